// float32: O of a limited number of keys at a time in registers, the sum of all before in the output array.
//
// Each tile's P V is rounded to the last place of O when it is added, and that of thousands of tiles adds up to many last places. O is therefore
// moved to memory after every PARTIAL_KEYS keys, and so rounded as seldom as in the blocked products of unfused float32. It stays unnormalised there,
// relative to the reference of its time. Every lane reads only what it has written itself.
#pragma once
#include "arguments.cuh"
#include "tile/constants.cuh"
#include "tile/fragment.cuh"

constexpr int PARTIAL_KEYS = 1024;
constexpr int PARTIAL_STEPS = ceil_div(PARTIAL_KEYS, TILE_KV);  // key tiles
constexpr bool PARTIAL_OUTPUTS = SameType<Element, float>::value && !Config::ALLOW_TF32 && HEAD_DIM_V <= 128;  // above, ptxas takes many seconds

template <int M, int N>
class PartialOutputs {
 public:
  // The warp's rows start at first_row, its columns at first_column; `destination` is the first row of the head.
  DEVICE PartialOutputs(float* destination, const TensorView& view, int first_row, int num_rows, int first_column)
      : destination(destination), view(view), first_row(first_row), num_rows(num_rows), first_column(first_column) {}

  // Moves O to memory, adding to what is there.
  template <typename Softmax>
  DEVICE void put(float (&O)[M][N][4], const Softmax& softmax) {
    for_each_in_memory(O, [&](float& in_memory, float& partial, int m, int r) {
      in_memory = any ? __fmaf_rn(in_memory, softmax.rescale_since(reference[m][r], m, r), partial) : partial;
      partial = 0.0f;
    });
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) reference[m][r] = softmax.reference[m][r];
    any = true;
  }

  // Adds what is in memory to O.
  template <typename Softmax>
  DEVICE void take(float (&O)[M][N][4], const Softmax& softmax) const {
    if (!any) return;
    for_each_in_memory(O, [&](float& in_memory, float& partial, int m, int r) {
      partial = __fmaf_rn(in_memory, softmax.rescale_since(reference[m][r], m, r), partial);
    });
  }

 private:
  template <typename Body>
  DEVICE void for_each_in_memory(float (&O)[M][N][4], Body body) const {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 16 * m + 8 * r + lane_index() / 4;
        if (row >= num_rows) continue;
        const int64 stride = view.stride_dim;
        float* in_memory = destination + row * view.stride_seqlen + (first_column + lane_index() % 4 * 2) * stride;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const int column = first_column + 8 * n + lane_index() % 4 * 2;
          if (column < HEAD_DIM_V) body(in_memory[0], O[m][n][2 * r], m, r);
          if (column + 1 < HEAD_DIM_V) body(in_memory[stride], O[m][n][2 * r + 1], m, r);
          in_memory += 8 * stride;
          if (n % 4 == 3) asm volatile("" ::: "memory");  // all loads at once would take as many registers as O
        }
      }
  }

  float* destination;
  const TensorView& view;
  int first_row, num_rows, first_column;
  bool any = false;
  float reference[M][2];  // of what is in memory
};
