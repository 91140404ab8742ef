"""mbarriers and the registers of warpgroups, GPU against simulator: what each test of a phase answers, and that kernels which move registers still compute."""

from __future__ import annotations

from typing import Any

import numpy
from calibration import Both

# One thread alone, so that every answer is certain.
PHASES = """
extern "C" __global__ void phases(u32* out, const u32* in) {
  extern __shared__ __align__(1024) u32 s[];
  __shared__ u64 barriers[2];
  u32 b = address(barriers), c = b + 8, n = 0;
  if (threadIdx.x != 0) return;
  u64 state;
  u32 pending;
#define TESTS out[n++] = test(b, 0); out[n++] = test(b, 1);
#define ARRIVE(BARRIER) asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(BARRIER) : "memory"); \\
  asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(pending) : "l"(state)); out[n++] = pending;
#define EXPECT(BYTES) asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(BYTES) : "memory");
#define COMPLETE(BYTES) asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(BYTES) : "memory");
  init(b, 2);
  init(c, 1);
  fences();
  TESTS                      // nothing has happened: the phase before is complete
  ARRIVE(b) TESTS            // one of two
  ARRIVE(b) TESTS            // phase 0 complete
  ARRIVE(b) TESTS
  EXPECT(64) ARRIVE(b) TESTS // all have arrived, bytes are missing
  COMPLETE(48) TESTS
  COMPLETE(16) TESTS         // phase 1 complete
  EXPECT(32) COMPLETE(32) TESTS
  ARRIVE(b) ARRIVE(b) TESTS  // phase 2 complete
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1], 2;" : "=l"(state) : "r"(b) : "memory");
  TESTS                      // phase 3, both at once
  asm volatile("mbarrier.arrive_drop.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(b) : "memory");
  TESTS ARRIVE(b) TESTS      // phase 4, with one fewer from now on
  ARRIVE(b) TESTS            // phase 5 needs one
  expect(b, 1024);           // arrives
  TESTS
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 1024, [%2];" :: "r"(address(s)), "l"(in), "r"(b) : "memory");
  out[n++] = wait(b, 0);     // phase 6
  out[n++] = s[17];
  TESTS
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" :: "r"(c) : "memory");
  asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
}
"""


def test_phases_of_an_mbarrier(both: Both) -> None:
    words = numpy.arange(256, dtype=numpy.uint32) * 7
    arguments = [("array", numpy.full(64, 99, numpy.uint32)), ("array", words)]
    out = both("mbarrier phases", PHASES, "phases", arguments, shared=1024)
    assert out[:2].tolist() == [0, 1]  # the phase of parity 1 is the one before the first
    assert out[5:8].tolist() == [1, 1, 0]


HANDOVER = """
// Eight values through a ring of two buffers from warp 0 to warps 4 to 11, with registers moved as in an attention kernel.
extern "C" __global__ void __launch_bounds__(384, 1) registers(float* out, const float* in, int rounds) {
  __shared__ u64 barriers[4];
  __shared__ float ring[2][256];
  u32 full = address(barriers), empty = full + 16, t = threadIdx.x;
  if (t == 0) for (int i = 0; i < 2; ++i) { init(full + 8 * i, 128); init(empty + 8 * i, 256); }
  fences();
  __syncthreads();
  if (t < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    for (int i = 0; i < rounds; ++i) {
      if (i >= 2) wait(empty + 8 * (i % 2), (i / 2 - 1) & 1);
      ring[i % 2][t] = in[i * 256 + t];
      ring[i % 2][t + 128] = in[i * 256 + t + 128];
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(full + 8 * (i % 2)) : "memory");
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    u32 own = t - 128;
    float x[64];
    for (int i = 0; i < 64; ++i) x[i] = i;
    for (int i = 0; i < rounds; ++i) {
      wait(full + 8 * (i % 2), (i / 2) & 1);
      float y = ring[i % 2][(own * 5 + i) % 256];
      for (int j = 0; j < 64; ++j) x[j] = x[j] * 0.5f + y;
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(empty + 8 * (i % 2)) : "memory");
    }
    for (int i = 0; i < 64; ++i) out[own * 64 + i] = x[i];
  }
}
"""


def test_registers_move_between_warpgroups(both: Both) -> None:
    values = numpy.random.default_rng(0).standard_normal((8, 256)).astype(numpy.float32)
    arguments: list[tuple[str, Any]] = [("array", numpy.zeros((256, 64), numpy.float32)), ("array", values), ("i", 8)]
    x = numpy.tile(numpy.arange(64, dtype=numpy.float32), (256, 1))
    for i in range(8):
        x = x * numpy.float32(0.5) + values[i, (numpy.arange(256) * 5 + i) % 256][:, None]  # exact halves: fused or not is the same
    both("setmaxnreg", HANDOVER, "registers", arguments, expected=x, block=384)


NAMED = """
extern "C" __global__ void named(u32* out, int rounds) {
  __shared__ volatile u32 turn[64];
  u32 side = threadIdx.x / 128, own = 1 + side, other = 2 - side;
  if (threadIdx.x < 64) turn[threadIdx.x] = 0;
  __syncthreads();
  if (side == 1) asm volatile("bar.arrive %0, 256;" :: "r"(other) : "memory");
  for (int i = 0; i < rounds; ++i) {
    asm volatile("bar.sync %0, 256;" :: "r"(own) : "memory");
    if (threadIdx.x % 128 == 0) turn[2 * i + side] = side == 0 ? (i ? turn[2 * i - 1] : 0) + 1 : turn[2 * i] * 2;
    if (side == 0 || i + 1 < rounds) asm volatile("bar.arrive %0, 256;" :: "r"(other) : "memory");
  }
  __syncthreads();
  if (threadIdx.x < 64) out[threadIdx.x] = turn[threadIdx.x];
}
"""


def test_named_barriers_take_turns(both: Both) -> None:
    expected, value = numpy.zeros(64, numpy.uint32), 0
    for i in range(10):
        expected[2 * i], value = value + 1, (value + 1) * 2
        expected[2 * i + 1] = value
    both("named barriers", NAMED, "named", [("array", numpy.zeros(64, numpy.uint32)), ("i", 10)], expected=expected, block=256)
