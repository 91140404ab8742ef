"""Small calls that reach every kernel, element type and code path: to be watched by compute-sanitizer, or judged.

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py    run and nothing else; every array has an allocation of its own
    python benchmarks/sanitize.py --check                              compare with the formula in float64, twice, and the bits of both runs
    python benchmarks/sanitize.py --simulator                          compare a GPU with the simulator, bit by bit
    python benchmarks/sanitize.py --streams                            streams, CUDA graphs, threads, a second GPU

`--check` runs its cases in a process of their own and starts another one behind a case that hangs or leaves the GPU unusable, so that one
failure does not hide the rest. `--dry-run` takes the simulator for the GPU. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

import numpy

from cuflash import reference
from small_calls.arrays import operands_of, run, the_gpu, values_of
from small_calls.cases import check_cases, dry_cases, simulator_cases, tiny_cases
from small_calls.checking import check, worker
from small_calls.compared import compare_with_simulator
from small_calls.streams import streams


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="judge results by float64")
    parser.add_argument("--simulator", action="store_true", help="compare a GPU with the simulator")
    parser.add_argument("--streams", action="store_true", help="check streams, graphs, threads and devices")
    parser.add_argument("--cases", default="", help="regular expression; only cases whose description it is found in")
    parser.add_argument("--keep", type=Path, help="folder for the results of wrong cases")
    parser.add_argument("--output", type=Path, help="JSON file for the figures of --simulator")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no case after this time")
    parser.add_argument("--count", action="store_true", help="print how many cases there are, and run none")
    parser.add_argument("--small", action="store_true", help="few cases, to test this program on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="take the simulator for the GPU, and few cases")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    checking = arguments.check or arguments.worker is not None
    cases = check_cases() if checking else simulator_cases() if arguments.simulator else tiny_cases()
    if arguments.dry_run or arguments.small:
        cases = dry_cases(cases)
    cases = [case for case in cases if re.search(arguments.cases, str(case))]
    if arguments.count:
        print(len(cases))
        return 0
    if arguments.streams:
        return streams(arguments)
    if arguments.simulator:
        return compare_with_simulator(cases, arguments)
    if arguments.worker is not None:
        return worker(cases, arguments.worker, arguments.dry_run, arguments.keep)
    if arguments.check:
        return check(cases, arguments)

    xp, failed, deadline = the_gpu(arguments.dry_run), 0, time.monotonic() + arguments.seconds
    if xp is not numpy:
        xp.cuda.set_allocator(None)  # an allocation for every array: what is beyond its end is nobody's
    done = 0
    for case in cases:
        if time.monotonic() > deadline:
            print(f"out of time after {done} of {len(cases)} cases")
            break
        done += 1
        started = time.perf_counter()
        try:
            results = run(case, operands_of(case, values_of(case), xp))
            finite = all(numpy.isfinite(reference.to_float64(array)).all() for name, array in results.items() if name != "lse")
        except Exception as error:
            print(f"WRONG {case}  {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        failed += not finite
        print(f"{'ran' if finite else 'NaN':5} {case}  [{time.perf_counter() - started:.1f} s]", flush=True)
    print(f"SUMMARY: {done} of {len(cases)} cases, {failed} failed")
    return int(failed > 0 or done < len(cases))


if __name__ == "__main__":
    sys.exit(main())
