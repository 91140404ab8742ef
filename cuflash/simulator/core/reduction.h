// ElementType-wise reductions in memory, as asynchronous copies do them.
#pragma once

#include "lanes.h"

namespace sim {

// The numbers are those of CUtensorMapDataType, and of the lists in instructions/bulk_copy.py.
enum class ElementType : u8 { U8, U16, U32, S32, U64, S64, F16, F32, F64, BF16, COUNT };
enum class Operation : u8 { ADD, MIN, MAX, INC, DEC, AND, OR, XOR, COUNT };

u32 element_bytes(ElementType element);

// Combines every element of `to` with that of `from`; elements are updated atomically.
using Reduction = void (*)(u8* to, const u8* from, u32 bytes);

// Null for combinations that no instruction has.
Reduction find_reduction(Operation operation, ElementType element);

}  // namespace sim
