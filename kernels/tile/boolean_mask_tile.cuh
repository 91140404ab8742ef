// What of a tile of scores a boolean mask hides whose tile lies in shared memory, a byte for each key.
//
// A byte for each score takes a load for two and a test for one. So the four lanes of a row read a quarter of it each, make bits of their bytes, and
// pass them round. From bits the assembler makes predicates, several at once. That is for bytes 0 and 1. NumPy and others have no more, but a view of
// other bytes as booleans does: a warp that finds one looks at each byte.
#pragma once
#include "tile/slab_tile.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

template <typename Tile, int N>  // accumulator tiles of a row
class BooleanMaskTile {
 public:
  // Reads the bits of the lane's two rows: `row` is the first of 16, in the tile.
  DEVICE void read(SmemAddress tile, int row) {
    bool are_bits = true;
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
      for (int r = 0; r < 2; ++r) word[slab][r] = pass_round(tile + slab * Tile::SLAB_BYTES, row + 8 * r + lane_index() / 4, are_bits);
    if (any_lane(!are_bits)) {
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

  DEVICE static constexpr int n_of(int bit) { return bit % 8 / 4 * 8 + bit / 16 * 4 + bit % 2 * 2 + bit % 4 / 2; }
  DEVICE static constexpr int c_of(int bit) { return bit % 16 / 8; }

  // The lane's bits of a row. Each of its four lanes has two chunks of 16 bytes: bit 8 b + i of `own` is that of byte b of their word i.
  DEVICE static uint32 pass_round(SmemAddress slab, int row, bool& are_bits) {
    const int lane = lane_index() % 4, shift = lane % 2 * 16 + lane / 2;
    uint32 own = 0, all = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Chunk chunk = load_shared(slab + Tile::offset(row, lane + 4 * half));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        own += chunk.word[i] << (4 * half + i);
        all |= chunk.word[i];
      }
    }
    are_bits &= (all & 0xfefefefeu) == 0;
    uint32 of_lane[4];  // every second of 16 bits
#pragma unroll
    for (int i = 0; i < 4; ++i) of_lane[i] = uint32(shfl(int(own), lane_index() / 4 * 4 + i)) >> shift & 0x5555u;
    return of_lane[0] + of_lane[1] * 2 + (of_lane[2] << 16) + (of_lane[3] << 17);
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
