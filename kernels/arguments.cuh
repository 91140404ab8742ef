// The one by-value parameter of each kernel. cuflash/planning/argument_structs.py lists the same fields in the same order with the same sizes.
//
// Strides are in elements. A broadcast axis has stride 0. Everything that changes from call to call is here, so a new length, batch
// size, head count or stride never compiles anything; but rows that all start on 16 bytes have kernels of their own (Config::VECTORIZED).
#pragma once
#include "feature_arguments.cuh"
#include "ptx/tensor_map.cuh"
#include "ptx/types.cuh"

struct TensorView {  // (batch, seqlen, head, head_dim) in this order, whatever the caller's layout
  void* data;
  int64 stride_batch, stride_seqlen, stride_head, stride_dim;
  int vectorized;  // every row starts on 16 bytes and head_dim is contiguous: 16-byte copies; otherwise one element at a time (tile/load.cuh)
  int reserved;

  template <typename Element>
  DEVICE Element* row_pointer(int batch, int head, int row = 0) const {
    return static_cast<Element*>(data) + batch * stride_batch + head * stride_head + row * stride_seqlen;
  }
};

struct RowView {  // one float32 for each (batch, head, query): lse and its gradient
  float* data;
  int64 stride_batch, stride_head, stride_seqlen;

  DEVICE float* pointer(int batch, int head, int query) const { return data + batch * stride_batch + head * stride_head + query * stride_seqlen; }
};

struct Geometry {
  int batch, seqlen_q, seqlen_kv, num_heads_q, num_heads_kv;
  int causal_offset;  // query i sees keys 0 .. i + causal_offset
  float scale;        // multiplies the scores
  float scale_log2;   // |scale| log2(e), or 1 where scale is 0
  float score_sign;   // the sign of scale: -1, 0 or 1; Q, the scores, or a factor of theirs takes it
  int num_tiles;      // tiles that one (batch, head) is cut into
  int section_heads;  // (batch, head) pairs whose blocks are launched together, if the call is causal or the kernel fused (tile/schedule.cuh)
};

// Lengths that are read on the device (tile/sequence.cuh), so that a captured graph replays with others. Null where a call has none.
struct SequenceLengths {
  const int* cu_seqlens_q;   // [num_sequences + 1]: where each packed sequence of queries starts, and where the last one ends
  const int* cu_seqlens_kv;  // the same for keys
  const int* seqlens_kv;     // [batch]: keys from there on are not seen; of packed sequences, keys of their places
  const int* seqlens_q;      // [num_sequences]: queries of a packed sequence's place that are its own
  int num_sequences;         // packed sequences; Geometry then holds one batch, and all packed rows as its lengths
  int bottom_right;          // causal: the last query of each sequence sees all of its keys
  int* packed_tiles;         // what tiles there are, where the kernel has a list of them (tile/packed_tiles.cuh)
  int packed_places;         // how many the list has room for
  int reserved;
};

struct ForwardArguments {
  TensorView query, key, value, out;
  RowView lse;  // data null: not stored
  Geometry geometry;
  SequenceLengths lengths;
  FeatureArguments features;
};

// Where the keys and values of each sequence lie (tile/cache_rows.cuh). All zero where they are arrays of one row for each sequence.
struct CacheArguments {
  const int* page_table;     // [batch][pages of a sequence]: key p is row p % page_size of the page there; null: sequences have rows of the cache
  const int* batch_indices;  // [batch]: which row of the cache is that of the sequence; null: its own
  const int* leftpad;        // [batch]: keys before it are not seen; null: none
  int64 stride_page_table;   // from sequence to sequence
  int page_size;
  int num_rows;  // rows of the cache, or pages
  int new_keys;  // that came with this call, behind those that `seqlens_kv` counts; of packed queries of all sequences, one for each query
  int reserved;
};

// What the numbers of an 8-bit cache are multiplied by, for each sequence and key head. Data null: 1.
struct CacheScales {
  HeadView key, value;
};

// Rotary embedding of queries and new keys (tile/rotary.cuh).
struct RotaryArguments {
  const void* cos;  // [rows][dim / 2]
  const void* sin;
  int64 stride_cos, stride_sin;  // from position to position
  int dim;                       // columns that are rotated; 0: none
  int rows;
  int interleaved;      // pairs are neighbours; otherwise dim / 2 apart
  int queries_advance;  // query i has a position of its own, i behind that of the first
};

// Stream-K: which blocks have parts of an output tile (tile/stream_k.cuh).
struct PartsOfTile {
  int first_block;
  int num_parts;  // of this block and those behind it; 1: its results are stored
};

// Parts of a block: one of an output tile whose first keys are the block's, and one of another.
DEVICE int part_of_block(int block, bool has_first_keys) { return 2 * block + has_first_keys; }

// Keys are shared out among blocks. With several splits results go to partial_*, which merge_attention makes `out` and `lse` of.
struct ForwardSplitArguments {
  TensorView query, key, value, out;
  RowView lse;         // data null: not stored
  float* partial_out;  // [num_splits][batch][num_heads_q][seqlen_q][head_dim_v]
  float* partial_lse;  // [num_splits][batch][num_heads_q][seqlen_q][2]: reference and sum (tile/merge.cuh)
  Geometry geometry;   // num_tiles: tiles of grouped rows (tile/grouped_rows.cuh)
  SequenceLengths lengths;
  FeatureArguments features;
  CacheArguments cache;
  int num_splits;
  int split_tiles;  // key tiles of a split; 0: those that a sequence has are cut into num_splits equal parts
  CacheScales scales;
  PartsOfTile* part_table;  // stream-K, [sequences][num_tiles][num_heads_kv]; parts are partial_out [blocks][2][TILE_Q][head_dim_v]
  int begin_tiles;          // what the beginning of an output tile costs, in key tiles
  float part_tiles;         // what a part costs the merge, in key tiles
  TensorView new_key, new_value;  // where the kernel appends (tile/new_keys.cuh)
  RotaryArguments rotary;
};

struct CacheAppendArguments {
  TensorView given_query, rotated_query;  // without rotary embedding neither is there
  TensorView new_key, new_value, key, value;
  Geometry geometry;  // seqlen_kv: the room that a sequence has
  SequenceLengths lengths;
  CacheArguments cache;
  int head_dim, head_dim_v;
  CacheScales scales;
  RotaryArguments rotary;
};

// An array that the TMA unit reads or writes: its map, of (head_dim, seqlen, heads, batch), and what the numbers of a head and of a batch are
// multiplied by to have its coordinates: 1, or 0 along an axis that is broadcast, which the map has once.
struct MappedTensor {
  TensorMap map;
  int head_factor, batch_factor;
};

// Of the last tiles of queries of forward_wgmma.cu, whose keys blocks share out (tile/key_shares.cuh). forward_wgmma_float32.cu
// has `parts` for O of earlier keys.
struct KeyShareArguments {
  float* parts;
  uint32* arrivals;  // for each warp of a tile: how many blocks have stored their part of its rows; 0 at the launch
  int first_work;    // tiles of queries before them, all of which one block has
  int length;        // key tiles of each block's share
};

struct ForwardWgmmaArguments {
  MappedTensor query, key, value;
  TensorView out;
  RowView lse;  // data null: not stored
  Geometry geometry;
  SequenceLengths lengths;
  FeatureArguments features;
  uint32* next_work;  // 0 at the launch: how many tiles blocks have taken besides their first ones (tile/work_queue.cuh); null: at fixed strides
  int num_work;       // tiles of all heads
  MappedTensor attn_mask;  // of (key, query, heads, batch), where it is copied
  KeyShareArguments shares;
  MappedTensor mapped_out;  // where the TMA unit stores it
};

// What operand_terms.cu splits, and where the terms go.
struct OperandTermsArguments {
  TensorView query, key, value;
  bfloat16 *query_terms, *key_terms, *value_terms;  // [batch][seqlen][heads][3][head_dim in whole slabs]
  Geometry geometry;
};

// As ForwardSplitArguments, but that keys and values are copied by the TMA unit. Where values are the first columns of their keys, `value` is not
// there.
struct ForwardWgmmaWideArguments {
  MappedTensor key, value;
  TensorView query, out;
  RowView lse;
  float* partial_out;
  float* partial_lse;
  Geometry geometry;
  SequenceLengths lengths;
  FeatureArguments features;
  CacheArguments cache;
  int num_splits;
  int split_tiles;
};

// What the backward kernels need of a query row. With an additive mask also log2_sum (tile/probability.cuh), in an array of its own.
struct alignas(8) RowStatistics {
  float reference;  // lse in units of the scores (tile/score.cuh); +inf for a row that sees no key, so that P is 0
  float delta;      // sum over d of dO * O, minus the gradient of lse
};

// How blocks of backward_wgmma.cu or backward_dkdv_mma.cu share out the queries of a tile of keys, and which of them add up dQ together, where there
// would be few blocks (tile/query_splits.cuh).
struct QuerySplits {
  float* key_parts;  // dK and dV of each block
  int num_splits;    // blocks of a tile of keys
  int num_chains;    // sums of dQ of a tile of queries
  int chain_tiles;   // tiles of keys whose blocks add to the same sum
  int chain_slots;   // of one chain (tile/query_sums.cuh)
};

struct BackwardArguments {
  TensorView query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  RowView lse, grad_lse;  // grad_lse.data null: zero
  RowStatistics* row_statistics;  // [batch][num_heads_q][seqlen_q]
  Geometry geometry;
  int group_batch, group_heads;  // dK, dV: batches and query heads whose gradients are summed into one output
  SequenceLengths lengths;
  FeatureArguments features;
  float* query_sums;  // dQ before it is scaled and converted (tile/query_sums.cuh)
  int* turns;         // [num_turns]: how many blocks have started, then who may add to each tile of query_sums next
  int num_turns;
  QuerySplits splits;
};

struct BackwardWgmmaArguments {
  MappedTensor query, key, value, grad_out;
  TensorView grad_key, grad_value;
  RowStatistics* row_statistics;  // as in BackwardArguments, and so are all that follow
  Geometry geometry;
  int group_batch, group_heads;
  SequenceLengths lengths;
  FeatureArguments features;
  float* query_sums;
  int* turns;
  TensorView grad_query;  // where the kernel makes it of the sums
  QuerySplits splits;
};

// Tangents, and what the forward call gave. A tangent that is not there has no address, and is zero.
struct ForwardJvpArguments {
  TensorView query, key, value, out;
  TensorView query_dot, key_dot, value_dot, out_dot;
  RowView lse, lse_dot;
  HeadView sinks_dot;             // stride_batch 0
  RowStatistics* row_statistics;  // with an additive mask only: references (backward_row_sums_mma.cu)
  Geometry geometry;
  SequenceLengths lengths;
  FeatureArguments features;
};

struct VisibleTilesArguments {
  Geometry geometry;  // num_tiles: tiles that the next kernel's blocks own
  SequenceLengths lengths;
  FeatureArguments features;
};

struct PackedTilesArguments {
  Geometry geometry;  // num_tiles: that the longest sequence may have
  SequenceLengths lengths;  // packed_tiles: what is written
};

struct DropoutMaskArguments {
  uint8* kept;  // [batch][num_heads_q][seqlen_q][seqlen_kv]
  Geometry geometry;  // num_tiles: blocks of one (batch, head)
  FeatureArguments features;
};
