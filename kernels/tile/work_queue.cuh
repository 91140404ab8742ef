// The tiles of queries that a persistent block computes, one after the other, and how the warp that finds the next one tells those that compute.
//
// There are as many blocks as run at one time. Each begins with the tile of its own number. Those behind it a block takes from a counter in global
// memory where tiles take different times, so that no block waits for another one, and else every gridDim.x-th. Which block computes a tile changes
// no bit of it. The counter is 0 before the launch. The keys of the last tiles may be shared out among blocks, which then begin with their shares
// (tile/key_shares.cuh).
//
// A tile of a sequence with lengths of its own (tile/sequence.cuh) comes with these, so that only one warp of a block waits for them.
#pragma once
#include "ptx/global.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"
#include "tile/key_shares.cuh"
#include "tile/packed_tiles.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"

struct TileWork {
  Work at;  // tile -1: there is no more
  int start_q = 0, start_kv = 0, seqlen_q = 0, seqlen_kv = 0;  // of the sequence; where lengths are the call's, nobody looks at them
  KeyShare keys{};  // with SHARES_KEYS

  static constexpr int BYTES = 32;  // in shared memory, on 16 bytes

  DEVICE void store(SmemAddress address) const {
    store_shared(address, Chunk{{uint32(at.tile), uint32(at.head), uint32(at.batch), 0}});
    if constexpr (RAGGED) store_shared(address + 16, Chunk{{uint32(start_q), uint32(start_kv), uint32(seqlen_q), uint32(seqlen_kv)}});
    if constexpr (SHARES_KEYS) store_shared(address + 16, Chunk{{uint32(keys.begin), uint32(keys.end), uint32(keys.tile), 0}});
  }

  // The same numbers in all lanes of the warp, and known to be.
  DEVICE static TileWork load(SmemAddress address) {
    const Chunk at = load_shared(address);
    TileWork work{{uniform_word(at, 0), uniform_word(at, 1), uniform_word(at, 2)}};
    if constexpr (RAGGED) {
      const Chunk sequence = load_shared(address + 16);
      work = {work.at, uniform_word(sequence, 0), uniform_word(sequence, 1), uniform_word(sequence, 2), uniform_word(sequence, 3)};
    }
    if constexpr (SHARES_KEYS) {
      const Chunk share = load_shared(address + 16);
      work.keys = {uniform_word(share, 0), uniform_word(share, 1), uniform_word(share, 2)};
    }
    return work;
  }

  DEVICE static int uniform_word(const Chunk& chunk, int i) { return int(uniform(chunk.word[i])); }

  // What its sequence looks like, as `geometry_of` (tile/sequence.cuh).
  template <typename Arguments>
  DEVICE decltype(auto) geometry(const Arguments& arguments) const {
    if constexpr (!RAGGED) {
      return (arguments.geometry);
    } else {
      Geometry geometry = arguments.geometry;
      geometry.seqlen_q = seqlen_q;
      geometry.seqlen_kv = seqlen_kv;
      geometry.causal_offset = arguments.lengths.bottom_right ? seqlen_kv - seqlen_q : 0;
      return geometry;
    }
  }

  // Whether this is no tile of a sequence, but rows behind the last one.
  template <typename Arguments>
  DEVICE bool is_behind(const Arguments& arguments) const {
    return VARLEN && at.batch == arguments.lengths.num_sequences;
  }
};

// For one whole warp.
template <bool CAUSAL, typename Arguments>
class WorkQueue {
 public:
  DEVICE explicit WorkQueue(const Arguments& arguments) : arguments(arguments), index(blockIdx.x) {
    if constexpr (SHARES_KEYS) go_to(KeyShares(arguments).begin(int(blockIdx.x)));
  }

  DEVICE bool is_empty() const { return !has_share() && index >= uint32(SHARES_KEYS ? arguments.shares.first_work : arguments.num_work); }

  // Takes the next tile while there is time: the counter answers late, and nothing is done with its answer before `advance`.
  DEVICE void take_ahead() {
    taken = index;
    if (arguments.next_work != nullptr && lane_index() == 0) taken = fetch_increment_relaxed(arguments.next_work);
  }
  DEVICE void advance() {
    if (has_share()) {
      go_to(KeyShares(arguments).next_tile(position()));
    } else {
      index = uniform(taken) + gridDim.x;
    }
  }

  DEVICE TileWork work() const {
    KeyShare keys{};
    if constexpr (SHARES_KEYS) {
      const KeyShares shares(arguments);
      keys = has_share() ? shares.share(position()) : shares.all_keys();
    }
    const int of = has_share() ? arguments.shares.first_work + keys.tile : int(index);
    const Work at = work_in_order<CAUSAL, true>(arguments, arguments.geometry.num_heads_q, of);
    const Geometry& geometry = arguments.geometry;
    TileWork work{at};
    work.keys = keys;
    if constexpr (RAGGED) {
      work.start_q = sequence_start(arguments.lengths.cu_seqlens_q, at.batch, geometry.seqlen_q);
      if (!work.is_behind(arguments)) {
        work.start_kv = sequence_start(arguments.lengths.cu_seqlens_kv, at.batch, geometry.seqlen_kv);
        const auto& own = geometry_of(arguments, at.batch);
        work.seqlen_q = own.seqlen_q;
        work.seqlen_kv = own.seqlen_kv;
      }
    }
    return work;
  }

 private:
  const Arguments& arguments;
  uint32 index, taken = 0;  // with SHARES_KEYS: or where the block is in its share, less than 0

  DEVICE bool has_share() const { return SHARES_KEYS && int(index) < 0; }
  DEVICE int position() const { return ~int(index); }

  // On in the block's share, or behind it.
  DEVICE void go_to(int position) { index = position < KeyShares(arguments).end(int(blockIdx.x)) ? ~uint32(position) : blockIdx.x; }
};
