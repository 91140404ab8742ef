// The instruction table: how an instruction is added to the core.
//
// Contract: every family of instructions has one file with one `register_…` function, called in table.cpp. A line such as
//
//     table.add("add.s32 add.u32", "d32 a32 b32", map<u32>([](auto a, auto b) { return a + b; }));
//
// gives the PTX names (without modifiers that change nothing, see decoder.py), the operands in PTX order, and the handler. An operand is
// the field of the record that holds it (d a b c x) and what it is: 32 or 64 for a register or constant of that many bits (16-bit
// registers count as 32), p for a predicate, i for an immediate. `family` says what kind of work the lines below it are, a fourth argument of
// `add` says it of one line. Instructions whose operands need more than that have a decoder of their
// own in instructions/ and an empty signature here.
#pragma once

#include <string>
#include <string_view>

#include "half.h"
#include "machine.h"

namespace sim {

// What kind of work an instruction is, for profiles. MEMORY becomes SHARED, GLOBAL, LOCAL or MOVE (parameters) by the space in field c; NONE
// is for records that are no instructions.
enum class Class : u8 { MATRIX, MUFU, FLOAT, INTEGER, CONVERT, SHARED, GLOBAL, LOCAL, MOVE, CONTROL, OTHER, NONE, MEMORY };

struct Entry {
  std::string name, signature;
  Handler handler;
  Class kind;
};

class Table {
 public:
  // The class of what is added from here on; every `register_…` function begins with it.
  void family(Class kind) { family_ = kind; }
  void add(std::string_view names, std::string_view signature, Handler handler) { add(names, signature, handler, family_); }
  void add(std::string_view names, std::string_view signature, Handler handler, Class kind);
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<Entry> entries_;
  Class family_ = Class::OTHER;
};

const Table& instruction_table();
const char* class_name(u32 number);  // null past the last class that a record can have
Class class_of(const Record& record);

void register_control(Table&);
void register_integer(Table&);
void register_wide_integer(Table&);
void register_float(Table&);
void register_special_functions(Table&);
void register_half(Table&);
void register_compare(Table&);
void register_convert(Table&);
void register_convert_integer(Table&);
void register_convert_float(Table&);
void register_memory(Table&);
void register_atomic(Table&);
void register_matrix(Table&);
void register_scalar_matrix(Table&);
void register_ldmatrix(Table&);
void register_wgmma(Table&);
void register_wgmma_hazards(Table&);
void register_register_pool(Table&);
void register_collective(Table&);
void register_barrier(Table&);
void register_cluster_barrier(Table&);
void register_async_copy(Table&);
void register_mbarrier(Table&);
void register_bulk_copy(Table&);
void register_tensor_map(Table&);
void register_tensor_copy(Table&);

// ---- map: a function of whole vectors, for hot instructions

template <class T, class F> const Record* map_handler(Warp& warp, const Record* in) {
  using V = Vec<T>;
  const u32 mask = warp.mask(in);
  const V* a = warp.row<V>(in->a);
  const V* b = warp.row<V>(in->b);
  const V* c = warp.row<V>(in->c);
  V* d = warp.row<V>(in->d);
  auto apply = [&](int part) {
    if constexpr (std::is_invocable_v<F, V>) return (V)F{}(a[part]);
    else if constexpr (std::is_invocable_v<F, V, V>) return (V)F{}(a[part], b[part]);
    else return (V)F{}(a[part], b[part], c[part]);
  };
  if (SIM_LIKELY(mask == ALL_LANES)) {
    SIM_UNROLL for (int part = 0; part < PARTS<T>; ++part) d[part] = apply(part);
  } else {
    SIM_UNROLL for (int part = 0; part < PARTS<T>; ++part) d[part] = select(mask, part, apply(part), d[part]);
  }
  return in + 1;
}
template <class T, class F> Handler map(F) { return map_handler<T, F>; }

// ---- each: a function of scalars, called once per lane

// How a type lies in a lane: small integers in the low bits of 32.
template <class T> struct LaneType {
  using Storage = std::conditional_t<sizeof(T) == 8, u64, u32>;
  static SIM_INLINE T load(Storage word) {
    if constexpr (std::is_floating_point_v<T>) return bits<T>(word);
    else return T(word);
  }
  static SIM_INLINE Storage store(T value) {
    if constexpr (std::is_floating_point_v<T>) return bits<Storage>(value);
    else return Storage(std::make_unsigned_t<T>(value));
  }
};

// Numbers that are computed as floats and stored in 16 bits.
struct f16 {};
struct bf16 {};
template <> struct LaneType<f16> {
  using Storage = u32;
  static SIM_INLINE f32 load(u32 word) { return f16_to_f32(word & 0xffffu); }
  static SIM_INLINE u32 store(f32 value) { return f32_to_f16(value); }
};
template <> struct LaneType<bf16> {
  using Storage = u32;
  static SIM_INLINE f32 load(u32 word) { return bf16_to_f32(word); }
  static SIM_INLINE u32 store(f32 value) { return f32_to_bf16(value); }
};

template <class F, class D, class... S> const Record* each_handler(Warp& warp, const Record* in) {
  using Result = typename LaneType<D>::Storage;
  const u32 mask = warp.mask(in);
  const u16 fields[4] = {in->a, in->b, in->c, u16(in->x)};
  alignas(64) Result results[LANES];
  [&]<size_t... I>(std::index_sequence<I...>) {
    for (int lane = 0; lane < LANES; ++lane) {
      results[lane] = LaneType<D>::store(F{}(LaneType<S>::load(warp.row<typename LaneType<S>::Storage>(fields[I])[lane])...));
    }
  }(std::index_sequence_for<S...>{});
  commit(warp, in->d, mask, results);
  return in + 1;
}
// each<result, operands…>(function): operands come from the fields a, b, c, x in that order.
template <class D, class... S, class F> Handler each(F) { return each_handler<F, D, S...>; }

}  // namespace sim
