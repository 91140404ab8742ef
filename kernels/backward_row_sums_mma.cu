// With an additive mask, after backward_delta: what the other backward kernels take for lse (tile/probability.cuh), row by row.
//
//     |lse| < LSE_LIMIT         reference = lse, +inf where no key was seen    log2_sum = 0
//     huge, of the row alone    reference = largest score of the row           log2_sum = log2 of the sum of exp(S - reference), sink included
//     huge, of more keys        reference = lse                                log2_sum = 0
//
// Half a unit in the last place of lse is the relative error of all probabilities of a row that are computed from it. At the limit this is 2^-18,
// what each score of that size is off by itself; at 65504 it is 0.2 %, and at 1e9 nothing is left of the logarithm of a sum. Ordinary scores are
// below the limit, so that as a rule a block reads and writes its rows' numbers and ends.
//
// Otherwise it does what the forward kernel does, without V: one block owns TILE_Q queries of one head and walks over all keys that they see. It
// takes no lists of visible tiles, which would have to be made for every call. A row gets the same numbers whatever its neighbours are.
//
// The given lse may be that of more keys than this call sees. It then is above the logarithm of the row's own sum by more than both are rounded by
// (tile/given_lse.cuh), and stays the reference: no sum of this call says what the others add.
//
// Shared memory: Q [TILE_Q][D] | K [NUM_STAGES][TILE_KV][D]. One copy group per key tile. For a wide head this for each slice, then the parts of S
// that the slices exchange.
#include "tile/constants.cuh"
#include "tile/given_lse.cuh"
#include "tile/pipeline.cuh"
#include "tile/products.cuh"
#include "tile/schedule.cuh"
#include "tile/score.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"
#include "tile/softmax.cuh"
#include "tile/visibility.cuh"

constexpr float LSE_LIMIT = 128.0f;

DEVICE bool is_huge(float lse) { return fabsf(lse) >= LSE_LIMIT && fabsf(lse) != infinity(); }

constexpr int WARP_ROWS = TILE_Q / ROW_WARPS;

constexpr int M_TILES = WARP_ROWS / 16;
constexpr int S_TILES = TILE_KV / 8;

constexpr int SLICE_BYTES = TileQ::BYTES + NUM_STAGES * TileK::BYTES;

static_assert(ADDITIVE_MASK, "only with an additive mask rows have sums of their own");
static_assert(TILE_Q % (16 * ROW_WARPS) == 0, "tile_q must be a multiple of 16 * num_warps");
static_assert(HEAD_SLICES * SLICE_BYTES + EXCHANGE_BYTES<M_TILES, S_TILES> == Config::SHARED_BYTES, "shared memory differs from the plan's");

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_row_sums_mma(const __grid_constant__ BackwardArguments arguments) {
  const Work work = work_longest_first<CAUSAL, true>(arguments.geometry, arguments.geometry.num_heads_q);
  const auto& geometry = geometry_of(arguments, work.batch);
  const int first_q = work.tile * TILE_Q;
  const int64 first_row = (int64(work.batch) * geometry.num_heads_q + work.head) * arguments.geometry.seqlen_q;
  RowStatistics* statistics = arguments.row_statistics + first_row;
  float* log2_sums = arguments.features.log2_sums + first_row;

  bool any_is_huge = false;
  for (int row = int(threadIdx.x); row < TILE_Q; row += NUM_THREADS) {
    const int query = first_q + row;
    if (query >= arguments.geometry.seqlen_q) break;  // rows behind a sequence's length, too: the gradient of the sinks reads them
    const float lse = *arguments.lse.pointer(work.batch, work.head, query);
    if (is_huge(lse)) {
      any_is_huge = true;
    } else {
      statistics[query].reference = lse == -infinity() ? infinity() : lse;
      log2_sums[query] = 0.0f;
    }
  }
  if (!__syncthreads_or(any_is_huge)) return;

  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress exchange = smem_address(shared) + HEAD_SLICES * SLICE_BYTES;
  const SmemAddress Q_smem = smem_address(shared) + slice_index() * SLICE_BYTES;
  const SmemAddress K_smem = Q_smem + TileQ::BYTES;
  const int head_kv = work.head / (geometry.num_heads_q / geometry.num_heads_kv);
  const int warp_row = row_warp_index() * WARP_ROWS;

  const Visibility visibility(geometry, arguments.features, work.batch, work.head);
  const int num_keys = visibility.end_key(first_q, first_q + TILE_Q);  // keys beyond are not even read
  const int begin = visibility.first_key(first_q) / TILE_KV;
  const int end = (num_keys + TILE_KV - 1) / TILE_KV;
  const SliceRows<TileQ, HEAD_DIM> Q_rows{arguments.query, work.batch, work.head, geometry.seqlen_q, 0};
  const SliceRows<TileK, HEAD_DIM> K_rows{arguments.key, work.batch, head_kv, num_keys, 0};
  const SliceTile<TileQ, HEAD_DIM> Q{Q_smem, first_q, Q_rows};
  auto K_loader = K_rows.loader();
  auto issue = [&](int tile) {
    if (tile < end) K_loader.issue(K_smem + stage_of(tile) * TileK::BYTES, tile * TILE_KV, first_column<TileK>(0));
    cp_async_commit_group();
  };
  if (SLICE_PIECES == 1 && begin < end) Q.load(0);
  fill_pipeline(begin, issue);

  OnlineSoftmax<M_TILES, true, 0, 0, EXACT_OF<Element>> softmax;
  const ScoreModifier modifier(geometry, arguments.features, work.batch, work.head);
  float no_output[M_TILES][1][4];  // nothing is made of the probabilities
  clear(no_output);

#pragma unroll 1
  for (int j = begin; j < end; ++j) {
    begin_step(j, issue, [&] { K_loader.land(K_smem); });
    const int first_kv = j * TILE_KV;
    const SliceTile<TileK, HEAD_DIM> K{K_smem + stage_of(j) * TileK::BYTES, first_kv, K_rows};

    float S[M_TILES][S_TILES][4];
    clear(S);
    multiply_rows(S, Q, warp_row, K);
    publish_and_collect(S, exchange);
    modifier.apply<false>(S, first_q + warp_row, first_kv);
    hide<false>(S, -infinity(), geometry, visibility, first_q, first_kv, warp_row, TILE_LISTS);
    softmax.update(S, no_output, modifier.factor());
    if constexpr (HEAD_SLICES == 1) end_step();  // slices have exchanged parts since K was read
  }

  if constexpr (SINKS) softmax.add_sink(no_output, arguments.features.sinks.load(work.batch, work.head) * SCORE_UNIT);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(softmax.sum[m][r]);
      const int query = first_q + warp_row + 16 * m + 8 * r + lane_index() / 4;
      if (slice_index() != 0 || lane_index() % 4 != 0 || query >= geometry.seqlen_q) continue;
      const float lse = *arguments.lse.pointer(work.batch, work.head, query);
      if (!is_huge(lse)) continue;
      const bool given = is_of_more(lse, __fmaf_rn(lg2(sum), LN_2, softmax.reference[m][r]));
      statistics[query].reference = given ? lse : softmax.reference[m][r];
      log2_sums[query] = given ? 0.0f : lg2(sum);
    }
}
