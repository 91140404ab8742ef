"""The loop of a tuning run: one task after the other, one candidate after the other, kept in the table as they come.

Contract: `run` takes what times a candidate (`Evaluator`), a clock and a listener as they are given, so that it knows no GPU, and closes the evaluator whatever
happens. A candidate that failed is noted and never tried again by a later run of the same kernels; what may have been the machine's fault is not written. After
Ctrl-C, at the end of the budget, and after an error, the table has everything that was found, and the next run goes on behind it; a process that is killed loses
what it found since the last write, a few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cuflash.hardware.device import Device
from cuflash.problem.tile import Tile
from cuflash.tuned import fingerprint, store
from cuflash.tuned.table import Entry, Timing
from cuflash.tuner.described_calls import extents
from cuflash.tuner.tasks import Task

HOPELESS = 1.3
"""A candidate that takes so many times longer than the best, in its first launches, is left."""

WRITE_EVERY = 5.0
"""Seconds. A table of a whole GPU has some hundred KiB."""


FINALISTS, ROUNDS = 3, 2
"""So many of the fastest tiles are timed so many times more, in turns with the default: the smallest of many times is small by chance, too."""


class OutOfTime(Exception):
    """The budget is used up."""


class Evaluator(Protocol):
    """What runs and times a candidate."""

    timer: str

    def compile_ahead(self, candidates: Sequence[tuple[Task, Tile]]) -> int:
        """Begin to compile what will be evaluated, in that order."""

    def evaluate(self, task: Task, tile: Tile, give_up_at: float | None, seconds_left: float | None) -> Timing:
        """Check a candidate against the default tile's result and time it.

        Args:
            task: of the candidate.
            tile: which.
            give_up_at: milliseconds beyond which it need not be timed to the end; None for no limit.
            seconds_left: of the budget; None for no limit.

        Returns:
            Its times, or a note of what was wrong. Nothing about the candidate raises.

        Raises:
            TuningError, SetupError: what no candidate is to blame for, or the default tile failed.
            OutOfTime: there is no answer, and some seconds after the budget nobody waits for it.
        """

    def time_again(self, task: Task, tile: Tile, seconds_left: float | None) -> Timing:
        """The same for a tile that was evaluated before."""

    def close(self) -> None:
        """Give back what it holds."""


class Listener(Protocol):
    """What a run tells."""

    def begun(self, task: Task, done: int) -> None:
        """A task of which so many candidates were tried before."""

    def tried(self, task: Task, timing: Timing, entry: Entry, left: int, seconds_left: float | None) -> None:
        """A candidate; so many are left in all tasks, for about so long."""

    def ended(self, reason: str) -> None:
        """The run: "done", "out of time", "interrupted", or "stopped" by an error."""


@dataclass
class Session:
    """One run.

    Attributes:
        device: that is tuned.
        path: of the table.
        evaluator, listener: see there.
        facts: of entries, for people: driver, cuflash, commit, date, effort.
        seconds: for all of it; None for no limit.
        again: forget what an earlier run has timed.
        clock: seconds.
    """

    device: Device
    path: Path
    evaluator: Evaluator
    listener: Listener
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    again: bool = False
    clock: Callable[[], float] = time.monotonic

    def run(self, tasks: Sequence[Task]) -> tuple[list[Entry], str]:
        """Tune; returns the entries of all tasks that have any, and why it ended: "done", "out of time" or "interrupted".

        Raises:
            OSError: the table cannot be written.
            OptionError: it is that of another GPU.
            TuningError, SetupError: see `Evaluator.evaluate`.
        """
        self._deadline = None if self.seconds is None else self.clock() + self.seconds
        self._unwritten: Entry | None = None
        self._written_at = self.clock()
        entries: list[Entry] = []
        reason = "stopped"
        try:
            entries += map(self._begin, tasks)
            candidates = [(task, tile) for task, entry in zip(tasks, entries, strict=True) for tile in _untried(task, entry)]
            self.evaluator.compile_ahead(candidates)
            self._begun_at, self._tried, self._left = self.clock(), 0, len(candidates)
            for index, task in enumerate(tasks):
                self.listener.begun(task, len(entries[index].timings))
                for entry in self._steps(task, entries[index]):
                    entries[index] = entry
            reason = "done"
        except OutOfTime:
            reason = "out of time"
        except KeyboardInterrupt:
            reason = "interrupted"
        finally:
            self.evaluator.close()
            if self._unwritten is not None:
                self._keep(self._unwritten, now=True)
            self.listener.ended(reason)
        return [entry for entry in entries if entry.timings], reason

    def _steps(self, task: Task, entry: Entry) -> Iterator[Entry]:
        """Tune one task; what is known of it after each candidate.

        Raises:
            OutOfTime: the budget is used up.
        """
        untried = _untried(task, entry)
        for tile in untried:
            self._check_time()
            entry = self._try(task, tile, entry)
            yield entry
        if untried or not entry.is_complete:
            entry = replace(self._run_off(task, entry), is_complete=True)
            self._keep(entry, now=True)
            yield entry

    def _run_off(self, task: Task, entry: Entry) -> Entry:
        """The default and the fastest others once more, in turns; of each the median of its times counts."""
        default = entry.timing_of(task.default)
        good = [timing for timing in entry.timings if timing.is_good and timing.tile != task.default]
        fastest = sorted(good, key=_milliseconds)[:FINALISTS]
        if self.evaluator.timer != "events" or default is None or not fastest or _milliseconds(fastest[0]) >= _milliseconds(default):
            return entry
        times = {timing.tile: [timing] for timing in (default, *fastest)}
        for tile in ROUNDS * tuple(times):
            self._check_time()
            times[tile].append(self.evaluator.time_again(task, tile, self._seconds_left()))
        return replace(entry, timings=tuple(_middle(times.get(timing.tile, [timing])) for timing in entry.timings))

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - self.clock())

    def _check_time(self) -> None:
        if self._seconds_left() == 0.0:
            raise OutOfTime

    def _begin(self, task: Task) -> Entry:
        """What the table has of a task that is still true, else nothing."""
        fresh = Entry(
            task.bucket, extents(task.problem), task.default, (), fingerprint.of_source(task.kernel.source), fingerprint.of_compiler(),
            timer=self.evaluator.timer, **self.facts,
        )  # fmt: skip
        kept = store.read(self.path, self.device).entries.get(task.bucket)
        if kept is None or self.again:
            return fresh
        merged = fresh.merged(kept)
        return kept if merged.timings and not _untried(task, merged) and kept.is_complete else merged

    def _try(self, task: Task, tile: Tile, entry: Entry) -> Entry:
        best = entry.best
        give_up_at = None if best is None or best.milliseconds is None else HOPELESS * best.milliseconds
        timing = self.evaluator.evaluate(task, tile, give_up_at, self._seconds_left())
        self._tried, self._left = self._tried + 1, self._left - 1
        entry = replace(entry, timings=(*entry.timings, timing))
        self._keep(entry, now=self.clock() - self._written_at >= WRITE_EVERY)
        each = (self.clock() - self._begun_at) / self._tried
        budget = self._seconds_left()
        self.listener.tried(task, timing, entry, self._left, each * self._left if budget is None else min(budget, each * self._left))
        return entry

    def _keep(self, entry: Entry, *, now: bool) -> None:
        """Write it, now or with what comes next."""
        self._unwritten = entry
        if now:
            if entry.lasting().timings:
                store.save(self.path, self.device, entry.lasting())
            self._unwritten, self._written_at = None, self.clock()


def _untried(task: Task, entry: Entry) -> list[Tile]:
    return [tile for tile in task.tiles if entry.timing_of(tile) is None]


def _milliseconds(timing: Timing) -> float:
    return float("inf") if timing.milliseconds is None else timing.milliseconds


def _middle(timings: Sequence[Timing]) -> Timing:
    """The one of the median time; of a tile that failed once, that."""
    failed = next((timing for timing in timings if not timing.is_good), None)
    return failed or sorted(timings, key=_milliseconds)[len(timings) // 2]
