// Registers that a wgmma uses after it was issued: found out from the control flow when a kernel is decoded.
#pragma once

#include "flow.h"

namespace sim {

struct WgmmaUse {
  std::vector<std::pair<u32, u32>> in_flight;  // register, record: a wgmma that is not waited for may use it there; ends of stretches only
  std::vector<WgmmaHazard> hazards;            // in the order of records
};
WgmmaUse find_wgmma_use(const ProgramDescription& description, const Flow& flow);

// Makes the records of `program.wgmma_hazards` fail when they are executed.
void mark_wgmma_hazards(Program& program);

}  // namespace sim
