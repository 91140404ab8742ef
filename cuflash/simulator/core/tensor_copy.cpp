// TMA: copies between a box of a tensor in global memory and shared memory.
//
// Contract: `extra` at x: address operands of shared memory, of the tensor map (generic), and for loads of the mbarrier; then the rank, the
// coordinates innermost first, and for loads the mask of blocks. Field c as in bulk_copy.cpp. A box lies in shared memory densely, innermost
// dimension first; swizzling exchanges 16-byte chunks by bits of their shared address. What lies outside of the tensor is filled by loads
// and left alone by stores; an mbarrier gets the bytes of the whole box in any case. As on a GPU, the coordinate of the innermost dimension must
// be a multiple of 16 bytes, and no coordinate of a store may be negative.
#include <algorithm>

#include "bulk_copy.h"
#include "cluster.h"
#include "table.h"
#include "tensor_map.h"

namespace sim {
namespace {

constexpr u32 BOX_ALIGNMENT = 128, CHUNK = 16;
constexpr u32 MAX_ROW_BYTES = 2048;  // 256 elements of 8 bytes

struct Box {
  TensorMap map;
  i64 begin[TensorMap::MAX_RANK];  // coordinates of the first element
  u32 row_bytes, bytes;
};

// Bytes to fill a row with.
const u8* fill_bytes(const TensorMap& map) {
  struct Rows {
    alignas(8) u8 zero[MAX_ROW_BYTES] = {};
    alignas(8) u8 nan16[MAX_ROW_BYTES], nan32[MAX_ROW_BYTES], nan64[MAX_ROW_BYTES];
    Rows() {
      const auto fill = [](u8* row, u32 element) {
        for (u32 i = 0; i < MAX_ROW_BYTES; ++i) row[i] = i % element == element - 1 ? 0x7f : 0xff;
      };
      fill(nan16, 2), fill(nan32, 4), fill(nan64, 8);
    }
  };
  static const Rows rows;
  if (!map.fill_nan) return rows.zero;
  const u32 element = element_bytes(map.element);
  return element == 2 ? rows.nan16 : element == 4 ? rows.nan32 : rows.nan64;
}

Box read_box(Warp& warp, const Record* in, u32 lane, const u16* map_operand, const u16* coordinates) {
  Pointers at;
  const u32 mask = 1u << lane;
  resolve(warp, in, Space::GENERIC, mask, address_operand(map_operand), {Access::READ, sizeof(TensorMap), TensorMap::ALIGNMENT, "tensor map"}, at);
  Box box;
  memcpy(&box.map, at.lane[lane], sizeof box.map);
  const TensorMap& map = box.map;
  if (map.magic != TensorMap::MAGIC)
    warp.fail(in, "tensor-map", mask, "what the address names is no tensor map of the simulator (see tensor_map.py)");
  const u32 rank = coordinates[0];
  if (map.rank != rank) warp.fail(in, "tensor-map", mask, "a copy of rank %u with a tensor map of rank %u", rank, map.rank);
  box.row_bytes = map.count(0) * element_bytes(map.element);
  box.bytes = box.row_bytes;
  for (u32 i = 0; i < rank; ++i) box.begin[i] = i32(warp.row<u32>(coordinates[1 + i])[lane]);
  for (u32 i = 1; i < rank; ++i) box.bytes *= map.count(i);
  const u32 element = element_bytes(map.element);
  if (box.begin[0] * element % CHUNK)
    warp.fail(in, "tensor-map", mask, "the innermost coordinate is %d elements of %u bytes, no multiple of %u bytes", int(box.begin[0]), element,
              CHUNK);
  return box;
}

u32 swizzled(Swizzle swizzle, u32 address) {
  switch (swizzle) {
    case Swizzle::NONE:
      return address;
    case Swizzle::B32:
      return address ^ (address >> 3 & 0x10u);
    case Swizzle::B64:
      return address ^ (address >> 3 & 0x30u);
    case Swizzle::B128:
      return address ^ (address >> 3 & 0x70u);
  }
  return address;
}

// Calls body(offset in the box, global address or 0 when outside, bytes) for the contiguous parts of every row.
template <class Body> void for_segments(const Box& box, Body body) {
  const TensorMap& map = box.map;
  const i64 element = element_bytes(map.element), extent = i64(map.extents[0]), length = map.count(0);
  // The innermost dimension has no steps: elements [first, last) of a row are inside.
  const i64 first = std::clamp<i64>(-box.begin[0], 0, length), last = std::clamp<i64>(extent - box.begin[0], first, length);
  u32 index[TensorMap::MAX_RANK] = {};
  for (u32 offset = 0; offset < box.bytes; offset += box.row_bytes) {
    bool inside = true;
    u64 address = map.address + u64(box.begin[0] * element);
    for (u32 i = 1; i < map.rank; ++i) {
      const i64 at = box.begin[i] + i64(index[i]) * map.steps[i];
      inside &= at >= 0 && at < i64(map.extents[i]);
      address += u64(at) * map.strides[i - 1];
    }
    const i64 from = inside ? first : 0, to = inside ? last : 0;
    if (from > 0) body(offset, u64(0), u32(from * element));
    if (to > from) body(offset + u32(from * element), address + u64(from * element), u32((to - from) * element));
    if (to < length) body(offset + u32(to * element), u64(0), u32((length - to) * element));
    for (u32 i = 1; i < map.rank && ++index[i] == map.count(i); ++i) index[i] = 0;
  }
}

// Calls body(shared address, bytes done before, bytes) for the contiguous parts of `bytes` bytes of a box at `address`.
template <class Body> void for_chunks(Swizzle swizzle, u32 address, u32 bytes, Body body) {
  if (swizzle == Swizzle::NONE) {
    body(address, 0u, bytes);
    return;
  }
  for (u32 done = 0; done < bytes;) {
    const u32 here = std::min(bytes - done, CHUNK - (address + done) % CHUNK);
    body(swizzled(swizzle, address + done), done, here);
    done += here;
  }
}

// Operands: destination, tensor map, mbarrier, rank, coordinates, mask of blocks.
const Record* load(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const char* const what = "cp.async.bulk.tensor to shared memory";
  const u16* extra = warp.extra + in->x;
  const u16* const coordinates = extra + 3 * ADDRESS_WORDS;
  Mbarriers& mbarriers = *warp.cta->cluster->mbarriers;
  u32 to[LANES], barriers[LANES];
  shared_addresses(warp, in, mask, extra, what, to);
  shared_addresses(warp, in, mask, extra + 2 * ADDRESS_WORDS, "mbarrier of cp.async.bulk.tensor", barriers);
  for_lanes(mask, [&](int each) {
    const u32 lane = u32(each);
    const Box box = read_box(warp, in, lane, extra + ADDRESS_WORDS, coordinates);
    const u8* const fill = fill_bytes(box.map);
    const u32 blocks = warp.row<u32>(coordinates[1 + coordinates[0]])[lane] & 0xffffu;
    for (const Destination& destination : find_destinations(warp, in, lane, to[lane], barriers[lane], in->c & MULTICAST, blocks, what)) {
      Cta& target = *destination.cta;
      resolve_range(warp, in, lane, target, destination.to, {Access::WRITE, box.bytes, BOX_ALIGNMENT, what});
      BulkCopy copy = make_bulk_copy(warp, in, lane);
      copy.bytes = box.bytes;
      copy.pieces.reserve(box.bytes / CHUNK);
      for_segments(box, [&](u32 offset, u64 address, u32 bytes) {
        const u8* from = fill;
        if (address) from = global_range(warp, in, lane, address, {Access::READ, bytes, 1, "source of cp.async.bulk.tensor"});
        for_chunks(box.map.swizzle, destination.to + offset, bytes,
                   [&](u32 chunk, u32 done, u32 size) { copy.pieces.push_back({target.shared + chunk, from + done, size}); });
      });
      copy.barrier = &mbarriers.issue(warp, in, lane, target, destination.mbarrier, box.bytes, true);
      if (target.shadow) {
        target.shadow->access_async(warp, in, Access::WRITE, lane, mbarriers.agent(*copy.barrier, true), destination.to, box.bytes, what);
      }
      warp.cta->cluster->bulk_copies->start(std::move(copy));
    }
  });
  ++warp.cta->counters.async_copies;
  return in + 1;
}

// Also reducing. Operands: source, tensor map, rank, coordinates.
const Record* store(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const char* const what = "cp.async.bulk.tensor from shared memory";
  const u16* extra = warp.extra + in->x;
  BulkCopies& copies = *warp.cta->cluster->bulk_copies;
  Cta& own = *warp.cta;
  u32 from[LANES];
  shared_addresses(warp, in, mask, extra, what, from);
  for_lanes(mask, [&](int each) {
    const u32 lane = u32(each);
    const Box box = read_box(warp, in, lane, extra + ADDRESS_WORDS, extra + 2 * ADDRESS_WORDS);
    for (u32 i = 0; i < box.map.rank; ++i) {
      if (box.begin[i] < 0)
        warp.fail(in, "tensor-map", 1u << lane, "coordinate %u is %d, and those of a store must not be negative", i, int(box.begin[i]));
    }
    const u32 begin = from[lane] & ~RANK_MASK;
    resolve_range(warp, in, lane, own, begin, {Access::READ, box.bytes, BOX_ALIGNMENT, what});
    BulkCopy copy = make_bulk_copy(warp, in, lane);
    const u32 operation = operation_of(in);
    if (operation != NO_OPERATION) {
      copy.reduction = find_reduction(Operation(operation), box.map.element);
      if (!copy.reduction) warp.fail(in, "tensor-map", 1u << lane, "elements of the tensor map's type have no such reduction");
    }
    copy.source_rank = own.rank;
    const AsyncAgent agent = copies.group_agent(warp);
    copy.clock = agent.clock;
    for_segments(box, [&](u32 offset, u64 address, u32 bytes) {
      if (!address) return;
      u8* to = global_range(warp, in, lane, address, {Access::WRITE, bytes, 1, "destination of cp.async.bulk.tensor"});
      for_chunks(box.map.swizzle, begin + offset, bytes, [&](u32 chunk, u32 done, u32 size) {
        copy.pieces.push_back({to + done, own.shared + chunk, size});
        if (own.shadow) own.shadow->access_async(warp, in, Access::READ, lane, agent, chunk, size, what);
      });
    });
    copies.start(std::move(copy));
  });
  ++warp.cta->counters.async_copies;
  return in + 1;
}

}  // namespace

void register_tensor_copy(Table& table) {
  table.family(Class::GLOBAL);
  table.add("cp.async.bulk.tensor.load", "", load);
  table.add("cp.async.bulk.tensor.store", "", store);
}

}  // namespace sim
