"""`python -m cuflash autotune`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuflash.cli.command_options import add_call, add_features, sample_of
from cuflash.cli.option_types import DTYPES, positive
from cuflash.errors import OptionError

if TYPE_CHECKING:
    from cuflash.cli.samples import Sample
    from cuflash.hardware.device import Device

SEQLENS = {"gpu": (4096, 1024), "simulator": (64,)}
"""Lengths that are tuned unless others are named; on the simulator checks take seconds."""

HEAD_DIMS = {"gpu": (128, 64), "simulator": (64,)}


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `python -m cuflash`."""
    parser = commands.add_parser(
        "autotune",
        help="time tiles on this GPU and keep the fastest for later calls; takes minutes",
        description="Time tiles on this GPU and keep the fastest in a table that later calls look into. Ctrl-C keeps what is found, and the same command goes "
        "on from there. docs/tuning.md is the guide.",
    )
    parser.add_argument(
        "--effort",
        choices=("quick", "standard", "full"),
        default="standard",
        help="tiles of each kernel besides the default: 28, 40 or all (default standard)",
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop after that time (default: when all is done)")
    parser.add_argument("--head-dim", nargs="+", type=positive, help="head dimensions (default 128 64)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default bfloat16, which float16 shares)")
    parser.add_argument("--seqlen", nargs="+", type=positive, help="lengths, whose neighbours share their tile (default 4096 1024)")
    parser.add_argument("--pass", dest="passes", nargs="+", choices=("forward", "backward"), help="(default both; with --like its own)")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="kinds of calls (default plain causal; --classes help lists them)",
    )
    parser.add_argument(
        "--like",
        metavar="'OPTIONS'",
        help="tune what one call needs instead: options of `python -m cuflash explain` that describe a call without a cache, as one word; --pass forward backward beside it for both passes",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the table (default: the user's own in the cache directory)")
    parser.add_argument("--again", action="store_true", help="time anew what was timed before")
    parser.add_argument("--compile-only", action="store_true", help="compile the candidates and time none")
    parser.add_argument(
        "--fit",
        nargs="+",
        type=Path,
        metavar="TABLE",
        help="tune nothing: fit the timing model's constants to the times in these tables, of any GPUs; --output writes them as JSON",
    )
    parser.add_argument("--arch", help="with --compile-only: for a GPU of this architecture, which need not be here")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Tune, or compile ahead; the exit status."""
    from cuflash.hardware import device
    from cuflash.tuned import store
    from cuflash.tuner import api, described_calls, progress, tasks

    if "help" in (options.classes or ()):
        print("\n".join(tasks.CLASSES))
        return 0
    if options.fit:
        return _fit(options.fit, options.output)
    if options.arch is not None and not options.compile_only:
        hint = "Tiles are timed on the GPU that is here; leave --arch out, or only compile."
        raise OptionError("--arch", options.arch, "--compile-only with it", hint)
    on = device.default() if options.arch is None else device.of_arch(options.arch, "gpu")
    passes = options.passes or (["forward", "backward"] if options.like is None else [_parsed(options.like).direction])
    samples = _samples(options, on)
    wanted = [(described_calls.of_sample(sample), tasks.problem_of(sample, backward="backward" in passes)) for sample in samples]
    if options.compile_only:
        return _compile(api.distinct_tasks(wanted, on, passes=passes, effort=options.effort), on)
    path = api.table_path(on, options.output)
    store.read(path, on)  # what is wrong with it, or with the budget, is said before the run begins
    api.seconds_of(options.budget)
    listener = progress.listener_for(sys.stderr)
    listener.say(f"{on.name}: {_count(len(samples), 'call')}, effort {options.effort}; writes {path}")
    found = api.tune(
        wanted,
        on,
        passes=passes,
        effort=options.effort,
        budget=options.budget,
        output=options.output,
        again=options.again,
        listener=listener,
    )
    print(found)
    return 130 if found.reason == "interrupted" else 0


def _samples(options: argparse.Namespace, on: Device) -> list[Sample]:
    from cuflash.tuner import tasks

    if options.like is not None:
        others = {"--dtype": options.dtype, "--head-dim": options.head_dim, "--seqlen": options.seqlen, "--classes": options.classes}
        given = [name for name, value in others.items() if value is not None]
        if given:
            hint = "Write what belongs to the call into the option itself."
            raise OptionError("--like", f"{', '.join(given)} beside it", "one call, or a list of calls", hint)
        return [sample_of(_parsed(options.like))]
    return tasks.samples(
        on,
        dtypes=options.dtype or ["bfloat16"],
        head_dims=options.head_dim or HEAD_DIMS[on.kind],
        seqlens=options.seqlen or SEQLENS[on.kind],
        classes=options.classes or ["plain", "causal"],
    )


def _parsed(text: str) -> argparse.Namespace:
    """The options of one call.

    Raises:
        OptionError: a call with a cache, which is not timed itself.
    """
    if "--cache" in (words := shlex.split(text)):
        hint = "Calls with a cache take the tile of ordinary calls of few queries: --seqlen 1 --seqlen-kv N --seqlens-kv (docs/tuning.md)."
        raise OptionError("--like", "--cache", "a call without a cache", hint)
    parser = argparse.ArgumentParser(prog="--like", add_help=False)
    add_call(parser)
    add_features(parser)
    return parser.parse_args(words)


def _compile(wanted: Any, on: Device) -> int:
    from cuflash.tuner import api

    count, failed = api.compiled_ahead(wanted, on)
    for line in failed:
        print(f"did not compile: {line}")
    print(f"{_count(count, 'kernel')} of {_count(len(wanted), 'task')} for {on.arch}, {len(failed)} failed; {api.cache_place()}")
    return int(bool(failed))


def _fit(paths: list[Path], output: Path | None) -> int:
    from cuflash.tuned.table import Table
    from cuflash.tuner import fitting

    tables = []
    for path in paths:
        try:
            tables.append(Table.from_text(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise OptionError("--fit", f"{path}: {error}", "a table that autotune wrote", "Name JSON files of tuned tiles.") from error
    fits = fitting.fit(tables, lambda words: print(words, file=sys.stderr, flush=True))
    print("\n".join(map(str, fits)))
    if output is not None:
        output.write_text(json.dumps([found.to_json() for found in fits], indent=1) + "\n", encoding="utf-8")
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
