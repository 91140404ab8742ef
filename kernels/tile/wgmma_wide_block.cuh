// What both sides of a block of forward_wgmma_wide.cu know, the warp that copies and the two warpgroups that compute: tiles and registers, where
// everything lies in shared memory, and over which keys the block walks.
#pragma once
#include "tile/cache_rows.cuh"
#include "tile/constants.cuh"
#include "tile/ring.cuh"
#include "tile/slab_tile.cuh"
#include "tile/split_rows.cuh"
#include "tile/visible_keys.cuh"
#include "tile/visible_tiles.cuh"

constexpr bool VALUE_IN_KEY = Config::VALUE_IN_KEY;  // a key's value is its first columns: one tile serves both products
constexpr int BOX_ROWS = Config::BOX_ROWS;           // keys that one copy has, of one page
constexpr int BOXES = TILE_KV / BOX_ROWS;

constexpr int S_TILES = TILE_KV / 8;
constexpr int P_STEPS = TILE_KV / 16;  // of the depth of P V

// The columns of O: whole slabs of V for the first warpgroup, the rest for the second.
constexpr int FIRST_COLUMNS = ceil_div(ceil_div(HEAD_DIM_V, SLAB_COLUMNS), 2) * SLAB_COLUMNS;
constexpr int SECOND_COLUMNS = round_up(HEAD_DIM_V - FIRST_COLUMNS, 16);

using BlockQ = SlabTile<WARPGROUP_ROWS, HEAD_DIM>;
using BlockP = SlabTile<WARPGROUP_ROWS, TILE_KV>;
using Keys = SlabTile<TILE_KV, HEAD_DIM>;
using First = SlabTile<TILE_KV, FIRST_COLUMNS>;                                             // of V, and with VALUE_IN_KEY of K
using Second = SlabTile<TILE_KV, (VALUE_IN_KEY ? HEAD_DIM : HEAD_DIM_V) - FIRST_COLUMNS>;  // the others

constexpr int COPYING_REGISTERS = 40, COMPUTING_REGISTERS = 232;

static_assert(TILE_Q == WARPGROUP_ROWS && NUM_WARPS == 8, "tile_q must be 64 and num_warps 8");
static_assert(NUM_STAGES >= 2, "num_stages must be at least 2");
static_assert(TILE_KV <= 256 && TILE_KV % BOX_ROWS == 0 && BOX_ROWS % 8 == 0, "tile_kv must be whole boxes");
static_assert(HEAD_DIM_V > SLAB_COLUMNS && HEAD_DIM_V <= 512, "value's head_dim must be above 64 and at most 512");

// Where everything lies in shared memory.
struct SharedMemory {
  static constexpr int STAGE_BYTES = (VALUE_IN_KEY ? 0 : Keys::BYTES) + First::BYTES + Second::BYTES;
  static constexpr int FACTORS_BYTES = WARPGROUP_ROWS * int(sizeof(float));
  static constexpr int RINGS = VALUE_IN_KEY ? 2 : 3;
  static constexpr int BYTES =
      BlockQ::BYTES + NUM_STAGES * STAGE_BYTES + BlockP::BYTES + FACTORS_BYTES + RINGS * Ring<NUM_STAGES>::BYTES + Ring<1>::BYTES + MBARRIER_BYTES;
  SmemAddress base;

  DEVICE SmemAddress Q() const { return base; }
  DEVICE SmemAddress first(int stage) const { return Q() + BlockQ::BYTES + stage * First::BYTES; }
  DEVICE SmemAddress second(int stage) const { return first(NUM_STAGES) + stage * Second::BYTES; }
  DEVICE SmemAddress keys(int stage) const { return second(NUM_STAGES) + stage * Keys::BYTES; }
  DEVICE SmemAddress P() const { return VALUE_IN_KEY ? second(NUM_STAGES) : keys(NUM_STAGES); }
  DEVICE SmemAddress factors() const { return P() + BlockP::BYTES; }  // of each row: what O is multiplied by before P V is added
  DEVICE Ring<NUM_STAGES> first_ring() const { return Ring<NUM_STAGES>(factors() + FACTORS_BYTES); }
  DEVICE Ring<NUM_STAGES> second_ring() const { return Ring<NUM_STAGES>(factors() + FACTORS_BYTES + Ring<NUM_STAGES>::BYTES); }
  DEVICE Ring<NUM_STAGES> keys_ring() const {  // where there is none of keys, the second columns are free last
    return Ring<NUM_STAGES>(factors() + FACTORS_BYTES + (VALUE_IN_KEY ? 1 : 2) * Ring<NUM_STAGES>::BYTES);
  }
  DEVICE Ring<1> P_ring() const { return Ring<1>(factors() + FACTORS_BYTES + RINGS * Ring<NUM_STAGES>::BYTES); }
  DEVICE SmemAddress landed() const { return base + BYTES - MBARRIER_BYTES; }
};

static_assert(SharedMemory::BYTES == Config::SHARED_BYTES, "shared memory differs from the plan's");

// The keys that a block walks over, and the rows that do. Where data decide which tiles those are, steps are entries of a list (visible_tiles.cuh).
struct SplitWalk {
  int first_row;            // of the grouped rows
  int first_key, end_key;   // what any row of the block sees lies in first_key .. end_key - 1
  int begin, end;           // steps over key tiles, of this split
  VisibleTiles tiles;

  DEVICE SplitWalk(const ForwardWgmmaWideArguments& arguments, const SplitWork& work, const Visibility& visibility, const GroupedRows& rows,
                   const SequenceInCache& sequence)
      : first_row(work.tile * TILE_Q),
        tiles(arguments.geometry, arguments.features, work.sequence, rows.first_head, work.tile, ceil_div(arguments.geometry.seqlen_kv, TILE_KV)) {
    const VisibleKeys visible(visibility, sequence, rows, first_row);
    first_key = visible.first_key;
    end_key = visible.end_key;
    const int first_tile = TILE_LISTS ? 0 : visible.first_tile(), end_tile = TILE_LISTS ? tiles.count() : visible.end_tile();
    const int split_tiles = arguments.split_tiles > 0 ? arguments.split_tiles : ceil_div(end_tile - first_tile, arguments.num_splits);
    begin = uniform(min(end_tile, first_tile + work.split * split_tiles));
    end = uniform(min(end_tile, begin + split_tiles));
  }
};
