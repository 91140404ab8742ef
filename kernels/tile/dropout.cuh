// Which probabilities dropout keeps: Philox 4x32-7, Salmon et al. 2011 (doi 10.1145/2063384.2063405), counted by the coordinates of the element, so
// that every kernel draws the same mask whatever its tiles. Seven rounds are the fewest that pass all of the paper's tests.
//
//     key      = words 0 and 1 of philox(counter = {offset low, offset high, ~0, ~0}, key = {seed low, seed high})
//     word     = philox(counter = {key position without bits 0 and 3, query position without bit 3, head, batch}, key)
//                    [2 (bit 3 of query) + (bit 3 of key)]
//     half     = the lower 16 bits of the word for an even key position, the upper ones for an odd one
//     kept    <=> half >= ceil(dropout_p 2^16)
//
// Bit 3 of query and key are the bits that change between the registers of a lane both in a tile of scores and in a transposed one, bit 0 of the key
// in the former, so there one call draws for eight elements of a lane, and in the latter for four of each of two.
#pragma once
#include "feature_arguments.cuh"
#include "tile/fragment.cuh"

struct PhiloxKey {
  uint32 low, high;
};

constexpr int PHILOX_ROUNDS = 7;
constexpr uint32 PHILOX_MULTIPLIERS[2] = {0xD2511F53u, 0xCD9E8D57u};

DEVICE uint4 philox_round(uint4 counter, PhiloxKey key) {
  const uint64 product0 = uint64(PHILOX_MULTIPLIERS[0]) * counter.x, product1 = uint64(PHILOX_MULTIPLIERS[1]) * counter.z;
  return make_uint4(uint32(product1 >> 32) ^ counter.y ^ key.low, uint32(product1), uint32(product0 >> 32) ^ counter.w ^ key.high, uint32(product0));
}

// The key of the next round.
DEVICE PhiloxKey philox_next(PhiloxKey key) { return {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u}; }

DEVICE uint4 philox(uint4 counter, PhiloxKey key) {
#pragma unroll
  for (int round = 0; round < PHILOX_ROUNDS; ++round, key = philox_next(key)) counter = philox_round(counter, key);
  return counter;
}

struct DrawnGroup {
  uint32 word[4];
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

  // For the elements (query, key), (query, key + 8), (query + 8, key), (query + 8, key + 8) and those of the next key. Neither index has bit 3 set,
  // and the key is even.
  DEVICE DrawnGroup draw(int batch, int head, int query, int key_position) const {
    const uint4 words = philox(make_uint4(uint32(key_position), uint32(query), uint32(head), uint32(batch)), key);
    return {{words.x, words.y, words.z, words.w}};
  }

  // What a word says of the element with a key of this parity.
  DEVICE bool keeps(uint32 word, int key_parity) const { return word << (16 - 16 * key_parity) > limit; }

  DEVICE PhiloxKey first_key() const { return key; }

  // The largest half that is dropped.
  DEVICE uint32 largest_dropped() const { return limit >> 16; }

 private:
  PhiloxKey key;
  uint32 limit;  // ceil(dropout_p 2^16) 2^16 - 1
};

// body(m, n, i, is_kept) for every place of an accumulator of scores whose rows are queries; both starts are multiples of 16.
template <int M, int N, typename Body>
DEVICE void for_each_drawn(const Dropout& dropout, int batch, int head, int first_row, int first_column, Body body) {
  static_assert(N % 2 == 0, "a group spans two neighbouring accumulator tiles");
  const int row = first_row + lane_index() / 4, column = first_column + lane_index() % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const DrawnGroup drawn = dropout.draw(batch, head, row + 16 * m, column + 8 * n);
#pragma unroll
      for (int word = 0; word < 4; ++word)
#pragma unroll
        for (int c = 0; c < 2; ++c) body(m, n + word % 2, 2 * (word / 2) + c, dropout.keeps(drawn.word[word], c));
    }
}

// The kept probabilities, 0 for the others. Their factor 1 / (1 - dropout_p) is that of all, and enters the sums that they are taken for.
template <int M, int N>
DEVICE void drop(float (&P)[M][N][4], const Dropout& dropout, int batch, int head, int first_row, int first_column) {
  for_each_drawn<M, N>(dropout, batch, head, first_row, first_column,
                       [&](int m, int n, int i, bool is_kept) { P[m][n][i] = is_kept ? P[m][n][i] : 0.0f; });
}

// The halves that say which elements of a tile are kept whose rows are keys: pair[m][n][r] has those of a lane's two queries of accumulator tile n,
// of the key 8 r rows below its first one of 16-row tile m.
template <int M, int N>
struct DrawnTile {
  static_assert(N % 2 == 0, "a group spans two neighbouring accumulator tiles");
  uint32 pair[M][N][2];

  // Two lanes with neighbouring keys need the same words, a half of each: each draws for one of its two queries, and they exchange the other's
  // halves.
  DEVICE void draw(const Dropout& dropout, int batch, int head, int first_row, int first_column) {
    const int row = first_row + lane_index() / 4, parity = row % 2, column = first_column + lane_index() % 4 * 2 + parity;
    const uint32 of_own = parity ? 0x7632 : 0x5410, of_other = parity ? 0x5410 : 0x7632;
    const uint32 first = parity ? 0x1054 : 0x5410, second = parity ? 0x3276 : 0x7632;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        const DrawnGroup drawn = dropout.draw(batch, head, column + 8 * n, (row + 16 * m) & ~1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32 own = __byte_perm(drawn.word[2 * i], drawn.word[2 * i + 1], of_own);
          const uint32 got = shfl_xor(int(__byte_perm(drawn.word[2 * i], drawn.word[2 * i + 1], of_other)), 4);
          pair[m][n + i][0] = __byte_perm(own, got, first);
          pair[m][n + i][1] = __byte_perm(own, got, second);
        }
      }
  }
};

// In the place of `drop` where all probabilities are needed once more: the sign says which are dropped. What is kept are then positive numbers, for
// those who take 0 for the others (tile/operand.cuh), or NaN.
template <int M, int N>
DEVICE void mark_dropped(float (&P)[M][N][4], const Dropout& dropout, const DrawnTile<M, N>& drawn) {
  for_each_place<M, N>([&](int m, int n, int i, int, int) { P[m][n][i] = dropout.keeps(drawn.pair[m][n][i / 2], i % 2) ? P[m][n][i] : -P[m][n][i]; });
}
DEVICE bool is_marked(float probability) { return __float_as_int(probability) < 0; }
