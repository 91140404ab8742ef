// See wgmma.h.
//
// Contract: wgmma.mma_async only checks and queues: a job exists from the moment that the first warp of the warpgroup issues it, may be executed once
// all four have, and is executed for all four at a time, in order. Schedule EARLY executes it then, LATE only when a wgmma.wait_group demands it,
// RANDOM at any moment between. Operands are read and results written when it is executed; wgmma_hazards.cpp sees to it that nobody looks
// at the registers meanwhile. The race detector is told of the reads when a warp issues: a warp reads all of B and its own 16 rows of A.
// Groups are those of the warpgroup, so whoever waited knows that the reads of all four warps are done.
//
// Products are summed in f32 in the order of k, an f16 accumulator is rounded at the end of each instruction.
#include "wgmma.h"

#include <algorithm>
#include <array>
#include <deque>

#include "cluster.h"
#include "fragment.h"
#include "shadow.h"
#include "table.h"

namespace sim {
namespace {

constexpr u32 WARPS = 4, ROWS = 16;  // of a warpgroup; of A and D in a warp
constexpr int MAX_TILES = 32, CHUNKS = 2;  // of 8 columns; of 16 bytes along k: every wgmma is 32 bytes deep

// ---- operands in shared memory

// A matrix descriptor of the PTX ISA. Memory is looked at in pieces of 16 bytes. K-major: piece (row, chunk of k), where a row of A or a column of B
// is two pieces. Otherwise (16-bit elements only): piece (k, eight rows).
struct Descriptor {
  u32 start, leading, stride, base, mode;
  bool k_major;

  Descriptor(u64 word, bool transposed)
      : start(u32(word & 0x3fff) << 4),
        leading(u32(word >> 16 & 0x3fff) << 4),
        stride(u32(word >> 32 & 0x3fff) << 4),
        base(u32(word >> 49 & 7)),
        mode(u32(word >> 62)),
        k_major(!transposed) {}

  // Pieces in a row of the swizzle pattern: 1, 8, 4, 2 for no swizzle, 128, 64 and 32 bytes.
  u32 width() const { return mode == 0 ? 1 : 16 >> mode; }

  u32 address_of(u32 outer, u32 inner) const {
    const u32 wide = width();
    u32 offset;
    if (k_major) offset = outer % 8 * 16 * wide + outer / 8 * stride + inner * (wide == 1 ? leading : 16);
    else if (wide == 1) offset = outer % 8 * 16 + outer / 8 * leading + inner * stride;
    else offset = outer % 8 * 16 * wide + outer / 8 * stride + inner % wide * 16 + inner / wide * leading;
    const u32 address = start + offset;
    return address ^ (((address >> 7) - base) & (wide - 1)) << 4;
  }
};

struct Range {
  u32 begin, bytes;
};

// The bytes of the pieces of `count` rows (a multiple of 8) from `first` on.
std::vector<Range> ranges_of(const Descriptor& matrix, u32 first, u32 count) {
  std::vector<u32> pieces;
  if (matrix.k_major) {
    for (u32 row = 0; row < count; ++row) {
      for (u32 chunk = 0; chunk < CHUNKS; ++chunk) pieces.push_back(matrix.address_of(first + row, chunk));
    }
  } else {
    for (u32 k = 0; k < 16; ++k) {
      for (u32 octet = 0; octet < count / 8; ++octet) pieces.push_back(matrix.address_of(k, first / 8 + octet));
    }
  }
  std::sort(pieces.begin(), pieces.end());
  std::vector<Range> ranges;
  for (u32 address : pieces) {
    if (!ranges.empty() && ranges.back().begin + ranges.back().bytes == address) ranges.back().bytes += 16;
    else if (ranges.empty() || ranges.back().begin + ranges.back().bytes < address) ranges.push_back({address, 16});
  }
  return ranges;
}

// ---- expanded operands, for the inner loop

// Values of k are held by chunk, place in a 32-bit word and word: k = VALUES (4 chunk + q) + i lies at [chunk][i][q].
template <Input A> struct ExpandedA {
  alignas(64) Vec<f32> rows[CHUNKS][VALUES<A>][4][2][HALF_PARTS];  // [upper or lower 8 rows]: lane 4g + q holds A[g][k], repeated over q
};
template <Input B> struct ExpandedB {
  alignas(64) Quad<f32> columns[2][CHUNKS][VALUES<B>][4];  // [even or odd column]: B[k][columns 0, 2, 4, 6 or 1, 3, 5, 7] of a tile
};

template <Input A> SIM_INLINE void expand_a(ExpandedA<A>& to, const u32* const (&registers)[4], bool negated) {
  const u32 sign = negated ? 0x80000000u : 0;
  SIM_UNROLL for (int reg = 0; reg < 4; ++reg) {
    SIM_UNROLL for (int part = 0; part < HALF_PARTS; ++part) {
      const Vec<u32> words = ((const Vec<u32>*)registers[reg])[part];
      const Vec<u32> repeated[4] = {broadcast_in_quads<0>(words), broadcast_in_quads<1>(words), broadcast_in_quads<2>(words),
                                    broadcast_in_quads<3>(words)};
      for (int i = 0; i < VALUES<A>; ++i) {
        for (int q = 0; q < 4; ++q) to.rows[reg >> 1][i][q][reg & 1][part] = as<f32>(as<u32>(value_at<A>(repeated[q], i)) ^ sign);
      }
    }
  }
}

// The 16 rows of a warp from shared memory, as the registers of the operand's other form.
void load_a(const u8* shared, const Descriptor& matrix, u32 warp, u32 (&registers)[4][LANES]) {
  for (u32 reg = 0; reg < 4; ++reg) {
    const u32 octet = 2 * warp + (reg & 1), chunk = reg >> 1;  // eight rows
    if (matrix.k_major) {
      for (u32 row = 0; row < 8; ++row) memcpy(registers[reg] + 4 * row, shared + matrix.address_of(8 * octet + row, chunk), 16);
    } else {
      Octet pieces[8];
      for (u32 k = 0; k < 8; ++k) memcpy(&pieces[k], shared + matrix.address_of(8 * chunk + k, octet), 16);
      transpose(pieces);
      memcpy(registers[reg], pieces, ROW_BYTES);
    }
  }
}

// Value `index` of 16 words.
template <Input INPUT> SIM_INLINE void convert(const Quad<u32> (&words)[4], int index, Quad<f32> (&to)[4]) {
  constexpr int VECTORS = 64 / VECTOR_BYTES;
  Vec<u32> vectors[VECTORS];
  memcpy(vectors, words, 64);
  for (Vec<u32>& vector : vectors) vector = as<u32>(value_at<INPUT>(vector, index));
  memcpy(to, vectors, 64);
}

template <Input B> void expand_b(ExpandedB<B>& to, const u8* shared, const Descriptor& matrix, u32 tile) {
  Quad<u32> words[4];
  for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
    if (matrix.k_major) {
      for (u32 odd = 0; odd < 2; ++odd) {
        for (u32 i = 0; i < 4; ++i) memcpy(&words[i], shared + matrix.address_of(8 * tile + 2 * i + odd, chunk), 16);
        transpose(words);
        for (int i = 0; i < VALUES<B>; ++i) convert<B>(words, i, to.columns[odd][chunk][i]);
      }
    } else if constexpr (VALUES<B> == 2) {
      for (u32 i = 0; i < 2; ++i) {
        for (u32 q = 0; q < 4; ++q) memcpy(&words[q], shared + matrix.address_of(8 * chunk + 2 * q + i, tile), 16);
        for (int odd = 0; odd < 2; ++odd) convert<B>(words, odd, to.columns[odd][chunk][i]);
      }
    }
  }
}

// ---- jobs

struct Job {
  const Record* in;
  u64 descriptor_a, descriptor_b;
  bool accumulates;
  u32 issued;  // bit per warp of the warpgroup
  u32 clock;  // of the warpgroup's agent
  std::vector<Range> ranges_b;  // with checks only
  void (*execute)(const Job&, Warp* warps);
};

template <Input A, Input B, Accumulator TYPE> SIM_INLINE void multiply_tile(const ExpandedA<A>& a, const ExpandedB<B>& b, HalfTile (&sum)[2]) {
  static_assert(VALUES<A> == VALUES<B>);
  // As many accumulators at a time as leave registers for A and B.
  constexpr int HALVES_AT_ONCE = VECTOR_BYTES == 64 ? 2 : 1;
  for (int first = 0; first < 2; first += HALVES_AT_ONCE) {
    HalfTile here[HALVES_AT_ONCE];
    memcpy(here, sum + first, sizeof here);
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      SIM_UNROLL for (int q = 0; q < 4; ++q) {
        SIM_UNROLL for (int i = 0; i < VALUES<A>; ++i) {
          const Vec<f32> even = repeat<f32>(b.columns[0][chunk][i][q]), odd = repeat<f32>(b.columns[1][chunk][i][q]);
          SIM_UNROLL for (int half = 0; half < HALVES_AT_ONCE; ++half) {
            SIM_UNROLL for (int p = 0; p < HALF_PARTS; ++p) {
              const Vec<f32> rows = a.rows[chunk][i][q][first + half][p];
              here[half][0][p] = multiply_accumulate(rows, even, here[half][0][p]);
              here[half][1][p] = multiply_accumulate(rows, odd, here[half][1][p]);
            }
          }
        }
      }
    }
    memcpy(sum + first, here, sizeof here);
  }
}

template <Input A, Input B, Accumulator TYPE> void execute_job(const Job& job, Warp* warps) {
  using L = WgmmaLayout;
  const u16* extra = warps[0].extra + job.in->x;
  const u8* shared = warps[0].cta->shared;
  const u32 flags = extra[L::FLAGS], tiles = extra[L::N] / 8;
  const Descriptor matrix_a(job.descriptor_a, flags & L::A_TRANSPOSED), matrix_b(job.descriptor_b, flags & L::B_TRANSPOSED);
  ExpandedB<B> b[MAX_TILES];
  for (u32 tile = 0; tile < tiles; ++tile) expand_b<B>(b[tile], shared, matrix_b, tile);
  for (u32 w = 0; w < WARPS; ++w) {
    const Warp& warp = warps[w];
    alignas(64) u32 loaded[4][LANES];
    const u32* registers[4];
    if (!(flags & L::A_IN_REGISTERS)) load_a(shared, matrix_a, w, loaded);
    for (u32 i = 0; i < 4; ++i) registers[i] = flags & L::A_IN_REGISTERS ? warp.row<u32>(extra[L::A + i]) : loaded[i];
    ExpandedA<A> a;
    expand_a<A>(a, registers, flags & L::NEGATED);
    for (u32 tile = 0; tile < tiles; ++tile) {
      const u16* d = extra + L::D + tile * C_REGISTERS<TYPE>;
      HalfTile sum[2] = {};
      if (job.accumulates) {
        for (int half = 0; half < 2; ++half) read_tile<TYPE>(warp, d, half, sum[half]);
      }
      multiply_tile<A, B, TYPE>(a, b[tile], sum);
      for (int half = 0; half < 2; ++half) write_tile<TYPE>(warp, d, half, sum[half]);
    }
  }
}

// Jobs, commits and waits of one warpgroup. Jobs are numbered from 0.
struct Warpgroup {
  struct Member {
    u64 issued = 0, waited = 0;  // jobs
    std::deque<u64> commits;  // jobs issued at each commit, oldest first; those that it waited for are gone
  };

  Warp* warps = nullptr;
  std::deque<Job> jobs;
  u64 first = 0, done = 0;  // of `jobs`; of those not executed yet
  Member members[WARPS];

  Job& job(u64 number) { return jobs[size_t(number - first)]; }
  bool ready() { return done < first + jobs.size() && job(done).issued == (1u << WARPS) - 1; }
  void execute() {
    const Job& next = job(done++);
    next.execute(next, warps);
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
    per_block_ = u32(cluster.ctas[0]->warps.size() + WARPS - 1) / WARPS;
    groups_.resize(cluster.size * per_block_);
    for (u32 i = 0; i < groups_.size(); ++i) groups_[i].warps = &cluster.ctas[i / per_block_]->warps[i % per_block_ * WARPS];
  }

  Warpgroup& group_of(const Warp& warp) { return groups_[warp.cta->rank * per_block_ + warp.id / WARPS]; }

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
    const Warpgroup::Member& member = group.members[warp.id % WARPS];
    if (member.waited < member.issued) {
      Failure failure{"open-wgmma", "lanes exit, but nothing waited for a wgmma that they issued", {}, 0, 0, {}};
      failure.where = place_of(warp, group.job(member.waited).in);
      failure.places.push_back({warp.id, lanes, warp.cta->record_index(in), warp.cta->rank});
      throw failure;
    }
    if (member.issued < group.first + group.jobs.size()) {
      const Job& job = group.job(member.issued);
      Failure failure{"partial-warp", "", {}, 0, 0, {}};
      failure.message = "warp " + std::to_string(warp.id) + " exits without a wgmma that others of its warpgroup issued (warps " +
                        warp_list(group.warps, job.issued) + "); all four must";
      failure.where = {warp.id, lanes, warp.cta->record_index(in), warp.cta->rank};
      for_lanes(job.issued, [&](int w) { failure.places.push_back(place_of(group.warps[w], job.in)); });
      throw failure;
    }
  }

  void describe_stall(std::string& text) const override {
    for (const Warpgroup& group : groups_) {
      for (const Job& job : group.jobs) {
        const u32 missing = ((1u << WARPS) - 1) & ~job.issued;
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
  for_lanes(job.issued, [&](int w) { failure.places.push_back(place_of(group.warps[w], job.in)); });
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
  const u32 first = warp.id / WARPS * WARPS;
  if (warp.cta->num_warps < first + WARPS || warp.cta->num_threads < (first + WARPS) * LANES) {
    warp.fail(in, "partial-warp", ALL_LANES, "warps %u to %u must execute it together, but the block has only %u threads", first, first + WARPS - 1,
              warp.cta->num_threads);
  }
  u32 gone = 0;
  for (u32 w = 0; w < WARPS; ++w) gone |= u32(group.warps[w].live != ALL_LANES && group.members[w].issued <= number) << w;
  if (gone == 0) return;
  warp.fail(in, "partial-warp", ALL_LANES, "all four warps of the warpgroup must execute it, but warps %s have exited",
            warp_list(group.warps, gone).c_str());
}

// The race detector's lane of a warp's reads: if lanes differ in what they know, it is the first that know most.
constexpr u32 READING_LANE = LANES - 1;

void check_reads(Warp& warp, const Record* in, const std::vector<Range>& ranges, u32 clock, const char* what) {
  Cta& cta = *warp.cta;
  if (SIM_UNLIKELY(ranges.front().begin < cta.shared_begin || ranges.back().begin + ranges.back().bytes > cta.shared_end)) {
    for (const Range& range : ranges) resolve_range(warp, in, READING_LANE, cta, range.begin, {Access::NONE, range.bytes, 16, what});
  }
  const AsyncAgent by{cta.cluster->warpgroup_agent(cta.rank, warp.id / WARPS), clock, true, true};
  for (const Range& range : ranges) cta.shadow->access_async(warp, in, Access::READ, READING_LANE, by, range.begin, range.bytes, what);
}

// c = predicate scale-d; extra at x: see WgmmaLayout.
template <Input A, Input B, Accumulator TYPE> const Record* multiply(Warp& warp, const Record* in) {
  using L = WgmmaLayout;
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  const u16* extra = warp.extra + in->x;
  const bool a_in_registers = extra[L::FLAGS] & L::A_IN_REGISTERS;
  const u64 descriptor_a = a_in_registers ? 0 : uniform<u64>(warp, in, extra[L::A], "descriptor of A");
  const u64 descriptor_b = uniform<u64>(warp, in, extra[L::B], "descriptor of B");
  const u32 scale_d = warp.predicates[in->c];
  if (scale_d != 0 && scale_d != ALL_LANES) warp.fail(in, "wgmma", ALL_LANES, "scale-d differs between lanes: true in 0x%08x only", scale_d);

  Cta& cta = *warp.cta;
  WgmmaEngine& engine = engine_of(warp);
  Warpgroup& group = engine.group_of(warp);
  const u32 member = warp.id % WARPS;
  const u64 number = group.members[member].issued;
  check_members(warp, in, group, number);
  if (number == group.first + group.jobs.size()) {
    const u32 agent = cta.cluster->warpgroup_agent(cta.rank, warp.id / WARPS);
    group.jobs.push_back({in, descriptor_a, descriptor_b, scale_d != 0, 0, cta.cluster->tick(agent), {}, execute_job<A, B, TYPE>});
    if (cta.checks) group.jobs.back().ranges_b = ranges_of(Descriptor(descriptor_b, extra[L::FLAGS] & L::B_TRANSPOSED), 0, extra[L::N]);
  }
  Job& job = group.job(number);
  if (job.in != in) fail_against(warp, in, group, job, "they execute different ones");
  if (job.descriptor_a != descriptor_a) fail_against(warp, in, group, job, "the descriptors of A differ");
  if (job.descriptor_b != descriptor_b) fail_against(warp, in, group, job, "the descriptors of B differ");
  if (job.accumulates != (scale_d != 0)) fail_against(warp, in, group, job, "scale-d differs");
  if (cta.checks) {
    check_reads(warp, in, job.ranges_b, job.clock, "B of wgmma");
    if (!a_in_registers) {
      const Descriptor matrix(descriptor_a, extra[L::FLAGS] & L::A_TRANSPOSED);
      check_reads(warp, in, ranges_of(matrix, ROWS * member, ROWS), job.clock, "A of wgmma");
    }
  }
  ++group.members[member].issued;
  job.issued |= 1u << member;
  ++cta.counters.matrix_instructions;
  cta.counters.matrix_flops += 2 * ROWS * extra[L::N] * CHUNKS * 4 * VALUES<A>;
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
  Warpgroup::Member& member = engine_of(warp).group_of(warp).members[warp.id % WARPS];
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
  Warpgroup::Member& member = group.members[warp.id % WARPS];
  if (member.commits.size() <= size_t(in->x)) return in + 1;
  const size_t due = member.commits.size() - size_t(in->x);
  const u64 target = member.commits[due - 1];
  while (group.done < target) {
    if (!group.ready()) return warp.block();
    group.execute();
  }
  if (warp.cta->checks && target > member.waited) {
    const u32 agent = warp.cta->cluster->warpgroup_agent(warp.cta->rank, warp.id / WARPS);
    warp.knowledge.learn(mask, warp.live, agent, group.job(target - 1).clock);
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
