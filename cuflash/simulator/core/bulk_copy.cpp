// See bulk_copy.h. The instructions that copy ranges of bytes, st.async and red.async, and the bulk groups.
//
// Contract: `extra` at x holds address operands (see access.h), destination first, then other rows; field c of a reduction its operation and
// element, of a copy MULTICAST. Every lane issues a copy of its own. Bulk groups are per thread, as in the PTX ISA.
#include "bulk_copy.h"

#include <algorithm>

#include "cluster.h"
#include "table.h"

namespace sim {
namespace {

constexpr u32 OPEN = ~0u;  // in place of the number of a group
constexpr u32 GRANULE = 16;  // bytes; addresses and sizes of bulk copies are multiples

BulkCopies& bulk_copies_of(const Warp& warp) { return *warp.cta->cluster->bulk_copies; }
Mbarriers& mbarriers_of(const Warp& warp) { return *warp.cta->cluster->mbarriers; }

}  // namespace

BulkCopies::BulkCopies(Cluster& cluster) : cluster_(cluster), schedule_(cluster.launch.schedule), commits_(cluster.warps.size()) {}

void BulkCopies::reset() {
  copies_.clear();
  for (auto& lanes : commits_) lanes.fill(0);
}

AsyncAgent BulkCopies::group_agent(const Warp& warp) {
  const u32 agent = cluster_.agent(warp.cta->rank, OWN_BULK, warp.id);
  return {agent, cluster_.tick(agent), true};
}

void BulkCopies::read_source(BulkCopy& copy) {
  if (copy.read) return;
  copy.read = true;
  if (copy.barrier) return;  // read and written at the same time
  size_t size = 0;
  for (const Piece& piece : copy.pieces) size += piece.bytes;
  copy.values.resize(size);
  u8* next = copy.values.data();
  for (Piece& piece : copy.pieces) {
    memcpy(next, piece.from, piece.bytes);
    piece.from = next;
    next += piece.bytes;
  }
}

void BulkCopies::finish(BulkCopy& copy) {
  read_source(copy);
  for (const Piece& piece : copy.pieces) {
    if (copy.reduction) copy.reduction(piece.to, piece.from, piece.bytes);
    else memcpy(piece.to, piece.from, piece.bytes);
  }
  copy.pieces.clear();
  if (copy.barrier) cluster_.mbarriers->complete(*copy.barrier, copy.bytes);
}

void BulkCopies::start(BulkCopy&& copy) {
  if (schedule_ == Schedule::EARLY || (schedule_ == Schedule::RANDOM && cluster_.random.below(4) == 0)) finish(copy);
  if (!copy.barrier || !copy.pieces.empty()) copies_.push_back(std::move(copy));
}

// Copies of bulk groups come last: nobody but their lane can wait for them.
bool BulkCopies::step(Random& random) {
  if (copies_.empty()) return false;
  const size_t first = schedule_ == Schedule::RANDOM ? random.below(u32(copies_.size())) : 0;
  for (const bool grouped : {false, true}) {
    for (size_t i = 0; i < copies_.size(); ++i) {
      const size_t chosen = (first + i) % copies_.size();
      BulkCopy& copy = copies_[chosen];
      if (copy.pieces.empty() || (copy.barrier == nullptr) != grouped) continue;
      if (grouped && !copy.read && random.below(2)) {
        read_source(copy);
        return true;
      }
      finish(copy);
      if (!grouped) copies_.erase(copies_.begin() + i64(chosen));
      return true;
    }
  }
  return false;
}

void BulkCopies::commit(const Warp& warp, u32 lanes) {
  for (BulkCopy& copy : copies_) {
    if (copy.warp == warp.index && !copy.barrier && copy.group == OPEN && (lanes >> copy.lane & 1)) copy.group = commits_[warp.index][copy.lane];
  }
  for_lanes(lanes, [&](int lane) { ++commits_[warp.index][u32(lane)]; });
}

void BulkCopies::wait(Warp& warp, u32 lanes, u32 allowed, bool read_only) {
  const auto& commits = commits_[warp.index];
  u32 done = MAX_CLOCK;
  for (BulkCopy& copy : copies_) {
    if (copy.warp != warp.index || copy.barrier) continue;
    if ((lanes >> copy.lane & 1) && copy.group != OPEN && copy.group + u64(allowed) < commits[copy.lane]) {
      read_source(copy);
      copy.read_waited = true;
      if (!read_only) finish(copy);
    } else if (!copy.read_waited) {
      done = std::min(done, copy.clock - 1);
    }
  }
  const auto is_done = [](const BulkCopy& copy) { return !copy.barrier && copy.read_waited && copy.pieces.empty(); };
  copies_.erase(std::remove_if(copies_.begin(), copies_.end(), is_done), copies_.end());
  if (!warp.cta->checks) return;
  warp.knowledge.waited(OWN_BULK, done == MAX_CLOCK ? cluster_.latest(warp.knowledge.agent(OWN_BULK)) : done, lanes);
}

void BulkCopies::check_exit(Warp& warp, const Record* in, u32 lanes) {
  const Cta& cta = *warp.cta;
  const bool last = cta.ends_with(warp, lanes);
  for (BulkCopy& copy : copies_) {
    const bool own = copy.warp == warp.index && !copy.barrier && (lanes >> copy.lane & 1);
    const bool reads_block = last && copy.barrier && copy.source_rank == cta.rank;
    if (cta.checks && ((own && !copy.read_waited) || reads_block)) {
      Failure failure{"open-copy", "", copy.place, 0, 0, {place_of(warp, in, lanes)}};
      failure.message = own ? "a thread exits, but nothing waited until its bulk copy had read shared memory"
                            : "a block exits while a copy still reads its shared memory";
      throw failure;
    }
    if (own) finish(copy);
  }
  const auto is_done = [](const BulkCopy& copy) { return !copy.barrier && copy.pieces.empty() && copy.read_waited; };
  copies_.erase(std::remove_if(copies_.begin(), copies_.end(), is_done), copies_.end());
}

BulkCopy make_bulk_copy(Warp& warp, const Record* in, u32 lane) {
  BulkCopy copy{};
  copy.place = place_of(warp, in, 1u << lane);
  copy.warp = warp.index, copy.lane = lane;
  copy.source_rank = NO_RANK;
  copy.group = OPEN;
  return copy;
}

u64 global_address(const Warp& warp, const u16* operand, u32 lane) {
  const Address address = address_operand(operand);
  return (address.wide ? warp.row<u64>(address.row)[lane] : warp.row<u32>(address.row)[lane]) + i64(address.offset);
}

u8* global_range(Warp& warp, const Record* in, u32 lane, u64 address, Use use) {
  alignas(64) u64 addresses[LANES] = {};
  addresses[lane] = address;
  Pointers pointers;
  resolve_global(warp, in, 1u << lane, addresses, use, pointers);
  return pointers.lane[lane];
}

std::vector<Destination> find_destinations(Warp& warp, const Record* in, u32 lane, u32 to, u32 mbarrier, bool multicast, u32 mask, const char* what) {
  const u32 rank = rank_of(warp, to);
  if (rank_of(warp, mbarrier) != rank) {
    warp.fail(in, "bulk-copy", 1u << lane, "%s to block %u of the cluster completes on an mbarrier of block %u; both must be in one block", what,
              rank, rank_of(warp, mbarrier));
  }
  std::vector<Destination> destinations;
  const u32 offset = to & ~RANK_MASK, mbarrier_offset = mbarrier & ~RANK_MASK;
  if (!multicast) {
    destinations.push_back({&target_block(warp, in, lane, to, what), offset, mbarrier_offset});
    return destinations;
  }
  if (mask == 0) warp.fail(in, "bulk-copy", 1u << lane, "%s to no block of the cluster: the mask is 0", what);
  for_lanes(mask, [&](int block) {
    Cta& target = target_block(warp, in, lane, u32(block + 1) << RANK_SHIFT, what);
    destinations.push_back({&target, offset, mbarrier_offset});
  });
  return destinations;
}

namespace {

u32 checked_size(Warp& warp, const Record* in, u32 lane, u16 row) {
  const u32 bytes = warp.row<u32>(row)[lane];
  if (bytes % GRANULE != 0)
    warp.fail(in, "bulk-copy", 1u << lane, "a copy of %u bytes (lane %u), which is not a multiple of %u", bytes, lane, GRANULE);
  return bytes;
}

Reduction reduction_of(const Record* in) {
  const u32 operation = operation_of(in);
  return operation == NO_OPERATION ? nullptr : find_reduction(Operation(operation), ElementType(in->c >> ELEMENT_SHIFT));
}

// Issues a copy into shared memory that completes on an mbarrier.
void start_on_mbarrier(Warp& warp, const Record* in, u32 lane, const Destination& destination, BulkCopy&& copy, Use use, bool proxy) {
  Cta& target = *destination.cta;
  u8* to = resolve_range(warp, in, lane, target, destination.to, use);
  Mbarriers& mbarriers = mbarriers_of(warp);
  copy.barrier = &mbarriers.issue(warp, in, lane, target, destination.mbarrier, use.bytes, proxy);
  copy.bytes = use.bytes;
  if (use.bytes == 0) return;
  if (target.shadow) {
    target.shadow->access_async(warp, in, use.access, lane, mbarriers.agent(*copy.barrier, proxy), destination.to, use.bytes, use.what);
  }
  copy.pieces[0].to = to;
  bulk_copies_of(warp).start(std::move(copy));
}

// global -> shared. Operands: destination, source, mbarrier, size, mask of blocks.
const Record* copy_to_shared(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const char* const what = "cp.async.bulk to shared memory";
  const u16* extra = warp.extra + in->x;
  const u16* const source = extra + ADDRESS_WORDS;
  const u16* const rest = extra + 3 * ADDRESS_WORDS;
  u32 to[LANES], barriers[LANES];
  shared_addresses(warp, in, mask, extra, what, to);
  shared_addresses(warp, in, mask, extra + 2 * ADDRESS_WORDS, "mbarrier of cp.async.bulk", barriers);
  for_lanes(mask, [&](int each) {
    const u32 lane = u32(each), bytes = checked_size(warp, in, lane, rest[0]);
    const u8* from = global_range(warp, in, lane, global_address(warp, source, lane), {Access::READ, bytes, GRANULE, "source of cp.async.bulk"});
    const u32 blocks = warp.row<u32>(rest[1])[lane] & 0xffffu;
    for (const Destination& destination : find_destinations(warp, in, lane, to[lane], barriers[lane], in->c & MULTICAST, blocks, what)) {
      BulkCopy copy = make_bulk_copy(warp, in, lane);
      copy.pieces.push_back({nullptr, from, bytes});
      start_on_mbarrier(warp, in, lane, destination, std::move(copy), {Access::WRITE, bytes, GRANULE, what}, true);
    }
  });
  ++warp.cta->counters.async_copies;
  return in + 1;
}

// shared -> shared of a block of the cluster, also reducing. Operands: destination, source, mbarrier, size.
const Record* copy_between_blocks(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const Reduction reduction = reduction_of(in);
  const char* const what = reduction ? "cp.reduce.async.bulk to shared memory" : "cp.async.bulk to shared memory";
  const u16* extra = warp.extra + in->x;
  u32 to[LANES], from[LANES], barriers[LANES];
  shared_addresses(warp, in, mask, extra, what, to);
  shared_addresses(warp, in, mask, extra + ADDRESS_WORDS, "source of cp.async.bulk", from);
  shared_addresses(warp, in, mask, extra + 2 * ADDRESS_WORDS, "mbarrier of cp.async.bulk", barriers);
  for_lanes(mask, [&](int each) {
    const u32 lane = u32(each), bytes = checked_size(warp, in, lane, extra[3 * ADDRESS_WORDS]);
    Cta& own = *warp.cta;
    const u32 begin = from[lane] & ~RANK_MASK;
    const Destination destination = find_destinations(warp, in, lane, to[lane], barriers[lane], false, 0, what)[0];
    BulkCopy copy = make_bulk_copy(warp, in, lane);
    copy.reduction = reduction;
    copy.source_rank = own.rank;
    copy.pieces.push_back({nullptr, resolve_range(warp, in, lane, own, begin, {Access::READ, bytes, GRANULE, "source of cp.async.bulk"}), bytes});
    if (own.shadow && bytes != 0) {
      const Place at = place_of(warp, in, 1u << lane);
      resolve_range(warp, in, lane, *destination.cta, destination.mbarrier, {Access::NONE, 8, 8, "mbarrier of cp.async.bulk"});
      const Mbarrier& barrier = mbarriers_of(warp).find(at, *destination.cta, destination.mbarrier, what);
      own.shadow->access_async(warp, in, Access::READ, lane, mbarriers_of(warp).agent(barrier, true), begin, bytes, "source of cp.async.bulk");
    }
    start_on_mbarrier(warp, in, lane, destination, std::move(copy), {reduction ? Access::ATOMIC : Access::WRITE, bytes, GRANULE, what}, true);
  });
  ++warp.cta->counters.async_copies;
  return in + 1;
}

// shared -> global, also reducing. Operands: destination, source, size.
const Record* copy_to_global(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u16* extra = warp.extra + in->x;
  const char* const what = "cp.async.bulk from shared memory";
  u32 from[LANES];
  shared_addresses(warp, in, mask, extra + ADDRESS_WORDS, what, from);
  for_lanes(mask, [&](int each) {
    const u32 lane = u32(each), bytes = checked_size(warp, in, lane, extra[2 * ADDRESS_WORDS]);
    Cta& own = *warp.cta;
    const u32 begin = from[lane] & ~RANK_MASK;
    BulkCopy copy = make_bulk_copy(warp, in, lane);
    copy.reduction = reduction_of(in);
    copy.source_rank = own.rank;
    const Access access = copy.reduction ? Access::ATOMIC : Access::WRITE;
    u8* to = global_range(warp, in, lane, global_address(warp, extra, lane), {access, bytes, GRANULE, "destination of cp.async.bulk"});
    copy.pieces.push_back({to, resolve_range(warp, in, lane, own, begin, {Access::READ, bytes, GRANULE, what}), bytes});
    const AsyncAgent agent = bulk_copies_of(warp).group_agent(warp);
    copy.clock = agent.clock;
    if (own.shadow && bytes != 0) own.shadow->access_async(warp, in, Access::READ, lane, agent, begin, bytes, what);
    bulk_copies_of(warp).start(std::move(copy));
  });
  ++warp.cta->counters.async_copies;
  return in + 1;
}

// st.async and red.async. Operands: destination, mbarrier, bytes of an element (a number), how many, the values.
const Record* store_async(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const Reduction reduction = reduction_of(in);
  const char* const what = reduction ? "red.async" : "st.async";
  const u16* extra = warp.extra + in->x;
  const u16* const rest = extra + 2 * ADDRESS_WORDS;
  const u32 size = rest[0], count = rest[1];
  u32 to[LANES], barriers[LANES];
  shared_addresses(warp, in, mask, extra, what, to);
  shared_addresses(warp, in, mask, extra + ADDRESS_WORDS, "mbarrier of an asynchronous store", barriers);
  for_lanes(mask, [&](int each) {
    const u32 lane = u32(each), bytes = size * count;
    BulkCopy copy = make_bulk_copy(warp, in, lane);
    copy.reduction = reduction;
    copy.values.resize(bytes);
    for (u32 i = 0; i < count; ++i) {
      const void* value = size == 8 ? (const void*)&warp.row<u64>(rest[2 + i])[lane] : (const void*)&warp.row<u32>(rest[2 + i])[lane];
      memcpy(copy.values.data() + i * size, value, size);
    }
    copy.pieces.push_back({nullptr, copy.values.data(), bytes});
    const Destination destination = find_destinations(warp, in, lane, to[lane], barriers[lane], false, 0, what)[0];
    start_on_mbarrier(warp, in, lane, destination, std::move(copy), {reduction ? Access::ATOMIC : Access::WRITE, bytes, bytes, what}, false);
  });
  ++warp.cta->counters.async_copies;
  return in + 1;
}

// A hint; the source must be there all the same. Operands: source, size.
const Record* prefetch(Warp& warp, const Record* in) {
  const u16* extra = warp.extra + in->x;
  for_lanes(warp.mask(in), [&](int each) {
    const u32 lane = u32(each), bytes = checked_size(warp, in, lane, extra[ADDRESS_WORDS]);
    global_range(warp, in, lane, global_address(warp, extra, lane), {Access::READ, bytes, GRANULE, "source of cp.async.bulk.prefetch"});
  });
  return in + 1;
}

const Record* commit_group(Warp& warp, const Record* in) {
  bulk_copies_of(warp).commit(warp, warp.mask(in));
  return in + 1;
}

template <bool READ_ONLY> const Record* wait_group(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask != 0) bulk_copies_of(warp).wait(warp, mask, u32(in->x), READ_ONLY);
  return in + 1;
}

}  // namespace

void register_bulk_copy(Table& table) {
  table.family(Class::GLOBAL);
  table.add("cp.async.bulk.to_shared", "", copy_to_shared);
  table.add("cp.async.bulk.between_blocks", "", copy_between_blocks, Class::SHARED);
  table.add("cp.async.bulk.to_global", "", copy_to_global);
  table.add("st.async", "", store_async, Class::SHARED);
  table.add("cp.async.bulk.prefetch", "", prefetch, Class::CONTROL);
  table.add("cp.async.bulk.commit_group", "", commit_group, Class::CONTROL);
  table.add("cp.async.bulk.wait_group", "xi", wait_group<false>, Class::CONTROL);
  table.add("cp.async.bulk.wait_group.read", "xi", wait_group<true>, Class::CONTROL);
}

}  // namespace sim
