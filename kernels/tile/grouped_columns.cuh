// What data say of a warp's accumulators whose two rows in each lane are grouped (tile/grouped_rows.cuh), so that heads and queries may differ from
// row to row: elements of a mask, which segments meet, and which probabilities dropout keeps. It is looked up while the product of scores runs, and
// waits in registers: of what is hidden or dropped a bit for each column of the lane (tile/visible_columns.cuh).
#pragma once
#include "tile/dropout.cuh"
#include "tile/grouped_rows.cuh"
#include "tile/mask.cuh"
#include "tile/visible_columns.cuh"

template <int N>  // accumulator tiles of a row
class GroupedColumns {
 public:
  DEVICE GroupedColumns(const Geometry& geometry, const FeatureArguments& features, int batch, const GroupedRows& rows, int first_row)
      : geometry(geometry), features(features), batch(batch), dropout(features) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r + lane_index() / 4;
      query[r] = rows.query(row);
      head[r] = rows.head(row);
      if constexpr (SEGMENTS) segment[r] = features.segment_ids_q.load(batch, query[r]);
    }
  }

  // Of the keys from first_key on; `hides`: data hide some pair of the tile.
  DEVICE void look_up(int first_key, bool hides) {
    hides_any = hides;
    if (ADDITIVE_MASK || (BOOLEAN_MASK && hides)) read_mask(first_key);
    if constexpr (SEGMENTS) {
      if (hides) read_segments(first_key);
    }
    if constexpr (DROPOUT) draw(first_key);
  }

  // Scores with an additive mask.
  DEVICE void add_mask(float (&S)[1][N][4]) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const MaskElement element = mask_element(MaskBits(mask[i / 2][n] >> (i % 2 * 8 * MASK_BYTES)), MaskElement{});
        add_bias(S[0][n][i], 1.0f, mask_bias(element));
      }
  }

  // -inf in the place of scores that data hide.
  DEVICE void hide(float (&S)[1][N][4]) const {
    if (!hides_any) return;
    VisibleColumns<N> seen;
    if constexpr (SEGMENTS) seen.hide_other_segments(segment, key_segments);
    if constexpr (BOOLEAN_MASK) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int w = 0; w < WORDS; ++w) seen.word[r][w] &= attended.word[r][w];
    }
    seen.apply(S, -infinity());
  }

  // 0 in the place of probabilities that are dropped.
  DEVICE void drop(float (&P)[1][N][4]) const { kept.apply(P, 0.0f); }

 private:
  static constexpr int WORDS = ceil_div(N, 16), KEY_SEGMENTS = ceil_div(8 * N, WARP_SIZE);
  const Geometry& geometry;
  const FeatureArguments& features;
  const int batch;
  const Dropout dropout;
  int query[2], head[2], segment[2];
  bool hides_any = false;
  MaskPair mask[2][ADDITIVE_MASK ? N : 1];
  VisibleColumns<N> attended, kept;
  int key_segments[SEGMENTS ? KEY_SEGMENTS : 1];

  // Pairs of keys at once where they are neighbours and all keys of the tile are there, else each element by itself, in a loop that takes few
  // registers.
  DEVICE void read_mask(int first_key) {
    const MaskView& view = features.attn_mask;
    const MaskElement* of_batch = static_cast<const MaskElement*>(view.data) + batch * view.stride_batch;
    const uint64 starts = reinterpret_cast<uint64>(of_batch) | uint64(view.stride_head | view.stride_query) * MASK_BYTES;
    const bool in_pairs = view.stride_key == 1 && starts % (2 * MASK_BYTES) == 0 && first_key + 8 * N <= geometry.seqlen_kv;
    const int first_column = first_key + lane_index() % 4 * 2;
    if constexpr (BOOLEAN_MASK) attended = VisibleColumns<N>(false);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const MaskElement* row = of_batch + head[r] * view.stride_head + query[r] * view.stride_query;
      if (in_pairs) {
#pragma unroll
        for (int n = 0; n < N; ++n) keep_pair(r, n, *reinterpret_cast<const MaskPair*>(row + first_column + 8 * n));
      } else {
#pragma unroll 1
        for (int n = 0; n < N; ++n) {
          MaskPair pair = 0;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const MaskElement* element = row + min(first_column + 8 * n + c, geometry.seqlen_kv - 1) * view.stride_key;
            pair |= MaskPair(*reinterpret_cast<const MaskBits*>(element)) << (c * 8 * MASK_BYTES);
          }
          keep_next_pair(r, n, pair);
        }
      }
    }
  }

  DEVICE void keep_pair(int r, int n, MaskPair pair) {
    if constexpr (ADDITIVE_MASK) {
      mask[r][n] = pair;
    } else {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if ((pair >> 8 * c & 0xff) != 0) attended.show(r, n, c);
    }
  }

  // The same where the compiler does not know n: the last pair comes to the end, and those before it move up.
  DEVICE void keep_next_pair(int r, int n, MaskPair pair) {
    if constexpr (ADDITIVE_MASK) {
#pragma unroll
      for (int i = 0; i + 1 < N; ++i) mask[r][i] = mask[r][i + 1];
      mask[r][N - 1] = pair;
    } else {
      keep_pair(r, n, pair);
    }
  }

  DEVICE void read_segments(int first_key) {
#pragma unroll
    for (int i = 0; i < KEY_SEGMENTS; ++i)
      key_segments[i] = features.segment_ids_kv.load(batch, min(first_key + i * WARP_SIZE + column_of_lane(), geometry.seqlen_kv - 1));
  }

  // Four words of a draw are of two queries, of which a row is one.
  DEVICE void draw(int first_key) {
    const int first_column = first_key + lane_index() % 4 * 2;
    kept = VisibleColumns<N>(false);
#pragma unroll 1
    for (int n = 0; n < N; n += 2)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const DrawnGroup drawn = dropout.draw(batch, head[r], query[r] & ~8, first_column + 8 * n);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (dropout.keeps((query[r] & 8) != 0 ? drawn.word[2 + m] : drawn.word[m], c)) kept.show(r, n + m, c);
      }
  }
};
