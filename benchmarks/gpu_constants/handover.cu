// What it costs to wait for somebody: mbarriers and named barriers between warps, barriers of a block, fences, launches; and the clock itself.
#include "common.cuh"

// Warps 0 and `partner` take turns: each waits for its own mbarrier and then arrives at the other's. A trip is two hand-overs.
extern "C" __global__ void mbarrier_turns(u64* results, int trips, int partner) {
  __shared__ u64 barriers[2];
  const u32 first = shared_address(barriers), second = first + 8;
  if (threadIdx.x == 0) {
    barrier_init(first, 1);
    barrier_init(second, 1);
    barriers_initialized();
  }
  __syncthreads();
  const int warp = warp_index();
  if (threadIdx.x % 32 != 0 || (warp != 0 && warp != partner)) return;
  const u32 own = warp == 0 ? first : second, other = warp == 0 ? second : first;
  if (warp == 0) barrier_arrive(own);
  bool good = true;
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips && good; ++trip) {
    good = barrier_wait(own, trip & 1);
    barrier_arrive(other);
  }
  const u64 end = clock_now();
  store_clocks(results, begin, good ? end : begin);
}

// The same by named barriers, as two halves of a block: `bar.sync` on one's own, `bar.arrive` on the other's. Numbers in registers.
extern "C" __global__ void named_turns(u64* results, int trips) {
  const int half = blockDim.x / 2, side = warp_index() >= half / 32;
  const int own = 1 + side, other = 2 - side;
  if (side == 1) asm volatile("bar.arrive %0, %1;" ::"r"(other), "r"(blockDim.x) : "memory");
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
    asm volatile("bar.sync %0, %1;" ::"r"(own), "r"(blockDim.x) : "memory");
    if (side == 0 || trip + 1 < trips) asm volatile("bar.arrive %0, %1;" ::"r"(other), "r"(blockDim.x) : "memory");
  }
  const u64 end = clock_now();
  store_clocks(results, begin, end);
}

// The same with numbers in the instructions, as kernels have them.
template <int OWN, int OTHER, int THREADS>
__device__ __forceinline__ void named_side(u64* results, int trips) {
  if (OWN == 2) asm volatile("bar.arrive %0, %1;" ::"n"(OTHER), "n"(THREADS) : "memory");
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
    asm volatile("bar.sync %0, %1;" ::"n"(OWN), "n"(THREADS) : "memory");
    if (OWN == 1 || trip + 1 < trips) asm volatile("bar.arrive %0, %1;" ::"n"(OTHER), "n"(THREADS) : "memory");
  }
  const u64 end = clock_now();
  store_clocks(results, begin, end);
}
template <int THREADS>
__device__ __forceinline__ void named_sides(u64* results, int trips) {
  if (warp_index() < THREADS / 64) named_side<1, 2, THREADS>(results, trips);
  else named_side<2, 1, THREADS>(results, trips);
}
extern "C" __global__ void named_turns_64(u64* results, int trips) { named_sides<64>(results, trips); }
extern "C" __global__ void named_turns_256(u64* results, int trips) { named_sides<256>(results, trips); }

extern "C" __global__ void block_barrier(u64* results, int trips) {
  __syncthreads();
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("bar.sync 0;" ::: "memory");
  }
  const u64 end = clock_now();
  store_clocks(results, begin, end);
}

// A barrier of each warpgroup's own 128 threads, its number in a register.
extern "C" __global__ void warpgroup_barrier(u64* results, int trips) {
  const int id = 1 + warp_index() / 4;
  __syncthreads();
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
  }
  const u64 end = clock_now();
  store_clocks(results, begin, end);
}

// One thread arrives at a barrier of its own and waits for it.
extern "C" __global__ void mbarrier_alone(u64* results, int trips) {
  __shared__ u64 barrier[1];
  const u32 own = shared_address(barrier);
  if (threadIdx.x == 0) {
    barrier_init(own, 1);
    barriers_initialized();
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  bool good = true;
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips && good; ++trip) {
    barrier_arrive(own);
    good = barrier_wait(own, trip & 1);
  }
  const u64 end = clock_now();
  store_clocks(results, begin, good ? end : begin);
}

// A try that succeeds at once: the barrier's phase is long complete.
extern "C" __global__ void mbarrier_ready(u64* results, int trips) {
  __shared__ u64 barrier[1];
  const u32 own = shared_address(barrier);
  if (threadIdx.x == 0) {
    barrier_init(own, 1);
    barriers_initialized();
  }
  __syncthreads();
  const u64 begin = clock_now();
  bool good = true;
#pragma unroll 1
  for (int trip = 0; trip < trips && good; ++trip) good = barrier_try(own, 1);
  const u64 end = clock_now();
  store_clocks(results, begin, good ? end : begin);
}

// A store, the fence after which asynchronous units see it, as before every TMA store.
extern "C" __global__ void proxy_fence(u64* results, int trips) {
  __shared__ u32 words[1024];
  const u32 own = shared_address(words + threadIdx.x);
  __syncthreads();
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(own), "r"(trip) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
  }
  const u64 end = clock_now();
  store_clocks(results, begin, end);
}

// Nothing, for the cost of a launch; and with the global timer, for the gap between two kernels of a stream.
extern "C" __global__ void nothing() {}
extern "C" __global__ void timer(u64* nanoseconds) {
  const u64 now = nanoseconds_now();
  if (blockIdx.x == 0 && threadIdx.x == 0) nanoseconds[0] = now;
}

// Runs for `cycles` clocks: how many nanoseconds are they?
extern "C" __global__ void clock_rate(u64* results, u64* nanoseconds, u64 cycles) {
  const u64 begin = clock_now(), begin_ns = nanoseconds_now();
  while (clock_now() - begin < cycles) {
  }
  const u64 end = clock_now(), end_ns = nanoseconds_now();
  store_clocks(results, begin, end);
  if (threadIdx.x == 0) {
    nanoseconds[2 * blockIdx.x] = begin_ns;
    nanoseconds[2 * blockIdx.x + 1] = end_ns;
  }
}
