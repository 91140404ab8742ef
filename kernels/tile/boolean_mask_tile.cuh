// What of a tile of scores a boolean mask hides whose tile lies in shared memory, a byte for each key.
//
// A byte for each score takes a load for two and a test for one. So the four lanes of a row read a quarter of it each by `ldmatrix`, four neighbours
// of 16 keys, make bits of their bytes, and ask two others for their own. From bits the assembler makes predicates, several at once. That is for
// bytes 0 and 1. NumPy and others have no more, but a view of other bytes as booleans does: a warp that finds one looks at each byte.
#pragma once
#include "tile/slab_tile.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

template <typename Tile, int N>  // accumulator tiles of a row
class BooleanMaskTile {
 public:
  // Reads the bits of the lane's two rows: `row` is the first of 16, in the tile.
  DEVICE void read(SmemAddress tile, int row) {
    uint32 all = 0;
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab) ask_others(tile, row, slab, all);
    if (any_lane((all & 0xfefefefeu) != 0)) {
#pragma unroll
      for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
        for (int r = 0; r < 2; ++r) word[slab][r] = look_at_each(tile + slab * Tile::SLAB_BYTES, row + 8 * r + lane_index() / 4);
    }
  }

  // Gives -inf to what is hidden.
  DEVICE void apply(float (&S)[1][N][4]) const {
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int bit = 0; bit < 32; ++bit) {
          const int n = 16 * slab + n_of(bit);
          if (n < N && !(word[slab][r] & 1u << bit)) S[0][min(n, N - 1)][2 * r + c_of(bit)] = -infinity();
        }
  }

 private:
  static constexpr int SLABS = ceil_div(N, 16);  // of 128 keys
  uint32 word[SLABS][2];  // a bit is that of column 8 n + 2 (lane % 4) + c of a slab

  DEVICE static constexpr int n_of(int bit) { return bit % 8 * 2 + bit / 16; }
  DEVICE static constexpr int c_of(int bit) { return bit % 16 / 8; }

  // The lane's bits of its rows of a slab. Bit 8 b + i of `own` is that of byte b of the lane's four keys of 16 keys i.
  DEVICE void ask_others(SmemAddress tile, int row, int slab, uint32& all) {
    constexpr int CHUNKS = ceil_div(N, 2);  // of 16 keys
    const int lane = lane_index() % 4, quad = lane_index() - lane;
    const int lane_offset = Tile::offset(row + lane_index() % 16, lane_index() / 16);
    uint32 own[2] = {};
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      if (8 * slab + i >= CHUNKS) continue;
      uint32 bytes[4];
      ldmatrix_x4(bytes, tile + Tile::at(lane_offset, 8 * slab + i));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (8 * slab + i + k / 2 >= CHUNKS) continue;
        own[k % 2] += bytes[k] << (i + k / 2);
        all |= bytes[k];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32 low = shfl(int(own[r]), quad + lane / 2), high = shfl(int(own[r]), quad + 2 + lane / 2);
      word[slab][r] = __byte_perm(low, high, lane % 2 ? 0x7632 : 0x5410);
    }
  }

  // The same of any bytes.
  DEVICE static uint32 look_at_each(SmemAddress slab, int row) {
    uint32 bits = 0;
#pragma unroll 1
    for (int bit = 0; bit < 32; ++bit) {
      const int n = n_of(bit);
      const uint16 pair = load_shared_u16(slab + Tile::offset(row, n / 2) + n % 2 * 8 + lane_index() % 4 * 2);
      if ((pair >> 8 * c_of(bit) & 0xff) != 0) bits |= 1u << bit;
    }
    return bits;
  }
};
