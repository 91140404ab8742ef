// bar.sync, bar.arrive and bar.red: the 16 named barriers of a block.
//
// Contract: a = barrier number, b = number of threads when HAS_COUNT is set in x. Warps arrive as a whole, and count as 32 threads even when
// lanes of them have exited. A waiting group holds a ticket, the generation of the barrier that it waits for.
#include "cluster.h"
#include "table.h"

namespace sim {
namespace {

constexpr i32 HAS_COUNT = 1;

struct Arrival {
  Barrier* barrier;
  bool completes;
};

u32 value_of(const Warp& warp, u16 row, u32 mask) { return warp.row<u32>(row)[__builtin_ctz(mask)]; }

Arrival arrive(Warp& warp, const Record* in, u32 mask) {
  const u32 number = value_of(warp, in->a, mask);
  if (number >= 16) warp.fail(in, "barrier", mask, "barrier %u: there are only barriers 0 to 15", number);
  Barrier& barrier = warp.cta->barriers[number];
  const u32 expected = in->x & HAS_COUNT ? value_of(warp, in->b, mask) : warp.cta->num_warps * LANES;
  if (expected == 0 || expected % LANES != 0) {
    warp.fail(in, "barrier", mask, "barrier %u: a count of %u threads is not a positive multiple of 32", number, expected);
  }
  if (barrier.arrived != 0 && barrier.expected != expected) {
    warp.fail(in, "barrier", mask, "barrier %u: expects %u threads here, but others that arrived expect %u", number, expected, barrier.expected);
  }
  if (barrier.arrived == 0) {
    barrier.votes_any = 0, barrier.votes_all = 1, barrier.count = 0;
    if (warp.cta->checks) barrier.arriving.reset(warp.cta->cluster->num_agents());
  }
  if (warp.cta->checks) warp.knowledge.release(mask, barrier.arriving);
  barrier.expected = expected;
  barrier.arrived += LANES;
  if (barrier.arrived > expected) {
    warp.fail(in, "barrier", mask, "barrier %u: %u threads arrived, %u were expected", number, barrier.arrived, expected);
  }
  return {&barrier, barrier.arrived == expected};
}

void complete(Warp& warp, Barrier& barrier) {
  ++barrier.generation;
  const u32 slot = barrier.generation & 1;
  barrier.result_any[slot] = barrier.votes_any;
  barrier.result_all[slot] = barrier.votes_all;
  barrier.result_count[slot] = barrier.count;
  if (warp.cta->checks) std::swap(barrier.completed[slot], barrier.arriving);
  barrier.arrived = 0;
  ++warp.cta->counters.barriers;
}

// Arrives (once) and waits. True when the barrier has completed; `generation` is the one that this group waited for.
bool arrive_and_wait(Warp& warp, const Record* in, u32 mask, u32 votes, Barrier*& barrier, u32& generation) {
  Group& group = warp.groups[warp.running];
  if (group.ticket == 0) {
    const Arrival arrival = arrive(warp, in, mask);
    barrier = arrival.barrier;
    barrier->votes_any |= (votes & mask) != 0;
    barrier->votes_all &= (votes & mask) == mask;
    barrier->count += u32(__builtin_popcount(votes & mask));
    group.ticket = barrier->generation + 1;
    if (arrival.completes) complete(warp, *barrier);
  } else {
    barrier = &warp.cta->barriers[value_of(warp, in->a, mask) % 16];
  }
  generation = group.ticket;
  if (barrier->generation < generation) return false;
  group.ticket = 0;
  if (warp.cta->checks) warp.knowledge.acquire(mask, warp.live, barrier->completed[generation & 1]);
  return true;
}

const Record* barrier_sync(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  if (SIM_UNLIKELY(mask != warp.live)) return warp.wait_for_lanes(in, warp.live);
  Barrier* barrier;
  u32 generation;
  return arrive_and_wait(warp, in, mask, 0, barrier, generation) ? in + 1 : warp.block();
}

const Record* barrier_arrive(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  if (SIM_UNLIKELY(mask != warp.live)) return warp.wait_for_lanes(in, warp.live);
  const Arrival arrival = arrive(warp, in, mask);
  if (arrival.completes) complete(warp, *arrival.barrier);
  return in + 1;
}

enum class Reduction { COUNT, ALL, ANY };

// bar.red: c = predicate, d = result.
template <Reduction REDUCTION> const Record* barrier_reduce(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  if (SIM_UNLIKELY(mask != warp.live)) return warp.wait_for_lanes(in, warp.live);
  Barrier* barrier;
  u32 generation;
  if (!arrive_and_wait(warp, in, mask, warp.predicates[in->c], barrier, generation)) return warp.block();
  const u32 slot = generation & 1;
  if (REDUCTION == Reduction::COUNT) {
    alignas(64) u32 result[LANES];
    for (u32& lane : result) lane = barrier->result_count[slot];
    commit(warp, in->d, mask, result);
  } else {
    const u32 result = REDUCTION == Reduction::ALL ? barrier->result_all[slot] : barrier->result_any[slot];
    warp.set_predicate(in->d, mask, result ? ALL_LANES : 0);
  }
  return in + 1;
}

}  // namespace

void register_barrier(Table& table) {
  table.family(Class::CONTROL);
  table.add("bar.sync", "", barrier_sync);
  table.add("bar.arrive", "", barrier_arrive);
  table.add("bar.red.popc.u32", "", barrier_reduce<Reduction::COUNT>);
  table.add("bar.red.and.pred", "", barrier_reduce<Reduction::ALL>);
  table.add("bar.red.or.pred", "", barrier_reduce<Reduction::ANY>);
}

}  // namespace sim
