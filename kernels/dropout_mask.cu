// The mask that dropout draws in the attention kernels, as an array: kept[batch][head][query][key] is 1 where a probability is kept.
//
// A block takes sixteen queries; each thread draws for groups of four elements (tile/dropout.cuh).
#include "arguments.cuh"
#include "ptx/warp.cuh"
#include "tile/dropout.cuh"
#include "tile/schedule.cuh"

constexpr int ROWS = 16;  // of a block: queries q and q + 8 share a group
constexpr int NUM_THREADS = Config::NUM_WARPS * WARP_SIZE;

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) dropout_mask(const __grid_constant__ DropoutMaskArguments arguments) {
  const Geometry& geometry = arguments.geometry;
  const Work work = work_of_block(geometry.num_tiles, geometry.num_heads_q);
  const Dropout dropout(arguments.features);
  uint8* kept_rows = arguments.kept + (int64(work.batch) * geometry.num_heads_q + work.head) * geometry.seqlen_q * geometry.seqlen_kv;

  const int groups = (geometry.seqlen_kv + 15) / 16 * 8;  // of one row: a group has keys k and k + 8
  for (int index = int(threadIdx.x); index < ROWS / 2 * groups; index += NUM_THREADS) {
    const int query = work.tile * ROWS + index / groups, key = index % groups / 8 * 16 + index % 8;
    const KeptGroup group = dropout.kept(work.batch, work.head, query, key);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int q = query + word / 2 * 8, k = key + word % 2 * 8;
      if (q < geometry.seqlen_q && k < geometry.seqlen_kv) kept_rows[int64(q) * geometry.seqlen_kv + k] = group.is_kept[word];
    }
  }
}
