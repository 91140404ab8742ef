// The mask that dropout draws in the attention kernels, as an array: kept[batch][head][query][key] is 1 where a probability is kept.
//
// A block takes sixteen queries; each thread draws for groups of eight elements (tile/dropout.cuh).
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

  const int groups = (geometry.seqlen_kv + 15) / 16 * 4;  // of one row: a group has keys k, k + 1, k + 8 and k + 9
  for (int index = int(threadIdx.x); index < ROWS / 2 * groups; index += NUM_THREADS) {
    const int query = work.tile * ROWS + index / groups, key = index % groups / 4 * 16 + index % 4 * 2;
    const DrawnGroup drawn = dropout.draw(work.batch, work.head, query, key);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int q = query + i / 4 * 8, k = key + i / 2 % 2 * 8 + i % 2;
      if (q < geometry.seqlen_q && k < geometry.seqlen_kv) kept_rows[int64(q) * geometry.seqlen_kv + k] = dropout.keeps(drawn.word[i / 2], i % 2);
    }
  }
}
