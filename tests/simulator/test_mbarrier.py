"""mbarrier: phases, arrivals, transaction counts, waits in every form, and what is reported when a kernel uses one wrongly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from mbarriers import ALL, SCHEDULES, launch, report
from simulated import run_ptx

from cuflash.errors import SimulatorError
from cuflash.simulator import Options

SETUP = "__shared__ u64 m[2]; if (t == 0) { init(m, %d); init(m + 1, 1); } __syncthreads();"


@pytest.mark.parametrize("options", ALL)
def test_phases_and_parity(options: Options) -> None:
    """A wait for parity 1 passes at once in phase 0; after each completed phase the parities swap."""
    out = np.zeros(8, np.int32)
    body = (
        (SETUP % 2)
        + """
    if (t == 0) for (int i = 0; i < 4; ++i) {
        a[2 * i] = test(m, 0), a[2 * i + 1] = test(m, 1);
        arrive(m);
        if (test(m, i % 2)) a[0] = 99;
        arrive(m);
        wait(m, i % 2);
    }"""
    )
    launch(body, out, options=options)
    assert out.tolist() == [0, 1, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("options", ALL)
def test_wait_by_state(options: Options) -> None:
    body = (
        (SETUP % 64)
        + """
    __shared__ int data[64];
    for (int i = 0; i < 3; ++i) {
        data[t] = a[t] + i;
        u64 state = arrive_state(m);
        asm volatile("{.reg .pred p;\\nAGAIN: mbarrier.try_wait.shared::cta.b64 p, [%0], %1, 1000;\\n@!p bra AGAIN;}"
            :: "r"(address(m)), "l"(state) : "memory");
        a[t] = data[63 - t];
        state = arrive_state(m);
        asm volatile("{.reg .pred p;\\nAGAIN: mbarrier.test_wait.acquire.cta.shared::cta.b64 p, [%0], %1;\\n@!p bra AGAIN;}"
            :: "r"(address(m)), "l"(state) : "memory");
    }"""
    )
    out = np.arange(64, dtype=np.int32)
    launch(body, out, options=options, block=64)
    assert out.tolist() == [63 - t + 3 for t in range(64)]


def test_arrivals_with_counts_and_pending_count() -> None:
    out = np.zeros(6, np.int32)
    body = (
        (SETUP % 10)
        + """
    if (t == 0) {
        u64 s; u32 n;
        asm volatile("mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %0, [%1], 3;" : "=l"(s) : "r"(address(m)) : "memory");
        asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(n) : "l"(s)); a[0] = n;
        asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 %0, [%1], 2;" : "=l"(s) : "r"(address(m)) : "memory");
        asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(n) : "l"(s)); a[1] = n;
        a[2] = test(m, 0);
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0], 5;" :: "r"(address(m)) : "memory");
        a[3] = test(m, 0);
        asm volatile("mbarrier.arrive_drop.noComplete.shared.b64 %0, [%1], 6;" : "=l"(s) : "r"(address(m)) : "memory");
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 4;" :: "r"(address(m)) : "memory");
        a[4] = test(m, 1);
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 4;" :: "r"(address(m)) : "memory");
        a[5] = test(m, 0);
    }"""
    )
    launch(body, out)
    assert out.tolist() == [10, 7, 0, 1, 1, 1]


def test_generic_addresses() -> None:
    body = """__shared__ u64 m;
    if (t == 0) {
        asm volatile("mbarrier.init.b64 [%0], 1;" :: "l"(&m) : "memory");
        asm volatile("mbarrier.arrive.b64 _, [%0];" :: "l"(&m) : "memory");
        wait(&m, 0);
        asm volatile("mbarrier.inval.b64 [%0];" :: "l"(&m) : "memory");
        m = 5;
        a[0] = m;
        asm volatile("mbarrier.init.b64 [%0], 1;" :: "l"(&m) : "memory");
        a[1] = test(&m, 0);
    }"""
    out = np.zeros(2, np.int32)
    launch(body, out)
    assert out.tolist() == [5, 0]
    text = report('asm volatile("mbarrier.init.b64 [%0], 1;" :: "l"(a + t * 2) : "memory");', np.zeros(64, np.int32))
    assert "[shared-bounds] mbarrier.init at the generic address" in text


@pytest.mark.parametrize("options", ALL)
def test_transaction_bytes(options: Options) -> None:
    """A phase needs its arrivals and as many bytes as were announced, in any order."""
    body = (
        (SETUP % 1)
        + """
    if (t == 0) {
        complete(m, 16);
        a[0] = test(m, 0);
        expect(m, 48);
        arrive_expect(m, 16);
        a[1] = test(m, 0);
        complete(m, 32);
        a[2] = test(m, 0);
        complete(m, 16);
        a[3] = test(m, 0);
    }"""
    )
    out = np.zeros(4, np.int32)
    launch(body, out, options=options)
    assert out.tolist() == [0, 0, 0, 1]


RING = """
    __shared__ u64 full[3], empty[3];
    __shared__ int data[3][32];
    if (t == 0) for (int s = 0; s < 3; ++s) init(full + s, FULL), init(empty + s, EMPTY);
    __syncthreads();
    if (t < 32) {
        for (int i = 0; i < 10; ++i) {
            WAIT_EMPTY
            data[i % 3][t] = a[i * 32 + t];
            SIGNAL_FULL
        }
    } else {
        int sum = 0;
        for (int i = 0; i < 10; ++i) {
            WAIT_FULL
            sum += data[i % 3][31 - t % 32] * (i + 1);
            SIGNAL_EMPTY
        }
        b[t - 32] = sum;
    }"""
WAIT_EMPTY, WAIT_FULL = "wait(empty + i % 3, i / 3 % 2 ^ 1);", "wait(full + i % 3, i / 3 % 2);"


def ring(options: Options, **changes: str) -> bool:
    """A producer warp and two consumer warps with ordinary stores; True if the result is right."""
    parts = {
        "WAIT_EMPTY": WAIT_EMPTY,
        "WAIT_FULL": WAIT_FULL,
        "SIGNAL_FULL": "__syncwarp(); if (t % 32 == 0) arrive(full + i % 3);",
        "SIGNAL_EMPTY": "__syncwarp(); if (t % 32 == 0) arrive(empty + i % 3);",
        "FULL": "1",
        "EMPTY": "2",
    } | changes
    body = RING
    for name, text in parts.items():
        body = body.replace(name, text)
    data, out = np.random.default_rng(0).integers(0, 100, (10, 32)).astype(np.int32), np.zeros(64, np.int32)
    launch(body, data, out, options=options, block=96)
    expected = (data[:, ::-1] * np.arange(1, 11)[:, None]).sum(0)
    return bool((out.reshape(2, 32) == expected).all())


@pytest.mark.parametrize("options", ALL)
def test_ring(options: Options) -> None:
    assert ring(options)
    assert ring(options, SIGNAL_EMPTY="arrive(empty + i % 3);", EMPTY="64")
    assert ring(options, SIGNAL_FULL="arrive(full + i % 3);", FULL="32")


@pytest.mark.parametrize("options", SCHEDULES)
def test_ring_bugs(options: Options) -> None:
    with pytest.raises(
        SimulatorError, match=r"\[race\] 4-byte store .* earlier read by warp|\[deadlock\].* waited for by warp [12], is in phase \d"
    ):
        ring(options, WAIT_EMPTY="")  # a producer that gets ahead by whole phases leaves its consumers waiting
    with pytest.raises(SimulatorError, match=r"\[(race|uninitialized)\] 4-byte load"):
        ring(options, WAIT_FULL="")
    with pytest.raises(SimulatorError, match=r"\[race\] 4-byte store .* earlier read by warp"):  # lane 0 speaks for lanes that still read
        ring(options, SIGNAL_EMPTY="if (t % 32 == 0) arrive(empty + i % 3);")
    with pytest.raises(SimulatorError, match=r"\[race\] 4-byte load .* earlier write by warp 0"):
        ring(options, SIGNAL_FULL="if (t % 32 == 0) arrive(full + i % 3);")
    relaxed = 'asm volatile("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%0];" :: "r"(address(full + i % 3)) : "memory");'
    with pytest.raises(SimulatorError, match=r"\[race\] 4-byte load .* earlier write by warp 0"):
        ring(options, SIGNAL_FULL=relaxed, FULL="32")
    wait = "{.reg .pred p;\\nAGAIN: mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 p, [%0], %1;\\n@!p bra AGAIN;}"
    with pytest.raises(SimulatorError, match=r"\[race\] 4-byte load .* earlier write by warp 0"):
        ring(options, WAIT_FULL=f'asm volatile("{wait}" :: "r"(address(full + i % 3)), "r"(i / 3 % 2) : "memory");')


@pytest.mark.parametrize("options", SCHEDULES)
def test_deadlock(options: Options) -> None:
    text = report(
        (SETUP % 3) + "\nif (t < 2) arrive(m + 1);\nif (t == 5) expect(m, 512);\nif (t < 2) arrive(m);\nwait(m, 0);",
        options=options,
        block=64,
    )
    assert "[mbarrier] 1 arrivals at the mbarrier at byte 8" not in text
    assert "[deadlock]" in text
    assert "the mbarrier at byte 0 of shared memory, waited for by warp" in text
    assert "is in phase 0, which lacks 1 of 3 arrivals and 512 of 512 bytes" in text
    assert "mbarrier.try_wait.parity" in text
    polling = report((SETUP % 3) + "\nwhile (!test(m, 0)) {}", options=options)
    assert "[deadlock] nobody gets on" in polling
    assert "lacks 3 of 3 arrivals" in polling


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("arrive(m);", "nobody has initialised it"),
        ("wait(m, 0);", "nobody has initialised it"),
        ("init(m, 1); ((volatile u64*)m)[0] = 7; arrive(m);", "mbarrier.arrive: the mbarrier at byte 0 of shared memory was overwritten"),
        ("init(m, 1); init(m, 1);", "is initialised again before mbarrier.inval"),
        ("init(m, 0);", "an mbarrier that expects 0 arrivals; 1 to 1048575 are possible"),
        ("init(m, 1 << 20);", "an mbarrier that expects 1048576 arrivals"),
        (
            "init(m, 2); expect(m, 16); arrive(m); arrive(m); arrive(m);",
            "1 arrivals at the mbarrier at byte 0 of shared memory, whose phase 0 lacks 0 of 2",
        ),
        ("init(m, 1); expect(m, 1 << 20);", "expects 1048576 more bytes, at most 1048575 are possible"),
        ("init(m, 2); expect(m, 1000000); expect(m, 48576);", "expects 1048576 more bytes"),
        ("init(m, 2); complete(m, 1000000); complete(m, 48576);", "1048576 bytes more than were announced"),
        (
            "init(m, 1); expect(m, 16); complete(m, 32); arrive(m);",
            "has all arrivals and expects 16 bytes, but copies of 32 bytes were issued in it",
        ),
        (
            "init(m, 1); arrive_expect(m, 16); complete(m, 32);",
            "has all arrivals and expects 16 bytes, but copies of 32 bytes were issued in it",
        ),
        (
            'init(m, 2); asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 3;" :: "r"(address(m)) : "memory");',
            "3 arrivals at the mbarrier at byte 0 of shared memory, whose phase 0 lacks 2 of 2",
        ),
        (
            'init(m, 1); u64 s; asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 1;" : "=l"(s) : "r"(address(m)) : "memory");',
            "mbarrier.arrive.noComplete completes phase 0",
        ),
        (
            "init(m, 1); u64 s = arrive_state(m); arrive(m);"
            'asm volatile("{.reg .pred p; mbarrier.test_wait.shared.b64 p, [%0], %1;}" :: "r"(address(m)), "l"(s) : "memory");',
            "for phase 0 of the mbarrier",
        ),
        (
            "init(m, 1); init(m + 1, 1); u64 s = arrive_state(m);"
            'asm volatile("{.reg .pred p; mbarrier.test_wait.shared.b64 p, [%0], %1;}" :: "r"(address(m + 1)), "l"(s) : "memory");',
            "a state is good for its own mbarrier",
        ),
    ],
)
def test_misuse(body: str, message: str, options: Options) -> None:
    text = report("__shared__ u64 m[2];\n" + f"if (t == 0) {{ {body} }}", options=options)
    assert "[mbarrier]" in text
    assert message in text
    assert "test.cu:4" in text


def test_misaligned() -> None:
    assert "[misaligned] mbarrier.init" in report("__shared__ u64 m[2];\ninit((u64*)((char*)m + 4), 1);")


@pytest.mark.parametrize("options", SCHEDULES)
def test_bytes_left_over(options: Options) -> None:
    text = report("__shared__ u64 m;\nif (t == 0) {\ninit(&m, 1);\nexpect(&m, 64);\n}", options=options)
    assert "[leftover] the block ends, but phase 0 of the mbarrier at byte 0 of shared memory still expects 64 bytes" in text


@pytest.mark.parametrize("options", SCHEDULES)
def test_unordered_initialisation(options: Options) -> None:
    text = report(
        "__shared__ u64 m;\nif (t == 0) init(&m, 32);\nif (t < 32) __syncwarp();\nif (t >= 32) arrive(&m);", block=64, options=options
    )
    assert "[race] mbarrier.arrive" in text or "nobody has initialised it" in text
    text = report("__shared__ u64 m;\nif (t == 0) init(&m, 32);\narrive(&m);", options=options)
    assert "[race] mbarrier.arrive at byte 0 of shared memory (lane 1) and an earlier write by warp 0, lane 0" in text
    text = report(
        (SETUP % 64)
        + '\narrive(m);\n__syncwarp();\nif (t == 0) asm volatile("mbarrier.inval.shared.b64 [%0];" :: "r"(address(m)) : "memory");',
        block=64,
        options=options,
    )
    assert "[race] mbarrier.inval" in text or "nobody has initialised it" in text


def test_too_many_mbarriers() -> None:
    launch("__shared__ u64 m[64]; if (t == 0) for (int i = 0; i < 64; ++i) init(m + i, 1);")
    text = report("__shared__ u64 m[65]; if (t == 0) for (int i = 0; i < 65; ++i) init(m + i, 1);")
    assert "[unsupported] a block with more than 64 mbarriers" in text
    body = "__shared__ u64 m; if (t == 0) init(&m, 1);"
    launch(body, block=1024, cluster=8)
    assert "[unsupported] a cluster of so many warps and mbarriers" in report(body, block=1024, cluster=16)


@pytest.mark.parametrize(
    "instruction",
    [
        "mbarrier.test_wait.parity.shared::cluster.b64 p, [r], 0;",
        "mbarrier.arrive.shared::cluster.b64 s, [r];",
        "mbarrier.init.odd.b64 [r], 1;",
        "mbarrier.init.global.b64 [s], 1;",
    ],
)
def test_unsupported_forms(instruction: str) -> None:
    ptx = f""".version 8.3
.target sm_90a
.address_size 64
.visible .entry k() {{ .reg .pred p; .reg .b32 r; .reg .b64 s; {instruction} ret; }}"""
    with pytest.raises(SimulatorError, match="does not support"):
        run_ptx(ptx)


def test_divergent_waits() -> None:
    """Lanes that wait for different phases go on when theirs has completed."""
    body = (
        (SETUP % 1)
        + """
    if (t < 32) {
        wait(m + t % 2, 0);
        a[t] = 1;
        if (t == 0) arrive(m + 1);
    } else if (t == 32) {
        arrive(m);
    }"""
    )
    for options in ALL:
        out = np.zeros(32, np.int32)
        launch(body, out, options=options, block=64)
        assert out.tolist() == [1] * 32


@pytest.mark.parametrize("options", SCHEDULES)
def test_initialised_again(options: Options) -> None:
    """An alarm with checks; without, the mbarrier starts anew, as on a GPU."""
    body = (SETUP % 1) + "if (t == 0) { init(m, 2); arrive(m); arrive(m); } __syncthreads(); wait(m, 0); a[t] = 1 + test(m, 1);"
    assert "[mbarrier] the mbarrier at byte" in (text := report(body, np.zeros(32, np.int32), options=options))
    assert "is initialised again before mbarrier.inval" in text
    out = np.zeros(32, np.int32)
    launch(body, out, options=dataclasses.replace(options, checks=False))
    assert out.tolist() == [1] * 32


def test_without_checks() -> None:
    out = np.zeros(64, np.int32)
    body = (SETUP % 64) + "arrive(m); wait(m, 0); a[t] = test(m, 0);"
    launch(body, out, options=Options(threads=1, checks=False), block=64)
    assert out.tolist() == [1] * 64
