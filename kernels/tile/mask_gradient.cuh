// The gradient of an additive mask that has an element of its own for each pair of query and key, so that nothing is summed: it is dS itself. The
// block that has the tile stores it, and zeros where it visits no tile.
//
// The gradient is contiguous. Two lanes exchange pairs of 16 bits, so that the four lanes of a row store 32 bytes side by side, whole sectors; those
// of float32 have as many. Rows that are no whole number of 8 bytes are stored element by element.
#pragma once
#include "ptx/warp.cuh"
#include "tile/constants.cuh"
#include "tile/features.cuh"
#include "tile/schedule.cuh"
#include "tile/slices.cuh"
#include "tile/visible_tiles.cuh"

constexpr bool STORES_GRAD_MASK = Config::STORES_GRAD_MASK;

static_assert(!STORES_GRAD_MASK || ADDITIVE_MASK, "only an additive mask has a gradient");

template <bool IS_STORED>
class MaskGradientRows {  // of one batch and query head
 public:
  DEVICE MaskGradientRows(const MaskView& view, const Work& work, int num_keys)
      : view(view),
        num_keys(num_keys),
        data(static_cast<MaskElement*>(view.data) + work.batch * view.stride_batch + work.head * view.stride_head),
        in_chunks(num_keys % CHUNK_ELEMENTS == 0) {}

  // Stores the warp's rows of dS, from first_row on and below num_queries, of keys from first_key on.
  template <int M, int N>
  DEVICE void store(const float (&dS)[M][N][4], int first_row, int num_queries, int first_key) const {
    if (slice_index() != 0) return;  // all slices of a wide head have the same scores
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = first_row + 16 * m + 8 * r + lane_index() / 4;
        const int end = query < num_queries ? num_keys : 0;
        if (in_chunks) {
          store_chunks(dS[m], r, row(query), first_key, end);
        } else {
          const int key = first_key + lane_index() % 4 * 2;
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              if (key + 8 * n + c < end) row(query)[(key + 8 * n + c) * view.stride_key] = from_float<MaskElement>(dS[m][n][2 * r + c]);
        }
      }
  }

  // Zeros in rows first_row .. end_row - 1 of keys first_key .. end_key - 1, both multiples of 16 or num_keys.
  DEVICE void clear(int first_row, int end_row, int first_key, int end_key) const {
    const int elements = in_chunks ? CHUNK_ELEMENTS : 1;
#pragma unroll 1
    for (int query = first_row + warp_index(); query < end_row; query += NUM_WARPS)
#pragma unroll 1
      for (int key = first_key + lane_index() * elements; key < end_key; key += WARP_SIZE * elements) {
        if (in_chunks) {
          *reinterpret_cast<uint64*>(row(query) + key) = 0;
        } else {
          row(query)[key * view.stride_key] = from_float<MaskElement>(0.0f);
        }
      }
  }

  // The same in all tiles of keys that a walk from step `begin` to `end` does not visit.
  template <typename Arguments>
  DEVICE void clear_unvisited(int first_row, int end_row, const Arguments& arguments, const Work& work, int begin, int end) const {
    int next_key = 0;
    if constexpr (TILE_LISTS) {
      const VisibleTiles tiles(arguments.geometry, arguments.features, work.batch, work.head, work.tile, ceil_div(num_keys, TILE_KV));
      for (int step = begin; step < end; ++step) {
        const int first_key = tiles.tile(step) * TILE_KV;
        clear(first_row, end_row, next_key, first_key);
        next_key = first_key + TILE_KV;
      }
    } else if (begin < end) {
      clear(first_row, end_row, 0, begin * TILE_KV);
      next_key = end * TILE_KV;
    }
    clear(first_row, end_row, next_key, num_keys);
  }

 private:
  static constexpr int CHUNK_ELEMENTS = int(sizeof(uint64) / sizeof(MaskElement));
  const MaskView& view;
  const int num_keys;
  MaskElement* const data;
  const bool in_chunks;

  DEVICE MaskElement* row(int query) const { return data + query * view.stride_query; }

  // Of rows 8 r below the first one of a tile of 16: eight bytes of each lane, or of 16 bits for each two accumulator tiles, of which lanes of even
  // index take the first.
  template <int N>
  DEVICE static void store_chunks(const float (&dS)[N][4], int r, MaskElement* row, int first_key, int end) {
    if constexpr (sizeof(MaskElement) == 4) {
      const int key = first_key + lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (key + 8 * n < end) *reinterpret_cast<float2*>(row + key + 8 * n) = make_float2(dS[n][2 * r], dS[n][2 * r + 1]);
    } else {
      const bool is_odd = lane_index() % 2 != 0;
      const int key = first_key + (is_odd ? 8 : 0) + lane_index() % 4 / 2 * 4;
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        const uint32 first = pack<MaskElement>(dS[n][2 * r], dS[n][2 * r + 1]), second = pack<MaskElement>(dS[n + 1][2 * r], dS[n + 1][2 * r + 1]);
        const uint32 other = uint32(shfl_xor(int(is_odd ? first : second), 1));
        const uint32 low = is_odd ? other : first, high = is_odd ? second : other;
        if (key + 8 * n < end) *reinterpret_cast<uint64*>(row + key + 8 * n) = uint64(high) << 32 | low;
      }
    }
  }
};

template <>
class MaskGradientRows<false> {  // where nobody asks
 public:
  DEVICE MaskGradientRows(const MaskView&, const Work&, int) {}
  template <int M, int N>
  DEVICE void store(const float (&)[M][N][4], int, int, int) const {}
  DEVICE void clear(int, int, int, int) const {}
  template <typename Arguments>
  DEVICE void clear_unvisited(int, int, const Arguments&, const Work&, int, int) const {}
};

using MaskGradient = MaskGradientRows<STORES_GRAD_MASK>;
