// Arithmetic on f16, f16x2, bf16 and bf16x2: computed wide, rounded once.
#include <cmath>

#include "float.h"

namespace sim {
namespace {

template <class T> SIM_INLINE f32 widen(u32 value) { return LaneType<T>::load(value); }
template <class T> SIM_INLINE u32 narrow(f32 value) { return LaneType<T>::store(value) & 0xffffu; }

// The function F on scalars, or on both halves of packed ones.
template <class T, class F> struct OnBothHalves {
  template <class... A> SIM_INLINE u32 operator()(A... operands) const {
    return narrow<T>(F{}(widen<T>(operands & 0xffffu)...)) | narrow<T>(F{}(widen<T>(operands >> 16)...)) << 16;
  }
};

template <class T, class F> void add_unary(Table& table, const std::string& stem, const std::string& type, F) {
  table.add(stem + "." + type, "d32 a32", each<T, T>(F{}));
  table.add(stem + "." + type + "x2", "d32 a32", each<u32, u32>(OnBothHalves<T, F>{}));
}
template <class T, class F> void add_binary(Table& table, const std::string& stem, const std::string& type, F) {
  table.add(stem + "." + type, "d32 a32 b32", each<T, T, T>(F{}));
  table.add(stem + "." + type + "x2", "d32 a32 b32", each<u32, u32, u32>(OnBothHalves<T, F>{}));
}
template <class T, class F> void add_ternary(Table& table, const std::string& stem, const std::string& type, F) {
  table.add(stem + "." + type, "d32 a32 b32 c32", each<T, T, T, T>(F{}));
  table.add(stem + "." + type + "x2", "d32 a32 b32 c32", each<u32, u32, u32, u32>(OnBothHalves<T, F>{}));
}

// Products are exact in double. A sum may not be: a product halfway between two results and an addend far below it. Odd roundings keep the
// final one correct.
template <class T> void register_type(Table& table, const std::string& type) {
  add_binary<T>(table, "add", type, [](f32 a, f32 b) { return round_to_odd(f64(a) + b); });
  add_binary<T>(table, "sub", type, [](f32 a, f32 b) { return round_to_odd(f64(a) - b); });
  add_binary<T>(table, "mul", type, [](f32 a, f32 b) { return round_to_odd(f64(a) * b); });
  add_ternary<T>(table, "fma", type, [](f32 a, f32 b, f32 c) { return round_to_odd(sum_to_odd(f64(a) * b, c)); });
  add_ternary<T>(table, "fma.relu", type, [](f32 a, f32 b, f32 c) {
    const f32 result = round_to_odd(sum_to_odd(f64(a) * b, c));
    return result < 0 ? 0.0f : result;
  });
  add_binary<T>(table, "add.sat", type, [](f32 a, f32 b) { return saturate(round_to_odd(f64(a) + b)); });
  add_binary<T>(table, "sub.sat", type, [](f32 a, f32 b) { return saturate(round_to_odd(f64(a) - b)); });
  add_binary<T>(table, "mul.sat", type, [](f32 a, f32 b) { return saturate(round_to_odd(f64(a) * b)); });
  add_ternary<T>(table, "fma.sat", type, [](f32 a, f32 b, f32 c) { return saturate(round_to_odd(sum_to_odd(f64(a) * b, c))); });
  add_binary<T>(table, "min", type, [](f32 a, f32 b) { return minimum(a, b); });
  add_binary<T>(table, "max", type, [](f32 a, f32 b) { return maximum(a, b); });
  add_binary<T>(table, "min.NaN", type, [](f32 a, f32 b) { return minimum_nan(a, b); });
  add_binary<T>(table, "max.NaN", type, [](f32 a, f32 b) { return maximum_nan(a, b); });
  table.add("neg." + type, "d32 a32", map<u32>([](auto a) { return (a ^ 0x8000u) & 0xffffu; }));
  table.add("abs." + type, "d32 a32", map<u32>([](auto a) { return a & 0x7fffu; }));
  table.add("neg." + type + "x2", "d32 a32", map<u32>([](auto a) { return a ^ 0x80008000u; }));
  table.add("abs." + type + "x2", "d32 a32", map<u32>([](auto a) { return a & 0x7fff7fffu; }));
}

}  // namespace

void register_half(Table& table) {
  table.family(Class::FLOAT);
  register_type<f16>(table, "f16");
  register_type<bf16>(table, "bf16");
}

}  // namespace sim
