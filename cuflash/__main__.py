"""The command line: `python -m cuflash demo | info | inspect | predict | profile | explain | autotune | warmup | cache`.

Exit status: 0 for success; 1 for a negative finding (the demo did not learn or a result was wrong; a default tile spills); 2 for wrong arguments or
something that is missing, told in one message without a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import cuflash
from cuflash.cli import explanation, terminal_tables
from cuflash.cli.cached_calls import add_cache, cache_of, warmup_caches
from cuflash.cli.command_options import add_call, add_cases, add_features, add_shape, check_writable, features_of, make_writable, sample_of
from cuflash.cli.option_types import DTYPES, positive
from cuflash.cli.terminal_tables import Table
from cuflash.errors import CuflashError, OptionError
from cuflash.tuner import command as tuner_command

if TYPE_CHECKING:
    from cuflash.cli.environment import Section
    from cuflash.cli.inspection import Report
    from cuflash.hardware.device import Device
    from cuflash.jit.compiler import CompileRequest
    from cuflash.planning.kernel_plan import KernelPlan
    from cuflash.problem.features import FeatureSet
    from cuflash.timing.description import Description
    from cuflash.timing.prediction import KernelPrediction


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to fail
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(parser, options.command, unknown)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.run(options))
    except CuflashError as error:
        print(f"cuflash: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cuflash: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cuflash: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cuflash", description="Exact attention with tiled flash kernels.")
    parser.add_argument("--version", action="version", version=cuflash.__version__)
    commands = parser.add_subparsers(dest="command", metavar="command")

    demo = commands.add_parser("demo", help="train a small transformer on cuflash's own source and check every gradient")
    demo.add_argument("--steps", type=positive, default=300, help="of training (default 300)")
    demo.add_argument("--seed", type=int, default=0, help="of parameters and batches (default 0)")
    demo.add_argument("--dtype", choices=DTYPES, default="float16", help="of attention's operands (default float16)")
    demo.add_argument("--arch", help="the architecture that the simulator poses as, such as sm_90 (default sm_80); ignored on a GPU")
    demo.add_argument("--output", type=Path, default=Path("cuflash-demo.png"), help="picture of the loss (default cuflash-demo.png)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="what this machine has, what would run here, what to install")
    info.set_defaults(run=_info)

    inspect = commands.add_parser("inspect", help="registers, spills, occupancy and instruction mix of the default tiles; needs no GPU")
    inspect.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"], help="architectures (default sm_80 sm_90)")
    add_cases(inspect)
    inspect.add_argument("--causal", action="store_true", help="the kernels of causal attention")
    inspect.add_argument(
        "--every-length",
        action="store_true",
        help="all kernels that some lengths, batches, heads, shapes of a mask or calls without lse take (default: those of one head of 1024 keys, or of many, with a mask of each pair, whose calls return lse)",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--save", type=Path, metavar="DIR", help="also write each kernel to DIR, as NAME.cubin and NAME.json")
    add_features(inspect, has_arrays=False)
    inspect.set_defaults(run=_inspect)

    predict = commands.add_parser(
        "predict", help="how long a call would take on a GPU by a model of it, and what holds it up; needs no GPU"
    )
    add_shape(predict)
    predict.set_defaults(seqlen=4096, heads=16, batch=4)
    predict.add_argument("--arch", default="sm_80", help="(default sm_80)")
    predict.add_argument("--backward", action="store_true", help="the backward pass (default: forward)")
    predict.add_argument("--fast", action="store_true", help="leave out what it would be without each limit, which takes most of the time")
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.add_argument(
        "--cubin", nargs="+", type=Path, metavar="FILE", help="only the steady states of kernels that `inspect --save` wrote"
    )
    add_features(predict)
    add_cache(predict)
    predict.set_defaults(run=_predict)

    profile = commands.add_parser("profile", help="what the kernels of a call do, line by line, counted by the simulator; needs no GPU")
    add_call(profile)
    profile.add_argument("--arch", help="the architecture that the simulator poses as (default sm_80)")
    profile.add_argument("--top", type=positive, default=20, metavar="N", help="show the N lines with the most instructions (default 20)")
    profile.add_argument("--full", action="store_true", help="show every line of the sources instead")
    profile.add_argument("--by-kernel-line", action="store_true", help="count inlined functions at the line of the kernel that calls them")
    profile.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    add_features(profile)
    profile.set_defaults(run=_profile)

    explanation.add_parser(commands)
    tuner_command.add_parser(commands)

    warmup = commands.add_parser("warmup", help="compile kernels ahead, so that no call has to")
    warmup.add_argument("--arch", help="the architecture to compile for (default: this machine's GPU, or the simulator)")
    warmup.add_argument(
        "--into", type=Path, metavar="DIR", help="keep them there, to be carried to another machine as its CUFLASH_CACHE_DIR"
    )
    warmup.add_argument("--causal", action="store_true", help="only the kernels of causal attention (default: causal and not)")
    warmup.add_argument("--unaligned", action="store_true", help="also for arrays whose rows do not start on 16 bytes")
    warmup.add_argument("--jvp", action="store_true", help="also the kernels of tangents")
    warmup.add_argument("--merge", action="store_true", help="also the kernels that merge attention over several sets of keys")
    warmup.add_argument("--seqused", action="store_true", help="with --varlen, kernels of sequences that use a part of their places")
    add_cases(warmup)
    add_features(warmup, has_arrays=False)
    add_cache(warmup)
    warmup.set_defaults(run=_warmup)

    cache = commands.add_parser("cache", help="list the compiled kernels that are kept")
    cache.add_argument("--clear", action="store_true", help="remove them")
    cache.set_defaults(run=_cache)
    return parser


_PASSES = {
    "--pass": "--pass backward",
    "--backward": "--backward",
    "--forward-only": "--forward-only, without which both are taken",
}
"""Options of the commands that choose a pass, and how to write each."""


def _refuse(parser: argparse.ArgumentParser, command: str | None, unknown: Sequence[str]) -> NoReturn:
    """End with the usage of the command that does not know an argument, what it has instead, and which commands know it."""
    message = f"unrecognized arguments: {' '.join(unknown)}"
    if command is None:
        parser.error(message)
    commands: dict[str, argparse.ArgumentParser]
    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    options = {name: set(one._option_string_actions) for name, one in commands.items()}
    keyword, hint = unknown[0].partition("=")[0], ""
    if (instead := next((option for option in _PASSES if option in options[command]), None)) and keyword in _PASSES:
        hint = f"; the pass is chosen by {_PASSES[instead]}"
    elif close := difflib.get_close_matches(keyword, options[command], 1, 0.8):
        hint = f"; did you mean {close[0]}?"
    elif knowing := [name for name in options if keyword in options[name]]:
        hint = f"; it is an option of {', '.join(knowing)}"
    commands[command].error(message + hint)


# --- Commands -----------------------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from cuflash import demo
    from cuflash.hardware import device

    if options.arch is not None:
        os.environ["CUFLASH_SIMULATOR_ARCH"] = device.normalize_arch(options.arch)
    check_writable("--output", options.output)
    demo.check_picture(options.output)
    return demo.run(demo.Options(options.steps, options.seed, options.dtype, options.output))


def _info(options: argparse.Namespace) -> int:
    from cuflash.cli import environment

    _print_sections(environment.facts())
    print("\nA call with float16 arrays of 1 x 1024 x 8 x 64 would run:\n")
    print(environment.sample_plan())
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from cuflash import tuning
    from cuflash.cli import inspection
    from cuflash.hardware import device

    if options.save is not None:
        make_writable("--save", options.save)
    features = features_of(options, is_causal=options.causal).kinds()
    plans: dict[CompileRequest, tuple[Device, KernelPlan]] = {}
    for arch in options.arch:
        on = device.of_arch(arch, "gpu")
        for dtype in options.dtype:
            for head_dim in options.head_dim:
                kernels = tuning.kernels_of_case(
                    on, head_dim=head_dim, dtype=dtype, head_dim_v=options.head_dim_v, is_causal=options.causal,
                    backward=not options.forward_only, varlen=options.varlen is not None, seqlens_q=options.seqlens_q is not None,
                    seqlens_kv=options.seqlens_kv is not None, features=features,
                    need_attn_mask_grad=options.need_attn_mask_grad, every_way=options.every_length,
                )  # fmt: skip
                plans |= {kernel.request(on): (on, kernel) for kernel in kernels}  # several kernels may have the same list of visible tiles
    reports = inspection.inspect_kernels(plans.values())
    kernels = [kernel for _, kernel in plans.values()]
    if options.save is not None:
        _save(options, reports, kernels)
    predicted = [_steady_state(report, kernel, options.causal) for report, kernel in zip(reports, kernels, strict=True)]
    if options.json:
        shares = [{"predicted_matrix_share": None if found is None else round(found.matrix_share, 4)} for found in predicted]
        found_features = {"features": list(features.names())}
        print(json.dumps([_as_json(report) | share | found_features for report, share in zip(reports, shares, strict=True)], indent=1))
    else:
        from cuflash.timing import report as timing_report

        print(_calls_inspected(options, features))
        inspection.render(reports)
        for found in predicted:
            if found is not None:
                print(f"predicted {timing_report.kernel_line(found)}")
    return 1 if any(report.failures for report in reports) else 0


def _description(report: Report, kernel: KernelPlan, causal: bool) -> Description:
    from cuflash.timing import prediction

    return prediction.describe(kernel, report.resources, report.subject.request, causal=causal)


def _save(options: argparse.Namespace, reports: Sequence[Report], kernels: Sequence[KernelPlan]) -> None:
    """Write each kernel to the folder that --save names; those that would have the same name are numbered."""
    from cuflash.timing import description

    names: set[str] = set()
    for report, kernel in zip(reports, kernels, strict=True):
        described = _description(report, kernel, options.causal)
        name, number = described.name, 1
        while name in names:
            number += 1
            name = f"{described.name}_{number}"
        names.add(name)
        description.save(options.save, described, report.cubin, name)


def _steady_state(report: Report, kernel: KernelPlan, causal: bool) -> KernelPrediction | None:
    """The predicted steady state of a kernel that was inspected; None where there is no listing, no model of the architecture or of its instructions, or no loop over tiles."""
    from cuflash.timing import machine, prediction, sass

    if report.listing is None or report.subject.device.arch not in machine.MULTIPROCESSORS or not kernel.spec.is_tiled:
        return None
    if report.occupancy.blocks == 0 or kernel.spec.implementation not in ("mma", "wgmma"):
        return None
    function = sass.parse_listing(report.listing)[report.resources.entry]
    return prediction.predict_kernel(function, _description(report, kernel, causal), limits=False)


def _calls_inspected(options: argparse.Namespace, features: FeatureSet) -> str:
    """What the table does not show of the calls whose kernels it lists."""
    calls = ["causal" if options.causal else "not causal"]
    lengths = {"packed sequences": options.varlen, "seqlens_q": options.seqlens_q, "seqlens_kv": options.seqlens_kv}
    calls += [words for words, given in lengths.items() if given is not None]
    return f"calls: {', '.join(calls)}; features: {', '.join(features.names()) or 'none'}\n"


def _as_json(report: Report) -> dict[str, Any]:
    subject, resources, resident = report.subject, report.resources, report.occupancy
    return {
        "arch": subject.device.arch,
        "kernel": subject.label,
        "dtype": subject.dtype,
        "head_dim": subject.head_dim,
        "head_dim_v": subject.head_dim_v or None,
        "tile": subject.tile,
        "num_threads": subject.num_threads,
        "registers": resources.registers,
        "spill_store_bytes": resources.spill_store_bytes,
        "spill_load_bytes": resources.spill_load_bytes,
        "static_shared_bytes": resources.static_shared_bytes,
        "dynamic_shared_bytes": subject.shared_bytes,
        "blocks_per_sm": resident.blocks,
        "occupancy": resident.warps / resident.max_warps,
        "limiter": resident.limiter,
        "instructions": report.mix,
        "compile_seconds": round(report.seconds, 3),
        "failures": list(report.failures),
        "warnings": list(report.warnings),
    }


def _predict(options: argparse.Namespace) -> int:
    from cuflash.cli import samples
    from cuflash.hardware import device
    from cuflash.planning import planner
    from cuflash.timing import machine, prediction, report

    if options.cubin:
        return _predict_saved(options)
    arch = device.normalize_arch(options.arch)
    machine.multiprocessor(arch)
    sample = sample_of(options)
    problem = samples.problem_of(sample, backward=options.backward)
    tile = None if options.tile is None else cuflash.Tile(*options.tile)
    plan = planner.make_plan(problem, device.of_arch(arch, "gpu"), backward=options.backward, tile=tile)
    data = sample.arguments() if problem.hides_by_data else {}
    predicted = prediction.predict_plan(plan, machine.CARDS[arch], limits=not options.fast, data=data)
    print(json.dumps(report.to_json(predicted), indent=1) if options.json else "\n".join(report.lines(predicted)))
    return 0


def _predict_saved(options: argparse.Namespace) -> int:
    """The steady states of kernels in files."""
    from cuflash.timing import description, prediction, report, sass

    found = []
    for path in options.cubin:
        described, cubin = description.load(path)
        function = max(sass.read_functions(cubin).values(), key=len)
        found.append(prediction.predict_kernel(function, described, limits=not options.fast))
    if options.json:
        print(json.dumps([report.kernel_json(kernel) for kernel in found], indent=1))
    for kernel in () if options.json else found:
        print("\n".join([report.kernel_line(kernel), *report.kernel_lines(kernel)]))
    return 0


def _profile(options: argparse.Namespace) -> int:
    from cuflash.cli import profiling
    from cuflash.hardware import device

    if options.arch is not None:
        os.environ["CUFLASH_SIMULATOR_ARCH"] = device.normalize_arch(options.arch)
    if options.json is not None:
        check_writable("--json", options.json)
    sample = sample_of(options)
    tile = None if options.tile is None else cuflash.Tile(*options.tile)
    with profiling.announced(profiling.estimate_seconds(sample, options.direction, tile=tile)):
        result = profiling.profile_call(sample, options.direction, tile=tile)
    profiling.render(result, profiling.View("kernel" if options.by_kernel_line else "innermost", options.top, options.full))
    if options.json is not None:
        options.json.write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
    return 0


def _warmup(options: argparse.Namespace) -> int:
    if options.into is not None:
        _use_cache("--into", options.into)
    start = time.perf_counter()

    def progress(done: int, total: int, *_: object) -> None:
        print(f"\r{done} of {total} kernels", end="", file=sys.stderr, flush=True)

    if (cached := cache_of(options)) is not None:
        for name, given in (
            ("jvp", options.jvp),
            ("merge", options.merge),
            ("seqused", options.seqused),
            ("seqlens-q", options.seqlens_q is not None),
        ):
            if given:
                raise OptionError(f"--{name}", "it with --cache", "no such option", "Run warmup once more, without --cache.")
        return _say_warm(options, warmup_caches(options, cached), start)
    if options.seqused and options.varlen is None:
        raise OptionError(
            "--seqused",
            "it without --varlen",
            "--varlen with it",
            "Add --varlen; rows of a padded batch have --seqlens-q and --seqlens-kv.",
        )
    count = cuflash.warmup(
        options.head_dim,
        options.dtype,
        head_dim_v=options.head_dim_v,
        is_causal=True if options.causal else (False, True),
        backward=not options.forward_only,
        arch=options.arch,
        varlen=options.varlen is not None,
        seqlens_q=options.seqlens_q is not None,
        seqlens_kv=options.seqlens_kv is not None,
        seqused=options.seqused,
        features=features_of(options, is_causal=True).kinds(),
        need_attn_mask_grad=options.need_attn_mask_grad,
        vectorized=(True, False) if options.unaligned else True,
        jvp=options.jvp,
        merge=options.merge,
        progress=progress if sys.stderr.isatty() else None,
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return _say_warm(options, count, start)


def _say_warm(options: argparse.Namespace, count: int, start: float) -> int:
    from cuflash.jit import cache, compiler

    compiled = cache.statistics().compiles
    print(f"{count} kernels are in the cache, {compiled} compiled now, {time.perf_counter() - start:.1f} s; {cache.directory()}")
    if options.into is not None:
        version = compiler.nvrtc_text()
        print(
            f"A machine with NVRTC {version} and this cuflash finds them with CUFLASH_CACHE_DIR={options.into}; with another NVRTC it compiles its own."
        )
    return 0


def _use_cache(option: str, folder: Path) -> None:
    """Keep kernels in a folder that is made if need be, or raise OptionError of the option that named it."""
    from cuflash.jit import cache

    os.environ["CUFLASH_CACHE_DIR"] = str(folder.absolute())
    try:
        kernels = cache.directory()
        if kernels is None:
            raise NotADirectoryError(errno.ENOTDIR, "no directory can be made there")
        with tempfile.TemporaryFile(dir=kernels):
            pass
    except OSError as error:
        raise OptionError(option, f"{str(folder)!r}: {error.strerror}", "a folder that can be written", "Name another one.") from error


def _cache(options: argparse.Namespace) -> int:
    from cuflash.jit import cache, kernel_files
    from cuflash.system import cache_directory

    if cache.directory() is None:
        print(f"There is no cache: {cache_directory.why_not(kernel_files.PART)}.")
        return 0
    if options.clear:
        from cuflash.simulator import build, program_cache

        programs, cores = program_cache.clear(), build.clear()
        print(f"{cache.clear()} kernels, {programs} decoded programs and {cores} cores of the simulator removed from {cache.directory()}")
        return 0
    groups: dict[str, list[cache.Entry]] = {}
    for entry in cache.contents():
        groups.setdefault(entry.request.describe(), []).append(entry)
    for name, entries in sorted(groups.items()):
        size, seconds = sum(entry.size for entry in entries), sum(entry.seconds for entry in entries)
        print(f"{name:40} {len(entries):5}  {size / 1024:9.1f} KiB  {seconds:7.1f} s of compilation")
    print(f"{sum(map(len, groups.values()))} kernels in {cache.directory()}")
    return 0


# --- Printing -----------------------------------------------------------------------------------------------------------------------------


def _print_sections(sections: Sequence[Section]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for _, rows in sections for name, _ in rows)
    for title, rows in sections:
        print(title)
        print(terminal_tables.plain(Table((), [(name.ljust(width), value) for name, value in rows], num_left=2), "  "), end="")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other commands do when `head` has seen enough
    sys.exit(main())
