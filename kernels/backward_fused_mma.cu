// Gradients of Q, K and V in one walk: dV = Pᵀ dO, dK = scale dSᵀ Q, dQ = scale dS K, with P and dS recomputed from LSE and delta.
//
// One block owns TILE_KV keys of one K/V head and walks over all queries that see them, as in backward_dkdv_mma.cu:
//     Sᵀ = K Qᵀ,   dPᵀ = V dOᵀ,   dV += Pᵀ dO,   dK += dSᵀ Q
// Each warp has its own keys of dS in registers; all of dS meets in shared memory for the fifth product, dS K, whose queries the warps share out. It
// is added to sums in global memory in the order of the keys (tile/query_sums.cuh), and backward_dq_convert.cu makes dQ of them. The result is the
// same bit for bit on every run. The kernels backward_dkdv_mma.cu and backward_dq_mma.cu together need seven products for the same.
//
// Tiles of queries are walked over from the last to the first. So under a causal mask blocks of neighbouring keys, which start at about the same
// time, begin with the same tile, and each finds it its turn when it comes there.
//
// Shared memory: K [TILE_KV][D] | V [TILE_KV][DV] | Q [NUM_STAGES][TILE_Q][D] | dO [NUM_STAGES][TILE_Q][DV] | row statistics [NUM_STAGES]
// (StatisticsOfColumns) | dSᵀ [TILE_KV][TILE_Q]. One copy group per query tile. Two barriers for each tile: at the first its copies have landed, and
// all warps are done with dSᵀ and the slot of the tile before; at the second dSᵀ is complete. One more where there is only one stage.
//
// Source: Dao 2023 (arXiv 2307.08691), algorithm 2, but for the order of the sums.
#include "tile/constants.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/pipeline.cuh"
#include "tile/products.cuh"
#include "tile/query_steps.cuh"
#include "tile/query_sum_parts.cuh"
#include "tile/query_sums.cuh"
#include "tile/row_statistics.cuh"
#include "tile/schedule.cuh"
#include "tile/score.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"
#include "tile/visibility.cuh"

constexpr int WARP_ROWS = TILE_KV / NUM_WARPS;
constexpr int M_TILES = WARP_ROWS / 16;
constexpr int S_TILES = TILE_Q / 8;
constexpr int COLUMN_TILES = D_TILES / COLUMN_GROUPS;  // of dQ, of one warp

using TileS = SmemTile<Element, TILE_KV, TILE_Q>;  // dSᵀ

constexpr int KEPT_BYTES = TileK::BYTES + TileV::BYTES;
constexpr int STAGED_BYTES = NUM_STAGES * (TileQ::BYTES + TileO::BYTES + StatisticsOfColumns::BYTES);

static_assert(HEAD_SLICES == 1, "wide heads are cut into slices, which this kernel does not know");
static_assert(sizeof(Element) == 2 && HAS_CP_ASYNC, "16-bit elements and asynchronous copies are expected");
static_assert(!TILE_LISTS, "the order of sums is not known where the tiles of a walk depend on data");
static_assert(TILE_KV % (16 * NUM_WARPS) == 0, "tile_kv must be a multiple of 16 * num_warps");
static_assert(KEPT_BYTES + STAGED_BYTES + TileS::BYTES == Config::SHARED_BYTES, "shared memory differs from the plan's");

// Puts the warp's rows of dSᵀ where all warps find them, behind the next barrier.
DEVICE void share(const float (&dS)[M_TILES][S_TILES][4], SmemAddress smem, int warp_row) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * m + 8 * r + lane_index() / 4;
#pragma unroll
      for (int n = 0; n < S_TILES; ++n)
        store_shared(smem + TileS::offset(row, n) + lane_index() % 4 * 4, pack<Element>(dS[m][n][2 * r], dS[m][n][2 * r + 1]));
    }
}

// Adds dS K to the sum of a tile of queries.
DEVICE void add_query_gradients(const BackwardArguments& arguments, int slot, bool is_first, SmemAddress dS_smem, SmemAddress K_smem) {
  float dQ[QUERY_ROWS / 16][COLUMN_TILES][4];
  clear(dQ);
  const int query_group = warp_index() / COLUMN_GROUPS, column_group = warp_index() % COLUMN_GROUPS;
  gemm_columns<Mma, TILE_KV, COLUMN_GROUPS>(dQ, Mma::OperandAByRows<TileS>(dS_smem, query_group * (QUERY_ROWS / 8)),
                                            Mma::OperandBByRows<TileK>(K_smem, 2 * column_group));
  add_to_sums(dQ, arguments, slot, is_first);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_fused_mma(const __grid_constant__ BackwardArguments arguments) {
  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress K_smem = smem_address(shared);
  const SmemAddress V_smem = K_smem + TileK::BYTES;
  const SmemAddress Q_smem = K_smem + KEPT_BYTES;
  const SmemAddress dO_smem = Q_smem + NUM_STAGES * TileQ::BYTES;
  const SmemAddress statistics_smem = dO_smem + NUM_STAGES * TileO::BYTES;
  const SmemAddress dS_smem = K_smem + KEPT_BYTES + STAGED_BYTES;

  const int heads_per_kv = arguments.geometry.num_heads_q / arguments.geometry.num_heads_kv;
  const Work work = work_of_ticket(take_ticket(arguments, dS_smem), arguments.geometry.num_tiles,
                                   arguments.geometry.num_heads_q / arguments.group_heads, arguments.geometry.section_heads);
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  const int start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);
  auto clear_gradients = [&](int begin, int end, int tile, int num_tiles) {
    clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM>(arguments.grad_key, work.head, begin, end, tile, num_tiles);
    clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM_V>(arguments.grad_value, work.head, begin, end, tile, num_tiles);
  };
  if (!claim_rows<TILE_KV>(arguments, arguments.lengths.cu_seqlens_kv, arguments.geometry.seqlen_kv, work, clear_gradients)) return;
  const int first_kv = work.tile * TILE_KV;
  const int warp_row = warp_index() * WARP_ROWS;

  float dK[M_TILES][D_TILES][4];
  float dV[M_TILES][DV_TILES][4];
  clear(dK);
  clear(dV);
  const Dropout dropout(arguments.features);
  const auto& first_geometry = geometry_of(arguments, work.batch * arguments.group_batch);
  const Visibility common(first_geometry, arguments.features, 0, 0);  // of all batches and heads, unless PER_HEAD_WALK
  const Steps common_steps = query_steps(common, first_kv);
  const int common_keys = common.end_key(0, first_geometry.seqlen_q);
  const int num_members = PER_HEAD_WALK || common_steps.begin < common_steps.end ? arguments.group_batch * arguments.group_heads : 0;
  int loaded_kv = -1;  // (batch, K/V head) in shared memory
  TurnTaker turns(arguments.turns);

#pragma unroll 1
  for (int member = 0; member < num_members; ++member) {
    const int batch = work.batch * arguments.group_batch + member / arguments.group_heads;
    const int head = work.head * arguments.group_heads + member % arguments.group_heads;
    const auto& geometry = geometry_of(arguments, batch);
    const Visibility visibility(geometry, arguments.features, batch, head);
    const Steps steps = PER_HEAD_WALK ? query_steps(visibility, first_kv) : common_steps;
    const int num_keys = PER_HEAD_WALK ? visibility.end_key(0, geometry.seqlen_q) : common_keys;  // keys beyond are not even read
    if (PER_HEAD_WALK && steps.begin >= steps.end) continue;
    const ScoreModifier modifier(geometry, arguments.features, batch, head);
    const StatisticsView view(arguments, batch, head, start_q, geometry.seqlen_q);
    const int slot = first_slot(arguments, batch, head, start_q);
    auto tile_of = [&](int step) { return steps.begin + steps.end - 1 - step; };  // the last one first
    auto statistics_of = [&](int step) {
      return StatisticsOfColumns(statistics_smem + slot_of(step) * StatisticsOfColumns::BYTES, view, tile_of(step) * TILE_Q);
    };

    const SliceRows<TileK, HEAD_DIM> K_rows{arguments.key, batch, head / heads_per_kv, num_keys, start_kv};
    const SliceRows<TileV, HEAD_DIM_V> V_rows{arguments.value, batch, head / heads_per_kv, num_keys, start_kv};
    const SliceRows<TileQ, HEAD_DIM> Q_rows{arguments.query, batch, head, geometry.seqlen_q, start_q};
    const SliceRows<TileO, HEAD_DIM_V> dO_rows{arguments.grad_out, batch, head, geometry.seqlen_q, start_q};
    const SliceTile<TileK, HEAD_DIM> K{K_smem, first_kv, K_rows};
    const SliceTile<TileV, HEAD_DIM_V> V{V_smem, first_kv, V_rows};
    auto Q_loader = Q_rows.loader();
    auto dO_loader = dO_rows.loader();
    auto issue = [&](int step) {
      const bool enabled = step < steps.end;
      Q_loader.issue(Q_smem + slot_of(step) * TileQ::BYTES, tile_of(step) * TILE_Q, 0, enabled);
      dO_loader.issue(dO_smem + slot_of(step) * TileO::BYTES, tile_of(step) * TILE_Q, 0, enabled);
      statistics_of(step).issue(enabled);
      cp_async_commit_group();
    };
    if constexpr (NUM_STAGES > 1) __syncthreads();  // every warp is done with the tiles of the previous member; one stage ends with a barrier
    const int kv = batch * geometry.num_heads_kv + head / heads_per_kv;
    // Another K/V head, or the first. Where members can be passed over, the one that is loaded has to be remembered.
    if (PER_HEAD_WALK ? kv != loaded_kv : head % heads_per_kv == 0 || member % arguments.group_heads == 0) {
      loaded_kv = kv;
      K.load(0);
      V.load(0);
    }
    fill_pipeline(steps.begin, issue);

#pragma unroll 1
    for (int j = steps.begin; j < steps.end; ++j) {
      begin_step(j, issue, [] {});
      const int first_q = tile_of(j) * TILE_Q;
      turns.look(slot + tile_of(j));
      const SliceTile<TileQ, HEAD_DIM> Q{Q_smem + slot_of(j) * TileQ::BYTES, first_q, Q_rows};
      const SliceTile<TileO, HEAD_DIM_V> dO{dO_smem + slot_of(j) * TileO::BYTES, first_q, dO_rows};

      float P[M_TILES][S_TILES][4];  // scores, then probabilities; rows are keys
      clear(P);
      multiply_rows(P, K, warp_row, Q);
      ScoreSlope<M_TILES, S_TILES> slope;
      modifier.apply<true>(P, slope, first_kv + warp_row, first_q);
      const StatisticsOfColumns statistics = statistics_of(j);
      statistics.to_probabilities(P, modifier.signed_factor());
      hide<true>(P, 0.0f, geometry, visibility, first_q, first_kv, warp_row, false);
      if constexpr (DROPOUT) {
        float kept_P[M_TILES][S_TILES][4];
        drop_and_mark(P, kept_P, dropout, batch, head, first_kv + warp_row, first_q);
        multiply_accumulator(dV, kept_P, dO);
      } else {
        multiply_accumulator(dV, P, dO);
      }
      float dS[M_TILES][S_TILES][4];  // dP - delta, then dS
      statistics.begin_grad_products(dS);
      multiply_rows(dS, V, warp_row, dO);
      if constexpr (DROPOUT) statistics.drop(dS, P, arguments.features.dropout_scale);
      multiply_all(dS, P);
      slope.multiply(dS);
      share(dS, dS_smem, warp_row);
      multiply_accumulator(dK, dS, Q);

      const int place = work.tile - visibility.first_key(first_q) / TILE_KV;  // among the blocks that add to this tile
      turns.take(slot + tile_of(j), place);
      __syncthreads();  // dSᵀ is complete, and it is the block's turn
      add_query_gradients(arguments, slot + tile_of(j), place == 0, dS_smem, K_smem);
      end_step();
    }
  }
  __syncthreads();  // every warp has added its last sum, and is done with K
  turns.finish();

  const int num_rows = sequence_length(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);  // that have gradients
  if constexpr (DROPOUT) multiply_all(dV, arguments.features.dropout_scale);
  store_slice<HEAD_DIM_V, TileK>(dV, K_smem, warp_row, arguments.grad_value, work, first_kv, num_rows, start_kv);
  multiply_all(dK, arguments.geometry.scale);
  store_slice<HEAD_DIM, TileK>(dK, K_smem, warp_row, arguments.grad_key, work, first_kv, num_rows, start_kv);
}
