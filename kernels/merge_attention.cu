// Merges attention over disjoint sets of keys:
//
//     lse = log of the sum of exp(lse of each part)        out = sum of exp(lse of a part - lse) * out of it
//
// A part whose lse is -inf saw no key: whatever its out holds changes nothing. Where all are, out is 0 and lse -inf. NaN in any lse of a row makes
// the row NaN, and so does +inf.
#include "tile/merge.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) merge_attention(const __grid_constant__ MergeArguments arguments) {
  const MergeParts& parts = arguments.parts;
  const Row row(arguments);
  if (!row.exists) return;
  const Weights weights(parts, row);
  if (row.lane == 0 && arguments.lse.data != nullptr) *row.of(arguments.lse) = weights.lse();

  for (int column = row.lane * VECTOR; column < arguments.head_dim; column += row.lanes * VECTOR) {
    float sum[VECTOR] = {};
    for (int i = 0; i < parts.num_parts; ++i) {
      const PartLse lse = PartRow::load_lse(parts, row, i);
      if (lse.is_empty()) continue;
      const PartRow part(parts, row, i);
      const float weight = weights.of(lse);
      float x[VECTOR];
      load(x, part.out, part.stride_dim, part.vectorized, column, arguments.head_dim);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) sum[j] = __fmaf_rn(weight, x[j], sum[j]);
    }
    store(sum, row.of(arguments.out), arguments.out.stride_dim, arguments.out.vectorized, column, arguments.head_dim);
  }
}
