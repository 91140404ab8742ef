// cvt between fp8, f16, bf16, tf32, f32 and f64, and rounding to integral values.
#include <cmath>

#include "float.h"
#include "fp8.h"

namespace sim {
namespace {

// ---- narrowing from f32: F is the rounding, as a function of vectors that gives 16 bits; RELU makes +0 of -0, too

template <class F, bool RELU> SIM_INLINE Vec<u32> narrow(Vec<f32> value) { return F{}(RELU ? (value <= 0.0f ? splat(0.0f) : value) : value); }

// cvt.bf16x2.f32 d, a, b: a goes to the upper half.
template <class F> void add_narrowing(Table& table, const std::string& rounding, const std::string& type, F) {
  const std::string stem = "cvt." + rounding;
  table.add(stem + "." + type + ".f32", "d32 a32", map<u32>([](auto a) { return narrow<F, false>(as<f32>(a)); }));
  table.add(stem + ".relu." + type + ".f32", "d32 a32", map<u32>([](auto a) { return narrow<F, true>(as<f32>(a)); }));
  table.add(stem + "." + type + "x2.f32", "d32 a32 b32",
            map<u32>([](auto a, auto b) { return narrow<F, false>(as<f32>(a)) << 16 | narrow<F, false>(as<f32>(b)); }));
  table.add(stem + ".relu." + type + "x2.f32", "d32 a32 b32",
            map<u32>([](auto a, auto b) { return narrow<F, true>(as<f32>(a)) << 16 | narrow<F, true>(as<f32>(b)); }));
}

// Toward zero: where rounding to nearest went away from zero, the number before.
SIM_INLINE Vec<u32> f32_to_f16_truncated(Vec<f32> value) {
  const Vec<u32> nearest = f32_to_f16(value);
  const Vec<i32> away = absolute(f16_to_f32(nearest)) > absolute(value);
  return as<u32>(away) != 0u ? nearest - 1u : nearest;
}
SIM_INLINE Vec<u32> f32_to_bf16_truncated(Vec<f32> value) { return is_nan(value) ? splat<u32>(0x7fff) : as<u32>(value) >> 16; }

// tf32 keeps 10 bits of the fraction; rna rounds ties away from zero, rn to even.
SIM_INLINE Vec<u32> f32_to_tf32_away(Vec<u32> a) {
  const Vec<i32> special = (a & 0x7f800000u) == 0x7f800000u;
  return special ? a : (a + 0x1000u) & 0xffffe000u;
}
SIM_INLINE Vec<u32> f32_to_tf32_even(Vec<u32> a) {
  const Vec<i32> special = (a & 0x7f800000u) == 0x7f800000u;
  return special ? a : (a + 0xfffu + ((a >> 13) & 1u)) & 0xffffe000u;
}

void register_narrowing(Table& table) {
  add_narrowing(table, "rn", "f16", [](auto a) { return f32_to_f16(a); });
  add_narrowing(table, "rz", "f16", [](auto a) { return f32_to_f16_truncated(a); });
  add_narrowing(table, "rn", "bf16", [](auto a) { return f32_to_bf16(a); });
  add_narrowing(table, "rz", "bf16", [](auto a) { return f32_to_bf16_truncated(a); });
  table.add("cvt.rna.tf32.f32", "d32 a32", map<u32>([](auto a) { return f32_to_tf32_away(a); }));
  table.add("cvt.rn.tf32.f32", "d32 a32", map<u32>([](auto a) { return f32_to_tf32_even(a); }));
  table.add("cvt.rz.tf32.f32", "d32 a32", map<u32>([](auto a) { return a & 0xffffe000u; }));
  table.add("cvt.rn.f16.f64", "d32 a64", each<f16, f64>([](f64 a) { return round_to_odd(a); }));
  table.add("cvt.rn.bf16.f64", "d32 a64", each<bf16, f64>([](f64 a) { return round_to_odd(a); }));
  table.add("cvt.rn.bf16.f16", "d32 a32", each<bf16, f16>([](f32 a) { return a; }));
  table.add("cvt.rn.f16.bf16", "d32 a32", each<f16, bf16>([](f32 a) { return a; }));
}

// cvt.e4m3x2.f32 d, a, b: a goes to the upper byte. From and to f16x2 by way of f32, which is exact.
template <class NARROW, class WIDEN> void add_fp8(Table& table, const std::string& type, NARROW, WIDEN) {
  table.add("cvt.rn.satfinite." + type + ".f32", "d32 a32 b32",
            map<u32>([](auto a, auto b) { return narrow<NARROW, false>(as<f32>(a)) << 8 | narrow<NARROW, false>(as<f32>(b)); }));
  table.add("cvt.rn.satfinite.relu." + type + ".f32", "d32 a32 b32",
            map<u32>([](auto a, auto b) { return narrow<NARROW, true>(as<f32>(a)) << 8 | narrow<NARROW, true>(as<f32>(b)); }));
  table.add("cvt.rn.satfinite." + type + ".f16x2", "d32 a32",
            map<u32>([](auto a) { return narrow<NARROW, false>(f16_to_f32(a >> 16)) << 8 | narrow<NARROW, false>(f16_to_f32(a & 0xffffu)); }));
  table.add("cvt.rn.satfinite.relu." + type + ".f16x2", "d32 a32",
            map<u32>([](auto a) { return narrow<NARROW, true>(f16_to_f32(a >> 16)) << 8 | narrow<NARROW, true>(f16_to_f32(a & 0xffffu)); }));
  table.add("cvt.rn.f16x2." + type, "d32 a32", map<u32>([](auto a) { return f32_to_f16(WIDEN{}(a >> 8)) << 16 | f32_to_f16(WIDEN{}(a)); }));
  table.add("cvt.rn.relu.f16x2." + type, "d32 a32", map<u32>([](auto a) {
              const auto half = [](Vec<f32> value) { return f32_to_f16(value <= 0.0f ? splat(0.0f) : value); };
              return half(WIDEN{}(a >> 8)) << 16 | half(WIDEN{}(a));
            }));
}

enum Direction { TOWARD_ZERO, DOWN, UP };

template <Direction DIRECTION> f32 narrow_directed(f64 value) {
  const f32 nearest = f32(value);
  const bool down = DIRECTION == DOWN || (DIRECTION == TOWARD_ZERO && value > 0);
  if (down && f64(nearest) > value) return std::nextafterf(nearest, -INFINITY);
  if (!down && f64(nearest) < value) return std::nextafterf(nearest, INFINITY);
  return nearest;
}

void register_f64(Table& table) {
  table.add("cvt.f64.f32 cvt.ftz.f64.f32", "d64 a32", each<f64, f32>([](f32 a) { return f64(a); }));
  table.add("cvt.f64.f16", "d64 a32", each<f64, f16>([](f32 a) { return f64(a); }));
  table.add("cvt.f64.bf16", "d64 a32", each<f64, bf16>([](f32 a) { return f64(a); }));
  table.add("cvt.rn.f32.f64", "d32 a64", each<f32, f64>([](f64 a) { return f32(a); }));
  table.add("cvt.rn.ftz.f32.f64", "d32 a64", each<f32, f64>([](f64 a) { return flush(f32(a)); }));
  table.add("cvt.rz.f32.f64", "d32 a64", each<f32, f64>([](f64 a) { return narrow_directed<TOWARD_ZERO>(a); }));
  table.add("cvt.rm.f32.f64", "d32 a64", each<f32, f64>([](f64 a) { return narrow_directed<DOWN>(a); }));
  table.add("cvt.rp.f32.f64", "d32 a64", each<f32, f64>([](f64 a) { return narrow_directed<UP>(a); }));
  table.add("cvt.rni.f64.f64", "d64 a64", each<f64, f64>([](f64 a) { return std::nearbyint(a); }));
  table.add("cvt.rzi.f64.f64", "d64 a64", each<f64, f64>([](f64 a) { return std::trunc(a); }));
  table.add("cvt.rmi.f64.f64", "d64 a64", each<f64, f64>([](f64 a) { return std::floor(a); }));
  table.add("cvt.rpi.f64.f64", "d64 a64", each<f64, f64>([](f64 a) { return std::ceil(a); }));
}

// Rounding to an integral f32, and copies with .ftz and .sat.
template <class F> void add_f32_to_f32(Table& table, const std::string& rounding, F) {
  const auto add = [&](const std::string& modifiers, auto f) { table.add("cvt." + modifiers + "f32.f32", "d32 a32", each<f32, f32>(f)); };
  add(rounding, Modified<F, false, false>{});
  add(rounding + "ftz.", Modified<F, true, false>{});
  add(rounding + "sat.", Modified<F, false, true>{});
  add(rounding + "ftz.sat.", Modified<F, true, true>{});
}

}  // namespace

void register_convert_float(Table& table) {
  table.family(Class::CONVERT);
  table.add("cvt.f32.f16 cvt.ftz.f32.f16", "d32 a32", map<u32>([](auto a) { return f16_to_f32(a & 0xffffu); }));
  table.add("cvt.f32.bf16 cvt.ftz.f32.bf16", "d32 a32", map<u32>([](auto a) { return bf16_to_f32(a); }));
  add_f32_to_f32(table, "", [](f32 a) { return a; });
  add_f32_to_f32(table, "rni.", [](f32 a) { return std::nearbyint(a); });
  add_f32_to_f32(table, "rzi.", [](f32 a) { return std::trunc(a); });
  add_f32_to_f32(table, "rmi.", [](f32 a) { return std::floor(a); });
  add_f32_to_f32(table, "rpi.", [](f32 a) { return std::ceil(a); });
  const auto add_half = [&](const char* rounding, auto f) {
    table.add(std::string("cvt.") + rounding + ".f16.f16", "d32 a32", each<f16, f16>(f));
    table.add(std::string("cvt.") + rounding + ".bf16.bf16", "d32 a32", each<bf16, bf16>(f));
  };
  add_half("rni", [](f32 a) { return std::nearbyint(a); });
  add_half("rzi", [](f32 a) { return std::trunc(a); });
  add_half("rmi", [](f32 a) { return std::floor(a); });
  add_half("rpi", [](f32 a) { return std::ceil(a); });
  register_narrowing(table);
  add_fp8(table, "e4m3x2", [](auto a) { return f32_to_e4m3(a); }, [](auto a) { return e4m3_to_f32(a); });
  add_fp8(table, "e5m2x2", [](auto a) { return f32_to_e5m2(a); }, [](auto a) { return e5m2_to_f32(a); });
  register_f64(table);
}

}  // namespace sim
