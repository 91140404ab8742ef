// Gradients of K and V: dV = Pᵀ dO, dK = scale dSᵀ Q, with P and dS recomputed from LSE and delta.
//
// One block owns TILE_KV keys of one K/V head, each warp TILE_KV / NUM_WARPS of them, and walks over all queries that see them: all query tiles of
// all query heads (and, where K or V is broadcast over the batch, of all batches) that share the head. Nothing is added across blocks, so the result
// is the same bit for bit on every run. The scores are computed transposed,
//     Sᵀ = K Qᵀ,   dPᵀ = V dOᵀ,   dV += Pᵀ dO,   dK += dSᵀ Q
// so that Pᵀ and dSᵀ become the A operands of the last two products without leaving registers.
//
// COMPUTE_DK and COMPUTE_DV say what is accumulated: both, or for large head dimensions one in each of two launches, since both together would not
// fit the registers. V and dP are needed for dK only.
//
// Shared memory of a slice of the head: K [TILE_KV][D] | V [TILE_KV][DV] | Q [NUM_STAGES][TILE_Q][D] | dO [NUM_STAGES][TILE_Q][DV] | row statistics
// [NUM_STAGES][TILE_Q], and with an additive mask log2_sum [TILE_Q] behind those of each stage (sm_80 and later). One copy group per query tile; with
// two stages or more the next tiles travel during the products of this one.
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

constexpr int WARP_ROWS = TILE_KV / ROW_WARPS;
constexpr bool COMPUTE_DK = Config::COMPUTE_DK;
constexpr bool COMPUTE_DV = Config::COMPUTE_DV;

constexpr int M_TILES = WARP_ROWS / 16;
constexpr int S_TILES = TILE_Q / 8;
constexpr bool STATISTICS_IN_SMEM = HAS_CP_ASYNC;  // sm_75 reads them from global memory: it has no bytes to spare at head_dim 256
constexpr int LOG2_SUMS_OFFSET = TILE_Q * int(sizeof(RowStatistics));
constexpr int STATISTICS_BYTES = STATISTICS_IN_SMEM ? LOG2_SUMS_OFFSET + (ADDITIVE_MASK ? TILE_Q * int(sizeof(float)) : 0) : 0;
constexpr int STATIONARY_BYTES = TileK::BYTES + (COMPUTE_DK ? TileV::BYTES : 0);
constexpr int SLICE_BYTES = STATIONARY_BYTES + NUM_STAGES * (TileQ::BYTES + TileO::BYTES);

static_assert(TILE_KV % (16 * ROW_WARPS) == 0, "tile_kv must be a multiple of 16 * num_warps");
static_assert(HEAD_SLICES * SLICE_BYTES + NUM_STAGES * STATISTICS_BYTES + (COMPUTE_DK ? 2 : 1) * EXCHANGE_BYTES<M_TILES, S_TILES> ==
                  Config::SHARED_BYTES,
              "shared memory differs from the plan's");

DEVICE void issue_statistics(SmemAddress destination, const RowStatistics* source, const float* log2_sums, int first_q, int seqlen_q) {
  for (int row = int(threadIdx.x); row < TILE_Q; row += NUM_THREADS) {
    const bool in_range = first_q + row < seqlen_q;
    const RowStatistics* pointer = in_range ? source + first_q + row : source;
    cp_async<8>(destination + row * int(sizeof(RowStatistics)), pointer, in_range ? 8 : 0);
    if constexpr (ADDITIVE_MASK)
      cp_async<4>(destination + LOG2_SUMS_OFFSET + row * int(sizeof(float)), in_range ? log2_sums + first_q + row : log2_sums, in_range ? 4 : 0);
  }
}

// reference and delta of two neighbouring queries: x, y of the first, z, w of the second; 0 past the end.
DEVICE float4 load_statistics(SmemAddress tile, const RowStatistics* source, int first_q, int column, int seqlen_q) {
  if constexpr (STATISTICS_IN_SMEM) {
    return load_shared_f32x4(tile + column * int(sizeof(RowStatistics)));
  } else {
    const int query = first_q + column;
    const RowStatistics first = query < seqlen_q ? source[query] : RowStatistics{0.0f, 0.0f};
    const RowStatistics second = query + 1 < seqlen_q ? source[query + 1] : RowStatistics{0.0f, 0.0f};
    return make_float4(first.reference, first.delta, second.reference, second.delta);
  }
}

// log2_sum of the same two queries.
DEVICE float2 load_log2_sums(SmemAddress tile, const float* source, int first_q, int column, int seqlen_q) {
  if constexpr (!ADDITIVE_MASK) {
    return make_float2(0.0f, 0.0f);
  } else if constexpr (STATISTICS_IN_SMEM) {
    return load_shared_f32x2(tile + LOG2_SUMS_OFFSET + column * int(sizeof(float)));
  } else {
    const int query = first_q + column;
    return make_float2(query < seqlen_q ? source[query] : 0.0f, query + 1 < seqlen_q ? source[query + 1] : 0.0f);
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_dkdv_mma(const __grid_constant__ BackwardArguments arguments) {
  const int heads_per_kv = arguments.geometry.num_heads_q / arguments.geometry.num_heads_kv;
  const Work work = decode_block(arguments.geometry.num_tiles, arguments.geometry.num_heads_q / arguments.group_heads, false);
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  const int start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);
  if (is_behind_last(arguments.lengths, work.batch)) {
    const int num_rows = arguments.geometry.seqlen_kv, num_tiles = arguments.geometry.num_tiles;
    if constexpr (COMPUTE_DK)
      clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM>(arguments.grad_key, work.head, start_kv, num_rows, work.tile, num_tiles);
    if constexpr (COMPUTE_DV)
      clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM_V>(arguments.grad_value, work.head, start_kv, num_rows, work.tile, num_tiles);
    return;
  }
  auto num_rows = [&] { return VARLEN ? geometry_of(arguments, work.batch).seqlen_kv : arguments.geometry.seqlen_kv; };  // that have gradients
  if (is_last_tile(arguments.geometry, work.tile)) {
    const int begin = start_kv + arguments.geometry.num_tiles * TILE_KV, end = start_kv + num_rows();
    if constexpr (COMPUTE_DK) clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM>(arguments.grad_key, work.head, begin, end, 0, 1);
    if constexpr (COMPUTE_DV) clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM_V>(arguments.grad_value, work.head, begin, end, 0, 1);
  }
  const int first_kv = work.tile * TILE_KV;
  if (VARLEN && first_kv >= num_rows()) return;  // the grid is made for the longest sequence
  const int warp_row = row_warp_index() * WARP_ROWS;

  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress K_smem = smem_address(shared) + slice_index() * SLICE_BYTES;
  const SmemAddress V_smem = K_smem + TileK::BYTES;
  const SmemAddress Q_smem = K_smem + STATIONARY_BYTES;
  const SmemAddress dO_smem = Q_smem + NUM_STAGES * TileQ::BYTES;
  const SmemAddress statistics_smem = smem_address(shared) + HEAD_SLICES * SLICE_BYTES;
  const SmemAddress S_exchange = statistics_smem + NUM_STAGES * STATISTICS_BYTES;
  const SmemAddress dP_exchange = S_exchange + EXCHANGE_BYTES<M_TILES, S_TILES>;

  float dK[M_TILES][COMPUTE_DK ? D_TILES : 2][4];
  float dV[M_TILES][COMPUTE_DV ? DV_TILES : 2][4];
  clear(dK);
  clear(dV);
  const Dropout dropout(arguments.features);

  const auto& first_geometry = geometry_of(arguments, work.batch * arguments.group_batch);
  const Visibility common(first_geometry, arguments.features, 0, 0);  // of all batches and heads, unless PER_HEAD_WALK
  const int first_tile = PER_HEAD_WALK ? 0 : common.first_query(first_kv) / TILE_Q;
  const int num_q_tiles = (common.end_query(first_kv, first_kv + TILE_KV) + TILE_Q - 1) / TILE_Q;
  const int common_keys = common.end_key(0, first_geometry.seqlen_q);
  const int num_members = PER_HEAD_WALK || first_tile < num_q_tiles ? arguments.group_batch * arguments.group_heads : 0;
  int loaded_pair = -1;  // (batch, K/V head) in shared memory
  auto slot = [](int step) { return NUM_STAGES == 1 ? 0 : step % NUM_STAGES; };

#pragma unroll 1
  for (int member = 0; member < num_members; ++member) {
    const int batch = work.batch * arguments.group_batch + member / arguments.group_heads;
    const int head = work.head * arguments.group_heads + member % arguments.group_heads;
    const auto& geometry = geometry_of(arguments, batch);
    const Visibility visibility(geometry, arguments.features, batch, head);
    const VisibleTiles tiles(geometry, arguments.features, batch, head, work.tile, (geometry.seqlen_q + TILE_Q - 1) / TILE_Q);
    const int begin = TILE_LISTS ? 0 : PER_HEAD_WALK ? visibility.first_query(first_kv) / TILE_Q : first_tile;  // steps over query tiles
    const int end = TILE_LISTS      ? tiles.count()
                    : PER_HEAD_WALK ? (visibility.end_query(first_kv, first_kv + TILE_KV) + TILE_Q - 1) / TILE_Q
                                    : num_q_tiles;
    const int num_keys = PER_HEAD_WALK ? visibility.end_key(0, geometry.seqlen_q) : common_keys;  // keys beyond are not even read
    if (PER_HEAD_WALK && begin >= end) continue;
    const ScoreModifier modifier(geometry, arguments.features, batch, head);
    const RowStatistics* statistics = row_statistics(arguments, batch, head, start_q);
    const float* log2_sums = log2_sums_of(arguments, batch, head);
    SliceLoader<TileQ, HEAD_DIM> load_Q(arguments.query, batch, head, geometry.seqlen_q, start_q);
    SliceLoader<TileO, HEAD_DIM_V> load_dO(arguments.grad_out, batch, head, geometry.seqlen_q, start_q);
    auto issue = [&](int step) {
      if (step < end) {
        if constexpr (HEAD_STEPS == 1) {
          load_Q.issue(Q_smem + slot(step) * TileQ::BYTES, tiles.tile(step) * TILE_Q, first_column<TileQ>(0));
          load_dO.issue(dO_smem + slot(step) * TileO::BYTES, tiles.tile(step) * TILE_Q, first_column<TileO>(0));
        }
        if constexpr (STATISTICS_IN_SMEM)
          issue_statistics(statistics_smem + slot(step) * STATISTICS_BYTES, statistics, log2_sums, tiles.tile(step) * TILE_Q, geometry.seqlen_q);
      }
      cp_async_commit_group();
    };

    if constexpr (NUM_STAGES > 1) __syncthreads();  // every warp is done with the tiles of the previous member; one stage ends with a barrier
    auto load_K = [&](int step) {
      load_piece<TileK, HEAD_DIM>(K_smem, arguments.key, batch, head / heads_per_kv, num_keys, first_kv, step, start_kv);
    };
    auto load_V = [&](int step) {
      load_piece<TileV, HEAD_DIM_V>(V_smem, arguments.value, batch, head / heads_per_kv, num_keys, first_kv, step, start_kv);
    };
    const int pair = batch * geometry.num_heads_kv + head / heads_per_kv;
    // Another K/V head, or the first. Where members can be passed over, the one that is loaded has to be remembered.
    if (HEAD_STEPS == 1 && (PER_HEAD_WALK ? pair != loaded_pair : head % heads_per_kv == 0 || member % arguments.group_heads == 0)) {
      loaded_pair = pair;
      load_K(0);
      if constexpr (COMPUTE_DK) load_V(0);
    }
#pragma unroll
    for (int ahead = 0; ahead < NUM_STAGES - 1; ++ahead) issue(begin + ahead);

#pragma unroll 1
    for (int j = begin; j < end; ++j) {
      if constexpr (HEAD_STEPS > 1) {
        issue(j);  // of the row statistics only: every product fetches its pieces itself, and waits for these too
      } else if constexpr (NUM_STAGES == 1) {
        issue(j);
        wait_for_tiles<0>([&] {
          load_Q.land(Q_smem);
          load_dO.land(dO_smem);
        });
      } else {
        wait_for_tiles<NUM_STAGES - 2>([] {});  // tile j has landed; every warp is done with tile j - 1, whose slot is next
        issue(j + NUM_STAGES - 1);
      }
      const int q_tile = tiles.tile(j);
      const SmemAddress Q_tile = Q_smem + slot(j) * TileQ::BYTES;
      const SmemAddress dO_tile = dO_smem + slot(j) * TileO::BYTES;
      auto statistics_of = [&](int n) {  // of this lane's two columns of S tile n
        const SmemAddress tile = statistics_smem + slot(j) * STATISTICS_BYTES;
        return load_statistics(tile, statistics, q_tile * TILE_Q, 8 * n + lane_index() % 4 * 2, geometry.seqlen_q);
      };

      float P[M_TILES][S_TILES][4];  // scores, then probabilities; rows are keys
      clear(P);
      auto add_scores = [&](int) {
        gemm_rows<Mma, TileQ::COLUMNS>(P, typename Mma::OperandA<TileK>(K_smem, warp_row), typename Mma::OperandB<TileQ>(Q_tile));
      };
      if constexpr (HEAD_STEPS == 1) {
        add_scores(0);
      } else {
        for_each_piece(
            [&](int step) {
              load_K(step);
              load_Q.issue(Q_tile, q_tile * TILE_Q, first_column<TileQ>(step));
            },
            add_scores);
      }
      publish_and_collect(P, S_exchange);
      ScoreSlope<M_TILES, S_TILES> slope;
      if constexpr (MODIFIES_SCORES) {
        modifier.apply<true>(P, slope, first_kv + warp_row, q_tile * TILE_Q);
      } else {
        if (geometry.score_sign != 1.0f) multiply_all(P, geometry.score_sign);
      }
#pragma unroll
      for (int n = 0; n < S_TILES; ++n) {
        const float4 pair = statistics_of(n);
        const float2 sums =
            load_log2_sums(statistics_smem + slot(j) * STATISTICS_BYTES, log2_sums, q_tile * TILE_Q, 8 * n + lane_index() % 4 * 2, geometry.seqlen_q);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            P[m][n][i] = probability(P[m][n][i], MODIFIES_SCORES ? 1.0f : geometry.scale_log2, i % 2 ? pair.z : pair.x, i % 2 ? sums.y : sums.x);
      }
      if (ONLY_CAUSAL ? needs_mask<CAUSAL>(geometry, q_tile * TILE_Q, first_kv + TILE_KV)
                      : tiles.is_partial(j) || visibility.needs_mask(q_tile * TILE_Q, q_tile * TILE_Q + TILE_Q, first_kv, first_kv + TILE_KV)) {
        for_each_element(P, [&](int row, int column, float& probability) {
          const bool visible = ONLY_CAUSAL ? is_visible<CAUSAL>(geometry, q_tile * TILE_Q + column, first_kv + warp_row + row)
                                           : visibility.sees(q_tile * TILE_Q + column, first_kv + warp_row + row);
          if (!visible) probability = 0.0f;
        });
      }
      KeptElements<true, M_TILES, S_TILES> kept;
      if constexpr (DROPOUT) kept.draw(dropout, batch, head, first_kv + warp_row, q_tile * TILE_Q);
      if constexpr (COMPUTE_DV) {
        auto add_to_dV = [&](const float (&weights)[M_TILES][S_TILES][4]) {
          auto add_piece = [&](int step) {
            gemm_accumulator<Mma, TileO::COLUMNS>(dV, weights, typename Mma::OperandBByRows<TileO>(dO_tile), step * TileO::COLUMNS / 8);
          };
          if constexpr (HEAD_STEPS == 1) {
            add_piece(0);
          } else {
            for_each_piece([&](int step) { load_dO.issue(dO_tile, q_tile * TILE_Q, first_column<TileO>(step)); }, add_piece);
          }
        };
        if constexpr (DROPOUT) {
          float kept_P[M_TILES][S_TILES][4];  // the factor 1 / (1 - dropout_p) follows when dV is stored
          for_each_place<M_TILES, S_TILES>([&](int m, int n, int i, int, int) { kept_P[m][n][i] = kept.has(m, n, i) ? P[m][n][i] : 0.0f; });
          add_to_dV(kept_P);
        } else {
          add_to_dV(P);
        }
      }

      if constexpr (COMPUTE_DK) {
        float dS[M_TILES][S_TILES][4];  // dP - delta, then dS; with dropout dP first
#pragma unroll
        for (int n = 0; n < S_TILES; ++n) {
          const float4 pair = statistics_of(n);
#pragma unroll
          for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) dS[m][n][i] = !DROPOUT && slice_index() == 0 ? i % 2 ? -pair.w : -pair.y : 0.0f;
        }
        auto add_grad_probabilities = [&](int) {
          gemm_rows<Mma, TileO::COLUMNS>(dS, typename Mma::OperandA<TileV>(V_smem, warp_row), typename Mma::OperandB<TileO>(dO_tile));
        };
        if constexpr (HEAD_STEPS == 1) {
          add_grad_probabilities(0);
        } else {
          for_each_piece(
              [&](int step) {
                load_V(step);
                load_dO.issue(dO_tile, q_tile * TILE_Q, first_column<TileO>(step));
              },
              add_grad_probabilities);
        }
        publish_and_collect(dS, dP_exchange);
        if constexpr (DROPOUT) {
#pragma unroll
          for (int n = 0; n < S_TILES; ++n) {
            const float4 pair = statistics_of(n);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                dS[m][n][i] = (kept.has(m, n, i) ? dS[m][n][i] * arguments.features.dropout_scale : 0.0f) - (i % 2 ? pair.w : pair.y);
          }
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
          for (int n = 0; n < S_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) dS[m][n][i] *= P[m][n][i];
        slope.multiply(dS);
        auto add_to_dK = [&](int step) {
          gemm_accumulator<Mma, TileQ::COLUMNS>(dK, dS, typename Mma::OperandBByRows<TileQ>(Q_tile), step * TileQ::COLUMNS / 8);
        };
        if constexpr (HEAD_STEPS == 1) {
          add_to_dK(0);
        } else {
          for_each_piece([&](int step) { load_Q.issue(Q_tile, q_tile * TILE_Q, first_column<TileQ>(step)); }, add_to_dK);
        }
      }
      if constexpr (NUM_STAGES == 1 && HEAD_STEPS == 1) __syncthreads();  // every warp is done with the only slot
    }
  }

  const int first_row = first_kv + warp_row;
  if constexpr (COMPUTE_DV) {
    if constexpr (DROPOUT) multiply_all(dV, arguments.features.dropout_scale);
    store_rows<Element, HEAD_DIM_V, TileK::COLUMNS, (HEAD_SLICES > 1)>(dV, K_smem + warp_row * TileK::ROW_BYTES, arguments.grad_value, work.batch,
                                                                       work.head, first_row, num_rows(), first_column<TileV>(0), start_kv);
  }
  if constexpr (COMPUTE_DK) {
    multiply_all(dK, arguments.geometry.scale);
    store_rows<Element, HEAD_DIM, TileK::COLUMNS, (HEAD_SLICES > 1)>(dK, K_smem + warp_row * TileK::ROW_BYTES, arguments.grad_key, work.batch,
                                                                     work.head, first_row, num_rows(), first_column<TileK>(0), start_kv);
  }
}
