// The arithmetic of wgmma: where its operands lie in shared memory, and the product itself.
#pragma once

#include "fragment.h"
#include "wgmma.h"

namespace sim {

constexpr u32 WARPGROUP = 4, WARP_ROWS = 16;  // warps of a warpgroup; rows of A and D in a warp
constexpr u32 CHUNKS = 2;                     // every wgmma is 32 bytes deep: two pieces of 16 bytes along k

// A matrix descriptor of the PTX ISA. Memory is looked at in pieces of 16 bytes. K-major: piece (row, chunk of k), where a row of A or a column of B
// is two pieces. Otherwise (16-bit elements only): piece (k, eight rows).
struct Descriptor {
  u32 start, leading, stride, base, mode;
  bool k_major;

  Descriptor(u64 word, bool transposed)
      : start(u32(word & 0x3fff) << 4),
        leading(u32(word >> 16 & 0x3fff) << 4),
        stride(u32(word >> 32 & 0x3fff) << 4),
        base(u32(word >> 49 & 7)),
        mode(u32(word >> 62)),
        k_major(!transposed) {}

  // Pieces in a row of the swizzle pattern: 1, 8, 4, 2 for no swizzle, 128, 64 and 32 bytes.
  u32 width() const { return mode == 0 ? 1 : 16 >> mode; }

  u32 address_of(u32 outer, u32 inner) const {
    const u32 wide = width();
    u32 offset;
    if (k_major) offset = outer % 8 * 16 * wide + outer / 8 * stride + inner * (wide == 1 ? leading : 16);
    else if (wide == 1) offset = outer % 8 * 16 + outer / 8 * leading + inner * stride;
    else offset = outer % 8 * 16 * wide + outer / 8 * stride + inner % wide * 16 + inner / wide * leading;
    const u32 address = start + offset;
    return address ^ (((address >> 7) - base) & (wide - 1)) << 4;
  }
};

struct Range {
  u32 begin, bytes;
};

// The bytes of `count` rows (a multiple of 8) of A, or columns of B, from `first` on; in ascending order.
std::vector<Range> ranges_of(const Descriptor& matrix, u32 first, u32 count);

// One wgmma.mma_async for the four warps of a warpgroup.
struct Product {
  const Record* in;
  u64 descriptor_a, descriptor_b;  // A only if it is not in registers
  bool accumulates;                // D = D + A B, not A B

  bool operator==(const Product&) const = default;
};

template <Input A, Input B, Accumulator TYPE> void multiply_warpgroup(const Product& product, Warp* warps);

}  // namespace sim
