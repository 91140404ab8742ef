// Gradient of Q: dQ = scale dS K, with P and dS recomputed from LSE and delta.
//
// One block owns TILE_Q queries of one head, each warp TILE_Q / NUM_WARPS of them, and walks over all keys that they see:
//     S = Q Kᵀ,   dP = dO Vᵀ,   dQ += dS K
// A kernel of its own costs two products more than adding dQ up with atomics from the dK/dV kernel, and saves the atomics, their float32
// accumulator and the conversion pass; its result is the same bit for bit on every run.
//
// With STORES_GRAD_MASK it is the kernel of an additive mask's gradient too, where nothing of it is summed (tile/mask_gradient.cuh).
//
// Shared memory: Q [TILE_Q][D] | dO [TILE_Q][DV] | K [NUM_STAGES][TILE_KV][D] | V [NUM_STAGES][TILE_KV][DV]. One copy group per key tile.
// For a wide head this for each slice, then the parts of S and of dP that the slices exchange.
#include "tile/constants.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/mask_gradient.cuh"
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

constexpr int SLICE_BYTES = TileQ::BYTES + TileO::BYTES + NUM_STAGES * (TileK::BYTES + TileV::BYTES);

static_assert(TILE_Q % (16 * ROW_WARPS) == 0, "tile_q must be a multiple of 16 * num_warps");
static_assert(HEAD_SLICES * SLICE_BYTES + 2 * EXCHANGE_BYTES<M_TILES, S_TILES> == Config::SHARED_BYTES, "shared memory differs from the plan's");

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_dq_mma(const __grid_constant__ BackwardArguments arguments) {
  const Work work = work_in_order<CAUSAL, true>(arguments, arguments.geometry.num_heads_q);
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  const int start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);
  const MaskGradient grad_attn_mask(arguments.features.grad_attn_mask, work, arguments.geometry.seqlen_kv);
  auto clear_gradients = [&](int begin, int end, int tile, int num_tiles) {
    clear_rows<Element, NUM_THREADS, TILE_Q, HEAD_DIM>(arguments.grad_query, work, begin, end, tile, num_tiles);
    grad_attn_mask.clear(begin, end, 0, arguments.geometry.seqlen_kv);
  };
  if (!claim_rows<TILE_Q>(arguments, packed_queries(arguments), work, clear_gradients)) return;
  const auto& geometry = geometry_of(arguments, work.batch);
  const int head_kv = work.head / (geometry.num_heads_q / geometry.num_heads_kv);
  const int first_q = work.tile * TILE_Q;
  const int warp_row = row_warp_index() * WARP_ROWS;

  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress S_exchange = smem_address(shared) + HEAD_SLICES * SLICE_BYTES;
  const SmemAddress dP_exchange = S_exchange + EXCHANGE_BYTES<M_TILES, S_TILES>;
  const SmemAddress Q_smem = smem_address(shared) + slice_index() * SLICE_BYTES;
  const SmemAddress dO_smem = Q_smem + TileQ::BYTES;
  const SmemAddress K_smem = dO_smem + TileO::BYTES;
  const SmemAddress V_smem = K_smem + NUM_STAGES * TileK::BYTES;

  const Visibility visibility(geometry, arguments.features, work.batch, work.head);
  const int num_keys = visibility.end_key(first_q, first_q + TILE_Q);  // keys beyond are not even read
  VisibleTilesAhead<NUM_STAGES> tiles(arguments.geometry, arguments.features, work.batch, work.head, work.tile,
                                      (arguments.geometry.seqlen_kv + TILE_KV - 1) / TILE_KV);
  const int begin = TILE_LISTS ? 0 : visibility.first_key(first_q) / TILE_KV;  // steps over key tiles
  const int end = TILE_LISTS ? tiles.count() : (num_keys + TILE_KV - 1) / TILE_KV;

  const SliceRows<TileQ, HEAD_DIM> Q_rows{arguments.query, work.batch, work.head, geometry.seqlen_q, start_q};
  const SliceRows<TileO, HEAD_DIM_V> dO_rows{arguments.grad_out, work.batch, work.head, geometry.seqlen_q, start_q};
  const SliceRows<TileK, HEAD_DIM> K_rows{arguments.key, work.batch, head_kv, num_keys, start_kv};
  const SliceRows<TileV, HEAD_DIM_V> V_rows{arguments.value, work.batch, head_kv, num_keys, start_kv};
  const SliceTile<TileQ, HEAD_DIM> Q{Q_smem, first_q, Q_rows};
  const SliceTile<TileO, HEAD_DIM_V> dO{dO_smem, first_q, dO_rows};
  auto K_loader = K_rows.loader();
  auto V_loader = V_rows.loader();
  auto issue = [&](int step) {
    K_loader.issue(K_smem + stage_of(step) * TileK::BYTES, tiles.tile(step) * TILE_KV, first_column<TileK>(0), step < end);
    V_loader.issue(V_smem + stage_of(step) * TileV::BYTES, tiles.tile(step) * TILE_KV, first_column<TileV>(0), step < end);
    cp_async_commit_group();
  };
  if (SLICE_PIECES == 1 && begin < end) {
    Q.load(0);
    dO.load(0);
  }
  fill_pipeline(begin, issue);
  grad_attn_mask.clear_unvisited(first_q, min(first_q + TILE_Q, geometry.seqlen_q), arguments, work, begin, end);

  const StatisticsView view(arguments, work.batch, work.head, start_q, geometry.seqlen_q);
  const StatisticsOfRows<M_TILES> statistics(view, first_q + warp_row);
  float dQ[M_TILES][D_TILES][4];
  clear(dQ);
  const ScoreModifier modifier(geometry, arguments.features, work.batch, work.head);
  const Dropout dropout(arguments.features);

#pragma unroll 1
  for (int j = begin; j < end; ++j) {
    tiles.look_ahead(j);
    begin_step(j, issue, [&] {
      K_loader.land(K_smem);
      V_loader.land(V_smem);
    });
    const int first_kv = tiles.tile(j) * TILE_KV;
    const SliceTile<TileK, HEAD_DIM> K{K_smem + stage_of(j) * TileK::BYTES, first_kv, K_rows};
    const SliceTile<TileV, HEAD_DIM_V> V{V_smem + stage_of(j) * TileV::BYTES, first_kv, V_rows};

    float S[M_TILES][S_TILES][4];
    clear(S);
    MaskAhead<false, M_TILES, S_TILES> mask;
    HiddenAhead<false, M_TILES, S_TILES> hidden;
    hidden.read(visibility, first_q + warp_row, first_kv, tiles.is_partial(j));
    modifier.read_mask(mask, first_q + warp_row, first_kv);
    multiply_rows(S, Q, warp_row, K);
    publish_and_collect(S, S_exchange);
    ScoreDerivative<M_TILES, S_TILES> derivative;
    modifier.apply<false>(S, derivative, first_q + warp_row, first_kv, mask);
    statistics.to_probabilities(S, modifier.signed_factor());
    auto& P = S;  // in place
    hide<false>(P, 0.0f, geometry, visibility, first_q, first_kv, warp_row, tiles.is_partial(j), hidden);

    float dP[M_TILES][S_TILES][4];  // less delta
    statistics.begin_grad_products(dP);
    multiply_rows(dP, dO, warp_row, V);
    publish_and_collect(dP, dP_exchange);
    if constexpr (DROPOUT) statistics.drop(dP, dropout, work.batch, work.head, first_q + warp_row, first_kv, arguments.features.dropout_scale);
    multiply_all(dP, P);
    auto& dS = dP;  // in place
    grad_attn_mask.store(dS, first_q + warp_row, geometry.seqlen_q, first_kv);
    derivative.multiply(dS);

    multiply_accumulator(dQ, dS, K);
    tiles.advance();
    end_step();
  }

  multiply_all(dQ, geometry.scale);
  store_slice<HEAD_DIM, TileQ>(dQ, Q_smem, warp_row, arguments.grad_query, work, first_q, geometry.seqlen_q, start_q);
}
