// The products of a step, whether a slice of the head is in shared memory or passes through it piece by piece.
#pragma once
#include "tile/constants.cuh"
#include "tile/gemm.cuh"
#include "tile/pipeline.cuh"
#include "tile/slices.cuh"

// For each piece of this group's slice: copies by `load(piece)`, then work on them by `multiply(piece)`. A slice that is one piece is there already.
// Recursive, since accumulators that a loop variable chooses would live in local memory.
template <int PIECE = 0, typename Load, typename Multiply>
DEVICE void for_each_piece(const Load& load, const Multiply& multiply) {
  if constexpr (SLICE_PIECES > 1) {
    __syncthreads();  // every warp is done with the pieces before
    load(PIECE);
    cp_async_commit_group();
    wait_for_tiles<0>();
  }
  multiply(PIECE);
  if constexpr (PIECE + 1 < SLICE_PIECES) for_each_piece<PIECE + 1>(load, multiply);
}

// c += A Bᵀ over this group's slice of the head. The rows of c are the warp's rows of A, from warp_row on. Groups exchange their parts afterwards.
template <typename TileA, typename TileB, int DIM, int M, int N>
DEVICE void multiply_rows(float (&c)[M][N][4], const SliceTile<TileA, DIM>& a, int warp_row, const SliceTile<TileB, DIM>& b) {
  for_each_piece(
      [&](int piece) {
        a.load(piece);
        b.load(piece);
      },
      [&](int) { gemm_rows<Mma, TileA::COLUMNS>(c, Mma::OperandA<TileA>(a.smem, warp_row), Mma::OperandB<TileB>(b.smem)); });
}

// c += P B, P in accumulators, for the columns of this group's slice.
template <typename Multiply = Mma, typename TileB, int DIM, int M, int N_C, int N_P>
DEVICE void multiply_accumulator(float (&c)[M][N_C][4], const float (&p)[M][N_P][4], const SliceTile<TileB, DIM>& b) {
  for_each_piece(
      [&](int piece) { b.load(piece); },
      [&](int piece) { gemm_accumulator<Multiply, TileB::COLUMNS>(c, p, Mma::OperandBByRows<TileB>(b.smem), piece * TileB::COLUMNS / 8); });
}
