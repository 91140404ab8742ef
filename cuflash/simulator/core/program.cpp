// Builds a Program from what Python decoded.
#include "program.h"

#include <algorithm>

#include "flow.h"
#include "table.h"
#include "validate.h"
#include "wgmma_hazards.h"

namespace sim {

std::unique_ptr<Program> make_program(const ProgramDescription& in) {
  check_description(in);
  auto program = std::make_unique<Program>();
  program->records.assign(in.records, in.records + in.num_records);
  program->extra.assign(in.extra, in.extra + in.num_extra);
  program->extra.resize(in.num_extra + EXTRA_PADDING);
  program->local_bytes = in.local_bytes;
  program->shared_begin = in.shared_begin;
  const Flow flow = find_flow(in);
  WgmmaUse wgmma = find_wgmma_use(in, flow);
  allocate_rows(in, flow, wgmma.in_flight, *program);
  check_program(*program, in.num_extra);
  const std::vector<Entry>& instructions = instruction_table().entries();
  for (const Record& record : program->records) {
    program->uses_mbarriers |= instructions[record.op].name.starts_with("mbarrier.init");
    program->uses_wgmma |= instructions[record.op].name.starts_with("wgmma.");
  }
  program->wgmma_hazards = std::move(wgmma.hazards);
  mark_wgmma_hazards(*program);
  const auto is_past_the_end = [](const Entry& entry) { return entry.name == PAST_THE_END; };
  const auto past_the_end = std::find_if(instructions.begin(), instructions.end(), is_past_the_end);
  program->records.push_back({u16(past_the_end - instructions.begin()), 0, 0, 0, 0, 0, 0});

  // Constants are rows as well, so that an operand needs no case distinction. A 64-bit constant fills two rows.
  for (u32 i = 0; i < in.num_constants; ++i) {
    const size_t bytes = in.wide[i] ? 8 : 4;
    const size_t row = program->constants.size();
    program->constants.resize(row + LANES * bytes / ROW_BYTES);
    u8* lanes = program->constants[row].bytes;
    for (int lane = 0; lane < LANES; ++lane) memcpy(lanes + size_t(lane) * bytes, &in.constants[i], bytes);
  }
  return program;
}

}  // namespace sim
