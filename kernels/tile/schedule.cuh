// Which piece of work a block does. The grid is one-dimensional (2^31 - 1 blocks): batch and heads have no 65535 limit.
#pragma once
#include "arguments.cuh"

struct Work {
  int tile, head, batch;
};

// Head by head: tiles of one head are neighbours, so that they share K and V in L2.
DEVICE Work work_of_block(int num_tiles, int num_heads, int index = int(blockIdx.x)) {
  const int tile = index % num_tiles;
  const int head = index / num_tiles % num_heads;
  return {tile, head, index / num_tiles / num_heads};
}

// By sections of section_heads (batch, head) pairs, and within each the first tiles of all its pairs first.
DEVICE Work work_of_section(int num_tiles, int section_heads, int num_heads, int index) {
  const int of_section = section_heads * num_tiles;
  const int section = index / of_section, within = index - section * of_section;
  const int tile = within / section_heads;
  const int pair = section * section_heads + (within - tile * section_heads);
  return {tile, pair % num_heads, pair / num_heads};
}

// Head by head where blocks are equally long. Under a causal mask by sections, in which the longest tiles of all pairs come first
// (cuflash/planning/block_order.py): of queries the last tile, which sees the most keys, of keys the first.
template <bool CAUSAL, bool LAST_TILE_FIRST>
DEVICE Work work_longest_first(const Geometry& geometry, int num_heads, int index = int(blockIdx.x)) {
  if constexpr (!CAUSAL) return work_of_block(geometry.num_tiles, num_heads, index);
  Work work = work_of_section(geometry.num_tiles, geometry.section_heads, num_heads, index);
  if constexpr (LAST_TILE_FIRST) work.tile = geometry.num_tiles - 1 - work.tile;
  return work;
}

// The work of the block that is the `ticket`-th to start. Sections of section_heads heads come one after another, so that what they read and add
// up stays in L2. Within a section the first tiles of all heads come first, then the second tiles.
DEVICE Work work_of_ticket(int ticket, int num_tiles, int num_heads, int section_heads) {
  const int before = ticket / (section_heads * num_tiles) * section_heads;  // (batch, head) in earlier sections
  const int heads = min(section_heads, int(gridDim.x) / num_tiles - before);
  const int within = ticket - before * num_tiles;
  const int head = before + within % heads;
  return {within / heads, head % num_heads, head / num_heads};
}
