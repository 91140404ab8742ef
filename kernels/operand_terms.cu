// Before forward_wgmma_float32.cu: each number x of Q, K and V as a sum of three of bfloat16,
//
//     high = bfloat16(x),  middle = bfloat16(x - high),  low = x - high - middle,
//
// which leaves nothing over: each takes 8 of the 24 bits of x, and a sign. Of numbers below 2^-109 it does: bfloat16 ends at 2^-133. Infinity, and
// what bfloat16 rounds to it, has a rest of NaN: such inputs give NaN where they are seen.
//
// A row of an array of terms has the high terms of all columns, then the middle and then the low ones, each filled up with zeros to whole slabs
// (tile/slab_tile.cuh). Rows lie as (batch, seqlen, heads), whatever the strides of the array are. A thread has eight columns of a row.
#include "arguments.cuh"
#include "ptx/convert.cuh"
#include "tile/load.cuh"

constexpr int NUM_THREADS = Config::NUM_WARPS * WARP_SIZE;
constexpr int COLUMNS_OF_THREAD = 8;
constexpr int SLAB_COLUMNS = 64;
constexpr int TERMS = 3;

// Columns `first` and the one behind it, of all terms.
DEVICE void split_pair(float first, float second, uint32 (&pairs)[TERMS]) {
#pragma unroll
  for (int term = 0; term < TERMS; ++term) {
    pairs[term] = pack<bfloat16>(first, second);
    first -= __uint_as_float(pairs[term] << 16);
    second -= __uint_as_float(pairs[term] & 0xffff0000u);
  }
}

template <int DIM>
struct TermsOf {
  static constexpr int TERM_COLUMNS = round_up(DIM, SLAB_COLUMNS);
  static constexpr uint32 THREADS_PER_ROW = TERM_COLUMNS / COLUMNS_OF_THREAD;

  // What thread `index` of an array does.
  DEVICE static void write(const TensorView& view, bfloat16* terms, uint32 index, uint32 seqlen, uint32 heads) {
    const uint32 row = index / THREADS_PER_ROW;
    const int column = int(index % THREADS_PER_ROW) * COLUMNS_OF_THREAD;
    const uint32 of_heads = row / heads;
    const float* source = view.row_pointer<float>(int(of_heads / seqlen), int(row % heads), int(of_heads % seqlen)) + column * view.stride_dim;
    float x[COLUMNS_OF_THREAD];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int left = DIM - column - 4 * half;
      const Chunk chunk = is_vectorized(view) && left >= 4 ? *reinterpret_cast<const Chunk*>(source + 4 * half)
                                                           : gather_chunk<float>(source + 4 * half * view.stride_dim, view.stride_dim, left);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[4 * half + i] = __uint_as_float(chunk.word[i]);
    }
    Chunk of_term[TERMS];
#pragma unroll
    for (int i = 0; i < COLUMNS_OF_THREAD / 2; ++i) {
      uint32 pairs[TERMS];
      split_pair(x[2 * i], x[2 * i + 1], pairs);
#pragma unroll
      for (int term = 0; term < TERMS; ++term) of_term[term].word[i] = pairs[term];
    }
#pragma unroll
    for (int term = 0; term < TERMS; ++term) *reinterpret_cast<Chunk*>(terms + (int64(row) * TERMS + term) * TERM_COLUMNS + column) = of_term[term];
  }
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS) operand_terms(const __grid_constant__ OperandTermsArguments arguments) {
  using OfKey = TermsOf<Config::HEAD_DIM>;
  using OfValue = TermsOf<Config::HEAD_DIM_V>;
  const Geometry& geometry = arguments.geometry;
  const uint32 rows_q = uint32(geometry.batch) * geometry.seqlen_q * geometry.num_heads_q;
  const uint32 rows_kv = uint32(geometry.batch) * geometry.seqlen_kv * geometry.num_heads_kv;
  const uint32 of_query = rows_q * OfKey::THREADS_PER_ROW, of_key = rows_kv * OfKey::THREADS_PER_ROW, of_value = rows_kv * OfValue::THREADS_PER_ROW;
  uint32 index = blockIdx.x * NUM_THREADS + threadIdx.x;
  if (index < of_query) return OfKey::write(arguments.query, arguments.query_terms, index, geometry.seqlen_q, geometry.num_heads_q);
  index -= of_query;
  if (index < of_key) return OfKey::write(arguments.key, arguments.key_terms, index, geometry.seqlen_kv, geometry.num_heads_kv);
  index -= of_key;
  if (index < of_value) OfValue::write(arguments.value, arguments.value_terms, index, geometry.seqlen_kv, geometry.num_heads_kv);
}
