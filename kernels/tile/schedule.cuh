// Which piece of work a block does. The grid is one-dimensional (2^31 - 1 blocks): batch and heads have no 65535 limit.
#pragma once
#include "arguments.cuh"

struct Work {
  int tile, head, batch;
};

// Tiles of one head are neighbours, so that they share K and V in L2. With `longest_first` they come in reverse: under a causal mask the
// last query tile has the most keys.
DEVICE Work decode_block(int num_tiles, int num_heads, bool longest_first) {
  const int index = int(blockIdx.x);
  const int tile = index % num_tiles;
  const int head = index / num_tiles % num_heads;
  return {longest_first ? num_tiles - 1 - tile : tile, head, index / num_tiles / num_heads};
}

// The work of the block that is the `ticket`-th to start. Sections of section_heads heads come one after another, so that what they read and add
// up stays in L2. Within a section the first tiles of all heads come first, then the second tiles.
DEVICE Work decode_ticket(int ticket, int num_tiles, int num_heads, int section_heads) {
  const int before = ticket / (section_heads * num_tiles) * section_heads;  // (batch, head) in earlier sections
  const int heads = min(section_heads, int(gridDim.x) / num_tiles - before);
  const int within = ticket - before * num_tiles;
  const int head = before + within % heads;
  return {within / heads, head % num_heads, head / num_heads};
}
