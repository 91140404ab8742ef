"""Tiles from tables that `cuflash.autotune` has written: which bucket a launch is in, and what the tables have for it (cuflash/tuned)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import ceil

from cuflash.hardware.device import Device
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.tile_rules import broken_rule
from cuflash.problem.features import FeatureSet
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile
from cuflash.tuned import store
from cuflash.tuned.buckets import Bucket, length_bucket

_ROWS_OF_A_TILE = 64
_TILES_PER_SM = 2


def bucket_of(case: KernelCase, problem: Problem, device: Device) -> Bucket:
    """The bucket of a kernel in a call."""
    packed = problem.num_sequences is not None
    sequences = problem.num_sequences if problem.num_sequences is not None else problem.batch
    rows, heads = problem.max_seqlen_q, problem.num_heads_q
    if case.kernel.splits_keys:  # its rows are the queries of all heads that share a key head
        rows, heads = rows * problem.heads_per_kv, problem.num_heads_kv
    tiles = sequences * heads * ceil(rows / _ROWS_OF_A_TILE)
    return Bucket(
        kernel=case.kernel.name,
        dtype=f"{case.dtype} with {case.kv_dtype}" if case.kv_dtype else case.dtype,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
        allow_tf32=case.allow_tf32,
        causal=problem.is_causal,
        features=_names(case.features),
        lengths="varlen" if packed else "seqlens_kv" if problem.seqlens_kv or problem.seqlens_q else "padded",
        grid="few" if tiles < _TILES_PER_SM * device.num_sms else "full",
        seqlen_q=length_bucket(rows),
        seqlen_kv=length_bucket(problem.max_seqlen_kv),
        window=_window_bucket(problem) if case.features.window else 0,
    )


def faster_way(ways: Sequence[Sequence[KernelCase]], problem: Problem, device: Device) -> tuple[int, float, str] | None:
    """Which of two ways to the same results tables say to be faster.

    Args:
        ways: the kernels of each.
        problem: the call.
        device: where.

    Returns:
        Its number, the part of the other one's time that it takes, and "timed" or "predicted"; None where not all kernels of both were timed on the same call.
    """
    found = [[tuned_tile(case, problem, device) for case in way] for way in ways]
    if len({(of.call, of.timer) for way in found for of in way}) != 1 or not found[0][0].milliseconds:
        return None
    times = [sum(of.milliseconds for of in way) for way in found]
    number = times.index(min(times))
    return number, times[number] / max(times), "predicted" if found[0][0].timer == "model" else "timed"


def _window_bucket(problem: Problem) -> int:
    low, high = problem.features.window_low, problem.features.window_high
    visible = (min(high, 0) if problem.is_causal else high) - low + 1
    return length_bucket(min(visible, problem.max_seqlen_kv))


def tuned_tile(case: KernelCase, problem: Problem, device: Device) -> store.Found:
    """What the tables have for a kernel in a call; nothing where a row's bits must not depend on the batch, of which a bucket does."""
    if not case.kernel.is_tuned or problem.batch_invariant:
        return store.NOTHING
    return store.look_up(bucket_of(case, problem, device), case.kernel.source, device, lambda tile: broken_rule(case, tile, device) is None)


def of_all_lengths(case: KernelCase, problem: Problem, device: Device) -> tuple[Tile, ...]:
    """All that `tuned_tile` may give a call that differs in lengths, batch and heads only."""
    bucket = bucket_of(case, problem, device)
    return store.tiles_of_all_lengths(bucket, case.kernel.source, device, lambda tile: broken_rule(case, tile, device) is None)


def _names(features: FeatureSet) -> tuple[str, ...]:
    used = {entry.name: getattr(features, entry.name) for entry in fields(features) if getattr(features, entry.name)}
    return tuple(sorted(name if value is True else f"{name} of {value}" for name, value in used.items()))
