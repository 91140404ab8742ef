"""Predictions for people and as JSON. A reader is told each time that nothing of it was measured."""

from __future__ import annotations

from typing import Any

from cuflash.planning.kernel_cases import head_dims
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.timing.machine import CARDS
from cuflash.timing.prediction import KernelPrediction, Launch, Prediction


def kernel_line(predicted: KernelPrediction) -> str:
    """One line: what the kernel is, its share of the matrix rate and what is busiest."""
    of, tile = predicted.description, predicted.description.tile
    what = f"{of.arch} {of.kernel} {of.dtype} {head_dims(of.head_dim, of.head_dim_v)} {'causal' if of.causal else 'full'}"
    busiest = max(predicted.busy, key=lambda name: predicted.busy[name])
    return (
        f"{what} {tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages}: {predicted.matrix_share:.2f} of the matrix rate with "
        f"{_blocks(predicted.blocks)} per SM, {predicted.instructions / max(1, predicted.matrix):.2f} instructions per product; "
        f"busiest: {busiest} ({predicted.busy[busiest]:.2f})"
    )


def lines(prediction: Prediction) -> list[str]:
    """The prediction of a call in words."""
    plan, card = prediction.plan, prediction.card
    problem = plan.problem
    what = f"{'backward' if plan.backward else 'forward'}, {problem.dtype}, batch {problem.batch}, seqlen {problem.seqlen_q} x {problem.seqlen_kv}"
    heads = f"{problem.num_heads_q}/{problem.num_heads_kv} heads, head_dim {head_dims(problem.head_dim, problem.head_dim_v)}"
    features = "".join(f", {name}" for name in problem.features.kinds.names())
    rate = "" if problem.hides_by_data else f", {prediction.tflops:.4g} TFLOP/s"  # how many pairs are visible is not counted
    text = [
        f"predicted for {card.name} ({card.arch}, {card.num_sms} SMs, {card.clock_ghz} GHz); docs/timing.md says how far to trust it",
        f"  {what}, {heads}, {'causal' if problem.is_causal else 'not causal'}{features}: {prediction.milliseconds:.4g} ms{rate}",
    ]
    for launch in prediction.launches:
        text += _launch_lines(launch)
    return text


def kernel_lines(predicted: KernelPrediction) -> list[str]:
    """The steady state of one kernel in words."""
    where = "memory" if TILED_KERNELS[predicted.description.kernel].splits_keys else "L2"
    busy = sorted(predicted.busy.items(), key=lambda item: -item[1])
    text = [
        f"    steady state  {predicted.matrix_share:.3f} of the matrix rate: {predicted.clocks:.0f} clocks for one tile of each of {_blocks(predicted.blocks)} per SM",
        f"    warp          {predicted.instructions} instructions per tile, {predicted.matrix} of them matrix products",
        f"    busy          {', '.join(f'{name} {share:.2f}' for name, share in busy if share >= 0.005)} ({where} at {predicted.l2_bytes:.3g} bytes per clock)",
    ]
    if predicted.between_tiles is not None:
        text.append(f"    blocks stay   a tile of queries takes {predicted.between_tiles:.0f} clocks beside its trips")
    if predicted.speedups:
        gains = sorted(predicted.speedups.items(), key=lambda item: -item[1])
        text.append(f"    faster without {', '.join(f'{name} {gain:.2f}x' for name, gain in gains)}")
    return text


def _launch_lines(launch: Launch) -> list[str]:
    if launch.kernel is None:
        return [f"  {launch.name}: {launch.milliseconds:.4g} ms, by its traffic"]
    tile, of = launch.kernel.description.tile, launch.kernel.description
    head = (
        f"  {launch.name}: {launch.milliseconds:.4g} ms; {tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages}, {of.registers} registers, "
        f"{of.spill_bytes} bytes spilled; {_blocks(launch.num_blocks)}, {launch.tiles_visited} tiles, balance {launch.balance:.2f}"
    )
    if 0 < launch.clock_ghz < CARDS[of.arch].clock_ghz:
        head += f"; at {launch.clock_ghz:.2f} GHz, to which power limits the card"
    if launch.memory_binds:
        head += "; as long as its operands and results take to and from memory"
    if launch.tiles_partial:
        head += f"; {launch.tiles_partial} tiles with hidden pairs, {launch.partial_cost:.2f} times as long"
    return [head, *kernel_lines(launch.kernel)]


def _blocks(count: int) -> str:
    return f"{count} block" if count == 1 else f"{count} blocks"


def kernel_json(predicted: KernelPrediction) -> dict[str, Any]:
    """The steady state of one kernel, with the fields of its description."""
    return predicted.description.to_json() | {
        "blocks_per_sm": predicted.blocks,
        "matrix_share": round(predicted.matrix_share, 4),
        "binds": predicted.binds,
        "clocks_per_trip": round(predicted.clocks, 1),
        "clocks_between_tiles": None if predicted.between_tiles is None else round(predicted.between_tiles, 1),
        "instructions_per_trip": predicted.instructions,
        "matrix_instructions_per_trip": predicted.matrix,
        "busy": {name: round(share, 4) for name, share in predicted.busy.items()},
        "speedup_without": {name: round(gain, 4) for name, gain in predicted.speedups.items()},
    }


def to_json(prediction: Prediction) -> dict[str, Any]:
    """The prediction of a call."""
    problem, card = prediction.plan.problem, prediction.card
    return {
        "card": card.name,
        "arch": card.arch,
        "clock_ghz": card.clock_ghz,
        "pass": "backward" if prediction.plan.backward else "forward",
        "dtype": problem.dtype,
        "batch": problem.batch,
        "seqlen": problem.seqlen_q,
        "seqlen_kv": problem.seqlen_kv,
        "heads": problem.num_heads_q,
        "heads_kv": problem.num_heads_kv,
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "causal": problem.is_causal,
        "features": list(problem.features.kinds.names()),
        "predicted_milliseconds": round(prediction.milliseconds, 6),
        "predicted_tflops": None if problem.hides_by_data else round(prediction.tflops, 3),
        "kernels": [_launch_json(launch) for launch in prediction.launches],
    }


def _launch_json(launch: Launch) -> dict[str, Any]:
    found = {"kernel": launch.name, "predicted_milliseconds": round(launch.milliseconds, 6), "num_blocks": launch.num_blocks}
    if launch.kernel is None:
        return found
    found["clock_ghz"] = round(launch.clock_ghz, 3)
    partial = {"tiles_partial": launch.tiles_partial, "partial_cost": round(launch.partial_cost, 4)}
    steady = kernel_json(launch.kernel) | {"binds": launch.binds}
    return found | {"tiles_visited": launch.tiles_visited} | partial | {"balance": round(launch.balance, 4)} | steady
