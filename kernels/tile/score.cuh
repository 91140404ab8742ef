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
// -inf, stays finite here, so that a row which has nothing else gives a softmax and no NaN. Beside float32's most negative number a sum overflows
// only where a score is below -10^31.
#pragma once
#include "tile/features.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/small_scores.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"

constexpr bool SOFTCAP = Config::SOFTCAP;
constexpr bool QUICK_TANH = !SameType<Element, float>::value;  // 16-bit types
constexpr bool ALIBI = Config::ALIBI;
constexpr bool MODIFIES_SCORES = SOFTCAP || ALIBI || ADDITIVE_MASK;  // scores are more than scaled products

constexpr bool ONLY_ADDS_MASK = ADDITIVE_MASK && !SOFTCAP && !ALIBI;  // score and mask are one FMA of the product

constexpr bool ONLY_CAPS = SOFTCAP && QUICK_TANH && !ALIBI && !ADDITIVE_MASK;  // a score is softcap times tanh

constexpr float SCORE_UNIT = ADDITIVE_MASK ? 1.0f : LOG2_E;

// d score / d (scale q·k) = 1 - tanh², for each element of a tile; empty without softcap.
template <int M, int N>
struct ScoreDerivative {
  float value[SOFTCAP ? M : 1][SOFTCAP ? N : 1][4];

  DEVICE void multiply(float (&dS)[M][N][4]) const {
    if constexpr (SOFTCAP) for_each_place<M, N>([&](int m, int n, int i, int, int) { dS[m][n][i] *= value[m][n][i]; });
  }
};

// The additive mask of a tile of scores, read while the scores are computed as far as registers allow, else where it is added.
template <bool TRANSPOSED, int M, int N>
struct MaskAhead {
  static constexpr int REGISTERS = M * N * (TRANSPOSED ? 4 : MASK_BYTES);
  static constexpr bool USED = ADDITIVE_MASK && REGISTERS <= 32;
  MaskTile<TRANSPOSED, USED ? M : 1, USED ? N : 1> tile;
  bool is_there = false;
};

// Where nobody reads it ahead.
struct MaskNotAhead {
  static constexpr bool USED = false;
};

// tanh(x). Of 16-bit types it is 1 - 2 / (1 + e^2x), wrong by about 2^-22 at most, which is little beside a large one; with NEAR_0 small ones have
// three terms of the series.
template <bool NEAR_0>
DEVICE float tanh_of(float x) {
  if constexpr (!QUICK_TANH) return tanhf(x);
  const float far = __fmaf_rn(-2.0f, reciprocal(1.0f + ex2(x * (2.0f * LOG2_E))), 1.0f);
  if constexpr (!NEAR_0) return far;
  const float square = x * x, near = x * __fmaf_rn(square, __fmaf_rn(square, 2.0f / 15.0f, -1.0f / 3.0f), 1.0f);
  return fabsf(x) < 0.1f ? near : far;
}

// Whether a kernel may make capped scores of quotients (tile/capped_scores.cuh): with more columns of O it spills.
constexpr bool MAKES_QUOTIENTS = ONLY_CAPS && Config::HEAD_DIM_V <= 64;

// A product q·k -> its score but for a mask. NEAR_0 as in `tanh_of`.
template <bool NEAR_0 = true>
DEVICE float score_of(float product, int query, int key, float slope, const Geometry& geometry, const FeatureArguments& features, float& derivative) {
  float score = product * features.score_factor;
  if constexpr (SOFTCAP) {
    const float t = tanh_of<NEAR_0>(score);
    derivative = __fmaf_rn(-t, t, 1.0f);
    score = features.softcap * t;
  }
  if constexpr (ALIBI) score -= slope * float(abs(key - query - geometry.causal_offset));
  return score;
}

// Adds an element of an additive mask to a score, which is `factor` times what is there.
DEVICE void add_bias(float& score, float factor, float bias) { score = __fmaf_rn(score, factor, bias); }

// The same with 16 rows and 16 columns of a mask of 16 bits in shared memory and accumulator tiles n and n + 1; `address` is the lane's, as of
// `ldmatrix_x4`.
template <int N>
DEVICE void add_mask_square(float (&S)[N][4], int n, float factor, SmemAddress address) {
  uint32 pairs[4];
  ldmatrix_x4(pairs, address);
#pragma unroll
  for (int i = 0; i < 8; ++i) add_bias(S[n + i / 4][i % 4], factor, bias_of_bits(MaskBits(pairs[i / 2] >> (i % 2 * 16))));
}

// The same with a mask of 16 bits whose tile lies in shared memory, of which `row` is the first of 16.
template <typename Tile, int N>
DEVICE void add_copied_mask(float (&S)[1][N][4], float factor, SmemAddress tile, int row) {
  const int lane_offset = Tile::offset(row + lane_index() % 16, lane_index() / 16);
#pragma unroll
  for (int n = 0; n < N; n += 2) add_mask_square(S[0], n, factor, tile + Tile::at(lane_offset, n));
}

class ScoreModifier {  // of one batch and query head
 public:
  DEVICE ScoreModifier(const Geometry& geometry, const FeatureArguments& features, int batch, int head)
      : geometry(geometry), features(features), batch(batch), head(head) {
    if constexpr (ALIBI) slope = features.alibi_slopes.load(batch, head) * SCORE_UNIT;
  }

  // Products -> scores, in place, of which an exponent of 2 takes `factor` times. Rows are queries from first_row on and columns keys from
  // first_column on, or with TRANSPOSED the other way round. `ahead` is the mask if `read_mask` has read it.
  template <bool TRANSPOSED, int M, int N, typename Ahead = MaskAhead<TRANSPOSED, M, N>>
  DEVICE void apply(float (&S)[M][N][4], ScoreDerivative<M, N>& derivative, int first_row, int first_column, const Ahead& ahead = Ahead()) const {
    apply_all_but_mask<TRANSPOSED>(S, derivative, first_row, first_column);
    if constexpr (ADDITIVE_MASK) add_mask<TRANSPOSED>(S, first_row, first_column, ahead);
  }

  // `apply`, or with QUICKLY, where ONLY_CAPS, products -> tanh; an exponent then takes `factor_after<QUICKLY>`. `shares`: a NaN may make NaN of its
  // neighbours in a row.
  template <bool TRANSPOSED, bool QUICKLY, int M, int N, typename Ahead>
  DEVICE void apply_or_cap(float (&S)[M][N][4], ScoreDerivative<M, N>& derivative, int first_row, int first_column, const Ahead& ahead,
                           bool shares) const {
    if constexpr (QUICKLY) {
      to_tanh(S, derivative, shares);
    } else {
      apply<TRANSPOSED>(S, derivative, first_row, first_column, ahead);
    }
  }
  template <bool QUICKLY>
  DEVICE float factor_after() const {
    return QUICKLY ? features.softcap : signed_factor();
  }

  // Products -> tanh, of which a score is softcap times.
  template <int M, int N>
  DEVICE void to_tanh(float (&S)[M][N][4], ScoreDerivative<M, N>& derivative, bool shares) const {
    if (shares && features.softcap <= MOST_OF_FAR_TANH) {
#pragma unroll
      for (int m = 0; m < M; ++m) tanh_in_fours(S[m], derivative.value[m]);
    } else {
      for_each_place<M, N>([&](int m, int n, int i, int, int) {
        const float t = tanh_of<true>(S[m][n][i] * features.score_factor);
        S[m][n][i] = t;
        derivative.value[m][n][i] = __fmaf_rn(-t, t, 1.0f);
      });
    }
  }

  // Adding the mask then takes `factor_beside_mask`.
  template <bool TRANSPOSED, int M, int N>
  DEVICE void apply_all_but_mask(float (&S)[M][N][4], ScoreDerivative<M, N>& derivative, int first_row, int first_column) const {
    if constexpr (ONLY_ADDS_MASK) return;
    if (SOFTCAP && QUICK_TANH && features.softcap <= MOST_OF_FAR_TANH) {
      score_all<TRANSPOSED, false>(S, derivative, first_row, first_column);
    } else if constexpr (MODIFIES_SCORES) {
      score_all<TRANSPOSED, true>(S, derivative, first_row, first_column);
    }
  }

  // The same where nobody asks for derivatives.
  template <bool TRANSPOSED, int M, int N>
  DEVICE void apply(float (&S)[M][N][4], int first_row, int first_column) const {
    ScoreDerivative<M, N> unused;
    apply<TRANSPOSED>(S, unused, first_row, first_column, MaskNotAhead());
  }

  // The same where rows are queries, with fewer instructions, but for a mask. `shares`: a NaN may make NaN of other scores of its row.
  // `looks_for_small` spares a warp special functions whose scores are all far below the cap: for 16-bit types alone, and where nothing is hidden,
  // which would change bits of the others.
  template <int M, int N>
  DEVICE void apply_to_rows(float (&S)[M][N][4], int first_row, int first_column, bool shares, bool looks_for_small) const {
    if constexpr (!MODIFIES_SCORES || ONLY_ADDS_MASK) return;
    if constexpr (SOFTCAP) {
      const SmallScores<M> small(features);
      float largest[M][2];
      if (looks_for_small && small.are_all(S, largest, first_row, geometry.seqlen_q)) {
        for_each_place<M, N>([&](int m, int n, int i, int, int) { S[m][n][i] = small.score(S[m][n][i]); });
      } else if (QUICK_TANH && shares && features.softcap <= MOST_OF_FAR_TANH) {
#pragma unroll
        for (int m = 0; m < M; ++m) cap_in_fours(S[m]);
      } else {
        for_each_place<M, N>(
            [&](int m, int n, int i, int, int) { S[m][n][i] = features.softcap * tanh_of<true>(S[m][n][i] * features.score_factor); });
      }
    }
    const float distance = float(first_column + lane_index() % 4 * 2 - first_row - lane_index() / 4 - geometry.causal_offset);
    const float factor = SOFTCAP ? 1.0f : features.score_factor;
    for_each_place<M, N>([&](int m, int n, int i, int, int) {
      // Eight rows and eight columns further the distance is the same, so that the compiler has half as many to compute.
      const float penalty = ALIBI ? slope * fabsf(distance + float(8 * (n - i / 2 - 2 * m) + i % 2)) : 0.0f;
      S[m][n][i] = ALIBI ? __fmaf_rn(S[m][n][i], factor, -penalty) : S[m][n][i] * factor;
    });
  }

  // Whether capped scores may be made of quotients (tile/capped_scores.cuh).
  DEVICE bool caps_quotients() const { return features.softcap <= MOST_OF_FAR_TANH; }

  // Products -> E = 1 + e^2x, where a score is softcap tanh(x) = softcap - 2 softcap / E.
  template <int M, int N>
  DEVICE void to_quotients(float (&S)[M][N][4]) const {
    const float factor = features.score_factor * (2.0f * LOG2_E);
    for_each_place<M, N>([&](int m, int n, int i, int, int) { S[m][n][i] = 1.0f + ex2(S[m][n][i] * factor); });
  }

  template <bool TRANSPOSED, int M, int N>
  DEVICE void read_mask(MaskAhead<TRANSPOSED, M, N>& ahead, int first_row, int first_column) const {
    if constexpr (MaskAhead<TRANSPOSED, M, N>::USED) {
      const MaskValues mask(geometry, features.attn_mask, batch, head);
      const int limit = mask.limit<TRANSPOSED, M, N>(first_row, first_column);
      ahead.is_there = limit > 0;
      mask.read(ahead.tile, first_row, first_column, limit);
    }
  }

  // Adds an additive mask. `ahead` is the mask if `read_mask` has read it.
  template <bool TRANSPOSED, int M, int N, typename Ahead>
  DEVICE void add_mask(float (&S)[M][N][4], int first_row, int first_column, const Ahead& ahead) const {
    const MaskValues mask(geometry, features.attn_mask, batch, head);
    auto add = [&](int m, int n, int i, MaskElement element) { add_bias(S[m][n][i], factor_beside_mask(), mask_bias(element)); };
    int limit = 0;
    bool is_there = false;
    if constexpr (Ahead::USED) {
      is_there = ahead.is_there;
    } else {
      limit = mask.limit<TRANSPOSED, M, N>(first_row, first_column);
      is_there = limit > 0;
    }
    if (is_there) {
      if constexpr (Ahead::USED) {
        MaskValues::for_each(ahead.tile, add);
      } else {
        MaskTile<TRANSPOSED, M, N> tile;
        mask.read(tile, first_row, first_column, limit);
        MaskValues::for_each(tile, add);
      }
    } else {
      for_each_place<M, N>([&](int m, int n, int i, int row, int column) {
        const int query = TRANSPOSED ? first_column + column : first_row + row;
        const int key = TRANSPOSED ? first_row + row : first_column + column;
        add(m, n, i, mask.at(query, key));
      });
    }
  }

  // What turns what all but the mask has left into scores where the mask is added.
  DEVICE float factor_beside_mask() const { return ONLY_ADDS_MASK ? features.score_factor : 1.0f; }

  // What an exponent of 2 takes scores times. The forward pass looks for the largest score and puts the sign of scale elsewhere; backward kernels
  // look for none, so that their factor may carry it.
  DEVICE float factor() const { return MODIFIES_SCORES ? 1.0f : geometry.scale_log2; }
  DEVICE float signed_factor() const { return MODIFIES_SCORES ? 1.0f : geometry.scale_log2 * geometry.score_sign; }

 private:
  template <bool TRANSPOSED, bool NEAR_0, int M, int N>
  DEVICE void score_all(float (&S)[M][N][4], ScoreDerivative<M, N>& derivative, int first_row, int first_column) const {
    for_each_place<M, N>([&](int m, int n, int i, int row, int column) {
      const int query = TRANSPOSED ? first_column + column : first_row + row;
      const int key = TRANSPOSED ? first_row + row : first_column + column;
      float& of_score = derivative.value[SOFTCAP ? m : 0][SOFTCAP ? n : 0][i];
      S[m][n][i] = score_of<NEAR_0>(S[m][n][i], query, key, slope, geometry, features, of_score);
    });
  }

  // 1 + e^2x of four neighbours of a row. Exponentials are held below 2^30, where tanh is 1, so that the product of four is finite.
  template <int N>
  DEVICE static void sums_of_four(const float (&S)[N][4], int n, int r, float factor, float (&sum)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = 1.0f + ex2(min_nan(S[n + i / 2][2 * r + i % 2] * factor, 30.0f));
  }

  // softcap tanh(x) = softcap (1 - 2 / (1 + e^2x)), where four neighbours of a row share a division: 1 / a = b / (a b).
  template <int N>
  DEVICE void cap_in_fours(float (&S)[N][4]) const {
    const float factor = features.score_factor * (2.0f * LOG2_E), cap = features.softcap;
#pragma unroll
    for (int n = 0; n < N; n += 2)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum[4];
        sums_of_four(S, n, r, factor, sum);
        const float low = sum[0] * sum[1], high = sum[2] * sum[3], inverse = -2.0f * cap * reciprocal(low * high);
        const float of_low = inverse * high, of_high = inverse * low;
        S[n][2 * r] = __fmaf_rn(of_low, sum[1], cap);
        S[n][2 * r + 1] = __fmaf_rn(of_low, sum[0], cap);
        S[n + 1][2 * r] = __fmaf_rn(of_high, sum[3], cap);
        S[n + 1][2 * r + 1] = __fmaf_rn(of_high, sum[2], cap);
      }
  }

  // tanh(x) = 1 - 2 / (1 + e^2x) likewise, and 1 - tanh^2.
  template <int N>
  DEVICE void tanh_in_fours(float (&S)[N][4], float (&derivative)[N][4]) const {
    const float factor = features.score_factor * (2.0f * LOG2_E);
#pragma unroll
    for (int n = 0; n < N; n += 2)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum[4];
        sums_of_four(S, n, r, factor, sum);
        const float low = sum[0] * sum[1], high = sum[2] * sum[3], inverse = -2.0f * reciprocal(low * high);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float t = __fmaf_rn(inverse * (i < 2 ? high : low), sum[i ^ 1], 1.0f);
          S[n + i / 2][2 * r + i % 2] = t;
          derivative[n + i / 2][2 * r + i % 2] = __fmaf_rn(-t, t, 1.0f);
        }
      }
  }

  const Geometry& geometry;
  const FeatureArguments& features;
  int batch, head;
  float slope = 0.0f;
};
