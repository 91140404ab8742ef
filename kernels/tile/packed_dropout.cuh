// Dropout of probabilities that are packed in pairs, by fewer instructions than tile/dropout.cuh, which says which of them are kept: one draw gives
// four words, and a word the mask of a pair.
//
// What batch and head do to the first two rounds is the same for all pairs of query and key, so it is put into the keys of these rounds, which are
// made once. A half of a word is kept where it is at least L = ceil(dropout_p 2^16), that is where the smaller of both is L. Up to the infinity of
// bfloat16 these are numbers that a comparison of two halves knows. Larger L are those of a kernel of their own (DROPS_MOST), in which halves are
// compared as integers, by two instructions more.
#pragma once
#include "ptx/packed.cuh"
#include "tile/dropout.cuh"

class PackedDropout {  // of one batch and query head
 public:
  DEVICE PackedDropout(const Dropout& dropout, int batch, int head) : limit(uniform((dropout.largest_dropped() + !Config::DROPS_MOST) * 0x10001u)) {
    if constexpr (!Config::DROPOUT) return;
    const uint64 product = uint64(PHILOX_MULTIPLIERS[1]) * uint32(head);
    PhiloxKey key = dropout.first_key();
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round, key = philox_next(key)) keys[round] = key;
    keys[0].low ^= uint32(product >> 32);
    keys[0].high ^= uint32(batch);
    keys[1].low ^= uint32(product);
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) keys[round] = {uniform(keys[round].low), uniform(keys[round].high)};
  }

  // Which elements are kept of steps BEGIN .. END - 1 of an A operand, all bits of their halves. Rows are queries; both starts are multiples of 16.
  template <int BEGIN, int END, int STEPS>
  DEVICE void draw(uint32 (&kept)[STEPS][4], int first_row, int first_column) const {
    const int query = first_row + lane_index() / 4, key_position = first_column + lane_index() % 4 * 2;
#pragma unroll
    for (int k = BEGIN; k < END; ++k) {
      const uint4 words = draw_words(query, key_position + 16 * k);
      kept[k][0] = kept_halves(words.x);
      kept[k][2] = kept_halves(words.y);
      kept[k][1] = kept_halves(words.z);
      kept[k][3] = kept_halves(words.w);
    }
  }

  // The same of all steps where rows are keys. Of a word a lane's key has one half, and neighbours in the operand are of two queries, so of two
  // draws.
  template <int STEPS>
  DEVICE void draw_transposed(uint32 (&kept)[STEPS][4], int first_row, int first_column) const {
    int key_position = first_row + lane_index() / 4;
    asm volatile("" : "+r"(key_position));  // else what it makes of the first rounds is kept from tile to tile, for which there are no registers
    const int query = first_column + lane_index() % 4 * 2;
    const uint32 halves = key_position % 2 ? 0x7632 : 0x5410;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const uint4 first = draw_words(query + 16 * k, key_position & ~1), second = draw_words(query + 16 * k + 1, key_position & ~1);
      kept[k][0] = kept_halves(__byte_perm(first.x, second.x, halves));
      kept[k][1] = kept_halves(__byte_perm(first.y, second.y, halves));
      kept[k][2] = kept_halves(__byte_perm(first.z, second.z, halves));
      kept[k][3] = kept_halves(__byte_perm(first.w, second.w, halves));
    }
  }

 private:
  PhiloxKey keys[PHILOX_ROUNDS];
  uint32 limit;  // twice L, or with DROPS_MOST L - 1

  // Those of `Dropout::draw`.
  DEVICE uint4 draw_words(int query, int key_position) const {
    uint4 words = make_uint4(uint32(key_position), uint32(query), 0, 0);  // head and batch are in the keys
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) words = philox_round(words, keys[round]);
    return words;
  }

  // All bits of those halves that are kept.
  DEVICE uint32 kept_halves(uint32 word) const {
    if constexpr (Config::DROPS_MOST) return greater_halves(word, limit);
    return equal_halves(min_of_halves(word, limit), limit);
  }
};

// Zeros where an A operand that `pack_accumulator` has made is not kept.
template <int STEPS>
DEVICE void drop_packed(uint32 (&P)[STEPS][4], const uint32 (&kept)[STEPS][4]) {
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) P[k][i] &= kept[k][i];
}
