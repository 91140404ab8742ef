"""What is tuned: each tiled kernel of a pass of a call is a task, with candidates in the order in which they are worth a try (`tile_choice.worth_timing`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cuflash.cli.sample_features import ALONE, SampleFeatures
from cuflash.cli.samples import Sample, plan_of
from cuflash.errors import CuflashError, OptionError
from cuflash.hardware.device import Device
from cuflash.planning import tile_choice, tuned_tiles
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import BACKWARD_DQ_CONVERT
from cuflash.planning.planner import make_plan, other_ways
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile
from cuflash.timing import machine, prediction
from cuflash.tuned.buckets import Bucket
from cuflash.tuned.store import untuned
from cuflash.tuner.described_calls import DescribedCall

Effort = Literal["quick", "standard", "full"]

EFFORTS: dict[Effort, int | None] = {"quick": 28, "standard": 40, "full": None}
"""How many candidates are tried besides the default; None for all legal ones, some 60 to 190. In each of the 16 sweeps that were timed on an H100 the first 28
have a tile within 2 % of the fastest; in 15 the first 20 have one."""

CLASSES = ("plain", "causal", *ALONE, "varlen", "seqlens_kv")
"""Kinds of calls: without features, causal, causal with one feature, causal and packed, with lengths of keys."""

USUAL_SEQLEN = 256
"""That the numbers of `ALONE` suit."""

TOKENS, HIDDEN = 16384, 2048
"""Of a call: batch x seqlen, and heads x head_dim, which fill any GPU."""


@dataclass(frozen=True)
class Task:
    """One kernel to tune.

    Attributes:
        call: to be timed.
        problem: the call, checked.
        backward: which pass.
        kernel: its plan with the default tile.
        bucket: where the result belongs.
        tiles: candidates, the default first.
    """

    call: DescribedCall
    problem: Problem
    backward: bool
    kernel: KernelPlan
    bucket: Bucket
    tiles: tuple[Tile, ...]

    @property
    def default(self) -> Tile:
        """The tile that is taken without a table."""
        return self.tiles[0]

    def planned(self, tile: Tile, device: Device) -> list[KernelPlan]:
        """All kernels of the pass with a tile for this one."""
        with untuned():
            return list(make_plan(self.problem, device, backward=self.backward, tile={self.kernel.name: tile}).kernels)


def tasks_of(call: DescribedCall, problem: Problem, device: Device, *, passes: Sequence[str], effort: Effort) -> list[Task]:
    """The tasks of a call; those of kernels that are not tuned are left out. Where there are several ways to the same results, those of all: the fastest one is taken."""
    found = []
    for backward in [name == "backward" for name in passes]:
        with untuned():
            ways = (None, *other_ways(problem, device, backward=backward))
            plans = [make_plan(problem, device, backward=backward, tile=way) for way in ways]
        for kernel in {kernel.name: kernel for plan in plans for kernel in plan.kernels}.values():
            if not kernel.spec.is_tiled or not kernel.spec.is_tuned:
                continue
            timed = EFFORTS[effort]
            others = [tile for tile in tile_choice.worth_timing(kernel.case, device) if tile != kernel.tile]
            bucket = tuned_tiles.bucket_of(kernel.case, problem, device)
            found.append(Task(call, problem, backward, kernel, bucket, (kernel.tile, *others[:timed])))
    return found


def predicted_milliseconds(task: Task, tile: Tile, device: Device) -> float | None:
    """What the timing model says of the task's kernel with a tile, on the card of the architecture that it knows; None where it says nothing."""
    card = machine.CARDS.get(device.arch)
    if card is None or task.kernel.spec.implementation != "mma":
        return None
    planned = task.planned(tile, device)
    kernel = next(kernel for kernel in planned if kernel.name == task.kernel.name)
    try:
        description, function = prediction.compiled(kernel, device, causal=task.problem.is_causal)
        steady = prediction.predict_kernel(function, description, limits=False)
        if task.problem.hides_by_data:  # how many tiles are visited is the same for all tiles, nearly
            return steady.clocks / steady.blocks / (tile.tile_q * tile.tile_kv)
        beside = [prediction.predict_traffic(of, task.problem, card) for of in planned if of.spec == BACKWARD_DQ_CONVERT]
        return prediction.lay_out(steady, kernel, task.problem, card).milliseconds + sum(launch.milliseconds for launch in beside)
    except CuflashError:  # nvdisasm is missing, the kernel has no loop that the model knows, or does not compile
        return None


# --- Calls that are tuned without being asked for one by one ------------------------------------------------------------------------------


def samples(
    device: Device, *, dtypes: Iterable[str], head_dims: Iterable[int], seqlens: Iterable[int], classes: Iterable[str]
) -> list[Sample]:
    """Calls of all combinations, those first that matter most; on the simulator as small as they can be.

    Raises:
        OptionError: a class that is none.
    """
    made = []
    for seqlen in seqlens:
        for head_dim in head_dims:
            for dtype in dtypes:
                for name in classes:
                    batch, heads = (1, 1) if device.kind == "simulator" else (max(1, TOKENS // seqlen), max(1, HIDDEN // head_dim))
                    made.append(_sample(name, batch, seqlen, heads, head_dim, dtype))
    return made


def _sample(name: str, batch: int, seqlen: int, heads: int, head_dim: int, dtype: str) -> Sample:
    if name not in CLASSES:
        raise OptionError("classes", repr(name), "some of " + ", ".join(CLASSES), "Name kinds of calls.")
    base = Sample(
        batch=batch, seqlen_q=seqlen, seqlen_kv=seqlen, num_heads_q=heads, num_heads_kv=heads, head_dim=head_dim, dtype=dtype,
        is_causal=name not in ("plain", "seqlens_kv"),
    )  # fmt: skip
    if name == "varlen":  # one sequence of the length, the others half as long
        return replace(base, lengths_q=(seqlen, *[max(1, seqlen // 2)] * (2 * batch - 2)))
    if name == "seqlens_kv":
        return replace(base, lengths_kv=tuple(max(1, seqlen - seqlen * row // (2 * batch)) for row in range(batch)))
    return replace(base, features=_of_length(ALONE[name], seqlen)) if name in ALONE else base


def _of_length(features: SampleFeatures, seqlen: int) -> SampleFeatures:
    """Windows and prefixes that are as large a part of a sequence as those of the usual samples are of theirs."""

    def scaled(number: int | None) -> int | None:
        return None if number is None else max(1, number * seqlen // USUAL_SEQLEN)

    window = None if features.window is None else (scaled(features.window[0]), scaled(features.window[1]))
    return replace(features, window=window, prefix=scaled(features.prefix))


def problem_of(sample: Sample, *, backward: bool) -> Problem:
    """The checked call of a sample, with lse as training asks for it."""
    with untuned():
        return replace(plan_of(sample, backward=backward).problem, return_lse=True)
