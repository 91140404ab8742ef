// cp.async: copies that a warp issues now and that happen later.
#pragma once

#include <memory>

#include "machine.h"

namespace sim {

std::unique_ptr<Engine> make_async_copy_engine(Cluster& cluster);

}  // namespace sim
