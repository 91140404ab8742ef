// wgmma: matrix products that a warpgroup (four consecutive warps, the first a multiple of four) issues now and that happen later.
#pragma once

#include <memory>

#include "machine.h"

namespace sim {

// What `extra` holds for a wgmma.mma_async, from x on.
struct WgmmaLayout {
  static constexpr u32 N = 0, FLAGS = 1;
  static constexpr u32 A = 2;  // four registers, or one descriptor
  static constexpr u32 B = 6;  // a descriptor
  static constexpr u32 D = 7;
  static constexpr u32 A_IN_REGISTERS = 1, A_TRANSPOSED = 2, B_TRANSPOSED = 4, NEGATED = 8;  // in FLAGS
};

std::unique_ptr<Engine> make_wgmma_engine(Cluster& cluster);

}  // namespace sim
