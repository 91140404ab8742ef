// setmaxnreg: warps of a block that hand registers to each other.
#pragma once

#include <memory>

#include "machine.h"

namespace sim {

std::unique_ptr<Engine> make_register_pool(Cluster& cluster);

}  // namespace sim
