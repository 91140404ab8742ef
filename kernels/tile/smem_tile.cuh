// A matrix of ROWS x WIDTH elements in shared memory, row-major in 16-byte chunks, swizzled so that the reads of matrix products are free of bank
// conflicts for any WIDTH, which is that of a head or of a piece of one.
//
// A row is PITCH chunks. Eight chunks make one pass over the 32 banks, so eight consecutive rows at the same column fall on only
// 8 / gcd(PITCH, 8) different chunk slots. The swizzle exchanges chunks inside aligned groups of SWIZZLE = gcd(PITCH, 8):
//
//     chunk' = chunk ^ ((row / (8 / SWIZZLE)) % SWIZZLE)
//
// so that the eight rows that ldmatrix reads at once, and the eight chunks that neighbouring threads store at once, lie on eight slots.
// For PITCH = 8 (64 columns of 16 bits) this is the usual chunk ^ (row % 8).
//
// Columns past WIDTH up to a multiple of 16 are zero: they take part in the matrix products. A 32-bit tile is read by columns one word
// at a time, which needs all eight slots: its pitch is a multiple of 8. Of it two neighbouring rows also differ in the third bit of the slot, so
// that four chunks of both, and two of four rows, lie on eight slots: copies of narrow rows, and accumulators on their way out.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

template <typename SmemElement_, int ROWS_, int WIDTH_>
struct SmemTile {
  using SmemElement = SmemElement_;
  static constexpr int ROWS = ROWS_;
  static constexpr int WIDTH = WIDTH_;
  static constexpr int CHUNK_ELEMENTS = 16 / int(sizeof(SmemElement));
  static constexpr int COLUMNS = round_up(WIDTH, 16);
  static constexpr int CHUNKS = COLUMNS / CHUNK_ELEMENTS;
  static constexpr int PITCH = sizeof(SmemElement) == 4 ? round_up(CHUNKS, 8) : CHUNKS;
  static constexpr int SWIZZLE = gcd(PITCH, 8);
  static constexpr int ROW_BYTES = PITCH * 16;
  static constexpr int BYTES = ROWS * ROW_BYTES;

  // Unsigned, so that the compiler sees that eight rows more change nothing.
  DEVICE static int swizzle(int row) {
    const int exchanged = int(uint32(row) / (8 / SWIZZLE) % SWIZZLE);
    return sizeof(SmemElement) == 4 ? exchanged ^ exchanged % 2 * 4 : exchanged;
  }

  DEVICE static int offset(int row, int chunk) { return row * ROW_BYTES + (chunk ^ swizzle(row)) * 16; }

  // The address `row` rows (a multiple of 8) and `chunk` chunks (even) away from a lane's place `lane_offset` = offset(lane_row, 0 or 1): adding
  // to the row leaves the swizzle as it is, and the low bits of an even chunk enter by exclusive or. What is left to compute in a loop is nothing:
  // a few lane offsets, one uniform tile address, immediates.
  DEVICE static SmemAddress at(SmemAddress tile, int lane_offset, int row, int chunk) {
    return tile + ((lane_offset ^ ((chunk % SWIZZLE) * 16)) + (chunk / SWIZZLE) * (SWIZZLE * 16) + row * ROW_BYTES);
  }
};

// Multiplies a tile in shared memory, by NUM_THREADS neighbouring threads.
template <typename Tile, int NUM_THREADS>
DEVICE void multiply_tile(SmemAddress tile, float factor) {
#pragma unroll 1
  for (int index = int(threadIdx.x) % NUM_THREADS; index < Tile::ROWS * Tile::CHUNKS; index += NUM_THREADS) {
    const SmemAddress address = tile + Tile::offset(index / Tile::CHUNKS, index % Tile::CHUNKS);
    Chunk chunk = load_shared(address);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(typename Tile::SmemElement) == 4) {
        chunk.word[i] = __float_as_uint(__uint_as_float(chunk.word[i]) * factor);
      } else {
        using Element = typename Tile::SmemElement;
        const float low = to_float(Element{uint16(chunk.word[i])}), high = to_float(Element{uint16(chunk.word[i] >> 16)});
        chunk.word[i] = pack<Element>(low * factor, high * factor);
      }
    }
    store_shared(address, chunk);
  }
}
