// Attention forward for sm_90a, head_dim 128, bf16, (B, S, H, D) contiguous: three consumer warpgroups of 64 rows, tiles of 80 keys, one producer warp.
// Options: -DCAUSAL=0|1 -DSTAGES=2|3 -DTOKEN=0|1 -DSPLIT=0|1 (end the basic block there)
#ifndef CAUSAL
#define CAUSAL 0
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef TOKEN
#define TOKEN 1
#endif
#ifndef SPLIT
#define SPLIT 0
#endif
typedef unsigned u32; typedef unsigned long long u64;
struct __align__(64) Map { char bytes[128]; };

constexpr int D = HD, GROUPS = WG, M = 64 * GROUPS, N = TN, SLABS = D / 64;
constexpr u32 Q_SLAB = M * 128, KV_SLAB = N * 128, Q_BYTES = SLABS * Q_SLAB, KV_BYTES = SLABS * KV_SLAB;  // a slab is 64 columns: rows of 128 bytes, 128-byte swizzle

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u32 b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" :: "r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void expect(u32 b, u32 n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" :: "r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void arrive_if(u32 b, int who) { asm volatile("{.reg .pred p; setp.ne.b32 p,%1,0; @p mbarrier.arrive.shared::cta.b64 _,[%0];}" :: "r"(b), "r"(who) : "memory"); }
__device__ __forceinline__ void wait(u32 b, u32 parity) {
    asm volatile("{.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n@p bra DONE;\nbra AGAIN;\nDONE:}" :: "r"(b), "r"(parity) : "memory");
}
__device__ __forceinline__ void load_tile(u32 to, const Map& map, int row, int head, int batch, u32 b) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3,%2,%4,%5}],[%6];"
        :: "r"(to), "l"(&map), "r"(0), "r"(row), "r"(head), "r"(batch), "r"(b) : "memory");
}
__device__ __forceinline__ void store_slab(u32 from, const Map& map, int slab, int row, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0,{%1,%2,%3,%4,%5}],[%6];"
        :: "l"(&map), "r"(0), "r"(row), "r"(slab), "r"(head), "r"(batch), "r"(from) : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int K> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(K) : "memory"); }
template <int K> __device__ __forceinline__ void keep(float (&x)[K]) {
#pragma unroll
    for (int i = 0; i < K; ++i) asm volatile("" : "+f"(x[i]) :: "memory");
}
template <int K> __device__ __forceinline__ void keep(u32 (&x)[K]) {
#pragma unroll
    for (int i = 0; i < K; ++i) asm volatile("" : "+r"(x[i]) :: "memory");
}
__device__ __forceinline__ float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 pack(float lo, float hi) { u32 r; asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
__device__ __forceinline__ float quad_max(float x) { x = fmaxf(x, __shfl_xor_sync(~0u, x, 2)); return fmaxf(x, __shfl_xor_sync(~0u, x, 1)); }
__device__ __forceinline__ float quad_sum(float x) { x += __shfl_xor_sync(~0u, x, 2); return x + __shfl_xor_sync(~0u, x, 1); }
// Descriptor of an operand with 128-byte swizzle and 8 rows every 1024 bytes; `slab`: bytes to the next 64 columns where the rows are k, else ignored.
__device__ __forceinline__ u64 descriptor(u32 address, u32 slab) { return u64(address >> 4) | u64(slab >> 4) << 16 | u64(64) << 32 | u64(1) << 62; }

//WGMMA
struct Ring { int stage; u32 parity; __device__ __forceinline__ void next() { if (++stage == STAGES) { stage = 0; parity ^= 1; } } };
struct No { enum { value = 0 }; }; struct Yes { enum { value = 1 }; };
struct Rows { float m0, m1, l0, l1; };  // of the two rows of a thread: maximum of raw scores; own share of the sum

__device__ __forceinline__ void issue_scores(float (&S)[N / 2], u64 q, u64 k) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) multiply_scores(S, q + (i / 4) * (Q_SLAB >> 4) + (i % 4) * 2, k + (i / 4) * (KV_SLAB >> 4) + (i % 4) * 2, i > 0);
    wgmma_commit();
}
__device__ __forceinline__ void issue_values(float (&O)[D / 2], u32 (&P)[N / 4], u64 v) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < N / 16; ++i) multiply_values(O, P[4 * i], P[4 * i + 1], P[4 * i + 2], P[4 * i + 3], v + i * 128, 1);
    wgmma_commit();
}
// Columns of a thread are 8 (i / 4) + i % 2 after the first; `last`: the last visible one of either row, counted like that.
__device__ __forceinline__ void mask(float (&S)[N / 2], int last0, int last1) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) if (8 * (i / 4) + i % 2 > ((i & 2) ? last1 : last0)) S[i] = -__int_as_float(0x7f800000);
}
__device__ __forceinline__ void new_maximum(float (&S)[N / 2], Rows& r, float scale, float& c0, float& c1) {
    float a0 = S[0], a1 = S[2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) if (i & 2) a1 = fmaxf(a1, S[i]); else a0 = fmaxf(a0, S[i]);
    a0 = fmaxf(quad_max(a0), r.m0); a1 = fmaxf(quad_max(a1), r.m1);
    c0 = exp2_approx((r.m0 - a0) * scale); c1 = exp2_approx((r.m1 - a1) * scale);
    r.m0 = a0; r.m1 = a1;
}
__device__ __forceinline__ void exponentials(float (&S)[N / 2], const Rows& r, float scale) {
    float s0 = r.m0 * scale, s1 = r.m1 * scale;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) S[i] = exp2_approx(fmaf(S[i], scale, (i & 2) ? -s1 : -s0));
}
__device__ __forceinline__ void sum_and_pack(const float (&S)[N / 2], Rows& r, float c0, float c1, u32 (&P)[N / 4]) {
    r.l0 *= c0; r.l1 *= c1;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) if (i & 2) r.l1 += S[i]; else r.l0 += S[i];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) P[i] = pack(S[2 * i], S[2 * i + 1]);
}

struct Barriers { u64 q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], token[GROUPS]; };

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
attention_forward(const __grid_constant__ Map q_map, const __grid_constant__ Map k_map, const __grid_constant__ Map v_map, const __grid_constant__ Map out_map,
                  float* lse, int S_len, int heads, int batches, float scale_log2, int section, int snake) {
    extern __shared__ __align__(1024) char tiles[];  // Q (later O), K ring, V ring
    __shared__ Barriers barriers;
    const u32 q_tile = shared_address(tiles), k_tiles = q_tile + Q_BYTES, v_tiles = k_tiles + STAGES * KV_BYTES;
    const u32 q_full = shared_address(&barriers.q_full), q_empty = shared_address(&barriers.q_empty);
    const u32 k_full = shared_address(barriers.k_full), k_empty = shared_address(barriers.k_empty);
    const u32 v_full = shared_address(barriers.v_full), v_empty = shared_address(barriers.v_empty), token = shared_address(barriers.token);
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1); barrier_init(q_empty, 4 * GROUPS);
        for (int i = 0; i < STAGES; ++i) { barrier_init(k_full + 8 * i, 1); barrier_init(k_empty + 8 * i, GROUPS); barrier_init(v_full + 8 * i, 1); barrier_init(v_empty + 8 * i, GROUPS); }
        for (int i = 0; i < GROUPS; ++i) barrier_init(token + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = __shfl_sync(~0u, (int)(threadIdx.x / 128), 0) - 1;
    const int tiles_m = (S_len + M - 1) / M, work = tiles_m * heads * batches;

    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(WG == 3 ? 32 : 24));
        if (threadIdx.x == 0) {
            Ring rk{0, 1}, rv{0, 1};  // a ring starts empty
            u32 q_parity = 1;
#pragma unroll 1
            for (int turn_ = 0, w = blockIdx.x; w < work; ++turn_, w = turn_ * gridDim.x + ((snake & turn_ & 1) ? gridDim.x - 1 - blockIdx.x : blockIdx.x)) {
                const int per = section * tiles_m, first_head = w / per * section, size = min(section, heads * batches - first_head), rest = w % per; const int m = tiles_m - 1 - rest / size, at = first_head + rest % size, head = at % heads, batch = at / heads;
                const int keys = CAUSAL ? min(S_len, m * M + M) : S_len, count = (keys + N - 1) / N;
#pragma unroll 1
                for (int j = 0; j <= count; ++j) {  // K of tile j, V of tile j - 1: the order in which they are used
                    if (j < count) {
                        wait(k_empty + 8 * rk.stage, rk.parity); expect(k_full + 8 * rk.stage, KV_BYTES);
                        load_tile(k_tiles + rk.stage * KV_BYTES, k_map, j * N, head, batch, k_full + 8 * rk.stage); rk.next();
                    }
                    if (j == 0) {  // after the first K: that one may come while the last tile's output still leaves through Q's memory
                        wait(q_empty, q_parity); q_parity ^= 1; expect(q_full, Q_BYTES);
                        load_tile(q_tile, q_map, m * M, head, batch, q_full);
                    } else {
                        wait(v_empty + 8 * rv.stage, rv.parity); expect(v_full + 8 * rv.stage, KV_BYTES);
                        load_tile(v_tiles + rv.stage * KV_BYTES, v_map, (j - 1) * N, head, batch, v_full + 8 * rv.stage); rv.next();
                    }
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(WG == 3 ? 160 : 240));
        const int thread = threadIdx.x % 128, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;  // shuffled: uniform to ptxas
        const int passes = thread == 0, frees_k = thread == 32, frees_v = thread == 64;  // different threads: ptxas puts neighbouring arrivals of one thread into a branch
        const u32 own = token + 8 * group, other = token + 8 * (group + 1 == GROUPS ? 0 : group + 1);
        u64 q_desc = descriptor(q_tile + group * 64 * 128, 0), k_desc = descriptor(k_tiles, 0), v_desc = descriptor(v_tiles, KV_SLAB);
        Ring rk{0, 0}, rv{0, 0};
        u32 q_parity = 0, turn = group == 0;  // the first has its first turn at once
#pragma unroll 1
        for (int turn_ = 0, w = blockIdx.x; w < work; ++turn_, w = turn_ * gridDim.x + ((snake & turn_ & 1) ? gridDim.x - 1 - blockIdx.x : blockIdx.x)) {
            const int per = section * tiles_m, first_head = w / per * section, size = min(section, heads * batches - first_head), rest = w % per; const int m = tiles_m - 1 - rest / size, at = first_head + rest % size, head = at % heads, batch = at / heads;
            const int keys = CAUSAL ? min(S_len, m * M + M) : S_len, count = (keys + N - 1) / N;
            const int first_row = m * M + group * 64;
            const int own_count = CAUSAL ? min(count, (first_row + 64 + N - 1) / N) : count;  // tiles that some row of this warpgroup sees
            const int unmasked = CAUSAL ? min(S_len, first_row + 1) / N : S_len / N;          // tiles that all rows see whole
            const int row = first_row + 16 * warp + lane / 4;
            const int column = 2 * (lane % 4);
            int last0 = (CAUSAL ? min(S_len - 1, row) : S_len - 1) - column, last1 = (CAUSAL ? min(S_len - 1, row + 8) : S_len - 1) - column;
            float O[D / 2]; u32 P[N / 4]; Rows r{-__int_as_float(0x7f800000), -__int_as_float(0x7f800000), 0, 0};
#pragma unroll
            for (int i = 0; i < D / 2; ++i) O[i] = 0;

            wait(q_full, q_parity); q_parity ^= 1;
            {   // the first tile: every row sees its first key, so all maxima are finite from here on
                float S[N / 2], c0, c1;
                wait(k_full + 8 * rk.stage, rk.parity);
                if (TOKEN) { wait(own, turn); turn ^= 1; }
                issue_scores(S, q_desc, k_desc + rk.stage * (KV_BYTES >> 4));
                wgmma_wait<0>(); keep(S);
                if (TOKEN) arrive_if(other, passes);
                arrive_if(k_empty + 8 * rk.stage, frees_k); rk.next();
                if (unmasked == 0) mask(S, last0, last1);
                new_maximum(S, r, scale_log2, c0, c1);
                exponentials(S, r, scale_log2);
                sum_and_pack(S, r, 0.f, 0.f, P);
                keep(P); keep(O);
            }
            auto round = [&](auto masked, int j) {
                float S[N / 2], c0, c1;
                asm volatile("" : "+l"(q_desc), "+l"(k_desc), "+l"(v_desc));
                wait(k_full + 8 * rk.stage, rk.parity);
                if (TOKEN) { wait(own, turn); turn ^= 1; }
                issue_scores(S, q_desc, k_desc + rk.stage * (KV_BYTES >> 4));
                wait(v_full + 8 * rv.stage, rv.parity);
                issue_values(O, P, v_desc + rv.stage * (KV_BYTES >> 4));
                if (TOKEN == 2) { wgmma_wait<0>(); keep(S); keep(O); keep(P); arrive_if(other, passes); arrive_if(v_empty + 8 * rv.stage, frees_v); rv.next(); }
                else { wgmma_wait<1>(); keep(S); }
                if (TOKEN == 1) arrive_if(other, passes);
                arrive_if(k_empty + 8 * rk.stage, frees_k); rk.next();
                if (decltype(masked)::value) mask(S, last0 - j * N, last1 - j * N);
                new_maximum(S, r, scale_log2, c0, c1);
                exponentials(S, r, scale_log2);
                if (SPLIT) wait(q_full, q_parity ^ 1);  // true through the whole tile; ends a basic block, so that ptxas cannot hoist the next wait
                if (TOKEN != 2) { wgmma_wait<0>(); keep(O); keep(P);
                arrive_if(v_empty + 8 * rv.stage, frees_v); rv.next(); }
                sum_and_pack(S, r, c0, c1, P);
#pragma unroll
                for (int i = 0; i < D / 2; ++i) O[i] *= (i & 2) ? c1 : c0;
                keep(P); keep(O);
            };
            int j = 1;
#pragma unroll 1
            for (; j < unmasked; ++j) round(No(), j);
#pragma unroll 1
            for (; j < own_count; ++j) round(Yes(), j);
            wait(v_full + 8 * rv.stage, rv.parity);
            issue_values(O, P, v_desc + rv.stage * (KV_BYTES >> 4));
            wgmma_wait<0>(); keep(O); keep(P);
            arrive_if(v_empty + 8 * rv.stage, frees_v); rv.next();
#pragma unroll 1
            for (; CAUSAL && j < count; ++j) {  // tiles that only later warpgroups see: one warp passes them on. If all waited, one could fall two phases behind and hang:
                if (warp == 0) {      // where no wgmma keeps four warps together, only one may follow a parity
                    if (TOKEN) { wait(own, turn); arrive_if(other, lane == 0); }
                    wait(k_full + 8 * rk.stage, rk.parity); arrive_if(k_empty + 8 * rk.stage, lane == 0);
                    wait(v_full + 8 * rv.stage, rv.parity); arrive_if(v_empty + 8 * rv.stage, lane == 0);
                }
                turn ^= TOKEN != 0; rk.next(); rv.next();
            }

            float sum0 = quad_sum(r.l0), sum1 = quad_sum(r.l1), inverse0 = 1.f / sum0, inverse1 = 1.f / sum1;
            if (lane % 4 == 0) {
                float* to = lse + ((long long)batch * heads + head) * S_len;
                if (row < S_len) to[row] = (r.m0 * scale_log2 + __log2f(sum0)) * 0.693147180559945f;
                if (row + 8 < S_len) to[row + 8] = (r.m1 * scale_log2 + __log2f(sum1)) * 0.693147180559945f;
            }
            asm volatile("bar.sync %0,128;" :: "r"(group + 1) : "memory");  // all warps have read Q
            const u32 slab = q_tile + (group * 64 + warp * 16) * 128, line = slab + (lane % 16) * 128;
#pragma unroll
            for (int c = 0; c < D / 16; ++c) {  // 16 x 16
                u32 a[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) { float f = (i & 1) ? inverse1 : inverse0; a[i] = pack(O[8 * c + 2 * i] * f, O[8 * c + 2 * i + 1] * f); }
                asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};"
                    :: "r"(line + (c / 4) * Q_SLAB + (((2 * c % 8 + lane / 16) ^ (lane & 7)) << 4)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            if (lane == 0) {
                if (first_row + warp * 16 < S_len) {
                    for (int s = 0; s < SLABS; ++s) store_slab(slab + s * Q_SLAB, out_map, s, first_row + warp * 16, head, batch);
                }
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
                asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            }
            arrive_if(q_empty, lane == 0);
        }
    }
}
