// Products of a warpgroup, which run while its threads go on: D (64 x N, float32) += A (64 x 16) B (16 x N). PTX ISA 9.7.15 "wgmma".
//
// Warp w of the warpgroup has rows 16 w .. 16 w + 15 of D, as tiles of m16n8 (ptx/mma.cuh), and of an A in registers the fragment that two
// neighbouring tiles make. B, and A if it is not in registers, lie in shared memory where a descriptor says.
//
// From `wgmma_fence` on the registers of D and A are the products' own until `wgmma_wait`. The compiler does not know that, so arithmetic on them is
// pinned before the one and behind the other.
#pragma once
#include "ptx/memory.cuh"

constexpr int WARPGROUP_ROWS = 64;  // of D

// Everything that is computed of these registers before this place is computed before it, everything behind it behind it.
template <int N>
DEVICE void pin(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}
template <int N>
DEVICE void pin(uint32 (&a)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}

// Before the first product of registers that anything else has touched. The assembler wants one behind every wait for a barrier, too (C7519).
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Products since the last one make up a group.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of the most recent groups are in flight.
template <int PENDING>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Where an operand lies whose rows are 128 bytes with the 128-byte swizzle, and repeat after eight rows. `slab_bytes`: from 64 columns to the next 64
// where B has its rows as depth; nobody asks for it elsewhere. Descriptors count in units of 16 bytes.
constexpr int DESCRIPTOR_UNIT = 16;
DEVICE uint64 wgmma_descriptor(SmemAddress address, int slab_bytes) {
  constexpr uint64 EIGHT_ROWS = 8 * 128 / DESCRIPTOR_UNIT, SWIZZLE_128 = 1;
  return uint64(address / DESCRIPTOR_UNIT) | uint64(slab_bytes / DESCRIPTOR_UNIT) << 16 | EIGHT_ROWS << 32 | SWIZZLE_128 << 62;
}

// The instructions of one element type and N = 8 TILES:
//   from_shared          A from shared memory, with B's columns as depth; `adds` to D, or overwrites it
//   from_shared_by_rows  the same with A's rows as depth
//   from_shared_over_rows  A from shared memory, its columns and B's rows as depth; adds to D
//   from_registers       A from registers, with B's rows as depth; adds to D, or `adds` or overwrites it
//   from_registers_over_columns  A from registers, with B's columns as depth; `adds` to D, or overwrites it
template <typename Element, int TILES>
struct Wgmma;

// Registers of D by number, as the text of an instruction names them, and as its operands.
#define R_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define R_12 R_8 ", %8, %9, %10, %11"
#define R_16 R_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R_24 R_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define R_32 R_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define R_40 R_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define R_48 R_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define R_56 R_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define R_64 R_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define R_72 R_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define R_80 R_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define R_88 R_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define R_96 R_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define R_104 R_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define R_112 R_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define R_120 R_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define R_128 R_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define D_4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define D_8(n) D_4(n), D_4(n + 1)
#define D_16(n) D_8(n), D_8(n + 2)
#define D_32(n) D_16(n), D_16(n + 4)
#define D_64(n) D_32(n), D_32(n + 8)

// I0 .. I5: the numbers that follow those of D.
#define WGMMA_OF_TYPE(ELEMENT, TYPE, TILES, N, REGISTERS, I0, I1, I2, I3, I4, I5, ...)                                                               \
  template <>                                                                                                                                        \
  struct Wgmma<ELEMENT, TILES> {                                                                                                                     \
    DEVICE static void from_shared(float (&d)[TILES][4], uint64 a, uint64 b, bool adds) {                                                            \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " I2 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " I0  \
                   ", " I1 ", p, 1, 1, 0, 0; }"                                                                                                      \
                   : __VA_ARGS__                                                                                                                     \
                   : "l"(a), "l"(b), "r"(int(adds)));                                                                                                \
    }                                                                                                                                                \
    DEVICE static void from_shared_by_rows(float (&d)[TILES][4], uint64 a, uint64 b, bool adds) {                                                    \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " I2 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " I0  \
                   ", " I1 ", p, 1, 1, 1, 0; }"                                                                                                      \
                   : __VA_ARGS__                                                                                                                     \
                   : "l"(a), "l"(b), "r"(int(adds)));                                                                                                \
    }                                                                                                                                                \
    DEVICE static void from_shared_over_rows(float (&d)[TILES][4], uint64 a, uint64 b) {                                                             \
      asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " I0       \
                   ", " I1 ", p, 1, 1, 0, 1; }"                                                                                                      \
                   : __VA_ARGS__                                                                                                                     \
                   : "l"(a), "l"(b));                                                                                                                \
    }                                                                                                                                                \
    DEVICE static void from_registers(float (&d)[TILES][4], const uint32 (&a)[4], uint64 b) {                                                        \
      asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" I0      \
                   ", " I1 ", " I2 ", " I3 "}, " I4 ", p, 1, 1, 1; }"                                                                                \
                   : __VA_ARGS__                                                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                            \
    }                                                                                                                                                \
    DEVICE static void from_registers(float (&d)[TILES][4], const uint32 (&a)[4], uint64 b, bool adds) {                                             \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " I5 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" I0 \
                   ", " I1 ", " I2 ", " I3 "}, " I4 ", p, 1, 1, 1; }"                                                                                \
                   : __VA_ARGS__                                                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)));                                                            \
    }                                                                                                                                                \
    DEVICE static void from_registers_over_columns(float (&d)[TILES][4], const uint32 (&a)[4], uint64 b, bool adds) {                                \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " I5 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" I0 \
                   ", " I1 ", " I2 ", " I3 "}, " I4 ", p, 1, 1, 0; }"                                                                                \
                   : __VA_ARGS__                                                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)));                                                            \
    }                                                                                                                                                \
  };
#define WGMMA(...)                           \
  WGMMA_OF_TYPE(float16, "f16", __VA_ARGS__) \
  WGMMA_OF_TYPE(bfloat16, "bf16", __VA_ARGS__)

WGMMA(2, "16", R_8, "%8", "%9", "%10", "%11", "%12", "%13", D_8(0))
WGMMA(3, "24", R_12, "%12", "%13", "%14", "%15", "%16", "%17", D_8(0), D_4(2))
WGMMA(4, "32", R_16, "%16", "%17", "%18", "%19", "%20", "%21", D_16(0))
WGMMA(6, "48", R_24, "%24", "%25", "%26", "%27", "%28", "%29", D_16(0), D_8(4))
WGMMA(8, "64", R_32, "%32", "%33", "%34", "%35", "%36", "%37", D_32(0))
WGMMA(10, "80", R_40, "%40", "%41", "%42", "%43", "%44", "%45", D_32(0), D_8(8))
WGMMA(12, "96", R_48, "%48", "%49", "%50", "%51", "%52", "%53", D_32(0), D_16(8))
WGMMA(14, "112", R_56, "%56", "%57", "%58", "%59", "%60", "%61", D_32(0), D_16(8), D_8(12))
WGMMA(16, "128", R_64, "%64", "%65", "%66", "%67", "%68", "%69", D_64(0))
WGMMA(18, "144", R_72, "%72", "%73", "%74", "%75", "%76", "%77", D_64(0), D_8(16))
WGMMA(20, "160", R_80, "%80", "%81", "%82", "%83", "%84", "%85", D_64(0), D_16(16))
WGMMA(22, "176", R_88, "%88", "%89", "%90", "%91", "%92", "%93", D_64(0), D_16(16), D_8(20))
WGMMA(24, "192", R_96, "%96", "%97", "%98", "%99", "%100", "%101", D_64(0), D_32(16))
WGMMA(26, "208", R_104, "%104", "%105", "%106", "%107", "%108", "%109", D_64(0), D_32(16), D_8(24))
WGMMA(28, "224", R_112, "%112", "%113", "%114", "%115", "%116", "%117", D_64(0), D_32(16), D_16(24))
WGMMA(30, "240", R_120, "%120", "%121", "%122", "%123", "%124", "%125", D_64(0), D_32(16), D_16(24), D_8(28))
WGMMA(32, "256", R_128, "%128", "%129", "%130", "%131", "%132", "%133", D_64(0), D_64(16))
