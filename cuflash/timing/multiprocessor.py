"""One SM that runs a trace: four sub-partitions, resident blocks, scoreboards, a memory pipe, copies, barriers.

`steady_clocks(trace, machine, warps=, blocks=)` runs every warp of the resident blocks through the trace again and again and returns the clocks that one trip of all of
them takes. `record` runs it likewise and returns when each instruction issued, which docs/draw_pictures.py draws. The rules:

- A sub-partition issues one instruction per clock, of a warp whose stall count is over, whose scoreboards are free and whose unit is free. It goes on
  with the warp that issued last whenever that can issue, else with the one that is furthest behind. Of the orders that were tried (strictly in turn, least
  recently issued, furthest behind), this one put the tiles that were measured into their order best (docs/timing.md).
- Warp i of a block lives in sub-partition i modulo 4; blocks go on where the last one ended.
- Memory instructions wait in a queue of their sub-partition for the SM's one memory pipe, which serves them in order of issue. If the queue is full, they do not
  issue. Their scoreboards are released a latency after their last wavefront.
- Copies and loads take L2's bandwidth in order of issue, too.
- A barrier takes arrivals one after another and lets go of the block some clocks after the last.

What it leaves out: register banks, the instruction cache, bank conflicts beyond the wavefronts that the trace says, DRAM, other SMs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cuflash.timing.machine import SUB_PARTITIONS, Multiprocessor
from cuflash.timing.operations import RESOURCES, Kind, Operation, Unit
from cuflash.timing.sass import NUM_SCOREBOARDS

_NEVER = float("inf")
_ISSUES = 24_000  # of a whole run, about: enough for a steady state, and tenths of a second
_FEWEST_TRIPS = 3
_MOST_TRIPS = 24
_GOLDEN = 0.618034  # blocks begin at different places of the trace, which no two of them share

_FREE = -1.0
_NUMBERS = {None: 0} | {unit: number for number, unit in enumerate(Unit, 1)}  # lists are faster than dictionaries of enumerators

LIMITS = (*(name for name in RESOURCES if name != "issue"), "barriers", "dependencies")
"""What `without` can lift."""


def without(trace: Sequence[Operation], limit: str) -> tuple[Operation, ...]:
    """The same trace where something costs nothing: a resource, "barriers", or "dependencies", which are stall counts, scoreboards and waits for copies."""
    changes: dict[str, object]
    if limit == "dependencies":
        changes = {"stall": 1.0, "waits": ()}
        return tuple(replace(o, **changes, kind=Kind.PLAIN if o.kind is Kind.WAIT else o.kind) for o in trace)  # type: ignore[arg-type]
    if limit == "barriers":
        return tuple(replace(o, kind=Kind.PLAIN) if o.kind is Kind.BARRIER else o for o in trace)
    if limit == "shared memory":
        return tuple(replace(o, wavefronts=0.0) for o in trace)
    if limit == "l2":
        return tuple(replace(o, l2_bytes=0.0, latency=0.0) if o.l2_bytes else o for o in trace)
    return tuple(replace(o, clocks=0.0) if o.unit is Unit(limit) else o for o in trace)


def steady_clocks(trace: Sequence[Operation], machine: Multiprocessor, *, warps: int, blocks: int) -> float:
    """Clocks of the SM for one trip of all warps of all resident blocks.

    Args:
        trace: one trip of one warp.
        machine: whose constants.
        warps: of a block.
        blocks: resident on the SM.
    """
    trips = max(_FEWEST_TRIPS, min(_MOST_TRIPS, round(_ISSUES / (len(trace) * warps * blocks))))
    return _Run(trace, machine, warps, blocks, trips).clocks()


@dataclass(frozen=True)
class Issue:
    """One instruction of a recorded run.

    Attributes:
        warp: that issued it; `warp // warps` is its block.
        trip: of that warp, from 0.
        position: of the instruction in the trace.
        clock: when it issued.
        done: when a copy is complete; the same as `clock` for all others.
    """

    warp: int
    trip: int
    position: int
    clock: float
    done: float


def record(trace: Sequence[Operation], machine: Multiprocessor, *, warps: int, blocks: int, trips: int) -> list[Issue]:
    """Every instruction that the resident blocks issue until the first warp has completed `trips` trips, in the order of the clock; see `steady_clocks`."""
    run = _RecordedRun(trace, machine, warps, blocks, trips)
    run.clocks()
    return run.issues


@dataclass
class _Warp:
    """What the SM knows of one warp.

    Attributes:
        index: among all warps of the SM.
        block: its own.
        position: of its next instruction in the trace.
        trips: that it has completed.
        ready: earliest clock for its next instruction, units and queues aside.
        scoreboards: when each is released.
        copied: when the copies that it has issued are complete.
        groups: the same, of each closed group of copies.
        last_issue: when its last instruction issued.
    """

    index: int
    block: int
    ready: float
    scoreboards: list[float]
    groups: deque[float]
    position: int = 0
    trips: int = 0
    copied: float = 0.0
    last_issue: float = -1.0


class _Run:
    """One run of the model."""

    def __init__(self, trace: Sequence[Operation], machine: Multiprocessor, warps: int, blocks: int, trips: int) -> None:
        self.trace, self.machine, self.trips = trace, machine, trips
        self.warps_per_block = warps
        self.warps: list[_Warp] = []
        self.homes: list[list[_Warp]] = [[] for _ in range(SUB_PARTITIONS)]
        for index in range(warps * blocks):
            block, within = divmod(index, warps)
            start = block * _GOLDEN % 1.0 * len(trace) * 1.5 + within * 7 % 40
            warp = _Warp(index, block, start, [0.0] * NUM_SCOREBOARDS, deque(maxlen=8))
            self.warps.append(warp)
            self.homes[index % SUB_PARTITIONS].append(warp)
        self.units = [_NUMBERS[operation.unit] for operation in trace]
        self.unit_free = [[_FREE] * len(_NUMBERS) for _ in range(SUB_PARTITIONS)]
        self.queues: list[deque[float]] = [deque() for _ in range(SUB_PARTITIONS)]
        self.pipe_free = self.l2_free = 0.0
        self.arrived: list[list[_Warp]] = [[] for _ in range(blocks)]
        self.barrier_free = [0.0] * blocks
        self.last: list[_Warp | None] = [None] * SUB_PARTITIONS
        self.fewest_trips = [0] * SUB_PARTITIONS
        self.issued = 0
        self.next_event = [0.0] * SUB_PARTITIONS

    def clocks(self) -> float:
        """Run from the moment when all warps have completed a trip until the first has completed all of them."""
        warming = len(self.warps)
        begin = issued_before = 0.0
        while True:
            time = min(self.next_event)
            home = self.next_event.index(time)
            if time == _NEVER:
                raise AssertionError("every warp waits for a barrier")
            completed = self._step(home, time)
            if completed is None:
                continue
            if completed.trips == 1:
                warming -= 1
                if not warming:
                    begin, issued_before = time, self.issued
            if completed.trips >= self.trips and not warming:
                trips = (self.issued - issued_before) / (len(self.trace) * len(self.warps))
                return (time - begin) / trips

    def _step(self, home: int, time: float) -> _Warp | None:
        """Issue at most one instruction of a sub-partition; the warp that completed a trip with it."""
        unit_free, units, queue, trace = self.unit_free[home], self.units, self.queues[home], self.trace
        while queue and queue[0] <= time:
            queue.popleft()
        full = len(queue) >= self.machine.queue_depth
        chosen: _Warp | None = None
        wake = _NEVER
        last = self.last[home]
        if last is not None and last.trips > self.fewest_trips[home] + 1:
            last = None  # or the others would starve
        for warp in self.homes[home]:
            earliest = warp.ready
            if earliest > time:
                wake = min(wake, earliest)
                continue
            free = unit_free[units[warp.position]]
            if free >= time + 1:
                wake = min(wake, free)
                continue
            if full and trace[warp.position].wavefronts:
                wake = min(wake, queue[0])
                continue
            if chosen is None or (chosen is not last and (warp is last or _progress(warp) < _progress(chosen))):
                chosen = warp
        if chosen is None:
            self.next_event[home] = _NEVER if wake == _NEVER else max(time + 1, float(int(wake)))
            return None
        self.last[home] = chosen
        self.next_event[home] = time + 1
        return chosen if self._issue(chosen, home, time) else None

    def _issue(self, warp: _Warp, home: int, time: float) -> bool:
        """Let the warp's next instruction go; whether that completed a trip."""
        operation = self.trace[warp.position]
        self.issued += 1
        warp.last_issue = time
        if operation.unit is not None:
            unit_free, unit = self.unit_free[home], self.units[warp.position]
            unit_free[unit] = max(unit_free[unit], time) + operation.clocks
        kind = operation.kind
        if operation.wavefronts or operation.l2_bytes:
            self._memory(warp, operation, home, time)
        elif operation.write_scoreboard is not None:
            warp.scoreboards[operation.write_scoreboard] = max(warp.scoreboards[operation.write_scoreboard], time + operation.latency)
        if kind is Kind.COMMIT:
            warp.groups.append(warp.copied)
        warp.position += 1
        completed = warp.position == len(self.trace)
        if completed:
            warp.position = 0
            warp.trips += 1
            self.fewest_trips[home] = min(other.trips for other in self.homes[home])
        held = kind is not Kind.FENCE or warp.index % self.warps_per_block == 0
        warp.ready = self._ready(warp, time + (operation.stall if held else 1.0))
        if kind is Kind.BARRIER:
            self._arrive(warp, time)
        return completed

    def _ready(self, warp: _Warp, earliest: float) -> float:
        """When the warp's next instruction may issue as far as the warp itself is concerned: all that it waits for has been issued."""
        operation = self.trace[warp.position]
        for scoreboard in operation.waits:
            earliest = max(earliest, warp.scoreboards[scoreboard])
        if operation.kind is Kind.WAIT and len(warp.groups) > operation.pending:
            earliest = max(earliest, warp.groups[len(warp.groups) - operation.pending - 1])
        return earliest

    def _memory(self, warp: _Warp, operation: Operation, home: int, time: float) -> None:
        start = max(time, self.pipe_free)
        self.pipe_free = start + operation.wavefronts
        if operation.wavefronts:
            self.queues[home].append(start)
        done = start + max(operation.wavefronts, operation.latency)
        if operation.l2_bytes:
            self.l2_free = max(start, self.l2_free) + operation.l2_bytes / self.machine.l2_bytes
            done = self.l2_free + operation.latency
        if operation.kind is Kind.COPY:
            warp.copied = max(warp.copied, done)
        elif operation.write_scoreboard is not None:
            warp.scoreboards[operation.write_scoreboard] = max(warp.scoreboards[operation.write_scoreboard], done)
        if operation.read_scoreboard is not None:
            warp.scoreboards[operation.read_scoreboard] = max(warp.scoreboards[operation.read_scoreboard], self.pipe_free)

    def _arrive(self, warp: _Warp, time: float) -> None:
        """Hold the warp until all of its block have arrived."""
        block = warp.block
        self.barrier_free[block] = max(self.barrier_free[block], time) + self.machine.barrier_arrival
        self.arrived[block].append(warp)
        if len(self.arrived[block]) < self.warps_per_block:
            warp.ready = _NEVER
            return
        release = self.barrier_free[block] + self.machine.barrier_latency
        for waiting in self.arrived[block]:
            waiting.ready = self._ready(waiting, max(release, waiting.last_issue + 1))
        self.arrived[block].clear()
        for home in range(SUB_PARTITIONS):
            self.next_event[home] = max(time + 1, min(self.next_event[home], float(int(release))))


class _RecordedRun(_Run):
    """A run that remembers what it issued."""

    def __init__(self, trace: Sequence[Operation], machine: Multiprocessor, warps: int, blocks: int, trips: int) -> None:
        super().__init__(trace, machine, warps, blocks, trips)
        self.issues: list[Issue] = []

    def _issue(self, warp: _Warp, home: int, time: float) -> bool:
        trip, position = warp.trips, warp.position
        completed = super()._issue(warp, home, time)
        done = warp.copied if self.trace[position].kind is Kind.COPY else time
        self.issues.append(Issue(warp.index, trip, position, time, done))
        return completed


def _progress(warp: _Warp) -> tuple[int, int]:
    return warp.trips, warp.position
