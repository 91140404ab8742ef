"""Numbers of float32 as sums of three of bfloat16, for `forward_wgmma_float32`: where the terms of query, key and value lie, and the kernel that makes
them.

A row of an array of terms has the terms of all columns, the highest ones first, each filled up with zeros to whole slabs of 64 columns
(kernels/operand_terms.cu).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, prod

from cuflash.hardware.device import Device
from cuflash.planning import kernel_specs
from cuflash.planning.codegen import config_text
from cuflash.planning.kernel_cases import KernelCase, columns_of_terms
from cuflash.planning.kernel_plan import Buffer, KernelPlan, LaunchShape
from cuflash.problem.layout import View
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

DTYPE = "bfloat16"
_COLUMNS_OF_THREAD = 8


def arrays(problem: Problem) -> dict[str, tuple[str, View]]:
    """Of each operand the array of its terms: its name, and how it lies."""
    found = {}
    for name, view in (("query", problem.query), ("key", problem.key), ("value", problem.value)):
        batch, seqlen, heads, head_dim = view.shape
        columns = columns_of_terms(head_dim)
        found[name] = f"{name}_terms", View((batch, seqlen, heads, columns), (seqlen * heads * columns, heads * columns, columns, 1))
    return found


def workspace(problem: Problem, kernels: Iterable[KernelPlan]) -> tuple[Buffer, ...]:
    """The arrays of terms."""
    if not any(kernel.spec.takes_terms for kernel in kernels):
        return ()
    return tuple(Buffer(name, view.shape, DTYPE) for name, view in arrays(problem).values())


def kernel(problem: Problem, device: Device) -> KernelPlan:
    """The kernel that splits query, key and value."""
    spec = kernel_specs.OPERAND_TERMS
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "NUM_WARPS": spec.num_warps,
        "VECTORIZED": problem.vectorized,
    }
    elements = sum(prod(view.shape) for _, view in arrays(problem).values())
    num_blocks = ceil(elements / (kernel_specs.TERMS * _COLUMNS_OF_THREAD * 32 * spec.num_warps))
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim, head_dim_v=problem.head_dim_v), Tile(1, 1, spec.num_warps, 1),
        config_text(problem.dtype, constants), LaunchShape(num_blocks, 32 * spec.num_warps, 0), 1,
    )  # fmt: skip
