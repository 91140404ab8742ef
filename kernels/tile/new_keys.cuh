// New keys and values that come with a call and are appended to a cache, where the kernel of attention does it itself (APPENDS): a few of each sequence,
// behind those that the cache has.
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

// A chunk of a row of a tile, of which `number(column)` are the elements.
template <typename Tile, typename Number>
DEVICE Chunk chunk_of(int chunk, const Number& number) {
  constexpr int BYTES = sizeof(typename Tile::SmemElement);
  Chunk made{};
#pragma unroll
  for (int i = 0; i < Tile::CHUNK_ELEMENTS; ++i) {
    const int column = chunk * Tile::CHUNK_ELEMENTS + i;
    if (column < Tile::WIDTH) made.word[i * BYTES / 4] |= uint32(from_float<typename Tile::SmemElement>(number(column)).bits) << (8 * BYTES * i % 32);
  }
  return made;
}

class NewKeys {  // of one sequence and key head
 public:
  // Without new keys `first` is behind all others.
  DEVICE NewKeys(const ForwardSplitArguments& arguments, const SequenceInCache& places, int sequence, int head)
      : arguments(arguments), places(places), sequence(sequence), head(head), first(arguments.geometry.seqlen_kv) {
    if constexpr (APPENDS) first = max(-arguments.cache.new_keys, min(arguments.lengths.seqlens_kv[sequence], first));
  }

  // Those among a warp's tile that starts at first_key, and among begin .. end - 1, to shared memory.
  template <typename WarpK, typename WarpV>
  DEVICE void copy(SmemAddress K_smem, SmemAddress V_smem, int first_key, int begin, int end) const {
    const int from = max(max(first, begin), first_key), to = min(end, first_key + WarpK::ROWS);
    constexpr int CHUNKS = WarpK::CHUNKS + WarpV::CHUNKS;
#pragma unroll 1
    for (int index = lane_index(); index < (to - from) * CHUNKS; index += WARP_SIZE) {
      const int key = from + index / CHUNKS, chunk = index % CHUNKS, row = key - first_key;
      if (chunk < WarpK::CHUNKS) {
        store_shared(K_smem + WarpK::offset(row, chunk), key_chunk<WarpK>(key, chunk));
      } else {
        store_shared(V_smem + WarpV::offset(row, chunk - WarpK::CHUNKS), value_chunk<WarpV>(key, chunk - WarpK::CHUNKS));
      }
    }
  }

  // Writes them into the cache, by all threads of a block; what has no place there is left out.
  template <typename WarpK, typename WarpV>
  DEVICE void append() const {
    constexpr int CHUNKS = WarpK::CHUNKS + WarpV::CHUNKS;
#pragma unroll 1
    for (int index = int(threadIdx.x); index < arguments.cache.new_keys * CHUNKS; index += NUM_THREADS) {
      const int key = first + index / CHUNKS, chunk = index % CHUNKS;
      if (key < 0 || key >= arguments.geometry.seqlen_kv) continue;
      const KeyPlace place = places.place(key);
      if (chunk < WarpK::CHUNKS) {
        store<WarpK>(arguments.key, place, chunk, key_chunk<WarpK>(key, chunk));
      } else {
        store<WarpV>(arguments.value, place, chunk - WarpK::CHUNKS, value_chunk<WarpV>(key, chunk - WarpK::CHUNKS));
      }
    }
  }

 private:
  const ForwardSplitArguments& arguments;
  const SequenceInCache& places;
  int sequence, head;

 public:
  int first;  // position of the first of them

 private:
  template <typename Tile>
  DEVICE Chunk key_chunk(int key, int chunk) const {
    const TensorView& view = arguments.new_key;
    const Element* row = view.row_pointer<const Element>(sequence, head, key - first);
    const float scale = scale_of(arguments.scales.key);
    return chunk_of<Tile>(chunk, [&](int column) { return scaled(rotated(arguments.rotary, row, view.stride_dim, column, key), scale); });
  }

  template <typename Tile>
  DEVICE Chunk value_chunk(int key, int chunk) const {
    const TensorView& view = arguments.new_value;
    const Element* row = view.row_pointer<const Element>(sequence, head, key - first);
    const float scale = scale_of(arguments.scales.value);
    return chunk_of<Tile>(chunk, [&](int column) { return scaled(to_float(row[column * view.stride_dim]), scale); });
  }

  DEVICE float scale_of(const HeadView& scales) const { return sizeof(CacheElement) == 1 ? scales.load_or_1(sequence, head) : 1.0f; }
  DEVICE static float scaled(float x, float scale) { return sizeof(CacheElement) == 1 ? __fdiv_rn(x, scale) : x; }

  template <typename Tile>
  DEVICE void store(const TensorView& view, const KeyPlace& place, int chunk, const Chunk& made) const {
    CacheElement* row = view.row_pointer<CacheElement>(place.page, head, place.row);
    const int column = chunk * Tile::CHUNK_ELEMENTS;
    if (is_vectorized(view) && column + Tile::CHUNK_ELEMENTS <= Tile::WIDTH) {
      *reinterpret_cast<Chunk*>(row + column) = made;
      return;
    }
    constexpr int BYTES = sizeof(CacheElement);
#pragma unroll
    for (int i = 0; i < Tile::CHUNK_ELEMENTS; ++i) {
      if (column + i >= Tile::WIDTH) continue;
      CacheElement x;
      x.bits = decltype(x.bits)(made.word[i * BYTES / 4] >> (8 * BYTES * i % 32));
      row[(column + i) * view.stride_dim] = x;
    }
  }
};
