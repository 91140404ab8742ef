// Which piece of work a block does. The grid is one-dimensional (2^31 - 1 blocks): batch and heads have no 65535 limit.
#pragma once
#include "arguments.cuh"

struct Work {
  int tile, head, batch;
};

// Tiles of one head are neighbours, so that they share K and V in L2. With `longest_first` they come in reverse: under a causal mask the
// last query tile has the most keys.
DEVICE Work work_of_block(int num_tiles, int num_heads, bool longest_first) {
  const int index = int(blockIdx.x);
  const int tile = index % num_tiles;
  const int head = index / num_tiles % num_heads;
  return {longest_first ? num_tiles - 1 - tile : tile, head, index / num_tiles / num_heads};
}
