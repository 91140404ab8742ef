// Two numbers of 16 bits in a word. PTX ISA 9.7.1 "min", 9.7.7 "set"; both take such words from sm_90 on.
#pragma once
#include "ptx/types.cuh"

// The smaller of each pair of halves, as integers without a sign.
DEVICE uint32 min_of_halves(uint32 x, uint32 y) {
  uint32 z;
  asm("min.u16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// All bits of a half where both are the same bfloat16 number: NaN is none, and -0 is 0.
DEVICE uint32 equal_halves(uint32 x, uint32 y) {
  uint32 mask;
  asm("set.eq.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(x), "r"(y));
  return mask;
}

// All bits of a half where that of x is greater, as an integer without a sign.
DEVICE uint32 greater_halves(uint32 x, uint32 y) { return __vcmpgtu2(x, y); }
