"""A trace without one of the limits that a kernel has: what it would gain says what binds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cuflash.timing.operations import RESOURCES, Kind, Operation, Unit
from cuflash.timing.roles import Act

LIMITS = (*(name for name in RESOURCES if name != "issue"), "barriers", "dependencies")
"""What `without` can lift."""


def without(trace: Sequence[Operation], limit: str) -> tuple[Operation, ...]:
    """The same trace where something costs nothing: a resource, "barriers", or "dependencies", which are stall counts, scoreboards and waits for copies."""
    changes: dict[str, object]
    if limit == "dependencies":
        changes = {"stall": 1.0}
        waits = (Kind.WAIT, Kind.PRODUCTS_WAIT)
        phases = {of for o in trace if _waits_for_phase(o) for of in (o.write_scoreboard,)}  # those are barriers
        return tuple(
            replace(o, **changes, waits=tuple(of for of in o.waits if of in phases), kind=Kind.PLAIN if o.kind in waits else o.kind)  # type: ignore[arg-type]
            for o in trace
        )
    if limit == "barriers":
        return tuple(replace(o, kind=Kind.PLAIN) if o.kind is Kind.BARRIER or _waits_for_phase(o) else o for o in trace)
    if limit == "shared memory":
        return tuple(replace(o, wavefronts=0.0) for o in trace)
    if limit == "l2":
        return tuple(replace(o, l2_bytes=0.0, latency=0.0) if o.l2_bytes else o for o in trace)
    return tuple(replace(o, clocks=0.0) if o.unit is Unit(limit) else o for o in trace)


def _waits_for_phase(operation: Operation) -> bool:
    return operation.meeting is not None and operation.meeting.act is Act.WAIT
