// Who touches a register of a wgmma at the wrong time. A dataflow over the registers that hold D or A of any wgmma.
//
// Contract, from the PTX ISA (wgmma.fence, wgmma.wait_group): from a wgmma to the wgmma.wait_group that waits for its commit group no other
// instruction may read or write its registers of D and A ("wgmma-register"); only a wgmma with the same D and shape may follow without a
// wait. Between an access to such a register and a wgmma that uses it there must be a wgmma.fence, and one before the first wgmma
// ("wgmma-fence"); reading a register of A needs none. A record that breaks this on some path is marked, and fails when it is executed.
#include "wgmma_hazards.h"

#include <algorithm>
#include <map>

#include "table.h"
#include "wgmma.h"

namespace sim {
namespace {

constexpr u8 NEVER = 255, OLDEST = 254;  // ages
constexpr int NOT_TRACKED = -1;

enum class Kind : u8 { OTHER, FENCE, COMMIT, WAIT, PRODUCT };

// A wgmma that may be using a register. Age: commits since; the youngest counts, since it is waited for last.
struct Flight {
  u8 age = NEVER;
  bool several = false;  // with different D
  u32 record = NO_RECORD;

  bool active() const { return age != NEVER; }
};

// What may have happened to a register on some path.
struct State {
  Flight as_d, as_a;
  u32 read = NO_RECORD, written = NO_RECORD;  // by another instruction, since the last wgmma.fence
};

struct States {
  std::vector<State> registers;  // tracked ones
  bool reached = false;
  bool unfenced = false;  // there was no wgmma.fence yet
};

class Analysis {
 public:
  Analysis(const ProgramDescription& in, const Flow& flow) : in_(in), flow_(flow) {
    find_kinds();
    track_registers();
  }

  WgmmaUse run() {
    if (num_tracked_ == 0) return {};
    std::vector<States> entries(flow_.blocks.size());
    for (States& states : entries) states.registers.resize(num_tracked_);
    entries[0].reached = entries[0].unfenced = true;
    std::vector<u32> work{0};
    while (!work.empty()) {
      const u32 b = work.back();
      work.pop_back();
      States states = entries[b];
      walk(b, states);
      for (u32 next : flow_.blocks[b].successors) {
        if (merge(entries[next], states)) work.push_back(next);
      }
    }
    reporting_ = true;
    for (u32 b = 0; b < entries.size(); ++b) {
      if (!entries[b].reached) continue;
      States states = entries[b];
      note_flights(states, flow_.blocks[b].begin);
      walk(b, states);
      note_flights(states, flow_.blocks[b].end - 1);
    }
    return std::move(use_);
  }

 private:
  using Layout = WgmmaLayout;

  void find_kinds() {
    const std::vector<Entry>& table = instruction_table().entries();
    std::vector<Kind> kind_of(table.size(), Kind::OTHER);
    for (size_t op = 0; op < table.size(); ++op) {
      const std::string& name = table[op].name;
      kind_of[op] = name == "wgmma.fence"                                              ? Kind::FENCE
                    : name == "wgmma.commit_group"                                     ? Kind::COMMIT
                    : name == "wgmma.wait_group"                                       ? Kind::WAIT
                    : name.starts_with("wgmma.f32.") || name.starts_with("wgmma.f16.") ? Kind::PRODUCT
                                                                                       : Kind::OTHER;
    }
    kinds_.resize(in_.num_records);
    for (u32 i = 0; i < in_.num_records; ++i) kinds_[i] = kind_of[in_.records[i].op];
  }

  // The operand's index in `extra`, from the start of its record's part.
  u32 index_of(const Operand& operand) const { return (operand.position & ~IN_EXTRA) - u32(in_.records[operand.record].x); }
  bool is_d(const Operand& operand) const { return operand.position & IN_EXTRA && index_of(operand) >= Layout::D; }
  bool is_a(const Operand& operand) const {
    return operand.position & IN_EXTRA && index_of(operand) < Layout::B && in_.widths[operand.reg >> 1] == 32;
  }

  void track_registers() {
    slots_.assign(in_.num_registers, NOT_TRACKED);
    accumulators_.assign(in_.num_records, 0);
    operands_from_.assign(flow_.blocks.size() + 1, 0);
    size_t next = 0;
    for (size_t b = 0; b < flow_.blocks.size(); ++b) {
      operands_from_[b] = next;
      for_records(in_, next, flow_.blocks[b].end, [&](const Operand* first, const Operand* last) {
        if (kinds_[first->record] != Kind::PRODUCT) return;
        accumulators_[first->record] = accumulator_number(first, last);
        for (const Operand* operand = first; operand < last; ++operand) {
          int& slot = slots_[operand->reg >> 1];
          if ((is_d(*operand) || is_a(*operand)) && slot == NOT_TRACKED) slot = int(num_tracked_++), registers_.push_back(operand->reg >> 1);
        }
      });
    }
  }

  // Whether two wgmma accumulate into the same D: types, N and registers.
  bool same_d(u32 first, u32 second) const { return accumulators_[first] == accumulators_[second]; }

  u32 accumulator_number(const Operand* first, const Operand* last) {
    const Record& record = in_.records[first->record];
    std::vector<u32> key{record.op, in_.extra[record.x + i32(Layout::N)]};
    for (const Operand* operand = first; operand < last; ++operand) {
      if (is_d(*operand)) key.push_back(operand->reg >> 1);
    }
    return accumulator_numbers_.try_emplace(key, u32(accumulator_numbers_.size())).first->second;
  }

  // ---- paths that meet

  bool merge(Flight& into, const Flight& from) const {
    if (!from.active()) return false;
    const bool differ = into.active() && (from.several || !same_d(into.record, from.record));
    const bool changed = from.age < into.age || (differ && !into.several);
    into.several |= from.several || differ;
    if (from.age < into.age) into.age = from.age, into.record = from.record;
    return changed;
  }
  static bool merge(u32& into, u32 from) {
    if (into != NO_RECORD || from == NO_RECORD) return false;
    into = from;
    return true;
  }
  bool merge(States& into, const States& from) const {
    bool changed = !into.reached || (from.unfenced && !into.unfenced);
    into.reached = true;
    into.unfenced |= from.unfenced;
    for (u32 i = 0; i < num_tracked_; ++i) {
      State& state = into.registers[i];
      const State& other = from.registers[i];
      changed |= merge(state.as_d, other.as_d) | merge(state.as_a, other.as_a) | merge(state.read, other.read) | merge(state.written, other.written);
    }
    return changed;
  }

  // ---- what a record does

  void walk(u32 number, States& states) {
    const Block& block = flow_.blocks[number];
    size_t next = operands_from_[number];
    for (u32 record = block.begin; record < block.end; ++record) {
      const Operand* first = in_.operands + next;
      while (next < in_.num_operands && in_.operands[next].record == record) ++next;
      const Operand* const last = in_.operands + next;
      switch (kinds_[record]) {
        case Kind::FENCE:
          states.unfenced = false;
          for (State& state : states.registers) state.read = state.written = NO_RECORD;
          break;
        case Kind::COMMIT:
          for (State& state : states.registers) grow_older(state.as_d), grow_older(state.as_a);
          break;
        case Kind::WAIT:
          if (reporting_) note_flights(states, record);
          for (State& state : states.registers) retire(state.as_d, in_.records[record].x), retire(state.as_a, in_.records[record].x);
          break;
        case Kind::PRODUCT:
          multiply(record, first, last, states);
          break;
        case Kind::OTHER:
          for (const Operand* operand = first; operand < last; ++operand) access(*operand, states);
          break;
      }
    }
  }

  static void grow_older(Flight& flight) {
    if (flight.age < OLDEST) ++flight.age;
  }
  static void retire(Flight& flight, i32 allowed) {
    if (flight.age != 0 && i32(flight.age) > allowed) flight = {};
  }

  void access(const Operand& operand, States& states) {
    const int slot = slots_[operand.reg >> 1];
    if (slot == NOT_TRACKED) return;
    State& state = states.registers[size_t(slot)];
    const bool writes = operand.reg & 1;
    if (state.as_d.active()) {
      report(operand.record, state.as_d.record, "wgmma-register",
             writes ? "writes a register of the accumulator D of a wgmma that no wgmma.wait_group has waited for"
                    : "reads a register of the accumulator D of a wgmma that no wgmma.wait_group has waited for");
    } else if (state.as_a.active()) {
      report(operand.record, state.as_a.record, "wgmma-register",
             writes ? "writes a register of A of a wgmma that no wgmma.wait_group has waited for"
                    : "reads a register of A of a wgmma that no wgmma.wait_group has waited for");
    }
    (writes ? state.written : state.read) = operand.record;
  }

  void multiply(u32 record, const Operand* first, const Operand* last, States& states) {
    if (states.unfenced) report(record, NO_RECORD, "wgmma-fence", "no wgmma.fence comes before the first wgmma");
    for (const Operand* operand = first; operand < last; ++operand) {
      const int slot = slots_[operand->reg >> 1];
      if (slot == NOT_TRACKED) continue;
      State& state = states.registers[size_t(slot)];
      if (is_d(*operand)) {
        if (state.as_a.active()) {
          report(record, state.as_a.record, "wgmma-register", "its D has registers of A of a wgmma that no wgmma.wait_group has waited for");
        }
        if (state.as_d.active() && (state.as_d.several || !same_d(record, state.as_d.record))) {
          report(record, state.as_d.record, "wgmma-register",
                 "its D has registers of another shape's D, of a wgmma that no wgmma.wait_group has waited for");
        }
        if (state.written != NO_RECORD) {
          report(record, state.written, "wgmma-fence", "a register of its accumulator D was written and no wgmma.fence came after");
        } else if (state.read != NO_RECORD) {
          report(record, state.read, "wgmma-fence", "a register of its accumulator D was read and no wgmma.fence came after");
        }
      } else if (is_a(*operand)) {
        if (state.as_d.active()) {
          report(record, state.as_d.record, "wgmma-register", "its A has registers of D of a wgmma that no wgmma.wait_group has waited for");
        }
        if (state.written != NO_RECORD) report(record, state.written, "wgmma-fence", "a register of its A was written and no wgmma.fence came after");
      }
    }
    for (const Operand* operand = first; operand < last; ++operand) {
      const int slot = slots_[operand->reg >> 1];
      if (slot == NOT_TRACKED) continue;
      State& state = states.registers[size_t(slot)];
      if (is_d(*operand)) state.as_d = {0, false, record};
      if (is_a(*operand)) state.as_a = {0, false, record};
    }
  }

  // ---- results

  void report(u32 record, u32 other, const char* check, const char* message) {
    if (!reporting_ || (!use_.hazards.empty() && use_.hazards.back().record == record)) return;
    use_.hazards.push_back({record, in_.records[record].op, check, message, other});
  }
  void note_flights(const States& states, u32 record) {
    for (u32 i = 0; i < num_tracked_; ++i) {
      const State& state = states.registers[i];
      if (state.as_d.active() || state.as_a.active()) use_.in_flight.emplace_back(registers_[i], record);
    }
  }

  const ProgramDescription& in_;
  const Flow& flow_;
  std::vector<Kind> kinds_;             // per record
  std::vector<int> slots_;              // per register: its number among those tracked
  std::vector<u32> registers_;          // the tracked ones
  std::vector<size_t> operands_from_;   // per block: its first operand
  std::vector<u32> accumulators_;      // per wgmma: the number of its D
  std::map<std::vector<u32>, u32> accumulator_numbers_;
  u32 num_tracked_ = 0;
  bool reporting_ = false;
  WgmmaUse use_;
};

// A record that was marked: fails if it does anything for any lane.
const Record* hazard(Warp& warp, const Record* in) {
  const std::vector<WgmmaHazard>& hazards = warp.cta->program.wgmma_hazards;
  const u32 record = warp.cta->record_index(in);
  const auto before = [](const WgmmaHazard& hazard, u32 value) { return hazard.record < value; };
  const WgmmaHazard& found = *std::lower_bound(hazards.begin(), hazards.end(), record, before);
  const u32 mask = warp.mask(in);
  if (mask == 0 || !warp.cta->checks) return instruction_table().entries()[found.op].handler(warp, in);
  Failure failure{found.check, found.message, {warp.id, mask, record, warp.cta->rank}, 0, 0, {}};
  if (found.other != NO_RECORD) failure.places.push_back({warp.id, mask, found.other, warp.cta->rank});
  throw failure;
}

}  // namespace

WgmmaUse find_wgmma_use(const ProgramDescription& description, const Flow& flow) { return Analysis(description, flow).run(); }

void mark_wgmma_hazards(Program& program) {
  if (program.wgmma_hazards.empty()) return;
  const std::vector<Entry>& table = instruction_table().entries();
  const auto entry = std::find_if(table.begin(), table.end(), [](const Entry& e) { return e.name == "wgmma.hazard"; });
  for (const WgmmaHazard& hazard : program.wgmma_hazards) program.records[hazard.record].op = u16(entry - table.begin());
}

void register_wgmma_hazards(Table& table) { table.add("wgmma.hazard", "", hazard); }

}  // namespace sim
