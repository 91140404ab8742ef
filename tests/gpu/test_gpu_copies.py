"""Asynchronous copies, GPU against simulator, bit by bit: TMA boxes of every rank and swizzle, inside and across the tensor's edges; stores that are clipped;
coordinates that are refused; bulk copies and reductions. Tensor maps come from the driver on a GPU and from the simulator's encoder there, so both are compared too."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
from calibration import Both

FILL = 0xA5A5A5A5
SHARED = 16384


def _coordinates(rank: int) -> str:
    return "{" + ", ".join(f"%{3 + i}" for i in range(rank)) + "}"


def _tensor_kernels(rank: int) -> str:
    inputs = ", ".join(f'"r"({name})' for name in ("x", "y", "z", "u", "v")[:rank])
    signature = "const __grid_constant__ Map map, int x, int y, int z, int u, int v, int bytes"
    text = f"""
extern "C" __global__ void load_{rank}(u32* out, {signature}, const u32* tensor) {{
  extern __shared__ __align__(1024) u32 s[];
  __shared__ u64 barrier;
  u32 b = address(&barrier), t = threadIdx.x;
  for (int i = t; i < {SHARED // 4}; i += 32) s[i] = {FILL}u;
  if (t == 0) init(b, 1);
  fences();
  __syncthreads();
  if (t == 0) {{
    expect(b, bytes);
    asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {_coordinates(rank)}], [%2];"
      :: "r"(address(s)), "l"(&map), "r"(b), {inputs} : "memory");
  }}
  bool good = wait(b, 0);
  for (int i = t; i < {SHARED // 4}; i += 32) out[i] = good ? s[i] : 0xdead;
}}"""
    body = f"""
  extern __shared__ __align__(1024) u32 s[];
  u32 t = threadIdx.x;
  for (int i = t; i < bytes / 4; i += 32) s[i] = in[i];
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  if (t == 0) {{
    asm volatile("OPERATION [%1, {_coordinates(rank)}], [%0];" :: "r"(address(s)), "l"(&map), "r"(0), {inputs} : "memory");
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
  }}
"""
    kinds = {"store": f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"}
    for operation in ("add", "max", "min"):
        kinds[operation] = f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.{operation}.tile.bulk_group"
    for name, operation in kinds.items():
        text += f'\nextern "C" __global__ void {name}_{rank}(u32* tensor, const u32* in, {signature}) {{{body.replace("OPERATION", operation)}}}'
    return text


SOURCES = {rank: _tensor_kernels(rank) for rank in range(1, 6)}
TENSORS = {
    # rank -> (extents, box), innermost first, of 2-byte elements; the box's first extent is the span of the swizzle if there is one
    1: ((200,), (64,)),
    2: ((136, 37), (64, 16)),
    3: ((72, 9, 11), (64, 4, 5)),
    4: ((72, 7, 5, 3), (64, 3, 2, 2)),
    5: ((72, 5, 4, 3, 3), (64, 2, 3, 2, 2)),
}


def strides_of(dims: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Rows with 16 bytes of padding, outer dimensions without."""
    strides = [dims[0] * itemsize + 16]
    for extent in dims[1:-1]:
        strides.append(strides[-1] * extent)
    return tuple(strides[: len(dims) - 1])


def memory_of(dims: tuple[int, ...], itemsize: int, seed: int = 0) -> Any:
    """Bytes that hold the tensor."""
    nbytes = strides_of(dims, itemsize)[-1] * dims[-1] if len(dims) > 1 else dims[0] * itemsize
    return numpy.random.default_rng(seed).integers(0, 1 << 30, (nbytes + 3) // 4 + 16, dtype=numpy.uint32)


def starts(dims: tuple[int, ...], box: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Inside, across the last element, wholly outside in one dimension, and before the first element, which only loads may be. What comes before a
    box in its row is always a multiple of 16 bytes."""
    inside = tuple(
        (extent - span) // 2 // 8 * 8 if i == 0 else (extent - span) // 2 for i, (extent, span) in enumerate(zip(dims, box, strict=True))
    )
    before = tuple(-(span // 2) for span in box)
    across = tuple(extent - span // 2 for extent, span in zip(dims, box, strict=True))
    outside = (*inside[:-1], dims[-1] + 8)
    return [inside, across, outside, before]


def _scalars(start: tuple[int, ...], nbytes: int) -> list[tuple[str, int]]:
    return [("i", x) for x in (*start, *[0] * (5 - len(start)))] + [("i", nbytes)]


def box_bytes(box: tuple[int, ...], itemsize: int) -> int:
    return int(numpy.prod(box)) * itemsize


@pytest.mark.parametrize("swizzle", ["none", "32B", "64B", "128B"])
@pytest.mark.parametrize("rank", TENSORS)
def test_tensor_loads(both: Both, rank: int, swizzle: str) -> None:
    dims, box = TENSORS[rank]
    if swizzle != "none":
        box = (int(swizzle[:-1]) // 2, *box[1:])
    memory, nbytes = memory_of(dims, 2), box_bytes(box, 2)
    for start in starts(dims, box):
        entry = {"array": 1, "dtype": "bfloat16", "dims": dims, "strides_bytes": strides_of(dims, 2), "box": box, "swizzle": swizzle}
        arguments = [("array", numpy.zeros(SHARED // 4, numpy.uint32)), ("map", entry), *_scalars(start, nbytes), ("array", memory)]
        out = both(f"load {rank}-D, swizzle {swizzle}, start {start}", SOURCES[rank], f"load_{rank}", arguments, shared=SHARED, keep=0)
        assert (out[nbytes // 4 :] == FILL).all()
        if swizzle == "none":
            assert (out.view(numpy.uint16)[: nbytes // 2] == _cut(memory, dims, box, start)).all()


def _cut(memory: Any, dims: tuple[int, ...], box: tuple[int, ...], start: tuple[int, ...]) -> Any:
    """The box of 2-byte elements by NumPy, zero outside."""
    strides = (2, *strides_of(dims, 2))
    tensor = numpy.lib.stride_tricks.as_strided(memory.view(numpy.uint16), dims[::-1], strides[::-1])
    result = numpy.zeros(box[::-1], numpy.uint16)
    low = [max(0, -s) for s in start[::-1]]
    high = [min(b, d - s) for b, d, s in zip(box[::-1], dims[::-1], start[::-1], strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        inner = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        outer = tuple(slice(a + s, b + s) for a, b, s in zip(low, high, start[::-1], strict=True))
        result[inner] = tensor[outer]
    return result.reshape(-1)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float16", 2), ("float32", 4), ("uint8", 1), ("bfloat16", 2)])
@pytest.mark.parametrize("fill", ["zero", "nan"])
def test_what_lies_outside(both: Both, dtype: str, itemsize: int, fill: str) -> None:
    if dtype == "uint8" and fill == "nan":
        pytest.skip("integers have no NaN")
    dims, box = (128 // itemsize + 16 // itemsize, 20), (64 // itemsize, 8)
    memory, nbytes = memory_of(dims, itemsize, 1), box_bytes(box, itemsize)
    for start in ((-16 // itemsize, -3), (dims[0] - 16 // itemsize, 15)):
        entry = {"array": 1, "dtype": dtype, "dims": dims, "strides_bytes": strides_of(dims, itemsize), "box": box, "oob_fill": fill}
        arguments = [("array", numpy.zeros(SHARED // 4, numpy.uint32)), ("map", entry), *_scalars(start, nbytes), ("array", memory)]
        both(f"load {dtype}, fill {fill}, start {start}", SOURCES[2], "load_2", arguments, shared=SHARED, only_record=fill == "nan")


@pytest.mark.parametrize("swizzle", ["none", "64B", "128B"])
@pytest.mark.parametrize("rank", TENSORS)
def test_tensor_stores_are_clipped(both: Both, rank: int, swizzle: str) -> None:
    dims, box = TENSORS[rank]
    if swizzle != "none":
        box = (int(swizzle[:-1]) // 2, *box[1:])
    nbytes = box_bytes(box, 2)
    data = numpy.random.default_rng(2).integers(0, 1 << 32, SHARED // 4, dtype=numpy.uint32)
    for start in starts(dims, box)[:-1]:
        entry = {"array": 0, "dtype": "bfloat16", "dims": dims, "strides_bytes": strides_of(dims, 2), "box": box, "swizzle": swizzle}
        arguments = [("array", memory_of(dims, 2)), ("array", data), ("map", entry), *_scalars(start, nbytes)]
        both(f"store {rank}-D, swizzle {swizzle}, start {start}", SOURCES[rank], f"store_{rank}", arguments, shared=SHARED, keep=0)


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [("add", "float32"), ("add", "bfloat16"), ("add", "float16"), ("add", "uint32"), ("max", "bfloat16"), ("min", "float16")],
)
def test_tensor_reductions(both: Both, operation: str, dtype: str) -> None:
    itemsize = 2 if "16" in dtype else 4
    dims, box = (128 // itemsize + 8, 21), (64 // itemsize, 8)
    rng = numpy.random.default_rng(3)

    def numbers(count: int) -> Any:
        """Integers that are exact in every type."""
        values = rng.integers(0, 60, count * 4 // itemsize)
        if dtype == "uint32":
            return values.astype(numpy.uint32)
        if dtype == "bfloat16":
            return (values.astype(numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16).view(numpy.uint32)
        return values.astype(numpy.dtype(dtype)).view(numpy.uint32)

    words = memory_of(dims, itemsize).size
    for start in ((8, 3), (0, 0), (dims[0] - 16 // itemsize, 16)):
        entry = {"array": 0, "dtype": dtype, "dims": dims, "strides_bytes": strides_of(dims, itemsize), "box": box}
        arguments = [("array", numbers(words)), ("array", numbers(SHARED // 4)), ("map", entry), *_scalars(start, box_bytes(box, itemsize))]
        both(f"reduce {operation} {dtype}, start {start}", SOURCES[2], f"{operation}_2", arguments, shared=SHARED)


@pytest.mark.parametrize(
    ("kernel", "start"),
    [
        *[("load_2", (first, 10)) for first in (1, 3, 4, -4)],
        *[("store_2", start) for start in ((4, 10), (-8, 10), (8, -1))],
        *[("add_2", start) for start in ((4, 10), (8, -1))],
    ],
)
def test_coordinates_that_are_refused(both: Both, kernel: str, start: tuple[int, int]) -> None:
    """The innermost coordinate must be a multiple of 16 bytes, and no coordinate of a store may be negative: the GPU calls the instruction illegal."""
    dims, box = TENSORS[2]
    tensor, other, load = ("array", memory_of(dims, 2)), ("array", numpy.zeros(SHARED // 4, numpy.uint32)), kernel == "load_2"
    entry = {"array": int(load), "dtype": "bfloat16", "dims": dims, "strides_bytes": strides_of(dims, 2), "box": box}
    middle = [("map", entry), *_scalars(start, box_bytes(box, 2))]
    arguments = [other, *middle, tensor] if load else [tensor, other, *middle]
    both.refuse(
        f"{kernel}, start {start}", SOURCES[2], kernel, arguments, gpu="cudaErrorIllegalInstruction", simulator="coordinate", shared=SHARED
    )


BULK = """
#define KERNEL(NAME, OPERATION) extern "C" __global__ void NAME(u32* out, const u32* in, int words) { \\
  extern __shared__ __align__(1024) u32 s[]; \\
  __shared__ u64 barrier; \\
  u32 b = address(&barrier), t = threadIdx.x; \\
  if (t == 0) { \\
    init(b, 1); fences(); expect(b, 4 * words); \\
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" \\
      :: "r"(address(s)), "l"(in), "r"(4 * words), "r"(b) : "memory"); \\
  } \\
  __syncthreads(); \\
  bool good = wait(b, 0); \\
  __syncthreads(); \\
  if (t == 0 && good) { \\
    asm volatile(OPERATION " [%0], [%1], %2;" :: "l"(out), "r"(address(s)), "r"(4 * words) : "memory"); \\
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory"); \\
  } \\
}
KERNEL(bulk_copy, "cp.async.bulk.global.shared::cta.bulk_group")
KERNEL(bulk_add_f32, "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32")
KERNEL(bulk_add_bf16, "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16")
KERNEL(bulk_add_f16, "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16")
KERNEL(bulk_add_u32, "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32")
KERNEL(bulk_max_bf16, "cp.reduce.async.bulk.global.shared::cta.bulk_group.max.bf16")
"""


@pytest.mark.parametrize("kernel", ["bulk_copy", "bulk_add_f32", "bulk_add_bf16", "bulk_add_f16", "bulk_add_u32", "bulk_max_bf16"])
def test_bulk_copies(both: Both, kernel: str) -> None:
    """Random normal numbers, rounded once per element."""
    rng = numpy.random.default_rng(4)

    def numbers() -> Any:
        values = rng.standard_normal(2048 if "16" in kernel else 1024).astype(numpy.float32) * 8
        if "bf16" in kernel:
            return (values.view(numpy.uint32) >> 16).astype(numpy.uint16).view(numpy.uint32)
        if "f16" in kernel:
            return values.astype(numpy.float16).view(numpy.uint32)
        return values if "f32" in kernel else rng.integers(0, 1 << 32, 1024, dtype=numpy.uint32)

    start, added = numbers(), numbers()
    expected = {"bulk_copy": added, "bulk_add_f32": start + added, "bulk_add_u32": start + added}.get(kernel)
    both(kernel, BULK, kernel, [("array", start), ("array", added), ("i", 1024)], expected=expected, shared=8192)


def test_every_case_of_starts_is_different() -> None:
    for (dims, box), swizzle in itertools.product(TENSORS.values(), (64,)):
        assert len(set(starts(dims, (swizzle, *box[1:])))) == 4
