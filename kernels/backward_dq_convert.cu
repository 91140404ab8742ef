// Behind backward_fused_mma.cu or backward_wgmma.cu: dQ of the sums that its blocks have added up, scaled and converted. Tiles that no key has been
// added to are 0.
//
// A block has one tile of TILE_Q queries, each warp 16 of them. Shared memory: dQ [TILE_Q][D], through which rows leave whole.
#include "tile/constants.cuh"
#include "tile/epilogue.cuh"
#include "tile/fragment.cuh"
#include "tile/packed_tiles.cuh"
#include "tile/query_sums.cuh"
#include "tile/sequence.cuh"

constexpr int TOGETHER =
    8;  // accumulator tiles of a chain that are asked for before the first is used: all of a wide head would not fit the registers

static_assert(TILE_Q == 16 * NUM_WARPS, "a warp has 16 rows");
static_assert(TileQ::BYTES == Config::SHARED_BYTES, "shared memory differs from the plan's");

// The warp's numbers of accumulator tile n of a slot.
DEVICE void load_sum(const BackwardArguments& arguments, int slot, int n, float (&sum)[4]) {
  if constexpr (TRANSPOSED_SUMS) {
    load_transposed_fragment(arguments, slot, warp_index(), n, sum);
  } else {
    load_fragment(query_sum(arguments, slot, warp_index(), n), sum);
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_dq_convert(const __grid_constant__ BackwardArguments arguments) {
  const Work work = work_in_order<false, true>(arguments, arguments.geometry.num_heads_q);
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  auto clear_gradients = [&](int begin, int end, int tile, int num_tiles) {
    clear_rows<Element, NUM_THREADS, TILE_Q, HEAD_DIM>(arguments.grad_query, work, begin, end, tile, num_tiles);
  };
  if (!claim_rows<TILE_Q>(arguments, packed_queries(arguments), work, clear_gradients)) return;
  extern __shared__ __align__(128) uint8 shared[];

  float dQ[1][D_TILES][4];
  clear(dQ);
  const int slot = first_slot(arguments, work.batch, work.head, start_q) + work.tile;
  if constexpr (Config::SPLIT) {  // each chain has sums of its own (tile/query_splits.cuh)
#pragma unroll
    for (int first = 0; first < D_TILES; first += TOGETHER)
#pragma unroll 1
      for (int chain = 0, of_chain = slot; chain < arguments.splits.num_chains; ++chain, of_chain += arguments.splits.chain_slots) {
        if (arguments.turns[1 + of_chain] == 0) continue;
#pragma unroll
        for (int n = first; n < min(first + TOGETHER, D_TILES); ++n) {
          float sum[4];
          load_sum(arguments, of_chain, n, sum);
          add(dQ[0][n], sum);
        }
      }
  } else if (arguments.turns[1 + slot] != 0) {
#pragma unroll
    for (int n = 0; n < D_TILES; ++n) load_sum(arguments, slot, n, dQ[0][n]);
  }
  multiply_all(dQ, arguments.geometry.scale);
  const int num_rows = sequence_length(packed_queries(arguments), work.batch);
  store_slice<HEAD_DIM, TileQ>(dQ, smem_address(shared), 16 * warp_index(), arguments.grad_query, work, work.tile * TILE_Q, num_rows, start_q);
}
