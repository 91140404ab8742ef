"""What a timing model of an SM needs to know of a GPU: clocks per instruction, latencies, bandwidths, and the order in which wgmma is served.

    python benchmarks/constants.py --compile DIR              cubins for --cubins, by NVRTC; needs no GPU
    python benchmarks/constants.py [--cubins DIR] --output DIR   measures on the first GPU (sm_90), writes DIR/constants.json
    python benchmarks/constants.py --dry-run --output DIR     the same on the simulator: times mean nothing
    python benchmarks/constants.py --table DIR/constants.json  prints it as the tables of docs/h100.md

Kernels are in benchmarks/gpu_constants. constants.json has `constants`, a list of records (name, value, low, high, unit, how, raw numbers), and `failures`. It is
renewed after every record. A measurement that fails or takes too long is ended, and a fresh process does the others. Nothing of the GPU is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_constants import programs, tables
from gpu_constants.machines import Gpu, Simulated
from gpu_constants.measurements import MEASUREMENTS


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return value.item() if hasattr(value, "item") else str(value)


def work(options: argparse.Namespace) -> None:
    """Run the measurements named in `only`, one line of JSON on standard output for each thing that happens."""

    def say(**event: Any) -> None:
        print(json.dumps(event, default=plain), flush=True)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside a call of the driver
    signal.alarm(15)
    machine = Simulated() if options.dry_run else Gpu(options.cubins)
    say(facts=machine.facts)
    for name in options.only:
        measure, limit = MEASUREMENTS[name]
        signal.alarm(600 if options.dry_run else limit)
        say(begun=name)
        start = time.perf_counter()
        try:
            for record in measure(machine):
                say(record={"measurement": name, **record})
            machine.wait()
        except Exception as error:
            say(failure={"measurement": name, "error": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)})
            sys.exit(3)  # after an error the context may be lost
        say(finished=name, seconds=round(time.perf_counter() - start, 2))


class Report:
    """What was found so far, and its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.constants: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def write(self) -> None:
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(vars(self) | {"path": None}, indent=1) + "\n")
        temporary.replace(self.path)


def supervise(options: argparse.Namespace) -> int:
    """Let processes of their own measure, until all is done or the time is up."""
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options.output / "constants.json")
    if not options.dry_run and options.cubins is None:
        options.cubins = options.output / "cubins"
        programs.compile_all(options.cubins, os.cpu_count() or 1)
    deadline = time.monotonic() + options.seconds
    left = list(options.only)
    while left and time.monotonic() < deadline:
        command = [sys.executable, "-X", "faulthandler", __file__, "--worker", "--only", *left]
        command += ["--dry-run"] if options.dry_run else []
        command += ["--cubins", str(options.cubins)] if options.cubins else []
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        signal.signal(signal.SIGALRM, lambda *_, worker=worker: worker.kill())
        signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0.1))
        begun, failed = left[0], False
        for line in worker.stdout:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                print(line, end="")
                continue
            report.facts = event.get("facts", report.facts)
            begun = event.get("begun", begun)
            if "record" in event:
                record = event["record"]
                report.constants.append(record)
                print(f"{record['name']}: {record['value']} {record['unit']}", flush=True)
            if "failure" in event:
                report.failures.append(event["failure"])
                failed = True
            if "finished" in event:
                report.seconds[event["finished"]] = event["seconds"]
                left.remove(event["finished"])
            report.write()
        code = worker.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if code != 0 and begun in left:
            left.remove(begun)
            if not failed:
                report.failures.append({"measurement": begun, "error": f"the process ended with code {code}: too slow, or crashed"})
    report.failures += [{"measurement": name, "error": "no time was left"} for name in left]
    report.write()
    for failure in report.failures:
        print("FAILED", failure["measurement"], failure["error"])
    return 1 if report.failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=Path, metavar="DIR", help="only compile, into DIR")
    parser.add_argument("--cubins", type=Path, metavar="DIR", help="use the cubins that --compile wrote")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("constants"), help="where constants.json goes (default: ./constants)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS)
    )
    parser.add_argument("--seconds", type=float, default=60, help="for all measurements together (default: 60)")
    parser.add_argument("--dry-run", action="store_true", help="on the simulator, few repetitions")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print this file's tables, in Markdown")
    options = parser.parse_args()
    if options.table:
        print(tables.document(json.loads(options.table.read_text())), end="")
        return 0
    if options.compile:
        programs.compile_all(options.compile, os.cpu_count() or 1)
        return 0
    if options.worker:
        work(options)
        return 0
    return supervise(options)


if __name__ == "__main__":
    sys.exit(main())
