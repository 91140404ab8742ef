// Online softmax over the key tiles of a query tile: Milakov and Gimelshein 2018 (arXiv 1805.02867); Dao et al. 2022 (arXiv 2205.14135), algorithm 1.
//
// Everything is in log2 units: p = 2^(S scale_log2 - reference), one FMA and one ex2 per score. The reference of a row is the maximum of its first
// scores times scale_log2, less SHIFT, rounded down; since every use takes the same rounded number, the rounding cancels in the normalisation. It
// rises to the running maximum where that has come to lie more than SLACK above it, and O is multiplied only then: most tiles raise no reference.
// Exponents are below SHIFT + SLACK + 2^-23 |reference|, which is much more only where |reference| passes 2^22. Rows where it does are coarse, and
// their exponents are clamped to SHIFT + 1 (scores of 1e5 in bfloat16 stay finite), which those that are right pass only where |reference| is above
// 2^24. Both are done where a warp finds a row that asks for it, so that other tiles have neither multiplications of O nor a clamp.
//
// With NATURAL scores are no log2 units and there is no scale_log2: p = 2^(S log2(e) - (reference log2(e) - SHIFT)), where the reference is the
// running maximum itself, or lies at most SLACK in log2 units below it, but for the rounding of huge scores. That is one FMA too, off by as much as
// lse is rounded. Rows are coarse here where |reference| passes 2^7: p = 2^((S - reference) log2(e) + SHIFT), and the difference of huge numbers is
// exact. With EXACT, in float32, all rows take it: else keys of an earlier reference are weighed 5e-6 off beside the others, which 16 bits never
// show.
//
// SHIFT scales all probabilities of a row by 2^SHIFT, and so its sum and O, which the normalisation takes out again: room for small ones in the type
// that P is rounded to.
//
// Probabilities of a tile are added up by themselves, in pairs, and then to the row's sum, whose rounding errors are carried along (Kahan 1965, doi
// 10.1145/363707.363723): a key that outweighs all others by 2^24 does not swallow what any number of tiles adds to it.
//
// A masked score is -inf, never a large finite number. A row that has seen no key keeps the lowest reference, sum = 0 and O = 0.
#pragma once
#include "ptx/math.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/fragment.cuh"

// SHIFT where P is rounded to Element: float16 ends at 2^-24, and has room up to 65504. More than 7 would round the exponents of the largest
// probabilities, and with them lse, more coarsely.
template <typename Element>
constexpr int SHIFT_OF = SameType<Element, float16>::value ? 7 : 0;

// SLACK where it is. In 16 bits exponents stay below 8 at any rate; in float32 the largest one stays 0, whose rounding would show in lse.
template <typename Element>
constexpr int SLACK_OF = SameType<Element, float>::value ? 0
                         : SHIFT_OF<Element> == 0        ? 7
                                                         : 1;

// EXACT where O has that type.
template <typename Element>
constexpr bool EXACT_OF = SameType<Element, float>::value;

constexpr float EXACT_REFERENCE_LIMIT = 4194304.0f;  // 2^22
constexpr float EXACT_NATURAL_LIMIT = 128.0f;

// What a tile may hold in the place of scores: nothing, or what tile/capped_scores.cuh says.
struct OnlyScores {
  static constexpr bool USED = false;
};

template <int M, bool NATURAL = false, int SHIFT = 0, int SLACK = 0, bool EXACT = false>  // EXACT says something with NATURAL alone
struct OnlineSoftmax {
  static constexpr bool SUBTRACTS = NATURAL && EXACT;  // the reference from all scores, and no row is coarse

  float reference[M][2];  // rows g and g + 8 of each 16-row tile
  float sum[M][2];  // this lane's columns only, until `finish`
  float rest[M][2];  // what rounding has left out of `sum`

  DEVICE OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        reference[m][r] = LOWEST;  // and not -inf: no difference from it is NaN
        sum[m][r] = 0.0f;
        rest[m][r] = 0.0f;
      }
  }

  // Turns scores S into probabilities relative to the reference. The branch is that of a warp, and stands where all scores have to be known anyway.
  // All lanes vote, so each looks at its own columns; the largest score of a whole row is found where a reference rises. Only there O is multiplied,
  // of which products may be in flight that `wait_for_O` waits for. ROW_BY_ROW: no row's numbers depend on those beside it in a warp, where rows
  // behind the end of a sequence hold anything; else, where one reference rises, the others do that can.
  template <bool ROW_BY_ROW, int N, int N_O, typename WaitForO>
  DEVICE void update(float (&S)[M][N][4], float (&O)[M][N_O][4], float scale_log2, WaitForO wait_for_O) {
    float offset[M][2];
    OnlyScores others;
    raise_if_asked<ROW_BY_ROW, false>(S, O, offset, scale_log2, wait_for_O, others);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        exponentiate(S[m], m, r, NATURAL ? LOG2_E : scale_log2, offset[m][r]);
        add_to_sum(m, r, row_sum<0, N>(S[m], r));
      }
  }

  template <int N, int N_O>
  DEVICE void update(float (&S)[M][N][4], float (&O)[M][N_O][4], float scale_log2) {
    update<false>(S, O, scale_log2, [] {});
  }

  // The same in two steps, where some tiles have scores in log2 units and others, with OTHERS, what `others` makes such scores of: first exponents
  // relative to the reference, then probabilities.
  template <bool OTHERS, int N, int N_O, typename Others>
  DEVICE void to_exponents(float (&S)[M][N][4], float (&O)[M][N_O][4], Others& others) {
    float offset[M][2];
    raise_if_asked<false, OTHERS>(S, O, offset, 1.0f, [] {}, others);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (OTHERS) {
        others.subtract(S[m], offset[m]);
      } else {
        for_each_place<1, N>([&](int, int n, int i, int, int) { S[m][n][i] -= offset[m][i / 2]; });
      }
    }
  }

  template <int N>
  DEVICE void exponentiate(float (&S)[M][N][4]) {
    for_each_place<M, N>([&](int m, int n, int i, int, int) { S[m][n][i] = ex2(S[m][n][i]); });
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) add_to_sum(m, r, row_sum<0, N>(S[m], r));
  }

  // The same of products whose scores are `small` (tile/small_scores.cuh), none of a row above that of `largest`.
  template <bool ROW_BY_ROW, int N, int N_O, typename Small, typename WaitForO>
  DEVICE void update_small(float (&S)[M][N][4], float (&O)[M][N_O][4], const float (&largest)[M][2], const Small& small, WaitForO wait_for_O) {
    bool is_rare = false;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) is_rare |= reference_of(fabsf(small.score(largest[m][r])), 1.0f, SLACK) > reference[m][r];
    if (any_lane(is_rare)) {
      wait_for_O();
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float of_row = small.score(quad_max(lane_max(S[m], r)));
          const bool rises = !ROW_BY_ROW || reference_of(of_row, 1.0f, SLACK) > reference[m][r];
          raise(O[m], rises ? of_row : -infinity(), m, r, 1.0f);
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) S[m][n][i] = ex2(small.score_less(S[m][n][i], offset_of(m, r)));
        add_to_sum(m, r, row_sum<0, N>(S[m], r));
      }
  }

  // The same where O is not at hand: it has to be multiplied by `rescale`. References rise with the maximum, and the branch is for coarse rows.
  template <int N>
  DEVICE void update(float (&S)[M][N][4], float (&rescale)[M][2], float scale_log2) {
    float factor[M][2], offset[M][2];
    bool any_is_coarse = false;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rescale[m][r] = raise_reference(row_max(S[m], r), m, r, scale_log2);
        factor[m][r] = NATURAL ? LOG2_E : scale_log2;
        offset[m][r] = offset_of(m, r);
        any_is_coarse |= is_coarse(m, r);
      }
    if (any_lane(any_is_coarse)) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (is_coarse(m, r)) {
            subtract_reference(S[m], m, r, scale_log2);
            if constexpr (!NATURAL) factor[m][r] = 1.0f;
            offset[m][r] = COARSE_OFFSET;
          }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        exponentiate(S[m], m, r, factor[m][r], offset[m][r]);
        add_to_sum(m, r, rescale[m][r], row_sum<0, N>(S[m], r));
      }
  }

  // What turns numbers relative to an earlier reference of the row into such relative to the present one.
  DEVICE float rescale_since(float earlier, int m, int r) const { return rescale(earlier, reference[m][r]); }
  DEVICE static float rescale(float earlier, float later) { return ex2(in_log2(earlier - later)); }

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
        const float used = reference[m][r];
        const float factor = rescale(previous, used);
        add_to_sum(m, r, factor, lane_index() % 4 == 0 ? of_sink(sink, used) : 0.0f);  // once per row: `finish` adds up the lanes of a quad
#pragma unroll
        for (int n = 0; n < N_O; ++n) {
          O[m][n][2 * r] *= factor;
          O[m][n][2 * r + 1] *= factor;
        }
      }
  }

  // Takes in the sum of a row over other keys, relative to a reference of its own. Returns what the row's own O and that of the other keys have to be
  // multiplied by.
  DEVICE float2 merge(int m, int r, float other_reference, float other_sum, float other_rest) {
    const float previous = reference[m][r];
    reference[m][r] = fmaxf(previous, other_reference);
    const float2 factors = make_float2(rescale(previous, reference[m][r]), rescale(other_reference, reference[m][r]));
    add_to_sum(m, r, factors.x, factors.y * other_sum);
    add_to_sum(m, r, factors.y * other_rest);
    return factors;
  }

  // Normalises O. From then on a row has `lse`, and `reference` is none any more.
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
        reference[m][r] = lse_of(reference[m][r], total);
      }
  }

  // The natural-log LSE of a row, once it is finished.
  DEVICE float lse(int m, int r) const { return reference[m][r]; }

  // What a sink adds to the sum of a row with this reference.
  DEVICE static float of_sink(float sink, float reference) { return ex2(NATURAL ? __fmaf_rn(sink - reference, LOG2_E, SHIFT) : sink - reference); }

  // The natural-log LSE of a row with this reference and sum.
  DEVICE static float lse_of(float reference, float sum) {
    const float log2_sum = lg2(sum * (1.0f / float(1 << SHIFT)));
    if constexpr (NATURAL) return __fmaf_rn(log2_sum, LN_2, reference);
    if constexpr (SHIFT == 0) return (reference + log2_sum) * LN_2;
    const float unshifted = reference + float(SHIFT);  // exact where keys were seen; a sink alone has not been shifted
    const float lost = reference - (unshifted - float(SHIFT));
    return ((unshifted + log2_sum) + lost) * LN_2;
  }

 private:
  // What `update` does before exponents, which are `offset` off the scores. OTHERS as in `to_exponents`.
  template <bool ROW_BY_ROW, bool OTHERS, int N, int N_O, typename WaitForO, typename Others>
  DEVICE void raise_if_asked(float (&S)[M][N][4], float (&O)[M][N_O][4], float (&offset)[M][2], float scale_log2, WaitForO wait_for_O,
                             Others& others) {
    float highest[M][2];
    bool is_rare = false;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        highest[m][r] = lane_max(S[m], r);
        offset[m][r] = offset_of(m, r);
        const bool asks = !NATURAL || highest[m][r] != -infinity();  // where nothing is seen, probabilities are 0 whatever the reference is
        if constexpr (OTHERS) {
          is_rare |= others.asks(highest[m][r], m, r);
        } else {
          is_rare |= reference_of(highest[m][r], scale_log2, SLACK) > reference[m][r] || (asks && is_coarse(m, r));
        }
      }
    if (any_lane(is_rare)) {
      wait_for_O();
      if constexpr (OTHERS) others.hold(S, highest);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float of_row = quad_max(highest[m][r]);
          if constexpr (OTHERS) of_row = others.score(of_row);
          const bool rises = !ROW_BY_ROW || reference_of(of_row, scale_log2, SLACK) > reference[m][r];
          raise(O[m], rises ? of_row : -infinity(), m, r, scale_log2);
          offset[m][r] = is_coarse(m, r) ? COARSE_OFFSET : offset_of(m, r);
          if (!OTHERS && is_coarse(m, r)) subtract_reference(S[m], m, r, scale_log2, 1.0f / scale_log2);
          if constexpr (Others::USED) others.allow(reference[m][r] + float(SHIFT + SLACK), m, r);
        }
    }
  }

  DEVICE static float in_log2(float difference) { return NATURAL ? difference * LOG2_E : difference; }

  // The largest score of row r.
  template <int N>
  DEVICE static float row_max(const float (&S)[N][4], int r) {
    return quad_max(lane_max(S, r));
  }

  // Of this lane's columns.
  template <int N>
  DEVICE static float lane_max(const float (&S)[N][4], int r) {
    float highest = fmaxf(S[0][2 * r], S[0][2 * r + 1]);
#pragma unroll
    for (int n = 1; n < N; ++n) highest = fmaxf(highest, fmaxf(S[n][2 * r], S[n][2 * r + 1]));
    return highest;
  }

  // The reference that a row with this largest score asks for, less `slack`.
  DEVICE static float reference_of(float highest, float scale_log2, int slack) {
    return NATURAL ? highest - float(slack) * LN_2 : fma_rm(highest, scale_log2, -float(SHIFT + slack));
  }

  // Raises the reference of a row to what its largest score asks for, and returns what turns numbers relative to the one before into such relative
  // to it.
  DEVICE float raise_reference(float highest, int m, int r, float scale_log2) {
    const float previous = reference[m][r];
    reference[m][r] = fmaxf(previous, reference_of(highest, scale_log2, 0));
    return rescale(previous, reference[m][r]);
  }

  // The same, and the sum and O with it.
  template <int N_O>
  DEVICE void raise(float (&O)[N_O][4], float highest, int m, int r, float scale_log2) {
    const float factor = raise_reference(highest, m, r, scale_log2);
    add_to_sum(m, r, factor, 0.0f);
#pragma unroll
    for (int n = 0; n < N_O; ++n) {
      O[n][2 * r] *= factor;
      O[n][2 * r + 1] *= factor;
    }
  }

  // What exponents are off the scores of a row by, in log2 units. It is finite for the lowest reference too.
  DEVICE float offset_of(int m, int r) const {
    return NATURAL ? __fmaf_rn(fmaxf(reference[m][r], 0.5f * LOWEST), LOG2_E, -float(SHIFT)) : reference[m][r];
  }
  static constexpr float COARSE_OFFSET = NATURAL ? -float(SHIFT) : 0.0f;  // behind `subtract_reference`

  // Whether the last place of a row's reference matters in an exponent.
  DEVICE bool is_coarse(int m, int r) const { return !SUBTRACTS && fabsf(reference[m][r]) > (NATURAL ? EXACT_NATURAL_LIMIT : EXACT_REFERENCE_LIMIT); }

  // Scores of a row whose reference is coarse -> exponents, clamped, times `factor`; with NATURAL only less the reference, which is exact.
  template <int N>
  DEVICE void subtract_reference(float (&S)[N][4], int m, int r, float scale_log2, float factor = 1.0f) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i)
        S[n][i] = NATURAL ? S[n][i] - reference[m][r] : min_nan(__fmaf_rn(S[n][i], scale_log2, -reference[m][r]), float(SHIFT + 1)) * factor;
  }

  template <int N>
  DEVICE void exponentiate(float (&S)[N][4], int m, int r, float factor, float offset) const {
    if constexpr (SUBTRACTS) subtract_reference(S, m, r, factor);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) S[n][i] = ex2(__fmaf_rn(S[n][i], factor, -(SUBTRACTS ? COARSE_OFFSET : offset)));
  }

  // This lane's columns of row r, tiles BEGIN .. END - 1, by halves.
  template <int BEGIN, int END, int N>
  DEVICE static float row_sum(const float (&p)[N][4], int r) {
    if constexpr (END - BEGIN == 1) {
      return p[BEGIN][2 * r] + p[BEGIN][2 * r + 1];
    } else {
      constexpr int MIDDLE = (BEGIN + END) / 2;
      return row_sum<BEGIN, MIDDLE>(p, r) + row_sum<MIDDLE, END>(p, r);
    }
  }

  // sum += x
  DEVICE void add_to_sum(int m, int r, float x) {
    const float missing = rest[m][r] + x;
    const float rounded = sum[m][r] + missing;
    rest[m][r] = (sum[m][r] - rounded) + missing;
    sum[m][r] = rounded;
  }

  // sum = rescale sum + x
  DEVICE void add_to_sum(int m, int r, float rescale, float x) {
    const float missing = __fmaf_rn(rest[m][r], rescale, x);
    const float rounded = __fmaf_rn(sum[m][r], rescale, missing);
    rest[m][r] = __fmaf_rn(sum[m][r], rescale, -rounded) + missing;
    sum[m][r] = rounded;
  }
};
