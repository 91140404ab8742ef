"""Where tables lie, and the tile that they have for a call.

    the user's own   tuning/NAME.json in the cache directory, one for each GPU; what `autotune` writes
    shipped ones     cuflash/tuned/shipped/*.json
    CUFLASH_TUNING   "off": none of them; else a FILE, which is the only one then

`look_up` takes the entry of exactly the call's bucket, else the nearest; the user's own before shipped ones. Entries of other kernels or of another compiler are
ignored, and the answer says so. A process reads each table once, so that two plans of one call in it never have two tiles, whatever other processes write meanwhile;
what this one writes is read again, and all of them after `forget`, which `autotune` calls.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cuflash.errors import OptionError
from cuflash.hardware.device import Device
from cuflash.problem.tile import Tile
from cuflash.system import cache_directory, private_files
from cuflash.system.file_lock import FileLock
from cuflash.tuned import fingerprint
from cuflash.tuned.buckets import Bucket
from cuflash.tuned.table import Entry, Table, Timing, device_facts

VARIABLE = "CUFLASH_TUNING"
"""Environment variable. Looked at when a call is planned, so not by calls whose like was made before."""

PART = "tuning"
"""The part of the cache directory that tables lie in."""

SHIPPED = Path(__file__).parent / "shipped"

LOCK_TIMEOUT = 30.0
_MAX_BYTES = 64 * 2**20

_log = logging.getLogger("cuflash")


@dataclass(frozen=True)
class Found:
    """What tables say of a bucket.

    Attributes:
        tile: to take; None where there is none.
        words: where the tile is from; or why one that there was is ignored; empty where there was none.
        milliseconds: that it took; 0.0 where there is none.
        call, timer: that it took them of, and by what.
    """

    tile: Tile | None = None
    words: str = ""
    milliseconds: float = 0.0
    call: str = ""
    timer: str = ""


NOTHING = Found()

_is_untuned = contextvars.ContextVar("cuflash_is_untuned", default=False)


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Plans of this thread as if there were no tables."""
    token = _is_untuned.set(True)
    try:
        yield
    finally:
        _is_untuned.reset(token)


def look_up(bucket: Bucket, source: str, device: Device, is_legal: Callable[[Tile], bool]) -> Found:
    """The tile that tables have for a bucket.

    Args:
        bucket: of the call.
        source: of its kernel, whose present text counts.
        device: where it runs.
        is_legal: whether the kernel takes a tile there.

    Raises:
        OptionError: CUFLASH_TUNING names no table.
    """
    near: list[tuple[float, int, Entry, Timing, str]] = []
    for number, (whose, table) in enumerate(_tables(device)):
        for entry in table.entries.values():
            distance = bucket.distance(entry.bucket)
            if distance is not None and (best := entry.best) is not None:
                near.append((distance, number, entry, best, whose))
    if not near:
        return NOTHING
    sources, nvrtc = fingerprint.of_source(source), fingerprint.of_compiler()
    ignored = ""
    for distance, _, entry, best, whose in sorted(near, key=lambda each: each[:2]):
        if not entry.is_of(sources, nvrtc):
            ignored = ignored or f"{whose} has a tile of {_what_differs(entry, sources)}, which is ignored: run autotune again"
        elif not is_legal(best.tile):
            ignored = ignored or f"{whose} has Tile({best.tile}), which is not legal here and is ignored"
        else:
            return Found(best.tile, _words(bucket, entry, whose, exact=distance == 0), best.milliseconds or 0.0, entry.call, entry.timer)
    _say_once(ignored)
    return Found(None, ignored)


def tiles_of_all_lengths(bucket: Bucket, source: str, device: Device, is_legal: Callable[[Tile], bool]) -> tuple[Tile, ...]:
    """Every tile that `look_up` may give a call that differs in lengths only: what compiling ahead has to compile."""
    buckets = {
        entry.bucket for _, table in _tables(device) for entry in table.entries.values()
        if entry.bucket.ignoring_lengths().distance(bucket.ignoring_lengths()) is not None
    }  # fmt: skip
    found = (look_up(each, source, device, is_legal).tile for each in sorted(buckets, key=str))
    return tuple(dict.fromkeys(tile for tile in found if tile is not None))


def _what_differs(entry: Entry, sources: str) -> str:
    return "other kernel sources" if entry.sources != sources else f"NVRTC {entry.nvrtc or '(none)'}"


def _words(bucket: Bucket, entry: Entry, whose: str, *, exact: bool) -> str:
    how = "predicted" if entry.timer == "model" else "timed"
    lengths = f"{entry.bucket.seqlen_q} x {entry.bucket.seqlen_kv}"
    if exact:
        return f"{how} for seqlen up to {lengths} ({whose})"
    other = "" if entry.bucket.dtype == bucket.dtype else f" in {entry.bucket.dtype}"
    return f"{how}{other} for seqlen up to {lengths}, the nearest there is ({whose})"


def summary(device: Device) -> str:
    """What tables there are for a device, for people; never raises."""
    try:
        tables = list(_tables(device))
    except OptionError as error:
        return str(error)
    if not tables:
        return f"none ({VARIABLE}=off)" if setting()[0] == "off" else "none: python -m cuflash autotune makes them"
    return "; ".join(f"{whose}: {len(table.entries)} {'bucket' if len(table.entries) == 1 else 'buckets'}" for whose, table in tables)


# --- Where tables are ---------------------------------------------------------------------------------------------------------------------


def setting() -> tuple[Literal["usual", "off", "file"], Path | None]:
    """What CUFLASH_TUNING asks for; "off" where plans are made `untuned`."""
    value = "off" if _is_untuned.get() else os.environ.get(VARIABLE) or ""
    if value in ("", "off"):
        return ("off" if value else "usual"), None
    return "file", Path(value).expanduser()


def own_path(device: Device) -> Path | None:
    """The file of the user's own table of a GPU; None without a cache directory."""
    folder = _folder(tuple(os.environ.get(name) for name in (cache_directory.VARIABLE, "XDG_CACHE_HOME", "HOME")))
    return None if folder is None else folder / f"{slug(device.name)}.json"


@functools.lru_cache(maxsize=16)
def _folder(_variables: tuple[str | None, ...]) -> Path | None:
    """The folder that these variables lead to, looked at once: that takes longer than the rest of a plan. Files in it are judged whenever they are read."""
    return cache_directory.find(PART)


def slug(name: str) -> str:
    """A file name for a GPU's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def _tables(device: Device) -> Iterator[tuple[str, Table]]:
    """The tables that count for a device, in their order, with what people know them by."""
    kind, path = setting()
    if path is not None:
        table = _kept(path, private=False)
        if isinstance(table, str):
            _read_before.pop(path, None)  # no plan came of it: it may be put right
            hint = "Name a file that `python -m cuflash autotune --output FILE` wrote, or 'off', or unset the environment variable."
            raise OptionError(VARIABLE, f"{str(path)!r}: {table}", "a table of tuned tiles", hint)
        if all(table.device[name] == getattr(device, name) for name in ("kind", "arch")):  # another card's too, since a user says so
            yield VARIABLE, table
        else:
            of = f"{table.device['name']} ({table.device['kind']}, {table.device['arch']})"
            _say_once(f"{VARIABLE} names a table of {of}, which has no tile for {device.name} ({device.kind}, {device.arch})")
    if kind != "usual":
        return
    own = own_path(device)
    places = [("the user's table", own, True)] if own is not None else []
    for whose, place, private in [*places, ("the shipped table", SHIPPED / f"{slug(device.name)}.json", False)]:
        found = _kept(place, private=private)
        if isinstance(found, Table) and found.is_of(device):
            yield whose, found
        elif isinstance(found, str) and found != MISSING:
            _say_once(f"{place} is ignored: {found}")


MISSING = "there is no such file"
_read_before: dict[Path, Table | str] = {}


def forget() -> None:
    """Read tables anew: plans of this process see what others have written."""
    _read_before.clear()


def _kept(path: Path, *, private: bool) -> Table | str:
    """The same as `_read`, as it was when this process first looked."""
    found = _read_before.get(path)
    if found is None:
        found = _read_before.setdefault(path, _read(path, private=private))
    return found


def _read(path: Path, *, private: bool) -> Table | str:
    """A table, or what is wrong with it. What others could have written is not taken from the cache directory."""
    try:
        return Table.from_text(private_files.read(path, _MAX_BYTES) if private else _read_plain(path))
    except ValueError as error:
        return f"it is no table of tuned tiles ({error})"
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return str(error)


def _read_plain(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    return content


_said: set[str] = set()


def _say_once(words: str) -> None:
    if words and words not in _said:
        _said.add(words)
        _log.warning("cuflash: %s", words)


# --- Writing ------------------------------------------------------------------------------------------------------------------------------


def read(path: Path, device: Device) -> Table:
    """The table in a file, for those who add to it; an empty one where there is none, or where what lies in the cache is damaged.

    Raises:
        OptionError: it is that of another GPU, or a file of the user's that is no table.
    """
    found = _read(path, private=False)
    if isinstance(found, str):
        if found != MISSING and path != own_path(device):
            raise OptionError("output", f"{str(path)!r}: {found}", "a new file, or a table of tuned tiles", "Name another file.")
        if found != MISSING:
            _say_once(f"{path} is replaced: {found}")
        return Table(device_facts(device))
    if not found.is_of(device):
        raise OptionError("output", f"a table of {found.device['name']}", f"one of {device.name}", "Name another file.")
    return found


def save(path: Path, device: Device, entry: Entry) -> None:
    """Add an entry to the table in a file. Processes that do so at the same time each keep the others' entries.

    Raises:
        OSError: it cannot be written.
        OptionError: it is that of another GPU.
    """
    private_files.make_directory(path.parent)
    with _locked(path.with_name(f"{path.name}.lock")):
        private_files.write(path, read(path, device).with_entry(entry).to_text().encode())
    _read_before.pop(path, None)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock whose file is still there: its last holder has removed the file that others wait on."""
    while True:
        lock = FileLock(path)
        try:
            lock.wait(LOCK_TIMEOUT, lambda: None, "write a table of tuned tiles")
            if lock.is_current():
                yield
                return
        finally:
            lock.close()
