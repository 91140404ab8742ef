// The 32 lanes of a warp as native vectors.
//
// Contract: everything that depends on the compiler (gcc >= 10, clang, zig) or on the processor (AVX-512, AVX2, NEON, none) is behind the
// names of this file. A row is 32 lanes of 4 or 8 bytes, 64-byte aligned. `Vec<T>` is one native vector; a row has PARTS<T> of them.
// Vectors take the usual operators; a comparison gives -1 or 0 per lane, and `condition ? a : b` selects per lane.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using f32 = float;
using f64 = double;

#define SIM_INLINE inline __attribute__((always_inline))
#define SIM_NOINLINE __attribute__((noinline))
#define SIM_LIKELY(x) __builtin_expect(!!(x), 1)
#define SIM_UNLIKELY(x) __builtin_expect(!!(x), 0)
#if defined(__clang__)
#define SIM_UNROLL _Pragma("clang loop unroll(full)")
#define SIM_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#else
#define SIM_UNROLL _Pragma("GCC unroll 64")
#define SIM_UNROLL_4 _Pragma("GCC unroll 4")
#endif

constexpr int LANES = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int ROW_BYTES = 128;  // 32 lanes of 32 bits; a 64-bit register is two rows

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SIM_AVX512 1
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SIM_AVX2 1
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T, int BYTES> struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T> using Vec = typename VectorOf<T, VECTOR_BYTES>::type;
template <class T> using Quad = typename VectorOf<T, 16>::type;
template <class T> constexpr int WIDTH = VECTOR_BYTES / int(sizeof(T));
template <class T> constexpr int PARTS = LANES / WIDTH<T>;

// The element type of a vector, and the vector of signed integers that comparisons give.
template <class V> using Element = std::decay_t<decltype(std::declval<V&>()[0])>;
template <class T> using MaskElement = std::conditional_t<sizeof(T) == 8, i64, i32>;

// The same bits under another type.
template <class To, class From> SIM_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
template <class T, class V> SIM_INLINE Vec<T> as(V value) { return (Vec<T>)value; }

// All lanes the same. A scalar operand of a vector operator is repeated; subtracting +0 keeps the sign of a zero.
template <class T> SIM_INLINE Vec<T> splat(T value) { return value - Vec<T>{}; }

// 0, 1, 2, … as lane numbers of part `part`.
template <int... I> SIM_INLINE Vec<u32> lane_numbers_(int part, std::integer_sequence<int, I...>) {
  return Vec<u32>{u32(I)...} + u32(part * WIDTH<u32>);
}
SIM_INLINE Vec<u32> lane_numbers(int part) { return lane_numbers_(part, std::make_integer_sequence<int, WIDTH<u32>>{}); }

// ---- masks: 32 bits, one per lane

template <class M, int... I> SIM_INLINE Vec<M> bits_of_lanes(std::integer_sequence<int, I...>) { return Vec<M>{(M(1) << I)...}; }

// The lanes of part `part` whose bit is set, as -1 / 0.
template <class T> SIM_INLINE Vec<MaskElement<T>> expand(u32 mask, int part) {
  using M = MaskElement<T>;
  const u32 here = mask >> (part * WIDTH<T>);
#if defined(SIM_AVX512)
  if constexpr (sizeof(T) == 4) return (Vec<M>)_mm512_movm_epi32(__mmask16(here));
  else return (Vec<M>)_mm512_movm_epi64(__mmask8(here));
#else
  const Vec<M> bit = bits_of_lanes<M>(std::make_integer_sequence<int, WIDTH<T>>{});
  return (splat<M>(M(here & ((1u << WIDTH<T>)-1))) & bit) == bit;
#endif
}

// One bit per lane of a comparison's result.
template <class V> SIM_INLINE u32 collect(V condition) {
  using M = Element<V>;
#if defined(SIM_AVX512)
  if constexpr (sizeof(M) == 4) return _mm512_movepi32_mask((__m512i)condition);
  else return _mm512_movepi64_mask((__m512i)condition);
#elif defined(SIM_AVX2)
  if constexpr (sizeof(M) == 4) return u32(_mm256_movemask_ps((__m256)condition));
  else return u32(_mm256_movemask_pd((__m256d)condition));
#else
  u32 result = 0;
  SIM_UNROLL for (int i = 0; i < WIDTH<M>; ++i) result |= u32(condition[i] & 1) << i;
  return result;
#endif
}

template <class V> SIM_INLINE V select(u32 mask, int part, V yes, V no) {
#if defined(SIM_AVX512)
  if constexpr (sizeof(Element<V>) == 4) return (V)_mm512_mask_mov_epi32((__m512i)no, __mmask16(mask >> (part * 16)), (__m512i)yes);
  else return (V)_mm512_mask_mov_epi64((__m512i)no, __mmask8(mask >> (part * 8)), (__m512i)yes);
#else
  return expand<Element<V>>(mask, part) ? yes : no;
#endif
}

// Runs `body(lane)` for every set bit of `mask`, lowest first.
template <class Body> SIM_INLINE void for_lanes(u32 mask, Body body) {
  for (u32 rest = mask; rest; rest &= rest - 1) body(__builtin_ctz(rest));
}

// ---- arithmetic that the vector operators do not have

SIM_INLINE Vec<f32> fused_multiply_add(Vec<f32> a, Vec<f32> b, Vec<f32> c) {
#if defined(SIM_AVX512)
  return (Vec<f32>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(SIM_AVX2)
  return (Vec<f32>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<f32>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  Vec<f32> result;
  SIM_UNROLL for (int i = 0; i < WIDTH<f32>; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
#endif
}

// a * b + c for factors whose product is exact, so that it does not matter whether it is rounded in between.
SIM_INLINE Vec<f32> multiply_accumulate(Vec<f32> a, Vec<f32> b, Vec<f32> c) {
#if defined(SIM_AVX512) || defined(SIM_AVX2) || defined(__aarch64__)
  return fused_multiply_add(a, b, c);
#else
  return a * b + c;
#endif
}

// Truncating conversion of integral values that are known to fit.
SIM_INLINE Vec<i32> to_int(Vec<f32> value) { return __builtin_convertvector(value, Vec<i32>); }
SIM_INLINE Vec<f32> to_float(Vec<i32> value) { return __builtin_convertvector(value, Vec<f32>); }

SIM_INLINE Vec<f32> absolute(Vec<f32> value) { return as<f32>(as<u32>(value) & 0x7fffffffu); }
SIM_INLINE Vec<i32> is_nan(Vec<f32> value) { return value != value; }

// Round to the nearest integer, ties to even; |value| < 2^22.
SIM_INLINE Vec<f32> round_small(Vec<f32> value) {
  const f32 magic = 12582912.0f;  // 1.5 * 2^23
  return (value + magic) - magic;
}

// ---- shuffles

template <int QUARTER, class V, int... I> SIM_INLINE V broadcast_in_quads_(V value, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(value, value, ((I & ~3) | QUARTER)...);
#else
  return __builtin_shuffle(value, Vec<MaskElement<Element<V>>>{((I & ~3) | QUARTER)...});
#endif
}
// Lane 4g + q takes the value of lane 4g + QUARTER.
template <int QUARTER, class V> SIM_INLINE V broadcast_in_quads(V value) {
  return broadcast_in_quads_<QUARTER>(value, std::make_integer_sequence<int, WIDTH<Element<V>>>{});
}

template <int A, int B, int C, int D, class Q> SIM_INLINE Q shuffle_quads(Q x, Q y) {  // 0-3 name x, 4-7 name y
#if defined(__clang__)
  return __builtin_shufflevector(x, y, A, B, C, D);
#else
  return __builtin_shuffle(x, y, Quad<i32>{A, B, C, D});
#endif
}

// q[i][j] becomes q[j][i].
SIM_INLINE void transpose(Quad<u32> (&q)[4]) {
  const Quad<u32> low01 = shuffle_quads<0, 4, 1, 5>(q[0], q[1]), high01 = shuffle_quads<2, 6, 3, 7>(q[0], q[1]);
  const Quad<u32> low23 = shuffle_quads<0, 4, 1, 5>(q[2], q[3]), high23 = shuffle_quads<2, 6, 3, 7>(q[2], q[3]);
  q[0] = shuffle_quads<0, 1, 4, 5>(low01, low23);
  q[1] = shuffle_quads<2, 3, 6, 7>(low01, low23);
  q[2] = shuffle_quads<0, 1, 4, 5>(high01, high23);
  q[3] = shuffle_quads<2, 3, 6, 7>(high01, high23);
}

using Octet = VectorOf<u16, 16>::type;

template <int... I> SIM_INLINE Octet interleave(Octet x, Octet y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, I...);
#else
  return __builtin_shuffle(x, y, VectorOf<i16, 16>::type{I...});
#endif
}

// The same for eight rows of eight 16-bit elements.
SIM_INLINE void transpose(Octet (&m)[8]) {
  Octet s[8], t[8];
  for (int i = 0; i < 4; ++i) {  // pairs of rows, element by element
    s[2 * i] = interleave<0, 8, 1, 9, 2, 10, 3, 11>(m[2 * i], m[2 * i + 1]);
    s[2 * i + 1] = interleave<4, 12, 5, 13, 6, 14, 7, 15>(m[2 * i], m[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {  // four rows, by pairs of elements
    for (int h = 0; h < 2; ++h) {
      t[4 * i + 2 * h] = interleave<0, 1, 8, 9, 2, 3, 10, 11>(s[4 * i + h], s[4 * i + 2 + h]);
      t[4 * i + 2 * h + 1] = interleave<4, 5, 12, 13, 6, 7, 14, 15>(s[4 * i + h], s[4 * i + 2 + h]);
    }
  }
  for (int i = 0; i < 4; ++i) {  // all eight
    m[2 * i] = interleave<0, 1, 2, 3, 8, 9, 10, 11>(t[i], t[4 + i]);
    m[2 * i + 1] = interleave<4, 5, 6, 7, 12, 13, 14, 15>(t[i], t[4 + i]);
  }
}

// The four lanes repeated over a whole vector.
template <class T> SIM_INLINE Vec<T> repeat(Quad<T> four) {
#if defined(SIM_AVX512)
  return (Vec<T>)_mm512_broadcast_i32x4((__m128i)four);
#elif defined(SIM_AVX2)
  return (Vec<T>)_mm256_broadcastsi128_si256((__m128i)four);
#else
  return (Vec<T>)four;
#endif
}

}  // namespace sim
