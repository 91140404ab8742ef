// Gradients of Q, K and V in one walk: dV = Pᵀ dO, dK = scale dSᵀ Q, dQ = scale dS K, with P and dS recomputed from LSE and delta.
//
// One block owns TILE_KV keys of one K/V head and walks over all queries that see them, as in backward_dkdv_mma.cu:
//     Sᵀ = K Qᵀ,   dPᵀ = V dOᵀ,   dV += Pᵀ dO,   dK += dSᵀ Q
// P and dS meet in shared memory, and the warps share out each product as suits it. SHARING_WARPS of them have the same keys: of S and dP each has
// some of the queries, of dV and dK some of the columns. So each has 32 keys where it can, and reads half of what it would read with 16. The queries
// of the fifth product, dS K, the warps share out once more. It is added to sums in global memory in the order of the keys (tile/query_sums.cuh), and
// backward_dq_convert.cu makes dQ of them. The result is the same bit for bit on every run. The kernels backward_dkdv_mma.cu and backward_dq_mma.cu
// together need seven products for the same, or eight.
//
// Tiles of queries are walked over from the last to the first. So under a causal mask blocks of neighbouring keys, which start at about the same
// time, begin with the same tile, and each finds it its turn when it comes there. Where a boolean mask or segments hide tiles, each warp reads for
// itself in the table of tile/visible_tiles.cuh which one comes next, and which place the block has in it.
//
// Shared memory: K [TILE_KV][D] | V [TILE_KV][DV] | Q [NUM_STAGES][TILE_Q][D] | dO [NUM_STAGES][TILE_Q][DV] | row statistics [NUM_STAGES]
// (StatisticsOfColumns) | Pᵀ [TILE_KV][TILE_Q] | dSᵀ [TILE_KV][TILE_Q]. One copy group per query tile. Two barriers for each tile: at the first its
// copies have landed, and all warps are done with P, dS and the stage of the tile before; at the second P and dS are complete. Where there is only
// one stage, there is one more before dS K: the stage is free, and the next tile travels during that product.
//
// Sources: Dao 2023 (arXiv 2307.08691), algorithm 2, but for the order of the sums; his kernels share out products among warps in the same way.
#include "tile/constants.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/gemm.cuh"
#include "tile/packed_tiles.cuh"
#include "tile/pipeline.cuh"
#include "tile/query_steps.cuh"
#include "tile/query_sum_parts.cuh"
#include "tile/query_sums.cuh"
#include "tile/row_statistics.cuh"
#include "tile/score.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_tiles.cuh"

constexpr int SHARING_WARPS = Config::SHARING_WARPS;
constexpr int WARP_KEYS = TILE_KV * SHARING_WARPS / NUM_WARPS;
constexpr int WARP_QUERIES = TILE_Q / SHARING_WARPS;
constexpr int M_TILES = WARP_KEYS / 16;
constexpr int S_TILES = WARP_QUERIES / 8;
constexpr int COLUMN_TILES = D_TILES / COLUMN_GROUPS;  // of dQ, of one warp
constexpr bool SEGMENTS_AHEAD = !Config::CAUSAL && S_TILES >= 8;  // else ids take more registers than there are
constexpr int STEPS_AHEAD = NUM_STAGES > 1 ? NUM_STAGES - 1 : 1;

using TileS = SmemTile<Element, TILE_KV, TILE_Q>;  // Pᵀ, dSᵀ

constexpr int STATIONARY_BYTES = TileK::BYTES + TileV::BYTES;
constexpr int STAGED_BYTES = NUM_STAGES * (TileQ::BYTES + TileO::BYTES + StatisticsOfColumns::BYTES);

static_assert(HEAD_SLICES == 1, "wide heads are cut into slices, which this kernel does not know");
static_assert(sizeof(Element) == 2 && HAS_CP_ASYNC, "16-bit elements and asynchronous copies are expected");
static_assert(NUM_WARPS % SHARING_WARPS == 0, "warps that share keys must be whole groups");
static_assert(WARP_KEYS % 16 == 0 && WARP_KEYS * NUM_WARPS == TILE_KV * SHARING_WARPS, "the keys of a warp must be a multiple of 16");
static_assert(WARP_QUERIES % 16 == 0 && D_TILES / 2 % SHARING_WARPS == 0 && DV_TILES / 2 % SHARING_WARPS == 0,
              "warps with the same keys must be able to share out queries and columns");
static_assert((SHARING_WARPS & (SHARING_WARPS - 1)) == 0, "operands take every 2nd, 4th or 8th pair of columns");
static_assert(STATIONARY_BYTES + STAGED_BYTES + 2 * TileS::BYTES == Config::SHARED_BYTES, "shared memory differs from the plan's");

// Puts a warp's part of Pᵀ or dSᵀ where all warps find it, behind the next barrier.
template <bool POSITIVE = false>
DEVICE void share(const float (&c)[M_TILES][S_TILES][4], SmemAddress tile, int warp_key, int warp_query) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_key + 16 * m + 8 * r + lane_index() / 4;
#pragma unroll
      for (int n = 0; n < S_TILES; ++n) {
        const float first = c[m][n][2 * r], second = c[m][n][2 * r + 1];
        store_shared(tile + TileS::offset(row, warp_query / 8 + n) + lane_index() % 4 * 4,
                     POSITIVE ? pack_positive<Element>(first, second) : pack<Element>(first, second));
      }
    }
}

// The same of probabilities: with dropout of those that are kept, and the others are marked.
DEVICE void share_kept(float (&P)[M_TILES][S_TILES][4], SmemAddress tile, const Dropout& dropout, int batch, int head, int first_kv, int first_q,
                       int warp_key, int warp_query) {
  if constexpr (DROPOUT) {
    DrawnTile<M_TILES, S_TILES> drawn;
    drawn.draw(dropout, batch, head, first_kv + warp_key, first_q + warp_query);
    mark_dropped(P, dropout, drawn);
    share<true>(P, tile, warp_key, warp_query);
  } else {
    share(P, tile, warp_key, warp_query);
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

// dK and dV, through the tiles that held K and V.
DEVICE void store_gradients(float (&dK)[M_TILES][D_TILES / SHARING_WARPS][4], float (&dV)[M_TILES][DV_TILES / SHARING_WARPS][4],
                            const BackwardArguments& arguments, const Work& work, SmemAddress K_smem, SmemAddress V_smem, int start_kv) {
  const int warp_key = warp_index() / SHARING_WARPS * WARP_KEYS, share_index = warp_index() % SHARING_WARPS;
  if constexpr (DROPOUT) multiply_all(dV, arguments.features.dropout_scale);
  multiply_all(dK, arguments.geometry.scale);
  put_columns<TileV, SHARING_WARPS>(dV, V_smem, warp_key, share_index);
  put_columns<TileK, SHARING_WARPS>(dK, K_smem, warp_key, share_index);
  __syncthreads();  // the tiles are complete
  const int first_kv = work.tile * TILE_KV;
  const int num_rows = sequence_length(packed_keys(arguments), work.batch);  // that have gradients
  store_tile<TileV, HEAD_DIM_V>(V_smem, arguments.grad_value, work, first_kv, num_rows, start_kv);
  store_tile<TileK, HEAD_DIM>(K_smem, arguments.grad_key, work, first_kv, num_rows, start_kv);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_fused_mma(const __grid_constant__ BackwardArguments arguments) {
  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress K_smem = smem_address(shared);
  const SmemAddress V_smem = K_smem + TileK::BYTES;
  const SmemAddress Q_smem = K_smem + STATIONARY_BYTES;
  const SmemAddress dO_smem = Q_smem + NUM_STAGES * TileQ::BYTES;
  const SmemAddress statistics_smem = dO_smem + NUM_STAGES * TileO::BYTES;
  const SmemAddress P_smem = K_smem + STATIONARY_BYTES + STAGED_BYTES;
  const SmemAddress dS_smem = P_smem + TileS::BYTES;

  const int heads_per_kv = arguments.geometry.num_heads_q / arguments.geometry.num_heads_kv;
  const Work work = work_of_ticket(arguments, arguments.geometry.num_heads_q / arguments.group_heads, take_ticket(arguments, dS_smem));
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  const int start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);
  auto clear_gradients = [&](int begin, int end, int tile, int num_tiles) {
    clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM>(arguments.grad_key, work, begin, end, tile, num_tiles);
    clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM_V>(arguments.grad_value, work, begin, end, tile, num_tiles);
  };
  if (!claim_rows<TILE_KV>(arguments, packed_keys(arguments), work, clear_gradients)) return;
  const int first_kv = work.tile * TILE_KV;
  const int warp_key = warp_index() / SHARING_WARPS * WARP_KEYS;
  const int share_index = warp_index() % SHARING_WARPS;
  const int warp_query = share_index * WARP_QUERIES;

  float dK[M_TILES][D_TILES / SHARING_WARPS][4];
  float dV[M_TILES][DV_TILES / SHARING_WARPS][4];
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
    VisibleTurnsAhead<STEPS_AHEAD> tiles(arguments.features, batch, head, arguments.geometry.num_tiles, work.tile,
                                         ceil_div(arguments.geometry.seqlen_q, TILE_Q), steps.begin, steps.end);
    if (PER_HEAD_WALK && !tiles.is_there(steps.begin)) continue;
    const ScoreModifier modifier(geometry, arguments.features, batch, head);
    const StatisticsView view(arguments, batch, head, start_q, geometry.seqlen_q);
    const int slot = first_slot(arguments, batch, head, start_q);
    auto statistics_of = [&](int step) {
      return StatisticsOfColumns(statistics_smem + stage_of(step) * StatisticsOfColumns::BYTES, view, tiles.tile(step) * TILE_Q);
    };

    const SliceRows<TileK, HEAD_DIM> K_rows{arguments.key, batch, head / heads_per_kv, num_keys, start_kv};
    const SliceRows<TileV, HEAD_DIM_V> V_rows{arguments.value, batch, head / heads_per_kv, num_keys, start_kv};
    const SliceRows<TileQ, HEAD_DIM> Q_rows{arguments.query, batch, head, geometry.seqlen_q, start_q};
    const SliceRows<TileO, HEAD_DIM_V> dO_rows{arguments.grad_out, batch, head, geometry.seqlen_q, start_q};
    auto Q_loader = Q_rows.loader();
    auto dO_loader = dO_rows.loader();
    auto issue = [&](int step) {
      const bool enabled = tiles.is_there(step);
      Q_loader.issue(Q_smem + stage_of(step) * TileQ::BYTES, tiles.tile(step) * TILE_Q, 0, enabled);
      dO_loader.issue(dO_smem + stage_of(step) * TileO::BYTES, tiles.tile(step) * TILE_Q, 0, enabled);
      statistics_of(step).issue(enabled);
      cp_async_commit_group();
    };
    __syncthreads();  // every warp is done with the tiles of the previous member
    const int kv = batch * geometry.num_heads_kv + head / heads_per_kv;
    // Another K/V head, or the first. Where members can be passed over, the one that is loaded has to be remembered.
    if (PER_HEAD_WALK ? kv != loaded_kv : head % heads_per_kv == 0 || member % arguments.group_heads == 0) {
      loaded_kv = kv;
      K_rows.loader().issue(K_smem, first_kv);
      V_rows.loader().issue(V_smem, first_kv);
    }
    turns.look(slot + tiles.tile(steps.begin));
    HiddenAhead<true, M_TILES, S_TILES, BOOLEAN_MASK, SEGMENTS_AHEAD> hidden;  // of the next tile, read while dQ is computed, which leaves registers
    hidden.read(visibility, first_kv + warp_key, tiles.tile(steps.begin) * TILE_Q + warp_query, tiles.is_partial());
#pragma unroll
    for (int ahead = 0; ahead < STEPS_AHEAD; ++ahead) issue(steps.begin + ahead);
    hidden.make_bits(tiles.is_partial());

#pragma unroll 1
    for (int j = steps.begin; tiles.is_there(j); ++j) {
      wait_for_tiles<STEPS_AHEAD - 1>();  // the tiles have landed; every warp is done with those before
      tiles.begin_step(j);
      if constexpr (NUM_STAGES > 1) issue(j + STEPS_AHEAD);  // into their stage
      turns.pass_on();
      const int first_q = tiles.tile(j) * TILE_Q;
      const SmemAddress Q = Q_smem + stage_of(j) * TileQ::BYTES, dO = dO_smem + stage_of(j) * TileO::BYTES;

      float P[M_TILES][S_TILES][4];  // scores, then probabilities; rows are keys
      clear(P);
      gemm_rows<Mma, TileK::COLUMNS, true>(P, Mma::OperandA<TileK>(K_smem, warp_key), Mma::OperandB<TileQ>(Q + warp_query * TileQ::ROW_BYTES));
      ScoreDerivative<M_TILES, S_TILES> derivative;
      modifier.apply<true>(P, derivative, first_kv + warp_key, first_q + warp_query);
      const StatisticsOfColumns statistics(statistics_smem + stage_of(j) * StatisticsOfColumns::BYTES, view, first_q, warp_query);
      statistics.to_probabilities(P, modifier.signed_factor());
      hide<true>(P, 0.0f, geometry, visibility, first_q + warp_query, first_kv, warp_key, tiles.is_partial(), hidden);
      share_kept(P, P_smem, dropout, batch, head, first_kv, first_q, warp_key, warp_query);
      float dS[M_TILES][S_TILES][4];  // dP - delta, then dS
      statistics.begin_grad_products(dS);
      gemm_rows<Mma, TileV::COLUMNS, true>(dS, Mma::OperandA<TileV>(V_smem, warp_key), Mma::OperandB<TileO>(dO + warp_query * TileO::ROW_BYTES));
      if constexpr (DROPOUT) statistics.drop(dS, P, arguments.features.dropout_scale);
      multiply_all(dS, P);
      derivative.multiply(dS);
      share(dS, dS_smem, warp_key, warp_query);

      const int place = TILE_LISTS ? tiles.place() : place_among_blocks(work, visibility, tiles.tile(j));
      turns.take(slot + tiles.tile(j), place);
      __syncthreads();  // P and dS are complete, and it is the block's turn
      gemm_by_rows<Mma, TILE_Q, SHARING_WARPS>(dV, Mma::OperandA<TileS>(P_smem, warp_key), Mma::OperandBByRows<TileO>(dO, 2 * share_index));
      gemm_by_rows<Mma, TILE_Q, SHARING_WARPS>(dK, Mma::OperandA<TileS>(dS_smem, warp_key), Mma::OperandBByRows<TileQ>(Q, 2 * share_index));
      if constexpr (NUM_STAGES == 1) {
        __syncthreads();  // every warp is done with the only stage
        issue(j + 1);
      }
      if (tiles.is_there(j + 1)) turns.look(slot + tiles.tile(j + 1));  // before the additions, behind which the answer would have to wait
      tiles.look_ahead();
      hidden.read(visibility, first_kv + warp_key, tiles.tile(j + 1) * TILE_Q + warp_query, tiles.next_is_partial());
      add_query_gradients(arguments, slot + tiles.tile(j), place == 0, dS_smem, K_smem);
      tiles.advance();
      hidden.make_bits(tiles.is_partial());
    }
  }
  __syncthreads();  // every warp has added its last sum, and is done with K
  turns.finish();
  store_gradients(dK, dV, arguments, work, K_smem, V_smem, start_kv);
}
