// Values of a mask at the places of a warp's accumulators.
//
// `read` takes a tile whose queries lie within the arrays and whose keys are neighbours in memory: pairs of keys at once where rows are queries, and
// with TRANSPOSED from one address for each query. `limit` says whether a tile is such a one. `at` reads any element, by stride, at indices clamped
// into the arrays.
#pragma once
#include "tile/features.cuh"
#include "tile/fragment.cuh"

template <int BYTES>
struct BitsOf;  // unsigned integers of one element and of two
template <>
struct BitsOf<1> {
  using One = uint8;
  using Two = uint16;
};
template <>
struct BitsOf<2> {
  using One = uint16;
  using Two = uint32;
};
template <>
struct BitsOf<4> {
  using One = uint32;
  using Two = uint64;
};

DEVICE float mask_element(uint8, NoMask) { return 0.0f; }  // nobody asks; compilers that read what is left out do
DEVICE uint8 mask_element(uint8 bits, uint8) { return bits; }
DEVICE float16 mask_element(uint16 bits, float16) { return {bits}; }
DEVICE bfloat16 mask_element(uint16 bits, bfloat16) { return {bits}; }
DEVICE float mask_element(uint32 bits, float) { return __uint_as_float(bits); }

constexpr int MASK_BYTES = int(sizeof(MaskElement));
using MaskBits = BitsOf<MASK_BYTES>::One;
using MaskPair = BitsOf<MASK_BYTES>::Two;

DEVICE float bias_of_bits(MaskBits bits) { return mask_bias(mask_element(bits, MaskElement{})); }

template <bool TRANSPOSED, int M, int N>
struct MaskTile {  // as it lies in registers
  MaskPair pair[M][N][2];
};
template <int M, int N>
struct MaskTile<true, M, N> {
  uint32 bits[M][N][4];  // of an element each
};

class MaskValues {  // of one batch and query head
 public:
  DEVICE MaskValues(const Geometry& geometry, const MaskView& view, int batch, int head)
      : geometry(geometry), view(view), data(static_cast<const MaskElement*>(view.data) + batch * view.stride_batch + head * view.stride_head) {}

  DEVICE MaskElement at(int query, int key) const {
    return data[min(query, geometry.seqlen_q - 1) * view.stride_query + min(key, geometry.seqlen_kv - 1) * view.stride_key];
  }

  // Whether every chunk of 16 keys lies on 16 bytes, and those of a tile within the arrays or wholly behind the last key.
  DEVICE bool lies_in_chunks(int end_q, int end_kv) const {
    const bool on_chunks = (reinterpret_cast<uint64>(data) | uint64(view.stride_query) * MASK_BYTES) % 16 == 0;
    return view.stride_key == 1 && on_chunks && end_q <= geometry.seqlen_q && (end_kv <= geometry.seqlen_kv || geometry.seqlen_kv % 16 == 0);
  }

  // The chunk from `key` on, a multiple of 16; nothing where it lies behind the last key.
  DEVICE void load_chunk(Chunk& chunk, int query, int key) const {
    if (key < geometry.seqlen_kv) chunk = *reinterpret_cast<const Chunk*>(data + query * view.stride_query + key);
  }

  // Keys below it may be read from a tile; 0 if none may.
  template <bool TRANSPOSED, int M, int N>
  DEVICE int limit(int first_row, int first_column) const {
    const int end_q = TRANSPOSED ? first_column + 8 * N : first_row + 16 * M;
    const bool in_pairs = TRANSPOSED || ((reinterpret_cast<uint64>(data) | uint64(view.stride_query) * MASK_BYTES) % (2 * MASK_BYTES) == 0 &&
                                         geometry.seqlen_kv % 2 == 0);
    return view.stride_key == 1 && in_pairs && end_q <= geometry.seqlen_q ? geometry.seqlen_kv : 0;
  }

  // The lane's elements of such a tile, body(m, n, i, element), in two parts: what happens between them does while they are on their way. No branch
  // is taken around the loads, only predicates.
  template <bool TRANSPOSED, int M, int N>
  DEVICE void read(MaskTile<TRANSPOSED, M, N>& tile, int first_row, int first_column, int limit) const {
    const int row = first_row + lane_index() / 4, column = first_column + lane_index() % 4 * 2;
    if constexpr (TRANSPOSED) {
      const MaskElement* of_query = data + column * view.stride_query + row;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int m = 0; m < M; ++m) {
            const int offset = 16 * m + i / 2 * 8;
            tile.bits[m][n][i] = 0;
            if (row + offset < limit)
              tile.bits[m][n][i] = *reinterpret_cast<const MaskBits*>((i % 2 ? of_query + view.stride_query : of_query) + offset);
          }
        of_query += 8 * view.stride_query;
      }
    } else {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const MaskElement* of_query = data + (row + 16 * m + 8 * r) * view.stride_query + column;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            tile.pair[m][n][r] = 0;
            if (column + 8 * n < limit) tile.pair[m][n][r] = *reinterpret_cast<const MaskPair*>(of_query + 8 * n);
          }
        }
    }
  }
  template <bool TRANSPOSED, int M, int N, typename Body>
  DEVICE static void for_each(const MaskTile<TRANSPOSED, M, N>& tile, Body body) {
    for_each_place<M, N>([&](int m, int n, int i, int, int) {
      if constexpr (TRANSPOSED) {
        body(m, n, i, mask_element(MaskBits(tile.bits[m][n][i]), MaskElement{}));
      } else {
        body(m, n, i, mask_element(MaskBits(tile.pair[m][n][i / 2] >> (i % 2 * 8 * MASK_BYTES)), MaskElement{}));
      }
    });
  }

 private:
  const Geometry& geometry;
  const MaskView& view;
  const MaskElement* data;
};
