// From accumulators to global memory: through the warp's own rows of a shared tile that is no longer needed, so that rows leave as whole
// 16-byte chunks. Only this warp has read those rows, so no block barrier is needed.
#pragma once
#include "arguments.cuh"
#include "ptx/convert.cuh"
#include "ptx/warp.cuh"
#include "tile/constants.cuh"
#include "tile/load.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/slices.cuh"
#include "tile/smem_tile.cuh"

// Converts c and stores it to rows first_row .. (counted from `start`) of (batch, head), leaving out rows from num_rows on and columns from HEAD_DIM
// on. With SLICE, c holds the columns from first_c on, and those behind it are others' to store. `scratch` is room for 16 M rows of SCRATCH_COLUMNS
// elements in this warp's own part of shared memory; more columns go through it one piece after another.
template <typename Element, int HEAD_DIM, int SCRATCH_COLUMNS, bool SLICE, int PIECE = 0, int M, int N>
DEVICE void store_rows(const float (&c)[M][N][4], SmemAddress scratch, const TensorView& view, int batch, int head, int first_row, int num_rows,
                       int first_c = 0, int start = 0) {
  constexpr int PIECE_COLUMNS = SCRATCH_COLUMNS < 8 * N ? SCRATCH_COLUMNS : 8 * N;
  using Tile = SmemTile<Element, 16 * M, PIECE_COLUMNS>;
  const int g = lane_index() / 4, t = lane_index() % 4;
  __syncwarp();  // no lane still reads what these rows held
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < min(PIECE_COLUMNS, 8 * N - PIECE) / 8; ++n) {
        const int row = 16 * m + 8 * r + g;
        const float (&accumulators)[4] = c[m][PIECE / 8 + n];
        if constexpr (sizeof(Element) == 4) {
          store_shared(scratch + Tile::offset(row, 2 * n + t / 2) + t % 2 * 8, make_float2(accumulators[2 * r], accumulators[2 * r + 1]));
        } else {
          store_shared(scratch + Tile::offset(row, n) + t * 4, pack<Element>(accumulators[2 * r], accumulators[2 * r + 1]));
        }
      }
  __syncwarp();  // the rows are complete

  Element* destination = view.row_pointer<Element>(batch, head, start);
  const int end = SLICE ? min(HEAD_DIM, first_c + 8 * N) : HEAD_DIM;
#pragma unroll 1
  for (int index = lane_index(); index < Tile::ROWS * Tile::CHUNKS; index += WARP_SIZE) {
    const int row = index / Tile::CHUNKS;
    const int column_of_piece = index % Tile::CHUNKS * Tile::CHUNK_ELEMENTS;
    const int column = SLICE || PIECE != 0 ? first_c + PIECE + column_of_piece : column_of_piece;
    if (first_row + row >= num_rows || column >= end) continue;
    const Chunk chunk = load_shared(scratch + Tile::offset(row, index % Tile::CHUNKS));
    Element* row_start = destination + (first_row + row) * view.stride_seqlen;
    if (is_vectorized(view) && column + Tile::CHUNK_ELEMENTS <= HEAD_DIM) {
      *reinterpret_cast<Chunk*>(row_start + column) = chunk;
    } else {
#pragma unroll
      for (int i = 0; i < Tile::CHUNK_ELEMENTS; ++i) {
        if (column + i < HEAD_DIM) {
          if constexpr (sizeof(Element) == 4) {
            row_start[(column + i) * view.stride_dim] = __uint_as_float(chunk.word[i]);
          } else {
            row_start[(column + i) * view.stride_dim].bits = uint16(chunk.word[i / 2] >> (16 * (i % 2)));
          }
        }
      }
    }
  }
  if constexpr (PIECE + PIECE_COLUMNS < 8 * N) {
    store_rows<Element, HEAD_DIM, SCRATCH_COLUMNS, SLICE, PIECE + PIECE_COLUMNS>(c, scratch, view, batch, head, first_row, num_rows, first_c, start);
  }
}

// Stores this group's slice of the block's rows of a result, the warp's at warp_row of the tile that starts at first_row; rows count from `start`.
// `smem` is a tile Scratch of this group, of whose rows only those of the warp are used.
template <int HEAD_DIM, typename Scratch, int M, int N>
DEVICE void store_slice(const float (&c)[M][N][4], SmemAddress smem, int warp_row, const TensorView& view, const Work& work, int first_row,
                        int num_rows, int start) {
  store_rows<Element, HEAD_DIM, Scratch::COLUMNS, (HEAD_SLICES > 1)>(c, smem + warp_row * Scratch::ROW_BYTES, view, work.batch, work.head,
                                                                     first_row + warp_row, num_rows, slice_index() * 8 * N, start);
}

// Stores two neighbours of a row of 16-bit elements.
template <typename Element>
DEVICE void store_pair(Element* row, int column, const TensorView& view, uint32 pair) {
  if (is_vectorized(view)) {
    *reinterpret_cast<uint32*>(row + column) = pair;
  } else {
    row[column * view.stride_dim].bits = uint16(pair);
    row[(column + 1) * view.stride_dim].bits = uint16(pair >> 16);
  }
}

// The same of elements of any type, converted.
template <typename Element>
DEVICE void store_pair(Element* row, int column, const TensorView& view, float first, float second) {
  if constexpr (sizeof(Element) == 2) {
    store_pair(row, column, view, pack<Element>(first, second));
  } else if (is_vectorized(view)) {
    *reinterpret_cast<float2*>(row + column) = make_float2(first, second);
  } else {
    row[column * view.stride_dim] = first;
    row[(column + 1) * view.stride_dim] = second;
  }
}

// Stores the columns of a row from `column` on that a chunk has, of the first HEAD_DIM. `store_rows` does the same in its
// place: with a function, and with a column by value here, it would be compiled to other code.
template <int HEAD_DIM, typename Element>
DEVICE void store_chunk(Element* row_start, const int& column, const Chunk& chunk, const TensorView& view) {
  constexpr int CHUNK_ELEMENTS = 16 / int(sizeof(Element));
  if (is_vectorized(view) && column + CHUNK_ELEMENTS <= HEAD_DIM) {
    *reinterpret_cast<Chunk*>(row_start + column) = chunk;
    return;
  }
#pragma unroll
  for (int i = 0; i < CHUNK_ELEMENTS; ++i) {
    if (column + i < HEAD_DIM) {
      if constexpr (sizeof(Element) == 4) {
        row_start[(column + i) * view.stride_dim] = __uint_as_float(chunk.word[i]);
      } else {
        row_start[(column + i) * view.stride_dim].bits = uint16(chunk.word[i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

// Puts a warp's rows of a result into a tile in shared memory, 16-bit elements: of its columns every STRIDE-th pair of eight, from pair `first` on.
template <typename Tile, int STRIDE, int M, int N>
DEVICE void put_columns(const float (&c)[M][N][4], SmemAddress tile, int warp_row, int first) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int row = warp_row + 16 * m + 8 * r + lane_index() / 4, chunk = 2 * (n / 2 * STRIDE + first) + n % 2;
        store_shared(tile + Tile::offset(row, chunk) + lane_index() % 4 * 4, pack<Element>(c[m][n][2 * r], c[m][n][2 * r + 1]));
      }
}

// Stores a tile that all warps have put together, but for rows from num_rows on; it starts at first_row, and rows count from `start`.
template <typename Tile, int HEAD_DIM>
DEVICE void store_tile(SmemAddress tile, const TensorView& view, const Work& work, int first_row, int num_rows, int start) {
  Element* destination = view.row_pointer<Element>(work.batch, work.head, start);
#pragma unroll 1
  for (int index = int(threadIdx.x); index < Tile::ROWS * Tile::CHUNKS; index += NUM_THREADS) {
    const int row = index / Tile::CHUNKS, chunk = index % Tile::CHUNKS, column = chunk * Tile::CHUNK_ELEMENTS;
    if (first_row + row >= num_rows || column >= HEAD_DIM) continue;
    store_chunk<HEAD_DIM>(destination + (first_row + row) * view.stride_seqlen, column, load_shared(tile + Tile::offset(row, chunk)), view);
  }
}

// Zeros in rows begin .. end - 1, which no sequence's block computes (tile/sequence.cuh); this block does TILE_ROWS of them at a time, as its
// tile says, and goes on at `num_tiles` tiles further.
template <typename Element, int NUM_THREADS, int TILE_ROWS, int DIM>
DEVICE void clear_rows(const TensorView& view, const Work& work, int begin, int end, int tile, int num_tiles, int thread = int(threadIdx.x)) {
  Element* destination = view.row_pointer<Element>(VARLEN ? 0 : work.batch, work.head);
  for (int64 first = begin + int64(tile) * TILE_ROWS; first < end; first += int64(num_tiles) * TILE_ROWS) {
    const int rows = int(min(int64(TILE_ROWS), end - first));
    for (int index = thread; index < rows * DIM; index += NUM_THREADS)
      destination[(first + index / DIM) * view.stride_seqlen + index % DIM * view.stride_dim] = from_float<Element>(0.0f);
  }
}

// The same of out, and LSE -inf: what a forward kernel leaves in rows that no query computes. `thread` is one of NUM_THREADS.
template <typename Arguments>
DEVICE void clear_queries(const Arguments& arguments, const Work& work, int begin, int end, int tile, int num_tiles, int thread = int(threadIdx.x)) {
  clear_rows<Element, NUM_THREADS, TILE_Q, HEAD_DIM_V>(arguments.out, work, begin, end, tile, num_tiles, thread);
  if (arguments.lse.data == nullptr) return;
  for (int64 row = begin + int64(tile) * NUM_THREADS + thread; row < end; row += int64(num_tiles) * NUM_THREADS)
    *arguments.lse.pointer(VARLEN ? 0 : work.batch, work.head, int(row)) = -infinity();
}
