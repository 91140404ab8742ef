// Wide heads: the columns of a head shared out among groups of warps.
//
// Accumulators of more than 256 columns do not fit the registers of the warps that own their rows. A wide head is therefore cut into HEAD_SLICES
// slices of columns. Each slice of Q, K, V and dO, and the same slice of every output, belongs to a group of ROW_WARPS warps with a region of shared
// memory of its own, as if it were a narrow head. What runs along the head, S and dP, each group knows only its part of: the groups exchange
// their parts through shared memory and add them up in the same order, so that all go on with the same bits. Only exponentials are computed more
// than once.
//
// Where one piece of each operand and slice still does not fit the shared memory, a slice is cut into SLICE_PIECES pieces that pass through it one
// after another. Nothing stays there then: an operand is read again for every tile.
//
// With one slice of one piece, everything in this file is nothing.
#pragma once
#include "tile/constants.cuh"
#include "tile/load.cuh"
#include "tile/pipeline.cuh"

DEVICE int slice_index() { return HEAD_SLICES == 1 ? 0 : warp_index() / ROW_WARPS; }

// The place of a warp among those that share out the rows.
DEVICE int row_warp_index() { return HEAD_SLICES == 1 ? warp_index() : warp_index() % ROW_WARPS; }

// The column of the head at which a piece of this group's slice starts.
template <typename Tile>
DEVICE int first_column(int piece) {
  return HEAD_SLICES == 1 ? 0 : (slice_index() * SLICE_PIECES + piece) * Tile::COLUMNS;
}

// Copies this group's pieces of a tile; DIM is the whole head dimension of the array.
template <typename Tile, int DIM, bool STAGE = false>
using SliceLoader = TileLoader<Tile, Element, SLICE_THREADS, STAGE && SLICE_PIECES == 1, HEAD_SLICES == 1 ? 0 : DIM>;

// Rows of (batch, head) of an array, of which this group takes its slice. They count from `start`, and end at num_rows.
//
// A loader that lives through a walk is the kernel's own; everything else makes one where it copies: a TileLoader that a lambda refers to, even in
// vain, is compiled to other code.
template <typename Tile, int DIM>
struct SliceRows {
  const TensorView& view;
  int batch, head, num_rows, start;

  template <bool STAGE = false>
  DEVICE SliceLoader<Tile, DIM, STAGE> loader() const {
    return {view, batch, head, num_rows, start};
  }
};

// The rows from first_row on that a tile in shared memory holds: a piece of them at a time.
template <typename Tile, int DIM>
struct SliceTile {
  SmemAddress smem;
  int first_row;
  const SliceRows<Tile, DIM>& rows;

  DEVICE void load(int piece) const { rows.loader().issue(smem, first_row, first_column<Tile>(piece)); }
};

// Bytes in which the groups exchange M x N accumulator tiles per warp.
template <int M, int N>
constexpr int EXCHANGE_BYTES = HEAD_SLICES == 1 ? 0 : NUM_THREADS * M * N * 16;

// Puts this group's part of a product along the head where the others find it, after the next barrier of the block.
template <int M, int N>
DEVICE void publish(const float (&c)[M][N][4], SmemAddress exchange) {
  if constexpr (HEAD_SLICES > 1) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
        store_shared(exchange + (m * N + n) * (NUM_THREADS * 16) + int(threadIdx.x) * 16,
                     make_float4(c[m][n][0], c[m][n][1], c[m][n][2], c[m][n][3]));
  }
}

// The sum of all groups' parts.
template <int M, int N>
DEVICE void collect(float (&c)[M][N][4], SmemAddress exchange) {
  if constexpr (HEAD_SLICES > 1) {
    const int thread = int(threadIdx.x) % SLICE_THREADS;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const SmemAddress parts = exchange + (m * N + n) * (NUM_THREADS * 16) + thread * 16;
        float4 sum = load_shared_f32x4(parts);
#pragma unroll
        for (int slice = 1; slice < HEAD_SLICES; ++slice) {
          const float4 part = load_shared_f32x4(parts + slice * (SLICE_THREADS * 16));
          sum.x += part.x;
          sum.y += part.y;
          sum.z += part.z;
          sum.w += part.w;
        }
        c[m][n][0] = sum.x;
        c[m][n][1] = sum.y;
        c[m][n][2] = sum.z;
        c[m][n][3] = sum.w;
      }
  }
}

template <int M, int N>
DEVICE void publish_and_collect(float (&c)[M][N][4], SmemAddress exchange) {
  if constexpr (HEAD_SLICES > 1) {
    publish(c, exchange);
    __syncthreads();
    collect(c, exchange);
  }
}
