"""Forged programs, run by a process of their own: python forging.py FIRST COUNT. It ends with status 0 if each was refused, reported or ran to its end.

The mutants keep the checksum of their file right, so that what is tested is the core: nothing in a program may make it leave its memory.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import test_hopper_pipeline as hopper
from simulated import compile_cuda, pack

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options, program_cache
from cuflash.simulator.program import Program

ARRAYS = ("records", "extra", "operands", "widths", "constants", "wide", "special", "jumps", "starts")
NUMBERS = ("param_bytes", "shared_begin", "dynamic_shared_begin", "local_bytes")
ODD = (0, 1, 2, 3, 7, 8, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

SMALL = """
extern "C" __global__ void small(int* out, int n) {
    __shared__ int shared[64];
    int local[8], t = threadIdx.x;
    for (int i = 0; i < 8; ++i) local[i] = t * i;
    switch (n & 7) { case 0: t += 3; break; case 1: t *= 5; break; case 2: t -= 9; break; case 3: t ^= 77; break; case 4: t |= 6; break; case 5: t &= 25; break; }
    shared[threadIdx.x] = __shfl_xor_sync(~0u, t, 3) + local[n & 7];
    __syncthreads();
    unsigned matrix;
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(matrix) : "r"((unsigned)__cvta_generic_to_shared(shared + threadIdx.x % 8 * 4)));
    __syncthreads();
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4; cp.async.wait_all;" :: "r"((unsigned)__cvta_generic_to_shared(shared + threadIdx.x)), "l"(out + threadIdx.x) : "memory");
    __syncthreads();
    if (__any_sync(~0u, t > 5) && __match_any_sync(~0u, t)) atomicAdd(out + 63, shared[63 - threadIdx.x]);
    float d[4] = {}, a = t;
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(__float_as_uint(a)));
    out[threadIdx.x] = shared[threadIdx.x] + (int)matrix + (int)d[0] + __syncthreads_count(t);
}
"""


def _run_small(module: Module, options: Options) -> None:
    out = np.zeros(64, np.int32)
    module.launch((2, 1, 1), (64, 1, 1), 0, pack([out, 3]), [(out.ctypes.data, out.nbytes, "out")], options)


def _run_hopper(module: Module, options: Options) -> None:
    hopper.run(module, options)


def _forge(program: Program, rng: np.random.Generator) -> Program:
    """Change some numbers of one or two arrays, or a length, or a plain number."""
    changes: dict[str, Any] = {}
    for name in rng.choice(ARRAYS, rng.integers(1, 3), replace=False):
        array = getattr(program, name).copy()
        flat = array.reshape(-1)
        kind = rng.integers(0, 5)
        for _ in range(int(rng.choice([1, 2, 30]))):
            if not flat.size:
                break
            at, limit = int(rng.integers(flat.size)), int(np.iinfo(flat.dtype).max)
            if kind == 0:
                flat[at] = int(rng.choice(ODD)) & limit
            elif kind == 1:
                flat[at] = int(rng.integers(limit, dtype=np.uint64))
            elif kind == 2:
                flat[at] ^= flat.dtype.type(1 << int(rng.integers(8 * flat.itemsize)))
            else:
                flat[at] = flat[int(rng.integers(flat.size))]
        if kind == 4:
            rows = len(array) - int(rng.integers(0, len(array) + 1))
            array = array[: rows // 8 * 8 if name == "records" else rows]
        changes[name] = array
    if rng.random() < 0.2:
        changes[str(rng.choice(NUMBERS))] = int(rng.choice([-1, 0, 1, 8, 4096, 2**20, 2**31, 2**32 + 8, 2**60]))
    return dataclasses.replace(program, **changes)


def main(first: int, count: int) -> None:
    """Run mutants `first` to `first + count - 1` of the kernels in turn; their numbers are printed before each."""
    kernels: list[tuple[str, Callable[[Module, Options], None]]] = [
        (compile_cuda(SMALL), _run_small),
        (hopper.ptx(), _run_hopper),
    ]
    programs = [Module(ptx).program for ptx, _ in kernels]
    outcomes = {"ran": 0, "refused": 0, "reported": 0}
    for number in range(first, first + count):
        print(number, flush=True)
        ptx, run = kernels[number % len(kernels)]
        rng = np.random.default_rng(number)
        forged = _forge(programs[number % len(kernels)], rng)
        program_cache.write(program_cache.key(ptx, None), forged)
        schedule = ("late", "early", "random")[number % 3]
        module = Module(ptx, keep=True)
        if np.array_equal(module.program.records, programs[number % len(kernels)].records) and not np.array_equal(
            forged.records, module.program.records
        ):
            outcomes["refused"] += 1
        try:
            run(module, Options(1, schedule, max_instructions=20_000))
            outcomes["ran"] += 1
        except SimulatorError:
            outcomes["reported"] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
