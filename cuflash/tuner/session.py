"""The loop of a tuning run: one task after the other, one candidate after the other, kept in the table as they come.

Contract: `run` takes what times a candidate (`Evaluator`), a clock and a listener as they are given, so that it knows no GPU. A candidate that failed is noted and
never tried again by a later run of the same kernels. After Ctrl-C, at the end of the budget, and after an error, the table has everything that was found, and
the next run goes on behind it; a process that is killed loses what it found since the last write, a few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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


class Evaluator(Protocol):
    """What runs and times a candidate."""

    timer: str

    def evaluate(self, task: Task, tile: Tile, give_up_at: float | None) -> Timing:
        """Check a candidate against the default tile's result and time it.

        Args:
            task: of the candidate.
            tile: which.
            give_up_at: milliseconds beyond which it need not be timed to the end; None for no limit.

        Returns:
            Its times, or a note of what was wrong. Nothing about the candidate raises.
        """

    def close(self) -> None:
        """Give back what it holds."""


class Listener(Protocol):
    """What a run tells."""

    def begun(self, task: Task, done: int) -> None:
        """A task of which so many candidates were tried before."""

    def tried(self, task: Task, timing: Timing, entry: Entry, left: int, seconds_left: float | None) -> None:
        """A candidate; so many are left in all tasks, for about so long."""

    def ended(self, reason: str) -> None:
        """The run: "done", "out of time" or "interrupted"."""


@dataclass
class Session:
    """One run.

    Attributes:
        device: that is tuned.
        path: of the table.
        evaluator, listener: see there.
        facts: of entries, for people: driver, cuflash, date, effort.
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
        """
        self._deadline = None if self.seconds is None else self.clock() + self.seconds
        self._unwritten: Entry | None = None
        self._written_at = self.clock()
        entries = [self._begin(task) for task in tasks]
        self._left = sum(len(_untried(task, entry)) for task, entry in zip(tasks, entries, strict=True))
        self._begun_at, self._tried = self.clock(), 0
        reason = "done"
        try:
            for index, task in enumerate(tasks):
                self.listener.begun(task, len(entries[index].timings))
                untried = _untried(task, entries[index])
                for tile in untried:
                    if self._deadline is not None and self.clock() >= self._deadline:
                        reason = "out of time"
                        break
                    entries[index] = self._try(task, tile, entries[index])
                if reason != "done":
                    break
                if untried or not entries[index].is_complete:
                    entries[index] = replace(entries[index], is_complete=True)
                    self._keep(entries[index], now=True)
        except KeyboardInterrupt:
            reason = "interrupted"
        finally:
            self.evaluator.close()
            if self._unwritten is not None:
                self._keep(self._unwritten, now=True)
        self.listener.ended(reason)
        return [entry for entry in entries if entry.timings], reason

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
        timing = self.evaluator.evaluate(task, tile, give_up_at)
        self._tried, self._left = self._tried + 1, self._left - 1
        entry = replace(entry, timings=(*entry.timings, timing))
        self._keep(entry, now=self.clock() - self._written_at >= WRITE_EVERY)
        each = (self.clock() - self._begun_at) / self._tried
        seconds_left = each * self._left
        if self._deadline is not None:
            seconds_left = min(seconds_left, max(0.0, self._deadline - self.clock()))
        self.listener.tried(task, timing, entry, self._left, seconds_left)
        return entry

    def _keep(self, entry: Entry, *, now: bool) -> None:
        """Write it, now or with what comes next."""
        self._unwritten = entry
        if now:
            store.save(self.path, self.device, entry)
            self._unwritten, self._written_at = None, self.clock()


def _untried(task: Task, entry: Entry) -> list[Tile]:
    return [tile for tile in task.tiles if entry.timing_of(tile) is None]
