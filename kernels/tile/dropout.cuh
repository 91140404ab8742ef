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

struct KeptGroup {
  bool is_kept[4];
};

class Dropout {
 public:
  // Seed and offset come from the device where they are there, so that a replayed CUDA graph draws afresh.
  DEVICE explicit Dropout(const FeatureArguments& features) : limit(features.dropout_limit) {
    const uint64 seed = features.dropout_state ? features.dropout_state[0] : features.dropout_seed;
    const uint64 offset = features.dropout_state ? features.dropout_state[1] : features.dropout_offset;
    const uint4 words = philox(make_uint4(uint32(offset), uint32(offset >> 32), ~0u, ~0u), {uint32(seed), uint32(seed >> 32)});
    key = {uniform(words.x), uniform(words.y)};  // so that the keys of all rounds are uniform registers, made once
  }

  // Of the four elements (query, key), (query, key + 8), (query + 8, key), (query + 8, key + 8) of a group; neither index has bit 3 set.
  DEVICE KeptGroup kept(int batch, int head, int query, int key_position) const {
    const uint4 words = philox(make_uint4(uint32(key_position), uint32(query), uint32(head), uint32(batch)), key);
    return {{words.x > limit, words.y > limit, words.z > limit, words.w > limit}};
  }

 private:
  PhiloxKey key;
  uint32 limit;
};

// body(m, n, i, is_kept) for every place of an accumulator of scores. Rows are queries, or with TRANSPOSED keys; both starts are multiples of 16.
template <bool TRANSPOSED, int M, int N, typename Body>
DEVICE void for_each_drawn(const Dropout& dropout, int batch, int head, int first_row, int first_column, Body body) {
  static_assert(N % 2 == 0, "a group spans two neighbouring accumulator tiles");
  const int row = first_row + lane_index() / 4, column = first_column + lane_index() % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; n += 2)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int query = TRANSPOSED ? column + 8 * n + c : row + 16 * m, key = TRANSPOSED ? row + 16 * m : column + 8 * n + c;
        const KeptGroup kept = dropout.kept(batch, head, query, key);
        body(m, n, c, kept.is_kept[0]);
        body(m, TRANSPOSED ? n : n + 1, TRANSPOSED ? 2 + c : c, kept.is_kept[1]);
        body(m, TRANSPOSED ? n + 1 : n, TRANSPOSED ? c : 2 + c, kept.is_kept[2]);
        body(m, n + 1, 2 + c, kept.is_kept[3]);
      }
}

// The kept probabilities, 0 for the others. Their factor 1 / (1 - dropout_p) is that of all, and enters the sums that they are taken for.
template <int M, int N>
DEVICE void drop(float (&P)[M][N][4], const Dropout& dropout, int batch, int head, int first_row, int first_column) {
  for_each_drawn<false, M, N>(dropout, batch, head, first_row, first_column,
                              [&](int m, int n, int i, bool is_kept) { P[m][n][i] = is_kept ? P[m][n][i] : 0.0f; });
}

// The same where all probabilities are needed once more: they stay, and the sign says which are dropped.
template <int M, int N>
DEVICE void drop_and_mark(float (&P)[M][N][4], float (&kept_P)[M][N][4], const Dropout& dropout, int batch, int head, int first_row,
                          int first_column) {
  for_each_drawn<true, M, N>(dropout, batch, head, first_row, first_column, [&](int m, int n, int i, bool is_kept) {
    kept_P[m][n][i] = is_kept ? P[m][n][i] : 0.0f;
    P[m][n][i] = is_kept ? P[m][n][i] : -P[m][n][i];
  });
}
DEVICE bool is_marked(float probability) { return __float_as_int(probability) < 0; }
