// Forward attention on warp-level matrix instructions: O = softmax(scale Q Kᵀ) V and the natural-log LSE of each row.
//
// One block computes TILE_Q rows of one head; each warp owns TILE_Q / NUM_WARPS of them and keeps their O and softmax state in registers. The block
// walks over the key tiles that its rows can see (FlashAttention-2, Dao 2023, arXiv 2307.08691, algorithm 1).
//
// Features of the generated Config change scores and visibility (tile/score.cuh, tile/visibility.cuh), add a logit to the denominator, or drop
// probabilities between softmax and P V; LSE is that of all probabilities.
//
// Shared memory: Q [TILE_Q][D] | K [NUM_STAGES][TILE_KV][D] | V [NUM_STAGES][TILE_KV][DV]; for a wide head this for each slice, then the parts of S
// that the slices exchange. A mask that is copied (tile/copied_mask.cuh) comes last.
//
// Copies are committed in the order K0 V0 K1 V1 ..., one group each. In step j two barriers each do two jobs:
//   A  K_j has landed; every warp is done with V_{j-1}   ->  V_{j+NUM_STAGES-1} may be issued into its stage
//   B  V_j has landed; every warp is done with K_j       ->  K_{j+NUM_STAGES} may be issued into its stage
// so at either barrier 2 (NUM_STAGES - 1) younger groups may still be in flight. With one stage, V_j travels during Q Kᵀ and K_{j+1} during the
// softmax and P V.
#include "tile/capped_scores.cuh"
#include "tile/constants.cuh"
#include "tile/copied_mask.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/packed_tiles.cuh"
#include "tile/partial_outputs.cuh"
#include "tile/pipeline.cuh"
#include "tile/products.cuh"
#include "tile/score.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"
#include "tile/softmax.cuh"
#include "tile/visibility.cuh"
#include "tile/visible_tiles.cuh"

constexpr int WARP_ROWS = TILE_Q / ROW_WARPS;

constexpr int M_TILES = WARP_ROWS / 16;
constexpr int S_TILES = TILE_KV / 8;
constexpr int PENDING = 2 * (NUM_STAGES - 1);  // copy groups younger than the one that a barrier waits for

constexpr bool ASKS_MASK = BOOLEAN_MASK && !COPIES_MASK;  // while pairs are hidden
// Whether a boolean mask that is copied says all: it is False behind the last key.
constexpr bool ONLY_COPIED = BOOLEAN_MASK && COPIES_MASK && !CAUSAL && !WINDOW && !SEGMENTS && !SEQLENS_KV;

constexpr int SLICE_BYTES = TileQ::BYTES + NUM_STAGES * (TileK::BYTES + TileV::BYTES);

static_assert(TILE_Q % (16 * ROW_WARPS) == 0, "tile_q must be a multiple of 16 * num_warps");
static_assert(HEAD_SLICES * SLICE_BYTES + EXCHANGE_BYTES<M_TILES, S_TILES> + CopiedMask::BYTES == Config::SHARED_BYTES,
              "shared memory differs from the plan's");
static_assert(!COPIES_MASK || HEAD_SLICES == 1, "warps of several slices have the same rows");

using Softmax = OnlineSoftmax<M_TILES, ADDITIVE_MASK, PROBABILITY_SHIFT, SLACK_OF<Element>, EXACT_OF<Element>>;

// The lse of a warp's rows, once they are finished, if anybody wants it.
DEVICE void store_lse(const Softmax& softmax, const ForwardArguments& arguments, const Work& work, int seqlen_q, int start_q) {
  const int first_row = work.tile * TILE_Q + row_warp_index() * WARP_ROWS;
  if (arguments.lse.data != nullptr && slice_index() == 0 && lane_index() % 4 == 0) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = first_row + 16 * m + 8 * r + lane_index() / 4;
        if (query < seqlen_q) *arguments.lse.pointer(work.batch, work.head, start_q + query) = softmax.lse(m, r);
      }
  }
}

// Products -> probabilities. `finish_scores` makes scores of products, hides pairs and leaves the mask; where softcap makes quotients of them, no
// pair is hidden.
template <int N, int N_O, typename FinishScores, typename LeaveMask>
DEVICE void to_probabilities(float (&S)[M_TILES][N][4], float (&O)[M_TILES][N_O][4], Softmax& softmax, CappedScores<M_TILES>& capped,
                             const ScoreModifier& modifier, bool hides, const FinishScores& finish_scores, const LeaveMask& leave_mask) {
  if constexpr (MAKES_QUOTIENTS) {
    if (!hides && modifier.caps_quotients()) {
      leave_mask();
      modifier.to_quotients(S);
      softmax.to_exponents<true>(S, O, capped);
    } else {
      finish_scores();
      softmax.to_exponents<false>(S, O, capped);
    }
    softmax.exponentiate(S);
  } else {
    finish_scores();
    softmax.update(S, O, modifier.factor());
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) forward_mma(const __grid_constant__ ForwardArguments arguments) {
  const Work work = work_in_order<CAUSAL, true>(arguments, arguments.geometry.num_heads_q);
  const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, work.batch, arguments.geometry.seqlen_q);
  const int start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, work.batch, arguments.geometry.seqlen_kv);
  auto clear_outputs = [&](int begin, int end, int tile, int num_tiles) { clear_queries(arguments, work, begin, end, tile, num_tiles); };
  if (!claim_rows<TILE_Q>(arguments, packed_queries(arguments), work, clear_outputs)) return;
  const auto& geometry = geometry_of(arguments, work.batch);
  const int head_kv = work.head / (geometry.num_heads_q / geometry.num_heads_kv);
  const int first_q = work.tile * TILE_Q;
  const int warp_row = row_warp_index() * WARP_ROWS;

  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress exchange = smem_address(shared) + HEAD_SLICES * SLICE_BYTES;
  const SmemAddress Q_smem = smem_address(shared) + slice_index() * SLICE_BYTES;
  const SmemAddress K_smem = Q_smem + TileQ::BYTES;
  const SmemAddress V_smem = K_smem + NUM_STAGES * TileK::BYTES;

  const Visibility visibility(geometry, arguments.features, work.batch, work.head);
  const int num_keys =  // keys beyond are not even read; asked of the geometry where it can be, as in `hide`
      ONLY_CAUSAL ? causal_end_key<CAUSAL>(geometry, first_q + TILE_Q) : visibility.end_key(first_q, first_q + TILE_Q);
  VisibleTilesAhead<NUM_STAGES> tiles(arguments.geometry, arguments.features, work.batch, work.head, work.tile,
                                      (arguments.geometry.seqlen_kv + TILE_KV - 1) / TILE_KV);
  const int begin = TILE_LISTS ? 0 : visibility.first_key(first_q) / TILE_KV;  // steps over key tiles
  const int end = TILE_LISTS ? tiles.count() : (num_keys + TILE_KV - 1) / TILE_KV;
  const SliceRows<TileQ, HEAD_DIM> Q_rows{arguments.query, work.batch, work.head, geometry.seqlen_q, start_q};
  const SliceRows<TileK, HEAD_DIM> K_rows{arguments.key, work.batch, head_kv, num_keys, start_kv};
  const SliceRows<TileV, HEAD_DIM_V> V_rows{arguments.value, work.batch, head_kv, num_keys, start_kv};
  const SliceTile<TileQ, HEAD_DIM> Q{Q_smem, first_q, Q_rows};
  const CopiedMask copied_mask(exchange, geometry, arguments.features.attn_mask, work.batch, work.head, first_q + warp_row);
  auto Q_loader = Q_rows.loader();
  auto K_loader = K_rows.loader<true>();
  auto V_loader = V_rows.loader<true>();
  auto issue_K = [&](int step) {
    K_loader.issue(K_smem + stage_of(step) * TileK::BYTES, tiles.tile(step) * TILE_KV, first_column<TileK>(0), step < end);
    cp_async_commit_group();
  };
  auto issue_V = [&](int step) {
    V_loader.issue(V_smem + stage_of(step) * TileV::BYTES, tiles.tile(step) * TILE_KV, first_column<TileV>(0), step < end);
    cp_async_commit_group();
  };
  auto issue_mask = [&](int step) {
    const bool is_asked = step < end && (ADDITIVE_MASK || tiles.is_partial(step));
    if constexpr (COPIES_MASK) copied_mask.issue(step, tiles.tile(step) * TILE_KV, geometry.seqlen_kv, is_asked);
  };
  if constexpr (SLICE_PIECES == 1) {
#pragma unroll
    for (int ahead = 0; ahead < NUM_STAGES; ++ahead) issue_mask(begin + ahead);
    if (begin < end) Q_loader.issue(Q_smem, first_q, first_column<TileQ>(0));
#pragma unroll
    for (int ahead = 0; ahead < NUM_STAGES - 1; ++ahead) {
      issue_K(begin + ahead);
      issue_V(begin + ahead);
    }
    issue_K(begin + NUM_STAGES - 1);
  }

  if (SLICE_PIECES == 1 && !MODIFIES_SCORES && geometry.score_sign != 1.0f && begin < end) {
    wait_for_tiles<PENDING>();  // Q is in the first group
    multiply_tile<TileQ, SLICE_THREADS>(Q_smem, geometry.score_sign);  // once, and not the scores of every tile; barrier A orders it
  }

  float O[M_TILES][DV_TILES][4];
  clear(O);
  Softmax softmax;
  const ScoreModifier modifier(geometry, arguments.features, work.batch, work.head);
  const Dropout dropout(arguments.features);
  CappedScores<M_TILES> capped(arguments.features.softcap);
  PartialOutputs<M_TILES, DV_TILES> partial(arguments.out.row_pointer<float>(work.batch, work.head, start_q), arguments.out, first_q + warp_row,
                                            geometry.seqlen_q, first_column<TileV>(0));

  for (int j = begin; j < end; ++j) {
    tiles.look_ahead(j);
    const SliceTile<TileK, HEAD_DIM> K{K_smem + stage_of(j) * TileK::BYTES, tiles.tile(j) * TILE_KV, K_rows};
    float S[M_TILES][S_TILES][4];
    if constexpr (SLICE_PIECES == 1) {
      wait_for_tiles<PENDING>([&] { K_loader.land(K_smem); });  // barrier A
      issue_V(j + NUM_STAGES - 1);
    }
    clear(S);
    MaskAhead<false, M_TILES, S_TILES> mask;
    if constexpr (!COPIES_MASK) modifier.read_mask(mask, first_q + warp_row, tiles.tile(j) * TILE_KV);
    multiply_rows(S, Q, warp_row, K);
    HiddenAhead<false, M_TILES, S_TILES, ASKS_MASK> hidden;
    hidden.read(visibility, first_q + warp_row, tiles.tile(j) * TILE_KV, tiles.is_partial(j));
    publish(S, exchange);
    if constexpr (SLICE_PIECES == 1) {
      wait_for_tiles<PENDING>([&] { V_loader.land(V_smem); });  // barrier B
      issue_K(j + NUM_STAGES);
    } else {
      __syncthreads();
    }
    collect(S, exchange);
    if constexpr (SLICE_PIECES > 1 && !MODIFIES_SCORES) multiply_all(S, geometry.score_sign);

    const int first_kv = tiles.tile(j) * TILE_KV;
    const bool hides = SOFTCAP && (tiles.is_partial(j) || visibility.hides_any(first_q, first_q + TILE_Q, first_kv, first_kv + TILE_KV));
    auto leave_mask = [&] {  // to the copy of a later step's
      if constexpr (COPIES_MASK) __syncwarp();
      issue_mask(j + NUM_STAGES);
    };
    auto finish_scores = [&] {
      modifier.apply_to_rows(S, first_q + warp_row, first_kv, !hides, false);
      if constexpr (COPIES_MASK) {
        if (ADDITIVE_MASK || tiles.is_partial(j)) copied_mask.apply(S, modifier.factor_beside_mask(), -infinity(), j);
        leave_mask();
      } else if constexpr (ADDITIVE_MASK) {
        modifier.add_mask<false>(S, first_q + warp_row, first_kv, mask);
      }
      if constexpr (!ONLY_COPIED)
        hide<false, ASKS_MASK>(S, -infinity(), geometry, visibility, first_q, first_kv, warp_row, (ASKS_MASK || SEGMENTS) && tiles.is_partial(j),
                               hidden);
    };
    to_probabilities(S, O, softmax, capped, modifier, hides, finish_scores, leave_mask);
    auto& P = S;  // in place
    if constexpr (DROPOUT) drop(P, dropout, work.batch, work.head, first_q + warp_row, first_kv);
    const SliceTile<TileV, HEAD_DIM_V> V{V_smem + stage_of(j) * TileV::BYTES, first_kv, V_rows};
    multiply_accumulator(O, P, V);
    if constexpr (PARTIAL_OUTPUTS) {
      if ((j - begin) % PARTIAL_STEPS == PARTIAL_STEPS - 1) partial.put(O, softmax);
    }
    tiles.advance();
  }
  if constexpr (PARTIAL_OUTPUTS) partial.take(O, softmax);

  if constexpr (SINKS) softmax.add_sink(O, arguments.features.sinks.load(work.batch, work.head) * SCORE_UNIT);
  softmax.finish(O);
  if constexpr (DROPOUT) multiply_all(O, arguments.features.dropout_scale);
  store_lse(softmax, arguments, work, geometry.seqlen_q, start_q);
  store_slice<HEAD_DIM_V, TileQ>(O, Q_smem, warp_row, arguments.out, work, first_q, geometry.seqlen_q, start_q);
}
