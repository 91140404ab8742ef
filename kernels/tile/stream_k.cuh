// Stream-K (Osama et al. 2023, arxiv.org/abs/2301.03598): each block has as many key tiles as any other, whatever the lengths of the sequences are.
//
// An output tile is a tile of grouped rows of one sequence and key head. All of them lie on a line of positions, one behind the other: for each as
// many positions as its beginning costs, and one for each key tile that its rows see, at least one. The line is cut into equal shares, one for each
// block. So a block has whole output tiles, whose results it stores, and at most two of which it has a part, at the beginning and at the end of its
// share: workspace has two places for parts of each block. The block with the first keys of an output tile lists its parts for merge_attention.cu.
//
// Lengths are read here, on the device, by each warp for itself: the launch is the same whatever they are, and nobody waits for a kernel before.
#pragma once
#include "ptx/math.cuh"
#include "tile/split_rows.cuh"
#include "tile/visible_keys.cuh"

class KeyTileStream {
 public:
  DEVICE explicit KeyTileStream(const ForwardSplitArguments& arguments) : arguments(arguments) {
    const int sequences = VARLEN ? arguments.lengths.num_sequences : arguments.geometry.batch;
    const int count = sequences * arguments.geometry.num_tiles, of_lane = ceil_div(count, WARP_SIZE);
    const int first = min(count, lane_index() * of_lane), last = min(count, first + of_lane);
    int own = 0, longest = 0;
    for (int i = first; i < last; ++i) {
      const int counted = count_tiles(i);
      own += positions_of(counted);
      longest = max(longest, counted);
    }
    int through = own;  // positions of this lane and of those before it
#pragma unroll
    for (int step = 1; step < WARP_SIZE; step *= 2) {
      const int below = shfl(through, max(lane_index() - step, 0));
      if (lane_index() >= step) through += below;
      longest = max(longest, shfl_xor(longest, step));
    }
    const int total = shfl(through, WARP_SIZE - 1);
    share = max(ceil_div(total, int(gridDim.x)), shortest_share(longest));
    position = int(min(int64(total), int64(blockIdx.x) * share));
    end = min(total, position + share);
    if (position >= end) return;

    const int lane = __ffs(int(lanes_with(position < through))) - 1;
    index = lane * of_lane;
    start = shfl(through - own, lane);
    for (tiles = count_tiles(index); start + positions_of(tiles) <= position; tiles = count_tiles(++index)) start += positions_of(tiles);
    const int of_head = arguments.begin_tiles + tiles;
    head_kv = (position - start) / of_head;
    start += head_kv * of_head;
  }

  // Whether key tiles of the output tile are this block's, and not its beginning alone.
  DEVICE bool has_more() const { return position < end && start + arguments.begin_tiles < end; }

  // The next output tile, and those of its key tiles that are the block's.
  DEVICE SplitWork work() const {
    const int num_tiles = arguments.geometry.num_tiles, keys = start + arguments.begin_tiles;
    const int sequence = index / num_tiles, first_tile = max(0, position - keys), end_tile = min(tiles, end - keys);
    const bool is_whole = first_tile == 0 && end_tile == tiles;
    const int part = is_whole ? -1 : part_of_block(int(blockIdx.x), first_tile == 0);
    const int start_q = sequence_start(arguments.lengths.cu_seqlens_q, sequence, arguments.geometry.seqlen_q);
    return {index % num_tiles, head_kv, sequence, 0, VARLEN ? 0 : sequence, start_q, 0, first_tile, end_tile, part};
  }

  // Says which blocks have parts of the output tile, whose first keys are this block's.
  DEVICE void list_parts() const {
    const int last_block = (start + arguments.begin_tiles + tiles - 1) / share;
    arguments.part_table[index * arguments.geometry.num_heads_kv + head_kv] = PartsOfTile{int(blockIdx.x), last_block - int(blockIdx.x) + 1};
  }

  DEVICE void advance() {
    start += arguments.begin_tiles + tiles;
    position = start;
    if (++head_kv == arguments.geometry.num_heads_kv) {
      head_kv = 0;
      do {
        ++index;
        if (position < end) tiles = count_tiles(index);
      } while (VARLEN && position < end && tiles == 0);
    }
  }

 private:
  const ForwardSplitArguments& arguments;
  int share;          // positions of a block
  int position, end;  // where this block is, and where it ends
  int index, head_kv;  // of the output tile: number of tile and sequence, the tiles of a sequence one behind the other
  int start, tiles;    // where it begins, and its key tiles

  // Key tiles that the rows of an output tile see, or 1; 0 of a packed sequence that does not reach it.
  DEVICE int count_tiles(int of) const {
    const int sequence = of / arguments.geometry.num_tiles, first_row = of % arguments.geometry.num_tiles * TILE_Q;
    const Geometry geometry = geometry_in_cache(arguments, sequence);
    const GroupedRows rows(geometry, 0);
    if (VARLEN && first_row >= rows.count) return 0;
    const Visibility visibility(geometry, arguments.features, sequence, 0);
    const VisibleKeys keys(visibility, SequenceInCache(arguments.cache, sequence), rows, first_row);
    return max(1, keys.end_tile() - keys.first_tile());
  }

  // Of the output tiles of all key heads that see so many.
  DEVICE int positions_of(int key_tiles) const {
    return VARLEN && key_tiles == 0 ? 0 : arguments.geometry.num_heads_kv * (arguments.begin_tiles + key_tiles);
  }

  // That where a smaller one would cost more in merging the longest output tile than it saves.
  DEVICE int shortest_share(int longest) const { return int(square_root(arguments.part_tiles * float(longest))) + 1; }
};
