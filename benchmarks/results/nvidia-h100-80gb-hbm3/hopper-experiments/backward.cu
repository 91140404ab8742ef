// Attention backward for sm_90a, head_dim 128, bf16, (B, S, H, D) contiguous: a block owns 128 keys (two consumer warpgroups of 64), one producer thread, tiles of 80 (or 64) queries.
// Options: -DCAUSAL=0|1 -DSTAGES=1|2 -DTOKEN=0|1 -DSPLIT=0|1 (end the basic block before the wait for dP) -DORDER=0|1|2 (dK issued when dV is done, at once, before dQ)
// -DDV_EARLY=0|1 (dV as soon as P is there; spills with 80) -DTILE=80|64
#ifndef CAUSAL
#define CAUSAL 0
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef TOKEN
#define TOKEN 0
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef ORDER
#define ORDER 0
#endif
#ifndef TILE
#define TILE 80
#endif
#ifndef DV_EARLY
#define DV_EARLY 0
#endif
typedef unsigned u32; typedef unsigned long long u64;
struct __align__(64) Map { char bytes[128]; };

constexpr int D = 128, GROUPS = 2, N = 64 * GROUPS, M = TILE;  // N keys, M queries
constexpr u32 KV_SLAB = N * 128, Q_SLAB = M * 128, KV_BYTES = 2 * KV_SLAB, Q_BYTES = 2 * Q_SLAB, ROW_BYTES = 4 * M;  // a slab is 64 columns: rows of 128 bytes, 128-byte swizzle
constexpr u32 DS_BYTES = GROUPS * Q_SLAB;  // dS: [64 keys of a warpgroup][M queries][64 keys]

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
// Descriptor of an operand with 128-byte swizzle and 8 rows every 1024 bytes; `slab`: bytes to the next 64 columns where the rows are k, else ignored.
__device__ __forceinline__ u64 descriptor(u32 address, u32 slab) { return u64(address >> 4) | u64(slab >> 4) << 16 | u64(64) << 32 | u64(1) << 62; }

__device__ __forceinline__ void multiply_scores(float (&d)[40], u64 a, u64 b, int scale_d) {
    asm volatile("{.reg .pred p; setp.ne.b32 p,%42,0;\nwgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16\n{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39},\n%40,%41,p,1,1,0,0;}"
        : "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3]),"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7]),
          "+f"(d[8]),"+f"(d[9]),"+f"(d[10]),"+f"(d[11]),"+f"(d[12]),"+f"(d[13]),"+f"(d[14]),"+f"(d[15]),
          "+f"(d[16]),"+f"(d[17]),"+f"(d[18]),"+f"(d[19]),"+f"(d[20]),"+f"(d[21]),"+f"(d[22]),"+f"(d[23]),
          "+f"(d[24]),"+f"(d[25]),"+f"(d[26]),"+f"(d[27]),"+f"(d[28]),"+f"(d[29]),"+f"(d[30]),"+f"(d[31]),
          "+f"(d[32]),"+f"(d[33]),"+f"(d[34]),"+f"(d[35]),"+f"(d[36]),"+f"(d[37]),"+f"(d[38]),"+f"(d[39])
        : "l"(a),"l"(b),"r"(scale_d));
}
__device__ __forceinline__ void multiply_values(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int scale_d) {
    asm volatile("{.reg .pred p; setp.ne.b32 p,%69,0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16\n{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},\n{%64,%65,%66,%67},%68,p,1,1,1;}"
        : "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3]),"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7]),
          "+f"(d[8]),"+f"(d[9]),"+f"(d[10]),"+f"(d[11]),"+f"(d[12]),"+f"(d[13]),"+f"(d[14]),"+f"(d[15]),
          "+f"(d[16]),"+f"(d[17]),"+f"(d[18]),"+f"(d[19]),"+f"(d[20]),"+f"(d[21]),"+f"(d[22]),"+f"(d[23]),
          "+f"(d[24]),"+f"(d[25]),"+f"(d[26]),"+f"(d[27]),"+f"(d[28]),"+f"(d[29]),"+f"(d[30]),"+f"(d[31]),
          "+f"(d[32]),"+f"(d[33]),"+f"(d[34]),"+f"(d[35]),"+f"(d[36]),"+f"(d[37]),"+f"(d[38]),"+f"(d[39]),
          "+f"(d[40]),"+f"(d[41]),"+f"(d[42]),"+f"(d[43]),"+f"(d[44]),"+f"(d[45]),"+f"(d[46]),"+f"(d[47]),
          "+f"(d[48]),"+f"(d[49]),"+f"(d[50]),"+f"(d[51]),"+f"(d[52]),"+f"(d[53]),"+f"(d[54]),"+f"(d[55]),
          "+f"(d[56]),"+f"(d[57]),"+f"(d[58]),"+f"(d[59]),"+f"(d[60]),"+f"(d[61]),"+f"(d[62]),"+f"(d[63])
        : "r"(a0),"r"(a1),"r"(a2),"r"(a3),"l"(b),"r"(scale_d));
}

// A and B in shared memory; A's rows are k (transposed)
__device__ __forceinline__ void multiply_transposed(float (&d)[40], u64 a, u64 b, int scale_d) {
    asm volatile("{.reg .pred p; setp.ne.b32 p,%42,0;\nwgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16\n{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39},\n%40,%41,p,1,1,1,0;}"
        : "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3]),"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7]),
          "+f"(d[8]),"+f"(d[9]),"+f"(d[10]),"+f"(d[11]),"+f"(d[12]),"+f"(d[13]),"+f"(d[14]),"+f"(d[15]),
          "+f"(d[16]),"+f"(d[17]),"+f"(d[18]),"+f"(d[19]),"+f"(d[20]),"+f"(d[21]),"+f"(d[22]),"+f"(d[23]),
          "+f"(d[24]),"+f"(d[25]),"+f"(d[26]),"+f"(d[27]),"+f"(d[28]),"+f"(d[29]),"+f"(d[30]),"+f"(d[31]),
          "+f"(d[32]),"+f"(d[33]),"+f"(d[34]),"+f"(d[35]),"+f"(d[36]),"+f"(d[37]),"+f"(d[38]),"+f"(d[39])
        : "l"(a),"l"(b),"r"(scale_d));
}
__device__ __forceinline__ void multiply_scores(float (&d)[32], u64 a, u64 b, int scale_d) {
    asm volatile("{.reg .pred p; setp.ne.b32 p,%34,0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16\n{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},\n%32,%33,p,1,1,0,0;}"
        : "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3]),"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7]),
          "+f"(d[8]),"+f"(d[9]),"+f"(d[10]),"+f"(d[11]),"+f"(d[12]),"+f"(d[13]),"+f"(d[14]),"+f"(d[15]),
          "+f"(d[16]),"+f"(d[17]),"+f"(d[18]),"+f"(d[19]),"+f"(d[20]),"+f"(d[21]),"+f"(d[22]),"+f"(d[23]),
          "+f"(d[24]),"+f"(d[25]),"+f"(d[26]),"+f"(d[27]),"+f"(d[28]),"+f"(d[29]),"+f"(d[30]),"+f"(d[31])
        : "l"(a),"l"(b),"r"(scale_d));
}
__device__ __forceinline__ void multiply_transposed(float (&d)[32], u64 a, u64 b, int scale_d) {
    asm volatile("{.reg .pred p; setp.ne.b32 p,%34,0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16\n{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},\n%32,%33,p,1,1,1,0;}"
        : "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3]),"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7]),
          "+f"(d[8]),"+f"(d[9]),"+f"(d[10]),"+f"(d[11]),"+f"(d[12]),"+f"(d[13]),"+f"(d[14]),"+f"(d[15]),
          "+f"(d[16]),"+f"(d[17]),"+f"(d[18]),"+f"(d[19]),"+f"(d[20]),"+f"(d[21]),"+f"(d[22]),"+f"(d[23]),
          "+f"(d[24]),"+f"(d[25]),"+f"(d[26]),"+f"(d[27]),"+f"(d[28]),"+f"(d[29]),"+f"(d[30]),"+f"(d[31])
        : "l"(a),"l"(b),"r"(scale_d));
}

__device__ __forceinline__ void load_rows(u32 to, const float* from, u32 bytes, u32 b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" :: "r"(to), "l"(from), "r"(bytes), "r"(b) : "memory");
}
__device__ __forceinline__ void load_four(float (&r)[4], u32 a) { asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3},[%4];" : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "r"(a) : "memory"); }
__device__ __forceinline__ void add4(float* to, float a, float b, float c, float d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0],{%1,%2,%3,%4};" :: "l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
struct Ring { int stage; u32 parity; __device__ __forceinline__ void next() { if (++stage == STAGES) { stage = 0; parity ^= 1; } } };
struct No { enum { value = 0 }; }; struct Yes { enum { value = 1 }; };

__device__ __forceinline__ void issue_scores(float (&S)[M / 2], u64 keys, u64 queries) {  // 64 keys x M queries
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) multiply_scores(S, keys + (i / 4) * (KV_SLAB >> 4) + (i % 4) * 2, queries + (i / 4) * (Q_SLAB >> 4) + (i % 4) * 2, i > 0);
    wgmma_commit();
}
__device__ __forceinline__ void issue_gradient(float (&G)[D / 2], u32 (&P)[M / 4], u64 queries) {  // 64 keys x D
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < M / 16; ++i) multiply_values(G, P[4 * i], P[4 * i + 1], P[4 * i + 2], P[4 * i + 3], queries + i * 128, 1);
    wgmma_commit();
}
__device__ __forceinline__ void issue_query_gradient(float (&G)[M / 2], u64 keys, u64 ds) {  // 64 of D x M queries
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < N / 16; ++i) multiply_transposed(G, keys + i * 128, ds + (i / 4) * (Q_SLAB >> 4) + (i % 4) * 2, i > 0);
    wgmma_commit();
}
// 16 keys x D of a warp to its own rows of a tile in shared memory
__device__ __forceinline__ void store_fragment(float (&G)[D / 2], u32 rows, int lane, float f) {
    const u32 line = rows + (lane % 16) * 128;
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = pack(G[8 * c + 2 * i] * f, G[8 * c + 2 * i + 1] * f);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};"
            :: "r"(line + (c / 4) * KV_SLAB + (((2 * c % 8 + lane / 16) ^ (lane & 7)) << 4)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
    }
}

struct Barriers { u64 kv_full, q_full[STAGES], do_full[STAGES], empty[STAGES], token[GROUPS]; };

// lse2, delta: (B, H, tiles of M queries, M), of 16 rows in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: what a thread needs lies together; lse2 = LSE log2(e), +infinity beyond S; dq: (B, H, tiles, warpgroup, M / 8, 128 threads, 4) of float, zero before, without `scale`
extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
attention_backward(const __grid_constant__ Map q_map, const __grid_constant__ Map k_map, const __grid_constant__ Map v_map, const __grid_constant__ Map do_map,
                   const __grid_constant__ Map dk_map, const __grid_constant__ Map dv_map,
                   const float* lse2, const float* delta, float* dq, int S_len, int heads, int batches, float scale_log2, float scale, int section) {
    extern __shared__ __align__(1024) char tiles[];  // K (later dK), V (later dV), Q ring, dO ring, dS twice, rows of lse2 and delta
    __shared__ Barriers barriers;
    const u32 k_tile = shared_address(tiles), v_tile = k_tile + KV_BYTES, q_tiles = v_tile + KV_BYTES, do_tiles = q_tiles + STAGES * Q_BYTES, ds_tiles = do_tiles + STAGES * Q_BYTES;
    const u32 lse_rows = ds_tiles + 2 * DS_BYTES, delta_rows = lse_rows + STAGES * ROW_BYTES;
    const u32 kv_full = shared_address(&barriers.kv_full), q_full = shared_address(barriers.q_full), do_full = shared_address(barriers.do_full);
    const u32 empty = shared_address(barriers.empty), token = shared_address(barriers.token);
    if (threadIdx.x == 0) {
        barrier_init(kv_full, 1);
        for (int i = 0; i < STAGES; ++i) { barrier_init(q_full + 8 * i, 1); barrier_init(do_full + 8 * i, 1); barrier_init(empty + 8 * i, GROUPS); }
        for (int i = 0; i < GROUPS; ++i) barrier_init(token + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = __shfl_sync(~0u, (int)(threadIdx.x / 128), 0) - 1;
    const int key_tiles = (S_len + N - 1) / N, per = section * key_tiles, first_head = blockIdx.x / per * section, size = min(section, heads * batches - first_head), rest = blockIdx.x % per; const int at = first_head + rest % size, head = at % heads, batch = at / heads, first_key = rest / size * N;
    const int count = (S_len + M - 1) / M, first = CAUSAL ? first_key / M : 0;
    const long long row_tile = ((long long)batch * heads + head) * count;

    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            Ring r{0, 1};  // a ring starts empty
#pragma unroll 1
            for (int j = first; j < count; ++j) {
                const u32 qb = q_full + 8 * r.stage, db = do_full + 8 * r.stage;
                wait(empty + 8 * r.stage, r.parity); expect(qb, Q_BYTES + ROW_BYTES);
                load_tile(q_tiles + r.stage * Q_BYTES, q_map, j * M, head, batch, qb);
                load_rows(lse_rows + r.stage * ROW_BYTES, lse2 + (row_tile + j) * M, ROW_BYTES, qb);
                if (j == first) {
                    expect(kv_full, 2 * KV_BYTES);
                    load_tile(k_tile, k_map, first_key, head, batch, kv_full); load_tile(v_tile, v_map, first_key, head, batch, kv_full);
                }
                expect(db, Q_BYTES + ROW_BYTES);
                load_tile(do_tiles + r.stage * Q_BYTES, do_map, j * M, head, batch, db);
                load_rows(delta_rows + r.stage * ROW_BYTES, delta + (row_tile + j) * M, ROW_BYTES, db);
                r.next();
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int thread = threadIdx.x % 128, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;  // shuffled: uniform to ptxas
        const int passes = thread == 0, frees = thread == 32;
        const u32 own = token + 8 * group, other = token + 8 * (group ^ 1);
        u64 k_desc = descriptor(k_tile + group * 64 * 128, 0), v_desc = descriptor(v_tile + group * 64 * 128, 0), kt_desc = descriptor(k_tile + group * KV_SLAB, 0);
        u64 q_desc = descriptor(q_tiles, 0), do_desc = descriptor(do_tiles, 0), qt_desc = descriptor(q_tiles, Q_SLAB), dot_desc = descriptor(do_tiles, Q_SLAB), ds_desc = descriptor(ds_tiles, 0);
        // dS, an 8 x 8 matrix a lane's row: queries (lane / 16) * 8 + lane % 8, keys 16 * warp + 8 * (lane / 8 % 2)
        u32 ds_line = ds_tiles + group * Q_SLAB + ((lane / 16) * 8 + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ (lane & 7)) << 4);
        const int key = first_key + group * 64 + 16 * warp + lane / 4, column = 2 * (lane % 4);
        const u32 lse_line = lse_rows + column * 8, delta_line = delta_rows + column * 8;
        float* to = dq + ((row_tile + first) * GROUPS + group) * (64 * M) + thread * 4;
        Ring r{0, 0};
        u32 turn = group == 0, buffer = 0;  // the first has its first turn at once
        float dK[D / 2], dV[D / 2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dK[i] = dV[i] = 0;
        keep(dK); keep(dV);
        wait(kv_full, 0);

        auto round = [&](auto masked, int j) {
            float S[M / 2], T[M / 2]; u32 P[M / 4], E[M / 4];
            asm volatile("" : "+l"(k_desc), "+l"(v_desc), "+l"(q_desc), "+l"(do_desc));
            asm volatile("" : "+l"(kt_desc), "+l"(qt_desc), "+l"(dot_desc), "+l"(ds_desc), "+r"(ds_line));
            const int stage = r.stage * (Q_BYTES >> 4);
            wait(q_full + 8 * r.stage, r.parity);
            if (TOKEN) { wait(own, turn); turn ^= 1; }
            issue_scores(S, k_desc, q_desc + stage);
            wait(do_full + 8 * r.stage, r.parity);
            issue_scores(T, v_desc, do_desc + stage);
            wgmma_wait<1>(); keep(S);
            if (TOKEN) arrive_if(other, passes);
            if (decltype(masked)::value) {
                const int see0 = CAUSAL ? key - j * M - column : 0, see1 = see0 + 8;  // the first query that sees the key, counted like a thread's columns
#pragma unroll
                for (int i = 0; i < M / 2; ++i)
                    if ((CAUSAL && 8 * (i / 4) + i % 2 < ((i & 2) ? see1 : see0)) || key + ((i & 2) ? 8 : 0) >= S_len) S[i] = -__int_as_float(0x7f800000);
            }
#pragma unroll
            for (int i = 0; i < M / 16; ++i) {
                float l[4]; load_four(l, lse_line + r.stage * ROW_BYTES + i * 64);
#pragma unroll
                for (int h = 0; h < 8; ++h) S[8 * i + h] = exp2_approx(fmaf(S[8 * i + h], scale_log2, -l[h / 4 * 2 + h % 2]));
            }
            if (SPLIT) wait(kv_full, 0);  // true for ever; ends a basic block, so that ptxas cannot hoist the next wait over the exponentials
            if (DV_EARLY) {
#pragma unroll
                for (int i = 0; i < M / 4; ++i) P[i] = pack(S[2 * i], S[2 * i + 1]);
                keep(P);
                issue_gradient(dV, P, dot_desc + stage);
                wgmma_wait<1>();
            } else wgmma_wait<0>();
            keep(T);
#pragma unroll
            for (int i = 0; i < M / 16; ++i) {
                float d[4]; load_four(d, delta_line + r.stage * ROW_BYTES + i * 64);
#pragma unroll
                for (int h = 0; h < 8; ++h) T[8 * i + h] = S[8 * i + h] * (T[8 * i + h] - d[h / 4 * 2 + h % 2]);
            }
#pragma unroll
            for (int i = 0; i < M / 4; ++i) { if (!DV_EARLY) P[i] = pack(S[2 * i], S[2 * i + 1]); E[i] = pack(T[2 * i], T[2 * i + 1]); }
#pragma unroll
            for (int i = 0; i < M / 16; ++i)
                asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0],{%1,%2,%3,%4};"
                    :: "r"(ds_line + buffer * DS_BYTES + i * 2048), "r"(E[4 * i]), "r"(E[4 * i + 1]), "r"(E[4 * i + 2]), "r"(E[4 * i + 3]) : "memory");
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            keep(E);
            if (!DV_EARLY) { keep(P); issue_gradient(dV, P, dot_desc + stage); }
            if (ORDER == 2) issue_gradient(dK, E, qt_desc + stage);
            asm volatile("bar.sync 1,%0;" :: "n"(128 * GROUPS) : "memory");  // dS of both; with two buffers it also tells that both have read the one of the last tile but one
            float G[M / 2];
            issue_query_gradient(G, kt_desc, ds_desc + buffer * (DS_BYTES >> 4));
            if (ORDER == 0) wgmma_wait<1>();
            if (ORDER < 2) issue_gradient(dK, E, qt_desc + stage);
            wgmma_wait<1>();
            if (ORDER == 2) { keep(dV); keep(dK); keep(P); keep(E); arrive_if(empty + 8 * r.stage, frees); wgmma_wait<0>(); }
            keep(G);
#pragma unroll
            for (int i = 0; i < M / 8; ++i) add4(to + i * 512, G[4 * i], G[4 * i + 1], G[4 * i + 2], G[4 * i + 3]);
            to += GROUPS * 64 * M;
            if (ORDER < 2) { wgmma_wait<0>(); keep(dV); keep(dK); keep(P); keep(E); arrive_if(empty + 8 * r.stage, frees); }
            r.next(); buffer ^= 1;
        };
        const int masked_until = first_key + N > S_len ? count : CAUSAL ? min(count, (first_key + N - 2) / M + 1) : first;
        int j = first;
#pragma unroll 1
        for (; j < masked_until; ++j) round(Yes(), j);
#pragma unroll 1
        for (; j < count; ++j) round(No(), j);

        asm volatile("bar.sync 1,%0;" :: "n"(128 * GROUPS) : "memory");  // both have read K and V
        const u32 rows = (group * 64 + warp * 16) * 128;
        const int first_row = first_key + group * 64 + warp * 16;
        store_fragment(dV, v_tile + rows, lane, 1.f);
        store_fragment(dK, k_tile + rows, lane, scale);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0 && first_row < S_len) {
            store_slab(v_tile + rows, dv_map, 0, first_row, head, batch); store_slab(v_tile + rows + KV_SLAB, dv_map, 1, first_row, head, batch);
            store_slab(k_tile + rows, dk_map, 0, first_row, head, batch); store_slab(k_tile + rows + KV_SLAB, dk_map, 1, first_row, head, batch);
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        }
    }
}
