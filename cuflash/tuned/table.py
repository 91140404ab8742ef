"""What was timed on one GPU, as JSON that people can read: an entry for each bucket, with every tile that was tried.

`Table.from_json` takes what `Table.to_text` wrote, and raises ValueError for anything else: a file may hold anything.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from cuflash.hardware.device import Device
from cuflash.problem.tile import Tile
from cuflash.tuned.buckets import Bucket

FORMAT = 1
_MAX_ENTRIES = 100_000
_TILE = tuple(entry.name for entry in fields(Tile))

LEAST_GAIN = 1.01
"""How many times faster than the default a tile has to be to be taken: less is noise."""

HUNG, SLOW_TO_COMPILE, UNTIMED = "hung: ", "took long to compile: ", "nothing to time it by"
"""How notes begin that say as much of the machine at that time as of the tile. They are never written, so that a later run tries the tile again."""

Record = TypeVar("Record")


@dataclass(frozen=True)
class Timing:
    """What became of one tile.

    Attributes:
        tile: which.
        milliseconds: median; None where it was not timed.
        p20, p80: quantiles.
        repeats: launches that were timed.
        sm_clock_mhz: of the GPU while it worked; None where the driver's library does not say.
        note: why it is not to be taken: it crashed, was wrong, did not compile or took too long; "left early" where a few launches showed that it is slow.
    """

    tile: Tile
    milliseconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    repeats: int = 0
    sm_clock_mhz: int | None = None
    note: str = ""

    @property
    def is_good(self) -> bool:
        """It was right, and timed to the end."""
        return self.milliseconds is not None and not self.note


@dataclass(frozen=True)
class Entry:
    """One bucket.

    Attributes:
        bucket: for which calls.
        call: extents of the one that was timed, for people.
        default: the tile that is taken without the table.
        timings: of every tile that was tried, in that order.
        sources, nvrtc: what the kernel was compiled from and with (`fingerprint`).
        driver, cuflash, commit, date: of the run, for people; the commit is empty of an installed library, and in older tables.
        timer: "events" of a GPU; "model" where there was none.
        effort: how many tiles the run was to try.
        is_complete: it tried all of them.
    """

    bucket: Bucket
    call: str
    default: Tile
    timings: tuple[Timing, ...]
    sources: str
    nvrtc: str
    driver: str = ""
    cuflash: str = ""
    commit: str = ""
    date: str = ""
    timer: str = "events"
    effort: str = ""
    is_complete: bool = False

    @functools.cached_property
    def best(self) -> Timing | None:
        """The fastest tile that is right, where it gains enough over the default, else the default; None if that was not timed."""
        default = self.timing_of(self.default)
        if default is None or default.milliseconds is None or not default.is_good:
            return None
        fastest = min((timing for timing in self.timings if timing.is_good), key=_milliseconds)
        return fastest if LEAST_GAIN * _milliseconds(fastest) <= default.milliseconds else default

    @property
    def gain(self) -> float | None:
        """How many times faster the best tile is than the default one."""
        best, default = self.best, self.timing_of(self.default)
        if best is None or default is None or not best.milliseconds or default.milliseconds is None:
            return None
        return default.milliseconds / best.milliseconds

    def lasting(self) -> Entry:
        """What is worth writing: without tiles that failed for what may have been the machine's fault."""
        passing = (HUNG, SLOW_TO_COMPILE, UNTIMED)
        return replace(self, timings=tuple(timing for timing in self.timings if not timing.note.startswith(passing)))

    def timing_of(self, tile: Tile) -> Timing | None:
        """What became of a tile; None if it was not tried."""
        return next((timing for timing in self.timings if timing.tile == tile), None)

    def is_of(self, sources: str, nvrtc: str) -> bool:
        """Whether it was timed with these kernels and this compiler."""
        return (self.sources, self.nvrtc) == (sources, nvrtc)

    def merged(self, older: Entry) -> Entry:
        """With the tiles that only an older entry of the same bucket, kernels and timer has tried, the others as they are here."""
        if not older.is_of(self.sources, self.nvrtc) or (older.timer, older.default) != (self.timer, self.default):
            return self
        tried = {timing.tile for timing in self.timings}
        more = tuple(timing for timing in older.timings if timing.tile not in tried)
        return replace(self, timings=self.timings + more)


def _milliseconds(timing: Timing) -> float:
    assert timing.milliseconds is not None
    return timing.milliseconds


@dataclass(frozen=True)
class Table:
    """All entries of one GPU.

    Attributes:
        device: kind, name and architecture, and what else was known of the GPU.
        entries: by bucket.
    """

    device: Mapping[str, Any]
    entries: Mapping[Bucket, Entry] = field(default_factory=dict)

    def is_of(self, device: Device) -> bool:
        """Whether it was made on such a GPU."""
        return all(self.device.get(name) == getattr(device, name) for name in ("kind", "name", "arch"))

    def with_entry(self, entry: Entry) -> Table:
        """With one more entry, merged with what there is of its bucket."""
        older = self.entries.get(entry.bucket)
        return replace(self, entries={**self.entries, entry.bucket: entry if older is None else entry.merged(older)})

    def to_text(self) -> str:
        """JSON with a line for each tile that was tried."""
        head = f'{{"format": {FORMAT},\n "device": {json.dumps(dict(self.device), ensure_ascii=False)},\n "entries": ['
        return head + ",".join(map(_entry_text, self.entries.values())) + "]}\n"

    @classmethod
    def from_text(cls, text: str | bytes) -> Table:
        """The table of a file.

        Raises:
            ValueError: it is none, or one of another format.
        """
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}, and this is {FORMAT}")
            device = found["device"]
            if not all(isinstance(device.get(name), str) for name in ("kind", "name", "arch")):
                raise ValueError("device without kind, name and arch")
            if len(found["entries"]) > _MAX_ENTRIES:
                raise ValueError(f"more than {_MAX_ENTRIES} entries")
            return cls(device, {entry.bucket: entry for entry in map(_entry, found["entries"])})
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def device_facts(device: Device) -> dict[str, Any]:
    """What a table says of its GPU."""
    return {name: getattr(device, name) for name in ("kind", "name", "arch", "num_sms", "shared_memory_per_block")}


def _entry_text(entry: Entry) -> str:
    best, gain = entry.best, entry.gain
    values: dict[str, Any] = {"bucket": asdict(entry.bucket), "tile": None if best is None else _numbers(best.tile)}
    values |= {"gain": None if gain is None else round(gain, 4), "default": _numbers(entry.default)}
    values |= {
        name: getattr(entry, name)
        for name in ("call", "sources", "nvrtc", "driver", "cuflash", "commit", "date", "timer", "effort", "is_complete")
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    timings = ",".join(f"\n    {json.dumps(asdict(timing) | {'tile': _numbers(timing.tile)})}" for timing in entry.timings)
    return "\n  {" + ",\n   ".join([*lines, f'"timings": [{timings}]']) + "}"


def _numbers(tile: Tile) -> list[int]:
    return [getattr(tile, name) for name in _TILE]


def _entry(value: Mapping[str, Any]) -> Entry:
    bucket = dict(value["bucket"])
    bucket["features"] = tuple(bucket["features"])
    texts = {name: value[name] for name in ("call", "sources", "nvrtc", "driver", "cuflash", "date", "timer", "effort")}
    texts["commit"] = value.get("commit", "")
    timings = tuple(_timing(timing) for timing in value["timings"])
    made = _checked(Bucket, bucket)
    if min(made.seqlen_q, made.seqlen_kv) < 1:
        raise ValueError("a bucket of no length")
    return _checked(
        Entry, {**texts, "bucket": made, "default": _tile(value["default"]), "timings": timings, "is_complete": value["is_complete"]}
    )


def _timing(value: Mapping[str, Any]) -> Timing:
    timing = _checked(Timing, {**value, "tile": _tile(value["tile"])})
    if timing.milliseconds is not None and not 0 <= timing.milliseconds < float("inf"):
        raise ValueError(f"a time of {timing.milliseconds} ms")
    return timing


def _tile(numbers: Any) -> Tile:
    if not isinstance(numbers, list) or [type(number) for number in numbers] != [int] * len(_TILE):
        raise ValueError(f"a tile of {numbers!r}")
    return Tile(*numbers)


_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float | None": (int, float, type(None))}
_TYPES |= {"int | None": (int, type(None)), "tuple[str, ...]": (tuple,)}


def _checked(kind: type[Record], values: dict[str, Any]) -> Record:
    """A record of values of the types that its fields have; names and types of others are refused."""
    for entry in fields(kind):  # type: ignore[arg-type]
        expected = _TYPES.get(str(entry.type))
        if entry.name in values and expected is not None and type(values[entry.name]) not in expected:
            raise ValueError(f"{entry.name} is {values[entry.name]!r}")
    return kind(**values)
