// From recomputed scores to probabilities, in the backward pass.
//
//     P = 2^(S scale_log2 - lse_log2)        dS = P (dP - delta)
//
// With an additive mask all scores of a row may be so huge that lse has no bits left for the logarithm of the row's sum, such as -3e38 for every key
// of a row of padding. A row then has two numbers in the place of lse, which backward_row_sums_mma.cu finds:
//
//     P = 2^((S - reference) log2(e) - log2_sum)
//
// They are lse and 0, or where that is not good enough the largest score and log2 of the sum of exp(S - reference).
//
// Accumulators of dP start at -delta, so that the subtraction costs nothing. dS lacks the factor `scale`; it enters once, when dQ and dK are stored.
// Source: Dao et al. 2022 (arXiv 2205.14135), algorithm 4.
#pragma once
#include "ptx/math.cuh"
#include "tile/features.cuh"
#include "tile/softmax.cuh"

// The exponent is never above 0 but for rounding, which at scores of 1e9 is large: hence the clamp.
DEVICE float probability(float score, float scale_log2, float reference, float log2_sum) {
  if constexpr (ADDITIVE_MASK) return ex2(__fmaf_rn(min_nan(score - reference, 0.0f), LOG2_E, -log2_sum));
  return ex2(min_nan(__fmaf_rn(score, scale_log2, -reference), 0.0f));
}
