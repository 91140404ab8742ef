// The control flow of a kernel, for what is found out when it is decoded.
#pragma once

#include "program.h"

namespace sim {

// Records [begin, end) that are executed one after the other.
struct Block {
  u32 begin, end;
  std::vector<u32> successors;
};

struct Flow {
  std::vector<u8> guarded;    // per record: it has a guard, so lanes may pass it by
  std::vector<Block> blocks;  // in the order of records; the first is the entry
};

Flow find_flow(const ProgramDescription& description);

constexpr u32 IN_EXTRA = 0x80000000u;  // in Operand::position
constexpr u32 RECORD_WORDS = sizeof(Record) / sizeof(u16);

// Runs `body(first, last)` for each record of [begin, end) that has operands, in order; `next` is the first operand of a record from `begin` on
// and is moved past them. Operands are sorted by record.
template <class Body> void for_records(const ProgramDescription& in, size_t& next, u32 end, Body body) {
  while (next < in.num_operands && in.operands[next].record < end) {
    const Operand* first = in.operands + next;
    while (next < in.num_operands && in.operands[next].record == first->record) ++next;
    body(first, in.operands + next);
  }
}

}  // namespace sim
