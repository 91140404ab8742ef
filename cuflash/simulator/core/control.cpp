// Branches, exits, joins and the instructions that only change the flow of a warp.
#include "cluster.h"
#include "table.h"
#include "validate.h"

namespace sim {
namespace {

// Stands at every label. Converged warps pass; otherwise lanes that are behind go first, and those that are here join in.
const Record* join(Warp& warp, const Record* in) {
  ++warp.uncounted;
  if (SIM_LIKELY(warp.num_groups == 1)) return in + 1;
  Group& mine = warp.groups[warp.running];
  mine.record = warp.cta->record_index(in + 1);
  for (u32 i = 0; i < warp.num_groups; ++i) {
    if (i != warp.running && warp.groups[i].record <= mine.record) return warp.regroup();
  }
  return in + 1;
}

// The lanes of `leaving` become a group of their own at `target`.
const Record* split(Warp& warp, const Record* in, u32 leaving, u32 target) {
  Group& mine = warp.groups[warp.running];
  mine.record = warp.cta->record_index(in + 1);
  mine.lanes = warp.active & ~leaving;
  warp.groups[warp.num_groups++] = {target, leaving, 0, false};
  return warp.regroup();
}

const Record* branch(Warp& warp, const Record* in) {
  const u32 leaving = warp.mask(in);
  if (leaving == 0) return in + 1;
  if (SIM_LIKELY(leaving == warp.active)) return warp.cta->program.records.data() + in->x;
  return split(warp, in, leaving, u32(in->x));
}

// brx.idx: a = index, x = start in `extra` of the number of targets and their records (low half, high half).
const Record* branch_indexed(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u32* index = warp.row<u32>(in->a);
  const u16* list = warp.extra + in->x;
  const u32 chosen = index[__builtin_ctz(mask)];
  u32 together = 0;
  for_lanes(mask, [&](int lane) {
    if (index[lane] >= list[0]) warp.fail(in, "branch-index", 1u << lane, "index %u, but the list has %u targets", index[lane], list[0]);
    together |= u32(index[lane] == chosen) << lane;
  });
  const u32 target = list[1 + 2 * chosen] | u32(list[2 + 2 * chosen]) << 16;
  if (together == warp.active) return warp.cta->program.records.data() + target;
  // One target at a time: the lanes that go elsewhere stay and execute the branch again.
  Group& mine = warp.groups[warp.running];
  mine.record = warp.cta->record_index(in);
  mine.lanes = warp.active & ~together;
  warp.groups[warp.num_groups++] = {target, together, 0, false};
  return warp.regroup();
}

const Record* leave(Warp& warp, const Record* in) {
  const u32 leaving = warp.mask(in);
  if (leaving == 0) return in + 1;
  for (auto& engine : warp.cta->cluster->engines) engine->check_exit(warp, in, leaving);
  warp.live &= ~leaving;
  warp.cta->cluster->barrier.complete_if_all_arrived(*warp.cta->cluster);
  Group& mine = warp.groups[warp.running];
  mine.lanes = warp.active & ~leaving;
  mine.record = warp.cta->record_index(in + 1);
  if (mine.lanes == 0) mine = warp.groups[--warp.num_groups];
  return warp.regroup();
}

const Record* nothing(Warp&, const Record* in) { return in + 1; }

// Behind the last record. Every program that was decoded ends before.
const Record* past_the_end(Warp& warp, const Record* in) { warp.fail(in, "program", warp.active, "the program has no end"); }

const Record* trap(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  warp.fail(in, "trap", mask, "the kernel executed a trap");
}

const Record* device_assert(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  warp.fail(in, "assert", mask, "a device-side assertion failed");
}

// Time advances by one with every look at the clock.
template <class T> const Record* clock(Warp& warp, const Record* in) {
  alignas(64) T now[LANES];
  ++warp.clock;
  for (T& value : now) value = T(warp.clock);
  commit(warp, in->d, warp.mask(in), now);
  return in + 1;
}

const Record* active_mask(Warp& warp, const Record* in) {
  alignas(64) u32 value[LANES];
  for (u32& lane : value) lane = warp.active;
  commit(warp, in->d, warp.mask(in), value);
  return in + 1;
}

}  // namespace

void register_control(Table& table) {
  table.family(Class::CONTROL);
  table.add("join", "", join, Class::NONE);
  table.add("bra", "", branch);
  table.add("brx.idx", "", branch_indexed);
  table.add("exit ret", "", leave);
  table.add("nop", "", nothing);
  table.add(PAST_THE_END, "", past_the_end, Class::NONE);
  table.add("nanosleep.u32", "a32", nothing);
  table.add("trap", "", trap);
  table.add("brkpt", "", nothing);
  table.add("assert", "", device_assert);
  table.add("read.clock", "d32", clock<u32>, Class::MOVE);
  table.add("read.clock64", "d64", clock<u64>, Class::MOVE);
  table.add("activemask.b32", "d32", active_mask, Class::MOVE);
}

}  // namespace sim
