// Barriers in shared memory at which threads and asynchronous copies arrive. PTX ISA 9.7.13.15 "mbarrier".
//
// A barrier is a 64-bit word and goes through phases. One ends when as many threads have arrived as the barrier was made for, and all bytes that were
// announced have come. A wait knows a phase by its parity alone: whoever waits must do so before the next phase ends.
#pragma once
#include "ptx/memory.cuh"

constexpr int MBARRIER_BYTES = 8;

DEVICE void mbarrier_init(SmemAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the barriers that this thread has made known to asynchronous copies.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives and announces so many bytes of copies.
DEVICE void mbarrier_arrive_expect(SmemAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void mbarrier_arrive(SmemAddress barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Where `arrives` holds. A predicate of the instruction itself: a branch would cut the schedule of what lies around it.
DEVICE void mbarrier_arrive_if(bool arrives, SmemAddress barrier) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p mbarrier.arrive.shared::cta.b64 _, [%1]; }" ::"r"(int(arrives)), "r"(barrier) : "memory");
}

// Arrives when all copies that this thread has begun by cp.async are complete: one of the arrivals that the barrier was made for.
DEVICE void mbarrier_arrive_behind_copies(SmemAddress barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Returns when the phase of this parity has ended. Before a barrier's first phase, that of parity 1 has.
DEVICE void mbarrier_wait(SmemAddress barrier, uint32 parity) {
  asm volatile("{ .reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(barrier), "r"(parity)
               : "memory");
}
