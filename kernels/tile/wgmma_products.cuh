// The products of a warpgroup as groups in flight (ptx/wgmma.cuh): each function issues one group, for whose end `wgmma_wait` waits.
#pragma once
#include "ptx/convert.cuh"
#include "tile/constants.cuh"
#include "tile/slab_tile.cuh"

// C = A Bᵀ over STEPS steps of 16 columns, or C += A Bᵀ. A and B are descriptors of a TileA and a TileB; a warpgroup has 64 rows of A.
template <typename TileA, typename TileB, int STEPS, bool ADDS = false, int N>
DEVICE void issue_rows(float (&c)[1][N][4], uint64 a, uint64 b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < STEPS; ++k) Wgmma<Element, N>::from_shared(c[0], TileA::columns(a, k), TileB::columns(b, k), ADDS || k > 0);
  wgmma_commit();
}

// The same, the first steps of A in registers.
template <typename TileA, typename TileB, int STEPS, bool ADDS = false, int FIRST_STEPS, int N>
DEVICE void issue_rows(float (&c)[1][N][4], const uint32 (&first)[FIRST_STEPS][4], uint64 a, uint64 b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    if (k < FIRST_STEPS) {
      Wgmma<Element, N>::from_registers_over_columns(c[0], first[k], TileB::columns(b, k), ADDS || k > 0);
    } else {
      Wgmma<Element, N>::from_shared(c[0], TileA::columns(a, k), TileB::columns(b, k), true);
    }
  }
  wgmma_commit();
}

// C += A B over all rows of B, A packed in registers.
template <typename TileB, int STEPS, int N>
DEVICE void issue_accumulator(float (&c)[1][N][4], const uint32 (&a)[STEPS][4], uint64 b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < STEPS; ++k) Wgmma<Element, N>::from_registers(c[0], a[k], TileB::rows(b, k));
  wgmma_commit();
}

// C += A B over all rows of B, A a TileA in shared memory.
template <typename TileA, typename TileB, int STEPS, int N>
DEVICE void issue_shared(float (&c)[1][N][4], uint64 a, uint64 b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < STEPS; ++k) Wgmma<Element, N>::from_shared_over_rows(c[0], TileA::columns(a, k), TileB::rows(b, k));
  wgmma_commit();
}

// Scores as the A operand of the next product.
template <int N>
DEVICE void pack_accumulator(uint32 (&a)[N / 2][4], const float (&c)[1][N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&tile)[4] = c[0][2 * k + i / 2];
      a[k][i] = pack<Element>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
    }
}
