// Spreads the clusters of a launch over threads and gathers counters, profiles and the first failure.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>

#include "cluster.h"
#include "global_shadow.h"
#include "interrupt.h"

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

void report_no_memory(Report& report) {
  report.check = "memory";
  snprintf(report.message, sizeof report.message, "the host has not enough memory for the blocks that run at a time; fewer threads need less");
  report.where = {0, 0, NO_RECORD, 0};
}

// The clusters of one launch, for as many threads as there are.
class Work {
 public:
  Work(const Program& program, const LaunchDescription& description, Interrupt& interrupt, CounterValues& counters, Report& report)
      : program_(program),
        description_(description),
        interrupt_(interrupt),
        counters_(counters),
        report_(report),
        total_(clusters_of(description)),
        first_failed_(total_),
        order_(description, total_) {
    const bool few = total_ < (1u << 24) - 2;  // as many as the shadow can tell apart
    if (description.checks && few) global_ = std::make_unique<GlobalShadow>(description);
  }

  // True when every cluster ran to its end.
  bool run() {
    const u64 wanted = std::min<u64>(u64(std::max(description_.threads, 1)), total_);
    std::vector<std::thread> helpers;
    helpers.reserve(wanted);
    try {
      while (helpers.size() + 1 < wanted) {
        ++helping_;
        helpers.emplace_back([this] {
          run_clusters(false);
          std::lock_guard<std::mutex> lock(mutex_);
          --helping_;
          all_done_.notify_one();
        });
      }
    } catch (const std::system_error&) {  // no more threads, as in a container with few process ids: those that there are do it
      std::lock_guard<std::mutex> lock(mutex_);
      --helping_;
    }
    run_clusters(true);
    await_helpers();
    for (std::thread& helper : helpers) helper.join();
    return first_failed_ == total_ && !no_memory_;
  }

 private:
  static u64 clusters_of(const LaunchDescription& launch) {
    const u64 blocks = u64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    return blocks / (launch.cluster[0] * launch.cluster[1] * launch.cluster[2]);
  }

  // Clusters are handed out in order and started ones are finished, so the first failure in that order does not depend on timing.
  void run_clusters(bool by_caller) {
    try {
      Cluster cluster(program_, description_, global_.get(), interrupt_, by_caller);
      for (u64 position; (position = next_++) < first_failed_.load();) {
        try {
          cluster.run(order_[position]);
        } catch (const Failure& failure) {
          std::lock_guard<std::mutex> lock(mutex_);
          if (position < first_failed_) {
            first_failed_ = position;
            fill_report(failure, cluster, report_);
          }
        }
      }
      std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& cta : cluster.ctas) add_counters(counters_, cta->counters);
      if (cluster.profile) cluster.profile->add_to(description_);
    } catch (const Interrupted&) {
    } catch (const std::bad_alloc&) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (first_failed_ == total_) report_no_memory(report_);
      no_memory_ = true;
      first_failed_ = 0;  // so that nobody begins another
    }
  }

  void await_helpers() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!all_done_.wait_for(lock, Interrupt::INTERVAL, [this] { return helping_ == 0; })) {
      lock.unlock();
      interrupt_.look();
      lock.lock();
    }
  }

  const Program& program_;
  const LaunchDescription& description_;
  Interrupt& interrupt_;
  CounterValues& counters_;
  Report& report_;
  const u64 total_;
  std::atomic<u64> next_{0}, first_failed_;
  const Order order_;
  std::unique_ptr<GlobalShadow> global_;
  std::mutex mutex_;  // guards counters, profiles, the report and what follows
  std::condition_variable all_done_;
  u64 helping_ = 0;
  bool no_memory_ = false;
};

}  // namespace

int launch(const Program& program, const LaunchDescription& description, CounterValues& counters, Report& report) {
  Interrupt interrupt(description.ends_on_interrupt);
  try {
    return !Work(program, description, interrupt, counters, report).run();
  } catch (const std::bad_alloc&) {
    report_no_memory(report);
    return 1;
  }
}

}  // namespace sim
