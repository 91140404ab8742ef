// How the warps of a block that computes dQ by `mma` share out a tile of it, and add their parts to its sums (tile/query_sums.cuh).
#pragma once
#include "tile/query_sums.cuh"

// Of the tile a warp has 32 rows, or 16, and every COLUMN_GROUPS-th pair of accumulator tiles.
constexpr int column_groups(int rows) {
  if (TILE_Q % rows != 0 || NUM_WARPS % (TILE_Q / rows) != 0) return 0;
  const int groups = NUM_WARPS / (TILE_Q / rows);
  return D_TILES / 2 % groups == 0 && (groups & (groups - 1)) == 0 ? groups : 0;
}
constexpr int QUERY_ROWS = column_groups(32) != 0 ? 32 : 16;
constexpr int COLUMN_GROUPS = column_groups(QUERY_ROWS);
static_assert(COLUMN_GROUPS != 0, "the warps cannot share out the tile of dQ");

// Adds a warp's part of dQ to the tile's sums, or stores it if it is the first.
template <int M, int N>
DEVICE void add_to_sums(const float (&dQ)[M][N][4], const BackwardArguments& arguments, int slot, bool is_first) {
  const int row_tile = warp_index() / COLUMN_GROUPS * M, first_pair = warp_index() % COLUMN_GROUPS;
  float* sums = query_sum(arguments, slot, row_tile, 2 * first_pair);
  auto for_each_fragment = [&](const auto& body) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) body(sums + (m * D_TILES + n / 2 * 2 * COLUMN_GROUPS + n % 2) * FRAGMENT_FLOATS, dQ[m][n]);
  };
  if (is_first) {
    for_each_fragment([](float* sum, const float (&c)[4]) { store_fragment(sum, c); });
  } else {
    for_each_fragment([](float* sum, const float (&c)[4]) { add_fragment(sum, c); });
  }
}
