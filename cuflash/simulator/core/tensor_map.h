// The descriptor of a tensor in global memory that TMA instructions refer to.
//
// Contract: 128 bytes, written by tensor_map.py, which checks everything that the driver checks, or by tensormap.replace; the layout is the
// simulator's own. Extents, strides and boxes are ordered from the innermost dimension outwards, as in CUDA.
#pragma once

#include "reduction.h"

namespace sim {

enum class Swizzle : u8 { NONE, B32, B64, B128 };  // span in bytes

struct TensorMap {
  static constexpr u32 MAX_RANK = 5, ALIGNMENT = 64;
  static constexpr u64 MAGIC = 0x70616d726f736e74ull;

  u64 magic;
  u64 address;
  u64 extents[MAX_RANK];      // elements
  u64 strides[MAX_RANK - 1];  // bytes; of dimensions 1 and up
  u16 box[MAX_RANK];          // elements of global memory that a box spans
  u8 steps[MAX_RANK];         // in elements, from one element of a box to the next
  u8 rank;
  ElementType element;
  Swizzle swizzle;
  u8 fill_nan;  // of elements outside: NaN instead of zero
  u8 unused[21];

  // Why no copy can use it, or null. What encode_tiled has made can be used; a kernel may have made something else.
  const char* problem() const;
  // Elements of a box in shared memory.
  u32 count(u32 dimension) const { return (u32(box[dimension]) + steps[dimension] - 1) / steps[dimension]; }
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace sim
