// Integer and logic instructions of 16 and 32 bits.
#include <algorithm>

#include "integer.h"

namespace sim {
namespace {

// lop3: bit i of the table says the result for inputs (a, b, c) = the bits of i, a highest.
const Record* lop3(Warp& warp, const Record* in) {
  using V = Vec<u32>;
  const u32 mask = warp.mask(in);
  const V* a = warp.row<V>(in->a);
  const V* b = warp.row<V>(in->b);
  const V* c = warp.row<V>(in->c);
  V* d = warp.row<V>(in->d);
  for (int part = 0; part < PARTS<u32>; ++part) {
    V result{};
    for (int i = 0; i < 8; ++i) {
      if (!(in->x >> i & 1)) continue;
      result |= (i & 4 ? a[part] : ~a[part]) & (i & 2 ? b[part] : ~b[part]) & (i & 1 ? c[part] : ~c[part]);
    }
    d[part] = select(mask, part, result, d[part]);
  }
  return in + 1;
}

void register_arithmetic(Table& table) {
  const auto add = [](auto a, auto b) { return a + b; };
  const auto sub = [](auto a, auto b) { return a - b; };
  const auto mul = [](auto a, auto b) { return a * b; };
  const auto mad = [](auto a, auto b, auto c) { return a * b + c; };
  const auto min = [](auto a, auto b) { return a < b ? a : b; };
  const auto max = [](auto a, auto b) { return a > b ? a : b; };
  table.add("add.s32 add.u32", "d32 a32 b32", map<u32>(add));
  table.add("sub.s32 sub.u32", "d32 a32 b32", map<u32>(sub));
  table.add("mul.lo.s32 mul.lo.u32", "d32 a32 b32", map<u32>(mul));
  table.add("mad.lo.s32 mad.lo.u32", "d32 a32 b32 c32", map<u32>(mad));
  table.add("min.s32", "d32 a32 b32", map<i32>(min));
  table.add("max.s32", "d32 a32 b32", map<i32>(max));
  table.add("min.u32", "d32 a32 b32", map<u32>(min));
  table.add("max.u32", "d32 a32 b32", map<u32>(max));
  table.add("neg.s32", "d32 a32", map<u32>([](auto a) { return -a; }));
  table.add("abs.s32", "d32 a32", map<i32>([](auto a) { return a < 0 ? -a : a; }));
  table.add("min.relu.s32", "d32 a32 b32", each<i32, i32, i32>([](i32 a, i32 b) { return std::max(0, std::min(a, b)); }));
  table.add("max.relu.s32", "d32 a32 b32", each<i32, i32, i32>([](i32 a, i32 b) { return std::max(0, std::max(a, b)); }));
  table.add("add.sat.s32", "d32 a32 b32", each<i32, i32, i32>([](i32 a, i32 b) {
              const i64 sum = i64(a) + b;
              return i32(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
            }));
  table.add("sub.sat.s32", "d32 a32 b32", each<i32, i32, i32>([](i32 a, i32 b) {
              const i64 sum = i64(a) - b;
              return i32(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
            }));
  table.add("mul.hi.s32", "d32 a32 b32", each<i32, i32, i32>([](i32 a, i32 b) { return i32((i64(a) * b) >> 32); }));
  table.add("mul.hi.u32", "d32 a32 b32", each<u32, u32, u32>([](u32 a, u32 b) { return u32((u64(a) * b) >> 32); }));
  table.add("mad.hi.s32", "d32 a32 b32 c32", each<i32, i32, i32, i32>([](i32 a, i32 b, i32 c) { return i32((i64(a) * b) >> 32) + c; }));
  table.add("mad.hi.u32", "d32 a32 b32 c32", each<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return u32((u64(a) * b) >> 32) + c; }));
  table.add("mul24.lo.s32", "d32 a32 b32", each<i32, i32, i32>([](i32 a, i32 b) { return i32((i64(a << 8 >> 8)) * (b << 8 >> 8)); }));
  table.add("mul24.lo.u32", "d32 a32 b32", each<u32, u32, u32>([](u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }));
  table.add("div.s32", "d32 a32 b32", each<i32, i32, i32>([](i32 a, i32 b) { return divide(a, b); }));
  table.add("div.u32", "d32 a32 b32", each<u32, u32, u32>([](u32 a, u32 b) { return divide(a, b); }));
  table.add("rem.s32", "d32 a32 b32", each<i32, i32, i32>([](i32 a, i32 b) { return remainder(a, b); }));
  table.add("rem.u32", "d32 a32 b32", each<u32, u32, u32>([](u32 a, u32 b) { return remainder(a, b); }));
  table.add("sad.s32", "d32 a32 b32 c32", each<i32, i32, i32, i32>([](i32 a, i32 b, i32 c) { return absolute_difference(a, b, c); }));
  table.add("sad.u32", "d32 a32 b32 c32", each<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return absolute_difference(a, b, c); }));
}

void register_bits(Table& table) {
  table.add("and.b32", "d32 a32 b32", map<u32>([](auto a, auto b) { return a & b; }));
  table.add("or.b32", "d32 a32 b32", map<u32>([](auto a, auto b) { return a | b; }));
  table.add("xor.b32", "d32 a32 b32", map<u32>([](auto a, auto b) { return a ^ b; }));
  table.add("not.b32", "d32 a32", map<u32>([](auto a) { return ~a; }));
  table.add("cnot.b32", "d32 a32", each<u32, u32>([](u32 a) { return u32(a == 0); }));
  table.add("shl.b32", "d32 a32 b32", map<u32>([](auto a, auto b) { return (a << (b & 31u)) & as<u32>(b < 32u); }));
  table.add("shr.u32 shr.b32", "d32 a32 b32", map<u32>([](auto a, auto b) { return (a >> (b & 31u)) & as<u32>(b < 32u); }));
  table.add("shr.s32", "d32 a32 b32", map<i32>([](auto a, auto b) { return a >> (as<u32>(b) > 31u ? splat(31) : b); }));
  table.add("lop3.b32", "d32 a32 b32 c32 xi", lop3);
  table.add("shf.l.wrap.b32", "d32 a32 b32 c32",
            each<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) << (c & 31) >> 32); }));
  table.add("shf.r.wrap.b32", "d32 a32 b32 c32", each<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (c & 31)); }));
  table.add("shf.l.clamp.b32", "d32 a32 b32 c32",
            each<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) << (c < 32 ? c : 32) >> 32); }));
  table.add("shf.r.clamp.b32", "d32 a32 b32 c32",
            each<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (c < 32 ? c : 32)); }));
  table.add("prmt.b32", "d32 a32 b32 c32", each<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute_bytes(a, b, c); }));
  table.add("bfe.s32", "d32 a32 b32 c32", each<i32, i32, u32, u32>([](i32 a, u32 b, u32 c) { return extract_field(a, b, c); }));
  table.add("bfe.u32", "d32 a32 b32 c32", each<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return extract_field(a, b, c); }));
  table.add("bfi.b32", "d32 a32 b32 c32 x32", each<u32, u32, u32, u32, u32>([](u32 a, u32 b, u32 c, u32 d) { return insert_field(a, b, c, d); }));
  table.add("popc.b32", "d32 a32", each<u32, u32>([](u32 a) { return u32(__builtin_popcount(a)); }));
  table.add("clz.b32", "d32 a32", each<u32, u32>([](u32 a) { return leading_zeros(a); }));
  table.add("brev.b32", "d32 a32", each<u32, u32>([](u32 a) { return reverse_bits(a); }));
  table.add("bfind.s32", "d32 a32", each<u32, i32>([](i32 a) { return find_bit<i32, false>(a); }));
  table.add("bfind.u32", "d32 a32", each<u32, u32>([](u32 a) { return find_bit<u32, false>(a); }));
  table.add("bfind.shiftamt.s32", "d32 a32", each<u32, i32>([](i32 a) { return find_bit<i32, true>(a); }));
  table.add("bfind.shiftamt.u32", "d32 a32", each<u32, u32>([](u32 a) { return find_bit<u32, true>(a); }));
  table.add("mov.b32 mov.u32 mov.s32 mov.f32 mov.b16 mov.u16 mov.s16", "d32 a32", map<u32>([](auto a) { return a; }), Class::MOVE);
}

// 16-bit registers are 32-bit rows whose upper half means nothing.
void register_short(Table& table) {
  table.add("add.s16 add.u16", "d32 a32 b32", each<u16, u16, u16>([](u16 a, u16 b) { return u16(a + b); }));
  table.add("sub.s16 sub.u16", "d32 a32 b32", each<u16, u16, u16>([](u16 a, u16 b) { return u16(a - b); }));
  table.add("mul.lo.s16 mul.lo.u16", "d32 a32 b32", each<u16, u16, u16>([](u16 a, u16 b) { return u16(u32(a) * b); }));
  table.add("mul.hi.s16", "d32 a32 b32", each<i16, i16, i16>([](i16 a, i16 b) { return i16((a * b) >> 16); }));
  table.add("mul.hi.u16", "d32 a32 b32", each<u16, u16, u16>([](u16 a, u16 b) { return u16((u32(a) * b) >> 16); }));
  table.add("mul.wide.s16", "d32 a32 b32", each<i32, i16, i16>([](i16 a, i16 b) { return a * b; }));
  table.add("mul.wide.u16", "d32 a32 b32", each<u32, u16, u16>([](u16 a, u16 b) { return u32(a) * b; }));
  table.add("mad.lo.s16 mad.lo.u16", "d32 a32 b32 c32", each<u16, u16, u16, u16>([](u16 a, u16 b, u16 c) { return u16(u32(a) * b + c); }));
  table.add("mad.wide.s16", "d32 a32 b32 c32", each<i32, i16, i16, i32>([](i16 a, i16 b, i32 c) { return a * b + c; }));
  table.add("mad.wide.u16", "d32 a32 b32 c32", each<u32, u16, u16, u32>([](u16 a, u16 b, u32 c) { return u32(a) * b + c; }));
  table.add("div.s16", "d32 a32 b32", each<i16, i16, i16>([](i16 a, i16 b) { return divide(a, b); }));
  table.add("div.u16", "d32 a32 b32", each<u16, u16, u16>([](u16 a, u16 b) { return divide(a, b); }));
  table.add("rem.s16", "d32 a32 b32", each<i16, i16, i16>([](i16 a, i16 b) { return remainder(a, b); }));
  table.add("rem.u16", "d32 a32 b32", each<u16, u16, u16>([](u16 a, u16 b) { return remainder(a, b); }));
  table.add("min.s16", "d32 a32 b32", each<i16, i16, i16>([](i16 a, i16 b) { return a < b ? a : b; }));
  table.add("max.s16", "d32 a32 b32", each<i16, i16, i16>([](i16 a, i16 b) { return a > b ? a : b; }));
  table.add("min.u16", "d32 a32 b32", each<u16, u16, u16>([](u16 a, u16 b) { return a < b ? a : b; }));
  table.add("max.u16", "d32 a32 b32", each<u16, u16, u16>([](u16 a, u16 b) { return a > b ? a : b; }));
  table.add("neg.s16", "d32 a32", each<u16, u16>([](u16 a) { return u16(-a); }));
  table.add("abs.s16", "d32 a32", each<i16, i16>([](i16 a) { return i16(a < 0 ? -a : a); }));
  table.add("and.b16", "d32 a32 b32", map<u32>([](auto a, auto b) { return a & b; }));
  table.add("or.b16", "d32 a32 b32", map<u32>([](auto a, auto b) { return a | b; }));
  table.add("xor.b16", "d32 a32 b32", map<u32>([](auto a, auto b) { return a ^ b; }));
  table.add("not.b16", "d32 a32", map<u32>([](auto a) { return ~a; }));
  table.add("cnot.b16", "d32 a32", each<u16, u16>([](u16 a) { return u16(a == 0); }));
  table.add("shl.b16", "d32 a32 b32", each<u16, u16, u32>([](u16 a, u32 b) { return b < 16 ? u16(a << b) : u16(0); }));
  table.add("shr.u16 shr.b16", "d32 a32 b32", each<u16, u16, u32>([](u16 a, u32 b) { return b < 16 ? u16(a >> b) : u16(0); }));
  table.add("shr.s16", "d32 a32 b32", each<i16, i16, u32>([](i16 a, u32 b) { return i16(a >> (b < 15 ? b : 15)); }));
}

}  // namespace

void register_integer(Table& table) {
  table.family(Class::INTEGER);
  register_arithmetic(table);
  register_bits(table);
  register_short(table);
}

}  // namespace sim
