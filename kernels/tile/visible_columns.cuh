// Which columns of a warp's accumulators a lane's rows see, a bit for each column of the lane: bit 2 (n % 16) + c of word n / 16 is that of column
// 8 n + 2 (lane % 4) + c. Row r is 8 r rows below the lane's first one. The assembler moves bits into predicates, mostly several at once, so that a
// hidden score takes one selection.
#pragma once
#include "tile/fragment.cuh"
#include "ptx/math.cuh"

// Which of 32 columns a lane answers for, so that the eight bits of a lane's columns are one byte of the answers of all.
DEVICE int column_of_lane() { return lane_index() % 8 / 2 * 8 + lane_index() / 8 * 2 + lane_index() % 2; }

template <int N, int M = 1>  // accumulator tiles of a row, and of a column
class VisibleColumns {
 public:
  static constexpr int ROWS = 2 * M;
  static constexpr int WORDS = ceil_div(N, 16);

  uint32 word[ROWS][WORDS];

  DEVICE explicit VisibleColumns(bool all = true) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int w = 0; w < WORDS; ++w) word[r][w] = all ? ~0u : 0;
  }

  // Column 8 n + 2 (lane % 4) + c is seen by row r.
  DEVICE void show(int r, int n, int c) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w)  // so that no register is found by a number
      if (WORDS == 1 || n / 16 == w) word[r][w] |= 1u << (n % 16 * 2 + c);
  }

  // Hides columns of row r before `first` and from `end` on, each less the lane's first column.
  DEVICE void cut(int r, int first, int end) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) word[r][w] &= columns_from(first - 128 * w) & ~columns_from(end - 128 * w);
  }

  // Hides columns of row r before `first`, likewise.
  DEVICE void cut(int r, int first) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) word[r][w] &= columns_from(first - 128 * w);
  }

  // Leaves the columns whose segment is that of the row, and no others; what was hidden before is forgotten. A lane knows the segments of columns
  // 32 k + column_of_lane(). Rows of one segment are done at once.
  template <int KEYS>
  DEVICE void hide_other_segments(const int (&segment)[ROWS], const int (&key_segments)[KEYS]) {
    bool is_done[ROWS] = {};
    int common = shfl(segment[0], 0);
#pragma unroll 1
    while (true) {
      const uint32 first_bytes = (lane_index() % 4) | (4 + lane_index() % 4) << 4;  // this lane's of two words
      uint32 same[WORDS];
#pragma unroll
      for (int w = 0; w < WORDS; ++w) {
        uint32 answers[4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (4 * w + k < KEYS) answers[k] = lanes_with(key_segments[min(4 * w + k, KEYS - 1)] == common);
        same[w] = __byte_perm(__byte_perm(answers[0], answers[1], first_bytes), __byte_perm(answers[2], answers[3], first_bytes), 0x5410);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (segment[r] == common) {
#pragma unroll
          for (int w = 0; w < WORDS; ++w) word[r][w] = same[w];
          is_done[r] = true;
        }
      bool is_open = !is_done[ROWS - 1];
      int next = segment[ROWS - 1];
#pragma unroll
      for (int r = ROWS - 2; r >= 0; --r) {
        is_open |= !is_done[r];
        next = is_done[r] ? next : segment[r];
      }
      const uint32 open = lanes_with(is_open);
      if (open == 0) return;
      common = shfl(next, __popc((open & -open) - 1));
    }
  }

  // Gives -inf to what is not seen, as `hide_on_fma`.
  DEVICE void apply_on_fma(float (&c)[M][N][4], int zero) const {
    for_each_place<M, N>(
        [&](int m, int n, int i, int, int) { hide_on_fma(c[m][n][i], word[2 * m + i / 2][n / 16] & 1u << (n % 16 * 2 + i % 2), zero); });
  }

  // Gives `hidden` to what is not seen.
  DEVICE void apply(float (&c)[M][N][4], float hidden) const {
    for_each_place<M, N>([&](int m, int n, int i, int, int) {
      if (!(word[2 * m + i / 2][n / 16] & 1u << (n % 16 * 2 + i % 2))) c[m][n][i] = hidden;
    });
  }

 private:
  // Bits of the columns of one word from `first` on; neighbouring pairs of bits are eight columns apart.
  DEVICE static uint32 columns_from(int first) {
    const int from_first_tile = max(first, 0);
    return __funnelshift_lc(0, ~0u, from_first_tile / 8 * 2 + min(from_first_tile % 8, 2));
  }
};
