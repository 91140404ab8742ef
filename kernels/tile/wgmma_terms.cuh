// The products of a warpgroup where each number of float32 is a sum of three of bfloat16, its terms (operand_terms.cu): of nine products of terms the
// six largest, small ones first, so that tensor cores, which cut off where they add, do so while sums are small. As in wgmma_products.cuh each
// function issues one group.
#pragma once
#include "ptx/convert.cuh"
#include "tile/constants.cuh"
#include "tile/wgmma_block.cuh"

constexpr int TERM_PRODUCTS = 6;

// Which term of A and of B the products multiply, 0 the highest: those that together are at most 2.
DEVICE constexpr int term_of_a(int product) { return product == 0 ? 2 : product == 1 ? 0 : product == 2 ? 1 : product == 3 ? 1 : 0; }
DEVICE constexpr int term_of_b(int product) {
  return product == 0 ? 0 : product == 1 ? 2 : product == 2 ? 1 : product == 3 ? 0 : product == 4 ? 1 : 0;
}

// Slabs of one term of a tile.
template <typename Tile>
constexpr int SLABS_OF_TERM = Tile::SLABS / TERMS;

// The same descriptor, of which the compiler knows nothing: those of all products, computed before a loop, would take more registers than there are.
DEVICE uint64 of_this_step(uint64 descriptor) {
  asm volatile("" : "+l"(descriptor));
  return descriptor;
}

// C = A Bᵀ over STEPS steps of 16 columns. A and B are descriptors of a TileA and a TileB.
template <typename TileA, typename TileB, int STEPS, int N>
DEVICE void issue_rows_of_terms(float (&c)[1][N][4], uint64 a, uint64 b) {
  constexpr int STEPS_OF_SLAB = SLAB_COLUMNS / 16;
  if constexpr (SLABS_OF_TERM<TileA> > 1) a = of_this_step(a);
  if constexpr (SLABS_OF_TERM<TileB> > 1) b = of_this_step(b);
  wgmma_fence();
#pragma unroll
  for (int product = 0; product < TERM_PRODUCTS; ++product)
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const int of_a = term_of_a(product) * SLABS_OF_TERM<TileA> * STEPS_OF_SLAB, of_b = term_of_b(product) * SLABS_OF_TERM<TileB> * STEPS_OF_SLAB;
      Wgmma<bfloat16, N>::from_shared(c[0], TileA::columns(a, of_a + k), TileB::columns(b, of_b + k), product + k > 0);
    }
  wgmma_commit();
}

// C = A B over all rows of B, A split in registers; of its columns those from slab FIRST_SLAB on.
template <typename TileB, int FIRST_SLAB, int STEPS, int N>
DEVICE void issue_accumulator_of_terms(float (&c)[1][N][4], const uint32 (&a)[TERMS][STEPS][4], uint64 b) {
  if constexpr (SLABS_OF_TERM<TileB> > 1) b = of_this_step(b);
  wgmma_fence();
#pragma unroll
  for (int product = 0; product < TERM_PRODUCTS; ++product)
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const int of_b = (term_of_b(product) * SLABS_OF_TERM<TileB> + FIRST_SLAB) * (TileB::SLAB_BYTES / DESCRIPTOR_UNIT);
      Wgmma<bfloat16, N>::from_registers(c[0], a[term_of_a(product)][k], TileB::rows(b + of_b, k), product + k > 0);
    }
  wgmma_commit();
}

// Scores as the A operand of the next product. The highest term is rounded, so that what is left over has either sign; the others are cut off, which
// leaves nothing over.
template <int N>
DEVICE void split_accumulator(uint32 (&a)[TERMS][N / 2][4], const float (&c)[1][N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&tile)[4] = c[0][2 * k + i / 2];
      const uint32 high = pack<bfloat16>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
      const float first = tile[i % 2 * 2] - __uint_as_float(high << 16), second = tile[i % 2 * 2 + 1] - __uint_as_float(high & 0xffff0000u);
      const uint32 middle_of_first = __float_as_uint(first) & 0xffff0000u, middle_of_second = __float_as_uint(second) & 0xffff0000u;
      a[0][k][i] = high;
      a[1][k][i] = middle_of_first >> 16 | middle_of_second;
      a[2][k][i] = pair_of_upper_halves(first - __uint_as_float(middle_of_first), second - __uint_as_float(middle_of_second));
    }
}
