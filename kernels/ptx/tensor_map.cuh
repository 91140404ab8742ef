// Copies of boxes of tensors by the TMA unit. PTX ISA 9.7.9.27 "cp.async.bulk.tensor".
#pragma once
#include "ptx/memory.cuh"

// What the driver's cuTensorMapEncodeTiled says of a tensor and its boxes (cuflash/runtime/tensor_maps.py). Opaque.
struct alignas(64) TensorMap {
  uint8 bytes[128];
};

// The box whose first element has these coordinates, the innermost first; what lies outside the tensor comes as zeros. The bytes of a whole box
// arrive at the mbarrier.
DEVICE void load_box(SmemAddress destination, const TensorMap& map, int column, int row, int head, int batch, SmemAddress mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(destination),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(mbarrier)
      : "memory");
}

// The other way round; what lies outside the tensor is left out. The copy is one of those of this thread that the next `commit_stores` makes a group.
DEVICE void store_box(const TensorMap& map, int column, int row, int head, int batch, SmemAddress source) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map), "r"(column), "r"(row),
               "r"(head), "r"(batch), "r"(source)
               : "memory");
}

DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all groups of this thread have read shared memory; when what they write is there, nobody knows before the kernel ends.
DEVICE void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
