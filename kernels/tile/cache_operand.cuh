// How keys and values of a cache reach the matrix units: in the type of the query as any tile does (tile/operand.cuh); in e4m3 they are widened
// between shared memory and the product.
//
// Of e4m3 a lane gets four neighbours where ldmatrix gives it two of 16 bits. A product does not care which of its depth slots are which columns of
// K, as long as those of Q are the same, so a lane's four columns 4 t .. 4 t + 3 fill its slots 2 t, 2 t + 1, 2 t + 8, 2 t + 9, and Q lies in shared
// memory in that order. Of V the four are two columns of two keys: the accumulator tiles 2 n and 2 n + 1 have the even and the odd ones of columns 16
// n .. 16 n + 15.
#pragma once
#include "ptx/e4m3.cuh"
#include "tile/operand.cuh"

template <typename Element>
struct MmaOfE4m3 : MmaHalf<Element> {
  using typename MmaHalf<Element>::B;

  template <typename Tile>
  struct OperandB {  // 16 rows: two B
    SmemAddress tile;
    int lane_offset;
    DEVICE explicit OperandB(SmemAddress tile) : tile(tile), lane_offset(Tile::offset(lane_index() % 16, 0)) {}
    DEVICE void load(B (&b)[2], int row, int k_step) const {
      uint32 frag[2];
      ldmatrix_x2(frag, Tile::at(tile, lane_offset, row, k_step));
#pragma unroll
      for (int i = 0; i < 2; ++i) b[i] = {widen_e4m3<Element>(frag[i]), widen_e4m3<Element>(frag[i] >> 16)};
    }
  };

  template <typename Tile>
  struct OperandBByRows {  // 16 rows x 16 columns: B of the even columns, and of the odd ones
    SmemAddress tile;
    int lane_offset;
    DEVICE explicit OperandBByRows(SmemAddress tile) : tile(tile), lane_offset(Tile::offset(lane_index() % 16, 0)) {}
    DEVICE void load(B (&b)[2], int k_step, int column_pair) const {
      uint32 frag[2];
      ldmatrix_x2_trans(frag, Tile::at(tile, lane_offset, MmaHalf<Element>::K * k_step, column_pair));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32 even_odd = __byte_perm(frag[i], 0, 0x3120);
        b[0].frag[i] = widen_e4m3<Element>(even_odd);
        b[1].frag[i] = widen_e4m3<Element>(even_odd >> 16);
      }
    }
  };
};

template <typename Mma, typename Element, typename CacheElement>
struct SelectCacheMma {
  using type = MmaOfE4m3<Element>;
};
template <typename Mma, typename Element>
struct SelectCacheMma<Mma, Element, Element> {
  using type = Mma;
};

// 16 columns of Q in the order of its depth slots: the even pairs of columns, then the odd ones.
DEVICE void order_as_e4m3(Chunk& first, Chunk& second) {
  const Chunk low = first, high = second;
  first = {low.word[0], low.word[2], high.word[0], high.word[2]};
  second = {low.word[1], low.word[3], high.word[1], high.word[3]};
}
