"""A plan in words: problem, device, kernels with tiles and grids, memory, work."""

from __future__ import annotations

from collections.abc import Sequence

from cuflash.hardware.device import Device
from cuflash.planning import kernel_cases, kernel_specs, split_forward
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.visits import all_tiles, visited_tiles
from cuflash.problem.features import NO_FEATURES
from cuflash.problem.problem import Problem


def describe(
    problem: Problem, device: Device, kernels: Sequence[KernelPlan], *, backward: bool, output_bytes: int, workspace_bytes: int, choice: str
) -> str:
    """A few lines for people."""
    causal = f"causal ({problem.causal_alignment})" if problem.is_causal else "not causal"
    where = device.name if device.arch in device.name else f"{device.name}, {device.arch}"
    lines = [
        f"{'backward' if backward else 'tangents of' if problem.of_tangents else 'forward'} attention on {where}",
        f"  problem    {problem.dtype}, {_extents(problem)}, "
        f"head_dim {kernel_cases.head_dims(problem.head_dim, problem.head_dim_v)}, {causal}, scale {problem.scale:.6g}",
    ]
    if problem.features.kinds != NO_FEATURES:
        lines.append(f"  features   {problem.features.describe()}")
    lines.append(f"  products   {_units(problem, device, of_terms=any(kernel.spec.takes_terms for kernel in kernels))}")
    if not problem.vectorized and problem.cache is None:
        lines.append("  copies     element by element, of arrays whose rows do not start on 16 bytes or whose head_dim is not contiguous")
    lines += [f"  kernel     {_launch(kernel)}" for kernel in kernels] or ["  kernel     none: there is nothing to compute"]
    lines += [f"  tile by    {kernel.name}: {kernel.tile_by}" for kernel in kernels if kernel.tile_by]
    lines += [f"  keys       {_traffic(kernel, problem, device)}" for kernel in kernels if kernel.spec.splits_keys]
    if choice:
        lines.append(f"  choice     {choice}")
    visits = [_visits(kernel, problem) for kernel in kernels if kernel.spec.is_tiled and kernel.spec.warps_share == "stationary"]
    if visits and (problem.is_causal or problem.features.kinds.hides_keys or problem.is_ragged):
        lines.append(f"  tiles      {', '.join(visits)}")
    at_most = "at most " if problem.hides_by_data else ""
    flops = problem.flops_backward if backward or problem.of_tangents else problem.flops_forward
    lines += [
        f"  memory     outputs {_bytes(output_bytes)}, workspace {_bytes(workspace_bytes)}; unfused attention would take {_bytes(_score_bytes(problem, backward))} more",
        f"  work       {at_most}{flops / 1e9:.4g} GFLOP in matrix products over visible pairs; the same bits on every run",
    ]
    return "\n".join(lines)


def _extents(problem: Problem) -> str:
    """Batch, lengths and heads."""
    grouped = problem.num_heads_q != problem.num_heads_kv
    heads = f"{problem.num_heads_q}/{problem.num_heads_kv} heads" if grouped else _count(problem.num_heads_q, "head")
    lengths = f"batch {problem.batch}, seqlen {problem.seqlen_q} x {problem.seqlen_kv}"
    if problem.num_sequences is not None:
        lengths = f"{_count(problem.num_sequences, 'packed sequence')} of {problem.seqlen_q} x {problem.seqlen_kv} tokens in all"
        lengths += f", each of at most {problem.max_seqlen_q} x {problem.max_seqlen_kv}"
        lengths += ", up to its seqused" if problem.in_places else ""
    if problem.cache is not None:
        pages = f", pages of {problem.cache.page_size}" if problem.cache.page_size else ""
        new = problem.cache.new_keys
        kept = f" of {problem.kv_dtype}" if problem.kv_dtype != problem.dtype else ""
        lengths += f" in a cache{kept}{pages}, keys of each row up to its cache_seqlens" + (f" and {new} new" if new else "")
    elif problem.seqlens_kv:
        lengths += ", keys of each row up to its seqlens_kv"
    lengths += ", queries of each row up to its seqlens_q" if problem.seqlens_q else ""
    return f"{lengths}, {heads}"


def _score_bytes(problem: Problem, backward: bool) -> int:
    """What unfused attention would keep of scores and their like."""
    scores = (problem.num_sequences or problem.batch) * problem.num_heads_q * problem.max_seqlen_q * problem.max_seqlen_kv
    return scores * problem.itemsize * (4 if backward else 2)


def _launch(kernel: KernelPlan) -> str:
    tile = f"{kernel.tile}, " if kernel.spec.is_tiled or kernel.spec == kernel_specs.VISIBLE_TILES else ""
    stay = "stays" if kernel.num_blocks == 1 else "stay"
    stays = f"which {stay} for {_count(kernel.num_work, 'tile')} of queries, " if kernel.num_work > kernel.num_blocks else ""
    if kernel.shares.tiles:
        last = "one" if kernel.shares.tiles == 1 else str(kernel.shares.tiles)
        stays = stays or f"for {_count(kernel.num_work, 'tile')} of queries, "
        stays += f"keys of the last {last} in equal shares, "
    splits = f", keys of a sequence in {kernel.splits.number} splits" if kernel.splits.number > 1 else ""
    if kernel.splits.chains:
        chains = f", {_count(kernel.splits.chains, 'chain')} of keys with sums of dQ of their own" if kernel.spec.added_up else ""
        splits = f", queries of a tile of keys in {_count(kernel.splits.number, 'split')}{chains}" if kernel.spec.is_tiled else ""
    if kernel.splits.stream_k:
        splits = ", stream-K: equal shares of all keys, whatever the lengths are"
    if kernel.packed_places and kernel.spec != kernel_specs.PACKED_TILES:
        splits = ", tiles from a list of those that there are"
    return (
        f"{kernel.name}: {kernel.source}, {tile}{_count(kernel.num_blocks, 'block')} of {kernel.num_threads} threads, {stays}"
        f"{kernel.shared_bytes} bytes of shared memory{splits}"
    )


def _traffic(kernel: KernelPlan, problem: Problem, device: Device) -> str:
    of = split_forward.traffic(kernel, problem, device)
    blocks = f"{_count(of.resident, 'block')} of an SM at a time, in {_count(of.waves, 'wave')}"
    return f"at most {_bytes(of.key_bytes)} of keys and values to read, by {blocks}, with {_bytes(of.bytes_in_flight)} in flight per SM"


def _visits(kernel: KernelPlan, problem: Problem) -> str:
    count = visited_tiles(problem, kernel.tile, by_keys=kernel.spec.owns_keys)
    of = f"of {all_tiles(problem, kernel.tile)} per head{' and sequence' if problem.num_sequences is not None else ''}"
    return f"{kernel.name} visits as many {of} as data leave visible" if count is None else f"{kernel.name} visits {count} {of}"


def _units(problem: Problem, device: Device, *, of_terms: bool) -> str:
    case = KernelCase(kernel_specs.FORWARD, problem.dtype, problem.head_dim)
    if case.uses_simt(device):
        return "float32 units: the tensor cores of sm_75 take float16 only"
    if of_terms:
        return f"tensor cores, {kernel_specs.TERM_PRODUCTS} x bfloat16 (float32 accuracy)"
    if problem.dtype == "float32":
        return "tensor cores, TF32" if problem.allow_tf32 else "tensor cores, 3 x TF32 (float32 accuracy)"
    return f"tensor cores, {problem.dtype} with float32 sums"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
