"""How new keys and values come into a cache, and keys and queries are rotated: a few by the kernel of attention (kernels/tile/new_keys.cuh), many by one before it."""

from __future__ import annotations

from math import ceil

from cuflash.hardware.device import Device
from cuflash.planning.codegen import CPP_ELEMENTS, config_text
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import Buffer, KernelPlan, LaunchShape
from cuflash.planning.kernel_specs import CACHE_APPEND, FORWARD_SPLIT, KernelSpec
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

MAX_FUSED_KEYS = 16
"""Of each sequence, which blocks take on the way: each tile of rows rotates those that it sees anew, and one block writes all of a key head."""


def is_fused(spec: KernelSpec, problem: Problem) -> bool:
    """Whether a kernel of attention appends by itself."""
    cache = problem.cache
    if spec != FORWARD_SPLIT or cache is None or cache.new is None or problem.num_sequences is not None:
        return False
    return cache.new.count <= MAX_FUSED_KEYS


def constants(spec: KernelSpec, problem: Problem) -> dict[str, int | bool | str]:
    """Of `Config`, for the kernel of attention."""
    appends = is_fused(spec, problem)
    return {"APPENDS": appends, "RotaryElement": _table_element(problem) if appends else CPP_ELEMENTS[problem.dtype]}


def kernels(spec: KernelSpec, problem: Problem, device: Device) -> tuple[KernelPlan, ...]:
    """The kernel before that of attention, which is `spec`; none where nothing is appended, or where that one does it."""
    cache = problem.cache
    if cache is None or cache.new is None or is_fused(spec, problem):
        return ()
    elements = problem.batch * cache.new.count * problem.num_heads_kv * (problem.head_dim + problem.head_dim_v)
    if cache.rotary is not None:
        elements += problem.batch * problem.seqlen_q * problem.num_heads_q * problem.head_dim
    config: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "NUM_WARPS": CACHE_APPEND.num_warps,
        "PAGED": cache.is_paged,
        "VECTORIZED": False,
        "SEQLENS_KV": True,
        "IN_PLACES": False,
        "VARLEN": problem.num_sequences is not None,
        "CacheElement": CPP_ELEMENTS[problem.kv_dtype],
        "RotaryElement": _table_element(problem),
    }
    num_threads = 32 * CACHE_APPEND.num_warps
    shape = LaunchShape(ceil(elements / num_threads), num_threads, 0)
    case = KernelCase(CACHE_APPEND, problem.dtype, problem.head_dim)
    return (KernelPlan(case, Tile(1, 1, CACHE_APPEND.num_warps, 1), config_text(problem.dtype, config), shape, shape.num_blocks),)


def _table_element(problem: Problem) -> str:
    """Of the tables of cos and sin, in C++."""
    rotary = problem.cache.rotary if problem.cache is not None else None
    return CPP_ELEMENTS[problem.dtype if rotary is None else rotary.dtype]


def workspace(problem: Problem) -> tuple[Buffer, ...]:
    """The rotated queries."""
    if problem.cache is None or problem.cache.rotary is None:
        return ()
    return (Buffer(CACHE_APPEND.workspace[0], problem.query.shape, problem.dtype),)
