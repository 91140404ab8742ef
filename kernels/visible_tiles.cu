// Which tiles of scores have any visible pair, and which of those have a masked one: lists in the format of tile/visible_tiles.cuh, for the tiles
// that the blocks of the next kernel own. Those are tiles of queries, or with BY_KEYS of keys.
//
// One block makes one list, tile after tile, so that its order is that of the tiles. Where neither mask, segments, prefixes nor lengths differ
// between heads or batches, a list is shared by all of them.
#include "arguments.cuh"
#include "ptx/warp.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_tiles.cuh"

constexpr int TILE_Q = Config::TILE_Q;
constexpr int TILE_KV = Config::TILE_KV;
constexpr bool BY_KEYS = Config::BY_KEYS;
constexpr int NUM_THREADS = Config::NUM_WARPS * WARP_SIZE;

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) visible_tiles(const __grid_constant__ VisibleTilesArguments arguments) {
  const Work work = decode_block(arguments.geometry.num_tiles, arguments.features.list_heads, false);
  const auto& geometry = geometry_of(arguments, work.batch);
  const Visibility visibility(geometry, arguments.features, work.batch, work.head);

  const int num_columns = BY_KEYS ? (arguments.geometry.seqlen_q + TILE_Q - 1) / TILE_Q : (arguments.geometry.seqlen_kv + TILE_KV - 1) / TILE_KV;
  int begin, end;  // columns that the masks which do not depend on data leave
  if constexpr (BY_KEYS) {
    begin = visibility.first_query(work.tile * TILE_KV) / TILE_Q;
    end = (visibility.end_query(work.tile * TILE_KV, (work.tile + 1) * TILE_KV) + TILE_Q - 1) / TILE_Q;
  } else {
    begin = visibility.first_key(work.tile * TILE_Q) / TILE_KV;
    end = (visibility.end_key(work.tile * TILE_Q, (work.tile + 1) * TILE_Q) + TILE_KV - 1) / TILE_KV;
  }

  int* list = visible_tiles_of(geometry, arguments.features, work.batch, work.head, work.tile, num_columns);
  int count = 0;
#pragma unroll 1
  for (int column = begin; column < end; ++column) {
    const int first_q = (BY_KEYS ? column : work.tile) * TILE_Q, first_kv = (BY_KEYS ? work.tile : column) * TILE_KV;
    bool any = false, all = true;
#pragma unroll 4
    for (int pair = int(threadIdx.x); pair < TILE_Q * TILE_KV; pair += NUM_THREADS) {
      const int query = first_q + pair / TILE_KV, key = first_kv + pair % TILE_KV;
      const bool visible = visibility.sees(query, key);
      any |= visible && query < geometry.seqlen_q;
      all &= visible;
    }
    const bool some_visible = __syncthreads_or(any), some_masked = !__syncthreads_and(all);
    if (some_visible) {
      ++count;
      if (threadIdx.x == 0) list[count] = column * 2 + some_masked;
    }
  }
  if (threadIdx.x == 0) list[0] = count;
}
