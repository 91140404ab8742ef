// Sequences whose lengths only the device knows: rows of a batch with fewer keys than it has room for (SEQLENS_KV), sequences of any length packed
// one behind the other (VARLEN), and sequences that use the first rows only of their places among those, or of a batch (IN_PLACES).
//
// A block looks its sequence up once and then works as if it were alone: with a Geometry of its own, whose rows start at `start_q` and `start_kv`
// of the packed arrays, which have a batch stride of 0. Offsets that make no sense are clamped: whatever they say, no access leaves the arrays.
//
// Packed rows behind the last sequence belong to nobody. Blocks of one sequence more than there are fill them with zeros. The grid is made for
// max_seqlen, or for a list of the tiles that there are (tile/packed_tiles.cuh); rows of a sequence that is longer all the same are filled with zeros
// by the block of its last tile. Rows of a sequence's place that it does not use are filled by the blocks of their tiles, and those beyond the last
// tile by all blocks of the sequence. Of a batch that is not packed these are the rows of queries; those of keys get the zeros that their sums are.
//
// With neither feature, everything in this file is nothing.
#pragma once
#include "arguments.cuh"
#include "tile/schedule.cuh"

constexpr bool VARLEN = Config::VARLEN;  // packed sequences
constexpr bool SEQLENS_KV =
    Config::SEQLENS_KV;  // sequences have key lengths besides their places: rows of a batch, a cache, or packed ones in places
constexpr bool RAGGED = VARLEN || SEQLENS_KV;
constexpr bool IN_PLACES = Config::IN_PLACES;  // sequences have lengths besides their places, of queries and of keys

constexpr bool PACKED_KEYS = VARLEN && (IN_PLACES || !SEQLENS_KV);  // keys too; a cache has lengths of its own, and no places

static_assert(!IN_PLACES || SEQLENS_KV, "of keys, too");

// The first packed row of a sequence; of the one behind the last, the first row that belongs to nobody.
DEVICE int sequence_start(const int* offsets, int sequence, int num_rows) { return VARLEN ? min(max(offsets[sequence], 0), num_rows) : 0; }

// Packed rows that a sequence has a place for; without packed sequences, all rows.
DEVICE int sequence_place(const int* offsets, int sequence, int num_rows) {
  if constexpr (!VARLEN) return num_rows;
  const int start = sequence_start(offsets, sequence, num_rows);
  return max(sequence_start(offsets, sequence + 1, num_rows) - start, 0);
}

// An array's rows: of how many each sequence has a place for, and how many it uses; null: all of them.
struct PackedArray {
  const int* offsets;
  const int* lengths;
  int num_rows;
};

template <typename Arguments>
DEVICE PackedArray packed_queries(const Arguments& arguments) {
  return {arguments.lengths.cu_seqlens_q, arguments.lengths.seqlens_q, arguments.geometry.seqlen_q};
}

template <typename Arguments>
DEVICE PackedArray packed_keys(const Arguments& arguments) {
  return {arguments.lengths.cu_seqlens_kv, VARLEN ? arguments.lengths.seqlens_kv : nullptr, arguments.geometry.seqlen_kv};
}

// Rows of a sequence: those of its place, or the first ones as its length says.
DEVICE int sequence_length(const PackedArray& packed, int sequence) {
  const int place = sequence_place(packed.offsets, sequence, packed.num_rows);
  return IN_PLACES && packed.lengths != nullptr ? min(max(packed.lengths[sequence], 0), place) : place;
}

// What the block's sequence looks like: the call's geometry itself, or a copy with the lengths of this sequence.
template <typename Arguments>
DEVICE decltype(auto) geometry_of(const Arguments& arguments, int sequence) {
  if constexpr (!RAGGED) {
    return (arguments.geometry);
  } else {
    const SequenceLengths& lengths = arguments.lengths;
    Geometry geometry = arguments.geometry;
    if constexpr (VARLEN) {
      geometry.seqlen_q = sequence_length(packed_queries(arguments), sequence);
      geometry.seqlen_kv = sequence_length(packed_keys(arguments), sequence);
    } else if constexpr (IN_PLACES) {
      geometry.seqlen_q = sequence_length(packed_queries(arguments), sequence);
      if (lengths.seqlens_kv != nullptr) geometry.seqlen_kv = min(max(lengths.seqlens_kv[sequence], 0), geometry.seqlen_kv);
    } else {
      geometry.seqlen_kv = min(max(lengths.seqlens_kv[sequence], 0), geometry.seqlen_kv);
    }
    geometry.causal_offset = lengths.bottom_right ? geometry.seqlen_kv - geometry.seqlen_q : 0;
    return geometry;
  }
}

// Gives the block its rows: whether its tile of TILE_ROWS rows holds any. `packed` is the array of which blocks own rows. Rows that no block owns are
// given to `clear(begin, end, tile, num_tiles)`, which fills the block's share of them, tile `tile` of `num_tiles`.
template <int TILE_ROWS, typename Arguments, typename Clear>
DEVICE bool claim_rows(const Arguments& arguments, const PackedArray& packed, const Work& work, const Clear& clear) {
  if constexpr (VARLEN) {
    const int num_tiles = arguments.geometry.num_tiles;
    const int start = sequence_start(packed.offsets, work.batch, packed.num_rows);
    if (work.batch == arguments.lengths.num_sequences) {  // behind the last sequence
      const int* const listed = arguments.lengths.packed_tiles;
      clear(start, packed.num_rows, work.tile, listed != nullptr ? arguments.lengths.packed_places - *listed : num_tiles);
      return false;
    }
    const int place = sequence_place(packed.offsets, work.batch, packed.num_rows), first = work.tile * TILE_ROWS;
    const int length = sequence_length(packed, work.batch), end = num_tiles * TILE_ROWS;  // the last row that max_seqlen has blocks for
    if constexpr (IN_PLACES) {
      clear(start + max(first, length), start + min(first + TILE_ROWS, place), 0, 1);
      clear(start + end, start + place, work.tile, num_tiles);  // places may be much longer than what sequences use
    } else {
      if (work.tile == num_tiles - 1) clear(start + end, start + place, 0, 1);  // longer than max_seqlen said
    }
    return first < length;  // the grid is made for the longest sequence
  } else if constexpr (IN_PLACES) {
    const int length = sequence_length(packed, work.batch), first = work.tile * TILE_ROWS;
    clear(max(first, length), min(first + TILE_ROWS, packed.num_rows), 0, 1);
    return first < length;
  }
  return true;
}
