// Who knows of whose memory accesses: the vector clocks behind the race detector.
//
// Contract: an agent is whoever accesses memory in an order of its own: a warp; the copies that a warp's cp.async issue; its bulk copies; the matrix
// products of a warpgroup; the copies that complete on one mbarrier. Every access carries a stamp: agent, the agent's clock, lane, record. A
// clock says of every agent up to which of its clocks accesses happened before. Synchronisation moves clocks: `release` adds what lanes
// know to a clock that others `acquire`. Lanes of a warp are told apart: until a warp synchronises, a lane knows its own accesses only.
//
// In kernels with mbarriers a clock also says of every warp up to which of its waits for mbarriers have happened, see mbarrier.h. These agents have
// the highest numbers and no stamps. A wait is one of the whole warp: its lanes wait together, and any of them vouches for all.
//
// Two kinds of knowledge: `known`, and `fenced`, what is known through a proxy fence. Asynchronous units (TMA, wgmma) must find ordinary
// accesses fenced.
#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace sim {

struct Warp;

constexpr u32 ATOMIC_LANE = 32;  // added to the lane of strong and atomic accesses

// One access in 64 bits: clock, agent, lane, record from the top. 0: none.
struct Stamp {
  u64 word = 0;

  static Stamp make(u32 agent, u32 clock, u32 lane, u32 record) {
    return {u64(clock) << 39 | u64(agent) << 28 | u64(lane) << 22 | (record & 0x3fffffu)};
  }
  u32 clock() const { return u32(word >> 39); }
  u32 agent() const { return u32(word >> 28) & 0x7ffu; }
  u32 lane() const { return u32(word >> 22) & 31u; }
  u32 record() const { return u32(word) & 0x3fffffu; }
  bool atomic() const { return word >> 27 & 1; }
  u32 lane_mask() const { return 1u << lane(); }
  Stamp by_lane(u32 lane) const { return {(word & ~(u64(31) << 22)) | u64(lane) << 22}; }
  Stamp by_agent(u32 agent) const { return {(word & ~(u64(0x7ff) << 28)) | u64(agent) << 28}; }
  explicit operator bool() const { return word != 0; }
};
constexpr u32 NO_AGENT = ~0u;
constexpr u32 MAX_CLOCK = (1u << 25) - 1, MAX_AGENTS = 1u << 11, MAX_STAMPED_RECORDS = 1u << 22;

// For every agent the clock up to which its accesses are covered. Some lanes of a warp may be ahead of the others.
class Clock {
 public:
  void reset(u32 num_agents) {
    at_.assign(num_agents, 0);
    parts_.clear();
  }
  u32 at(u32 agent) const { return at_[agent]; }
  SIM_INLINE bool covers(Stamp stamp) const { return SIM_LIKELY(stamp.clock() <= at_[stamp.agent()]) || covers_in_part(stamp); }
  void raise(u32 agent, u32 clock) { at_[agent] = std::max(at_[agent], clock); }
  // Only the accesses of `lanes`.
  void raise(u32 agent, u32 clock, u32 lanes);
  void join(const Clock& other);

 private:
  struct Part {
    u32 agent, clock, lanes;
  };
  bool covers_in_part(Stamp stamp) const;
  std::vector<u32> at_;
  std::vector<Part> parts_;
};

// What travels through a barrier.
struct Knowledge {
  Clock known, fenced;

  void reset(u32 num_agents) { known.reset(num_agents), fenced.reset(num_agents); }
  void join(const Knowledge& other) { known.join(other.known), fenced.join(other.fenced); }
};

// Kinds of agents that belong to a warp.
enum OwnAgent : u32 { OWN_ACCESSES = 0, OWN_COPIES = 1, OWN_BULK = 2, NUM_OWN_AGENTS = 3 };

// What the lanes of one warp know.
class WarpKnowledge {
 public:
  // `waits`: the agent of its waits for mbarriers, or NO_AGENT.
  void reset(u32 num_agents, const u32 (&own_agents)[NUM_OWN_AGENTS], u32 waits);

  u32 now() const { return own_[OWN_ACCESSES].done; }  // the clock of the warp's next access
  u32 agent(OwnAgent which) const { return own_[which].agent; }

  // Whether the access happened before what `lane` does now.
  SIM_INLINE bool knows(Stamp stamp, u32 lane) const {
    return SIM_LIKELY(stamp.clock() <= all_.known.at(stamp.agent())) || knows_slowly(stamp, lane);
  }
  bool knows_fenced(Stamp stamp, u32 lane) const;
  // The same for an access that several lanes made.
  SIM_INLINE bool knows(Stamp stamp, u32 stamp_lanes, u32 lane) const {
    return SIM_LIKELY(stamp.clock() <= all_.known.at(stamp.agent())) || knows_each(stamp, stamp_lanes, lane);
  }
  const Clock& known_to_all() const { return all_.known; }

  // To be called for every access of `lanes` in a clock that others may synchronise with.
  SIM_INLINE void touch(u32 lanes) { unsynchronized_ |= lanes; }

  // `lanes` of a warp with lanes `live` add what they know, their own accesses included; what they do later is not part of it.
  void release(u32 lanes, Knowledge& into);
  void acquire(u32 lanes, u32 live, const Knowledge& from);
  void synchronize(u32 lanes, u32 live);  // bar.warp.sync
  void fence_proxy(u32 lanes, u32 live);  // what they know, own accesses included, is visible to asynchronous units from now on
  // The asynchronous work that a lane itself issued is done up to `clock`; other lanes learn of it when they synchronise with this one.
  void waited(OwnAgent which, u32 clock, u32 lanes) {
    own_[which].done = std::max(own_[which].done, clock);
    unsynchronized_ |= lanes;
  }
  // Flags, written and read by strong accesses: one passes on what its writer knew at its last fence, and counts for its reader from the next.
  void write_flag(u32 lane, Knowledge& flag) const;
  void read_flag(u32 lane, const Knowledge& flag);
  void fence(u32 lanes, u32 live);
  // Everything that an agent did up to `clock` happened before what `lanes` do now.
  void learn(u32 lanes, u32 live, u32 agent, u32 clock);

  u32 count_wait() { return ++waits_.done; }
  // Only the waits that the warp knows of, its own included; `first` is the agent of the first warp's. For what orders waits but no accesses.
  void release_waits(u32 first, std::vector<u32>& into) const;
  void learn_waits(u32 first, const std::vector<u32>& from);

 private:
  struct Own {
    u32 agent, done;
  };
  bool knows_slowly(Stamp stamp, u32 lane) const;
  bool knows_each(Stamp stamp, u32 stamp_lanes, u32 lane) const;
  Knowledge& of_lane(u32 lane);

  Own own_[NUM_OWN_AGENTS];
  Own waits_;
  u32 unsynchronized_ = 0;        // lanes with accesses, or waits for copies, that not all lanes know
  u32 ahead_ = 0;                 // lanes that know more than `all_`: see `lanes_`
  Knowledge all_;                 // what every lane knows
  std::vector<Knowledge> lanes_;  // empty until a lane gets ahead

  struct Fences {
    Knowledge known_at_last, seen_since;
  };
  u32 fenced_ = 0, seeing_ = 0;  // lanes whose `known_at_last` and `seen_since` mean something
  std::vector<Fences> fences_;   // per lane; empty until there is a fence or a flag is read
  u32 num_agents_ = 0;
};

}  // namespace sim
