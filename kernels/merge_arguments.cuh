// The by-value parameters of the kernels that merge attention over disjoint sets of keys. cuflash/planning/argument_structs.py lists the same fields
// in the same order with the same sizes.
#pragma once
#include "arguments.cuh"

struct MergePart {
  TensorView out;
  RowView lse;
};

constexpr int LISTED_PARTS = 16;  // what fits the parameter

// Parts are arrays of their own, which are listed here or, if there are more, in a table in global memory; or one array, `step` elements apart.
struct MergeParts {
  MergePart* table;  // null: `listed`
  int64 stride_part_out, stride_part_lse;  // parts of one array, of which the first is listed; 0 otherwise
  int num_parts;
  int first;  // merge_table: where the listed parts come in the table
  int one_array;
  int reserved;
  MergePart listed[LISTED_PARTS];

  DEVICE const MergePart& listed_part(int i) const { return listed[one_array ? 0 : i]; }
};

// Stream-K (tile/stream_k.cuh): each tile of grouped rows has parts of its own.
struct MergeStream {
  const PartsOfTile* part_table;
  int tile_q, num_tiles;  // rows of such a tile, and those of a key head
  int group;              // heads that share a key head
  int num_sequences;      // packed ones
  const int* cu_seqlens_q;  // null: queries are not packed
};

struct MergeTableArguments {
  MergeParts parts;
};

struct MergeArguments {
  TensorView out, grad_out, grad_outs;  // grad_outs: of the first part; forward: no gradients
  RowView lse, grad_lse, grad_lses;  // grad_lse.data null: zero; forward, lse.data null: not stored
  int64 stride_grad_outs, stride_grad_lses;  // from part to part
  int seqlen_q, num_heads, head_dim;
  int num_tiles;  // blocks of one (batch, head)
  int lanes;  // neighbouring threads that share the columns of a row: a power of two, at most a warp
  int groups;  // of so many lanes, which share out the parts of a row: a power of two, and 1 where there are more rows than threads; backward: 1
  MergeParts parts;
  MergeStream stream;
};
