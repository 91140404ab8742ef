// Gradient of an additive mask: the sum of dS = P (dP - delta) over the axes along which the mask is broadcast.
//
// One block owns one tile of the gradient, or of the axes that the mask has: it walks over all query tiles where the mask has one row for all
// queries, over all key tiles where it has one column for all keys, and over all heads and batches that share it. Sums stay in registers in the form
// of a tile of scores, S = Q Kᵀ and dP = dO Vᵀ are computed again for every tile, and rows and columns are added up once at the end, in a fixed
// order: the result is the same bit for bit on every run, and no memory is taken but that of the gradient.
//
// Shared memory: Q [TILE_Q][D] | dO [TILE_Q][DV] | K [TILE_KV][D] | V [TILE_KV][DV]; for a wide head this for each slice, then the parts of S and of
// dP that the slices exchange. At the end sums of columns [ROW_WARPS][TILE_KV]. All slices of a wide head add up the same sums, the first stores
// them.
#include "tile/constants.cuh"
#include "tile/dropout.cuh"
#include "tile/pipeline.cuh"
#include "tile/products.cuh"
#include "tile/row_statistics.cuh"
#include "tile/schedule.cuh"
#include "tile/score.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"
#include "tile/visibility.cuh"

constexpr int WARP_ROWS = TILE_Q / ROW_WARPS;

constexpr int M_TILES = WARP_ROWS / 16;
constexpr int S_TILES = TILE_KV / 8;

constexpr int SLICE_BYTES = TileQ::BYTES + TileO::BYTES + TileK::BYTES + TileV::BYTES;

static_assert(ADDITIVE_MASK, "only an additive mask has a gradient");
static_assert(TILE_Q % (16 * ROW_WARPS) == 0, "tile_q must be a multiple of 16 * num_warps");
static_assert(HEAD_SLICES * SLICE_BYTES + 2 * EXCHANGE_BYTES<M_TILES, S_TILES> == Config::SHARED_BYTES, "shared memory differs from the plan's");
static_assert(ROW_WARPS * TILE_KV * int(sizeof(float)) <= Config::SHARED_BYTES, "sums of columns need more shared memory");

// The sum of a tile's rows for each of its columns, over all warps; the result is in column_sums[0 .. TILE_KV).
DEVICE void sum_rows(const float (&total)[M_TILES][S_TILES][4], float* column_sums) {
#pragma unroll
  for (int n = 0; n < S_TILES; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) sum += total[m][n][c] + total[m][n][2 + c];
#pragma unroll
      for (int lane_mask = 4; lane_mask < WARP_SIZE; lane_mask *= 2) sum += shfl_xor(sum, lane_mask);
      if (slice_index() == 0 && lane_index() < 4) column_sums[row_warp_index() * TILE_KV + 8 * n + 2 * lane_index() + c] = sum;
    }
  __syncthreads();
  for (int column = int(threadIdx.x); column < TILE_KV; column += NUM_THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < ROW_WARPS; ++warp) sum += column_sums[warp * TILE_KV + column];
    column_sums[column] = sum;
  }
  __syncthreads();
}

// Stores the sums of the tile that starts at first_q and first_kv, added up along the axes of which the mask has one element. Memory of the tiles,
// from `shared` on, is used again.
DEVICE void store_sums(float (&total)[M_TILES][S_TILES][4], uint8* shared, const MaskView& grad_attn_mask, const Work& work, int first_q,
                       int first_kv, int seqlen_q, int seqlen_kv) {
  const bool sums_queries = grad_attn_mask.stride_query == 0, sums_keys = grad_attn_mask.stride_key == 0;
  const int warp_row = row_warp_index() * WARP_ROWS;
  MaskElement* destination =
      static_cast<MaskElement*>(grad_attn_mask.data) + work.batch * grad_attn_mask.stride_batch + work.head * grad_attn_mask.stride_head;
  if (sums_queries) {
    __syncthreads();  // every warp is done with the tiles, whose memory is used again
    float* column_sums = reinterpret_cast<float*>(shared);
    sum_rows(total, column_sums);
    if (sums_keys) {
      float sum = 0.0f;
      for (int column = 0; column < TILE_KV; ++column) sum += column_sums[column];
      if (threadIdx.x == 0) *destination = from_float<MaskElement>(sum);
    } else {
      for (int column = int(threadIdx.x); column < TILE_KV; column += NUM_THREADS) {
        if (first_kv + column < seqlen_kv)
          destination[(first_kv + column) * grad_attn_mask.stride_key] = from_float<MaskElement>(column_sums[column]);
      }
    }
  } else if (slice_index() != 0) {
    return;
  } else if (sums_keys) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < S_TILES; ++n) sum += total[m][n][2 * r] + total[m][n][2 * r + 1];
        sum = quad_sum(sum);
        const int query = first_q + warp_row + 16 * m + 8 * r + lane_index() / 4;
        if (lane_index() % 4 == 0 && query < seqlen_q) destination[query * grad_attn_mask.stride_query] = from_float<MaskElement>(sum);
      }
  } else {
    for_each_element(total, [&](int row, int column, float& sum) {
      const int query = first_q + warp_row + row, key = first_kv + column;
      if (query < seqlen_q && key < seqlen_kv)
        destination[query * grad_attn_mask.stride_query + key * grad_attn_mask.stride_key] = from_float<MaskElement>(sum);
    });
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_mask_mma(const __grid_constant__ BackwardArguments arguments) {
  const MaskView& grad_attn_mask = arguments.features.grad_attn_mask;
  const bool sums_queries = grad_attn_mask.stride_query == 0, sums_keys = grad_attn_mask.stride_key == 0;
  const int seqlen_q = arguments.geometry.seqlen_q, seqlen_kv = arguments.geometry.seqlen_kv;
  const int num_q_tiles = (seqlen_q + TILE_Q - 1) / TILE_Q, num_kv_tiles = (seqlen_kv + TILE_KV - 1) / TILE_KV;
  const Work work = work_of_block(arguments.geometry.num_tiles, arguments.geometry.num_heads_q / arguments.group_heads);
  const int owned_kv_tiles = sums_keys ? 1 : num_kv_tiles;
  const int begin_q = sums_queries ? 0 : work.tile / owned_kv_tiles, end_q = sums_queries ? num_q_tiles : begin_q + 1;
  const int begin_kv = sums_keys ? 0 : work.tile % owned_kv_tiles, end_kv = sums_keys ? num_kv_tiles : begin_kv + 1;
  const int warp_row = row_warp_index() * WARP_ROWS;

  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress S_exchange = smem_address(shared) + HEAD_SLICES * SLICE_BYTES;
  const SmemAddress dP_exchange = S_exchange + EXCHANGE_BYTES<M_TILES, S_TILES>;
  const SmemAddress Q_smem = smem_address(shared) + slice_index() * SLICE_BYTES;
  const SmemAddress dO_smem = Q_smem + TileQ::BYTES;
  const SmemAddress K_smem = dO_smem + TileO::BYTES;
  const SmemAddress V_smem = K_smem + TileK::BYTES;

  float total[M_TILES][S_TILES][4];
  clear(total);
  const Dropout dropout(arguments.features);

#pragma unroll 1
  for (int member = 0; member < arguments.group_batch * arguments.group_heads; ++member) {
    const int batch = work.batch * arguments.group_batch + member / arguments.group_heads;
    const int head = work.head * arguments.group_heads + member % arguments.group_heads;
    const auto& geometry = geometry_of(arguments, batch);
    const int head_kv = head / (geometry.num_heads_q / geometry.num_heads_kv);
    const Visibility visibility(geometry, arguments.features, batch, head);
    const ScoreModifier modifier(geometry, arguments.features, batch, head);
    const StatisticsView view(arguments, batch, head, 0, geometry.seqlen_q);
    const SliceRows<TileQ, HEAD_DIM> Q_rows{arguments.query, batch, head, geometry.seqlen_q, 0};
    const SliceRows<TileO, HEAD_DIM_V> dO_rows{arguments.grad_out, batch, head, geometry.seqlen_q, 0};

#pragma unroll 1
    for (int q_tile = begin_q; q_tile < end_q; ++q_tile) {
      const int first_q = q_tile * TILE_Q;
      const int num_keys = visibility.end_key(first_q, first_q + TILE_Q);
      const int first_tile = max(begin_kv, visibility.first_key(first_q) / TILE_KV);
      const int end_tile = min(end_kv, (num_keys + TILE_KV - 1) / TILE_KV);
      const StatisticsOfRows<M_TILES> statistics(view, first_q + warp_row);
      const SliceRows<TileK, HEAD_DIM> K_rows{arguments.key, batch, head_kv, num_keys, 0};
      const SliceRows<TileV, HEAD_DIM_V> V_rows{arguments.value, batch, head_kv, num_keys, 0};
      const SliceTile<TileQ, HEAD_DIM> Q{Q_smem, first_q, Q_rows};
      const SliceTile<TileO, HEAD_DIM_V> dO{dO_smem, first_q, dO_rows};

#pragma unroll 1
      for (int kv_tile = first_tile; kv_tile < end_tile; ++kv_tile) {
        const int first_kv = kv_tile * TILE_KV;
        const SliceTile<TileK, HEAD_DIM> K{K_smem, first_kv, K_rows};
        const SliceTile<TileV, HEAD_DIM_V> V{V_smem, first_kv, V_rows};
        if constexpr (SLICE_PIECES == 1) {
          __syncthreads();  // every warp is done with the tiles before
          if (kv_tile == first_tile) {
            Q.load(0);
            dO.load(0);
          }
          K.load(0);
          V.load(0);
          cp_async_commit_group();
          wait_for_tiles<0>();
        }

        float S[M_TILES][S_TILES][4];
        clear(S);
        multiply_rows(S, Q, warp_row, K);
        publish_and_collect(S, S_exchange);
        modifier.apply<false>(S, first_q + warp_row, first_kv);
        statistics.to_probabilities(S, modifier.signed_factor());
        auto& P = S;  // in place
        hide<false>(P, 0.0f, geometry, visibility, first_q, first_kv, warp_row, TILE_LISTS);

        float dP[M_TILES][S_TILES][4];  // less delta
        statistics.begin_grad_products(dP);
        multiply_rows(dP, dO, warp_row, V);
        publish_and_collect(dP, dP_exchange);
        if constexpr (DROPOUT) statistics.drop(dP, dropout, batch, head, first_q + warp_row, first_kv, arguments.features.dropout_scale);
        for_each_place<M_TILES, S_TILES>([&](int m, int n, int i, int, int) { total[m][n][i] += P[m][n][i] * dP[m][n][i]; });  // dS
      }
    }
  }

  store_sums(total, shared, grad_attn_mask, work, begin_q * TILE_Q, begin_kv * TILE_KV, seqlen_q, seqlen_kv);
}
