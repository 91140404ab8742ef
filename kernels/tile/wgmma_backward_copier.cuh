// What the warps of backward_wgmma.cu do that compute nothing: one asks for everything that the block needs, one copies masks, and two keep the order
// in which blocks add to dQ.
#pragma once
#include "ptx/memory.cuh"
#include "tile/query_sums.cuh"
#include "tile/staged_mask.cuh"
#include "tile/wgmma_backward_block.cuh"

// Asks for the block's rows of K and V. One thread.
DEVICE void copy_keys(const BackwardWgmmaArguments& arguments, const BlockWork& work, const SharedMemory& shared, int batch, int head) {
  const int start = Starts(arguments, work.batch).kv;
  mbarrier_arrive_expect(shared.keys_landed(), WARPGROUPS * (WarpgroupK::BYTES + V_BYTES));
#pragma unroll
  for (int warpgroup = 0; warpgroup < WARPGROUPS; ++warpgroup) {
    const int row = start + work.tile * TILE_KV + warpgroup * WARPGROUP_ROWS;
    WarpgroupK::load(shared.K(warpgroup), arguments.key, row, head, batch, shared.keys_landed());
    if constexpr (COMPUTE_DK) WarpgroupV::load(shared.V(warpgroup), arguments.value, row, head, batch, shared.keys_landed());
  }
}

// Asks for everything that the block needs, in the order in which it is used. One warp.
DEVICE void copy_all(const BackwardWgmmaArguments& arguments, const BlockWork& work, const SharedMemory& shared) {
  const bool asks = lane_index() == 0;  // the TMA unit; row statistics are copied by all lanes
  Ring<NUM_STAGES> ring = shared.ring();
  Ring<GRAD_OUT_STAGES> out_ring = shared.out_ring();
  bool is_first = true;
  uint32 landed = 0;  // parity of the next phase of cut_landed
  const int start = Starts(arguments, work.batch).q;
  for_each_member(arguments, work, [&](int batch, int head, const Geometry& geometry, const Visibility& visibility, const Steps& steps) {
    const StatisticsView view(arguments, batch, head, start, geometry.seqlen_q);
    auto copy_keys_once = [&] {
      if (asks && is_first) copy_keys(arguments, work, shared, batch, head / (geometry.num_heads_q / geometry.num_heads_kv));
      is_first = false;
    };
    if (TILE_LISTS && steps.begin < steps.end) copy_keys_once();
    for_each_tile(arguments, work, batch, head, visibility, steps, [&](int tile, int place, bool is_partial) {
      if constexpr (!TILE_LISTS) copy_keys_once();
      ring.wait_empty();
      const int row = start + tile * TILE_Q, num_rows = geometry.seqlen_q - tile * TILE_Q;
      const bool is_cut = CUTS_QUERIES && num_rows < TILE_Q;
      const bool is_with_Q = !HAS_OUT_RING || is_cut;  // dO arrives at the same mbarrier
      const int out_stage = HAS_OUT_RING ? out_ring.stage : ring.stage;
      if (HAS_OUT_RING && is_cut) out_ring.wait_empty();
      if (asks) {
        const SmemAddress full = is_cut ? shared.cut_landed() : ring.full();
        if constexpr (TILE_LISTS) ListedTile::of(tile, place == 0, is_partial).store(shared.listed_tile(ring.stage));
        mbarrier_arrive_expect(full, RingQ::BYTES + (is_with_Q ? RingO::BYTES : 0));
        RingQ::load(shared.Q(ring.stage), arguments.query, row, head, batch, full);
        if (is_with_Q) RingO::load(shared.dO(out_stage), arguments.grad_out, row, head, batch, full);
      }
      if (is_cut) {  // rows of another sequence or of none, which may hold anything
        mbarrier_wait(shared.cut_landed(), landed);
        landed ^= 1;
        RingQ::clear_from(shared.Q(ring.stage), num_rows);
        RingO::clear_from(shared.dO(out_stage), num_rows);
        fence_proxy_async();
        __syncwarp();
        mbarrier_arrive_if(asks, ring.full());
        if constexpr (HAS_OUT_RING) mbarrier_arrive_if(asks, out_ring.full());
      }
      StatisticsOfColumns(shared.statistics(ring.stage), view, tile * TILE_Q).issue<WARP_SIZE>(true, lane_index());
      mbarrier_arrive_behind_copies(ring.full());
      if (!is_with_Q) {
        out_ring.wait_empty();
        if (asks) {
          mbarrier_arrive_expect(out_ring.full(), RingO::BYTES);
          RingO::load(shared.dO(out_stage), arguments.grad_out, row, head, batch, out_ring.full());
        }
      }
      ring.advance();
      out_ring.advance();
    });
    if (TILE_LISTS && steps.begin < steps.end) {
      ring.wait_empty();
      if (asks) {
        ListedTile{ListedTile::NONE}.store(shared.listed_tile(ring.stage));
        mbarrier_arrive(ring.full());
      }
      mbarrier_arrive_behind_copies(ring.full());
      ring.advance();
    }
  });
  cp_async_commit_group();
  cp_async_wait_group<0>();  // PTX does not say what becomes of the copies of a thread that has ended, and of the arrivals behind them
}

// Copies what a mask and segments need of each tile, beside those that `copy_all` asks for. One warp. Of lists only tiles with a hidden pair need it.
DEVICE void copy_masks(const BackwardWgmmaArguments& arguments, const BlockWork& work, const SharedMemory& shared) {
  Ring<NUM_STAGES> ring = shared.ring();
  for_each_member(arguments, work, [&](int batch, int head, const Geometry& geometry, const Visibility& visibility, const Steps& steps) {
    for_each_tile(arguments, work, batch, head, visibility, steps, [&](int tile, int, bool is_partial) {
      ring.wait_empty();
      const StagedMask staged(shared.mask(ring.stage));
      const int first_q = tile * TILE_Q, first_kv = work.tile * TILE_KV;
      if (SEGMENTS && is_partial) staged.copy_ids(arguments.features, batch, first_q, first_kv, geometry);
      const bool copies_mask = ADDITIVE_MASK || (BOOLEAN_MASK && is_partial);
      if (!copies_mask || staged.copy(arguments.features.attn_mask, batch, head, first_q, first_kv, geometry)) {
        mbarrier_arrive_behind_copies(ring.full());
      } else {
        cp_async_commit_group();
        cp_async_wait_group<0>();  // of ids; the mask's elements are stored
        mbarrier_arrive(ring.full());  // of what each lane has stored
      }
      ring.advance();
    });
    if (TILE_LISTS && steps.begin < steps.end) {  // the end of the list
      ring.wait_empty();
      mbarrier_arrive_behind_copies(ring.full());
      ring.advance();
    }
  });
  cp_async_commit_group();
  cp_async_wait_group<0>();  // likewise
}

// body(turn, place) for each tile to which the block adds: the tile's turn, and the block's place among those that add to it. With lists a whole
// warp.
template <typename Body>
DEVICE void for_each_turn(const BackwardWgmmaArguments& arguments, const BlockWork& work, const Body& body) {
  const int start = Starts(arguments, work.batch).q;
  for_each_member(arguments, work, [&](int batch, int head, const Geometry&, const Visibility& visibility, const Steps& steps) {
    int* turns = arguments.turns + 1 + first_slot(arguments, batch, head, start) + work.slots_before;
    for_each_tile(arguments, work, batch, head, visibility, steps, [&](int tile, int place, bool) { body(turns + tile, place); });
  });
}

// Waits for the block's turn to add to each tile, up to TURNS tiles ahead, and says so to the warpgroups. One thread, with lists of a whole warp.
DEVICE void wait_for_turns(const BackwardWgmmaArguments& arguments, const BlockWork& work, const SharedMemory& shared) {
  Ring<TURNS> ring = shared.turns();
  for_each_turn(arguments, work, [&](const int* turn, int place) {
    if (!TILE_LISTS || lane_index() == 0) {
      ring.wait_empty();
      wait_for_turn(turn, place);
      mbarrier_arrive(ring.full());
    }
    ring.advance();
  });
}

// Passes each turn on when the warpgroups have added. One thread, lane 0 of warp 2, with lists of the whole warp.
DEVICE void pass_turns_on(const BackwardWgmmaArguments& arguments, const BlockWork& work, const SharedMemory& shared) {
  Ring<TURNS> ring = shared.turns();
  for_each_turn(arguments, work, [&](int* turn, int) {
    if (!TILE_LISTS || lane_index() == 0) {
      ring.wait_at(shared.has_added());
      pass_turn_on(turn);
    }
    ring.release(2);
  });
}
