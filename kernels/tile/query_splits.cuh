// Several blocks for each tile of keys, where a call has few (cuflash/planning/query_splits.py).
//
// Tiles of queries that see a tile of keys, of all heads that share it, are shared out among num_splits blocks, equal numbers of neighbours to each.
// Each stores what its queries give to dK and dV, in float32, and backward_dkdv_merge.cu adds up these parts in the order of the splits.
//
// backward_dkdv_mma.cu does the same, without what follows; where data hide tiles, it counts those that a list has. Blocks of backward_wgmma.cu that
// start together add to a tile of dQ one after the other. So tiles of keys are cut into chains of chain_tiles neighbours, and each chain has sums and
// turns of its own (tile/query_sums.cuh), which backward_dq_convert.cu adds up in the order of the chains. Of one tile of keys just one block adds to
// a tile of queries, and blocks start in the order of their keys, so turns are what they are without splits. Where data hide tiles, the table has
// places among all keys, and there is one chain.
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

// The work of a block that adds nothing up with others: splits of one tile of keys start one behind the other.
template <typename Arguments>
DEVICE BlockWork split_work_in_order(const Arguments& arguments, int num_heads) {
  const int num_splits = arguments.splits.num_splits;
  BlockWork work{work_longest_first<CAUSAL, false>(arguments.geometry, num_heads, int(blockIdx.x) / num_splits)};
  work.split = int(blockIdx.x) % num_splits;
  return work;
}

// The same of any block of backward_wgmma.cu. `scratch` is room for a ticket; it ends with a barrier of the block.
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
    work = split_work_in_order(arguments, num_heads);
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
  return arguments.splits.key_parts + rows * PART_TILES * FRAGMENT_FLOATS + lane_index() * (HAS_VECTOR_RED ? 4 : 1);
}

// Stores a warp's dK and dV for backward_dkdv_merge.cu: those of 16 M keys of the block, from its row_tile-th 16 on.
template <typename Arguments, int M, int K_TILES, int V_TILES>
DEVICE void store_part(const Arguments& arguments, const BlockWork& work, const float (&dK)[M][K_TILES][4], const float (&dV)[M][V_TILES][4],
                       int row_tile) {
  const int num_heads = arguments.geometry.num_heads_q / arguments.group_heads;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float* part = key_part(arguments, work, num_heads, work.split, row_tile + m);
    if constexpr (Config::COMPUTE_DK) {
#pragma unroll
      for (int n = 0; n < D_TILES; ++n) store_fragment(part + n * FRAGMENT_FLOATS, dK[m][n]);
    }
    if constexpr (Config::COMPUTE_DV) {
#pragma unroll
      for (int n = 0; n < DV_TILES; ++n) store_fragment(part + (DK_TILES + n) * FRAGMENT_FLOATS, dV[m][n]);
    }
  }
}

// body(batch, head, geometry, visibility, steps) for every batch and query head whose gradients blocks with the tile of keys sum up, with all steps.
template <typename Arguments, typename Body>
DEVICE void for_each_whole_member(const Arguments& arguments, const BlockWork& work, const Body& body) {
  const int num_members = arguments.group_batch * arguments.group_heads;
#pragma unroll 1
  for (int member = 0; member < num_members; ++member) {
    const int batch = work.batch * arguments.group_batch + member / arguments.group_heads;
    const int head = work.head * arguments.group_heads + member % arguments.group_heads;
    const auto& geometry = geometry_of(arguments, batch);
    const Visibility visibility(geometry, arguments.features, batch, head);
    body(batch, head, geometry, visibility, query_steps(visibility, work.tile * TILE_KV));
  }
}

// A block's own of all steps of its tile of keys, of which each member has `count(batch, head, geometry, steps)`.
template <typename Arguments, typename Count>
DEVICE Steps steps_of_split(const Arguments& arguments, const BlockWork& work, const Count& count) {
  int total = 0;
  for_each_whole_member(arguments, work, [&](int batch, int head, const Geometry& geometry, const Visibility&, const Steps& all) {
    total += count(batch, head, geometry, all);
  });
  const int num_splits = arguments.splits.num_splits;
  return {uniform(int(int64(total) * work.split / num_splits)), uniform(int(int64(total) * (work.split + 1) / num_splits))};
}

// The same where each member has all steps that positions leave.
template <typename Arguments>
DEVICE Steps steps_of_split(const Arguments& arguments, const BlockWork& work) {
  return steps_of_split(arguments, work, [](int, int, const Geometry&, const Steps& all) { return max(all.end - all.begin, 0); });
}

// A block's own of the steps of a member, `before` which so many steps of other members come; that counts these, too.
DEVICE Steps own_steps(const Steps& own, const Steps& all, int& before) {
  const int count = max(all.end - all.begin, 0);
  auto cut = [&](int step) { return all.begin + min(max(step - before, 0), count); };
  const Steps steps{cut(own.begin), cut(own.end)};
  before += count;
  return steps;
}
