// How a tile's numbers reach the matrix units: one policy per element type and architecture, all with the same interface.
//
//   SmemElement            what a tile holds in shared memory
//   K                      depth of one product: 32 bytes of a row
//   UNROLL                 depth steps of a row to unroll
//   SHORT_SUMS             products start from zero and their sums are added up outside the matrix units
//   A, B                   fragments of a 16 x K and a K x 8 operand
//   OperandA<Tile>         A from rows of a tile:               A[i][k] = tile[i][k]
//   OperandB<Tile>         B from rows of a tile:               B[k][j] = tile[j][k]      (a product with the transposed tile)
//   OperandBByRows<Tile>   B with the tile's rows as depth:     B[k][j] = tile[k][j]
//   OperandAByRows<Tile>   A with the tile's rows as depth:     A[i][k] = tile[k][i]      (16-bit elements only)
//   from_accumulator       A from the accumulators of an earlier product, without leaving registers
//   multiply               c += A B
//
// Lane l = 4 g + t. An accumulator tile m16n8 is float[4]: rows g, g + 8, columns 2 t, 2 t + 1.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/mma.cuh"
#include "ptx/warp.cuh"
#include "tile/smem_tile.cuh"

// ldmatrix addresses that are the same for every element type: rows of 32 bytes, two chunks.
template <typename Tile>
struct RowsForA {  // 16 rows: matrices (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1)
  SmemAddress tile;
  int lane_offset;
  DEVICE RowsForA(SmemAddress tile, int first_row) : tile(tile), lane_offset(Tile::offset(first_row + lane_index() % 16, lane_index() / 16)) {}
  DEVICE void load(uint32 (&frag)[4], int row, int k_step) const { ldmatrix_x4(frag, Tile::at(tile, lane_offset, row, 2 * k_step)); }
};

template <typename Tile>
struct RowsForB {  // 16 rows, two B fragments: (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1)
  SmemAddress tile;
  int lane_offset;
  DEVICE explicit RowsForB(SmemAddress tile)
      : tile(tile), lane_offset(Tile::offset(lane_index() % 8 + 8 * (lane_index() / 16), lane_index() / 8 % 2)) {}
  DEVICE void load(uint32 (&frag)[4], int row, int k_step) const { ldmatrix_x4(frag, Tile::at(tile, lane_offset, row, 2 * k_step)); }
};

// float16 and bfloat16 on tensor cores, m16n8k16.
template <typename Element>
struct MmaHalf {
  using SmemElement = Element;
  static constexpr int K = 16;
  static constexpr int UNROLL = 2;
  static constexpr bool SHORT_SUMS = false;
  struct A {
    uint32 frag[4];
  };
  struct B {
    uint32 frag[2];
  };

  template <typename Tile>
  struct OperandA {
    RowsForA<Tile> rows;
    DEVICE OperandA(SmemAddress tile, int first_row) : rows(tile, first_row) {}
    DEVICE A load(int row, int k_step) const {
      A a;
      rows.load(a.frag, row, k_step);
      return a;
    }
  };

  template <typename Tile>
  struct OperandB {
    RowsForB<Tile> rows;
    DEVICE explicit OperandB(SmemAddress tile) : rows(tile) {}
    DEVICE void load(B (&b)[2], int row, int k_step) const {
      uint32 frag[4];
      rows.load(frag, row, k_step);
      b[0] = {frag[0], frag[1]};
      b[1] = {frag[2], frag[3]};
    }
  };

  template <typename Tile>
  struct OperandBByRows {  // 16 rows x 16 columns, transposed on the way: the two row halves of one chunk make one B
    SmemAddress tile;
    int lane_offset;
    // Columns count from 8 first_chunk, which is even.
    DEVICE explicit OperandBByRows(SmemAddress tile, int first_chunk = 0)
        : tile(tile), lane_offset(Tile::offset(lane_index() % 16, lane_index() / 16 + first_chunk)) {}
    DEVICE void load(B (&b)[2], int k_step, int column_pair) const {
      uint32 frag[4];
      ldmatrix_x4_trans(frag, Tile::at(tile, lane_offset, K * k_step, 2 * column_pair));
      b[0] = {frag[0], frag[1]};
      b[1] = {frag[2], frag[3]};
    }
  };

  template <typename Tile>
  struct OperandAByRows {  // 16 rows x 16 columns, transposed on the way: (rows 0-7, chunk 0), (rows 0-7, chunk 1), then rows 8-15
    SmemAddress tile;
    int lane_offset;
    DEVICE OperandAByRows(SmemAddress tile, int first_chunk)
        : tile(tile), lane_offset(Tile::offset(lane_index() % 8 + 8 * (lane_index() / 16), lane_index() / 8 % 2 + first_chunk)) {}
    DEVICE A load(int k_step, int chunk) const {
      A a;
      ldmatrix_x4_trans(a.frag, Tile::at(tile, lane_offset, K * k_step, chunk));
      return a;
    }
  };

  template <int N_TILES>
  DEVICE static A from_accumulator(const float (&c)[N_TILES][4], int k_step) {
    const float (&low)[4] = c[2 * k_step];
    const float (&high)[4] = c[2 * k_step + 1];
    return {pack<Element>(low[0], low[1]), pack<Element>(low[2], low[3]), pack<Element>(high[0], high[1]), pack<Element>(high[2], high[3])};
  }

  DEVICE static void multiply(float (&c)[4], const A& a, const B& b) { mma_m16n8k16(c, a.frag, b.frag, Element{}); }
};

// float32 on tensor cores, m16n8k8 TF32. With PRODUCTS = 3 each number is high + low, both TF32, and low * low is left out: the error per
// product is about 2^-22, that of float32. Tensor cores truncate when they add to an accumulator, so long sums are kept outside, by additions that
// round (Ootomo and Yokota 2022, arXiv 2203.03341). With PRODUCTS = 1 it is TF32 as the caller asked for.
// `low` is not rounded: it has 12 bits at most, and the matrix units ignore what is behind the 11 of TF32, which is as exact as a tie rounded away.
// Infinity, and what TF32 rounds to it, has a rest of NaN: such inputs give NaN where they are seen.
template <int PRODUCTS>
struct MmaTf32 {
  using SmemElement = float;
  static constexpr int K = 8;
  static constexpr int UNROLL = 1;
  static constexpr bool HAS_LOW = PRODUCTS == 3;
  static constexpr bool SHORT_SUMS = HAS_LOW;
  template <int REGISTERS>
  struct Fragment {
    uint32 high[REGISTERS];
    uint32 low[HAS_LOW ? REGISTERS : 1];
    DEVICE void set(int i, float x) {
      if constexpr (HAS_LOW) {
        high[i] = round_to_tf32(x);
        low[i] = __float_as_uint(x - __uint_as_float(high[i]));
      } else {
        high[i] = to_tf32(x);
      }
    }
  };
  using A = Fragment<4>;
  using B = Fragment<2>;

  template <typename Tile>
  struct OperandA {
    RowsForA<Tile> rows;
    DEVICE OperandA(SmemAddress tile, int first_row) : rows(tile, first_row) {}
    DEVICE A load(int row, int k_step) const {
      uint32 frag[4];
      rows.load(frag, row, k_step);
      A a;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set(i, __uint_as_float(frag[i]));
      return a;
    }
  };

  template <typename Tile>
  struct OperandB {
    RowsForB<Tile> rows;
    DEVICE explicit OperandB(SmemAddress tile) : rows(tile) {}
    DEVICE void load(B (&b)[2], int row, int k_step) const {
      uint32 frag[4];
      rows.load(frag, row, k_step);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, __uint_as_float(frag[i]));
    }
  };

  // Depth slots t and t + 4 of a product stand for rows 2 t and 2 t + 1, here and in from_accumulator: the sum does not care for the order,
  // and accumulators become an A fragment without a shuffle. Lanes read single words: four even (odd) rows x eight columns, 32 banks.
  template <typename Tile>
  struct OperandBByRows {
    SmemAddress tile;
    int even, odd;
    DEVICE explicit OperandBByRows(SmemAddress tile)
        : tile(tile),
          even(Tile::offset(lane_index() % 4 * 2, lane_index() / 16) + lane_index() / 4 % 4 * 4),
          odd(Tile::offset(lane_index() % 4 * 2 + 1, lane_index() / 16) + lane_index() / 4 % 4 * 4) {}
    DEVICE void load(B (&b)[2], int k_step, int column_pair) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b[i].set(0, load_shared_f32(Tile::at(tile, even, K * k_step, 4 * column_pair + 2 * i)));
        b[i].set(1, load_shared_f32(Tile::at(tile, odd, K * k_step, 4 * column_pair + 2 * i)));
      }
    }
  };

  template <int N_TILES>
  DEVICE static A from_accumulator(const float (&c)[N_TILES][4], int k_step) {
    A a;
    a.set(0, c[k_step][0]);
    a.set(1, c[k_step][2]);
    a.set(2, c[k_step][1]);
    a.set(3, c[k_step][3]);
    return a;
  }

  DEVICE static void multiply(float (&c)[4], const A& a, const B& b) {
    if constexpr (HAS_LOW) {  // small terms first
      mma_m16n8k8_tf32(c, a.low, b.high);
      mma_m16n8k8_tf32(c, a.high, b.low);
    }
    mma_m16n8k8_tf32(c, a.high, b.high);
  }
};

// float32 arithmetic on the ordinary units, for what Turing's tensor cores cannot take: float32 and bfloat16. Accumulators keep the layout of
// m16n8, so everything above this file is shared.
struct MmaSimt {
  using SmemElement = float;
  static constexpr int K = 8;
  static constexpr int UNROLL = 1;
  static constexpr bool SHORT_SUMS = false;
  struct A {
    float row[2][K];  // rows g and g + 8
  };
  struct B {
    float column[2][K];  // columns 2 t and 2 t + 1
  };

  template <typename Tile>
  DEVICE static void load_row(float (&row)[K], SmemAddress tile, int lane_offset, int row_offset, int k_step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The second chunk of the pair is the first with the lowest chunk bit flipped.
      const float4 x = load_shared_f32x4(Tile::at(tile, lane_offset ^ (16 * half), row_offset, 2 * k_step));
      row[4 * half + 0] = x.x;
      row[4 * half + 1] = x.y;
      row[4 * half + 2] = x.z;
      row[4 * half + 3] = x.w;
    }
  }

  template <typename Tile>
  struct OperandA {
    SmemAddress tile;
    int lane_offset;
    DEVICE OperandA(SmemAddress tile, int first_row) : tile(tile), lane_offset(Tile::offset(first_row + lane_index() / 4, 0)) {}
    DEVICE A load(int row, int k_step) const {
      A a;
      load_row<Tile>(a.row[0], tile, lane_offset, row, k_step);
      load_row<Tile>(a.row[1], tile, lane_offset, row + 8, k_step);
      return a;
    }
  };

  template <typename Tile>
  struct OperandB {
    SmemAddress tile;
    int lane_offset[2];
    DEVICE explicit OperandB(SmemAddress tile) : tile(tile) {
      lane_offset[0] = Tile::offset(lane_index() % 4 * 2, 0);
      lane_offset[1] = Tile::offset(lane_index() % 4 * 2 + 1, 0);
    }
    DEVICE void load(B (&b)[2], int row, int k_step) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) load_row<Tile>(b[i / 2].column[i % 2], tile, lane_offset[i % 2], row + 8 * (i / 2), k_step);
    }
  };

  template <typename Tile>
  struct OperandBByRows {
    SmemAddress tile;
    int lane_offset;  // of columns 2 t, 2 t + 1
    DEVICE explicit OperandBByRows(SmemAddress tile) : tile(tile), lane_offset(lane_index() % 4 * 8) {}
    DEVICE void load(B (&b)[2], int k_step, int column_pair) const {
      static_assert(Tile::SWIZZLE == 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int k = 0; k < K; ++k) {  // of the swizzle the lowest bit, that of k, meets the lane's; the others are constants
          const int chunk = (4 * column_pair + 2 * i) ^ (Tile::swizzle(k) & ~1);
          const float2 x = load_shared_f32x2(tile + (lane_offset ^ (k % 2 * 16)) + chunk * 16 + (K * k_step + k) * Tile::ROW_BYTES);
          b[i].column[0][k] = x.x;
          b[i].column[1][k] = x.y;
        }
      }
    }
  };

  template <int N_TILES>
  DEVICE static A from_accumulator(const float (&c)[N_TILES][4], int k_step) {
    A a;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int owner = lane_index() / 4 * 4 + k / 2;
      a.row[0][k] = shfl(c[k_step][k % 2], owner);
      a.row[1][k] = shfl(c[k_step][2 + k % 2], owner);
    }
    return a;
  }

  DEVICE static void multiply(float (&c)[4], const A& a, const B& b) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += a.row[i / 2][k] * b.column[i % 2][k];
    }
  }
};

// The same but that numbers below zero are 0 in an A that is made of accumulators.
template <typename Mma>
struct Positive : Mma {
  template <int N_TILES>
  DEVICE static typename Mma::A from_accumulator(const float (&c)[N_TILES][4], int k_step) {
    float positive[N_TILES][4];
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) positive[n][i] = c[n][i] < 0.0f ? 0.0f : c[n][i];
    return Mma::from_accumulator(positive, k_step);
  }
};
template <typename Element>
struct Positive<MmaHalf<Element>> : MmaHalf<Element> {
  template <int N_TILES>
  DEVICE static typename MmaHalf<Element>::A from_accumulator(const float (&c)[N_TILES][4], int k_step) {
    const float (&low)[4] = c[2 * k_step];
    const float (&high)[4] = c[2 * k_step + 1];
    return {pack_positive<Element>(low[0], low[1]), pack_positive<Element>(low[2], low[3]), pack_positive<Element>(high[0], high[1]),
            pack_positive<Element>(high[2], high[3])};
  }
};

template <typename Element, int CAPABILITY, bool ALLOW_TF32>
struct SelectMma {
  using type = MmaHalf<Element>;
};
template <int CAPABILITY, bool ALLOW_TF32>
struct SelectMma<float, CAPABILITY, ALLOW_TF32> {
  using type = MmaTf32<ALLOW_TF32 ? 1 : 3>;
};
template <bool ALLOW_TF32>
struct SelectMma<float, 75, ALLOW_TF32> {
  using type = MmaSimt;
};
template <bool ALLOW_TF32>
struct SelectMma<bfloat16, 75, ALLOW_TF32> {
  using type = MmaSimt;
};
