// Which tile of which packed sequence a block has, where there is a list of the tiles that there are (packed_tiles.cu).
//
// Without a list a grid has blocks for the longest sequence in the place of each, of which most find no rows where lengths differ much. Lengths are
// known to the device only, but no more tiles than places can be: one for each TILE_ROWS of all packed rows, and one more for each sequence. Blocks
// in places behind the last tile fill rows behind the last sequence.
//
//     packed_tiles [1 + packed_places][2]: how many tiles, no more than places, and 0, then the number of a tile in its sequence, and of the sequence
//
// Tiles with the most to walk over come first, and those of a sequence that have as much in their own order. Blocks take sections of
// geometry.section_heads heads one after another, of which a divisor of all heads is one, and in each the first tile of all heads, then the second.
#pragma once
#include "arguments.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"

template <typename Arguments>
DEVICE bool has_list(const Arguments& arguments) {
  if constexpr (VARLEN) return arguments.lengths.packed_tiles != nullptr;
  return false;
}

// Tiles of each (batch, head) pair, or with a list places of each head.
template <typename Arguments>
DEVICE int tiles_of_head(const Arguments& arguments) {
  return has_list(arguments) ? arguments.lengths.packed_places : arguments.geometry.num_tiles;
}

// The work itself, or with a list what is in this place.
template <typename Arguments>
DEVICE Work look_up(const Arguments& arguments, const Work& work) {
  if (!has_list(arguments)) return work;
  const int* const list = arguments.lengths.packed_tiles;
  const int behind = work.tile - list[0];
  if (behind >= 0) return {behind, work.head, arguments.lengths.num_sequences};
  return {list[2 + 2 * work.tile], work.head, list[3 + 2 * work.tile]};
}

// As work_longest_first.
template <bool CAUSAL, bool LAST_TILE_FIRST, typename Arguments>
DEVICE Work work_in_order(const Arguments& arguments, int num_heads, int index = int(blockIdx.x)) {
  if constexpr (!VARLEN) return work_longest_first<CAUSAL, LAST_TILE_FIRST>(arguments.geometry, num_heads, index);
  const int num_tiles = tiles_of_head(arguments);
  Work work = work_of_section(num_tiles, arguments.geometry.section_heads, num_heads, index);
  if (CAUSAL && LAST_TILE_FIRST && !has_list(arguments)) work.tile = num_tiles - 1 - work.tile;
  return look_up(arguments, work);
}

// As work_of_ticket.
template <typename Arguments>
DEVICE Work work_of_ticket(const Arguments& arguments, int num_heads, int ticket) {
  return look_up(arguments, work_of_ticket(ticket, tiles_of_head(arguments), num_heads, arguments.geometry.section_heads));
}
