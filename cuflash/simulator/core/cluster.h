// Blocks that run together: a cluster, or a single block where the kernel has none. Takes their warps in turn or at random, and finds out when
// nobody can go on.
//
// Contract: within a warp, the group at the lowest record runs first and groups that meet are merged, so diverged lanes come together at
// the earliest possible place. A group that cannot go on is left where it is and tried again later; when no group can go on and no
// asynchronous engine has work left, the cluster is stalled, which is always reported.
#pragma once

#include <memory>
#include <unordered_set>

#include "profile.h"

namespace sim {

class GlobalShadow;
class BulkCopies;
class Interrupt;
class Mbarriers;

// Who an agent of clock.h is, for reports.
struct AgentName {
  char text[64];
  u32 rank, warp;  // warp: NO_WARP when it belongs to no warp
  bool is_async;
};

// barrier.cluster. Per warp, lanes that have arrived in this phase, and lanes that have not waited since they arrived.
struct ClusterBarrier {
  std::vector<u32> arrived, unwaited;
  Knowledge arriving, completed;

  void reset(const Cluster& cluster);
  void complete_if_all_arrived(const Cluster& cluster);
  void describe_stall(const Cluster& cluster, std::string& text) const;
};

class Cluster {
 public:
  // `global` is null without checks.
  // `by_caller`: in the thread that called `launch`, which looks for signals.
  Cluster(const Program& program, const LaunchDescription& launch, GlobalShadow* global, Interrupt& interrupt, bool by_caller);
  ~Cluster();
  void run(u64 number);

  const Program& program;
  const LaunchDescription& launch;
  GlobalShadow* global;
  u32 index;                             // in the grid
  std::unordered_set<u32> known_blocks;  // whose accesses to global memory happened before, see global_shadow.h
  std::shared_ptr<const std::unordered_set<u32>> passed_on;  // those and itself, as its strong writes pass them on; null until one does
  std::unordered_set<u64> seen_flags;    // addresses of flags in global memory that were read since the last fence
  bool writes_fenced;                    // a fence followed the last ordinary write to global memory
  u32 size;  // blocks
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<Warp*> warps;  // of all blocks
  std::vector<std::unique_ptr<Engine>> engines;
  ClusterBarrier barrier;
  std::unique_ptr<Profile> profile;  // null if the launch is not profiled
  Engine *wgmma, *register_pool;  // two of them
  Mbarriers* mbarriers;  // one of the engines
  BulkCopies* bulk_copies;  // one of the engines
  Random random{0};

  // Agents, block by block: the warps; for each warp its cp.async copies, then its bulk copies; the warpgroups' matrix products; each warp's part in
  // them, in kernels with wgmma; mbarriers. After all these the warps' waits, in kernels with mbarriers.
  u32 num_agents() const { return num_stamped_agents() + (program.uses_mbarriers ? size * warps_per_cta_ : 0); }
  u32 num_stamped_agents() const { return size * agents_per_cta_; }
  u32 agent(u32 rank, OwnAgent which, u32 warp) const { return rank * agents_per_cta_ + u32(which) * warps_per_cta_ + warp; }
  u32 warpgroup_agent(u32 rank, u32 warpgroup) const { return rank * agents_per_cta_ + NUM_OWN_AGENTS * warps_per_cta_ + warpgroup; }
  u32 wgmma_part_agent(u32 rank, u32 warp) const { return warpgroup_agent(rank, warpgroups_per_cta_) + warp; }
  bool is_wgmma_part(u32 agent) const {
    const u32 number = agent % agents_per_cta_ - wgmma_part_agent(0, 0);
    return number < parts_per_cta_;
  }
  u32 warpgroup_of_part(u32 agent) const {
    const u32 rank = agent / agents_per_cta_;
    return warpgroup_agent(rank, (agent - wgmma_part_agent(rank, 0)) / 4);
  }
  u32 mbarrier_agent(u32 rank, u32 slot) const { return wgmma_part_agent(rank, parts_per_cta_) + slot; }
  u32 wait_agent(u32 rank, u32 warp) const { return program.uses_mbarriers ? num_stamped_agents() + rank * warps_per_cta_ + warp : NO_AGENT; }
  bool is_warp(u32 agent) const { return agent % agents_per_cta_ < warps_per_cta_; }
  bool is_copy(u32 agent) const { return agent % agents_per_cta_ / warps_per_cta_ == OWN_COPIES; }
  bool is_proxy(u32 agent) const { return agent % agents_per_cta_ >= OWN_BULK * warps_per_cta_; }
  AgentName agent_name(u32 agent) const;
  u32 tick(u32 agent) { return ++clocks_[agent]; }  // the clock of the next asynchronous access of an agent
  u32 latest(u32 agent) const { return clocks_[agent]; }
  u32 num_mbarriers() const { return mbarriers_per_cta_; }

 private:
  enum class Turn { STUCK, RAN, POLLED };
  void reset(u64 number);
  Turn run_warp(Warp& warp, u64 fuel) { return profile ? run_warp_as<true>(warp, fuel) : run_warp_as<false>(warp, fuel); }
  template <bool PROFILED> Turn run_warp_as(Warp& warp, u64 fuel);
  bool merge_groups(Warp& warp);
  bool pick_group(Warp& warp, u32 tried);
  bool step_engines();
  void after_turn(const Warp& warp, u64 executed_before);
  void run_in_turn();
  void run_at_random();
  void check_clocks() const;
  [[noreturn]] void report_stall(bool polling);

  u32 warps_per_cta_, warpgroups_per_cta_, parts_per_cta_, mbarriers_per_cta_, agents_per_cta_;
  std::vector<u32> clocks_;
  Interrupt& interrupt_;
  const bool by_caller_;
  u64 since_look_ = 0;  // instructions
};

}  // namespace sim
