// See async_copy.h.
//
// Contract: the bytes of a copy are read and written when it completes. Schedule EARLY completes it at once, LATE only when a wait demands
// it, RANDOM at any moment between. Commit groups are per thread, as in the PTX ISA: a commit closes a group for the lanes that execute it.
// A copy that nothing waited for is reported when its lane exits, under every schedule; cp.async.mbarrier.arrive hands the wait over to an mbarrier.
#include "async_copy.h"

#include <algorithm>

#include "cluster.h"
#include "mbarrier.h"
#include "profile.h"
#include "shadow.h"
#include "table.h"

namespace sim {
namespace {

struct Copy {
  u32 record;
  u32 open;      // lanes that have not committed it yet
  u32 unwaited;  // lanes that have not waited for it yet
  u32 pending;   // lanes whose bytes have not moved yet
  u32 group;     // number of the commit that closed it; meaningless while open
  u32 bytes;     // written per lane
  u32 clock;     // of the warp's copies, see clock.h
  Pointers to, from;
  u32 size[LANES];  // bytes read per lane; the rest becomes zero
};

void move_bytes(Copy& copy, u32 lanes) {
  lanes &= copy.pending;
  copy.pending &= ~lanes;
  for_lanes(lanes, [&](int lane) {
    if (SIM_LIKELY(copy.size[lane] == 16)) {
      memcpy(copy.to.lane[lane], copy.from.lane[lane], 16);
      return;
    }
    u8 bytes[16] = {};
    memcpy(bytes, copy.from.lane[lane], copy.size[lane]);
    memcpy(copy.to.lane[lane], bytes, copy.bytes);
  });
}

// An arrival at an mbarrier once all copies of a lane up to `clock` are complete.
struct Arrival {
  Place place;
  u32 lane, clock;
  Mbarrier* barrier;
};

// The copies of one warp, oldest first, and its commits. Commit i of the warp closed a group for the lanes of `commits[i - first_commit]`.
struct Queue {
  std::vector<Copy> copies;
  std::vector<u32> commits;
  std::vector<Arrival> arrivals;
  u32 first_commit = 0;

  void clear() {
    copies.clear();
    arrivals.clear();
    commits.clear();
    first_commit = 0;
  }

  void commit(u32 lanes) {
    const u32 number = first_commit + u32(commits.size());
    const size_t count = copies.size();
    for (size_t i = 0; i < count; ++i) {
      const u32 closing = copies[i].open & lanes;
      if (closing == 0) continue;
      if (closing != copies[i].open) {  // some lanes commit later: their part becomes a copy of its own
        Copy rest = copies[i];
        rest.open &= ~closing, rest.unwaited &= ~closing, rest.pending &= ~closing;
        copies.push_back(rest);
        copies[i].unwaited &= closing, copies[i].pending &= closing;
      }
      copies[i].open = 0;
      copies[i].group = number;
    }
    commits.push_back(lanes);
  }

  // Completes what `lanes` wait for when at most `allowed` of their newest groups may stay.
  void wait(u32 lanes, u32 allowed) {
    u32 newer[LANES] = {};  // groups that a lane has seen, newest first
    for (size_t i = commits.size(); i-- > 0;) {
      u32 due = 0;
      for_lanes(commits[i] & lanes, [&](int lane) { due |= u32(newer[lane]++ >= allowed) << lane; });
      if (due == 0) continue;
      commits[i] &= ~due;
      for (Copy& copy : copies) {
        if (copy.open == 0 && copy.group == first_commit + i) move_bytes(copy, due), copy.unwaited &= ~due;
      }
    }
    forget();
  }

  void wait_all(u32 lanes) {
    for (u32& commit : commits) commit &= ~lanes;
    for (Copy& copy : copies) {
      move_bytes(copy, lanes);
      copy.unwaited &= ~lanes;
      copy.open &= ~lanes;
    }
    forget();
  }

  bool is_complete(const Arrival& arrival) const {
    return std::none_of(copies.begin(), copies.end(),
                        [&](const Copy& copy) { return copy.clock <= arrival.clock && (copy.pending >> arrival.lane & 1); });
  }

  void forget() {
    const auto is_done = [](const Copy& copy) { return copy.unwaited == 0 && copy.pending == 0; };
    copies.erase(std::remove_if(copies.begin(), copies.end(), is_done), copies.end());
    size_t done = 0;
    while (done < commits.size() && commits[done] == 0) ++done;
    commits.erase(commits.begin(), commits.begin() + i64(done));
    first_commit += u32(done);
  }
};

class AsyncCopyEngine final : public Engine {
 public:
  explicit AsyncCopyEngine(Cluster& cluster) : cluster_(cluster), schedule_(cluster.launch.schedule), queues(cluster.warps.size()) {}

  void reset() override {
    for (Queue& queue : queues) queue.clear();
  }

  void issued(Copy& copy, Random& random) {
    if (schedule_ == Schedule::EARLY) move_bytes(copy, ALL_LANES);
    if (schedule_ == Schedule::RANDOM && random.below(4) == 0) move_bytes(copy, random.next() | random.next());
  }

  // The arrivals at mbarriers whose copies are complete.
  void arrive(Queue& queue) {
    for (size_t i = 0; i < queue.arrivals.size();) {
      const Arrival arrival = queue.arrivals[i];
      if (!queue.is_complete(arrival)) {
        ++i;
        continue;
      }
      queue.arrivals.erase(queue.arrivals.begin() + i64(i));
      cluster_.mbarriers->arrive(arrival.place, *arrival.barrier, 1);
    }
  }

  // Completes what an mbarrier waits for. Only a random schedule also completes copies that nobody waits for.
  bool step(Random& random) override {
    for (Queue& queue : queues) {
      if (queue.arrivals.empty()) continue;
      const Arrival arrival = queue.arrivals[random.below(u32(queue.arrivals.size()))];
      for (Copy& copy : queue.copies) {
        if (copy.clock <= arrival.clock) move_bytes(copy, 1u << arrival.lane);
      }
      arrive(queue);
      queue.forget();
      return true;
    }
    if (schedule_ != Schedule::RANDOM) return false;
    Queue& queue = queues[random.below(u32(queues.size()))];
    if (queue.copies.empty()) return false;
    Copy& copy = queue.copies[random.below(u32(queue.copies.size()))];
    if (copy.pending == 0) return false;
    move_bytes(copy, random.below(2) ? ALL_LANES : random.next());
    return true;
  }

  void check_exit(Warp& warp, const Record* in, u32 lanes) override {
    if (!warp.cta->checks) return;
    for (const Copy& copy : queues[warp.index].copies) {
      if ((copy.unwaited & lanes) == 0) continue;
      Failure failure{"open-copy", "lanes exit, but nothing waited for a cp.async that they issued", {}, 0, 0, {}};
      failure.where = {warp.id, copy.unwaited & lanes, copy.record, warp.cta->rank};
      failure.places.push_back({warp.id, lanes, warp.cta->record_index(in), warp.cta->rank});
      throw failure;
    }
  }

 private:
  Cluster& cluster_;
  Schedule schedule_;

 public:
  std::vector<Queue> queues;
};

AsyncCopyEngine& engine_of(Warp& warp) { return static_cast<AsyncCopyEngine&>(*warp.cta->cluster->engines[0]); }

// a = destination, b = source, c = bytes to read; extra at x: offsets of destination and source, bytes to write, address widths.
const Record* copy_async(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u16* extra = warp.extra + in->x;
  const u32 bytes = extra[4];
  const u32* size = warp.row<u32>(in->c);
  AsyncCopyEngine& engine = engine_of(warp);
  std::vector<Copy>& copies = engine.queues[warp.index].copies;
  copies.emplace_back();
  Copy& copy = copies.back();
  copy.record = warp.cta->record_index(in);
  copy.open = copy.unwaited = copy.pending = mask;
  copy.bytes = bytes;
  memcpy(copy.size, size, sizeof copy.size);
  u32 whole = 0, nothing = 0;
  for (int lane = 0; lane < LANES; ++lane) whole |= u32(size[lane] == bytes) << lane, nothing |= u32(size[lane] == 0) << lane;
  resolve(warp, in, Space::SHARED, mask, {in->a, (extra[5] & 1) != 0, offset_at(extra)}, {Access::NONE, bytes, bytes, "destination of cp.async"},
          copy.to);
  const Address source{in->b, (extra[5] & 2) != 0, offset_at(extra + 2)};
  resolve(warp, in, Space::GLOBAL, mask & whole, source, {Access::READ, bytes, bytes, "source of cp.async", false}, copy.from);
  for_lanes(mask & ~whole & ~nothing, [&](int lane) {  // fewer bytes than are written: rare, so one lane at a time
    if (size[lane] > bytes) {
      warp.fail(in, "async-copy", 1u << lane, "lane %d reads %u bytes, but only %u are written", lane, size[lane], bytes);
    }
    Pointers one;
    resolve(warp, in, Space::GLOBAL, 1u << lane, source, {Access::READ, size[lane], 1, "source of cp.async", false}, one);
    copy.from.lane[lane] = one.lane[lane];
  });
  u32 destination[LANES];
  for (int lane = 0; lane < LANES; ++lane) destination[lane] = u32(copy.to.lane[lane] - warp.cta->shared);
  if (Profile* profile = warp.cta->profile) {
    profile->shared(copy.record, Access::WRITE, mask, destination, bytes);
    profile->global(copy.record, Access::READ, mask & ~nothing, (const u64*)copy.from.lane, size);
  }
  const u32 agent = warp.cta->cluster->agent(warp.cta->rank, OWN_COPIES, warp.id);
  copy.clock = warp.cta->cluster->tick(agent);
  if (SharedShadow* shadow = warp.cta->shadow.get()) {
    for_lanes(mask, [&](int lane) {
      shadow->access_async(warp, in, Access::WRITE, u32(lane), {agent, copy.clock, false}, destination[lane], bytes, "cp.async");
    });
  }
  ++warp.cta->counters.async_copies;
  engine.issued(copy, warp.cta->cluster->random);
  return in + 1;
}

const Record* commit_group(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask) engine_of(warp).queues[warp.index].commit(mask);
  return in + 1;
}

// The race detector learns which copies all their lanes have waited for.
void waited(Warp& warp, u32 lanes, const Queue& queue) {
  if (!warp.cta->checks) return;
  u32 done = MAX_CLOCK;
  for (const Copy& copy : queue.copies) {
    if (copy.unwaited != 0) done = std::min(done, copy.clock - 1);
  }
  if (done == MAX_CLOCK) done = warp.cta->cluster->latest(warp.knowledge.agent(OWN_COPIES));
  warp.knowledge.waited(OWN_COPIES, done, lanes);
}

const Record* wait_group(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  Queue& queue = engine_of(warp).queues[warp.index];
  queue.wait(mask, u32(in->x));
  engine_of(warp).arrive(queue);
  waited(warp, mask, queue);
  return in + 1;
}

const Record* wait_all(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  Queue& queue = engine_of(warp).queues[warp.index];
  queue.wait_all(mask);
  engine_of(warp).arrive(queue);
  waited(warp, mask, queue);
  return in + 1;
}

// cp.async.mbarrier.arrive: extra: address of the mbarrier; a = 1 with .noinc, which does not add to the arrivals that the phase expects.
const Record* arrive_on_mbarrier(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  AsyncCopyEngine& engine = engine_of(warp);
  Cluster& cluster = *warp.cta->cluster;
  Queue& queue = engine.queues[warp.index];
  const u32 agent = cluster.agent(warp.cta->rank, OWN_COPIES, warp.id), clock = cluster.latest(agent);
  for_barriers(warp, in, "cp.async.mbarrier.arrive", [&](Mbarrier& barrier, u32 lanes) {
    if (warp.cta->checks) barrier.arriving.known.raise(agent, clock, lanes), cluster.mbarriers->release_waits(warp, barrier);
    for_lanes(lanes, [&](int lane) {
      const Place at = place_of(warp, in, 1u << lane);
      if (!(in->a & 1)) cluster.mbarriers->expect_arrival(at, barrier);
      queue.arrivals.push_back({at, u32(lane), clock, &barrier});
    });
    cluster.mbarriers->carry(place_of(warp, in, lanes), barrier);
    for (Copy& copy : queue.copies) copy.unwaited &= ~lanes;
  });
  engine.arrive(queue);
  queue.forget();
  return in + 1;
}

}  // namespace

std::unique_ptr<Engine> make_async_copy_engine(Cluster& cluster) { return std::make_unique<AsyncCopyEngine>(cluster); }

void register_async_copy(Table& table) {
  table.family(Class::CONTROL);
  table.add("cp.async", "", copy_async, Class::GLOBAL);
  table.add("cp.async.commit_group", "", commit_group);
  table.add("cp.async.wait_group", "xi", wait_group);
  table.add("cp.async.wait_all", "", wait_all);
  table.add("cp.async.mbarrier.arrive", "", arrive_on_mbarrier);
}

}  // namespace sim
