// See flow.h.
#include "flow.h"

namespace sim {
namespace {

constexpr u32 GUARD_WORD = 1;

// At this stage the guard is an operand like others.
std::vector<u8> find_guarded(const ProgramDescription& in) {
  std::vector<u8> guarded(in.num_records, 0);
  for (u32 i = 0; i < in.num_operands; ++i) {
    const u32 position = in.operands[i].position;
    if (!(position & IN_EXTRA) && position % RECORD_WORDS == GUARD_WORD) guarded[position / RECORD_WORDS] = 1;
  }
  return guarded;
}

}  // namespace

Flow find_flow(const ProgramDescription& in) {
  Flow flow{find_guarded(in), {}};
  std::vector<Block>& blocks = flow.blocks;
  std::vector<u8> leader(in.num_records + 1, 0), jumps(in.num_records, 0);
  leader[0] = 1;
  for (u32 i = 0; i < in.num_jumps; ++i) {
    const u32 from = in.jumps[2 * i], to = in.jumps[2 * i + 1];
    jumps[from] = 1;
    leader[from + 1] = 1;
    if (to != NO_RECORD) leader[to] = 1;
  }
  std::vector<u32> block_of(in.num_records + 1, 0);
  for (u32 i = 0; i < in.num_records; ++i) {
    if (leader[i]) blocks.push_back({i, i, {}});
    blocks.back().end = i + 1;
    block_of[i] = u32(blocks.size()) - 1;
  }
  for (u32 i = 0; i < in.num_jumps; ++i) {
    const u32 from = in.jumps[2 * i], to = in.jumps[2 * i + 1];
    if (to != NO_RECORD) blocks[block_of[from]].successors.push_back(block_of[to]);
  }
  for (Block& block : blocks) {
    const u32 last = block.end - 1;
    const bool continues = !jumps[last] || flow.guarded[last];
    if (continues && block.end < in.num_records) block.successors.push_back(block_of[block.end]);
  }
  return flow;
}

}  // namespace sim
