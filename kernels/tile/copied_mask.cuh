// A mask that passes through shared memory beside K and V, where its rows start on 16 bytes and its keys are neighbours.
//
// A warp copies the rows of its own queries, and nobody else reads them: the mask of step j + NUM_STAGES may travel as soon as the lanes of the warp
// have read that of step j, without a barrier of the block. Its copies are committed with V of the same step, or with K where the walk begins.
//
// Shared memory: [NUM_STAGES][TILE_Q][TILE_KV], in chunks of 16 bytes, of which GROUP stay neighbours. Groups are exchanged as in tile/smem_tile.cuh,
// so that the rows that lanes read at once lie on different banks: eight rows of a chunk, or of 32-bit elements four rows of two.
//
// A boolean mask is copied for tiles alone of which it hides some pair.
#pragma once
#include "tile/constants.cuh"
#include "tile/score.cuh"
#include "tile/slices.cuh"
#include "tile/visibility.cuh"

constexpr bool COPIES_MASK = Config::COPIES_MASK;

class CopiedMask {  // of one batch, query head and warp; nothing unless COPIES_MASK
  static constexpr int ROWS = TILE_Q / ROW_WARPS;
  static constexpr int CHUNK_KEYS = 16 / MASK_BYTES;
  static constexpr int CHUNKS = TILE_KV / CHUNK_KEYS;  // of a row
  static constexpr int GROUP = MASK_BYTES == 4 ? 2 : 1, SLOTS = 8 / GROUP;
  static constexpr int SWIZZLE = gcd(CHUNKS / GROUP, SLOTS);
  static constexpr int ROW_BYTES = CHUNKS * 16;
  static constexpr int WARP_BYTES = ROWS * ROW_BYTES;
  static constexpr int ROW_LANES = gcd(CHUNKS, 4);  // lanes that copy a row together
  static constexpr int ROW_STEP = WARP_SIZE / ROW_LANES;  // a multiple of 8, the period of the exchange
  static constexpr int M = ROWS / 16, N = TILE_KV / 8;

 public:
  static constexpr int BYTES = COPIES_MASK ? NUM_STAGES * TILE_Q * ROW_BYTES : 0;

  DEVICE CopiedMask(SmemAddress shared, const Geometry& geometry, const MaskView& view, int batch, int head, int first_query)
      : tile(shared + row_warp_index() * WARP_BYTES), stride_query(view.stride_query), num_rows(geometry.seqlen_q - first_query - lane_row()) {
    if constexpr (COPIES_MASK) {
      const auto* data = static_cast<const MaskElement*>(view.data) + batch * view.stride_batch + head * view.stride_head;
      source = data + (first_query + lane_row()) * stride_query + lane_chunk() * CHUNK_KEYS;
    }
  }

  // Starts the copies of a step's tile, unless the step is not `enabled`. Behind the last query or key is 0.
  DEVICE void issue(int step, int first_kv, int seqlen_kv, bool enabled) const {
    if constexpr (COPIES_MASK) {
      const SmemAddress stage = stage_address(step);
      const int lane_offset = offset(lane_row(), lane_chunk());
      const int num_keys = seqlen_kv - first_kv - lane_chunk() * CHUNK_KEYS;
      const MaskElement* row = source + first_kv;
#pragma unroll
      for (int i = 0; i < ROWS; i += ROW_STEP) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += ROW_LANES) {
          const bool is_there = i < num_rows && chunk * CHUNK_KEYS < num_keys;
          const bool is_own = ROWS % ROW_STEP == 0 || i + lane_row() < ROWS;  // where a row has an odd number of chunks, lanes may be left over
          cp_async<16>(enabled && is_own, at(stage, lane_offset, i, chunk), row + chunk * CHUNK_KEYS, is_there ? 16 : 0);
        }
        row += ROW_STEP * stride_query;
      }
    }
  }

  // Adds an additive mask to `factor` times what is there, or gives `hidden` to what a boolean one hides.
  DEVICE void apply(float (&S)[M][N][4], float factor, float hidden, int step) const {
    if constexpr (ADDITIVE_MASK) add(S, factor, step);
    if constexpr (BOOLEAN_MASK) hide(S, hidden, step);
  }

 private:
  SmemAddress tile;  // the warp's rows of the first stage
  const MaskElement* source = nullptr;  // the first chunk that the lane copies of a tile that starts at key 0
  int64 stride_query;
  int num_rows;  // that exist, from the first that the lane copies

  DEVICE void add(float (&S)[M][N][4], float factor, int step) const {
    if constexpr (MASK_BYTES == 2) {
      const int lane_offset = offset(lane_index() % 16, lane_index() / 16);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; n += 2) add_mask_square(S[m], n, factor, at(stage_address(step), lane_offset, 16 * m, n));
    } else if constexpr (MASK_BYTES == 4) {
      const int lane_offset = offset(lane_index() / 4, lane_index() % 4 / 2) + lane_index() % 2 * 8;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int n = 0; n < N; ++n) {
            const float2 pair = load_shared_f32x2(at(stage_address(step), lane_offset, 16 * m + 8 * r, 2 * n));
            add_bias(S[m][n][2 * r], factor, pair.x);
            add_bias(S[m][n][2 * r + 1], factor, pair.y);
          }
    }
  }

  DEVICE void hide(float (&S)[M][N][4], float hidden, int step) const {
    const int lane_offset = offset(lane_index() / 4, 0) + lane_index() % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const uint32 pair = load_shared_u16(at(stage_address(step), lane_offset, 16 * m + 8 * r, n / 2) + n % 2 * 8);
          if ((pair & 0x00ff) == 0) S[m][n][2 * r] = hidden;
          if ((pair & 0xff00) == 0) S[m][n][2 * r + 1] = hidden;
        }
  }

  DEVICE static int lane_row() { return lane_index() / ROW_LANES; }
  DEVICE static int lane_chunk() { return lane_index() % ROW_LANES; }
  DEVICE SmemAddress stage_address(int step) const { return tile + stage_of(step) * (TILE_Q * ROW_BYTES); }

  DEVICE static int offset(int row, int chunk) { return row * ROW_BYTES + (chunk ^ int(uint32(row) / (SLOTS / SWIZZLE) % SWIZZLE) * GROUP) * 16; }
  // The address `row` rows (a multiple of 8) and `chunk` chunks away from a lane's place `lane_offset`: as `SmemTile::at`.
  DEVICE static SmemAddress at(SmemAddress stage, int lane_offset, int row, int chunk) {
    const int group = chunk / GROUP;
    return stage + ((lane_offset ^ (group % SWIZZLE * GROUP * 16)) + group / SWIZZLE * (SWIZZLE * GROUP * 16) + row * ROW_BYTES);
  }
};
