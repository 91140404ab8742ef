"""How long a call takes: events around each call on a GPU, else the wall clock over blocks of calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy

from bench.machine import Machine

Clock = Callable[[], float]


def time_call(
    machine: Machine, call: Callable[[], Any], seconds: float, wait: Callable[[], None] | None = None, clock: Clock = time.perf_counter,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Time a call that has run before.

    Args:
        seconds: to spend, about; at least three and at most 200 calls.
        wait: waits for what `call` started, where events do not see it; then the wall clock is used, over blocks of calls.
        clock: the wall clock, in seconds.
        before: called before each call and not timed, where events are.

    Returns:
        The columns of attention.csv about time, clocks and heat.
    """
    if machine.dry or wait is not None:
        return _by_wall(machine, call, seconds, wait or (lambda: None), clock)
    return _by_events(machine, call, seconds, before)


def _by_events(machine: Machine, call: Callable[[], Any], seconds: float, prepare: Callable[[], None]) -> dict[str, Any]:
    before, events = machine.monitor.sm_clock(), machine.cupy.cuda

    def measure(count: int) -> tuple[list[float], dict[str, Any]]:
        pairs = [(events.Event(), events.Event()) for _ in range(count)]
        for start, end in pairs:
            prepare()
            start.record(events.Stream.null)
            call()
            end.record(events.Stream.null)
        monitor = machine.monitor
        during = {"sm_clock_mhz": monitor.sm_clock(), "watts": monitor.watts(), "celsius": monitor.celsius()}
        machine.synchronize()
        return [float(events.get_elapsed_time(start, end)) for start, end in pairs], during

    call()
    once = statistics.median(measure(2)[0]) / 1000
    times, during = measure(max(3, min(200, int(seconds / max(once, 1e-6)))))
    after = {"sm_clock_before_mhz": before, "sm_clock_after_mhz": machine.monitor.sm_clock()}
    return {**quantiles(times), "repeats": len(times), "timer": "events", **during, **after}


def _by_wall(machine: Machine, call: Callable[[], Any], seconds: float, wait: Callable[[], None], clock: Clock) -> dict[str, Any]:
    def measure(count: int) -> float:
        wait()
        started = clock()
        for _ in range(count):
            call()
        wait()
        return (clock() - started) / count

    before, once = machine.monitor.sm_clock(), measure(1)
    count = max(1, min(40, int(seconds / 5 / max(once, 1e-6))))
    times = [1000 * measure(count) for _ in range(1 if machine.dry else 5)]
    clocks = {"sm_clock_before_mhz": before, "sm_clock_after_mhz": machine.monitor.sm_clock()}
    return {**quantiles(times), "repeats": count * len(times), "timer": "wall", **clocks}


class Stopwatch:
    """A timer for pytest-benchmark: the second of two readings minus the first is what the device took in between.

    On a GPU the first reading records an event and waits for nothing, so that work which is in the queue already hides the host's part of the call; the second
    records another, waits for it, and is the seconds between the two. Where events do not see what a call starts, `wait` waits for it and the wall clock counts.

    Attributes:
        wait: of the call that is timed, `Calls.wait`.
    """

    __name__ = __qualname__ = "Stopwatch"

    def __init__(self, machine: Machine, clock: Clock = time.perf_counter) -> None:
        self.machine, self._clock = machine, clock
        self.wait: Callable[[], None] | None = None
        self._start: Any = None

    @property
    def name(self) -> str:
        """As the column `timer` has it."""
        return "wall" if self.machine.dry or self.wait is not None else "events"

    def __call__(self) -> float:
        if self.name == "wall":
            if self.wait is not None:
                self.wait()
            return self._clock()
        events = self.machine.cupy.cuda
        event = events.Event()
        event.record(events.Stream.null)
        if self._start is None:
            self._start = event
            return 0.0
        start, self._start = self._start, None
        self.machine.synchronize()
        return float(events.get_elapsed_time(start, event)) / 1000


def quantiles(times: list[float]) -> dict[str, float]:
    p20, median, p80 = (float(x) for x in numpy.quantile(times, (0.2, 0.5, 0.8)))
    return {"milliseconds": median, "milliseconds_p20": p20, "milliseconds_p80": p80}
