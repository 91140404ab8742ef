// Gradient of Q: dQ = scale dS K, with P and dS recomputed from LSE and delta.
//
// One block owns TILE_Q queries of one head, each warp TILE_Q / NUM_WARPS of them, and walks over all keys that they see:
//     S = Q Kᵀ,   dP = dO Vᵀ,   dQ += dS K
// A kernel of its own costs two products more than adding dQ up with atomics from the dK/dV kernel, and saves the atomics, their float32
// accumulator and the conversion pass; its result is the same bit for bit on every run.
//
// Shared memory: Q [TILE_Q][D] | dO [TILE_Q][DV] | K [NUM_STAGES][TILE_KV][D] | V [NUM_STAGES][TILE_KV][DV]. One copy group per key tile.
// For a wide head this for each slice, then the parts of S and of dP that the slices exchange.
#include "tile/backward.cuh"
#include "tile/constants.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/gemm.cuh"
#include "tile/pipeline.cuh"
#include "tile/schedule.cuh"
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
  const Work work = decode_block(arguments.geometry.num_tiles, arguments.geometry.num_heads_q, CAUSAL);
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  const int start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);
  if (is_behind_last(arguments.lengths, work.batch)) {
    clear_rows<Element, NUM_THREADS, TILE_Q, HEAD_DIM>(arguments.grad_query, work.head, start_q, arguments.geometry.seqlen_q, work.tile,
                                                       arguments.geometry.num_tiles);
    return;
  }
  const auto& geometry = geometry_of(arguments, work.batch);
  if (is_last_tile(arguments.geometry, work.tile))
    clear_rows<Element, NUM_THREADS, TILE_Q, HEAD_DIM>(arguments.grad_query, work.head, start_q + arguments.geometry.num_tiles * TILE_Q,
                                                       start_q + geometry.seqlen_q, 0, 1);
  const int head_kv = work.head / (geometry.num_heads_q / geometry.num_heads_kv);
  const int first_q = work.tile * TILE_Q;
  if (VARLEN && first_q >= geometry.seqlen_q) return;  // the grid is made for the longest sequence
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
  const VisibleTiles tiles(arguments.geometry, arguments.features, work.batch, work.head, work.tile,
                           (arguments.geometry.seqlen_kv + TILE_KV - 1) / TILE_KV);
  const int begin = TILE_LISTS ? 0 : visibility.first_key(first_q) / TILE_KV;  // steps over key tiles
  const int end = TILE_LISTS ? tiles.count() : (num_keys + TILE_KV - 1) / TILE_KV;
  SliceLoader<TileK, HEAD_DIM> load_K(arguments.key, work.batch, head_kv, num_keys, start_kv);
  SliceLoader<TileV, HEAD_DIM_V> load_V(arguments.value, work.batch, head_kv, num_keys, start_kv);
  auto load_Q = [&](int step) {
    load_piece<TileQ, HEAD_DIM>(Q_smem, arguments.query, work.batch, work.head, geometry.seqlen_q, first_q, step, start_q);
  };
  auto load_dO = [&](int step) {
    load_piece<TileO, HEAD_DIM_V>(dO_smem, arguments.grad_out, work.batch, work.head, geometry.seqlen_q, first_q, step, start_q);
  };
  if (HEAD_STEPS == 1 && begin < end) {
    load_Q(0);
    load_dO(0);
  }
  auto slot = [](int step) { return NUM_STAGES == 1 ? 0 : step % NUM_STAGES; };
  auto issue = [&](int step) {
    if (step < end) {
      load_K.issue(K_smem + slot(step) * TileK::BYTES, tiles.tile(step) * TILE_KV, first_column<TileK>(0));
      load_V.issue(V_smem + slot(step) * TileV::BYTES, tiles.tile(step) * TILE_KV, first_column<TileV>(0));
    }
    cp_async_commit_group();
  };
#pragma unroll
  for (int ahead = 0; ahead < NUM_STAGES - 1; ++ahead) issue(begin + ahead);

  RowStatistics statistics[M_TILES][2];
  float log2_sums[M_TILES][2];
  const RowStatistics* statistics_gmem = row_statistics(arguments, work.batch, work.head, start_q);
  const float* log2_sums_gmem = log2_sums_of(arguments, work.batch, work.head);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_q + warp_row + 16 * m + 8 * r + lane_index() / 4;
      statistics[m][r] = query < geometry.seqlen_q ? statistics_gmem[query] : RowStatistics{infinity(), 0.0f};
      log2_sums[m][r] = ADDITIVE_MASK && query < geometry.seqlen_q ? log2_sums_gmem[query] : 0.0f;
    }

  float dQ[M_TILES][D_TILES][4];
  clear(dQ);
  const ScoreModifier modifier(geometry, arguments.features, work.batch, work.head);
  const Dropout dropout(arguments.features);

#pragma unroll 1
  for (int j = begin; j < end; ++j) {
    if constexpr (HEAD_STEPS > 1) {
      // Every product fetches its pieces itself.
    } else if constexpr (NUM_STAGES == 1) {
      issue(j);
      wait_for_tiles<0>([&] {
        load_K.land(K_smem);
        load_V.land(V_smem);
      });
    } else {
      wait_for_tiles<NUM_STAGES - 2>([] {});  // tile j has landed; every warp is done with tile j - 1, whose slot is next
      issue(j + NUM_STAGES - 1);
    }
    const int first_kv = tiles.tile(j) * TILE_KV;

    float P[M_TILES][S_TILES][4];  // scores, then probabilities
    clear(P);
    auto add_scores = [&](int) {
      gemm_rows<Mma, TileQ::COLUMNS>(P, typename Mma::OperandA<TileQ>(Q_smem, warp_row),
                                     typename Mma::OperandB<TileK>(K_smem + slot(j) * TileK::BYTES));
    };
    if constexpr (HEAD_STEPS == 1) {
      add_scores(0);
    } else {
      for_each_piece(
          [&](int step) {
            load_Q(step);
            load_K.issue(K_smem, first_kv, first_column<TileK>(step));
          },
          add_scores);
    }
    publish_and_collect(P, S_exchange);
    ScoreSlope<M_TILES, S_TILES> slope;
    if constexpr (MODIFIES_SCORES) {
      modifier.apply<false>(P, slope, first_q + warp_row, first_kv);
    } else {
      if (geometry.score_sign != 1.0f) multiply_all(P, geometry.score_sign);
    }
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int n = 0; n < S_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          P[m][n][i] = probability(P[m][n][i], MODIFIES_SCORES ? 1.0f : geometry.scale_log2, statistics[m][i / 2].reference, log2_sums[m][i / 2]);
    if (ONLY_CAUSAL ? needs_mask<CAUSAL>(geometry, first_q, first_kv + TILE_KV)
                    : tiles.is_partial(j) || visibility.needs_mask(first_q, first_q + TILE_Q, first_kv, first_kv + TILE_KV)) {
      for_each_element(P, [&](int row, int column, float& probability) {
        const bool visible = ONLY_CAUSAL ? is_visible<CAUSAL>(geometry, first_q + warp_row + row, first_kv + column)
                                         : visibility.sees(first_q + warp_row + row, first_kv + column);
        if (!visible) probability = 0.0f;
      });
    }

    float dS[M_TILES][S_TILES][4];  // dP - delta, then dS; with dropout dP first
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int n = 0; n < S_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dS[m][n][i] = !DROPOUT && slice_index() == 0 ? -statistics[m][i / 2].delta : 0.0f;
    auto add_grad_probabilities = [&](int) {
      gemm_rows<Mma, TileO::COLUMNS>(dS, typename Mma::OperandA<TileO>(dO_smem, warp_row),
                                     typename Mma::OperandB<TileV>(V_smem + slot(j) * TileV::BYTES));
    };
    if constexpr (HEAD_STEPS == 1) {
      add_grad_probabilities(0);
    } else {
      for_each_piece(
          [&](int step) {
            load_dO(step);
            load_V.issue(V_smem, first_kv, first_column<TileV>(step));
          },
          add_grad_probabilities);
    }
    publish_and_collect(dS, dP_exchange);
    if constexpr (DROPOUT) {
      KeptElements<false, M_TILES, S_TILES> kept;
      kept.draw(dropout, work.batch, work.head, first_q + warp_row, first_kv);
      for_each_place<M_TILES, S_TILES>([&](int m, int n, int i, int, int) {
        dS[m][n][i] = (kept.has(m, n, i) ? dS[m][n][i] * arguments.features.dropout_scale : 0.0f) - statistics[m][i / 2].delta;
      });
    }
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int n = 0; n < S_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dS[m][n][i] *= P[m][n][i];
    slope.multiply(dS);
    auto add_gradients = [&](int step) {
      gemm_accumulator<Mma, TileK::COLUMNS>(dQ, dS, typename Mma::OperandBByRows<TileK>(K_smem + slot(j) * TileK::BYTES), step * TileK::COLUMNS / 8);
    };
    if constexpr (HEAD_STEPS == 1) {
      add_gradients(0);
    } else {
      for_each_piece([&](int step) { load_K.issue(K_smem, first_kv, first_column<TileK>(step)); }, add_gradients);
    }
    if constexpr (NUM_STAGES == 1 && HEAD_STEPS == 1) __syncthreads();  // every warp is done with the only slot
  }

  multiply_all(dQ, geometry.scale);
  store_rows<Element, HEAD_DIM, TileQ::COLUMNS, (HEAD_SLICES > 1)>(dQ, Q_smem + warp_row * TileQ::ROW_BYTES, arguments.grad_query, work.batch,
                                                                   work.head, first_q + warp_row, geometry.seqlen_q, first_column<TileQ>(0), start_q);
}
