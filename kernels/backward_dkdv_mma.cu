// Gradients of K and V: dV = Pᵀ dO, dK = scale dSᵀ Q, with P and dS recomputed from LSE and delta.
//
// One block owns TILE_KV keys of one K/V head, each warp TILE_KV / NUM_WARPS of them, and walks over all queries that see them: all query tiles of
// all query heads (and, where K or V is broadcast over the batch, of all batches) that share the head, one member of them after the other. Nothing is
// added across blocks, so the result is the same bit for bit on every run. Where there would be few blocks, several share out these query tiles
// (SPLIT, tile/query_splits.cuh), and a kernel behind adds up what each has stored. The scores are computed transposed,
//     Sᵀ = K Qᵀ,   dPᵀ = V dOᵀ,   dV += Pᵀ dO,   dK += dSᵀ Q
// so that Pᵀ and dSᵀ become the A operands of the last two products without leaving registers.
//
// COMPUTE_DK and COMPUTE_DV say what is accumulated: both, or for large head dimensions one in each of two launches, since both together would not
// fit the registers. V and dP are needed for dK only.
//
// Shared memory: K [TILE_KV][D] | V [TILE_KV][DV] | Q [NUM_STAGES][TILE_Q][D] | dO [NUM_STAGES][TILE_Q][DV], for a wide head this for each slice;
// then the row statistics [NUM_STAGES] (StatisticsOfColumns), and the parts of S and of dP that the slices exchange. One copy group per query tile;
// with two stages or more the next tiles travel during the products of this one.
#include "tile/constants.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/packed_tiles.cuh"
#include "tile/pipeline.cuh"
#include "tile/products.cuh"
#include "tile/query_splits.cuh"
#include "tile/query_steps.cuh"
#include "tile/row_statistics.cuh"
#include "tile/score.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_tiles.cuh"

constexpr int WARP_ROWS = TILE_KV / ROW_WARPS;
constexpr bool COMPUTE_DK = Config::COMPUTE_DK;
constexpr bool COMPUTE_DV = Config::COMPUTE_DV;
constexpr bool MAY_PASS_OVER = PER_HEAD_WALK || SPLIT;  // members of whose queries none is the block's

constexpr int M_TILES = WARP_ROWS / 16;
constexpr int S_TILES = TILE_Q / 8;
// Both products of scores come first where much is to do for each score, which the assembler then mixes with them. With 16 keys for each warp shared
// memory binds, and that gains nothing.
constexpr bool CAPS_QUICKLY = ONLY_CAPS && M_TILES > 1;
constexpr bool MIXES = CAPS_QUICKLY || ((DROPOUT || (BOOLEAN_MASK && Config::CAPABILITY < 90)) && M_TILES > 1);
using Statistics = StatisticsOfColumns;
constexpr int STATIONARY_BYTES = TileK::BYTES + (COMPUTE_DK ? TileV::BYTES : 0);
constexpr int SLICE_BYTES = STATIONARY_BYTES + NUM_STAGES * (TileQ::BYTES + TileO::BYTES);

static_assert(TILE_KV % (16 * ROW_WARPS) == 0, "tile_kv must be a multiple of 16 * num_warps");
static_assert(HEAD_SLICES * SLICE_BYTES + NUM_STAGES * StatisticsOfColumns::BYTES + (COMPUTE_DK ? 2 : 1) * EXCHANGE_BYTES<M_TILES, S_TILES> ==
                  Config::SHARED_BYTES,
              "shared memory differs from the plan's");

static_assert(!SPLIT || HEAD_SLICES == 1, "the plan splits no heads in slices");

// Which keys are the block's.
DEVICE BlockWork work_of(const BackwardArguments& arguments) {
  const int num_heads = arguments.geometry.num_heads_q / arguments.group_heads;
  if constexpr (SPLIT) return split_work_in_order(arguments, num_heads);
  return {work_in_order<CAUSAL, false>(arguments, num_heads)};
}

// Of all queries that there may be, as lists have them.
DEVICE int num_tiles_q(const BackwardArguments& arguments) { return (arguments.geometry.seqlen_q + TILE_Q - 1) / TILE_Q; }

// The steps of a split, where data hide tiles of the tiles in lists.
DEVICE Steps listed_steps_of_split(const BackwardArguments& arguments, const BlockWork& work) {
  if constexpr (!TILE_LISTS) return steps_of_split(arguments, work);
  return steps_of_split(arguments, work, [&](int batch, int head, const Geometry& geometry, const Steps&) {
    return VisibleTiles(geometry, arguments.features, batch, head, work.tile, num_tiles_q(arguments)).count();
  });
}

// dP less delta, or with dropout dP.
template <typename ValueTile, typename GradTile>
DEVICE void find_grad_products(float (&dP)[M_TILES][S_TILES][4], const Statistics& statistics, const ValueTile& V, int warp_row, const GradTile& dO,
                               SmemAddress exchange) {
  if constexpr (COMPUTE_DK) {
    statistics.begin_grad_products(dP);
    multiply_rows(dP, V, warp_row, dO);
    publish_and_collect(dP, exchange);
  }
}

// dV += Pᵀ dO, of probabilities that are kept.
template <int V_TILES, typename GradTile>
DEVICE void multiply_kept(float (&dV)[M_TILES][V_TILES][4], const float (&P)[M_TILES][S_TILES][4], const GradTile& dO) {
  if constexpr (DROPOUT) {
    multiply_accumulator<Positive<Mma>>(dV, P, dO);
  } else {
    multiply_accumulator(dV, P, dO);
  }
}

// Stores what the warp has summed up, or a split's part of it. K_smem is room for it, which no other warp reads.
template <int K_TILES, int V_TILES>
DEVICE void store_gradients(const BackwardArguments& arguments, const BlockWork& work, float (&dK)[M_TILES][K_TILES][4],
                            float (&dV)[M_TILES][V_TILES][4], SmemAddress K_smem, int start_kv) {
  const int first_kv = work.tile * TILE_KV, warp_row = row_warp_index() * WARP_ROWS;
  if constexpr (SPLIT) {
    store_part(arguments, work, dK, dV, warp_row / 16);
    return;
  }
  const int num_rows = sequence_length(packed_keys(arguments), work.batch);  // that have gradients
  if constexpr (COMPUTE_DV) {
    if constexpr (DROPOUT) multiply_all(dV, arguments.features.dropout_scale);
    store_slice<HEAD_DIM_V, TileK>(dV, K_smem, warp_row, arguments.grad_value, work, first_kv, num_rows, start_kv);
  }
  if constexpr (COMPUTE_DK) {
    multiply_all(dK, arguments.geometry.scale);
    store_slice<HEAD_DIM, TileK>(dK, K_smem, warp_row, arguments.grad_key, work, first_kv, num_rows, start_kv);
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_dkdv_mma(const __grid_constant__ BackwardArguments arguments) {
  const int heads_per_kv = arguments.geometry.num_heads_q / arguments.geometry.num_heads_kv;
  BlockWork work = work_of(arguments);
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  const int start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);
  auto clear_gradients = [&](int begin, int end, int tile, int num_tiles) {
    if (SPLIT && work.split != 0) return;  // one of them is enough
    if constexpr (COMPUTE_DK) clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM>(arguments.grad_key, work, begin, end, tile, num_tiles);
    if constexpr (COMPUTE_DV) clear_rows<Element, NUM_THREADS, TILE_KV, HEAD_DIM_V>(arguments.grad_value, work, begin, end, tile, num_tiles);
  };
  if (!claim_rows<TILE_KV>(arguments, packed_keys(arguments), work, clear_gradients)) return;
  if constexpr (SPLIT) work.own = listed_steps_of_split(arguments, work);
  const int first_kv = work.tile * TILE_KV;
  const int warp_row = row_warp_index() * WARP_ROWS;

  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress K_smem = smem_address(shared) + slice_index() * SLICE_BYTES;
  const SmemAddress V_smem = K_smem + TileK::BYTES;
  const SmemAddress Q_smem = K_smem + STATIONARY_BYTES;
  const SmemAddress dO_smem = Q_smem + NUM_STAGES * TileQ::BYTES;
  const SmemAddress statistics_smem = smem_address(shared) + HEAD_SLICES * SLICE_BYTES;
  const SmemAddress S_exchange = statistics_smem + NUM_STAGES * Statistics::BYTES;
  const SmemAddress dP_exchange = S_exchange + EXCHANGE_BYTES<M_TILES, S_TILES>;

  float dK[M_TILES][COMPUTE_DK ? D_TILES : 2][4];
  float dV[M_TILES][COMPUTE_DV ? DV_TILES : 2][4];
  clear(dK);
  clear(dV);
  const Dropout dropout(arguments.features);
  const auto& first_geometry = geometry_of(arguments, work.batch * arguments.group_batch);
  const Visibility common(first_geometry, arguments.features, 0, 0);  // of all batches and heads, unless PER_HEAD_WALK
  const Steps common_steps = query_steps(common, first_kv);
  const int common_keys = common.end_key(0, first_geometry.seqlen_q);
  const int num_members = PER_HEAD_WALK || common_steps.begin < common_steps.end ? arguments.group_batch * arguments.group_heads : 0;
  int loaded_kv = -1;  // (batch, K/V head) in shared memory
  int steps_before = 0;  // of earlier members, where splits count them

#pragma unroll 1
  for (int member = 0; member < num_members; ++member) {
    const int batch = work.batch * arguments.group_batch + member / arguments.group_heads;
    const int head = work.head * arguments.group_heads + member % arguments.group_heads;
    const auto& geometry = geometry_of(arguments, batch);
    const Visibility visibility(geometry, arguments.features, batch, head);
    VisibleTilesAhead<NUM_STAGES> tiles(geometry, arguments.features, batch, head, work.tile, num_tiles_q(arguments));
    const Steps all_steps = TILE_LISTS ? Steps{0, tiles.count()} : PER_HEAD_WALK ? query_steps(visibility, first_kv) : common_steps;
    const Steps steps = SPLIT ? own_steps(work.own, all_steps, steps_before) : all_steps;
    const int num_keys = PER_HEAD_WALK ? visibility.end_key(0, geometry.seqlen_q) : common_keys;  // keys beyond are not even read
    if (MAY_PASS_OVER && steps.begin >= steps.end) continue;
    if constexpr (SPLIT) tiles.begin_at(steps.begin);
    const ScoreModifier modifier(geometry, arguments.features, batch, head);
    const StatisticsView view(arguments, batch, head, start_q, geometry.seqlen_q);
    auto statistics_of = [&](int step) { return Statistics(statistics_smem + stage_of(step) * Statistics::BYTES, view, tiles.tile(step) * TILE_Q); };
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
      Q_loader.issue(Q_smem + stage_of(step) * TileQ::BYTES, tiles.tile(step) * TILE_Q, first_column<TileQ>(0), enabled);
      dO_loader.issue(dO_smem + stage_of(step) * TileO::BYTES, tiles.tile(step) * TILE_Q, first_column<TileO>(0), enabled);
      statistics_of(step).issue(enabled);
      cp_async_commit_group();
    };
    if constexpr (NUM_STAGES > 1) __syncthreads();  // every warp is done with the tiles of the previous member; one stage ends with a barrier
    const int kv = batch * geometry.num_heads_kv + head / heads_per_kv;
    // Another K/V head, or the first. Where members can be passed over, the one that is loaded has to be remembered.
    if (SLICE_PIECES == 1 && (MAY_PASS_OVER ? kv != loaded_kv : head % heads_per_kv == 0 || member % arguments.group_heads == 0)) {
      loaded_kv = kv;
      K.load(0);
      if constexpr (COMPUTE_DK) V.load(0);
    }
    fill_pipeline(steps.begin, issue);

#pragma unroll 1
    for (int j = steps.begin; j < steps.end; ++j) {
      tiles.look_ahead(j);
      begin_step(j, issue, [&] {
        Q_loader.land(Q_smem);
        dO_loader.land(dO_smem);
      });
      const int first_q = tiles.tile(j) * TILE_Q;
      const SliceTile<TileQ, HEAD_DIM> Q{Q_smem + stage_of(j) * TileQ::BYTES, first_q, Q_rows};
      const SliceTile<TileO, HEAD_DIM_V> dO{dO_smem + stage_of(j) * TileO::BYTES, first_q, dO_rows};
      if constexpr (SLICE_PIECES > 1) statistics_of(j).issue();  // with the first pieces

      float S[M_TILES][S_TILES][4];  // transposed: rows are keys
      clear(S);
      MaskAhead<true, M_TILES, S_TILES> mask;
      HiddenAhead<true, M_TILES, S_TILES> hidden;
      hidden.read(visibility, first_kv + warp_row, first_q, tiles.is_partial(j));
      modifier.read_mask(mask, first_kv + warp_row, first_q);
      DrawnTile<M_TILES, S_TILES> drawn;
      if constexpr (DROPOUT && MIXES) drawn.draw(dropout, batch, head, first_kv + warp_row, first_q);
      multiply_rows(S, K, warp_row, Q);
      publish_and_collect(S, S_exchange);
      const Statistics statistics = statistics_of(j);
      float dP[M_TILES][S_TILES][4];  // less delta
      if constexpr (MIXES) find_grad_products(dP, statistics, V, warp_row, dO, dP_exchange);
      ScoreDerivative<M_TILES, S_TILES> derivative;
      const bool hides = CAPS_QUICKLY && (tiles.is_partial(j) || visibility.hides_any(first_q, first_q + TILE_Q, first_kv, first_kv + TILE_KV));
      modifier.apply_or_cap<true, CAPS_QUICKLY>(S, derivative, first_kv + warp_row, first_q, mask, !hides);
      statistics.to_probabilities(S, modifier.factor_after<CAPS_QUICKLY>());
      auto& P = S;  // in place
      hidden.make_bits(tiles.is_partial(j));
      hide<true>(P, 0.0f, geometry, visibility, first_q, first_kv, warp_row, tiles.is_partial(j), hidden);
      if constexpr (DROPOUT && !MIXES) drawn.draw(dropout, batch, head, first_kv + warp_row, first_q);
      if constexpr (DROPOUT) mark_dropped(P, dropout, drawn);
      if constexpr (COMPUTE_DV) multiply_kept(dV, P, dO);
      if constexpr (COMPUTE_DK) {
        if constexpr (!MIXES) find_grad_products(dP, statistics, V, warp_row, dO, dP_exchange);
        if constexpr (DROPOUT) statistics.drop(dP, P, arguments.features.dropout_scale);
        multiply_all(dP, P);
        auto& dS = dP;  // in place
        derivative.multiply(dS);
        multiply_accumulator(dK, dS, Q);
      }
      tiles.advance();
      end_step();
    }
  }

  store_gradients(arguments, work, dK, dV, K_smem, start_kv);
}
