// Rows whose keys were shared out among the warps of a block: each warp has a softmax and an O of all rows for its own keys, and the block adds them
// up in shared memory.
//
// What lies there: for each warp its O, rows of float32, relative to the largest reference of each row in any warp; and for each warp and row the
// reference and the sum of its softmax.
#pragma once
#include "tile/constants.cuh"
#include "tile/features.cuh"
#include "tile/fragment.cuh"
#include "tile/score.cuh"
#include "tile/softmax.cuh"
#include "tile/split_rows.cuh"
#include "tile/vector.cuh"

template <int M>
using WarpSoftmax = OnlineSoftmax<M, ADDITIVE_MASK, PROBABILITY_SHIFT, SLACK_OF<Element>>;

using WarpO = SmemTile<float, TILE_Q, HEAD_DIM_V>;
constexpr int STATES_BYTES = NUM_WARPS * TILE_Q * int(sizeof(float2));

// A row in all warps together; with SINKS a logit more, -inf for none.
struct WholeRow : RowTotal {
  DEVICE WholeRow(SmemAddress states, int row, float sink) : RowTotal{LOWEST, 0.0f} {
    float2 state[NUM_WARPS];
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) {
      state[warp] = load_shared_f32x2(states + (warp * TILE_Q + row) * int(sizeof(float2)));
      reference = fmaxf(reference, state[warp].x);
    }
    if constexpr (SINKS) {
      reference = fmaxf(reference, sink);
      sum = WarpSoftmax<1>::of_sink(sink, reference);
    }
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) sum = __fmaf_rn(state[warp].y, WarpSoftmax<1>::rescale(state[warp].x, reference), sum);
  }
};

// The state of this warp's softmax, for all warps to see behind a barrier.
template <int M>
DEVICE void publish_state(const WarpSoftmax<M>& softmax, SmemAddress states) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(softmax.sum[m][r]);
      const int row = 16 * m + 8 * r + lane_index() / 4;
      if (lane_index() % 4 == 0)
        store_shared(states + (warp_index() * TILE_Q + row) * int(sizeof(float2)), make_float2(softmax.reference[m][r], sum));
    }
}

// This warp's O, relative to the whole rows, of which the first `num_rows` exist. `sink(row)` is that of a row. With PAIRED tiles, each two
// neighbours have the even and the odd ones of their columns (tile/cache_operand.cuh).
template <bool PAIRED, int M, int N, typename Sink>
DEVICE void publish_O(const float (&O)[M][N][4], const WarpSoftmax<M>& softmax, SmemAddress states, SmemAddress parts, int num_rows,
                      const Sink& sink) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const SmemAddress own = parts + warp_index() * WarpO::BYTES;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * m + 8 * r + g;
      if (row >= num_rows) continue;
      const float factor = WarpSoftmax<M>::rescale(softmax.reference[m][r], WholeRow(states, row, sink(row)).reference);
#pragma unroll
      for (int n = 0; n < N; n += PAIRED ? 2 : 1) {
        if constexpr (PAIRED) {
          const float (&even)[4] = O[m][n], (&odd)[4] = O[m][n + 1];
          store_shared(own + WarpO::offset(row, 2 * n + t),
                       make_float4(even[2 * r] * factor, odd[2 * r] * factor, even[2 * r + 1] * factor, odd[2 * r + 1] * factor));
        } else {
          store_shared(own + WarpO::offset(row, 2 * n + t / 2) + t % 2 * 8, make_float2(O[m][n][2 * r] * factor, O[m][n][2 * r + 1] * factor));
        }
      }
    }
}

// VECTOR columns of a row of O, added up over the warps and multiplied by `factor`.
DEVICE void collect_O(float (&x)[VECTOR], SmemAddress parts, int row, int column, float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) {
      const float4 part = load_shared_f32x4(parts + warp * WarpO::BYTES + WarpO::offset(row, column / 4 + half));
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    x[4 * half + 0] = sum.x * factor;
    x[4 * half + 1] = sum.y * factor;
    x[4 * half + 2] = sum.z * factor;
    x[4 * half + 3] = sum.w * factor;
  }
}
