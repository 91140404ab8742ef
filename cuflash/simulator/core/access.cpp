// See access.h. Each space has a vectorised test for the good case, and a slow path that finds out what is wrong.
#include "access.h"

#include <cstdio>

namespace sim {
namespace {

struct alignas(64) Addresses {
  u64 lane[LANES];
};

void fail_alignment(Warp& warp, const Record* in, u32 lanes, u64 address, u32 alignment, const char* what) {
  warp.fail(in, "misaligned", lanes, "%s at 0x%llx (lane %d) needs an alignment of %u bytes", what, (unsigned long long)address, __builtin_ctz(lanes),
            alignment);
}

// Reports the lanes whose address is not a multiple of `alignment`, if any.
void check_alignment(Warp& warp, const Record* in, u32 mask, const u64* addresses, u32 alignment, const char* what) {
  u32 bad = 0;
  for_lanes(mask, [&](int lane) { bad |= u32((addresses[lane] & (alignment - 1)) != 0) << lane; });
  if (bad) fail_alignment(warp, in, bad, addresses[__builtin_ctz(bad)], alignment, what);
}

// True when all lanes of `mask` lie in [begin, end) and are aligned.
SIM_INLINE bool all_inside(u32 mask, const u64* addresses, u64 begin, u64 end, u32 bytes, u32 alignment) {
  if (end - begin < bytes) return false;
  using V = Vec<i64>;
  const V first = splat(i64(begin)), room = splat(i64(end - begin - bytes));
  const V misaligned = splat(i64(alignment - 1));
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

SIM_NOINLINE void resolve_global_slowly(Warp& warp, const Record* in, u32 mask, const u64* addresses, u32 bytes, u32 alignment, const char* what,
                                        u8& guess) {
  const LaunchDescription& launch = warp.cta->launch;
  check_alignment(warp, in, mask, addresses, alignment, what);
  u32 outside = 0;
  for_lanes(mask, [&](int lane) {
    const u64 address = addresses[lane];
    for (u32 i = 0; i < launch.num_buffers; ++i) {
      const Buffer& buffer = launch.buffers[i];
      const bool inside = address >= buffer.begin && address <= buffer.end && buffer.end - address >= bytes;
      if (!inside) continue;
      guess = u8(i);
      return;
    }
    outside |= 1u << lane;
  });
  if (!outside) return;
  const int lane = __builtin_ctz(outside);
  char text[160];
  snprintf(text, sizeof text, "%s at 0x%llx (lane %d)", what, (unsigned long long)addresses[lane], lane);
  throw Failure{"global-bounds", text, {warp.id, outside, warp.cta->record_index(in)}, addresses[lane], bytes, {}};
}

SIM_NOINLINE void fail_window(Warp& warp, const Record* in, u32 mask, const u64* addresses, u64 begin, u64 end, u32 bytes, u32 alignment,
                              const char* what, const char* space) {
  check_alignment(warp, in, mask, addresses, alignment, what);
  u32 outside = 0;
  for_lanes(mask, [&](int lane) {
    const u64 address = addresses[lane];
    outside |= u32(address < begin || address > end || end - address < bytes) << lane;
  });
  if (!outside) return;
  const int lane = __builtin_ctz(outside);
  const u64 address = addresses[lane];
  const char* name = space[0] == 's' ? "shared-bounds" : space[0] == 'l' ? "local-bounds" : "param-bounds";
  if (address >= begin && address + bytes > end) {
    warp.fail(in, name, outside, "%s at offset %llu (lane %d) of %llu bytes of %s memory ends %llu bytes past its end", what,
              (unsigned long long)(address - begin), lane, (unsigned long long)(end - begin), space, (unsigned long long)(address + bytes - end));
  }
  warp.fail(in, name, outside, "%s at 0x%llx (lane %d) is below %s memory, whose %llu bytes start at 0x%llx", what, (unsigned long long)address, lane,
            space, (unsigned long long)(end - begin), (unsigned long long)begin);
}

// Addresses of a space that is a window of `end - begin` bytes; lane l's bytes start at base + l * stride.
void resolve_window(Warp& warp, const Record* in, u32 mask, const u64* addresses, u64 begin, u64 end, u8* base, u64 stride, u32 bytes, u32 alignment,
                    const char* what, const char* space, Pointers& pointers) {
  if (warp.cta->checks && SIM_UNLIKELY(!all_inside(mask, addresses, begin, end, bytes, alignment))) {
    fail_window(warp, in, mask, addresses, begin, end, bytes, alignment, what, space);
  }
  for (int lane = 0; lane < LANES; ++lane) pointers.lane[lane] = base + addresses[lane] + stride * lane;
}

void resolve_in(Warp& warp, const Record* in, Space space, u32 mask, const u64* addresses, u32 bytes, u32 alignment, const char* what,
                Pointers& pointers) {
  const Cta& cta = *warp.cta;
  switch (space) {
    case Space::GLOBAL:
      resolve_global(warp, in, mask, addresses, bytes, alignment, what, pointers);
      return;
    case Space::SHARED:
      resolve_window(warp, in, mask, addresses, cta.shared_begin, cta.shared_end, cta.shared, 0, bytes, alignment, what, "shared", pointers);
      return;
    case Space::LOCAL:
      resolve_window(warp, in, mask, addresses, 0, cta.program.local_bytes, warp.local, cta.program.local_bytes, bytes, alignment, what, "local",
                     pointers);
      return;
    case Space::PARAM:
      resolve_window(warp, in, mask, addresses, 0, cta.launch.param_bytes, const_cast<u8*>(cta.launch.params), 0, bytes, alignment, what, "param",
                     pointers);
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
    resolve_in(warp, in, Space(window), here, inner.lane, bytes, alignment, what, part);
    for_lanes(here, [&](int lane) { pointers.lane[lane] = part.lane[lane]; });
    mask &= ~here;
  }
  if (mask) resolve_global(warp, in, mask, addresses, bytes, alignment, what, pointers);  // reports them
}

}  // namespace

void resolve_global(Warp& warp, const Record* in, u32 mask, const u64* addresses, u32 bytes, u32 alignment, const char* what, Pointers& pointers) {
  Cta& cta = *warp.cta;
  if (cta.checks && mask != 0) {
    u8& guess = cta.last_buffer[cta.record_index(in)];
    const bool good = guess < cta.launch.num_buffers &&
                      all_inside(mask, addresses, cta.launch.buffers[guess].begin, cta.launch.buffers[guess].end, bytes, alignment);
    if (SIM_UNLIKELY(!good)) resolve_global_slowly(warp, in, mask, addresses, bytes, alignment, what, guess);
  }
  memcpy(pointers.lane, addresses, sizeof pointers.lane);
}

// Shared memory at 32-bit addresses, the case of every tile: tested without widening the addresses first.
SIM_INLINE bool resolve_shared_quickly(Warp& warp, u32 mask, Address address, u32 bytes, u32 alignment, Pointers& pointers) {
  const Cta& cta = *warp.cta;
  const Vec<u32>* row = warp.row<Vec<u32>>(address.row);
  const u32 room = cta.shared_end - cta.shared_begin;
  if (room < bytes) return false;
  const Vec<u32> begin = splat(cta.shared_begin), last = splat(room - bytes), misaligned = splat(alignment - 1);
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
  return true;
}

void resolve(Warp& warp, const Record* in, Space space, u32 mask, Address address, u32 bytes, u32 alignment, const char* what, Pointers& pointers) {
  if (space == Space::SHARED && !address.wide && warp.cta->checks) {
    if (SIM_LIKELY(resolve_shared_quickly(warp, mask, address, bytes, alignment, pointers))) return;
  }
  Addresses addresses;
  if (address.wide) {
    const u64* row = warp.row<u64>(address.row);
    for (int lane = 0; lane < LANES; ++lane) addresses.lane[lane] = row[lane] + i64(address.offset);
  } else {
    const u32* row = warp.row<u32>(address.row);
    for (int lane = 0; lane < LANES; ++lane) addresses.lane[lane] = u32(row[lane] + u32(address.offset));
  }
  resolve_in(warp, in, space, mask, addresses.lane, bytes, alignment, what, pointers);
}

}  // namespace sim
