"""`cuflash.autotune`: find the fastest tiles for one call; and `tune`, which the command line also uses for many calls."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cuflash
from cuflash.arrays.borrowing import AnyArray
from cuflash.arrays.descriptions import describe
from cuflash.cli import terminal_tables
from cuflash.errors import OptionError
from cuflash.hardware.device import Device
from cuflash.jit import cache
from cuflash.problem.options import check_bool
from cuflash.runtime import calls
from cuflash.system import cache_directory
from cuflash.tuned import store
from cuflash.tuned.store import untuned
from cuflash.tuned.table import Entry
from cuflash.tuner import checkout, described_calls, progress
from cuflash.tuner.session import Evaluator, Listener, Session
from cuflash.tuner.tasks import EFFORTS, Effort, Task, tasks_of
from cuflash.tuner.worker import Workers


@dataclass(frozen=True)
class Tuned:
    """What a run found; `print` it for the table of gains.

    Attributes:
        entries: of every bucket that was tuned, with every candidate's time.
        path: of the table that has them.
        reason: why it ended: "done", "out of time" or "interrupted".
    """

    entries: tuple[Entry, ...]
    path: Path
    reason: str

    def __str__(self) -> str:
        lines = [terminal_tables.plain(progress.gains(self.entries)).rstrip()] if self.entries else ["nothing was timed"]
        if any(entry.timer == "model" for entry in self.entries):
            lines.append("These are predictions of the timing model: there is no GPU here, and nothing was timed.")
        failed = progress.failures(self.entries)
        lines += [f"not taken: {line}" for line in failed]
        return "\n".join([*lines, f"{self.reason}; " + (f"kept in {self.path}" if self.entries else "nothing to keep")])

    def __repr__(self) -> str:
        return f"<Tuned {len(self.entries)} buckets, {self.reason}; print it for the gains>"


def autotune(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    *,
    backward: bool = True,
    effort: Effort = "standard",
    budget: float | None = None,
    output: str | os.PathLike[str] | None = None,
    again: bool = False,
    verbose: bool = True,
    **arguments: Any,
) -> Tuned:
    """Time tiles for one call on its GPU, and keep what is found in a table that later calls look into.

    Candidates run in a process of their own, on random arrays of the same shapes, are compared with the default tile's result, and then timed. Nothing about
    results changes but the order of additions. Calls of other lengths take the tile of the nearest; what is tuned is read by other processes too. On the
    simulator there is no time: the timing model gives one.

    Args:
        query, key, value: as in the call; only shapes, the order of axes in memory and element types count.
        backward: also tune the backward pass.
        effort: "quick" tries 28 tiles of each kernel besides the default, "standard" 40, "full" all legal ones.
        budget: minutes after which to stop; the same call goes on from there.
        output: file of the table instead of the user's own in the cache directory; `CUFLASH_TUNING` then names it to later calls.
        again: time anew what an earlier run has timed.
        verbose: say on stderr what is tried.
        arguments: all others, as in `cuflash.plan`; with cu_seqlens_q, those of `cuflash.varlen_plan`. Arrays such as masks keep their values.

    Returns:
        What was found; `print` it.

    Raises:
        ArgumentError: as the call.
        OptionError: CUFLASH_TUNING=off, CUFLASH_COMPILE=forbid, a bad budget or effort, a file that is no table of this GPU.
        TuningError, SetupError: what no tile is to blame for: no memory, CuPy is missing, the default tile fails. What was found before is kept.
    """
    backward = check_bool("backward", backward)
    plan_of = cuflash.varlen_plan if "cu_seqlens_q" in arguments else cuflash.plan
    if "tile" in arguments:
        raise OptionError("tile", "a tile", "none", "Tiles are what autotune looks for; pin one in the call itself.")
    with untuned():
        plan = plan_of(query, key, value, **arguments, backward=backward)
    call = described_calls.of_arguments({"query": query, "key": key, "value": value}, arguments)
    wanted = [(call, plan.problem)]
    listener = progress.listener_for(sys.stderr) if check_bool("verbose", verbose) else progress.Silent()
    return tune(
        wanted, plan.device, passes=("forward", "backward") if backward else ("forward",), effort=effort, budget=budget, output=output, again=again,
        listener=listener,
    )  # fmt: skip


def tune(
    wanted: Sequence[tuple[described_calls.DescribedCall, Any]],
    device: Device,
    *,
    passes: Sequence[str],
    effort: Effort,
    budget: float | None,
    output: str | os.PathLike[str] | None,
    again: bool,
    listener: Listener,
    evaluator: Evaluator | None = None,
) -> Tuned:
    """Tune calls, each with its checked problem; what was said of a bucket twice is tuned once."""
    path = table_path(device, output)
    check_effort(effort)
    seconds = seconds_of(budget)
    if cache.is_compilation_forbidden():
        raise OptionError("CUFLASH_COMPILE", "'forbid'", "'allow'", "Tuning compiles candidates: unset the environment variable.")
    again = check_bool("again", again)
    tasks, facts = distinct_tasks(wanted, device, passes=passes, effort=effort), _facts(device, effort)
    session = Session(device, path, Workers(device) if evaluator is None else evaluator, listener, facts, seconds, again)
    entries, reason = session.run(tasks)
    store.forget()
    calls.forget()  # calls that were prepared with other tiles
    return Tuned(tuple(entries), path, reason)


def distinct_tasks(
    wanted: Sequence[tuple[described_calls.DescribedCall, Any]], device: Device, *, passes: Sequence[str], effort: Effort
) -> list[Task]:
    """The tasks of all calls, one for each bucket."""
    found: dict[Any, Task] = {}
    for call, problem in wanted:
        for task in tasks_of(call, problem, device, passes=passes, effort=effort):
            found.setdefault(task.bucket, task)
    return list(found.values())


def check_effort(effort: object) -> None:
    """One of EFFORTS."""
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise OptionError("effort", describe(effort), "one of " + ", ".join(EFFORTS), 'Write effort="quick" for a first look.')


def table_path(device: Device, output: str | os.PathLike[str] | None) -> Path:
    """The file that a run writes: the one that is named, that of CUFLASH_TUNING, or the user's own.

    Raises:
        OptionError: nothing would find what it writes, or there is no cache directory.
    """
    if output is not None:
        return Path(output).expanduser().absolute()
    kind, named = store.setting()
    if kind == "off":
        hint = "Unset the environment variable, or name a file for the table."
        raise OptionError(store.VARIABLE, "'off', with which no call finds what is tuned", "none, or a file", hint)
    path = named.absolute() if named is not None else store.own_path(device)
    if path is None:
        hint = "Let CUFLASH_CACHE_DIR name a directory that only you can write to, or name a file for the table."
        raise OptionError("output", f"no cache directory ({cache_directory.why_not(store.PART)})", "a file", hint)
    return path


def seconds_of(budget: object) -> float | None:
    """Of a budget in minutes; None for no limit."""
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < float("inf"):
        raise OptionError("budget", describe(budget), "a positive number of minutes, or None", "Write budget=5 for five minutes.")
    return 60.0 * budget


def _facts(device: Device, effort: str) -> dict[str, str]:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"driver": _driver(device), "cuflash": cuflash.__version__, "commit": checkout.commit(), "date": now, "effort": effort}


def _driver(device: Device) -> str:
    """The newest CUDA that the driver has, and the version of CUDA's runtime library; empty without a GPU."""
    if device.kind != "gpu":
        return ""
    runtime = importlib.import_module("cupy").cuda.runtime
    versions = [int(runtime.driverGetVersion()), int(runtime.runtimeGetVersion())]
    return " / ".join(f"CUDA {number // 1000}.{number % 1000 // 10}" for number in versions)


def compiled_ahead(tasks: Sequence[Task], device: Device) -> tuple[int, list[str]]:
    """Compile all candidates for a GPU that need not be here; how many kernels there are, and what went wrong."""
    workers = Workers(device)
    try:
        count = workers.compile_ahead([(task, tile) for task in tasks for tile in task.tiles])
        return count, workers.wait_for_compiled()
    finally:
        workers.close()


def cache_place() -> str:
    """Where compiled candidates are, for people."""
    return str(cache.directory() or "nowhere: there is no cache directory")
