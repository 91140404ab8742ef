"""Bytes that kernels move from and to memory: at least, of those that walk over tiles; all, of those that do not, or seldom."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from cuflash.errors import UnsupportedError
from cuflash.planning import kernel_specs
from cuflash.planning.kernel_cases import conversion_bytes, terms_bytes
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import KernelSpec
from cuflash.problem.problem import Problem


def least_bytes(kernel: KernelPlan, problem: Problem) -> float:
    """Of the operands and results of a kernel, each moved once."""
    rows_q = problem.query_rows
    rows_kv = problem.key_shape[0] * problem.num_heads_kv * problem.seqlen_kv
    width = problem.itemsize * (problem.head_dim + problem.head_dim_v)
    moved = (*kernel.spec.stationary, *kernel.spec.streamed, *kernel.spec.outputs)
    of_queries = sum(name in ("query", "query_dot", "grad_out", "O", "O_dot", "dQ") for name in moved)
    sums = 4 * problem.head_dim * rows_q if kernel.spec.added_up else 0
    if kernel.spec.splits_keys:
        of_result = 4 * kernel.splits.number if kernel.splits.makes_parts else problem.itemsize  # parts are float32
        columns = problem.head_dim if kernel.case.value_in_key else problem.head_dim + problem.head_dim_v
        rows = problem.sequences * problem.num_heads_kv * problem.max_seqlen_kv
        return problem.kv_itemsize * rows * columns + rows_q * (problem.itemsize * problem.head_dim + of_result * problem.head_dim_v)
    return width / 2 * (of_queries * rows_q + (len(moved) - of_queries) * rows_kv) + sums


def bytes_of(kernel: KernelPlan, problem: Problem) -> int:
    """Of a kernel that walks over no tiles, or seldom.

    Raises:
        UnsupportedError: nothing is known of it.
    """
    if kernel.spec not in _TRAFFIC:
        hint = "Leave out the features that need it."
        raise UnsupportedError(
            "features", f"a call with the kernel {kernel.name}", "kernels that walk over tiles or whose traffic is known", hint
        )
    more_sums = max(0, kernel.splits.chains - 1) * 4 * problem.query_rows * problem.head_dim  # of chains
    return _TRAFFIC[kernel.spec](problem) + more_sums


def _listed_bytes(problem: Problem) -> int:
    """A boolean mask, and ids; the lists themselves are short."""
    mask = problem.features.attn_mask
    ids = 4 * problem.batch * (problem.seqlen_q + problem.seqlen_kv) if problem.features.kinds.segments else 0
    return ids + (prod(mask.extents) if mask is not None and problem.features.kinds.attn_mask == "bool" else 0)


_TRAFFIC: dict[KernelSpec, Callable[[Problem], int]] = {
    # reads the output and its gradient, writes eight bytes for each row
    kernel_specs.BACKWARD_DELTA: lambda problem: problem.query_rows * (2 * problem.itemsize * problem.head_dim_v + 8),
    kernel_specs.BACKWARD_DQ_CONVERT: conversion_bytes,
    # where no row has huge scores: reads lse, writes the statistics' reference and log2 of the sum
    kernel_specs.BACKWARD_ROW_SUMS: lambda problem: problem.query_rows * 12,
    # reads lse and delta
    kernel_specs.BACKWARD_SINKS: lambda problem: problem.query_rows * 8,
    kernel_specs.VISIBLE_TILES: _listed_bytes,
    kernel_specs.OPERAND_TERMS: terms_bytes,
}
