// Words in global memory that blocks share. PTX ISA 9.7.13.4 "membar", 9.7.13.6 "atom", 9.7.13.7 "red", 9.7.9 "ld", "st".
//
// Relaxed accesses order nothing by themselves. A fence before a relaxed write and behind a relaxed read of what it wrote orders everything before
// the one and behind the other.
#pragma once
#include "ptx/types.cuh"

#if __CUDA_ARCH__ >= 900
#define HAS_VECTOR_RED 1
#else
#define HAS_VECTOR_RED 0
#endif

DEVICE int load_relaxed(const int* address) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Returns what was there before.
DEVICE int fetch_add_relaxed(int* address, int addend) {
  int value;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(value) : "l"(address), "r"(addend) : "memory");
  return value;
}

// The same with 1, below 2^32 - 1. ptxas sums up an `add` of the lanes of a warp and hands each its part, for which it waits at once. It takes an
// `inc` of all 32 bits for one, and leaves this one alone.
DEVICE uint32 fetch_increment_relaxed(uint32* address) {
  uint32 value;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(value) : "l"(address), "r"(0xfffffffeu) : "memory");
  return value;
}

DEVICE void add_relaxed(int* address, int addend) { asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(addend) : "memory"); }

DEVICE void add_relaxed(float* address, float addend) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(addend) : "memory");
}

DEVICE void load_relaxed(const float* address, float (&values)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "l"(address)
               : "memory");
}

DEVICE void store_relaxed(float* address, const float (&values)[4]) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

#if HAS_VECTOR_RED
// Four neighbours on 16 bytes, each as if by itself.
DEVICE void add_relaxed(float* address, const float (&addend)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(addend[0]), "f"(addend[1]), "f"(addend[2]),
               "f"(addend[3])
               : "memory");
}
#endif

DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
