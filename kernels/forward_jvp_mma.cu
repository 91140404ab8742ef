// The derivative of attention along tangents of its inputs (forward mode), from Q̇, K̇, V̇ to those of O and of LSE:
//
//     Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ)        μ = rowsum(P ∘ Ṡ)        Ȯ = (P ∘ Ṡ) V + P V̇ - μ ∘ O        LSĖ = μ
//
// O and LSE are those of the forward call, so that P comes from LSE as in the backward pass: nothing is rescaled, and the products with V and with V̇
// add to one accumulator. One block owns TILE_Q queries of one head, each warp TILE_Q / NUM_WARPS of them, and walks once over all keys that they
// see.
//
// A tangent whose address is null is zero: it is not copied, and its product is left out, by branches that the whole grid takes alike. The slope of a
// softcap multiplies Ṡ. Dropout drops what V and V̇ are multiplied by, and nothing in μ. A sink, whose share of a row is p, adds p times its tangent
// to μ. With an additive mask backward_row_sums_mma.cu has run before (tile/probability.cuh).
//
// Shared memory: Q [TILE_Q][D] | Q̇ [TILE_Q][D] | K [NUM_STAGES][TILE_KV][D] | K̇ the same | V [NUM_STAGES][TILE_KV][DV] | V̇ the same. One copy group
// per key tile. For a wide head this for each slice, then the parts of S and of Ṡ that the slices exchange.
#include "tile/constants.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/packed_tiles.cuh"
#include "tile/pipeline.cuh"
#include "tile/products.cuh"
#include "tile/row_statistics.cuh"
#include "tile/score.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_tiles.cuh"

constexpr int WARP_ROWS = TILE_Q / ROW_WARPS;

constexpr int M_TILES = WARP_ROWS / 16;
constexpr int S_TILES = TILE_KV / 8;

constexpr int SLICE_BYTES = 2 * (TileQ::BYTES + NUM_STAGES * (TileK::BYTES + TileV::BYTES));

static_assert(TILE_Q % (16 * ROW_WARPS) == 0, "tile_q must be a multiple of 16 * num_warps");
static_assert(HEAD_SLICES * SLICE_BYTES + 2 * EXCHANGE_BYTES<M_TILES, S_TILES> == Config::SHARED_BYTES, "shared memory differs from the plan's");

// Rows that no query computes have tangents of zero, as their O and LSE are constants.
DEVICE void clear_tangents(const ForwardJvpArguments& arguments, const Work& work, int begin, int end, int tile, int num_tiles) {
  clear_rows<Element, NUM_THREADS, TILE_Q, HEAD_DIM_V>(arguments.out_dot, work, begin, end, tile, num_tiles);
  for (int64 row = begin + int64(tile) * NUM_THREADS + int(threadIdx.x); row < end; row += int64(num_tiles) * NUM_THREADS)
    *arguments.lse_dot.pointer(VARLEN ? 0 : work.batch, work.head, int(row)) = 0.0f;
}

// Ṡ -> P ∘ Ṡ, where S_dot lacks `scale`, and its sum over this lane's columns of each row.
DEVICE void weigh(float (&S_dot)[M_TILES][S_TILES][4], const float (&P)[M_TILES][S_TILES][4], float scale, float (&mu)[M_TILES][2]) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int n = 0; n < S_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        S_dot[m][n][i] *= scale * P[m][n][i];
        mu[m][i / 2] += S_dot[m][n][i];
      }
}

// What a sink adds to μ of row r of 16-row tile m.
DEVICE float sink_tangent(const ForwardJvpArguments& arguments, const Work& work, const StatisticsOfRows<M_TILES>& statistics, int m, int r) {
  if (!SINKS || arguments.sinks_dot.data == nullptr) return 0.0f;
  return statistics.share_of_sink(arguments.features.sinks.load(work.batch, work.head), m, r) * arguments.sinks_dot.load(work.batch, work.head);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) forward_jvp_mma(const __grid_constant__ ForwardJvpArguments arguments) {
  const Work work = work_in_order<CAUSAL, true>(arguments, arguments.geometry.num_heads_q);
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  const int start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);
  auto clear_outputs = [&](int begin, int end, int tile, int num_tiles) { clear_tangents(arguments, work, begin, end, tile, num_tiles); };
  if (!claim_rows<TILE_Q>(arguments, packed_queries(arguments), work, clear_outputs)) return;
  const auto& geometry = geometry_of(arguments, work.batch);
  const int head_kv = work.head / (geometry.num_heads_q / geometry.num_heads_kv);
  const int first_q = work.tile * TILE_Q;
  const int warp_row = row_warp_index() * WARP_ROWS;
  const bool moves_Q = arguments.query_dot.data != nullptr, moves_K = arguments.key_dot.data != nullptr,
             moves_V = arguments.value_dot.data != nullptr;

  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress S_exchange = smem_address(shared) + HEAD_SLICES * SLICE_BYTES;
  const SmemAddress S_dot_exchange = S_exchange + EXCHANGE_BYTES<M_TILES, S_TILES>;
  const SmemAddress Q_smem = smem_address(shared) + slice_index() * SLICE_BYTES;
  const SmemAddress Q_dot_smem = Q_smem + TileQ::BYTES;
  const SmemAddress K_smem = Q_dot_smem + TileQ::BYTES;
  const SmemAddress K_dot_smem = K_smem + NUM_STAGES * TileK::BYTES;
  const SmemAddress V_smem = K_dot_smem + NUM_STAGES * TileK::BYTES;
  const SmemAddress V_dot_smem = V_smem + NUM_STAGES * TileV::BYTES;

  const Visibility visibility(geometry, arguments.features, work.batch, work.head);
  const int num_keys = visibility.end_key(first_q, first_q + TILE_Q);  // keys beyond are not even read
  VisibleTilesAhead<NUM_STAGES> tiles(arguments.geometry, arguments.features, work.batch, work.head, work.tile,
                                      (arguments.geometry.seqlen_kv + TILE_KV - 1) / TILE_KV);
  const int begin = TILE_LISTS ? 0 : visibility.first_key(first_q) / TILE_KV;  // steps over key tiles
  const int end = TILE_LISTS ? tiles.count() : (num_keys + TILE_KV - 1) / TILE_KV;

  const SliceRows<TileQ, HEAD_DIM> Q_rows{arguments.query, work.batch, work.head, geometry.seqlen_q, start_q};
  const SliceRows<TileQ, HEAD_DIM> Q_dot_rows{arguments.query_dot, work.batch, work.head, geometry.seqlen_q, start_q};
  const SliceRows<TileK, HEAD_DIM> K_rows{arguments.key, work.batch, head_kv, num_keys, start_kv};
  const SliceRows<TileK, HEAD_DIM> K_dot_rows{arguments.key_dot, work.batch, head_kv, num_keys, start_kv};
  const SliceRows<TileV, HEAD_DIM_V> V_rows{arguments.value, work.batch, head_kv, num_keys, start_kv};
  const SliceRows<TileV, HEAD_DIM_V> V_dot_rows{arguments.value_dot, work.batch, head_kv, num_keys, start_kv};
  const SliceTile<TileQ, HEAD_DIM> Q{Q_smem, first_q, Q_rows};
  const SliceTile<TileQ, HEAD_DIM> Q_dot{Q_dot_smem, first_q, Q_dot_rows};
  auto K_loader = K_rows.loader();
  auto K_dot_loader = K_dot_rows.loader();
  auto V_loader = V_rows.loader();
  auto V_dot_loader = V_dot_rows.loader();
  auto issue = [&](int step) {
    const int stage = stage_of(step), first_kv = tiles.tile(step) * TILE_KV;
    K_loader.issue(K_smem + stage * TileK::BYTES, first_kv, first_column<TileK>(0), step < end);
    K_dot_loader.issue(K_dot_smem + stage * TileK::BYTES, first_kv, first_column<TileK>(0), step < end && moves_K);
    V_loader.issue(V_smem + stage * TileV::BYTES, first_kv, first_column<TileV>(0), step < end);
    V_dot_loader.issue(V_dot_smem + stage * TileV::BYTES, first_kv, first_column<TileV>(0), step < end && moves_V);
    cp_async_commit_group();
  };
  if (SLICE_PIECES == 1 && begin < end) {
    Q.load(0);
    if (moves_Q) Q_dot.load(0);
  }
  fill_pipeline(begin, issue);

  const StatisticsOfRows<M_TILES> statistics(arguments, arguments.lse, work.batch, work.head, start_q, first_q + warp_row, geometry.seqlen_q);
  float O_dot[M_TILES][DV_TILES][4];
  clear(O_dot);
  float mu[M_TILES][2] = {};  // of this lane's columns, until they are added up
  const ScoreModifier modifier(geometry, arguments.features, work.batch, work.head);
  const Dropout dropout(arguments.features);

#pragma unroll 1
  for (int j = begin; j < end; ++j) {
    tiles.look_ahead(j);
    begin_step(j, issue, [] {});
    const int stage = stage_of(j), first_kv = tiles.tile(j) * TILE_KV;
    const SliceTile<TileK, HEAD_DIM> K{K_smem + stage * TileK::BYTES, first_kv, K_rows};
    const SliceTile<TileK, HEAD_DIM> K_dot{K_dot_smem + stage * TileK::BYTES, first_kv, K_dot_rows};
    const SliceTile<TileV, HEAD_DIM_V> V{V_smem + stage * TileV::BYTES, first_kv, V_rows};
    const SliceTile<TileV, HEAD_DIM_V> V_dot{V_dot_smem + stage * TileV::BYTES, first_kv, V_dot_rows};

    float S[M_TILES][S_TILES][4];
    clear(S);
    MaskAhead<false, M_TILES, S_TILES> mask;
    modifier.read_mask(mask, first_q + warp_row, first_kv);
    multiply_rows(S, Q, warp_row, K);
    publish_and_collect(S, S_exchange);
    ScoreDerivative<M_TILES, S_TILES> derivative;
    modifier.apply<false>(S, derivative, first_q + warp_row, first_kv, mask);
    statistics.to_probabilities(S, modifier.signed_factor());
    auto& P = S;  // in place
    hide<false>(P, 0.0f, geometry, visibility, first_q, first_kv, warp_row, tiles.is_partial(j));

    float S_dot[M_TILES][S_TILES][4];
    clear(S_dot);
    if (moves_Q) multiply_rows(S_dot, Q_dot, warp_row, K);
    if (moves_K) multiply_rows(S_dot, Q, warp_row, K_dot);
    publish_and_collect(S_dot, S_dot_exchange);
    derivative.multiply(S_dot);
    weigh(S_dot, P, geometry.scale, mu);
    if constexpr (DROPOUT)
      for_each_drawn<M_TILES, S_TILES>(dropout, work.batch, work.head, first_q + warp_row, first_kv, [&](int m, int n, int i, bool is_kept) {
        P[m][n][i] = is_kept ? P[m][n][i] : 0.0f;
        S_dot[m][n][i] = is_kept ? S_dot[m][n][i] : 0.0f;
      });

    if (moves_Q || moves_K) multiply_accumulator(O_dot, S_dot, V);
    if (moves_V) multiply_accumulator(O_dot, P, V_dot);
    tiles.advance();
    end_step();
  }

  if constexpr (DROPOUT) multiply_all(O_dot, arguments.features.dropout_scale);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_q + warp_row + 16 * m + 8 * r + lane_index() / 4;
      const float sum = quad_sum(mu[m][r]);  // by all lanes
      if (query >= geometry.seqlen_q) continue;
      const float lse_dot = sum + sink_tangent(arguments, work, statistics, m, r);
      if (slice_index() == 0 && lane_index() % 4 == 0) *arguments.lse_dot.pointer(work.batch, work.head, start_q + query) = lse_dot;
      const TensorView& out = arguments.out;
      const Element* O_row = out.row_pointer<const Element>(work.batch, work.head, start_q) + query * out.stride_seqlen;
#pragma unroll
      for (int n = 0; n < DV_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = (slice_index() * DV_TILES + n) * 8 + lane_index() % 4 * 2 + i;
          if (column < HEAD_DIM_V) O_dot[m][n][2 * r + i] -= lse_dot * to_float(O_row[column * out.stride_dim]);
        }
    }
  store_slice<HEAD_DIM_V, TileQ>(O_dot, Q_smem, warp_row, arguments.out_dot, work, first_q, geometry.seqlen_q, start_q);
}
