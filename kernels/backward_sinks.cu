// Gradient of the sinks: a sink takes the share exp(sink - lse) of a row's probabilities and has no value, so
//
//     grad_sink = - sum over batches and queries of exp(sink - lse) * delta
//
// One block sums one head; every thread and every warp adds in a fixed order.
#include "arguments.cuh"
#include "ptx/math.cuh"
#include "ptx/warp.cuh"

constexpr int NUM_WARPS = Config::NUM_WARPS;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_sinks(const __grid_constant__ BackwardArguments arguments) {
  const Geometry& geometry = arguments.geometry;
  const int head = int(blockIdx.x);
  const float sink_log2 = arguments.features.sinks.load(0, head) * LOG2_E;

  float sum = 0.0f;
  for (int batch = 0; batch < geometry.batch; ++batch) {
    const RowStatistics* rows = arguments.row_statistics + (int64(batch) * geometry.num_heads_q + head) * geometry.seqlen_q;
    float of_batch = 0.0f;
    for (int query = int(threadIdx.x); query < geometry.seqlen_q; query += NUM_THREADS) {
      of_batch -= ex2(fminf(sink_log2 - rows[query].lse_log2, 0.0f)) * rows[query].delta;
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
