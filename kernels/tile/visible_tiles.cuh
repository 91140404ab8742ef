// The tiles that a block walks over where that depends on data.
//
// With a boolean mask or segments, the kernel visible_tiles.cu has listed the tiles in which any pair is visible, for each tile that a block of the
// next kernel owns:
//
//     visible_tiles[list_batches][list_heads][num_tiles][1 + num_columns]: count, then entries tile * 2 + (1 if some pair of the tile is hidden)
//
// A step of a walk is the index of an entry. Without such masks nothing is listed, visible tiles are neighbours, and a step is the index of a tile.
//
// Where blocks own keys and add to tiles of queries in turn (tile/query_sums.cuh), a block has to know how many add to a tile before it. A table
// takes the place of the lists then, and of all that share their walks with such kernels:
//
//     visible_tiles[list_batches][list_heads][tiles of keys][tiles of queries]: place * 2 + (1 if some pair of the two is hidden), or NOTHING_VISIBLE
//
// The place of a tile of keys is the number of earlier ones of which some query of the tile sees a key.
#pragma once
#include "ptx/warp.cuh"
#include "tile/features.cuh"

constexpr int NOTHING_VISIBLE = -1;  // in the place of an entry

// Which of the lists is that of (batch, head): one may be for all batches or heads.
DEVICE int64 list_of(const FeatureArguments& features, int batch, int head) {
  const int list_batch = features.list_batches == 1 ? 0 : batch;
  const int list_head = features.list_heads == 1 ? 0 : head;
  return int64(list_batch) * features.list_heads + list_head;
}

// The row of a tile of keys in the table, with an entry for each tile of queries.
DEVICE int* places_of_tiles(const FeatureArguments& features, int batch, int head, int num_tiles_kv, int tile_kv, int num_tiles_q) {
  return features.visible_tiles + (list_of(features, batch, head) * num_tiles_kv + tile_kv) * num_tiles_q;
}

DEVICE int* visible_tiles_of(const Geometry& geometry, const FeatureArguments& features, int batch, int head, int tile, int num_columns) {
  return features.visible_tiles + (list_of(features, batch, head) * geometry.num_tiles + tile) * (1 + num_columns);
}

class VisibleTiles {  // of the tile `tile` of (batch, head); nothing without lists
 public:
  DEVICE VisibleTiles(const Geometry& geometry, const FeatureArguments& features, int batch, int head, int tile, int num_columns) {
    if constexpr (TILE_LISTS) list = visible_tiles_of(geometry, features, batch, head, tile, num_columns);
  }

  DEVICE int count() const { return list[0]; }
  DEVICE int entry(int step) const { return list[1 + step]; }
  DEVICE int tile(int step) const { return TILE_LISTS ? list[1 + step] >> 1 : step; }
  DEVICE bool is_partial(int step) const { return TILE_LISTS && list[1 + step] % 2 != 0; }

 private:
  const int* list = nullptr;
};

// The same for a kernel whose copies run ahead of its products: entries are read into registers a step before one is wanted, so that no copy waits
// for its entry. In step j those of steps j .. j + AHEAD are there.
//
//     VisibleTilesAhead<NUM_STAGES> tiles(...);  // at step 0, or at another one behind begin_at
//     for (int j = 0; j < tiles.count(); ++j) {
//       tiles.look_ahead(j);
//       ...
//       tiles.advance();
//     }
template <int AHEAD>
class VisibleTilesAhead {
 public:
  DEVICE VisibleTilesAhead(const Geometry& geometry, const FeatureArguments& features, int batch, int head, int tile, int num_columns) {
    if constexpr (TILE_LISTS) {
      list = visible_tiles_of(geometry, features, batch, head, tile, num_columns);
      num_entries = list[0];
      begin_at(0);
    }
  }

  DEVICE void begin_at(int step) {
    if constexpr (TILE_LISTS) {
      present = step;
#pragma unroll
      for (int i = 0; i <= AHEAD; ++i) entries[i] = read(step + i);
    }
  }

  DEVICE int count() const { return num_entries; }
  DEVICE int tile(int step) const { return TILE_LISTS ? entry(step) >> 1 : step; }
  DEVICE bool is_partial(int step) const { return TILE_LISTS && entry(step) % 2 != 0; }

  DEVICE void look_ahead(int step) {
    if constexpr (TILE_LISTS) {
      present = step;
      entries[AHEAD + 1] = read(step + AHEAD + 1);
    }
  }
  DEVICE void advance() {
    if constexpr (TILE_LISTS) {
#pragma unroll
      for (int i = 0; i <= AHEAD; ++i) entries[i] = entries[i + 1];
    }
  }

 private:
  const int* list = nullptr;
  int num_entries = 0;
  int present = 0;
  int entries[TILE_LISTS ? AHEAD + 2 : 1];  // of steps present .. present + AHEAD + 1

  DEVICE int read(int step) const { return step < num_entries ? list[1 + step] : 0; }

  // Which one it is, is known at compile time: steps are asked for relative to the present one.
  DEVICE int entry(int step) const {
    int found = entries[0];
#pragma unroll
    for (int i = 1; i <= AHEAD; ++i)
      if (step - present == i) found = entries[i];
    return found;
  }
};

// The same of the table, for a kernel whose blocks own keys: the tiles of queries in the row of a tile of keys, the last one first. Every step looks
// for the next tile in neighbouring entries, one in each lane. Without a table all tiles are there.
//
//     VisibleTurnsAhead<STEPS_AHEAD> tiles(...);  // at step begin
//     for (int j = begin; tiles.is_there(j); ++j) {
//       tiles.begin_step(j);
//       ...
//       tiles.look_ahead();
//       ...
//       tiles.advance();
//     }
template <int AHEAD>
class VisibleTurnsAhead {
 public:
  // Of tiles begin .. end - 1; the first step is `begin`.
  DEVICE VisibleTurnsAhead(const FeatureArguments& features, int batch, int head, int num_tiles_kv, int tile_kv, int num_tiles_q, int begin, int end)
      : begin(begin), end(end), present(begin) {
    if constexpr (TILE_LISTS) {
      row = places_of_tiles(features, batch, head, num_tiles_kv, tile_kv, num_tiles_q);
      int above = end;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) above = tiles[i] = next_below(above, neighbour(above));
      if (tiles[0] != NOTHING_VISIBLE) entry = row[tiles[0]];
      neighbours = neighbour(above);
    }
  }

  DEVICE bool is_there(int step) const { return TILE_LISTS ? tile(step) != NOTHING_VISIBLE : step < end; }
  DEVICE int place() const { return entry >> 1; }  // of the block among those that add to the present tile, with a table
  DEVICE bool is_partial() const { return entry % 2 != 0; }
  DEVICE bool next_is_partial() const { return next_entry != NOTHING_VISIBLE && next_entry % 2 != 0; }  // behind look_ahead

  DEVICE int tile(int step) const {  // which one it is, is known at compile time, as in VisibleTilesAhead
    if constexpr (!TILE_LISTS) return begin + end - 1 - step;
    int found = tiles[0];
#pragma unroll
    for (int i = 1; i <= AHEAD; ++i)
      if (step - present == i) found = tiles[i];
    return found;
  }

  // Before it the tiles of steps present .. present + AHEAD - 1 are there, behind it that of present + AHEAD, too.
  DEVICE void begin_step(int step) {
    if constexpr (TILE_LISTS) {
      present = step;  // as it is already; now the compiler knows it
      tiles[AHEAD] = next_below(tiles[AHEAD - 1], neighbours);
    }
  }
  // Before the block adds: behind its additions loads would wait for them.
  DEVICE void look_ahead() {
    if constexpr (TILE_LISTS) {
      next_entry = tiles[1] != NOTHING_VISIBLE ? row[tiles[1]] : NOTHING_VISIBLE;
      neighbours = neighbour(tiles[AHEAD]);
    }
  }
  DEVICE void advance() {
    if constexpr (TILE_LISTS) {
      entry = next_entry;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) tiles[i] = tiles[i + 1];
      ++present;
    }
  }

 private:
  const int begin, end;
  int present;
  const int* row = nullptr;
  int entry = 0, next_entry = 0;  // of the present step and the next one
  int neighbours = 0;  // this lane's of those below the last tile that is there
  int tiles[AHEAD + 1] = {};

  // The entry of the tile as far below `above` as the lane is from the first one.
  DEVICE int neighbour(int above) const {
    const int tile = above - 1 - lane_index();
    return tile >= begin ? row[tile] : NOTHING_VISIBLE;
  }

  // The next tile with a visible pair; `entry` is this lane's of those below `above`.
  DEVICE int next_below(int above, int entry) const {
    uint32 found = lanes_with(entry != NOTHING_VISIBLE);
#pragma unroll 1
    while (found == 0 && above - WARP_SIZE > begin) {
      above -= WARP_SIZE;
      found = lanes_with(neighbour(above) != NOTHING_VISIBLE);
    }
    return found == 0 ? NOTHING_VISIBLE : above - __ffs(int(found));
  }
};
