// Forward attention on Hopper's warpgroup instructions: O = softmax(scale Q Kᵀ) V and the natural-log LSE of each row, for 16-bit types and
// positive scales.
//
// One block computes TILE_Q rows of one head. A warpgroup is four warps. The first one copies: a single thread of it asks the TMA unit for Q and for
// the tiles of K and V, NUM_STAGES of each ahead. Each of the others owns 64 rows, whose O, P and softmax state it keeps in registers, and to which
// the first hands most of its own. Their products run while their threads go on (FlashAttention-3, Shah et al. 2024, arXiv 2407.08608, algorithm 2):
//
//     S_j = Q K_jᵀ             issued first, waited for first
//     O += P_{j-1} V_{j-1}     in flight while S_j becomes P_j
//
// so the tensor cores have work while the maximum is found, and while exponentials are computed they have that of warpgroups that are out of step.
// The assembler moves the wait for O ahead of most exponentials; kernels in which it was held back were slower on an H100 (docs/hopper.md).
//
// Shared memory: Q [TILE_Q / 64][⌈D / 64⌉][64][64] | K [NUM_STAGES][⌈D / 64⌉][TILE_KV][64] | V [NUM_STAGES][⌈DV / 64⌉][TILE_KV][64] | mbarriers. At
// the end each warp's part of O passes through its warpgroup's part of Q.
//
// mbarriers: Q has landed; for each stage of K and of V, "full": the tile has landed, and "empty": every warpgroup is done with it.
#include "tile/constants.cuh"
#include "tile/epilogue.cuh"
#include "tile/ring.cuh"
#include "tile/schedule.cuh"
#include "tile/score.cuh"
#include "tile/slab_tile.cuh"
#include "tile/softmax.cuh"
#include "tile/visibility.cuh"
#include "ptx/warpgroup.cuh"

constexpr int WARPGROUP_ROWS = 64;  // those of a wgmma
constexpr int WARPGROUPS = TILE_Q / WARPGROUP_ROWS;  // that compute
constexpr int S_TILES = TILE_KV / 8;
constexpr int P_STEPS = TILE_KV / 16;  // of the depth of P V

using WarpgroupQ = SlabTile<WARPGROUP_ROWS, HEAD_DIM>;
using RingK = SlabTile<TILE_KV, HEAD_DIM>;
using RingV = SlabTile<TILE_KV, HEAD_DIM_V>;

constexpr int Q_BYTES = WARPGROUPS * WarpgroupQ::BYTES;
constexpr int O_COLUMNS =
    WarpgroupQ::SLABS * SLAB_COLUMNS < 8 * DV_TILES ? WarpgroupQ::SLABS * SLAB_COLUMNS : 8 * DV_TILES;  // that pass through Q at a time
constexpr int NUM_BARRIERS = 1 + 4 * NUM_STAGES;

// setmaxnreg moves the registers of a block, which are what its threads start with: 512 threads with 128 each, 384 with 168.
constexpr int FIRST_REGISTERS = WARPGROUPS == 3 ? 128 : 168;
constexpr int COPYING_REGISTERS = WARPGROUPS == 3 ? 32 : 24;
constexpr int COMPUTING_REGISTERS = WARPGROUPS == 3 ? 160 : 240;

static_assert(WARPGROUPS == 2 || WARPGROUPS == 3, "num_warps must be 8 or 12");
static_assert(COPYING_REGISTERS + WARPGROUPS * COMPUTING_REGISTERS <= (1 + WARPGROUPS) * FIRST_REGISTERS, "nobody could hand on so many registers");
static_assert(TILE_KV <= 256, "tile_kv must be at most the columns of a wgmma");
static_assert(TILE_Q == 16 * NUM_WARPS, "tile_q must be 16 rows for each warp");
static_assert(Q_BYTES + NUM_STAGES * (RingK::BYTES + RingV::BYTES) + NUM_BARRIERS * MBARRIER_BYTES == Config::SHARED_BYTES,
              "shared memory differs from the plan's");

// Where everything lies in shared memory.
struct SharedMemory {
  SmemAddress base;

  DEVICE SmemAddress Q(int warpgroup) const { return base + warpgroup * WarpgroupQ::BYTES; }
  DEVICE SmemAddress K(int stage) const { return base + Q_BYTES + stage * RingK::BYTES; }
  DEVICE SmemAddress V(int stage) const { return K(NUM_STAGES) + stage * RingV::BYTES; }
  DEVICE SmemAddress Q_full() const { return V(NUM_STAGES); }
  DEVICE Ring<NUM_STAGES> K_ring() const { return Ring<NUM_STAGES>(Q_full() + MBARRIER_BYTES); }
  DEVICE Ring<NUM_STAGES> V_ring() const { return Ring<NUM_STAGES>(Q_full() + (1 + 2 * NUM_STAGES) * MBARRIER_BYTES); }
};

template <typename Tile>
DEVICE void load_rows(SmemAddress tile, const MappedTensor& tensor, int row, int head, int batch, SmemAddress full) {
  Tile::load(tile, tensor.map, row, head * tensor.head_step, batch * tensor.batch_step, full);
}

// One thread: asks for Q, then for K and V of tiles begin .. end - 1 in the order in which they are used.
DEVICE void copy_tiles(const ForwardWgmmaArguments& arguments, const Work& work, int begin, int end, const SharedMemory& shared) {
  const int head_kv = work.head / (arguments.geometry.num_heads_q / arguments.geometry.num_heads_kv);
  mbarrier_arrive_expect(shared.Q_full(), Q_BYTES);
#pragma unroll
  for (int warpgroup = 0; warpgroup < WARPGROUPS; ++warpgroup)
    load_rows<WarpgroupQ>(shared.Q(warpgroup), arguments.query, work.tile * TILE_Q + warpgroup * WARPGROUP_ROWS, work.head, work.batch,
                          shared.Q_full());
  Ring<NUM_STAGES> K = shared.K_ring(), V = shared.V_ring();
#pragma unroll 1
  for (int j = begin; j < end; ++j) {
    K.wait_empty();
    mbarrier_arrive_expect(K.full(), RingK::BYTES);
    load_rows<RingK>(shared.K(K.stage), arguments.key, j * TILE_KV, head_kv, work.batch, K.full());
    K.advance();
    V.wait_empty();
    mbarrier_arrive_expect(V.full(), RingV::BYTES);
    load_rows<RingV>(shared.V(V.stage), arguments.value, j * TILE_KV, head_kv, work.batch, V.full());
    V.advance();
  }
}

// A warpgroup's 64 rows.
class WarpgroupRows {
 public:
  float O[1][DV_TILES][4] = {};
  OnlineSoftmax<1, false, PROBABILITY_SHIFT> softmax;

  DEVICE WarpgroupRows(const ForwardWgmmaArguments& arguments, const Work& work, const Visibility& visibility, const SharedMemory& shared,
                       int warpgroup)
      : first_row(work.tile * TILE_Q + warpgroup * WARPGROUP_ROWS + 16 * warp_of_warpgroup()),
        modifier(arguments.geometry, arguments.features, work.batch, work.head),
        shared(shared),
        K(shared.K_ring()),
        V(shared.V_ring()),
        Q_descriptor(WarpgroupQ::descriptor(shared.Q(warpgroup))) {
    const int column = lane_index() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_row + 8 * r + lane_index() / 4;
      first_key[r] = visibility.first_key(query) - column;
      end_key[r] = visibility.end_key(query, query + 1) - column;
    }
  }

  // O and the softmax state after tiles begin .. end - 1, of which unmasked_begin .. unmasked_end - 1 are visible to all rows.
  DEVICE void walk(int begin, int unmasked_begin, int unmasked_end, int end) {
    first_step(begin, begin < unmasked_begin || begin >= unmasked_end);
    int j = begin + 1;
    if constexpr (WINDOW) {  // masked tiles come before and behind the others, in one piece of code
#pragma unroll 1
      for (int masked_end = min(unmasked_begin, end); j < end; masked_end = end) {
        steps<true>(j, masked_end);
        steps<false>(j, unmasked_end);
      }
    } else {
      steps<false>(j, unmasked_end);
      steps<true>(j, end);
    }
    issue_outputs();
    wgmma_wait<0>();
    pin(O[0]);
    pin(P);
    V.release(2);
  }

  // Tiles that only other warpgroups see: this one says that it is done with them. One warp alone does, which no other can leave behind by a phase.
  DEVICE void skip(int begin, int end) {
    if (warp_of_warpgroup() != 0) return;
#pragma unroll 1
    for (int j = begin; j < end; ++j) {
      K.wait_full();
      K.release(0);
      V.wait_full();
      V.release(0);
    }
  }

 private:
  const int first_row;  // of the warp
  const ScoreModifier modifier;
  const SharedMemory shared;
  Ring<NUM_STAGES> K, V;
  const uint64 Q_descriptor;
  int first_key[2], end_key[2];  // which keys a row sees, less the column of the lane
  uint32 P[P_STEPS][4];

  DEVICE void issue_scores(float (&S)[1][S_TILES][4]) {
    K.wait_full();
    const uint64 K_descriptor = RingK::descriptor(shared.K(K.stage));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D_TILES / 2; ++k)
      Wgmma<Element, S_TILES>::from_shared(S[0], WarpgroupQ::columns(Q_descriptor, k), RingK::columns(K_descriptor, k), k > 0);
    wgmma_commit();
  }

  DEVICE void issue_outputs() {
    V.wait_full();
    const uint64 V_descriptor = RingV::descriptor(shared.V(V.stage));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < P_STEPS; ++k) Wgmma<Element, DV_TILES>::from_registers(O[0], P[k], RingV::rows(V_descriptor, k));
    wgmma_commit();
  }

  // Products -> probabilities of tile j, in place; O has to be multiplied by `rescale`.
  DEVICE void make_probabilities(float (&S)[1][S_TILES][4], float (&rescale)[1][2], int j, bool is_masked) {
    const int first_kv = j * TILE_KV;
    if constexpr (MODIFIES_SCORES) {
      ScoreSlope<1, S_TILES> unused;
      modifier.apply<false>(S, unused, first_row, first_kv);
    }
    if (is_masked) hide_keys(S, first_kv);
    softmax.update(S, rescale, modifier.factor());
  }

  DEVICE void hide_keys(float (&S)[1][S_TILES][4], int first_kv) const {
#pragma unroll
    for (int n = 0; n < S_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * n + i % 2;
        if (column >= end_key[i / 2] - first_kv || (WINDOW && column < first_key[i / 2] - first_kv)) S[0][n][i] = -infinity();
      }
  }

  DEVICE void pack_probabilities(const float (&S)[1][S_TILES][4]) {
#pragma unroll
    for (int k = 0; k < P_STEPS; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&tile)[4] = S[0][2 * k + i / 2];
        P[k][i] = pack<Element>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
      }
    pin(P);
    pin(O[0]);
  }

  // Nothing to multiply with V yet.
  DEVICE void first_step(int j, bool is_masked) {
    float S[1][S_TILES][4], unused[1][2];
    issue_scores(S);
    wgmma_wait<0>();
    pin(S[0]);
    K.release(1);
    make_probabilities(S, unused, j, is_masked);
    pack_probabilities(S);
  }

  template <bool IS_MASKED>
  DEVICE void steps(int& j, int end) {
#pragma unroll 1
    for (; j < end; ++j) step<IS_MASKED>(j);
  }

  template <bool IS_MASKED>
  DEVICE void step(int j) {
    float S[1][S_TILES][4], rescale[1][2];
    issue_scores(S);
    issue_outputs();
    wgmma_wait<1>();
    pin(S[0]);
    K.release(1);
    make_probabilities(S, rescale, j, IS_MASKED);
    wgmma_wait<0>();
    pin(O[0]);
    pin(P);
    V.release(2);
#pragma unroll
    for (int n = 0; n < DV_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) O[0][n][i] *= rescale[0][i / 2];
    pack_probabilities(S);
  }
};

// What one of the computing warpgroups does with tiles begin .. end - 1 of the block.
DEVICE void compute_rows(const ForwardWgmmaArguments& arguments, const Work& work, const Visibility& visibility, int begin, int end,
                         const SharedMemory& shared, int warpgroup) {
  const Geometry& geometry = arguments.geometry;
  const int first_q = work.tile * TILE_Q + warpgroup * WARPGROUP_ROWS;
  const int own_end = first_q < geometry.seqlen_q ? ceil_div(visibility.end_key(first_q, first_q + WARPGROUP_ROWS), TILE_KV) : 0;
  const int unmasked_begin = ceil_div(visibility.first_key(first_q + WARPGROUP_ROWS - 1), TILE_KV);
  const int unmasked_end = visibility.end_key(first_q, first_q + 1) / TILE_KV;

  WarpgroupRows rows(arguments, work, visibility, shared, warpgroup);
  if (begin < end) mbarrier_wait(shared.Q_full(), 0);
  if (begin < own_end) rows.walk(begin, unmasked_begin, unmasked_end, own_end);
  rows.skip(max(begin, own_end), end);

  if constexpr (SINKS) rows.softmax.add_sink(rows.O, arguments.features.sinks.load(work.batch, work.head) * SCORE_UNIT);
  rows.softmax.finish(rows.O);
  const int warp_row = 16 * warp_of_warpgroup(), first_row = first_q + warp_row;
  if (arguments.lse.data != nullptr && lane_index() % 4 == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_row + 8 * r + lane_index() / 4;
      if (query < geometry.seqlen_q) *arguments.lse.pointer(work.batch, work.head, query) = rows.softmax.lse(0, r);
    }
  }
  sync_warpgroup(1 + warpgroup);  // no warp's products read Q any more
  store_rows<Element, HEAD_DIM_V, O_COLUMNS, false>(rows.O, shared.Q(warpgroup) + warp_row * O_COLUMNS * 2, arguments.out, work.batch, work.head,
                                                    first_row, geometry.seqlen_q);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS + WARPGROUP_SIZE, 1) forward_wgmma(const __grid_constant__ ForwardWgmmaArguments arguments) {
  extern __shared__ __align__(SLAB_ALIGNMENT) uint8 memory[];
  const SharedMemory shared{smem_address(memory)};
  const Work work = work_longest_first<CAUSAL, true>(arguments.geometry, arguments.geometry.num_heads_q);
  const Visibility visibility(arguments.geometry, arguments.features, work.batch, work.head);
  const int begin = visibility.first_key(work.tile * TILE_Q) / TILE_KV;
  const int end = ceil_div(visibility.end_key(work.tile * TILE_Q, (work.tile + 1) * TILE_Q), TILE_KV);
  if (threadIdx.x == 0) {
    mbarrier_init(shared.Q_full(), 1);
    shared.K_ring().init(WARPGROUPS);
    shared.V_ring().init(WARPGROUPS);
    fence_mbarrier_init();
  }
  __syncthreads();
  const int index = warpgroup_index();
  if (index == 0) {
    give_registers<COPYING_REGISTERS>();
    if (threadIdx.x == 0 && begin < end) copy_tiles(arguments, work, begin, end, shared);
  } else {
    take_registers<COMPUTING_REGISTERS>();
    compute_rows(arguments, work, visibility, begin, end, shared, index - 1);
  }
}
