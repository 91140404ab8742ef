"""Helpers of these tests: compile CUDA to PTX, write PTX for one instruction, run either on NumPy arrays."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cuflash.simulator import Counters, Module, Options

Array = npt.NDArray[Any]

_FORMATS = {"b": 1, "h": 2, "i": 4, "I": 4, "f": 4, "q": 8, "Q": 8}

# Test kernels have no headers: what they need of the CUDA headers is here, on the line of their first line.
PRELUDE = "typedef unsigned u32; typedef unsigned short u16; typedef unsigned long long u64; "


@functools.cache
def compile_cuda(source: str, arch: str = "compute_80", name: str = "test.cu") -> str:
    """CUDA C++ to PTX by NVRTC, with source lines."""
    pytest.importorskip("cupy")
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(PRELUDE + source, name, (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={arch}", "-std=c++17", "-lineinfo"))
    except nvrtc.NVRTCError as error:
        raise AssertionError(nvrtc.getProgramLog(program)) from error
    ptx = nvrtc.getPTX(program)
    return ptx if isinstance(ptx, str) else ptx.decode()


def pack(arguments: Sequence[Any]) -> bytes:
    """Kernel parameters: arrays as pointers, Python ints as 32-bit, others as (format, value)."""
    packed = b""
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            code, value = "Q", argument.ctypes.data
        elif isinstance(argument, tuple):
            code, value = argument
        elif isinstance(argument, float):
            code, value = "f", argument
        else:
            code, value = "i", argument
        packed += bytes(-len(packed) % _FORMATS[code]) + struct.pack("<" + code, value)
    return packed


def run_ptx(
    ptx: str,
    *arguments: Any,
    grid: int | tuple[int, int, int] = 1,
    block: int | tuple[int, int, int] = 32,
    shared: int = 0,
    options: Options | None = None,
    name: str = "test.cu",
    source: str = "",
) -> Counters:
    """Launch a kernel on arrays and scalars; array i is the buffer "array i"."""
    buffers = [(a.ctypes.data, a.nbytes, f"array {i}") for i, a in enumerate(arguments) if isinstance(a, np.ndarray)]
    grid = (grid, 1, 1) if isinstance(grid, int) else grid
    block = (block, 1, 1) if isinstance(block, int) else block
    module = Module(ptx, sources={name: PRELUDE + source})
    return module.launch(grid, block, shared, pack(arguments), buffers, options or Options(threads=1))


def run_cuda(source: str, *arguments: Any, arch: str = "compute_80", **launch: Any) -> Counters:
    """Compile and launch."""
    return run_ptx(compile_cuda(source, arch), *arguments, source=source, **launch)


_LOAD = {1: ("u8", "r"), 2: ("u16", "h"), 4: ("b32", "r"), 8: ("b64", "d")}
_REGISTER = {1: ".b16", 2: ".b16", 4: ".b32", 8: ".b64"}


def run_instruction(instruction: str, result: npt.DTypeLike, *operands: Array) -> Array:
    """Execute one instruction, in which %d is the result and %a, %b, … are the operands, once per element."""
    count = operands[0].size
    block = 128
    padded = [np.ascontiguousarray(np.concatenate([o, np.resize(o, -count % block)])) for o in operands]
    out = np.zeros(padded[0].size, dtype=result)
    names = "abce"[: len(operands)]
    lines = []
    for letter, array in zip(names, padded, strict=True):
        size = array.itemsize
        lines += [
            f".reg {_REGISTER[size]} %{letter};",
            f"ld.param.u64 %p, [k_param_{letter}];",
            f"mad.wide.u32 %p, %i, {size}, %p;",
            f"ld.global.{_LOAD[size][0]} %{letter}, [%p];",
        ]
    size = out.itemsize
    params = ", ".join(f".param .u64 k_param_{letter}" for letter in (*names, "d"))
    text = "\n".join(lines)
    store = {1: "u8", 2: "u16", 4: "b32", 8: "b64"}[size]
    ptx = f""".version 8.0
.target sm_90
.address_size 64
.visible .entry k({params})
{{
.reg .b32 %i, %n, %t; .reg .b64 %p; .reg .pred %q, %w; .reg {_REGISTER[size]} %d;
mov.u32 %i, %tid.x;
mov.u32 %n, %ctaid.x;
mov.u32 %t, %ntid.x;
mad.lo.u32 %i, %n, %t, %i;
{text}
{instruction}
ld.param.u64 %p, [k_param_d];
mad.wide.u32 %p, %i, {size}, %p;
st.global.{store} [%p], %d;
ret;
}}
"""
    run_ptx(ptx, *padded, out, grid=out.size // block, block=block)
    return out[:count]


def special_integers(dtype: npt.DTypeLike, count: int = 400, seed: int = 0) -> Array:
    """Random integers of all magnitudes, and the extreme ones."""
    info = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    wide = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
    shifted = wide >> rng.integers(0, info.bits, count).astype(dtype)
    extreme = np.array([0, 1, 2, 3, 7, 31, 32, 33, info.max, info.max - 1, info.min, info.min + 1], dtype=dtype)
    values = np.concatenate([wide[: count // 2], shifted[: count // 2], extreme])
    return rng.permutation(values)


def special_floats(dtype: npt.DTypeLike, count: int = 400, seed: int = 0) -> Array:
    """Random floats of all magnitudes, subnormals, infinities and NaN."""
    rng = np.random.default_rng(seed)
    info = np.finfo(dtype)
    scale = rng.integers(info.minexp // 2, info.maxexp // 2, count)
    values = np.ldexp(rng.standard_normal(count), scale).astype(dtype)
    near_one = rng.standard_normal(count // 2).astype(dtype)
    tiny = info.smallest_subnormal
    extreme = np.array(
        [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, np.inf, -np.inf, np.nan, info.max, -info.max, info.tiny, tiny, -tiny], dtype=dtype
    )
    return rng.permutation(np.concatenate([values, near_one, extreme]))
