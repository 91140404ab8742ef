// Which keys a query may see by the end of the arrays and the causal diagonal alone (tile/visibility.cuh has the rest): query q sees key k when
// k < seqlen_kv and, if causal, k <= q + causal_offset.
#pragma once
#include "arguments.cuh"
#include "tile/fragment.cuh"

// One past the last key that any query below `end_q` sees.
template <bool CAUSAL>
DEVICE int causal_end_key(const Geometry& geometry, int end_q) {
  const int all = geometry.seqlen_kv;
  return CAUSAL ? max(0, min(all, min(end_q, geometry.seqlen_q) + geometry.causal_offset)) : all;
}

// The first query that sees any key from `first_kv` on.
template <bool CAUSAL>
DEVICE int causal_first_query(const Geometry& geometry, int first_kv) {
  return CAUSAL ? max(0, first_kv - geometry.causal_offset) : 0;
}

// Whether some pair of the tile (queries from first_q, keys first_kv .. end_kv - 1) is hidden.
template <bool CAUSAL>
DEVICE bool hides_any(const Geometry& geometry, int first_q, int end_kv) {
  return end_kv > geometry.seqlen_kv || (CAUSAL && end_kv - 1 > first_q + geometry.causal_offset);
}

template <bool CAUSAL>
DEVICE bool is_visible(const Geometry& geometry, int query, int key) {
  return key < geometry.seqlen_kv && (!CAUSAL || key <= query + geometry.causal_offset);
}
