// See wgmma_product.h.
//
// Contract: B is expanded to f32 once for all four warps, A for each, then every tile of 8 columns takes one loop over k as in matrix.cpp. Products
// are summed in f32 in the order of k, an f16 accumulator is rounded at the end.
#include "wgmma_product.h"

#include <algorithm>

namespace sim {
namespace {

constexpr int MAX_TILES = 32;  // of 8 columns

// Values of k are held by chunk, place in a 32-bit word and word: k = VALUES (4 chunk + q) + i lies at [chunk][i][q].
template <Input A> struct ExpandedA {
  alignas(64) Vec<f32> rows[CHUNKS][VALUES<A>][4][2][HALF_PARTS];  // [upper or lower 8 rows]: lane 4g + q holds A[g][k], repeated over q
};
template <Input B> struct ExpandedB {
  alignas(64) Quad<f32> columns[2][CHUNKS][VALUES<B>][4];  // [even or odd column]: B[k][columns 0, 2, 4, 6 or 1, 3, 5, 7] of a tile
};

template <Input A> SIM_INLINE void expand_a(ExpandedA<A>& to, const u32* const (&registers)[4], bool negated) {
  const u32 sign = negated ? 0x80000000u : 0;
  SIM_UNROLL for (int reg = 0; reg < 4; ++reg) {
    SIM_UNROLL for (int part = 0; part < HALF_PARTS; ++part) {
      const Vec<u32> words = ((const Vec<u32>*)registers[reg])[part];
      const Vec<u32> repeated[4] = {broadcast_in_quads<0>(words), broadcast_in_quads<1>(words), broadcast_in_quads<2>(words),
                                    broadcast_in_quads<3>(words)};
      for (int i = 0; i < VALUES<A>; ++i) {
        for (int q = 0; q < 4; ++q) to.rows[reg >> 1][i][q][reg & 1][part] = as<f32>(as<u32>(value_at<A>(repeated[q], i)) ^ sign);
      }
    }
  }
}

// The 16 rows of a warp from shared memory, as the registers of the operand's other form.
void load_a(const u8* shared, const Descriptor& matrix, u32 warp, u32 (&registers)[4][LANES]) {
  for (u32 reg = 0; reg < 4; ++reg) {
    const u32 octet = 2 * warp + (reg & 1), chunk = reg >> 1;  // eight rows
    if (matrix.k_major) {
      for (u32 row = 0; row < 8; ++row) memcpy(registers[reg] + 4 * row, shared + matrix.address_of(8 * octet + row, chunk), 16);
    } else {
      Octet pieces[8];
      for (u32 k = 0; k < 8; ++k) memcpy(&pieces[k], shared + matrix.address_of(8 * chunk + k, octet), 16);
      transpose(pieces);
      memcpy(registers[reg], pieces, ROW_BYTES);
    }
  }
}

// Value `index` of 16 words.
template <Input INPUT> SIM_INLINE void convert(const Quad<u32> (&words)[4], int index, Quad<f32> (&to)[4]) {
  constexpr int VECTORS = 64 / VECTOR_BYTES;
  Vec<u32> vectors[VECTORS];
  memcpy(vectors, words, 64);
  for (Vec<u32>& vector : vectors) vector = as<u32>(value_at<INPUT>(vector, index));
  memcpy(to, vectors, 64);
}

template <Input B> void expand_b(ExpandedB<B>& to, const u8* shared, const Descriptor& matrix, u32 tile) {
  Quad<u32> words[4];
  for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
    if (matrix.k_major) {
      for (u32 odd = 0; odd < 2; ++odd) {
        for (u32 i = 0; i < 4; ++i) memcpy(&words[i], shared + matrix.address_of(8 * tile + 2 * i + odd, chunk), 16);
        transpose(words);
        for (int i = 0; i < VALUES<B>; ++i) convert<B>(words, i, to.columns[odd][chunk][i]);
      }
    } else if constexpr (VALUES<B> == 2) {
      for (u32 i = 0; i < 2; ++i) {
        for (u32 q = 0; q < 4; ++q) memcpy(&words[q], shared + matrix.address_of(8 * chunk + 2 * q + i, tile), 16);
        for (int odd = 0; odd < 2; ++odd) convert<B>(words, odd, to.columns[odd][chunk][i]);
      }
    }
  }
}

template <Input A, Input B> SIM_INLINE void multiply_tile(const ExpandedA<A>& a, const ExpandedB<B>& b, HalfTile (&sum)[2]) {
  static_assert(VALUES<A> == VALUES<B>);
  // As many accumulators at a time as leave registers for A and B.
  constexpr int HALVES_AT_ONCE = VECTOR_BYTES == 64 ? 2 : 1;
  for (int first = 0; first < 2; first += HALVES_AT_ONCE) {
    HalfTile here[HALVES_AT_ONCE];
    memcpy(here, sum + first, sizeof here);
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
      SIM_UNROLL for (int q = 0; q < 4; ++q) {
        SIM_UNROLL for (int i = 0; i < VALUES<A>; ++i) {
          const Vec<f32> even = repeat<f32>(b.columns[0][chunk][i][q]), odd = repeat<f32>(b.columns[1][chunk][i][q]);
          SIM_UNROLL for (int half = 0; half < HALVES_AT_ONCE; ++half) {
            SIM_UNROLL for (int p = 0; p < HALF_PARTS; ++p) {
              const Vec<f32> rows = a.rows[chunk][i][q][first + half][p];
              here[half][0][p] = multiply_accumulate(rows, even, here[half][0][p]);
              here[half][1][p] = multiply_accumulate(rows, odd, here[half][1][p]);
            }
          }
        }
      }
    }
    memcpy(sum + first, here, sizeof here);
  }
}

}  // namespace

std::vector<Range> ranges_of(const Descriptor& matrix, u32 first, u32 count) {
  std::vector<u32> pieces;
  if (matrix.k_major) {
    for (u32 row = 0; row < count; ++row) {
      for (u32 chunk = 0; chunk < CHUNKS; ++chunk) pieces.push_back(matrix.address_of(first + row, chunk));
    }
  } else {
    for (u32 k = 0; k < 16; ++k) {
      for (u32 octet = 0; octet < count / 8; ++octet) pieces.push_back(matrix.address_of(k, first / 8 + octet));
    }
  }
  std::sort(pieces.begin(), pieces.end());
  std::vector<Range> ranges;
  for (u32 address : pieces) {
    if (!ranges.empty() && ranges.back().begin + ranges.back().bytes == address) ranges.back().bytes += 16;
    else if (ranges.empty() || ranges.back().begin + ranges.back().bytes < address) ranges.push_back({address, 16});
  }
  return ranges;
}

template <Input A, Input B, Accumulator TYPE> void multiply_warpgroup(const Product& product, Warp* warps) {
  using L = WgmmaLayout;
  const u16* extra = warps[0].extra + product.in->x;
  const u8* shared = warps[0].cta->shared;
  const u32 flags = extra[L::FLAGS], tiles = extra[L::N] / 8;
  const Descriptor matrix_a(product.descriptor_a, flags & L::A_TRANSPOSED), matrix_b(product.descriptor_b, flags & L::B_TRANSPOSED);
  ExpandedB<B> b[MAX_TILES];
  for (u32 tile = 0; tile < tiles; ++tile) expand_b<B>(b[tile], shared, matrix_b, tile);
  for (u32 w = 0; w < WARPGROUP; ++w) {
    const Warp& warp = warps[w];
    alignas(64) u32 loaded[4][LANES];
    const u32* registers[4];
    if (!(flags & L::A_IN_REGISTERS)) load_a(shared, matrix_a, w, loaded);
    for (u32 i = 0; i < 4; ++i) registers[i] = flags & L::A_IN_REGISTERS ? warp.row<u32>(extra[L::A + i]) : loaded[i];
    ExpandedA<A> a;
    expand_a<A>(a, registers, flags & L::NEGATED);
    for (u32 tile = 0; tile < tiles; ++tile) {
      const u16* d = extra + L::D + tile * C_REGISTERS<TYPE>;
      HalfTile sum[2] = {};
      if (product.accumulates) {
        for (int half = 0; half < 2; ++half) read_tile<TYPE>(warp, d, half, sum[half]);
      }
      multiply_tile<A, B>(a, b[tile], sum);
      for (int half = 0; half < 2; ++half) write_tile<TYPE>(warp, d, half, sum[half]);
    }
  }
}

template void multiply_warpgroup<Input::F16, Input::F16, Accumulator::F32>(const Product&, Warp*);
template void multiply_warpgroup<Input::F16, Input::F16, Accumulator::F16>(const Product&, Warp*);
template void multiply_warpgroup<Input::BF16, Input::BF16, Accumulator::F32>(const Product&, Warp*);
template void multiply_warpgroup<Input::TF32, Input::TF32, Accumulator::F32>(const Product&, Warp*);
template void multiply_warpgroup<Input::E4M3, Input::E4M3, Accumulator::F32>(const Product&, Warp*);
template void multiply_warpgroup<Input::E4M3, Input::E5M2, Accumulator::F32>(const Product&, Warp*);
template void multiply_warpgroup<Input::E5M2, Input::E4M3, Accumulator::F32>(const Product&, Warp*);
template void multiply_warpgroup<Input::E5M2, Input::E5M2, Accumulator::F32>(const Product&, Warp*);
template void multiply_warpgroup<Input::E4M3, Input::E4M3, Accumulator::F16>(const Product&, Warp*);
template void multiply_warpgroup<Input::E4M3, Input::E5M2, Accumulator::F16>(const Product&, Warp*);
template void multiply_warpgroup<Input::E5M2, Input::E4M3, Accumulator::F16>(const Product&, Warp*);
template void multiply_warpgroup<Input::E5M2, Input::E5M2, Accumulator::F16>(const Product&, Warp*);

}  // namespace sim
