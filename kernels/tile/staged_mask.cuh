// The elements of a mask and the segment ids of one tile of queries and one of keys, in a stage of shared memory, where the rows of accumulators are
// keys: a warp copies them ahead, and the others read them as they lie in their accumulators. Where rows start on 16 bytes they are copied in chunks
// of that, else element by element.
//
// The mask lies in slabs of TILE_Q rows of 128 bytes, whose chunks are exchanged as chunk ^ (row % 8): the lanes of a warp, which have four queries
// and eight keys, read from different banks. Ids lie behind it, those of the keys first.
#pragma once
#include "arguments.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"
#include "tile/constants.cuh"
#include "tile/features.cuh"
#include "tile/mask.cuh"
#include "tile/score.cuh"
#include "tile/visible_columns.cuh"

class StagedMask {
  static constexpr bool HAS_MASK = BOOLEAN_MASK || ADDITIVE_MASK;
  static constexpr int ROW_BYTES = 128;
  static constexpr int SLAB_KEYS = ROW_BYTES / MASK_BYTES, SLAB_BYTES = TILE_Q * ROW_BYTES;
  static constexpr int CHUNK_KEYS = 16 / MASK_BYTES;
  static constexpr int ELEMENTS_BYTES = HAS_MASK ? TILE_KV / SLAB_KEYS * SLAB_BYTES : 0;
  static_assert(!HAS_MASK || (TILE_KV % SLAB_KEYS == 0 && WARP_SIZE % (TILE_KV / CHUNK_KEYS) == 0), "a warp copies whole rows of whole slabs");

 public:
  static constexpr bool USED = HAS_MASK || SEGMENTS;
  static constexpr int BYTES = ELEMENTS_BYTES + (SEGMENTS ? (TILE_KV + TILE_Q) * int(sizeof(int)) : 0);

  DEVICE explicit StagedMask(SmemAddress stage) : stage(stage) {}

  // Copies the mask. A whole warp. What lies behind the last query or key is 0. True: copies are under way; false: lanes have stored it.
  DEVICE bool copy(const MaskView& view, int batch, int head, int first_q, int first_kv, const Geometry& geometry) const {
    const auto* data = static_cast<const MaskElement*>(view.data) + batch * view.stride_batch + head * view.stride_head;
    const uint64 starts = reinterpret_cast<uint64>(data) | uint64(view.stride_query) * MASK_BYTES;
    if (view.stride_key == 1 && starts % 16 == 0) {
      copy_chunks(data, view.stride_query, first_q, first_kv, geometry);
      return true;
    }
    copy_elements(data, view, first_q, first_kv, geometry);
    return false;
  }

  // Starts the copies of segment ids.
  DEVICE void copy_ids(const FeatureArguments& features, int batch, int first_q, int first_kv, const Geometry& geometry) const {
    copy_ids<TILE_KV>(ids(), features.segment_ids_kv, batch, first_kv, geometry.seqlen_kv);
    copy_ids<TILE_Q>(ids() + TILE_KV * int(sizeof(int)), features.segment_ids_q, batch, first_q, geometry.seqlen_q);
  }

  // Adds an additive mask to a warp's scores, whose keys start at first_key of the tile.
  template <int N>
  DEVICE void add(float (&S)[1][N][4], int first_key) const {
    if constexpr (MASK_BYTES == 2) {
      const int query = lane_index() / 16 * 8 + lane_index() % 8, chunk = first_key / CHUNK_KEYS + lane_index() / 8 % 2;
      const SmemAddress rows = stage + chunk / 8 * SLAB_BYTES + query * ROW_BYTES + (chunk % 8 ^ query % 8) * 16;
#pragma unroll
      for (int k = 0; k < N / 2; ++k) {
        uint32 pair[4];
        ldmatrix_x4_trans(pair, rows + k * 16 * ROW_BYTES);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            add_bias(S[0][2 * k + j / 2][j % 2 * 2 + half], 1.0f, bias_of_bits(MaskBits(pair[j] >> half * 16)));
          }
      }
    } else {
      for_each(S, first_key,
               [&](float& score, SmemAddress at) { add_bias(score, 1.0f, bias_of_bits(MaskBits(__float_as_uint(load_shared_f32(at))))); });
    }
  }

  // Which of a warp's scores data leave, whose keys start at first_key of the tile.
  template <int N>
  DEVICE VisibleColumns<N> visible(int first_key) const {
    VisibleColumns<N> visible;
    if constexpr (SEGMENTS) hide_other_segments(visible, first_key);
    if constexpr (BOOLEAN_MASK) hide_by_mask(visible, first_key);
    return visible;
  }

 private:
  SmemAddress stage;

  DEVICE SmemAddress ids() const { return stage + ELEMENTS_BYTES; }

  template <int COUNT>
  DEVICE static void copy_ids(SmemAddress destination, const SequenceView& view, int batch, int first, int length) {
#pragma unroll 1
    for (int i = lane_index(); i < COUNT; i += WARP_SIZE) {
      const bool is_there = first + i < length;
      const int* source = view.data + batch * view.stride_batch + (is_there ? first + i : 0) * view.stride_position;
      cp_async<4>(true, destination + i * int(sizeof(int)), source, is_there ? 4 : 0);
    }
  }

  template <int N>
  DEVICE void hide_other_segments(VisibleColumns<N>& visible, int first_key) const {
    constexpr int QUERIES = ceil_div(N, 4);  // that a lane knows the ids of
    const int first_row = first_key + lane_index() / 4;
    const int of_keys[2] = {load_shared_s32(ids() + first_row * int(sizeof(int))), load_shared_s32(ids() + (first_row + 8) * int(sizeof(int)))};
    int of_queries[QUERIES];
#pragma unroll
    for (int k = 0; k < QUERIES; ++k) {
      const int query = min(32 * k + column_of_lane(), 8 * N - 1);
      of_queries[k] = load_shared_s32(ids() + (TILE_KV + query) * int(sizeof(int)));
    }
    visible.hide_other_segments(of_keys, of_queries);
  }

  // A key is a byte, so `ldmatrix` gives a lane two neighbouring keys of its queries, which makes bits of their bytes, and lanes with the same
  // queries exchange them. That is for bytes 0 and 1. NumPy and others have no more, but a view of other bytes as booleans does: a warp that finds
  // one looks at each byte.
  template <int N>
  DEVICE void hide_by_mask(VisibleColumns<N>& visible, int first_key) const {
    constexpr int WORDS = VisibleColumns<N>::WORDS;
    uint32 words[2][WORDS], all = 0;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      uint32 own[4] = {};  // of each four accumulator tiles; bytes 0 and 1: bits of the even and the odd key, as in VisibleColumns
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (16 * w + 4 * i < N) own[i] = bits_of_queries<N>(16 * w + 4 * i, first_key, all);
      }
      const uint32 low = __byte_perm(own[0], own[1], 0x5410), high = __byte_perm(own[2], own[3], 0x5410);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int source = 16 * r + lane_index() / 8 * 4 + lane_index() % 4;
        words[r][w] = __byte_perm(shfl(int(low), source), N > 8 ? shfl(int(high), source) : 0, lane_index() / 4 % 2 ? 0x7531 : 0x6420);
      }
    }
    const bool other_bytes = any_lane((all & 0xfefefefeu) != 0);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int w = 0; w < WORDS; ++w) visible.word[r][w] &= other_bytes ? look_at_each<N>(w, first_key + lane_index() / 4 + 8 * r) : words[r][w];
  }

  // The lane's bits of the queries of four accumulator tiles from `n` on, and in `all` whatever bytes had.
  template <int N>
  DEVICE uint32 bits_of_queries(int n, int first_key, uint32& all) const {
    uint32 bytes[4] = {};
    const SmemAddress row = address(8 * n + lane_index(), first_key);
    if (n + 4 <= N) {
      ldmatrix_x4_trans(bytes, row);
    } else {
      uint32 pair[2];
      ldmatrix_x2_trans(pair, row);
      bytes[0] = pair[0];
      bytes[1] = pair[1];
    }
    uint32 bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits += bytes[i] << 2 * i;
      all |= bytes[i];
    }
    return bits | bits >> 15;  // the odd query's behind the even one's
  }

  // The same of any bytes.
  template <int N>
  DEVICE uint32 look_at_each(int w, int key) const {
    uint32 bits = 0;
#pragma unroll 1
    for (int bit = 0; bit < 32 && 128 * w + bit / 2 * 8 < 8 * N; ++bit) {
      if (load_shared_u8(address(128 * w + bit / 2 * 8 + bit % 2 + lane_index() % 4 * 2, key)) != 0) bits |= 1u << bit;
    }
    return bits;
  }

  DEVICE SmemAddress address(int query, int key) const {
    const int chunk = key / CHUNK_KEYS;
    return stage + chunk / 8 * SLAB_BYTES + query * ROW_BYTES + (chunk % 8 ^ query % 8) * 16 + key % CHUNK_KEYS * MASK_BYTES;
  }

  // A lane has the same chunk of several queries.
  DEVICE void copy_chunks(const MaskElement* data, int64 stride_query, int first_q, int first_kv, const Geometry& geometry) const {
    constexpr int CHUNKS = TILE_KV / CHUNK_KEYS, ROWS = WARP_SIZE / CHUNKS;
    const int first_row = lane_index() / CHUNKS, key = lane_index() % CHUNKS * CHUNK_KEYS, num_queries = geometry.seqlen_q - first_q;
    const int valid_bytes = min(max(geometry.seqlen_kv - first_kv - key, 0), CHUNK_KEYS) * MASK_BYTES;
    const auto* source = data + (first_row < num_queries ? first_q + first_row : 0) * stride_query + (valid_bytes > 0 ? first_kv + key : 0);
#pragma unroll 1
    for (int row = first_row; row < TILE_Q; row += ROWS) {
      cp_async<16>(true, address(row, key), source, row < num_queries ? valid_bytes : 0);
      if (row + ROWS < num_queries) source += ROWS * stride_query;
    }
  }

  DEVICE static void store(SmemAddress, NoMask) {}
  DEVICE static void store(SmemAddress at, uint8 element) { store_shared(at, element); }
  DEVICE static void store(SmemAddress at, float16 element) { store_shared(at, element.bits); }
  DEVICE static void store(SmemAddress at, bfloat16 element) { store_shared(at, element.bits); }
  DEVICE static void store(SmemAddress at, float element) { store_shared(at, __float_as_uint(element)); }

  DEVICE void copy_elements(const MaskElement* data, const MaskView& view, int first_q, int first_kv, const Geometry& geometry) const {
#pragma unroll 1
    for (int i = lane_index(); i < TILE_Q * TILE_KV; i += WARP_SIZE) {
      const int query = i / TILE_KV, key = i % TILE_KV;
      MaskElement element{};
      if (first_q + query < geometry.seqlen_q && first_kv + key < geometry.seqlen_kv)
        element = data[(first_q + query) * view.stride_query + (first_kv + key) * view.stride_key];
      store(address(query, key), element);
    }
  }

  // body(element, address of its mask) for a lane's accumulators.
  template <int N, typename Body>
  DEVICE void for_each(float (&c)[1][N][4], int first_key, const Body& body) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SmemAddress at = address(lane_index() % 4 * 2 + i % 2, first_key + lane_index() / 4 + i / 2 * 8);
#pragma unroll
      for (int n = 0; n < N; ++n) body(c[0][n][i], at + n * 8 * ROW_BYTES);
    }
  }
};
