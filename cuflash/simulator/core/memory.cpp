// ld and st in all spaces, fences, and the conversions between generic and other addresses.
//
// Contract: the decoder gives element type and count in the name (ld.s8, ld.b32.v4), the space and the width of addresses in field c, the
// address in a, and in `extra` at x: the offset (two halves), then the registers.
#include <atomic>

#include "access.h"
#include "cluster.h"
#include "global_shadow.h"
#include "table.h"

namespace sim {
namespace {

Address address_of(const Record* in, const u16* extra) { return {in->a, (in->c & ADDRESS_64) != 0, offset_at(extra)}; }
Space space_of(const Record* in) { return Space(in->c & 7); }

template <class T> const char* describe(const char* const (&names)[8], int count) {
  const int bytes = int(sizeof(T)) * count;
  return bytes == 1 ? names[0] : bytes == 2 ? names[1] : bytes == 4 ? names[2] : bytes == 8 ? names[3] : bytes == 16 ? names[4] : names[5];
}
const char* const LOADS[8] = {"1-byte load", "2-byte load", "4-byte load", "8-byte load", "16-byte load", "32-byte load"};
const char* const STORES[8] = {"1-byte store", "2-byte store", "4-byte store", "8-byte store", "16-byte store", "32-byte store"};

// Four words per lane, all lanes: transposed four lanes at a time.
SIM_INLINE void load_quads(const Pointers& from, u32* const (&rows)[4]) {
  for (int lane = 0; lane < LANES; lane += 4) {
    Quad<u32> q[4];
    for (int i = 0; i < 4; ++i) memcpy(&q[i], from.lane[lane + i], 16);
    transpose(q);
    for (int i = 0; i < 4; ++i) memcpy(rows[i] + lane, &q[i], 16);
  }
}
SIM_INLINE void store_quads(const Pointers& to, const u32* const (&rows)[4]) {
  for (int lane = 0; lane < LANES; lane += 4) {
    Quad<u32> q[4];
    for (int i = 0; i < 4; ++i) memcpy(&q[i], rows[i] + lane, 16);
    transpose(q);
    for (int i = 0; i < 4; ++i) memcpy(to.lane[lane + i], &q[i], 16);
  }
}

template <class T, int COUNT> const Record* load(Warp& warp, const Record* in) {
  using Storage = std::conditional_t<sizeof(T) == 8, u64, std::conditional_t<std::is_signed_v<T>, i32, u32>>;
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u16* extra = warp.extra + in->x;
  Pointers from;
  constexpr u32 BYTES = sizeof(T) * COUNT;
  resolve(warp, in, space_of(in), mask, address_of(in, extra),
          {in->c & STRONG ? Access::STRONG_READ : Access::READ, BYTES, BYTES, describe<T>(LOADS, COUNT)}, from);
  Storage* rows[COUNT];
  for (int i = 0; i < COUNT; ++i) rows[i] = warp.row<Storage>(extra[2 + i]);
  if constexpr (sizeof(T) == 4 && COUNT == 4) {
    if (SIM_LIKELY(mask == ALL_LANES)) {
      load_quads(from, (u32* const(&)[4])rows);
      return in + 1;
    }
  }
  const auto load_lane = [&](int lane) {
    T values[COUNT];
    memcpy(values, from.lane[lane], sizeof values);
    for (int i = 0; i < COUNT; ++i) rows[i][lane] = values[i];
  };
  if (SIM_LIKELY(mask == ALL_LANES)) {
    for (int lane = 0; lane < LANES; ++lane) load_lane(lane);
  } else {
    for_lanes(mask, load_lane);
  }
  return in + 1;
}

template <class T, int COUNT> const Record* store(Warp& warp, const Record* in) {
  using Storage = std::conditional_t<sizeof(T) == 8, u64, u32>;
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  const u16* extra = warp.extra + in->x;
  if (space_of(in) == Space::PARAM) warp.fail(in, "param-bounds", mask, "kernel parameters are read-only");
  Pointers to;
  constexpr u32 BYTES = sizeof(T) * COUNT;
  const Storage* rows[COUNT];
  StoredValues values{{}, COUNT, sizeof(T)};
  for (int i = 0; i < COUNT; ++i) values.rows[i] = rows[i] = warp.row<Storage>(extra[2 + i]);
  resolve(warp, in, space_of(in), mask, address_of(in, extra),
          {in->c & STRONG ? Access::STRONG_WRITE : Access::WRITE, BYTES, BYTES, describe<T>(STORES, COUNT), true, &values}, to);
  if constexpr (sizeof(T) == 4 && COUNT == 4) {
    if (SIM_LIKELY(mask == ALL_LANES)) {
      store_quads(to, (const u32* const(&)[4])rows);
      return in + 1;
    }
  }
  const auto store_lane = [&](int lane) {
    T values[COUNT];
    for (int i = 0; i < COUNT; ++i) values[i] = T(rows[i][lane]);
    memcpy(to.lane[lane], values, sizeof values);
  };
  if (SIM_LIKELY(mask == ALL_LANES)) {
    for (int lane = 0; lane < LANES; ++lane) store_lane(lane);
  } else {
    for_lanes(mask, store_lane);
  }
  return in + 1;
}

// Orders the memory accesses of blocks that run on different threads. x = 1 when its scope is wider than the block.
const Record* fence(Warp& warp, const Record* in) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const u32 mask = warp.mask(in);
  if (warp.cta->checks) warp.knowledge.fence(mask, warp.live);
  Cluster& cluster = *warp.cta->cluster;
  if (mask != 0 && in->x && cluster.global) cluster.global->fence(cluster);
  return in + 1;
}

// fence.proxy.async: asynchronous units see what these lanes know of.
const Record* fence_proxy_async(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (mask != 0 && warp.cta->checks) warp.knowledge.fence_proxy(mask, warp.live);
  return in + 1;
}

// isspacep: d = whether the generic address a lies in window x.
const Record* is_space(Warp& warp, const Record* in) {
  const u64* address = warp.row<u64>(in->a);
  u32 result = 0;
  for (int lane = 0; lane < LANES; ++lane) result |= u32(address[lane] >> WINDOW_SHIFT == u64(in->x)) << lane;
  warp.set_predicate(in->d, warp.mask(in), result);
  return in + 1;
}

}  // namespace

void register_memory(Table& table) {
  table.family(Class::MEMORY);
  table.add("ld.u8", "", load<u8, 1>);
  table.add("ld.s8", "", load<i8, 1>);
  table.add("ld.u16", "", load<u16, 1>);
  table.add("ld.s16", "", load<i16, 1>);
  table.add("ld.b32", "", load<u32, 1>);
  table.add("ld.b64", "", load<u64, 1>);
  table.add("ld.u8.v2", "", load<u8, 2>);
  table.add("ld.s8.v2", "", load<i8, 2>);
  table.add("ld.u16.v2", "", load<u16, 2>);
  table.add("ld.s16.v2", "", load<i16, 2>);
  table.add("ld.b32.v2", "", load<u32, 2>);
  table.add("ld.b64.v2", "", load<u64, 2>);
  table.add("ld.u8.v4", "", load<u8, 4>);
  table.add("ld.s8.v4", "", load<i8, 4>);
  table.add("ld.u16.v4", "", load<u16, 4>);
  table.add("ld.s16.v4", "", load<i16, 4>);
  table.add("ld.b32.v4", "", load<u32, 4>);
  table.add("ld.b64.v4", "", load<u64, 4>);
  table.add("ld.b32.v8", "", load<u32, 8>);
  table.add("st.u8", "", store<u8, 1>);
  table.add("st.u16", "", store<u16, 1>);
  table.add("st.b32", "", store<u32, 1>);
  table.add("st.b64", "", store<u64, 1>);
  table.add("st.u8.v2", "", store<u8, 2>);
  table.add("st.u16.v2", "", store<u16, 2>);
  table.add("st.b32.v2", "", store<u32, 2>);
  table.add("st.b64.v2", "", store<u64, 2>);
  table.add("st.u8.v4", "", store<u8, 4>);
  table.add("st.u16.v4", "", store<u16, 4>);
  table.add("st.b32.v4", "", store<u32, 4>);
  table.add("st.b64.v4", "", store<u64, 4>);
  table.add("st.b32.v8", "", store<u32, 8>);
  table.add("fence", "xi", fence, Class::CONTROL);
  table.add("fence.proxy.async", "", fence_proxy_async, Class::CONTROL);
  table.add("isspacep", "dp a64 xi", is_space, Class::INTEGER);
  table.add("enter.window", "d64 a64 b64", map<u64>([](auto a, auto b) { return a | b; }), Class::INTEGER);
  table.add("leave.window", "d64 a64", map<u64>([](auto a) { return a & WINDOW_MASK; }), Class::INTEGER);
}

}  // namespace sim
