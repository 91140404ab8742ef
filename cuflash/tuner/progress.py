"""What a tuning run says: a line for each candidate, a bar where rich is installed and somebody looks on, and in the end a table of what is gained."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, TextIO

from cuflash.cli.terminal_tables import Table
from cuflash.problem.tile import Tile
from cuflash.tuned.table import Entry, Timing
from cuflash.tuner.tasks import Task


class Silent:
    """Says nothing."""

    def begun(self, task: Task, done: int) -> None:
        """See `session.Listener`."""

    def tried(self, task: Task, timing: Timing, entry: Entry, left: int, seconds_left: float | None) -> None:
        """See `session.Listener`."""

    def ended(self, reason: str) -> None:
        """See `session.Listener`."""


class Lines(Silent):
    """Plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._has_any = False

    def begun(self, task: Task, done: int) -> None:
        self._has_any |= done > 0
        before = f", {done} tried before" if done else ""
        self.say(f"{task.bucket} ({len(task.tiles)} tiles{before})")

    def tried(self, task: Task, timing: Timing, entry: Entry, left: int, seconds_left: float | None) -> None:
        self._has_any = True
        best = entry.best
        found = "" if best is None else f"; best {best.milliseconds:.4g} ms {short(best.tile)}"
        self.say(f"  {short(timing.tile):16} {outcome(timing)}{found}; {left} left{_about(seconds_left)}")

    def ended(self, reason: str) -> None:
        if reason != "done" and self._has_any:
            self.say(f"{reason}: what was found is kept, and the same command goes on from here")
        elif reason != "done":
            self.say(f"{reason} before a candidate was timed; the same command begins again")

    def say(self, line: str) -> None:
        """One line, at once."""
        print(line, file=self._stream, flush=True)


class Bar(Lines):
    """A bar of rich's below the lines of the tasks."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        progress = importlib.import_module("rich.progress")
        columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("{task.description}"))
        self._bar = progress.Progress(*columns, console=importlib.import_module("rich.console").Console(file=stream), transient=True)
        self._number: Any = None
        self._done = 0

    def tried(self, task: Task, timing: Timing, entry: Entry, left: int, seconds_left: float | None) -> None:
        self._done, self._has_any = self._done + 1, True
        best = entry.best
        words = f"{task.kernel.name} {short(timing.tile)}: {outcome(timing)}"
        words += "" if best is None else f"; best {best.milliseconds:.4g} ms"
        if self._number is None:
            self._bar.start()
            self._number = self._bar.add_task("", total=None)
        self._bar.update(self._number, completed=self._done, total=self._done + left, description=words + _about(seconds_left))

    def ended(self, reason: str) -> None:
        self._bar.stop()
        super().ended(reason)

    def say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)


def listener_for(stream: TextIO) -> Lines:
    """A bar on a terminal with rich, else lines."""
    if stream.isatty():
        try:
            return Bar(stream)
        except ImportError:
            pass
    return Lines(stream)


def short(tile: Tile) -> str:
    """As tables have it: 128x64 w4 s2."""
    return f"{tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages}"


def outcome(timing: Timing) -> str:
    """Its time, or what was wrong."""
    if timing.milliseconds is None:
        return timing.note
    return f"{timing.milliseconds:.4g} ms" + (f" ({timing.note})" if timing.note else "")


def _about(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f", about {seconds:.0f} s" if seconds < 120 else f", about {seconds / 60:.0f} min"


def gains(entries: Sequence[Entry]) -> Table:
    """A row for each bucket: the default tile, the best one, and how many times faster that is."""
    header = ("default ms", "best ms", "faster", "tried", "failed", "best tile", "default tile", "for")
    rows = []
    for entry in entries:
        best, default = entry.best, entry.timing_of(entry.default)
        failed = sum(timing.milliseconds is None for timing in entry.timings)
        rows.append((
            _milliseconds(default), _milliseconds(best), "–" if entry.gain is None else f"{entry.gain:.2f}x", str(len(entry.timings)), str(failed),
            "–" if best is None else short(best.tile), short(entry.default), str(entry.bucket),
        ))  # fmt: skip
    return Table(header, rows, num_left=3)


def _milliseconds(timing: Timing | None) -> str:
    return "–" if timing is None or timing.milliseconds is None else f"{timing.milliseconds:.4g}"


def failures(entries: Sequence[Entry]) -> list[str]:
    """A line for each candidate that crashed, was wrong, or could not be timed."""
    return [
        f"{entry.bucket.kernel}, {entry.bucket.dtype}, head_dim {entry.bucket.head_dim}, {short(timing.tile)}: {timing.note}"
        for entry in entries
        for timing in entry.timings
        if timing.milliseconds is None
    ]
