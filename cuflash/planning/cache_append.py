"""The kernel that appends new keys and values to a cache and rotates keys and queries: when it runs, and what it needs."""

from __future__ import annotations

from math import ceil

from cuflash.hardware.device import Device
from cuflash.planning.codegen import CPP_ELEMENTS, config_text
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import Buffer, KernelPlan, LaunchShape
from cuflash.planning.kernel_specs import CACHE_APPEND
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile


def kernels(problem: Problem, device: Device) -> tuple[KernelPlan, ...]:
    """The kernel; none where nothing is appended."""
    cache = problem.cache
    if cache is None or cache.new is None:
        return ()
    elements = problem.batch * cache.new.count * problem.num_heads_kv * (problem.head_dim + problem.head_dim_v)
    if cache.rotary is not None:
        elements += problem.batch * problem.seqlen_q * problem.num_heads_q * problem.head_dim
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "NUM_WARPS": CACHE_APPEND.num_warps,
        "PAGED": cache.is_paged,
        "VECTORIZED": False,
        "SEQLENS_KV": True,
        "IN_PLACES": False,
        "VARLEN": problem.num_sequences is not None,
        "CacheElement": CPP_ELEMENTS[problem.kv_dtype],
        "RotaryElement": CPP_ELEMENTS[problem.dtype if cache.rotary is None else cache.rotary.dtype],
    }
    num_threads = 32 * CACHE_APPEND.num_warps
    shape = LaunchShape(ceil(elements / num_threads), num_threads, 0)
    case = KernelCase(CACHE_APPEND, problem.dtype, problem.head_dim)
    return (KernelPlan(case, Tile(1, 1, CACHE_APPEND.num_warps, 1), config_text(problem.dtype, constants), shape, shape.num_blocks),)


def workspace(problem: Problem) -> tuple[Buffer, ...]:
    """The rotated queries."""
    if problem.cache is None or problem.cache.rotary is None:
        return ()
    return (Buffer(CACHE_APPEND.workspace[0], problem.query.shape, problem.dtype),)
