// Gradient of the sinks: a sink takes the share exp(sink - lse) of a row's probabilities and has no value, so
//
//     grad_sink = - sum over batches and queries of exp(sink - lse) * delta
//
// With an additive mask, sinks and references are no log2 units, and rows have a log2_sum (tile/probability.cuh). One block sums one head; every
// thread and every warp adds in a fixed order. Rows of a padded batch that no query has (SEQLENS_Q) are not read: they may have no log2_sum.
#include "arguments.cuh"
#include "ptx/math.cuh"
#include "ptx/warp.cuh"

constexpr int NUM_WARPS = Config::NUM_WARPS;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_sinks(const __grid_constant__ BackwardArguments arguments) {
  const Geometry& geometry = arguments.geometry;
  const int head = int(blockIdx.x);
  const float sink = arguments.features.sinks.load(0, head) * (Config::ADDITIVE_MASK ? 1.0f : LOG2_E);

  float sum = 0.0f;
  for (int batch = 0; batch < geometry.batch; ++batch) {
    const RowStatistics* rows = arguments.row_statistics + (int64(batch) * geometry.num_heads_q + head) * geometry.seqlen_q;
    int num_queries = geometry.seqlen_q;
    if constexpr (Config::SEQLENS_Q) num_queries = min(num_queries, arguments.lengths.seqlens_q[batch]);
    float of_batch = 0.0f;
    for (int query = int(threadIdx.x); query < num_queries; query += NUM_THREADS) {
      float exponent = fminf(sink - rows[query].reference, 0.0f);
      if constexpr (Config::ADDITIVE_MASK)
        exponent = __fmaf_rn(exponent, LOG2_E, -arguments.features.log2_sums[&rows[query] - arguments.row_statistics]);
      of_batch -= ex2(exponent) * rows[query].delta;
    }
    sum += of_batch;
  }
#pragma unroll
  for (int lane_mask = WARP_SIZE / 2; lane_mask > 0; lane_mask /= 2) sum += shfl_xor(sum, lane_mask);

  extern __shared__ float warp_sums[];
  if (lane_index() == 0) warp_sums[warp_index()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) total += warp_sums[warp];
    arguments.features.grad_sinks[head] = total;
  }
}
