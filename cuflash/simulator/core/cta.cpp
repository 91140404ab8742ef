// Runs one block: takes warps in turn (or at random), and finds out when nobody can go on.
//
// Contract: within a warp, the group at the lowest record runs first and groups that meet are merged, so diverged lanes come together at
// the earliest possible place. A group that cannot go on is left where it is and tried again later; when no group of the block can go on,
// the block is stalled, which is always reported.
#include <algorithm>
#include <cstdio>

#include "async_copy.h"
#include "machine.h"
#include "matrix.h"
#include "special_registers.h"
#include "table.h"

namespace sim {

void Warp::fail(const Record* in, const char* check, u32 lanes, const char* format, ...) const {
  char text[MESSAGE_BYTES];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure{check, text, {id, lanes, cta->record_index(in)}, 0, 0, {}};
}

const Record* Warp::wait_for_lanes(const Record* in, u32 needed) {
  const u32 missing = needed & ~active;
  if (missing & ~live) {
    const char* reason = missing & ~present ? "do not exist (the block's size is not a multiple of 32)" : "have exited";
    fail(in, "partial-warp", active, "lanes 0x%08x take part, lanes 0x%08x must too but %s", active, missing & ~live, reason);
  }
  if (missing == 0) {  // the lanes are here, but the instruction is switched off for some of them
    fail(in, "partial-warp", active, "lanes 0x%08x must execute it together; a guard switches it off for some", needed);
  }
  groups[running].partial = true;
  return block();
}

Cta::Cta(const Program& program_, const LaunchDescription& launch_)
    : program(program_),
      launch(launch_),
      checks(launch_.checks != 0),
      random(0),
      last_buffer(program_.records.size(), 0),
      matrix(std::make_unique<MatrixScratch>()) {
  num_threads = launch.block[0] * launch.block[1] * launch.block[2];
  num_warps = (num_threads + LANES - 1) / LANES;
  shared_begin = program.shared_begin;
  shared_end = launch.shared_end;
  const size_t align = 1024;
  const size_t shared_bytes = (size_t(shared_end) + align) & ~(align - 1);
  const size_t register_bytes = size_t(program.num_rows) * ROW_BYTES;
  const size_t predicate_bytes = (size_t(program.num_predicates) * 4 + 63) & ~size_t(63);
  const size_t local_bytes = (size_t(program.local_bytes) * LANES + 63) & ~size_t(63);
  memory_.reset(new u8[shared_bytes + num_warps * (register_bytes + predicate_bytes + local_bytes) + align]);
  u8* next = (u8*)((u64(memory_.get()) + align - 1) & ~u64(align - 1));
  shared = next;
  next += shared_bytes;
  warps.resize(num_warps);
  for (u32 i = 0; i < num_warps; ++i) {
    Warp& warp = warps[i];
    warp.registers = next, next += register_bytes;
    warp.predicates = (u32*)next, next += predicate_bytes;
    warp.local = next, next += local_bytes;
    warp.constants = (const u8*)program.constants.data();
    warp.extra = program.extra.data();
    warp.cta = this;
    warp.id = i;
  }
  engines.push_back(make_async_copy_engine(*this));
}

Cta::~Cta() = default;

void Cta::reset(u32 index) {
  block[0] = index % launch.grid[0];
  block[1] = index / launch.grid[0] % launch.grid[1];
  block[2] = index / launch.grid[0] / launch.grid[1];
  random = Random(launch.seed * 0x100000001b3ull + index);
  memset(shared + shared_begin, 0xff, shared_end - shared_begin);
  memset(barriers, 0, sizeof barriers);
  for (auto& engine : engines) engine->reset();
  for (Warp& warp : warps) {
    const u32 lanes = std::min<u32>(LANES, num_threads - warp.id * LANES);
    warp.present = lanes == LANES ? ALL_LANES : (1u << lanes) - 1;
    warp.live = warp.present;
    warp.executed = warp.uncounted = warp.clock = 0;
    warp.carry = 0;
    warp.num_groups = 1;
    warp.groups[0] = {0, warp.live, 0, false};
    memset(warp.predicates, 0, size_t(program.num_predicates) * 4);
    warp.predicates[0] = ALL_LANES;
    memset(warp.local, 0xff, size_t(program.local_bytes) * LANES);
    for (u16 row : program.poisoned_rows) memset(warp.row<u8>(row), 0xff, ROW_BYTES);
    for (auto [number, row] : program.special) fill_special_register(*this, warp, number, row);
  }
}

void Cta::run(u32 index) {
  reset(index);
  if (launch.schedule == Schedule::RANDOM) run_at_random();
  else run_in_turn();
  ++counters.ctas;
  for (const Warp& warp : warps) counters.warp_instructions += warp.executed - warp.uncounted;
}

// Groups that met become one. True when there were any.
bool Cta::merge_groups(Warp& warp) {
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
bool Cta::pick_group(Warp& warp, u32 tried) {
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

// Runs a warp until all its groups are blocked, it has exited, or `fuel` instructions were issued. True when anything was executed.
bool Cta::run_warp(Warp& warp, u64 fuel) {
  static const std::vector<Handler> handlers = [] {
    std::vector<Handler> list;
    for (const Entry& entry : instruction_table().entries()) list.push_back(entry.handler);
    return list;
  }();
  const Handler* const table = handlers.data();
  const u64 start = warp.executed, limit = start + fuel;
  u32 tried = 0;  // groups that could not go on since anything last happened
  while (warp.num_groups != 0) {
    if (warp.num_groups > 1 && merge_groups(warp)) tried = 0;
    if (!pick_group(warp, tried)) break;
    const Record* in = program.records.data() + warp.groups[warp.running].record;
    const Record* at = in;
    u64 executed = warp.executed;
    while (SIM_LIKELY(executed < limit)) {
      at = in;
      in = table[in->op](warp, in);
      if (SIM_UNLIKELY(in == nullptr)) break;
      ++executed;
    }
    const bool moved = executed > warp.executed;
    warp.executed = executed;
    if (in != nullptr) {  // out of fuel
      warp.groups[warp.running].record = record_index(in);
      break;
    }
    if (warp.event == Event::BLOCKED) {
      warp.groups[warp.running].record = record_index(at);
      tried = (moved ? 0 : tried) | 1u << warp.running;
    } else {
      ++warp.executed;
      tried = 0;
    }
  }
  return warp.executed > start;
}

void Cta::run_in_turn() {
  constexpr u64 FUEL = 1 << 14;  // so that a warp that polls memory cannot starve the one that it waits for
  for (;;) {
    bool unfinished = false, progress = false;
    for (Warp& warp : warps) {
      if (warp.num_groups == 0) continue;
      unfinished = true;
      progress |= run_warp(warp, FUEL);
    }
    if (!unfinished) return;
    if (!progress && !step_engines()) report_stall();
  }
}

void Cta::run_at_random() {
  std::vector<u32> candidates;
  u32 stalled = 0;  // warps that could not go on since anything last happened
  for (;;) {
    candidates.clear();
    bool unfinished = false;
    for (const Warp& warp : warps) {
      unfinished |= warp.num_groups != 0;
      if (warp.num_groups != 0 && !(stalled >> warp.id & 1)) candidates.push_back(warp.id);
    }
    if (!unfinished) return;
    if (candidates.empty()) {
      if (!step_engines()) report_stall();
      stalled = 0;
      continue;
    }
    const u32 chosen = candidates[random.below(u32(candidates.size()))];
    // Mostly short turns, now and then a long one, so that a warp can also get far ahead of the others.
    const u64 fuel = random.below(8) ? 1 + random.below(48) : 1 + random.below(4096);
    if (run_warp(warps[chosen], fuel)) stalled = 0;
    else stalled |= 1u << chosen;
    if (random.below(4) == 0) step_engines();
  }
}

bool Cta::step_engines() {
  const u32 first = random.below(u32(engines.size()));
  for (size_t i = 0; i < engines.size(); ++i) {
    if (engines[(first + i) % engines.size()]->step(random)) return true;
  }
  return false;
}

void Cta::report_stall() {
  Failure failure{"deadlock", "", {0, 0, NO_RECORD}, 0, 0, {}};
  std::string exited;
  for (const Warp& warp : warps) {
    if (warp.num_groups == 0) exited += (exited.empty() ? "" : ", ") + std::to_string(warp.id);
    for (u32 i = 0; i < warp.num_groups; ++i) {
      const Group& group = warp.groups[i];
      if (failure.places.size() < MAX_PLACES) failure.places.push_back({warp.id, group.lanes, group.record});
      if (group.partial && failure.where.record == NO_RECORD) {
        char text[160];
        snprintf(text, sizeof text, "lanes 0x%08x wait here for the other lanes of their warp (0x%08x), which never come", group.lanes,
                 warp.live & ~group.lanes);
        failure.check = "partial-warp";
        failure.message = text;
        failure.where = {warp.id, group.lanes, group.record};
      }
    }
  }
  if (failure.where.record == NO_RECORD) {
    failure.message = "nobody can go on";
    for (int i = 0; i < 16; ++i) {
      if (barriers[i].arrived == 0) continue;
      char text[96];
      snprintf(text, sizeof text, "; barrier %d has %u of %u threads", i, barriers[i].arrived, barriers[i].expected);
      failure.message += text;
    }
    if (!exited.empty()) failure.message += "; warps that have exited: " + exited;
  }
  throw failure;
}

}  // namespace sim
