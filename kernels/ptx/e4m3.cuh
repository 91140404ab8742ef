// Conversions of e4m3, the 8-bit float of caches, to and from wider types. sm_89 and later have instructions for it (PTX ISA 9.7.9.21 "cvt").
#pragma once
#include "ptx/convert.cuh"

#if __CUDA_ARCH__ >= 890
#define HAS_E4M3_CVT 1
#else
#define HAS_E4M3_CVT 0
#endif

// The nearest value; the largest one for what is larger.
template <>
DEVICE float8_e4m3fn from_float<float8_e4m3fn>(float x) {
  float8_e4m3fn y;
#if HAS_E4M3_CVT
  uint16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  y.bits = uint8(pair);
#else
  const uint32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80u;
  const uint32 magnitude = min(bits & 0x7fffffffu, __float_as_uint(448.0f));
  const uint32 normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - ((127 - 7) << 3);
  const uint32 subnormal = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - __float_as_uint(16384.0f);  // the sum is rounded to 2^-9
  y.bits = uint8(x == x ? sign | (magnitude < __float_as_uint(0.015625f) ? subnormal : normal) : 0x7fu);
#endif
  return y;
}

// The values in the lower half of `pair` as two neighbours of a wider type, which has them all.
//
// Without an instruction, their bits are put where the wider type has the low bits of its exponent and the high ones of its mantissa, and a product
// makes up for the other bias, exactly, subnormal numbers too. NaN has become 480 then, whose exponent is filled with ones.
template <typename Element>
DEVICE uint32 widen_e4m3(uint32 pair);

template <>
DEVICE uint32 widen_e4m3<float16>(uint32 pair) {
  uint32 y;
#if HAS_E4M3_CVT
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(uint16(pair)));
#else
  const uint32 spread = __byte_perm(pair, 0, 0x1404), magnitude = (spread & 0x7f007f00u) >> 1;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"((spread & 0x80008000u) | magnitude), "r"(0x5c005c00u));  // 2^8
  y |= ((magnitude + 0x00800080u) & 0x40004000u) >> 1;
#endif
  return y;
}

template <>
DEVICE uint32 widen_e4m3<bfloat16>(uint32 pair) {
  uint32 y;
#if HAS_E4M3_CVT
  const uint32 halves = widen_e4m3<float16>(pair);
  y = pack<bfloat16>(to_float(float16{uint16(halves)}), to_float(float16{uint16(halves >> 16)}));
#else
  const uint32 spread = __byte_perm(pair, 0, 0x1404), magnitude = (spread & 0x7f007f00u) >> 4;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"((spread & 0x80008000u) | magnitude), "r"(0x7b807b80u), "r"(0x80008000u));  // 2^120
  y |= ((magnitude + 0x00100010u) & 0x08000800u) / 2 * 15;
#endif
  return y;
}
