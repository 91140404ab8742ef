// What the row statistics make of a tile of scores in the backward pass (tile/probability.cuh):
//
//     to_probabilities        P = 2^(S - reference)
//     begin_grad_products     dP = -delta, to which the product adds; with dropout 0, since delta must not be dropped
//     drop                    dP = kept dP / (1 - dropout_p) - delta; with dropout only
//
// These are the operations of two classes. Where the rows of accumulators are queries, the statistics of a warp's rows stay in its registers
// (StatisticsOfRows). Where the columns are queries, the statistics travel with the tiles (StatisticsOfColumns).
#pragma once
#include "arguments.cuh"
#include "ptx/memory.cuh"
#include "tile/probability.cuh"
#include "tile/constants.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"

// Where the statistics of the queries of one (batch, head) lie; queries count from row `start` of a packed array.
struct StatisticsView {
  const RowStatistics* rows;
  const float* log2_sums;  // null without an additive mask; there are no packed sequences with one
  int num_queries;

  template <typename Arguments>
  DEVICE StatisticsView(const Arguments& arguments, int batch, int head, int start, int seqlen_q)
      : rows(arguments.row_statistics + first_row(arguments.geometry, VARLEN ? 0 : batch, head) + start),
        log2_sums(ADDITIVE_MASK ? arguments.features.log2_sums + first_row(arguments.geometry, batch, head) : nullptr),
        num_queries(seqlen_q) {}

 private:
  DEVICE static int64 first_row(const Geometry& geometry, int batch, int head) {
    return (int64(batch) * geometry.num_heads_q + head) * geometry.seqlen_q;
  }
};

// What accumulators of dP start from: the groups of a wide head add up their parts, so only one of them takes delta off.
DEVICE float grad_product_start(float delta) { return !DROPOUT && slice_index() == 0 ? -delta : 0.0f; }

template <int M>
class StatisticsOfRows {
 public:
  // Of the warp's rows, queries from first_query on. Past the end P is 0.
  DEVICE StatisticsOfRows(const StatisticsView& view, int first_query) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = first_query + 16 * m + 8 * r + lane_index() / 4;
        statistics[m][r] = query < view.num_queries ? view.rows[query] : RowStatistics{infinity(), 0.0f};
        log2_sums[m][r] = ADDITIVE_MASK && query < view.num_queries ? view.log2_sums[query] : 0.0f;
      }
  }

  // The same of a kernel that needs no delta, from lse itself; with an additive mask of what became of it (backward_row_sums_mma.cu).
  template <typename Arguments>
  DEVICE StatisticsOfRows(const Arguments& arguments, const RowView& lse, int batch, int head, int start, int first_query, int num_queries) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = first_query + 16 * m + 8 * r + lane_index() / 4;
        statistics[m][r] = {infinity(), 0.0f};
        log2_sums[m][r] = 0.0f;
        if (query >= num_queries) continue;
        if constexpr (ADDITIVE_MASK) {
          const StatisticsView view(arguments, batch, head, start, num_queries);
          statistics[m][r].reference = view.rows[query].reference;
          log2_sums[m][r] = view.log2_sums[query];
        } else {
          const float of_row = *lse.pointer(batch, head, start + query);
          if (of_row != -infinity()) statistics[m][r].reference = of_row * LOG2_E;
        }
      }
  }

  template <int N>
  DEVICE void to_probabilities(float (&S)[M][N][4], float scale_log2) const {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) S[m][n][i] = probability(S[m][n][i], scale_log2, statistics[m][i / 2].reference, log2_sums[m][i / 2]);
  }

  // Of the probabilities of a row, 8 r rows below the lane's first one of 16-row tile m: that of a sink, which is a logit.
  DEVICE float share_of_sink(float sink, int m, int r) const { return probability(sink, LOG2_E, statistics[m][r].reference, log2_sums[m][r]); }

  template <int N>
  DEVICE void begin_grad_products(float (&dP)[M][N][4]) const {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dP[m][n][i] = grad_product_start(statistics[m][i / 2].delta);
  }

  // The warp's columns start at first_key.
  template <int N>
  DEVICE void drop(float (&dP)[M][N][4], const Dropout& dropout, int batch, int head, int first_query, int first_key, float dropout_scale) const {
    for_each_drawn<M, N>(dropout, batch, head, first_query, first_key, [&](int m, int n, int i, bool is_kept) {
      dP[m][n][i] = (is_kept ? dP[m][n][i] * dropout_scale : 0.0f) - statistics[m][i / 2].delta;
    });
  }

 private:
  RowStatistics statistics[M][2];  // rows g and g + 8 of each 16-row tile
  float log2_sums[M][2];
};

// The statistics of one tile of queries, in shared memory from sm_80 on: statistics [TILE_Q], and with an additive mask log2_sum [TILE_Q]. sm_75 has
// no bytes to spare at head_dim 256 and reads them from global memory.
class StatisticsOfColumns {
  static constexpr bool IN_SMEM = HAS_CP_ASYNC;
  static constexpr int LOG2_SUMS_OFFSET = TILE_Q * int(sizeof(RowStatistics));

 public:
  static constexpr int BYTES = IN_SMEM ? LOG2_SUMS_OFFSET + (ADDITIVE_MASK ? TILE_Q * int(sizeof(float)) : 0) : 0;

  DEVICE StatisticsOfColumns(SmemAddress tile, const StatisticsView& view, int first_q, int first_column = 0)
      : tile(tile), view(view), first_q(first_q), first_column(first_column) {}

  // Starts the copies if `enabled`, which the caller commits with those of the tile or lets arrive at its mbarrier. `thread` is one of THREADS. Past
  // the end all is 0, and so is dO.
  template <int THREADS = NUM_THREADS>
  DEVICE void issue(bool enabled = true, int thread = int(threadIdx.x)) const {
    if constexpr (IN_SMEM) {
#pragma unroll
      for (int first = 0; first < TILE_Q; first += THREADS) {
        const int row = first + thread;
        const bool has_row = enabled && row < TILE_Q, in_range = first_q + row < view.num_queries;
        const RowStatistics* source = in_range ? view.rows + first_q + row : view.rows;
        cp_async<8>(has_row, tile + row * int(sizeof(RowStatistics)), source, in_range ? 8 : 0);
        if constexpr (ADDITIVE_MASK)
          cp_async<4>(has_row, tile + LOG2_SUMS_OFFSET + row * int(sizeof(float)), in_range ? view.log2_sums + first_q + row : view.log2_sums,
                      in_range ? 4 : 0);
      }
    }
  }

  template <int M, int N>
  DEVICE void to_probabilities(float (&S)[M][N][4], float scale_log2) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float4 two = statistics(n);
      const float2 sums = log2_sums(n);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) S[m][n][i] = probability(S[m][n][i], scale_log2, i % 2 ? two.z : two.x, i % 2 ? sums.y : sums.x);
    }
  }

  template <int M, int N>
  DEVICE void begin_grad_products(float (&dP)[M][N][4]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float4 two = statistics(n);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) dP[m][n][i] = grad_product_start(i % 2 ? two.w : two.y);
    }
  }

  // `kept`: both halves of a word are all ones or zeros (tile/packed_dropout.cuh).
  template <int N>
  DEVICE void drop(float (&dP)[1][N][4], const uint32 (&kept)[N / 2][4], float dropout_scale) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float4 two = statistics(n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32 mask = __byte_perm(kept[n / 2][n % 2 * 2 + i / 2], 0, i % 2 ? 0x3232 : 0x1010);
        const float product = __uint_as_float(__float_as_uint(dP[0][n][i]) & mask);
        dP[0][n][i] = __fmaf_rn(product, dropout_scale, i % 2 ? -two.w : -two.y);
      }
    }
  }

  // Takes the marks off P (mark_dropped).
  template <int M, int N>
  DEVICE void drop(float (&dP)[M][N][4], float (&P)[M][N][4], float dropout_scale) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float4 two = statistics(n);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float minus_delta = i % 2 ? -two.w : -two.y;
          dP[m][n][i] = is_marked(P[m][n][i]) ? minus_delta : __fmaf_rn(dP[m][n][i], dropout_scale, minus_delta);
          P[m][n][i] = fabsf(P[m][n][i]);
        }
    }
  }

 private:
  SmemAddress tile;
  const StatisticsView& view;
  int first_q;
  int first_column;  // of the warp

  // This lane's two columns of accumulator tile n: reference and delta of the first in x and y, of the second in z and w; 0 past the end.
  DEVICE float4 statistics(int n) const {
    const int column = first_column + 8 * n + lane_index() % 4 * 2;
    if constexpr (IN_SMEM) {
      return load_shared_f32x4(tile + column * int(sizeof(RowStatistics)));
    } else {
      const int query = first_q + column;
      const RowStatistics first = query < view.num_queries ? view.rows[query] : RowStatistics{0.0f, 0.0f};
      const RowStatistics second = query + 1 < view.num_queries ? view.rows[query + 1] : RowStatistics{0.0f, 0.0f};
      return make_float4(first.reference, first.delta, second.reference, second.delta);
    }
  }

  // Their log2_sum.
  DEVICE float2 log2_sums(int n) const {
    const int column = first_column + 8 * n + lane_index() % 4 * 2;
    if constexpr (!ADDITIVE_MASK) {
      return make_float2(0.0f, 0.0f);
    } else if constexpr (IN_SMEM) {
      return load_shared_f32x2(tile + LOG2_SUMS_OFFSET + column * int(sizeof(float)));
    } else {
      const int query = first_q + column;
      return make_float2(query < view.num_queries ? view.log2_sums[query] : 0.0f, query + 1 < view.num_queries ? view.log2_sums[query + 1] : 0.0f);
    }
  }
};
