// The mbarriers of a cluster: barriers in shared memory whose phases complete when all arrivals and all announced bytes have come.
//
// Contract: the state of an mbarrier is kept here; its eight bytes of shared memory only hold a word by which it is recognised, so that one that was
// never initialised, or was overwritten, is an error. Asynchronous work that completes on an mbarrier is done in the name of the mbarrier's
// agent, so that exactly those who waited for the phase know of it (see clock.h). Who starts such work calls `issue` at once and `complete`
// when its bytes have arrived; between the two the phase cannot complete.
//
// A wait by parity cannot tell a phase from the one after the next: a warp that looks only then sees the parity that it had before, and waits for
// ever. So a warp's wait for a phase must happen before the next phase ends. Whether it does is asked of the clocks, when that phase ends: the order
// in which things happened to come does not matter.
#pragma once

#include <array>
#include <string>

#include "cluster.h"
#include "shadow.h"

namespace sim {

struct Mbarrier {
  bool valid;
  u32 rank, slot, address;  // its block, its number there, its address in the shared memory of that block
  u32 arrivals;             // expected in every phase
  u32 pending;              // of these, missing in this phase
  u32 phase;                // completed phases
  // Bytes of this phase: announced by expect-tx; of all copies issued; of those that arrived. The tx-count of the PTX ISA is announced - arrived.
  i64 announced, issued, arrived;
  Place last_copy;  // that was issued in this phase
  bool carries;     // copies complete in this phase
  u32 carried;      // phases up to the last one in which copies completed
  u32 waited;       // phases that somebody waited for
  struct Wait {
    const Warp* warp;
    u32 clock;  // of the warp's waits
    Place place;
  };
  std::vector<Wait> waits;  // that passed in this phase, for the phase before: the last one of every warp
  Place last_arrival;
  Place init;
  Stamp init_fence;               // the fence.mbarrier_init after the initialisation, if any
  Knowledge arriving, completed;  // of those that arrived, up to now and in completed phases
};

class Mbarriers final : public Engine {
 public:
  explicit Mbarriers(Cluster& cluster);

  void reset() override;
  bool step(Random&) override { return false; }
  void check_exit(Warp& warp, const Record* in, u32 lanes) override;
  void describe_stall(std::string& text) const override;

  // `at` is always the lane on whose behalf something happens, for reports.
  void init(const Place& at, Cta& cta, u32 address, u32 arrivals);
  void invalidate(const Place& at, Mbarrier& barrier);
  // The mbarrier at an address of a block. Throws when there is none.
  Mbarrier& find(const Place& at, const Cta& cta, u32 address, const char* what);

  void expect(const Place& at, Mbarrier& barrier, u32 bytes);
  void arrive(const Place& at, Mbarrier& barrier, u32 count);
  void expect_arrival(const Place& at, Mbarrier& barrier);  // one more, in this phase only
  void drop(Mbarrier& barrier, u32 count) { barrier.arrivals -= count; }

  // Finds the mbarrier that a copy of `bytes` bytes will complete on. By a unit of the asynchronous proxy its initialisation must be fenced.
  Mbarrier& issue(Warp& warp, const Record* in, u32 lane, Cta& target, u32 address, u32 bytes, bool proxy);
  void issue(const Place& at, Mbarrier& barrier, u32 bytes);  // the same for an mbarrier at hand
  // Asynchronous work that a warp issues comes after the waits that the warp knows of, and completes in this phase.
  void release_waits(const Warp& warp, Mbarrier& barrier) const;
  void carry(const Place& at, Mbarrier& barrier);  // asynchronous work completes in this phase
  AsyncAgent agent(const Mbarrier& barrier, bool proxy) const;
  void complete(Mbarrier& barrier, u32 bytes);

  // A wait for the phase that has just completed.
  void note_wait(Warp& warp, const Place& at, Mbarrier& barrier);
  void fence_inits(Warp& warp, const Record* in, u32 lanes);
  // Whether a wait that cannot succeed yet answers "no" instead of blocking: now and then in the random schedule.
  bool gives_up();
  // Notes who waits, for `describe_stall`.
  void blocked(const Warp& warp, const Place& at, const Mbarrier& barrier);
  void passed(const Warp& warp, const Place& at);

 private:
  static constexpr u32 MAX_FALSE_ANSWERS = 8;  // until something happens to an mbarrier, so that a deadlock is still found
  struct Waiter {
    u32 warp;  // in the cluster
    Place place;
    const Mbarrier* barrier;
  };
  void complete_phase_if_due(Mbarrier& barrier);
  void check_waits(Mbarrier& barrier) const;
  void check_announced(const Place& at, const Mbarrier& barrier) const;
  std::string name(const Mbarrier& barrier) const;

  Cluster& cluster_;
  std::vector<std::array<Mbarrier, MAX_MBARRIERS>> barriers_;  // of each block
  std::vector<Waiter> waiters_;
  u32 false_answers_ = MAX_FALSE_ANSWERS;  // left
};

Place place_of(const Warp& warp, const Record* in, u32 lanes);

// ---- for instructions that name mbarriers

// Tells the race detector of an access to the eight bytes.
void report_word_access(Warp& warp, const Record* in, Access access, Cta& target, u32 address, u32 lanes, const char* what);

// Calls body(block, address, lanes) for every different address in shared memory that the first operand in `extra` gives to lanes.
template <class Body> void for_mbarrier_addresses(Warp& warp, const Record* in, const char* what, Body body) {
  u32 mask = warp.mask(in);
  u32 addresses[LANES];
  shared_addresses(warp, in, mask, warp.extra + in->x, what, addresses);
  while (mask != 0) {
    const u32 first = u32(__builtin_ctz(mask));
    u32 lanes = 0;
    for_lanes(mask, [&](int lane) { lanes |= u32(addresses[lane] == addresses[first]) << lane; });
    Cta& target = target_block(warp, in, first, addresses[first], what);
    const u32 address = addresses[first] & ~RANK_MASK;
    resolve_range(warp, in, first, target, address, {Access::NONE, 8, 8, what});
    body(target, address, lanes);
    mask &= ~lanes;
  }
}

// The same with the mbarriers there. All instructions but init and inval only look at the word in memory, whatever they do to the state.
template <class Body> void for_barriers(Warp& warp, const Record* in, const char* what, Body body) {
  for_mbarrier_addresses(warp, in, what, [&](Cta& cta, u32 address, u32 lanes) {
    Mbarrier& barrier = warp.cta->cluster->mbarriers->find(place_of(warp, in, lanes), cta, address, what);
    report_word_access(warp, in, Access::READ, cta, address, lanes, what);
    body(barrier, lanes);
  });
}

}  // namespace sim
