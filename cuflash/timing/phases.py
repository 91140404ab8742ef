"""mbarriers of a block while the model runs: which phases are over, and who waits for one.

Of a ring there is one `Phases` for all its stages, since both sides go through them in the same order: its phases are those of the stages in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cuflash.timing.operations import Role
from cuflash.timing.roles import Act, Meeting

NEVER = float("inf")
COPIES = -1
"""Who arrives when copies in bulk have landed."""
_WARPGROUP_WARPS = 4


class Phases:
    """The phases of one barrier, or of a ring of them.

    Attributes:
        arrivals: that end a phase; those of copies in bulk count as one.
        ends: when each phase that is over was known to be over by those who wait.
        waiting: warp, scoreboard and phase of those who wait for one that is not over.
    """

    def __init__(self, arrivals: int, initial: int) -> None:
        """So many phases are over in the beginning."""
        self.arrivals = arrivals
        self.ends: list[float] = [0.0] * initial
        self.waiting: list[tuple[int, int, int]] = []
        self._initial = initial
        self._arrived: Counter[int] = Counter()
        self._waits: Counter[int] = Counter()
        self._latest: Counter[int] = Counter()
        self._ends: dict[int, float] = {}

    def next_wait(self, warp: int) -> int:
        """The phase that a warp waits for next; each wait is for another one."""
        self._waits[warp] += 1
        return self._waits[warp] - 1

    def end_of(self, phase: int) -> float:
        """When a phase is over; NEVER while that is not known."""
        return self.ends[phase] if phase < len(self.ends) else NEVER

    def arrive(self, warp: int, time: float) -> bool:
        """A warp arrives, or `COPIES` do, each time in the next phase; whether that ends a phase."""
        phase = self._initial + self._latest[warp]
        self._latest[warp] += 1
        self._arrived[phase] += 1
        self._ends[phase] = max(self._ends.get(phase, 0.0), time)
        if self._arrived[phase] < self.arrivals:
            return False
        del self._arrived[phase]
        self.ends.append(self._ends.pop(phase))
        return True


class Meetings:
    """All barriers of the resident blocks."""

    def __init__(self, roles: Sequence[Role], blocks: int) -> None:
        self.roles = roles
        self._phases: dict[tuple[int, int, int], Phases] = {}
        for block in range(blocks):
            for barrier in {o.meeting.barrier for role in roles for o in role.trace if o.meeting is not None and not o.meeting.turns}:
                self._phases[block, barrier, -1] = Phases(self._arrivals(barrier), self._initial(barrier))

    def _arrivals(self, barrier: int) -> int:
        """Warps that arrive there, each once in a phase, and the copies."""
        of_warps = sum(
            role.warps
            for role in self.roles
            for act in (Act.ARRIVE, Act.ARRIVE_BEHIND_COPIES)
            if any(_is(o.meeting, act, barrier) for o in role.trace)
        )
        return of_warps + any(_is(o.meeting, Act.COPY, barrier) for role in self.roles for o in role.trace)

    def _initial(self, barrier: int) -> int:
        waits = (o.meeting for role in self.roles for o in role.trace if _is(o.meeting, Act.WAIT, barrier))
        return max((meeting.initial for meeting in waits if meeting is not None), default=0)

    def of(self, block: int, meeting: Meeting) -> Phases:
        """The barrier that a meeting is at."""
        return self._phases[block, meeting.barrier, -1]

    def handed_by(self, block: int, meeting: Meeting, role: int, place: int) -> Phases:
        """The barrier at which a warp's warpgroup waits for its turn; the first one has it in the beginning."""
        return self._turn_of(block, meeting, (place - self.roles[role].first) // _WARPGROUP_WARPS)

    def handed_to(self, block: int, meeting: Meeting, role: int, place: int) -> Phases:
        """The barrier at which the next warpgroup waits for its turn."""
        groups = max(1, self.roles[role].warps // _WARPGROUP_WARPS)
        return self._turn_of(block, meeting, ((place - self.roles[role].first) // _WARPGROUP_WARPS + 1) % groups)

    def _turn_of(self, block: int, meeting: Meeting, group: int) -> Phases:
        return self._phases.setdefault((block, meeting.barrier, group), Phases(_WARPGROUP_WARPS, int(group == 0)))


def _is(meeting: Meeting | None, act: Act, barrier: int) -> bool:
    return meeting is not None and meeting.act is act and meeting.barrier == barrier
