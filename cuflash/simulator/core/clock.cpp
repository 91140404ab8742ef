// See clock.h.
#include "clock.h"

namespace sim {

void Clock::raise(u32 agent, u32 clock, u32 lanes) {
  if (clock <= at_[agent]) return;
  for (Part& part : parts_) {
    if (part.agent != agent || part.lanes != lanes) continue;
    part.clock = std::max(part.clock, clock);
    return;
  }
  parts_.push_back({agent, clock, lanes});
}

void Clock::join(const Clock& other) {
  for (size_t i = 0; i < at_.size(); ++i) at_[i] = std::max(at_[i], other.at_[i]);
  if (SIM_LIKELY(parts_.empty() && other.parts_.empty())) return;
  for (const Part& part : other.parts_) raise(part.agent, part.clock, part.lanes);
  parts_.erase(std::remove_if(parts_.begin(), parts_.end(), [&](const Part& part) { return part.clock <= at_[part.agent]; }), parts_.end());
}

bool Clock::covers_in_part(Stamp stamp) const {
  for (const Part& part : parts_) {
    if (part.agent != stamp.agent() || part.clock < stamp.clock()) continue;
    if (part.lanes >> stamp.lane() & 1) return true;
  }
  return false;
}

void WarpKnowledge::reset(u32 num_agents, const u32 (&own_agents)[NUM_OWN_AGENTS], u32 waits) {
  for (u32 i = 0; i < NUM_OWN_AGENTS; ++i) own_[i] = {own_agents[i], 0};
  own_[OWN_ACCESSES].done = 1;
  waits_ = {waits, 0};
  unsynchronized_ = ahead_ = fenced_ = seeing_ = 0;
  num_agents_ = num_agents;
  all_.reset(num_agents);
}

bool WarpKnowledge::knows_slowly(Stamp stamp, u32 lane) const {
  for (const Own& own : own_) {
    if (stamp.agent() == own.agent && stamp.lane() == lane && stamp.clock() <= own.done) return true;
  }
  return all_.known.covers(stamp) || ((ahead_ >> lane & 1) && lanes_[lane].known.covers(stamp));
}

bool WarpKnowledge::knows_each(Stamp stamp, u32 stamp_lanes, u32 lane) const {
  bool all = true;
  for_lanes(stamp_lanes, [&](int other) { all = all && knows_slowly(stamp.by_lane(u32(other)), lane); });
  return all;
}

bool WarpKnowledge::knows_fenced(Stamp stamp, u32 lane) const {
  return all_.fenced.covers(stamp) || ((ahead_ >> lane & 1) && lanes_[lane].fenced.covers(stamp));
}

Knowledge& WarpKnowledge::of_lane(u32 lane) {
  if (lanes_.empty()) lanes_.resize(LANES);
  if (!(ahead_ >> lane & 1)) {
    lanes_[lane] = all_;
    ahead_ |= 1u << lane;
  }
  return lanes_[lane];
}

void WarpKnowledge::release(u32 lanes, Knowledge& into) {
  into.join(all_);
  const bool everything = (unsynchronized_ & ~lanes) == 0;
  for (const Own& own : own_) {
    if (everything) into.known.raise(own.agent, own.done);
    else into.known.raise(own.agent, own.done, lanes);
  }
  if (waits_.agent != NO_AGENT) into.known.raise(waits_.agent, waits_.done);
  for_lanes(lanes & ahead_, [&](int lane) { into.join(lanes_[lane]); });
  ++own_[OWN_ACCESSES].done;
}

void WarpKnowledge::acquire(u32 lanes, u32 live, const Knowledge& from) {
  if ((live & ~lanes) == 0) {
    all_.join(from);
    for_lanes(ahead_, [&](int lane) { lanes_[lane].join(from); });
  } else {
    for_lanes(lanes, [&](int lane) { of_lane(u32(lane)).join(from); });
  }
}

void WarpKnowledge::write_flag(u32 lane, Knowledge& flag) const {
  if (fenced_ >> lane & 1) flag.join(fences_[lane].known_at_last);
}

void WarpKnowledge::read_flag(u32 lane, const Knowledge& flag) {
  if (fences_.empty()) fences_.resize(LANES);
  if (!(seeing_ >> lane & 1)) fences_[lane].seen_since.reset(num_agents_);
  fences_[lane].seen_since.join(flag);
  seeing_ |= 1u << lane;
}

void WarpKnowledge::fence(u32 lanes, u32 live) {
  if (fences_.empty()) fences_.resize(LANES);
  for_lanes(lanes, [&](int lane) {
    Fences& fences = fences_[lane];
    if (seeing_ >> lane & 1) acquire(1u << lane, live, fences.seen_since);
    fences.known_at_last.reset(num_agents_);
    release(1u << lane, fences.known_at_last);
  });
  fenced_ |= lanes;
  seeing_ &= ~lanes;
}

void WarpKnowledge::learn(u32 lanes, u32 live, u32 agent, u32 clock) {
  if ((live & ~lanes) == 0) all_.known.raise(agent, clock);
  else for_lanes(lanes, [&](int lane) { of_lane(u32(lane)).known.raise(agent, clock); });
}

void WarpKnowledge::release_waits(u32 first, std::vector<u32>& into) const {
  if (waits_.agent == NO_AGENT) return;
  into.resize(num_agents_ - first);
  const auto add = [&](const Clock& known) {
    for (u32 i = 0; i < into.size(); ++i) into[i] = std::max(into[i], known.at(first + i));
  };
  add(all_.known);
  for_lanes(ahead_, [&](int lane) { add(lanes_[lane].known); });
  into[waits_.agent - first] = waits_.done;
}

void WarpKnowledge::learn_waits(u32 first, const std::vector<u32>& from) {
  for (u32 i = 0; i < from.size(); ++i) {
    all_.known.raise(first + i, from[i]);
    for_lanes(ahead_, [&](int lane) { lanes_[lane].known.raise(first + i, from[i]); });
  }
}

void WarpKnowledge::synchronize(u32 lanes, u32 live) {
  if ((live & ~lanes) == 0) {
    for (const Own& own : own_) all_.known.raise(own.agent, own.done);
    for_lanes(ahead_, [&](int lane) { all_.join(lanes_[lane]); });
    ahead_ = unsynchronized_ = 0;
    ++own_[OWN_ACCESSES].done;
    return;
  }
  Knowledge together = all_;
  release(lanes, together);
  acquire(lanes, live, together);
}

void WarpKnowledge::fence_proxy(u32 lanes, u32 live) {
  const bool everything = (unsynchronized_ & ~lanes) == 0;
  const auto fence = [&](Knowledge& knowledge, u32 own_lanes) {
    knowledge.fenced.join(knowledge.known);
    for (const Own& own : own_) {
      if (everything) knowledge.fenced.raise(own.agent, own.done);
      else knowledge.fenced.raise(own.agent, own.done, own_lanes);
    }
  };
  if ((live & ~lanes) == 0) {
    fence(all_, lanes);
    for_lanes(ahead_, [&](int lane) { fence(lanes_[lane], lanes); });
  } else {
    for_lanes(lanes, [&](int lane) { fence(of_lane(u32(lane)), 1u << lane); });
  }
  ++own_[OWN_ACCESSES].done;
}

}  // namespace sim
