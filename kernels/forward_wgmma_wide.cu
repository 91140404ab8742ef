// Forward attention of wide heads on Hopper's warpgroup instructions: O = softmax(scale Q Kᵀ) V and the natural-log LSE of each row, for 16-bit
// types, where O of 64 rows is more than the registers of one warpgroup hold.
//
// A block has 64 rows, which are the queries of all heads that share a key head (tile/grouped_rows.cuh), and one of `num_splits` ranges of the keys
// (tile/split_rows.cuh). Two warpgroups compute, and share out the columns of O. The first one makes the probabilities, and hands them to the second
// through shared memory, with what the rows of O have to be multiplied by:
//
//     first     S_j = Q K_jᵀ issued │ O += P_{j-1} V_{j-1} issued │ S_j is there: P_j, to the second, too │ O is there
//     second                          P_j is there: O += P_j V_j
//
// One warp of a third warpgroup copies (tile/wide_copier.cuh). Where the values are the first columns of their keys (VALUE_IN_KEY), as in multi-head
// latent attention (DeepSeek-AI 2024, arXiv 2405.04434), a tile of keys is copied once and serves both products. It comes in two parts, since its
// parts are free at different times: the columns that are the first warpgroup's of V, and the others.
//
// Shared memory: Q [⌈D / 64⌉][64][64] | first columns of V [NUM_STAGES][..][TILE_KV][64] | second columns of V, or of K all others, the same |
// K, unless it is there already, the same | P [⌈TILE_KV / 64⌉][64][64] | a factor for each row | mbarriers. At the end O passes through the first
// slab of Q and of P.
//
// mbarriers, for each stage: "full", the tile has landed, and "empty", whoever reads it is done with it. Two more say that P is there and free, and
// one that a tile has landed of which rows are set to zero before it is full.
#include "tile/constants.cuh"
#include "tile/epilogue.cuh"
#include "tile/grouped_columns.cuh"
#include "tile/wgmma_products.cuh"
#include "tile/wide_copier.cuh"
#include "ptx/warpgroup.cuh"

// What the warp that copies does: tiles of K and V in the order in which they are used, as far ahead as there are stages.
DEVICE void copy_all(WideCopier copier, const SharedMemory& shared, const SplitWalk& walk) {
  Ring<NUM_STAGES> first = shared.first_ring(), second = shared.second_ring(), keys = shared.keys_ring();
  int tile = copier.tile(walk.begin), previous_tile = tile;  // of a list, without which they are j and j - 1
  KeyPlace place = copier.look_up(walk.begin, tile), previous = place;
#pragma unroll 1
  for (int j = walk.begin; j < walk.end + !VALUE_IN_KEY; ++j) {
    const int next_tile = copier.tile(j + 1);
    const KeyPlace next = copier.look_up(j + 1, next_tile);
    if constexpr (VALUE_IN_KEY) {
      copier.copy_K<Second>(second, shared.second(second.stage), FIRST_COLUMNS, place, TILE_LISTS ? tile : j);
      copier.copy_K<First>(first, shared.first(first.stage), 0, place, TILE_LISTS ? tile : j);
    } else {
      if (j < walk.end) copier.copy_K<Keys>(keys, shared.keys(keys.stage), 0, place, TILE_LISTS ? tile : j);
      if (j > walk.begin) {
        copier.copy_V<First>(first, shared.first(first.stage), 0, previous, TILE_LISTS ? previous_tile : j - 1);
        copier.copy_V<Second>(second, shared.second(second.stage), FIRST_COLUMNS, previous, TILE_LISTS ? previous_tile : j - 1);
      }
    }
    previous = place;
    previous_tile = tile;
    place = next;
    tile = next_tile;
  }
}

// Copies Q of the block's rows, zeros behind the last one, by both warpgroups that compute.
DEVICE void copy_queries(SmemAddress tile, const TensorView& view, const SplitWork& work, const GroupedRows& rows, int first_row) {
  constexpr int CHUNKS = BlockQ::SLABS * 8;  // of 8 elements, of a row
#pragma unroll 1
  for (int index = int(threadIdx.x) - WARPGROUP_SIZE; index < TILE_Q * CHUNKS; index += NUM_THREADS) {
    const int row = index / CHUNKS, chunk = index % CHUNKS, column = chunk * 8;
    const Element* source = view.row_pointer<const Element>(work.batch, rows.head(first_row + row), work.start_q + rows.query(first_row + row)) +
                            column * view.stride_dim;
    const int valid = first_row + row < rows.count ? max(0, min(HEAD_DIM - column, 8)) : 0;
    const SmemAddress destination = tile + chunk / 8 * BlockQ::SLAB_BYTES + BlockQ::offset(row, chunk % 8);
    if (is_vectorized(view)) {
      cp_async<16>(true, destination, valid > 0 ? source : view.row_pointer<const Element>(0, 0), valid * int(sizeof(Element)));
    } else {
      store_shared(destination, gather_chunk<Element>(source, view.stride_dim, valid));
    }
  }
  cp_async_commit_group();
  cp_async_wait_group<0>();
  fence_proxy_async();
  sync_threads_of(1, NUM_THREADS);
}

// Stores a warp's 16 rows of O, 8 N columns from `first_column` on: as a part, or through `scratch`, 16 rows of a slab that nobody reads any more.
template <int N>
DEVICE void store_columns(const float (&O)[1][N][4], const ForwardWgmmaWideArguments& arguments, const SplitWork& work, const GroupedRows& rows,
                          int first_row, int first_column, SmemAddress scratch) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  if (arguments.num_splits > 1) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r + g;
      if (row >= rows.count) continue;
      float* part = arguments.partial_out + RowOfResult(arguments, work, rows, row).part * HEAD_DIM_V + first_column + 2 * t;
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (first_column + 8 * n < HEAD_DIM_V) *reinterpret_cast<float2*>(part + 8 * n) = make_float2(O[0][n][2 * r], O[0][n][2 * r + 1]);
    }
    return;
  }
  const TensorView& out = arguments.out;
#pragma unroll
  for (int piece = 0; piece < N; piece += 8) {
    if (piece > 0) __syncwarp();  // the piece before has been read
#pragma unroll
    for (int n = piece; n < min(piece + 8, N); ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        store_shared(scratch + BlockQ::offset(8 * r + g, n - piece) + t * 4, pack<Element>(O[0][n][2 * r], O[0][n][2 * r + 1]));
    __syncwarp();  // the rows are complete
#pragma unroll 1
    for (int index = lane_index(); index < 16 * 8; index += WARP_SIZE) {
      const int row = index / 8, chunk = index % 8, column = 8 * (piece + chunk);
      if (first_row + row >= rows.count || column >= 8 * N || first_column + column >= HEAD_DIM_V) continue;
      const RowOfResult result(arguments, work, rows, first_row + row);
      Element* row_start = out.row_pointer<Element>(result.batch, result.head) + result.query * out.stride_seqlen;
      store_chunk<HEAD_DIM_V>(row_start, first_column + column, load_shared(scratch + BlockQ::offset(row, chunk)), out);
    }
  }
}

// O of a row, multiplied by a factor for each of the lane's two rows.
template <int N>
DEVICE void multiply_rows(float (&O)[1][N][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) O[0][n][i] *= factor[i / 2];
}

// The first warpgroup: scores, probabilities, and the first columns of O.
class FirstWarpgroup {
 public:
  float O[1][FIRST_COLUMNS / 8][4] = {};

  DEVICE FirstWarpgroup(const ForwardWgmmaWideArguments& arguments, const SharedMemory& shared, const Geometry& geometry, const SplitWork& work,
                        const GroupedRows& rows, const SplitWalk& walk, const Visibility& visibility)
      : geometry(geometry),
        shared(shared),
        walk(walk),
        dropout_scale(arguments.features.dropout_scale),
        own_row(16 * warp_of_warpgroup()),
        scores(geometry, arguments.features, work.sequence, rows, walk.first_row + own_row),
        columns(geometry, arguments.features, work.sequence, rows, walk.first_row + own_row),
        keys(VALUE_IN_KEY ? shared.second_ring() : shared.keys_ring()),
        first(shared.first_ring()),
        values(shared.first_ring()),
        P_out(shared.P_ring()) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = rows.query(walk.first_row + own_row + 8 * r + lane_index() / 4), column = lane_index() % 4 * 2;
      first_key[r] = max(visibility.first_key(query), walk.first_key) - column;
      end_key[r] = visibility.end_key(query, query + 1) - column;
      unmasked_begin = max(unmasked_begin, first_key[r] + column);
      unmasked_end = min(unmasked_end, end_key[r] + column);
    }
  }

  // O and the softmax state after all of the block's tiles.
  DEVICE void walk_keys() {
    if (walk.begin >= walk.end) return;
    if constexpr (TILE_LISTS) next_entry = walk.tiles.entry(walk.begin);
    first_step();
#pragma unroll 1
    for (int j = walk.begin + 1; j < walk.end; ++j) step(j);
    issue_outputs();
    wgmma_wait<0>();
    pin(O[0]);
    pin(P);
  }

  // A row's sum, with a sink in units of the scores where there is one, and what O has to be multiplied by.
  DEVICE RowTotal total(int r, float sink, float& factor) const {
    using Softmax = OnlineSoftmax<1, ADDITIVE_MASK, PROBABILITY_SHIFT>;
    RowTotal total{softmax.reference[0][r], quad_sum(softmax.sum[0][r])};
    factor = 1.0f;
    if constexpr (SINKS) {
      const float reference = fmaxf(total.reference, sink);
      factor = Softmax::rescale(total.reference, reference);
      total = {reference, __fmaf_rn(total.sum, factor, sink == -infinity() ? 0.0f : Softmax::of_sink(sink, reference))};
    }
    factor *= total.inverse();
    if constexpr (DROPOUT) factor *= dropout_scale;
    return total;
  }

  // Hands factors of the lane's rows to the second warpgroup, and whatever this warp has written for it before.
  DEVICE void publish(const float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (lane_index() % 4 == 0) store_shared(shared.factors() + (own_row + 8 * r + lane_index() / 4) * 4, __float_as_uint(factor[r]));
    __syncwarp();
    mbarrier_arrive_if(lane_index() == 0, P_out.full());
    P_out.advance();
  }

  DEVICE void wait_until_taken() const { P_out.wait_empty(); }

 private:
  const Geometry& geometry;
  const SharedMemory shared;
  const SplitWalk& walk;
  const float dropout_scale;
  const int own_row;  // of the warp, in the block
  const GroupedScores<1> scores;
  GroupedColumns<S_TILES> columns;  // of the tile whose scores were issued last
  OnlineSoftmax<1, ADDITIVE_MASK, PROBABILITY_SHIFT> softmax;
  Ring<NUM_STAGES> keys, first, values;  // `first` and `values` are one ring: the tile whose scores, and the tile whose output comes next
  Ring<1> P_out;
  int entry = 0, next_entry = 0;  // of a list: of the tile whose scores were issued last, and of the next
  int first_key[2], end_key[2];  // which keys a row sees, less the column of the lane
  int unmasked_begin = 0, unmasked_end = 0x7fffffff;  // both rows see them
  uint32 P[P_STEPS][4];

  DEVICE void issue_scores(float (&S)[1][S_TILES][4]) {
    const uint64 Q = BlockQ::descriptor(uniform(shared.Q()));  // found anew: as many descriptors as steps would take registers from tile to tile
    keys.wait_full();
    if constexpr (VALUE_IN_KEY) {
      constexpr int FIRST_STEPS = FIRST_COLUMNS / 16, ALL_STEPS = ceil_div(HEAD_DIM, 16);
      const uint64 Q_operand = BlockQ::columns(Q, FIRST_STEPS);
      uint64 K_operand = Second::descriptor(shared.second(keys.stage));
      issue_rows<BlockQ, Second, ALL_STEPS - FIRST_STEPS>(S, Q_operand, K_operand);
      first.wait_full();
      K_operand = First::descriptor(shared.first(first.stage));
      issue_rows<BlockQ, First, FIRST_STEPS, true>(S, Q, K_operand);
      first.advance();
    } else {
      const uint64 K_operand = Keys::descriptor(shared.keys(keys.stage));
      issue_rows<BlockQ, Keys, ceil_div(HEAD_DIM, 16)>(S, Q, K_operand);
    }
  }

  // What data say of step j's tile, while its scores are computed. Entries of a list are read a step ahead.
  DEVICE void look_up_columns(int j) {
    if constexpr (TILE_LISTS) {
      entry = next_entry;
      next_entry = walk.tiles.entry(min(j + 1, walk.end - 1));
    }
    if constexpr (TILE_LISTS || ADDITIVE_MASK || DROPOUT) columns.look_up(tile_of(j) * TILE_KV, entry % 2 != 0);
  }
  DEVICE int tile_of(int j) const { return TILE_LISTS ? entry >> 1 : j; }

  DEVICE void issue_outputs() {
    if constexpr (!VALUE_IN_KEY) values.wait_full();
    const uint64 V_operand = First::descriptor(shared.first(values.stage));
    issue_accumulator<First>(O, P, V_operand);
  }

  // Products -> probabilities of tile j, in place; O has to be multiplied by `rescale`.
  DEVICE void make_probabilities(float (&S)[1][S_TILES][4], float (&rescale)[1][2], int j) {
    const int first_kv = tile_of(j) * TILE_KV;
    scores.apply<false>(S, first_kv);
    if constexpr (ADDITIVE_MASK) columns.add_mask(S);
    if (any_lane(first_kv < unmasked_begin || first_kv + TILE_KV > unmasked_end)) {
#pragma unroll
      for (int n = 0; n < S_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * n + i % 2;
          if (column >= end_key[i / 2] - first_kv || column < first_key[i / 2] - first_kv) S[0][n][i] = -infinity();
        }
    }
    if constexpr (TILE_LISTS) columns.hide(S);
    softmax.update(S, rescale, scores.factor());
    if constexpr (DROPOUT) columns.drop(S);
  }

  // Probabilities and `factor` of the lane's rows to the second warpgroup. This one packs them again when its product reads P no more.
  DEVICE void hand_on(float (&S)[1][S_TILES][4], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < S_TILES; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        store_shared(shared.P() + n / 8 * BlockP::SLAB_BYTES + BlockP::offset(own_row + 8 * r + lane_index() / 4, n % 8) + lane_index() % 4 * 4,
                     pack<Element>(S[0][n][2 * r], S[0][n][2 * r + 1]));
    fence_proxy_async();
    publish(factor);
    pin(S[0]);
  }

  DEVICE void pack_probabilities(const float (&S)[1][S_TILES][4]) {
    pack_accumulator(P, S);
    pin(P);
    pin(O[0]);
  }

  // Nothing to multiply with V yet.
  DEVICE void first_step() {
    float S[1][S_TILES][4], unused[1][2];
    issue_scores(S);
    look_up_columns(walk.begin);
    wgmma_wait<0>();
    pin(S[0]);
    keys.release(1);
    make_probabilities(S, unused, walk.begin);
    const float nothing_yet[2] = {1.0f, 1.0f};
    hand_on(S, nothing_yet);
    pack_probabilities(S);
  }

  DEVICE void step(int j) {
    float S[1][S_TILES][4], rescale[1][2];
    issue_scores(S);
    look_up_columns(j);
    wait_until_taken();  // here, since a wait while P is read would have the assembler serialise the products
    issue_outputs();
    wgmma_wait<1>();
    pin(S[0]);
    keys.release(1);
    make_probabilities(S, rescale, j);
    hand_on(S, rescale[0]);
    wgmma_wait<0>();
    pin(O[0]);
    pin(P);
    values.release(2);
    multiply_rows(O, rescale[0]);
    pack_probabilities(S);
  }
};

// The second warpgroup: the other columns of O.
class SecondWarpgroup {
 public:
  float O[1][SECOND_COLUMNS / 8][4] = {};

  DEVICE explicit SecondWarpgroup(const SharedMemory& shared) : shared(shared), values(shared.second_ring()), P_in(shared.P_ring()) {}

  DEVICE void walk_keys(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      P_in.wait_full();
      take_factors();
      pin(O[0]);
      values.wait_full();
      const uint64 P_operand = BlockP::descriptor(shared.P()), V_operand = Second::descriptor(shared.second(values.stage));
      issue_shared<BlockP, Second, P_STEPS>(O, P_operand, V_operand);
      wgmma_wait<0>();
      pin(O[0]);
      __syncwarp();  // every lane has read its factors
      P_in.release_by_each_warp();
      values.release(2);
    }
  }

  // O, normalised.
  DEVICE void finish() {
    P_in.wait_full();
    take_factors();
  }

 private:
  const SharedMemory shared;
  Ring<NUM_STAGES> values;
  Ring<1> P_in;

  DEVICE void take_factors() {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) factor[r] = load_shared_f32(shared.factors() + (16 * warp_of_warpgroup() + 8 * r + lane_index() / 4) * 4);
    multiply_rows(O, factor);
  }
};

DEVICE void compute_first(const ForwardWgmmaWideArguments& arguments, const SharedMemory& shared, const Geometry& geometry, const SplitWork& work,
                          const GroupedRows& rows, const SplitWalk& walk, const Visibility& visibility) {
  FirstWarpgroup warpgroup(arguments, shared, geometry, work, rows, walk, visibility);
  warpgroup.walk_keys();
  const int warp_row = 16 * warp_of_warpgroup(), first_row = walk.first_row + warp_row;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r + lane_index() / 4;
    float sink = -infinity();
    if constexpr (SINKS)
      if (work.split == 0) sink = arguments.features.sinks.load(work.sequence, rows.head(row)) * SCORE_UNIT;
    const RowTotal total = warpgroup.total(r, sink, factor[r]);
    if (lane_index() % 4 == 0 && row < rows.count) RowOfResult(arguments, work, rows, row).store_lse(total);
  }
  warpgroup.wait_until_taken();
  warpgroup.publish(factor);
  multiply_rows(warpgroup.O, factor);
  store_columns(warpgroup.O, arguments, work, rows, first_row, 0, shared.Q() + warp_row * BlockQ::ROW_BYTES);
}

DEVICE void compute_second(const ForwardWgmmaWideArguments& arguments, const SharedMemory& shared, const SplitWork& work, const GroupedRows& rows,
                           const SplitWalk& walk) {
  SecondWarpgroup warpgroup(shared);
  warpgroup.walk_keys(walk.end - walk.begin);
  warpgroup.finish();
  const int warp_row = 16 * warp_of_warpgroup();
  store_columns(warpgroup.O, arguments, work, rows, walk.first_row + warp_row, FIRST_COLUMNS, shared.P() + warp_row * BlockP::ROW_BYTES);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS + WARPGROUP_SIZE, 1)
    forward_wgmma_wide(const __grid_constant__ ForwardWgmmaWideArguments arguments) {
  const Work at = work_longest_first<CAUSAL, true>(arguments.geometry, arguments.geometry.num_heads_kv);
  const SplitWork work = work_of_split(arguments.geometry, arguments.lengths, at);
  if (!claim_grouped_rows<NUM_THREADS + WARPGROUP_SIZE>(arguments, work)) return;
  const Geometry geometry = geometry_in_cache(arguments, work.sequence);
  const SequenceInCache sequence(arguments.cache, work.sequence, work.start_kv);
  const GroupedRows rows(geometry, work.head_kv);
  const Visibility visibility(geometry, arguments.features, work.sequence, rows.first_head);
  const SplitWalk walk(arguments, work, visibility, rows, sequence);
  if (walk.begin >= walk.end && arguments.num_splits > 1 && !(SINKS && work.split == 0)) {
    const int row = walk.first_row + int(threadIdx.x);
    if (threadIdx.x < TILE_Q && row < rows.count) RowOfResult(arguments, work, rows, row).store_part(-infinity(), 0.0f);
    return;
  }

  extern __shared__ __align__(SLAB_ALIGNMENT) uint8 memory[];
  const SharedMemory shared{smem_address(memory)};
  if (threadIdx.x == 0) {
    shared.first_ring().init(1);
    shared.second_ring().init(VALUE_IN_KEY ? 2 : 1);
    if constexpr (!VALUE_IN_KEY) shared.keys_ring().init(1);
    shared.P_ring().init(4, 4);  // each warp says so for itself
    mbarrier_init(shared.landed(), 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    give_registers<COPYING_REGISTERS>();
    if (warp_of_warpgroup() == 0) copy_all(WideCopier(arguments, shared, sequence, walk, work.head_kv), shared, walk);
    return;
  }
  take_registers<COMPUTING_REGISTERS>();
  copy_queries(shared.Q(), arguments.query, work, rows, walk.first_row);
  if (warpgroup == 1) compute_first(arguments, shared, geometry, work, rows, walk, visibility);
  else compute_second(arguments, shared, work, rows, walk);
}
