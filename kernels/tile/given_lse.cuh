// What the lse that a backward pass is given says beside the sum over the call's own terms.
//
// It is that of the own terms, or that of more: of all chunks of keys, of which the call sees one. float32 keeps log(sum) only as far as the size of
// lse leaves bits for it. Where the two differ by less than that, the own sum is the better number; where they differ by more, the others add it.
#pragma once
#include "ptx/types.cuh"

// Whether `lse` is above the lse of the own terms, `own`, by more than one or two units in the last place. Numbers that were the same before each was
// rounded differ by at most one. A sum over more terms is not smaller: below `own` is rounding, however far. `own` is -inf without terms.
DEVICE bool is_of_more(float lse, float own) { return lse - own > 0x1p-23f * fabsf(lse); }
