// Keys that a tile of grouped rows sees of its sequence.
#pragma once
#include "tile/cache_rows.cuh"
#include "tile/constants.cuh"
#include "tile/grouped_rows.cuh"
#include "tile/visibility.cuh"

struct VisibleKeys {
  int first_q, end_q;      // the tile's queries
  int first_key, end_key;  // what any of them sees lies in first_key .. end_key - 1

  DEVICE VisibleKeys(const Visibility& visibility, const SequenceInCache& sequence, const GroupedRows& rows, int first_row)
      : first_q(rows.query(first_row)), end_q(rows.query(first_row + TILE_Q - 1) + 1) {
    end_key = visibility.end_key(first_q, end_q);
    first_key = max(visibility.first_key(first_q), sequence.first_key);
  }

  DEVICE int first_tile() const { return first_key / TILE_KV; }
  DEVICE int end_tile() const { return max(first_tile(), ceil_div(end_key, TILE_KV)); }
};
