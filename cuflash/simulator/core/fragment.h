// What mma.sync and wgmma share: values in the registers of a fragment, and accumulators.
//
// Contract: with g = lane / 4 and q = lane % 4, an accumulator register of f32 holds column 2q or 2q + 1 of row g or g + 8, so a register of 32
// lanes is 8 rows of four even or odd columns; a register of f16 holds both columns. Operand registers hold VALUES consecutive values of k.
#pragma once

#include "fp8.h"
#include "machine.h"

namespace sim {

enum class Input { F16, BF16, TF32, E4M3, E5M2 };
enum class Accumulator { F32, F16 };

template <Input INPUT> constexpr int VALUES = INPUT == Input::TF32 ? 1 : INPUT == Input::E4M3 || INPUT == Input::E5M2 ? 4 : 2;  // per 32 bits

// Value `index` of the lanes' words as floats.
template <Input INPUT> SIM_INLINE Vec<f32> value_at(Vec<u32> words, int index) {
  if constexpr (INPUT == Input::TF32) return as<f32>(words & 0xffffe000u);
  else if constexpr (INPUT == Input::BF16) return as<f32>(index ? words & 0xffff0000u : words << 16);
  else if constexpr (INPUT == Input::F16) return f16_to_f32(index ? words >> 16 : words & 0xffffu);
  else if constexpr (INPUT == Input::E4M3) return e4m3_to_f32(words >> u32(8 * index));
  else return e5m2_to_f32(words >> u32(8 * index));
}

constexpr int HALF_PARTS = PARTS<f32>;  // vectors that hold a register of 32 lanes: 8 rows of 4 even or odd columns

using HalfTile = Vec<f32>[2][HALF_PARTS];  // [even or odd columns]: 8 rows and 8 columns of the accumulator

template <Accumulator TYPE> constexpr int C_REGISTERS = TYPE == Accumulator::F32 ? 4 : 2;  // of 16 rows and 8 columns

// Reads rows g + 8 half of the accumulator.
template <Accumulator TYPE> SIM_INLINE void read_tile(const Warp& warp, const u16* rows, int half, HalfTile& tile) {
  for (int p = 0; p < HALF_PARTS; ++p) {
    if constexpr (TYPE == Accumulator::F32) {
      tile[0][p] = warp.row<Vec<f32>>(rows[2 * half])[p];
      tile[1][p] = warp.row<Vec<f32>>(rows[2 * half + 1])[p];
    } else {
      const Vec<u32> pair = warp.row<Vec<u32>>(rows[half])[p];
      tile[0][p] = f16_to_f32(pair & 0xffffu);
      tile[1][p] = f16_to_f32(pair >> 16);
    }
  }
}
template <Accumulator TYPE> SIM_INLINE void write_tile(const Warp& warp, const u16* rows, int half, const HalfTile& tile) {
  for (int p = 0; p < HALF_PARTS; ++p) {
    if constexpr (TYPE == Accumulator::F32) {
      warp.row<Vec<f32>>(rows[2 * half])[p] = tile[0][p];
      warp.row<Vec<f32>>(rows[2 * half + 1])[p] = tile[1][p];
    } else {
      warp.row<Vec<u32>>(rows[half])[p] = f32_to_f16(tile[0][p]) | f32_to_f16(tile[1][p]) << 16;
    }
  }
}

}  // namespace sim
