// Latency and throughput of single instructions. Every warp runs CHAINS independent chains of one instruction whose result is its next operand; one
// chain gives the latency, many give the cycles that the unit needs per instruction. `INSTRUCTION(name)` at the end of the program makes the kernels.
#include "common.cuh"

constexpr int UNROLLED = 64;  // instructions of all chains in one trip of the loop
constexpr int SLOT = 512;  // bytes of shared memory per warp

// What shared memory holds: addresses, so that what a load returns is the address of the next load.
enum class Pattern { NONE, WORDS, MATRIX, TRANSPOSED };

// Bytes between the addresses of neighbouring lanes: as many as a lane accesses, so that no bank is asked twice at a time.
template <class Instruction>
constexpr int LANE_BYTES = 16;

#define PLAIN(NAME, TEXT)                                                              \
  struct NAME {                                                                        \
    static constexpr Pattern PATTERN = Pattern::NONE;                                  \
    static __device__ __forceinline__ void step(u32 (&x)[4], u32 a, u32 b, u32 slot) { \
      asm volatile(TEXT : "+r"(x[0]) : "r"(a), "r"(b) : "memory");                     \
    }                                                                                  \
  };
PLAIN(ffma, "fma.rn.f32 %0, %0, %1, %2;")
PLAIN(fadd, "add.rn.f32 %0, %0, %1;")
PLAIN(fmul, "mul.rn.f32 %0, %0, %1;")
PLAIN(fmnmx, "max.f32 %0, %0, %1; min.f32 %0, %0, %2;")  // two: the maximum of the same twice would be folded
PLAIN(mufu_ex2, "ex2.approx.ftz.f32 %0, %0;")
PLAIN(mufu_lg2, "lg2.approx.ftz.f32 %0, %0;")
PLAIN(mufu_rsq, "rsqrt.approx.ftz.f32 %0, %0;")  // not the reciprocal: that of a reciprocal would be folded
PLAIN(mufu_tanh, "tanh.approx.f32 %0, %0;")
PLAIN(f2fp_bf16, "cvt.rn.bf16x2.f32 %0, %0, %1;")
PLAIN(f2fp_f16, "cvt.rn.f16x2.f32 %0, %0, %1;")
PLAIN(cvt_tf32, "cvt.rna.tf32.f32 %0, %0;")
PLAIN(imad, "mad.lo.u32 %0, %0, %1, %2;")
PLAIN(lop3, "lop3.b32 %0, %0, %1, %2, 0x1e;")
PLAIN(prmt, "prmt.b32 %0, %0, %1, 0x2541;")
PLAIN(hfma2_bf16, "fma.rn.bf16x2 %0, %0, %1, %2;")
PLAIN(shfl, "shfl.sync.bfly.b32 %0, %0, 1, 0x1f, 0xffffffff;")
PLAIN(redux, "redux.sync.max.u32 %0, %0, 0xffffffff;")

// An exponential beside four multiply-adds of another chain: do their units work at the same time?
struct mufu_and_ffma {
  static constexpr Pattern PATTERN = Pattern::NONE;
  static __device__ __forceinline__ void step(u32 (&x)[4], u32 a, u32 b, u32 slot) {
    asm volatile(
        "ex2.approx.ftz.f32 %0, %0; fma.rn.f32 %1, %1, %4, %5; fma.rn.f32 %2, %2, %4, %5; fma.rn.f32 %3, %3, %4, %5; fma.rn.f32 %1, %1, %4, %5;"
        : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
        : "r"(a), "r"(b)
        : "memory");
  }
};

#define PRODUCT(NAME, TEXT)                                                                \
  struct NAME {                                                                            \
    static constexpr Pattern PATTERN = Pattern::NONE;                                      \
    static __device__ __forceinline__ void step(u32 (&x)[4], u32 a, u32 b, u32 slot) {     \
      asm volatile(TEXT " {%0, %1, %2, %3}, {%4, %5, %4, %5}, {%4, %5}, {%0, %1, %2, %3};" \
                   : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])                        \
                   : "r"(a), "r"(b)                                                        \
                   : "memory");                                                            \
    }                                                                                      \
  };
PRODUCT(hmma_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
PRODUCT(hmma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
PRODUCT(hmma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")

#define SHARED(NAME, KIND, TEXT)                                                                  \
  struct NAME {                                                                                   \
    static constexpr Pattern PATTERN = Pattern::KIND;                                             \
    static __device__ __forceinline__ void step(u32 (&x)[4], u32 a, u32 b, u32 slot) {            \
      asm volatile(TEXT : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3]) : "r"(slot) : "memory"); \
    }                                                                                             \
  };
SHARED(lds_b32, WORDS, "ld.volatile.shared.u32 %0, [%0];")
SHARED(lds_128, WORDS, "ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%0];")
SHARED(ldsm_x4, MATRIX, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%0];")
SHARED(ldsm_x4_trans, TRANSPOSED, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%0];")
SHARED(sts_b32, NONE, "st.volatile.shared.u32 [%4], %0;")
SHARED(sts_128, NONE, "st.volatile.shared.v4.u32 [%4], {%0, %1, %2, %3};")
SHARED(stsm_x4, NONE, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%4], {%0, %1, %2, %3};")
template <>
constexpr int LANE_BYTES<lds_b32> = 4;
template <>
constexpr int LANE_BYTES<sts_b32> = 4;

template <class Instruction, int CHAINS>
__device__ __forceinline__ void measure(u64* results, int trips, u32 a, u32 b, u32 impossible) {
  extern __shared__ __align__(1024) char memory[];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 base = shared_address(memory) + warp * SLOT;
  u32 slot = base + lane * LANE_BYTES<Instruction>, first = 0x3f000000u + threadIdx.x;  // a float near 1/2
  u32* words = reinterpret_cast<u32*>(memory + warp * SLOT);
  for (u32 i = lane; i < SLOT / 4; i += 32) {
    if (Instruction::PATTERN == Pattern::MATRIX) words[i] = base + 16 * (i % 32);
    else if (Instruction::PATTERN ==
             Pattern::TRANSPOSED) {  // in the low half of what a lane gets; addresses have 16 bits, and odd rows are the high half
      const u32 row = i % 32 / 4, column = i % 4 * 2, address = base + 16 * (4 * column + row / 2);
      words[i] = row % 2 ? 0 : address | (address + 64) << 16;
    } else words[i] = base + 4 * i;
  }
  if (Instruction::PATTERN != Pattern::NONE) first = slot;
  u32 x[CHAINS][4];
#pragma unroll
  for (int c = 0; c < CHAINS; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[c][i] = Instruction::PATTERN == Pattern::NONE ? first + 64 * (4 * c + i) : first;
  __syncthreads();
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
#pragma unroll
    for (int i = 0; i < UNROLLED / CHAINS; ++i)
#pragma unroll
      for (int c = 0; c < CHAINS; ++c) Instruction::step(x[c], a, b, slot);
  }
  const u64 end = clock_now();
  u32 sum = 0;
#pragma unroll
  for (int c = 0; c < CHAINS; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum ^= x[c][i];
  if (sum == impossible) results[0] = 0;
  store_clocks(results, begin, end);
}

#define INSTRUCTION(NAME)                                                                                          \
  extern "C" __global__ void __launch_bounds__(512, 1) NAME##_latency(u64* r, int n, u32 a, u32 b, u32 never) {    \
    measure<NAME, 1>(r, n, a, b, never);                                                                           \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(512, 1) NAME##_throughput(u64* r, int n, u32 a, u32 b, u32 never) { \
    measure<NAME, 8>(r, n, a, b, never);                                                                           \
  }
