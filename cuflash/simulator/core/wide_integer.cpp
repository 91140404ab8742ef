// Integer instructions with 64-bit results or operands, and additions with carry.
#include "integer.h"

namespace sim {
namespace {

u64 high_product(u64 a, u64 b) { return u64((unsigned __int128)a * b >> 64); }
i64 high_product(i64 a, i64 b) { return i64((__int128)a * b >> 64); }

// a + b + carry (or a - b - borrow) per lane; `IN` and `OUT` say whether the carry flag is read and written.
template <class T, bool SUBTRACT, bool IN, bool OUT> const Record* add_with_carry(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  const T* a = warp.row<T>(in->a);
  const T* b = warp.row<T>(in->b);
  alignas(64) T result[LANES];
  u32 carry = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    const unsigned __int128 x = a[lane], y = b[lane], c = IN ? warp.carry >> lane & 1 : 0;
    const unsigned __int128 sum = SUBTRACT ? x - y - c : x + y + c;
    result[lane] = T(sum);
    carry |= u32(sum >> (sizeof(T) * 8) & 1) << lane;
  }
  commit(warp, in->d, mask, result);
  if (OUT) warp.carry = (warp.carry & ~mask) | (carry & mask);
  return in + 1;
}

template <class T> void register_carry(Table& table, const std::string& type, const std::string& signature) {
  const auto names = [&](const char* stem) { return stem + (".u" + type) + " " + stem + (".s" + type); };
  table.add(names("add.cc"), signature, add_with_carry<T, false, false, true>);
  table.add(names("addc"), signature, add_with_carry<T, false, true, false>);
  table.add(names("addc.cc"), signature, add_with_carry<T, false, true, true>);
  table.add(names("sub.cc"), signature, add_with_carry<T, true, false, true>);
  table.add(names("subc"), signature, add_with_carry<T, true, true, false>);
  table.add(names("subc.cc"), signature, add_with_carry<T, true, true, true>);
}

// mad with carry: d = (low or high half of a * b) + c + carry.
template <class T, bool HIGH, bool IN, bool OUT> const Record* multiply_add_with_carry(Warp& warp, const Record* in) {
  const u32 mask = warp.mask(in);
  const T* a = warp.row<T>(in->a);
  const T* b = warp.row<T>(in->b);
  const T* c = warp.row<T>(in->c);
  alignas(64) T result[LANES];
  u32 carry = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    const unsigned __int128 product = (unsigned __int128)a[lane] * b[lane];
    const unsigned __int128 half = HIGH ? product >> (sizeof(T) * 8) : T(product);
    const unsigned __int128 sum = half + c[lane] + (IN ? warp.carry >> lane & 1 : 0);
    result[lane] = T(sum);
    carry |= u32(sum >> (sizeof(T) * 8) & 1) << lane;
  }
  commit(warp, in->d, mask, result);
  if (OUT) warp.carry = (warp.carry & ~mask) | (carry & mask);
  return in + 1;
}

template <class T> void register_multiply_carry(Table& table, const std::string& type, const std::string& signature) {
  table.add("mad.lo.cc." + type, signature, multiply_add_with_carry<T, false, false, true>);
  table.add("mad.hi.cc." + type, signature, multiply_add_with_carry<T, true, false, true>);
  table.add("madc.lo." + type, signature, multiply_add_with_carry<T, false, true, false>);
  table.add("madc.hi." + type, signature, multiply_add_with_carry<T, true, true, false>);
  table.add("madc.lo.cc." + type, signature, multiply_add_with_carry<T, false, true, true>);
  table.add("madc.hi.cc." + type, signature, multiply_add_with_carry<T, true, true, true>);
}

void register_bits(Table& table) {
  table.add("and.b64", "d64 a64 b64", map<u64>([](auto a, auto b) { return a & b; }));
  table.add("or.b64", "d64 a64 b64", map<u64>([](auto a, auto b) { return a | b; }));
  table.add("xor.b64", "d64 a64 b64", map<u64>([](auto a, auto b) { return a ^ b; }));
  table.add("not.b64", "d64 a64", map<u64>([](auto a) { return ~a; }));
  table.add("cnot.b64", "d64 a64", each<u64, u64>([](u64 a) { return u64(a == 0); }));
  table.add("shl.b64", "d64 a64 b32", each<u64, u64, u32>([](u64 a, u32 b) { return b < 64 ? a << b : 0; }));
  table.add("shr.u64 shr.b64", "d64 a64 b32", each<u64, u64, u32>([](u64 a, u32 b) { return b < 64 ? a >> b : 0; }));
  table.add("shr.s64", "d64 a64 b32", each<i64, i64, u32>([](i64 a, u32 b) { return a >> (b < 63 ? b : 63); }));
  table.add("bfe.s64", "d64 a64 b32 c32", each<i64, i64, u32, u32>([](i64 a, u32 b, u32 c) { return extract_field(a, b, c); }));
  table.add("bfe.u64", "d64 a64 b32 c32", each<u64, u64, u32, u32>([](u64 a, u32 b, u32 c) { return extract_field(a, b, c); }));
  table.add("bfi.b64", "d64 a64 b64 c32 x32", each<u64, u64, u64, u32, u32>([](u64 a, u64 b, u32 c, u32 d) { return insert_field(a, b, c, d); }));
  table.add("popc.b64", "d32 a64", each<u32, u64>([](u64 a) { return u32(__builtin_popcountll(a)); }));
  table.add("clz.b64", "d32 a64", each<u32, u64>([](u64 a) { return leading_zeros(a); }));
  table.add("brev.b64", "d64 a64", each<u64, u64>([](u64 a) { return reverse_bits(a); }));
  table.add("bfind.s64", "d32 a64", each<u32, i64>([](i64 a) { return find_bit<i64, false>(a); }));
  table.add("bfind.u64", "d32 a64", each<u32, u64>([](u64 a) { return find_bit<u64, false>(a); }));
  table.add("bfind.shiftamt.s64", "d32 a64", each<u32, i64>([](i64 a) { return find_bit<i64, true>(a); }));
  table.add("bfind.shiftamt.u64", "d32 a64", each<u32, u64>([](u64 a) { return find_bit<u64, true>(a); }));
  table.add("mov.b64 mov.u64 mov.s64 mov.f64", "d64 a64", map<u64>([](auto a) { return a; }), Class::MOVE);
}

// mov between a vector of registers and one wider register.
void register_packing(Table& table) {
  table.family(Class::MOVE);
  table.add("pack.b64.b32", "d64 a32 b32", each<u64, u32, u32>([](u32 low, u32 high) { return u64(high) << 32 | low; }));
  table.add("pack.b32.b16", "d32 a32 b32", map<u32>([](auto low, auto high) { return (low & 0xffffu) | high << 16; }));
  table.add("pack.b64.b16", "d64 a32 b32 c32 x32",
            each<u64, u16, u16, u16, u16>([](u16 a, u16 b, u16 c, u16 d) { return u64(d) << 48 | u64(c) << 32 | u64(b) << 16 | a; }));
  table.add("pack.b32.b8", "d32 a32 b32 c32 x32",
            each<u32, u8, u8, u8, u8>([](u8 a, u8 b, u8 c, u8 d) { return u32(d) << 24 | u32(c) << 16 | u32(b) << 8 | a; }));
  table.add("pack.b16.b8", "d32 a32 b32", each<u32, u8, u8>([](u8 a, u8 b) { return u32(b) << 8 | a; }));
  table.add("unpack.b64.b32", "d32 a64 b32", each<u32, u64, u32>([](u64 a, u32 shift) { return u32(a >> (shift & 63)); }));
  table.add("unpack.b64.b16", "d32 a64 b32", each<u16, u64, u32>([](u64 a, u32 shift) { return u16(a >> (shift & 63)); }));
  table.add("unpack.b32.b16", "d32 a32 b32", map<u32>([](auto a, auto shift) { return a >> (shift & 31u) & 0xffffu; }));
  table.add("unpack.b32.b8", "d32 a32 b32", map<u32>([](auto a, auto shift) { return a >> (shift & 31u) & 0xffu; }));
  table.add("unpack.b16.b8", "d32 a32 b32", map<u32>([](auto a, auto shift) { return a >> (shift & 31u) & 0xffu; }));
}

}  // namespace

void register_wide_integer(Table& table) {
  table.family(Class::INTEGER);
  const auto min = [](auto a, auto b) { return a < b ? a : b; };
  const auto max = [](auto a, auto b) { return a > b ? a : b; };
  table.add("add.s64 add.u64", "d64 a64 b64", map<u64>([](auto a, auto b) { return a + b; }));
  table.add("sub.s64 sub.u64", "d64 a64 b64", map<u64>([](auto a, auto b) { return a - b; }));
  table.add("mul.lo.s64 mul.lo.u64", "d64 a64 b64", map<u64>([](auto a, auto b) { return a * b; }));
  table.add("mad.lo.s64 mad.lo.u64", "d64 a64 b64 c64", map<u64>([](auto a, auto b, auto c) { return a * b + c; }));
  table.add("min.s64", "d64 a64 b64", map<i64>(min));
  table.add("max.s64", "d64 a64 b64", map<i64>(max));
  table.add("min.u64", "d64 a64 b64", map<u64>(min));
  table.add("max.u64", "d64 a64 b64", map<u64>(max));
  table.add("neg.s64", "d64 a64", map<u64>([](auto a) { return -a; }));
  table.add("abs.s64", "d64 a64", map<i64>([](auto a) { return a < 0 ? -a : a; }));
  table.add("mul.wide.s32", "d64 a32 b32", each<i64, i32, i32>([](i32 a, i32 b) { return i64(a) * b; }));
  table.add("mul.wide.u32", "d64 a32 b32", each<u64, u32, u32>([](u32 a, u32 b) { return u64(a) * b; }));
  table.add("mad.wide.s32", "d64 a32 b32 c64", each<i64, i32, i32, i64>([](i32 a, i32 b, i64 c) { return i64(a) * b + c; }));
  table.add("mad.wide.u32", "d64 a32 b32 c64", each<u64, u32, u32, u64>([](u32 a, u32 b, u64 c) { return u64(a) * b + c; }));
  table.add("mul.hi.s64", "d64 a64 b64", each<i64, i64, i64>([](i64 a, i64 b) { return high_product(a, b); }));
  table.add("mul.hi.u64", "d64 a64 b64", each<u64, u64, u64>([](u64 a, u64 b) { return high_product(a, b); }));
  table.add("mad.hi.s64", "d64 a64 b64 c64", each<i64, i64, i64, i64>([](i64 a, i64 b, i64 c) { return high_product(a, b) + c; }));
  table.add("mad.hi.u64", "d64 a64 b64 c64", each<u64, u64, u64, u64>([](u64 a, u64 b, u64 c) { return high_product(a, b) + c; }));
  table.add("div.s64", "d64 a64 b64", each<i64, i64, i64>([](i64 a, i64 b) { return divide(a, b); }));
  table.add("div.u64", "d64 a64 b64", each<u64, u64, u64>([](u64 a, u64 b) { return divide(a, b); }));
  table.add("rem.s64", "d64 a64 b64", each<i64, i64, i64>([](i64 a, i64 b) { return remainder(a, b); }));
  table.add("rem.u64", "d64 a64 b64", each<u64, u64, u64>([](u64 a, u64 b) { return remainder(a, b); }));
  register_bits(table);
  register_carry<u32>(table, "32", "d32 a32 b32");
  register_carry<u64>(table, "64", "d64 a64 b64");
  register_multiply_carry<u32>(table, "u32", "d32 a32 b32 c32");
  register_multiply_carry<u64>(table, "u64", "d64 a64 b64 c64");
  register_packing(table);
}

}  // namespace sim
