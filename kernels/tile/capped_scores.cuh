// Capped scores as quotients: the online softmax of tiles that have E = 1 + e^2x in the place of scores.
//
// cap tanh(x) = cap - 2 cap / E grows with E, so the largest score of a row is that of its largest E, and an exponent is one FMA of a quotient:
//
//     p = 2^((cap - reference) - 2 cap / E)
//
// Four neighbours of a row share a division: 1 / a = b / (a b).
#pragma once
#include "ptx/math.cuh"
#include "tile/fragment.cuh"

template <int M>
class CappedScores {  // of a warp's rows; `cap` in log2 units
 public:
  static constexpr bool USED = true;

  DEVICE explicit CappedScores(float cap) : cap(cap) {}

  // Whether a row's largest E is above what its reference allows, or `hold`.
  DEVICE bool asks(float highest, int m, int r) const { return highest > limit[m][r]; }

  // The reference of a row now allows scores up to `most`.
  DEVICE void allow(float most, int m, int r) { limit[m][r] = most < cap ? fminf(2.0f * cap / (cap - most), MOST) : MOST; }

  // Holds E where the product of four is finite.
  template <int N>
  DEVICE void hold(float (&E)[M][N][4], float (&highest)[M][2]) const {
    for_each_place<M, N>([&](int m, int n, int i, int, int) { E[m][n][i] = min_nan(E[m][n][i], MOST); });
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) highest[m][r] = fminf(highest[m][r], MOST);
  }

  DEVICE float score(float E) const { return __fmaf_rn(-2.0f * cap, reciprocal(E), cap); }

  // E -> scores less the references of their rows.
  template <int N>
  DEVICE void subtract(float (&E)[N][4], const float (&reference)[2]) const {
#pragma unroll
    for (int n = 0; n < N; n += 2)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float four[4] = {E[n][2 * r], E[n][2 * r + 1], E[n + 1][2 * r], E[n + 1][2 * r + 1]};
        const float low = four[0] * four[1], high = four[2] * four[3], inverse = -2.0f * cap * reciprocal(low * high), highest = cap - reference[r];
        const float of_low = inverse * high, of_high = inverse * low;
        E[n][2 * r] = __fmaf_rn(of_low, four[1], highest);
        E[n][2 * r + 1] = __fmaf_rn(of_low, four[0], highest);
        E[n + 1][2 * r] = __fmaf_rn(of_high, four[3], highest);
        E[n + 1][2 * r + 1] = __fmaf_rn(of_high, four[2], highest);
      }
  }

 private:
  static constexpr float MOST = 1073741824.0f;  // 2^30, of which tanh is 1

  float cap;
  float limit[M][2] = {};  // of a row's E
};
