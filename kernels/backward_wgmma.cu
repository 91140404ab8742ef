// Gradients of Q, K and V on Hopper's warpgroup instructions: what backward_fused_mma.cu computes, for 16-bit types and head dimensions up to 256.
// COMPUTE_DK and COMPUTE_DV say what is accumulated: both, or above 192 columns of K or 128 of V one in each of two launches, since both together
// would not fit the registers. dQ comes with dK.
//
// One block owns TILE_KV = 128 keys of one K/V head, and walks over all queries that see them, tile by tile from the last to the first. A warpgroup
// is four warps. Two of them own 64 keys each, whose dK and dV they keep in registers, and to which the first hands most of its own. A step is
//
//     Sᵀ = K Qᵀ, dPᵀ = V dOᵀ - delta issued together; while dPᵀ is in flight Sᵀ becomes Pᵀ
//     dSᵀ = Pᵀ dPᵀ                   to shared memory once, where both warpgroups find all of it
//     dV += Pᵀ dO, dQᵀ = Kᵀ dSᵀ, dK += dSᵀ Q
//
// dV alone takes scores of a tile beside dV of the tile before, for which dO has a ring of its own.
//
// Pᵀ and dSᵀ are operands of dV and dK from registers. Of dQᵀ a warpgroup computes 64 columns of the head for all keys of the block, and of columns
// that are left over half of the queries, and adds them to sums in global memory from registers while dK is in flight. Blocks add in the order of
// their keys (tile/query_sums.cuh), so that the result is the same bit for bit on every run. Of the sums backward_dq_convert.cu makes dQ, or with a
// causal mask alone each block of those to which it adds last (tile/query_sum_conversion.cuh).
//
// Of the first warpgroup one warp copies: it asks the TMA unit for K, V and the tiles of Q and dO, NUM_STAGES of them ahead, and its lanes copy row
// statistics. One thread of another waits for the block's turn to add to each tile, TURNS of them ahead, since that takes two trips to L2 and more
// where additions stand before it. One thread of a third passes the turn on when all warps have added. The fourth copies masks and segment ids
// (tile/staged_mask.cuh). Where a boolean mask or segments hide tiles, these warps go through the table of tile/visible_tiles.cuh, the first says in
// the stage which tile it is, and tiles without a visible pair take neither a stage nor a turn.
//
// Shared memory: K [2][⌈D / 64⌉][64][64] | V [2][⌈DV / 64⌉][64][64] | Q [NUM_STAGES][⌈D / 64⌉][TILE_Q][64] | dO [GRAD_OUT_STAGES][⌈DV /
// 64⌉][TILE_Q][64] | dS [2][2][TILE_Q][64] | masks and ids [NUM_STAGES] (StagedMask) | row statistics [NUM_STAGES] (StatisticsOfColumns) | which tile
// of a table [NUM_STAGES] | mbarriers | ticket. At the end dK and dV pass through K and V.
//
// mbarriers, for each stage: "full", all copies have landed, and "empty", both warpgroups are done with them. For each of TURNS:
// it is the block's turn to add, all warps have added, and the turn is passed on. K and V have landed. One barrier of both warpgroups for each tile:
// behind it dS is complete, and the other buffer of dS, which dQ of the tile before was computed from, is free.
//
// Source: Dao 2023 (arXiv 2307.08691), algorithm 2; Shah et al. 2024 (arXiv 2407.08608).
#include "tile/constants.cuh"
#include "tile/epilogue.cuh"
#include "tile/fragment.cuh"
#include "tile/packed_dropout.cuh"
#include "tile/packed_tiles.cuh"
#include "tile/query_splits.cuh"
#include "tile/query_sum_conversion.cuh"
#include "tile/query_sums.cuh"
#include "tile/score.cuh"
#include "tile/visible_columns.cuh"
#include "tile/wgmma_backward_block.cuh"
#include "tile/wgmma_backward_copier.cuh"
#include "tile/wgmma_products.cuh"
#include "ptx/warpgroup.cuh"

constexpr int COMPUTING_BARRIER = 1;  // of both warpgroups
constexpr int NOBODY_SEES = 0x7fffffff;
constexpr int LASTS_OF_WINDOW = S_TILES > 12 ? 1 : 2;  // of a lane's two keys: where registers are short, the second is computed from the first

// A warpgroup's 64 keys.
class WarpgroupKeys {
 public:
  float dK[1][COMPUTE_DK ? D_TILES : 1][4] = {};
  float dV[1][COMPUTE_DV ? DV_TILES : 1][4] = {};

  DEVICE WarpgroupKeys(const BackwardWgmmaArguments& arguments, const BlockWork& work, const SharedMemory& shared, int warpgroup)
      : arguments(arguments),
        work(work),
        shared(shared),
        warpgroup(warpgroup),
        dropout(arguments.features),
        ring(shared.ring()),
        out_ring(shared.out_ring()),
        turns(shared.turns()),
        K_descriptor(WarpgroupK::descriptor(shared.K(warpgroup))),
        V_descriptor(WarpgroupV::descriptor(shared.V(warpgroup))) {}

  // K and V have landed.
  DEVICE void load_first_steps() {
    const int lane_offset = WarpgroupK::offset(16 * warp_of_warpgroup() + lane_index() % 16, lane_index() / 16);
#pragma unroll
    for (int k = 0; k < K_REGISTER_STEPS; ++k) ldmatrix_x4(K_steps[k], shared.K(warpgroup) + WarpgroupK::at(lane_offset, 2 * k));
#pragma unroll
    for (int k = 0; k < V_REGISTER_STEPS; ++k) ldmatrix_x4(V_steps[k], shared.V(warpgroup) + WarpgroupV::at(lane_offset, 2 * k));
  }

  // Adds what the queries of one member give.
  DEVICE void walk(int batch, int head, const Geometry& geometry, const Visibility& visibility, const Steps& steps) {
    const Member member(arguments, work, geometry, visibility, dropout, batch, head,
                        work.tile * TILE_KV + warpgroup * WARPGROUP_ROWS + 16 * warp_of_warpgroup());
    int tile = steps.end;
    if constexpr (!COMPUTE_DK) begin_values(member, --tile);
    if constexpr (!WINDOW) {  // with a window there are few tiles whose queries see all keys
      const int last_kv = (work.tile + 1) * TILE_KV - 1;
      const int unmasked_begin = uniform(last_kv < geometry.seqlen_kv ? ceil_div(visibility.first_query(last_kv), TILE_Q) : steps.end);
      walk_down<false>(member, tile, max(unmasked_begin, steps.begin));
    }
    walk_down<true>(member, tile, steps.begin);
    if constexpr (!COMPUTE_DK) finish_values();
  }

  // The same over the tiles that the copying warp says.
  DEVICE void walk_list(int batch, int head, const Geometry& geometry, const Visibility& visibility) {
    const Member member(arguments, work, geometry, visibility, dropout, batch, head,
                        work.tile * TILE_KV + warpgroup * WARPGROUP_ROWS + 16 * warp_of_warpgroup());
    ListedTile listed;
    auto find_next = [&] {
      ring.wait_full();
      listed = ListedTile::load(shared.listed_tile(ring.stage));
      return listed.is_there();
    };
    const bool has_tiles = COMPUTE_DK || find_next();
    if constexpr (TILE_LISTS && !COMPUTE_DK) {
      if (has_tiles) begin_values(member, listed.tile(), listed);
    }
#pragma unroll 1
    while (has_tiles && find_next()) {
      if constexpr (TILE_LISTS) step_of<true>(member, listed.tile(), listed);
    }
    if constexpr (COMPUTE_DK) {
      sync_warpgroup(COMPUTING_BARRIER + 1 + warpgroup);  // all warps have read it
      ring.release(1);
    } else {
      if (has_tiles) finish_values();
      __syncwarp();  // all lanes have
      ring.release_by_each_warp();
    }
  }

 private:
  struct Member {
    const int batch, head;
    const StatisticsView view;
    const Visibility& visibility;
    const ScoreModifier modifier;
    const PackedDropout dropout;
    const int first_key;  // of the warp
    float* sums;  // of the first tile
    int first_query[2];  // that sees a key of this lane, less the column of the lane
    int last_of_window[LASTS_OF_WINDOW];  // the last one whose window reaches back to it, likewise, as if there were as many

    DEVICE Member(const BackwardWgmmaArguments& arguments, const BlockWork& work, const Geometry& geometry, const Visibility& visibility,
                  const Dropout& dropout, int batch, int head, int first_key)
        : batch(batch),
          head(head),
          view(arguments, batch, head, Starts(arguments, batch).q, geometry.seqlen_q),
          visibility(visibility),
          modifier(geometry, arguments.features, batch, head),
          dropout(dropout, batch, head),
          first_key(first_key),
          sums(query_sum(arguments, first_slot(arguments, batch, head, Starts(arguments, batch).q) + work.slots_before, 0, 0)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = first_key + 8 * r + lane_index() / 4;
        first_query[r] = key < geometry.seqlen_kv ? visibility.first_query(key) - lane_index() % 4 * 2 : NOBODY_SEES;
        if (WINDOW && r < LASTS_OF_WINDOW) last_of_window[r] = visibility.last_of_window(key) - lane_index() % 4 * 2;
      }
    }
  };

  // A warpgroup's part of dQᵀ of a tile.
  struct QueryGradients {
    float own[OWN_SLABS > 0 ? OWN_SLABS : 1][S_TILES][4], shared[1][SHARED_TILES][4];
  };

  const BackwardWgmmaArguments& arguments;
  const BlockWork& work;
  const SharedMemory shared;
  const int warpgroup;
  const Dropout dropout;
  Ring<NUM_STAGES> ring;
  Ring<GRAD_OUT_STAGES> out_ring;
  Ring<TURNS> turns;
  const uint64 K_descriptor, V_descriptor;
  int buffer = 0;  // of dS
  uint32 K_steps[K_REGISTER_STEPS > 0 ? K_REGISTER_STEPS : 1][4];  // as far as registers have room; products read the rest in shared memory
  uint32 V_steps[V_REGISTER_STEPS > 0 ? V_REGISTER_STEPS : 1][4];
  uint32 P_of_values[P_STEPS][4];  // of the tile whose dV is computed beside the scores of the next one

  DEVICE int warp_key() const { return warpgroup * WARPGROUP_ROWS + 16 * warp_of_warpgroup(); }  // of the block's

  template <bool IS_MASKED>
  DEVICE void walk_down(const Member& member, int& tile, int begin) {
#pragma unroll 1
    while (tile > begin) step_of<IS_MASKED>(member, --tile);
  }

  template <bool IS_MASKED>
  DEVICE void step_of(const Member& member, int tile, ListedTile listed = {}) {
    if constexpr (COMPUTE_DK) {
      step<IS_MASKED>(member, tile, listed);
    } else {
      step_of_values<IS_MASKED>(member, tile, listed);
    }
  }

  // dV alone: scores of a tile are computed while dV of the tile before is, whose probabilities are in registers.
  template <bool IS_MASKED>
  DEVICE void step_of_values(const Member& member, int tile, ListedTile listed) {
    if constexpr (!TILE_LISTS) ring.wait_full();
    float P[1][S_TILES][4];
    out_ring.wait_full();
    issue_scores(P);
    issue_values();
    const VisibleColumns<S_TILES> visible = left_by_data(member, tile, listed);
    wgmma_wait<1>();
    pin(P[0]);
    to_probabilities<IS_MASKED>(P, member, tile, visible, listed);
    mbarrier_wait(shared.keys_landed(), 0);  // they have: it keeps the assembler from moving the next wait up, before the exponentials
    wait_for_values();
    pack_for_values(P, member, tile);
  }

  // The first tile, whose scores no dV is computed beside.
  DEVICE void begin_values(const Member& member, int tile, ListedTile listed = {}) {
    if constexpr (!TILE_LISTS) ring.wait_full();
    float P[1][S_TILES][4];
    issue_scores(P);
    const VisibleColumns<S_TILES> visible = left_by_data(member, tile, listed);
    wgmma_wait<0>();
    pin(P[0]);
    to_probabilities<true>(P, member, tile, visible, listed);
    pack_for_values(P, member, tile);
  }

  // dV of the last tile.
  DEVICE void finish_values() {
    out_ring.wait_full();
    issue_values();
    wait_for_values();
  }

  DEVICE void issue_scores(float (&S)[1][S_TILES][4]) const {
    pin(S[0]);
    const uint64 Q_descriptor = RingQ::descriptor(shared.Q(ring.stage));
    if constexpr (K_REGISTER_STEPS > 0) {
      issue_rows<WarpgroupK, RingQ, D_TILES / 2>(S, K_steps, K_descriptor, Q_descriptor);
    } else {
      issue_rows<WarpgroupK, RingQ, D_TILES / 2>(S, K_descriptor, Q_descriptor);
    }
  }

  DEVICE void issue_values() {
    pin(P_of_values);
    pin(dV[0]);
    if constexpr (COMPUTE_DV) issue_accumulator<RingO>(dV, P_of_values, RingO::descriptor(shared.dO(out_ring.stage)));
  }

  DEVICE void wait_for_values() {
    wgmma_wait<0>();
    pin(dV[0]);
    pin(P_of_values);
    out_ring.release(1);
  }

  // Scores in, probabilities out. The stage of Q is free.
  template <bool IS_MASKED>
  DEVICE void to_probabilities(float (&P)[1][S_TILES][4], const Member& member, int tile, const VisibleColumns<S_TILES>& visible, ListedTile listed) {
    const int first_q = tile * TILE_Q;
    const StatisticsOfColumns statistics(shared.statistics(ring.stage), member.view, first_q);
    ScoreDerivative<1, S_TILES> derivative;
    member.modifier.apply_all_but_mask<true>(P, derivative, member.first_key, first_q);
    const StagedMask staged(shared.mask(ring.stage));
    if constexpr (ADDITIVE_MASK) {
      multiply_all(P, member.modifier.factor_beside_mask());  // apart: with one FMA for both the schedule is slower at head_dim 128
      staged.add(P, warp_key());
    }
    statistics.to_probabilities(P, member.modifier.signed_factor());
    hide<IS_MASKED>(P, member, first_q, visible, listed);
    __syncwarp();  // all lanes of the warp have read row statistics; with dQ a barrier of all stands behind those reads
    ring.release_by_each_warp();
  }

  // Of probabilities, what dropout drops 0.
  DEVICE void pack_for_values(const float (&P)[1][S_TILES][4], const Member& member, int tile) {
    pack_accumulator(P_of_values, P);
    if constexpr (DROPOUT) {
      uint32 kept[P_STEPS][4];
      member.dropout.draw_transposed(kept, member.first_key, tile * TILE_Q);
      drop_packed(P_of_values, kept);
    }
  }

  template <bool IS_MASKED>
  DEVICE void step(const Member& member, int tile, ListedTile listed) {
    const int first_q = tile * TILE_Q;
    if constexpr (!TILE_LISTS) ring.wait_full();
    const uint64 Q_descriptor = RingQ::descriptor(shared.Q(ring.stage));
    const uint64 dO_descriptor = RingO::descriptor(shared.dO(HAS_OUT_RING ? out_ring.stage : ring.stage));
    float P[1][S_TILES][4], dS[1][S_TILES][4];  // scores, then probabilities; dP, then dS; rows are keys
    if constexpr (DROPOUT) pin(P[0]);  // else it is given what it held a step ago, behind the fence
    const StatisticsOfColumns statistics(shared.statistics(ring.stage), member.view, first_q);
    statistics.begin_grad_products(dS);
    pin(dS[0]);
    if constexpr (K_REGISTER_STEPS > 0) {
      issue_rows<WarpgroupK, RingQ, D_TILES / 2>(P, K_steps, K_descriptor, Q_descriptor);
    } else {
      issue_rows<WarpgroupK, RingQ, D_TILES / 2>(P, K_descriptor, Q_descriptor);
    }
    if constexpr (HAS_OUT_RING) out_ring.wait_full();
    if constexpr (V_REGISTER_STEPS > 0) {
      issue_rows<WarpgroupV, RingO, DV_TILES / 2, true>(dS, V_steps, V_descriptor, dO_descriptor);
    } else {
      issue_rows<WarpgroupV, RingO, DV_TILES / 2, true>(dS, V_descriptor, dO_descriptor);
    }
    [[maybe_unused]] uint32 kept[P_STEPS][4];
    if constexpr (DROPOUT && COMPUTE_DV) member.dropout.draw_transposed(kept, member.first_key, first_q);
    const VisibleColumns<S_TILES> visible = left_by_data(member, tile, listed);
    wgmma_wait<1>();
    pin(P[0]);
    ScoreDerivative<1, S_TILES> derivative;
    member.modifier.apply_all_but_mask<true>(P, derivative, member.first_key, first_q);
    const StagedMask staged(shared.mask(ring.stage));
    if constexpr (ADDITIVE_MASK) {
      multiply_all(P, member.modifier.factor_beside_mask());  // apart: with one FMA for both the schedule is slower at head_dim 128
      staged.add(P, warp_key());
    }
    statistics.to_probabilities(P, member.modifier.signed_factor());
    hide<IS_MASKED>(P, member, first_q, visible, listed);
    if constexpr (DROPOUT && !COMPUTE_DV) {  // nobody takes P, which has room for a mark where registers are short
      DrawnTile<1, S_TILES> drawn;
      drawn.draw(dropout, member.batch, member.head, member.first_key, first_q);
      mark_dropped(P, dropout, drawn);
    }
    uint32 P_operand[P_STEPS][4], dS_operand[P_STEPS][4];
    mbarrier_wait(shared.keys_landed(), 0);  // they have: it keeps the assembler from moving the next wait up, before the exponentials
    wgmma_wait<0>();
    pin(dS[0]);
    if constexpr (HAS_OUT_RING) out_ring.release(2);
    if constexpr (DROPOUT && COMPUTE_DV) {
      statistics.drop(dS, kept, arguments.features.dropout_scale);
    } else if constexpr (DROPOUT) {
      statistics.drop(dS, P, arguments.features.dropout_scale);
    }
    multiply_all(dS, P);
    pack_accumulator(P_operand, P);
    if constexpr (DROPOUT && COMPUTE_DV) drop_packed(P_operand, kept);
    derivative.multiply(dS);
    pack_accumulator(dS_operand, dS);
    share(dS_operand);
    if constexpr (COMPUTE_DV) pin(P_operand);
    pin(dS_operand);
    if constexpr (COMPUTE_DV) issue_accumulator<RingO>(dV, P_operand, dO_descriptor);
    sync_threads_of(COMPUTING_BARRIER, WARPGROUPS * WARPGROUP_SIZE);
    if constexpr (WAITS_FOR_DV) {
      wgmma_wait<0>();  // Pᵀ leaves its registers to dQ
      pin(dV[0]);
      pin(P_operand);
    }
    QueryGradients dQ;
    issue_query_gradients(dQ);
    if constexpr (COMPUTE_DV) wgmma_wait<1>();  // dK comes behind dV
    issue_accumulator<RingQ>(dK, dS_operand, Q_descriptor);
    wgmma_wait<1>();
    for_each_own([&](int i, int) { pin(dQ.own[i]); });
    if constexpr (SHARES_SLAB) pin(dQ.shared[0]);
    add_query_gradients(dQ, member, tile, listed);
    wgmma_wait<0>();
    if constexpr (COMPUTE_DV) pin(dV[0]);
    pin(dK[0]);
    if constexpr (COMPUTE_DV && !WAITS_FOR_DV) pin(P_operand);
    pin(dS_operand);
    ring.release(1);
    buffer ^= 1;
  }

  // What is left of a listed tile in which some pair is hidden. It is found while products run.
  DEVICE VisibleColumns<S_TILES> left_by_data(const Member& member, int tile, ListedTile listed) const {
    VisibleColumns<S_TILES> visible;
    if constexpr (TILE_LISTS) {
      if (listed.is_partial()) {
        visible = StagedMask(shared.mask(ring.stage)).visible<S_TILES>(warp_key());
        cut_by_positions(visible, member, tile * TILE_Q);
      }
    }
    return visible;
  }

  // Zeros where positions or data hide a pair.
  template <bool IS_MASKED>
  DEVICE void hide(float (&P)[1][S_TILES][4], const Member& member, int first_q, const VisibleColumns<S_TILES>& visible, ListedTile listed) const {
    if constexpr (TILE_LISTS) {
      if (listed.is_partial()) visible.apply(P, 0.0f);
    } else if constexpr (IS_MASKED) {
      hide_pairs(P, member, first_q);
    }
  }

  DEVICE void cut_by_positions(VisibleColumns<S_TILES>& visible, const Member& member, int first_q) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (WINDOW) {
        const int last = LASTS_OF_WINDOW == 2 ? member.last_of_window[r % LASTS_OF_WINDOW] : member.last_of_window[0] + 8 * r;
        visible.cut(r, member.first_query[r] - first_q, last + 1 - first_q);
      } else {
        visible.cut(r, member.first_query[r] - first_q);
      }
    }
  }

  // What positions hide.
  DEVICE void hide_pairs(float (&P)[1][S_TILES][4], const Member& member, int first_q) const {
    if constexpr (WINDOW) {
      VisibleColumns<S_TILES> visible;
      cut_by_positions(visible, member, first_q);
      visible.apply(P, 0.0f);
    } else {
#pragma unroll
      for (int n = 0; n < S_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * n + i % 2 < member.first_query[i / 2] - first_q) P[0][n][i] = 0.0f;
    }
  }

  // Puts the warp's rows of dSᵀ into the slab of its warpgroup, as columns.
  DEVICE void share(const uint32 (&dS)[P_STEPS][4]) const {
    const int query = lane_index() / 16 * 8 + lane_index() % 8, chunk = 2 * warp_of_warpgroup() + lane_index() / 8 % 2;
    const SmemAddress rows = shared.dS(buffer) + warpgroup * GradScores::SLAB_BYTES + GradScores::offset(query, chunk);
#pragma unroll
    for (int k = 0; k < P_STEPS; ++k) stmatrix_x4_trans(rows + k * 16 * GradScores::ROW_BYTES, dS[k]);
    fence_proxy_async();
  }

  // body(i, slab) for the slabs of columns of dQᵀ that are the warpgroup's own.
  template <typename Body>
  DEVICE void for_each_own(const Body& body) const {
#pragma unroll
    for (int i = 0; i < OWN_SLABS; ++i) body(i, warpgroup * OWN_SLABS + i);
  }

  // dQᵀ = Kᵀ dSᵀ over all keys of the block.
  DEVICE void issue_query_gradients(QueryGradients& dQ) const {
    wgmma_fence();
    for_each_own([&](int i, int slab) { multiply_slab(dQ.own[i], slab, 0); });
    if constexpr (SHARES_SLAB) multiply_slab(dQ.shared[0], WarpgroupK::SLABS - 1, warpgroup * SHARED_TILES);
    wgmma_commit();
  }

  // Of one slab of columns, and queries from first_tile * 8 on.
  template <int TILES>
  DEVICE void multiply_slab(float (&dQ)[TILES][4], int slab, int first_tile) const {
    const uint64 K = WarpgroupK::descriptor(shared.K(0) + slab * WarpgroupK::SLAB_BYTES);
    const uint64 dS = GradScores::descriptor(shared.dS(buffer) + first_tile * 8 * GradScores::ROW_BYTES);
    constexpr int STEPS = WARPGROUP_ROWS / 16;
#pragma unroll
    for (int k = 0; k < WARPGROUPS * STEPS; ++k)
      Wgmma<Element, TILES>::from_shared_by_rows(dQ, WarpgroupK::rows(K + k / STEPS * (WarpgroupK::BYTES / DESCRIPTOR_UNIT), k % STEPS),
                                                 GradScores::columns(dS, k), k > 0);
  }

  // Adds them to the tile's sums, or stores them, when it is the block's turn.
  DEVICE void add_query_gradients(const QueryGradients& dQ, const Member& member, int tile, ListedTile listed) {
    turns.wait_full();
    const bool is_first = TILE_LISTS ? listed.is_first() : place_in_chain(work, member.visibility, tile) == 0;
    float* sums = member.sums + int64(tile) * SLOT_FLOATS;
    for_each_own([&](int i, int slab) { add_slab(sums, dQ.own[i], slab, 0, is_first); });
    if constexpr (SHARES_SLAB) add_slab(sums, dQ.shared[0], WarpgroupK::SLABS - 1, warpgroup * SHARED_TILES, is_first);
    __syncwarp();  // all lanes of the warp have added
    mbarrier_arrive_if(lane_index() == 0, shared.has_added() + turns.stage * MBARRIER_BYTES);
    turns.advance();
  }

  template <int TILES>
  DEVICE void add_slab(float* sums, const float (&dQ)[TILES][4], int slab, int first_tile, bool is_first) const {
    const int row_tile = 4 * slab + warp_of_warpgroup();
    if (row_tile >= D_TILES / 2) return;
    sums += (row_tile * SUM_COLUMN_TILES + first_tile) * FRAGMENT_FLOATS;
    if (is_first) {
#pragma unroll
      for (int n = 0; n < TILES; ++n) store_fragment(sums + n * FRAGMENT_FLOATS, dQ[n]);
    } else {
#pragma unroll
      for (int n = 0; n < TILES; ++n) add_fragment(sums + n * FRAGMENT_FLOATS, dQ[n]);
    }
  }
};

// Zeros in a warpgroup's rows of K and V that no query of any member sees: their probabilities are 0, but 0 times NaN is NaN.
DEVICE void clear_hidden_keys(const BackwardWgmmaArguments& arguments, const BlockWork& work, const SharedMemory& shared, int warpgroup) {
  int end = 0;
  for_each_member(arguments, work, [&](int, int, const Geometry& geometry, const Visibility& visibility, const Steps&) {
    end = max(end, visibility.end_key(0, geometry.seqlen_q));
  });
  const int first_row = uniform(end) - work.tile * TILE_KV - warpgroup * WARPGROUP_ROWS;
  if (first_row >= WARPGROUP_ROWS) return;
  if (warp_of_warpgroup() == 0) {
    WarpgroupK::clear_from(shared.K(warpgroup), max(first_row, 0));
    if constexpr (COMPUTE_DK) WarpgroupV::clear_from(shared.V(warpgroup), max(first_row, 0));
    fence_proxy_async();
  }
  sync_warpgroup(COMPUTING_BARRIER + 1 + warpgroup);
}

// What a warpgroup of those that compute does.
DEVICE void compute(const BackwardWgmmaArguments& arguments, const BlockWork& work, const SharedMemory& shared) {
  const int warpgroup = warpgroup_index() - 1;
  WarpgroupKeys keys(arguments, work, shared, warpgroup);
  bool has_keys = false;
  for_each_member(arguments, work, [&](int batch, int head, const Geometry& geometry, const Visibility& visibility, const Steps& steps) {
    if (steps.begin >= steps.end) return;
    if (!has_keys) {
      mbarrier_wait(shared.keys_landed(), 0);
      if constexpr (CUTS_KEYS) clear_hidden_keys(arguments, work, shared, warpgroup);
      if constexpr (K_REGISTER_STEPS + V_REGISTER_STEPS > 0) keys.load_first_steps();
      has_keys = true;
    }
    if constexpr (TILE_LISTS) {
      keys.walk_list(batch, head, geometry, visibility);
    } else {
      keys.walk(batch, head, geometry, visibility, steps);
    }
  });
  if constexpr (CONVERTS_SUMS) fence_gpu();
  sync_threads_of(COMPUTING_BARRIER, WARPGROUPS * WARPGROUP_SIZE);  // no product reads K and V any more, and all additions are issued
  const int warp_row = 16 * warp_of_warpgroup(), first_row = work.tile * TILE_KV + warpgroup * WARPGROUP_ROWS + warp_row;
  const int num_rows = sequence_length(packed_keys(arguments), work.batch);  // that have gradients
  const int start = Starts(arguments, work.batch).kv;
  if constexpr (SPLIT) {
    store_part(arguments, work, keys.dK, keys.dV, 4 * warpgroup + warp_of_warpgroup());
    return;
  }
  if constexpr (COMPUTE_DV) {
    if constexpr (DROPOUT) multiply_all(keys.dV, arguments.features.dropout_scale);
    constexpr int COLUMNS = 8 * (COMPUTE_DK || DV_TILES < D_TILES ? DV_TILES : D_TILES);  // that the tile has room for whose place dV takes
    const SmemAddress room = COMPUTE_DK ? shared.V(warpgroup) : shared.K(warpgroup);
    store_rows<Element, HEAD_DIM_V, COLUMNS, false>(keys.dV, room + warp_row * COLUMNS * 2, arguments.grad_value, work.batch, work.head, first_row,
                                                    num_rows, 0, start);
  }
  if constexpr (COMPUTE_DK) {
    multiply_all(keys.dK, arguments.geometry.scale);
    store_rows<Element, HEAD_DIM, 8 * D_TILES, false>(keys.dK, shared.K(warpgroup) + warp_row * 8 * D_TILES * 2, arguments.grad_key, work.batch,
                                                      work.head, first_row, num_rows, 0, start);
  }
  if constexpr (CONVERTS_SUMS) convert_sums(arguments, work);
}

// Which keys are the block's. Where blocks add up dQ, in the order in which they start; it ends with a barrier of the block.
DEVICE BlockWork work_of(const BackwardWgmmaArguments& arguments, const SharedMemory& shared) {
  const int num_heads = arguments.geometry.num_heads_q / arguments.group_heads;
  if constexpr (SPLIT) {
    return split_work_of(arguments, num_heads, shared.ticket());
  } else if constexpr (COMPUTE_DK) {
    return {work_of_ticket(arguments, num_heads, uniform(take_ticket(arguments, shared.ticket())))};
  } else {
    __syncthreads();
    return {work_in_order<CAUSAL, false>(arguments, num_heads)};
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS + WARPGROUP_SIZE, 1)
    backward_wgmma(const __grid_constant__ BackwardWgmmaArguments arguments) {
  extern __shared__ __align__(SLAB_ALIGNMENT) uint8 memory[];
  const SharedMemory shared{smem_address(memory)};
  if (threadIdx.x == 0) {
    shared.ring().init(COMPUTE_DK ? WARPGROUPS : NUM_WARPS, 1 + (StagedMask::USED ? 2 : 1) * WARP_SIZE);
    if constexpr (HAS_OUT_RING) shared.out_ring().init(WARPGROUPS);
    mbarrier_init(shared.keys_landed(), 1);
    if constexpr (COMPUTE_DK) {
      shared.turns().init(1);
#pragma unroll
      for (int i = 0; i < TURNS; ++i) mbarrier_init(shared.has_added() + i * MBARRIER_BYTES, NUM_WARPS);
    }
    if constexpr (CUTS_QUERIES) mbarrier_init(shared.cut_landed(), 1);
    fence_mbarrier_init();
  }
  BlockWork work = work_of(arguments, shared);
  auto clear_gradients = [&](int begin, int end, int tile, int num_tiles) {
    constexpr int THREADS = NUM_THREADS + WARPGROUP_SIZE;
    if (SPLIT && work.split != 0) return;  // one of them is enough
    if constexpr (COMPUTE_DK) clear_rows<Element, THREADS, TILE_KV, HEAD_DIM>(arguments.grad_key, work, begin, end, tile, num_tiles);
    if constexpr (COMPUTE_DV) clear_rows<Element, THREADS, TILE_KV, HEAD_DIM_V>(arguments.grad_value, work, begin, end, tile, num_tiles);
  };
  if (!claim_rows<TILE_KV>(arguments, packed_keys(arguments), work, clear_gradients)) return;
  if constexpr (SPLIT) work.own = steps_of_split(arguments, work);
  if (warpgroup_index() == 0) {
    give_registers<COPYING_REGISTERS>();
    const int warp = warp_of_warpgroup();
    if (warp == 0) copy_all(arguments, work, shared);
    const bool takes_part = TILE_LISTS || lane_index() == 0;
    if (COMPUTE_DK && warp == 1 && takes_part) wait_for_turns(arguments, work, shared);
    if (COMPUTE_DK && warp == 2 && takes_part) pass_turns_on(arguments, work, shared);
    if (StagedMask::USED && warp == 3) copy_masks(arguments, work, shared);
  } else {
    take_registers<COMPUTING_REGISTERS>();
    compute(arguments, work, shared);
  }
}
