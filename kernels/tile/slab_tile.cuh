// A matrix of ROWS x COLUMNS 16-bit elements in shared memory as the TMA unit writes it and wgmma reads it: slabs of 64 columns one behind the
// other, each with rows of 128 bytes, whose 16-byte chunks are exchanged as chunk ^ (row % 8). It starts on 1024 bytes. What a slab has beyond the
// columns of the tensor is zero.
#pragma once
#include "arguments.cuh"
#include "ptx/warp.cuh"
#include "ptx/wgmma.cuh"

constexpr int SLAB_COLUMNS = 64;
constexpr int SLAB_ALIGNMENT = 1024;  // of eight rows, after which the swizzle starts anew

template <int ROWS_, int COLUMNS_>
struct SlabTile {
  static constexpr int ROWS = ROWS_;
  static constexpr int SLABS = ceil_div(COLUMNS_, SLAB_COLUMNS);
  static constexpr int ROW_BYTES = SLAB_COLUMNS * 2;  // of a slab
  static constexpr int SLAB_BYTES = ROWS * ROW_BYTES;
  static constexpr int BYTES = SLABS * SLAB_BYTES;
  static_assert(ROWS % 8 == 0, "the swizzle repeats after 8 rows");

  // Asks for the rows from `row` on, from `column` on. BYTES arrive at the mbarrier.
  template <int ELEMENT_BYTES = 2>
  DEVICE static void load(SmemAddress tile, const MappedTensor& tensor, int row, int head, int batch, SmemAddress mbarrier, int column = 0) {
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab)
      load_box(tile + slab * SLAB_BYTES, tensor.map, column + slab * (ROW_BYTES / ELEMENT_BYTES), row, head * tensor.head_factor,
               batch * tensor.batch_factor, mbarrier);
  }

  // The other way round, of a warp's 16 rows of it, which lie from `rows` on in the first slab and are those from `row` on of the tensor. By one
  // thread, which waits for them by `wait_stores_read`.
  DEVICE static void store(SmemAddress rows, const MappedTensor& tensor, int row, int head, int batch) {
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab)
      store_box(tensor.map, slab * SLAB_COLUMNS, row, head * tensor.head_factor, batch * tensor.batch_factor, rows + slab * SLAB_BYTES);
    commit_stores();
  }

  // Where a chunk of 16 bytes of a row of the first slab lies.
  DEVICE static int offset(int row, int chunk) { return row * ROW_BYTES + (chunk ^ row % 8) * 16; }

  // Where the chunk is that lies `chunk` chunks (even) behind a lane's place `lane_offset` = offset(lane_row, 0 or 1).
  DEVICE static int at(int lane_offset, int chunk) {
    constexpr int CHUNKS = SLAB_COLUMNS / 8;
    return chunk / CHUNKS * SLAB_BYTES + (lane_offset ^ chunk % CHUNKS * 16);
  }

  // Zeros in the rows from `row` on, by a whole warp. Chunks are exchanged within a row, so it is all of them.
  DEVICE static void clear_from(SmemAddress tile, int row) {
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab)
      for (int offset = row * ROW_BYTES + lane_index() * 16; offset < SLAB_BYTES; offset += WARP_SIZE * 16)
        store_shared(tile + slab * SLAB_BYTES + offset, Chunk{});
  }

  // The same in the rows before `row`.
  DEVICE static void clear_until(SmemAddress tile, int row) {
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab)
      for (int offset = lane_index() * 16; offset < row * ROW_BYTES; offset += WARP_SIZE * 16)
        store_shared(tile + slab * SLAB_BYTES + offset, Chunk{});
  }

  DEVICE static uint64 descriptor(SmemAddress tile) { return wgmma_descriptor(tile, SLAB_BYTES); }

  // The descriptors of step k of a product, 16 deep, from that of the tile: with columns as depth, and with rows as depth.
  DEVICE static uint64 columns(uint64 descriptor, int k) {
    constexpr int STEPS = SLAB_COLUMNS / 16;
    return descriptor + (k / STEPS * SLAB_BYTES + k % STEPS * 32) / DESCRIPTOR_UNIT;
  }
  DEVICE static uint64 rows(uint64 descriptor, int k) { return descriptor + k * (16 * ROW_BYTES) / DESCRIPTOR_UNIT; }
};
