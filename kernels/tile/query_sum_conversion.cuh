// dQ of sums of dQᵀ (tile/query_sums.cuh) by the blocks that add them up, in the place of backward_dq_convert.cu: a block converts the tiles to which
// it adds last. With a causal mask alone those are the tiles of its own diagonal, about as many for each block, and they lie in L2.
#pragma once
#include "ptx/convert.cuh"
#include "tile/epilogue.cuh"
#include "tile/query_sums.cuh"
#include "tile/wgmma_backward_block.cuh"

constexpr bool CONVERTS_SUMS = Config::CONVERTS_SUMS;
static_assert(!CONVERTS_SUMS || (COMPUTE_DK && CAUSAL && !WINDOW && !PREFIX && !TILE_LISTS && !RAGGED), "another block may add last");

// Tiles of queries of a head to which the block adds last. All queries see the first key, so each tile is some block's.
DEVICE Steps converted_tiles(const BlockWork& work, const Visibility& visibility, int num_tiles, int seqlen_q) {
  const int next_kv = (work.tile + 1) * TILE_KV;
  const int begin = visibility.first_query(work.tile * TILE_KV) / TILE_Q;
  const int all = ceil_div(seqlen_q, TILE_Q);
  return {begin, work.tile + 1 < num_tiles ? min(all, visibility.first_query(next_kv) / TILE_Q) : all};
}

// Makes dQ of one tile. The warps of all warpgroups share out its squares of 16 columns of the head and 16 queries; all of their sums are asked for
// before the first is used.
DEVICE void convert_tile(const BackwardWgmmaArguments& arguments, int batch, int head, int tile) {
  constexpr int SQUARES = D_TILES / 2 * P_STEPS, OF_WARP = ceil_div(SQUARES, NUM_WARPS);
  const int warp = warp_index() - WARPGROUP_SIZE / WARP_SIZE, g = lane_index() / 4, t = lane_index() % 4;
  float sums[OF_WARP][2][4];
  const float* of_tile = query_sum(arguments, first_slot(arguments, batch, head, 0) + tile, 0, 0);
#pragma unroll
  for (int i = 0; i < OF_WARP; ++i)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int square = warp + i * NUM_WARPS;
      if (square < SQUARES) load_relaxed(of_tile + (square / P_STEPS * SUM_COLUMN_TILES + square % P_STEPS * 2 + n) * FRAGMENT_FLOATS, sums[i][n]);
    }
#pragma unroll
  for (int i = 0; i < OF_WARP; ++i) {
    const int square = warp + i * NUM_WARPS;
    if (square >= SQUARES) break;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int query = tile * TILE_Q + square % P_STEPS * 16 + 8 * n + g;
      Element* row = arguments.grad_query.row_pointer<Element>(batch, head) + query * arguments.grad_query.stride_seqlen;
      const float scale = arguments.geometry.scale;
      const float (&of_columns)[4] = sums[i][n];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32 pair = movmatrix_trans(pack<Element>(of_columns[2 * r] * scale, of_columns[2 * r + 1] * scale));
        const int column = square / P_STEPS * 16 + 8 * r + 2 * t;
        if (query < arguments.geometry.seqlen_q && column < HEAD_DIM) store_pair(row, column, arguments.grad_query, pair);
      }
    }
  }
}

// Makes dQ of all that the block has added to last. All threads of the warpgroups that compute call, behind a fence of each and a barrier of all that
// stand behind their additions.
DEVICE void convert_sums(const BackwardWgmmaArguments& arguments, const BlockWork& work) {
  for_each_member(arguments, work, [&](int batch, int head, const Geometry& geometry, const Visibility& visibility, const Steps&) {
    const Steps tiles = converted_tiles(work, visibility, geometry.num_tiles, geometry.seqlen_q);
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile) convert_tile(arguments, batch, head, tile);
  });
}
