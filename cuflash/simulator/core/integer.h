// Scalar functions behind integer instructions, for all widths.
//
// Contract: what the PTX ISA leaves open is defined here: a division by zero gives all ones, its remainder the dividend.
#pragma once

#include "table.h"

namespace sim {

template <class T> T divide(T a, T b) { return b == 0 ? T(~T(0)) : T(-1) < T(0) && b == T(-1) ? T(0 - std::make_unsigned_t<T>(a)) : T(a / b); }
template <class T> T remainder(T a, T b) { return b == 0 ? a : T(-1) < T(0) && b == T(-1) ? T(0) : T(a % b); }

template <class T> T extract_field(T a, u32 position, u32 length) {
  constexpr int BITS = sizeof(T) * 8;
  using U = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  if (length == 0) return 0;
  const u32 top = position + length - 1 < BITS - 1 ? position + length - 1 : BITS - 1;
  const U sign = T(-1) < T(0) ? U(U(a) >> top & 1) : U(0);
  const U field = position < BITS ? U(U(a) >> position) : U(0);
  const U keep = length < BITS ? U((U(1) << length) - 1) : U(~U(0));
  // Bits past the end of the source are copies of the sign.
  const u32 available = position < BITS ? BITS - position : 0;
  const U valid = available < BITS ? U((U(1) << available) - 1) : U(~U(0));
  const U known = keep & valid;
  return T((field & known) | (sign ? U(~known) : U(0)));
}

template <class U> U insert_field(U a, U b, u32 position, u32 length) {
  constexpr u32 BITS = sizeof(U) * 8;
  position &= 255, length &= 255;
  if (length == 0 || position >= BITS) return b;
  const U ones = length < BITS ? (U(1) << length) - 1 : ~U(0);
  return (b & ~(ones << position)) | ((a & ones) << position);
}

inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 control = selector >> (4 * i) & 15;
    u32 byte = u32(bytes >> (8 * (control & 7))) & 255;
    if (control & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

template <class U> u32 leading_zeros(U a) {
  if (a == 0) return sizeof(U) * 8;
  return sizeof(U) == 8 ? __builtin_clzll(a) : __builtin_clz(u32(a));
}

// The position of the highest bit that differs from the sign; with `shift`, how far to shift left to bring it to the top.
template <class T, bool SHIFT> u32 find_bit(T a) {
  using U = std::make_unsigned_t<T>;
  const U magnitude = a < 0 ? U(~U(a)) : U(a);
  if (magnitude == 0) return ~0u;
  const u32 zeros = leading_zeros(magnitude);
  return SHIFT ? zeros : sizeof(T) * 8 - 1 - zeros;
}

template <class U> U reverse_bits(U a) {
  U result = 0;
  for (unsigned i = 0; i < sizeof(U) * 8; ++i) result |= (a >> i & 1) << (sizeof(U) * 8 - 1 - i);
  return result;
}

template <class T> T absolute_difference(T a, T b, T c) {
  using U = std::make_unsigned_t<T>;
  return T(U(c) + (a < b ? U(b) - U(a) : U(a) - U(b)));
}

}  // namespace sim
