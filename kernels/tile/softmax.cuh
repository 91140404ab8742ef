// Online softmax over the key tiles of a query tile: Milakov and Gimelshein 2018 (arXiv 1805.02867); Dao et al. 2022 (arXiv 2205.14135), algorithm 1.
//
// Everything is in log2 units: p = 2^(S scale_log2 - reference), one FMA and one ex2 per score. The reference of a row is its running maximum
// times scale_log2, rounded down; since every use takes the same rounded number, the rounding cancels in the normalisation. It also is
// at most one unit in the last place below the exact product, so exponents are below 2^-24 |reference|: only where |reference| passes 2^24 can
// they become large, and there they are clamped to 0 (scores of 1e5 in bfloat16 stay finite).
//
// With NATURAL scores are no log2 units and there is no scale_log2: p = 2^((S - reference) log2(e)), where the reference is the running maximum
// itself. The difference of huge numbers is exact, and never above 0.
//
// A masked score is -inf, never a large finite number. A row that has seen no key keeps reference = -inf, sum = 0 and O = 0.
#pragma once
#include "ptx/math.cuh"
#include "ptx/warp.cuh"

constexpr float EXACT_REFERENCE_LIMIT = 16777216.0f;  // 2^24

// min(x, 0) that keeps NaN.
DEVICE float clamp_exponent(float x) { return x > 0.0f ? 0.0f : x; }

template <int M, bool NATURAL = false>
struct OnlineSoftmax {
  float reference[M][2];  // rows g and g + 8 of each 16-row tile
  float sum[M][2];  // this lane's columns only, until `finish`

  DEVICE OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        reference[m][r] = -infinity();
        sum[m][r] = 0.0f;
      }
  }

  // Turns scores S into probabilities relative to the new reference and rescales O to it.
  template <int N, int N_O>
  DEVICE void update(float (&S)[M][N][4], float (&O)[M][N_O][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float row_max = -infinity();
#pragma unroll
        for (int n = 0; n < N; ++n) row_max = fmaxf(row_max, fmaxf(S[m][n][2 * r], S[m][n][2 * r + 1]));
        const float previous = reference[m][r];
        if constexpr (NATURAL) {
          reference[m][r] = fmaxf(previous, quad_max(row_max));
        } else {
          reference[m][r] = fmaxf(previous, mul_rm(quad_max(row_max), scale_log2));
        }
        const float used = reference[m][r] == -infinity() ? 0.0f : reference[m][r];

        const float rescale = ex2(in_log2(previous - used));
        sum[m][r] *= rescale;
#pragma unroll
        for (int n = 0; n < N_O; ++n) {
          O[m][n][2 * r] *= rescale;
          O[m][n][2 * r + 1] *= rescale;
        }

        float factor = scale_log2, offset = used;
        if (!NATURAL && fabsf(used) > EXACT_REFERENCE_LIMIT) {
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) S[m][n][i] = clamp_exponent(__fmaf_rn(S[m][n][i], scale_log2, -used));
          factor = 1.0f;
          offset = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            S[m][n][i] = ex2(NATURAL ? in_log2(S[m][n][i] - used) : __fmaf_rn(S[m][n][i], factor, -offset));
            sum[m][r] += S[m][n][i];
          }
      }
    }
  }

  // A logit in the denominator alone, without a key or a value: the sum of each row grows by exp(sink) (Xiao et al. 2024, arXiv 2309.17453). The
  // logit is in units of the scores.
  template <int N_O>
  DEVICE void add_sink(float (&O)[M][N_O][4], float sink) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float previous = reference[m][r];
        reference[m][r] = fmaxf(previous, sink);
        const float used = reference[m][r] == -infinity() ? 0.0f : reference[m][r];
        const float rescale = ex2(in_log2(previous - used));
        sum[m][r] *= rescale;
        if (lane_index() % 4 == 0) sum[m][r] += ex2(in_log2(sink - used));  // once per row: `finish` adds up the lanes of a quad
#pragma unroll
        for (int n = 0; n < N_O; ++n) {
          O[m][n][2 * r] *= rescale;
          O[m][n][2 * r + 1] *= rescale;
        }
      }
  }

  // Normalises O and turns `reference` into the natural-log LSE of each row.
  template <int N_O>
  DEVICE void finish(float (&O)[M][N_O][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float total = quad_sum(sum[m][r]);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
        for (int n = 0; n < N_O; ++n) {
          O[m][n][2 * r] *= inverse;
          O[m][n][2 * r + 1] *= inverse;
        }
        if constexpr (NATURAL) {
          reference[m][r] = __fmaf_rn(lg2(total), LN_2, reference[m][r]);
        } else {
          reference[m][r] = (reference[m][r] + lg2(total)) * LN_2;
        }
      }
  }

 private:
  DEVICE static float in_log2(float difference) { return NATURAL ? difference * LOG2_E : difference; }
};
