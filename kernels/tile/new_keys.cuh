// New keys and values that come with a call and are appended to a cache, where the kernel of attention does it itself (APPENDS): a few of each
// sequence, behind those that the cache has.
//
// Blocks whose rows see them take them from where the caller has them, rotated and converted as the cache will have them: the numbers are those that
// a later call reads. One block of each sequence and key head writes them into the cache, where no block of this call reads them.
#pragma once
#include "ptx/e4m3.cuh"
#include "tile/cache_rows.cuh"
#include "tile/constants.cuh"
#include "tile/rotary.cuh"

constexpr bool APPENDS = Config::APPENDS;

using CacheElement = Config::CacheElement;  // of K and V

// A chunk of a row of `width` numbers, number(column) each.
template <typename To, typename Number>
DEVICE Chunk chunk_of(int chunk, int width, const Number& number) {
  constexpr int BYTES = sizeof(To), ELEMENTS = 16 / BYTES;
  Chunk made{};
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) {
    const int column = chunk * ELEMENTS + i;
    if (column < width) made.word[i * BYTES / 4] |= uint32(from_float<To>(number(column)).bits) << (8 * BYTES * i % 32);
  }
  return made;
}

class NewKeys {  // of one sequence and key head
 public:
  int first;  // position of the first; behind all keys where there are none

  DEVICE NewKeys(const ForwardSplitArguments& arguments, const SequenceInCache& places, int sequence, int head)
      : first(arguments.geometry.seqlen_kv), arguments(arguments), places(places), sequence(sequence), head(head) {
    if constexpr (APPENDS) first = max(-arguments.cache.new_keys, min(arguments.lengths.seqlens_kv[sequence], first));
  }

  // Those among a warp's tile that starts at first_key, and among begin .. end - 1, to shared memory.
  template <typename WarpK, typename WarpV>
  DEVICE void copy(SmemAddress K_smem, SmemAddress V_smem, int first_key, int begin, int end) const {
    const int from = max(max(first, begin), first_key), to = min(end, first_key + WarpK::ROWS);
    constexpr int CHUNKS = WarpK::CHUNKS + WarpV::CHUNKS;
#pragma unroll 1
    for (int index = lane_index(); index < (to - from) * CHUNKS; index += WARP_SIZE) {
      const int key = from + index / CHUNKS, row = key - first_key;
      const bool is_key = index % CHUNKS < WarpK::CHUNKS;
      const int chunk = is_key ? index % CHUNKS : index % CHUNKS - WarpK::CHUNKS;
      store_shared(is_key ? K_smem + WarpK::offset(row, chunk) : V_smem + WarpV::offset(row, chunk), converted(is_key, key, chunk));
    }
  }

  // Writes them into the cache, by all threads of a block; what has no place there is left out.
  template <typename WarpK, typename WarpV>
  DEVICE void append() const {
    constexpr int CHUNKS = WarpK::CHUNKS + WarpV::CHUNKS;
#pragma unroll 1
    for (int index = int(threadIdx.x); index < arguments.cache.new_keys * CHUNKS; index += NUM_THREADS) {
      const int key = first + index / CHUNKS;
      if (key < 0 || key >= arguments.geometry.seqlen_kv) continue;
      const bool is_key = index % CHUNKS < WarpK::CHUNKS;
      const int chunk = is_key ? index % CHUNKS : index % CHUNKS - WarpK::CHUNKS;
      store(is_key, places.place(key), chunk, converted(is_key, key, chunk));
    }
  }

 private:
  const ForwardSplitArguments& arguments;
  const SequenceInCache& places;
  int sequence, head;

  // Of a key, or of its value, what the cache gets. Both are one piece of code, since the loop over tiles has it too.
  DEVICE Chunk converted(bool is_key, int key, int chunk) const {
    const TensorView &keys = arguments.new_key, &values = arguments.new_value;
    const Element* row =
        is_key ? keys.row_pointer<const Element>(sequence, head, key - first) : values.row_pointer<const Element>(sequence, head, key - first);
    const int64 stride_dim = is_key ? keys.stride_dim : values.stride_dim;
    RotaryArguments rotary = arguments.rotary;
    if (!is_key) rotary.dim = 0;
    float scale = 1.0f;
    if constexpr (sizeof(CacheElement) == 1)
      scale = is_key ? arguments.scales.key.load_or_1(sequence, head) : arguments.scales.value.load_or_1(sequence, head);
    return chunk_of<CacheElement>(chunk, is_key ? HEAD_DIM : HEAD_DIM_V, [&](int column) {
      const float x = rotated(rotary, row, stride_dim, column, key);
      return sizeof(CacheElement) == 1 ? __fdiv_rn(x, scale) : x;
    });
  }

  DEVICE void store(bool is_key, const KeyPlace& place, int chunk, const Chunk& made) const {
    constexpr int BYTES = sizeof(CacheElement), ELEMENTS = 16 / BYTES;
    const TensorView &keys = arguments.key, &values = arguments.value;
    CacheElement* row =
        is_key ? keys.row_pointer<CacheElement>(place.page, head, place.row) : values.row_pointer<CacheElement>(place.page, head, place.row);
    const int64 stride_dim = is_key ? keys.stride_dim : values.stride_dim;
    const int column = chunk * ELEMENTS, width = is_key ? HEAD_DIM : HEAD_DIM_V;
    if ((is_key ? is_vectorized(keys) : is_vectorized(values)) && column + ELEMENTS <= width) {
      *reinterpret_cast<Chunk*>(row + column) = made;
      return;
    }
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      if (column + i >= width) continue;
      CacheElement x;
      x.bits = decltype(x.bits)(made.word[i * BYTES / 4] >> (8 * BYTES * i % 32));
      row[(column + i) * stride_dim] = x;
    }
  }
};
