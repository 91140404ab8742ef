// ldmatrix, stmatrix and movmatrix: 8x8 matrices of 16-bit elements between shared memory and fragments.
//
// Contract: lane 8j + i gives the address of row i of matrix j. In a fragment, lane 4i + q holds elements 2q and 2q + 1 of row i, so the 32
// lanes of a register are the eight rows one after the other. `extra` at x: offset (two halves), then the registers.
#include "access.h"
#include "table.h"

namespace sim {
namespace {

// Pointers to the rows of COUNT matrices.
template <int COUNT> SIM_INLINE void resolve_rows(Warp& warp, const Record* in, Access access, const char* what, Pointers& rows) {
  constexpr u32 LANES_USED = COUNT == 4 ? ALL_LANES : (1u << (8 * COUNT)) - 1;
  const Address address{in->a, (in->c & ADDRESS_64) != 0, offset_at(warp.extra + in->x)};
  resolve(warp, in, Space(in->c & 7), LANES_USED, address, {access, 16, 16, what}, rows);
}

template <int COUNT, bool TRANSPOSED> const Record* load_matrix(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  Pointers from;
  resolve_rows<COUNT>(warp, in, Access::READ, "row of ldmatrix", from);
  Octet matrices[COUNT][8];  // all are read before a register is written: the address may be one of them
  for (int j = 0; j < COUNT; ++j) {
    for (int i = 0; i < 8; ++i) memcpy(&matrices[j][i], from.lane[8 * j + i], 16);
    if (TRANSPOSED) transpose(matrices[j]);
  }
  const u16* registers = warp.extra + in->x + 2;
  for (int j = 0; j < COUNT; ++j) memcpy(warp.row<u8>(registers[j]), matrices[j], ROW_BYTES);
  return in + 1;
}

template <int COUNT, bool TRANSPOSED> const Record* store_matrix(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  Pointers to;
  resolve_rows<COUNT>(warp, in, Access::WRITE, "row of stmatrix", to);
  const u16* registers = warp.extra + in->x + 2;
  for (int j = 0; j < COUNT; ++j) {
    Octet matrix[8];
    memcpy(matrix, warp.row<u8>(registers[j]), ROW_BYTES);
    if (TRANSPOSED) transpose(matrix);
    for (int i = 0; i < 8; ++i) memcpy(to.lane[8 * j + i], &matrix[i], 16);
  }
  return in + 1;
}

const Record* move_matrix(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  if (SIM_UNLIKELY(mask != ALL_LANES)) {
    if (mask == 0) return in + 1;
    return warp.wait_for_lanes(in, ALL_LANES);
  }
  Octet matrix[8];
  memcpy(matrix, warp.row<u8>(in->a), ROW_BYTES);
  transpose(matrix);
  memcpy(warp.row<u8>(in->d), matrix, ROW_BYTES);
  return in + 1;
}

}  // namespace

void register_ldmatrix(Table& table) {
  table.family(Class::MEMORY);
  table.add("ldmatrix.x1", "", load_matrix<1, false>);
  table.add("ldmatrix.x2", "", load_matrix<2, false>);
  table.add("ldmatrix.x4", "", load_matrix<4, false>);
  table.add("ldmatrix.x1.trans", "", load_matrix<1, true>);
  table.add("ldmatrix.x2.trans", "", load_matrix<2, true>);
  table.add("ldmatrix.x4.trans", "", load_matrix<4, true>);
  table.add("stmatrix.x1", "", store_matrix<1, false>);
  table.add("stmatrix.x2", "", store_matrix<2, false>);
  table.add("stmatrix.x4", "", store_matrix<4, false>);
  table.add("stmatrix.x1.trans", "", store_matrix<1, true>);
  table.add("stmatrix.x2.trans", "", store_matrix<2, true>);
  table.add("stmatrix.x4.trans", "", store_matrix<4, true>);
  table.add("movmatrix.m8n8.trans.b16", "d32 a32", move_matrix, Class::MOVE);
}

}  // namespace sim
