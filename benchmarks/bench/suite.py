"""What pytest measures of bench_attention.py: every case by every peer in every pass, as the other modes measure it.

Contract: on a GPU the times are those of events behind other work in the queue (`timing.Stopwatch`, `machine.fill_queue`); without one, tiny shapes run once on the
simulator, and `extra_info["measured"]` is false: such a time says something of the simulator, nothing of a GPU. A peer that is not here, or cannot do a case, is
skipped by name.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

from bench.calls import Calls, Library, NotSupported
from bench.cases import Case, dry_cases, dry_feature_cases, full_cases
from bench.comparison import known_before, measure
from bench.libraries import NEEDED, absent, libraries
from bench.machine import Machine, fill_queue
from bench.operands import Operands
from bench.report import one_line
from bench.timing import Stopwatch, quantiles

PASSES = ("forward", "forward_lse", "backward", "both")
LABELS = ("cuflash", *NEEDED, "formula")
ROUNDS = 20


@functools.cache
def machine() -> Machine:
    """The GPU, or the simulator without one; CUFLASH_BENCH_SMALL=1 takes tiny shapes on a GPU too, to test this program."""
    try:
        import cupy

        here = cupy.is_available()
    except ImportError:
        here = False
    return Machine(dry=not here, small=os.environ.get("CUFLASH_BENCH_SMALL") == "1")


def _rounds() -> int:
    return 1 if machine().dry else 2 if machine().small else ROUNDS


@functools.cache
def stopwatch() -> Stopwatch:
    return Stopwatch(machine())


@functools.cache
def cases() -> list[Case]:
    return [*dry_cases(), *dry_feature_cases()] if machine().small else full_cases()


@functools.lru_cache(1)
def _operands(case: Case) -> Operands:
    return Operands(case, machine())


@functools.lru_cache(1)
def _prepared(case: Case, label: str) -> tuple[Library, Calls]:
    (library,) = libraries(machine(), [label])
    return library, library.prepare(_operands(case))


@functools.cache
def _why_not(label: str) -> str:
    """Why a peer is not here; empty if it is."""
    if libraries(machine(), [label]):
        return ""
    return absent(machine()).get(label, "is there only in the place of torch")


def prepared(case: Case, label: str) -> tuple[Library, Calls]:
    """A peer and its calls; skips by name what is not here or cannot."""
    if why := _why_not(label):
        pytest.skip(f"{label} is not here: {why}")
    (library,) = libraries(machine(), [label])
    if not library.takes(case):
        pytest.skip(f"{label} does not take {case}")
    try:
        return _prepared(case, label)
    except Exception as error:
        if label == "cuflash":
            raise
        pytest.skip(f"{label}: {error if isinstance(error, NotSupported) else one_line(error)}")


def run(benchmark: Any, case: Case, label: str, direction: str) -> None:
    """Judge and time one pass; what was found is in `extra_info` under the names of attention.csv's columns."""
    library, calls = prepared(case, label)
    if calls.of(direction) is None:
        pytest.skip(f"{label} has no call for {direction}")
    place = machine()
    benchmark.group = ("simulator, not measured: " if place.dry else "") + f"{case} {direction}"

    def timed(call: Callable[[], Any], wait: Callable[[], None] | None) -> dict[str, Any]:
        clock = stopwatch()
        clock.wait = wait
        setup = None if place.dry or wait is not None else functools.partial(fill_queue, place)
        benchmark.pedantic(call, setup=setup, rounds=_rounds(), warmup_rounds=0 if place.small else 3)
        times = benchmark.stats.stats.data if benchmark.stats is not None else [float("nan")]  # --benchmark-disable
        return {
            **quantiles([1000 * x for x in times]),
            "repeats": len(times),
            "timer": clock.name,
            "sm_clock_mhz": place.monitor.sm_clock(),
        }

    with calls.context():
        found = measure(library, _operands(case), calls, direction, place, timed)
    if found["note"] == "wrong":
        pytest.fail(f"{label}: relative error {found['relative_error']:.1e}")
    found["gb_per_s"] = case.traffic(direction) / found["milliseconds"] / 1e6
    benchmark.extra_info.update({**known_before(library, case, place, direction), **found, "measured": not place.dry})
