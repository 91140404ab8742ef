// cvt between integers.
//
// Contract: a result narrower than 32 bits is extended to 32 according to its own sign.
#include <limits>

#include "convert.h"

namespace sim {
namespace {

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

}  // namespace

void register_convert_integer(Table& table) {
  table.family(Class::CONVERT);
  add_integers_from<i8, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<u8, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<i16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<u16, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<i32, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<u32, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<i64, i8, u8, i16, u16, i32, u32, i64, u64>(table);
  add_integers_from<u64, i8, u8, i16, u16, i32, u32, i64, u64>(table);
}

}  // namespace sim
