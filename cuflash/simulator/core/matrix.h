// The workspace of mma.sync, one per running block.
#pragma once

#include "fragment.h"

namespace sim {

constexpr int MAX_K = 32;  // depth of the largest mma

// Operands expanded for the inner loop, and the registers that they were expanded from: consecutive instructions often share A or B.
struct MatrixScratch {
  alignas(64) Vec<f32> a[MAX_K][2][HALF_PARTS];  // [k][upper or lower 8 rows]: lane 4g + q holds A[g][k]
  alignas(64) Vec<f32> b[MAX_K][2];              // [k][even or odd column]: lane 4g + q holds B[k][2q] or B[k][2q + 1]
  alignas(64) u32 a_source[4][LANES];
  alignas(64) u32 b_source[2][LANES];
  int a_kind = -1, b_kind = -1;                  // type and depth of the operands held; -1 when there are none
};

}  // namespace sim
