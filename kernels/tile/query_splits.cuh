// Several blocks for each tile of keys, where a call has few (cuflash/planning/query_splits.py).
//
// Tiles of queries that see a tile of keys, of all heads that share it, are shared out among num_splits blocks, equal numbers of neighbours to each.
// Each stores what its queries give to dK and dV, in float32, and backward_dkdv_merge.cu adds up these parts in the order of the splits.
//
// Blocks that start together add to a tile of dQ one after the other. So tiles of keys are cut into chains of chain_tiles neighbours, and each chain
// has sums and turns of its own (tile/query_sums.cuh), which backward_dq_convert.cu adds up in the order of the chains. Of one tile of keys just one
// block adds to a tile of queries, and blocks start in the order of their keys, so turns are what they are without splits. Where data hide tiles, the
// table has places among all keys, and there is one chain.
//
//     key_parts [batch][head][tile of keys][split][16 keys of a warp][D_TILES of dK, DV_TILES of dV] accumulator tiles m16n8 as they lie in registers
//     query_sums, turns [chain][slots]
#pragma once
#include "tile/constants.cuh"
#include "tile/features.cuh"
#include "tile/query_steps.cuh"
#include "tile/query_sums.cuh"
#include "tile/schedule.cuh"

constexpr bool SPLIT = Config::SPLIT;
constexpr int DK_TILES = Config::COMPUTE_DK ? D_TILES : 0;
constexpr int PART_TILES = DK_TILES + (Config::COMPUTE_DV ? DV_TILES : 0);
constexpr int PART_ROW_TILES = TILE_KV / 16;

// Which keys are a block's, and which of their queries.
struct BlockWork : Work {
  int split = 0;
  Steps own = {};  // of all steps of the tile of keys, counted through the heads that share it
  int first_of_chain = 0;  // the chain's first tile of keys
  int slots_before = 0;  // of the chains before
};

// The work of a block: splits of one tile of keys start one behind the other. `scratch` is room for a ticket; it ends with a barrier of the block.
template <typename Arguments>
DEVICE BlockWork split_work_of(const Arguments& arguments, int num_heads, SmemAddress scratch) {
  const Geometry& geometry = arguments.geometry;
  const QuerySplits& splits = arguments.splits;
  BlockWork work;
  if constexpr (Config::COMPUTE_DK) {
    const int ticket = uniform(take_ticket(arguments, scratch));
    static_cast<Work&>(work) = work_of_ticket(ticket, geometry.num_tiles * splits.num_splits, num_heads, geometry.section_heads);
    work.split = work.tile % splits.num_splits;
    work.tile /= splits.num_splits;
  } else {
    __syncthreads();
    work.split = int(blockIdx.x) % splits.num_splits;
    static_cast<Work&>(work) = work_longest_first<CAUSAL, false>(geometry, num_heads, int(blockIdx.x) / splits.num_splits);
  }
  if constexpr (!TILE_LISTS) {
    const int chain = work.tile / splits.chain_tiles;
    work.first_of_chain = uniform(chain * splits.chain_tiles);
    work.slots_before = uniform(chain * splits.chain_slots);
  }
  work.tile = uniform(work.tile);
  work.head = uniform(work.head);
  work.batch = uniform(work.batch);
  return work;
}

// This lane's numbers of the first accumulator tile of 16 keys of a split.
template <typename Arguments>
DEVICE float* key_part(const Arguments& arguments, const Work& work, int num_heads, int split, int row_tile) {
  const int64 tile = (int64(work.batch) * num_heads + work.head) * arguments.geometry.num_tiles + work.tile;
  const int64 rows = (tile * arguments.splits.num_splits + split) * PART_ROW_TILES + row_tile;
  return arguments.splits.key_parts + rows * PART_TILES * FRAGMENT_FLOATS + lane_index() * 4;
}
