// Conversions between float32 and the storage types, round to nearest even. PTX ISA 9.7.9.21 "cvt".
//
// What an architecture lacks (packed cvt before sm_80, bfloat16 before sm_80) is written out with what it has.
#pragma once
#include "ptx/types.cuh"

#if __CUDA_ARCH__ >= 800
#define HAS_PACKED_CVT 1
#else
#define HAS_PACKED_CVT 0
#endif

DEVICE float to_float(float x) { return x; }

DEVICE float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32(x.bits) << 16); }

template <typename Element>
DEVICE Element from_float(float x);

template <>
DEVICE float from_float<float>(float x) {
  return x;
}

template <>
DEVICE float16 from_float<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <>
DEVICE bfloat16 from_float<bfloat16>(float x) {
  bfloat16 y;
#if HAS_PACKED_CVT
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32 bits = __float_as_uint(x);
  const uint32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  y.bits = x == x ? uint16(rounded) : uint16(0x7fff);
#endif
  return y;
}

// Two neighbours in one 32-bit register, `low` in the low half.
template <typename Element>
DEVICE uint32 pack(float low, float high);

template <>
DEVICE uint32 pack<float16>(float low, float high) {
  uint32 y;
#if HAS_PACKED_CVT
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }" : "=r"(y) : "f"(low), "f"(high));
#endif
  return y;
}

template <>
DEVICE uint32 pack<bfloat16>(float low, float high) {
#if HAS_PACKED_CVT
  uint32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return uint32(from_float<bfloat16>(low).bits) | uint32(from_float<bfloat16>(high).bits) << 16;
#endif
}

// The same of numbers below zero as 0.
template <typename Element>
DEVICE uint32 pack_positive(float low, float high) {
#if HAS_PACKED_CVT
  uint32 y;
  if constexpr (SameType<Element, float16>::value) asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  if constexpr (SameType<Element, bfloat16>::value) asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return pack<Element>(low < 0.0f ? 0.0f : low, high < 0.0f ? 0.0f : high);
#endif
}

// The upper halves of two numbers in one 32-bit register, that of `low` in the low half: bfloat16 that cuts off.
DEVICE uint32 pair_of_upper_halves(float low, float high) { return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632); }

// The nearest TF32 value (10 explicit mantissa bits), ties away from zero, as the bits of a float32.
DEVICE uint32 to_tf32(float x) {
  uint32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// The same in two instructions where the assembler makes four of cvt, but of NaN, which may become a zero: x less it is NaN.
DEVICE uint32 round_to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }
