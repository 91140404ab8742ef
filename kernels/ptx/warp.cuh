// Exchanges inside a warp and barriers. PTX ISA 9.7.9.6 "shfl.sync", 9.7.13.1 "barrier", 9.7.13.9 "vote.sync".
#pragma once
#include "ptx/types.cuh"

DEVICE float shfl_xor(float x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }
DEVICE int shfl_xor(int x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }
DEVICE float shfl(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE int shfl(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// A number that is the same in all lanes, which the assembler cannot know: from here on it does.
DEVICE uint32 uniform(uint32 x) { return __shfl_sync(0xffffffffu, x, 0); }
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

DEVICE uint32 lanes_with(bool x) { return __ballot_sync(0xffffffffu, x); }  // bit i: of lane i
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE bool all_lanes(bool x) { return __all_sync(0xffffffffu, x); }

// Reductions over the four lanes that share an accumulator row.
DEVICE float quad_max(float x) {
  x = fmaxf(x, shfl_xor(x, 1));
  return fmaxf(x, shfl_xor(x, 2));
}
DEVICE float quad_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

DEVICE int lane_index() { return int(threadIdx.x) % WARP_SIZE; }

// The same, found out where it stands: what is computed from it takes no registers before. PTX ISA 10.3 "%laneid".
DEVICE int lane_index_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

DEVICE int warp_index() { return int(threadIdx.x) / WARP_SIZE; }
