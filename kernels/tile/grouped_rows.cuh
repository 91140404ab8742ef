// Rows that are the queries of all heads which share a key head: row r is query r / group of the head r % group among them. Nothing has to divide
// anything: a tile may begin and end within a query.
#pragma once
#include "tile/fragment.cuh"
#include "tile/score.cuh"
#include "tile/visibility.cuh"

struct GroupedRows {  // of one batch and key head
  int first_head, group, count;

  DEVICE GroupedRows(const Geometry& geometry, int head_kv) {
    group = geometry.num_heads_q / geometry.num_heads_kv;
    first_head = head_kv * group;
    count = geometry.seqlen_q * group;
  }

  // Of any row: those behind the last one are as the last one.
  DEVICE int query(int row) const { return min(row, count - 1) / group; }
  DEVICE int head(int row) const { return first_head + min(row, count - 1) % group; }
};

// Scores and visibility of a warp's accumulators, whose rows are grouped, 16 M of them from first_row on, and whose columns are keys.
template <int M>
class GroupedScores {
 public:
  DEVICE GroupedScores(const Geometry& geometry, const FeatureArguments& features, int batch, const GroupedRows& rows, int first_row)
      : geometry(geometry), features(features), batch(batch) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 16 * m + 8 * r + lane_index() / 4;
        query[m][r] = rows.query(row);
        head[m][r] = rows.head(row);
        if constexpr (ALIBI) slope[m][r] = features.alibi_slopes.load(batch, head[m][r]) * SCORE_UNIT;
      }
  }

  // Products -> scores, in place, of which an exponent of 2 takes `factor` times. ADDS_MASK: an additive mask, too.
  template <bool ADDS_MASK = true, int N>
  DEVICE void apply(float (&S)[M][N][4], int first_key) const {
    if constexpr (MODIFIES_SCORES) {
      for_each_place<M, N>([&](int m, int n, int i, int, int column) {
        const int q = query[m][i / 2], key = first_key + column;
        float unused;
        S[m][n][i] = score_of(S[m][n][i], q, key, slope[ALIBI ? m : 0][i / 2], geometry, features, unused);
        if constexpr (ADDITIVE_MASK && ADDS_MASK) add_bias(S[m][n][i], 1.0f, mask_bias(mask(m, i).at(q, key)));
      });
    } else {
      if (geometry.score_sign != 1.0f) multiply_all(S, geometry.score_sign);
    }
  }

  DEVICE float factor() const { return MODIFIES_SCORES ? 1.0f : geometry.scale_log2; }

  // -inf in the place of scores whose key is not visible, or comes before `first_visible`.
  template <int N>
  DEVICE void hide(float (&S)[M][N][4], int first_key, int first_visible) const {
    for_each_place<M, N>([&](int m, int n, int i, int, int column) {
      const int key = first_key + column;
      const Visibility visibility(geometry, features, batch, head[m][i / 2]);
      if (key < first_visible || !visibility.sees(query[m][i / 2], key)) S[m][n][i] = -infinity();
    });
  }

 private:
  const Geometry& geometry;
  const FeatureArguments& features;
  int batch;
  int query[M][2], head[M][2];  // of this lane's rows
  float slope[ALIBI ? M : 1][2] = {};

  DEVICE MaskValues mask(int m, int i) const { return MaskValues(geometry, features.attn_mask, batch, head[m][i / 2]); }
};
