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
import functools
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

import cuflash
from cuflash import reference
from cuflash.planning import make_plan
from cuflash.reference_features import dropout_mask
from cuflash.samples import DROPOUT_SEED, Sample, SampleFeatures, numpy_call

UNUSABLE = 75
"""Exit status of a process whose GPU answers nothing any more: the rest needs a new one."""

CASE_SECONDS = 40.0
"""A case that takes longer, compilation included, hangs."""

NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value")


@dataclass(frozen=True)
class Case:
    """One forward and one backward call.

    Attributes:
        sample: the call.
        view: "aligned"; "odd", rows that do not start on 16 bytes; "bhsd", the other order of the middle dimensions in memory.
        with_grad_lse: a gradient also flows in through LSE.
    """

    sample: Sample
    view: str = "aligned"
    with_grad_lse: bool = False

    @classmethod
    def of(
        cls,
        dtype: str,
        head_dim: int,
        seqlen_q: int = 70,
        seqlen_kv: int = 100,
        batch: int = 1,
        heads: int = 1,
        heads_kv: int = 0,
        **others: Any,
    ) -> Case:
        """The usual case; `view` and `with_grad_lse` are the case's, all others the sample's."""
        own = {name: others.pop(name) for name in ("view", "with_grad_lse") if name in others}
        shape = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv, "num_heads_q": heads, "num_heads_kv": heads_kv or heads}
        return cls(Sample(dtype=dtype, head_dim=head_dim, **shape, **others), **own)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """`Sample.arguments`, made once."""
        return self.sample.arguments()

    @property
    def is_plain(self) -> bool:
        """A padded batch without features, whose heads the usual kernels take."""
        sample = self.sample
        usual = sample.head_dim_v is None and sample.head_dim <= 256 and sample.lengths_q is None and sample.lengths_kv is None
        return usual and sample.features == SampleFeatures()

    @property
    def longest(self) -> int:
        """Queries of the longest sequence."""
        return max(self.sample.packed_lengths[0]) if self.sample.is_packed else self.sample.seqlen_q

    def __str__(self) -> str:
        sample = self.sample
        heads = f"h{sample.num_heads_q}" + (f"/{sample.num_heads_kv}" if sample.num_heads_kv != sample.num_heads_q else "")
        words = [sample.dtype, f"d{sample.head_dim}" + (f"/{sample.head_dim_v}" if sample.head_dim_v else "")]
        words += (
            [f"packed{list(sample.packed_lengths[0])}"]
            if sample.is_packed
            else [f"s{sample.seqlen_q}x{sample.seqlen_kv}", f"b{sample.batch}"]
        )
        words += [heads, self.view] + (["grad_lse"] if self.with_grad_lse else [])
        options = {name: getattr(sample, name) for name in ("is_causal", "causal_alignment", "scale", "allow_tf32")} | {
            "lengths_kv": sample.lengths_kv
        }
        used = {name: value for name, value in asdict(sample.features).items() if value != getattr(SampleFeatures(), name)}
        return " ".join(words + [f"{name}={value}" for name, value in (options | used).items() if value])


DTYPES = ("bfloat16", "float16", "float32")
CAUSAL = {"is_causal": True}
BOTTOM_RIGHT = {"is_causal": True, "causal_alignment": "bottom_right"}

MANY = SampleFeatures(
    attn_mask="bool", dropout=0.2, window=(60, 30), softcap=20.0, alibi=True, sinks=True, segments=2
)  # fmt: skip
"""All features that go together, with the kernels of visible tiles, sinks and dropout masks."""
PACKED = {"lengths_q": (70, 0, 33, 5), "lengths_kv": (100, 20, 0, 7)}
PACKED_FEATURES = SampleFeatures(dropout=0.2, window=(60, 30), softcap=20.0, alibi=True, sinks=True, prefix=9)


def bias(dtype: str) -> SampleFeatures:
    """An additive mask of each head, whose gradient is summed over the batch by a kernel of its own."""
    return SampleFeatures(attn_mask=dtype, mask_axes="hqk", need_attn_mask_grad=True)


def tiny_cases() -> list[Case]:
    """For tools that slow a kernel down a thousandfold."""
    cases = [Case.of(dtype, head_dim, **CAUSAL) for head_dim in (64, 128, 256) for dtype in DTYPES]
    for dtype in DTYPES:
        cases += [
            Case.of(dtype, 64),
            Case.of(dtype, 40, 40, 33, 2, 2, 1, **BOTTOM_RIGHT, view="odd", with_grad_lse=True),
            Case.of(dtype, 64, features=MANY),
        ]
    cases += [
        *(Case.of(dtype, 64, batch=2, features=bias(dtype)) for dtype in ("bfloat16", "float32")),
        *(Case.of(dtype, 64, heads=2, **PACKED, **CAUSAL, features=PACKED_FEATURES) for dtype in ("bfloat16", "float32")),
        Case.of("bfloat16", 64, batch=2, **BOTTOM_RIGHT, lengths_kv=(100, 41), features=SampleFeatures(prefix=12, segments=2)),
        Case.of("bfloat16", 576, head_dim_v=512, **CAUSAL),
        Case.of("float32", 512, **CAUSAL),
    ]
    return [*cases, Case.of("float32", 64, allow_tf32=True)]


def check_cases() -> list[Case]:
    """For the judge: several tiles in every direction, ends that no tile divides. What most calls look like comes first."""
    cases = [Case.of(dtype, d, 515, 515, 2, 3, **causal) for causal in ({}, CAUSAL) for d in (64, 128, 256) for dtype in DTYPES]
    for dtype in DTYPES:
        cases += [
            Case.of(dtype, 64, 300, 515, 2, 4, 2, **BOTTOM_RIGHT, with_grad_lse=True),
            Case.of(dtype, 128, 515, 300, 1, 2, 1, **CAUSAL, view="bhsd", with_grad_lse=True),
            Case.of(dtype, 80, 200, 333, 1, 2, scale=-0.3, view="odd"),
            Case.of(dtype, 7, 100, 130, 1, 2, **CAUSAL),
            Case.of(dtype, 64, 3000, 3000, **CAUSAL),
        ]
    return [
        *cases,
        *lone_feature_cases(),
        *(case for dtype in DTYPES for case in combined_cases(dtype)),
        Case.of("float32", 64, 515, 515, allow_tf32=True),
    ]


def lone_feature_cases() -> list[Case]:
    """Every score feature alone."""
    used = [
        {"attn_mask": "bool"}, {"attn_mask": "bool", "mask_axes": "bk"}, {"dropout": 0.3}, {"window": (50, 20)}, {"softcap": 10.0}, {"alibi": True},
        {"sinks": True}, {"segments": 4},
    ]  # fmt: skip
    cases = [Case.of("bfloat16", 64, 200, 333, 2, features=SampleFeatures(**one)) for one in used]  # type: ignore[arg-type]
    return [*cases, Case.of("bfloat16", 64, 200, 333, 2, **CAUSAL, features=SampleFeatures(prefix=90))]


def combined_cases(dtype: str) -> list[Case]:
    """Features together, gradients of masks, every kind of lengths and unusual head dimensions."""
    lengths = {"lengths_q": (150, 0, 65, 5), "lengths_kv": (200, 20, 0, 7)}
    return [
        Case.of(dtype, 128, 200, 333, 2, **BOTTOM_RIGHT, features=MANY, with_grad_lse=True),
        Case.of(dtype, 64, 200, 233, 2, 2, features=bias(dtype)),
        Case.of(dtype, 64, 200, 233, 2, features=replace(bias("float32"), mask_axes="qk", sinks=True)),
        Case.of(dtype, 64, 200, 333, 3, 2, 1, **BOTTOM_RIGHT, lengths_kv=(333, 0, 250), with_grad_lse=True),
        Case.of(dtype, 64, heads=4, heads_kv=2, **lengths, **CAUSAL, with_grad_lse=True),
        Case.of(dtype, 64, heads=2, **lengths, **CAUSAL, features=PACKED_FEATURES),
        Case.of(dtype, 192, 200, 200, 1, 2, head_dim_v=128, **CAUSAL),
        Case.of(dtype, 576, 150, 150, 1, 2, 1, head_dim_v=512, **CAUSAL),
        Case.of(dtype, 512, 150, 150, **CAUSAL),
    ]


def simulator_cases() -> list[Case]:
    """For the simulator: few, and small."""
    cases = [Case.of(dtype, head_dim, 200, 200, **CAUSAL) for dtype in DTYPES for head_dim in (64, 128)]
    cases += [Case.of("bfloat16", 64, 200, 333, 1, 2, 1, view="odd", with_grad_lse=True)]
    cases += [Case.of("bfloat16", 64, 100, 200, features=MANY), Case.of("bfloat16", 64, 100, 200, features=bias("bfloat16"))]
    return [
        *cases,
        Case.of("bfloat16", 64, **PACKED, **CAUSAL, features=PACKED_FEATURES),
        Case.of("bfloat16", 576, 70, 100, head_dim_v=512),
    ]


def dry_cases(cases: list[Case]) -> list[Case]:
    """Few of them that the simulator makes quickly, with all that a list has of features."""
    small = [case for case in cases if case.longest < 300 and case.sample.dtype == "bfloat16"]
    plain = [case for case in small if case.is_plain]
    return plain[:2] + [case for case in small if not case.is_plain]


# --- Arrays -------------------------------------------------------------------------------------------------------------------------------


def values_of(case: Case) -> dict[str, Any]:
    """Operands in float32, rounded to the case's element type, and the arrays among the arguments."""
    generator, sample = numpy.random.default_rng(8), case.sample
    made = sample.operands(7)
    if case.with_grad_lse:
        rows = (
            (sample.num_heads_q, sum(sample.packed_lengths[0])) if sample.is_packed else (sample.batch, sample.num_heads_q, sample.seqlen_q)
        )
        made["grad_lse"] = generator.standard_normal(rows, dtype=numpy.float32)
    return made | {name: x for name, x in case.arguments.items() if isinstance(x, numpy.ndarray)}


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
    """All arrays of a case, by the names of arguments."""
    placed = {}
    for name, array in values.items():
        if name in ("query", "key", "value", "grad_out"):
            placed[name] = place(array, case.sample.dtype, case.view, xp)
        else:
            dtype = case.sample.features.attn_mask if name == "attn_mask" else None
            placed[name] = place(array, dtype or array.dtype.name, "aligned", xp)
    return placed


def run(case: Case, operands: dict[str, Any]) -> dict[str, Any]:
    """Both calls, and the mask of dropout; the results by name."""
    sample, inputs = case.sample, [operands[name] for name in ("query", "key", "value")]
    arguments = {name: operands.get(name, argument) for name, argument in case.arguments.items()}
    out, lse = sample.forward(*inputs, return_lse=True, **arguments)
    gradients = sample.backward(
        operands["grad_out"], *inputs, out, lse, grad_lse=operands.get("grad_lse"), **arguments, **sample.backward_options
    )
    results = dict(zip(NAMES, (out, lse, *gradients), strict=True))
    results |= {f"grad_{name}": x for name in ("attn_mask", "sinks") if (x := getattr(gradients, name)) is not None}
    if sample.features.dropout and not sample.is_packed:
        shape = (sample.batch, sample.num_heads_q, sample.seqlen_q, sample.seqlen_kv)
        results["dropout_mask"] = cuflash.dropout_mask(shape, sample.features.dropout, DROPOUT_SEED, like=operands["query"])
    return results


def bits_of(array: Any) -> Any:
    """Elements in logical order as unsigned integers, in NumPy."""
    array = getattr(array, "bits", array)
    array = numpy.ascontiguousarray(array.get() if hasattr(array, "get") else array)
    return array.view({1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32}[array.itemsize])


def requests_of(cases: list[Case], device: Any) -> list[Any]:
    """What has to be compiled for `device` before these cases run."""
    found: dict[Any, None] = {}
    for case in cases:
        operands, arguments = numpy_call(case.sample)
        del operands["grad_out"]
        problem = case.sample.plan(**operands, **arguments, **case.sample.backward_options).problem
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


def noise_of(case: Case, values: dict[str, Any], name: str, truth: dict[str, Any]) -> Any:
    """What rounding may leave of gradients in which terms cancel; it is relative to the terms, `compare` to the result.

    In float32 that is the last place of every sum. The gradient of a sink is -Σ P_sink · delta over all rows, whose delta = Σ dO ∘ O has the error of O: in 16 bits
    that of its last rounding, in float32 two units for the sums behind it. Of independent errors, four standard deviations are allowed.
    """
    sample = case.sample
    if name == "grad_sinks":
        of_sinks = numpy.exp(case.arguments["sinks"][:, None] - truth["lse"]).swapaxes(-1, -2)  # the axes of out but the last
        terms = of_sinks[..., None] * values["grad_out"] * truth["out"]
        deviation = reference.EPSILON[sample.dtype] * (2.0 if sample.dtype == "float32" else 12**-0.5)
        return 4 * deviation * numpy.sqrt((terms**2).sum(axis=(*range(terms.ndim - 2), terms.ndim - 1)))
    if sample.dtype != "float32" or not name.startswith("grad"):
        return 0.0
    scale = abs(sample.head_dim**-0.5 if sample.scale is None else sample.scale)
    product = numpy.linalg.norm(values["grad_out"], axis=-1).max() * numpy.linalg.norm(values["value"], axis=-1).max()
    largest = max(numpy.abs(values["key"]).max(), numpy.abs(values["query"]).max())
    kept_factor = 1.0 / (1.0 - sample.features.dropout)
    return float(2.0**-22 * scale * product * largest * sample.head_dim**-0.5 * kept_factor)


def whereabouts(wrong: Any) -> str:
    """Which part of an array is wrong, along each axis: patterns tell tiles, warps and ends apart."""
    parts = []
    for axis in range(wrong.ndim):
        found = numpy.flatnonzero(wrong.any(axis=tuple(other for other in range(wrong.ndim) if other != axis)))
        listed = ",".join(map(str, found[:8])) + (",…" if len(found) > 8 else "")
        parts.append(f"axis {axis}: {len(found)} of {wrong.shape[axis]}, {found.min()} to {found.max()} ({listed})")
    return "; ".join(parts)


def expected(case: Case, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Truth in float64, and what the plain formula gives in the case's precision, by the names of results."""
    sample, dtype = case.sample, case.sample.dtype
    operands = [values[name] for name in ("query", "key", "value")]
    options = {name: x for name, x in case.arguments.items() if name != "allow_tf32" and not name.startswith("max_seqlen")}
    backward = {**options, "grad_lse": values.get("grad_lse")}
    precise: Any = dtype
    if sample.is_packed:
        truth = [*reference.varlen_attention(*operands, **options)]
        naive = [*reference.varlen_attention(*operands, precision=precise, **options)]
        naive[1] = reference.varlen_attention(*operands, precision="float32", **options)[1]
        grads = [reference.varlen_attention_backward(values["grad_out"], *operands, precision=p, **backward) for p in (None, precise)]
    else:
        truth = [*reference.attention(*operands, **options)]
        naive = [*reference.attention_naive(*operands, precise, **options)]
        naive[1] = reference.attention_naive(*operands, "float32", **options)[1]
        grads = [
            reference.attention_backward(values["grad_out"], *operands, **backward),
            reference.attention_naive_backward(values["grad_out"], *operands, precise, **backward),
        ]
    both = []
    for results, gradients in zip((truth, naive), grads, strict=True):
        named = dict(zip(NAMES, (*results, *gradients), strict=True))
        both.append(named | {f"grad_{name}": getattr(gradients, name) for name in ("attn_mask", "sinks")})
    if sample.features.dropout and not sample.is_packed:
        lengths = (sample.seqlen_q, sample.seqlen_kv)
        masks = [
            [dropout_mask((b, h), lengths, sample.features.dropout, DROPOUT_SEED) for h in range(sample.num_heads_q)]
            for b in range(sample.batch)
        ]
        both[0]["dropout_mask"] = both[1]["dropout_mask"] = numpy.array(masks, numpy.float64)
    return both[0], both[1]


def judge(case: Case, values: dict[str, Any], results: dict[str, Any]) -> tuple[str, list[str]]:
    """A line of relative errors, and complaints: what is beyond the error of the plain formula in the same precision."""
    truth, naive = expected(case, values)
    figures, complaints = [], []
    for name, result in results.items():
        want, yardstick = truth[name], naive[name]
        got = reference.to_float64(result)
        finite = numpy.isfinite(want)
        error = float(numpy.linalg.norm(got[finite] - want[finite]) / max(float(numpy.linalg.norm(want[finite])), 1e-300))
        figures.append(f"{name} {error:.1e}")
        if case.sample.allow_tf32:
            if not error < 5e-3:
                complaints.append(f"{name}: relative error {error:.3e}, expected below 5e-3 in TF32")
            continue
        noise = noise_of(case, values, name, truth)
        try:
            with numpy.errstate(invalid="ignore"):
                near = numpy.abs(got - want) <= noise
            dtype = "float32" if name in ("lse", "dropout_mask") else case.sample.dtype
            reference.compare(numpy.where(near, want, got), want, yardstick, name=name, dtype=dtype)
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
    for name in first:
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
        for name in ours:
            ours_bits, theirs_bits = bits_of(ours[name]), bits_of(theirs[name])
            distance = numpy.abs(ordered(ours_bits) - ordered(theirs_bits))
            got, want = reference.to_float64(ours[name]), reference.to_float64(theirs[name])
            finite = numpy.isfinite(want)
            error = float(numpy.linalg.norm((got - want)[finite]) / max(float(numpy.linalg.norm(want[finite])), 1e-300))
            limit = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-5}["float32" if name == "lse" else case.sample.dtype]
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


class Skipped(Exception):
    """A check that this machine cannot make; the message says why."""


def streams(arguments: argparse.Namespace) -> int:
    """Whether calls run where and when they should."""
    xp = the_gpu(arguments.dry_run)
    case = Case.of("float16", 64, 70, 70, 1, 2, **CAUSAL) if arguments.dry_run else Case.of("bfloat16", 128, 1111, 1111, 2, 4, **CAUSAL)
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
            raise Skipped("one GPU only")
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
        except (ImportError, Skipped) as error:
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
        cases = dry_cases(cases)
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
