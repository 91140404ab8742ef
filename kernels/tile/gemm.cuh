// Warp-level products of tiles. A warp owns 16 M rows of the result; c[m][n] is an m16n8 accumulator tile.
#pragma once
#include "tile/fragment.cuh"
#include "tile/operand.cuh"

// c += A Bᵀ over the head dimension: both operands are rows of tiles in shared memory. Few depth steps are straight code, and eight where each has
// few products, which alone would wait for their fragments. Of more of them unrolled the assembler fetches fragments so far ahead that accumulators
// spill (docs/log-forward.md), unless the caller knows that there is room (STRAIGHT). Short sums are one depth step long; of 16 rows, two steps are
// unrolled, whose products do not wait for each other.
template <typename Mma, int COLUMNS, bool STRAIGHT = false, int M, int N, typename OperandA, typename OperandB>
DEVICE void gemm_rows(float (&c)[M][N][4], const OperandA& operand_a, const OperandB& operand_b) {
  constexpr int K_STEPS = COLUMNS / Mma::K;
  constexpr int UNROLL = Mma::SHORT_SUMS && M == 1 ? 2 : Mma::UNROLL > 1 && (STRAIGHT || K_STEPS <= 8) ? K_STEPS : Mma::UNROLL;
#pragma unroll(UNROLL)
  for (int k = 0; k < K_STEPS; ++k) {
    typename Mma::A a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = operand_a.load(16 * m, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      typename Mma::B b[2];
      operand_b.load(b, 8 * n, k);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (Mma::SHORT_SUMS) {
            float sum[4] = {};
            Mma::multiply(sum, a[m], b[i]);
            add(c[m][n + i], sum);
          } else {
            Mma::multiply(c[m][n + i], a[m], b[i]);
          }
        }
    }
  }
}

// c += P B: P in accumulator form, N_P tiles of 8 columns; B has its rows as depth and COLUMNS columns, those of c from tile `first` on. Short sums
// are one tile long.
template <typename Mma, int COLUMNS, int M, int N_C, int N_P, typename OperandB>
DEVICE void gemm_accumulator(float (&c)[M][N_C][4], const float (&p)[M][N_P][4], const OperandB& operand_b, int first = 0) {
  constexpr int N = COLUMNS / 8;
  constexpr int K_STEPS = 8 * N_P / Mma::K;
  if constexpr (Mma::SHORT_SUMS) {
    typename Mma::A a[M][K_STEPS];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) a[m][k] = Mma::from_accumulator(p[m], k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      float sum[M][2][4] = {};
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) {
        typename Mma::B b[2];
        operand_b.load(b, k, n / 2);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) Mma::multiply(sum[m][i], a[m][k], b[i]);
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) add(c[m][first + n + i], sum[m][i]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      typename Mma::A a[M];
#pragma unroll
      for (int m = 0; m < M; ++m) a[m] = Mma::from_accumulator(p[m], k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        typename Mma::B b[2];
        operand_b.load(b, k, n / 2);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) Mma::multiply(c[m][first + n + i], a[m], b[i]);
      }
    }
  }
}

// One depth step of c += A B, where B has its rows as depth, and every STRIDE-th pair of eight columns.
template <typename Mma, int STRIDE, int M, int N, typename OperandB>
DEVICE void multiply_by_rows(float (&c)[M][N][4], const typename Mma::A (&a)[M], const OperandB& operand_b, int k) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    typename Mma::B b[2];
    operand_b.load(b, k, n / 2 * STRIDE);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) Mma::multiply(c[m][n + i], a[m], b[i]);
  }
}

// c += Aᵀ B: both operands have their rows as depth, of which there are DEPTH. A has columns 16 m, B every STRIDE-th pair of eight columns.
template <typename Mma, int DEPTH, int STRIDE, int M, int N, typename OperandA, typename OperandB>
DEVICE void gemm_columns(float (&c)[M][N][4], const OperandA& operand_a, const OperandB& operand_b) {
#pragma unroll
  for (int k = 0; k < DEPTH / Mma::K; ++k) {
    typename Mma::A a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = operand_a.load(k, 2 * m);
    multiply_by_rows<Mma, STRIDE>(c, a, operand_b, k);
  }
}

// c += A B: A has its columns as depth, of which there are DEPTH, B its rows. B has every STRIDE-th pair of eight columns.
template <typename Mma, int DEPTH, int STRIDE, int M, int N, typename OperandA, typename OperandB>
DEVICE void gemm_by_rows(float (&c)[M][N][4], const OperandA& operand_a, const OperandB& operand_b) {
#pragma unroll
  for (int k = 0; k < DEPTH / Mma::K; ++k) {
    typename Mma::A a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = operand_a.load(16 * m, k);
    multiply_by_rows<Mma, STRIDE>(c, a, operand_b, k);
  }
}
