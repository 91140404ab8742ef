// From the addresses of a warp to checked host pointers.
//
// Contract: every instruction that touches memory goes through `resolve_…`. Global addresses are host addresses and must lie in one of the
// launch's buffers; shared addresses index the block's window, which does not start at 0, so that a null pointer is caught; local and param
// addresses are offsets. A generic address carries its space in the top four bits.
#pragma once

#include "machine.h"

namespace sim {

// SHARED is the block's own memory, CLUSTER that of any block of the cluster.
enum class Space : u32 { GLOBAL = 0, SHARED = 1, LOCAL = 2, PARAM = 3, GENERIC = 4, CLUSTER = 5 };

// STRONG accesses (volatile, relaxed, acquire, release) and atomics do not race with each other. NONE: the caller tells the race detector itself.
enum class Access : u8 { READ, WRITE, STRONG_READ, STRONG_WRITE, ATOMIC, NONE };
constexpr bool is_strong(Access access) { return access == Access::STRONG_READ || access == Access::STRONG_WRITE || access == Access::ATOMIC; }
constexpr bool reads(Access access) { return access == Access::READ || access == Access::STRONG_READ || access == Access::ATOMIC; }
constexpr bool writes(Access access) { return access == Access::WRITE || access == Access::STRONG_WRITE || access == Access::ATOMIC; }

// In field c of loads and stores, besides the space.
constexpr u32 ADDRESS_64 = 8, NO_RESULT = 16, STRONG = 32;

// The values that a store writes: `count` of `bytes` bytes per lane, low bits of rows of 32 or 64 bits. Lanes that write the same values to the
// same place do not race.
struct StoredValues {
  const void* rows[8];
  u32 count, bytes;

  bool same(u32 lane, u32 other) const {
    const size_t stride = bytes == 8 ? 8 : 4;
    for (u32 i = 0; i < count; ++i) {
      const u8* row = (const u8*)rows[i];
      if (memcmp(row + stride * lane, row + stride * other, bytes) != 0) return false;
    }
    return true;
  }
  // Whether `place` holds what a lane writes.
  bool equal(u32 lane, const u8* place) const {
    const size_t stride = bytes == 8 ? 8 : 4;
    for (u32 i = 0; i < count; ++i) {
      if (memcmp((const u8*)rows[i] + stride * lane, place + bytes * i, bytes) != 0) return false;
    }
    return true;
  }
};

// What an instruction does with each address. `what` names it, as in "4-byte load".
struct Use {
  Access access;
  u32 bytes, alignment;
  const char* what;
  bool profiled = true;  // false: the caller tells the profile itself, as it does with Access::NONE
  const StoredValues* values = nullptr;  // of a store, where known
  bool observed = true;                  // false: nobody sees the value that was there, as of red, which therefore orders nothing behind it
};

constexpr int WINDOW_SHIFT = 60;  // generic address = window << 60 | address; window 0 is global
constexpr u64 WINDOW_MASK = (u64(1) << WINDOW_SHIFT) - 1;

struct alignas(64) Pointers {
  u8* lane[LANES];
};

// The address operand of an instruction: a row of 32- or 64-bit addresses plus an offset.
struct Address {
  u16 row;
  bool wide;
  i32 offset;
};
SIM_INLINE i32 offset_at(const u16* extra) { return i32(u32(extra[0]) | u32(extra[1]) << 16); }

// An address of shared memory in a cluster: block << 24 | address in that block, where block is its rank + 1, or 0 for the block that asks.
constexpr int RANK_SHIFT = 24;
constexpr u32 RANK_MASK = 31u << RANK_SHIFT;
SIM_INLINE u32 rank_of(const Warp& warp, u32 address) { return address & RANK_MASK ? (address >> RANK_SHIFT) - 1 : warp.cta->rank; }

// The block that a shared address of a cluster lies in. Throws when there is no such block, or when it has exited.
Cta& target_block(Warp& warp, const Record* in, u32 lane, u32 address, const char* what);

// Fills `pointers` for the lanes of `mask`. Throws the report of the first check that fails.
void resolve(Warp& warp, const Record* in, Space space, u32 mask, Address address, Use use, Pointers& pointers);

// The same for global addresses that are computed already.
void resolve_global(Warp& warp, const Record* in, u32 mask, const u64* addresses, Use use, Pointers& pointers);

// An address operand in `extra`: row, offset (two halves), and the space with ADDRESS_64.
constexpr u32 ADDRESS_WORDS = 4;
SIM_INLINE Space space_operand(const u16* extra) { return Space(extra[3] & 7); }
SIM_INLINE Address address_operand(const u16* extra) { return {extra[0], (extra[3] & ADDRESS_64) != 0, offset_at(extra + 1)}; }

// The addresses of shared memory of the cluster that such an operand gives to the lanes of `mask`. Throws when a generic one lies elsewhere.
void shared_addresses(Warp& warp, const Record* in, u32 mask, const u16* operand, const char* what, u32 (&addresses)[LANES]);

// The same for a range of shared memory of one block that a unit of its own accesses, for one lane: bounds and alignment only.
u8* resolve_range(Warp& warp, const Record* in, u32 lane, Cta& target, u32 address, Use use);

}  // namespace sim
