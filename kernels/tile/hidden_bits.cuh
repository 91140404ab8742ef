// What a boolean mask hides of a warp's accumulators whose rows are keys, as bits of a lane.
//
// A key is a byte, and a lane has every eighth one of many queries: a load for each score. So the lanes of a warp read the mask in chunks of 16 keys
// of a query, make bits of their bytes, and exchange them: a lane has eight bits of each of the eight lanes with its queries. That is for bytes 0 and
// 1. NumPy and others have no more, but a view of other bytes as booleans does: what a warp that finds one has read is not there.
#pragma once
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"

template <int M, int N>  // accumulator tiles of a column, which has keys, and of a row, which has queries
class HiddenBits {
 public:
  static constexpr bool FITS = M <= 2 && (N == 2 || N == 4 || N == 8);

  // Starts the loads of a tile, if it is wanted and the mask lies so that it may.
  DEVICE void read(const MaskValues& mask, int first_key, int first_query, bool enabled) {
    is_there = false;
#pragma unroll
    for (int q = 0; q < QUERIES; ++q)
#pragma unroll
      for (int m = 0; m < CHUNKS; ++m) chunk[q][m] = Chunk{};
    if (!enabled || !mask.lies_in_chunks(first_query + 8 * N, first_key + 16 * M)) return;
    is_there = true;
#pragma unroll
    for (int q = 0; q < QUERIES; ++q)
#pragma unroll
      for (int m = 0; m < CHUNKS; ++m) {
        const int of_lane = N == 2 ? lane_index() / 16 : m;
        if (of_lane < M)
          mask.load_chunk(chunk[q][m], first_query + 8 * accumulator_tile() + lane_index() % 4 * 2 + parity(q), first_key + 16 * of_lane);
      }
  }

  // Makes bits of what has been read.
  DEVICE void make() {
    uint32 of_half[2] = {}, all = 0;  // byte b: keys 4 h + b and those 8, 16, 24 behind, in bits 0 to 3 of an even query and 4 to 7 of an odd one
#pragma unroll
    for (int q = 0; q < QUERIES; ++q)
#pragma unroll
      for (int m = 0; m < CHUNKS; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int shift = N == 2 ? i / 2 : 2 * m + i / 2;
          of_half[i % 2] += chunk[q][m].word[i] << (QUERIES == 2 ? shift + 4 * q : shift);
          all |= chunk[q][m].word[i];
        }
    is_there &= !any_lane((all & 0xfefefefeu) != 0);
    const int lane = lane_index();
    if constexpr (QUERIES == 1) {
      const int shift = 4 * parity(0) + (N == 2 ? lane / 16 * 2 : 0);
      of_half[0] <<= shift;
      of_half[1] <<= shift;
    }
    // The lower 16 lanes have keys 0 to 3 of each eight, and the upper ones the others.
    const bool is_upper = lane >= 16;
    const uint32 kept = of_half[is_upper], got = shfl_xor(int(of_half[!is_upper]), 16);
    if constexpr (N == 8) {
      word[0] = to_key(is_upper ? got : kept);
      word[1] = to_key(is_upper ? kept : got);
    } else {
      word[0] = to_key(kept + got);
      if constexpr (N == 2) word[0] |= word[0] >> 16;
    }
  }

  // Whether the mask lay so that it could be read in chunks.
  DEVICE bool are_there() const { return is_there; }

  // Gives `hidden` to what is hidden.
  DEVICE void apply(float (&c)[M][N][4], float hidden) const {
    for_each_place<M, N>([&](int m, int n, int i, int, int) {
      if (!(word[n / 4] & 1u << (n % 4 * 8 + 2 * m + i / 2 + i % 2 * 4))) c[m][n][i] = hidden;
    });
  }

 private:
  static constexpr int QUERIES = N == 8 ? 2 : 1, CHUNKS = N == 2 ? 1 : M;  // that a lane reads
  Chunk chunk[QUERIES][CHUNKS];
  uint32 word[ceil_div(N, 4)];
  bool is_there = false;

  // Of the eight lanes with the same columns each reads for one accumulator tile: both queries, or one of them.
  DEVICE static int accumulator_tile() { return lane_index() / 4 % N; }
  DEVICE static int parity(int q) { return N == 8 ? q : lane_index() / (4 * N) % 2; }

  // Of words with a byte for each of four lanes those bytes that are for this one, in their order. Lanes 4 apart exchange them.
  DEVICE static uint32 to_key(uint32 own) {
    const int lane = lane_index() / 4;
    const uint32 pairs = __byte_perm(own, uint32(shfl_xor(int(own), 8)), lane & 2 ? 0x3276 : 0x5410);
    return __byte_perm(pairs, uint32(shfl_xor(int(pairs), 4)), lane & 1 ? 0x3715 : 0x6240);
  }
};
