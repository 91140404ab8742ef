// What all kernels that measure constants share: clocks, mbarriers with bounded waits, and where results go.
//
// A result is a pair of clocks per warp. No wait spins for ever: one that fails raises `FAILED` in the block's shared memory, which the host finds
// in the results.
#pragma once
typedef unsigned u32;
typedef unsigned long long u64;

__device__ __forceinline__ u64 clock_now() {
  u64 t;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)::"memory");
  return t;
}
__device__ __forceinline__ u64 nanoseconds_now() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, (int)(threadIdx.x / 32), 0); }

// `results` has, for every warp of every block, the clocks at which its work began and ended.
__device__ __forceinline__ void store_clocks(u64* results, u64 begin, u64 end) {
  if (threadIdx.x % 32 == 0) {
    u64* own = results + 2 * (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    own[0] = begin;
    own[1] = end;
  }
}

// --- mbarriers

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_initialized() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ bool barrier_try(u32 barrier, u32 parity) {
  u32 done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}
// A try suspends the thread for about a microsecond at most, so this gives up after less than a tenth of a second.
__device__ __forceinline__ bool barrier_wait(u32 barrier, u32 parity) {
#pragma unroll 1
  for (int attempt = 0; attempt < 10000; ++attempt)
    if (barrier_try(barrier, parity)) return true;
  return false;
}
