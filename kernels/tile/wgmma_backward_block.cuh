// What all warps of a block of backward_wgmma.cu know, those that copy and those that compute: tiles and registers, where everything lies in shared
// memory, and the steps of the block in their order.
#pragma once
#include "tile/constants.cuh"
#include "tile/query_splits.cuh"
#include "tile/query_steps.cuh"
#include "tile/ring.cuh"
#include "tile/row_statistics.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/slab_tile.cuh"
#include "tile/staged_mask.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_tiles.cuh"

constexpr bool COMPUTE_DK = Config::COMPUTE_DK;  // and dQ
constexpr bool COMPUTE_DV = Config::COMPUTE_DV;

constexpr int K_REGISTER_STEPS = Config::K_REGISTER_STEPS;  // of the depth of K Qᵀ, whose part of K is kept in registers
constexpr int V_REGISTER_STEPS = Config::V_REGISTER_STEPS;  // of that of V dOᵀ

constexpr int WARPGROUPS = TILE_KV / WARPGROUP_ROWS;  // that compute
constexpr int S_TILES = TILE_Q / 8;
constexpr int P_STEPS = TILE_Q / 16;  // of the depth of Pᵀ dO and dSᵀ Q

using WarpgroupK = SlabTile<WARPGROUP_ROWS, HEAD_DIM>;
using WarpgroupV = SlabTile<WARPGROUP_ROWS, HEAD_DIM_V>;
using RingQ = SlabTile<TILE_Q, HEAD_DIM>;
using RingO = SlabTile<TILE_Q, HEAD_DIM_V>;  // of dO
using GradScores = SlabTile<TILE_Q, TILE_KV>;  // dS, of which a warpgroup writes its slab

// dQᵀ of a tile: a warpgroup has slabs of columns of the head of its own, and where their number is odd half of the queries of the last one.
constexpr int OWN_SLABS = WarpgroupK::SLABS / WARPGROUPS;
constexpr bool SHARES_SLAB = COMPUTE_DK && WarpgroupK::SLABS % 2 == 1;
constexpr int SHARED_TILES = SHARES_SLAB ? S_TILES / WARPGROUPS : 1;
constexpr bool WAITS_FOR_DV = COMPUTE_DK && COMPUTE_DV && WarpgroupK::SLABS > 2;  // before dQ is issued: registers have no room for Pᵀ beside it

constexpr int LISTED_TILE_BYTES = TILE_LISTS ? 8 : 0;  // of which `ListedTile` takes 4: mbarriers lie behind them
constexpr int STAGE_BYTES = RingQ::BYTES + StagedMask::BYTES + StatisticsOfColumns::BYTES + LISTED_TILE_BYTES;
constexpr int V_BYTES = COMPUTE_DK ? WarpgroupV::BYTES : 0;  // of a warpgroup: dV alone needs no dP
constexpr int DS_BUFFERS = COMPUTE_DK ? 2 : 0;

// dO has a ring of its own where shared memory holds fewer tiles of it than of Q, or where it is wanted a step later; else both share one.
constexpr int GRAD_OUT_STAGES = Config::GRAD_OUT_STAGES;
constexpr bool HAS_OUT_RING = !COMPUTE_DK || GRAD_OUT_STAGES != NUM_STAGES;
constexpr int RINGS_BYTES = Ring<NUM_STAGES>::BYTES + (HAS_OUT_RING ? Ring<GRAD_OUT_STAGES>::BYTES : 0);
constexpr int TURNS = 2;  // that are waited for ahead of the one at which the block adds
constexpr bool CUTS_KEYS = RAGGED || CAUSAL || WINDOW;  // there may be keys in memory that no query sees
constexpr bool CUTS_QUERIES = VARLEN || IN_PLACES;  // behind a sequence's queries there may be others, or anything

// setmaxnreg: 384 threads begin with 168 registers each (tile/wgmma_block.cuh).
constexpr int COPYING_REGISTERS = !COMPUTE_DV ? 40 : !COMPUTE_DK && CUTS_QUERIES ? 56 : 24;  // where both rings are cut
constexpr int COMPUTING_REGISTERS = ((1 + WARPGROUPS) * 168 - COPYING_REGISTERS) / WARPGROUPS;

static_assert(WARPGROUPS == 2 && TILE_KV == 16 * NUM_WARPS, "num_warps must be 8, and tile_kv 16 rows for each");
static_assert(!(COMPUTE_DK && COMPUTE_DV) || (WarpgroupK::SLABS <= 3 && WarpgroupV::SLABS <= 2), "dK and dV of wider heads take a kernel each");
static_assert(WarpgroupK::SLABS <= 4 && WarpgroupV::SLABS <= 4, "head_dim and that of value must be at most 256");
static_assert(GRAD_OUT_STAGES == NUM_STAGES || !COMPUTE_DV, "dO must be there as long as Q where dV is computed");
static_assert(TILE_Q <= 256, "tile_q must be at most the columns of a wgmma");

// Where everything lies in shared memory.
struct SharedMemory {
  static constexpr int BYTES = WARPGROUPS * (WarpgroupK::BYTES + V_BYTES) + NUM_STAGES * STAGE_BYTES + GRAD_OUT_STAGES * RingO::BYTES +
                               DS_BUFFERS * GradScores::BYTES + RINGS_BYTES + Ring<TURNS>::BYTES + (TURNS + 3) * MBARRIER_BYTES;
  SmemAddress base;

  DEVICE SmemAddress K(int warpgroup) const { return base + warpgroup * WarpgroupK::BYTES; }
  DEVICE SmemAddress V(int warpgroup) const { return K(WARPGROUPS) + warpgroup * V_BYTES; }
  DEVICE SmemAddress Q(int stage) const { return V(WARPGROUPS) + stage * RingQ::BYTES; }
  DEVICE SmemAddress dO(int stage) const { return Q(NUM_STAGES) + stage * RingO::BYTES; }
  DEVICE SmemAddress dS(int buffer) const { return dO(GRAD_OUT_STAGES) + buffer * GradScores::BYTES; }
  DEVICE SmemAddress mask(int stage) const { return dS(DS_BUFFERS) + stage * StagedMask::BYTES; }
  DEVICE SmemAddress statistics(int stage) const { return mask(NUM_STAGES) + stage * StatisticsOfColumns::BYTES; }
  DEVICE SmemAddress listed_tile(int stage) const { return statistics(NUM_STAGES) + stage * LISTED_TILE_BYTES; }
  DEVICE Ring<NUM_STAGES> ring() const { return Ring<NUM_STAGES>(listed_tile(NUM_STAGES)); }
  DEVICE Ring<GRAD_OUT_STAGES> out_ring() const {
    return Ring<GRAD_OUT_STAGES>(listed_tile(NUM_STAGES) + (RINGS_BYTES - Ring<GRAD_OUT_STAGES>::BYTES));
  }
  // Full: it is the block's turn to add; empty: that has been passed on.
  DEVICE Ring<TURNS> turns() const { return Ring<TURNS>(listed_tile(NUM_STAGES) + RINGS_BYTES); }
  DEVICE SmemAddress has_added() const { return keys_landed() - TURNS * MBARRIER_BYTES; }  // one for each stage of turns
  DEVICE SmemAddress keys_landed() const { return base + BYTES - 3 * MBARRIER_BYTES; }
  DEVICE SmemAddress cut_landed() const { return keys_landed() + MBARRIER_BYTES; }
  DEVICE SmemAddress ticket() const { return keys_landed() + 2 * MBARRIER_BYTES; }
};

static_assert(SharedMemory::BYTES == Config::SHARED_BYTES, "shared memory differs from the plan's");

// Where the block's sequence starts in packed arrays; 0 where nothing is packed.
struct Starts {
  int q, kv;

  DEVICE Starts(const BackwardWgmmaArguments& arguments, int sequence)
      : q(sequence_start(arguments.lengths.cu_seqlens_q, sequence, arguments.geometry.seqlen_q)),
        kv(sequence_start(arguments.lengths.cu_seqlens_kv, sequence, arguments.geometry.seqlen_kv)) {}
};

// body(batch, head, geometry, visibility, steps) for every batch and query head whose gradients the block sums up, with its own steps.
template <typename Body>
DEVICE void for_each_member(const BackwardWgmmaArguments& arguments, const BlockWork& work, const Body& body) {
  if constexpr (SPLIT) {
    int before = 0;
    for_each_whole_member(arguments, work, [&](int batch, int head, const Geometry& geometry, const Visibility& visibility, const Steps& all) {
      body(batch, head, geometry, visibility, own_steps(work.own, all, before));
    });
  } else {
    for_each_whole_member(arguments, work, body);
  }
}

// How many blocks add to a tile of queries before this one, where that does not depend on data.
DEVICE int place_in_chain(const BlockWork& work, const Visibility& visibility, int tile) {
  if constexpr (SPLIT) return work.tile - max(visibility.first_key(tile * TILE_Q) / TILE_KV, work.first_of_chain);
  return place_among_blocks(work, visibility, tile);
}

// body(tile, place, is_partial) for the tiles of queries of one of them, the last one first: how many blocks add to it before this one, and with
// lists whether data hide some pair of it. With lists a whole warp calls, of which each lane reads one of 32 neighbouring entries.
template <typename Body>
DEVICE void for_each_tile(const BackwardWgmmaArguments& arguments, const BlockWork& work, int batch, int head, const Visibility& visibility,
                          const Steps& steps, const Body& body) {
  if constexpr (TILE_LISTS) {
    const int num_tiles = ceil_div(arguments.geometry.seqlen_q, TILE_Q);
    const int* entries = places_of_tiles(arguments.features, batch, head, arguments.geometry.num_tiles, work.tile, num_tiles);
#pragma unroll 1
    for (int last = steps.end - 1; last >= steps.begin; last -= WARP_SIZE) {
      const int own = last - lane_index(), entry = own >= steps.begin ? entries[own] : NOTHING_VISIBLE;
#pragma unroll 1
      for (uint32 left = lanes_with(entry != NOTHING_VISIBLE); left != 0; left &= left - 1) {
        const int lane = __ffs(int(left)) - 1, listed = shfl(entry, lane);
        body(last - lane, listed / 2, listed % 2 != 0);
      }
    }
  } else {
#pragma unroll 1
    for (int tile = steps.end - 1; tile >= steps.begin; --tile) body(tile, place_in_chain(work, visibility, tile), false);
  }
}

// What the copying warp says of a listed tile to those that compute.
struct ListedTile {
  int bits;

  static constexpr int NONE = -1;  // the last one of a (batch, head) was before

  DEVICE static ListedTile of(int tile, bool is_first, bool is_partial) { return {tile * 4 + is_first * 2 + is_partial}; }
  DEVICE static ListedTile load(SmemAddress address) { return {uniform(load_shared_s32(address))}; }
  DEVICE void store(SmemAddress address) const { store_shared(address, uint32(bits)); }

  DEVICE bool is_there() const { return bits != NONE; }
  DEVICE int tile() const { return bits >> 2; }
  DEVICE bool is_first() const { return bits & 2; }  // no block adds to it before this one
  DEVICE bool is_partial() const { return bits & 1; }
};
