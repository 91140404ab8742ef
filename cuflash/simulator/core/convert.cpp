// cvt between integers and floats.
//
// Contract: floats outside the range of an integer saturate, NaN becomes 0. Conversions from f16 and bf16 are decoded as two, by way of f32.
#include <cmath>
#include <limits>

#include "convert.h"

namespace sim {
namespace {

// ---- float to integer

template <class D> D to_integer(f64 value) {
  using Limits = std::numeric_limits<D>;
  if (value != value) return 0;
  if (value <= f64(Limits::min())) return Limits::min();
  // The largest integer may round up to a power of two as a double; nothing in between is representable.
  if (value >= f64(Limits::max())) return Limits::max();
  return D(value);
}

template <class D, class S> void add_float_to_integer(Table& table) {
  const auto add = [&](const char* modifiers, auto round) {
    const Handler handler = each<Stored<D>, S>([](auto a) { return Stored<D>(to_integer<D>(decltype(round){}(f64(a)))); });
    table.add(name<D, S>((std::string(modifiers) + ".").c_str()), signature<D, S>(), handler);
    table.add(name<D, S>((std::string(modifiers) + ".sat.").c_str()), signature<D, S>(), handler);
  };
  add("rni", [](f64 a) { return std::nearbyint(a); });
  add("rzi", [](f64 a) { return std::trunc(a); });
  add("rmi", [](f64 a) { return std::floor(a); });
  add("rpi", [](f64 a) { return std::ceil(a); });
}
template <class S, class... D> void add_integers_from_float(Table& table) { (add_float_to_integer<D, S>(table), ...); }

// ---- integer to float

enum Direction { NEAREST, TOWARD_ZERO, DOWN, UP };

// Rounds to f32 or f64 in a direction; comparing as 128-bit integers is exact.
template <class F, Direction DIRECTION, class S> F from_integer(S value) {
  const F nearest = F(value);
  if (DIRECTION == NEAREST) return nearest;
  const __int128 exact = value, got = __int128(nearest);
  const bool too_large = got > exact, too_small = got < exact;
  const bool toward_down = DIRECTION == DOWN || (DIRECTION == TOWARD_ZERO && value >= 0);
  if (toward_down && too_large) return std::nextafter(nearest, F(-INFINITY));
  if (!toward_down && too_small) return std::nextafter(nearest, F(INFINITY));
  return nearest;
}

template <class D, class S> void add_integer_to_float(Table& table) {
  if constexpr (std::is_same_v<D, f32> || std::is_same_v<D, f64>) {
    table.add(name<D, S>("rn."), signature<D, S>(), each<D, S>([](S a) { return D(a); }));
    table.add(name<D, S>("rz."), signature<D, S>(), each<D, S>([](S a) { return from_integer<D, TOWARD_ZERO>(a); }));
    table.add(name<D, S>("rm."), signature<D, S>(), each<D, S>([](S a) { return from_integer<D, DOWN>(a); }));
    table.add(name<D, S>("rp."), signature<D, S>(), each<D, S>([](S a) { return from_integer<D, UP>(a); }));
  } else {
    table.add(name<D, S>("rn."), signature<D, S>(), each<D, S>([](S a) { return round_to_odd(f64(a)); }));
  }
}
template <class D, class... S> void add_floats_from_integers(Table& table) { (add_integer_to_float<D, S>(table), ...); }

}  // namespace

void register_convert(Table& table) {
  table.family(Class::CONVERT);
  add_integers_from_float<f32, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from_float<f64, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_floats_from_integers<f32, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_floats_from_integers<f64, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_floats_from_integers<f16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_floats_from_integers<bf16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
}

}  // namespace sim
