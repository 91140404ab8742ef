// Appends the new keys and values of a call to its cache, and rotates keys and queries by their positions (rotary embedding: Su et al. 2021, arXiv
// 2104.09864), the queries into memory of their own.
//
// New key i of a sequence comes to position seqlens_kv + i of it; one that has no place in the cache is left out. Query i has that position too, or,
// where neither a causal mask nor a window asks for the queries' order, seqlens_kv. A thread moves one element: a step of decoding has few of them.
// Packed (VARLEN), queries and new keys have the same offsets. An 8-bit cache gets what is new divided by the scale of its sequence and head.
#include "ptx/e4m3.cuh"
#include "tile/cache_rows.cuh"
#include "tile/packed_rows.cuh"
#include "tile/rotary.cuh"

using Element = Config::Element;
using CacheElement = Config::CacheElement;

constexpr int NUM_THREADS = Config::NUM_WARPS * WARP_SIZE;

struct Place {  // of an element of (batch, row, head, head_dim)
  int batch, row, head, column;

  DEVICE Place(int64 index, int rows, int heads, int columns) {
    column = int(index % columns);
    head = int(index / columns % heads);
    row = int(index / columns / heads % rows);
    batch = int(index / columns / heads / rows);
  }

  DEVICE Element* in(const TensorView& view) const { return view.row_pointer<Element>(batch, head, row); }
};

struct Token {  // which one it is of which sequence; of nobody's sequence -1
  int sequence, index;

  DEVICE Token(const CacheAppendArguments& arguments, const Place& place) : sequence(place.batch), index(place.row) {
    if constexpr (!VARLEN) return;
    const int* offsets = arguments.lengths.cu_seqlens_q;
    sequence = sequence_of_row(offsets, arguments.lengths.num_sequences, place.row);
    index = sequence < 0 ? 0 : place.row - offsets[sequence];
  }

  DEVICE int64 position(const CacheAppendArguments& arguments, bool advances = true) const {
    if (VARLEN && sequence < 0) return -1;
    return int64(arguments.lengths.seqlens_kv[sequence]) + (advances ? index : 0);
  }
};

DEVICE void append(const CacheAppendArguments& arguments, const TensorView& cache, const HeadView& scales, const Place& place, int sequence,
                   int64 position, float x) {
  if (position < 0 || position >= arguments.geometry.seqlen_kv) return;
  const KeyPlace key = SequenceInCache(arguments.cache, sequence).place(int(position));
  if constexpr (sizeof(CacheElement) == 1) x = __fdiv_rn(x, scales.load_or_1(sequence, place.head));
  cache.row_pointer<CacheElement>(key.page, place.head, key.row)[place.column * cache.stride_dim] = from_float<CacheElement>(x);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) cache_append(const __grid_constant__ CacheAppendArguments arguments) {
  const Geometry& geometry = arguments.geometry;
  const int64 new_rows = int64(geometry.batch) * arguments.cache.new_keys * geometry.num_heads_kv;
  const int64 keys = new_rows * arguments.head_dim, values = new_rows * arguments.head_dim_v;
  const int64 queries = arguments.rotary.dim > 0 ? int64(geometry.batch) * geometry.seqlen_q * geometry.num_heads_q * arguments.head_dim : 0;
  const int64 index = int64(blockIdx.x) * NUM_THREADS + threadIdx.x;
  if (index < keys) {
    const Place place(index, arguments.cache.new_keys, geometry.num_heads_kv, arguments.head_dim);
    const Token token(arguments, place);
    const int64 position = token.position(arguments);
    const float x = rotated(arguments.rotary, place.in(arguments.new_key), arguments.new_key.stride_dim, place.column, position);
    append(arguments, arguments.key, arguments.scales.key, place, token.sequence, position, x);
  } else if (index < keys + values) {
    const Place place(index - keys, arguments.cache.new_keys, geometry.num_heads_kv, arguments.head_dim_v);
    const Token token(arguments, place);
    const float x = to_float(place.in(arguments.new_value)[place.column * arguments.new_value.stride_dim]);
    append(arguments, arguments.value, arguments.scales.value, place, token.sequence, token.position(arguments), x);
  } else if (index < keys + values + queries) {
    const Place place(index - keys - values, geometry.seqlen_q, geometry.num_heads_q, arguments.head_dim);
    const int64 position = Token(arguments, place).position(arguments, arguments.rotary.queries_advance);
    const float x = rotated(arguments.rotary, place.in(arguments.given_query), arguments.given_query.stride_dim, place.column, position);
    place.in(arguments.rotated_query)[place.column * arguments.rotated_query.stride_dim] = from_float<Element>(x);
  }
}
