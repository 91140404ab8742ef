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
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cuflash  # noqa: E402
from cuflash import reference  # noqa: E402

UNUSABLE = 75
"""Exit status of a process whose GPU answers nothing any more: the rest needs a new one."""

CASE_SECONDS = 40.0
"""A case that takes longer, compilation included, hangs."""

NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value")


@dataclass(frozen=True)
class Case:
    """One forward and one backward call.

    Attributes:
        batch, seqlen_q, seqlen_kv, heads, heads_kv, head_dim: shapes.
        options: of both calls.
        view: "aligned"; "odd", rows that do not start on 16 bytes; "bhsd", the other order of the middle dimensions in memory.
        with_grad_lse: a gradient also flows in through LSE.
    """

    dtype: str
    head_dim: int
    seqlen_q: int = 70
    seqlen_kv: int = 100
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    view: str = "aligned"
    with_grad_lse: bool = False

    def __str__(self) -> str:
        heads = f"h{self.heads}" if self.heads == self.heads_kv else f"h{self.heads}/{self.heads_kv}"
        words = [self.dtype, f"d{self.head_dim}", f"s{self.seqlen_q}x{self.seqlen_kv}", f"b{self.batch}", heads, self.view]
        words += ["grad_lse"] if self.with_grad_lse else []
        return " ".join(words + [f"{name}={option}" for name, option in self.options.items()])


DTYPES = ("bfloat16", "float16", "float32")
CAUSAL = {"is_causal": True}
BOTTOM_RIGHT = {"is_causal": True, "causal_alignment": "bottom_right"}


def tiny_cases() -> list[Case]:
    """For tools that slow a kernel down a thousandfold."""
    cases = [Case(dtype, head_dim, heads=1, heads_kv=1, options=CAUSAL) for head_dim in (64, 128, 256) for dtype in DTYPES]
    for dtype in DTYPES:
        cases += [
            Case(dtype, 64, heads=1, heads_kv=1),
            Case(dtype, 40, 40, 33, 2, 2, 1, {"enable_gqa": True, **BOTTOM_RIGHT}, "odd", True),
        ]
    return [*cases, Case("float32", 64, heads=1, heads_kv=1, options={"allow_tf32": True})]


def check_cases() -> list[Case]:
    """For the judge: several tiles in every direction, ends that no tile divides. What most calls look like comes first."""
    cases = [
        Case(dtype, head_dim, 515, 515, 2, 3, 3, options) for options in ({}, CAUSAL) for head_dim in (64, 128, 256) for dtype in DTYPES
    ]
    for dtype in DTYPES:
        cases += [
            Case(dtype, 64, 300, 515, 2, 4, 2, {"enable_gqa": True, **BOTTOM_RIGHT}, "aligned", True),
            Case(dtype, 128, 515, 300, 1, 2, 1, {"enable_gqa": True, **CAUSAL}, "bhsd", True),
            Case(dtype, 80, 200, 333, 1, 2, 2, {"scale": -0.3}, "odd"),
            Case(dtype, 7, 100, 130, 1, 2, 2, CAUSAL),
            Case(dtype, 64, 3000, 3000, 1, 1, 1, CAUSAL),
        ]
    return [*cases, Case("float32", 64, 515, 515, options={"allow_tf32": True})]


def simulator_cases() -> list[Case]:
    """For the simulator: few, and small."""
    cases = [Case(dtype, head_dim, 200, 200, 1, 1, 1, CAUSAL) for dtype in DTYPES for head_dim in (64, 128)]
    return [*cases, Case("bfloat16", 64, 200, 333, 1, 2, 1, {"enable_gqa": True}, "odd", True)]


# --- Arrays -------------------------------------------------------------------------------------------------------------------------------


def values_of(case: Case) -> dict[str, Any]:
    """Normally distributed operands, float32, rounded to the case's element type."""
    generator = numpy.random.default_rng(7)
    query = (case.batch, case.seqlen_q, case.heads, case.head_dim)
    key = (case.batch, case.seqlen_kv, case.heads_kv, case.head_dim)
    shapes = {"query": query, "key": key, "value": key, "grad_out": query}
    made = {name: reference.round_to(generator.standard_normal(shape, dtype=numpy.float32), case.dtype) for name, shape in shapes.items()}
    if case.with_grad_lse:
        made["grad_lse"] = generator.standard_normal((case.batch, case.heads, case.seqlen_q), dtype=numpy.float32)
    return made


def place(values: Any, dtype: str, view: str, xp: Any) -> Any:
    """The values as an array of `xp`, which is NumPy or CuPy. bfloat16 is tagged uint16, so that nothing else has to be installed."""
    elements = reference.to_bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)
    if view == "odd":
        buffer = numpy.zeros((*values.shape[:-1], values.shape[-1] + 1 + values.shape[-1] % 2), elements.dtype)
        buffer[..., : values.shape[-1]] = elements
        placed = xp.asarray(buffer)[..., : values.shape[-1]]
    elif view == "bhsd":
        placed = xp.asarray(numpy.ascontiguousarray(elements.swapaxes(1, 2))).swapaxes(1, 2)
    else:
        placed = xp.asarray(elements)
    return cuflash.bfloat16(placed) if dtype == "bfloat16" else placed


def operands_of(case: Case, values: dict[str, Any], xp: Any) -> dict[str, Any]:
    placed = {name: place(array, case.dtype, case.view, xp) for name, array in values.items() if name != "grad_lse"}
    placed["grad_lse"] = xp.asarray(values["grad_lse"]) if case.with_grad_lse else None
    return placed


def run(case: Case, operands: dict[str, Any]) -> dict[str, Any]:
    """Both calls; the results by name."""
    inputs = [operands[name] for name in ("query", "key", "value")]
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **case.options)
    gradients = cuflash.scaled_dot_product_attention_backward(
        operands["grad_out"], *inputs, out, lse, grad_lse=operands["grad_lse"], **case.options
    )
    return dict(zip(NAMES, (out, lse, *gradients), strict=True))


def bits_of(array: Any) -> Any:
    """Elements in logical order as unsigned integers, in NumPy."""
    array = getattr(array, "bits", array)
    array = numpy.ascontiguousarray(array.get() if hasattr(array, "get") else array)
    return array.view({2: numpy.uint16, 4: numpy.uint32}[array.itemsize])


def requests_of(cases: list[Case], device: Any) -> list[Any]:
    """What has to be compiled for `device` before these cases run."""
    from cuflash.planning import make_plan

    found: dict[Any, None] = {}
    for case in cases:
        query = numpy.empty(
            (case.batch, case.seqlen_q, case.heads, case.head_dim), numpy.uint16 if case.dtype == "bfloat16" else case.dtype
        )
        key = numpy.empty((case.batch, case.seqlen_kv, case.heads_kv, case.head_dim), query.dtype)
        inputs = [cuflash.bfloat16(x) if case.dtype == "bfloat16" else x for x in (query, key, key)]
        problem = cuflash.plan(*inputs, **case.options).problem
        for backward in (False, True):
            found |= dict.fromkeys(kernel.request(device) for kernel in make_plan(problem, device, backward=backward).kernels)
    return list(found)


def the_gpu(dry_run: bool) -> Any:
    """CuPy, or with `dry_run` NumPy, whose arrays run on the simulator."""
    if dry_run:
        return numpy
    import cupy

    if not cupy.is_available():
        sys.exit("CuPy finds no GPU here; --dry-run takes the simulator.")
    return cupy


# --- The judge ----------------------------------------------------------------------------------------------------------------------------


def noise_of(case: Case, values: dict[str, Any]) -> float:
    """What sums in float32 may leave of gradients in which terms cancel; it is relative to the terms, `compare` to the result."""
    if case.dtype != "float32":
        return 0.0
    scale = abs(case.options.get("scale", case.head_dim**-0.5))
    product = numpy.linalg.norm(values["grad_out"], axis=3).max() * numpy.linalg.norm(values["value"], axis=3).max()
    largest = max(numpy.abs(values["key"]).max(), numpy.abs(values["query"]).max())
    return float(2.0**-22 * scale * product * largest * case.head_dim**-0.5)


def whereabouts(wrong: Any) -> str:
    """Which part of an array is wrong, along each axis: patterns tell tiles, warps and ends apart."""
    parts = []
    for axis in range(wrong.ndim):
        found = numpy.flatnonzero(wrong.any(axis=tuple(other for other in range(wrong.ndim) if other != axis)))
        listed = ",".join(map(str, found[:8])) + (",…" if len(found) > 8 else "")
        parts.append(f"axis {axis}: {len(found)} of {wrong.shape[axis]}, {found.min()} to {found.max()} ({listed})")
    return "; ".join(parts)


def judge(case: Case, values: dict[str, Any], results: dict[str, Any]) -> tuple[str, list[str]]:
    """A line of relative errors, and complaints: what is beyond the error of the plain formula in the same precision."""
    query, key, value, grad_out, grad_lse = (values.get(name) for name in ("query", "key", "value", "grad_out", "grad_lse"))
    options = {name: option for name, option in case.options.items() if name != "allow_tf32"}
    precision: Any = case.dtype
    truth = [*reference.attention(query, key, value, **options)]
    truth += reference.attention_backward(grad_out, query, key, value, grad_lse=grad_lse, **options)
    naive = [*reference.attention_naive(query, key, value, precision, **options)]
    naive[1] = reference.attention_naive(query, key, value, "float32", **options)[1]
    naive += reference.attention_naive_backward(grad_out, query, key, value, precision, grad_lse=grad_lse, **options)
    noise, figures, complaints = noise_of(case, values), [], []
    for name, want, yardstick in zip(NAMES, truth, naive, strict=True):
        got = reference.to_float64(results[name])
        finite = numpy.isfinite(want)
        error = float(numpy.linalg.norm((got - want)[finite]) / max(float(numpy.linalg.norm(want[finite])), 1e-300))
        figures.append(f"{name} {error:.1e}")
        if case.options.get("allow_tf32"):
            if not error < 5e-3:
                complaints.append(f"{name}: relative error {error:.3e}, expected below 5e-3 in TF32")
            continue
        try:
            with numpy.errstate(invalid="ignore"):
                near = numpy.abs(got - want) <= (noise if name.startswith("grad") else 0.0)
            reference.compare(numpy.where(near, want, got), want, yardstick, name=name, dtype="float32" if name == "lse" else case.dtype)
        except AssertionError as complaint:
            with numpy.errstate(invalid="ignore"):
                largest = 2 * numpy.nanmax(numpy.abs(numpy.where(finite, yardstick - want, 0))) + noise
                wrong = ~(numpy.abs(numpy.where(finite, got - want, 0)) <= largest) | (numpy.isfinite(got) != finite)
            complaints.append(str(complaint) + (f"\n      wrong at {whereabouts(wrong)}" if wrong.any() else ""))
    return ", ".join(figures), complaints


def check_one(case: Case, xp: Any, keep: Path | None) -> tuple[str, list[str]]:
    values = values_of(case)
    operands = operands_of(case, values, xp)
    results = run(case, operands)
    first = {name: bits_of(array) for name, array in results.items()}
    line, complaints = judge(case, values, results)
    second = {name: bits_of(array) for name, array in run(case, operands).items()}
    for name in NAMES:
        different = first[name] != second[name]
        if different.any():
            complaints.append(
                f"{name}: {int(different.sum())} of {different.size} elements differ between two runs; at {whereabouts(different)}"
            )
    if complaints and keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if sum(file.stat().st_size for file in keep.iterdir()) < 12 << 20:
            numpy.savez_compressed(keep / (re.sub(r"[^\w.-]+", "_", str(case)) + ".npz"), **first)
    return line, complaints


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
        command = [sys.executable, "-X", "faulthandler", __file__, "--worker", str(begin), "--cases", arguments.cases]
        command += ["--dry-run"] if arguments.dry_run else []
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


# --- GPU and simulator --------------------------------------------------------------------------------------------------------------------


def ordered(bits: Any) -> Any:
    """Bits of floating-point numbers as integers whose differences count the numbers in between."""
    sign = 1 << (8 * bits.itemsize - 1)
    whole = bits.astype(numpy.int64)
    return numpy.where(whole & sign, sign - whole, whole)


def compare_with_simulator(cases: list[Case], arguments: argparse.Namespace) -> int:
    """The same PTX on both: not the same bits, since tensor cores add in another way, but nearly."""
    xp = the_gpu(arguments.dry_run)
    if not arguments.dry_run:
        capability = cuflash.plan(*[operands_of(cases[0], values_of(cases[0]), xp)[name] for name in ("query", "key", "value")]).device.arch
        os.environ.setdefault("CUFLASH_SIMULATOR_ARCH", capability)
    wrong, identical, rows, deadline = 0, [], [], time.monotonic() + arguments.seconds
    for done, case in enumerate(cases):
        if time.monotonic() > deadline:
            print(f"out of time after {done} of {len(cases)} cases")
            break
        values = values_of(case)
        ours, theirs = (run(case, operands_of(case, values, library)) for library in (xp, numpy))
        print(case)
        for name in NAMES:
            ours_bits, theirs_bits = bits_of(ours[name]), bits_of(theirs[name])
            distance = numpy.abs(ordered(ours_bits) - ordered(theirs_bits))
            got, want = reference.to_float64(ours[name]), reference.to_float64(theirs[name])
            finite = numpy.isfinite(want)
            error = float(numpy.linalg.norm((got - want)[finite]) / max(float(numpy.linalg.norm(want[finite])), 1e-300))
            limit = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-5}["float32" if name == "lse" else case.dtype]
            bad = not error < limit or bool((numpy.isfinite(got) != finite).any())
            share, wrong = float((distance == 0).mean()), wrong + bad
            identical.append(share)
            rows.append(
                {"case": str(case), "result": name, "identical": share, "relative_difference": error, "most_ulps": int(distance.max())}
            )
            print(
                f"  {'WRONG' if bad else 'ok':5} {name:10}  the same bits {share:7.2%}, units in the last place: 99 % within "
                f"{int(numpy.quantile(distance, 0.99))}, most {int(distance.max())}; relative difference {error:.1e}"
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"SUMMARY: {wrong} of {len(identical)} results differ by more than rounding; the same bits: {numpy.mean(identical or [0]):.2%}")
    return int(wrong > 0)


# --- Streams, graphs, threads, devices ----------------------------------------------------------------------------------------------------


def streams(arguments: argparse.Namespace) -> int:
    """Whether calls run where and when they should."""
    xp = the_gpu(arguments.dry_run)
    case = Case("float16", 64, 70, 70, options=CAUSAL) if arguments.dry_run else Case("bfloat16", 128, 1111, 1111, 2, 4, 4, CAUSAL)
    values = values_of(case)
    want = {name: bits_of(array) for name, array in run(case, operands_of(case, values, xp)).items()}

    def same(results: dict[str, Any]) -> None:
        for name in NAMES:
            different = int((bits_of(results[name]) != want[name]).sum())
            assert different == 0, f"{name}: {different} of {want[name].size} elements differ from those of the default stream"

    def in_threads() -> None:
        failures: list[str] = []

        def one() -> None:
            try:
                same(run(case, operands_of(case, values, xp)))
            except Exception as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]

    def on_another_stream() -> None:
        operands = operands_of(case, values, xp)
        late, busy = xp.zeros_like(operands["query"].bits), xp.ones(1 << 26, "float32")
        xp.cuda.Device().synchronize()
        stream = xp.cuda.Stream(non_blocking=True)
        with stream:
            for _ in range(30):  # keeps the stream busy, so that a call on another one would read zeros
                xp.sin(busy, out=busy)
            late[...] = operands["query"].bits
            results = run(case, {**operands, "query": cuflash.bfloat16(late)})
        stream.synchronize()
        same(results)

    def capture(library: str) -> None:
        """Forward and backward in one graph; replayed on other values in the same memory."""
        operands = operands_of(case, {name: 0.5 * array for name, array in values.items()}, xp)
        final = operands_of(case, values, xp)
        if library == "torch":
            import torch

            operands, final = (
                {name: None if x is None else torch.from_dlpack(x) for name, x in each.items()} for each in (operands, final)
            )
            run(case, operands)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(graph):
                results = run(case, operands)
            for name, x in final.items():
                if x is not None:
                    operands[name].copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            same({name: xp.from_dlpack(x.view(torch.int16) if x.dtype == torch.bfloat16 else x) for name, x in results.items()})
            return
        stream = xp.cuda.Stream(non_blocking=True)
        xp.cuda.Device().synchronize()
        with stream:
            warm = [run(case, operands) for _ in range(2)]  # memory that the pool can give again during capture
            stream.synchronize()
            del warm
            stream.begin_capture()
            try:
                results = run(case, operands)
            finally:
                graph = stream.end_capture()
            for name, x in final.items():
                if x is not None:
                    operands[name].bits[...] = x.bits
            graph.launch(stream)
        stream.synchronize()
        same(results)

    def torch_stream() -> None:
        import torch

        operands = {name: None if x is None else torch.from_dlpack(x) for name, x in operands_of(case, values, xp).items()}
        late, busy = torch.zeros_like(operands["query"]), torch.ones(1 << 26, device="cuda")
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(30):
                busy.sin_()
            late.copy_(operands["query"])
            results = run(case, {**operands, "query": late})
        stream.synchronize()
        same({name: xp.from_dlpack(x.view(torch.int16) if x.dtype == torch.bfloat16 else x) for name, x in results.items()})

    def second_device() -> None:
        if xp.cuda.runtime.getDeviceCount() < 2:
            raise NotImplementedError("one GPU only")
        with xp.cuda.Device(1):
            operands = operands_of(case, values, xp)
        results = run(case, operands)  # device 0 is current
        assert xp.cuda.runtime.getDevice() == 0, "the current device changed"
        with xp.cuda.Device(1):
            same(results)

    checks: dict[str, Callable[[], None]] = {"four threads": in_threads}
    if not arguments.dry_run:
        checks |= {
            "another stream, CuPy": on_another_stream,
            "another stream, torch": torch_stream,
            "CUDA graph, CuPy": lambda: capture("cupy"),
            "CUDA graph, torch": lambda: capture("torch"),
            "second GPU": second_device,
        }
    wrong = 0
    for name, one in checks.items():
        try:
            one()
            verdict = "ok"
        except (ImportError, NotImplementedError) as error:
            verdict = f"skipped: {error}"
        except Exception as error:
            wrong += 1
            verdict = f"WRONG {type(error).__name__}: {error}\n{traceback.format_exc()}"
        print(f"{name:24} {verdict}", flush=True)
    print(f"SUMMARY: {wrong} of {len(checks)} checks wrong")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="judge results by float64")
    parser.add_argument("--simulator", action="store_true", help="compare a GPU with the simulator")
    parser.add_argument("--streams", action="store_true", help="check streams, graphs, threads and devices")
    parser.add_argument("--cases", default="", help="regular expression; only cases whose description it is found in")
    parser.add_argument("--keep", type=Path, help="folder for the results of wrong cases")
    parser.add_argument("--output", type=Path, help="JSON file for the figures of --simulator")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no case after this time")
    parser.add_argument("--dry-run", action="store_true", help="take the simulator for the GPU, and few cases")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    checking = arguments.check or arguments.worker is not None
    cases = check_cases() if checking else simulator_cases() if arguments.simulator else tiny_cases()
    if arguments.dry_run:
        cases = [case for case in cases if case.seqlen_q < 300][:5]
    cases = [case for case in cases if re.search(arguments.cases, str(case))]
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
    for done, case in enumerate(cases):
        if time.monotonic() > deadline:
            print(f"out of time after {done} of {len(cases)} cases")
            break
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
    print(f"SUMMARY: {len(cases)} cases, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
