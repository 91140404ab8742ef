// A warp's accumulators: walks over their elements, and arithmetic on all of them.
#pragma once
#include "ptx/warp.cuh"

// body(row, column, value): rows and columns count from the warp's first row and the tile's first column.
template <int M, int N, typename Body>
DEVICE void for_each_element(float (&c)[M][N][4], Body body) {
  const int lane_row = lane_index() / 4;
  const int lane_column = lane_index() % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(16 * m + lane_row + i / 2 * 8, 8 * n + lane_column + i % 2, c[m][n][i]);
}

// body(m, n, i, row, column): every place of accumulators c[m][n][i], rows and columns as above.
template <int M, int N, typename Body>
DEVICE void for_each_place(Body body) {
  const int lane_row = lane_index() / 4;
  const int lane_column = lane_index() % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(m, n, i, 16 * m + lane_row + i / 2 * 8, 8 * n + lane_column + i % 2);
}

template <int M, int N>
DEVICE void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
}

DEVICE void add(float (&c)[4], const float (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
}

template <int M, int N>
DEVICE void multiply_all(float (&c)[M][N][4], float factor) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] *= factor;
}

template <int M, int N>
DEVICE void multiply_all(float (&c)[M][N][4], const float (&factors)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] *= factors[m][n][i];
}
