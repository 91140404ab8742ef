"""cp.async.bulk and its kin: where bytes go, when they move, what completes, and what is reported when a kernel does not wait."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from mbarriers import ALL, SCHEDULES, launch, report
from simulated import run_ptx

from cuflash.errors import SimulatorError
from cuflash.simulator import Options

SETUP = """__shared__ __align__(128) int s[1024]; __shared__ __align__(8) u64 m[2];
if (t == 0) { init(m, 1); init(m + 1, 1); fence_init(); } __syncthreads();
"""


def numbers(*shape: int) -> npt.NDArray[np.int32]:
    """Different numbers."""
    return np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype(np.int32)


@pytest.mark.parametrize("options", ALL)
@pytest.mark.parametrize("target", ["shared::cluster", "shared::cta"])
def test_load(options: Options, target: str) -> None:
    body = (
        SETUP
        + """
if (t == 0) {
    arrive_expect(m, 4096);
    for (int i = 0; i < 4; ++i)
        asm volatile("cp.async.bulk.TARGET.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
            :: "r"(address(s + 256 * (3 - i))), "l"(a + 256 * i), "r"(1024), "r"(address(m)), "l"(0ll) : "memory");
}
wait(m, 0);
for (int i = t; i < 1024; i += 64) b[i] = s[i];
""".replace("TARGET", target)
    )
    data, out = numbers(4, 256), np.zeros((4, 256), np.int32)
    counters = launch(body, data, out, options=options, block=64)
    np.testing.assert_array_equal(out, data[::-1])
    assert counters.async_copies == 4


@pytest.mark.parametrize("options", ALL)
def test_store(options: Options) -> None:
    body = (
        SETUP
        + """
for (int i = t; i < 1024; i += 32) s[i] = a[i];
fence_async();
__syncthreads();
if (t < 4) {
    store(b + 256 * t, s + 256 * (3 - t), 1024);
    commit();
    wait_group<0>();
    c[t] = ((volatile int*)b)[256 * t];
}
"""
    )
    data, out, first = numbers(4, 256), np.zeros((4, 256), np.int32), np.zeros(4, np.int32)
    launch(body, data, out, first, options=options)
    np.testing.assert_array_equal(out, data[::-1])
    np.testing.assert_array_equal(first, data[::-1, 0])


def test_groups_complete_when_waited_for() -> None:
    """Late: waiting until one group is left writes the first one only; with .read its source may change, but nothing is written yet."""
    body = (
        SETUP
        + """
if (t == 0) {
    s[0] = 1, s[4] = 2;
    fence_async();
    store(a, s, 16); commit();
    store(a + 4, s + 4, 16); commit();
    wait_group<1>();
    b[0] = ((volatile int*)a)[0], b[1] = ((volatile int*)a)[4];
    s[0] = 3;
    fence_async();
    store(a, s, 16); commit();
    wait_read<0>();
    s[0] = 4;
    b[2] = ((volatile int*)a)[0], b[3] = ((volatile int*)a)[4];
    wait_group<0>();
    b[4] = ((volatile int*)a)[0], b[5] = ((volatile int*)a)[4];
}
"""
    )
    body = body.replace("s[0] = 1, s[4] = 2;", "for (int i = 0; i < 8; ++i) s[i] = 1 + i / 4;")
    seen = {}
    for schedule in ("early", "late"):
        out, values = np.zeros(8, np.int32), np.zeros(6, np.int32)
        launch(body, out, values, options=Options(threads=1, schedule=schedule))  # type: ignore[arg-type]
        seen[schedule] = values.tolist()
    assert seen == {"early": [1, 2, 3, 2, 3, 2], "late": [1, 0, 1, 0, 3, 2]}


REDUCTIONS: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda a, b: np.where(a >= b, 0, a + 1),
    "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - 1),
}
DTYPES = {
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "b32": np.uint32,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
FORMS = [
    *(("add", kind) for kind in ("u32", "s32", "u64", "f32", "f64", "noftz.f16", "noftz.bf16")),
    *((operation, kind) for operation in ("min", "max") for kind in ("u32", "s32", "u64", "s64", "f16", "bf16")),
    *((operation, "u32") for operation in ("inc", "dec")),
    *((operation, kind) for operation in ("and", "or", "xor") for kind in ("b32", "b64")),
]


def operands(kind: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Two arrays of 1024 bytes."""
    dtype = np.dtype(DTYPES[kind.removeprefix("noftz.")])
    rng = np.random.default_rng(1)
    count = 1024 // dtype.itemsize
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        a, b = (rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True) for _ in range(2))
        a[:8], b[:8] = 5, np.arange(8)
        a[8:10] = 0
        return a, b
    return rng.standard_normal(count).astype(dtype), rng.standard_normal(count).astype(dtype)


@pytest.mark.parametrize(("operation", "kind"), FORMS)
def test_reduction_in_global_memory(operation: str, kind: str) -> None:
    old, new = operands(kind)
    body = (
        SETUP
        + f"""
for (int i = t; i < 256; i += 32) s[i] = b[i];
fence_async();
__syncthreads();
if (t == 0) {{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}.{kind} [%0], [%1], 1024;"
        :: "l"(a), "r"(address(s)) : "memory");
    commit();
    wait_group<0>();
}}
"""
    )
    result = old.copy()
    launch(body, result, new)
    expected = REDUCTIONS[operation](old, new)
    assert expected.dtype == old.dtype or operation in ("inc", "dec")
    np.testing.assert_array_equal(result, expected.astype(old.dtype))


def test_f32_reduction_flushes_subnormals() -> None:
    body = (
        SETUP
        + """
for (int i = t; i < 4; i += 32) s[i] = b[i];
fence_async();
__syncwarp();
if (t == 0) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 16;" :: "l"(a), "r"(address(s)) : "memory");
    commit();
    wait_group<0>();
}
"""
    )
    tiny = np.finfo(np.float32).tiny
    result = np.array([1e-40, 1e-40, 1.5 * tiny, -tiny], np.float32)
    launch(body, result, np.array([1e-40, 1.0, -tiny, tiny], np.float32))
    assert result.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("add", "u32"),
        ("add", "s32"),
        ("add", "u64"),
        ("min", "s32"),
        ("max", "u32"),
        ("inc", "u32"),
        ("dec", "u32"),
        ("and", "b32"),
        ("or", "b32"),
        ("xor", "b32"),
    ],
)
@pytest.mark.parametrize("options", SCHEDULES)
def test_reduction_in_shared_memory(operation: str, kind: str, options: Options) -> None:
    """By cp.reduce.async.bulk and, for the first sixteen bytes more, by red.async."""
    old, new = operands(kind)
    constraint, count = ("l", 2) if kind == "u64" else ("r", 4)
    pointer = {"u64": "u64"}.get(kind, "u32")
    body = (
        SETUP
        + f"""
for (int i = t; i < 256; i += 32) s[i] = a[i], s[256 + i] = b[i];
fence_async();
__syncthreads();
if (t == 0) {{
    arrive_expect(m, 1024);
    asm volatile("cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{operation}.{kind} [%0], [%1], 1024, [%2];"
        :: "r"(address(s)), "r"(address(s + 256)), "r"(address(m)) : "memory");
    wait(m, 0);
    arrive_expect(m + 1, 16);
}}
__syncthreads();
if (t < {count})
    asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{operation}.{kind} [%0], %1, [%2];"
        :: "r"(address(({pointer}*)s + t)), "{constraint}"((({pointer}*)b)[t]), "r"(address(m + 1)) : "memory");
wait(m + 1, 0);
for (int i = t; i < 256; i += 32) a[i] = s[i];
"""
    )
    result = old.copy()
    launch(body, result, new, options=options)
    expected = REDUCTIONS[operation](old, new).astype(old.dtype)
    expected[:count] = REDUCTIONS[operation](expected[:count], new[:count])
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("options", ALL)
def test_copy_within_shared_memory(options: Options) -> None:
    body = (
        SETUP
        + """
for (int i = t; i < 128; i += 32) s[i] = a[i];
fence_async();
__syncthreads();
if (t == 0) {
    arrive_expect(m, 512);
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 512, [%2];"
        :: "r"(address(s + 512)), "r"(address(s)), "r"(address(m)) : "memory");
}
wait(m, 0);
s[t] = 0;  // the source has been read
for (int i = t; i < 128; i += 32) b[i] = s[512 + i];
"""
    )
    data, out = numbers(128), np.zeros(128, np.int32)
    launch(body, data, out, options=options)
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("options", ALL)
def test_asynchronous_stores(options: Options) -> None:
    body = (
        SETUP
        + """
if (t == 0) arrive_expect(m, 32 * (4 + 8 + 16));
asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
    :: "r"(address(s + t)), "r"(a[t]), "r"(address(m)) : "memory");
asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.s32 [%0], {%1, %2}, [%3];"
    :: "r"(address(s + 32 + 2 * t)), "r"(a[32 + 2 * t]), "r"(a[33 + 2 * t]), "r"(address(m)) : "memory");
asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u64 [%0], {%1, %2}, [%3];"
    :: "r"(address(s + 96 + 4 * t)), "l"(((u64*)a)[48 + 2 * t]), "l"(((u64*)a)[49 + 2 * t]), "r"(address(m)) : "memory");
wait(m, 0);
for (int i = 0; i < 7; ++i) b[32 * i + t] = s[32 * i + t];
"""
    )
    data, out = numbers(224), np.zeros(224, np.int32)
    launch(body, data, out, options=options)
    np.testing.assert_array_equal(out, data)
    with pytest.raises(SimulatorError, match=r"\[race\] 4-byte load .* and an earlier write by a copy that completes on mbarrier 0"):
        launch(body.replace("wait(m, 0);", ""), data, out, options=options)


@pytest.mark.parametrize("options", ALL)
def test_several_reductions_of_one_address(options: Options) -> None:
    """Asynchronous reductions are atomic: they do not race with each other."""
    body = (
        SETUP
        + """
if (t == 0) { s[0] = 5; arrive_expect(m, 128); }
__syncthreads();
asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.s32 [%0], %1, [%2];"
    :: "r"(address(s)), "r"(t), "r"(address(m)) : "memory");
wait(m, 0);
a[t] = s[0];
"""
    )
    out = np.zeros(32, np.int32)
    launch(body, out, options=options)
    assert out.tolist() == [5 + 31 * 16] * 32


@pytest.mark.parametrize("options", ALL)
@pytest.mark.parametrize("increments", [True, False])
def test_arrival_of_cp_async_at_an_mbarrier(options: Options, increments: bool) -> None:
    """A producer warp copies with cp.async and exits; a consumer warp waits for the mbarrier only."""
    body = (
        SETUP.replace("init(m, 1)", "init(m, COUNT)")
        + """
if (t < 32) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address(s + 4 * t)), "l"(a + 4 * t) : "memory");
    asm volatile("cp.async.mbarrier.arrive.NOINCshared::cta.b64 [%0];" :: "r"(address(m)) : "memory");
    ARRIVE
} else {
    wait(m, 0);
    for (int i = 0; i < 4; ++i) b[32 * i + t - 32] = s[32 * i + t - 32];
}
"""
    )
    body = (
        body.replace("COUNT", "32").replace("NOINC", "" if increments else "noinc.").replace("ARRIVE", "arrive(m);" if increments else "")
    )
    data, out = numbers(128), np.zeros(128, np.int32)
    launch(body, data, out, options=options, block=64)
    np.testing.assert_array_equal(out, data)
    if not increments:
        plain = body.replace("cp.async.mbarrier.arrive.noinc.", "mbarrier.arrive.").replace("b64 [%0]", "b64 _, [%0]")
        plain = plain.replace("} else {", 'asm volatile("cp.async.wait_all;" ::: "memory");\n} else {')
        assert "[race] 4-byte load" in report(plain, data, out, options=options, block=64)


@pytest.mark.parametrize("options", SCHEDULES)
def test_handed_over_copies_that_nobody_waits_for(options: Options) -> None:
    body = (
        SETUP.replace("init(m, 1)", "init(m, 32)")
        + """
asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address(s + 4 * t)), "l"(a + 4 * t) : "memory");
asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(address(m)) : "memory");
"""
    )
    text = report(body, numbers(128), options=options)
    assert "[leftover] the block ends, but nobody waited for the copies of phase 0 of the mbarrier at byte 4096" in text
    assert "test.cu:7: asm volatile" in text


# Two blocks, with no barrier of the cluster: each tells the other by a flag in global memory that it is there, and by one in the shared memory of
# the other what it did before. Addresses of other blocks are made by hand.
CLUSTER = """__shared__ __align__(128) int s[256]; __shared__ u64 full, done; __shared__ u32 ready;
u32 rank; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
u32 other = 2 - rank << 24;
volatile int* flags = (volatile int*)b;
if (t == 0) {
    init(&full, 1); init(&done, 32); fence_init();
    asm volatile("st.release.cluster.shared::cluster.u32 [%0], 1;" :: "r"(address(&ready) | other) : "memory");
    flags[rank] = 1;
    while (flags[1 - rank] == 0) {}
    u32 seen; asm volatile("ld.acquire.cluster.shared.u32 %0, [%1];" : "=r"(seen) : "r"(address(&ready)) : "memory");
}
__syncthreads();
if (rank == 0) {
    SEND
    WAIT_DONE
} else {
    if (t == 0) arrive_expect(&full, 512);
    wait(&full, 0);
    for (int i = t; i < 128; i += 32) c[i] = s[i];
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(address(&done) | other) : "memory");
}
"""
SENDS = {
    "copy": """for (int i = t; i < 128; i += 32) s[i] = a[i];
    fence_async();
    __syncwarp();
    if (t == 0) asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 512, [%2];"
        :: "r"(address(s) | other), "r"(address(s)), "r"(address(&full) | other) : "memory");""",
    "store": """asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
        :: "r"(address(s + 4 * t) | other), "r"(a[4 * t]), "r"(a[4 * t + 1]), "r"(a[4 * t + 2]), "r"(a[4 * t + 3]),
           "r"(address(&full) | other) : "memory");""",
}


@pytest.mark.parametrize("kind", ["copy", "store"])
@pytest.mark.parametrize("options", ALL)
def test_to_another_block(kind: str, options: Options) -> None:
    """The receiver arrives at an mbarrier of the sender, which knows then that its shared memory may be used again."""
    body = CLUSTER.replace("SEND", SENDS[kind]).replace("WAIT_DONE", "wait(&done, 0); s[t] = 0;")
    data, out = numbers(128), np.zeros(128, np.int32)
    launch(body, data, np.zeros(2, np.int32), out, options=options, cluster=2)
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("options", SCHEDULES)
def test_source_in_use_by_another_block(options: Options) -> None:
    body = CLUSTER.replace("SEND", SENDS["copy"]).replace("WAIT_DONE", "s[t] = 0; wait(&done, 0);")
    text = report(body, numbers(128), np.zeros(2, np.int32), np.zeros(128, np.int32), options=options, cluster=2)
    assert (
        "[race] 4-byte store at byte 0 of shared memory (lane 0) and an earlier read by a copy that completes on mbarrier 0 of block 1"
        in text
    )


def test_exit_while_another_block_reads() -> None:
    body = CLUSTER.replace("SEND", SENDS["copy"]).replace("WAIT_DONE", "")
    text = report(body, numbers(128), np.zeros(2, np.int32), np.zeros(128, np.int32), cluster=2)
    assert "[open-copy] a block exits while a copy still reads its shared memory" in text
    mixed = CLUSTER.replace("SEND", SENDS["copy"].replace("address(&full) | other", "address(&full)")).replace("WAIT_DONE", "")
    text = report(mixed, numbers(128), np.zeros(2, np.int32), np.zeros(128, np.int32), cluster=2)
    assert "to block 1 of the cluster completes on an mbarrier of block 0; both must be in one block" in text


@pytest.mark.parametrize("options", SCHEDULES)
def test_deadlock_when_too_much_is_expected(options: Options) -> None:
    text = report(SETUP + "if (t == 0) {\narrive_expect(m, 1040);\nload(s, a, 1024, m);\n}\nwait(m, 0);", numbers(256), options=options)
    assert "[deadlock]" in text
    assert "waited for by warp 0, is in phase 0, which lacks 0 of 1 arrivals and 16 of 1040 bytes" in text


@pytest.mark.parametrize("options", SCHEDULES)
def test_too_little_is_expected(options: Options) -> None:
    text = report(SETUP + "if (t == 0) {\narrive_expect(m, 512);\nload(s, a, 1024, m);\n}\nwait(m, 0);", numbers(256), options=options)
    assert (
        "[mbarrier] phase 0 of the mbarrier at byte 4096 of shared memory has all arrivals and expects 512 bytes, but copies of 1024 bytes"
        in text
    )
    assert "test.cu:7: load(s, a, 1024, m);" in text
    text = report(SETUP + "if (t == 0) {\nload(s, a, 1024, m);\narrive_expect(m, 512);\n}\nwait(m, 0);", numbers(256), options=options)
    assert "[mbarrier] phase 0" in text
    assert "test.cu:7: arrive_expect(m, 512);" in text
    assert "test.cu:6: load(s, a, 1024, m);" in text  # the copy


@pytest.mark.parametrize("options", SCHEDULES)
def test_missing_fence_before_a_store(options: Options) -> None:
    body = (
        SETUP
        + "for (int i = t; i < 64; i += 32) s[i] = i;\nFENCE\n__syncthreads();\nif (t == 0) {\nstore(a, s, 256); commit(); wait_group<0>(); }"
    )
    out = np.zeros(64, np.int32)
    launch(body.replace("FENCE", "fence_async();"), out, options=options)
    assert out.tolist() == list(range(64))
    text = report(body.replace("FENCE", ""), out, options=options)
    assert "[proxy-fence] cp.async.bulk from shared memory at byte 0 of shared memory" in text
    assert "the asynchronous proxy does not see it without a fence.proxy.async" in text
    assert "test.cu:9: store(a, s, 256);" in text
    assert "test.cu:5: for" in text  # the write
    wrong = body.replace("FENCE", "").replace("store(a", "fence_async(); store(a")  # by the reader, which is as good
    launch(wrong, out, options=options)
    for fence in ("fence.proxy.async", "fence.proxy.async.shared::cluster"):
        launch(body.replace("FENCE", f'asm volatile("{fence};" ::: "memory");'), out, options=options)
    for fence in ("fence.proxy.async.global", "fence.proxy.alias", "fence.acq_rel.cta", "fence.mbarrier_init.release.cluster"):
        assert "[proxy-fence]" in report(body.replace("FENCE", f'asm volatile("{fence};" ::: "memory");'), out, options=options)


@pytest.mark.parametrize("options", SCHEDULES)
def test_initialisation_without_a_fence(options: Options) -> None:
    body = SETUP + "if (t == 32) {\narrive_expect(m, 256);\nload(s, a, 256, m);\n}\nwait(m, 0);"
    launch(body, numbers(64), options=options, block=64)
    launch(body.replace("fence_init", "fence_async"), numbers(64), options=options, block=64)
    text = report(body.replace("fence_init();", ""), numbers(64), options=options, block=64)
    assert "[isa-rules] mbarrier of a copy at byte 4096 of shared memory" in text
    assert "test.cu:7: load(s, a, 256, m);" in text
    assert "test.cu:4" in text  # the initialisation


@pytest.mark.parametrize("options", SCHEDULES)
def test_shared_memory_reused_too_soon(options: Options) -> None:
    body = (
        SETUP
        + """
if (t == 0) {
    for (int i = 0; i < 64; ++i) s[i] = i;
    fence_async();
    store(a, s, 256); commit();
    WAIT
    s[5] = 7;
    wait_group<0>();
}
"""
    )
    out = np.zeros(64, np.int32)
    launch(body.replace("WAIT", "wait_read<0>();"), out, options=options)
    assert out.tolist() == list(range(64))
    for wait in ("", "wait_read<1>();", "wait_group<1>();"):
        text = report(body.replace("WAIT", wait), out, options=options)
        assert "[race] 4-byte store at byte 20 of shared memory (lane 0) and an earlier read by bulk copy of warp 0, lane 0" in text
        assert "test.cu:11: s[5] = 7;" in text
        assert "test.cu:9: store(a, s, 256)" in text


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("committed", [True, False])
def test_open_group_at_exit(options: Options, committed: bool) -> None:
    body = (
        SETUP + "for (int i = t; i < 64; i += 32) s[i] = i;\nfence_async();\n__syncthreads();\nif (t == 0) {\nstore(a, s, 256);\nCOMMIT }"
    )
    body = body.replace("COMMIT", "commit();" if committed else "")
    text = report(body, np.zeros(64, np.int32), options=options)
    assert "[open-copy] a thread exits, but nothing waited until its bulk copy had read shared memory" in text
    assert "test.cu:9: store(a, s, 256);" in text
    if committed:
        out = np.zeros(64, np.int32)
        launch(body.replace("commit();", "commit(); wait_read<0>();"), out, options=options)
        assert out.tolist() == list(range(64))


@pytest.mark.parametrize("options", SCHEDULES)
def test_load_that_nobody_waits_for(options: Options) -> None:
    text = report(SETUP + "if (t == 0) {\narrive_expect(m, 256);\nload(s, a, 256, m);\n}", numbers(64), options=options)
    assert "[leftover] the block ends" in text
    assert "test.cu:7: load(s, a, 256, m);" in text


@pytest.mark.parametrize("options", SCHEDULES)
def test_read_before_the_load_has_come(options: Options) -> None:
    body = SETUP + "if (t == 0) {\narrive_expect(m, 256);\nload(s, a, 256, m);\n}\n__syncthreads();\nWAIT\nb[t] = s[t];\nwait(m, 0);"
    launch(body.replace("WAIT", "wait(m, 0);"), numbers(64), np.zeros(32, np.int32), options=options)
    text = report(body.replace("WAIT", ""), numbers(64), np.zeros(32, np.int32), options=options)
    assert "[race] 4-byte load" in text
    assert "an earlier write by a copy that completes on mbarrier 0" in text
    assert "test.cu:11: b[t] = s[t];" in text


RING = """__shared__ __align__(128) int s[STAGES][256]; __shared__ u64 full[STAGES], empty[STAGES];
if (t == 0) { for (int i = 0; i < STAGES; ++i) init(full + i, 1), init(empty + i, 2); fence_init(); }
__syncthreads();
if (t < 32) {
    if (t == 0) for (int i = 0; i < 9; ++i) {
        WAIT_EMPTY
        arrive_expect(full + i % STAGES, 1024);
        load(s[i % STAGES], a + 256 * i, 1024, full + i % STAGES);
    }
} else {
    int sum = 0;
    for (int i = 0; i < 9; ++i) {
        wait(full + i % STAGES, i / STAGES % 2);
        for (int j = 0; j < 8; ++j) sum += s[i % STAGES][j * 32 + 31 - t % 32] * (i + 1);
        RELEASE
    }
    b[t - 32] = sum;
}
"""


def ring(options: Options, stages: int, **changes: str) -> bool:
    """A producer thread, two consumer warps."""
    parts = {
        "WAIT_EMPTY": "wait(empty + i % STAGES, i / STAGES % 2 ^ 1);",
        "RELEASE": "__syncwarp(); if (t % 32 == 0) arrive(empty + i % STAGES);",
    } | changes
    body = RING
    for name, text in parts.items():
        body = body.replace(name, text)
    data, out = np.random.default_rng(0).integers(0, 100, (9, 8, 32)).astype(np.int32), np.zeros(64, np.int32)
    launch(body.replace("STAGES", str(stages)), data, out, options=options, block=96)
    expected = (data.sum(1)[:, ::-1] * np.arange(1, 10)[:, None]).sum(0)
    return bool((out.reshape(2, 32) == expected).all())


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("options", ALL)
def test_ring(options: Options, stages: int) -> None:
    assert ring(options, stages)


@pytest.mark.parametrize("options", SCHEDULES)
def test_ring_bugs(options: Options) -> None:
    race = r"\[race\] cp.async.bulk to shared memory at byte \d+ of shared memory \(lane 0\) and an earlier (read by warp|write by a copy)"
    skipped = race + r"|\[mbarrier\] 1 arrivals at .* lacks 0 of 1"  # late, the bytes of the round before are still missing
    with pytest.raises(SimulatorError, match=skipped):
        ring(options, 2, WAIT_EMPTY="")
    with pytest.raises(SimulatorError, match=skipped):
        ring(options, 2, WAIT_EMPTY="if (i != 5) wait(empty + i % STAGES, i / STAGES % 2 ^ 1);")
    with pytest.raises(SimulatorError, match=race):  # lane 0 speaks for lanes that may still read
        ring(options, 2, RELEASE="if (t % 32 == 0) arrive(empty + i % STAGES);")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("arrive_expect(m, 24); load(s, a, 24, m);", "[bulk-copy] a copy of 24 bytes (lane 0), which is not a multiple of 16"),
        ("load(s + 1, a, 16, m);", "[misaligned] cp.async.bulk to shared memory"),
        ("load(s, a + 1, 16, m);", "[misaligned] source of cp.async.bulk"),
        ("load(s, a + 60, 32, m);", "[global-bounds] source of cp.async.bulk"),
        ("load(s + 1016, a, 64, m);", "[shared-bounds] cp.async.bulk to shared memory"),
        ("load(s, a, 64, (u64*)s);", "[mbarrier] a copy that completes on an mbarrier: at byte 0 of shared memory there is no mbarrier"),
        ("store(a, s + 1, 16);", "[misaligned] cp.async.bulk from shared memory"),
        ("store(a + 60, s, 32);", "[global-bounds] destination of cp.async.bulk"),
        ("store(a, s, 16);", "[uninitialized] cp.async.bulk from shared memory"),
        (
            'asm volatile("cp.async.bulk.prefetch.L2.global [%0], 512;" :: "l"(a) : "memory");',
            "[global-bounds] source of cp.async.bulk.prefetch",
        ),
    ],
)
def test_misuse(body: str, message: str) -> None:
    setup = SETUP.replace("__shared__ __align__(8) u64 m[2];", "").replace("int s[1024];", "int s[1026]; u64* m = (u64*)(s + 1022);")
    assert message in report((setup if "shared-bounds" in message else SETUP) + f"if (t == 0) {{ {body} }}", numbers(64))


def test_prefetch_does_nothing() -> None:
    launch('asm volatile("cp.async.bulk.prefetch.L2.global [%0], 256;" :: "l"(a) : "memory");', numbers(64))


@pytest.mark.parametrize(
    "instruction",
    [
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.ignore_oob [r], [d], 16, [r], 0, 0;",
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [d], [r], 16, r;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [d], [r], 16;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.min.f32 [d], [r], 16;",
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.min.u64 [r], [r], 16, [r];",
        "st.async.release.sys.global.u32 [d], r;",
    ],
)
def test_unsupported_forms(instruction: str) -> None:
    ptx = f".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k() {{ .reg .b32 r; .reg .b64 d; {instruction} ret; }}"
    with pytest.raises(SimulatorError, match="does not support"):
        run_ptx(ptx)
