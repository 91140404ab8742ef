// The 8-bit floats e4m3 and e5m2 as f32 and back.
//
// Contract: an 8-bit value sits in the low byte of a 32-bit lane, what is above is ignored. e4m3 has no infinity, its largest magnitudes 0x7f and
// 0xff are NaN; e5m2 is an f16 without its low byte. Narrowing rounds to nearest even and saturates to the largest finite number
// (.satfinite of the PTX ISA); a NaN becomes 0x7f.
#pragma once

#include "half.h"

namespace sim {

SIM_INLINE Vec<f32> e4m3_to_f32(Vec<u32> value) {
  const Vec<u32> magnitude = (value & 0x7fu) << 20;
  const Vec<u32> finite = as<u32>(as<f32>(magnitude) * 0x1p120f);  // moves the exponent bias from 7 to 127; exact, subnormals too
  return as<f32>((value & 0x80u) << 24 | (magnitude == 0x07f00000u ? splat<u32>(0x7fc00000) : finite));
}
SIM_INLINE Vec<f32> e5m2_to_f32(Vec<u32> value) { return f16_to_f32((value & 0xffu) << 8); }

// FRACTION bits of fraction, exponent bias BIAS, largest finite magnitude MAX.
template <int FRACTION, int BIAS, u32 MAX> SIM_INLINE Vec<u32> f32_to_fp8(Vec<f32> value) {
  constexpr int DROPPED = 23 - FRACTION;
  const Vec<u32> word = as<u32>(value), magnitude = word & 0x7fffffffu;
  // As for f16: normal results round the dropped bits, then move the bias; for subnormal results an addition aligns the last place.
  const Vec<u32> normal = (magnitude + ((1u << (DROPPED - 1)) - 1u) + ((magnitude >> DROPPED) & 1u) - (u32(127 - BIAS) << 23)) >> DROPPED;
  constexpr u32 ALIGN = u32(127 - BIAS + 1 + DROPPED) << 23;  // a power of two whose last place is that of the subnormals
  const Vec<u32> subnormal = as<u32>(as<f32>(magnitude) + bits<f32>(ALIGN)) - ALIGN;
  const Vec<u32> rounded = magnitude < (u32(128 - BIAS) << 23) ? subnormal : normal;
  const Vec<u32> finite = rounded > MAX ? splat<u32>(MAX) : rounded;
  return is_nan(value) ? splat<u32>(0x7f) : (word >> 24 & 0x80u) | finite;
}
SIM_INLINE Vec<u32> f32_to_e4m3(Vec<f32> value) { return f32_to_fp8<3, 7, 0x7e>(value); }
SIM_INLINE Vec<u32> f32_to_e5m2(Vec<f32> value) { return f32_to_fp8<2, 15, 0x7b>(value); }

}  // namespace sim
