// Shared-memory addresses, matrix loads and asynchronous copies.
// PTX ISA 9.7.9.25 "cp.async", 9.7.14.5.15 "ldmatrix", 9.7.14.5.16 "stmatrix".
#pragma once
#include "ptx/types.cuh"

#if __CUDA_ARCH__ >= 800
#define HAS_CP_ASYNC 1
#else
#define HAS_CP_ASYNC 0
#endif

using SmemAddress = uint32;  // a byte address in the .shared window

DEVICE SmemAddress smem_address(const void* pointer) { return SmemAddress(__cvta_generic_to_shared(pointer)); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix_x4(uint32 (&frag)[4], SmemAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
               : "r"(address)
               : "memory");
}

DEVICE void ldmatrix_x4_trans(uint32 (&frag)[4], SmemAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
               : "r"(address)
               : "memory");
}

// Two matrices: lane l < 16 gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix_x2(uint32 (&frag)[2], SmemAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(frag[0]), "=r"(frag[1]) : "r"(address) : "memory");
}

DEVICE void ldmatrix_x2_trans(uint32 (&frag)[2], SmemAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(frag[0]), "=r"(frag[1]) : "r"(address) : "memory");
}

// The other way round: lane l gives the address of row l % 8 of matrix l / 8. From sm_90 on.
DEVICE void stmatrix_x4(SmemAddress address, const uint32 (&frag)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(frag[0]), "r"(frag[1]), "r"(frag[2]),
               "r"(frag[3])
               : "memory");
}

// The same of the transpose of each matrix: lane l gives the address of row l % 8 of the transpose of matrix l / 8.
DEVICE void stmatrix_x4_trans(SmemAddress address, const uint32 (&frag)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(frag[0]), "r"(frag[1]), "r"(frag[2]),
               "r"(frag[3])
               : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements, of which each lane has two neighbours of a row, as in `ldmatrix`.
DEVICE uint32 movmatrix_trans(uint32 pair) {
  uint32 transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

DEVICE uint32 load_shared_u8(SmemAddress address) {
  uint32 value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

DEVICE int load_shared_s32(SmemAddress address) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

DEVICE uint32 load_shared_u16(SmemAddress address) {
  uint32 value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

DEVICE float load_shared_f32(SmemAddress address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

DEVICE float2 load_shared_f32x2(SmemAddress address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

DEVICE float4 load_shared_f32x4(SmemAddress address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(address) : "memory");
  return value;
}

DEVICE Chunk load_shared(SmemAddress address) {
  Chunk chunk;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.word[0]), "=r"(chunk.word[1]), "=r"(chunk.word[2]), "=r"(chunk.word[3])
               : "r"(address)
               : "memory");
  return chunk;
}

DEVICE void store_shared(SmemAddress address, const Chunk& chunk) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(chunk.word[0]), "r"(chunk.word[1]), "r"(chunk.word[2]),
               "r"(chunk.word[3])
               : "memory");
}

DEVICE void store_shared(SmemAddress address, uint8 byte) { asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(uint32(byte)) : "memory"); }
DEVICE void store_shared(SmemAddress address, uint16 half) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(half) : "memory"); }
DEVICE void store_shared(SmemAddress address, uint32 word) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory"); }

DEVICE void store_shared(SmemAddress address, float2 pair) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(pair.x), "f"(pair.y) : "memory");
}

DEVICE void store_shared(SmemAddress address, float4 four) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(four.x), "f"(four.y), "f"(four.z), "f"(four.w) : "memory");
}

// BYTES from global to shared, of which the first `valid_bytes` are read and the rest are zero-filled; nothing at all unless `enabled`. That is a
// predicate of the instruction: a branch would cut the code around it into pieces that the assembler schedules one by one.
template <int BYTES>
DEVICE void cp_async(bool enabled, SmemAddress destination, const void* source, int valid_bytes) {
  if constexpr (BYTES == 16) {  // .cg: cached in L2 only
    asm volatile(
        "{\n"
        "  .reg .pred enabled;\n"
        "  setp.ne.u32 enabled, %3, 0;\n"
        "  @enabled cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n"
        "}" ::"r"(destination),
        "l"(source), "r"(valid_bytes), "r"(uint32(enabled))
        : "memory");
  } else {
    asm volatile(
        "{\n"
        "  .reg .pred enabled;\n"
        "  setp.ne.u32 enabled, %4, 0;\n"
        "  @enabled cp.async.ca.shared.global [%0], [%1], %2, %3;\n"
        "}" ::"r"(destination),
        "l"(source), "n"(BYTES), "r"(valid_bytes), "r"(uint32(enabled))
        : "memory");
  }
}

DEVICE void cp_async_commit_group() {
#if HAS_CP_ASYNC
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's most recent groups are still in flight.
template <int PENDING>
DEVICE void cp_async_wait_group() {
#if HAS_CP_ASYNC
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Between ordinary accesses to shared memory and those of asynchronous units, TMA and wgmma, that come behind them. PTX ISA 9.7.13.6 "membar".
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
