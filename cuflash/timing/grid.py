"""A grid of blocks on all SMs: waves, blocks of unequal length, tails.

`grid_clocks(blocks, num_sms=, trip_clocks=, overhead=)` hands out blocks in the order of their index, each to the first SM that has room, and returns the clocks until the
last one ends. Blocks that share an SM slow each other down as the model of the SM says: an SM with few blocks left runs each of them faster, but seldom all
of them together.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy


def grid_clocks(
    blocks: Iterable[float], *, num_sms: int, trip_clocks: Sequence[float], overhead: float, empty: float | None = None
) -> float:
    """Clocks from the first block's begin to the last one's end.

    Args:
        blocks: the trips of each block through its loop, in the order of launch.
        num_sms: of the card.
        trip_clocks: of an SM for one trip of each of its blocks, with 1, 2, … blocks on it; as many as it can hold.
        overhead: clocks of a block beside its trips, while others on its SM work.
        empty: the same of a block without trips, which ends at once; None for as much.
    """
    waiting = iter(blocks)
    sms = [_Sm(trip_clocks, overhead, overhead if empty is None else empty) for _ in range(num_sms)]
    for _ in range(len(trip_clocks)):  # first every SM gets one block, then every SM gets a second one
        for sm in sms:
            if (trips := next(waiting, None)) is not None:
                sm.add(trips)
    events = [(sm.next_end(), index) for index, sm in enumerate(sms) if sm.ends]
    heapq.heapify(events)
    time = 0.0
    while events:
        time, index = heapq.heappop(events)
        sm = sms[index]
        sm.remove(time)
        if (trips := next(waiting, None)) is not None:
            sm.add(trips)
        if sm.ends:
            heapq.heappush(events, (sm.next_end(), index))
    return time


def clocks_of_memory_grid(
    blocks: Sequence[Sequence[float]], *, num_sms: int, trip_clocks: Sequence[float], memory_clocks: float, overhead: float, empty: float
) -> float:
    """The same of blocks that wait for memory, whose bandwidth all blocks share which copy at a time: where few are left, each is faster.

    Args:
        blocks: of each block, in the order of launch, the trips of one walk after the other.
        num_sms: of the card.
        trip_clocks: of an SM for one trip of each of its blocks, with 1, 2, … blocks on it, if memory had no limit.
        memory_clocks: of memory for one trip of one block.
        overhead: clocks before the trips of a walk, in which nothing is copied.
        empty: of a block without trips.
    """
    waiting = iter([[walk for walk in block if walk] for block in blocks])
    clocks = numpy.asarray(trip_clocks)
    of_sms = (num_sms, len(trip_clocks))
    latency, trips = numpy.zeros(of_sms), numpy.zeros(of_sms)  # that are left of each block's walk
    walks: dict[tuple[int, int], list[float]] = {}

    def begin(place: tuple[int, int]) -> None:
        """The next walk of the block there, or the next block."""
        if not walks.get(place):
            if (block := next(waiting, None)) is None:
                walks.pop(place, None)
                return
            walks[place] = block
            if not block:
                latency[place] = empty
                return
        trips[place], latency[place] = walks[place].pop(0), overhead

    for slot in range(len(trip_clocks)):
        for sm in range(num_sms):
            begin((sm, slot))
    time = 0.0
    while walks:
        copies = (trips > 0) & (latency <= 0)
        together = copies.sum(axis=1)
        of_trip = numpy.maximum(clocks[numpy.maximum(together, 1) - 1], memory_clocks * together.sum())[:, None]
        ends = numpy.where(latency > 0, latency, numpy.where(copies, trips * of_trip, numpy.inf))
        step = float(ends.min())
        time += step
        latency = numpy.where(latency > 0, latency - step, 0.0)
        trips = numpy.where(copies, trips - step / of_trip, trips)
        latency[latency < 1e-6], trips[trips < 1e-9] = 0.0, 0.0
        for sm, slot in zip(*numpy.nonzero((latency == 0) & (trips == 0)), strict=True):
            if (place := (int(sm), int(slot))) in walks:
                begin(place)
    return time


class _Sm:
    """The blocks of one SM. All of them progress alike, so each ends at a fixed number of trips that the SM has made since its begin."""

    def __init__(self, trip_clocks: Sequence[float], overhead: float, empty: float) -> None:
        self.trip_clocks, self.overhead, self.empty = trip_clocks, overhead, empty
        self.time = 0.0
        self.trips = 0.0
        self.ends: list[float] = []

    def add(self, trips: float) -> None:
        """Begin a block now."""
        heapq.heappush(self.ends, self.trips + trips + (self.overhead if trips else self.empty) / self.trip_clocks[-1])

    def next_end(self) -> float:
        """When the next block ends, if none is added before."""
        return self.time + (self.ends[0] - self.trips) * self.trip_clocks[len(self.ends) - 1]

    def remove(self, time: float) -> None:
        """End the next block, whose end `time` is."""
        self.time, self.trips = time, heapq.heappop(self.ends)
