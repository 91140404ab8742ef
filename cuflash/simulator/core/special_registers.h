// %tid, %ctaid and the other registers that a launch fills in.
#pragma once

#include "machine.h"

namespace sim {

// Writes special register `number` (an index into special_register_name) to all lanes of `row`.
void fill_special_register(const Cta& cta, Warp& warp, u32 number, u16 row);

// The PTX name, or nullptr past the last one.
const char* special_register_name(u32 number);

}  // namespace sim
