// Forward attention on Hopper's warpgroup instructions, float32: O = softmax(scale Q Kᵀ) V and the natural-log LSE of each row, to the accuracy of
// float32.
//
// Each number is a sum of three of bfloat16, its terms, of 8 bits each (operand_terms.cu has split Q, K and V). Of the nine products of two such
// numbers six are computed, those whose terms count at least 2^-16 together; what is left out is of the order of 2^-24. They take as long as three
// products of TF32, whose operands wgmma could not read by rows, as P V needs it.
//
// Blocks, their warp that copies and their warpgroups of 64 rows are those of forward_wgmma.cu. A step of a warpgroup is
//
//     product = P_{j-1} V_{j-1}      six products of terms, those of small ones first; the first 64 columns of V before the others
//     S_j = Q K_jᵀ                   issued with what comes last of these
//     O += product                   while S_j is computed
//     S_j -> P_j, split into terms   while the tensor cores have work of other warpgroups
//
// Tensor cores cut off where they add: so O gets the sum of one tile at a time, by additions that round.
//
// Shared memory and mbarriers are those of forward_wgmma.cu, with rows of three terms (tile/wgmma_block.cuh).
#include "tile/constants.cuh"
#include "tile/copier.cuh"
#include "tile/epilogue.cuh"
#include "tile/fragment.cuh"
#include "tile/key_shares.cuh"
#include "tile/partial_outputs.cuh"
#include "tile/softmax.cuh"
#include "tile/visibility.cuh"
#include "tile/wgmma_block.cuh"
#include "tile/wgmma_terms.cuh"
#include "ptx/warpgroup.cuh"

static_assert(SameType<Element, float>::value && !Config::ALLOW_TF32, "it is for float32 accuracy");
static_assert(!TILE_LISTS && !MAPS_MASK && !ADDITIVE_MASK && !Config::SOFTCAP && !Config::ALIBI && !WINDOW && !PREFIX && !DROPOUT && !SINKS &&
                  !VARLEN,
              "it knows none of these features");

constexpr int FIRST_TILES = DV_TILES < SLAB_COLUMNS / 8 ? DV_TILES : SLAB_COLUMNS / 8;  // of O, whose products are in flight together
constexpr int OTHER_TILES = DV_TILES - FIRST_TILES;

// A warpgroup's 64 rows.
class WarpgroupRows {
 public:
  float O[1][DV_TILES][4] = {};
  OnlineSoftmax<1, false, PROBABILITY_SHIFT, SLACK_OF<Element>> softmax;

  DEVICE WarpgroupRows(const Geometry& geometry, const Work& work, const Visibility& visibility, const SharedMemory& shared, SmemAddress Q,
                       int warpgroup, Ring<NUM_STAGES>& K, Ring<NUM_STAGES>& V)
      : geometry(geometry), shared(shared), K(K), V(V), Q_descriptor(WarpgroupQ::descriptor(Q)) {
    const int first_row = work.tile * TILE_Q + warpgroup * WARPGROUP_ROWS + 16 * warp_of_warpgroup();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_row + 8 * r + lane_index() / 4;
      end_key[r] = visibility.end_key(query, query + 1) - lane_index() % 4 * 2;
    }
  }

  // O and the softmax state after tiles 0 .. end - 1, of which those before unmasked_end are visible to all rows. Each tile that is added rounds O,
  // so that beside a large O thousands of small ones would be lost: O starts anew after every PARTIAL_STEPS tiles, and the sum of all before is in
  // memory: where, is computed anew each time, so that it takes no registers from the loops.
  DEVICE void walk(const ForwardWgmmaArguments& arguments, int warpgroup, int unmasked_end, int end) {
    int j = 0;
#pragma unroll 1
    while (true) {
      const int begin = j, part_end = min(end, j + PARTIAL_STEPS);
      first_step(j, j >= unmasked_end);
      ++j;
      steps<false>(j, min(unmasked_end, part_end));
      steps<true>(j, part_end);
      finish<OTHER_TILES>();
      int block = int(blockIdx.x);
      asm volatile("" : "+r"(block));
      const PartOfRows earlier(arguments, 0, block, 4 * warpgroup + warp_of_warpgroup());
      if (begin > 0) earlier.add_outputs_to(O, softmax);
      if (j == end) break;
      earlier.store(O, softmax);
      clear(O);
    }
  }

 private:
  const Geometry& geometry;
  const SharedMemory shared;
  Ring<NUM_STAGES>&K, &V;
  const uint64 Q_descriptor;
  int end_key[2];  // which keys a row sees, less the column of the lane
  uint32 P[TERMS][P_STEPS][4];

  DEVICE void issue_scores(float (&S)[1][S_TILES][4]) {
    issue_rows_of_terms<WarpgroupQ, RingK, D_TILES / 2>(S, Q_descriptor, RingK::descriptor(shared.K(K.stage)));
  }

  // Columns of P V from slab FIRST_SLAB on.
  template <int FIRST_SLAB, int N>
  DEVICE void issue_outputs(float (&product)[1][N][4]) {
    issue_accumulator_of_terms<RingV, FIRST_SLAB>(product, P, RingV::descriptor(shared.V(V.stage)));
  }

  // The same to O, once they are done.
  template <int FIRST_TILE, int N>
  DEVICE void add(float (&product)[1][N][4]) {
    pin(product[0]);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) O[0][FIRST_TILE + n][i] += product[0][n][i];
    pin(O[0]);
  }

  DEVICE void release_values() {
#pragma unroll
    for (int term = 0; term < TERMS; ++term) pin(P[term]);
    V.release(2);
  }

  // Scores are there.
  DEVICE void release_keys(float (&S)[1][S_TILES][4]) {
    pin(S[0]);
    K.release(1);
  }

  // Products -> probabilities of tile j as an operand, and O to their reference.
  DEVICE void make_probabilities(float (&S)[1][S_TILES][4], int j, bool is_masked) {
    if constexpr (Config::ANY_SCALE) multiply_all(S, geometry.score_sign);
    if (is_masked) hide_keys(S, j * TILE_KV);
    softmax.update<true>(S, O, geometry.scale_log2, [] {});
    split_accumulator(P, S);
#pragma unroll
    for (int term = 0; term < TERMS; ++term) pin(P[term]);
  }

  DEVICE void hide_keys(float (&S)[1][S_TILES][4], int first_kv) const {
#pragma unroll
    for (int n = 0; n < S_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * n + i % 2 >= end_key[i / 2] - first_kv) S[0][n][i] = -infinity();
  }

  // Nothing to multiply with V yet.
  DEVICE void first_step(int j, bool is_masked) {
    float S[1][S_TILES][4];
    K.wait_full();
    issue_scores(S);
    wgmma_wait<0>();
    release_keys(S);
    make_probabilities(S, j, is_masked);
  }

  template <bool IS_MASKED>
  DEVICE void steps(int& j, int end) {
#pragma unroll 1
    for (; j < end; ++j) step<IS_MASKED, OTHER_TILES>(j);
  }

  template <bool IS_MASKED, int OTHERS>
  DEVICE void step(int j) {
    float S[1][S_TILES][4];
    float product[1][FIRST_TILES][4];
    V.wait_full();
    issue_outputs<0>(product);
    if constexpr (OTHERS > 0) {
      wgmma_wait<0>();
      // There are heads, so it does add. But the assembler cannot know it, and moves no addition out of a branch: else it puts some of them behind
      // the next products, which need the registers of the first columns.
      if (geometry.num_heads_q > 0) add<0>(product);
      K.wait_full();
      float others[1][OTHERS][4];
      issue_outputs<1>(others);
      issue_scores(S);
      wgmma_wait<1>();
      add<FIRST_TILES>(others);
    } else {
      K.wait_full();
      issue_scores(S);
      wgmma_wait<1>();
      add<0>(product);
    }
    release_values();
    wgmma_wait<0>();
    release_keys(S);
    make_probabilities(S, j, IS_MASKED);
  }

  template <int OTHERS>
  DEVICE void finish() {
    float product[1][FIRST_TILES][4];
    V.wait_full();
    issue_outputs<0>(product);
    wgmma_wait<0>();
    add<0>(product);
    if constexpr (OTHERS > 0) {
      float others[1][OTHERS][4];
      issue_outputs<1>(others);
      wgmma_wait<0>();
      add<FIRST_TILES>(others);
    }
    release_values();
  }
};

// Writes what a warpgroup has computed. O passes through its part of Q.
DEVICE void store_results(const ForwardWgmmaArguments& arguments, const TileWork& work, WarpgroupRows& rows, SmemAddress Q, int warpgroup) {
  const int seqlen_q = work.geometry(arguments).seqlen_q;
  rows.softmax.finish(rows.O);
  const int warp_row = 16 * warp_of_warpgroup(), first_row = work.at.tile * TILE_Q + warpgroup * WARPGROUP_ROWS + warp_row;
  if (arguments.lse.data != nullptr && lane_index() % 4 == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_row + 8 * r + lane_index() / 4;
      if (query < seqlen_q) *arguments.lse.pointer(work.at.batch, work.at.head, query) = rows.softmax.lse(0, r);
    }
  }
  sync_warpgroup(1 + warpgroup);  // no warp's products read Q any more
  using RowsO = SmemTile<Element, 16, O_COLUMNS>;
  store_rows<Element, HEAD_DIM_V, O_COLUMNS, false>(rows.O, Q + warp_row * RowsO::ROW_BYTES, arguments.out, work.at.batch, work.at.head, first_row,
                                                    seqlen_q);
}

// What one of the computing warpgroups does for the tile of queries in a stage of Q.
DEVICE void compute_tile(const ForwardWgmmaArguments& arguments, const TileWork& work, const SharedMemory& shared, int stage, int warpgroup,
                         Ring<NUM_STAGES>& K, Ring<NUM_STAGES>& V) {
  const auto& geometry = work.geometry(arguments);
  const Visibility visibility(geometry, arguments.features, work.at.batch, work.at.head);
  const int first_q = work.at.tile * TILE_Q + warpgroup * WARPGROUP_ROWS;
  WarpgroupRows rows(geometry, work.at, visibility, shared, shared.Q(stage, warpgroup), warpgroup, K, V);
  const int own_end =  // of the tiles that this warpgroup sees
      uniform(first_q < geometry.seqlen_q ? ceil_div(visibility.end_key(first_q, first_q + WARPGROUP_ROWS), TILE_KV) : 0);
  const int unmasked_end = uniform(visibility.end_key(first_q, first_q + 1) / TILE_KV);
  if (own_end > 0) rows.walk(arguments, warpgroup, unmasked_end, own_end);
  // The same numbers as `work` and what follows from it, which would take registers in the meantime.
  const TileWork same = TileWork::load(shared.work(stage));
  store_results(arguments, same, rows, shared.Q(stage, warpgroup), warpgroup);
  const auto& same_geometry = same.geometry(arguments);
  const int end = Walk(arguments, same, Visibility(same_geometry, arguments.features, same.at.batch, same.at.head)).end;
  skip(K, V, end - max(0, own_end), 1 + warpgroup);
}

// What it does for all tiles of the block.
DEVICE void compute_all(const ForwardWgmmaArguments& arguments, const SharedMemory& shared) {
  Ring<Q_STAGES> Q = shared.Q_ring();
  Ring<NUM_STAGES> K = shared.K_ring(), V = shared.V_ring();
#pragma unroll 1
  while (true) {
    Q.wait_full();
    const TileWork work = TileWork::load(shared.work(Q.stage));
    if (work.at.tile < 0) return;
    const int warpgroup = warpgroup_index() - 1;  // for each tile anew, so that it takes no register from one to the next
    compute_tile(arguments, work, shared, Q.stage, warpgroup, K, V);
    fence_proxy_async();  // O went through Q
    __syncwarp();
    Q.release_by_each_warp();
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS + WARPGROUP_SIZE, 1)
    forward_wgmma_float32(const __grid_constant__ ForwardWgmmaArguments arguments) {
  extern __shared__ __align__(SLAB_ALIGNMENT) uint8 memory[];
  const SharedMemory shared{smem_address(memory)};
  shared.init_mbarriers();
  if (warpgroup_index() == 0) {
    give_registers<COPYING_REGISTERS>();
    if (warp_of_warpgroup() == 0) Copier(arguments, shared).copy_all();
  } else {
    take_registers<COMPUTING_REGISTERS>();
    compute_all(arguments, shared);
  }
}
