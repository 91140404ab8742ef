// A list of the tiles that packed sequences have, in the format of tile/packed_tiles.cuh, for the blocks of the next kernel, which own tiles of
// queries, or of keys: those with the most pairs first, so that the last blocks to start are the shortest.
//
// The place of a tile is the number of tiles before it. A lane counts those of every 32nd sequence, by a formula: tiles of a sequence differ by how
// many positions of the other array a causal mask leaves them, and these rise or fall from one tile to the next. Nothing is sorted and nothing
// counted by atomics, so the list is the same on every run.
//
// Tiles of a place that its sequence does not use have blocks too, which fill them with zeros; they come last.
#include "arguments.cuh"
#include "ptx/warp.cuh"
#include "tile/sequence.cuh"

constexpr int TILE_ROWS = Config::TILE_ROWS;
constexpr bool BY_KEYS = Config::BY_KEYS;
constexpr int NUM_WARPS = Config::NUM_WARPS;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;
constexpr int WARP_TILES = 4;

// The tiles of one sequence, and what blocks walk over for them.
class SequenceTiles {
 public:
  int tiles;  // of its place, as far as the grid may have any
  int used;   // that have rows of the sequence

  DEVICE SequenceTiles(const PackedTilesArguments& arguments, int sequence) : arguments(arguments) {
    const PackedArray queries = packed_queries(arguments), keys = packed_keys(arguments);
    const PackedArray& owned = BY_KEYS ? keys : queries;
    const int place = sequence_place(owned.offsets, sequence, owned.num_rows);
    const int seqlen_q = sequence_length(queries, sequence), seqlen_kv = sequence_length(keys, sequence);
    const int most = arguments.geometry.num_tiles;
    tiles = min(ceil_div(place, TILE_ROWS), most);
    used = min(ceil_div(BY_KEYS ? seqlen_kv : seqlen_q, TILE_ROWS), most);
    walked = BY_KEYS ? seqlen_q : seqlen_kv;
    offset = arguments.lengths.bottom_right ? seqlen_kv - seqlen_q : 0;
  }

  // Positions that the block of a tile walks over.
  DEVICE int length_of(int tile) const {
    if (tile >= used) return 0;
    if (!Config::CAUSAL) return walked;
    if (BY_KEYS) return walked - min(max(tile * TILE_ROWS - offset, 0), walked);
    return min(max((tile + 1) * TILE_ROWS + offset, 0), walked);
  }

  // Tiles with so many positions or more: of queries under a causal mask its last tiles, else its first.
  DEVICE int count_from(int length) const {
    if (length <= 0) return tiles;
    if (walked < length) return 0;
    if (!Config::CAUSAL) return used;
    if (BY_KEYS) {
      const int last = walked - length + offset;
      return last < 0 ? 0 : min(last / TILE_ROWS + 1, used);
    }
    const int end = length - offset;  // a tile has to end there or behind
    return end <= TILE_ROWS ? used : max(used - (ceil_div(end, TILE_ROWS) - 1), 0);
  }

  // Tiles of this sequence before one of it.
  DEVICE int before(int tile) const {
    const int length = length_of(tile), longer = count_from(length + 1);
    if (BY_KEYS) return tile;
    if (length > 0) return longer + tile - (used - count_from(length));
    return tile < used ? longer + tile : tile;
  }

 private:
  const PackedTilesArguments& arguments;
  int walked, offset;
};

// Tiles are counted up to the number of places: sequences that overlap, as senseless offsets make them, may have more than an int holds.
DEVICE int add_tiles(int count, int more, int most) { return int(min(uint32(count) + uint32(more), uint32(most))); }

DEVICE int sum_of_lanes(int count, int most) {
#pragma unroll
  for (int lane_mask = WARP_SIZE / 2; lane_mask > 0; lane_mask /= 2) count = add_tiles(count, shfl_xor(count, lane_mask), most);
  return count;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) packed_tiles(const __grid_constant__ PackedTilesArguments arguments) {
  const int num_sequences = arguments.lengths.num_sequences, places = arguments.lengths.packed_places;
  int* const list = arguments.lengths.packed_tiles;
  const int blocks = ceil_div(arguments.geometry.num_tiles, NUM_WARPS * WARP_TILES);  // of a sequence
  const int sequence = int(blockIdx.x) / blocks;
  if (sequence == num_sequences) {
    if (warp_index() != 0) return;
    int count = 0;
    for (int other = lane_index(); other < num_sequences; other += WARP_SIZE) count = add_tiles(count, SequenceTiles(arguments, other).tiles, places);
    count = sum_of_lanes(count, places);
    if (lane_index() < 2) list[lane_index()] = lane_index() == 0 ? count : 0;
    return;
  }
  const int first = (int(blockIdx.x) % blocks * NUM_WARPS + warp_index()) * WARP_TILES;
  const SequenceTiles own(arguments, sequence);
  if (first >= own.tiles) return;
  int before[WARP_TILES] = {}, length[WARP_TILES];
#pragma unroll
  for (int i = 0; i < WARP_TILES; ++i) length[i] = own.length_of(first + i);
#pragma unroll 1
  for (int other = lane_index(); other < num_sequences; other += WARP_SIZE) {
    const SequenceTiles others(arguments, other);
    if (other == sequence) continue;
#pragma unroll
    for (int i = 0; i < WARP_TILES; ++i) before[i] = add_tiles(before[i], others.count_from(length[i] + (other > sequence)), places);
  }
#pragma unroll
  for (int i = 0; i < WARP_TILES; ++i) {
    const int tile = first + i, place = add_tiles(sum_of_lanes(before[i], places), own.before(tile), places);
    if (tile < own.tiles && place < places && lane_index() < 2) list[2 + 2 * place + lane_index()] = lane_index() == 0 ? tile : sequence;
  }
}
