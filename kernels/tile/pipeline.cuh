// Waiting for tiles on their way into shared memory, the same for cp.async (groups in order of their commit) and for staged registers.
#pragma once
#include "tile/load.cuh"

// Makes the tiles of all but the last PENDING committed groups visible to the whole block. `land` stores what was staged in registers.
template <int PENDING, typename Land>
DEVICE void wait_for_tiles(Land land) {
  land();
  cp_async_wait_group<PENDING>();
  __syncthreads();
}
