// See validate.h.
#include "validate.h"

#include "bulk_copy.h"
#include "flow.h"
#include "special_registers.h"
#include "table.h"
#include "tensor_map.h"
#include "wgmma.h"

namespace sim {
namespace {

void require(bool holds, const char* what, size_t number) {
  if (!holds) throw InvalidProgram{std::string(what) + " " + std::to_string(number) + " of the program is out of range"};
}

// What field x of an instruction's records is.
enum class X : u8 { NUMBER, ROW, TARGET, EXTRA, TARGETS, WGMMA, TENSOR, STORE, NEVER };

X use_of_x(const Entry& entry) {
  const std::string& name = entry.name;
  if (name == PAST_THE_END || name == "wgmma.hazard") return X::NEVER;
  if (!entry.signature.empty()) return entry.signature.find("xi") != std::string::npos ? X::NUMBER : X::ROW;
  if (name == "bra") return X::TARGET;
  if (name == "brx.idx") return X::TARGETS;
  if (name.starts_with("setmaxnreg.") || name.starts_with("bar.") || name.starts_with("barrier.")) return X::NUMBER;
  if (name.starts_with("wgmma.f")) return name == "wgmma.fence" ? X::NUMBER : X::WGMMA;
  if (name.starts_with("cp.async.bulk.tensor.")) return X::TENSOR;
  if (name == "st.async") return X::STORE;
  return X::EXTRA;
}

const std::vector<X>& uses_of_x() {
  static const std::vector<X> uses = [] {
    std::vector<X> list;
    for (const Entry& entry : instruction_table().entries()) list.push_back(use_of_x(entry));
    return list;
  }();
  return uses;
}

void check_targets(const Record& record, size_t number, const u16* extra, u32 num_extra, u32 num_records) {
  const u32 count = extra[record.x];
  require(u64(record.x) + 1 + 2 * u64(count) <= num_extra, "the list of targets of record", number);
  for (u32 i = 0; i < count; ++i) {
    const u16* target = extra + record.x + 1 + 2 * i;
    require((target[0] | u32(target[1]) << 16) < num_records, "a target of record", number);
  }
}

// An element and an operation that there are, or none; and values of its size.
bool is_copy(const Record& record) {
  const u32 operation = operation_of(&record);
  return (operation == NO_OPERATION || operation < u32(Operation::COUNT)) && u32(record.c >> ELEMENT_SHIFT) < u32(ElementType::COUNT);
}

bool is_store(const Record& record, const u16* words) {
  const u32 size = words[2 * ADDRESS_WORDS], count = words[2 * ADDRESS_WORDS + 1];
  const bool reduces = operation_of(&record) != NO_OPERATION;
  return (size == 4 || size == 8) && count >= 1 && count <= 4 && (!reduces || element_bytes(ElementType(record.c >> ELEMENT_SHIFT)) == size);
}

bool is_tensor_copy(const Entry& entry, const u16* words) {
  const u32 rank = words[(entry.name.ends_with(".load") ? 3 : 2) * ADDRESS_WORDS];
  return rank >= 1 && rank <= TensorMap::MAX_RANK;
}

// `extra` has EXTRA_PADDING words behind num_extra.
void check_record(const Record& record, size_t number, const u16* extra, u32 num_extra, u32 num_records) {
  const X use = uses_of_x()[record.op];
  const Entry& entry = instruction_table().entries()[record.op];
  require(use != X::NEVER, "the instruction of record", number);
  if (use == X::NUMBER) return;
  require(record.x >= 0, "field x of record", number);
  if (use == X::ROW) require(record.x <= 0xffff, "field x of record", number);
  else if (use == X::TARGET) require(u32(record.x) < num_records, "the target of record", number);
  else require(u32(record.x) < num_extra, "the operands of record", number);
  if (use == X::TARGETS) check_targets(record, number, extra, num_extra, num_records);
  const u16* words = extra + record.x;
  if (use == X::WGMMA) {
    const u32 n = words[WgmmaLayout::N];
    require(n >= 8 && n <= 256 && n % 8 == 0, "the shape of record", number);
  }
  if (entry.name.find(".bulk.") != std::string::npos || use == X::STORE) require(is_copy(record), "the reduction of record", number);
  if (use == X::STORE) require(is_store(record, words), "the values of record", number);
  if (entry.name == "cp.async") require(words[4] == 4 || words[4] == 8 || words[4] == 16, "the size of record", number);
  if (use == X::TENSOR) require(is_tensor_copy(entry, words), "the rank of record", number);
}

void check_records(const Record* records, u32 num_records, const u16* extra, u32 num_extra) {
  const size_t num_instructions = instruction_table().entries().size();
  for (u32 i = 0; i < num_records; ++i) {
    require(records[i].op < num_instructions, "the instruction of record", i);
    check_record(records[i], i, extra, num_extra, num_records);
  }
}

void check_operands(const ProgramDescription& in) {
  constexpr u32 OP = 0, HIGH_X = RECORD_WORDS - 1;
  u32 latest = 0;
  for (u32 i = 0; i < in.num_operands; ++i) {
    const Operand& operand = in.operands[i];
    const u32 index = operand.position & ~IN_EXTRA, word = index % RECORD_WORDS;
    const bool inside = operand.position & IN_EXTRA ? index < in.num_extra : index / RECORD_WORDS == operand.record && word != OP && word != HIGH_X;
    require(operand.record < in.num_records && operand.record >= latest, "the record of operand", i);
    require(inside, "the position of operand", i);
    require(operand.reg >> 1 < in.num_registers, "the register of operand", i);
    latest = operand.record;
  }
}

}  // namespace

void check_description(const ProgramDescription& in) {
  require(in.num_records >= 1 && in.num_records < u32(INT32_MAX), "the number of records,", in.num_records);
  require(in.num_extra < u32(INT32_MAX), "the length of extra,", in.num_extra);
  require(in.local_bytes <= MAX_LOCAL_BYTES, "the local memory in bytes,", in.local_bytes);
  require(in.shared_begin <= MAX_SHARED_ADDRESS, "the begin of shared memory,", in.shared_begin);
  for (u32 i = 0; i < in.num_registers; ++i) {
    require(in.widths[i] == 1 || in.widths[i] == 32 || in.widths[i] == 64, "the width of register", i);
  }
  for (u32 i = 0; i < in.num_special; ++i) {
    require(special_register_name(in.special[2 * i]) != nullptr, "the number of special register", i);
    require(in.special[2 * i + 1] < in.num_registers && in.widths[in.special[2 * i + 1]] != 1, "the register of special register", i);
  }
  for (u32 i = 0; i < in.num_jumps; ++i) {
    require(in.jumps[2 * i] < in.num_records, "the origin of jump", i);
    require(in.jumps[2 * i + 1] < in.num_records || in.jumps[2 * i + 1] == NO_RECORD, "the target of jump", i);
  }
  std::vector<u16> extra(in.extra, in.extra + in.num_extra);
  extra.resize(in.num_extra + EXTRA_PADDING);
  check_records(in.records, in.num_records, extra.data(), in.num_extra);
  check_operands(in);
}

void check_program(const Program& program, u32 num_extra) {
  check_records(program.records.data(), u32(program.records.size()), program.extra.data(), num_extra);
}

}  // namespace sim
