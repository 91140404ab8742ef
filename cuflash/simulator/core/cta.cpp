// The memory and the initial state of one block, and what a warp does that cannot go on. See machine.h.
#include <algorithm>
#include <cstdio>

#include "cluster.h"
#include "matrix.h"
#include "shadow.h"
#include "special_registers.h"

namespace sim {
namespace {

// Room for the highest row or predicate that a record can name, behind everything that it indexes: a program whose records name wrong ones computes
// garbage, and touches no other memory.
constexpr size_t ROOM_FOR_ROWS = (size_t(CONSTANT) + 1) * ROW_BYTES;
static_assert(ROOM_FOR_ROWS > 0x10000 * sizeof(u32));  // predicates are named by 16 bits

}  // namespace

void Warp::fail(const Record* in, const char* check, u32 lanes, const char* format, ...) const {
  char text[MESSAGE_BYTES];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure{check, text, {id, lanes, cta->record_index(in), cta->rank}, 0, 0, {}};
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

const Record* Warp::poll_again(const Record* next) {
  groups[running].record = cta->record_index(next);
  event = Event::POLLED;
  polling = true;
  return nullptr;
}

Cta::Cta(Cluster& cluster_, u32 rank_)
    : cluster(&cluster_),
      program(cluster_.program),
      launch(cluster_.launch),
      rank(rank_),
      checks(launch.checks != 0),
      last_buffer(program.records.size(), 0),
      matrix(std::make_unique<MatrixScratch>()),
      profile(cluster_.profile.get()) {
  num_threads = launch.block[0] * launch.block[1] * launch.block[2];
  num_warps = (num_threads + LANES - 1) / LANES;
  shared_begin = program.shared_begin;
  shared_end = launch.shared_end;
  const size_t align = 1024;
  const size_t shared_bytes = (size_t(shared_end) + align) & ~(align - 1);
  const size_t register_bytes = size_t(program.num_rows) * ROW_BYTES;
  const size_t predicate_bytes = (size_t(program.num_predicates) * 4 + 63) & ~size_t(63);
  const size_t local_bytes = (size_t(program.local_bytes) * LANES + 63) & ~size_t(63);
  const size_t constant_bytes = program.constants.size() * ROW_BYTES;
  memory_.reset(new u8[shared_bytes + num_warps * (register_bytes + predicate_bytes + 2 * local_bytes) + constant_bytes + ROOM_FOR_ROWS + align]);
  u8* next = (u8*)((u64(memory_.get()) + align - 1) & ~u64(align - 1));
  shared = next;
  next += shared_bytes;
  warps.resize(num_warps);
  for (u32 i = 0; i < num_warps; ++i) {
    Warp& warp = warps[i];
    warp.registers = next, next += register_bytes;
    warp.predicates = (u32*)next, next += predicate_bytes;
    warp.local = next, next += local_bytes;
    warp.local_written = next, next += local_bytes;
    warp.extra = program.extra.data();
    warp.cta = this;
    warp.id = i;
  }
  memcpy(next, program.constants.data(), constant_bytes);
  for (Warp& warp : warps) warp.constants = next;
  if (checks) shadow = std::make_unique<SharedShadow>(*this);
}

Cta::~Cta() = default;

void Cta::reset(u32 x, u32 y, u32 z) {
  block[0] = x, block[1] = y, block[2] = z;
  memset(shared + shared_begin, 0xff, shared_end - shared_begin);
  if (shadow) shadow->reset();
  for (Barrier& barrier : barriers) barrier = Barrier{};
  for (Warp& warp : warps) {
    const u32 lanes = std::min<u32>(LANES, num_threads - warp.id * LANES);
    warp.present = lanes == LANES ? ALL_LANES : (1u << lanes) - 1;
    warp.live = warp.present;
    warp.executed = warp.uncounted = warp.clock = 0;
    warp.carry = 0;
    warp.polling = false;
    warp.num_groups = 1;
    warp.groups[0] = {0, warp.live, 0, false};
    if (checks) {
      u32 agents[NUM_OWN_AGENTS];
      for (u32 i = 0; i < NUM_OWN_AGENTS; ++i) agents[i] = cluster->agent(rank, OwnAgent(i), warp.id);
      warp.knowledge.reset(cluster->num_agents(), agents, cluster->wait_agent(rank, warp.id));
    }
    memset(warp.predicates, 0, size_t(program.num_predicates) * 4);
    warp.predicates[0] = ALL_LANES;
    memset(warp.local, 0xff, size_t(program.local_bytes) * LANES);
    memset(warp.local_written, 0, size_t(program.local_bytes) * LANES);
    for (u16 row : program.poisoned_rows) memset(warp.row<u8>(row), 0xff, ROW_BYTES);
    for (auto [number, row] : program.special) fill_special_register(*this, warp, number, row);
  }
}

void Cta::describe_stall(std::string& text) const {
  for (int i = 0; i < 16; ++i) {
    const Barrier& barrier = barriers[i];
    if (barrier.arrived == 0) continue;
    char line[128];
    snprintf(line, sizeof line, "; barrier %d has %u of %u threads", i, barrier.arrived, barrier.expected);
    text += line;
    if (cluster->size > 1) text += " in block " + std::to_string(rank);
  }
}

}  // namespace sim
