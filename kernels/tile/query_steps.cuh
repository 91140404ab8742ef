// The tiles of queries that a block with a tile of keys walks over.
#pragma once
#include "tile/constants.cuh"
#include "tile/schedule.cuh"
#include "tile/visibility.cuh"

// A block's steps over tiles of queries.
struct Steps {
  int begin, end;
};

// Those in which any query may see a key of the block's tile, as far as that does not depend on data.
DEVICE Steps query_steps(const Visibility& visibility, int first_kv) {
  return {visibility.first_query(first_kv) / TILE_Q, (visibility.end_query(first_kv, first_kv + TILE_KV) + TILE_Q - 1) / TILE_Q};
}

// How many blocks add to a tile of queries before this one, where that does not depend on data.
DEVICE int place_among_blocks(const Work& work, const Visibility& visibility, int tile) {
  return work.tile - visibility.first_key(tile * TILE_Q) / TILE_KV;
}
