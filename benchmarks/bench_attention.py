"""How fast attention is on a GPU, beside other libraries on the same memory.

    python benchmarks/bench_attention.py --quick --output OUT       the cases that matter most, within --seconds
    python benchmarks/bench_attention.py --full --output OUT        every case and library
    python benchmarks/bench_attention.py --features --output OUT    a case of every score feature, kind of lengths and unusual head dimension
    python benchmarks/bench_attention.py --tiles --output OUT       time tiles, beside what the model behind the default thinks of them
    python benchmarks/bench_attention.py --cache --output OUT       steps of generation with a cache of keys and values
    python benchmarks/bench_attention.py --host --output OUT        what a warm call costs the host
    python benchmarks/bench_attention.py --facts --output OUT       the machine, its software and its ceilings
    python benchmarks/bench_attention.py --compile                  every kernel that the others need, in threads; with --arch for another machine
    python benchmarks/bench_attention.py --one bfloat16 128 4096 causal forward         one call, for a profiler; a call before it warms up
    python benchmarks/bench_attention.py --worst OUT/attention.csv  the arguments of --one where cuflash is furthest behind

    pytest benchmarks/bench_attention.py --benchmark-enable --benchmark-json=OUT/attention.json     every case, library and pass as a benchmark of its own

pytest measures the same cases by the same libraries, and besides forward and backward pass together, first calls and what a call costs the host; `-k` chooses
("d128 and s4096 and cuflash"). Each benchmark's `extra_info` has the columns of attention.csv and GB/s. Without a GPU it runs tiny shapes on the simulator, and says
so: `"measured": false`. `benchmarks/report.py` reads both forms.

Every library works on the same arrays, and its results are compared with float64 on one head before it is timed: a wrong result has no time, and a library
that cannot do a case has its reason in the table. FLOP are those of the visible scores (bench/cases.py). Events around each call give median and
quantiles; clocks are read while the GPU works. JAX works on streams of its own and is timed by the wall clock over many calls.

`--small` takes tiny shapes, and `--dry-run` also the simulator, or torch on the CPU, and the wall clock: they test this program, their times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

from bench.comparison import compare_libraries
from bench.compilation import compile_all
from bench.facts import facts
from bench.host import host_cost
from bench.machine import ROOT, Machine
from bench.single import one_call, worst
from bench.steps import time_steps
from bench.tile_sweep import sweep_tiles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="compare libraries on the cases that matter most (the default)")
    what.add_argument("--full", action="store_true", help="compare all libraries on all cases")
    what.add_argument(
        "--features", action="store_true", help="compare libraries on a case of every score feature, kind of lengths and head dimension"
    )
    what.add_argument("--tiles", action="store_true", help="time tiles")
    what.add_argument("--cache", action="store_true", help="time steps of generation")
    what.add_argument("--host", action="store_true", help="time the host's part of warm calls")
    what.add_argument("--facts", action="store_true", help="describe the machine")
    what.add_argument("--compile", action="store_true", help="compile ahead")
    what.add_argument("--one", nargs=5, metavar=("DTYPE", "HEAD_DIM", "SEQLEN", "causal|full", "PASS"), help="two calls, for a profiler")
    what.add_argument("--worst", type=Path, metavar="CSV", help="print the case where cuflash is furthest behind")
    parser.add_argument("--output", type=Path, help="folder for CSV and JSON; without it, nothing is written")
    parser.add_argument("--seconds", type=float, default=170.0, help="begin nothing after this time; default 170")
    parser.add_argument("--begin", type=int, default=0, help="leave out that many cases")
    parser.add_argument("--cases", default="", help="regular expression; only cases whose description it is found in")
    parser.add_argument(
        "--libraries",
        default="",
        help="comma-separated: cuflash, naive, flash, cudnn, efficient, math, varlen, flex, triton, flash-attn, flashinfer, jax",
    )
    parser.add_argument("--top", type=int, default=6, help="tiles to time, the model's best")
    parser.add_argument("--spread", type=int, default=6, help="tiles to time beyond those, evenly among the rest")
    parser.add_argument("--arch", help="with --compile: for a GPU of this architecture, which need not be here")
    parser.add_argument(
        "--like", type=Path, metavar="CACHE", help="with --compile: also what tests compiled for the simulator as --arch into this cache"
    )
    parser.add_argument("--small", action="store_true", help="test this program on a GPU: tiny shapes, few cases")
    parser.add_argument("--dry-run", action="store_true", help="test this program without a GPU")
    arguments = parser.parse_args()
    if arguments.worst:
        return worst(arguments.worst)
    if (
        arguments.dry_run
        and arguments.output
        and "results" in arguments.output.resolve().parts[-3:]
        and ROOT in arguments.output.resolve().parents
    ):
        parser.error("a dry run writes nothing below benchmarks/results")
    if arguments.full and arguments.seconds == 170.0:
        arguments.seconds = math.inf
    warnings.simplefilter("ignore")  # torch warns for every backend that does not take a case
    if arguments.compile:
        return compile_all(arguments)
    machine = Machine(arguments.dry_run, arguments.small)
    for chosen, action in (
        (arguments.tiles, sweep_tiles), (arguments.cache, time_steps), (arguments.host, host_cost), (arguments.facts, facts), (arguments.one, one_call),
    ):  # fmt: skip
        if chosen:
            return action(machine, arguments)
    return compare_libraries(machine, arguments)


# --- pytest -------------------------------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: Any) -> None:
    """The lists are made only where pytest asks: they look for a GPU."""
    from bench import suite

    if metafunc.function is test_attention:
        metafunc.parametrize("case", suite.cases(), ids=str)
        metafunc.parametrize("library", suite.LABELS)
        metafunc.parametrize("direction", suite.PASSES)
        metafunc.definition.add_marker(_timed_by(suite.stopwatch()))
    elif metafunc.function is test_host_overhead:
        metafunc.parametrize("name", _host_calls(), ids=" ".join)


def _timed_by(timer: Any) -> Any:
    import pytest

    return pytest.mark.benchmark(timer=timer)


@functools.cache
def _host_calls() -> dict[tuple[str, str], Any]:
    from bench import suite
    from bench.host import host_calls

    return host_calls(suite.machine())


def test_attention(benchmark: Any, case: Any, library: str, direction: str) -> None:
    from bench import suite

    warnings.simplefilter("ignore")
    suite.run(benchmark, case, library, direction)


def test_host_overhead(benchmark: Any, name: tuple[str, str]) -> None:
    """A warm call on small arrays until it returns; on the simulator the kernels' work is in it."""
    from bench import suite

    machine, call = suite.machine(), _host_calls()[name]
    benchmark.extra_info.update({**machine.head(), "arrays": name[0], "call": name[1], "timer": "wall", "measured": not machine.dry})
    benchmark.pedantic(call, rounds=1 if machine.dry else 100, iterations=1 if machine.dry else 20, warmup_rounds=1)
    machine.synchronize()


def test_first_call_with_nothing_compiled(benchmark: Any, tmp_path: Path) -> None:
    _first_call(benchmark, tmp_path, compiled=False)


def test_first_call_with_kernels_in_the_cache(benchmark: Any, tmp_path: Path) -> None:
    _first_call(benchmark, tmp_path, compiled=True)


def _first_call(benchmark: Any, folder: Path, *, compiled: bool) -> None:
    """A new process, from its start to the result of its first call."""
    from bench import first_call, suite

    machine = suite.machine()
    cache = first_call.empty_cache(folder / "cache", machine)
    if compiled:
        first_call.first_call(cache, machine)
    setup = None if compiled else lambda: first_call.empty_cache(folder / "cache", machine) and None
    found = benchmark.pedantic(first_call.first_call, (cache, machine), setup=setup, rounds=1 if machine.dry else 5)
    assert (found["kernels_compiled"] == 0) == compiled
    benchmark.extra_info.update({**machine.head(), **found, "timer": "wall", "measured": not machine.dry})


if __name__ == "__main__":
    sys.exit(main())
