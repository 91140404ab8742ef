// ex2, lg2, sqrt, rsqrt, sin, cos and tanh: the approximate functions of the special function unit.
//
// Contract: more accurate than the hardware (about one unit in the last place), with the special values of the PTX ISA. ex2 and tanh are
// vectorised, since a softmax calls them for every score.
#include <cmath>

#include "float.h"

namespace sim {
namespace {

// 2^x: the fraction in [-1/2, 1/2] by a polynomial, the integer by two exact scalings, so that subnormal results come out rounded once.
SIM_INLINE Vec<f32> exp2(Vec<f32> x) {
  const Vec<f32> low = x < -151.0f ? splat(-151.0f) : x;
  const Vec<f32> clamped = low > 129.0f ? splat(129.0f) : low;
  const Vec<f32> whole = round_small(clamped);
  const Vec<f32> f = clamped - whole;
  Vec<f32> p = splat(1.535336188319500e-4f);
  p = fused_multiply_add(p, f, splat(1.339887440266574e-3f));
  p = fused_multiply_add(p, f, splat(9.618437357674640e-3f));
  p = fused_multiply_add(p, f, splat(5.550332471162809e-2f));
  p = fused_multiply_add(p, f, splat(2.402264791363012e-1f));
  p = fused_multiply_add(p, f, splat(6.931472028550421e-1f));
  p = fused_multiply_add(p, f, splat(1.0f));
  const Vec<i32> exponent = to_int(whole);
  const Vec<i32> half = exponent >> 1;
  const Vec<f32> scale1 = as<f32>((half + 127) << 23);
  const Vec<f32> scale2 = as<f32>((exponent - half + 127) << 23);
  return is_nan(x) ? x : p * scale1 * scale2;
}

// tanh |x| = (1 - t) / (1 + t) with t = exp(-2 |x|); near zero its series, where that would cancel.
SIM_INLINE Vec<f32> hyperbolic_tangent(Vec<f32> x) {
  const Vec<f32> magnitude = absolute(x);
  const Vec<f32> t = exp2(magnitude * -2.885390081777927f);
  const Vec<f32> large = (1.0f - t) / (1.0f + t);
  const Vec<f32> square = x * x;
  Vec<f32> series = splat(-0.05396825396825397f);
  series = fused_multiply_add(series, square, splat(0.13333333333333333f));
  series = fused_multiply_add(series, square, splat(-0.3333333333333333f));
  const Vec<f32> small = fused_multiply_add(series * square, magnitude, magnitude);
  const Vec<f32> result = magnitude < 0.25f ? small : large;
  return is_nan(x) ? x : as<f32>(as<u32>(result) | (as<u32>(x) & 0x80000000u));
}

template <bool BF16> SIM_INLINE Vec<f32> widen(Vec<u32> value) { return BF16 ? bf16_to_f32(value) : f16_to_f32(value & 0xffffu); }
template <bool BF16> SIM_INLINE Vec<u32> narrow(Vec<f32> value) { return BF16 ? f32_to_bf16(value) : f32_to_f16(value); }

template <bool BF16, class F> void add_half(Table& table, const std::string& stem, const std::string& type, F) {
  table.add(stem + "." + type + " " + stem + ".ftz." + type, "d32 a32", map<u32>([](auto a) { return narrow<BF16>(F{}(widen<BF16>(a))); }));
  table.add(stem + "." + type + "x2 " + stem + ".ftz." + type + "x2", "d32 a32",
            map<u32>([](auto a) { return narrow<BF16>(F{}(widen<BF16>(a))) | narrow<BF16>(F{}(widen<BF16>(a >> 16))) << 16; }));
}

}  // namespace

void register_special_functions(Table& table) {
  table.family(Class::MUFU);
  const auto ex2 = [](Vec<f32> x) { return exp2(x); };
  const auto tanh = [](Vec<f32> x) { return hyperbolic_tangent(x); };
  add_f32(table, "ex2", "d32 a32", ex2);
  add_f32(table, "tanh", "d32 a32", tanh);
  add_half<false>(table, "ex2", "f16", ex2);
  add_half<true>(table, "ex2", "bf16", ex2);
  add_half<false>(table, "tanh", "f16", tanh);
  add_half<true>(table, "tanh", "bf16", tanh);
  add_f32_each<f32>(table, "lg2", "d32 a32", [](f32 a) { return std::log2(a); });
  add_f32_each<f32>(table, "sqrt", "d32 a32", [](f32 a) { return __builtin_sqrtf(a); });
  add_f32_each<f32>(table, "rsqrt", "d32 a32", [](f32 a) { return f32(1.0 / __builtin_sqrt(f64(a))); });
  add_f32_each<f32>(table, "sin", "d32 a32", [](f32 a) { return std::sin(a); });
  add_f32_each<f32>(table, "cos", "d32 a32", [](f32 a) { return std::cos(a); });
}

}  // namespace sim
