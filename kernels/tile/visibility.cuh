// Which keys a query may see, all masks taken together: the end of the arrays and the causal diagonal (tile/causal.cuh), the window, the causal
// diagonal lifted for the keys of a prefix, equal segment ids, and a boolean mask, alone or beside an additive one. Query q sees key k where all of
// them allow it. A boolean mask beside an additive one is looked at in every tile; nobody lists tiles for it.
//
// Values of the mask and segment ids are read where they are needed, by stride, at indices clamped into the arrays.
#pragma once
#include "tile/features.cuh"
#include "tile/causal.cuh"
#include "tile/mask.cuh"
#include "tile/hidden_bits.cuh"
#include "tile/visible_columns.cuh"

class Visibility {  // of one batch and query head
 public:
  DEVICE Visibility(const Geometry& geometry, const FeatureArguments& features, int batch, int head)
      : geometry(geometry), features(features), batch(batch), head(head) {
    if constexpr (PREFIX) prefix = min(features.prefix_lengths.load(batch, 0), geometry.seqlen_kv);
    if constexpr (WINDOW) {
      window_low = around_diagonal(features.window_low);
      window_high = around_diagonal(features.window_high);
    }
  }

  // The first key that any query from `first_q` on sees.
  DEVICE int first_key(int first_q) const {
    if constexpr (WINDOW) return int(max(int64(0), int64(first_q) + window_low));
    return 0;
  }

  // One past the last key that any query of first_q .. end_q - 1 sees; 0 where they see none.
  DEVICE int end_key(int first_q, int end_q) const {
    int end = causal_end_key<Config::CAUSAL>(geometry, end_q);
    if constexpr (PREFIX) end = max(end, prefix);
    if constexpr (WINDOW) {
      end = int(max(int64(0), min(int64(end), int64(min(end_q, geometry.seqlen_q)) + window_high)));
      if (end <= first_key(first_q)) end = 0;
    }
    if (IN_PLACES && first_q >= geometry.seqlen_q) end = 0;  // there may be no query at all, whose mask would lie before the array
    return end;
  }

  // The first query that sees any key from `first_kv` on.
  DEVICE int first_query(int first_kv) const {
    int first = PREFIX && first_kv < prefix ? 0 : causal_first_query<Config::CAUSAL>(geometry, first_kv);
    if constexpr (WINDOW) first = int(max(int64(first), min(int64(geometry.seqlen_q), int64(first_kv) - window_high)));
    return first;
  }

  // One past the last query that sees any key of first_kv .. end_kv - 1; 0 where none does.
  DEVICE int end_query(int first_kv, int end_kv) const {
    int end = geometry.seqlen_q;
    if constexpr (WINDOW) {
      end = int(max(int64(0), min(int64(end), int64(min(end_kv, geometry.seqlen_kv)) - window_low)));
      if (end <= first_query(first_kv)) end = 0;
    }
    if (SEQLENS_KV && first_kv >= geometry.seqlen_kv) end = 0;
    return end;
  }

  // The keys that a query sees as far as that does not depend on data, from `first` to before `end`, or with TRANSPOSED the queries that see a key.
  template <bool TRANSPOSED>
  DEVICE void find_range(int row, int& first, int& end) const {
    first = TRANSPOSED ? first_query(row) : first_key(row);
    end = !TRANSPOSED ? end_key(row, row + 1) : row < geometry.seqlen_kv ? end_query(row, row + 1) : 0;
  }

  // The last query whose window reaches back to a key, as if there were as many: of the next key it is the next one.
  DEVICE int last_of_window(int key) const { return int(max(int64(-UNLIMITED / 2), min(int64(UNLIMITED - 64), int64(key) - window_low))); }

  // Whether some pair of the tile (queries first_q .. end_q - 1, keys first_kv .. end_kv - 1) is hidden, as far as that does not depend on data.
  DEVICE bool hides_any(int first_q, int end_q, int first_kv, int end_kv) const {
    if constexpr (PAIR_MASK) return true;
    bool hides = PREFIX ? end_kv > geometry.seqlen_kv || (end_kv > prefix && ::hides_any<true>(geometry, first_q, end_kv))
                        : ::hides_any<Config::CAUSAL>(geometry, first_q, end_kv);
    if constexpr (WINDOW) hides |= end_kv - 1 - first_q > window_high || first_kv - (end_q - 1) < window_low;
    return hides;
  }

  // ASKS_MASK: False where another one asks the boolean mask.
  template <bool ASKS_MASK = BOOLEAN_MASK>
  DEVICE bool sees(int query, int key) const {
    bool visible = is_visible<Config::CAUSAL>(geometry, query, key);
    if constexpr (PREFIX) visible |= key < prefix;
    if constexpr (WINDOW) visible &= key - query >= window_low && key - query <= window_high;
    if constexpr (SEGMENTS || ASKS_MASK || PAIR_MASK) {
      const int q = min(query, geometry.seqlen_q - 1), k = min(key, geometry.seqlen_kv - 1);
      if constexpr (SEGMENTS) visible &= features.segment_ids_q.load(batch, q) == features.segment_ids_kv.load(batch, k);
      if constexpr (ASKS_MASK) visible &= mask_attends(mask().at(q, k));
      if constexpr (PAIR_MASK) {
        const MaskView& view = features.pair_mask;
        visible &= static_cast<const uint8*>(
                       view.data)[batch * view.stride_batch + head * view.stride_head + q * view.stride_query + k * view.stride_key] != 0;
      }
    }
    return visible;
  }

  DEVICE MaskValues mask() const { return MaskValues(geometry, features.attn_mask, batch, head); }

  const Geometry& geometry;
  const FeatureArguments& features;
  const int batch, head;

 private:
  int prefix = 0;
  int window_low = 0, window_high = 0;  // of key - query

  DEVICE int around_diagonal(int limit) const {
    if (limit == UNLIMITED || limit == -UNLIMITED) return limit;
    return int(max(int64(-UNLIMITED), min(int64(UNLIMITED), int64(limit) + geometry.causal_offset)));
  }
};

// Segment ids of the rows and columns of a warp's accumulators. A lane has those of rows 32 k + lane, and of the columns that it answers for
// (tile/visible_columns.cuh).
template <bool TRANSPOSED, int M, int N>
class SegmentsAhead {
 public:
  static constexpr bool USED = SEGMENTS && !PAIR_MASK;

  DEVICE void read(const Visibility& visibility, int first_row, int first_column, bool is_partial) {
    if constexpr (USED) {
      if (!is_partial) return;
      const Geometry& geometry = visibility.geometry;
      const FeatureArguments& features = visibility.features;
      const SequenceView& of_rows = TRANSPOSED ? features.segment_ids_kv : features.segment_ids_q;
      const SequenceView& of_columns = TRANSPOSED ? features.segment_ids_q : features.segment_ids_kv;
      const int end_row = TRANSPOSED ? geometry.seqlen_kv : geometry.seqlen_q, end_column = TRANSPOSED ? geometry.seqlen_q : geometry.seqlen_kv;
#pragma unroll
      for (int k = 0; k < OF_COLUMNS; ++k)
        column_segments[k] = of_columns.load(visibility.batch, min(first_column + 32 * k + column_of_lane(), end_column - 1));
#pragma unroll
      for (int k = 0; k < OF_ROWS; ++k) row_segments[k] = of_rows.load(visibility.batch, min(first_row + 32 * k + lane_index(), end_row - 1));
    }
  }

  // Hides what other segments have, if the tile is partial, and what positions hide, if they hide any.
  DEVICE void hide(float (&c)[M][N][4], float hidden, const Visibility& visibility, int first_row, int first_column, bool is_partial,
                   bool by_position) const {
    VisibleColumns<N, M> visible;
    if (is_partial) {
      int segments[2 * M];
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) segments[r] = shfl(row_segments[r / 4], r % 4 * 8 + lane_index() / 4);
      visible.hide_other_segments(segments, column_segments);
    }
    if (by_position) {
      const int lane_row = first_row + lane_index() / 4, lane_column = first_column + lane_index() % 4 * 2;
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
        int first, end;
        visibility.find_range<TRANSPOSED>(lane_row + 8 * r, first, end);
        visible.cut(r, first - lane_column, end - lane_column);
      }
    }
    visible.apply(c, hidden);
  }

 private:
  static constexpr int OF_ROWS = ceil_div(M, 2), OF_COLUMNS = ceil_div(N, 4);
  int row_segments[OF_ROWS], column_segments[OF_COLUMNS];
};

// The elements of a boolean mask of a tile, where registers allow it and no segments hide pairs too.
template <bool TRANSPOSED, bool ASKS_MASK, int M, int N>
struct BooleanMaskAhead {
  static constexpr int REGISTERS = M * N * (TRANSPOSED ? 4 : 2);
  static constexpr bool USED = ASKS_MASK && !SEGMENTS && REGISTERS <= 16;

  DEVICE void read(const Visibility& visibility, int first_row, int first_column, bool is_partial) {
    if constexpr (USED) {
      if (!is_partial) return;
      const MaskValues mask = visibility.mask();
      limit = mask.limit<TRANSPOSED, M, N>(first_row, first_column);
      mask.read(tile, first_row, first_column, limit);
    }
  }

  int limit = 0;  // as of MaskValues
  MaskTile<TRANSPOSED, USED ? M : 1, USED ? N : 1> tile;
};

// The same where rows are keys, as bits.
template <bool TRANSPOSED, bool ASKS_MASK, int M, int N>
struct HiddenBitsAhead {
  static constexpr bool USED = ASKS_MASK && !SEGMENTS && TRANSPOSED && HiddenBits<M, N>::FITS;

  DEVICE void read(const Visibility& visibility, int first_row, int first_column, bool is_partial) {
    if constexpr (USED) {
      bits.read(visibility.mask(), first_row, first_column, is_partial);
    }
  }
  DEVICE void make(bool is_partial) {
    if constexpr (USED) {
      if (is_partial) bits.make();
    }
  }

  HiddenBits<USED ? M : 1, USED ? N : 2> bits;
};

// What data say of the pairs of a tile, read ahead of `hide`: products, barriers or other warps take the loads' time. Nothing of a tile that is not
// partial. READS_SEGMENTS: segment ids too.
template <bool TRANSPOSED, int M, int N, bool ASKS_MASK = BOOLEAN_MASK, bool READS_SEGMENTS = true>
struct HiddenAhead {
  using Segments = SegmentsAhead<TRANSPOSED, M, N>;
  using Bits = HiddenBitsAhead<TRANSPOSED, ASKS_MASK, M, N>;
  using Mask = BooleanMaskAhead<TRANSPOSED, ASKS_MASK && !Bits::USED, M, N>;
  static constexpr bool HAS_SEGMENTS = Segments::USED && READS_SEGMENTS, HAS_MASK = Mask::USED, HAS_BITS = Bits::USED;
  Segments segments;
  Mask mask;
  Bits bits;

  DEVICE void read(const Visibility& visibility, int first_row, int first_column, bool is_partial) {
    if constexpr (HAS_SEGMENTS) segments.read(visibility, first_row, first_column, is_partial);
    mask.read(visibility, first_row, first_column, is_partial);
    bits.read(visibility, first_row, first_column, is_partial);
  }

  // Between `read` and `hide`, when what was read is there.
  DEVICE void make_bits(bool is_partial) { bits.make(is_partial); }
};

struct NothingAhead {  // in the place of HiddenAhead
  struct Segments {
    static constexpr bool USED = false;
  };
  static constexpr bool HAS_SEGMENTS = false, HAS_MASK = false, HAS_BITS = false;
};

// Gives `hidden` to the elements of a warp's accumulators whose pair is not visible. The block's tile starts at first_q and first_kv, the warp's
// rows at warp_row of it: queries, or with TRANSPOSED keys. `is_partial`: data hide some pair of the tile. ASKS_MASK as in `Visibility::sees`.
// Without `ahead`, data are read where they are looked at, which takes more time and fewer registers.
//
// Numbers come by reference, and the causal mask, where it is the only one, is asked of the geometry: anything else is compiled to other code, which
// takes more registers (docs/log-features.md).
template <bool TRANSPOSED, bool ASKS_MASK = BOOLEAN_MASK, int M, int N, typename Ahead = NothingAhead>
DEVICE void hide(float (&c)[M][N][4], float hidden, const Geometry& geometry, const Visibility& visibility, const int& first_q, const int& first_kv,
                 const int& warp_row, bool is_partial, const Ahead& ahead = Ahead()) {
  if (!(ONLY_CAUSAL ? hides_any<Config::CAUSAL>(geometry, first_q, first_kv + Config::TILE_KV)
                    : is_partial || visibility.hides_any(first_q, first_q + Config::TILE_Q, first_kv, first_kv + Config::TILE_KV)))
    return;
  if constexpr (Ahead::HAS_SEGMENTS && !ASKS_MASK) {
    const bool by_position = !TRANSPOSED || visibility.hides_any(first_q, first_q + Config::TILE_Q, first_kv, first_kv + Config::TILE_KV);
    ahead.segments.hide(c, hidden, visibility, (TRANSPOSED ? first_kv : first_q) + warp_row, TRANSPOSED ? first_q : first_kv, is_partial,
                        by_position);
    return;
  }
  // Where rows are keys this takes fewer registers than to compare ids pair by pair, but not where positions hide pairs too.
  if constexpr (TRANSPOSED && Ahead::Segments::USED && !Ahead::HAS_SEGMENTS && !ASKS_MASK && !Config::CAUSAL) {
    typename Ahead::Segments segments;
    const bool by_position = visibility.hides_any(first_q, first_q + Config::TILE_Q, first_kv, first_kv + Config::TILE_KV);
    segments.read(visibility, first_kv + warp_row, first_q, is_partial);
    segments.hide(c, hidden, visibility, first_kv + warp_row, first_q, is_partial, by_position);
    return;
  }
  if constexpr (ASKS_MASK && !SEGMENTS) {  // in most tiles nothing else hides a pair
    const int first_row = (TRANSPOSED ? first_kv : first_q) + warp_row, first_column = TRANSPOSED ? first_q : first_kv;
    const bool only_data = !visibility.hides_any(first_q, first_q + Config::TILE_Q, first_kv, first_kv + Config::TILE_KV);
    if constexpr (Ahead::HAS_BITS) {
      if (ahead.bits.bits.are_there() && only_data) {
        ahead.bits.bits.apply(c, hidden);
        return;
      }
    }
    auto apply = [&](int m, int n, int i, MaskElement element) { c[m][n][i] = mask_attends(element) ? c[m][n][i] : hidden; };
    if constexpr (Ahead::HAS_MASK) {
      if (ahead.mask.limit > 0 && only_data) {
        MaskValues::for_each(ahead.mask.tile, apply);
        return;
      }
    } else {
      const MaskValues mask = visibility.mask();
      const int limit = mask.limit<TRANSPOSED, M, N>(first_row, first_column);
      if (limit > 0 && only_data) {
        MaskTile<TRANSPOSED, M, N> tile;
        mask.read(tile, first_row, first_column, limit);
        MaskValues::for_each(tile, apply);
        return;
      }
    }
  }
  for_each_element(c, [&](int row, int column, float& element) {
    const int query = TRANSPOSED ? first_q + column : first_q + warp_row + row;
    const int key = TRANSPOSED ? first_kv + warp_row + row : first_kv + column;
    const bool visible = ONLY_CAUSAL ? is_visible<Config::CAUSAL>(geometry, query, key) : visibility.template sees<ASKS_MASK>(query, key);
    if (!visible) element = hidden;
  });
}
