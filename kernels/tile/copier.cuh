// The warp of a block of forward_wgmma.cu that copies: it finds the tiles of queries that the block computes, and asks the TMA unit for Q and for the
// tiles of K and V in the order in which they are used, as far ahead as there are stages.
//
// The last tile of V of a sequence may reach into the next one, or into what lies behind a row's keys. Probabilities there are 0, but 0 times NaN is
// NaN, so when such a tile has landed, the warp sets these rows to zero before it says that the tile is full.
#pragma once
#include "tile/wgmma_block.cuh"

class Copier {
 public:
  DEVICE Copier(const ForwardWgmmaArguments& arguments, const SharedMemory& shared)
      : arguments(arguments), shared(shared), Q(shared.Q_ring()), K(shared.K_ring()), V(shared.V_ring()), asks(lane_index() == 0) {}

  // Everything that the block needs, in the order in which it is used.
  DEVICE void copy_all() {
    WorkQueue<CAUSAL, ForwardWgmmaArguments> queue(arguments);
#pragma unroll 1
    for (; !queue.is_empty(); queue.advance()) {
      queue.take_ahead();
      const TileWork work = queue.work();
      if (has_rows(work)) copy_tile(work);
    }
    tell({{-1, 0, 0}}, false);
  }

 private:
  const ForwardWgmmaArguments& arguments;
  const SharedMemory shared;
  Ring<Q_STAGES> Q;
  Ring<NUM_STAGES> K, V;
  const bool asks;  // the thread that does
  uint32 landed = 0;  // parity of the next phase of V_landed

  // Whether there is anything to do for the warpgroups that compute. The grid is made for the longest sequence.
  DEVICE bool has_rows(const TileWork& work) const {
    if constexpr (!VARLEN) return true;
    const int first_q = work.at.tile * TILE_Q;
    return work.is_behind(arguments) ? work.start_q + first_q < arguments.geometry.seqlen_q : first_q < work.seqlen_q;
  }

  DEVICE void copy_tile(const TileWork& work) {
    if (work.is_behind(arguments)) return tell(work, false);  // rows of no sequence, which has no lengths to look up
    if (IN_PLACES && work.at.tile * TILE_Q >= work.seqlen_q) return tell(work, false);  // rows that the sequence does not use
    const auto& geometry = work.geometry(arguments);
    const Visibility visibility(geometry, arguments.features, work.at.batch, work.at.head);
    Walk walk(arguments, work, visibility);
    if (walk.begin >= walk.end) return tell(work, false);
    const int head_kv = work.at.head / (geometry.num_heads_q / geometry.num_heads_kv);
    int num_keys = 0x7fffffff;  // from there on V may hold anything
    if constexpr (CUTS_VALUES) {
      const int end = visibility.end_key(0, geometry.seqlen_q);
      if (RAGGED || end < geometry.seqlen_kv) num_keys = end;
    }
    if (MAPS_MASK && asks) store_shared(shared.mask_place(), Chunk{{uint32(work.at.tile * TILE_Q), uint32(work.at.head), uint32(work.at.batch), 0}});
    walk.tiles.look_ahead(walk.begin);
    copy_keys(work, walk.tiles, walk.begin, head_kv);
    tell(work, true);
#pragma unroll 1
    for (int j = walk.begin; j < walk.end; ++j) {
      walk.tiles.look_ahead(j);
      const int row = walk.tiles.tile(j) * TILE_KV;
      copy_values(work, row, head_kv, num_keys - row);
      if (j + 1 < walk.end) copy_keys(work, walk.tiles, j + 1, head_kv);
      walk.tiles.advance();
    }
  }

  DEVICE void copy_keys(const TileWork& work, const KeyTiles& tiles, int step, int head_kv) {
    if (asks) {
      K.wait_empty();
      if constexpr (TILE_LISTS) store_shared(shared.list_entry(K.stage), uint32(tiles.tile(step) * 2 + tiles.is_partial(step)));
      mbarrier_arrive_expect(K.full(), RingK::BYTES + SharedMemory::MASK_TILE_BYTES);
      RingK::load(shared.K(K.stage), arguments.key, work.start_kv + tiles.tile(step) * TILE_KV, head_kv, work.at.batch, K.full());
      if constexpr (MAPS_MASK) {  // where in the mask lies in shared memory, and not in registers, of which this thread has too few
        const Chunk place = load_shared(shared.mask_place());
        RingMask::load<MASK_BYTES>(shared.mask(K.stage), arguments.attn_mask, int(place.word[0]), int(place.word[1]), int(place.word[2]), K.full(),
                                   tiles.tile(step) * TILE_KV);
      }
    }
    K.advance();
  }

  // Which tile of queries comes next, and with `copies` its Q.
  DEVICE void tell(const TileWork& work, bool copies) {
    if (asks) {
      Q.wait_empty();
      work.store(shared.work(Q.stage));
      if (copies) {
        mbarrier_arrive_expect(Q.full(), Q_BYTES);
#pragma unroll
        for (int warpgroup = 0; warpgroup < WARPGROUPS; ++warpgroup)
          WarpgroupQ::load(shared.Q(Q.stage, warpgroup), arguments.query, work.start_q + work.at.tile * TILE_Q + warpgroup * WARPGROUP_ROWS,
                           work.at.head, work.at.batch, Q.full());
      } else {
        mbarrier_arrive(Q.full());
      }
    }
    Q.advance();
  }

  // V from `row` on, of which so many rows are the sequence's.
  DEVICE void copy_values(const TileWork& work, int row, int head_kv, int num_rows) {
    const bool is_cut = CUTS_VALUES && num_rows < TILE_KV;
    const SmemAddress tile = shared.V(V.stage);
    if (asks) {
      V.wait_empty();
      const SmemAddress full = is_cut ? shared.V_landed() : V.full();
      mbarrier_arrive_expect(full, RingV::BYTES);
      RingV::load(tile, arguments.value, work.start_kv + row, head_kv, work.at.batch, full);
      if (is_cut) mbarrier_wait(full, landed);
    }
    if (is_cut) {
      __syncwarp();
      RingV::clear_from(tile, num_rows);
      fence_proxy_async();
      __syncwarp();
      if (asks) mbarrier_arrive(V.full());
      landed ^= 1;
    }
    V.advance();
  }
};
