// Behind backward_wgmma.cu or backward_dkdv_mma.cu where blocks share out the queries of a tile of keys (tile/query_splits.cuh): dK and dV, the sums
// of what each split has given, in the order of the splits, scaled and converted.
//
// A block has 16 keys, each of its warps every NUM_WARPS-th accumulator tile of their dK and dV.
#include "tile/epilogue.cuh"
#include "tile/features.cuh"
#include "tile/query_splits.cuh"
#include "tile/sequence.cuh"

static_assert(SPLIT && HEAD_SLICES == 1, "parts are of whole heads");
static_assert(HEAD_DIM % 2 == 0 && HEAD_DIM_V % 2 == 0, "columns are stored in pairs");

// Stores an accumulator tile's columns from `column` on, of the first NUM_COLUMNS.
template <int NUM_COLUMNS>
DEVICE void store_tile(const float (&c)[4], float factor, const TensorView& view, const Work& work, int start, int first_row, int num_rows,
                       int column) {
  column += lane_index() % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r + lane_index() / 4;
    if (row >= num_rows || column >= NUM_COLUMNS) continue;
    Element* destination = view.row_pointer<Element>(work.batch, work.head, start) + row * view.stride_seqlen;
    store_pair(destination, column, view, c[2 * r] * factor, c[2 * r + 1] * factor);
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_dkdv_merge(const __grid_constant__ BackwardArguments arguments) {
  const int num_heads = arguments.geometry.num_heads_q / arguments.group_heads, row_tile = int(blockIdx.x) % PART_ROW_TILES;
  const Work work = work_of_block(arguments.geometry.num_tiles, num_heads, int(blockIdx.x) / PART_ROW_TILES);
  const PackedArray packed = packed_keys(arguments);
  const int start = sequence_start(packed.offsets, work.batch, packed.num_rows), num_rows = sequence_length(packed, work.batch);
  const int first_row = work.tile * TILE_KV + row_tile * 16;
  if (first_row >= num_rows) return;  // of a packed sequence that is shorter than others nobody may have stored anything there
#pragma unroll 1
  for (int n = warp_index(); n < PART_TILES; n += NUM_WARPS) {
    float sum[4] = {};
#pragma unroll 4
    for (int split = 0; split < arguments.splits.num_splits; ++split) {
      float part[4];
      load_fragment(key_part(arguments, work, num_heads, split, row_tile) + n * FRAGMENT_FLOATS, part);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[i];
    }
    if (n < DK_TILES) {
      store_tile<HEAD_DIM>(sum, arguments.geometry.scale, arguments.grad_key, work, start, first_row, num_rows, 8 * n);
    } else {
      const float factor = DROPOUT ? arguments.features.dropout_scale : 1.0f;
      store_tile<HEAD_DIM_V>(sum, factor, arguments.grad_value, work, start, first_row, num_rows, 8 * (n - DK_TILES));
    }
  }
}
