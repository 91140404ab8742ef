// Which of the sequences that are packed one behind the other a row is of.
#pragma once
#include "ptx/types.cuh"

// By bisection of the sequences' first rows, which ascend and end with the first row that is nobody's; -1 of such rows.
DEVICE int sequence_of_row(const int* offsets, int num_sequences, int row) {
  int low = 0, high = num_sequences;
  if (row >= offsets[high]) return -1;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (offsets[middle] <= row ? low : high) = middle;
  }
  return low;
}
