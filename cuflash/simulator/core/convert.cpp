// cvt between integers, and between integers and floats.
//
// Contract: a result narrower than 32 bits is extended to 32 according to its own sign. Floats outside the range of an integer saturate,
// NaN becomes 0.
#include <cmath>
#include <limits>

#include "float.h"

namespace sim {
namespace {

template <class T> struct Name;
template <> struct Name<i8> { static constexpr const char* value = "s8"; };
template <> struct Name<u8> { static constexpr const char* value = "u8"; };
template <> struct Name<i16> { static constexpr const char* value = "s16"; };
template <> struct Name<u16> { static constexpr const char* value = "u16"; };
template <> struct Name<i32> { static constexpr const char* value = "s32"; };
template <> struct Name<u32> { static constexpr const char* value = "u32"; };
template <> struct Name<i64> { static constexpr const char* value = "s64"; };
template <> struct Name<u64> { static constexpr const char* value = "u64"; };
template <> struct Name<f32> { static constexpr const char* value = "f32"; };
template <> struct Name<f64> { static constexpr const char* value = "f64"; };
template <> struct Name<f16> { static constexpr const char* value = "f16"; };
template <> struct Name<bf16> { static constexpr const char* value = "bf16"; };

template <class T> constexpr bool WIDE = std::is_same_v<T, i64> || std::is_same_v<T, u64> || std::is_same_v<T, f64>;
template <class D, class S> std::string signature() { return std::string(WIDE<D> ? "d64 " : "d32 ") + (WIDE<S> ? "a64" : "a32"); }
template <class D, class S> std::string name(const char* modifiers) {
  return std::string("cvt.") + modifiers + Name<D>::value + "." + Name<S>::value;
}

// Small integers as they are stored: extended to 32 bits.
template <class T> using Stored = std::conditional_t<sizeof(T) == 8, T, std::conditional_t<std::is_signed_v<T>, i32, u32>>;

// ---- integer to integer

template <class D, class S> D clamp(S value) {
  using Limits = std::numeric_limits<D>;
  if (std::is_signed_v<S> && value < 0) {
    if (!std::is_signed_v<D>) return 0;
    return i64(value) < i64(Limits::min()) ? Limits::min() : D(value);
  }
  return u64(value) > u64(Limits::max()) ? Limits::max() : D(value);
}

template <class D, class S> void add_integer_pair(Table& table) {
  table.add(name<D, S>(""), signature<D, S>(), each<Stored<D>, S>([](S a) { return Stored<D>(D(a)); }));
  if constexpr (sizeof(D) < sizeof(S) || std::is_signed_v<D> != std::is_signed_v<S>) {
    table.add(name<D, S>("sat."), signature<D, S>(), each<Stored<D>, S>([](S a) { return Stored<D>(clamp<D>(a)); }));
  }
}
template <class S, class... D> void add_integers_from(Table& table) { (add_integer_pair<D, S>(table), ...); }

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
  add_integers_from<i8, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<u8, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<i16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<u16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<i32, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<u32, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<i64, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<u64, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from_float<f32, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from_float<f64, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from_float<f16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from_float<bf16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_floats_from_integers<f32, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_floats_from_integers<f64, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_floats_from_integers<f16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_floats_from_integers<bf16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
}

}  // namespace sim
