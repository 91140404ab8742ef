// What both sides of a block of forward_wgmma.cu know, the warp that copies and the warpgroups that compute: tiles and registers, where everything
// lies in shared memory, over which key tiles the block walks, and how tiles are given back.
#pragma once
#include "tile/constants.cuh"
#include "tile/ring.cuh"
#include "tile/slab_tile.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_tiles.cuh"
#include "tile/work_queue.cuh"

constexpr int WARPGROUPS = TILE_Q / WARPGROUP_ROWS;  // that compute
constexpr int S_TILES = TILE_KV / 8;
constexpr int P_STEPS = TILE_KV / 16;  // of the depth of P V
constexpr int Q_STAGES = Config::Q_STAGES;
constexpr int Q_REGISTER_STEPS = Config::Q_REGISTER_STEPS;  // of the depth of Q Kᵀ, whose part of Q is kept in registers

// A number of float32 is a sum of three of bfloat16 (operand_terms.cu): a row has all first terms, then all second and all third ones, each in slabs
// of their own.
constexpr int TERMS = SameType<Element, float>::value ? 3 : 1;
constexpr int columns_of_terms(int head_dim) { return TERMS == 1 ? head_dim : TERMS * round_up(head_dim, SLAB_COLUMNS); }

using WarpgroupQ = SlabTile<WARPGROUP_ROWS, columns_of_terms(HEAD_DIM)>;
using RingK = SlabTile<TILE_KV, columns_of_terms(HEAD_DIM)>;
using RingV = SlabTile<TILE_KV, columns_of_terms(HEAD_DIM_V)>;
using WarpgroupO = SlabTile<WARPGROUP_ROWS, HEAD_DIM_V>;  // with MAPS_OUT
using RingMask = SlabTile<TILE_Q, TILE_KV * MASK_BYTES / 2>;  // of a boolean mask a column is two keys

constexpr bool MAPS_MASK = Config::MAPS_MASK;  // tiles of a mask of 8 or 16 bits are copied with those of K; other masks are read where they lie
constexpr bool MAPS_OUT =
    Config::MAPS_OUT;  // the TMA unit stores O, from shared memory that is for O alone; else each warp does, through its part of Q

constexpr int Q_BYTES = WARPGROUPS * WarpgroupQ::BYTES;
constexpr int Q_ROW_ELEMENTS = WarpgroupQ::SLABS * WarpgroupQ::ROW_BYTES / int(sizeof(Element));
constexpr int O_COLUMNS = Q_ROW_ELEMENTS < 8 * DV_TILES ? Q_ROW_ELEMENTS : 8 * DV_TILES;  // that pass through Q at a time
constexpr bool CUTS_VALUES = RAGGED || CAUSAL || WINDOW;  // there may be keys in memory that no query sees

// setmaxnreg moves the registers of a block, which are what its threads start with: 512 threads with 128 each, 384 with 168. Whoever copies needs
// more of them where it cuts tiles of V or reads a list of tiles.
constexpr bool COPIES_MUCH = CUTS_VALUES || TILE_LISTS;
constexpr int FIRST_REGISTERS = WARPGROUPS == 3 ? 128 : 168;
constexpr int COPYING_REGISTERS = WARPGROUPS == 3 ? 32 : COPIES_MUCH ? 40 : 24;
constexpr int COMPUTING_REGISTERS = WARPGROUPS == 3 ? 160 : COPIES_MUCH ? 232 : 240;

static_assert(WARPGROUPS == 2 || WARPGROUPS == 3, "num_warps must be 8 or 12");
static_assert(COPYING_REGISTERS + WARPGROUPS * COMPUTING_REGISTERS <= (1 + WARPGROUPS) * FIRST_REGISTERS, "nobody could hand on so many registers");
static_assert(TILE_KV <= 256, "tile_kv must be at most the columns of a wgmma");
static_assert(TILE_Q == 16 * NUM_WARPS, "tile_q must be 16 rows for each warp");

// Where everything lies in shared memory.
struct SharedMemory {
  static constexpr int LIST_ENTRY_BYTES = 8;  // of which the entry takes 4: mbarriers lie behind them
  static constexpr int MASK_TILE_BYTES = MAPS_MASK ? RingMask::BYTES : 0;
  static constexpr int MASK_PLACE_BYTES = MAPS_MASK ? 16 : 0;
  static constexpr int O_BYTES = MAPS_OUT ? WARPGROUPS * WarpgroupO::BYTES : 0;
  static constexpr int BYTES = O_BYTES + MASK_PLACE_BYTES + Q_STAGES * (Q_BYTES + TileWork::BYTES) +
                               NUM_STAGES * (RingK::BYTES + RingV::BYTES + MASK_TILE_BYTES + LIST_ENTRY_BYTES) + Ring<Q_STAGES>::BYTES +
                               2 * Ring<NUM_STAGES>::BYTES + MBARRIER_BYTES;
  SmemAddress base;

  DEVICE SmemAddress Q(int stage, int warpgroup) const { return base + stage * Q_BYTES + warpgroup * WarpgroupQ::BYTES; }
  DEVICE SmemAddress K(int stage) const { return Q(Q_STAGES, 0) + stage * RingK::BYTES; }
  DEVICE SmemAddress V(int stage) const { return K(NUM_STAGES) + stage * RingV::BYTES; }
  DEVICE SmemAddress O(int warpgroup) const { return V(NUM_STAGES) + warpgroup * WarpgroupO::BYTES; }
  DEVICE SmemAddress mask(int K_stage) const { return V(NUM_STAGES) + O_BYTES + K_stage * MASK_TILE_BYTES; }
  DEVICE SmemAddress mask_place() const { return mask(NUM_STAGES); }
  DEVICE SmemAddress work(int Q_stage) const { return mask_place() + MASK_PLACE_BYTES + Q_stage * TileWork::BYTES; }
  DEVICE SmemAddress list_entry(int K_stage) const { return work(Q_STAGES) + K_stage * LIST_ENTRY_BYTES; }
  DEVICE Ring<Q_STAGES> Q_ring() const { return Ring<Q_STAGES>(list_entry(NUM_STAGES)); }
  DEVICE Ring<NUM_STAGES> K_ring() const { return Ring<NUM_STAGES>(list_entry(NUM_STAGES) + Ring<Q_STAGES>::BYTES); }
  DEVICE Ring<NUM_STAGES> V_ring() const { return Ring<NUM_STAGES>(V_landed() - Ring<NUM_STAGES>::BYTES); }
  DEVICE SmemAddress V_landed() const { return base + BYTES - MBARRIER_BYTES; }

  // All threads of the block, before any other use.
  DEVICE void init_mbarriers() const {
    if (threadIdx.x == 0) {
      Q_ring().init(NUM_WARPS);
      K_ring().init(TILE_LISTS || MAPS_MASK ? NUM_WARPS : WARPGROUPS);
      V_ring().init(WARPGROUPS);
      if constexpr (CUTS_VALUES) mbarrier_init(V_landed(), 1);
      fence_mbarrier_init();
    }
    __syncthreads();
  }
};

static_assert(SharedMemory::BYTES == Config::SHARED_BYTES, "shared memory differs from the plan's");

// The key tiles that a block walks over for a tile of queries: steps begin .. end - 1. Those of lists are read a step ahead.
using KeyTiles = VisibleTilesAhead<1>;
struct Walk {
  KeyTiles tiles;
  int begin, end;

  DEVICE Walk(const ForwardWgmmaArguments& arguments, const TileWork& work, const Visibility& visibility)
      : tiles(arguments.geometry, arguments.features, work.at.batch, work.at.head, work.at.tile, ceil_div(arguments.geometry.seqlen_kv, TILE_KV)) {
    const int first_q = work.at.tile * TILE_Q;
    if constexpr (SHARES_KEYS) {
      begin = work.keys.begin;
      end = work.keys.end;
    } else {
      begin = TILE_LISTS ? 0 : uniform(visibility.first_key(first_q) / TILE_KV);
      end = uniform(TILE_LISTS ? tiles.count() : ceil_div(visibility.end_key(first_q, first_q + TILE_Q), TILE_KV));
    }
  }
};

// This warpgroup is done with a tile of K. Where each warp has read what lies beside it, it says so for itself.
DEVICE void release_keys(Ring<NUM_STAGES>& K, int warp) {
  if constexpr (TILE_LISTS || MAPS_MASK) {
    K.release_by_each_warp();
  } else {
    K.release(warp);
  }
}

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
