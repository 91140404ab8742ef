// What an SM can move from and to the L2 cache: bulk copies, tensor copies, ordinary loads, reductions. Every block works alone on an SM of its own
// (the host asks for so much shared memory); how many SMs work at a time is the size of the grid.
#include "common.cuh"

struct __align__(64) TensorMap {
  char bytes[128];
};
constexpr int STAGES = 4, CHUNK = 32768;  // bytes of one stage

__device__ __forceinline__ void bulk_load(u32 to, const char* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void bulk_load_both(u32 to, const char* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier), "h"((unsigned short)3)
               : "memory");
}
__device__ __forceinline__ void tensor_load_both(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"((unsigned short)3)
      : "memory");
}
__device__ __forceinline__ void tensor_load(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map),
               "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

// One thread keeps STAGES chunks in flight. `step`: bytes between the starts of neighbouring blocks; 0: all read the same at about the same time.
// TILES: a chunk is 128 rows of 128 columns of a tensor of 2-byte elements, as two boxes of 64 columns.
template <bool TILES>
__device__ __forceinline__ void stream(u64* results, const char* data, const TensorMap& map, u32 footprint, u32 step, int chunks) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ u64 barriers[STAGES];
  const u32 to = shared_address(ring), full = shared_address(barriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1);
    barriers_initialized();
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  u32 offset = (blockIdx.x * step) % footprint;
  bool good = true;
  const u64 begin = clock_now();
#pragma unroll 1
  for (int i = 0; i < chunks + STAGES && good; ++i) {
    const u32 stage = i % STAGES, barrier = full + 8 * stage;
    if (i >= STAGES) good = barrier_wait(barrier, (i / STAGES - 1) & 1);
    if (i >= chunks) continue;
    barrier_expect(barrier, CHUNK);
    if (TILES) {
      tensor_load(to + stage * CHUNK, map, 0, offset / 256, barrier);
      tensor_load(to + stage * CHUNK + CHUNK / 2, map, 64, offset / 256, barrier);
    } else {
      bulk_load(to + stage * CHUNK, data + offset, CHUNK / 2, barrier);
      bulk_load(to + stage * CHUNK + CHUNK / 2, data + offset + CHUNK / 2, CHUNK / 2, barrier);
    }
    offset += CHUNK;
    if (offset >= footprint) offset -= footprint;
  }
  const u64 end = clock_now();
  store_clocks(results, begin, good ? end : begin);
}
extern "C" __global__ void __launch_bounds__(32, 1) bulk_stream(u64* results, const char* data, u32 footprint, u32 step, int chunks) {
  stream<false>(results, data, *reinterpret_cast<const TensorMap*>(data), footprint, step, chunks);
}
extern "C" __global__ void __launch_bounds__(32, 1)
    tensor_stream(u64* results, const __grid_constant__ TensorMap map, u32 footprint, u32 step, int chunks) {
  stream<true>(results, nullptr, map, footprint, step, chunks);
}

// Two blocks of a cluster read the same chunks, each one half of them for both.
template <bool TILES>
__device__ __forceinline__ void multicast(u64* results, const char* data, const TensorMap& map, u32 footprint, u32 step, int chunks) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 to = shared_address(memory), full = shared_address(barriers), empty = full + 8 * STAGES;
  u32 rank, peer_empty;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer_empty) : "r"(empty), "r"(rank ^ 1));
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 2);
    }
    barriers_initialized();
  }
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
  if (threadIdx.x == 0) {
    u32 offset = (blockIdx.x / 2 * step) % footprint;
    bool good = true;
    const u64 begin = clock_now();
#pragma unroll 1
    for (int i = 0; i < chunks + STAGES && good; ++i) {
      const u32 stage = i % STAGES, barrier = full + 8 * stage, half = rank * (CHUNK / 2);
      if (i >= STAGES) {
        good = barrier_wait(barrier, (i / STAGES - 1) & 1);
        barrier_arrive(empty + 8 * stage);
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_empty + 8 * stage) : "memory");
      }
      if (i >= chunks) continue;
      if (i >= STAGES) good = good && barrier_wait(empty + 8 * stage, (i / STAGES - 1) & 1);
      barrier_expect(barrier, CHUNK);
      if (TILES) tensor_load_both(to + stage * CHUNK + half, map, 64 * rank, offset / 256, barrier);
      else bulk_load_both(to + stage * CHUNK + half, data + offset + half, CHUNK / 2, barrier);
      offset += CHUNK;
      if (offset >= footprint) offset -= footprint;
    }
    const u64 end = clock_now();
    store_clocks(results, begin, good ? end : begin);
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32, 1)
    bulk_multicast(u64* results, const char* data, u32 footprint, u32 step, int chunks) {
  multicast<false>(results, data, *reinterpret_cast<const TensorMap*>(data), footprint, step, chunks);
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32, 1)
    tensor_multicast(u64* results, const __grid_constant__ TensorMap map, u32 footprint, u32 step, int chunks) {
  multicast<true>(results, nullptr, map, footprint, step, chunks);
}

// One copy at a time, from its issue to the end of the wait; `results`: a pair of clocks per copy.
extern "C" __global__ void __launch_bounds__(32, 1) bulk_latency(u64* results, const char* data, u32 footprint, u32 bytes, int copies) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ u64 barriers[1];
  const u32 to = shared_address(memory), full = shared_address(barriers);
  if (threadIdx.x != 0) return;
  barrier_init(full, 1);
  barriers_initialized();
  bool good = true;
#pragma unroll 1
  for (int i = 0; i < copies && good; ++i) {
    const char* from = data + ((u64)i * 1237 * 512) % footprint;
    const u64 begin = clock_now();
    barrier_expect(full, bytes);
    bulk_load(to, from, bytes, full);
    good = barrier_wait(full, i & 1);
    const u64 end = clock_now();
    results[2 * i] = begin;
    results[2 * i + 1] = good ? end : begin;
  }
}
extern "C" __global__ void __launch_bounds__(32, 1) tensor_latency(u64* results, const __grid_constant__ TensorMap map, u32 footprint, int copies) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ u64 barriers[1];
  const u32 to = shared_address(memory), full = shared_address(barriers);
  if (threadIdx.x != 0) return;
  barrier_init(full, 1);
  barriers_initialized();
  bool good = true;
#pragma unroll 1
  for (int i = 0; i < copies && good; ++i) {
    const u32 row = ((u64)i * 1237 * 512) % footprint / 256;
    const u64 begin = clock_now();
    barrier_expect(full, CHUNK / 2);
    tensor_load(to, map, 0, row, full);
    good = barrier_wait(full, i & 1);
    const u64 end = clock_now();
    results[2 * i] = begin;
    results[2 * i + 1] = good ? end : begin;
  }
}

// All threads load 16 bytes at a time past the L1 cache, 8 loads in flight each.
extern "C" __global__ void __launch_bounds__(512, 1) load_stream(u64* results, const char* data, u32 footprint, u32 step, int trips, u32 impossible) {
  u32 offset = (blockIdx.x * step) % footprint, sum = 0;
  const u32 round = 8 * 16 * blockDim.x;
  __syncthreads();
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
    u32 x[8][4];
    const char* from = data + offset + 16 * threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3])
                   : "l"(from + 16 * blockDim.x * i));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum ^= x[i][0] ^ x[i][1] ^ x[i][2] ^ x[i][3];
    offset += round;
    if (offset >= footprint) offset -= footprint;
  }
  const u64 end = clock_now();
  if (sum == impossible) results[0] = 0;
  store_clocks(results, begin, end);
}

// `data` is a chain of offsets.
extern "C" __global__ void __launch_bounds__(32, 1) load_latency(u64* results, const char* data, int loads, u32 impossible) {
  u32 offset = 0;
  if (threadIdx.x != 0) return;
  const u64 begin = clock_now();
#pragma unroll 1
  for (int i = 0; i < loads; ++i) asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(offset) : "l"(data + offset));
  const u64 end = clock_now();
  if (offset == impossible) results[1] = 0;
  store_clocks(results, begin, end);
}

// Reductions from registers. `step`: bytes between the regions of blocks; `region`: bytes that a block goes round in. The final fence waits for all.
template <int WORDS>
__device__ __forceinline__ void reduce(u64* results, char* data, u32 region, u32 step, int trips) {
  char* own = data + (u64)blockIdx.x * step;
  u32 offset = 4 * WORDS * threadIdx.x % region;
  const u32 round = 4 * WORDS * blockDim.x;
  __syncthreads();
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
    if (WORDS == 4) asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(own + offset), "f"(1.0f) : "memory");
    else asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(own + offset), "f"(1.0f) : "memory");
    offset += round;
    if (offset >= region) offset = 4 * WORDS * threadIdx.x % region;
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  const u64 end = clock_now();
  store_clocks(results, begin, end);
}
extern "C" __global__ void __launch_bounds__(512, 1) reduce_f32(u64* results, char* data, u32 region, u32 step, int trips) {
  reduce<1>(results, data, region, step, trips);
}
extern "C" __global__ void __launch_bounds__(512, 1) reduce_v4_f32(u64* results, char* data, u32 region, u32 step, int trips) {
  reduce<4>(results, data, region, step, trips);
}

// Reductions of blocks of shared memory; three in flight.
extern "C" __global__ void __launch_bounds__(32, 1) bulk_reduce(u64* results, char* data, u32 region, u32 step, u32 bytes, int trips) {
  extern __shared__ __align__(1024) char memory[];
  for (u32 i = threadIdx.x; i < bytes / 4; i += 32) reinterpret_cast<float*>(memory)[i] = 1;
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncwarp();
  if (threadIdx.x != 0) return;
  char* own = data + (u64)blockIdx.x * step;
  const u32 from = shared_address(memory);
  u32 offset = 0;
  const u64 begin = clock_now();
#pragma unroll 1
  for (int trip = 0; trip < trips; ++trip) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(own + offset), "r"(from), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 2;" ::: "memory");
    offset += bytes;
    if (offset >= region) offset = 0;
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  const u64 end = clock_now();
  store_clocks(results, begin, end);
}
