// The pipeline of a walk over tiles: NUM_STAGES stages in shared memory, filled ahead and taken in turn, one copy group for each step of the walk.
//
//     fill_pipeline(begin, issue);
//     for (int step = begin; step < end; ++step) {
//       begin_step(step, issue, land);  // the tiles of `step` are in stage_of(step), for all warps
//       ...
//       end_step();
//     }
//
// `issue(step)` starts the copies of a step into its stage, none from `end` on, and commits them as one group in any case; `land()` ends those that
// do not end by themselves (tile/load.cuh). Heads that pass through shared memory in pieces have no pipeline: their products copy for themselves
// (tile/products.cuh).
#pragma once
#include "tile/constants.cuh"
#include "tile/load.cuh"

DEVICE int stage_of(int step) { return NUM_STAGES == 1 ? 0 : step % NUM_STAGES; }

// Makes the tiles of all but the last PENDING committed groups visible to the whole block. `land` stores what was staged in registers; loaders that
// do not stage need none.
template <int PENDING, typename Land>
DEVICE void wait_for_tiles(Land land) {
  land();
  cp_async_wait_group<PENDING>();
  __syncthreads();
}
template <int PENDING>
DEVICE void wait_for_tiles() {
  cp_async_wait_group<PENDING>();
  __syncthreads();
}

template <typename Issue>
DEVICE void fill_pipeline(int begin, const Issue& issue) {
#pragma unroll
  for (int ahead = 0; ahead < NUM_STAGES - 1; ++ahead) issue(begin + ahead);
}

template <typename Issue, typename Land>
DEVICE void begin_step(int step, const Issue& issue, const Land& land) {
  if constexpr (SLICE_PIECES == 1) {
    if constexpr (NUM_STAGES == 1) {
      issue(step);
      wait_for_tiles<0>(land);  // nothing travels ahead
    } else {
      wait_for_tiles<NUM_STAGES - 2>();  // the tiles have landed; every warp is done with those before, whose stage is next
      issue(step + NUM_STAGES - 1);
    }
  }
}

DEVICE void end_step() {
  if constexpr (SLICE_PIECES == 1 && NUM_STAGES == 1) __syncthreads();  // every warp is done with the only stage
}
