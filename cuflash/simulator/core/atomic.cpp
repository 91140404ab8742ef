// atom and red: every lane in turn, lowest first; across blocks by compare-and-swap.
//
// Contract: space and address as in memory.cpp; `extra` at x: offset (two halves), the operand, the second operand of cas. With
// NO_RESULT in field c the old value is dropped. As on a GPU, additions of f32 flush subnormal operands and results in global memory and keep
// them in shared memory.
#include <algorithm>

#include "access.h"
#include "float.h"
#include "table.h"

namespace sim {
namespace {

template <class T> const char* describe() { return sizeof(T) == 2 ? "2-byte atomic" : sizeof(T) == 4 ? "4-byte atomic" : "8-byte atomic"; }

// F gets the old value, the operand and, for cas, the second operand, all as unsigned words, and gives the new one; G does so in global memory.
template <class Word, class F, class G> const Record* atomic(Warp& warp, const Record* in) {
  using Storage = std::conditional_t<sizeof(Word) == 8, u64, u32>;
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u16* extra = warp.extra + in->x;
  Pointers at;
  const Space space = Space(in->c & 7);
  const auto in_global = [&](int lane) {
    return space == Space::GLOBAL || (space == Space::GENERIC && warp.row<u64>(in->a)[lane] >> WINDOW_SHIFT == 0);
  };
  resolve(warp, in, space, mask, {in->a, (in->c & ADDRESS_64) != 0, offset_at(extra)},
          {Access::ATOMIC, sizeof(Word), sizeof(Word), describe<Word>(), true, nullptr, (in->c & NO_RESULT) == 0}, at);
  const Storage* operand = warp.row<Storage>(extra[2]);
  const Storage* second = warp.row<Storage>(extra[3]);
  Storage* result = in->c & NO_RESULT ? nullptr : warp.row<Storage>(in->d);
  for_lanes(mask, [&](int lane) {
    Word* memory = (Word*)at.lane[lane];
    const Word x = Word(operand[lane]), y = Word(second[lane]);  // read before the result, which may be the same register
    const bool global = !std::is_same_v<F, G> && in_global(lane);  // asked before the result is written, which may be the address
    Word old = __atomic_load_n(memory, __ATOMIC_RELAXED);
    Word wanted;
    do {
      wanted = global ? G{}(old, x, y) : F{}(old, x, y);
    } while (!__atomic_compare_exchange_n(memory, &old, wanted, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    if (result) result[lane] = old;
  });
  return in + 1;
}

template <class Word, class F, class G> void add_atomic(Table& table, const std::string& name, F, G) {
  table.add("atom." + name, "", atomic<Word, F, G>);
}
template <class Word, class F> void add_atomic(Table& table, const std::string& name, F f) { add_atomic<Word>(table, name, f, f); }

// S is the signed or unsigned type that orders the words.
template <class S, class Word> void register_integers(Table& table, const std::string& type) {
  add_atomic<Word>(table, "add." + type, [](Word old, Word x, Word) { return Word(old + x); });
  add_atomic<Word>(table, "min." + type, [](Word old, Word x, Word) { return Word(std::min(S(old), S(x))); });
  add_atomic<Word>(table, "max." + type, [](Word old, Word x, Word) { return Word(std::max(S(old), S(x))); });
}

template <class Word> void register_bits(Table& table, const std::string& type) {
  add_atomic<Word>(table, "and." + type, [](Word old, Word x, Word) { return Word(old & x); });
  add_atomic<Word>(table, "or." + type, [](Word old, Word x, Word) { return Word(old | x); });
  add_atomic<Word>(table, "xor." + type, [](Word old, Word x, Word) { return Word(old ^ x); });
  add_atomic<Word>(table, "exch." + type, [](Word, Word x, Word) { return x; });
  add_atomic<Word>(table, "cas." + type, [](Word old, Word x, Word y) { return old == x ? y : old; });
}

template <class T> u32 add_halves(u32 old, u32 x) {
  const u32 low = LaneType<T>::store(LaneType<T>::load(old & 0xffffu) + LaneType<T>::load(x & 0xffffu)) & 0xffffu;
  const u32 high = LaneType<T>::store(LaneType<T>::load(old >> 16) + LaneType<T>::load(x >> 16)) & 0xffffu;
  return high << 16 | low;
}

}  // namespace

void register_atomic(Table& table) {
  table.family(Class::MEMORY);
  register_integers<i32, u32>(table, "s32");
  register_integers<u32, u32>(table, "u32");
  register_integers<i64, u64>(table, "s64");
  register_integers<u64, u64>(table, "u64");
  register_bits<u32>(table, "b32");
  register_bits<u64>(table, "b64");
  add_atomic<u16>(table, "cas.b16", [](u16 old, u16 x, u16 y) { return old == x ? y : old; });
  add_atomic<u32>(table, "inc.u32", [](u32 old, u32 x, u32) { return old >= x ? 0u : old + 1; });
  add_atomic<u32>(table, "dec.u32", [](u32 old, u32 x, u32) { return old == 0 || old > x ? x : old - 1; });
  add_atomic<u32>(
      table, "add.f32", [](u32 old, u32 x, u32) { return bits<u32>(bits<f32>(old) + bits<f32>(x)); },
      [](u32 old, u32 x, u32) { return bits<u32>(flush(flush(bits<f32>(old)) + flush(bits<f32>(x)))); });
  add_atomic<u64>(table, "add.f64", [](u64 old, u64 x, u64) { return bits<u64>(bits<f64>(old) + bits<f64>(x)); });
  add_atomic<u16>(table, "add.f16", [](u16 old, u16 x, u16) { return u16(add_halves<f16>(old, x)); });
  add_atomic<u16>(table, "add.bf16", [](u16 old, u16 x, u16) { return u16(add_halves<bf16>(old, x)); });
  add_atomic<u32>(table, "add.f16x2", [](u32 old, u32 x, u32) { return add_halves<f16>(old, x); });
  add_atomic<u32>(table, "add.bf16x2", [](u32 old, u32 x, u32) { return add_halves<bf16>(old, x); });
}

}  // namespace sim
