// mma.sync of integers of 8 and 4 bits and of f64: D = A B + C of one warp, number by number.
//
// Contract: fragments lie as in the PTX ISA ("Matrix Fragments for mma.…"). With g = lane / 4 and q = lane % 4, and VALUES numbers of k in a
// register, register r of A holds row g + 8 (r % 2), where there are 16 rows, and k from VALUES (4 (r / 2) + q) on; register r of B holds column g
// and k from VALUES (4 r + q) on; register r of C holds row g + 8 (r / 2) and column 2 q + r % 2. `extra` at x holds the rows of the operands in PTX
// order. Integers are exact and wrap around or saturate once, at the end; f64 is summed in the order of k by fused multiply-adds.
#include <algorithm>
#include <cmath>
#include <limits>

#include "table.h"

namespace sim {
namespace {

constexpr int COLUMNS = 8;
constexpr u16 A_SIGNED = 1, B_SIGNED = 2, SATURATES = 4;  // in field c

struct Float64 {
  using Register = f64;
  using Number = f64;
  static constexpr int VALUES = 1;
  static Number value(Register word, int, bool) { return word; }
  static Number multiply_add(Number a, Number b, Number c) { return std::fma(a, b, c); }
  using Result = f64;
  static Result result(Number sum, bool) { return sum; }
};

template <int BITS> struct Integer {
  using Register = u32;
  using Number = i64;
  static constexpr int VALUES = 32 / BITS;
  static Number value(Register word, int index, bool is_signed) {
    const u32 top = word << (32 - BITS * (index + 1));
    return is_signed ? Number(i32(top) >> (32 - BITS)) : Number(top >> (32 - BITS));
  }
  static Number multiply_add(Number a, Number b, Number c) { return a * b + c; }
  using Result = i32;
  static Result result(Number sum, bool saturates) {
    if (saturates) sum = std::clamp<i64>(sum, std::numeric_limits<i32>::min(), std::numeric_limits<i32>::max());
    return Result(u32(u64(sum)));
  }
};

template <class Type, int ROWS, int K> const Record* multiply(Warp& warp, const Record* in) {
  using Number = typename Type::Number;
  using Register = typename Type::Register;
  using Result = typename Type::Result;
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  constexpr int VALUES = Type::VALUES, TALL = ROWS / 8;  // registers of A with the same k
  constexpr int IN_A = ROWS * K / LANES / VALUES, IN_B = K * COLUMNS / LANES / VALUES, IN_C = ROWS * COLUMNS / LANES;
  const u16* const d = warp.extra + in->x;
  const u16* const a_rows = d + IN_C;
  const u16* const b_rows = a_rows + IN_A;
  const u16* const c_rows = b_rows + IN_B;
  Number a[ROWS][K], b[K][COLUMNS], sum[ROWS][COLUMNS];
  for (int lane = 0; lane < LANES; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < IN_A; ++r) {
      const Register word = warp.row<Register>(a_rows[r])[lane];
      for (int i = 0; i < VALUES; ++i) a[g + 8 * (r % TALL)][VALUES * (4 * (r / TALL) + q) + i] = Type::value(word, i, in->c & A_SIGNED);
    }
    for (int r = 0; r < IN_B; ++r) {
      const Register word = warp.row<Register>(b_rows[r])[lane];
      for (int i = 0; i < VALUES; ++i) b[VALUES * (4 * r + q) + i][g] = Type::value(word, i, in->c & B_SIGNED);
    }
    for (int r = 0; r < IN_C; ++r) sum[g + 8 * (r / 2)][2 * q + r % 2] = warp.row<Result>(c_rows[r])[lane];
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < COLUMNS; ++column) sum[row][column] = Type::multiply_add(a[row][k], b[k][column], sum[row][column]);
    }
  }
  for (int lane = 0; lane < LANES; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < IN_C; ++r) warp.row<Result>(d[r])[lane] = Type::result(sum[g + 8 * (r / 2)][2 * q + r % 2], in->c & SATURATES);
  }
  CounterValues& counters = warp.cta->counters;
  ++counters.matrix_instructions;
  counters.matrix_flops += 2 * ROWS * COLUMNS * K;
  return in + 1;
}

}  // namespace

// Names: shape and bits of the inputs.
void register_scalar_matrix(Table& table) {
  table.family(Class::MATRIX);
  table.add("mma.m8n8k16.8bit", "", multiply<Integer<8>, 8, 16>);
  table.add("mma.m16n8k16.8bit", "", multiply<Integer<8>, 16, 16>);
  table.add("mma.m16n8k32.8bit", "", multiply<Integer<8>, 16, 32>);
  table.add("mma.m8n8k32.4bit", "", multiply<Integer<4>, 8, 32>);
  table.add("mma.m16n8k32.4bit", "", multiply<Integer<4>, 16, 32>);
  table.add("mma.m16n8k64.4bit", "", multiply<Integer<4>, 16, 64>);
  table.add("mma.m8n8k4.f64", "", multiply<Float64, 8, 4>);
  table.add("mma.m16n8k4.f64", "", multiply<Float64, 16, 4>);
  table.add("mma.m16n8k8.f64", "", multiply<Float64, 16, 8>);
  table.add("mma.m16n8k16.f64", "", multiply<Float64, 16, 16>);
}

}  // namespace sim
