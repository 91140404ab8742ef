// Copies of tiles from global to shared memory.
//
// `issue` starts a copy, `land` ends it. With cp.async (sm_80 and later) the copy runs by itself, the caller commits and waits, and `land` does
// nothing. Without it (sm_75) `issue` copies at once; only a loader with STAGE loads into registers and leaves the stores to `land`, so that the
// latency is hidden in the same place. Rows past the end and columns past the tile's WIDTH become zero, so that no NaN in memory that is not ours
// reaches a product.
#pragma once
#include "arguments.cuh"
#include "ptx/convert.cuh"
#include "tile/smem_tile.cuh"

// Whether rows of an array are copied 16 bytes at a time. Mostly all arrays of a call are such, and nothing else is compiled; in other calls each
// array says so itself.
DEVICE bool is_vectorized(const TensorView& view) { return Config::VECTORIZED || view.vectorized; }

// One chunk of a row, element by element: any stride, any alignment, conversion to the tile's element.
template <typename SmemElement, typename Element>
DEVICE Chunk gather_chunk(const Element* source, int64 stride_dim, int valid_elements) {
  constexpr int ELEMENTS = 16 / int(sizeof(SmemElement));
  Chunk chunk{};
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) {
    if (i < valid_elements) {
      const Element element = source[i * stride_dim];
      if constexpr (sizeof(SmemElement) == 4) {
        chunk.word[i] = __float_as_uint(to_float(element));
      } else if constexpr (sizeof(SmemElement) == 1) {
        chunk.word[i / 4] |= uint32(element.bits) << (8 * (i % 4));
      } else {
        chunk.word[i / 2] |= uint32(element.bits) << (16 * (i % 2));
      }
    }
  }
  return chunk;
}

// Threads are laid out as ROW_STEP rows x THREADS_PER_ROW chunks; each walks down its column and then to the next group of chunks. ROW_STEP is a
// multiple of 8, the period of the swizzle, and the row pointer moves by one constant step: all addresses of a thread are one base and immediates,
// and none has to be kept in a register across the main loop.
//
// With HEAD_WIDTH, the tile is a piece of rows of HEAD_WIDTH columns, which starts at `first_column`, and NUM_THREADS neighbouring threads of the
// block copy it.
template <typename Tile, typename Element, int NUM_THREADS, bool STAGE = false, int HEAD_WIDTH = 0>
struct TileLoader {
  using SmemElement = typename Tile::SmemElement;
  static constexpr int THREADS_PER_ROW = gcd(Tile::CHUNKS, NUM_THREADS / 8);
  static constexpr int ROW_STEP = NUM_THREADS / THREADS_PER_ROW;
  static constexpr int ROW_ITERATIONS = ceil_div(Tile::ROWS, ROW_STEP);
  static constexpr int CHUNK_ITERATIONS = Tile::CHUNKS / THREADS_PER_ROW;
  static constexpr bool SAME_ELEMENT = SameType<SmemElement, Element>::value;
  static constexpr bool ASYNC = HAS_CP_ASYNC && SAME_ELEMENT;
  static constexpr bool STAGED = STAGE && !ASYNC && SAME_ELEMENT && CHUNK_ITERATIONS * ROW_ITERATIONS <= 8;  // at most 32 registers
  static constexpr int ROWS_TOGETHER = ASYNC || STAGED || HEAD_WIDTH == 0 ? ROW_ITERATIONS : 2;  // of wide heads more in registers would spill others

  const Element* source;  // row 0
  const TensorView& view;
  int num_rows;
  Chunk staged[STAGED ? CHUNK_ITERATIONS : 1][STAGED ? ROW_ITERATIONS : 1];

  // Rows count from `start`.
  DEVICE TileLoader(const TensorView& view, int batch, int head, int num_rows, int start = 0)
      : source(view.row_pointer<const Element>(batch, head, start)), view(view), num_rows(num_rows) {}

  // Nothing happens unless `enabled`.
  DEVICE void issue(SmemAddress tile, int first_row, int first_column = 0, bool enabled = true) {
    const bool vectorized = SAME_ELEMENT && is_vectorized(view);
    if (enabled && !vectorized) gather(tile, first_row, first_column);
    if (!ASYNC && !(enabled && vectorized)) return;
    if constexpr (SAME_ELEMENT) {
#pragma unroll(ASYNC || STAGED ? CHUNK_ITERATIONS : 1)
      for (int j = 0; j < CHUNK_ITERATIONS; ++j) {
        const int chunk = thread_chunk() + j * THREADS_PER_ROW;
        const int column = chunk * Tile::CHUNK_ELEMENTS;
        // Whole chunks or none wherever HEAD_DIM allows it: the assembler then drops the arithmetic of a partial copy.
        int columns = column < Tile::WIDTH ? Tile::CHUNK_ELEMENTS : 0;
        if constexpr (Tile::WIDTH == Tile::COLUMNS) columns = Tile::CHUNK_ELEMENTS;
        if constexpr (Tile::WIDTH % Tile::CHUNK_ELEMENTS != 0) columns = valid_columns(column);
        if constexpr (HEAD_WIDTH % Tile::CHUNK_ELEMENTS != 0) columns = valid_columns(first_column + column);
        if constexpr (HEAD_WIDTH != 0 && HEAD_WIDTH % Tile::CHUNK_ELEMENTS == 0)
          columns = first_column + column < HEAD_WIDTH ? Tile::CHUNK_ELEMENTS : 0;
        int row = thread_row();
        const Element* pointer = source + (first_row + row) * view.stride_seqlen + first_column + column;
#pragma unroll(ROWS_TOGETHER)
        for (int i = 0; i < ROW_ITERATIONS; ++i) {
          if (owns_row(row)) {
            const int valid = first_row + row < num_rows ? columns : 0;
            if constexpr (ASYNC) {
              cp_async<16>(enabled && vectorized, tile + Tile::offset(row, chunk), pointer, valid * int(sizeof(Element)));
            } else {
              const Chunk loaded =
                  valid == Tile::CHUNK_ELEMENTS ? *reinterpret_cast<const Chunk*>(pointer) : gather_chunk<SmemElement>(pointer, 1, valid);
              if constexpr (STAGED) {
                staged[j][i] = loaded;
              } else {
                store_shared(tile + Tile::offset(row, chunk), loaded);
              }
            }
          }
          row += ROW_STEP;
          pointer += ROW_STEP * view.stride_seqlen;
        }
      }
    }
  }

  DEVICE void land(SmemAddress tile) {
    if constexpr (STAGED) {
      if (!is_vectorized(view)) return;
#pragma unroll
      for (int j = 0; j < CHUNK_ITERATIONS; ++j)
#pragma unroll
        for (int i = 0; i < ROW_ITERATIONS; ++i) {
          const int row = thread_row() + i * ROW_STEP;
          if (owns_row(row)) store_shared(tile + Tile::offset(row, thread_chunk() + j * THREADS_PER_ROW), staged[j][i]);
        }
    }
  }

 private:
  DEVICE static uint32 thread() { return HEAD_WIDTH ? threadIdx.x % NUM_THREADS : threadIdx.x; }
  DEVICE static int thread_row() { return int(thread() / THREADS_PER_ROW); }
  DEVICE static int thread_chunk() { return int(thread() % THREADS_PER_ROW); }
  DEVICE static bool owns_row(int row) { return Tile::ROWS % ROW_STEP == 0 || row < Tile::ROWS; }

  // How many elements of the chunk at `column` of a row exist.
  DEVICE static int valid_columns(int column) { return min(max((HEAD_WIDTH ? HEAD_WIDTH : Tile::WIDTH) - column, 0), Tile::CHUNK_ELEMENTS); }

  // The general path: complete when it returns. Loops stay rolled to keep its registers out of the fast path's way.
  DEVICE void gather(SmemAddress tile, int first_row, int first_column) {
#pragma unroll 1
    for (int index = int(thread()); index < Tile::ROWS * Tile::CHUNKS; index += NUM_THREADS) {
      const int row = index / Tile::CHUNKS, chunk = index % Tile::CHUNKS;
      const int column = first_column + chunk * Tile::CHUNK_ELEMENTS;
      const int valid = first_row + row < num_rows ? valid_columns(column) : 0;
      const Element* pointer = source + (first_row + row) * view.stride_seqlen + column * view.stride_dim;
      store_shared(tile + Tile::offset(row, chunk), gather_chunk<SmemElement>(pointer, view.stride_dim, valid));
    }
  }
};
