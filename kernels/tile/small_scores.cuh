// Capped scores that are all far below their cap, without a special function:
//
//     tanh(x) = x (c0 + c1 x^2 + c2 x^4 + c3 x^6), wrong by 2^-22 at most, for |x| up to a half: a polynomial of least largest error.
//
// An exponent is one FMA of it. A score is no larger than that of the row's largest product without its sign, which has to be known anyway, so that
// the online softmax looks for the largest score only where that one would raise a reference.
#pragma once
#include "ptx/math.cuh"
#include "ptx/warp.cuh"
#include "tile/features.cuh"
#include "tile/fragment.cuh"

// Largest cap, in units of the scores, of which tanh may be wrong by 2^-22 however small it is.
constexpr float MOST_OF_FAR_TANH = 128.0f;

constexpr float MOST_OF_SMALL_TANH = 0.5f;
constexpr float SMALL_TANH[4] = {0.99999768f, -0.33320655f, 0.13145146f, -0.04337248f};

template <int M>
class SmallScores {
 public:
  DEVICE explicit SmallScores(const FeatureArguments& features) : factor(fabsf(features.score_factor)) {
    const float square = factor * factor;
    float power = features.softcap * features.score_factor;
#pragma unroll
    for (int i = 0; i < 4; ++i, power *= square) coefficient[i] = SMALL_TANH[i] * power;
    // The powers of the factor stay far from both ends of a float.
    fits = features.softcap <= MOST_OF_FAR_TANH && factor >= 1.0f / 4096.0f && factor <= 4096.0f;
  }

  // Whether the polynomial is right for all products of the warp, but those of rows that are not the sequence's; `largest` of each row of the lane's
  // products, without their signs.
  template <int N>
  DEVICE bool are_all(const float (&S)[M][N][4], float (&largest)[M][2], int first_row, int seqlen_q) const {
    float most = 0.0f;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        largest[m][r] = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) largest[m][r] = fmaxf(largest[m][r], fmaxf(fabsf(S[m][n][2 * r]), fabsf(S[m][n][2 * r + 1])));
        most = fmaxf(most, first_row + 16 * m + 8 * r + lane_index() / 4 < seqlen_q ? largest[m][r] : 0.0f);
      }
    return !any_lane(!(most * factor <= (fits ? MOST_OF_SMALL_TANH : -1.0f)));
  }

  DEVICE float score(float product) const { return product * slope(product * product); }
  DEVICE float score_less(float product, float offset) const { return __fmaf_rn(product, slope(product * product), -offset); }

 private:
  float coefficient[4];
  float factor;
  bool fits;

  DEVICE float slope(float square) const {
    return __fmaf_rn(__fmaf_rn(__fmaf_rn(coefficient[3], square, coefficient[2]), square, coefficient[1]), square, coefficient[0]);
  }
};
