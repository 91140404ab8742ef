// See wgmma.h.
//
// Contract: wgmma.mma_async only checks and queues: a job exists from the moment that the first warp of the warpgroup issues it, may be executed once
// all four have, and is executed for all four at a time, in order. Schedule EARLY executes it then, LATE only when a wgmma.wait_group demands it,
// RANDOM at any moment between. Operands are read and results written when it is executed; wgmma_hazards.cpp sees to it that nobody looks
// at the registers meanwhile. The race detector is told of the reads when a warp issues. A warp reads all of B and all of A: hardware's warps may
// read their own 16 rows only, but the PTX ISA does not promise it, so the other rows fall under the option isa_rules. Groups are those of the
// warpgroup: one warp's wait says that the product is done for all four, and CUTLASS' pipelines count on that when one thread hands a stage back
// to TMA. Only for ordinary stores into A the ISA is taken at its word, that a wait is for the executing threads' own part. A product also orders the
// waits for mbarriers before it (see mbarrier.h) before what follows a wait for it.
#include "wgmma.h"

#include <algorithm>
#include <deque>

#include "cluster.h"
#include "shadow.h"
#include "table.h"
#include "wgmma_product.h"

namespace sim {
namespace {

struct Job {
  Product product;
  void (*execute)(const Product&, Warp* warps);
  u32 issued;  // bit per warp of the warpgroup
  u32 clock;  // of the warpgroup's agent
  // With checks only.
  std::vector<Range> ranges_b, ranges_a[WARPGROUP];  // A: the rows of each warp, if it is in shared memory
  std::vector<u32> waits;  // for mbarriers, that the warps which issued it know of
};

// Jobs, commits and waits of one warpgroup. Jobs are numbered from 0.
struct Warpgroup {
  struct Member {
    u64 issued = 0, waited = 0;  // jobs
    std::deque<u64> commits;  // jobs issued at each commit, oldest first; those that it waited for are gone
  };

  Warp* warps = nullptr;
  std::deque<Job> jobs;
  u64 first = 0, done = 0;  // of `jobs`; of those not executed yet
  Member members[WARPGROUP];

  Job& job(u64 number) { return jobs[size_t(number - first)]; }
  bool ready() { return done < first + jobs.size() && job(done).issued == (1u << WARPGROUP) - 1; }
  void execute() {
    const Job& next = job(done++);
    next.execute(next.product, warps);
  }
  void forget() {
    u64 waited = members[0].waited;
    for (const Member& member : members) waited = std::min(waited, member.waited);
    for (; first < waited; ++first) jobs.pop_front();
  }
};

Place place_of(const Warp& warp, const Record* in) { return {warp.id, ALL_LANES, warp.cta->record_index(in), warp.cta->rank}; }

std::string warp_list(const Warp* warps, u32 which) {
  std::string text;
  for_lanes(which, [&](int w) { text += (text.empty() ? "" : ", ") + std::to_string(warps[w].id); });
  return text;
}

class WgmmaEngine final : public Engine {
 public:
  explicit WgmmaEngine(Cluster& cluster) : schedule_(cluster.launch.schedule) {
    per_block_ = u32(cluster.ctas[0]->warps.size() + WARPGROUP - 1) / WARPGROUP;
    groups_.resize(cluster.size * per_block_);
    for (u32 i = 0; i < groups_.size(); ++i) groups_[i].warps = &cluster.ctas[i / per_block_]->warps[i % per_block_ * WARPGROUP];
  }

  Warpgroup& group_of(const Warp& warp) { return groups_[warp.cta->rank * per_block_ + warp.id / WARPGROUP]; }

  void reset() override {
    for (Warpgroup& group : groups_) {
      Warp* warps = group.warps;
      group = Warpgroup{};
      group.warps = warps;
    }
  }

  void issued(Warpgroup& group) {
    if (schedule_ == Schedule::EARLY && group.ready()) group.execute();
  }

  // Only a random schedule executes jobs that nobody waits for.
  bool step(Random& random) override {
    if (schedule_ != Schedule::RANDOM) return false;
    Warpgroup& group = groups_[random.below(u32(groups_.size()))];
    if (!group.ready()) return false;
    group.execute();
    return true;
  }

  void check_exit(Warp& warp, const Record* in, u32 lanes) override {
    if (!warp.cta->checks) return;
    Warpgroup& group = group_of(warp);
    const Warpgroup::Member& member = group.members[warp.id % WARPGROUP];
    if (member.waited < member.issued) {
      Failure failure{"open-wgmma", "lanes exit, but nothing waited for a wgmma that they issued", {}, 0, 0, {}};
      failure.where = place_of(warp, group.job(member.waited).product.in);
      failure.places.push_back({warp.id, lanes, warp.cta->record_index(in), warp.cta->rank});
      throw failure;
    }
    if (member.issued < group.first + group.jobs.size()) {
      const Job& job = group.job(member.issued);
      Failure failure{"partial-warp", "", {}, 0, 0, {}};
      failure.message = "warp " + std::to_string(warp.id) + " exits without a wgmma that others of its warpgroup issued (warps " +
                        warp_list(group.warps, job.issued) + "); all four must";
      failure.where = {warp.id, lanes, warp.cta->record_index(in), warp.cta->rank};
      for_lanes(job.issued, [&](int w) { failure.places.push_back(place_of(group.warps[w], job.product.in)); });
      throw failure;
    }
  }

  void describe_stall(std::string& text) const override {
    for (const Warpgroup& group : groups_) {
      for (const Job& job : group.jobs) {
        const u32 missing = ((1u << WARPGROUP) - 1) & ~job.issued;
        if (missing == 0) continue;
        text += "; a wgmma waits for warps " + warp_list(group.warps, missing) + " of its warpgroup";
        break;
      }
    }
  }

 private:
  Schedule schedule_;
  u32 per_block_;  // warpgroups
  std::vector<Warpgroup> groups_;
};

WgmmaEngine& engine_of(const Warp& warp) { return static_cast<WgmmaEngine&>(*warp.cta->cluster->wgmma); }

// ---- issuing

[[noreturn]] void fail_against(const Warp& warp, const Record* in, const Warpgroup& group, const Job& job, const char* what) {
  Failure failure{"wgmma", "", place_of(warp, in), 0, 0, {}};
  failure.message = "warp " + std::to_string(warp.id) + " and others of its warpgroup disagree about the same wgmma: " + what;
  for_lanes(job.issued, [&](int w) { failure.places.push_back(place_of(group.warps[w], job.product.in)); });
  throw failure;
}

// The value of an operand that all lanes must agree on.
template <class T> T uniform(const Warp& warp, const Record* in, u16 row, const char* what) {
  const T* lanes = warp.row<T>(row);
  if (warp.cta->checks) {
    for (int lane = 1; lane < LANES; ++lane) {
      if (SIM_UNLIKELY(lanes[lane] != lanes[0])) {
        warp.fail(in, "wgmma", 1u << lane, "the %s differs between lanes: 0x%llx in lane 0, 0x%llx in lane %d", what, (unsigned long long)lanes[0],
                  (unsigned long long)lanes[lane], lane);
      }
    }
  }
  return lanes[0];
}

void check_members(Warp& warp, const Record* in, const Warpgroup& group, u64 number) {
  const u32 first = warp.id / WARPGROUP * WARPGROUP;
  if (warp.cta->num_warps < first + WARPGROUP || warp.cta->num_threads < (first + WARPGROUP) * LANES) {
    warp.fail(in, "partial-warp", ALL_LANES, "warps %u to %u must execute it together, but the block has only %u threads", first,
              first + WARPGROUP - 1, warp.cta->num_threads);
  }
  u32 gone = 0;
  for (u32 w = 0; w < WARPGROUP; ++w) gone |= u32(group.warps[w].live != ALL_LANES && group.members[w].issued <= number) << w;
  if (gone == 0) return;
  warp.fail(in, "partial-warp", ALL_LANES, "all four warps of the warpgroup must execute it, but warps %s have exited",
            warp_list(group.warps, gone).c_str());
}

// The race detector's lane of a warp's reads: if lanes differ in what they know, it is the first that know most.
constexpr u32 READING_LANE = LANES - 1;

void check_reads(Warp& warp, const Record* in, const std::vector<Range>& ranges, AsyncAgent by, const char* what) {
  Cta& cta = *warp.cta;
  if (SIM_UNLIKELY(ranges.front().begin < cta.shared_begin || ranges.back().begin + ranges.back().bytes > cta.shared_end)) {
    for (const Range& range : ranges) resolve_range(warp, in, READING_LANE, cta, range.begin, {Access::NONE, range.bytes, 16, what});
  }
  for (const Range& range : ranges) cta.shadow->access_async(warp, in, Access::READ, READING_LANE, by, range.begin, range.bytes, what);
}

void find_ranges(Job& job, u32 flags, u32 n) {
  using L = WgmmaLayout;
  job.ranges_b = ranges_of({job.product.descriptor_b, (flags & L::B_TRANSPOSED) != 0}, 0, n);
  if (flags & L::A_IN_REGISTERS) return;
  const Descriptor a(job.product.descriptor_a, flags & L::A_TRANSPOSED);
  for (u32 i = 0; i < WARPGROUP; ++i) job.ranges_a[i] = ranges_of(a, WARP_ROWS * i, WARP_ROWS);
}

// All that this warp reads, or may read, of a product in shared memory; and the waits that come before it.
void check_operands(Warp& warp, const Record* in, Job& job) {
  const Cluster& cluster = *warp.cta->cluster;
  const u32 rank = warp.cta->rank;
  check_reads(warp, in, job.ranges_b, {cluster.warpgroup_agent(rank, warp.id / WARPGROUP), job.clock, true, true}, "B of wgmma");
  for (u32 i = 0; i < WARPGROUP; ++i) {
    const bool own = i == warp.id % WARPGROUP;
    if (job.ranges_a[i].empty() || (!own && !cluster.launch.isa_rules)) continue;
    check_reads(warp, in, job.ranges_a[i], {cluster.wgmma_part_agent(rank, warp.id), job.clock, true, true, !own}, "A of wgmma");
  }
  warp.knowledge.release_waits(cluster.wait_agent(0, 0), job.waits);
}

Product product_of(const Warp& warp, const Record* in) {
  using L = WgmmaLayout;
  const u16* extra = warp.extra + in->x;
  const u32 scale_d = warp.predicates[in->c];
  if (scale_d != 0 && scale_d != ALL_LANES) warp.fail(in, "wgmma", ALL_LANES, "scale-d differs between lanes: true in 0x%08x only", scale_d);
  const u64 descriptor_a = extra[L::FLAGS] & L::A_IN_REGISTERS ? 0 : uniform<u64>(warp, in, extra[L::A], "descriptor of A");
  return {in, descriptor_a, uniform<u64>(warp, in, extra[L::B], "descriptor of B"), scale_d != 0};
}

void check_agreement(const Warp& warp, const Warpgroup& group, const Job& job, const Product& mine) {
  const Product& theirs = job.product;
  if (theirs == mine) return;
  fail_against(warp, mine.in, group, job,
               theirs.in != mine.in                       ? "they execute different ones"
               : theirs.descriptor_a != mine.descriptor_a ? "the descriptors of A differ"
               : theirs.descriptor_b != mine.descriptor_b ? "the descriptors of B differ"
                                                          : "scale-d differs");
}

// c = predicate scale-d; extra at x: see WgmmaLayout.
template <Input A, Input B, Accumulator TYPE> const Record* multiply(Warp& warp, const Record* in) {
  using L = WgmmaLayout;
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  Cta& cta = *warp.cta;
  const u32 member = warp.id % WARPGROUP, n = warp.extra[in->x + i32(L::N)], flags = warp.extra[in->x + i32(L::FLAGS)];
  const Product product = product_of(warp, in);
  WgmmaEngine& engine = engine_of(warp);
  Warpgroup& group = engine.group_of(warp);
  const u64 number = group.members[member].issued;
  check_members(warp, in, group, number);
  if (number == group.first + group.jobs.size()) {
    const u32 agent = cta.cluster->warpgroup_agent(cta.rank, warp.id / WARPGROUP);
    group.jobs.push_back({product, multiply_warpgroup<A, B, TYPE>, 0, cta.cluster->tick(agent), {}, {}, {}});
    if (cta.checks) find_ranges(group.jobs.back(), flags, n);
  }
  Job& job = group.job(number);
  check_agreement(warp, group, job, product);
  if (cta.checks) check_operands(warp, in, job);
  ++group.members[member].issued;
  job.issued |= 1u << member;
  ++cta.counters.matrix_instructions;
  cta.counters.matrix_flops += 2 * WARP_ROWS * n * CHUNKS * 4 * VALUES<A>;
  engine.issued(group);
  return in + 1;
}

// wgmma.fence: nothing to do, its place is checked in wgmma_hazards.cpp.
const Record* fence(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES) && mask != 0) return warp.wait_for_lanes(in, ALL_LANES);
  return in + 1;
}

const Record* commit_group(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  Warpgroup::Member& member = engine_of(warp).group_of(warp).members[warp.id % WARPGROUP];
  member.commits.push_back(member.issued);
  return in + 1;
}

// x = groups that may stay.
const Record* wait_group(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  Warpgroup& group = engine_of(warp).group_of(warp);
  Warpgroup::Member& member = group.members[warp.id % WARPGROUP];
  if (member.commits.size() <= size_t(in->x)) return in + 1;
  const size_t due = member.commits.size() - size_t(in->x);
  const u64 target = member.commits[due - 1];
  while (group.done < target) {
    if (!group.ready()) return warp.block();
    group.execute();
  }
  if (warp.cta->checks && target > member.waited) {
    const Cluster& cluster = *warp.cta->cluster;
    const Job& last = group.job(target - 1);
    warp.knowledge.learn(mask, warp.live, cluster.warpgroup_agent(warp.cta->rank, warp.id / WARPGROUP), last.clock);
    warp.knowledge.learn(mask, warp.live, cluster.wgmma_part_agent(warp.cta->rank, warp.id), last.clock);
    warp.knowledge.learn_waits(cluster.wait_agent(0, 0), last.waits);
  }
  member.waited = target;
  member.commits.erase(member.commits.begin(), member.commits.begin() + i64(due));
  group.forget();
  return in + 1;
}

template <Accumulator TYPE> void register_fp8(Table& table, const std::string& stem) {
  table.add(stem + ".e4m3.e4m3", "", multiply<Input::E4M3, Input::E4M3, TYPE>);
  table.add(stem + ".e4m3.e5m2", "", multiply<Input::E4M3, Input::E5M2, TYPE>);
  table.add(stem + ".e5m2.e4m3", "", multiply<Input::E5M2, Input::E4M3, TYPE>);
  table.add(stem + ".e5m2.e5m2", "", multiply<Input::E5M2, Input::E5M2, TYPE>);
}

}  // namespace

std::unique_ptr<Engine> make_wgmma_engine(Cluster& cluster) { return std::make_unique<WgmmaEngine>(cluster); }

// Names: types of D, A and B.
void register_wgmma(Table& table) {
  table.family(Class::MATRIX);
  table.add("wgmma.f32.f16.f16", "", multiply<Input::F16, Input::F16, Accumulator::F32>);
  table.add("wgmma.f16.f16.f16", "", multiply<Input::F16, Input::F16, Accumulator::F16>);
  table.add("wgmma.f32.bf16.bf16", "", multiply<Input::BF16, Input::BF16, Accumulator::F32>);
  table.add("wgmma.f32.tf32.tf32", "", multiply<Input::TF32, Input::TF32, Accumulator::F32>);
  register_fp8<Accumulator::F32>(table, "wgmma.f32");
  register_fp8<Accumulator::F16>(table, "wgmma.f16");
  table.family(Class::CONTROL);
  table.add("wgmma.fence", "", fence);
  table.add("wgmma.commit_group", "", commit_group);
  table.add("wgmma.wait_group", "xi", wait_group);
}

}  // namespace sim
