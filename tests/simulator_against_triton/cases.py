"""A case: a Triton kernel, what it is launched on, and what has to come out. `simulate` compiles it for a GPU that need not be there and runs the PTX.

Contract: arrays are copied into memory of their own for every launch, aligned as device memory is; outputs start unwritten, and inputs must come back as they
were. `simulate` gives the outputs of one launch; `simulate_all_ways` launches under every schedule, with checks and without, wants the same bits, and judges.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy
import numpy.typing as npt
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cuflash.simulator import Buffer, Module, Options
from cuflash.simulator.tensor_map import encode_tiled

Array = npt.NDArray[Any]

TYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    **{name: name[0] + name.lstrip("uint") for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}
"""NumPy's names of element types -> Triton's."""

ELEMENTS: dict[str, Any] = {
    **{name: numpy.dtype(name) for name in TYPES if not name.startswith(("bfloat", "float8"))},
    **{name: numpy.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
}

ALIGNMENT = 256
"""Of device memory."""


@dataclass(frozen=True)
class Output:
    """An array that the kernel writes; `start` is what is in it before, None if nothing that may be read."""

    shape: tuple[int, ...]
    dtype: str
    start: Array | None = None


@dataclass(frozen=True)
class Mapped:
    """An array or output that the kernel gets as a tensor map made on the host, for boxes of the shape `block`."""

    array: Array | Output
    block: tuple[int, ...]


Argument = Array | Output | Mapped | int | float


@dataclass(frozen=True)
class Case:
    """A launch and its judge.

    Attributes:
        name: what pytest calls it.
        kernel: a function under `triton.jit`.
        arch: "sm_80", "sm_90".
        grid: programs in x, y, z.
        arguments: makes the arguments of the kernel in their order, without the constants.
        check: takes the outputs and asserts what they have to be.
        constants: the kernel's `tl.constexpr` arguments.
        warps, stages, ctas: as Triton's options are called with `num_` before.
        exhaustive: only with --exhaustive.
        exact: a GPU has to give the same bits: no sum is rounded and no function approximated.
        any_order: outputs may depend on the order in which programs run.
    """

    name: str
    kernel: Any
    arch: str
    grid: tuple[int, ...]
    arguments: Callable[[], Sequence[Argument]]
    check: Callable[[list[Array]], None]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    ctas: int = 1
    exhaustive: bool = False
    exact: bool = False
    any_order: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.arch}"


# --- Compiling ----------------------------------------------------------------------------------------------------------------------------


def _array_type(array: Array | Output) -> str:
    return TYPES[str(array.dtype)]


def _type(argument: Argument) -> str:
    """What Triton calls the type of an argument."""
    if isinstance(argument, Mapped):
        return f"tensordesc<{_array_type(argument.array)}{list(argument.block)}>"
    if isinstance(argument, (numpy.ndarray, Output)):
        return "*" + _array_type(argument)
    return "i32" if isinstance(argument, int) else "fp32"


def _is_divisible(argument: Argument) -> bool:
    """Whether Triton may count on a multiple of 16, as its own launcher finds out: addresses here always are."""
    return isinstance(argument, (numpy.ndarray, Output)) or (isinstance(argument, int) and argument % 16 == 0)


@functools.cache
def _compile(
    kernel: Any, types: tuple[str, ...], divisible: tuple[bool, ...], constants: tuple[tuple[str, Any], ...], capability: int, options: tuple[tuple[str, Any], ...]
) -> Any:  # fmt: skip
    names = [name for name in kernel.arg_names if name not in dict(constants)]
    attributes: dict[Any, Any] = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, does in zip(names, divisible, strict=True) if does
    }
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | dict(zip(names, types, strict=True))
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def compiled(case: Case, arguments: Sequence[Argument]) -> Any:
    """What Triton makes of a case: `.asm["ptx"]` and `.metadata`; compiled once."""
    options = {"num_warps": case.warps, "num_stages": case.stages, "num_ctas": case.ctas, "enable_fp_fusion": True}
    return _compile(
        case.kernel, tuple(map(_type, arguments)), tuple(map(_is_divisible, arguments)), tuple(case.constants.items()),
        int(case.arch.removeprefix("sm_")), tuple(options.items()),
    )  # fmt: skip


@functools.cache
def module(ptx: str) -> Module:
    """The kernel in the simulator, decoded once."""
    return Module(ptx)


# --- Running ------------------------------------------------------------------------------------------------------------------------------


def aligned_empty(nbytes: int, alignment: int = ALIGNMENT) -> Array:
    """Bytes at a multiple of `alignment`, each 0xFF: NaN in every floating-point type."""
    memory = numpy.full(nbytes + alignment, 0xFF, numpy.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes]


def _memory(argument: Array | Output) -> Array:
    """A copy of an argument, or memory for it."""
    dtype = ELEMENTS[str(argument.dtype)]
    size = int(numpy.prod(argument.shape))
    memory = aligned_empty(size * dtype.itemsize).view(dtype).reshape(argument.shape)
    values = argument.start if isinstance(argument, Output) else argument
    if values is not None:
        memory[...] = values
    return memory


def _tensor_map(memory: Array, meta: dict[str, Any]) -> bytes:
    """The map that Triton's launcher would make from what the compiled kernel says of it."""
    dtype = str(memory.dtype) if "float8" not in str(memory.dtype) else "uint8"
    swizzle = ("none", "32B", "64B", "128B")[meta["swizzle"]]
    strides = memory.strides[-2::-1]
    return encode_tiled(memory.ctypes.data, dtype, memory.shape[::-1], strides, meta["block_size"][::-1], swizzle=swizzle)


def _parameter_values(arguments: Sequence[Argument], memories: Sequence[Array | None], maps: Sequence[Any]) -> Iterator[bytes]:
    """The bytes of each parameter: a tensor map is followed by the extents and strides of its tensor."""
    metas = iter(maps)
    for argument, memory in zip(arguments, memories, strict=True):
        if isinstance(argument, Mapped):
            assert memory is not None
            yield _tensor_map(memory, next(metas))
            yield from (struct.pack("<i", extent) for extent in memory.shape)
            yield from (struct.pack("<q", stride // memory.itemsize) for stride in memory.strides)
        elif memory is not None:
            yield struct.pack("<Q", memory.ctypes.data)
        else:
            yield struct.pack("<i" if isinstance(argument, int) else "<f", argument)


def simulate(case: Case, options: Options | None = None) -> list[Array]:
    """Launch a case once; returns the outputs in the order of the arguments."""
    arguments = case.arguments()
    kernel = compiled(case, arguments)
    runnable = module(kernel.asm["ptx"])
    arrays = [argument.array if isinstance(argument, Mapped) else argument for argument in arguments]
    memories = [_memory(array) if isinstance(array, (numpy.ndarray, Output)) else None for array in arrays]
    buffers, inputs, outputs = [], [], []
    for name, array, memory in zip((n for n in case.kernel.arg_names if n not in case.constants), arrays, memories, strict=True):
        if memory is None:
            continue
        unwritten = isinstance(array, Output) and array.start is None
        buffers.append(Buffer(memory.ctypes.data, memory.nbytes, name, numpy.zeros(memory.nbytes, numpy.uint8) if unwritten else None))
        if isinstance(array, Output):
            outputs.append(memory)
        else:
            inputs.append((name, array, memory))
    grid = (*case.grid, 1, 1)[:3]
    metadata = kernel.metadata
    values = list(_parameter_values(arguments, memories, metadata.tensordesc_meta))
    hidden = len(runnable.kernel.params) - len(values)  # global scratch memory, then that of profilers
    if metadata.global_scratch_size:
        blocks = grid[0] * grid[1] * grid[2] * case.ctas
        scratch = aligned_empty(blocks * metadata.global_scratch_size, max(128, metadata.global_scratch_align))
        buffers.append(Buffer(scratch.ctypes.data, scratch.nbytes, "scratch", numpy.zeros(scratch.nbytes, numpy.uint8)))
        values.append(struct.pack("<Q", scratch.ctypes.data))
        hidden -= 1
    values += [bytes(8)] * hidden
    parameters = bytearray(runnable.param_bytes)
    for offset, value in zip(runnable.kernel.params.values(), values, strict=True):
        parameters[offset : offset + len(value)] = value
    runnable.launch(
        (grid[0] * case.ctas, grid[1], grid[2]), (32 * metadata.num_warps, 1, 1), metadata.shared, parameters, buffers, options,
        cluster=(case.ctas, 1, 1),
    )  # fmt: skip
    for name, array, memory in inputs:
        assert memory.tobytes() == array.tobytes(), f"{name} was overwritten"
    return outputs


WAYS = {
    "late": Options(threads=1, isa_rules=False, schedule="late"),
    "early": Options(threads=1, isa_rules=False, schedule="early"),
    "random 0": Options(threads=1, isa_rules=False, schedule="random", seed=0),
    "random 1": Options(threads=1, isa_rules=False, schedule="random", seed=1),
    "without checks": Options(threads=1, checks=False, schedule="late"),
}
"""How the simulator runs every case."""


def simulate_all_ways(case: Case) -> None:
    """Launch a case in all `WAYS` and judge it; what its check has seen needs none again."""
    judged: set[bytes] = set()
    for way, options in WAYS.items():
        outputs = simulate(case, options)
        bits = b"".join(output.tobytes() for output in outputs)
        if bits in judged:
            continue
        assert case.any_order or not judged, f"run as {way!r}, outputs have other bits"
        case.check(outputs)
        judged.add(bits)


# --- Judging ------------------------------------------------------------------------------------------------------------------------------


def integers(shape: tuple[int, ...], dtype: str, seed: int, largest: int = 8) -> Array:
    """Random integers of small magnitude, which every element type here holds."""
    return numpy.random.default_rng(seed).integers(-largest, largest + 1, shape).astype(ELEMENTS[dtype])


def normals(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Normally distributed values."""
    return numpy.random.default_rng(seed).standard_normal(shape).astype(ELEMENTS[dtype])


def assert_equal(got: Array, want: Array) -> None:
    """Every element is exactly the wanted one."""
    wrong = numpy.argwhere(got.astype(numpy.float64) != want.astype(numpy.float64))
    where = tuple(int(i) for i in wrong[0]) if len(wrong) else ()
    assert not len(wrong), f"{len(wrong)} of {got.size} elements are wrong; first at {where}: got {got[where]}, expected {want[where]}"


def assert_within(got: Array, want: Array, allowed: Array | float) -> None:
    """No element is further off than `allowed`."""
    error = numpy.abs(got.astype(numpy.float64) - want) - allowed
    where = numpy.unravel_index(int(numpy.argmax(numpy.where(numpy.isnan(error), numpy.inf, error))), error.shape)
    assert error[where] <= 0.0, (
        f"at {tuple(map(int, where))}: got {got[where]}, expected {want[where]}; {error[where]:.3e} beyond what is allowed"
    )
