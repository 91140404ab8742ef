// Forward attention on Hopper's warpgroup instructions: O = softmax(scale Q Kᵀ) V and the natural-log LSE of each row, for 16-bit types.
// Scales that are not positive numbers are a kernel of their own (ANY_SCALE), since the others need not look at the sign.
//
// Blocks stay: each computes one tile of TILE_Q rows of one head after the other (tile/work_queue.cuh). A warpgroup is four warps. Of the first, one
// warp copies: it asks the TMA unit for Q and for the tiles of K and V, NUM_STAGES of each ahead, and goes on to the block's next tile while the
// others finish this one. Each of the other warpgroups owns 64 rows, whose O, P and softmax state it keeps in registers, and to which the first hands
// most of its own. Their products run while their threads go on (FlashAttention-3, Shah et al. 2024, arXiv 2407.08608, algorithm 2):
//
//     S_j = Q K_jᵀ             issued first, waited for first
//     O += P_{j-1} V_{j-1}     in flight while S_j becomes P_j
//
// so the tensor cores have work while the maximum is found, and while exponentials are computed they have that of warpgroups that are out of step.
// Of wide heads, the first columns of Q are kept in registers, too, as far as there is room, and shared memory is read less (docs/kernels.md).
// The assembler moves the wait for O ahead of most exponentials; kernels in which it was held back were slower on an H100 (docs/hopper.md).
//
// Shared memory: Q [Q_STAGES][TILE_Q / 64][⌈D / 64⌉][64][64] | K [NUM_STAGES][⌈D / 64⌉][TILE_KV][64] | V [NUM_STAGES][⌈DV / 64⌉][TILE_KV][64] |
// which tile of queries is in each stage of Q | which entry of its list is in each stage of K | mbarriers. At the end each warp's part of O passes
// through its warpgroup's part of Q.
//
// mbarriers, for each stage of Q, K and V: "full", the tile has landed, and "empty", every warpgroup is done with it, of which one thread says so.
// With Q, and with lists of tiles K, every warp says so for itself: each has read what lies beside the tile, and O of each goes through Q. One more:
// the last tile of V of a sequence has landed, of which rows that belong to the next one are set to zero before it is "full", since 0 times NaN is
// NaN.
#include "tile/constants.cuh"
#include "tile/boolean_mask_tile.cuh"
#include "tile/copier.cuh"
#include "tile/epilogue.cuh"
#include "tile/packed_dropout.cuh"
#include "tile/score.cuh"
#include "tile/softmax.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_columns.cuh"
#include "tile/wgmma_block.cuh"
#include "tile/wgmma_products.cuh"
#include "ptx/warpgroup.cuh"

// This warpgroup is done with a tile of K. Where each warp has read what lies beside it, it says so for itself.
DEVICE void release_keys(Ring<NUM_STAGES>& K, int warp) {
  if constexpr (TILE_LISTS || MAPS_MASK) {
    K.release_by_each_warp();
  } else {
    K.release(warp);
  }
}

constexpr bool KNOWS_SEGMENTS = SEGMENTS && !BOOLEAN_MASK;  // of rows and keys, in registers
constexpr int KEY_SEGMENTS = ceil_div(TILE_KV, WARP_SIZE);  // of a lane

constexpr bool COPIES_BITS = MAPS_MASK && BOOLEAN_MASK;

// Dropout draws for the first steps of the depth of P V while the scores are computed, which it need not know, as far as registers have room.
constexpr int DRAWN_AHEAD = WARPGROUPS == 2 || COPIES_BITS ? 0 : P_STEPS < 4 ? P_STEPS : 4;

// Where scores are capped products and nothing else.
constexpr bool ONLY_CAPS = SOFTCAP && !ALIBI && !ADDITIVE_MASK && !Config::ANY_SCALE;

// A warpgroup's 64 rows.
class WarpgroupRows {
 public:
  float O[1][DV_TILES][4] = {};
  OnlineSoftmax<1, ADDITIVE_MASK, PROBABILITY_SHIFT, SLACK_OF<Element>> softmax;

  DEVICE WarpgroupRows(const Geometry& geometry, const FeatureArguments& features, const Work& work, const Visibility& visibility,
                       const Dropout& dropout, const SharedMemory& shared, SmemAddress Q, int warpgroup, Ring<NUM_STAGES>& K, Ring<NUM_STAGES>& V)
      : first_q(work.tile * TILE_Q),
        first_row(first_q + warpgroup * WARPGROUP_ROWS + 16 * warp_of_warpgroup()),
        geometry(geometry),
        features(features),
        visibility(visibility),
        modifier(geometry, features, work.batch, work.head),
        dropout(dropout, work.batch, work.head),
        work(work),
        shared(shared),
        K(K),
        V(V),
        Q_descriptor(WarpgroupQ::descriptor(Q)) {
    if constexpr (Q_REGISTER_STEPS > 0) load_first_steps(Q);
    if constexpr (!TILE_LISTS) find_visible_keys(first_key, end_key);
    if constexpr (KNOWS_SEGMENTS) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        segment[r] = features.segment_ids_q.load(work.batch, min(first_row + 8 * r + lane_index() / 4, geometry.seqlen_q - 1));
    }
  }

  // O and the softmax state after tiles begin .. end - 1, of which unmasked_begin .. unmasked_end - 1 are visible to all rows.
  DEVICE void walk(int begin, int unmasked_begin, int unmasked_end, int end) {
    first_step(begin, begin < unmasked_begin || begin >= unmasked_end);
    int j = begin + 1;
    if constexpr (WINDOW) {  // masked tiles come before and behind the others, in one piece of code
#pragma unroll 1
      for (int masked_end = min(unmasked_begin, end); j < end; masked_end = end) {
        steps<true>(j, masked_end);
        steps<false>(j, unmasked_end);
      }
    } else {
      steps<false>(j, unmasked_end);
      steps<true>(j, end);
    }
    finish();
  }

  // As if no key had been seen.
  DEVICE void forget() {
#pragma unroll
    for (int n = 0; n < DV_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) O[0][n][i] = 0.0f;
    softmax = {};
  }

  // The same after so many tiles of a list.
  DEVICE void walk_list(int count) {
    first_step(0, true);
    int j = 1;
    steps<true>(j, count);
    finish();
  }

 private:
  const int first_q;  // of the block
  const int first_row;  // of the warp
  const Geometry& geometry;
  const FeatureArguments& features;
  const Visibility& visibility;
  const ScoreModifier modifier;
  const PackedDropout dropout;
  const Work& work;
  const SharedMemory shared;
  Ring<NUM_STAGES>&K, &V;
  const uint64 Q_descriptor;
  int first_key[2], end_key[2];  // which keys a row sees, less the column of the lane; with lists they are found when they are wanted
  int segment[2];  // of a row
  int key_segments[KNOWS_SEGMENTS ? KEY_SEGMENTS : 1];
  BooleanMaskTile<RingMask, S_TILES> boolean_mask;  // of the tile whose scores were issued last, if COPIES_BITS
  int entry = 0;  // of the list, for the tile whose scores were issued last
  uint32 P[P_STEPS][4];
  uint32 first_steps[Q_REGISTER_STEPS > 0 ? Q_REGISTER_STEPS : 1][4];  // of Q, as far as registers have room; products read the rest in shared memory

  // The first steps of the depth of Q, as A operands.
  DEVICE void load_first_steps(SmemAddress Q) {
    const int lane_offset = WarpgroupQ::offset(16 * warp_of_warpgroup() + lane_index() % 16, lane_index() / 16);
#pragma unroll
    for (int k = 0; k < Q_REGISTER_STEPS; ++k) ldmatrix_x4(first_steps[k], Q + WarpgroupQ::at(lane_offset, 2 * k));
  }

  DEVICE void issue_scores(float (&S)[1][S_TILES][4]) {
    K.wait_full();
    if constexpr (TILE_LISTS) {
      if (lane_index() == 0) entry = load_shared_s32(shared.list_entry(K.stage));  // the lane that will say that it is done
      entry = uniform(entry);
      if constexpr (KNOWS_SEGMENTS) read_key_segments();
    }
    if constexpr (Q_REGISTER_STEPS > 0) {
      issue_rows<WarpgroupQ, RingK, D_TILES / 2>(S, first_steps, Q_descriptor, RingK::descriptor(shared.K(K.stage)));
    } else {
      issue_rows<WarpgroupQ, RingK, D_TILES / 2>(S, Q_descriptor, RingK::descriptor(shared.K(K.stage)));
    }
    if constexpr (COPIES_BITS) {
      if (entry % 2 != 0) boolean_mask.read(shared.mask(K.stage), first_row - first_q);
    }
  }

  DEVICE void issue_outputs() {
    V.wait_full();
    issue_accumulator<RingV>(O, P, RingV::descriptor(shared.V(V.stage)));
  }

  // Products -> probabilities of tile j, in place, and O to their reference. SHARES: all keys are visible to all rows.
  template <bool SHARES>
  DEVICE void make_probabilities(float (&S)[1][S_TILES][4], int j, bool is_masked) {
    const int first_kv = first_key_of(j);
    const auto wait_for_O = [&] {
      wgmma_wait<0>();  // a reference rises, and O is multiplied
      pin(O[0]);
    };
    if constexpr (ONLY_CAPS) {
      const SmallScores<1> small(features);
      float largest[1][2];
      if ((TILE_LISTS ? !hides_any(first_kv) : !is_masked) && small.are_all(S, largest, first_row, geometry.seqlen_q)) {
        softmax.update_small<true>(S, O, largest, small, wait_for_O);
        release_keys(K, 1);
        return;
      }
    }
    if constexpr (MODIFIES_SCORES && (MAPS_MASK || !ADDITIVE_MASK)) {
      const bool sees_all = SOFTCAP && !ONLY_CAPS && (TILE_LISTS ? !hides_any(first_kv) : !is_masked);
      modifier.apply_to_rows(S, first_row, first_kv, SHARES, sees_all);
      if constexpr (MAPS_MASK && ADDITIVE_MASK)
        add_copied_mask<RingMask>(S, modifier.factor_beside_mask(), shared.mask(K.stage), first_row - first_q);
    } else if constexpr (MODIFIES_SCORES) {
      modifier.apply<false>(S, first_row, first_kv);
    } else if constexpr (Config::ANY_SCALE) {
      multiply_all(S, geometry.score_sign);
    }
    if (is_masked) hide_keys(S, first_kv);
    softmax.update<true>(S, O, modifier.factor(), wait_for_O);
    if constexpr (MAPS_MASK) __syncwarp();
    release_keys(K, 1);
  }

  // Of tile j, or with lists of the tile whose scores were issued last.
  DEVICE int first_key_of(int j) const { return (TILE_LISTS ? entry >> 1 : j) * TILE_KV; }

  // Whether some pair of the block's tile is hidden, with lists.
  DEVICE bool hides_any(int first_kv) const {
    return entry % 2 != 0 || visibility.hides_any(first_q, first_q + TILE_Q, first_kv, first_kv + TILE_KV);
  }

  DEVICE void hide_keys(float (&S)[1][S_TILES][4], int first_kv) const {
    if constexpr (!TILE_LISTS) {
      hide_by_position(S, first_key, end_key, first_kv);
    } else if constexpr (!MAPS_MASK && !KNOWS_SEGMENTS) {
      hide<false>(S, -infinity(), geometry, visibility, first_q, first_kv, first_row - first_q, entry % 2 != 0);
    } else {
      const bool hides_data = entry % 2 != 0;
      const bool is_cut = (KNOWS_SEGMENTS || CUTS_VALUES) &&  // else a mask that is copied is False behind the last key
                          visibility.hides_any(first_q, first_q + TILE_Q, first_kv, first_kv + TILE_KV);
      if constexpr (KNOWS_SEGMENTS) {
        if (!hides_data && !is_cut) return;
        VisibleColumns<S_TILES> visible;
        if (hides_data) visible.hide_other_segments(segment, key_segments);
        if (is_cut) cut(visible, first_kv);
        visible.apply_on_fma(S, min(geometry.seqlen_q, 0));
      } else {
        if (is_cut) {
          int first_key[2], end_key[2];
          find_visible_keys(first_key, end_key);
          hide_by_position(S, first_key, end_key, first_kv);
        }
        if (hides_data) boolean_mask.apply(S);
      }
    }
  }

  DEVICE void cut(VisibleColumns<S_TILES>& visible, int first_kv) const {
    int first[2], end[2];
    find_visible_keys(first, end);
#pragma unroll
    for (int r = 0; r < 2; ++r) visible.cut(r, first[r] - first_kv, end[r] - first_kv);
  }

  // Which keys each row sees, less the column of the lane.
  DEVICE void find_visible_keys(int (&first_key)[2], int (&end_key)[2]) const {
    const int column = lane_index() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_row + 8 * r + lane_index() / 4;
      first_key[r] = visibility.first_key(query) - column;
      end_key[r] = visibility.end_key(query, query + 1) - column;
    }
  }

  DEVICE static void hide_by_position(float (&S)[1][S_TILES][4], const int (&first_key)[2], const int (&end_key)[2], int first_kv) {
#pragma unroll
    for (int n = 0; n < S_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * n + i % 2;
        if (column >= end_key[i / 2] - first_kv || (WINDOW && column < first_key[i / 2] - first_kv)) S[0][n][i] = -infinity();
      }
  }

  // Segments of the keys of the tile whose scores are issued.
  DEVICE void read_key_segments() {
#pragma unroll
    for (int i = 0; i < KEY_SEGMENTS; ++i) {
      const int key = (entry >> 1) * TILE_KV + i * WARP_SIZE + column_of_lane();
      if (entry % 2 != 0) key_segments[i] = features.segment_ids_kv.load(work.batch, min(key, geometry.seqlen_kv - 1));
    }
  }

  // Which probabilities of tile j dropout keeps, of some steps of the depth of P V.
  template <int BEGIN, int END>
  DEVICE void draw(uint32 (&kept)[P_STEPS][4], int j) const {
    if constexpr (DROPOUT) dropout.draw<BEGIN, END>(kept, first_row, first_key_of(j));
  }

  // Of tile j, of whose draws the first ones are there.
  DEVICE void pack_probabilities(const float (&S)[1][S_TILES][4], uint32 (&kept)[P_STEPS][4], int j) {
    pack_accumulator(P, S);
    if constexpr (DROPOUT) {
      draw<DRAWN_AHEAD, P_STEPS>(kept, j);
      drop_packed(P, kept);
    }
    pin(P);
  }

  DEVICE void finish() {
    issue_outputs();
    wgmma_wait<0>();
    pin(O[0]);
    pin(P);
    V.release(2);
  }

  // Nothing to multiply with V yet.
  DEVICE void first_step(int j, bool is_masked) {
    float S[1][S_TILES][4];
    issue_scores(S);
    uint32 kept[P_STEPS][4];
    draw<0, DRAWN_AHEAD>(kept, j);
    wgmma_wait<0>();
    pin(S[0]);
    make_probabilities<false>(S, j, is_masked);
    pack_probabilities(S, kept, j);
  }

  template <bool IS_MASKED>
  DEVICE void steps(int& j, int end) {
#pragma unroll 1
    for (; j < end; ++j) step<IS_MASKED>(j);
  }

  template <bool IS_MASKED>
  DEVICE void step(int j) {
    float S[1][S_TILES][4];
    issue_scores(S);
    issue_outputs();
    uint32 kept[P_STEPS][4];
    draw<0, DRAWN_AHEAD>(kept, j);
    wgmma_wait<1>();
    pin(S[0]);
    make_probabilities<!IS_MASKED>(S, j, IS_MASKED);
    wgmma_wait<0>();
    pin(O[0]);
    pin(P);
    V.release(2);
    pack_probabilities(S, kept, j);
  }
};

// Tiles that only other warpgroups see: this one says that it is done with them. One warp waits for them alone, which no other can leave behind by a
// phase; the other three wait for that warp, and then know of these phases, too.
DEVICE void skip(Ring<NUM_STAGES>& K, Ring<NUM_STAGES>& V, int count, int barrier) {
  if (count <= 0) return;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if (TILE_LISTS || MAPS_MASK || warp_of_warpgroup() == 0) K.wait_full();
    release_keys(K, 0);
    if (warp_of_warpgroup() == 0) V.wait_full();
    V.release(0);
  }
  sync_warpgroup(barrier);
}

// Writes what a warpgroup has computed. O passes through its part of Q.
DEVICE void store_results(const ForwardWgmmaArguments& arguments, const TileWork& work, WarpgroupRows& rows, SmemAddress Q, int warpgroup) {
  const int seqlen_q = work.geometry(arguments).seqlen_q;
  if constexpr (SHARES_KEYS) {
    sync_warpgroup(1 + warpgroup);  // no warp's products read Q any more; behind the merging of parts some warps are done
    if (work.keys.tile >= 0 && !merge_parts(arguments, work.keys, rows, 4 * warpgroup + warp_of_warpgroup())) return;
  }
  if constexpr (SINKS) rows.softmax.add_sink(rows.O, arguments.features.sinks.load(work.at.batch, work.at.head) * SCORE_UNIT);
  rows.softmax.finish(rows.O);
  if constexpr (DROPOUT) multiply_all(rows.O, arguments.features.dropout_scale);
  const int warp_row = 16 * warp_of_warpgroup(), first_row = work.at.tile * TILE_Q + warpgroup * WARPGROUP_ROWS + warp_row;
  if (arguments.lse.data != nullptr && lane_index() % 4 == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_row + 8 * r + lane_index() / 4;
      if (query < seqlen_q) *arguments.lse.pointer(work.at.batch, work.at.head, work.start_q + query) = rows.softmax.lse(0, r);
    }
  }
  if constexpr (!SHARES_KEYS) sync_warpgroup(1 + warpgroup);  // likewise
  store_rows<Element, HEAD_DIM_V, O_COLUMNS, false>(rows.O, Q + warp_row * O_COLUMNS * 2, arguments.out, work.at.batch, work.at.head, first_row,
                                                    seqlen_q, 0, work.start_q);
}

// What one of the computing warpgroups does for the tile of queries in a stage of Q.
DEVICE void compute_tile(const ForwardWgmmaArguments& arguments, const TileWork& work, const Dropout& dropout, const SharedMemory& shared, int stage,
                         int warpgroup, Ring<NUM_STAGES>& K, Ring<NUM_STAGES>& V) {
  const auto& geometry = work.geometry(arguments);
  const Visibility visibility(geometry, arguments.features, work.at.batch, work.at.head);
  const Walk walk(arguments, work, visibility);
  const int first_q = work.at.tile * TILE_Q + warpgroup * WARPGROUP_ROWS;
  WarpgroupRows rows(geometry, arguments.features, work.at, visibility, dropout, shared, shared.Q(stage, warpgroup), warpgroup, K, V);
  int own_end = 0;  // of the tiles that this warpgroup sees
  if constexpr (TILE_LISTS) {
    if (first_q < geometry.seqlen_q) own_end = walk.end;
    if (walk.begin < own_end) rows.walk_list(own_end);
  } else {
    own_end = uniform(
        first_q < geometry.seqlen_q ? (SHARES_KEYS ? walk.end : ceil_div(visibility.end_key(first_q, first_q + WARPGROUP_ROWS), TILE_KV)) : 0);
    const int unmasked_begin = uniform(ceil_div(visibility.first_key(first_q + WARPGROUP_ROWS - 1), TILE_KV));
    int unmasked_end = uniform(visibility.end_key(first_q, first_q + 1) / TILE_KV);
    if constexpr (SHARES_KEYS) unmasked_end = min(unmasked_end, walk.end);
    if (walk.begin < own_end) rows.walk(walk.begin, unmasked_begin, unmasked_end, own_end);
  }
  // The same numbers as `work`, which would take registers in the meantime.
  const TileWork same = TileWork::load(shared.work(stage));
  store_results(arguments, same, rows, shared.Q(stage, warpgroup), warpgroup);
  if constexpr (SHARES_KEYS) {
    if (first_q >= geometry.seqlen_q) skip(K, V, same.keys.end - same.keys.begin, 1 + warpgroup);
  } else {
    skip(K, V, walk.end - max(walk.begin, own_end), 1 + warpgroup);
  }
}

// What it does for all tiles of the block.
DEVICE void compute_all(const ForwardWgmmaArguments& arguments, const SharedMemory& shared) {
  const Dropout dropout(arguments.features);
  Ring<Q_STAGES> Q = shared.Q_ring();
  Ring<NUM_STAGES> K = shared.K_ring(), V = shared.V_ring();
#pragma unroll 1
  while (true) {
    Q.wait_full();
    const TileWork work = TileWork::load(shared.work(Q.stage));
    if (work.at.tile < 0) return;
    const int warpgroup = warpgroup_index() - 1;  // for each tile anew, so that it takes no register from one to the next
    bool has_rows = true;
    if constexpr (VARLEN) {
      if (work.is_behind(arguments) || work.at.tile == arguments.geometry.num_tiles - 1) {
        auto clear = [&](int begin, int end, int tile, int num_tiles) {
          clear_queries(arguments, work.at, begin, end, tile, num_tiles, int(threadIdx.x) - WARPGROUP_SIZE);
        };
        has_rows = claim_rows<TILE_Q>(arguments, packed_queries(arguments), work.at, clear);
      }
    }
    if (has_rows) compute_tile(arguments, work, dropout, shared, Q.stage, warpgroup, K, V);
    fence_proxy_async();  // O went through Q
    __syncwarp();
    Q.release_by_each_warp();
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS + WARPGROUP_SIZE, 1) forward_wgmma(const __grid_constant__ ForwardWgmmaArguments arguments) {
  extern __shared__ __align__(SLAB_ALIGNMENT) uint8 memory[];
  const SharedMemory shared{smem_address(memory)};
  if (threadIdx.x == 0) {
    shared.Q_ring().init(NUM_WARPS);
    shared.K_ring().init(TILE_LISTS || MAPS_MASK ? NUM_WARPS : WARPGROUPS);
    shared.V_ring().init(WARPGROUPS);
    if constexpr (CUTS_VALUES) mbarrier_init(shared.V_landed(), 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warpgroup_index() == 0) {
    give_registers<COPYING_REGISTERS>();
    if (warp_of_warpgroup() == 0) Copier(arguments, shared).copy_all();
  } else {
    take_registers<COMPUTING_REGISTERS>();
    compute_all(arguments, shared);
  }
}
