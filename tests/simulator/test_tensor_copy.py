"""TMA: boxes of tensors of every rank, swizzles, what lies outside, multicast, and what is reported about wrong maps and missing waits."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from mbarriers import ALL, SCHEDULES, launch, report
from simulated import run_ptx

from cuflash.errors import OptionError, SimulatorError, UnsupportedError
from cuflash.simulator import Options
from cuflash.simulator.tensor_map import NBYTES, encode_tiled

Array = npt.NDArray[Any]
SPANS = {"none": 0, "32B": 32, "64B": 64, "128B": 128}

SETUP = """extern __shared__ __align__(1024) char s[]; __shared__ u64 m;
if (t == 0) { init(&m, 1); fence_init(); } __syncthreads();
"""


def aligned(array: Array) -> Array:
    """A copy whose address is a multiple of 128."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 128
    result = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def tensor_map(array: Array, box: tuple[int, ...], **options: Any) -> bytes:
    """The map of a C-contiguous array, with the box in the array's order of dimensions."""
    return encode_tiled(array.ctypes.data, str(array.dtype), array.shape[::-1], array.strides[-2::-1], box[::-1], **options)


def coordinates(start: tuple[int, ...]) -> str:
    return "{" + ", ".join(str(i) for i in start[::-1]) + "}"


def cut(array: Array, start: tuple[int, ...], box: tuple[int, ...], steps: tuple[int, ...], fill: float) -> Array:
    """The box at `start` with elements outside of the array filled."""
    lists = [[first + i for i in range(0, extent, step)] for first, extent, step in zip(start, box, steps, strict=True)]
    result = np.full([len(positions) for positions in lists], fill, array.dtype)
    for index in itertools.product(*(range(len(positions)) for positions in lists)):
        at = tuple(positions[i] for positions, i in zip(lists, index, strict=True))
        if all(0 <= i < extent for i, extent in zip(at, array.shape, strict=True)):
            result[index] = array[at]
    return result


def swizzled(flat: Array, span: int) -> Array:
    """Bytes at addresses that are multiples of 1024: chunk c of row r of 128 bytes goes to c XOR r modulo the chunks of a span."""
    if span == 0:
        return flat
    result = np.empty_like(flat)
    for offset in range(0, flat.size, 16):
        row, chunk = offset // 128, offset % 128 // 16
        moved = chunk ^ row % {128: 8, 64: 4, 32: 2}[span]
        result[row * 128 + moved * 16 :][:16] = flat[offset : offset + 16]
    return result


def load_body(rank: int, start: tuple[int, ...], nbytes: int, modifiers: str = "") -> str:
    return (
        SETUP
        + f"""
if (t == 0) {{
    arrive_expect(&m, {nbytes});
    asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global{modifiers}.mbarrier::complete_tx::bytes [%0], [%1, {coordinates(start)}], [%2];"
        :: "r"(address(s)), "l"(&m0), "r"(address(&m)) : "memory");
}}
wait(&m, 0);
for (int i = t; i < {nbytes}; i += 32) a[i] = s[i];
"""
    )


def load_box(
    array: Array, start: tuple[int, ...], box: tuple[int, ...], options: Options | None = None, modifiers: str = "", **fields: Any
) -> Array:
    """The bytes in shared memory after a load."""
    steps = fields.get("element_strides", (1,) * len(box))[::-1]
    count = int(np.prod([-(-extent // step) for extent, step in zip(box, steps, strict=True)]))
    out = np.zeros(count * array.itemsize, np.uint8)
    memory = aligned(array)
    body = load_body(array.ndim, start, out.nbytes, modifiers)
    launch(body, out, memory, maps=[tensor_map(memory, box, **fields)], options=options, element="char", shared=out.nbytes)
    return out


def random(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    return np.random.default_rng(0).integers(1, 100, shape).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "start", "box", "dtype"),
    [
        ((64,), (16,), (32,), np.int32),
        ((256,), (0,), (256,), np.uint8),
        ((20, 48), (3, 8), (8, 16), np.float16),
        ((7, 9, 16), (2, 3, 8), (3, 4, 8), np.float32),
        ((3, 4, 5, 16), (1, 0, 2, 0), (2, 3, 3, 16), ml_dtypes.bfloat16),
        ((2, 3, 4, 3, 4), (0, 1, 1, 0, 2), (2, 2, 3, 2, 2), np.float64),
        ((5, 8), (1, 2), (3, 2), np.int64),
    ],
)
@pytest.mark.parametrize("options", SCHEDULES)
def test_load_of_every_rank(
    shape: tuple[int, ...], start: tuple[int, ...], box: tuple[int, ...], dtype: npt.DTypeLike, options: Options
) -> None:
    array = random(shape, dtype)
    got = load_box(array, start, box, options, ".tile")
    np.testing.assert_array_equal(got, cut(array, start, box, (1,) * len(box), 0).reshape(-1).view(np.uint8))


@pytest.mark.parametrize("start", [(-2, -8), (14, 24), (-3, 24), (30, 0), (0, -40), (5, 24), (-20, 0)])
def test_load_outside(start: tuple[int, int]) -> None:
    """Zeros, or NaN on request, and the mbarrier gets the bytes of the whole box."""
    array = random((16, 32), np.float16)
    box = (8, 16)
    zeros = load_box(array, start, box).view(np.float16)
    np.testing.assert_array_equal(zeros, cut(array, start, box, (1, 1), 0).reshape(-1))
    filled = load_box(array, start, box, oob_fill="nan", swizzle="32B")
    expected = cut(array, start, box, (1, 1), np.nan).reshape(-1)
    np.testing.assert_array_equal(filled.view(np.float16), swizzled(expected.view(np.uint8), 32).view(np.float16))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_fill_with_nan(dtype: npt.DTypeLike) -> None:
    got = load_box(random((4, 16), dtype), (2, 0), (4, 16), oob_fill="nan").view(dtype).astype(np.float64).reshape(4, 16)
    assert np.isfinite(got[:2]).all()
    assert np.isnan(got[2:]).all()


def test_element_strides() -> None:
    array = random((20, 12, 16), np.float32)
    start, box, steps = (3, -1, 4), (9, 8, 8), (2, 3, 1)
    got = load_box(array, start, box, element_strides=steps[::-1]).view(np.float32)
    np.testing.assert_array_equal(got, cut(array, start, box, steps, 0).reshape(-1))


@pytest.mark.parametrize("swizzle", ["none", "32B", "64B", "128B"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_swizzle_of_loads_and_stores(swizzle: str, dtype: npt.DTypeLike) -> None:
    width = (SPANS[swizzle] or 64) // np.dtype(dtype).itemsize
    array = random((40, 2 * width), dtype)
    start, box = (5, width), (24, width)
    expected = swizzled(cut(array, start, box, (1, 1), 0).reshape(-1).view(np.uint8), SPANS[swizzle])
    np.testing.assert_array_equal(load_box(array, start, box, swizzle=swizzle), expected)
    out = aligned(np.zeros_like(array))
    store_box(out, expected, start, box, swizzle=swizzle)
    wanted = np.zeros_like(array)
    wanted[5:29, width:] = array[5:29, width:]
    np.testing.assert_array_equal(out, wanted)


def test_swizzle_goes_by_addresses() -> None:
    """A box at an odd multiple of 128 bytes continues the pattern of the kilobyte that it lies in."""
    array = random((16, 64), np.float16)
    memory = aligned(array)
    out = np.zeros(4096, np.uint8)
    body = load_body(2, (0, 0), 1024).replace("address(s)", "address(s + 384)")
    body = body.replace("a[i] = s[i]", "a[i + 384] = s[i + 384]")
    launch(body, out, memory, maps=[tensor_map(memory, (8, 64), swizzle="128B")], element="char", shared=4096)
    everything = np.zeros(4096, np.uint8)
    everything[384:1408] = array[:8].reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(out[384:1408], swizzled(everything, 128)[384:1408])


STORE = (
    SETUP
    + """
for (int i = t; i < NBYTES; i += 32) s[i] = a[i];
fence_async();
__syncthreads();
if (t == 0) {
    asm volatile("INSTRUCTION [%0, COORDINATES], [%1];" :: "l"(&m0), "r"(address(s)) : "memory");
    commit();
    wait_group<0>();
}
"""
)


def store_box(
    out: Array,
    content: Array,
    start: tuple[int, ...],
    box: tuple[int, ...],
    options: Options | None = None,
    operation: str = "",
    **fields: Any,
) -> None:
    """Store bytes of shared memory to a box of `out`."""
    rank = out.ndim
    instruction = f"cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group"
    if operation:
        instruction = f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.{operation}.tile.bulk_group"
    body = STORE.replace("NBYTES", str(content.nbytes)).replace("INSTRUCTION", instruction).replace("COORDINATES", coordinates(start))
    launch(body, content, out, maps=[tensor_map(out, box, **fields)], options=options, element="char", shared=content.nbytes)


@pytest.mark.parametrize("start", [(2, 8), (0, 0), (12, 24), (20, 0)])
@pytest.mark.parametrize("options", SCHEDULES)
def test_store_leaves_alone_what_is_outside(start: tuple[int, int], options: Options) -> None:
    out, content = aligned(np.full((16, 32), 7, np.float16)), random((8, 16), np.float16)
    store_box(out, content.reshape(-1).view(np.uint8), start, (8, 16), options)
    expected = np.full((16, 32), 7, np.float16)
    for row, column in itertools.product(range(8), range(16)):
        at = (start[0] + row, start[1] + column)
        if 0 <= at[0] < 16 and 0 <= at[1] < 32:
            expected[at] = content[row, column]
    np.testing.assert_array_equal(out, expected)


def test_coordinates_that_a_gpu_refuses() -> None:
    out, content = aligned(np.zeros((16, 32), np.float16)), np.zeros(256, np.uint8)
    with pytest.raises(SimulatorError, match=r"\[tensor-map\] the innermost coordinate is 4 elements of 2 bytes, no multiple of 16 bytes"):
        load_box(out, (0, 4), (8, 16))
    with pytest.raises(SimulatorError, match=r"\[tensor-map\] the innermost coordinate is 12 elements"):
        store_box(out, content, (0, 12), (8, 16))
    with pytest.raises(SimulatorError, match=r"\[tensor-map\] coordinate 1 is -1, and those of a store must not be negative"):
        store_box(out, content, (-1, 8), (8, 16))
    with pytest.raises(SimulatorError, match=r"\[tensor-map\] coordinate 0 is -8, and those of a store must not be negative"):
        store_box(out, content, (2, -8), (8, 16), operation="add")


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        ("add", np.float32),
        ("add", np.float16),
        ("add", ml_dtypes.bfloat16),
        ("min", np.int32),
        ("max", np.float16),
        ("xor", np.uint32),
        ("inc", np.uint32),
    ],
)
def test_reduction(operation: str, dtype: npt.DTypeLike) -> None:
    old, new = random((8, 32), dtype), random((4, 16), dtype)[::-1].copy()
    out = aligned(old)
    store_box(out, new.reshape(-1).view(np.uint8), (2, 8), (4, 16), operation=operation)
    functions: dict[str, Any] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "xor": np.bitwise_xor,
        "inc": lambda a, b: np.where(a >= b, 0, a + 1),
    }
    expected = old.copy()
    expected[2:6, 8:24] = functions[operation](old[2:6, 8:24], new).astype(dtype)
    np.testing.assert_array_equal(out, expected)


def test_reduction_that_the_type_does_not_have() -> None:
    out = aligned(np.zeros((4, 16), np.float32))
    with pytest.raises(SimulatorError, match=r"\[tensor-map\] elements of the tensor map's type have no such reduction"):
        store_box(out, np.zeros(256, np.uint8), (0, 0), (4, 16), operation="min")


@pytest.mark.parametrize("place", ["parameter", "global"])
def test_where_the_map_lies(place: str) -> None:
    """In a kernel parameter, or in global memory that is aligned to 64 bytes."""
    array = aligned(random((8, 32), np.int32))
    encoded = tensor_map(array, (4, 16))
    table = aligned(np.frombuffer(encoded, np.uint8))
    out = np.zeros(256, np.uint8)
    body = load_body(2, (1, 8), 256)
    body = body.replace("shared::cluster.global", "shared::cta.global")
    if place == "global":
        body = body.replace('"l"(&m0)', '"l"(c)')
    launch(body, out, array, table, maps=[encoded], element="char", shared=256)
    np.testing.assert_array_equal(out.view(np.int32).reshape(4, 16), array[1:5, 8:24])
    if place == "global":
        text = report(body.replace('"l"(c)', '"l"(c + 16)'), out, array, table, maps=[encoded], element="char", shared=256)
        assert "[misaligned] tensor map" in text


def test_prefetches_do_nothing() -> None:
    array = aligned(random((8, 32), np.int32))
    body = """asm volatile("prefetch.tensormap [%0];" :: "l"(&m0) : "memory");
asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {0, 0}];" :: "l"(&m0) : "memory");"""
    launch(body, array, maps=[tensor_map(array, (4, 16))])


# Without a barrier of the cluster, block 1 tells by a flag in global memory that its mbarrier is there, and by one in the shared memory of block 0
# what it did before. Addresses of other blocks are made by hand.
MULTICAST = """extern __shared__ __align__(1024) char s[]; __shared__ u64 m; __shared__ u32 ready;
u32 rank; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
volatile int* flag = (volatile int*)c;
if (t == 0) {
    init(&m, 1); fence_init();
    arrive_expect(&m, 1024);
    if (rank == 1) {
        asm volatile("st.release.cluster.shared::cluster.u32 [%0], 1;" :: "r"(address(&ready) | 1 << 24) : "memory");
        *flag = 1;
    } else {
        while (*flag == 0) {}
        u32 seen; asm volatile("ld.acquire.cluster.shared.u32 %0, [%1];" : "=r"(seen) : "r"(address(&ready)) : "memory");
        LOAD
    }
}
__syncthreads();
wait(&m, 0);
for (int i = t; i < 1024; i += 32) a[rank * 1024 + i] = s[i];
"""
LOADS = {
    "tensor": 'asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], '
    '[%1, {8, 3}], [%2], %3, %4;" :: "r"(address(s)), "l"(&m0), "r"(address(&m)), "h"((u16)MASK), "l"(0ll) : "memory");',
    "bulk": 'asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], 1024, [%2], %3;"'
    ' :: "r"(address(s)), "l"(b), "r"(address(&m)), "h"((u16)MASK) : "memory");',
}


@pytest.mark.parametrize("kind", ["tensor", "bulk"])
@pytest.mark.parametrize("options", ALL)
def test_multicast(kind: str, options: Options) -> None:
    """One load fills the shared memory of both blocks and completes on the mbarrier of each."""
    array = aligned(random((32, 32), np.int32))
    out, flag = np.zeros((2, 1024), np.uint8), np.zeros(4, np.uint8)
    body = MULTICAST.replace("LOAD", LOADS[kind]).replace("MASK", "3")
    launch(body, out, array, flag, maps=[tensor_map(array, (16, 16))], options=options, cluster=2, element="char", shared=1024)
    expected = array[3:19, 8:24] if kind == "tensor" else array[:8]
    for block in range(2):
        np.testing.assert_array_equal(out[block].view(np.int32), expected.reshape(-1))


@pytest.mark.parametrize("options", SCHEDULES)
def test_multicast_to_too_few_or_too_many(options: Options) -> None:
    array = aligned(random((32, 32), np.int32))
    body = MULTICAST.replace("LOAD", LOADS["tensor"])

    def run(mask: str) -> str:
        out, flag = np.zeros((2, 1024), np.uint8), np.zeros(4, np.uint8)
        maps = [tensor_map(array, (16, 16))]
        return report(body.replace("MASK", mask), out, array, flag, maps=maps, options=options, cluster=2, element="char", shared=1024)

    assert "of shared memory of block 1, waited for by warp 0, is in phase 0, which lacks 0 of 1 arrivals and 1024 of 1024 bytes" in run(
        "1"
    )
    assert "[cluster] cp.async.bulk.tensor to shared memory in block 2 of a cluster of 2 blocks" in run("7")
    assert "[bulk-copy] cp.async.bulk.tensor to shared memory to no block of the cluster" in run("0")


RING = """extern __shared__ __align__(1024) char s[]; __shared__ u64 full[2], empty[2];
if (t == 0) { for (int i = 0; i < 2; ++i) init(full + i, 1), init(empty + i, 64); fence_init(); }
__syncthreads();
if (t == 0) {
    for (int i = 0; i < 6; ++i) {
        WAIT_EMPTY
        arrive_expect(full + i % 2, 2048);
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {0, %2}], [%3];"
            :: "r"(address(s + i % 2 * 2048)), "l"(&m0), "r"(i * 16), "r"(address(full + i % 2)) : "memory");
    }
} else if (t >= 32) {
    u32 at = address(s + 4096) + (t - 32) * 16;
    float x[4], y[4] = {0, 0, 0, 0};
    for (int i = 0; i < 6; ++i) {
        wait(full + i % 2, i / 2 % 2);
        for (int j = 0; j < 2; ++j) {
            u32 row = (t - 32) / 8 + j * 8, chunk = (t - 32) % 8;
            const float* from = (const float*)(s + i % 2 * 2048 + row * 128 + (chunk ^ row % 8) * 16);
            for (int k = 0; k < 4; ++k) y[k] += from[k] * (i + 1);
        }
        arrive(empty + i % 2);
    }
    for (int k = 0; k < 4; ++k) asm volatile("st.shared.f32 [%0], %1;" :: "r"(at + 4 * k), "f"(y[k]) : "memory");
    FENCE
    asm volatile("bar.sync 1, 64;" ::: "memory");
    if (t == 32) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {0, 0}], [%1];" :: "l"(&m1), "r"(address(s + 4096)) : "memory");
        commit();
        wait_read<0>();
    }
}
"""


def ring(options: Options, **changes: str) -> bool:
    """A producer thread, two consumer warps that sum up swizzled tiles and store the result."""
    parts = {"WAIT_EMPTY": "wait(empty + i % 2, i / 2 % 2 ^ 1);", "FENCE": "fence_async();"} | changes
    body = RING
    for name, text in parts.items():
        body = body.replace(name, text)
    array, out = aligned(random((96, 32), np.float32)), aligned(np.zeros((8, 32), np.float32))
    maps = [tensor_map(array, (16, 32), swizzle="128B"), tensor_map(out, (8, 32))]
    launch(body, array, out, maps=maps, options=options, block=96, shared=5120)
    tiles = array.reshape(6, 2, 8, 32).sum(1)
    return bool((out == (tiles * np.arange(1, 7)[:, None, None]).sum(0)).all())


@pytest.mark.parametrize("options", ALL)
def test_ring(options: Options) -> None:
    assert ring(options)


@pytest.mark.parametrize("options", SCHEDULES)
def test_ring_bugs(options: Options) -> None:
    race = r"\[race\] cp.async.bulk.tensor to shared memory at byte \d+ of shared memory \(lane 0\) and an earlier (read by warp|write by a copy)"
    with pytest.raises(SimulatorError, match=race + r"|\[mbarrier\] 1 arrivals at .* lacks 0 of 1"):
        ring(options, WAIT_EMPTY="")
    with pytest.raises(SimulatorError, match=r"\[proxy-fence\] cp.async.bulk.tensor from shared memory .* earlier write by warp [12]"):
        ring(options, FENCE="")


def test_misuse() -> None:
    array = aligned(random((32, 32), np.int32))
    good = tensor_map(array, (8, 32))
    out = np.zeros(1024, np.uint8)

    def run(body: str, encoded: bytes = good, shared: int = 1024, memory: Array = array) -> str:
        return report(body, out, memory, maps=[encoded], element="char", shared=shared)

    assert "[tensor-map] what the address names is no tensor map" in run(load_body(2, (0, 0), 1024), bytes(NBYTES))
    assert "[tensor-map] a copy of rank 3 with a tensor map of rank 2" in run(load_body(3, (0, 0, 0), 1024))
    assert "[misaligned] cp.async.bulk.tensor to shared memory" in run(
        load_body(2, (0, 0), 1024).replace("address(s)", "address(s + 64)"), shared=2048
    )
    assert "[shared-bounds] cp.async.bulk.tensor to shared memory" in run(load_body(2, (0, 0), 1024), shared=512)
    text = run(load_body(2, (24, 0), 1024), memory=array[:30])  # the map says 32 rows
    assert "[global-bounds] source of cp.async.bulk.tensor" in text
    assert "starts at the end of 'array 1'" in text
    assert "[mbarrier] phase 0" in run(load_body(2, (30, 0), 1024).replace("arrive_expect(&m, 1024)", "arrive_expect(&m, 256)"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float8"}, "dtype: got 'float8'"),
        ({"address": 8}, "address: got 0x8; expected a multiple of 16"),
        ({"dims": (64, 0)}, "dims: got"),
        ({"dims": ()}, "expected 1 to 5 extents"),
        ({"dims": (1,) * 6}, "expected 1 to 5 extents"),
        ({"strides_bytes": (24,)}, "strides_bytes: got"),
        ({"strides_bytes": (1 << 40,)}, "strides_bytes: got"),
        ({"strides_bytes": ()}, "strides_bytes: got (); expected 1 numbers"),
        ({"box": (64, 257)}, "expected extents from 1 to 256"),
        ({"box": (4, 4)}, "expected a multiple of 8 elements"),
        ({"box": (64,)}, "box: got (64,); expected 2 numbers"),
        ({"element_strides": (1, 9)}, "expected steps from 1 to 8"),
        ({"swizzle": "64B"}, "expected at most 32 elements in the innermost dimension"),
        ({"oob_fill": "one"}, "oob_fill"),
        ({"dtype": "int16"}, "dtype"),
        ({"dtype": "uint16", "oob_fill": "nan"}, "Integers have no NaN"),
        ({"l2_promotion": "512B"}, "l2_promotion"),
    ],
)
def test_maps_that_the_driver_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        encode_tiled(**MAP | fields)
    assert message in str(caught.value)


MAP: dict[str, Any] = {"address": 4096, "dtype": "float16", "dims": (64, 10), "strides_bytes": (128,), "box": (64, 8)}


@pytest.mark.parametrize("fields", [{"interleave": "16B"}, {"swizzle": "128B_ATOM_32B"}, {"swizzle": "128B", "box": (32, 8)}])
def test_maps_that_are_not_modelled(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        encode_tiled(**MAP | fields)


def test_layout() -> None:
    """128 bytes: a word to recognise it by, then the address."""
    encoded = encode_tiled(**MAP)
    assert len(encoded) == NBYTES == 128
    assert struct.unpack_from("<8sQ", encoded) == (b"tnsormap", 4096)


@pytest.mark.parametrize(
    "instruction",
    [
        "cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [r], [d, {r, r, r}], [r], {h};",
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile::gather4.mbarrier::complete_tx::bytes [r], [d, {r, r, r, r, r}], [r];",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [r], [d, {r}], [r];",
    ],
)
def test_unsupported_forms(instruction: str) -> None:
    ptx = f".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k() {{ .reg .b16 h; .reg .b32 r; .reg .b64 d; {instruction} ret; }}"
    with pytest.raises(SimulatorError, match="does not support"):
        run_ptx(ptx)
