// Arithmetic on f32 and f64: correctly rounded, to nearest even unless the instruction names another direction.
#include "float.h"

#include <cmath>

namespace sim {
namespace {

enum Direction { TOWARD_ZERO, DOWN, UP };

// Rounds high + low, |low| being at most half a place of high, to f32 in a direction.
template <Direction DIRECTION> f32 round_directed(f64 high, f64 low) {
  f32 result = f32(high);
  if (!(std::fabs(high) <= 3.4028235677973366e38)) {  // infinite, NaN or too large for f32
    const bool overflow = std::isfinite(high);
    const bool to_infinity = DIRECTION == UP ? high > 0 : DIRECTION == DOWN ? high < 0 : false;
    return overflow && !to_infinity ? std::copysign(3.4028235e38f, f32(high)) : result;
  }
  if (std::isinf(result)) result = std::copysign(3.4028235e38f, result);
  const f64 rest = (high - f64(result)) + low;
  const bool above = rest > 0, below = rest < 0;  // the exact value lies above or below the result
  const bool negative = result < 0 || (result == 0 && (high + low) < 0);
  if ((DIRECTION == UP || (DIRECTION == TOWARD_ZERO && negative)) && above) return std::nextafterf(result, INFINITY);
  if ((DIRECTION == DOWN || (DIRECTION == TOWARD_ZERO && !negative)) && below) return std::nextafterf(result, -INFINITY);
  return result;
}

// a + b exactly, as a double and its error.
template <Direction DIRECTION> f32 add_directed(f64 a, f64 b) {
  const f64 sum = a + b;
  if (!std::isfinite(sum)) return f32(sum);
  if (sum == 0) return a == 0 && b == 0 ? f32(sum) : DIRECTION == DOWN ? -0.0f : 0.0f;
  const f64 part = sum - a;
  const f64 error = (a - (sum - part)) + (b - part);
  return round_directed<DIRECTION>(sum, error);
}

template <Direction DIRECTION> void register_directed(Table& table, const std::string& rounding) {
  add_f32_each<f32, f32>(table, "add." + rounding, "d32 a32 b32", [](f32 a, f32 b) { return add_directed<DIRECTION>(a, b); });
  add_f32_each<f32, f32>(table, "sub." + rounding, "d32 a32 b32", [](f32 a, f32 b) { return add_directed<DIRECTION>(a, -b); });
  add_f32_each<f32, f32>(table, "mul." + rounding, "d32 a32 b32", [](f32 a, f32 b) { return round_directed<DIRECTION>(f64(a) * b, 0.0); });
  add_f32_each<f32, f32, f32>(table, "fma." + rounding, "d32 a32 b32 c32",
                              [](f32 a, f32 b, f32 c) { return add_directed<DIRECTION>(f64(a) * b, c); });
}

void register_f64(Table& table) {
  table.add("add.f64", "d64 a64 b64", map<f64>([](auto a, auto b) { return a + b; }));
  table.add("sub.f64", "d64 a64 b64", map<f64>([](auto a, auto b) { return a - b; }));
  table.add("mul.f64", "d64 a64 b64", map<f64>([](auto a, auto b) { return a * b; }));
  table.add("div.f64", "d64 a64 b64", map<f64>([](auto a, auto b) { return a / b; }));
  table.add("fma.f64 mad.f64", "d64 a64 b64 c64", each<f64, f64, f64, f64>([](f64 a, f64 b, f64 c) { return std::fma(a, b, c); }));
  table.add("neg.f64", "d64 a64", map<u64>([](auto a) { return a ^ u64(0x8000000000000000); }));
  table.add("abs.f64", "d64 a64", map<u64>([](auto a) { return a & u64(0x7fffffffffffffff); }));
  table.add("min.f64", "d64 a64 b64", each<f64, f64, f64>([](f64 a, f64 b) { return minimum(a, b); }));
  table.add("max.f64", "d64 a64 b64", each<f64, f64, f64>([](f64 a, f64 b) { return maximum(a, b); }));
  table.add("rcp.f64 rcp.ftz.f64", "d64 a64", each<f64, f64>([](f64 a) { return 1.0 / a; }), Class::MUFU);
  table.add("sqrt.f64", "d64 a64", each<f64, f64>([](f64 a) { return std::sqrt(a); }), Class::MUFU);
  table.add("rsqrt.f64 rsqrt.ftz.f64", "d64 a64", each<f64, f64>([](f64 a) { return 1.0 / std::sqrt(a); }), Class::MUFU);
  table.add("copysign.f64", "d64 a64 b64", map<u64>([](auto a, auto b) { return (a & u64(0x8000000000000000)) | (b & u64(0x7fffffffffffffff)); }));
}

}  // namespace

void register_float(Table& table) {
  table.family(Class::FLOAT);
  add_f32<true>(table, "add", "d32 a32 b32", [](auto a, auto b) { return a + b; });
  add_f32<true>(table, "sub", "d32 a32 b32", [](auto a, auto b) { return a - b; });
  add_f32<true>(table, "mul", "d32 a32 b32", [](auto a, auto b) { return a * b; });
  add_f32<true>(table, "fma", "d32 a32 b32 c32", [](auto a, auto b, auto c) { return fused_multiply_add(a, b, c); });
  add_f32<true>(table, "mad", "d32 a32 b32 c32", [](auto a, auto b, auto c) { return fused_multiply_add(a, b, c); });
  add_f32(table, "min", "d32 a32 b32", [](auto a, auto b) { return minimum(a, b); });
  add_f32(table, "max", "d32 a32 b32", [](auto a, auto b) { return maximum(a, b); });
  table.add("min.NaN.f32 min.ftz.NaN.f32", "d32 a32 b32", each<f32, f32, f32>([](f32 a, f32 b) { return minimum_nan(a, b); }));
  table.add("max.NaN.f32 max.ftz.NaN.f32", "d32 a32 b32", each<f32, f32, f32>([](f32 a, f32 b) { return maximum_nan(a, b); }));
  table.add("max3.f32", "d32 a32 b32 c32", map<f32>([](auto a, auto b, auto c) { return maximum(maximum(a, b), c); }));
  table.add("min3.f32", "d32 a32 b32 c32", map<f32>([](auto a, auto b, auto c) { return minimum(minimum(a, b), c); }));
  add_f32(table, "neg", "d32 a32", [](auto a) { return as<f32>(as<u32>(a) ^ 0x80000000u); });
  add_f32(table, "abs", "d32 a32", [](auto a) { return absolute(a); });
  add_f32(table, "div", "d32 a32 b32", [](auto a, auto b) { return a / b; });
  table.add("copysign.f32", "d32 a32 b32", map<u32>([](auto a, auto b) { return (a & 0x80000000u) | (b & 0x7fffffffu); }));
  register_directed<TOWARD_ZERO>(table, "rz");
  register_directed<DOWN>(table, "rm");
  register_directed<UP>(table, "rp");
  register_f64(table);
  table.family(Class::MUFU);
  add_f32(table, "rcp", "d32 a32", [](auto a) { return 1.0f / a; });
}

}  // namespace sim
