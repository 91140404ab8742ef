// The last tiles of queries of forward_wgmma.cu, whose keys its blocks share out, where whole tiles would leave blocks idle at the end.
//
// Tiles see the same number of keys then (SHARES_KEYS). forward_wgmma_float32.cu computes whole tiles only. The key tiles of those that are shared
// out lie one behind the other, and each block has as many of them as any other ("a share", stream-K: Osama et al. 2023, arXiv 2301.03598): it begins
// with them, and computes whole tiles of queries behind. A share reaches into two tiles of queries at most. Of each of them a warp stores a part: O
// and its softmax as they lie in registers. The warp that is the last of those with the same rows merges their parts, in the order of the keys, so
// that the bits are the same on every run, and goes on as if it had had all keys. Nobody waits for another block.
#pragma once
#include "arguments.cuh"
#include "ptx/global.cuh"
#include "ptx/warp.cuh"
#include "tile/constants.cuh"
#include "tile/visibility.cuh"

constexpr bool SHARES_KEYS = !SameType<Element, float>::value && !(CAUSAL || WINDOW || PREFIX || TILE_LISTS || RAGGED);

// Of a tile of queries, the key tiles begin .. end - 1 that are a block's.
struct KeyShare {
  int begin = 0, end = 0;
  int tile = -1;  // the tile's number among those whose keys are shared out; -1: the block has all keys
};

// Where shares begin and end on the line of key tiles.
class KeyShares {
 public:
  DEVICE explicit KeyShares(const ForwardWgmmaArguments& arguments)
      : key_tiles(ceil_div(arguments.geometry.seqlen_kv, TILE_KV)),
        length(arguments.shares.length),
        total((arguments.num_work - arguments.shares.first_work) * key_tiles) {}

  DEVICE int begin(int block) const { return block * length; }
  DEVICE int end(int block) const { return min(total, (block + 1) * length); }

  // From `position` on, which is this block's, as far as the tile of queries goes.
  DEVICE KeyShare share(int position) const {
    const int tile = position / key_tiles, first = position - tile * key_tiles;
    return {first, min(key_tiles, first + end(int(blockIdx.x)) - position), tile};
  }
  DEVICE KeyShare all_keys() const { return {0, key_tiles, -1}; }

  // Where the next tile of queries begins.
  DEVICE int next_tile(int position) const { return (position / key_tiles + 1) * key_tiles; }

  // The blocks that have the first and the last keys of a tile of queries.
  DEVICE int first_block(int tile) const { return tile * key_tiles / length; }
  DEVICE int last_block(int tile) const { return ((tile + 1) * key_tiles - 1) / length; }

 private:
  int key_tiles, length, total;
};

// What a warp has computed with its share of the keys, in global memory: each lane's registers, four at a time, beside those of the others.
class PartOfRows {
 public:
  static constexpr int CHUNKS = DV_TILES + 2;  // O; references, sums and what rounding has left out of them
  static constexpr int FLOATS = CHUNKS * 4 * WARP_SIZE;

  // Of a tile of queries, by its number among those that are shared out: parts of one tile and neighbouring blocks have neighbouring places, and the
  // next tile's begin with a place more.
  DEVICE PartOfRows(const ForwardWgmmaArguments& arguments, int tile, int block, int warp)
      : chunks(arguments.shares.parts + (int64(tile + block) * NUM_WARPS + warp) * FLOATS + lane_index() * 4) {}

  template <typename Softmax>
  DEVICE void store(const float (&O)[1][DV_TILES][4], const Softmax& softmax) const {
#pragma unroll
    for (int n = 0; n < DV_TILES; ++n) store_relaxed(chunk(n), O[0][n]);
    const auto &reference = softmax.reference[0], &sum = softmax.sum[0], &rest = softmax.rest[0];
    store_relaxed(chunk(DV_TILES), {reference[0], reference[1], sum[0], sum[1]});
    store_relaxed(chunk(DV_TILES + 1), {rest[0], rest[1], 0.0f, 0.0f});
  }

  // Adds it to the rows of other keys.
  template <typename Softmax>
  DEVICE void add_to(float (&O)[1][DV_TILES][4], Softmax& softmax) const {
    float state[4], rest[4];
    load_relaxed(chunk(DV_TILES), state);
    load_relaxed(chunk(DV_TILES + 1), rest);
    const float2 factors[2] = {softmax.merge(0, 0, state[0], state[2], rest[0]), softmax.merge(0, 1, state[1], state[3], rest[1])};
#pragma unroll
    for (int n = 0; n < DV_TILES; ++n) {
      float other[4];
      load_relaxed(chunk(n), other);
#pragma unroll
      for (int i = 0; i < 4; ++i) O[0][n][i] = __fmaf_rn(O[0][n][i], factors[i / 2].x, other[i] * factors[i / 2].y);
    }
  }

  // The same of O alone, where the softmax is that of all keys.
  template <typename Softmax>
  DEVICE void add_outputs_to(float (&O)[1][DV_TILES][4], const Softmax& softmax) const {
    float state[4];
    load_relaxed(chunk(DV_TILES), state);
    const float factors[2] = {softmax.rescale_since(state[0], 0, 0), softmax.rescale_since(state[1], 0, 1)};
#pragma unroll
    for (int n = 0; n < DV_TILES; ++n) {
      float other[4];
      load_relaxed(chunk(n), other);
#pragma unroll
      for (int i = 0; i < 4; ++i) O[0][n][i] = __fmaf_rn(other[i], factors[i / 2], O[0][n][i]);
    }
  }

 private:
  float* chunks;  // this lane's first one

  DEVICE float* chunk(int i) const { return chunks + i * 4 * WARP_SIZE; }
};

// Rows of a share become those of all keys. Returns false where another warp will see to that, which has not stored its part yet. `warp`: of those
// that compute.
template <typename Rows>
DEVICE bool merge_parts(const ForwardWgmmaArguments& arguments, const KeyShare& share, Rows& rows, int warp) {
  const KeyShares shares(arguments);
  const int first = shares.first_block(share.tile), last = shares.last_block(share.tile);
  if (first == last) return true;
  PartOfRows(arguments, share.tile, int(blockIdx.x), warp).store(rows.O, rows.softmax);
  __syncwarp();
  uint32 arrived = 0;
  if (lane_index() == 0) {
    fence_gpu();  // behind the parts of all lanes, and before those of others are read
    arrived = fetch_increment_relaxed(arguments.shares.arrivals + share.tile * NUM_WARPS + warp);
    fence_gpu();
  }
  if (int(uniform(arrived)) < last - first) return false;
  __syncwarp();  // so that all lanes read behind the fence of one, which an exchange of a number does not promise
  rows.forget();
#pragma unroll 1
  for (int block = first; block <= last; ++block) PartOfRows(arguments, share.tile, block, warp).add_to(rows.O, rows.softmax);
  return true;
}
