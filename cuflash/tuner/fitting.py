"""`python -m cuflash autotune --fit`: the timing model's constants from tables of tuned tiles, which hold the time of every tile that was tried on a card.

Contract: nothing is changed; the fit says what constants the times speak for, how sure it is, and how far the model is off before and after, also on times that it has not
seen. Only entries that can be predicted again count: timed by events, of the present kernels, plain or causal, padded. Every factor is held near 1 by a prior, so that
what the times do not decide stays as it is.

A factor multiplies clocks: 1.2 means that the card takes 1.2 times as long for it as the model thought.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from statistics import median
from typing import Any

import numpy
from numpy.typing import NDArray

from cuflash.cli.samples import Sample, plan_of
from cuflash.errors import CuflashError, OptionError
from cuflash.hardware import device
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.planning.planner import make_plan
from cuflash.problem.problem import Problem
from cuflash.timing import prediction
from cuflash.timing.description import Description
from cuflash.timing.machine import CARDS, Card, multiprocessor
from cuflash.timing.sass import Function
from cuflash.tuned import fingerprint
from cuflash.tuned.store import untuned
from cuflash.tuned.table import Entry, Table, Timing

CONSTANTS: dict[str, tuple[str, ...]] = {
    "matrix": ("matrix_rates",),
    "arithmetic": ("fma", "imad", "alu", "half", "convert"),
    "exponentials": ("mufu",),
    "shared memory": ("shared_latency", "matrix_load_latency"),
    "copies": ("copy_latency", "global_latency"),
    "L2": ("l2_bytes",),
    "barriers": ("barrier_latency", "barrier_arrival"),
    "block start": ("block_start",),
}
"""What is fitted -> the fields of `Multiprocessor` or `Card` that one factor multiplies, or divides where they are rates."""

RATES = ("matrix_rates", "l2_bytes")
TILES_OF_AN_ENTRY = 8
PRIOR, NOISE = 0.2, 0.04
"""Standard deviations of the logarithms of a factor, before any time is seen, and of a time."""
STEP, ROUNDS = 0.05, 3

_CALL = re.compile(r"batch (\d+), seqlen (\d+) x (\d+), heads (\d+)(?:/(\d+))?")


@dataclass(frozen=True)
class Observation:
    """A tile that was timed, and all that the model needs to time it."""

    kernel: KernelPlan
    problem: Problem
    card: Card
    description: Description
    function: Function
    milliseconds: float

    def predicted(self, factors: Mapping[str, float]) -> float:
        """Milliseconds by the model with other constants."""
        machine, card = scaled(multiprocessor(self.card.arch), factors), scaled(self.card, factors)
        steady = prediction.predict_kernel(self.function, self.description, limits=False, machine=machine)
        return prediction.lay_out(steady, self.kernel, self.problem, card, machine=machine).milliseconds


@dataclass(frozen=True)
class Fit:
    """What the times of one architecture say.

    Attributes:
        arch: which.
        factors: by the names of `CONSTANTS`.
        deviations: of the factors' logarithms; near `PRIOR` where the times say nothing.
        before, after: measured over predicted, of the times that the fit has seen.
        held_before, held_after: likewise, of those that it has not.
        left_out: why entries do not count.
    """

    arch: str
    factors: Mapping[str, float]
    deviations: Mapping[str, float]
    before: Sequence[float]
    after: Sequence[float]
    held_before: Sequence[float] = ()
    held_after: Sequence[float] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def is_decided(self, name: str) -> bool:
        """The times have halved what was not known of a factor."""
        return self.deviations[name] < PRIOR / 2

    def __str__(self) -> str:
        lines = [f"{self.arch}: {len(self.before)} tiles fitted, {len(self.held_before)} held out"]
        for name, found in self.factors.items():
            sure = f"± {100 * self.deviations[name]:.0f} %" if self.is_decided(name) else "not decided by these times"
            lines.append(f"  {name:14} {found:5.2f} times the clocks, {sure}: {', '.join(CONSTANTS[name])}")
        lines.append(f"  off by {_off(self.before)} before, {_off(self.after)} after (median of tiles)")
        if self.held_before:
            lines.append(f"  off by {_off(self.held_before)} before, {_off(self.held_after)} after, on tiles that were held out")
        lines += [f"  left out: {count} entries, {reason}" for reason, count in self.left_out.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For a file: the constants as `cuflash/timing/machine.py` has them, and what they are worth."""
        machine, card = scaled(multiprocessor(self.arch), self.factors), scaled(CARDS[self.arch], self.factors)
        values = {name: getattr(card if hasattr(card, name) else machine, name) for names in CONSTANTS.values() for name in names}
        errors = {name: _error(getattr(self, name)) for name in ("before", "after", "held_before", "held_after")}
        return {
            "arch": self.arch,
            "factors": dict(self.factors),
            "deviations": dict(self.deviations),
            "constants": values,
            "errors": errors,
        }


def _error(ratios: Sequence[float]) -> float | None:
    return median(abs(log(ratio)) for ratio in ratios) if ratios else None


def _off(ratios: Sequence[float]) -> str:
    return f"{100 * (exp(_error(ratios) or 0.0) - 1):.1f} %"


def scaled(of: Any, factors: Mapping[str, float]) -> Any:
    """A `Multiprocessor` or a `Card` with its constants multiplied."""
    changed: dict[str, Any] = {}
    for name, factor in factors.items():
        for entry in CONSTANTS[name]:
            if not hasattr(of, entry):
                continue
            value, by = getattr(of, entry), 1 / factor if entry in RATES else factor
            changed[entry] = {kind: rate * by for kind, rate in value.items()} if isinstance(value, dict) else value * by
    return replace(of, **changed)


# --- What there is to fit -----------------------------------------------------------------------------------------------------------------


def observations(table: Table, left_out: dict[str, int]) -> list[Observation]:
    """The tiles of a table that can be predicted again; counts in `left_out` why entries cannot.

    Raises:
        OptionError: the table is not of a GPU that the model knows.
    """
    arch = str(table.device["arch"])
    if table.device["kind"] != "gpu" or arch not in CARDS:
        what = f"a table of {table.device['name']} ({table.device['kind']}, {arch})"
        raise OptionError("fit", what, "tables of GPUs: " + ", ".join(CARDS), "Tune on the card whose constants are wanted.")
    found: list[Observation] = []
    for entry in table.entries.values():
        reason = _why_not(entry)
        try:
            found += [] if reason else _of_entry(entry, table, arch)
        except CuflashError as error:
            reason = str(error).partition("\n")[0]
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
    return found


def _why_not(entry: Entry) -> str:
    bucket, spec = entry.bucket, TILED_KERNELS.get(entry.bucket.kernel)
    if spec is None or spec.implementation != "mma" or spec.splits_keys:
        return "of kernels that the model does not know"
    if entry.timer != "events":
        return "not timed on a GPU"
    if bucket.features or bucket.lengths != "padded" or bucket.allow_tf32:
        return "with features or lengths"
    if entry.sources != fingerprint.of_source(spec.source):
        return "of other kernels than the present ones"
    return "" if _CALL.fullmatch(entry.call) else "of a call that the table does not describe"


def _of_entry(entry: Entry, table: Table, arch: str) -> list[Observation]:
    bucket, described = entry.bucket, _CALL.fullmatch(entry.call)
    assert described is not None
    batch, rows, columns, heads, shared = (int(x) if x else None for x in described.groups())
    sample = Sample(
        batch=batch or 1, seqlen_q=rows or 1, seqlen_kv=columns or 1, num_heads_q=heads or 1, num_heads_kv=shared or heads or 1, dtype=bucket.dtype,
        head_dim=bucket.head_dim, head_dim_v=bucket.head_dim_v, is_causal=bucket.causal,
    )  # fmt: skip
    backward, on = TILED_KERNELS[bucket.kernel].backward, replace(device.of_arch(arch, "gpu"), num_sms=int(table.device["num_sms"]))
    with untuned():
        problem = replace(plan_of(sample, backward=backward).problem, return_lse=True)
        found = []
        for timing in chosen(entry.timings):
            assert timing.milliseconds is not None
            plan = make_plan(problem, on, backward=backward, tile={bucket.kernel: timing.tile})
            kernel = next(kernel for kernel in plan.kernels if kernel.name == bucket.kernel)
            description, function = prediction.compiled(kernel, on, causal=bucket.causal)
            clock = CARDS[arch].clock_ghz if timing.sm_clock_mhz is None else timing.sm_clock_mhz / 1000
            card = replace(CARDS[arch], name=str(table.device["name"]), num_sms=on.num_sms, clock_ghz=clock)
            found.append(Observation(kernel, problem, card, description, function, timing.milliseconds))
    return found


def chosen(timings: Sequence[Timing]) -> list[Timing]:
    """Some tiles of an entry, evenly from the fastest to the slowest of those that were timed to the end."""
    good = sorted((timing for timing in timings if timing.is_good and timing.milliseconds), key=lambda timing: timing.milliseconds or 0.0)
    if len(good) <= TILES_OF_AN_ENTRY:
        return good
    return [good[round(i * (len(good) - 1) / (TILES_OF_AN_ENTRY - 1))] for i in range(TILES_OF_AN_ENTRY)]


# --- The fit ------------------------------------------------------------------------------------------------------------------------------

Say = Callable[[str], None]


def fit(tables: Sequence[Table], say: Say = lambda words: None) -> list[Fit]:
    """The constants of every architecture that the tables are of.

    Raises:
        OptionError: nothing in the tables can be predicted again, or one is not of a GPU.
    """
    fits: list[Fit] = []
    by_arch: dict[str, list[Observation]] = {}
    left_out: dict[str, dict[str, int]] = {}
    for table in tables:
        arch = str(table.device["arch"])
        by_arch.setdefault(arch, []).extend(observations(table, left_out.setdefault(arch, {})))
    if not any(by_arch.values()):
        reasons = "; ".join(map(_reasons, filter(None, left_out.values()))) or "they are empty"
        hint = "Run `python -m cuflash autotune` on the card, with these kernels, for plain or causal calls."
        raise OptionError("fit", f"tables with nothing to fit: {reasons}", "times of the present kernels", hint)
    for arch, found in by_arch.items():
        if not found:
            say(f"{arch}: nothing to fit: {_reasons(left_out[arch]) or 'its tables are empty'}")
            continue
        held = found[2::3] if len(found) >= 6 else []
        seen = [observation for observation in found if all(observation is not other for other in held)]
        fits.append(replace(_fitted(arch, seen, held, say), left_out=left_out[arch]))
    return fits


def _reasons(left_out: Mapping[str, int]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in left_out.items())


def _fitted(arch: str, seen: Sequence[Observation], held: Sequence[Observation], say: Say) -> Fit:
    """Gauss and Newton's steps on the logarithms, with the prior as rows of its own; a step that does not help is halved."""
    names = tuple(CONSTANTS)
    at = numpy.zeros(len(names))
    start = residuals = _residuals(seen, at)
    for number in range(ROUNDS):
        slopes = numpy.stack([(_residuals(seen, at + STEP * unit) - residuals) / STEP for unit in numpy.eye(len(names))], axis=1)
        system = numpy.concatenate([slopes / NOISE, numpy.eye(len(names)) / PRIOR])
        step = numpy.linalg.lstsq(system, -numpy.concatenate([residuals / NOISE, at / PRIOR]), rcond=None)[0]
        for _ in range(4):
            moved = numpy.clip(at + step, -log(2), log(2))
            tried = _residuals(seen, moved)
            if _cost(tried, moved) < _cost(residuals, at):
                break
            step = step / 2
        else:
            break
        gained = _cost(residuals, at) - _cost(tried, moved)
        at, residuals = moved, tried
        say(f"{arch}, round {number + 1}: off by {_off(_ratios(residuals))} of {len(seen)} tiles")
        if gained < 1:
            break
    deviations = numpy.sqrt(numpy.diag(numpy.linalg.inv(system.T @ system)))
    return Fit(
        arch, {name: float(exp(x)) for name, x in zip(names, at, strict=True)}, {name: float(x) for name, x in zip(names, deviations, strict=True)},
        _ratios(start), _ratios(residuals), _ratios(_residuals(held, 0 * at)), _ratios(_residuals(held, at)),
    )  # fmt: skip


def _residuals(of: Sequence[Observation], at: NDArray[Any]) -> NDArray[Any]:
    """Logarithms of predicted over measured."""
    factors = {name: exp(x) for name, x in zip(CONSTANTS, at.tolist(), strict=True)}
    return numpy.array([log(observation.predicted(factors) / observation.milliseconds) for observation in of])


def _ratios(residuals: NDArray[Any]) -> list[float]:
    return [exp(-x) for x in residuals.tolist()]


def _cost(residuals: NDArray[Any], at: NDArray[Any]) -> float:
    return float(((residuals / NOISE) ** 2).sum() + ((at / PRIOR) ** 2).sum())
