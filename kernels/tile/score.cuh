// From products Q Kᵀ to scores in log2 units where they are more than scaled products:
//
//     score = [softcap tanh](scale q·k [/ softcap]) + mask - slope |query + shift - key|,        times log2(e)
//
// softcap: Gemma Team 2024 (arXiv 2408.00118). ALiBi: Press et al. 2022 (arXiv 2108.12409), around the diagonal of `causal_alignment`.
//
// An additive mask of -inf hides a key. Everything else is a finite score, however small: the most negative number of a type, a common stand-in for
// -inf, stays finite here (times log2(e) it would overflow), so that a row which has nothing else gives a softmax and no NaN.
#pragma once
#include "tile/features.cuh"
#include "tile/fragment.cuh"

constexpr float LOWEST = -3.402823466e38f;

// d score / d (scale q·k) = 1 - tanh², for each element of a tile; empty without softcap.
template <int M, int N>
struct ScoreSlope {
  float value[SOFTCAP ? M : 1][SOFTCAP ? N : 1][4];

  DEVICE void multiply(float (&dS)[M][N][4]) const {
    if constexpr (SOFTCAP) for_each_place<M, N>([&](int m, int n, int i, int, int) { dS[m][n][i] *= value[m][n][i]; });
  }
};

class ScoreModifier {  // of one batch and query head
 public:
  DEVICE ScoreModifier(const Geometry& geometry, const FeatureArguments& features, int batch, int head) : geometry(geometry), features(features) {
    if constexpr (ALIBI) slope_log2 = features.alibi_slopes.load(batch, head) * LOG2_E;
    if constexpr (ADDITIVE_MASK)
      mask = static_cast<const MaskElement*>(features.mask.data) + batch * features.mask.stride_batch + head * features.mask.stride_head;
  }

  // Products -> scores. Rows are queries from first_row on and columns keys from first_column on, or with TRANSPOSED the other way round.
  template <bool TRANSPOSED, int M, int N>
  DEVICE void apply(float (&S)[M][N][4], ScoreSlope<M, N>& slope, int first_row, int first_column) const {
    for_each_place<M, N>([&](int m, int n, int i, int row, int column) {
      const int query = TRANSPOSED ? first_column + column : first_row + row;
      const int key = TRANSPOSED ? first_row + row : first_column + column;
      float score = S[m][n][i] * features.score_factor;
      if constexpr (SOFTCAP) {
        const float t = tanhf(score);
        slope.value[m][n][i] = __fmaf_rn(-t, t, 1.0f);
        score = features.softcap_log2 * t;
      }
      if constexpr (ALIBI) score -= slope_log2 * float(abs(key - query - geometry.causal_offset));
      if constexpr (ADDITIVE_MASK) {
        const int q = min(query, geometry.seqlen_q - 1), k = min(key, geometry.seqlen_kv - 1);
        const float bias = mask_bias(mask[q * features.mask.stride_query + k * features.mask.stride_key]);
        score = lowest_if_below(score + lowest_if_below(bias * LOG2_E));
        if (bias == -infinity()) score = -infinity();
      }
      S[m][n][i] = score;
    });
  }

 private:
  const Geometry& geometry;
  const FeatureArguments& features;
  const MaskElement* mask = nullptr;
  float slope_log2 = 0.0f;

  DEVICE static float lowest_if_below(float x) { return x < LOWEST ? LOWEST : x; }  // keeps NaN
};
