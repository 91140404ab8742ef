// setp, selp, set, slct, testp and the logic of predicates.
//
// Contract: `setp` writes predicate d and, when x is not 0, the complement to predicate x. The forms that combine with a third predicate
// are decoded into several records.
#include <cmath>

#include "float.h"

namespace sim {
namespace {

template <class T, class F> const Record* compare_vectors(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  const Vec<T>* a = warp.row<Vec<T>>(in->a);
  const Vec<T>* b = warp.row<Vec<T>>(in->b);
  u32 result = 0;
  SIM_UNROLL for (int part = 0; part < PARTS<T>; ++part) result |= collect(F{}(a[part], b[part])) << (part * WIDTH<T>);
  warp.set_predicate(in->d, mask, result);
  if (in->x) warp.set_predicate(u32(in->x), mask, ~result);
  return in + 1;
}

template <class T, class F> const Record* compare_scalars(Warp& warp, const Record* in) {
  using L = LaneType<T>;
  const u32 mask = warp.mask(in);
  const auto* a = warp.row<typename L::Storage>(in->a);
  const auto* b = warp.row<typename L::Storage>(in->b);
  u32 result = 0;
  for (int lane = 0; lane < LANES; ++lane) result |= u32(F{}(L::load(a[lane]), L::load(b[lane]))) << lane;
  warp.set_predicate(in->d, mask, result);
  if (in->x) warp.set_predicate(u32(in->x), mask, ~result);
  return in + 1;
}

template <class T> constexpr bool VECTORISED = sizeof(T) >= 4;

template <class T, class F> void add_comparison(Table& table, const std::string& name, F) {
  const std::string signature = sizeof(T) == 8 ? "dp a64 b64" : "dp a32 b32";
  if constexpr (VECTORISED<T>) table.add(name, signature, compare_vectors<T, F>);
  else table.add(name, signature, compare_scalars<T, F>);
}

template <class T> void register_ordered(Table& table, const std::string& type) {
  const auto add = [&](const std::string& operation, auto f) { add_comparison<T>(table, "setp." + operation + "." + type, f); };
  add("eq", [](auto a, auto b) { return a == b; });
  add("ne", [](auto a, auto b) { return (a < b) | (a > b); });
  add("lt", [](auto a, auto b) { return a < b; });
  add("le", [](auto a, auto b) { return a <= b; });
  add("gt", [](auto a, auto b) { return a > b; });
  add("ge", [](auto a, auto b) { return a >= b; });
  add("lo", [](auto a, auto b) { return a < b; });
  add("ls", [](auto a, auto b) { return a <= b; });
  add("hi", [](auto a, auto b) { return a > b; });
  add("hs", [](auto a, auto b) { return a >= b; });
}

// Comparisons of floats that are true when an operand is a NaN.
template <class T> void register_unordered(Table& table, const std::string& type) {
  const auto add = [&](const std::string& operation, auto f) { add_comparison<T>(table, "setp." + operation + "." + type, f); };
  add("equ", [](auto a, auto b) { return (a == b) | (a != a) | (b != b); });
  add("neu", [](auto a, auto b) { return a != b; });
  add("ltu", [](auto a, auto b) { return (a < b) | (a != a) | (b != b); });
  add("leu", [](auto a, auto b) { return (a <= b) | (a != a) | (b != b); });
  add("gtu", [](auto a, auto b) { return (a > b) | (a != a) | (b != b); });
  add("geu", [](auto a, auto b) { return (a >= b) | (a != a) | (b != b); });
  add("num", [](auto a, auto b) { return (a == a) & (b == b); });
  add("nan", [](auto a, auto b) { return (a != a) | (b != b); });
}

template <class V> const Record* select_by_predicate(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  const u32 chosen = warp.predicates[in->c & 0x7fff];
  const V* a = warp.row<V>(in->a);
  const V* b = warp.row<V>(in->b);
  V* d = warp.row<V>(in->d);
  SIM_UNROLL for (int part = 0; part < PARTS<Element<V>>; ++part) {
    const V result = select(chosen, part, a[part], b[part]);
    d[part] = SIM_LIKELY(mask == ALL_LANES) ? result : select(mask, part, result, d[part]);
  }
  return in + 1;
}

enum class Logic { AND, OR, XOR, NOT, MOVE };

template <Logic LOGIC> const Record* combine_predicates(Warp& warp, const Record* in) {
  const u32 a = warp.predicates[in->a];
  const u32 b = warp.predicates[in->b];
  const u32 result = LOGIC == Logic::AND ? a & b : LOGIC == Logic::OR ? a | b : LOGIC == Logic::XOR ? a ^ b : LOGIC == Logic::NOT ? ~a : a;
  warp.set_predicate(in->d, warp.mask(in), result);
  return in + 1;
}

// Predicate d = a constant: x, for all lanes.
const Record* set_constant(Warp& warp, const Record* in) {
  warp.set_predicate(in->d, warp.mask(in), in->x ? ALL_LANES : 0);
  return in + 1;
}

// A predicate as a number: what `set` stores.
template <u32 TRUE_VALUE> const Record* number_from_predicate(Warp& warp, const Record* in) {
  alignas(64) u32 result[LANES];
  const u32 predicate = warp.predicates[in->a];
  for (int lane = 0; lane < LANES; ++lane) result[lane] = predicate >> lane & 1 ? TRUE_VALUE : 0;
  commit(warp, in->d, warp.mask(in), result);
  return in + 1;
}

template <class T, class F> const Record* test_scalars(Warp& warp, const Record* in) {
  const T* a = warp.row<T>(in->a);
  u32 result = 0;
  for (int lane = 0; lane < LANES; ++lane) result |= u32(F{}(a[lane])) << lane;
  warp.set_predicate(in->d, warp.mask(in), result);
  return in + 1;
}

template <class T> void register_tests(Table& table, const std::string& type) {
  const std::string signature = sizeof(T) == 8 ? "dp a64" : "dp a32";
  const auto add = [&](const char* name, auto f) { table.add("testp." + std::string(name) + "." + type, signature, test_scalars<T, decltype(f)>); };
  add("finite", [](T a) { return std::isfinite(a); });
  add("infinite", [](T a) { return std::isinf(a); });
  add("number", [](T a) { return !std::isnan(a); });
  add("notanumber", [](T a) { return std::isnan(a); });
  add("normal", [](T a) { return std::isnormal(a); });
  add("subnormal", [](T a) { return std::fpclassify(a) == FP_SUBNORMAL; });
}

// 16-bit floats, and f32 whose subnormals are flushed first: loaded as floats and compared one by one.
template <class T> void register_scalar_floats(Table& table, const std::string& type) {
  const auto add = [&](const char* operation, auto f) {
    table.add(std::string("setp.") + operation + "." + type, "dp a32 b32", compare_scalars<T, decltype(f)>);
  };
  add("eq", [](f32 a, f32 b) { return a == b; });
  add("ne", [](f32 a, f32 b) { return a < b || a > b; });
  add("lt", [](f32 a, f32 b) { return a < b; });
  add("le", [](f32 a, f32 b) { return a <= b; });
  add("gt", [](f32 a, f32 b) { return a > b; });
  add("ge", [](f32 a, f32 b) { return a >= b; });
  add("equ", [](f32 a, f32 b) { return !(a < b || a > b); });
  add("neu", [](f32 a, f32 b) { return a != b; });
  add("ltu", [](f32 a, f32 b) { return !(a >= b); });
  add("leu", [](f32 a, f32 b) { return !(a > b); });
  add("gtu", [](f32 a, f32 b) { return !(a <= b); });
  add("geu", [](f32 a, f32 b) { return !(a < b); });
  add("num", [](f32 a, f32 b) { return a == a && b == b; });
  add("nan", [](f32 a, f32 b) { return a != a || b != b; });
}

}  // namespace

void register_compare(Table& table) {
  table.family(Class::INTEGER);
  register_ordered<i16>(table, "s16");
  register_ordered<u16>(table, "u16");
  register_ordered<u16>(table, "b16");
  register_ordered<i32>(table, "s32");
  register_ordered<u32>(table, "u32");
  register_ordered<u32>(table, "b32");
  register_ordered<i64>(table, "s64");
  register_ordered<u64>(table, "u64");
  register_ordered<u64>(table, "b64");
  register_ordered<f32>(table, "f32");
  register_unordered<f32>(table, "f32");
  register_ordered<f64>(table, "f64");
  register_unordered<f64>(table, "f64");
  register_scalar_floats<FlushedF32>(table, "ftz.f32");
  register_scalar_floats<f16>(table, "f16");
  register_scalar_floats<bf16>(table, "bf16");
  register_tests<f32>(table, "f32");
  register_tests<f64>(table, "f64");

  table.add("selp.b32 selp.u32 selp.s32 selp.f32 selp.b16 selp.u16 selp.s16", "d32 a32 b32 cp", select_by_predicate<Vec<u32>>);
  table.add("selp.b64 selp.u64 selp.s64 selp.f64", "d64 a64 b64 cp", select_by_predicate<Vec<u64>>);
  table.add("slct.s32.s32 slct.u32.s32 slct.b32.s32 slct.f32.s32", "d32 a32 b32 c32",
            each<u32, u32, u32, i32>([](u32 a, u32 b, i32 c) { return c >= 0 ? a : b; }));
  table.add("slct.s32.f32 slct.u32.f32 slct.b32.f32 slct.f32.f32", "d32 a32 b32 c32",
            each<u32, u32, u32, f32>([](u32 a, u32 b, f32 c) { return c >= 0 ? a : b; }));
  table.add("and.pred", "dp ap bp", combine_predicates<Logic::AND>);
  table.add("or.pred", "dp ap bp", combine_predicates<Logic::OR>);
  table.add("xor.pred", "dp ap bp", combine_predicates<Logic::XOR>);
  table.add("not.pred", "dp ap", combine_predicates<Logic::NOT>);
  table.add("mov.pred", "dp ap", combine_predicates<Logic::MOVE>, Class::MOVE);
  table.add("constant.pred", "dp xi", set_constant, Class::MOVE);
  table.add("number.u32.pred", "d32 ap", number_from_predicate<0xffffffffu>);
  table.add("number.f32.pred", "d32 ap", number_from_predicate<0x3f800000u>);
}

}  // namespace sim
