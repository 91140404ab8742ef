// See reduction.h.
#include "reduction.h"

#include <algorithm>

#include "float.h"

namespace sim {
namespace {

// F gives the new word from the old one and the operand.
template <class Word, class F> void reduce(u8* to, const u8* from, u32 bytes) {
  for (u32 i = 0; i < bytes; i += sizeof(Word)) {
    Word operand;
    memcpy(&operand, from + i, sizeof operand);
    Word* memory = (Word*)(to + i);
    Word old = __atomic_load_n(memory, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(memory, &old, F{}(old, operand), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
}
template <class Word, class F> Reduction make(F) { return reduce<Word, F>; }

// F is a function of f32.
template <class T, class F> Reduction make_16(F) {
  return make<u16>([](u16 old, u16 x) { return u16(LaneType<T>::store(F{}(LaneType<T>::load(old), LaneType<T>::load(x)))); });
}

template <class S, class Word> Reduction integer_reduction(Operation operation) {
  switch (operation) {
    case Operation::ADD:
      return make<Word>([](Word old, Word x) { return Word(old + x); });
    case Operation::MIN:
      return make<Word>([](Word old, Word x) { return Word(std::min(S(old), S(x))); });
    case Operation::MAX:
      return make<Word>([](Word old, Word x) { return Word(std::max(S(old), S(x))); });
    case Operation::AND:
      return make<Word>([](Word old, Word x) { return Word(old & x); });
    case Operation::OR:
      return make<Word>([](Word old, Word x) { return Word(old | x); });
    case Operation::XOR:
      return make<Word>([](Word old, Word x) { return Word(old ^ x); });
    default:
      return nullptr;
  }
}

template <class T> Reduction half_reduction(Operation operation) {
  switch (operation) {
    case Operation::ADD:
      return make_16<T>([](f32 a, f32 b) { return a + b; });
    case Operation::MIN:
      return make_16<T>([](f32 a, f32 b) { return minimum(a, b); });
    case Operation::MAX:
      return make_16<T>([](f32 a, f32 b) { return maximum(a, b); });
    default:
      return nullptr;
  }
}

}  // namespace

u32 element_bytes(ElementType element) {
  static constexpr u8 BYTES[u32(ElementType::COUNT)] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  return BYTES[u32(element)];
}

Reduction find_reduction(Operation operation, ElementType element) {
  switch (element) {
    case ElementType::U32:
      if (operation == Operation::INC) return make<u32>([](u32 old, u32 x) { return old >= x ? 0u : old + 1; });
      if (operation == Operation::DEC) return make<u32>([](u32 old, u32 x) { return old == 0 || old > x ? x : old - 1; });
      return integer_reduction<u32, u32>(operation);
    case ElementType::S32:
      return integer_reduction<i32, u32>(operation);
    case ElementType::U64:
      return integer_reduction<u64, u64>(operation);
    case ElementType::S64:
      return integer_reduction<i64, u64>(operation);
    case ElementType::F16:
      return half_reduction<f16>(operation);
    case ElementType::BF16:
      return half_reduction<bf16>(operation);
    case ElementType::F32:  // subnormal operands and results become zero
      if (operation != Operation::ADD) return nullptr;
      return make<u32>([](u32 old, u32 x) { return bits<u32>(flush(flush(bits<f32>(old)) + flush(bits<f32>(x)))); });
    case ElementType::F64:
      if (operation != Operation::ADD) return nullptr;
      return make<u64>([](u64 old, u64 x) { return bits<u64>(bits<f64>(old) + bits<f64>(x)); });
    default:
      return nullptr;
  }
}

}  // namespace sim
