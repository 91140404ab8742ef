"""`python -m cuflash explain`: what one call would run on a GPU, which need not be here, and why.

Contract: `explain` gathers facts without printing; nothing is launched. Only the prediction compiles. What cannot be found out says why instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from cuflash.cli.cached_calls import add_cache
from cuflash.cli.command_options import add_call, add_features, sample_of

if TYPE_CHECKING:
    from cuflash.cli.samples import Sample
    from cuflash.hardware.device import Device
    from cuflash.planning.kernel_plan import KernelPlan
    from cuflash.planning.plan import Plan
    from cuflash.problem.tile import Tiles
    from cuflash.timing.machine import Card
    from cuflash.timing.prediction import Prediction

SHOWN_TILES = 3


@dataclass(frozen=True)
class TileFacts:
    """Why a kernel has its tile.

    Attributes:
        kernel: its name.
        tile_by: where the tile is from.
        legal: how many tiles of the usual shapes are legal.
        refused: how many each rule refuses.
        next_best: the others that the model of tiles prefers, as tables have them.
    """

    kernel: str
    tile_by: str
    legal: int
    refused: Mapping[str, int]
    next_best: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """All that there is to say of a call.

    Attributes:
        plan: what would run.
        tiles: of each kernel with matrix products.
        ruled_out: kernels that the call cannot have, and why.
        flops: of the matrix products over visible pairs.
        least_bytes: operands and results, each moved once.
        card: whose peaks and clock predictions are for; None where nothing is known of the architecture.
        prediction: of the timing model; None where `not_predicted` says why.
        compiled: whether each kernel is in the cache, by name; None where that cannot be said.
    """

    plan: Plan
    tiles: tuple[TileFacts, ...]
    ruled_out: Mapping[str, str]
    flops: int
    least_bytes: int
    card: Card | None
    prediction: Prediction | None
    not_predicted: str
    compiled: Mapping[str, bool] | None

    @property
    def bounds_ms(self) -> tuple[float, float] | None:
        """Milliseconds that the matrix units at their peak, and memory, would take alone; None where nothing is known of the architecture."""
        from cuflash.timing import machine

        if self.card is None:
            return None
        problem = self.plan.problem
        kind = "tf32" if problem.dtype == "float32" else "half"
        units = machine.multiprocessor(self.card.arch)
        rate = units.matrix_rates[kind] / (3 if kind == "tf32" and not problem.allow_tf32 else 1)
        if units.warpgroups is not None and any(kernel.spec.implementation == "wgmma" for kernel in self.plan.kernels):
            rate = units.warpgroups.multiply_adds
        peak = 2 * rate * machine.SUB_PARTITIONS * self.card.num_sms * self.card.clock_ghz * 1e9
        return 1e3 * self.flops / peak, 1e3 * self.least_bytes / self.card.memory_bytes_per_second


def explain(
    sample: Sample, device: Device, *, backward: bool, tile: Tiles = None, predict: bool = True, limits: bool = True
) -> Explanation:
    """Find out all about a pass of a call.

    Raises:
        CuflashError: what the call itself raises.
    """
    from cuflash.cli import samples
    from cuflash.errors import CuflashError
    from cuflash.planning import planner
    from cuflash.timing import machine, prediction

    problem = samples.problem_of(sample, backward=backward)
    plan = planner.make_plan(problem, device, backward=backward, tile=tile)
    card, predicted, reason = machine.CARDS.get(device.arch), None, ""
    compiled = _compiled(plan)  # before the prediction compiles
    if not predict:
        reason = "not asked for"
    elif card is None:
        reason = f"the timing model knows {', '.join(machine.CARDS)}, and this is {device.arch}"
    else:
        try:
            data = sample.arguments() if problem.hides_by_data else {}
            predicted = prediction.predict_plan(plan, card, limits=limits, data=data)
        except CuflashError as error:
            reason = str(error).partition("\n")[0]
    return Explanation(
        plan, tuple(_tile_facts(kernel, device) for kernel in plan.kernels if kernel.spec.is_tiled), planner.ruled_out(problem, device, backward=backward),
        problem.flops_backward if backward else problem.flops_forward, _least_bytes(plan), card, predicted, reason, compiled,
    )  # fmt: skip


def _tile_facts(kernel: KernelPlan, device: Device) -> TileFacts:
    from cuflash.planning import tile_choice

    legal = tile_choice.legal_tiles_for(kernel.case, device)
    others = [f"{tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages}" for tile in legal if tile != kernel.tile]
    return TileFacts(kernel.name, kernel.tile_by, len(legal), tile_choice.refusals(kernel.case, device), tuple(others[:SHOWN_TILES]))


def _least_bytes(plan: Plan) -> int:
    problem = plan.problem
    rows, columns = prod(problem.query.shape), prod(problem.key_shape) + prod(problem.value_shape)
    if problem.cache is not None:  # pages may be of other sequences
        columns = problem.sequences * problem.seqlen_kv * problem.num_heads_kv * (problem.head_dim + problem.head_dim_v)
    moved = problem.itemsize * rows + problem.kv_itemsize * columns + plan.output_bytes
    if plan.backward:  # out and its gradient, lse
        moved += 2 * problem.itemsize * prod(problem.output_shape) + 4 * prod(problem.lse_shape)
    mask = problem.features.attn_mask
    if mask is not None:
        moved += prod(mask.extents) * {"bool": 1, "float32": 4}.get(mask.dtype, 2)
    return moved


def _compiled(plan: Plan) -> dict[str, bool] | None:
    """Which kernels are in the cache on disk; nothing is compiled."""
    from cuflash.errors import SetupError
    from cuflash.jit import kernel_files

    try:
        found: dict[str, bool] = {}
        for kernel in plan.kernels:  # several may make lists of visible tiles
            there = kernel_files.read(kernel_files.place_of(kernel.request(plan.device))) is not None
            found[kernel.name] = there and found.get(kernel.name, True)
    except SetupError:
        return None
    return found


# --- Words --------------------------------------------------------------------------------------------------------------------------------


def lines(found: Explanation) -> list[str]:
    """For people: the plan, then why, then what it costs."""
    return [*str(found.plan).splitlines(), *_why(found), *_cost(found), *_state(found)]


def _why(found: Explanation) -> list[str]:
    text = ["why these tiles"] if found.tiles else []
    for facts in found.tiles:
        refused = ", ".join(f"{count} by {rule}" for rule, count in sorted(facts.refused.items(), key=lambda item: -item[1]))
        text.append(f"  {facts.kernel}: {facts.legal} tiles of the usual shapes are legal; refused: {refused or 'none'}")
        text.append(f"    others, best by the model of tiles first: {', '.join(facts.next_best) or 'none'}")
    if any("model" in facts.tile_by for facts in found.tiles):  # that of tiles or of time
        text.append("  no timing of this GPU decides: python -m cuflash autotune makes one (docs/tuning.md)")
    if found.ruled_out:
        text.append("kernels that this call cannot have")
        text += [f"  {name}: {reason}" for name, reason in found.ruled_out.items()]
    return text


def _cost(found: Explanation) -> list[str]:
    from cuflash.planning import split_forward
    from cuflash.timing import report

    per_byte = found.flops / max(1, found.least_bytes)
    text = [
        "cost",
        f"  {found.flops / 1e9:.4g} GFLOP, at least {found.least_bytes / 2**20:.4g} MiB to and from memory: {per_byte:.4g} FLOP per byte",
    ]
    bounds = found.bounds_ms
    if bounds is not None and found.card is not None:
        products, memory = bounds
        larger = "the matrix units" if products >= memory else "memory"
        text.append(
            f"  at the peaks of {found.card.name}: products by mma.sync {_time(products)}, memory {_time(memory)}; {larger} would bind"
        )
    share = split_forward.predicted_share(found.plan)
    if share is not None:
        text.append(f"  by the model of splits, forward_split takes keys from memory at {share:.0%} of its bandwidth, with full caches")
    if found.prediction is None:
        return [*text, f"  not predicted: {found.not_predicted}"]
    text += report.lines(found.prediction)[:2]
    for launch in found.prediction.launches:
        if launch.kernel is not None:
            text.append(f"    {launch.name}: {launch.milliseconds:.4g} ms, {_binds(launch.binds, launch.kernel.speedups)}")
        else:
            text.append(f"    {launch.name}: {launch.milliseconds:.4g} ms, by its traffic")
    return text


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.4g} ms" if milliseconds >= 1e-3 else f"{1e3 * milliseconds:.4f} µs"


def _binds(limit: str, speedups: Mapping[str, float]) -> str:
    gain = f", without which it would be {speedups[limit]:.2f}x as fast" if limit in speedups else ""
    return f"{limit} binds{gain}"


def _state(found: Explanation) -> list[str]:
    if found.compiled is None:
        return ["compiled: not known without NVRTC"]
    from cuflash.jit import compiler

    by = f"by NVRTC {compiler.nvrtc_text()}"
    missing = [name for name, there in found.compiled.items() if not there]
    if not missing:
        return [f"compiled: all in the cache, {by}" if found.compiled else "compiled: nothing to compile"]
    return [
        f"compiled: not yet {', '.join(missing)}, {by}; the first call takes about a second for each, python -m cuflash warmup does it ahead"
    ]


def to_json(found: Explanation) -> dict[str, Any]:
    """The same for programs."""
    from cuflash.planning import split_forward
    from cuflash.timing import report

    plan = found.plan
    return {
        "device": plan.device.name,
        "arch": plan.device.arch,
        "pass": "backward" if plan.backward else "forward",
        "choice": plan.choice,
        "kernels": [
            {"kernel": kernel.name, "tile": [kernel.tile.tile_q, kernel.tile.tile_kv, kernel.tile.num_warps, kernel.tile.num_stages], "tile_by": kernel.tile_by,
             "num_blocks": kernel.num_blocks, "num_threads": kernel.num_threads, "shared_bytes": kernel.shared_bytes,
             "compiled": None if found.compiled is None else found.compiled[kernel.name]}
            for kernel in plan.kernels
        ],
        "ruled_out": dict(found.ruled_out),
        "flops": found.flops,
        "least_bytes": found.least_bytes,
        "bounds_milliseconds": None if found.bounds_ms is None else [round(value, 6) for value in found.bounds_ms],
        "output_bytes": plan.output_bytes,
        "workspace_bytes": plan.workspace_bytes,
        "prediction": None if found.prediction is None else report.to_json(found.prediction),
        "not_predicted": found.not_predicted,
        "share_of_bandwidth": split_forward.predicted_share(plan),
    }  # fmt: skip


# --- The command --------------------------------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `python -m cuflash`."""
    parser = commands.add_parser(
        "explain", help="what one call would run and why, what it costs, what binds it; also for a GPU that is not here"
    )
    add_call(parser)
    parser.add_argument("--arch", help="a GPU of this architecture, which need not be here (default: this machine's GPU, or the simulator)")
    parser.add_argument("--fast", action="store_true", help="leave out what it would be without each limit, which takes most of the time")
    parser.add_argument("--no-predict", action="store_true", help="leave out the prediction, which compiles")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_features(parser)
    add_cache(parser)
    parser.set_defaults(seqlen=4096, heads=16, batch=4, run=run)


def run(options: argparse.Namespace) -> int:
    """Explain; the exit status."""
    import cuflash
    from cuflash.hardware import device

    on = device.default() if options.arch is None else device.of_arch(options.arch, "gpu")
    tile = None if options.tile is None else cuflash.Tile(*options.tile)
    backward = options.direction == "backward"
    found = explain(sample_of(options), on, backward=backward, tile=tile, predict=not options.no_predict, limits=not options.fast)
    print(json.dumps(to_json(found), indent=1) if options.json else "\n".join(lines(found)))
    return 0
