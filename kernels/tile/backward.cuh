// What the two backward kernels share: probabilities and score gradients from recomputed scores.
//
//     P = 2^(S scale_log2 - lse_log2)        dS = P (dP - delta)
//
// Accumulators of dP start at -delta, so that the subtraction costs nothing. dS lacks the factor `scale`; it enters once, when dQ and dK are stored.
// Source: Dao et al. 2022 (arXiv 2205.14135), algorithm 4.
#pragma once
#include "arguments.cuh"
#include "ptx/math.cuh"
#include "tile/mask.cuh"
#include "tile/sequence.cuh"
#include "tile/softmax.cuh"

// The exponent is never above 0 but for rounding, which at scores of 1e9 is large: hence the clamp.
DEVICE float probability(float score, float scale_log2, float lse_log2) { return ex2(clamp_exponent(__fmaf_rn(score, scale_log2, -lse_log2))); }

// Of row `start` on.
DEVICE const RowStatistics* row_statistics(const BackwardArguments& arguments, int batch, int head, int start) {
  const Geometry& geometry = arguments.geometry;
  return arguments.row_statistics + (int64(VARLEN ? 0 : batch) * geometry.num_heads_q + head) * geometry.seqlen_q + start;
}
