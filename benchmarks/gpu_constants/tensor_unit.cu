// The tensor unit of one SM under wgmma: its throughput, and the order in which it serves several warpgroups.
//
// The program in front of this file defines `Wgmma<N>`, with `ss` and `rs`, for every N that it needs. All products accumulate into the same
// registers, as in a product of matrices. Operands are K-major with 128-byte swizzle; what they hold is pseudo-random, because the clock depends on
// it.
#include "common.cuh"

constexpr int GROUP_BYTES = 64 * 128;  // A of a warpgroup: 64 rows of 64 columns
constexpr int MAX_ISSUES = 32, MAX_GROUPS = 3;

__device__ __forceinline__ u64 descriptor(u32 address) { return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | u64(64) << 32 | u64(1) << 62; }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int COUNT>
__device__ __forceinline__ void keep(float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
__device__ __forceinline__ void keep(u32 (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
// Two bfloat16 between 1/4 and 1 of either sign.
__device__ __forceinline__ u32 random_pair(u32 seed) {
  seed = (seed ^ 61) ^ (seed >> 16);
  seed *= 9;
  seed ^= seed >> 4;
  seed *= 0x27d4eb2du;
  seed ^= seed >> 15;
  return (seed & 0x80ff80ffu) | 0x3e803e80u;
}

template <int N, bool RS>
struct Products {
  float d[N / 2];
  u32 a[4];
  u64 a_descriptor, b_descriptor;

  __device__ __forceinline__ Products(u32 memory, int group) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = random_pair(threadIdx.x * 4 + i);
    a_descriptor = descriptor(memory + group * GROUP_BYTES);
    b_descriptor = descriptor(memory + MAX_GROUPS * GROUP_BYTES);
    pin();
  }
  __device__ __forceinline__ void pin() {
    keep(d);
    keep(a);
  }
  __device__ __forceinline__ void issue(int k) {  // k: which 16 of the 64 columns
    if constexpr (RS) Wgmma<N>::rs(d, a, b_descriptor + 2 * (k % 4));
    else Wgmma<N>::ss(d, a_descriptor + 2 * (k % 4), b_descriptor + 2 * (k % 4));
  }
  __device__ __forceinline__ float sum() const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) total += d[i];
    return total;
  }
};

// Fills the operands of all groups; `bytes` is a multiple of 4.
__device__ __forceinline__ u32 prepare(int bytes) {
  extern __shared__ __align__(1024) char memory[];
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) reinterpret_cast<u32*>(memory)[i] = random_pair(i);
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  return shared_address(memory);
}

// Every warpgroup issues 16 products per trip and lets one batch stay in flight. `nanoseconds`: two readings of the global timer per block.
template <int N, bool RS>
__device__ __forceinline__ void throughput(u64* results, u64* nanoseconds, int trips, float impossible) {
  const u32 memory = prepare(MAX_GROUPS * GROUP_BYTES + N * 128);
  Products<N, RS> products(memory, warp_index() / 4);
  __syncthreads();
  const u64 begin = clock_now(), begin_ns = nanoseconds_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 16; ++i) products.issue(i);
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  products.pin();
  const u64 end = clock_now(), end_ns = nanoseconds_now();
  store_clocks(results, begin, end);
  if (threadIdx.x == 0) {
    nanoseconds[2 * blockIdx.x] = begin_ns;
    nanoseconds[2 * blockIdx.x + 1] = end_ns;
  }
  if (products.sum() == impossible) results[0] = 0;
}

// One warpgroup's part in the test of the order. It waits until `delay` clocks after the block's start, issues `length` products (a multiple of 4, of
// which each four are a commit group), waits for all. `log`: for each of four warps begin, issued, done; then the clock after each issue of warp 0.
template <int N, bool RS>
__device__ __forceinline__ void batch(u32 memory, u32* log, u32* stamps, int group, int length, int delay, u64 start, float impossible) {
  Products<N, RS> products(memory, group);
  const u32 warp = threadIdx.x / 32 % 4, stamp = shared_address(stamps);
  const bool writes = threadIdx.x % 32 == 0;
  while ((long long)(clock_now() - start) < delay) {
  }
  const u32 begin = (u32)clock_now();
  int first = 0;
#pragma unroll 1
  do {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      products.issue(i);
      const u32 now = (u32)clock_now();
      asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.shared.u32 [%0], %1;}" ::"r"(stamp + 4 * (MAX_ISSUES * warp + first + i)), "r"(now),
                   "r"((u32)writes)
                   : "memory");
    }
    wgmma_commit();
    first += 4;
  } while (first < length);
  const u32 issued = (u32)clock_now();
  wgmma_wait<0>();
  const u32 done = (u32)clock_now();
  products.pin();
  if (writes) {
    log[3 * warp] = begin;
    log[3 * warp + 1] = issued;
    log[3 * warp + 2] = done;
    if (warp == 0)
      for (int i = 0; i < length; ++i) log[12 + i] = stamps[i];
  }
  if (products.sum() == impossible) log[0] = 0;
}

struct Work {
  int length[MAX_GROUPS], delay[MAX_GROUPS];
};
// Group 0 runs products of shape N0, the others of N1.
template <int N0, bool RS0, int N1, bool RS1>
__device__ __forceinline__ void order(u32* logs, Work work, float impossible) {
  __shared__ u32 stamps[MAX_GROUPS][4 * MAX_ISSUES];
  const u32 memory = prepare(MAX_GROUPS * GROUP_BYTES + (N0 > N1 ? N0 : N1) * 128);
  const int group = warp_index() / 4;
  u32* log = logs + group * (12 + MAX_ISSUES);
  __syncthreads();
  const u64 start = clock_now() + 1024;  // by then all have cleared their registers
  if (group == 0) batch<N0, RS0>(memory, log, stamps[0], 0, work.length[0], work.delay[0], start, impossible);
  else
    batch<N1, RS1>(memory, log, stamps[group], group, group == 1 ? work.length[1] : work.length[2], group == 1 ? work.delay[1] : work.delay[2], start,
                   impossible);
}

// Eight products, each a commit group of its own, and the clock at which each of them was found complete. Per group: begin, issued, eight clocks.
template <int N, bool RS>
__device__ __forceinline__ void timeline(u32* logs, Work work, float impossible) {
  const u32 memory = prepare(MAX_GROUPS * GROUP_BYTES + N * 128);
  const int group = warp_index() / 4;
  Products<N, RS> products(memory, group);
  u32 done[8];
  __syncthreads();
  const u64 start = clock_now() + 1024;  // by then all have cleared their registers
  const int delay = group == 0 ? work.delay[0] : group == 1 ? work.delay[1] : work.delay[2];
  while ((long long)(clock_now() - start) < delay) {
  }
  const u32 begin = (u32)clock_now();
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    products.issue(0);
    wgmma_commit();
  }
  const u32 issued = (u32)clock_now();
  wgmma_wait<7>();
  done[0] = (u32)clock_now();
  wgmma_wait<6>();
  done[1] = (u32)clock_now();
  wgmma_wait<5>();
  done[2] = (u32)clock_now();
  wgmma_wait<4>();
  done[3] = (u32)clock_now();
  wgmma_wait<3>();
  done[4] = (u32)clock_now();
  wgmma_wait<2>();
  done[5] = (u32)clock_now();
  wgmma_wait<1>();
  done[6] = (u32)clock_now();
  wgmma_wait<0>();
  done[7] = (u32)clock_now();
  products.pin();
  if (threadIdx.x % 128 == 0) {
    u32* log = logs + 10 * group;
    log[0] = begin;
    log[1] = issued;
#pragma unroll
    for (int i = 0; i < 8; ++i) log[2 + i] = done[i];
  }
  if (products.sum() == impossible) logs[0] = 0;
}

#define THROUGHPUT(NAME, N, RS)                                                                                            \
  extern "C" __global__ void __launch_bounds__(384, 1) NAME(u64* results, u64* nanoseconds, int trips, float impossible) { \
    throughput<N, RS>(results, nanoseconds, trips, impossible);                                                            \
  }
#define ORDER(NAME, N0, RS0, N1, RS1)                                                                       \
  extern "C" __global__ void __launch_bounds__(384, 1) NAME(u32* logs, const Work work, float impossible) { \
    order<N0, RS0, N1, RS1>(logs, work, impossible);                                                        \
  }
#define TIMELINE(NAME, N, RS) \
  extern "C" __global__ void __launch_bounds__(384, 1) NAME(u32* logs, const Work work, float impossible) { timeline<N, RS>(logs, work, impossible); }
