// Rotary embedding (Su et al. 2021, arXiv 2104.09864): pairs of columns of a query or a key are turned by angles that grow with its position.
#pragma once
#include "arguments.cuh"
#include "ptx/convert.cuh"

using RotaryElement = Config::RotaryElement;  // of the tables of cos and sin

// A column of a row, rotated by a position; without rotary embedding, and behind the columns that are rotated, as it is.
template <typename Element>
DEVICE float rotated(const RotaryArguments& rotary, const Element* row, int64 stride_dim, int column, int64 position) {
  const float x = to_float(row[column * stride_dim]);
  if (column >= rotary.dim) return x;
  const int half = rotary.dim / 2;
  const bool is_first = rotary.interleaved ? column % 2 == 0 : column < half;
  const int pair = rotary.interleaved ? column / 2 : is_first ? column : column - half;
  const int distance = rotary.interleaved ? 1 : half;
  const float other = to_float(row[(column + (is_first ? distance : -distance)) * stride_dim]);
  const int64 at = max(int64(0), min(position, int64(rotary.rows - 1)));
  const float cos = to_float(static_cast<const RotaryElement*>(rotary.cos)[at * rotary.stride_cos + pair]);
  const float sin = to_float(static_cast<const RotaryElement*>(rotary.sin)[at * rotary.stride_sin + pair]);
  return __fmaf_rn(x, cos, is_first ? -other * sin : other * sin);
}
