"""`--check`: cases are judged in a process of their own; another one starts behind a case that hangs or leaves the GPU unusable."""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from small_calls.arrays import the_gpu
from small_calls.cases import Case
from small_calls.judge import check_one

SCRIPT = Path(__file__).resolve().parents[1] / "sanitize.py"

UNUSABLE = 75
"""Exit status of a process whose GPU answers nothing any more: the rest needs a new one."""

CASE_SECONDS = 15.0
"""A case that takes longer, compilation included, hangs."""


def worker(cases: list[Case], begin: int, dry_run: bool, keep: Path | None) -> int:
    """Check `cases[begin:]` and write a JSON line for each."""
    xp = the_gpu(dry_run)
    for index, case in enumerate(cases[begin:], start=begin):
        started = time.perf_counter()
        try:
            line, complaints = check_one(case, xp, keep)
        except Exception as error:
            line, complaints = "", [f"{type(error).__name__}: {error}", *traceback.format_exc().strip().splitlines()[-7:-1]]
        seconds = time.perf_counter() - started
        print(json.dumps({"index": index, "line": line, "complaints": complaints, "seconds": seconds}), flush=True)
        if complaints and not dry_run:
            try:
                xp.cuda.runtime.deviceSynchronize()
                xp.zeros(1).get()
            except Exception:
                return UNUSABLE
    return 0


def _lines(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """Lines that a process writes, None when it ends; raises `queue.Empty` when nothing comes for `CASE_SECONDS`."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        line = lines.get(timeout=CASE_SECONDS)
        yield line
        if line is None:
            return


def check(cases: list[Case], arguments: argparse.Namespace) -> int:
    """Check all cases, whatever becomes of the process that runs them."""
    the_gpu(arguments.dry_run)
    begin, wrong, deadline = 0, 0, time.monotonic() + arguments.seconds
    while begin < len(cases) and time.monotonic() < deadline:
        command = [sys.executable, "-X", "faulthandler", str(SCRIPT), "--worker", str(begin), "--cases", arguments.cases]
        command += [f"--{option.replace('_', '-')}" for option in ("dry_run", "small") if getattr(arguments, option)]
        command += ["--keep", str(arguments.keep)] if arguments.keep else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        trouble, first = "", begin
        try:
            for line in _lines(process):
                if line is None or time.monotonic() > deadline:
                    break
                if not line.startswith("{"):
                    print(line, end="")
                    continue
                told = json.loads(line)
                begin, wrong = told["index"] + 1, wrong + bool(told["complaints"])
                print(f"{'WRONG' if told['complaints'] else 'ok':5} {cases[told['index']]}  [{told['seconds']:.1f} s]  {told['line']}")
                for complaint in told["complaints"]:
                    print(f"      {complaint}", flush=True)
            else:
                trouble = "ended without a word"
        except queue.Empty:
            trouble = f"nothing for {CASE_SECONDS:.0f} s: it hangs"
        process.kill() if process.poll() is None and (trouble or time.monotonic() > deadline) else None
        status = process.wait()
        ended_well = status == 0 or (status == UNUSABLE and begin > first)
        if begin < len(cases) and not ended_well and time.monotonic() < deadline:
            print(f"WRONG {cases[begin]}  {trouble or f'the process ended with status {status}'}", flush=True)
            begin, wrong = begin + 1, wrong + 1
    print(f"SUMMARY: {begin - wrong} of {len(cases)} cases right, {wrong} wrong, {len(cases) - begin} not run")
    return int(wrong > 0 or begin < len(cases))
