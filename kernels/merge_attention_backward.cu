// Gradients of the parts of merge_attention.cu. With w = exp(lse of the part - lse), its share, and delta = sum over d of dO * O - grad_lse:
//
//     grad_out of the part = w dO        grad_lse of the part = w (sum over d of dO * out of the part - delta)
//
// out and lse may be those of more parts than are given (tile/given_lse.cuh). An empty part has no gradients, not even where dO is NaN.
#include "tile/given_lse.cuh"
#include "tile/merge.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) merge_attention_backward(const __grid_constant__ MergeArguments arguments) {
  const MergeParts& parts = arguments.parts;
  const Row row(arguments);
  const int head_dim = row.exists ? arguments.head_dim : 0;  // threads without a row stay for the sums of their warp
  const int first = row.lane * VECTOR, step = row.lanes * VECTOR;
  const Element* dO_row = row.of(arguments.grad_out);
  const Element* O_row = row.of(arguments.out);
  auto load_dO = [&](float (&x)[VECTOR], int column) {
    load(x, dO_row, arguments.grad_out.stride_dim, arguments.grad_out.vectorized, column, head_dim);
  };

  float delta = 0.0f;
  for (int column = first; column < head_dim; column += step) {
    float dO[VECTOR], O[VECTOR];
    load_dO(dO, column);
    load(O, O_row, arguments.out.stride_dim, arguments.out.vectorized, column, head_dim);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) delta = __fmaf_rn(dO[j], O[j], delta);
  }
  delta = row.sum_of_lanes(delta);

  Weights weights(parts, row);
  if (row.exists) {
    if (arguments.grad_lse.data != nullptr) delta -= *row.of(arguments.grad_lse);
    const float lse = *row.of(arguments.lse);
    if (is_of_more(lse, weights.lse())) weights = Weights(lse);
  }

  for (int i = 0; i < parts.num_parts; ++i) {
    float weight = 0.0f, dot = 0.0f;
    const bool contributes = row.exists && !PartRow::load_lse(parts, row, i).is_empty();
    if (contributes) weight = weights.of(PartRow::load_lse(parts, row, i));
    PartElement* destination = row.of<PartElement>(arguments.grad_outs) + i * arguments.stride_grad_outs;
    for (int column = first; column < head_dim; column += step) {
      float gradient[VECTOR] = {};
      if (contributes) {
        const PartRow part(parts, row, i);
        float dO[VECTOR], O[VECTOR];
        load_dO(dO, column);
        load(O, part.out, part.stride_dim, part.vectorized, column, head_dim);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
          dot = __fmaf_rn(dO[j], O[j], dot);
          gradient[j] = weight * dO[j];
        }
      }
      store(gradient, destination, arguments.grad_outs.stride_dim, arguments.grad_outs.vectorized, column, head_dim);
    }
    dot = row.sum_of_lanes(dot);
    if (row.exists && row.lane == 0) row.of(arguments.grad_lses)[i * arguments.stride_grad_lses] = contributes ? weight * (dot - delta) : 0.0f;
  }
}
