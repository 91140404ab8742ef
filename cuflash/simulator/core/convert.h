// What the files of conversions share: the names of types, and the names and signatures of instructions made of them.
#pragma once

#include <string>

#include "float.h"

namespace sim {

template <class T> struct Name;
template <> struct Name<i8> {
  static constexpr const char* value = "s8";
};
template <> struct Name<u8> {
  static constexpr const char* value = "u8";
};
template <> struct Name<i16> {
  static constexpr const char* value = "s16";
};
template <> struct Name<u16> {
  static constexpr const char* value = "u16";
};
template <> struct Name<i32> {
  static constexpr const char* value = "s32";
};
template <> struct Name<u32> {
  static constexpr const char* value = "u32";
};
template <> struct Name<i64> {
  static constexpr const char* value = "s64";
};
template <> struct Name<u64> {
  static constexpr const char* value = "u64";
};
template <> struct Name<f32> {
  static constexpr const char* value = "f32";
};
template <> struct Name<f64> {
  static constexpr const char* value = "f64";
};
template <> struct Name<f16> {
  static constexpr const char* value = "f16";
};
template <> struct Name<bf16> {
  static constexpr const char* value = "bf16";
};

template <class T> constexpr bool WIDE = std::is_same_v<T, i64> || std::is_same_v<T, u64> || std::is_same_v<T, f64>;
template <class D, class S> std::string signature() { return std::string(WIDE<D> ? "d64 " : "d32 ") + (WIDE<S> ? "a64" : "a32"); }
template <class D, class S> std::string name(const char* modifiers) {
  return std::string("cvt.") + modifiers + Name<D>::value + "." + Name<S>::value;
}

// Small integers as they are stored: extended to 32 bits.
template <class T> using Stored = std::conditional_t<sizeof(T) == 8, T, std::conditional_t<std::is_signed_v<T>, i32, u32>>;

}  // namespace sim
