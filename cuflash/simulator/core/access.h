// From the addresses of a warp to checked host pointers.
//
// Contract: every instruction that touches memory goes through `resolve_…`. Global addresses are host addresses and must lie in one of the
// launch's buffers; shared addresses index the block's window, which does not start at 0, so that a null pointer is caught; local and param
// addresses are offsets. A generic address carries its space in the top four bits.
#pragma once

#include "machine.h"

namespace sim {

enum class Space : u32 { GLOBAL = 0, SHARED = 1, LOCAL = 2, PARAM = 3, GENERIC = 4 };

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

// Fills `pointers` for the lanes of `mask`; each may access `bytes` bytes, aligned to `alignment`. Throws the report of the first check
// that fails. `what` names the access, as in "4-byte load".
void resolve(Warp& warp, const Record* in, Space space, u32 mask, Address address, u32 bytes, u32 alignment, const char* what, Pointers& pointers);

// The same for global addresses that are computed already.
void resolve_global(Warp& warp, const Record* in, u32 mask, const u64* addresses, u32 bytes, u32 alignment, const char* what, Pointers& pointers);

}  // namespace sim
