// A tile of K or V as the warp of a block of forward_wgmma_wide.cu that copies asks the TMA unit for it: in one box, or in one for each page.
//
// Of tiles at an edge, rows that no query of the block sees may hold anything, and pages of which none is seen are not even looked up. Probabilities
// there are 0, but 0 times NaN is NaN: when such a tile has landed, the warp sets these rows to zero before it says that the tile is full.
#pragma once
#include "tile/wgmma_wide_block.cuh"

class WideCopier {
 public:
  DEVICE WideCopier(const ForwardWgmmaWideArguments& arguments, const SharedMemory& shared, const SequenceInCache& sequence, const SplitWalk& walk,
                    int head_kv)
      : arguments(arguments), shared(shared), sequence(sequence), walk(walk), head_kv(head_kv) {}

  // The tile of step j, 0 where there is no such step.
  DEVICE int tile(int j) const { return !TILE_LISTS || j < walk.end ? walk.tiles.tile(j) : 0; }

  // Where the lane's box of a step's tile lies; row -1 where the lane has none, or nobody sees any of its keys.
  DEVICE KeyPlace look_up(int j, int tile) const {
    const int key = tile * TILE_KV + lane_index() * BOX_ROWS;
    if (lane_index() >= BOXES || j >= walk.end) return {0, -1};
    if (PAGED && (key + BOX_ROWS <= walk.first_key || key >= walk.end_key)) return {0, -1};
    return sequence.place(key);
  }

  // The columns of a tile of keys from `column` on; `place` is the lane's.
  template <typename Tile>
  DEVICE void copy_K(Ring<NUM_STAGES>& ring, SmemAddress tile, int column, const KeyPlace& place, int of_keys) {
    copy<Tile>(ring, tile, arguments.key, column, place, of_keys);
  }

  // The same of values.
  template <typename Tile>
  DEVICE void copy_V(Ring<NUM_STAGES>& ring, SmemAddress tile, int column, const KeyPlace& place, int of_keys) {
    copy<Tile>(ring, tile, arguments.value, column, place, of_keys);
  }

 private:
  const ForwardWgmmaWideArguments& arguments;
  const SharedMemory shared;
  const SequenceInCache& sequence;
  const SplitWalk& walk;
  const int head_kv;
  uint32 landed = 0;  // parity of the next phase of shared.landed()

  template <typename Tile>
  DEVICE void copy(Ring<NUM_STAGES>& ring, SmemAddress tile, const MappedTensor& tensor, int column, const KeyPlace& place, int of_keys) {
    const bool asks = lane_index() == 0;
    const int first_row = walk.first_key - of_keys * TILE_KV, end_row = walk.end_key - of_keys * TILE_KV;
    const bool is_cut = first_row > 0 || end_row < TILE_KV;
    const SmemAddress full = is_cut ? shared.landed() : ring.full();
    int bytes = Tile::BYTES;
    if constexpr (BOXES > 1) bytes = __popc(__ballot_sync(0xffffffffu, place.row >= 0)) * (Tile::BYTES / BOXES);
    auto copy_box = [&](int first) {
#pragma unroll
      for (int slab = 0; slab < Tile::SLABS; ++slab)
        load_box(tile + slab * Tile::SLAB_BYTES + first * Tile::ROW_BYTES, tensor.map, column + slab * SLAB_COLUMNS, place.row,
                 head_kv * tensor.head_factor, place.page * tensor.batch_factor, full);
    };
    if (asks) {
      ring.wait_empty();
      mbarrier_arrive_expect(full, bytes);
      if constexpr (BOXES == 1) copy_box(0);
    }
    if constexpr (BOXES > 1) {
      __syncwarp();
      if (place.row >= 0) copy_box(lane_index() * BOX_ROWS);
    }
    if (is_cut) {
      if (asks) mbarrier_wait(full, landed);
      __syncwarp();
      if (first_row > 0) Tile::clear_until(tile, first_row);
      if (end_row < TILE_KV) Tile::clear_from(tile, end_row);
      fence_proxy_async();
      __syncwarp();
      if (asks) mbarrier_arrive(ring.full());
      landed ^= 1;
    }
    ring.advance();
  }
};
