// barrier.cluster, and the addresses of other blocks' shared memory: mapa and getctarank.
//
// Contract: every thread of the cluster that has not exited arrives once in each phase and waits before it arrives again; x = 1 for
// arrive.relaxed, which passes on no knowledge of memory.
#include "access.h"
#include "cluster.h"
#include "table.h"

namespace sim {

void ClusterBarrier::reset(const Cluster& cluster) {
  arrived.assign(cluster.warps.size(), 0);
  unwaited.assign(cluster.warps.size(), 0);
  if (cluster.launch.checks) arriving.reset(cluster.num_agents()), completed.reset(cluster.num_agents());
}

void ClusterBarrier::complete_if_all_arrived(const Cluster& cluster) {
  bool any = false;
  for (const Warp* warp : cluster.warps) {
    if (warp->live & ~arrived[warp->index]) return;
    any |= arrived[warp->index] != 0;
  }
  if (!any) return;
  std::fill(arrived.begin(), arrived.end(), 0);
  if (!cluster.launch.checks) return;
  std::swap(completed, arriving);
  arriving.reset(cluster.num_agents());
}

void ClusterBarrier::describe_stall(const Cluster& cluster, std::string& text) const {
  u32 here = 0, expected = 0;
  for (const Warp* warp : cluster.warps) {
    here += u32(__builtin_popcount(arrived[warp->index]));
    expected += u32(__builtin_popcount(warp->live | arrived[warp->index]));
  }
  if (here) text += "; the cluster's barrier has " + std::to_string(here) + " of " + std::to_string(expected) + " threads";
}

namespace {

const Record* cluster_arrive(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  Cluster& cluster = *warp.cta->cluster;
  ClusterBarrier& barrier = cluster.barrier;
  if (const u32 again = barrier.unwaited[warp.index] & mask) {
    warp.fail(in, "barrier", again, "lanes arrive at the cluster's barrier again before they have waited for the last time");
  }
  barrier.arrived[warp.index] |= mask;
  barrier.unwaited[warp.index] |= mask;
  if (warp.cta->checks && !in->x) warp.knowledge.release(mask, barrier.arriving);
  barrier.complete_if_all_arrived(cluster);
  return in + 1;
}

const Record* cluster_wait(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  ClusterBarrier& barrier = warp.cta->cluster->barrier;
  if (const u32 early = mask & ~barrier.unwaited[warp.index]) {
    warp.fail(in, "barrier", early, "lanes wait at the cluster's barrier without having arrived");
  }
  if (barrier.arrived[warp.index] & mask) return warp.block();
  barrier.unwaited[warp.index] &= ~mask;
  if (warp.cta->checks) warp.knowledge.acquire(mask, warp.live, barrier.completed);
  return in + 1;
}

void check_rank(Warp& warp, const Record* in, u32 lane, u32 rank) {
  const u32 size = warp.cta->cluster->size;
  if (rank >= size) warp.fail(in, "cluster", 1u << lane, "block %u of a cluster of %u blocks (lane %u)", rank, size, lane);
}

// mapa: the address a of this block's shared memory in block b.
template <class T> const Record* map_address(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  const T* address = warp.row<T>(in->a);
  const u32* rank = warp.row<u32>(in->b);
  alignas(64) T result[LANES];
  for_lanes(mask, [&](int lane) {
    check_rank(warp, in, u32(lane), rank[lane]);
    result[lane] = (address[lane] & ~T(RANK_MASK)) | T(rank[lane] + 1) << RANK_SHIFT;
  });
  commit(warp, in->d, mask, result);
  return in + 1;
}

template <class T> const Record* block_rank(Warp& warp, const Record* in) {
  const T* address = warp.row<T>(in->a);
  alignas(64) u32 result[LANES];
  for (int lane = 0; lane < LANES; ++lane) result[lane] = rank_of(warp, u32(address[lane]));
  commit(warp, in->d, warp.mask(in), result);
  return in + 1;
}

}  // namespace

void register_cluster_barrier(Table& table) {
  table.family(Class::CONTROL);
  table.add("barrier.cluster.arrive", "xi", cluster_arrive);
  table.add("barrier.cluster.wait", "", cluster_wait);
  table.family(Class::INTEGER);
  table.add("mapa.shared::cluster.u32", "d32 a32 b32", map_address<u32>);
  table.add("mapa.shared::cluster.u64 mapa.u64", "d64 a64 b32", map_address<u64>);
  table.add("mapa.u32", "d32 a32 b32", map_address<u32>);
  table.add("getctarank.shared::cluster.u32 getctarank.u32", "d32 a32", block_rank<u32>);
  table.add("getctarank.shared::cluster.u64 getctarank.u64", "d32 a64", block_rank<u64>);
}

}  // namespace sim
