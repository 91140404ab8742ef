// Turns virtual registers into rows: liveness, then one linear scan.
//
// Contract: PTX is in single assignment form mostly, so a kernel names thousands of registers of which a hundred or two live at a time; rows
// that are shared keep a warp's registers in the cache. A register that may be read before it is written is live at the entry; its row is
// its own until then, and is poisoned when a block starts, so sharing hides nothing.
#include <algorithm>
#include <queue>

#include "flow.h"

namespace sim {
namespace {

using Bits = std::vector<u64>;

// What lives in a block, one bit per register.
struct Liveness {
  Bits live_in, live_out, used, defined;
};

struct Interval {
  u32 first = NO_RECORD, last = 0;
  void touch(u32 record) {
    first = std::min(first, record);
    last = std::max(last, record);
  }
};

// Fills used / defined per block. A definition under a guard keeps the old value of the other lanes, so it is a use as well.
std::vector<Liveness> summarize(const ProgramDescription& in, const Flow& flow) {
  const size_t words = (in.num_registers + 63) / 64;
  std::vector<Liveness> result(flow.blocks.size());
  size_t next = 0;
  for (size_t b = 0; b < flow.blocks.size(); ++b) {
    Liveness& block = result[b];
    block.live_in.assign(words, 0), block.live_out.assign(words, 0);
    block.used.assign(words, 0), block.defined.assign(words, 0);
    for_records(in, next, flow.blocks[b].end, [&](const Operand* first, const Operand* last) {
      for (int definitions = 0; definitions < 2; ++definitions) {  // uses come before definitions
        for (const Operand* operand = first; operand < last; ++operand) {
          const u32 reg = operand->reg >> 1;
          const bool defines = operand->reg & 1;
          const u64 bit = u64(1) << (reg & 63);
          if (!definitions && (!defines || flow.guarded[first->record]) && !(block.defined[reg >> 6] & bit)) block.used[reg >> 6] |= bit;
          if (definitions && defines) block.defined[reg >> 6] |= bit;
        }
      }
    });
  }
  return result;
}

void solve(const Flow& flow, std::vector<Liveness>& lives) {
  bool changed = true;
  while (changed) {
    changed = false;
    for (size_t b = lives.size(); b-- > 0;) {
      Liveness& block = lives[b];
      for (size_t w = 0; w < block.used.size(); ++w) {
        u64 out = 0;
        for (u32 s : flow.blocks[b].successors) out |= lives[s].live_in[w];
        const u64 in = block.used[w] | (out & ~block.defined[w]);
        changed |= in != block.live_in[w];
        block.live_out[w] = out, block.live_in[w] = in;
      }
    }
  }
}

template <class Body> void for_bits(const Bits& set, Body body) {
  for (size_t w = 0; w < set.size(); ++w) {
    for (u64 rest = set[w]; rest; rest &= rest - 1) body(u32(w * 64 + __builtin_ctzll(rest)));
  }
}

std::vector<Interval> find_intervals(const ProgramDescription& in, const Flow& flow, const std::vector<Liveness>& lives,
                                     const std::vector<std::pair<u32, u32>>& in_flight) {
  std::vector<Interval> intervals(in.num_registers);
  for (u32 i = 0; i < in.num_operands; ++i) intervals[in.operands[i].reg >> 1].touch(in.operands[i].record);
  for (size_t b = 0; b < lives.size(); ++b) {
    for_bits(lives[b].live_in, [&](u32 reg) { intervals[reg].touch(flow.blocks[b].begin); });
    for_bits(lives[b].live_out, [&](u32 reg) { intervals[reg].touch(flow.blocks[b].end - 1); });
  }
  for (const auto& [reg, record] : in_flight) intervals[reg].touch(record);
  return intervals;
}

}  // namespace

void allocate_rows(const ProgramDescription& in, const Flow& flow, const std::vector<std::pair<u32, u32>>& in_flight, Program& program) {
  std::vector<Liveness> lives = summarize(in, flow);
  solve(flow, lives);
  const std::vector<Interval> intervals = find_intervals(in, flow, lives, in_flight);

  std::vector<u32> order;
  for (u32 reg = 0; reg < in.num_registers; ++reg) {
    if (intervals[reg].first != NO_RECORD) order.push_back(reg);
  }
  std::stable_sort(order.begin(), order.end(), [&](u32 p, u32 q) { return intervals[p].first < intervals[q].first; });

  // Free rows by kind: predicates, single rows, pairs. A row is free again after the last record that touches its register.
  struct Busy {
    u32 last;
    u16 row;
    u8 kind;
    bool operator<(const Busy& other) const { return last > other.last; }
  };
  std::priority_queue<Busy> busy;
  std::vector<u16> free_rows[3], row_of(in.num_registers, 0);
  for (u32 reg : order) {
    while (!busy.empty() && busy.top().last < intervals[reg].first) {
      free_rows[busy.top().kind].push_back(busy.top().row);
      busy.pop();
    }
    const u8 kind = in.widths[reg] == 1 ? 0 : in.widths[reg] == 32 ? 1 : 2;
    u16 row;
    if (!free_rows[kind].empty()) {
      row = free_rows[kind].back();
      free_rows[kind].pop_back();
    } else if (kind == 0) {
      row = u16(program.num_predicates++);
    } else {
      row = u16(program.num_rows);
      program.num_rows += kind;
    }
    row_of[reg] = row;
    busy.push({intervals[reg].last, row, kind});
  }

  u16* words = (u16*)program.records.data();
  for (u32 i = 0; i < in.num_operands; ++i) {
    const Operand& operand = in.operands[i];
    u16& target = operand.position & IN_EXTRA ? program.extra[operand.position & ~IN_EXTRA] : words[operand.position];
    target = u16((target & NEGATED) | row_of[operand.reg >> 1]);
  }
  for_bits(lives[0].live_in, [&](u32 reg) {
    if (in.widths[reg] == 1) return;
    program.poisoned_rows.push_back(row_of[reg]);
    if (in.widths[reg] == 64) program.poisoned_rows.push_back(u16(row_of[reg] + 1));
  });
  for (u32 i = 0; i < in.num_special; ++i) program.special.emplace_back(in.special[2 * i], row_of[in.special[2 * i + 1]]);
}

}  // namespace sim
