// What the files of floating-point instructions share: flushing subnormals, saturation, and registering an instruction with these variants.
#pragma once

#include "table.h"

namespace sim {

// A subnormal becomes zero of the same sign.
SIM_INLINE Vec<f32> flush(Vec<f32> value) {
  const Vec<u32> word = as<u32>(value);
  return as<f32>((word & 0x7f800000u) == 0u ? word & 0x80000000u : word);
}
SIM_INLINE f32 flush(f32 value) {
  const u32 word = bits<u32>(value);
  return (word & 0x7f800000u) == 0 ? bits<f32>(word & 0x80000000u) : value;
}

// An f32 operand whose subnormals count as zero.
struct FlushedF32 {};
template <> struct LaneType<FlushedF32> {
  using Storage = u32;
  static SIM_INLINE f32 load(u32 word) { return flush(bits<f32>(word)); }
};

// Clamps to [0, 1]; NaN becomes 0.
SIM_INLINE Vec<f32> saturate(Vec<f32> value) {
  const Vec<f32> low = value > 0.0f ? value : splat(0.0f);
  return low < 1.0f ? low : splat(1.0f);
}
SIM_INLINE f32 saturate(f32 value) {
  const f32 low = value > 0.0f ? value : 0.0f;
  return low < 1.0f ? low : 1.0f;
}

// The function F on floats with .ftz and .sat applied around it; works for vectors and for scalars.
template <class F, bool FTZ, bool SAT> struct Modified {
  template <class V> static SIM_INLINE V before(V value) { return FTZ ? flush(value) : value; }
  template <class V> static SIM_INLINE V after(V value) {
    const V flushed = FTZ ? flush(value) : value;
    return SAT ? saturate(flushed) : flushed;
  }
  template <class V> requires std::is_invocable_v<F, V> SIM_INLINE V operator()(V a) const { return after((V)F{}(before(a))); }
  template <class V> requires std::is_invocable_v<F, V, V> SIM_INLINE V operator()(V a, V b) const { return after((V)F{}(before(a), before(b))); }
  template <class V> requires std::is_invocable_v<F, V, V, V> SIM_INLINE V operator()(V a, V b, V c) const {
    return after((V)F{}(before(a), before(b), before(c)));
  }
};

// Registers stem.f32 and stem.ftz.f32 for a function of vectors; with SAT also stem.sat.f32 and stem.ftz.sat.f32.
template <bool SAT = false, class F> void add_f32(Table& table, const std::string& stem, const std::string& signature, F) {
  table.add(stem + ".f32", signature, map<f32>(Modified<F, false, false>{}));
  table.add(stem + ".ftz.f32", signature, map<f32>(Modified<F, true, false>{}));
  if constexpr (SAT) {
    table.add(stem + ".sat.f32", signature, map<f32>(Modified<F, false, true>{}));
    table.add(stem + ".ftz.sat.f32", signature, map<f32>(Modified<F, true, true>{}));
  }
}

// The same for a function of scalars.
template <class... S, class F> void add_f32_each(Table& table, const std::string& stem, const std::string& signature, F) {
  table.add(stem + ".f32", signature, each<f32, S...>(Modified<F, false, false>{}));
  table.add(stem + ".ftz.f32", signature, each<f32, S...>(Modified<F, true, false>{}));
}

// minimum and maximum of the PTX ISA: of two operands of which one is a NaN the other; -0 is below +0.
template <class T> SIM_INLINE T sign_bits_and(T a, T b) {
  if constexpr (std::is_same_v<T, f32>) return bits<f32>(bits<u32>(a) & bits<u32>(b));
  else if constexpr (std::is_same_v<T, f64>) return bits<f64>(bits<u64>(a) & bits<u64>(b));
  else return as<f32>(as<u32>(a) & as<u32>(b));
}
template <class T> SIM_INLINE T sign_bits_or(T a, T b) {
  if constexpr (std::is_same_v<T, f32>) return bits<f32>(bits<u32>(a) | bits<u32>(b));
  else if constexpr (std::is_same_v<T, f64>) return bits<f64>(bits<u64>(a) | bits<u64>(b));
  else return as<f32>(as<u32>(a) | as<u32>(b));
}
template <class T> SIM_INLINE T minimum(T a, T b) {
  const T smaller = a < b ? a : b;  // b when a is a NaN
  const T ordered = a == b ? sign_bits_or(a, b) : smaller;
  return b != b ? a : ordered;
}
template <class T> SIM_INLINE T maximum(T a, T b) {
  const T larger = a > b ? a : b;
  const T ordered = a == b ? sign_bits_and(a, b) : larger;
  return b != b ? a : ordered;
}
// The variants with .NaN: a NaN if any operand is one.
template <class T> SIM_INLINE T minimum_nan(T a, T b) { return a != a ? a : b != b ? b : minimum(a, b); }
template <class T> SIM_INLINE T maximum_nan(T a, T b) { return a != a ? a : b != b ? b : maximum(a, b); }

}  // namespace sim
