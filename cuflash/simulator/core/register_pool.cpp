// See register_pool.h.
//
// Contract: a block has 65536 registers. Each of its threads starts with .maxnreg of them, or where the kernel does not declare it with as many as
// there are for all (255 at most), rounded down to a multiple of 8. setmaxnreg.dec gives registers back at once; setmaxnreg.inc waits until
// there are enough. What a warp holds when it exits stays taken. Values are not lost: how many registers a kernel needs is for ptxas to say.
#include "register_pool.h"

#include <algorithm>

#include "cluster.h"
#include "table.h"

namespace sim {
namespace {

constexpr u32 REGISTERS = 65536, MAX_PER_THREAD = 255, GRANULARITY = 8, WARPS = 4;  // of a block; …; of a warpgroup

struct BlockPool {
  struct Member {
    u32 held = 0;      // registers per thread
    u32 missing = 0;   // registers that it waits for
    u32 executed = 0;  // setmaxnreg
  };
  std::vector<Member> members;                    // per warp
  std::vector<std::vector<const Record*>> order;  // per warpgroup: the setmaxnreg that its first warp executed

  u32 taken() const {
    u32 sum = 0;
    for (const Member& member : members) sum += member.held * LANES;
    return sum;
  }
};

class RegisterPool final : public Engine {
 public:
  explicit RegisterPool(Cluster& cluster) : blocks(cluster.size) {
    for (BlockPool& block : blocks) {
      block.members.resize(cluster.ctas[0]->num_warps);
      block.order.resize((block.members.size() + WARPS - 1) / WARPS);
    }
  }

  void reset() override {
    for (BlockPool& block : blocks) {
      std::fill(block.members.begin(), block.members.end(), BlockPool::Member{});
      for (auto& order : block.order) order.clear();
    }
  }

  bool step(Random&) override { return false; }

  void check_exit(Warp& warp, const Record* in, u32 lanes) override {
    if (!warp.cta->checks) return;
    const BlockPool& block = blocks[warp.cta->rank];
    const std::vector<const Record*>& order = block.order[warp.id / WARPS];
    const u32 executed = block.members[warp.id].executed;
    if (executed >= order.size()) return;
    Failure failure{"setmaxnreg", "", {warp.id, lanes, warp.cta->record_index(in), warp.cta->rank}, 0, 0, {}};
    failure.message = "warp " + std::to_string(warp.id) + " exits without a setmaxnreg that another warp of its warpgroup executed; all four must";
    failure.places.push_back({NO_WARP, ALL_LANES, warp.cta->record_index(order[executed]), warp.cta->rank});
    throw failure;
  }

  void describe_stall(std::string& text) const override {
    for (size_t rank = 0; rank < blocks.size(); ++rank) {
      for (size_t w = 0; w < blocks[rank].members.size(); ++w) {
        const u32 missing = blocks[rank].members[w].missing;
        if (missing == 0) continue;
        text += "; warp " + std::to_string(w) + (blocks.size() > 1 ? " of block " + std::to_string(rank) : "") + " waits in setmaxnreg, where " +
                std::to_string(missing) + " registers are missing for it (" + std::to_string(REGISTERS - blocks[rank].taken()) + " of " +
                std::to_string(REGISTERS) + " are free)";
      }
    }
  }

  std::vector<BlockPool> blocks;
};

// The pool of a warp's block, where every thread holds what it started with at the first look. `declared`: .maxnreg, or 0.
BlockPool& pool_of(Warp& warp, const Record* in, u32 declared) {
  BlockPool& block = static_cast<RegisterPool&>(*warp.cta->cluster->register_pool).blocks[warp.cta->rank];
  if (block.members[0].held != 0) return block;
  const u32 threads = warp.cta->num_warps * LANES;
  const u32 initial = declared ? declared : std::min(MAX_PER_THREAD, REGISTERS / threads);
  for (BlockPool::Member& member : block.members) member.held = initial / GRANULARITY * GRANULARITY;
  if (block.taken() > REGISTERS) {
    warp.fail(in, "setmaxnreg", ALL_LANES, "%u threads start with %u registers each, %u in all; a block has %u", threads, block.members[0].held,
              block.taken(), REGISTERS);
  }
  return block;
}

// Whether two setmaxnreg, perhaps at different places, do the same.
bool same_effect(const Record* first, const Record* second) { return first->op == second->op && first->x == second->x; }

// All warps of a warpgroup execute the same ones in the same order.
void check_order(Warp& warp, const Record* in, BlockPool& block) {
  std::vector<const Record*>& order = block.order[warp.id / WARPS];
  const u32 number = block.members[warp.id].executed;
  if (number == order.size()) order.push_back(in);
  if (!same_effect(order[number], in)) {
    Failure failure{"setmaxnreg", "", {warp.id, ALL_LANES, warp.cta->record_index(in), warp.cta->rank}, 0, 0, {}};
    failure.message = "warp " + std::to_string(warp.id) + " and another warp of its warpgroup execute different ones";
    failure.places.push_back({NO_WARP, ALL_LANES, warp.cta->record_index(order[number]), warp.cta->rank});
    throw failure;
  }
  const u32 first = warp.id / WARPS * WARPS, end = std::min(first + WARPS, warp.cta->num_warps);
  for (u32 w = first; w < end; ++w) {
    if (warp.cta->warps[w].live != 0 || block.members[w].executed > number) continue;
    warp.fail(in, "setmaxnreg", ALL_LANES, "all warps of a warpgroup must execute it, but warp %u has exited", w);
  }
}

// x = registers per thread, a = .maxnreg of the kernel or 0.
template <bool INCREASES> const Record* set_max_registers(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  const u32 count = u32(in->x);
  BlockPool& block = pool_of(warp, in, in->a);
  BlockPool::Member& member = block.members[warp.id];
  if (warp.cta->checks) check_order(warp, in, block);
  if (INCREASES ? count < member.held : count > member.held) {
    warp.fail(in, "setmaxnreg", mask, "%s %u registers per thread, but the warp holds %u", INCREASES ? "inc to" : "dec to", count, member.held);
  }
  if (INCREASES) {
    const u32 needed = (count - member.held) * LANES, free = REGISTERS - block.taken();
    member.missing = needed > free ? needed - free : 0;
    if (member.missing != 0) return warp.block();
  }
  member.held = count;
  ++member.executed;
  return in + 1;
}

}  // namespace

std::unique_ptr<Engine> make_register_pool(Cluster& cluster) { return std::make_unique<RegisterPool>(cluster); }

void register_register_pool(Table& table) {
  table.family(Class::CONTROL);
  table.add("setmaxnreg.inc", "", set_max_registers<true>);
  table.add("setmaxnreg.dec", "", set_max_registers<false>);
}

}  // namespace sim
