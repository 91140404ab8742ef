// Turns virtual registers into rows: liveness, then one linear scan.
//
// Contract: PTX is in single assignment form mostly, so a kernel names thousands of registers of which a hundred or two live at a time; rows
// that are shared keep a warp's registers in the cache. A register that may be read before it is written is live at the entry; its row is
// its own until then, and is poisoned when a block starts, so sharing hides nothing.
#include <algorithm>
#include <queue>

#include "program.h"

namespace sim {
namespace {

using Bits = std::vector<u64>;

struct Block {
  u32 begin, end;
  std::vector<u32> successors;
  Bits live_in, live_out, used, defined;
};

struct Interval {
  u32 first = NO_RECORD, last = 0;
  void touch(u32 record) {
    first = std::min(first, record);
    last = std::max(last, record);
  }
};

constexpr u32 IN_EXTRA = 0x80000000u;
constexpr u32 WORDS = sizeof(Record) / sizeof(u16), GUARD_WORD = 1;

// Which records have a guard: at this stage the guard is an operand like others.
std::vector<u8> find_guarded(const ProgramDescription& in) {
  std::vector<u8> guarded(in.num_records, 0);
  for (u32 i = 0; i < in.num_operands; ++i) {
    const u32 position = in.operands[i].position;
    if (!(position & IN_EXTRA) && position % WORDS == GUARD_WORD) guarded[position / WORDS] = 1;
  }
  return guarded;
}

std::vector<Block> find_blocks(const ProgramDescription& in, const std::vector<u8>& guarded) {
  std::vector<u8> leader(in.num_records + 1, 0), jumps(in.num_records, 0);
  leader[0] = 1;
  for (u32 i = 0; i < in.num_jumps; ++i) {
    const u32 from = in.jumps[2 * i], to = in.jumps[2 * i + 1];
    jumps[from] = 1;
    leader[from + 1] = 1;
    if (to != NO_RECORD) leader[to] = 1;
  }
  std::vector<Block> blocks;
  std::vector<u32> block_of(in.num_records + 1, 0);
  for (u32 i = 0; i < in.num_records; ++i) {
    if (leader[i]) {
      blocks.emplace_back();
      blocks.back().begin = i;
    }
    blocks.back().end = i + 1;
    block_of[i] = u32(blocks.size()) - 1;
  }
  for (u32 i = 0; i < in.num_jumps; ++i) {
    const u32 from = in.jumps[2 * i], to = in.jumps[2 * i + 1];
    if (to != NO_RECORD) blocks[block_of[from]].successors.push_back(block_of[to]);
  }
  for (Block& block : blocks) {
    const u32 last = block.end - 1;
    const bool continues = !jumps[last] || guarded[last];
    if (continues && block.end < in.num_records) block.successors.push_back(block_of[block.end]);
  }
  return blocks;
}

// Fills used / defined per block. A definition under a guard keeps the old value of the other lanes, so it is a use as well.
void summarize(const ProgramDescription& in, const std::vector<u8>& guarded, std::vector<Block>& blocks) {
  const size_t words = (in.num_registers + 63) / 64;
  size_t next = 0;
  for (Block& block : blocks) {
    block.live_in.assign(words, 0), block.live_out.assign(words, 0);
    block.used.assign(words, 0), block.defined.assign(words, 0);
    while (next < in.num_operands && in.operands[next].record < block.end) {
      const u32 record = in.operands[next].record;
      size_t end = next;
      while (end < in.num_operands && in.operands[end].record == record) ++end;
      for (int definitions = 0; definitions < 2; ++definitions) {  // uses come before definitions
        for (size_t i = next; i < end; ++i) {
          const u32 reg = in.operands[i].reg >> 1;
          const bool defines = in.operands[i].reg & 1;
          const u64 bit = u64(1) << (reg & 63);
          if (!definitions && (!defines || guarded[record]) && !(block.defined[reg >> 6] & bit)) block.used[reg >> 6] |= bit;
          if (definitions && defines) block.defined[reg >> 6] |= bit;
        }
      }
      next = end;
    }
  }
}

void solve(std::vector<Block>& blocks) {
  bool changed = true;
  while (changed) {
    changed = false;
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      for (size_t w = 0; w < block->used.size(); ++w) {
        u64 out = 0;
        for (u32 s : block->successors) out |= blocks[s].live_in[w];
        const u64 in = block->used[w] | (out & ~block->defined[w]);
        changed |= in != block->live_in[w];
        block->live_out[w] = out, block->live_in[w] = in;
      }
    }
  }
}

template <class Body> void for_bits(const Bits& set, Body body) {
  for (size_t w = 0; w < set.size(); ++w) {
    for (u64 rest = set[w]; rest; rest &= rest - 1) body(u32(w * 64 + __builtin_ctzll(rest)));
  }
}

std::vector<Interval> find_intervals(const ProgramDescription& in, const std::vector<Block>& blocks) {
  std::vector<Interval> intervals(in.num_registers);
  for (u32 i = 0; i < in.num_operands; ++i) intervals[in.operands[i].reg >> 1].touch(in.operands[i].record);
  for (const Block& block : blocks) {
    for_bits(block.live_in, [&](u32 reg) { intervals[reg].touch(block.begin); });
    for_bits(block.live_out, [&](u32 reg) { intervals[reg].touch(block.end - 1); });
  }
  return intervals;
}

}  // namespace

void allocate_rows(const ProgramDescription& in, Program& program) {
  const std::vector<u8> guarded = find_guarded(in);
  std::vector<Block> blocks = find_blocks(in, guarded);
  summarize(in, guarded, blocks);
  solve(blocks);
  const std::vector<Interval> intervals = find_intervals(in, blocks);

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
  for_bits(blocks[0].live_in, [&](u32 reg) {
    if (in.widths[reg] == 1) return;
    program.poisoned_rows.push_back(row_of[reg]);
    if (in.widths[reg] == 64) program.poisoned_rows.push_back(u16(row_of[reg] + 1));
  });
  for (u32 i = 0; i < in.num_special; ++i) program.special.emplace_back(in.special[2 * i], row_of[in.special[2 * i + 1]]);
}

}  // namespace sim
