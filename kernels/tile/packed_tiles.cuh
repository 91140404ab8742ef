// Which tile of which packed sequence a block has, where there is a list of the tiles that there are (packed_tiles.cu).
//
// Without a list a grid has blocks for the longest sequence in the place of each, of which most find no rows where lengths differ much. Lengths are
// known to the device only, but no more tiles than places can be: one for each TILE_ROWS of all packed rows, and one more for each sequence. Blocks in
// places behind the last tile fill rows behind the last sequence.
//
//     packed_tiles [1 + packed_places][2]: how many tiles and 0, then the number of a tile in its sequence, and of the sequence
//
// Tiles with the most to walk over come first, and those of a sequence that have as much in their own order. Blocks take sections of
// geometry.section_heads heads one after another, of which a divisor of all heads is one, and in each the first tile of all heads, then the second.
#pragma once
#include "arguments.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"

template <typename Arguments>
DEVICE Work listed_work(const Arguments& arguments, int num_heads, int index) {
  const int section_heads = arguments.geometry.section_heads, of_section = section_heads * arguments.lengths.packed_places;
  const int section = index / of_section, within = index - section * of_section;
  const int place = within / section_heads;
  const int head = section * section_heads + (within - place * section_heads);
  const int* const list = arguments.lengths.packed_tiles;
  const int behind = place - list[0];
  if (behind >= 0) return {behind, head, arguments.lengths.num_sequences};
  return {list[2 + 2 * place], head, list[3 + 2 * place]};
}

template <typename Arguments>
DEVICE bool has_list(const Arguments& arguments) {
  if constexpr (VARLEN) return arguments.lengths.packed_tiles != nullptr;
  return false;
}

// As work_longest_first.
template <bool CAUSAL, bool LAST_TILE_FIRST, typename Arguments>
DEVICE Work work_in_order(const Arguments& arguments, int num_heads, int index = int(blockIdx.x)) {
  if (has_list(arguments)) return listed_work(arguments, num_heads, index);
  return work_longest_first<CAUSAL, LAST_TILE_FIRST>(arguments.geometry, num_heads, index);
}

// As work_of_ticket.
template <typename Arguments>
DEVICE Work work_of_ticket(const Arguments& arguments, int num_heads, int ticket) {
  if (has_list(arguments)) return listed_work(arguments, num_heads, ticket);
  return work_of_ticket(ticket, arguments.geometry.num_tiles, num_heads, arguments.geometry.section_heads);
}
