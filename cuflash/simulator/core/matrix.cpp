// mma.sync of all floats but f64: D = A B + C of one warp, for m16n8 and a depth of 4 to 32.
//
// Contract: fragments lie as in the PTX ISA ("Matrix Fragments for mma.m16n8k…"). With g = lane / 4 and q = lane % 4, an accumulator
// register holds column 2q or 2q + 1 of row g or g + 8, so a register of 32 lanes is 8 rows of four even or odd columns. C stays in that
// layout: the loop over k multiplies A[g][k], repeated over q, by B[k][columns], repeated over g. Products are summed in f32 in the order
// of k; a product of two f16, bf16, tf32 or 8-bit numbers is exact in f32. `extra` at x holds the rows of the operands in PTX order.
#include "matrix.h"

#include "table.h"

namespace sim {
namespace {

template <Input INPUT, int K> constexpr int KIND = int(INPUT) * 64 + K;
template <Input INPUT, int K> constexpr int A_REGISTERS = K * 2 / 4 / VALUES<INPUT>;
template <Input INPUT, int K> constexpr int B_REGISTERS = K / 4 / VALUES<INPUT>;

// Copies the registers if they differ from those of the last call.
template <int COUNT> SIM_INLINE bool same_source(u32 (*source)[LANES], const u32* const (&rows)[COUNT]) {
  Vec<u32> different{};
  for (int i = 0; i < COUNT; ++i) {
    for (int part = 0; part < PARTS<u32>; ++part) {
      Vec<u32>& held = ((Vec<u32>*)source[i])[part];
      const Vec<u32> now = ((const Vec<u32>*)rows[i])[part];
      different |= held ^ now;
      held = now;
    }
  }
  return collect(different != 0u) == 0;
}

// A register r holds rows g + 8 (r % 2), columns VALUES * (4 (r / 2) + q) onward.
template <Input INPUT, int K, int Q> SIM_INLINE void expand_a_quarter(MatrixScratch& scratch, int reg, int part, Vec<u32> words) {
  const Vec<u32> repeated = broadcast_in_quads<Q>(words);
  const int k = VALUES<INPUT> * (4 * (reg >> 1) + Q);
  for (int i = 0; i < VALUES<INPUT>; ++i) scratch.a[k + i][reg & 1][part] = value_at<INPUT>(repeated, i);
}
template <Input INPUT, int K> SIM_INLINE void expand_a(MatrixScratch& scratch, const u32* const (&rows)[A_REGISTERS<INPUT, K>]) {
  const bool same = same_source(scratch.a_source, rows);
  if (same && scratch.a_kind == KIND<INPUT, K>) return;
  scratch.a_kind = KIND<INPUT, K>;
  SIM_UNROLL for (int reg = 0; reg < A_REGISTERS<INPUT, K>; ++reg) {
    SIM_UNROLL for (int part = 0; part < PARTS<u32>; ++part) {
      const Vec<u32> words = ((const Vec<u32>*)rows[reg])[part];
      expand_a_quarter<INPUT, K, 0>(scratch, reg, part, words);
      expand_a_quarter<INPUT, K, 1>(scratch, reg, part, words);
      expand_a_quarter<INPUT, K, 2>(scratch, reg, part, words);
      expand_a_quarter<INPUT, K, 3>(scratch, reg, part, words);
    }
  }
}

// B register r: lane 4n + q holds column n, rows VALUES * (4 r + q) onward.
template <Input INPUT, int K> SIM_INLINE void expand_b(MatrixScratch& scratch, const u32* const (&rows)[B_REGISTERS<INPUT, K>]) {
  const bool same = same_source(scratch.b_source, rows);
  if (same && scratch.b_kind == KIND<INPUT, K>) return;
  scratch.b_kind = KIND<INPUT, K>;
  SIM_UNROLL for (int reg = 0; reg < B_REGISTERS<INPUT, K>; ++reg) {
    SIM_UNROLL for (int odd = 0; odd < 2; ++odd) {
      Quad<u32> columns[4];  // of columns odd, odd + 2, …; after the transposition of rows
      for (int i = 0; i < 4; ++i) memcpy(&columns[i], rows[reg] + 4 * (2 * i + odd), 16);
      transpose(columns);
      SIM_UNROLL for (int q = 0; q < 4; ++q) {
        const Vec<u32> repeated = repeat<u32>(columns[q]);
        const int k = VALUES<INPUT> * (4 * reg + q);
        for (int i = 0; i < VALUES<INPUT>; ++i) scratch.b[k + i][odd] = value_at<INPUT>(repeated, i);
      }
    }
  }
}

// As many accumulators at a time as leave registers for A and B.
constexpr int HALVES_AT_ONCE = VECTOR_BYTES == 64 ? 2 : 1;

template <int K> SIM_INLINE void multiply(const MatrixScratch& scratch, int first, HalfTile* tiles) {
  Vec<f32> sum[HALVES_AT_ONCE][2][HALF_PARTS];
  memcpy(sum, tiles, sizeof sum);
  SIM_UNROLL_4 for (int k = 0; k < K; ++k) {
    const Vec<f32> b_even = scratch.b[k][0], b_odd = scratch.b[k][1];
    SIM_UNROLL for (int half = 0; half < HALVES_AT_ONCE; ++half) {
      SIM_UNROLL for (int p = 0; p < HALF_PARTS; ++p) {
        const Vec<f32> a = scratch.a[k][first + half][p];
        sum[half][0][p] = multiply_accumulate(a, b_even, sum[half][0][p]);
        sum[half][1][p] = multiply_accumulate(a, b_odd, sum[half][1][p]);
      }
    }
  }
  memcpy(tiles, sum, sizeof sum);
}

template <Input A, Input B, int K, Accumulator TYPE> const Record* matrix_multiply(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  const u16* extra = warp.extra + in->x;
  const u16* d = extra;
  const u16* a = d + C_REGISTERS<TYPE>;
  const u16* b = a + A_REGISTERS<A, K>;
  const u16* c = b + B_REGISTERS<B, K>;
  MatrixScratch& scratch = *warp.cta->matrix;
  const u32* a_rows[A_REGISTERS<A, K>];
  const u32* b_rows[B_REGISTERS<B, K>];
  for (int i = 0; i < A_REGISTERS<A, K>; ++i) a_rows[i] = warp.row<u32>(a[i]);
  for (int i = 0; i < B_REGISTERS<B, K>; ++i) b_rows[i] = warp.row<u32>(b[i]);
  expand_a<A, K>(scratch, a_rows);
  expand_b<B, K>(scratch, b_rows);
  HalfTile tiles[2];  // all of C is read before D is written: they may share registers in another order
  for (int half = 0; half < 2; ++half) read_tile<TYPE>(warp, c, half, tiles[half]);
  for (int half = 0; half < 2; half += HALVES_AT_ONCE) multiply<K>(scratch, half, tiles + half);
  for (int half = 0; half < 2; ++half) write_tile<TYPE>(warp, d, half, tiles[half]);
  CounterValues& counters = warp.cta->counters;
  ++counters.matrix_instructions;
  counters.matrix_flops += 2 * 16 * 8 * K;
  return in + 1;
}

template <Input INPUT, int K, Accumulator TYPE> constexpr Handler same_inputs = matrix_multiply<INPUT, INPUT, K, TYPE>;

template <int K, Accumulator TYPE> void register_fp8(Table& table, const std::string& stem) {
  table.add(stem + ".e4m3.e4m3", "", matrix_multiply<Input::E4M3, Input::E4M3, K, TYPE>);
  table.add(stem + ".e4m3.e5m2", "", matrix_multiply<Input::E4M3, Input::E5M2, K, TYPE>);
  table.add(stem + ".e5m2.e4m3", "", matrix_multiply<Input::E5M2, Input::E4M3, K, TYPE>);
  table.add(stem + ".e5m2.e5m2", "", matrix_multiply<Input::E5M2, Input::E5M2, K, TYPE>);
}

}  // namespace

// Names: shape, accumulator, inputs; of 8 bits both.
void register_matrix(Table& table) {
  table.family(Class::MATRIX);
  table.add("mma.m16n8k8.f32.f16", "", same_inputs<Input::F16, 8, Accumulator::F32>);
  table.add("mma.m16n8k16.f32.f16", "", same_inputs<Input::F16, 16, Accumulator::F32>);
  table.add("mma.m16n8k8.f16.f16", "", same_inputs<Input::F16, 8, Accumulator::F16>);
  table.add("mma.m16n8k16.f16.f16", "", same_inputs<Input::F16, 16, Accumulator::F16>);
  table.add("mma.m16n8k8.f32.bf16", "", same_inputs<Input::BF16, 8, Accumulator::F32>);
  table.add("mma.m16n8k16.f32.bf16", "", same_inputs<Input::BF16, 16, Accumulator::F32>);
  table.add("mma.m16n8k4.f32.tf32", "", same_inputs<Input::TF32, 4, Accumulator::F32>);
  table.add("mma.m16n8k8.f32.tf32", "", same_inputs<Input::TF32, 8, Accumulator::F32>);
  register_fp8<16, Accumulator::F32>(table, "mma.m16n8k16.f32");
  register_fp8<16, Accumulator::F16>(table, "mma.m16n8k16.f16");
  register_fp8<32, Accumulator::F32>(table, "mma.m16n8k32.f32");
  register_fp8<32, Accumulator::F16>(table, "mma.m16n8k32.f16");
}

}  // namespace sim
