// See access.h. Each space has a vectorised test for the good case, and a slow path that finds out what is wrong.
#include "access.h"

#include <cstdio>

#include "cluster.h"
#include "global_shadow.h"
#include "profile.h"
#include "shadow.h"

namespace sim {
namespace {

struct alignas(64) Addresses {
  u64 lane[LANES];
};

// Memory that starts at some address: lane l's bytes start at base + l * stride + address.
struct Window {
  const char* name;
  u64 begin, end;
  u8* base;
  u64 stride;
};

// Reports the lanes whose address is not a multiple of the alignment, if any.
void check_alignment(Warp& warp, const Record* in, u32 mask, const u64* addresses, Use use) {
  u32 bad = 0;
  for_lanes(mask, [&](int lane) { bad |= u32((addresses[lane] & (use.alignment - 1)) != 0) << lane; });
  if (bad == 0) return;
  const int lane = __builtin_ctz(bad);
  warp.fail(in, "misaligned", bad, "%s at 0x%llx (lane %d) needs an alignment of %u bytes", use.what, (unsigned long long)addresses[lane], lane,
            use.alignment);
}

// True when all lanes of `mask` lie in [begin, end) and are aligned.
SIM_INLINE bool all_inside(u32 mask, const u64* addresses, u64 begin, u64 end, Use use) {
  if (end - begin < use.bytes) return false;
  using V = Vec<i64>;
  const V first = splat(i64(begin)), room = splat(i64(end - begin - use.bytes));
  const V misaligned = splat(i64(use.alignment - 1));
  V bad{}, odd{};
  for (int part = 0; part < PARTS<i64>; ++part) {
    V address = ((const V*)addresses)[part];
    if (mask != ALL_LANES) address = select(mask, part, address, first);
    const V distance = address - first;
    bad |= distance | (room - distance);
    odd |= address & misaligned;
  }
  bad = (bad < 0) | (odd != 0);
  return collect(bad) == 0;
}

SIM_NOINLINE void resolve_global_slowly(Warp& warp, const Record* in, u32 mask, const u64* addresses, Use use, u8& guess) {
  const LaunchDescription& launch = warp.cta->launch;
  check_alignment(warp, in, mask, addresses, use);
  u32 outside = 0;
  for_lanes(mask, [&](int lane) {
    const u64 address = addresses[lane];
    for (u32 i = 0; i < launch.num_buffers; ++i) {
      const Buffer& buffer = launch.buffers[i];
      const bool inside = address >= buffer.begin && address <= buffer.end && buffer.end - address >= use.bytes;
      if (!inside) continue;
      guess = u8(i);
      return;
    }
    outside |= 1u << lane;
  });
  if (!outside) return;
  const int lane = __builtin_ctz(outside);
  char text[160];
  snprintf(text, sizeof text, "%s at 0x%llx (lane %d)", use.what, (unsigned long long)addresses[lane], lane);
  throw Failure{"global-bounds", text, {warp.id, outside, warp.cta->record_index(in), warp.cta->rank}, addresses[lane], use.bytes, {}};
}

SIM_NOINLINE void fail_window(Warp& warp, const Record* in, u32 mask, const u64* addresses, const Window& window, Use use) {
  check_alignment(warp, in, mask, addresses, use);
  u32 outside = 0;
  for_lanes(mask, [&](int lane) {
    const u64 address = addresses[lane];
    outside |= u32(address < window.begin || address > window.end || window.end - address < use.bytes) << lane;
  });
  if (!outside) return;
  const int lane = __builtin_ctz(outside);
  const u64 address = addresses[lane];
  const char* check = window.name[0] == 's' ? "shared-bounds" : window.name[0] == 'l' ? "local-bounds" : "param-bounds";
  if (address >= window.begin && address + use.bytes > window.end) {
    warp.fail(in, check, outside, "%s at offset %llu (lane %d) of %llu bytes of %s memory ends %llu bytes past its end", use.what,
              (unsigned long long)(address - window.begin), lane, (unsigned long long)(window.end - window.begin), window.name,
              (unsigned long long)(address + use.bytes - window.end));
  }
  warp.fail(in, check, outside, "%s at 0x%llx (lane %d) is below %s memory, whose %llu bytes start at 0x%llx", use.what, (unsigned long long)address,
            lane, window.name, (unsigned long long)(window.end - window.begin), (unsigned long long)window.begin);
}

void resolve_window(Warp& warp, const Record* in, u32 mask, const u64* addresses, const Window& window, Use use, Pointers& pointers) {
  if (warp.cta->checks && SIM_UNLIKELY(!all_inside(mask, addresses, window.begin, window.end, use))) {
    fail_window(warp, in, mask, addresses, window, use);
  }
  for (int lane = 0; lane < LANES; ++lane) pointers.lane[lane] = window.base + addresses[lane] + window.stride * lane;
}

Window shared_window(const Cta& cta) { return {"shared", cta.shared_begin, cta.shared_end, cta.shared, 0}; }

void resolve_shared(Warp& warp, const Record* in, u32 mask, const u64* addresses, Cta& target, Use use, Pointers& pointers) {
  resolve_window(warp, in, mask, addresses, shared_window(target), use, pointers);
  if (use.access == Access::NONE || !(target.shadow || target.profile)) return;
  u32 offsets[LANES];
  for (int lane = 0; lane < LANES; ++lane) offsets[lane] = u32(addresses[lane]);
  if (target.shadow) target.shadow->access(warp, in, use.access, mask, offsets, use.bytes, use.what, use.values);
  if (target.profile) target.profile->shared(warp.cta->record_index(in), use.access, mask, offsets, use.bytes);
}

// Lanes may address the memory of different blocks.
void resolve_cluster(Warp& warp, const Record* in, u32 mask, const u64* addresses, Use use, Pointers& pointers) {
  for (u32 rest = mask; rest != 0;) {
    const u32 first = u32(__builtin_ctz(rest)), rank = rank_of(warp, u32(addresses[first]));
    Cta& target = target_block(warp, in, first, u32(addresses[first]), use.what);
    Addresses inner;
    u32 here = 0;
    for_lanes(rest, [&](int lane) {
      here |= u32(rank_of(warp, u32(addresses[lane])) == rank) << lane;
      inner.lane[lane] = u32(addresses[lane]) & ~RANK_MASK;
    });
    Pointers part;
    resolve_shared(warp, in, here, inner.lane, target, use, part);
    for_lanes(here, [&](int lane) { pointers.lane[lane] = part.lane[lane]; });
    rest &= ~here;
  }
}

void resolve_local(Warp& warp, const Record* in, u32 mask, const u64* addresses, Use use, Pointers& pointers) {
  const u64 bytes = warp.cta->program.local_bytes;
  resolve_window(warp, in, mask, addresses, {"local", 0, bytes, warp.local, bytes}, use, pointers);
  if (!warp.cta->checks) return;
  for_lanes(mask, [&](int lane) {
    u8* written = warp.local_written + bytes * u64(lane) + addresses[lane];
    if (writes(use.access)) memset(written, 1, use.bytes);
    else if (memchr(written, 0, use.bytes))
      warp.fail(in, "uninitialized", 1u << lane, "%s at offset %llu of local memory (lane %d), which was never written", use.what,
                (unsigned long long)addresses[lane], lane);
  });
}

void resolve_in(Warp& warp, const Record* in, Space space, u32 mask, const u64* addresses, Use use, Pointers& pointers) {
  Cta& cta = *warp.cta;
  switch (space) {
    case Space::GLOBAL:
      resolve_global(warp, in, mask, addresses, use, pointers);
      return;
    case Space::SHARED:
      resolve_shared(warp, in, mask, addresses, cta, use, pointers);
      return;
    case Space::CLUSTER:
      resolve_cluster(warp, in, mask, addresses, use, pointers);
      return;
    case Space::LOCAL:
      resolve_local(warp, in, mask, addresses, use, pointers);
      return;
    case Space::PARAM:
      resolve_window(warp, in, mask, addresses, {"param", 0, cta.launch.param_bytes, const_cast<u8*>(cta.launch.params), 0}, use, pointers);
      return;
    case Space::GENERIC:
      break;
  }
  // Lanes may point to different spaces: one at a time.
  for (u32 window = 0; window < 4; ++window) {
    u32 here = 0;
    Addresses inner;
    for_lanes(mask, [&](int lane) {
      here |= u32(addresses[lane] >> WINDOW_SHIFT == window) << lane;
      inner.lane[lane] = addresses[lane] & WINDOW_MASK;
    });
    if (here == 0) continue;
    Pointers part;
    resolve_in(warp, in, Space(window) == Space::SHARED ? Space::CLUSTER : Space(window), here, inner.lane, use, part);
    for_lanes(here, [&](int lane) { pointers.lane[lane] = part.lane[lane]; });
    mask &= ~here;
  }
  if (mask) resolve_global(warp, in, mask, addresses, use, pointers);  // reports them
}

}  // namespace

Cta& target_block(Warp& warp, const Record* in, u32 lane, u32 address, const char* what) {
  const u32 rank = rank_of(warp, address);
  if (rank >= warp.cta->cluster->size) {
    warp.fail(in, "cluster", 1u << lane, "%s in block %u of a cluster of %u blocks", what, rank, warp.cta->cluster->size);
  }
  Cta& target = *warp.cta->cluster->ctas[rank];
  if (target.checks && target.exited()) {
    warp.fail(in, "cluster", 1u << lane, "%s in the shared memory of block %u of the cluster, which has exited", what, rank);
  }
  return target;
}

void resolve_global(Warp& warp, const Record* in, u32 mask, const u64* addresses, Use use, Pointers& pointers) {
  Cta& cta = *warp.cta;
  if (cta.checks && mask != 0) {
    u8& guess = cta.last_buffer[cta.record_index(in)];
    const bool good =
        guess < cta.launch.num_buffers && all_inside(mask, addresses, cta.launch.buffers[guess].begin, cta.launch.buffers[guess].end, use);
    if (SIM_UNLIKELY(!good)) resolve_global_slowly(warp, in, mask, addresses, use, guess);
    if (cta.cluster->global) cta.cluster->global->access(warp, in, use, mask, addresses, guess);
  }
  if (SIM_UNLIKELY(cta.profile != nullptr) && use.profiled && use.access != Access::NONE) {
    cta.profile->global(cta.record_index(in), use.access, mask, addresses, use.bytes);
  }
  memcpy(pointers.lane, addresses, sizeof pointers.lane);
}

// Shared memory at 32-bit addresses, the case of every tile: tested without widening the addresses first.
SIM_INLINE bool resolve_shared_quickly(Warp& warp, const Record* in, u32 mask, Address address, Use use, Pointers& pointers) {
  const Cta& cta = *warp.cta;
  const Vec<u32>* row = warp.row<Vec<u32>>(address.row);
  const u32 room = cta.shared_end - cta.shared_begin;
  if (room < use.bytes) return false;
  const Vec<u32> begin = splat(cta.shared_begin), last = splat(room - use.bytes), misaligned = splat(use.alignment - 1);
  const Vec<u32> offset = splat(u32(address.offset));
  alignas(64) u32 addresses[LANES];
  u32 bad = 0;
  SIM_UNROLL for (int part = 0; part < PARTS<u32>; ++part) {
    const Vec<u32> sum = row[part] + offset;
    ((Vec<u32>*)addresses)[part] = sum;
    bad |= collect((sum - begin > last) | ((sum & misaligned) != 0u)) << (part * WIDTH<u32>);
  }
  if (SIM_UNLIKELY((bad & mask) != 0)) return false;
  for (int lane = 0; lane < LANES; ++lane) pointers.lane[lane] = cta.shared + addresses[lane];
  if (use.access == Access::NONE) return true;
  cta.shadow->access(warp, in, use.access, mask, addresses, use.bytes, use.what, use.values);
  if (SIM_UNLIKELY(cta.profile != nullptr)) cta.profile->shared(cta.record_index(in), use.access, mask, addresses, use.bytes);
  return true;
}

void resolve(Warp& warp, const Record* in, Space space, u32 mask, Address address, Use use, Pointers& pointers) {
  if (space == Space::SHARED && !address.wide && warp.cta->checks) {
    if (SIM_LIKELY(resolve_shared_quickly(warp, in, mask, address, use, pointers))) return;
  }
  Addresses addresses;
  if (address.wide) {
    const u64* row = warp.row<u64>(address.row);
    for (int lane = 0; lane < LANES; ++lane) addresses.lane[lane] = row[lane] + i64(address.offset);
  } else {
    const u32* row = warp.row<u32>(address.row);
    for (int lane = 0; lane < LANES; ++lane) addresses.lane[lane] = u32(row[lane] + u32(address.offset));
  }
  resolve_in(warp, in, space, mask, addresses.lane, use, pointers);
}

void shared_addresses(Warp& warp, const Record* in, u32 mask, const u16* operand, const char* what, u32 (&addresses)[LANES]) {
  const Address from = address_operand(operand);
  const Space space = space_operand(operand);
  for_lanes(mask, [&](int lane) {
    const u64 address = from.wide ? warp.row<u64>(from.row)[lane] + i64(from.offset) : u64(u32(warp.row<u32>(from.row)[lane] + u32(from.offset)));
    addresses[lane] = u32(address);
    if (space == Space::GENERIC && address >> WINDOW_SHIFT != u64(Space::SHARED)) {
      warp.fail(in, "shared-bounds", 1u << lane, "%s at the generic address 0x%llx (lane %d), which is not one of shared memory", what,
                (unsigned long long)address, lane);
    }
    if (space == Space::SHARED && rank_of(warp, u32(address)) != warp.cta->rank) {
      warp.fail(in, "shared-bounds", 1u << lane, "%s at 0x%x (lane %d), which is not in the shared memory of this block", what, u32(address), lane);
    }
  });
}

u8* resolve_range(Warp& warp, const Record* in, u32 lane, Cta& target, u32 address, Use use) {
  Addresses addresses;
  addresses.lane[lane] = address;
  if (target.checks && !all_inside(1u << lane, addresses.lane, target.shared_begin, target.shared_end, use)) {
    fail_window(warp, in, 1u << lane, addresses.lane, shared_window(target), use);
  }
  return target.shared + address;
}

}  // namespace sim
