// Spreads the clusters of a launch over threads and gathers counters, profiles and the first failure.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <numeric>
#include <thread>

#include "cluster.h"
#include "global_shadow.h"

namespace sim {
namespace {

void fill_report(const Failure& failure, const Cluster& cluster, Report& report) {
  report.check = failure.check;
  snprintf(report.message, sizeof report.message, "%s", failure.message.c_str());
  memcpy(report.block, cluster.ctas[failure.where.rank]->block, sizeof report.block);
  report.where = failure.where;
  report.address = failure.address;
  report.bytes = failure.bytes;
  report.num_places = u32(std::min<size_t>(failure.places.size(), MAX_PLACES));
  std::copy_n(failure.places.begin(), report.num_places, report.places);
}

void add_counters(CounterValues& sum, const CounterValues& part) {
  sum.warp_instructions += part.warp_instructions;
  sum.matrix_instructions += part.matrix_instructions;
  sum.matrix_flops += part.matrix_flops;
  sum.barriers += part.barriers;
  sum.async_copies += part.async_copies;
  sum.ctas += part.ctas;
}

// The order in which clusters start: as they are numbered, or in a random schedule another one for each seed. Nothing promises a kernel either.
class Order {
 public:
  Order(const LaunchDescription& description, u64 total) : total_(total) {
    if (description.schedule != Schedule::RANDOM) return;
    Random random(description.seed);
    offset_ = random.next() % total;
    do step_ = 1 + random.next() % total;
    while (std::gcd(step_, total) != 1);  // so that every cluster has its turn
  }
  u64 operator[](u64 position) const { return u64(((unsigned __int128)position * step_ + offset_) % total_); }

 private:
  u64 total_, step_ = 1, offset_ = 0;
};

}  // namespace

int launch(const Program& program, const LaunchDescription& description, CounterValues& counters, Report& report) {
  const u64 blocks = u64(description.grid[0]) * description.grid[1] * description.grid[2];
  const u64 total = blocks / (description.cluster[0] * description.cluster[1] * description.cluster[2]);
  std::atomic<u64> next{0}, first_failed{total};
  std::mutex mutex;  // guards counters, profiles and report
  const bool few = total < (1u << 24) - 2;  // as many as the shadow can tell apart
  const auto global = description.checks && few ? std::make_unique<GlobalShadow>(description) : nullptr;
  const Order order(description, total);
  // Clusters are handed out in order and started ones are finished, so the first failure in that order does not depend on timing.
  auto work = [&] {
    Cluster cluster(program, description, global.get());
    for (u64 position; (position = next++) < first_failed.load();) {
      try {
        cluster.run(order[position]);
      } catch (const Failure& failure) {
        std::lock_guard<std::mutex> lock(mutex);
        if (position < first_failed) {
          first_failed = position;
          fill_report(failure, cluster, report);
        }
      }
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& cta : cluster.ctas) add_counters(counters, cta->counters);
    if (cluster.profile) cluster.profile->add_to(description);
  };
  const u64 num_threads = std::min<u64>(u64(std::max(description.threads, 1)), total);
  std::vector<std::thread> helpers;
  for (u64 i = 1; i < num_threads; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  return first_failed != total;
}

}  // namespace sim
