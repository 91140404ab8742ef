// Scalar types and attributes that every kernel file uses. No CUDA header is included anywhere, so compilation stays below a second.
//
// 16-bit floats are storage only: arithmetic on them is float32, conversions live in ptx/convert.cuh.
#pragma once

#define DEVICE __device__ __forceinline__

using int64 = long long;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

struct float16 {
  uint16 bits;
};
struct bfloat16 {
  uint16 bits;
};
struct float8_e4m3fn {  // sign, 4 bits of exponent, 3 of mantissa; up to 448, and no infinity
  uint8 bits;
};

struct NoMask {};  // stands for the element type of a mask that is not there

struct alignas(16) Chunk {  // 16 bytes: the unit of copies and of the shared-memory swizzle
  uint32 word[4];
};

template <typename A, typename B>
struct SameType {
  static constexpr bool value = false;
};
template <typename A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

constexpr int WARP_SIZE = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float LOWEST = -3.402823466e38f;  // of the finite ones

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

DEVICE float infinity() { return __int_as_float(0x7f800000); }
