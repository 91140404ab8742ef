// Half and bfloat16 numbers: conversions of scalars and of vectors.
//
// Contract: round to nearest even unless the name says otherwise; subnormals are kept; a NaN becomes the canonical NaN of the PTX ISA
// (0x7fff) when it is narrowed. A 16-bit value sits in the low half of a 32-bit lane.
#pragma once

#include "lanes.h"

namespace sim {

// ---- bfloat16

SIM_INLINE f32 bf16_to_f32(u32 value) { return bits<f32>(value << 16); }
SIM_INLINE Vec<f32> bf16_to_f32(Vec<u32> value) { return as<f32>(value << 16); }

SIM_INLINE u32 f32_to_bf16(f32 value) {
  const u32 word = bits<u32>(value);
  const u32 rounded = (word + 0x7fffu + ((word >> 16) & 1)) >> 16;
  return value != value ? 0x7fffu : rounded;
}
SIM_INLINE Vec<u32> f32_to_bf16(Vec<f32> value) {
  const Vec<u32> word = as<u32>(value);
  const Vec<u32> rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  return is_nan(value) ? splat<u32>(0x7fff) : rounded;
}

// ---- half

SIM_INLINE f32 f16_to_f32(u32 value) {
  const u32 magnitude = (value & 0x7fffu) << 13;
  const u32 sign = (value & 0x8000u) << 16;
  const u32 finite = bits<u32>(bits<f32>(magnitude) * 0x1p112f);  // moves the exponent bias from 15 to 127; exact, subnormals too
  const u32 special = magnitude | 0x7f800000u;                    // infinity and NaN
  return bits<f32>(sign | ((value & 0x7c00u) == 0x7c00u ? special : finite));
}
SIM_INLINE Vec<f32> f16_to_f32(Vec<u32> value) {
#if defined(SIM_AVX512)
  return (Vec<f32>)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)value));
#else
  const Vec<u32> magnitude = (value & 0x7fffu) << 13;
  const Vec<u32> sign = (value & 0x8000u) << 16;
  const Vec<u32> finite = as<u32>(as<f32>(magnitude) * 0x1p112f);
  return as<f32>(sign | ((value & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
#endif
}

SIM_INLINE u32 f32_to_f16(f32 value) {
  const u32 word = bits<u32>(value);
  const u32 sign = (word >> 16) & 0x8000u;
  const u32 magnitude = word & 0x7fffffffu;
  // Normal results: round the 13 dropped bits, then move the bias. Subnormal results: an addition aligns the last place.
  const u32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const u32 subnormal = bits<u32>(bits<f32>(magnitude) + 0.5f) - 0x3f000000u;
  u32 result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  return magnitude > 0x7f800000u ? 0x7fffu : sign | result;
}
SIM_INLINE Vec<u32> f32_to_f16(Vec<f32> value) {
#if defined(SIM_AVX512)
  const Vec<u32> rounded = (Vec<u32>)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return is_nan(value) ? splat<u32>(0x7fff) : rounded;
#else
  const Vec<u32> word = as<u32>(value);
  const Vec<u32> sign = (word >> 16) & 0x8000u;
  const Vec<u32> magnitude = word & 0x7fffffffu;
  const Vec<u32> normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const Vec<u32> subnormal = as<u32>(as<f32>(magnitude) + 0.5f) - 0x3f000000u;
  Vec<u32> result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? splat<u32>(0x7c00) : result;
  return magnitude > 0x7f800000u ? splat<u32>(0x7fff) : sign | result;
#endif
}

// A sum or product computed in double, rounded once: to the nearest representable after an odd rounding to float.
SIM_INLINE f32 round_to_odd(f64 value) {
  const f32 nearest = f32(value);
  if (f64(nearest) == value || value != value || nearest - nearest != 0) return nearest;
  const u32 word = bits<u32>(nearest);
  const bool away = (nearest < 0 ? -f64(nearest) : f64(nearest)) > (value < 0 ? -value : value);
  return bits<f32>((away ? word - 1 : word) | 1u);
}

// A sum that is rounded once more later: one that is not exact gets an odd last bit, so that a tie then is one only if the sum is.
SIM_INLINE f64 sum_to_odd(f64 a, f64 b) {
  const f64 sum = a + b, from_b = sum - a, error = (a - (sum - from_b)) + (b - from_b);  // sum + error is exact
  const u64 word = bits<u64>(sum);
  if (error == 0 || error != error || word & 1) return sum;
  return bits<f64>((error > 0) == (sum > 0) ? word + 1 : word - 1);
}

}  // namespace sim
