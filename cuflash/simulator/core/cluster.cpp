// See cluster.h.
#include "cluster.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "async_copy.h"
#include "interrupt.h"
#include "register_pool.h"
#include "bulk_copy.h"
#include "table.h"
#include "wgmma.h"

namespace sim {

Cluster::Cluster(const Program& program_, const LaunchDescription& launch_, GlobalShadow* global_, Interrupt& interrupt, bool by_caller)
    : program(program_), launch(launch_), global(global_), interrupt_(interrupt), by_caller_(by_caller) {
  size = launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
  warps_per_cta_ = (launch.block[0] * launch.block[1] * launch.block[2] + LANES - 1) / LANES;
  warpgroups_per_cta_ = (warps_per_cta_ + 3) / 4;
  mbarriers_per_cta_ = program.uses_mbarriers ? MAX_MBARRIERS : 0;
  parts_per_cta_ = program.uses_wgmma ? warps_per_cta_ : 0;
  agents_per_cta_ = NUM_OWN_AGENTS * warps_per_cta_ + warpgroups_per_cta_ + parts_per_cta_ + mbarriers_per_cta_;
  clocks_.assign(num_agents(), 0);
  if (launch.record_profiles) profile = std::make_unique<Profile>(program, launch);
  for (u32 rank = 0; rank < size; ++rank) {
    ctas.push_back(std::make_unique<Cta>(*this, rank));
    for (Warp& warp : ctas.back()->warps) warps.push_back(&warp);
  }
  for (u32 i = 0; i < warps.size(); ++i) warps[i]->index = i;
  engines.push_back(make_async_copy_engine(*this));
  engines.push_back(make_wgmma_engine(*this));
  wgmma = engines.back().get();
  engines.push_back(make_register_pool(*this));
  register_pool = engines.back().get();
  engines.push_back(std::make_unique<Mbarriers>(*this));
  mbarriers = static_cast<Mbarriers*>(engines.back().get());
  engines.push_back(std::make_unique<BulkCopies>(*this));
  bulk_copies = static_cast<BulkCopies*>(engines.back().get());
}

Cluster::~Cluster() = default;

void Cluster::reset(u64 number) {
  index = u32(number);
  known_blocks.clear(), passed_on.reset(), seen_flags.clear();
  writes_fenced = true;
  random = Random(launch.seed * 0x100000001b3ull + number);
  std::fill(clocks_.begin(), clocks_.end(), 0);
  for (auto& engine : engines) engine->reset();
  barrier.reset(*this);
  u32 first[3];  // block of rank 0
  for (int i = 0; i < 3; ++i) {
    const u32 clusters = launch.grid[i] / launch.cluster[i];
    first[i] = u32(number % clusters) * launch.cluster[i];
    number /= clusters;
  }
  for (u32 rank = 0; rank < size; ++rank) {
    const u32 x = rank % launch.cluster[0], y = rank / launch.cluster[0] % launch.cluster[1], z = rank / launch.cluster[0] / launch.cluster[1];
    ctas[rank]->reset(first[0] + x, first[1] + y, first[2] + z);
  }
}

void Cluster::run(u64 number) {
  reset(number);
  if (launch.checks && num_stamped_agents() > MAX_AGENTS) {
    throw Failure{"unsupported", "a cluster of so many warps and mbarriers is too large for the race detector", {0, 0, NO_RECORD, 0}, 0, 0, {}};
  }
  if (launch.schedule == Schedule::RANDOM) run_at_random();
  else run_in_turn();
  check_clocks();
  for (auto& cta : ctas) {
    ++cta->counters.ctas;
    for (const Warp& warp : cta->warps) cta->counters.warp_instructions += warp.executed - warp.uncounted;
  }
}

AgentName Cluster::agent_name(u32 agent) const {
  const u32 rank = agent / agents_per_cta_;
  u32 number = agent % agents_per_cta_;
  AgentName name{"", rank, NO_WARP, true};
  char* at = name.text;
  int room = int(sizeof name.text);
  const auto write = [&](const char* what, u32 n) {
    const int used = snprintf(at, size_t(room), "%s %u", what, n);
    at += used, room -= used;
  };
  if (number < NUM_OWN_AGENTS * warps_per_cta_) {
    static const char* const KINDS[NUM_OWN_AGENTS] = {"warp", "cp.async of warp", "bulk copy of warp"};
    name.warp = number % warps_per_cta_;
    name.is_async = number / warps_per_cta_ != OWN_ACCESSES;
    write(KINDS[number / warps_per_cta_], name.warp);
  } else if ((number -= NUM_OWN_AGENTS * warps_per_cta_) < warpgroups_per_cta_) {
    write("wgmma of warpgroup", number);
  } else if ((number -= warpgroups_per_cta_) < parts_per_cta_) {
    name.warp = number;
    write("wgmma of warp", number);
  } else {
    write("a copy that completes on mbarrier", number - parts_per_cta_);
  }
  if (size > 1) write(" of block", rank);
  return name;
}

[[noreturn]] static void fail_endless(const Warp& warp, const Record* in) {
  warp.fail(in, "endless-loop", warp.active,
            "a warp has executed %llu instructions and has not come to its end; it is now here. If it may, "
            "allow it more: cuflash.simulator.configure(max_instructions=...)",
            (unsigned long long)warp.executed);
}

// Groups that met become one. True when there were any.
bool Cluster::merge_groups(Warp& warp) {
  Group* groups = warp.groups;
  bool merged = false;
  for (u32 i = 0; i < warp.num_groups; ++i) {
    for (u32 j = i + 1; j < warp.num_groups;) {
      const bool meet = groups[i].record == groups[j].record && !groups[i].ticket && !groups[j].ticket;
      if (meet) {
        groups[i].lanes |= groups[j].lanes;
        groups[j] = groups[--warp.num_groups];
        merged = true;
      } else {
        ++j;
      }
    }
  }
  return merged;
}

// Chooses the group at the lowest record among those not in `tried`; false when there is none.
bool Cluster::pick_group(Warp& warp, u32 tried) {
  u32 best = LANES;
  for (u32 i = 0; i < warp.num_groups; ++i) {
    if (tried >> i & 1) continue;
    if (best == LANES || warp.groups[i].record < warp.groups[best].record) best = i;
  }
  if (best == LANES) return false;
  warp.running = best;
  warp.active = warp.groups[best].lanes;
  warp.groups[best].partial = false;
  return true;
}

// Runs a warp until all its groups are blocked, it has exited, it looked in vain for something to happen, or `fuel` instructions were issued.
template <bool PROFILED> Cluster::Turn Cluster::run_warp_as(Warp& warp, u64 fuel) {
  static const std::vector<Handler> handlers = [] {
    std::vector<Handler> list;
    for (const Entry& entry : instruction_table().entries()) list.push_back(entry.handler);
    return list;
  }();
  const Handler* const table = handlers.data();
  const u64 start = warp.executed, limit = std::min(start + fuel, launch.max_instructions);
  const u64& flops = warp.cta->counters.matrix_flops;
  u32 tried = 0;  // groups that could not go on since anything last happened
  while (warp.num_groups != 0) {
    if (warp.num_groups > 1 && merge_groups(warp)) tried = 0;
    if (!pick_group(warp, tried)) break;
    const bool waited = std::exchange(warp.groups[warp.running].waiting, false);
    const Record* in = program.records.data() + warp.groups[warp.running].record;
    const Record* at = in;
    u64 executed = warp.executed;
    while (SIM_LIKELY(executed < limit)) {
      const u64 flops_before = flops;
      at = in;
      in = table[in->op](warp, in);
      if (SIM_UNLIKELY(in == nullptr)) break;
      if (PROFILED) profile->issued(warp.cta->record_index(at), flops - flops_before);
      ++executed;
    }
    const bool moved = executed > warp.executed;
    warp.executed = executed;
    if (in != nullptr) {  // out of fuel
      if (executed >= launch.max_instructions) fail_endless(warp, in);
      warp.groups[warp.running].record = u32(in - program.records.data());
      break;
    }
    if (warp.event == Event::BLOCKED) {
      Group& group = warp.groups[warp.running];
      group.record = u32(at - program.records.data());
      if (PROFILED && (moved || !waited)) profile->waited(group.record);
      group.waiting = true;
      tried = (moved ? 0 : tried) | 1u << warp.running;
      continue;
    }
    ++warp.executed;
    if (PROFILED) {
      profile->issued(warp.cta->record_index(at), 0);
      if (warp.event == Event::POLLED) profile->waited(warp.cta->record_index(at));
    }
    if (warp.event == Event::POLLED) return Turn::POLLED;
    tried = 0;
  }
  return warp.executed > start ? Turn::RAN : Turn::STUCK;
}

constexpr u32 MAX_IDLE_ROUNDS = 1000;  // in which warps only look whether something has happened

// Stops a launch that is to stop. The clock is looked at only now and then: turns of a random schedule are short.
void Cluster::after_turn(const Warp& warp, u64 executed_before) {
  constexpr u64 LOOK_EVERY = 1 << 12;
  interrupt_.check();
  if (!by_caller_ || (since_look_ += warp.executed - executed_before + 1) < LOOK_EVERY) return;
  since_look_ = 0;
  interrupt_.look();
  interrupt_.check();
}

void Cluster::run_in_turn() {
  constexpr u64 FUEL = 1 << 14;  // so that a warp that polls memory cannot starve the one that it waits for
  for (u32 idle = 0;;) {
    bool unfinished = false, progress = false, polled = false;
    for (Warp* warp : warps) {
      if (warp->num_groups == 0) continue;
      unfinished = true;
      const u64 before = warp->executed;
      const Turn turn = run_warp(*warp, FUEL);
      after_turn(*warp, before);
      progress |= turn == Turn::RAN;
      polled |= turn == Turn::POLLED;
    }
    if (!unfinished) return;
    if (progress || step_engines()) idle = 0;
    else if (!polled || ++idle == MAX_IDLE_ROUNDS) report_stall(polled);
  }
}

void Cluster::run_at_random() {
  std::vector<u32> candidates;
  std::vector<u8> stalled(warps.size(), 0);  // warps that could not go on since anything last happened
  u32 idle = 0;
  for (;;) {
    candidates.clear();
    bool unfinished = false;
    for (const Warp* warp : warps) {
      unfinished |= warp->num_groups != 0;
      if (warp->num_groups != 0 && !stalled[warp->index]) candidates.push_back(warp->index);
    }
    if (!unfinished) return;
    if (candidates.empty()) {
      if (!step_engines()) report_stall(false);
      std::fill(stalled.begin(), stalled.end(), 0);
      continue;
    }
    const u32 chosen = candidates[random.below(u32(candidates.size()))];
    // Mostly short turns, now and then a long one, so that a warp can also get far ahead of the others.
    const u64 fuel = random.below(8) ? 1 + random.below(48) : 1 + random.below(4096);
    const u64 before = warps[chosen]->executed;
    const Turn turn = run_warp(*warps[chosen], fuel);
    after_turn(*warps[chosen], before);
    if (turn == Turn::RAN) {
      std::fill(stalled.begin(), stalled.end(), 0);
      if (!warps[chosen]->polling) idle = 0;  // going around a loop that polls is not progress
    }
    if (turn == Turn::STUCK) stalled[chosen] = 1;
    const bool stepped = (turn == Turn::POLLED || random.below(4) == 0) && step_engines();
    if (stepped) std::fill(stalled.begin(), stalled.end(), 0), idle = 0;
    if (turn == Turn::POLLED && !stepped && ++idle == MAX_IDLE_ROUNDS * warps.size()) report_stall(true);
  }
}

bool Cluster::step_engines() {
  const u32 first = random.below(u32(engines.size()));
  for (size_t i = 0; i < engines.size(); ++i) {
    if (engines[(first + i) % engines.size()]->step(random)) return true;
  }
  return false;
}

void Cluster::check_clocks() const {
  if (!launch.checks) return;
  u32 latest = *std::max_element(clocks_.begin(), clocks_.end());
  for (const Warp* warp : warps) latest = std::max(latest, warp->knowledge.now());
  if (latest < MAX_CLOCK) return;
  throw Failure{"unsupported", "a block synchronises too often for the race detector; use smaller inputs", {0, 0, NO_RECORD, 0}, 0, 0, {}};
}

void Cluster::report_stall(bool polling) {
  Failure failure{"deadlock", "", {0, 0, NO_RECORD, 0}, 0, 0, {}};
  std::string exited;
  for (const Warp* warp : warps) {
    if (warp->num_groups == 0) {
      exited += (exited.empty() ? "" : ", ") + std::to_string(warp->id);
      if (size > 1) exited += " of block " + std::to_string(warp->cta->rank);
    }
    for (u32 i = 0; i < warp->num_groups; ++i) {
      const Group& group = warp->groups[i];
      if (failure.places.size() < MAX_PLACES) failure.places.push_back({warp->id, group.lanes, group.record, warp->cta->rank});
      if (group.partial && failure.where.record == NO_RECORD) {
        char text[160];
        snprintf(text, sizeof text, "lanes 0x%08x wait here for the other lanes of their warp (0x%08x), which never come", group.lanes,
                 warp->live & ~group.lanes);
        failure.check = "partial-warp";
        failure.message = text;
        failure.where = {warp->id, group.lanes, group.record, warp->cta->rank};
      }
    }
  }
  if (failure.where.record == NO_RECORD) {
    failure.message = polling ? "nobody gets on, warps only look again and again whether something has happened" : "nobody can go on";
    for (const auto& cta : ctas) cta->describe_stall(failure.message);
    barrier.describe_stall(*this, failure.message);
    for (const auto& engine : engines) engine->describe_stall(failure.message);
    if (!exited.empty()) failure.message += "; warps that have exited: " + exited;
  }
  throw failure;
}

}  // namespace sim
