// Where the keys of a sequence lie: in one row of a cache, in pages that a table lists, or packed behind those of the sequence before; and the
// copies of tiles of them that a warp makes for itself.
//
// Lengths, tables and indices are read here, on the device. Whatever they hold, no access leaves the arrays: numbers are clamped, and entries of keys
// that nobody sees are not even read.
#pragma once
#include "arguments.cuh"
#include "ptx/warp.cuh"
#include "tile/load.cuh"
#include "tile/sequence.cuh"
#include "tile/smem_tile.cuh"

constexpr bool PAGED = Config::PAGED;

// The sequence's geometry: the call's, with the numbers of its own keys and queries. Each packed query came with a new key, if any are new.
template <typename Arguments>
DEVICE Geometry geometry_in_cache(const Arguments& arguments, int sequence) {
  if constexpr (PACKED_KEYS) return geometry_of(arguments, sequence);
  const Geometry& of_call = arguments.geometry;
  const SequenceLengths& lengths = arguments.lengths;
  Geometry geometry = of_call;
  if constexpr (SEQLENS_KV) {
    int new_keys = arguments.cache.new_keys;
    if constexpr (VARLEN) {
      geometry.seqlen_q = sequence_place(lengths.cu_seqlens_q, sequence, of_call.seqlen_q);
      new_keys = new_keys > 0 ? geometry.seqlen_q : 0;
    }
    const int64 length = int64(lengths.seqlens_kv[sequence]) + new_keys;
    geometry.seqlen_kv = int(max(int64(0), min(length, int64(of_call.seqlen_kv))));
    geometry.causal_offset = lengths.bottom_right ? geometry.seqlen_kv - geometry.seqlen_q : 0;
  }
  return geometry;
}

struct KeyPlace {  // `row` of `page`, or of a batch's row of the cache; row -1: no key
  int page, row;
};

constexpr int NOT_IN_CACHE = -2;  // in the place of the row of a key that somebody else copies (tile/new_keys.cuh)

class SequenceInCache {
 public:
  // `first_row`: of packed keys, the sequence's first.
  DEVICE SequenceInCache(const CacheArguments& cache, int sequence, int first_row = 0) : cache(cache), own(sequence), first_row(first_row) {
    if constexpr (PACKED_KEYS) {
      own = 0;
    } else if constexpr (PAGED) {
      table = cache.page_table + sequence * cache.stride_page_table;
    } else if (cache.batch_indices != nullptr) {
      own = in_cache(cache.batch_indices[sequence]);
    }
    first_key = cache.leftpad == nullptr ? 0 : max(cache.leftpad[sequence], 0);
  }

  DEVICE KeyPlace place(int key) const {
    if constexpr (!PAGED) return {own, PACKED_KEYS ? first_row + key : key};
    const int page = key / cache.page_size;
    return {in_cache(table[page]), key - page * cache.page_size};
  }

  int first_key;  // keys before it are not seen

 private:
  const CacheArguments& cache;
  const int* table = nullptr;
  int own, first_row;

  DEVICE int in_cache(int index) const { return max(0, min(index, cache.num_rows - 1)); }
};

// The rows of a tile of KEYS keys that a lane copies: every ROW_STEP-th, LANES neighbouring lanes to a row.
template <int KEYS, int LANES, bool SOME_ARE_NEW>
struct LaneKeys {
  static constexpr int ROW_STEP = WARP_SIZE / LANES;
  static constexpr int COUNT = ceil_div(KEYS, ROW_STEP);
  KeyPlace places[COUNT];

  // Of the tile that starts at first_key; keys outside of begin .. end - 1 are none. Those from first_new on are not in the cache.
  DEVICE void look_up(const SequenceInCache& sequence, int first_key, int begin, int end, int first_new) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int row = lane_index() / LANES + i * ROW_STEP, key = first_key + row;
      places[i] = {0, -1};
      if (row < KEYS && key >= begin && key < end) places[i] = SOME_ARE_NEW && key >= first_new ? KeyPlace{0, NOT_IN_CACHE} : sequence.place(key);
    }
  }

  // Starts the copy of these rows of (batch or page, head) into a tile; zeros where there is no key, so that no NaN in memory that nobody sees
  // reaches a product.
  template <typename Tile, typename Element>
  DEVICE void copy(SmemAddress tile, const TensorView& view, int head) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int row = lane_index() / LANES + i * ROW_STEP;
      if (KEYS % ROW_STEP != 0 && row >= KEYS) continue;
      const bool is_copied = !SOME_ARE_NEW || places[i].row != NOT_IN_CACHE;
      const Element* source = view.row_pointer<const Element>(places[i].page, head, max(places[i].row, 0));
      const int width = places[i].row < 0 ? 0 : Tile::WIDTH;
      if (is_vectorized(view)) {
#pragma unroll
        for (int chunk = lane_index() % LANES, j = 0; j < Tile::CHUNKS / LANES; ++j, chunk += LANES)
          cp_async<16>(is_copied, tile + Tile::offset(row, chunk), source + chunk * Tile::CHUNK_ELEMENTS,
                       elements<Tile>(chunk, width) * int(sizeof(Element)));
      } else if (is_copied) {
#pragma unroll 1
        for (int chunk = lane_index() % LANES; chunk < Tile::CHUNKS; chunk += LANES)
          store_shared(tile + Tile::offset(row, chunk),
                       gather_chunk<Element>(source + chunk * Tile::CHUNK_ELEMENTS * view.stride_dim, view.stride_dim, elements<Tile>(chunk, width)));
      }
    }
  }

 private:
  // How many elements of a chunk a row of so many columns has.
  template <typename Tile>
  DEVICE static int elements(int chunk, int width) {
    if constexpr (Tile::WIDTH == Tile::COLUMNS) return width == 0 ? 0 : Tile::CHUNK_ELEMENTS;
    return max(0, min(width - chunk * Tile::CHUNK_ELEMENTS, Tile::CHUNK_ELEMENTS));
  }
};
