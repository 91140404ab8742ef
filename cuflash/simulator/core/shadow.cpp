// See shadow.h.
#include "shadow.h"

#include <cstdio>

#include "cluster.h"
#include "table.h"

namespace sim {
namespace {

constexpr u8 NO_SLOT = 0xff;

}  // namespace

struct SharedShadow::Visit {
  Warp& warp;
  const Record* in;
  Access access;
  bool async, proxy, wgmma, isa_rule;
  u32 lane;
  u32 lanes;  // those that access: this one, or the whole warp at once
  u32 size;   // bytes of the whole access
  const char* what;
  Stamp stamp;  // of this access
  u32 slot;
  Read* reads;  // of this agent
  // Of a store by lanes of a warp.
  u32 stored = 0;  // lanes that have been visited
  const u32* addresses = nullptr;
  const StoredValues* values = nullptr;
  const u8* memory = nullptr;  // of the block

  const Cluster& cluster() const { return *warp.cta->cluster; }
  bool orders_read(const Read& earlier) const {
    return warp.knowledge.knows(earlier.stamp, earlier.lanes, lane) || ((proxy || !cluster().launch.isa_rules) && is_known_by_group(earlier.stamp));
  }
  // Whether the read is one of A by a wgmma that some warp of the warpgroup is known to have waited for: it was done for all four together.
  bool is_known_by_group(Stamp read) const {
    return cluster().is_wgmma_part(read.agent()) && warp.knowledge.knows(read.by_agent(cluster().warpgroup_of_part(read.agent())), lane);
  }
  // Whether whoever hears of this read has heard of the earlier one by the same agent: what one lane or an asynchronous unit
  // does completes in order.
  bool supersedes(const Read& earlier) const { return async || earlier.lanes == 1u << lane || orders_read(earlier); }
  // Whether a lane has just written the same here, in the same instruction. Stamps tell: the lane was visited, so what it wrote before is gone.
  bool repeats(Stamp earlier) const {
    const u32 other = earlier.lane();
    return values && (stored >> other & 1) && earlier.by_lane(lane).word == stamp.word && addresses[other] == addresses[lane] &&
           values->same(lane, other);
  }
  // Whether a warp stores what another warp has stored there, which only the PTX ISA calls a race: no order of the two makes a difference.
  bool changes_nothing(Stamp earlier) const {
    if (!values || cluster().launch.isa_rules || earlier.atomic() || !cluster().is_warp(earlier.agent())) return false;
    return values->equal(lane, memory + addresses[lane]);
  }
  // Whether the write is visible to this access.
  bool orders_write(Stamp earlier) const {
    if (!warp.knowledge.knows(earlier, lane)) return false;
    if (!proxy || cluster().is_proxy(earlier.agent()) || warp.knowledge.knows_fenced(earlier, lane)) return true;
    return !cluster().launch.isa_rules && wgmma && cluster().is_copy(earlier.agent());
  }
};

SharedShadow::SharedShadow(Cta& cta) : cta_(cta), begin_(cta.shared_begin & ~(CELL_BYTES - 1)) {
  cells_.resize((cta.shared_end - begin_ + CELL_BYTES - 1) / CELL_BYTES);
  slot_of_agent_.assign(cta.cluster->num_agents(), NO_SLOT);
  reads_.resize(MAX_READERS);
}

void SharedShadow::reset() {
  std::fill(cells_.begin(), cells_.end(), Cell{0, 0});
  splits_.clear();
  free_splits_.clear();
  flags_.clear();
}

// The stamps of an agent's reads, one per cell, and the bit that stands for it.
SharedShadow::Read* SharedShadow::reads_of(u32 agent, u32& slot) {
  u8& known = slot_of_agent_[agent];
  if (SIM_UNLIKELY(known == NO_SLOT)) {
    if (num_slots_ == MAX_READERS) throw Failure{"unsupported", "more than 64 agents read the shared memory of a block", {}, 0, 0, {}};
    known = u8(num_slots_++);
    reads_[known] = std::make_unique<Read[]>(cells_.size());
  }
  slot = known;
  return reads_[known].get();
}

SharedShadow::Split& SharedShadow::split(Cell& cell) {
  u32 index;
  if (free_splits_.empty()) {
    index = u32(splits_.size());
    splits_.emplace_back();
  } else {
    index = free_splits_.back();
    free_splits_.pop_back();
  }
  Split& result = splits_[index];
  for (Stamp& write : result.write) write = {cell.write};
  for (Stamp& write : result.plain) write = {cell.write};
  result.reads.clear();
  const size_t number = size_t(&cell - cells_.data());
  for (u64 rest = cell.readers; rest; rest &= rest - 1) result.reads.push_back({reads_[__builtin_ctzll(rest)][number], 0xffff});
  cell = {IS_SPLIT | index, 0};
  return result;
}

void SharedShadow::make_whole(Cell& cell) {
  free_splits_.push_back(u32(cell.write & ~IS_SPLIT));
  cell.readers = 0;
}

SIM_INLINE void SharedShadow::touch_whole(Visit& visit, u32 index) {
  Cell& cell = cells_[index];
  const u32 address = begin_ + index * CELL_BYTES;
  if (SIM_UNLIKELY(is_split(cell))) {
    touch_split(visit, index, 0xffff);
    return;
  }
  const Stamp write{cell.write};
  if (visit.access == Access::READ) {
    if (SIM_UNLIKELY(!write)) uninitialized(visit, address);
    if (SIM_UNLIKELY(!visit.orders_write(write))) race(visit, write, write.lane_mask(), true, address);
    Read& last = visit.reads[index];
    const u64 bit = u64(1) << visit.slot;
    u32 lanes = visit.lanes;
    if (cell.readers & bit) {
      if (last.stamp.clock() == visit.stamp.clock()) {
        lanes |= last.lanes;
      } else if (SIM_UNLIKELY(!visit.supersedes(last))) {  // both have to be remembered
        touch_split(visit, index, 0xffff);
        return;
      }
    }
    last = {visit.stamp, lanes};
    cell.readers |= bit;
    return;
  }
  if (write && !visit.orders_write(write) && !visit.repeats(write) && !visit.changes_nothing(write))
    race(visit, write, write.lane_mask(), true, address);
  for (u64 rest = cell.readers; rest; rest &= rest - 1) {
    const Read& read = reads_[__builtin_ctzll(rest)][index];
    if (SIM_UNLIKELY(!visit.orders_read(read))) race(visit, read.stamp, read.lanes, false, address);
  }
  cell = {visit.stamp.word, 0};
}

// Single bytes of a cell: bit i of `bytes` is byte i.
SIM_NOINLINE void SharedShadow::touch_split(Visit& visit, u32 index, u32 bytes) {
  Cell& cell = cells_[index];
  Split& parts = is_split(cell) ? split_of(cell) : split(cell);
  const u32 address = begin_ + index * CELL_BYTES;
  for_lanes(bytes, [&](int byte) {
    const Stamp write = parts.write[byte];
    if (reads(visit.access) && !write) uninitialized(visit, address + u32(byte));
    const Stamp last = is_strong(visit.access) ? parts.plain[byte] : write;
    if (last && !visit.orders_write(last) && !visit.repeats(last) && !visit.changes_nothing(last))
      race(visit, last, last.lane_mask(), true, address + u32(byte));
  });
  std::vector<PartialRead>& earlier = parts.reads;
  if (!writes(visit.access)) {
    const u32 lanes = visit.lanes;
    for (auto& [read, read_bytes] : earlier) {
      if (read.stamp.agent() != visit.stamp.agent() || read.stamp.atomic() != visit.stamp.atomic()) continue;
      if (read.stamp.clock() == visit.stamp.clock()) {
        if (read_bytes != bytes && read.lanes != lanes) continue;
        read = {visit.stamp, read.lanes | lanes}, read_bytes |= bytes;
        return;
      }
      if (!visit.supersedes(read)) continue;
      if (read_bytes & ~bytes) {
        read_bytes &= ~bytes;  // its other bytes are a read of their own from now on
        continue;
      }
      read = {visit.stamp, lanes}, read_bytes = bytes;
      return;
    }
    earlier.push_back({{visit.stamp, lanes}, bytes});
    return;
  }
  for (auto& [read, read_bytes] : earlier) {
    if ((read_bytes & bytes) == 0) continue;
    const bool both_strong = is_strong(visit.access) && read.stamp.atomic();
    if (!both_strong && !visit.orders_read(read)) race(visit, read.stamp, read.lanes, false, address + u32(__builtin_ctz(read_bytes & bytes)));
    read_bytes &= ~bytes;
  }
  earlier.erase(std::remove_if(earlier.begin(), earlier.end(), [](const PartialRead& read) { return read.bytes == 0; }), earlier.end());
  for_lanes(bytes, [&](int byte) {
    parts.write[byte] = visit.stamp;
    if (!is_strong(visit.access)) parts.plain[byte] = visit.stamp;
  });
  const Stamp first = parts.write[0];
  if (first.atomic()) return;
  if (!parts.reads.empty() || !std::all_of(parts.write, parts.write + CELL_BYTES, [&](Stamp write) { return write.word == first.word; })) return;
  make_whole(cell);
  cell.write = first.word;
}

SIM_INLINE void SharedShadow::touch(Visit& visit, u32 begin, u32 bytes) {
  const u32 end = begin + bytes;
  while (begin < end) {
    const u32 index = (begin - begin_) / CELL_BYTES, first = (begin - begin_) % CELL_BYTES;
    const u32 here = std::min(CELL_BYTES - first, end - begin);
    if (SIM_LIKELY(here == CELL_BYTES && !is_strong(visit.access))) touch_whole(visit, index);
    else touch_split(visit, index, ((1u << here) - 1) << first);
    begin += here;
  }
}

// The hot case: whole cells are read that everybody may read. Returns the lanes for which it is not that simple.
u32 SharedShadow::read_cells(const Visit& visit, Stamp stamp, u32 lanes, const u32* addresses) {
  const Clock& known = visit.warp.knowledge.known_to_all();
  const u32 known_own = known.at(stamp.agent());
  const u64 bit = u64(1) << visit.slot;
  u32 left = 0;
  for_lanes(lanes, [&](int lane) {
    const u32 index = (addresses[lane] - begin_) / CELL_BYTES;
    Cell& cell = cells_[index];
    Read& last = visit.reads[index];
    const Stamp write{cell.write};
    const bool was_read = (cell.readers & bit) != 0, same_clock = was_read && last.stamp.clock() == stamp.clock();
    const bool simple =
        write && !is_split(cell) && write.clock() <= known.at(write.agent()) && (!was_read || same_clock || last.stamp.clock() <= known_own);
    if (SIM_UNLIKELY(!simple)) {
      left |= 1u << lane;
      return;
    }
    last = {stamp.by_lane(u32(lane)), (same_clock ? last.lanes : 0) | 1u << lane};
    cell.readers |= bit;
  });
  return left;
}

void SharedShadow::access(Warp& warp, const Record* in, Access access, u32 lanes, const u32* addresses, u32 bytes, const char* what,
                          const StoredValues* values) {
  Visit visit{warp, in, access, false, false, false, false, 0, 0, bytes, what, {}, 0, nullptr};
  const u32 agent = warp.knowledge.agent(OWN_ACCESSES), now = warp.knowledge.now(), record = warp.cta->record_index(in);
  visit.reads = reads_of(agent, visit.slot);
  visit.addresses = addresses, visit.values = values, visit.memory = cta_.shared;
  warp.knowledge.touch(lanes);
  if (bytes == CELL_BYTES && access == Access::READ) lanes = read_cells(visit, Stamp::make(agent, now, 0, record), lanes, addresses);
  for_lanes(lanes, [&](int lane) {
    visit.lane = u32(lane), visit.lanes = 1u << lane;
    visit.stamp = Stamp::make(agent, now, visit.lane | (is_strong(access) ? ATOMIC_LANE : 0), record);
    if (is_strong(access) && reads(access)) warp.knowledge.read_flag(u32(lane), flag_at(addresses[lane]));
    touch(visit, addresses[lane], bytes);
    if (is_strong(access) && writes(access)) warp.knowledge.write_flag(u32(lane), flag_at(addresses[lane]));
    visit.stored |= 1u << lane;
  });
}

Knowledge& SharedShadow::flag_at(u32 address) {
  const auto [flag, is_new] = flags_.try_emplace(address);
  if (is_new) flag->second.reset(cta_.cluster->num_agents());
  return flag->second;
}

void SharedShadow::access_async(Warp& warp, const Record* in, Access access, u32 lane, AsyncAgent by, u32 begin, u32 bytes, const char* what) {
  const u32 lanes = by.by_warp ? ALL_LANES : 1u << lane;
  Visit visit{warp, in, access, true, by.proxy, by.by_warp, by.isa_rule, lane, lanes, bytes, what, {}, 0, nullptr};
  if (access == Access::READ && bytes >= CELL_BYTES) visit.reads = reads_of(by.agent, visit.slot);  // only whole cells have slots of readers
  visit.stamp = Stamp::make(by.agent, by.clock, lane | (is_strong(access) ? ATOMIC_LANE : 0), warp.cta->record_index(in));
  warp.knowledge.touch(1u << lane);
  touch(visit, begin, bytes);
}

void SharedShadow::uninitialized(const Visit& visit, u32 address) {
  visit.warp.fail(visit.in, "uninitialized", 1u << visit.lane, "%s reads byte %u of shared memory (lane %u), which nobody has written", visit.what,
                  address - cta_.shared_begin, visit.lane);
}

// What the PTX ISA demands here though NVIDIA's own kernels leave it out; "" if it is nothing of that kind.
std::string SharedShadow::isa_rule_of(const Visit& visit, Stamp earlier, bool earlier_writes) const {
  const Cluster& cluster = *cta_.cluster;
  const std::string& op = instruction_table().entries()[visit.warp.cta->program.records[earlier.record()].op].name;
  const bool known = visit.warp.knowledge.knows(earlier, visit.lane);
  if (known && visit.wgmma && cluster.is_copy(earlier.agent())) return "a fence.proxy.async between cp.async and wgmma";
  if (known && op == "mbarrier.init") return "a fence.mbarrier_init or fence.proxy.async between mbarrier.init and a copy that completes on it";
  if (earlier_writes && visit.isa_rule) return "a barrier here, because it does not promise that a warp reads only its own 16 rows of A";
  if (!earlier_writes && visit.is_known_by_group(earlier))
    return "a wgmma.wait_group by that warp and then a barrier, because it does not promise that a warp reads only its own 16 rows of A";
  return "";
}

void SharedShadow::race(const Visit& visit, Stamp earlier, u32 earlier_lanes, bool earlier_writes, u32 address) {
  Cluster& cluster = *cta_.cluster;
  const std::string rule = isa_rule_of(visit, earlier, earlier_writes);
  const bool of_group = rule.empty() && cluster.is_wgmma_part(earlier.agent());  // nobody is known to have waited
  const AgentName who = cluster.agent_name(of_group ? cluster.warpgroup_of_part(earlier.agent()) : earlier.agent());
  const bool unfenced = visit.proxy && visit.warp.knowledge.knows(earlier, visit.lane);
  char lane[32] = "";
  if ((earlier_lanes & (earlier_lanes - 1)) == 0) snprintf(lane, sizeof lane, ", lane %u", earlier.lane());
  const std::string isa_advice = "the PTX ISA demands " + rule + "; kernels of NVIDIA's leave that out, and Options(isa_rules=False) allows it";
  const char* const advice = !rule.empty()  ? isa_advice.c_str()
                             : unfenced     ? "the asynchronous proxy does not see it without a fence.proxy.async"
                             : who.is_async ? "nothing waited for its completion before, or the wait was not followed by a barrier"
                             : earlier.agent() == visit.warp.knowledge.agent(OWN_ACCESSES) ? "lanes of one warp, with no __syncwarp between"
                                                                                           : "no barrier orders them";
  Failure failure{!rule.empty() ? "isa-rules" : unfenced ? "proxy-fence" : "race", "", {}, 0, 0, {}};
  char text[MESSAGE_BYTES];
  snprintf(text, sizeof text, "%s at byte %u of shared memory (lane %u) and an earlier %s by %s%s: %s", visit.what, address - cta_.shared_begin,
           visit.lane, earlier_writes ? "write" : "read", who.text, lane, advice);
  failure.message = text;
  failure.where = {visit.warp.id, 1u << visit.lane, cta_.record_index(visit.in), visit.warp.cta->rank};
  failure.places.push_back({who.warp, earlier_lanes, earlier.record(), who.rank});
  throw failure;
}

}  // namespace sim
