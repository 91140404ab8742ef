// VECTOR neighbouring columns of a row in global memory, as float32 in registers: whole chunks where rows start on 16 bytes and columns are
// neighbours, else one element at a time. Columns from head_dim on are read as 0 and not written.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/types.cuh"

constexpr int VECTOR = 8;

template <typename T>
DEVICE void load(float (&x)[VECTOR], const T* source, int64 stride_dim, bool vectorized, int column, int head_dim) {
  if (vectorized && column + VECTOR <= head_dim) {
#pragma unroll
    for (int i = 0; i < VECTOR; i += 16 / int(sizeof(T))) {
      const Chunk chunk = *reinterpret_cast<const Chunk*>(source + column + i);
#pragma unroll
      for (int j = 0; j < 16 / int(sizeof(T)); ++j) {
        if constexpr (sizeof(T) == 4) {
          x[i + j] = __uint_as_float(chunk.word[j]);
        } else {
          T element;
          element.bits = uint16(chunk.word[j / 2] >> (16 * (j % 2)));
          x[i + j] = to_float(element);
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[i] = column + i < head_dim ? to_float(source[(column + i) * stride_dim]) : 0.0f;
  }
}

template <typename T>
DEVICE void store(const float (&x)[VECTOR], T* destination, int64 stride_dim, bool vectorized, int column, int head_dim) {
  if (vectorized && column + VECTOR <= head_dim) {
#pragma unroll
    for (int i = 0; i < VECTOR; i += 16 / int(sizeof(T))) {
      Chunk chunk;
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int j = 0; j < 16 / int(sizeof(T)); ++j) chunk.word[j] = __float_as_uint(x[i + j]);
      } else {
#pragma unroll
        for (int j = 0; j < 16 / int(sizeof(T)); j += 2)
          chunk.word[j / 2] = uint32(from_float<T>(x[i + j]).bits) | uint32(from_float<T>(x[i + j + 1]).bits) << 16;
      }
      *reinterpret_cast<Chunk*>(destination + column + i) = chunk;
    }
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      if (column + i < head_dim) destination[(column + i) * stride_dim] = from_float<T>(x[i]);
  }
}
