// Forward attention of few queries: O = softmax(scale Q Kᵀ) V and the natural-log LSE of each row, at the speed at which K and V come from memory.
//
// The rows of a tile are the queries of all heads that share a key head (tile/grouped_rows.cuh), so that K and V are read once for all of them. The
// keys of a sequence are shared out twice: among blocks, each of which has one of `num_splits` ranges of key tiles (Flash-Decoding: Dao et al. 2023,
// crfm.stanford.edu/2023/10/12/flashdecoding.html), and within a tile of TILE_KV keys among warps, each of which has WARP_KEYS of them for all rows.
// With several splits O and LSE of each are parts, float32, for merge_attention.cu. A split without keys says LSE -inf and leaves its O as
// it is; but the first one has the sink. Queries may be packed (VARLEN), and keys with them or not: then parts are those of all tokens, in one batch.
// A few new keys and values are appended here (APPENDS, tile/new_keys.cuh), and queries rotated on their way to shared memory; many come by
// cache_append.cu. With STREAM_K blocks have equal shares of all key tiles instead, one output tile after the other (tile/stream_k.cuh).
//
// A warp copies its keys and values for itself, into a ring of NUM_STAGES stages of its own, one copy group for each step, and never waits for
// another warp until its last key: per step one wait for its own copies and one barrier of the warp, behind which the stage of the step before is
// free. The groups of the last steps are empty, so nothing travels any more when a warp is done.
//
// Shared memory: Q [TILE_Q][D] | for each warp NUM_STAGES times K [WARP_KEYS][D], V [WARP_KEYS][DV]; in its place, at the end, for each warp
// O [TILE_Q][DV] in float32 | for each warp the state of its softmax (tile/warp_parts.cuh).
#include "tile/constants.cuh"
#include "tile/cache_operand.cuh"
#include "tile/cache_rows.cuh"
#include "tile/grouped_rows.cuh"
#include "tile/new_keys.cuh"
#include "tile/pipeline.cuh"
#include "tile/products.cuh"
#include "tile/split_rows.cuh"
#include "tile/stream_k.cuh"
#include "tile/visible_keys.cuh"
#include "tile/warp_parts.cuh"

constexpr int M_TILES = TILE_Q / 16;
constexpr int WARP_KEYS = TILE_KV / NUM_WARPS;
constexpr int S_TILES = WARP_KEYS / 8;

using CacheMma = SelectCacheMma<Mma, Element, CacheElement>::type;
using WarpK = SmemTile<CacheElement, WARP_KEYS, HEAD_DIM>;
using WarpV = SmemTile<CacheElement, WARP_KEYS, HEAD_DIM_V>;
using Keys = LaneKeys<WARP_KEYS, gcd(gcd(WarpK::CHUNKS, WarpV::CHUNKS), 4), APPENDS>;

constexpr bool WIDENS = sizeof(CacheElement) == 1;

constexpr int STAGE_BYTES = WarpK::BYTES + WarpV::BYTES;
constexpr int RINGS_BYTES = NUM_WARPS * NUM_STAGES * STAGE_BYTES;
constexpr int PARTS_BYTES = NUM_WARPS * WarpO::BYTES;
constexpr int REUSED_BYTES = RINGS_BYTES > PARTS_BYTES ? RINGS_BYTES : PARTS_BYTES;

static_assert(TILE_KV == 16 * NUM_WARPS || TILE_KV == 32 * NUM_WARPS, "tile_kv must be 16 or 32 rows for each warp");
static_assert(NUM_STAGES >= 2, "num_stages must be at least 2");
static_assert(HEAD_SLICES == 1, "head_dim must be at most 256");
static_assert(TileQ::BYTES + REUSED_BYTES + STATES_BYTES == Config::SHARED_BYTES, "shared memory differs from the plan's");

// Q of the grouped rows from first_row on, zeros behind the last one. The caller commits and waits.
DEVICE void copy_queries(SmemAddress tile, const TensorView& view, const SplitWork& work, const GroupedRows& rows, int first_row) {
  for (int index = int(threadIdx.x); index < TILE_Q * TileQ::CHUNKS; index += NUM_THREADS) {
    const int row = index / TileQ::CHUNKS, chunk = index % TileQ::CHUNKS, column = chunk * TileQ::CHUNK_ELEMENTS;
    const Element* source = view.row_pointer<const Element>(work.batch, rows.head(first_row + row), work.start_q + rows.query(first_row + row)) +
                            column * view.stride_dim;
    const int valid = first_row + row < rows.count ? max(0, min(HEAD_DIM - column, TileQ::CHUNK_ELEMENTS)) : 0;
    if (is_vectorized(view)) {
      cp_async<16>(true, tile + TileQ::offset(row, chunk), source, valid * int(sizeof(Element)));
    } else {
      store_shared(tile + TileQ::offset(row, chunk), gather_chunk<Element>(source, view.stride_dim, valid));
    }
  }
}

// The same where columns have another order (tile/cache_operand.cuh).
DEVICE void copy_queries_for_e4m3(SmemAddress tile, const TensorView& view, const SplitWork& work, const GroupedRows& rows, int first_row) {
  for (int index = int(threadIdx.x); index < TILE_Q * TileQ::CHUNKS / 2; index += NUM_THREADS) {
    const int row = index / (TileQ::CHUNKS / 2), first = index % (TileQ::CHUNKS / 2) * 2;
    const Element* source = view.row_pointer<const Element>(work.batch, rows.head(first_row + row), work.start_q + rows.query(first_row + row));
    Chunk chunks[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = (first + i) * TileQ::CHUNK_ELEMENTS;
      const int valid = first_row + row < rows.count ? max(0, min(HEAD_DIM - column, TileQ::CHUNK_ELEMENTS)) : 0;
      const bool is_whole = is_vectorized(view) && valid == TileQ::CHUNK_ELEMENTS;
      chunks[i] = is_whole ? *reinterpret_cast<const Chunk*>(source + column)
                           : gather_chunk<Element>(source + column * view.stride_dim, view.stride_dim, valid);
    }
    order_as_e4m3(chunks[0], chunks[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) store_shared(tile + TileQ::offset(row, first + i), chunks[i]);
  }
}

// The same of queries that are rotated, element by element.
DEVICE void copy_rotated_queries(SmemAddress tile, const ForwardSplitArguments& arguments, const SplitWork& work, const GroupedRows& rows,
                                 int first_row) {
  const TensorView& view = arguments.query;
  const int64 length = arguments.lengths.seqlens_kv[work.sequence];
#pragma unroll 1
  for (int index = int(threadIdx.x); index < TILE_Q * TileQ::CHUNKS / 2; index += NUM_THREADS) {
    const int row = index / (TileQ::CHUNKS / 2), first = index % (TileQ::CHUNKS / 2) * 2, query = rows.query(first_row + row);
    const Element* source = view.row_pointer<const Element>(work.batch, rows.head(first_row + row), work.start_q + query);
    const int64 position = length + (arguments.rotary.queries_advance ? query : 0);
    Chunk chunks[2] = {};
    if (first_row + row < rows.count) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        chunks[i] =
            chunk_of<Element>(first + i, HEAD_DIM, [&](int column) { return rotated(arguments.rotary, source, view.stride_dim, column, position); });
    }
    if constexpr (WIDENS) order_as_e4m3(chunks[0], chunks[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) store_shared(tile + TileQ::offset(row, first + i), chunks[i]);
  }
}

// Attention of the work's rows to its keys, by all threads of a block.
DEVICE void attend(const ForwardSplitArguments& arguments, const SplitWork& work) {
  const Geometry geometry = geometry_in_cache(arguments, work.sequence);
  const SequenceInCache sequence(arguments.cache, work.sequence, work.start_kv);
  const GroupedRows rows(geometry, work.head_kv);
  const Visibility visibility(geometry, arguments.features, work.sequence, rows.first_head);
  const int first_row = work.tile * TILE_Q;
  const VisibleKeys visible(visibility, sequence, rows, first_row);
  const int first_q = visible.first_q, end_q = visible.end_q, first_key = visible.first_key, end_key = visible.end_key;

  const int first_tile = visible.first_tile(), end_tile = visible.end_tile();
  const int split_tiles = arguments.split_tiles > 0 ? arguments.split_tiles : ceil_div(end_tile - first_tile, arguments.num_splits);
  const int begin = min(end_tile, first_tile + (STREAM_K ? work.begin : work.split * split_tiles));  // steps over key tiles
  const int end = min(end_tile, STREAM_K ? first_tile + work.end : begin + split_tiles);
  const bool is_first = STREAM_K ? work.begin == 0 : work.split == 0, has_sink = SINKS && is_first, appends = APPENDS && is_first && work.tile == 0;
  if (!STREAM_K && begin >= end && arguments.num_splits > 1 && !has_sink && !appends) {
#pragma unroll
    for (int i = 0; i < ceil_div(TILE_Q, NUM_THREADS); ++i) {
      const int index = int(threadIdx.x) + i * NUM_THREADS, row = first_row + index;
      if (index < TILE_Q && row < rows.count) RowOfResult(arguments, work, rows, row).store_part(-infinity(), 0.0f);
    }
    return;
  }

  extern __shared__ __align__(128) uint8 shared[];
  const SmemAddress Q_smem = smem_address(shared);
  const SmemAddress reused = Q_smem + TileQ::BYTES, states = reused + REUSED_BYTES;
  const SmemAddress ring = reused + warp_index() * NUM_STAGES * STAGE_BYTES;
  const int warp_key = warp_index() * WARP_KEYS;  // of each tile

  const bool rotates = APPENDS && arguments.rotary.dim > 0;
  if constexpr (WIDENS) {
    if (!rotates) copy_queries_for_e4m3(Q_smem, arguments.query, work, rows, first_row);
  } else {
    if (!rotates) copy_queries(Q_smem, arguments.query, work, rows, first_row);
    cp_async_commit_group();
  }
  const NewKeys new_keys(arguments, sequence, work.sequence, work.head_kv);
  Keys keys;
  auto issue = [&](int step) {  // what was looked up one step before
    if (step < end) {
      const SmemAddress K_smem = ring + stage_of(step) * STAGE_BYTES;
      keys.copy<WarpK, CacheElement>(K_smem, arguments.key, work.head_kv);
      keys.copy<WarpV, CacheElement>(K_smem + WarpK::BYTES, arguments.value, work.head_kv);
      if constexpr (APPENDS) new_keys.copy<WarpK, WarpV>(K_smem, K_smem + WarpK::BYTES, step * TILE_KV + warp_key, first_key, end_key);
      if (step + 1 < end) keys.look_up(sequence, (step + 1) * TILE_KV + warp_key, first_key, end_key, new_keys.first);
    }
    cp_async_commit_group();
  };
  if (begin < end) keys.look_up(sequence, begin * TILE_KV + warp_key, first_key, end_key, new_keys.first);
  fill_pipeline(begin, issue);
  if constexpr (APPENDS) {  // while the first keys travel
    if (rotates) copy_rotated_queries(Q_smem, arguments, work, rows, first_row);
    if (appends) new_keys.append<WarpK, WarpV>();
  }
  if constexpr (WIDENS) __syncthreads();  // Q is there, for all warps
  else wait_for_tiles<NUM_STAGES - 1>();

  float O[M_TILES][DV_TILES][4];
  clear(O);
  WarpSoftmax<M_TILES> softmax;
  const GroupedScores<M_TILES> scores(geometry, arguments.features, work.sequence, rows, first_row);
  const float key_scale = WIDENS ? arguments.scales.key.load_or_1(work.sequence, work.head_kv) : 1.0f;
  for (int step = begin; step < end; ++step) {
    cp_async_wait_group<NUM_STAGES - 2>();
    __syncwarp();  // the warp's keys of this step have landed; every lane is done with those before, whose stage is next
    issue(step + NUM_STAGES - 1);
    const int first = step * TILE_KV + warp_key;
    if (first >= end_key) continue;
    const SmemAddress K_smem = ring + stage_of(step) * STAGE_BYTES;
    float S[M_TILES][S_TILES][4];
    clear(S);
    gemm_rows<CacheMma, TileQ::COLUMNS>(S, CacheMma::OperandA<TileQ>(Q_smem, 0), CacheMma::OperandB<WarpK>(K_smem));
    if constexpr (WIDENS) multiply_all(S, key_scale);
    scores.apply(S, first);
    if (BOOLEAN_MASK || first < first_key || visibility.hides_any(first_q, end_q, first, first + WARP_KEYS)) scores.hide(S, first, first_key);
    softmax.update(S, O, scores.factor());
    auto& P = S;  // in place
    const SmemAddress V_smem = K_smem + WarpK::BYTES;
    gemm_accumulator<CacheMma, WarpV::COLUMNS>(O, P, CacheMma::OperandBByRows<WarpV>(V_smem));
  }

  auto sink = [&](int row) { return has_sink ? arguments.features.sinks.load(work.sequence, rows.head(first_row + row)) * SCORE_UNIT : -infinity(); };
  publish_state(softmax, states);
  __syncthreads();  // every warp's state is there, and no warp copies or reads keys any more
  publish_O<WIDENS>(O, softmax, states, reused, rows.count - first_row, sink);
  __syncthreads();
  const float value_scale = WIDENS ? arguments.scales.value.load_or_1(work.sequence, work.head_kv) : 1.0f;
  constexpr int VECTORS = ceil_div(HEAD_DIM_V, VECTOR);
  for (int index = int(threadIdx.x); index < TILE_Q * VECTORS; index += NUM_THREADS) {
    const int row = index / VECTORS, column = index % VECTORS * VECTOR;
    if (first_row + row >= rows.count) break;
    const WholeRow whole(states, row, sink(row));
    const RowOfResult result(arguments, work, rows, first_row + row);
    if (column == 0) result.store_lse(whole);
    float x[VECTOR];
    collect_O(x, reused, row, column, WIDENS ? whole.inverse() * value_scale : whole.inverse());
    result.store_O(x, column);
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) forward_split_mma(const __grid_constant__ ForwardSplitArguments arguments) {
  if constexpr (STREAM_K) {
    clear_rows_of_nobody(arguments);
    for (KeyTileStream stream(arguments); stream.has_more(); stream.advance()) {
      const SplitWork work = stream.work();
      if (work.begin == 0) {
        if (threadIdx.x == 0) stream.list_parts();
        claim_grouped_rows(arguments, work);
      }
      attend(arguments, work);
      __syncthreads();  // shared memory is read to the end
    }
  } else {
    const SplitWork work =
        work_of_split(arguments.geometry, arguments.lengths, work_of_block(arguments.geometry.num_tiles, arguments.geometry.num_heads_kv));
    if (claim_grouped_rows(arguments, work)) attend(arguments, work);
  }
}
