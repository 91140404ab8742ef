// Merges attention over disjoint sets of keys:
//
//     lse = log of the sum of exp(lse of each part)        out = sum of exp(lse of a part - lse) * out of it
//
// A part whose lse is -inf saw no key: whatever its out holds changes nothing. Where all are, out is 0 and lse -inf. NaN in any lse of a row makes
// the row NaN, and so does +inf. Of stream-K (tile/stream_k.cuh) a row has parts of its own, and one that has a single part is left as it is.
#include "tile/merge.cuh"

constexpr int PARTS_AHEAD = 4;  // whose rows travel at a time
constexpr float EMPTY = -1.0f;  // in the place of a weight, which is never negative

// Adds the parts of the thread's group to columns of the row. Each lane finds the weight of one of `lanes` parts for the others.
DEVICE void add_parts(float (&sum)[VECTOR], const MergeArguments& arguments, const Row& row, const Weights& weights, int column) {
  const MergeParts& parts = arguments.parts;
  const int first_lane = lane_index() - row.lane;
  auto has_parts_from = [&](int i) { return STREAM_K ? any_lane(i < row.num_parts) : i < parts.num_parts; };  // any row of the warp
  for (int before = 0; has_parts_from(before); before += row.lanes * row.groups) {
    const int base = before + row.group, own = base + row.lane * row.groups;
    float own_weight = EMPTY;
    if (own < row.num_parts) {
      const PartLse lse = before == 0 ? weights.own : PartRow::load_lse(parts, row, own);
      if (!lse.is_empty()) own_weight = weights.of(lse);
    }
    for (int lane = 0; lane < row.lanes; lane += PARTS_AHEAD) {
      float weight[PARTS_AHEAD], x[PARTS_AHEAD][VECTOR];
#pragma unroll
      for (int i = 0; i < PARTS_AHEAD; ++i) {
        weight[i] = shfl(own_weight, first_lane + (lane + i) % row.lanes);
        if (lane + i >= row.lanes) weight[i] = EMPTY;
        if (weight[i] == EMPTY) continue;
        const PartRow part(parts, row, base + (lane + i) * row.groups);
        load(x[i], part.out, part.stride_dim, part.vectorized, column, arguments.head_dim);
      }
#pragma unroll
      for (int i = 0; i < PARTS_AHEAD; ++i)
#pragma unroll
        for (int j = 0; j < VECTOR; ++j)
          if (weight[i] != EMPTY) sum[j] = __fmaf_rn(weight[i], x[i][j], sum[j]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) merge_attention(const __grid_constant__ MergeArguments arguments) {
  __shared__ float sums[NUM_THREADS][VECTOR];
  const Row row(arguments);
  const Weights weights(arguments.parts, row);
  const bool writes = row.exists && row.group == 0;
  if (writes && row.lane == 0 && arguments.lse.data != nullptr) *row.of(arguments.lse) = weights.lse();

  const int step = row.lanes * VECTOR;
  for (int first = 0; first < arguments.head_dim; first += step) {
    const int column = first + row.lane * VECTOR;
    float sum[VECTOR] = {};
    add_parts(sum, arguments, row, weights, column);
    if (row.groups > 1) {
      if (first > 0) __syncthreads();  // those of the columns before have been read
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) sums[threadIdx.x][j] = sum[j];
      __syncthreads();
      for (int i = 1; writes && i < row.groups; ++i)
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum[j] += sums[threadIdx.x + i * row.lanes][j];
    }
    if (writes && column < arguments.head_dim)
      store(sum, row.of(arguments.out), arguments.out.stride_dim, arguments.out.vectorized, column, arguments.head_dim);
  }
}
