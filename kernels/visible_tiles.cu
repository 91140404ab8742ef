// Which tiles of scores have any visible pair, and which of those have a masked one: lists in the format of tile/visible_tiles.cuh, for the tiles
// that the blocks of the next kernel own. Those are tiles of queries, or with BY_KEYS of keys. With PLACES it makes a table for a kernel whose blocks
// add to tiles of queries in turn: each block has a tile of queries, and counts the tiles of keys that they see.
//
// One block makes one list. Its warps look at neighbouring tiles at the same time, and what they find is listed in the order of the tiles. Where
// neither mask, segments, prefixes nor lengths differ between heads or batches, a list is shared by all of them.
//
// Few tiles are looked at pair by pair: those that a mask of positions cuts, and those in which segments meet. For the others it is enough to read
// the ids of their queries and of their keys, and the mask in 16-byte chunks where it lies so, one element for all along a broadcast axis.
#include "arguments.cuh"
#include "ptx/warp.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_tiles.cuh"

constexpr int TILE_Q = Config::TILE_Q;
constexpr int TILE_KV = Config::TILE_KV;
constexpr bool BY_KEYS = Config::BY_KEYS;
constexpr int NUM_WARPS = Config::NUM_WARPS;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr bool PLACES = Config::PLACES;

static_assert(!PLACES || !BY_KEYS, "the tiles of keys of one tile of queries are counted by one block");

struct Seen {  // of the pairs of a tile, as far as one lane has looked
  bool any = false, all = true;

  DEVICE void add(bool visible) {
    any |= visible;
    all &= visible;
  }
  DEVICE bool is_decided() const { return any_lane(any) && !all_lanes(all); }  // for the whole warp: the rest of the tile changes nothing
};

// visit(i) for i < count, a lane every WARP_SIZE-th of them, until what they have seen decides.
template <typename Visit>
DEVICE void share_out(const Seen& seen, int count, Visit visit) {
  constexpr int AT_ONCE = 4;
#pragma unroll 1
  for (int first = 0; first < count && !seen.is_decided(); first += AT_ONCE * WARP_SIZE)
#pragma unroll
    for (int step = 0; step < AT_ONCE; ++step) {
      const int i = first + step * WARP_SIZE + lane_index();
      if (i < count) visit(i);
    }
}

struct IdRange {
  int low = 0x7fffffff, high = -0x7fffffff - 1;

  DEVICE bool is_one() const { return low == high; }
  DEVICE bool meets(const IdRange& other) const { return low <= other.high && other.low <= high; }
};

// Of the ids of positions first .. end - 1, for the whole warp.
DEVICE IdRange id_range(const SequenceView& ids, int batch, int first, int end) {
  IdRange range;
  for (int position = first + lane_index(); position < end; position += WARP_SIZE) {
    const int id = ids.load(batch, position);
    range.low = min(range.low, id);
    range.high = max(range.high, id);
  }
#pragma unroll
  for (int lane_mask = WARP_SIZE / 2; lane_mask > 0; lane_mask /= 2) {
    range.low = min(range.low, shfl_xor(range.low, lane_mask));
    range.high = max(range.high, shfl_xor(range.high, lane_mask));
  }
  return range;
}

DEVICE bool has_zero_byte(uint32 word) { return ((word - 0x01010101u) & ~word & 0x80808080u) != 0; }

// Elements of a boolean mask: num_rows times num_columns from `corner` on.
DEVICE Seen look_at_mask(const uint8* corner, int num_rows, int64 row_stride, int num_columns, int64 column_stride) {
  Seen seen;
  const bool in_chunks = column_stride == 1 && num_columns % 16 == 0 && (reinterpret_cast<uint64>(corner) | uint64(row_stride)) % 16 == 0;
  if (in_chunks) {
    const int row_chunks = num_columns / 16;
    share_out(seen, num_rows * row_chunks, [&](int i) {
      const Chunk chunk = *reinterpret_cast<const Chunk*>(corner + i / row_chunks * row_stride + i % row_chunks * 16);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        seen.any |= chunk.word[word] != 0;
        seen.all &= !has_zero_byte(chunk.word[word]);
      }
    });
  } else {
    share_out(seen, num_rows * num_columns,
              [&](int i) { seen.add(mask_attends(corner[i / num_columns * row_stride + i % num_columns * column_stride])); });
  }
  return seen;
}

// A tile of the mask that lies within the arrays.
DEVICE Seen look_at_mask(const MaskView& mask, int batch, int head, int first_q, int first_kv) {
  const uint8* corner = static_cast<const uint8*>(mask.data) + batch * mask.stride_batch + head * mask.stride_head + first_q * mask.stride_query +
                        first_kv * mask.stride_key;
  const int num_q = mask.stride_query == 0 ? 1 : TILE_Q, num_kv = mask.stride_key == 0 ? 1 : TILE_KV;
  const bool transposed = mask.stride_query == 1 && mask.stride_key != 1;
  return transposed ? look_at_mask(corner, num_kv, mask.stride_key, num_q, mask.stride_query)
                    : look_at_mask(corner, num_q, mask.stride_query, num_kv, mask.stride_key);
}

DEVICE Seen look_at_pairs(const Visibility& visibility, int seqlen_q, int first_q, int first_kv) {
  Seen seen;
  share_out(seen, TILE_Q * TILE_KV, [&](int pair) {
    const int query = first_q + pair / TILE_KV, key = first_kv + pair % TILE_KV;
    const bool visible = visibility.sees(query, key);
    seen.any |= visible && query < seqlen_q;
    seen.all &= visible;
  });
  return seen;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) visible_tiles(const __grid_constant__ VisibleTilesArguments arguments) {
  const FeatureArguments& features = arguments.features;
  const Work work = work_of_block(arguments.geometry.num_tiles, features.list_heads);
  const auto& geometry = geometry_of(arguments, work.batch);
  const Visibility visibility(geometry, features, work.batch, work.head);

  const int num_columns = BY_KEYS ? (arguments.geometry.seqlen_q + TILE_Q - 1) / TILE_Q : (arguments.geometry.seqlen_kv + TILE_KV - 1) / TILE_KV;
  int begin, end;  // columns that the masks which do not depend on data leave
  if constexpr (BY_KEYS) {
    begin = visibility.first_query(work.tile * TILE_KV) / TILE_Q;
    end = (visibility.end_query(work.tile * TILE_KV, (work.tile + 1) * TILE_KV) + TILE_Q - 1) / TILE_Q;
  } else {
    begin = visibility.first_key(work.tile * TILE_Q) / TILE_KV;
    end = (visibility.end_key(work.tile * TILE_Q, (work.tile + 1) * TILE_Q) + TILE_KV - 1) / TILE_KV;
  }

  auto query_ids = [&](int first) { return id_range(features.segment_ids_q, work.batch, first, min(first + TILE_Q, geometry.seqlen_q)); };
  auto key_ids = [&](int first) { return id_range(features.segment_ids_kv, work.batch, first, min(first + TILE_KV, geometry.seqlen_kv)); };
  IdRange own_ids;
  if constexpr (SEGMENTS) own_ids = BY_KEYS ? key_ids(work.tile * TILE_KV) : query_ids(work.tile * TILE_Q);

  auto look_at_column = [&](int column) {  // its entry in the list; all lanes of a warp together
    const int first_q = (BY_KEYS ? column : work.tile) * TILE_Q, first_kv = (BY_KEYS ? work.tile : column) * TILE_KV;
    bool by_pairs = first_q + TILE_Q > geometry.seqlen_q || visibility.hides_any(first_q, first_q + TILE_Q, first_kv, first_kv + TILE_KV);
    if constexpr (SEGMENTS) {
      const IdRange ids = BY_KEYS ? query_ids(first_q) : key_ids(first_kv);
      if (!ids.meets(own_ids)) return NOTHING_VISIBLE;
      by_pairs |= !(ids.is_one() && own_ids.is_one());
    }
    Seen seen;
    if (by_pairs) {
      seen = look_at_pairs(visibility, geometry.seqlen_q, first_q, first_kv);
    } else if constexpr (BOOLEAN_MASK) {
      seen = look_at_mask(features.attn_mask, work.batch, work.head, first_q, first_kv);
    } else {
      seen.add(true);
    }
    const bool any = any_lane(seen.any), all = all_lanes(seen.all);
    return any ? column * 2 + !all : NOTHING_VISIBLE;
  };

  extern __shared__ int found[];  // [NUM_WARPS]
  int* list = PLACES ? nullptr : visible_tiles_of(geometry, features, work.batch, work.head, work.tile, num_columns);
  auto entry_of = [&](int column) -> int& {  // in the table
    return places_of_tiles(features, work.batch, work.head, num_columns, column, geometry.num_tiles)[work.tile];
  };
  if constexpr (PLACES) {
    for (int column = int(threadIdx.x); column < num_columns; column += NUM_THREADS)
      if (column < begin || column >= end) entry_of(column) = NOTHING_VISIBLE;
  }
  int count = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += NUM_WARPS) {
    const int column = first + warp_index();
    const int entry = column < end ? look_at_column(column) : NOTHING_VISIBLE;
    if (lane_index() == 0) found[warp_index()] = entry;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
      for (int warp = 0; warp < NUM_WARPS; ++warp) {
        const bool is_visible = found[warp] != NOTHING_VISIBLE;
        if constexpr (PLACES) {
          if (first + warp < end) entry_of(first + warp) = is_visible ? count++ * 2 + found[warp] % 2 : NOTHING_VISIBLE;
        } else {
          if (is_visible) list[++count] = found[warp];
        }
      }
    }
    __syncthreads();
  }
  if (!PLACES && threadIdx.x == 0) list[0] = count;
}
