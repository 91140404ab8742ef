// See global_shadow.h.
#include "global_shadow.h"

#include <sys/mman.h>

#include <cstdio>

#include "cluster.h"

namespace sim {

GlobalShadow::GlobalShadow(const LaunchDescription& launch) : launch_(launch) {
  for (u32 i = 0; i < launch.num_buffers; ++i) {
    const Buffer& buffer = launch.buffers[i];
    Shadow shadow{buffer.begin, buffer.end, buffer.begin / CELL_BYTES, nullptr, 0, buffer.written};
    shadow.mapped_bytes = size_t(buffer.end / CELL_BYTES - shadow.first_cell + 1) * sizeof(Cell);
    // Pages of zeros that exist once they are touched.
    void* memory = mmap(nullptr, shadow.mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) shadow.cells = (Cell*)memory;
    shadows_.push_back(shadow);
  }
}

GlobalShadow::~GlobalShadow() {
  for (const Shadow& shadow : shadows_) {
    if (shadow.cells) munmap(shadow.cells, shadow.mapped_bytes);
  }
}

bool GlobalShadow::ordered(const Visit& visit, Trace earlier) const {
  if (earlier.word == 0 || earlier.block() == visit.block) return true;
  if (earlier.strong() && is_strong(visit.use.access)) return true;
  const std::unordered_set<u32>& known = visit.warp.cta->cluster->known_blocks;
  if (known.empty()) return false;
  return earlier.several() || known.count(earlier.block()) != 0;
}

void GlobalShadow::access(Warp& warp, const Record* in, Use use, u32 lanes, const u64* addresses, u32 guess) {
  if (use.access == Access::NONE) return;
  if (use.access == Access::WRITE) warp.cta->cluster->writes_fenced = false;
  Visit visit{warp, in, use, 0, 0, warp.cta->cluster->index};
  for_lanes(lanes, [&](int lane) {
    u64 address = addresses[lane];
    visit.lane = u32(lane), visit.address = address;
    const auto holds = [&](const Shadow& shadow) { return address >= shadow.begin && address + use.bytes <= shadow.end; };
    if (guess >= shadows_.size() || !holds(shadows_[guess])) {
      for (guess = 0; guess < shadows_.size() && !holds(shadows_[guess]);) ++guess;
      if (guess == shadows_.size()) return;
    }
    const Shadow& shadow = shadows_[guess];
    if (shadow.written) check_written(visit, shadow);
    if (!shadow.cells) return;
    if (is_strong(use.access)) synchronize(visit);
    const u64 end = address + use.bytes;
    while (address < end) {
      const u32 first = u32(address % CELL_BYTES), here = u32(std::min<u64>(CELL_BYTES - first, end - address));
      touch(visit, shadow, address / CELL_BYTES, ((1u << here) - 1) << first);
      address += here;
    }
  });
}

void GlobalShadow::touch(const Visit& visit, const Shadow& shadow, u64 number, u32 bytes) {
  Cell& cell = shadow.cells[number - shadow.first_cell];
  const bool writing = writes(visit.use.access);
  const Trace mine = Trace::make(visit.block, is_strong(visit.use.access), visit.warp.cta->record_index(visit.in), bytes);
  if (!writing && __atomic_load_n(&cell.write, __ATOMIC_SEQ_CST) == 0) {
    const Trace read{__atomic_load_n(&cell.read, __ATOMIC_SEQ_CST)};  // the common case: read before in the same way
    if (read.word != IN_LIST && read.bytes() == bytes && (read.several() || read.block() == visit.block)) return;
  }
  std::lock_guard<std::mutex> lock(locks_[number % NUM_LOCKS]);
  Trace write{cell.write}, read{cell.read};
  // One trace is enough for one kind of access, by one block or by several to the same bytes.
  const auto differs = [&](Trace other) {
    return other.word != 0 && (other.strong() != mine.strong() || (other.bytes() != bytes && other.block() != visit.block));
  };
  if (cell.write == IN_LIST || differs(write) || differs(read)) {
    if (cell.write != IN_LIST) {
      std::lock_guard<std::mutex> lists(lists_lock_);
      History& history = lists_[number];
      if (write.word) history.writes.push_back(write);
      if (read.word) history.reads.push_back(read);
      __atomic_store_n(&cell.write, IN_LIST, __ATOMIC_SEQ_CST);
    }
    touch_list(visit, number, bytes, mine);
    return;
  }
  // All traces of other blocks are of exactly these bytes.
  if (!ordered(visit, write)) race(visit, write, true);
  if (writing) {
    if (!ordered(visit, read)) race(visit, read, false);
    __atomic_store_n(&cell.write, write.block() == visit.block ? mine.with_bytes(write.bytes()).word : mine.word, __ATOMIC_SEQ_CST);
  } else {
    const bool first = read.word == 0, same = read.block() == visit.block;
    __atomic_store_n(&cell.read, first ? mine.word : same ? read.with_bytes(bytes).word : read.of_several().word, __ATOMIC_SEQ_CST);
  }
}

void GlobalShadow::touch_list(const Visit& visit, u64 key, u32 bytes, Trace mine) {
  std::lock_guard<std::mutex> lock(lists_lock_);
  History& history = lists_[key];
  const auto check = [&](const std::vector<Trace>& traces, bool earlier_writes) {
    for (const Trace& trace : traces) {
      if ((trace.bytes() & bytes) && !ordered(visit, trace)) race(visit, trace, earlier_writes);
    }
  };
  const bool writing = writes(visit.use.access);
  check(history.writes, true);
  if (writing) check(history.reads, false);
  std::vector<Trace>& traces = writing ? history.writes : history.reads;
  for (Trace& trace : traces) {
    if (trace.block() != visit.block || trace.strong() != mine.strong()) continue;
    trace = mine.with_bytes(trace.bytes());
    return;
  }
  traces.push_back(mine);
}

// A kernel that adds up in global memory makes a flag of every sum: what is passed on is shared by all that a block writes between two fences.
void GlobalShadow::synchronize(const Visit& visit) {
  Cluster& cluster = *visit.warp.cta->cluster;
  if (reads(visit.use.access) && visit.use.observed) cluster.seen_flags.insert(visit.address);
  if (!writes(visit.use.access) || !cluster.writes_fenced) return;
  if (!cluster.passed_on) {
    auto known = std::make_shared<std::unordered_set<u32>>(cluster.known_blocks);
    known->insert(visit.block);
    cluster.passed_on = std::move(known);
  }
  std::lock_guard<std::mutex> lock(flags_lock_);
  auto& flag = flags_[visit.address];
  if (flag.empty() || flag.back() != cluster.passed_on) flag.push_back(cluster.passed_on);
}

// The flags are looked up only now: what a load returns may have been written after the load was reported here.
void GlobalShadow::fence(Cluster& cluster) {
  cluster.writes_fenced = true;
  const size_t before = cluster.known_blocks.size();
  {
    std::lock_guard<std::mutex> lock(flags_lock_);
    for (const u64 address : cluster.seen_flags) {
      const auto flag = flags_.find(address);
      if (flag == flags_.end()) continue;
      for (const auto& known : flag->second) cluster.known_blocks.insert(known->begin(), known->end());
    }
  }
  cluster.seen_flags.clear();
  if (cluster.known_blocks.size() != before) cluster.passed_on.reset();
}

void GlobalShadow::check_written(const Visit& visit, const Shadow& shadow) const {
  u8* written = shadow.written + (visit.address - shadow.begin);
  if (reads(visit.use.access) && memchr(written, 0, visit.use.bytes)) {
    char text[128];
    snprintf(text, sizeof text, "%s (lane %u) of memory that nobody has written", visit.use.what, visit.lane);
    throw Failure{
        "uninitialized", text, {visit.warp.id, 1u << visit.lane, visit.warp.cta->record_index(visit.in), visit.warp.cta->rank}, visit.address,
        visit.use.bytes, {}};
  }
  if (writes(visit.use.access)) memset(written, 1, visit.use.bytes);
}

void GlobalShadow::race(const Visit& visit, Trace earlier, bool earlier_writes) const {
  char text[256], who[64] = "several blocks";
  if (!earlier.several()) {
    const u32* grid = launch_.grid;
    const u32* cluster = launch_.cluster;
    u32 index = earlier.block(), first[3];
    for (int i = 0; i < 3; ++i) first[i] = index % (grid[i] / cluster[i]) * cluster[i], index /= grid[i] / cluster[i];
    const bool many = cluster[0] * cluster[1] * cluster[2] > 1;
    snprintf(who, sizeof who, "%s (%u, %u, %u)", many ? "the cluster from block" : "block", first[0], first[1], first[2]);
  }
  snprintf(text, sizeof text, "%s (lane %u) and %s by %s: nothing orders the two blocks", visit.use.what, visit.lane,
           earlier_writes ? "a write" : "a read", who);
  Failure failure{
      "race",          text, {visit.warp.id, 1u << visit.lane, visit.warp.cta->record_index(visit.in), visit.warp.cta->rank}, visit.address,
      visit.use.bytes, {}};
  failure.places.push_back({NO_WARP, ALL_LANES, earlier.record(), visit.warp.cta->rank});
  throw failure;
}

}  // namespace sim
