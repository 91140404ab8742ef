// From products Q Kᵀ to scores where they are more than scaled products:
//
//     score = [softcap tanh](scale q·k [/ softcap]) + mask - slope |query + shift - key|
//
// in log2 units, that is times log2(e), or with an additive mask as it stands: times log2(e) the most negative number of a type would overflow, and
// every large number would be rounded once more.
//
// softcap: Gemma Team 2024 (arXiv 2408.00118). ALiBi: Press et al. 2022 (arXiv 2108.12409), around the diagonal of `causal_alignment`.
//
// An additive mask of -inf hides a key. Everything else is a finite score, however small: the most negative number of a type, a common stand-in for
// -inf, stays finite here, so that a row which has nothing else gives a softmax and no NaN.
#pragma once
#include "tile/features.cuh"
#include "tile/fragment.cuh"

constexpr bool SOFTCAP = Config::SOFTCAP;
constexpr bool ALIBI = Config::ALIBI;
constexpr bool MODIFIES_SCORES = SOFTCAP || ALIBI || ADDITIVE_MASK;  // scores are more than scaled products

constexpr float SCORE_UNIT = ADDITIVE_MASK ? 1.0f : LOG2_E;

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
    if constexpr (ALIBI) slope = features.alibi_slopes.load(batch, head) * SCORE_UNIT;
    if constexpr (ADDITIVE_MASK)
      mask =
          static_cast<const MaskElement*>(features.attn_mask.data) + batch * features.attn_mask.stride_batch + head * features.attn_mask.stride_head;
  }

  // Products -> scores, in place, of which an exponent of 2 takes `factor` times. Rows are queries from first_row on and columns keys from
  // first_column on, or with TRANSPOSED the other way round.
  template <bool TRANSPOSED, int M, int N>
  DEVICE void apply(float (&S)[M][N][4], ScoreSlope<M, N>& derivative, int first_row, int first_column) const {
    if constexpr (MODIFIES_SCORES) {
      for_each_place<M, N>([&](int m, int n, int i, int row, int column) {
        const int query = TRANSPOSED ? first_column + column : first_row + row;
        const int key = TRANSPOSED ? first_row + row : first_column + column;
        S[m][n][i] = score(S[m][n][i], query, key, derivative.value[SOFTCAP ? m : 0][SOFTCAP ? n : 0][i]);
      });
    } else {
      if (geometry.score_sign != 1.0f) multiply_all(S, geometry.score_sign);
    }
  }

  DEVICE float factor() const { return MODIFIES_SCORES ? 1.0f : geometry.scale_log2; }

 private:
  DEVICE float score(float product, int query, int key, float& derivative) const {
    float score = product * features.score_factor;
    if constexpr (SOFTCAP) {
      const float t = tanhf(score);
      derivative = __fmaf_rn(-t, t, 1.0f);
      score = features.softcap * t;
    }
    if constexpr (ALIBI) score -= slope * float(abs(key - query - geometry.causal_offset));
    if constexpr (ADDITIVE_MASK) {
      const int q = min(query, geometry.seqlen_q - 1), k = min(key, geometry.seqlen_kv - 1);
      const float bias = mask_bias(mask[q * features.attn_mask.stride_query + k * features.attn_mask.stride_key]);
      const float lowest = fminf(bias, LOWEST);  // -inf where the mask is
      score += bias;
      if (score < lowest) score = lowest;  // NaN stays NaN
    }
    return score;
  }

  const Geometry& geometry;
  const FeatureArguments& features;
  const MaskElement* mask = nullptr;
  float slope = 0.0f;
};
