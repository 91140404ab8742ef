"""An mbarrier tells only the parity of its phase: a warp whose wait may come two phases late is found under every schedule."""

from __future__ import annotations

import numpy as np
import pytest
from mbarriers import ALL, launch, report

from cuflash.simulator import Options

# One thread fills a slot again and again, four warps pass it on without looking at it.
RING = """__shared__ u64 full, empty;
if (t == 0) { init(&full, 1); init(&empty, ARRIVALS); } __syncthreads();
if (t == 128) for (int i = 0; i < 6; ++i) {
    wait(&empty, i % 2 ^ 1);
    arrive(&full);
}
if (t < 128) for (int i = 0; i < 6; ++i) {
    CONSUME
}"""
BARRIER = 'asm volatile("bar.sync 1, 128;" ::: "memory");'


def ring(consume: str, arrivals: int = 1) -> str:
    return RING.replace("ARRIVALS", str(arrivals)).replace("CONSUME", consume)


RIGHT = {
    "one warp follows": ring("if (t < 32) { wait(&full, i % 2); if (t == 0) arrive(&empty); }"),
    "every warp says that it came": ring("wait(&full, i % 2); if (t % 32 == 0) arrive(&empty);", arrivals=4),
    "every thread says that it came": ring("wait(&full, i % 2); arrive(&empty);", arrivals=128),
    "a barrier before the arrival": ring(f"wait(&full, i % 2); {BARRIER} if (t == 0) arrive(&empty);"),
    "what looks again": ring(f"wait(&full, i % 2); {BARRIER} wait(&full, i % 2); {BARRIER} if (t == 0) arrive(&empty);"),
    "a chain of mbarriers": """__shared__ u64 first, second, third;
if (t == 0) { init(&first, 1); init(&second, 1); init(&third, 1); } __syncthreads();
for (int i = 0; i < 4; ++i) {
    if (t / 32 == 0) { if (i > 0) wait(&third, i - 1 & 1); if (t == 0) arrive(&first); }
    if (t / 32 == 1) { wait(&first, i & 1); if (t == 32) arrive(&second); }
    if (t / 32 == 2) { wait(&second, i & 1); if (t == 64) arrive(&third); }
}""",
    "bytes that a thread reports itself": """__shared__ u64 m;
if (t == 0) {
    init(&m, 1);
    for (int i = 0; i < 4; ++i) { arrive_expect(&m, 16); wait(&m, i % 2 ^ 1); complete(&m, 16); }
    wait(&m, 1);
}""",
    "the last phase": """__shared__ u64 m;
if (t == 0) init(&m, 32); __syncthreads();
if (t < 32) arrive(&m);
wait(&m, 0);""",
}
WRONG = {
    "all warps pass it on and one of them says so": ring("wait(&full, i % 2); if (t == 0) arrive(&empty);"),
    "a barrier that comes before the wait": ring(f"{BARRIER} wait(&full, i % 2); if (t == 0) arrive(&empty);"),
    "three of four say so": ring("wait(&full, i % 2); if (t % 32 == 0 && t < 96) arrive(&empty);", arrivals=3),
    "a warp that only watches": ring("if (t < 64) wait(&full, i % 2); if (t == 0) arrive(&empty);"),
}


@pytest.mark.parametrize("kernel", RIGHT)
@pytest.mark.parametrize("options", ALL)
def test_waits_that_are_in_time(kernel: str, options: Options) -> None:
    launch(RIGHT[kernel], options=options, block=160)


@pytest.mark.parametrize("kernel", WRONG)
@pytest.mark.parametrize("options", ALL)
def test_waits_that_may_be_late(kernel: str, options: Options) -> None:
    text = report(WRONG[kernel], options=options, block=160)
    if options.schedule == "random" and "[late-wait]" not in text:
        assert "[deadlock]" in text  # the schedule made a warp so late that it hung before it could be noticed
        return
    assert text.startswith("[late-wait] nothing orders this wait of warp ")
    assert "for phase 0 of the mbarrier at byte 0 of shared memory, before the end of phase 1" in text
    assert "a warp that comes only then sees the old parity again and waits for ever" in text
    assert "mbarrier.try_wait.parity" in text
    assert "arrive(&full);" in text  # what ended the phase


@pytest.mark.parametrize("options", ALL)
def test_a_wait_that_a_fresh_mbarrier_lets_pass(options: Options) -> None:
    """The first wait of a producer finds a slot that nobody has used; two warps do it, one of them goes on."""
    body = """__shared__ u64 full, empty;
if (t == 0) { init(&full, 1); init(&empty, 1); } __syncthreads();
if (t >= 32) { wait(&empty, 1); if (t == 32) arrive(&full); }
if (t == 0) { wait(&full, 0); arrive(&empty); }"""
    launch(body, options=options, block=64)
    text = report(body, options=options, block=96)
    assert "[late-wait]" in text or "[deadlock]" in text
    if options.schedule != "random":
        assert "wait of warp 2, which only an mbarrier without completed phases lets pass" in text


def test_without_checks_nothing_is_said() -> None:
    launch(WRONG["all warps pass it on and one of them says so"], options=Options(threads=1, checks=False), block=160)


@pytest.mark.parametrize("options", ALL)
def test_copies_bring_the_waits_of_who_issued_them(options: Options) -> None:
    """Only cp.async arrives at `full`, and only an asynchronous store brings its bytes: the waits before them count."""
    body = """__shared__ u64 full, empty; __shared__ __align__(16) int slot[32];
if (t == 0) { init(&full, 32); init(&empty, 32); } __syncthreads();
if (t < 32) for (int i = 0; i < 4; ++i) {
    wait(&empty, i % 2 ^ 1);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(address(slot + t)), "l"(a + t) : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(address(&full)) : "memory");
}
else for (int i = 0; i < 4; ++i) {
    wait(&full, i % 2);
    b[t - 32] = slot[t - 32];
    arrive(&empty);
}"""
    source, out = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    launch(body, source, out, options=options, block=64)
    assert (out == source).all()
