// A ring of STAGES tiles in shared memory between one warp that asks for copies and warpgroups that compute: a place in it, and the mbarriers that
// hand its tiles to and fro. Each side has a ring of its own and goes through the tiles in the same order.
#pragma once
#include "ptx/mbarrier.cuh"
#include "ptx/warpgroup.cuh"

template <int STAGES>
class Ring {
 public:
  int stage = 0;  // of the tile whose turn it is

  static constexpr int BYTES = 2 * STAGES * MBARRIER_BYTES;

  // `barriers`: BYTES of them, all "full" ones first.
  DEVICE explicit Ring(SmemAddress barriers) : barriers(barriers) {}

  // One thread, before any other looks at the barriers. So many arrivals make a stage empty, and so many full.
  DEVICE void init(int arrivals, int full_arrivals = 1) const {
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(barriers + i * MBARRIER_BYTES, full_arrivals);
      mbarrier_init(barriers + (STAGES + i) * MBARRIER_BYTES, arrivals);
    }
  }

  DEVICE SmemAddress full() const { return barriers + stage * MBARRIER_BYTES; }

  DEVICE void wait_full() const { mbarrier_wait(full(), parity); }

  // The same of a barrier besides, of which there is one for each stage.
  DEVICE void wait_at(SmemAddress barriers) const { mbarrier_wait(barriers + stage * MBARRIER_BYTES, parity); }

  // At first every stage is empty.
  DEVICE void wait_empty() const { mbarrier_wait(empty(), parity ^ 1); }

  DEVICE void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }

  // This warpgroup is done with the tile, and goes on to the next. One thread says so, that of lane 0 of a warp: with another warp for each of
  // several rings, arrivals stay single instructions, while two of one thread would be made a branch.
  DEVICE void release(int warp) {
    mbarrier_arrive_if(threadIdx.x % WARPGROUP_SIZE == warp * WARP_SIZE, empty());
    advance();
  }

  // The same where each warp says so for itself.
  DEVICE void release_by_each_warp() {
    mbarrier_arrive_if(threadIdx.x % WARP_SIZE == 0, empty());
    advance();
  }

 private:
  SmemAddress barriers;
  uint32 parity = 0;  // of the phase in which the tile is full

  DEVICE SmemAddress empty() const { return barriers + (STAGES + stage) * MBARRIER_BYTES; }
};
