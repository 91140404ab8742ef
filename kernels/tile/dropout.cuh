// Which probabilities dropout keeps: Philox 4x32-10, Salmon et al. 2011 (doi 10.1145/2063384.2063405), counted by the coordinates of the element, so
// that every kernel draws the same mask whatever its tiles.
//
//     key      = words 0 and 1 of philox(counter = {offset low, offset high, ~0, ~0}, key = {seed low, seed high})
//     word     = philox(counter = {key position without bit 3, query position without bit 3, head, batch}, key)[2 (bit 3 of query) + (bit 3 of key)]
//     kept    <=> word > dropout_limit = ceil(dropout_p 2^32) - 1
//
// Bit 3 of query and key are the bits that change between the registers of a lane both in a tile of scores and in a transposed one, so that one call
// gives all four words to the lane that needs them.
#pragma once
#include "feature_arguments.cuh"
#include "tile/fragment.cuh"

struct PhiloxKey {
  uint32 low, high;
};

DEVICE uint4 philox(uint4 counter, PhiloxKey key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64 product0 = uint64(0xD2511F53u) * counter.x, product1 = uint64(0xCD9E8D57u) * counter.z;
    counter =
        make_uint4(uint32(product1 >> 32) ^ counter.y ^ key.low, uint32(product1), uint32(product0 >> 32) ^ counter.w ^ key.high, uint32(product0));
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return counter;
}

class Dropout {
 public:
  // Seed and offset come from the device where they are there, so that a replayed CUDA graph draws afresh.
  DEVICE explicit Dropout(const FeatureArguments& features) : limit(features.dropout_limit) {
    const uint64 seed = features.dropout_state ? features.dropout_state[0] : features.dropout_seed;
    const uint64 offset = features.dropout_state ? features.dropout_state[1] : features.dropout_offset;
    const uint4 words = philox(make_uint4(uint32(offset), uint32(offset >> 32), ~0u, ~0u), {uint32(seed), uint32(seed >> 32)});
    key = {words.x, words.y};
  }

  // The four elements (query, key), (query, key + 8), (query + 8, key), (query + 8, key + 8) of a group as bits 0 to 3; neither index has bit 3 set.
  DEVICE uint32 kept(int batch, int head, int query, int key_position) const {
    const uint4 words = philox(make_uint4(uint32(key_position), uint32(query), uint32(head), uint32(batch)), key);
    return uint32(words.x > limit) | uint32(words.y > limit) << 1 | uint32(words.z > limit) << 2 | uint32(words.w > limit) << 3;
  }

 private:
  PhiloxKey key;
  uint32 limit;
};

// The kept elements of an accumulator of scores, one bit each. Rows are queries, or with TRANSPOSED keys; both starts are multiples of 16.
template <bool TRANSPOSED, int M, int N>
struct KeptElements {
  static_assert(N % 2 == 0, "a group spans two neighbouring accumulator tiles");
  uint32 groups[M][ceil_div(N, 8)];  // 4 bits for each column of each pair of tiles

  DEVICE void draw(const Dropout& dropout, int batch, int head, int first_row, int first_column) {
    const int row = first_row + lane_index() / 4, column = first_column + lane_index() % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        if (n % 8 == 0) groups[m][n / 8] = 0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int query = TRANSPOSED ? column + 8 * n + c : row + 16 * m, key = TRANSPOSED ? row + 16 * m : column + 8 * n + c;
          groups[m][n / 8] |= dropout.kept(batch, head, query, key) << (n % 8 / 2 * 8 + c * 4);
        }
      }
    }
  }

  // The kept probabilities, 0 for the others. Their factor 1 / (1 - dropout_p) is that of all, and enters the sums that they are taken for.
  DEVICE void select(const float (&all)[M][N][4], float (&selected)[M][N][4]) const {
    for_each_place<M, N>([&](int m, int n, int i, int, int) { selected[m][n][i] = has(m, n, i) ? all[m][n][i] : 0.0f; });
  }

  DEVICE bool has(int m, int n, int i) const {
    const int of_row = i / 2, of_column = n % 2;  // bit 3 of each
    const int word = TRANSPOSED ? 2 * of_column + of_row : 2 * of_row + of_column;
    return groups[m][n / 8] >> (n % 8 / 2 * 8 + i % 2 * 4 + word) & 1u;
  }
};
