// Writes parts that are arrays of their own into a table, for merge_attention.cu and merge_attention_backward.cu: more of them than fit the parameter
// of a kernel. One block takes as many as fit its own.
#include "merge_arguments.cuh"

extern "C" __global__ void __launch_bounds__(LISTED_PARTS, 1) merge_table(const __grid_constant__ MergeTableArguments arguments) {
  const MergeParts& parts = arguments.parts;
  const int i = int(threadIdx.x);
  if (parts.first + i < parts.num_parts) parts.table[parts.first + i] = parts.listed[i];
}
