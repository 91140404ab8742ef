// shfl, vote, match, redux, elect and bar.warp.sync: what the lanes of a warp do together.
//
// Contract: every lane that the member mask names must execute the instruction together; lanes that are elsewhere are waited for, and lanes
// that can never come are an error, as is a lane that executes the instruction without being named.
#include <algorithm>

#include "float.h"

namespace sim {
namespace {

// The lanes of the member mask in `row`, after checking those that are here.
u32 members_of(Warp& warp, const Record* in, u32 mask, u16 row) {
  const u32* member_mask = warp.row<u32>(row);
  const u32 members = member_mask[__builtin_ctz(mask)];
  if (SIM_LIKELY(row & CONSTANT) && SIM_LIKELY((mask & ~members) == 0)) return members;
  for_lanes(mask, [&](int lane) {
    if (SIM_UNLIKELY(!(member_mask[lane] >> lane & 1))) {
      warp.fail(in, "partial-warp", 1u << lane, "lane %d executes it but is not in its member mask 0x%08x", lane, member_mask[lane]);
    }
    if (SIM_UNLIKELY(member_mask[lane] != members && (members >> lane & 1))) {
      warp.fail(in, "partial-warp", mask, "lanes disagree about the member mask: 0x%08x and 0x%08x", members, member_mask[lane]);
    }
  });
  return members;
}

// Reports lanes that read a lane which does not take part.
void check_sources(Warp& warp, const Record* in, u32 mask, const u32* source) {
  for_lanes(mask, [&](int lane) {
    if (mask >> source[lane] & 1) return;
    warp.fail(in, "partial-warp", 1u << lane, "lane %d reads lane %u, which does not take part (mask 0x%08x)", lane, source[lane], mask);
  });
}

enum class Shuffle { UP, DOWN, BUTTERFLY, INDEX };

// d, a, b = lane or distance, c = clamp and segment mask; extra at x: member mask, predicate (0: none).
template <Shuffle MODE> const Record* shuffle(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u16* extra = warp.extra + in->x;
  const u32 members = members_of(warp, in, mask, extra[0]);
  if (SIM_UNLIKELY(members & ~mask)) return warp.wait_for_lanes(in, members);
  const u32* value = warp.row<u32>(in->a);
  const Vec<u32>* control = warp.row<Vec<u32>>(in->b);
  const Vec<u32>* limits = warp.row<Vec<u32>>(in->c);
  // All in vectors but the gathering itself: where each lane reads, and whether that is within its segment.
  alignas(64) u32 source[LANES], result[LANES];
  u32 valid = 0;
  SIM_UNROLL for (int part = 0; part < PARTS<u32>; ++part) {
    const Vec<u32> lane = lane_numbers(part);
    const Vec<u32> distance = control[part] & 31u, segment = limits[part] >> 8 & 31u, clamp = limits[part] & 31u;
    const Vec<u32> last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    const Vec<u32> from = MODE == Shuffle::UP          ? lane - distance
                          : MODE == Shuffle::DOWN      ? lane + distance
                          : MODE == Shuffle::BUTTERFLY ? lane ^ distance
                                                       : first | (distance & ~segment);
    const Vec<i32> good = MODE == Shuffle::UP ? as<i32>(from) >= as<i32>(last) : as<i32>(from) <= as<i32>(last);
    ((Vec<u32>*)source)[part] = (good ? from : lane) & 31u;
    valid |= collect(good) << (part * WIDTH<u32>);
  }
  for (int i = 0; i < LANES; ++i) result[i] = value[source[i]];
  if (SIM_UNLIKELY(mask != ALL_LANES)) check_sources(warp, in, mask, source);
  commit(warp, in->d, mask, result);
  if (extra[1]) warp.set_predicate(extra[1], mask, valid);
  return in + 1;
}

enum class Vote { ALL, ANY, UNIFORM, BALLOT };

// d, a = predicate, b = member mask.
template <Vote MODE> const Record* vote(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u32 members = members_of(warp, in, mask, in->b);
  if (SIM_UNLIKELY(members & ~mask)) return warp.wait_for_lanes(in, members);
  const u32 yes = warp.predicates[in->a] & members;
  if (MODE == Vote::BALLOT) {
    alignas(64) u32 result[LANES];
    for (u32& lane : result) lane = yes;
    commit(warp, in->d, mask, result);
    return in + 1;
  }
  const bool all = yes == members, none = yes == 0;
  const bool result = MODE == Vote::ALL ? all : MODE == Vote::ANY ? !none : all || none;
  warp.set_predicate(in->d, mask, result ? ALL_LANES : 0);
  return in + 1;
}

// match.any: d = lanes with the same value. a = value, b = member mask.
template <class T> const Record* match_any(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u32 members = members_of(warp, in, mask, in->b);
  if (members & ~mask) return warp.wait_for_lanes(in, members);
  const T* value = warp.row<T>(in->a);
  alignas(64) u32 result[LANES] = {};
  for_lanes(mask, [&](int i) { for_lanes(mask, [&](int j) { result[i] |= u32(value[i] == value[j]) << j; }); });
  commit(warp, in->d, mask, result);
  return in + 1;
}

// match.all: d = the member mask if all values are the same, else 0; predicate x (0: none) says which.
template <class T> const Record* match_all(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u32 members = members_of(warp, in, mask, in->b);
  if (members & ~mask) return warp.wait_for_lanes(in, members);
  const T* value = warp.row<T>(in->a);
  const T first = value[__builtin_ctz(mask)];
  bool same = true;
  for_lanes(mask, [&](int lane) { same &= value[lane] == first; });
  alignas(64) u32 result[LANES];
  for (u32& lane : result) lane = same ? members : 0;
  commit(warp, in->d, mask, result);
  if (in->x) warp.set_predicate(u32(in->x), mask, same ? ALL_LANES : 0);
  return in + 1;
}

// redux: d = the values of all members reduced. a = value, b = member mask.
template <class T, class F> const Record* reduce(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u32 members = members_of(warp, in, mask, in->b);
  if (members & ~mask) return warp.wait_for_lanes(in, members);
  const T* value = warp.row<T>(in->a);
  const int first = __builtin_ctz(mask);
  T sum = value[first];
  for_lanes(mask & ~(1u << first), [&](int lane) { sum = F{}(sum, value[lane]); });
  alignas(64) T result[LANES];
  for (T& lane : result) lane = sum;
  commit(warp, in->d, mask, result);
  return in + 1;
}
template <class T, class F> void add_reduction(Table& table, const char* name, F) { table.add(name, "d32 a32 b32", reduce<T, F>); }

// elect.sync d|p, mask: the lowest member. extra at x: row of d (or 0xffff), predicate, row of the member mask.
const Record* elect(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u16* extra = warp.extra + in->x;
  const u32 members = members_of(warp, in, mask, extra[2]);
  if (members & ~mask) return warp.wait_for_lanes(in, members);
  const u32 leader = u32(__builtin_ctz(members));
  if (extra[0] != 0xffff) {
    alignas(64) u32 result[LANES];
    for (u32& lane : result) lane = leader;
    commit(warp, extra[0], mask, result);
  }
  warp.set_predicate(extra[1], mask, 1u << leader);
  return in + 1;
}

// bar.warp.sync: a = member mask.
const Record* synchronize_warp(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u32 members = members_of(warp, in, mask, in->a) & warp.live;
  if (members & ~mask) return warp.wait_for_lanes(in, members);
  if (!warp.cta->checks) return in + 1;
  const u32* member_mask = warp.row<u32>(in->a);
  for (u32 rest = mask; rest;) {  // lanes may have come with different masks
    const u32 together = member_mask[__builtin_ctz(rest)] & warp.live;
    warp.knowledge.synchronize(together, warp.live);
    rest &= ~together;
  }
  return in + 1;
}

}  // namespace

void register_collective(Table& table) {
  table.family(Class::MOVE);
  table.add("shfl.up", "", shuffle<Shuffle::UP>);
  table.add("shfl.down", "", shuffle<Shuffle::DOWN>);
  table.add("shfl.bfly", "", shuffle<Shuffle::BUTTERFLY>);
  table.add("shfl.idx", "", shuffle<Shuffle::INDEX>);
  table.add("vote.all.pred", "dp ap b32", vote<Vote::ALL>);
  table.add("vote.any.pred", "dp ap b32", vote<Vote::ANY>);
  table.add("vote.uni.pred", "dp ap b32", vote<Vote::UNIFORM>);
  table.add("vote.ballot.b32", "d32 ap b32", vote<Vote::BALLOT>);
  table.add("match.any.b32", "d32 a32 b32", match_any<u32>);
  table.add("match.any.b64", "d32 a64 b32", match_any<u64>);
  table.add("match.all.b32", "d32 a32 b32", match_all<u32>);
  table.add("match.all.b64", "d32 a64 b32", match_all<u64>);
  add_reduction<u32>(table, "redux.add.u32 redux.add.s32", [](u32 a, u32 b) { return a + b; });
  add_reduction<i32>(table, "redux.min.s32", [](i32 a, i32 b) { return std::min(a, b); });
  add_reduction<i32>(table, "redux.max.s32", [](i32 a, i32 b) { return std::max(a, b); });
  add_reduction<u32>(table, "redux.min.u32", [](u32 a, u32 b) { return std::min(a, b); });
  add_reduction<u32>(table, "redux.max.u32", [](u32 a, u32 b) { return std::max(a, b); });
  add_reduction<u32>(table, "redux.and.b32", [](u32 a, u32 b) { return a & b; });
  add_reduction<u32>(table, "redux.or.b32", [](u32 a, u32 b) { return a | b; });
  add_reduction<u32>(table, "redux.xor.b32", [](u32 a, u32 b) { return a ^ b; });
  add_reduction<f32>(table, "redux.min.f32", [](f32 a, f32 b) { return minimum(a, b); });
  add_reduction<f32>(table, "redux.max.f32", [](f32 a, f32 b) { return maximum(a, b); });
  table.add("elect.sync", "", elect, Class::CONTROL);
  table.add("bar.warp.sync", "a32", synchronize_warp, Class::CONTROL);
}

}  // namespace sim
