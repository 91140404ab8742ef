"""One SM that runs traces: four sub-partitions, resident blocks, scoreboards, a memory pipe, copies, barriers.

`steady_clocks(trace, machine, warps=, blocks=)` runs every warp of the resident blocks through the trace again and again and returns the clocks that one trip of all of
them takes. `steady_clocks_of_roles` does so where warps of a block run different code, each role its own trace; trips are those of the first role. `record` runs it likewise and returns when each instruction issued, which docs/draw_pictures.py draws. The rules:

- A sub-partition issues one instruction per clock, of a warp whose stall count is over, whose scoreboards are free and whose unit is free. It goes on
  with the warp that issued last whenever that can issue, else with the one that is furthest behind. Of the orders that were tried (strictly in turn, least
  recently issued, furthest behind), this one put the tiles that were measured into their order best (docs/timing.md). In kernels of several roles it goes on
  with the oldest warp: with the one that is furthest behind, warpgroups fall into step, and are a third slower than was measured.
- Warp i of a block lives in sub-partition i modulo 4; blocks go on where the last one ended.
- Memory instructions wait in a queue of their sub-partition for the SM's one memory pipe, which serves them in order of issue. If the queue is full, they do not
  issue. Their scoreboards are released a latency after their last wavefront.
- Copies and loads take L2's bandwidth in order of issue, too.
- A barrier takes arrivals one after another and lets go of the block, or of so many neighbouring warps, some clocks after the last.
- Products of wgmma go to the sub-partition's tensor unit (`tensor_unit.py`), bulk copies land piece by piece in shared memory, mbarriers have phases (`phases.py`).

What it leaves out: register banks, the instruction cache, bank conflicts beyond the wavefronts that the trace says, DRAM, other SMs.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from cuflash.timing.machine import SUB_PARTITIONS, Multiprocessor
from cuflash.timing.operations import Kind, Operation, Role, Unit
from cuflash.timing.phases import COPIES, Meetings, Phases
from cuflash.timing.roles import Act, Meeting
from cuflash.timing.sass import NUM_SCOREBOARDS
from cuflash.timing.tensor_unit import Group, TensorUnit

_NEVER = float("inf")
_ISSUES = 24_000  # of a whole run, about: enough for a steady state, and tenths of a second
_FEWEST_TRIPS = 3
_MOST_TRIPS = (
    24  # and of warps of different roles, which come into step, or out of it, in some tens of trips: six may be 20 % too fast, 24 up to 6 %
)
WARMING, STEADY_TRIPS = 64, 96  # where a figure has to be right by a percent: how warps stand to each other settles in some tens of trips
_PIECE_WAVEFRONTS = 16  # 2 KB of a bulk copy
_GOLDEN = 0.618034  # blocks begin at different places of the trace, which no two of them share

_FREE = -1.0
_NUMBERS = {None: 0} | {unit: number for number, unit in enumerate(Unit, 1)}  # lists are faster than dictionaries of enumerators


def steady_clocks(trace: Sequence[Operation], machine: Multiprocessor, *, warps: int, blocks: int) -> float:
    """Clocks of the SM for one trip of all warps of all resident blocks.

    Args:
        trace: one trip of one warp.
        machine: whose constants.
        warps: of a block.
        blocks: resident on the SM.
    """
    return steady_clocks_of_roles([Role(tuple(trace), warps)], machine, blocks=blocks)


def steady_clocks_of_roles(
    roles: Sequence[Role], machine: Multiprocessor, *, blocks: int, in_turn: bool = False, trips: int | None = None, warming: int = 1
) -> float:
    """Clocks of the SM for one trip of all warps of all resident blocks in the first role's trace.

    Args:
        roles: of a block.
        machine: whose constants.
        blocks: resident on the SM.
        in_turn: products of wgmma are served warp by warp in turn, and not in the order of their issue.
        trips: of the run; None for a few, of several roles 24.
        warming: trips of every warp before clocks are counted.
    """
    if trips is None:
        length = len(roles[0].trace) * roles[0].warps * blocks
        trips = _MOST_TRIPS if len(roles) > 1 else max(_FEWEST_TRIPS, min(_MOST_TRIPS, round(_ISSUES / length)))
    return _Run(roles, machine, blocks, trips, in_turn, warming).clocks()


@dataclass(frozen=True)
class Issue:
    """One instruction of a recorded run.

    Attributes:
        warp: that issued it; `warp // warps` is its block.
        trip: of that warp, from 0.
        position: of the instruction in the trace.
        clock: when it issued.
        begun: when the tensor unit begins with a product; the same as `clock` for all others.
        done: when a copy is complete, or a product of the tensor unit; infinite if the run ends before, and the same as `clock` for all others.
    """

    warp: int
    trip: int
    position: int
    clock: float
    begun: float
    done: float


def record(trace: Sequence[Operation], machine: Multiprocessor, *, warps: int, blocks: int, trips: int) -> list[Issue]:
    """Every instruction that the resident blocks issue until the first warp has completed `trips` trips, in the order of the clock; see `steady_clocks`."""
    return record_roles([Role(tuple(trace), warps)], machine, blocks=blocks, trips=trips)


def record_roles(roles: Sequence[Role], machine: Multiprocessor, *, blocks: int, trips: int) -> list[Issue]:
    """The same of warps in several roles; warps are counted role by role, block by block."""
    run = _RecordedRun(roles, machine, blocks, trips, False)
    run.clocks()
    return run.recorded()


@dataclass
class _Warp:
    """What the SM knows of one warp.

    Attributes:
        index: among all warps of the SM.
        place: in its block.
        block: its own.
        home: its sub-partition.
        role: index of its role.
        trace: that it runs.
        units: numbers of the units that the trace takes.
        scale: of a position, so that the progress of warps in different roles can be compared.
        position: of its next instruction in the trace.
        trips: that it has completed.
        ready: earliest clock for its next instruction, units and queues aside.
        earliest: the same without what it waits for.
        scoreboards: when each is released.
        copied: when the copies that it has issued are complete.
        groups: the same, of each closed group of copies.
        products: groups of products that were issued.
        last_issue: when its last instruction issued.
    """

    index: int
    place: int
    block: int
    home: int
    role: int
    trace: Sequence[Operation]
    units: list[int]
    ready: float
    scoreboards: list[float]
    groups: deque[float]
    products: deque[Group]
    scale: float
    position: int = 0
    trips: int = 0
    earliest: float = 0.0
    copied: float = 0.0
    last_issue: float = -1.0

    def progress(self) -> tuple[int, float]:
        """How far it has come."""
        return self.trips, self.position * self.scale


class _Run:
    """One run of the model."""

    def __init__(self, roles: Sequence[Role], machine: Multiprocessor, blocks: int, trips: int, in_turn: bool, warming: int = 1) -> None:
        self.roles, self.machine, self.trips, self.warming = roles, machine, trips, warming
        self.length = len(roles[0].trace)
        self.computing = roles[0].warps * blocks
        self.warps_per_block = max(role.first + role.warps for role in roles)
        self.warps: list[_Warp] = []
        self.homes: list[list[_Warp]] = [[] for _ in range(SUB_PARTITIONS)]
        for block in range(blocks):
            for number, role in enumerate(roles):
                self._add_warps(block, number, role)
        self.unit_free = [[_FREE] * len(_NUMBERS) for _ in range(SUB_PARTITIONS)]
        self.queues: list[deque[float]] = [deque() for _ in range(SUB_PARTITIONS)]
        self.pipe_free = self.l2_free = 0.0
        self.arrived: dict[tuple[int, int, int], list[_Warp]] = defaultdict(list)
        self.barrier_free: dict[tuple[int, int, int], float] = defaultdict(float)
        self.last: list[_Warp | None] = [None] * SUB_PARTITIONS
        self.fewest_trips = [0] * SUB_PARTITIONS
        self.issued = 0
        self.next_event = [0.0] * SUB_PARTITIONS
        units = machine.warpgroups
        self.tensor = [TensorUnit(units, self._read, in_turn=in_turn) for _ in range(SUB_PARTITIONS)] if units is not None else []
        self.meetings = Meetings(roles, blocks)
        self.landings: list[tuple[float, int, float, Phases | None]] = []

    def _add_warps(self, block: int, number: int, role: Role) -> None:
        trace, units = role.trace, [_NUMBERS[operation.unit] for operation in role.trace]
        for within in range(role.warps):
            place = role.first + within
            home = (block * self.warps_per_block + place) % SUB_PARTITIONS
            start = block * _GOLDEN % 1.0 * len(trace) * 1.5 + within * 7 % 40
            warp = _Warp(
                len(self.warps), place, block, home, number, trace, units, start, [0.0] * NUM_SCOREBOARDS, deque(maxlen=8), deque(maxlen=8), 1 / len(trace)
            )  # fmt: skip
            self.warps.append(warp)
            self.homes[home].append(warp)

    def clocks(self) -> float:
        """Run from the moment when all warps have completed the trips of `warming` until the first has completed all of them."""
        warming = self.computing
        begin = issued_before = 0.0
        while True:
            time = min(self.next_event)
            if self.landings and self.landings[0][0] <= time:
                self._land()
                continue
            home = self.next_event.index(time)
            if time == _NEVER:
                raise AssertionError("every warp waits for a barrier")
            completed = self._step(home, time)
            if completed is None or completed.role:
                continue
            if completed.trips == self.warming:
                warming -= 1
                if not warming:
                    begin, issued_before = time, self.issued
            if completed.trips >= self.trips and not warming:
                trips = (self.issued - issued_before) / (self.length * self.computing)
                return (time - begin) / trips

    def _step(self, home: int, time: float) -> _Warp | None:
        """Issue at most one instruction of a sub-partition; the warp that completed a trip with it."""
        unit_free, queue = self.unit_free[home], self.queues[home]
        tensor = self.tensor[home] if self.tensor else None
        if tensor is not None and tensor.waiting and tensor.advance(time):
            for warp in self.homes[home]:
                if warp.ready == _NEVER and warp.products:
                    warp.ready = self._ready(warp, warp.earliest)
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
            operation = warp.trace[warp.position]
            if operation.kind is Kind.PRODUCT:
                assert tensor is not None
                if not tensor.admits(warp.index, time):
                    wake = min(wake, max(time + 1, tensor.free))
                    continue
            else:
                free = unit_free[warp.units[warp.position]]
                if free >= time + 1:
                    wake = min(wake, free)
                    continue
            if full and operation.wavefronts and operation.kind is not Kind.PRODUCT:
                wake = min(wake, queue[0])
                continue
            if chosen is None or (chosen is not last and (warp is last or self._precedes(warp, chosen))):
                chosen = warp
        if chosen is None:
            if tensor is not None and tensor.waiting:
                wake = min(wake, tensor.next_begin())
            self.next_event[home] = _NEVER if wake == _NEVER else max(time + 1, float(int(wake)))
            return None
        self.last[home] = chosen
        self.next_event[home] = time + 1
        return chosen if self._issue(chosen, home, time) else None

    def _precedes(self, warp: _Warp, other: _Warp) -> bool:
        """Whether a warp's turn is before another's: that is furthest behind, or in specialised kernels the oldest."""
        return warp.index < other.index if len(self.roles) > 1 else warp.progress() < other.progress()

    def _issue(self, warp: _Warp, home: int, time: float) -> bool:
        """Let the warp's next instruction go; whether that completed a trip."""
        operation = warp.trace[warp.position]
        self.issued += not warp.role
        warp.last_issue = time
        kind = operation.kind
        if kind is Kind.PRODUCT:
            self._product(warp, operation, time)
        elif kind is Kind.PHASE:
            self._meet(warp, operation, time)
        elif kind is Kind.BULK_STORE:
            self._store_in_bulk(warp, operation, time)
        else:
            if operation.unit is not None:
                unit_free, unit = self.unit_free[home], warp.units[warp.position]
                unit_free[unit] = max(unit_free[unit], time) + operation.clocks
            if operation.wavefronts or operation.l2_bytes:
                self._memory(warp, operation, home, time)
            elif operation.write_scoreboard is not None:
                warp.scoreboards[operation.write_scoreboard] = max(warp.scoreboards[operation.write_scoreboard], time + operation.latency)
        if kind is Kind.COMMIT:
            warp.groups.append(warp.copied)
        warp.position += 1
        completed = warp.position == len(warp.trace)
        if completed:
            warp.position = 0
            warp.trips += 1
            self.fewest_trips[home] = min(other.trips for other in self.homes[home])
        held = kind is not Kind.FENCE or warp.place == self.roles[warp.role].first
        warp.ready = self._ready(warp, time + (operation.stall if held else 1.0))
        if kind is Kind.BARRIER:
            self._arrive(warp, operation, time)
        return completed

    def _ready(self, warp: _Warp, earliest: float) -> float:
        """When the warp's next instruction may issue as far as the warp itself is concerned: all that it waits for has been issued."""
        warp.earliest = earliest
        operation = warp.trace[warp.position]
        for scoreboard in operation.waits:
            earliest = max(earliest, warp.scoreboards[scoreboard])
        if operation.kind is Kind.WAIT and len(warp.groups) > operation.pending:
            earliest = max(earliest, warp.groups[len(warp.groups) - operation.pending - 1])
        elif operation.kind is Kind.PRODUCTS_WAIT and len(warp.products) > operation.pending:
            earliest = max(earliest, warp.products[len(warp.products) - operation.pending - 1].known_end)
        return earliest

    def _product(self, warp: _Warp, operation: Operation, time: float) -> None:
        if not warp.products or warp.products[-1].closed:
            warp.products.append(Group())
        group = warp.products[-1]
        self.tensor[warp.home].issue(warp.index, operation.clocks, operation.wavefronts, group, time)
        group.closed = operation.closes

    def _read(self, time: float, wavefronts: float) -> float:
        """Take the memory pipe for operands; when they are there."""
        self.pipe_free = max(self.pipe_free, time) + wavefronts
        return self.pipe_free

    def _meet(self, warp: _Warp, operation: Operation, time: float) -> None:
        """What an instruction does at an mbarrier."""
        meeting, units = operation.meeting, self.machine.warpgroups
        assert meeting is not None
        assert units is not None
        if operation.read_scoreboard is not None:
            warp.scoreboards[operation.read_scoreboard] = max(warp.scoreboards[operation.read_scoreboard], time + operation.latency)
        if meeting.act is Act.COPY:
            self._copy_in_bulk(operation, meeting, self.meetings.of(warp.block, meeting), time)
        elif meeting.act in (Act.ARRIVE, Act.ARRIVE_BEHIND_COPIES):
            phases = (
                self.meetings.handed_to(warp.block, meeting, warp.role, warp.place)
                if meeting.turns
                else self.meetings.of(warp.block, meeting)
            )
            arrived = max(time, warp.copied) if meeting.act is Act.ARRIVE_BEHIND_COPIES else time
            if phases.arrive(warp.index, arrived + units.phase_hand_over):
                self._let_go(phases, time)
        elif meeting.act is Act.WAIT:
            phases = (
                self.meetings.handed_by(warp.block, meeting, warp.role, warp.place)
                if meeting.turns
                else self.meetings.of(warp.block, meeting)
            )
            if operation.write_scoreboard is not None:
                phase = phases.next_wait(warp.index)
                end = phases.end_of(phase)
                warp.scoreboards[operation.write_scoreboard] = max(time + operation.latency, end)
                if end == _NEVER:
                    phases.waiting.append((warp.index, operation.write_scoreboard, phase))

    def _copy_in_bulk(self, operation: Operation, meeting: Meeting, phases: Phases, time: float) -> None:
        """It comes from L2 in pieces, which are written to shared memory one after the other."""
        units = self.machine.warpgroups
        assert units is not None
        pieces = max(1, round(operation.wavefronts / _PIECE_WAVEFRONTS))
        self.l2_free = max(self.l2_free, time)
        for piece in range(pieces):
            self.l2_free += operation.l2_bytes / pieces / self.machine.l2_bytes
            ends = phases if meeting.completes and piece == pieces - 1 else None
            heappush(self.landings, (self.l2_free + units.bulk_copy, len(self.landings), operation.wavefronts / pieces, ends))

    def _store_in_bulk(self, warp: _Warp, operation: Operation, time: float) -> None:
        """L2 takes it in pieces, each of which is read in shared memory then."""
        pieces = max(1, round(operation.wavefronts / _PIECE_WAVEFRONTS))
        self.l2_free = max(self.l2_free, time)
        for _ in range(pieces):
            heappush(self.landings, (self.l2_free, len(self.landings), operation.wavefronts / pieces, None))
            self.l2_free += operation.l2_bytes / pieces / self.machine.l2_bytes
        warp.copied = max(warp.copied, self.l2_free + operation.latency)

    def _land(self) -> None:
        time, _, wavefronts, phases = heappop(self.landings)
        end = self._read(time, wavefronts)
        if phases is not None and phases.arrive(COPIES, end):
            self._let_go(phases, time)

    def _let_go(self, phases: Phases, time: float) -> None:
        """Let those go on that wait for a phase that is over now."""
        still = []
        for index, scoreboard, phase in phases.waiting:
            end = phases.end_of(phase)
            if end == _NEVER:
                still.append((index, scoreboard, phase))
                continue
            warp = self.warps[index]
            warp.scoreboards[scoreboard] = end
            if warp.ready == _NEVER:
                warp.ready = self._ready(warp, warp.earliest)
                self._wake(warp.home, time, warp.ready)
        phases.waiting[:] = still

    def _wake(self, home: int, time: float, ready: float) -> None:
        if ready != _NEVER:
            self.next_event[home] = max(time + 1, min(self.next_event[home], float(int(ready))))

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

    def _arrive(self, warp: _Warp, operation: Operation, time: float) -> None:
        """Hold the warp until all of its block have arrived, or as many neighbours as the barrier is for."""
        meeting = operation.threads // 32 or self.warps_per_block
        key = (warp.block, meeting, (warp.place - self.roles[warp.role].first) // meeting)
        self.barrier_free[key] = max(self.barrier_free[key], time) + self.machine.barrier_arrival
        self.arrived[key].append(warp)
        if len(self.arrived[key]) < meeting:
            warp.ready = _NEVER
            return
        units = self.machine.warpgroups
        release = self.barrier_free[key] + (
            units.named_barrier if operation.numbered and units is not None else self.machine.barrier_latency
        )
        for waiting in self.arrived[key]:
            waiting.ready = self._ready(waiting, max(release, waiting.last_issue + 1))
        self.arrived[key].clear()
        for home in range(SUB_PARTITIONS):
            self.next_event[home] = max(time + 1, min(self.next_event[home], float(int(release))))


class _RecordedRun(_Run):
    """A run that remembers what it issued."""

    def __init__(self, roles: Sequence[Role], machine: Multiprocessor, blocks: int, trips: int, in_turn: bool) -> None:
        super().__init__(roles, machine, blocks, trips, in_turn)
        self.issues: list[Issue] = []
        for unit in self.tensor:
            unit.services = defaultdict(deque)

    def _issue(self, warp: _Warp, home: int, time: float) -> bool:
        trip, position, operation = warp.trips, warp.position, warp.trace[warp.position]
        completed = super()._issue(warp, home, time)
        done = warp.copied if operation.kind is Kind.COPY else time
        if operation.meeting is not None and operation.meeting.act is Act.COPY and self.machine.warpgroups is not None:
            done = self.l2_free + self.machine.warpgroups.bulk_copy
        self.issues.append(Issue(warp.index, trip, position, time, time, done))
        return completed

    def recorded(self) -> list[Issue]:
        """All of them, now that it is known when the tensor units served which product: those of a warp in the order of their issue."""
        found = []
        for issue in self.issues:
            warp = self.warps[issue.warp]
            if warp.trace[issue.position].kind is Kind.PRODUCT:
                services = self.tensor[warp.home].services
                begun, done = services[warp.index].popleft() if services and services[warp.index] else (_NEVER, _NEVER)
                issue = replace(issue, begun=begun, done=done)
            found.append(issue)
        return found
