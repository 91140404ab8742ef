// Rows of a block that has one of the ranges ("splits") into which the keys of a sequence are cut: which block it is, and where its results go. Rows
// are the queries of all heads that share a key head (tile/grouped_rows.cuh).
//
// With several splits O and LSE of each are parts, float32, for merge_attention.cu. Queries may be packed (VARLEN): then parts are those of all
// tokens, in one batch.
#pragma once
#include "tile/constants.cuh"
#include "tile/grouped_rows.cuh"
#include "tile/load.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/vector.cuh"

// A row of one split: its sum of 2^(score - reference) over all keys, or with an additive mask of exp, times 2^PROBABILITY_SHIFT.
struct RowTotal {
  using Softmax = OnlineSoftmax<1, ADDITIVE_MASK, PROBABILITY_SHIFT>;
  float reference, sum;

  DEVICE bool is_empty() const { return sum == 0.0f; }
  DEVICE float lse() const { return Softmax::lse_of(reference, sum); }
  // What the reference's exponential takes times to be exp(LSE), as the merge of parts wants it (tile/merge.cuh).
  DEVICE float part_sum() const { return ADDITIVE_MASK ? sum * (1.0f / float(1 << PROBABILITY_SHIFT)) : sum; }
  DEVICE float inverse() const { return is_empty() ? 0.0f : 1.0f / sum; }
};

constexpr bool STREAM_K = Config::STREAM_K;  // blocks have equal shares of all key tiles (tile/stream_k.cuh)

struct SplitWork {
  int tile, head_kv, sequence, split;
  int batch, start_q;  // where the sequence's queries lie
  int start_kv;        // the sequence's first key among packed ones
  int begin = 0, end = 0;  // STREAM_K: its key tiles, counted from the first that the rows see
  int part = -1;           // STREAM_K: where its part goes; -1: it has all keys
};

// `work`: tile, key head and, sequence by sequence for one split after the other, what is called its batch.
DEVICE SplitWork work_of_split(const Geometry& geometry, const SequenceLengths& lengths, const Work& work) {
  const int sequences = VARLEN ? lengths.num_sequences + 1 : geometry.batch;  // packed, those of the last have rows of nobody
  const int sequence = work.batch % sequences;
  return {work.tile,
          work.head,
          sequence,
          work.batch / sequences,
          VARLEN ? 0 : sequence,
          sequence_start(lengths.cu_seqlens_q, sequence, geometry.seqlen_q),
          PACKED_KEYS ? sequence_start(lengths.cu_seqlens_kv, sequence, geometry.seqlen_kv) : 0};
}

// Where a row of the results goes: to `out` and `lse`, or to this split's part.
template <typename Arguments>
struct RowOfResult {
  const Arguments& arguments;
  int batch, head, query;
  bool is_part;
  int64 part;  // rows before this one among the parts

  DEVICE RowOfResult(const Arguments& arguments, const SplitWork& work, const GroupedRows& rows, int row)
      : arguments(arguments), batch(work.batch), head(rows.head(row)), query(work.start_q + rows.query(row)) {
    if constexpr (STREAM_K) {
      is_part = work.part >= 0;
      part = int64(work.part) * TILE_Q + row % TILE_Q;
    } else {
      const Geometry& geometry = arguments.geometry;
      is_part = arguments.num_splits > 1;
      part = ((int64(work.split) * geometry.batch + batch) * geometry.num_heads_q + head) * geometry.seqlen_q + query;
    }
  }

  DEVICE void store_empty_lse() const {
    if (is_part) {
      store_part(-infinity(), 0.0f);
    } else if (arguments.lse.data != nullptr) {
      *arguments.lse.pointer(batch, head, query) = -infinity();
    }
  }

  DEVICE void store_lse(const RowTotal& row) const {
    if (is_part) {
      store_part(row.is_empty() ? -infinity() : row.reference, row.part_sum());
    } else if (arguments.lse.data != nullptr) {
      *arguments.lse.pointer(batch, head, query) = row.lse();
    }
  }

  // Both are kept, since scores may be so large that an LSE would swallow the sum.
  DEVICE void store_part(float reference, float sum) const { reinterpret_cast<float2*>(arguments.partial_lse)[part] = make_float2(reference, sum); }

  DEVICE void store_O(const float (&x)[VECTOR], int column) const {
    if (is_part) {
      store(x, arguments.partial_out + part * HEAD_DIM_V, 1, HEAD_DIM_V % 4 == 0, column, HEAD_DIM_V);
    } else {
      const TensorView& out = arguments.out;
      store(x, out.row_pointer<Element>(batch, head) + query * out.stride_seqlen, out.stride_dim, is_vectorized(out), column, HEAD_DIM_V);
    }
  }
};

// Zeros and LSE -inf for grouped rows from first_row on, the share of block `tile` of `num_tiles`, which has so many THREADS.
template <int THREADS, typename Arguments>
DEVICE void clear_results(const Arguments& arguments, const SplitWork& work, const GroupedRows& rows, int first_row, int tile, int num_tiles) {
  constexpr int VECTORS = ceil_div(HEAD_DIM_V, VECTOR);
  const int64 count = int64(rows.count - first_row) * VECTORS, step = int64(num_tiles) * THREADS;
  for (int64 index = int64(tile) * THREADS + threadIdx.x; index < count; index += step) {
    const RowOfResult result(arguments, work, rows, first_row + int(index / VECTORS));
    const int column = int(index % VECTORS) * VECTOR;
    if (column == 0) result.store_empty_lse();
    const float zeros[VECTOR] = {};
    if (!result.is_part) result.store_O(zeros, column);
  }
}

// Grouped rows that are to be computed: whether the block's tile holds any. Those of nobody behind the last sequence are cleared, and by the block of
// the last tile those of a sequence that is longer than the grid was made for; of places, by all blocks of a sequence the rows that it does not use.
template <int THREADS = NUM_THREADS, typename Arguments>
DEVICE bool claim_grouped_rows(const Arguments& arguments, const SplitWork& work) {
  if constexpr (VARLEN) {
    Geometry geometry = arguments.geometry;
    const bool is_behind = work.sequence == arguments.lengths.num_sequences;
    geometry.seqlen_q =
        is_behind ? geometry.seqlen_q - work.start_q : sequence_place(arguments.lengths.cu_seqlens_q, work.sequence, geometry.seqlen_q);
    const GroupedRows rows(geometry, work.head_kv);
    const int end = geometry.num_tiles * TILE_Q;
    if (is_behind) {
      clear_results<THREADS>(arguments, work, rows, 0, work.tile, geometry.num_tiles);
      return false;
    }
    int used = rows.count;
    if constexpr (IN_PLACES) {
      used = sequence_length(packed_queries(arguments), work.sequence) * rows.group;
      clear_results<THREADS>(arguments, work, rows, min(used, end), work.tile, geometry.num_tiles);
    } else {
      SplitWork whole = work;
      whole.part = -1;  // STREAM_K: no part has these rows
      if (work.tile == geometry.num_tiles - 1 && used > end) clear_results<THREADS>(arguments, whole, rows, end, 0, 1);
    }
    return work.tile * TILE_Q < used;
  }
  return true;
}

// With STREAM_K, whose launch has no blocks of their own for rows behind the last packed sequence: all blocks clear them together.
template <typename Arguments>
DEVICE void clear_rows_of_nobody(const Arguments& arguments) {
  if constexpr (VARLEN) {
    const int num_tiles = arguments.geometry.num_tiles;
    for (int i = int(blockIdx.x); i < num_tiles * arguments.geometry.num_heads_kv; i += int(gridDim.x))
      claim_grouped_rows(arguments,
                         work_of_split(arguments.geometry, arguments.lengths, Work{i % num_tiles, i / num_tiles, arguments.lengths.num_sequences}));
  }
}
