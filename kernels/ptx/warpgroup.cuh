// Four consecutive warps, the first of which is a multiple of four: what issues wgmma. PTX ISA 9.7.13.1 "barrier", 9.7.19.5 "setmaxnreg".
#pragma once
#include "ptx/types.cuh"

constexpr int WARPGROUP_SIZE = 128;

// The same number in every lane, and known to be: what is computed from it alone stays in uniform registers.
DEVICE int warpgroup_index() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / WARPGROUP_SIZE, 0); }
DEVICE int warp_of_warpgroup() { return __shfl_sync(0xffffffffu, int(threadIdx.x) % WARPGROUP_SIZE / WARP_SIZE, 0); }

// Hands registers beyond `REGISTERS` of each thread back to the block.
template <int REGISTERS>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Waits until each thread can have so many.
template <int REGISTERS>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// A barrier of so many threads, whole warps, by a number of its own; barrier 0 is the block's.
DEVICE void sync_threads_of(int barrier, int num_threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory"); }

// A barrier of this warpgroup alone, by a number of its own; barrier 0 is the block's.
DEVICE void sync_warpgroup(int barrier) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(WARPGROUP_SIZE) : "memory"); }
