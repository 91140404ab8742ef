"""`--quick`, `--full` and `--features`: cuflash and other libraries side by side.

Libraries take turns case by case, so that a GPU that grows warm slows all of them. A wrong result has no time, and neither has a library that cannot do a
case: then the table has its reason.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from bench.calls import Calls, Library, NotSupported
from bench.cases import SEQLENS, Case, dry_cases, dry_feature_cases, feature_cases, full_cases, quick_cases
from bench.compilation import prefetch
from bench.libraries import absent, libraries
from bench.machine import Machine, heat, usable
from bench.memory import peak_memory
from bench.operands import ALLOWED_ERROR, Operands
from bench.report import COLUMNS, FLOP_LINE, Table, case_columns, one_line
from bench.timing import time_call

GRADIENTS = ("query", "key", "value", "attn_mask")
PASSES = ("forward", "forward_lse", "backward")


def judge(library: Library, case: Case, errors: list[float]) -> tuple[float | None, str]:
    """The largest error and what is to be said of it; "wrong" if the time is worth nothing."""
    if not errors:
        return None, "not checked"
    largest = max(errors) if all(math.isfinite(error) for error in errors) else math.nan
    allowed = ALLOWED_ERROR[case.sample.dtype]
    if largest <= allowed:
        return largest, ""
    inexact = library.name != "cuflash" and case.sample.dtype == "float32" and largest <= 100 * allowed
    return largest, "less exact than float32" if inexact else "wrong"


def checked(library: Library, operands: Operands, calls: Calls, direction: str) -> tuple[float | None, str]:
    """Run one pass, and judge it unless what it draws is its own business."""
    call = calls.of(direction)
    assert call is not None
    results = call()
    if calls.wait is not None:
        calls.wait()
    if calls.note.startswith("not checked"):
        return None, calls.note
    if direction.startswith("forward"):
        results = [results]
    names = ("out",) if direction.startswith("forward") else GRADIENTS
    named = {name: calls.as_operands(name, x) for name, x in zip(names, results, strict=False)}
    error, note = judge(library, operands.case, operands.errors(named))
    return error, note or calls.note


class GpuLost(Exception):
    """The GPU answers nothing any more, which in CUDA is for the life of a process; the message says behind which library."""


def require_gpu(machine: Machine, library: Library) -> None:
    """Raise `GpuLost` if this process cannot go on."""
    if not machine.dry and not usable(machine):
        raise GpuLost(library.label)


def known_before(library: Library, case: Case, machine: Machine, direction: str) -> dict[str, Any]:
    """The columns of a row of attention.csv that need no run."""
    names = {"library": library.name, "version": library.version, "backend": library.backend}
    return {**machine.head(), **names, **case_columns(case, machine.device), "pass": direction}


def measure(
    library: Library, operands: Operands, calls: Calls, direction: str, machine: Machine, timed: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Judge one pass and time it: the columns of attention.csv that `known_before` leaves open. A wrong result has no time.

    Args:
        timed: gives the columns about time of a call and what waits for it, `Calls.wait`.
    """
    call = calls.of(direction)
    assert call is not None
    error, note = checked(library, operands, calls, direction)
    if note == "wrong":
        return {"relative_error": error, "note": note}
    memory = peak_memory(operands, machine, call, library.name)
    times = timed(call, calls.wait)
    rate = operands.case.flops(direction) / times["milliseconds"] / 1e9
    return {**times, "tflops": rate, "peak_memory_bytes": memory, "relative_error": error, "note": note}


def time_case(case: Case, libraries_: list[Library], machine: Machine, table: Table, seconds: float) -> Iterator[str]:
    """Time all libraries on one case; says what it found. Yields "wrong" for every wrong result of cuflash."""
    operands = Operands(case, machine)
    said: dict[str, list[str]] = {direction: [] for direction in PASSES}
    for library in libraries_:
        if not library.takes(case):
            continue
        own = library.name == "cuflash"
        try:
            calls = library.prepare(operands)
        except Exception as error:
            reason = str(error) if isinstance(error, NotSupported) else one_line(error)
            for direction in said:
                table.add(
                    {**known_before(library, case, machine, direction), "note": f"{'does not run' if own else 'not supported'}: {reason}"}
                )
                said[direction].append(f"{library.label} –")
            if own:
                traceback.print_exc()
                yield "wrong"
            require_gpu(machine, library)
            continue
        with calls.context():
            for direction, words in said.items():
                if calls.of(direction) is None:
                    continue
                row = known_before(library, case, machine, direction)
                try:
                    found = measure(
                        library, operands, calls, direction, machine, lambda call, wait: time_call(machine, call, seconds, wait)
                    )
                    table.add({**row, **found})
                    if found["note"] == "wrong":
                        words.append(f"{library.label} WRONG ({found['relative_error']:.1e})")
                        if own:
                            yield "wrong"
                        continue
                    words.append(f"{library.label} {found['tflops']:.3g}")
                except Exception as error:
                    table.add({**row, "note": f"does not run: {one_line(error)}"})
                    words.append(f"{library.label} –")
                    if own:
                        traceback.print_exc()
                        yield "wrong"
                    require_gpu(machine, library)
        del calls
    for direction, words in said.items():
        if words:
            print(f"{case!s:52} {direction:11} TFLOP/s  {'   '.join(words)}", flush=True)


def _cases(machine: Machine, arguments: argparse.Namespace) -> list[Case]:
    if arguments.features:
        return dry_feature_cases() if machine.small else feature_cases()
    if machine.small:
        return dry_cases()
    return full_cases() if arguments.full else quick_cases()


def compare_libraries(machine: Machine, arguments: argparse.Namespace) -> int:
    """Time all cases. Libraries that take long to start come last, with the cases that are left time for."""
    quick = not arguments.full
    cases = [case for case in _cases(machine, arguments) if re.search(arguments.cases, str(case))]
    first = ["cuflash", "flash", "cudnn", "efficient", "formula", "varlen", "flash-attn", "flashinfer"]
    first += ["math", "naive"] if machine.dry or arguments.features or arguments.full else []
    last = [] if arguments.libraries else (["jax", "triton", "flex"] if arguments.features or arguments.full else ["jax"])
    found = libraries(machine, arguments.libraries.split(",") if arguments.libraries else first)
    table = Table(arguments.output and arguments.output / "attention.csv", COLUMNS)
    deadline, wrong, done = time.monotonic() + arguments.seconds, 0, arguments.begin
    seconds = 0.06 if quick else 0.25
    print(f"{machine.gpu}, {', '.join(library.label for library in found)}; {len(cases)} cases. {FLOP_LINE}")
    print("not here: " + "; ".join(f"{label} ({why})" for label, why in absent(machine).items()))
    prefetch(cases, machine)
    heat(machine)
    for case in cases[done:]:
        done += 1
        try:
            wrong += len(list(time_case(case, found, machine, table, seconds)))
        except GpuLost as lost:
            print(f"WRONG {case}: the GPU answers nothing any more after {lost}; another process goes on behind this case", flush=True)
            return go_on(done, deadline - time.monotonic())
        if time.monotonic() > deadline:
            print("out of time")
            break
    for library in libraries(machine, last):  # JAX has memory and streams of its own
        chosen = [case for case in cases if machine.dry or library.label != "jax" or case.name or _of_jax(case, quick)]
        for number, case in enumerate(chosen):
            if time.monotonic() > deadline:
                print(f"out of time after {number} of {len(chosen)} cases of {library.label}")
                break
            list(time_case(case, [library], machine, table, seconds))
    before = f", the first {arguments.begin} by processes that have lost their GPU" if arguments.begin else ""
    print(f"SUMMARY: {done} of {len(cases)} cases timed{before}, {wrong} wrong results of cuflash")
    return int(wrong > 0 or (done < len(cases) and not quick))


def go_on(begin: int, seconds: float) -> int:
    """Run the rest of the cases in a new process, whose exit status is then that of this one, but never 0."""
    left = ["--begin", str(begin), "--seconds", f"{max(seconds, 1.0):.0f}"]  # the last of an option counts
    subprocess.run([sys.executable, *sys.argv, *left], check=False)
    return 1


def _of_jax(case: Case, quick: bool) -> bool:
    return case.sample.dtype == "bfloat16" and case.seqlen in ((2048, 8192) if quick else SEQLENS)
