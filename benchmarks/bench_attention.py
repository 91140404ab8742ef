"""How fast attention is on a GPU, beside other libraries on the same memory.

    python benchmarks/bench_attention.py --quick --output OUT       the cases that matter most, within --seconds
    python benchmarks/bench_attention.py --full --output OUT        every case and library
    python benchmarks/bench_attention.py --tiles --output OUT       time tiles, beside what the model behind the default thinks of them
    python benchmarks/bench_attention.py --host --output OUT        what a warm call costs the host
    python benchmarks/bench_attention.py --facts --output OUT       the machine, its software and its ceilings
    python benchmarks/bench_attention.py --compile                  every kernel that the others need, in threads
    python benchmarks/bench_attention.py --one bfloat16 128 4096 causal forward         one call, for a profiler; a call before it warms up
    python benchmarks/bench_attention.py --worst OUT/attention.csv  the arguments of --one where cuflash is furthest behind

Protocol: seqlen 512 to 16k, batch = 16384 / seqlen, heads = 2048 / head_dim. FLOP are 4 · batch · heads · seqlen² · head_dim for the forward pass, half
of that if causal, times 2.5 for the backward pass, whatever a library really computes. Every library works on the same arrays, stored as (batch,
seqlen, heads, head_dim), and its results are compared with float64 on one head before it is timed: a wrong result has no time. Events around each call
give median and quantiles; libraries take turns case by case, so that a GPU that grows warm slows all of them; clocks are read while it works. The
backends of torch are pinned. JAX works on streams of its own and is timed by the wall clock over many calls.

`--dry-run` takes tiny shapes on the simulator, or torch on the CPU, and the wall clock: it tests this program, its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX shares the GPU's memory with torch

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import cuflash  # noqa: E402
from cuflash import cache, device, reference, tiles  # noqa: E402
from cuflash.planning import make_plan  # noqa: E402

TOKENS, HIDDEN = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
SHAPES = (
    ("bfloat16", 128), ("bfloat16", 64), ("float32", 64), ("bfloat16", 256), ("float16", 128), ("float32", 128), ("float16", 64), ("float16", 256),
)  # fmt: skip
"""Element types and head dimensions, what matters most first."""

ALLOWED_ERROR = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 2e-5}
"""Relative to the norm of the result. What another library exceeds up to a hundredfold in float32 is TF32, and said so."""

COLUMNS = (
    "date", "commit", "gpu", "driver", "library", "version", "backend", "pass", "dtype", "batch", "heads", "seqlen", "head_dim", "causal", "milliseconds",
    "milliseconds_p20", "milliseconds_p80", "tflops", "sm_clock_mhz", "peak_memory_bytes", "relative_error", "repeats", "timer", "sm_clock_before_mhz",
    "sm_clock_after_mhz", "watts", "celsius", "note",
)  # fmt: skip
TILE_COLUMNS = (
    "date", "commit", "gpu", "driver", "kernel", "dtype", "batch", "heads", "seqlen", "head_dim", "causal", "tile_q", "tile_kv", "num_warps", "num_stages",
    "rank", "of", "modelled", "registers", "spill_bytes", "shared_bytes", "milliseconds", "milliseconds_p20", "milliseconds_p80", "tflops", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One shape to time, both passes."""

    dtype: str
    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int

    @classmethod
    def of(cls, dtype: str, head_dim: int, causal: bool, seqlen: int) -> Case:
        return cls(dtype, head_dim, causal, seqlen, max(1, TOKENS // seqlen), HIDDEN // head_dim)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen, self.heads, self.head_dim

    def flops(self, direction: str) -> float:
        whole = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim * (0.5 if self.causal else 1.0)
        return whole * (2.5 if direction == "backward" else 1.0)

    def __str__(self) -> str:
        return f"{self.dtype} d{self.head_dim} s{self.seqlen} b{self.batch} h{self.heads}{' causal' if self.causal else ''}"


def quick_cases() -> list[Case]:
    """What matters most first: the list may be cut anywhere."""
    cases = [Case.of(dtype, d, causal, s) for s in (8192, 2048) for dtype, d in SHAPES for causal in (True, False)]
    return cases + [Case.of("bfloat16", d, causal, s) for s in (16384, 512, 4096, 1024) for d in (128, 64, 256) for causal in (True, False)]


def full_cases() -> list[Case]:
    return list(
        dict.fromkeys(quick_cases() + [Case.of(*shape, causal, s) for s in SEQLENS for shape in SHAPES for causal in (True, False)])
    )


def dry_cases() -> list[Case]:
    return [Case("bfloat16", 64, True, 48, 1, 2), Case("float32", 64, False, 32, 1, 1)]


# --- The machine --------------------------------------------------------------------------------------------------------------------------


class Monitor:
    """Clocks, power and temperature of a GPU, from the driver's library; without it everything is None."""

    def __init__(self, bus_id: str | None) -> None:
        self._library: Any = None
        if bus_id is None:
            return
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            handle = ctypes.c_void_p()
            if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(handle)) == 0:
                self._library, self._handle = library, handle
        except (OSError, AttributeError):
            pass

    def _read(self, function: str, *arguments: int) -> int | None:
        if self._library is None:
            return None
        value = ctypes.c_uint()
        status = getattr(self._library, function)(self._handle, *arguments, ctypes.byref(value))
        return None if status else int(value.value)

    def sm_clock(self) -> int | None:
        return self._read("nvmlDeviceGetClockInfo", 1)

    def watts(self) -> float | None:
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    def celsius(self) -> int | None:
        return self._read("nvmlDeviceGetTemperature", 0)


def output_of(*command: str) -> str:
    """What a command prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).strip()


@functools.cache
def commit() -> str:
    """The commit and whether files differ from it; in a copy without history a hash of library and kernels."""
    found = output_of("git", "rev-parse", "--short=12", "HEAD")
    if re.fullmatch("[0-9a-f]{12}", found):
        return found + ("+" if output_of("git", "status", "--porcelain", "--untracked-files=no", "cuflash", "kernels") else "")
    return f"tree-{tree_hash()}"


@functools.cache
def tree_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("cuflash/*.py"), *ROOT.glob("kernels/**/*.cu*")]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def version_of(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


@functools.cache
def the_torch() -> Any:
    """torch, or None."""
    try:
        import torch
    except Exception:
        return None
    return torch


class Machine:
    """Where everything runs, and how it is timed.

    Attributes:
        dry: tiny shapes without a GPU.
        gpu, driver: names for the tables.
        monitor: see `Monitor`.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        bus_id = None
        self.gpu, self.driver = "simulator", ""
        if not dry:
            import cupy

            if not cupy.is_available():
                sys.exit("CuPy finds no GPU here; --dry-run tests this program without one.")
            self.cupy = cupy
            self.gpu = device.gpu(0).name
            bus_id = cupy.cuda.runtime.deviceGetPCIBusId(0)
            bus_id = bus_id.decode() if isinstance(bus_id, bytes) else bus_id
            self.driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0").partition("\n")[0]
        self.monitor = Monitor(bus_id)
        self.date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")

    @property
    def device(self) -> device.Device:
        return device.of_arch(device.simulator_arch()) if self.dry else device.gpu(0)

    def head(self) -> dict[str, Any]:
        return {"date": self.date, "commit": commit(), "gpu": self.gpu, "driver": self.driver}

    def synchronize(self) -> None:
        if not self.dry:
            self.cupy.cuda.runtime.deviceSynchronize()

    def time(self, call: Callable[[], Any], seconds: float, wall: Callable[[], None] | None = None) -> dict[str, Any]:
        """Time a call that has run before.

        Args:
            seconds: to spend, about; at least three and at most 200 calls.
            wall: waits for what `call` started; then the wall clock is used, over blocks of calls.
        """
        if self.dry or wall is not None:
            return self._time_by_wall(call, seconds, wall or (lambda: None))
        before = self.monitor.sm_clock()
        events = self.cupy.cuda

        def measure(count: int) -> list[float]:
            pairs = [(events.Event(), events.Event()) for _ in range(count)]
            for start, end in pairs:
                start.record(events.Stream.null)
                call()
                end.record(events.Stream.null)
            self.during = self.monitor.sm_clock()
            self.heat = self.monitor.watts(), self.monitor.celsius()
            self.synchronize()
            return [float(events.get_elapsed_time(start, end)) for start, end in pairs]

        call()
        once = statistics.median(measure(2)) / 1000
        times = measure(max(3, min(200, int(seconds / max(once, 1e-6)))))
        return {
            **quantiles(times), "repeats": len(times), "timer": "events", "sm_clock_mhz": self.during, "sm_clock_before_mhz": before,
            "sm_clock_after_mhz": self.monitor.sm_clock(), "watts": self.heat[0], "celsius": self.heat[1],
        }  # fmt: skip

    def _time_by_wall(self, call: Callable[[], Any], seconds: float, wait: Callable[[], None]) -> dict[str, Any]:
        def measure(count: int) -> float:
            wait()
            started = time.perf_counter()
            for _ in range(count):
                call()
            wait()
            return (time.perf_counter() - started) / count

        before, once = self.monitor.sm_clock(), measure(1)
        count = max(1, min(40, int(seconds / 5 / max(once, 1e-6))))
        times = [1000 * measure(count) for _ in range(1 if self.dry else 5)]
        clocks = {"sm_clock_before_mhz": before, "sm_clock_after_mhz": self.monitor.sm_clock()}
        return {**quantiles(times), "repeats": count * len(times), "timer": "wall", **clocks}


def quantiles(times: list[float]) -> dict[str, float]:
    p20, median, p80 = (float(x) for x in numpy.quantile(times, (0.2, 0.5, 0.8)))
    return {"milliseconds": median, "milliseconds_p20": p20, "milliseconds_p80": p80}


class Table:
    """A CSV file that has every row at once, whatever happens next."""

    def __init__(self, path: Path | None, columns: tuple[str, ...]) -> None:
        self._file = None
        self._columns = columns
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            self._file = path.open("a", newline="")
            self._writer = csv.DictWriter(self._file, columns, restval="", extrasaction="raise", lineterminator="\n")
            if new:
                self._writer.writeheader()

    def add(self, row: dict[str, Any]) -> None:
        unknown = set(row) - set(self._columns)
        assert not unknown, unknown
        if self._file is not None:
            shown = {name: "" if x is None else f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
            self._writer.writerow(shown)
            self._file.flush()


# --- Operands and truth -------------------------------------------------------------------------------------------------------------------


class Operands:
    """query, key, value and grad_out of a case, (batch, seqlen, heads, head_dim), on the GPU: torch tensors, else CuPy or NumPy arrays.

    Attributes:
        torch: the module, or None where arrays are not its tensors.
        truth: out, grad_query, grad_key, grad_value of the last head of the last batch in float64.
    """

    def __init__(self, case: Case, machine: Machine) -> None:
        self.case, self.torch = case, the_torch()
        if self.torch is not None:
            torch = self.torch
            where = "cpu" if machine.dry else "cuda"
            generator = torch.Generator(where).manual_seed(1)
            self.arrays = [torch.randn(case.shape, generator=generator, device=where).to(getattr(torch, case.dtype)) for _ in range(4)]
            self.truth: list[Any] | None = self._truth_by_torch(torch)
            return
        values = numpy.random.default_rng(1).standard_normal((4, *case.shape), dtype=numpy.float32)
        rounded = [reference.to_bfloat16_bits(x) if case.dtype == "bfloat16" else x.astype(case.dtype) for x in values]
        placed = rounded if machine.dry else [machine.cupy.asarray(x) for x in rounded]
        self.arrays = [cuflash.bfloat16(x) if case.dtype == "bfloat16" else x for x in placed]
        self.truth = None
        if case.seqlen <= 2048:
            query, key, value, grad = (reference.round_to(x[-1:, :, -1:], case.dtype) for x in values)
            out, _ = reference.attention(query, key, value, is_causal=case.causal)
            gradients = reference.attention_backward(grad, query, key, value, is_causal=case.causal)
            self.truth = [x[0, :, 0] for x in (out, *gradients)]

    def _truth_by_torch(self, torch: Any) -> list[Any]:
        query, key, value, grad = (x[-1, :, -1].double() for x in self.arrays)
        scale, length = self.case.head_dim**-0.5, self.case.seqlen
        out, grad_query, grad_key, grad_value = (torch.zeros_like(query) for _ in range(4))
        for begin in range(0, length, 2048):
            rows = slice(begin, min(begin + 2048, length))
            seen = slice(0, rows.stop if self.case.causal else length)
            scores = scale * query[rows] @ key[seen].T
            if self.case.causal:
                hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + begin)
                scores.masked_fill_(hidden, -math.inf)
            weights = scores.softmax(-1)
            out[rows] = weights @ value[seen]
            grad_scores = weights * (grad[rows] @ value[seen].T - (grad[rows] * out[rows]).sum(-1, keepdim=True))
            grad_query[rows] = scale * grad_scores @ key[seen]
            grad_key[seen] += scale * grad_scores.T @ query[rows]
            grad_value[seen] += weights.T @ grad[rows]
        return [out, grad_query, grad_key, grad_value]

    def errors(self, results: list[Any]) -> list[float | None]:
        """Relative errors of [out], or of the three gradients, laid out like the operands."""
        if self.truth is None:
            return [None] * len(results)
        found: list[float | None] = []
        for got, want in zip(results, self.truth[:1] if len(results) == 1 else self.truth[1:], strict=True):
            if self.torch is not None:
                found.append(float((got[-1, :, -1].double() - want).norm() / want.norm()))
            else:
                found.append(float(numpy.linalg.norm(reference.to_float64(got)[-1, :, -1] - want) / numpy.linalg.norm(want)))
        return found


# --- Libraries ----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Calls:
    """A library on the operands of one case.

    Attributes:
        forward: gives out.
        backward: gives the three gradients; None where there is no backward pass to time.
        as_operands: turns what both give into arrays like the operands.
        wait: ends what a call started, where events do not see it.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any] | None
    as_operands: Callable[[Any], Any] = lambda x: x
    wait: Callable[[], None] | None = None


@dataclass(frozen=True)
class Library:
    """Something to time.

    Attributes:
        name, backend, version: for the tables.
        prepare: makes `Calls`; raises what the library raises for a case that it does not take.
        takes: whether it is worth asking.
    """

    name: str
    backend: str
    version: str
    prepare: Callable[[Operands], Calls]
    takes: Callable[[Case], bool] = lambda case: True

    @property
    def label(self) -> str:
        """What `--libraries` calls it."""
        return "jax" if self.name == "jax" else self.backend


def _cuflash_calls(operands: Operands) -> Calls:
    query, key, value, grad_out = operands.arrays
    attention = functools.partial(cuflash.scaled_dot_product_attention, query, key, value, is_causal=operands.case.causal)
    out, lse = attention(return_lse=True)
    backward = functools.partial(
        cuflash.scaled_dot_product_attention_backward, grad_out, query, key, value, out, lse, is_causal=operands.case.causal
    )
    return Calls(lambda: attention(return_lse=True)[0], backward)  # the others compute LSE too


def _torch_calls(operands: Operands, call: Callable[..., Any], context: Callable[[], Any]) -> Calls:
    torch = operands.torch
    inputs = [x.transpose(1, 2) for x in operands.arrays[:3]]  # views: the memory is the same
    grad_out = operands.arrays[3].transpose(1, 2)

    def forward() -> Any:
        with torch.no_grad(), context():
            return call(*inputs)

    leaves = [x.detach().requires_grad_() for x in inputs]
    with context():
        out = call(*leaves)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    def as_operands(x: Any) -> Any:
        return x.transpose(1, 2)

    forward()
    return Calls(forward, backward, as_operands)


def _sdpa_calls(operands: Operands, backend: str) -> Calls:
    torch = operands.torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=operands.case.causal)
    return _torch_calls(operands, attention, lambda: sdpa_kernel(getattr(SDPBackend, backend)))


@functools.cache
def _compiled_flex() -> Any:
    import contextlib

    import torch
    from torch.nn.attention.flex_attention import flex_attention

    for name in ("recompile_limit", "cache_size_limit"):
        with contextlib.suppress(Exception):
            setattr(torch._dynamo.config, name, 256)
    return torch.compile(flex_attention, dynamic=False)


def _flex_calls(operands: Operands) -> Calls:
    from contextlib import nullcontext

    from torch.nn.attention.flex_attention import create_block_mask

    mask, case = None, operands.case
    if case.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.seqlen, case.seqlen, device=operands.arrays[0].device)
    return _torch_calls(operands, functools.partial(_compiled_flex(), block_mask=mask), nullcontext)


def _jax_calls(operands: Operands, implementation: str) -> Calls:
    import jax

    query, key, value, grad_out = (jax.dlpack.from_dlpack(x) for x in operands.arrays)

    @jax.jit
    def attention(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=operands.case.causal, implementation=implementation)

    _, pull_back = jax.vjp(attention, query, key, value)
    pull = jax.jit(lambda back, x: back(x))
    last: list[Any] = [None]

    def kept(x: Any) -> Any:
        last[0] = x
        return x

    def wait() -> None:
        if last[0] is not None:
            jax.block_until_ready(last[0])

    jax.block_until_ready((attention(query, key, value), pull(pull_back, grad_out)))
    return Calls(
        lambda: kept(attention(query, key, value)), lambda: kept(pull(pull_back, grad_out)), lambda x: operands.torch.from_dlpack(x), wait
    )


def _formula_calls(operands: Operands) -> Calls:
    """Something to compare with where nothing is installed."""
    values = [reference.to_float64(x) for x in operands.arrays]
    causal = operands.case.causal
    return Calls(
        lambda: reference.attention(*values[:3], is_causal=causal)[0],
        lambda: reference.attention_backward(values[3], *values[:3], is_causal=causal),
    )


def libraries(machine: Machine, wanted: list[str]) -> list[Library]:
    """Those that are installed and wanted, cuflash first."""
    found = [Library("cuflash", "cuflash", cuflash.__version__, _cuflash_calls)]
    torch = the_torch()
    if torch is not None:
        backends = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
        for name, backend in ({"math": "MATH"} if machine.dry else backends).items():
            takes = (lambda case: case.dtype != "float32") if name in ("flash", "cudnn") else (lambda case: True)
            found.append(Library("torch", name, torch.__version__, functools.partial(_sdpa_calls, backend=backend), takes))
        found.append(Library("torch", "flex", torch.__version__, _flex_calls))
        implementation = "xla" if machine.dry else "cudnn"
        sixteen: Callable[[Case], bool] = lambda case: case.dtype != "float32"  # noqa: E731
        found.append(Library("jax", "cudnn", version_of("jax"), functools.partial(_jax_calls, implementation=implementation), sixteen))
    else:
        found.append(Library("numpy", "formula", numpy.__version__, _formula_calls, lambda case: case.seqlen <= 512))
    return [library for library in found if library.label in wanted]


def peak_memory(operands: Operands, machine: Machine, call: Callable[[], Any], library: str) -> int | None:
    """Bytes beyond what is there before the call, its results included."""
    torch = operands.torch
    if machine.dry or torch is None or library == "jax":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.max_memory_allocated() - before)


def judge(library: Library, case: Case, errors: list[float | None]) -> tuple[float | None, str]:
    """The largest error and what is to be said of it; "wrong" if the time is worth nothing."""
    known = [error for error in errors if error is not None]
    if not known:
        return None, "not checked"
    largest = max(known) if all(math.isfinite(error) for error in known) else math.nan
    if largest <= ALLOWED_ERROR[case.dtype]:
        return largest, ""
    inexact = library.name != "cuflash" and case.dtype == "float32" and largest <= 100 * ALLOWED_ERROR[case.dtype]
    return largest, "less exact than float32" if inexact else "wrong"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def time_case(case: Case, libraries_: list[Library], machine: Machine, table: Table, seconds: float) -> Iterator[str]:
    """Time all libraries on one case; says what it found. Yields "wrong" for every wrong result of cuflash."""
    operands = Operands(case, machine)
    fields = {
        "dtype": case.dtype,
        "batch": case.batch,
        "heads": case.heads,
        "seqlen": case.seqlen,
        "head_dim": case.head_dim,
        "causal": int(case.causal),
    }
    said: dict[str, list[str]] = {"forward": [], "backward": []}
    for library in libraries_:
        if not library.takes(case):
            continue
        row = {**machine.head(), "library": library.name, "version": library.version, "backend": library.backend, **fields}
        try:
            calls = library.prepare(operands)
        except Exception as error:
            table.add({**row, "pass": "forward", "note": f"does not run: {one_line(error)}"})
            said["forward"].append(f"{library.label} –")
            if library.name == "cuflash":
                traceback.print_exc()
                yield "wrong"
            continue
        for direction, call in (("forward", calls.forward), ("backward", calls.backward)):
            if call is None:
                continue
            row["pass"] = direction
            try:
                results = call()
                if calls.wait is not None:
                    calls.wait()
                arrays = [calls.as_operands(x) for x in (results if direction == "backward" else [results])]
                error, note = judge(library, case, operands.errors(arrays))
                del results, arrays
                if note == "wrong":
                    table.add({**row, "relative_error": error, "note": note})
                    said[direction].append(f"{library.label} WRONG ({error:.1e})")
                    if library.name == "cuflash":
                        yield "wrong"
                    continue
                memory = peak_memory(operands, machine, call, library.name)
                times = machine.time(call, seconds, calls.wait)
                rate = case.flops(direction) / times["milliseconds"] / 1e9
                table.add({**row, **times, "tflops": rate, "peak_memory_bytes": memory, "relative_error": error, "note": note})
                said[direction].append(f"{library.label} {rate:.3g}")
            except Exception as error:
                table.add({**row, "note": f"does not run: {one_line(error)}"})
                said[direction].append(f"{library.label} –")
                if library.name == "cuflash":
                    traceback.print_exc()
                    yield "wrong"
        del calls
    for direction, words in said.items():
        if words:
            print(f"{case!s:44} {direction:8} TFLOP/s  {'   '.join(words)}", flush=True)


def compare_libraries(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--quick` and `--full`."""
    quick = not arguments.full
    cases = dry_cases() if machine.dry else quick_cases() if quick else full_cases()
    cases = [case for case in cases if re.search(arguments.cases, str(case))]
    every = ["cuflash", "flash", "cudnn", "efficient", "math", "formula"]
    first = arguments.libraries.split(",") if arguments.libraries else every + ([] if quick else ["flex"])
    table = Table(arguments.output and arguments.output / "attention.csv", COLUMNS)
    found, deadline, wrong = libraries(machine, first), time.monotonic() + arguments.seconds, 0
    seconds = 0.06 if quick else 0.25
    print(
        f"{machine.gpu}, {', '.join(library.label for library in found)}; {len(cases)} cases; FLOP of the formula, whatever is really computed"
    )
    prefetch(cases, machine)
    heat(machine)
    done = 0
    for case in cases:
        wrong += len(list(time_case(case, found, machine, table, seconds)))
        done += 1
        if time.monotonic() > deadline:
            print("out of time")
            break
    late = [] if arguments.libraries else libraries(machine, ["jax"])  # after the rest: it has memory and streams of its own
    for case in cases if late else []:
        if time.monotonic() > deadline:
            break
        if machine.dry or (case.dtype == "bfloat16" and case.seqlen in ((2048, 8192) if quick else SEQLENS)):
            list(time_case(case, late, machine, table, seconds))
    print(f"SUMMARY: {done} of {len(cases)} cases timed, {wrong} wrong results of cuflash")
    return int(wrong > 0 or (done < len(cases) and not quick))


def heat(machine: Machine) -> None:
    """Half a second of work, so that the first case does not find a GPU asleep."""
    torch = the_torch()
    if machine.dry or torch is None:
        return
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    started = time.monotonic()
    while time.monotonic() - started < 0.5:
        x @ x
        torch.cuda.synchronize()


# --- Compilation --------------------------------------------------------------------------------------------------------------------------


def inputs_like(case: Case) -> list[Any]:
    """Arrays that no memory stands behind, for plans."""
    strides = {"strides": (0, 0, 0, 4 if case.dtype == "float32" else 2)}
    x = numpy.lib.stride_tricks.as_strided(
        numpy.zeros(case.head_dim, numpy.uint16 if case.dtype == "bfloat16" else case.dtype), case.shape, **strides
    )
    return [cuflash.bfloat16(x) if case.dtype == "bfloat16" else x] * 3


def plans_of(case: Case, on: device.Device, tile: Any = None, backward: bool | None = None) -> list[Any]:
    """The plans of a case; without a GPU they can be made for one."""
    problem = cuflash.plan(*inputs_like(case), is_causal=case.causal, return_lse=True).problem
    return [make_plan(problem, on, backward=each, tile=tile) for each in ((False, True) if backward is None else (backward,))]


def prefetch(cases: list[Case], machine: Machine) -> None:
    """Compile what the cases need before the first of them is timed."""
    requests = [kernel.request(machine.device) for case in cases for plan in plans_of(case, machine.device) for kernel in plan.kernels]
    started, compiled = time.perf_counter(), cache_count()
    try:
        cache.fetch_many(list(dict.fromkeys(requests)), max_workers=os.cpu_count())
    except Exception as error:  # the cases that need it will say so; the others need not suffer
        print(f"WRONG {one_line(error)}")
    print(
        f"kernels: {len(set(requests))}, {cache_count() - compiled} of them compiled in {time.perf_counter() - started:.1f} s", flush=True
    )


def cache_count() -> int:
    return int(cache.statistics().compiles) if hasattr(cache, "statistics") else 0


def compile_all(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--compile`: one failure does not keep the others from being compiled."""
    import sanitize

    on = machine.device
    wanted: dict[Any, None] = {}
    for cases in (sanitize.check_cases(), sanitize.tiny_cases(), sanitize.simulator_cases()):
        wanted |= dict.fromkeys(sanitize.requests_of(cases[:1] if machine.dry else cases, on))
    for case in dry_cases() if machine.dry else quick_cases():
        wanted |= dict.fromkeys(kernel.request(on) for plan in plans_of(case, on) for kernel in plan.kernels)
    started, failed, spilled = time.perf_counter(), 0, 0
    deadline = time.monotonic() + arguments.seconds
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [(request, pool.submit(cache.fetch, request)) for request in wanted]
        for request, task in tasks:
            try:
                artifact = task.result(timeout=max(0.1, deadline - time.monotonic()))
            except Exception as error:
                failed += 1
                task.cancel()
                print(f"WRONG {request.describe()}: {one_line(error)}")
                continue
            used = [f"{r.registers} registers, {r.spill_store_bytes}/{r.spill_load_bytes} bytes spilled" for r in artifact.resources]
            spilled += any(r.spill_store_bytes for r in artifact.resources)
            words = re.findall(r"(HEAD_DIM|TILE_Q|TILE_KV|NUM_WARPS|NUM_STAGES|CAUSAL) = (\w+)", request.config)
            print(
                f"{request.describe():48} {' '.join(f'{a.lower()}={b}' for a, b in words):80} {artifact.seconds:.1f} s, {'; '.join(used)}"
            )
        for _, task in tasks:
            task.cancel()
    print(f"SUMMARY: {len(wanted)} kernels in {time.perf_counter() - started:.0f} s, {failed} failed, {spilled} spill")
    return int(failed > 0)


# --- Tiles --------------------------------------------------------------------------------------------------------------------------------


def chosen_tiles(case: tiles.KernelCase, on: device.Device, top: int, spread: int) -> list[tuple[int, int, Any]]:
    """(rank, how many there are, tile): the model's best, and some of the rest, evenly, in case that it is wrong."""
    legal = tiles.legal_tiles_for(case, on)
    fitting = [rank for rank, tile in enumerate(legal) if tiles.estimate_registers(case, tile, on) <= tiles.MAX_REGISTERS]
    rest = [rank for rank in fitting if rank >= top]
    picked = [*range(min(top, len(legal))), *rest[:: max(1, len(rest) // spread if spread else len(rest) + 1)][:spread]]
    return [(rank, len(legal), legal[rank]) for rank in picked]


def sweep_tiles(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--tiles`: whole passes with one kernel's tile pinned. Compilation runs ahead in threads while earlier tiles are timed."""
    on, deadline = machine.device, time.monotonic() + arguments.seconds
    shapes = [("bfloat16", 128, True), ("bfloat16", 64, True), ("float32", 64, True), ("bfloat16", 256, True), ("bfloat16", 128, False)]
    shapes += [("float32", 128, True), ("float16", 128, True), ("bfloat16", 64, False)]
    cases = dry_cases()[:1] if machine.dry else [Case.of(dtype, head_dim, causal, 4096) for dtype, head_dim, causal in shapes]
    cases = [case for case in cases if re.search(arguments.cases, str(case))]
    table = Table(arguments.output and arguments.output / "tiles.csv", TILE_COLUMNS)
    work: list[tuple[Case, str, int, int, Any, Any, Any]] = []
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2))
    for case in cases:
        names = [kernel.name for plan in plans_of(case, on) for kernel in plan.kernels if kernel.name != "backward_delta"]
        for name in names:
            kernel_case = tiles.KernelCase(name, case.dtype, case.head_dim)  # type: ignore[arg-type]
            for rank, count, tile in chosen_tiles(
                kernel_case, on, 2 if machine.dry else arguments.top, 1 if machine.dry else arguments.spread
            ):
                pinned = {name: tile} if name != "forward" else tile
                plan = plans_of(case, on, pinned, name != "forward")[0]
                kernel = next(kernel for kernel in plan.kernels if kernel.name == name)
                others = [pool.submit(cache.fetch, other.request(on)) for other in plan.kernels if other is not kernel]
                work.append((case, name, rank, count, pinned, kernel, [pool.submit(cache.fetch, kernel.request(on)), *others]))
    operands: Operands | None = None
    best: dict[tuple[Case, str], list[tuple[float, int, Any]]] = {}
    done = wrong = 0
    for case, name, rank, count, pinned, kernel, artifacts in work:
        if time.monotonic() > deadline:
            print(f"out of time after {done} of {len(work)} tiles")
            break
        if operands is None or operands.case != case:
            operands = Operands(case, machine)
            heat(machine)
        kernel_case = tiles.KernelCase(name, case.dtype, case.head_dim)  # type: ignore[arg-type]
        tile = kernel.tile
        first = tiles.estimate_cycles(kernel_case, tiles.default_tile(kernel_case, on), on)
        row: dict[str, Any] = {
            **machine.head(), "kernel": name, "dtype": case.dtype, "batch": case.batch, "heads": case.heads, "seqlen": case.seqlen,
            "head_dim": case.head_dim, "causal": int(case.causal), "tile_q": tile.tile_q, "tile_kv": tile.tile_kv, "num_warps": tile.num_warps,
            "num_stages": tile.num_stages, "rank": rank, "of": count, "modelled": tiles.estimate_cycles(kernel_case, tile, on) / first,
            "shared_bytes": kernel.shared_bytes,
        }  # fmt: skip
        direction = "forward" if name == "forward" else "backward"
        try:
            compiled = [task.result(timeout=max(1.0, deadline - time.monotonic())) for task in artifacts]
            if compiled[0].resources:
                used = compiled[0].resources_of(kernel.entry)
                row |= {"registers": used.registers, "spill_bytes": used.spill_store_bytes + used.spill_load_bytes}
            query, key, value, grad_out = operands.arrays
            options: dict[str, Any] = {"is_causal": case.causal}
            attention = functools.partial(cuflash.scaled_dot_product_attention, query, key, value, return_lse=True, **options)
            if direction == "forward":
                call: Callable[[], Any] = functools.partial(attention, tile=pinned)
                error = operands.errors([call()[0]])[0]
            else:
                out, lse = attention()
                call = functools.partial(
                    cuflash.scaled_dot_product_attention_backward, grad_out, query, key, value, out, lse, tile=pinned, **options
                )
                errors = [error for error in operands.errors(list(call())) if error is not None]
                error = max(errors, default=None)
            if error is not None and not error <= ALLOWED_ERROR[case.dtype]:
                wrong += 1
                row["note"] = f"wrong: relative error {error:.1e}"
                print(f"WRONG {case} {name} {tile}: relative error {error:.1e}", flush=True)
            else:
                times = machine.time(call, 0.03)
                row |= {column: times[column] for column in ("milliseconds", "milliseconds_p20", "milliseconds_p80")}
                row["tflops"] = case.flops(direction) / times["milliseconds"] / 1e9
                best.setdefault((case, name), []).append((times["milliseconds"], rank, tile))
        except Exception as error:
            wrong += 1
            row["note"] = one_line(error)
            print(f"WRONG {case} {name} {tile}: {one_line(error)}", flush=True)
            if not machine.dry and not usable(machine):
                print("the GPU answers nothing any more")
                break
        table.add(row)
        done += 1
    pool.shutdown(wait=False, cancel_futures=True)
    print("the whole pass, with one kernel's tile pinned: the default's time, and the best tile's")
    for (case, name), times_ in best.items():
        default = next((ms for ms, rank, _ in times_ if rank == 0), math.nan)
        ms, rank, tile = min(times_, key=lambda each: each[0])
        print(
            f"{case!s:40} {name:13} default {default:8.3f} ms, best {ms:8.3f} ms ({default / ms:.2f}x): rank {rank:3}, {tile}; {len(times_)} timed"
        )
    print(f"SUMMARY: {done} of {len(work)} tiles timed, {wrong} wrong")
    return int(wrong > 0)


def usable(machine: Machine) -> bool:
    try:
        machine.synchronize()
        machine.cupy.zeros(1).get()
    except Exception:
        return False
    return True


# --- Host ---------------------------------------------------------------------------------------------------------------------------------


def host_cost(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--host`: microseconds of a warm call on small arrays until it returns, the launch included and the GPU's work not."""
    case = Case("float16", 64, True, 32 if machine.dry else 128, 1, 2)
    torch = the_torch()
    rows: list[dict[str, Any]] = []
    kinds: dict[str, list[Any]] = {}
    values = [numpy.ones(case.shape, numpy.float16) for _ in range(4)]
    if machine.dry:
        kinds["numpy"] = values
    else:
        kinds["cupy"] = [machine.cupy.asarray(x) for x in values]
    if torch is not None:
        kinds["torch"] = [torch.as_tensor(x, device="cpu" if machine.dry else "cuda") for x in values]
    wrong = 0
    for kind, (query, key, value, grad_out) in kinds.items():
        attention = functools.partial(cuflash.scaled_dot_product_attention, query, key, value, is_causal=True)
        out, lse = attention(return_lse=True)
        gradient = functools.partial(cuflash.scaled_dot_product_attention_backward, grad_out, query, key, value, out, lse, is_causal=True)
        calls: dict[str, Callable[[], Any]] = {
            "cuflash forward": attention,
            "cuflash forward with LSE": lambda attention=attention: attention(return_lse=True),
            "cuflash backward": gradient,
        }
        if kind == "torch" and not machine.dry:
            made = _sdpa_calls(FakeOperands(case, torch, [query, key, value, grad_out]), "FLASH_ATTENTION")  # type: ignore[arg-type]
            calls |= {"torch flash forward": made.forward, "torch flash backward with autograd": made.backward or made.forward}
        for name, call in calls.items():
            try:
                times = host_times(call, machine)
            except Exception as error:
                wrong += name.startswith("cuflash")
                print(f"{kind:8} {name:36} {one_line(error)}")
                continue
            rows.append({**machine.head(), "arrays": kind, "call": name, **times})
            print(f"{kind:8} {name:36} median {times['median']:7.1f} µs, 20 % {times['p20']:.1f}, 80 % {times['p80']:.1f}", flush=True)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "host.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(
        "SUMMARY: " + "; ".join(f"{row['arrays']} {row['call']} {row['median']:.0f} µs" for row in rows if "LSE" not in row["call"])[:150]
    )
    return int(wrong > 0)


@dataclass
class FakeOperands:
    """What `_torch_calls` looks at."""

    case: Case
    torch: Any
    arrays: list[Any]


def host_times(call: Callable[[], Any], machine: Machine) -> dict[str, float]:
    rounds, each = (2, 2) if machine.dry else (100, 20)
    for _ in range(2 if machine.dry else 50):
        call()
    times = []
    for _ in range(rounds):
        machine.synchronize()  # an empty queue: no launch waits for another
        started = time.perf_counter()
        for _ in range(each):
            call()
        times.append(1e6 * (time.perf_counter() - started) / each)
    machine.synchronize()
    p20, median, p80 = (float(x) for x in numpy.quantile(times, (0.2, 0.5, 0.8)))
    return {"median": median, "p20": p20, "p80": p80}


# --- Facts, and single calls --------------------------------------------------------------------------------------------------------------

SMI_FIELDS = (
    "name,driver_version,pci.bus_id,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,clocks.applications.graphics,power.limit,power.draw,"
    "temperature.gpu,persistence_mode,compute_mode,mig.mode.current,ecc.mode.current"
)
PACKAGES = (
    "numpy", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch", "triton",
    "jax", "jaxlib", "ml_dtypes", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "rich", "platformdirs", "matplotlib",
)  # fmt: skip


def facts(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--facts`: what every figure depends on."""
    found: dict[str, Any] = {**machine.head(), "tree": tree_hash(), "slug": machine.slug, "cuflash": cuflash.__version__}
    found |= {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            found["cpu"] = line.partition(":")[2].strip()
            break
    found["packages"] = {name: version for name in PACKAGES if (version := version_of(name))}
    found["tools"] = {}
    for tool in ("nvcc", "compute-sanitizer", "ncu", "g++"):
        path = shutil.which(tool)
        found["tools"][tool] = output_of(tool, "--version").splitlines()[-1] if path else "not found"
    from cuflash import compiler

    found["nvrtc"] = ".".join(map(str, compiler.nvrtc_version()))
    if not machine.dry:
        found["nvidia_smi"] = dict(
            zip(
                SMI_FIELDS.split(","),
                output_of("nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader").split(", "),
                strict=False,
            )
        )
        found["cuda_driver"] = machine.cupy.cuda.runtime.driverGetVersion()
        found["cuda_runtime"] = machine.cupy.cuda.runtime.runtimeGetVersion()
        on = machine.device
        found["device"] = {
            name: getattr(on, name) for name in ("arch", "num_sms", "shared_memory_per_block", "shared_memory_per_sm", "registers_per_sm")
        }
        found["gpus"] = machine.cupy.cuda.runtime.getDeviceCount()
        found["ceilings"] = ceilings(machine)
    text = json.dumps(found, indent=1)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "facts.json").write_text(text + "\n")
    print(text)
    print(f"SUMMARY: {machine.gpu}, driver {machine.driver}, NVRTC {found['nvrtc']}, {commit()}, {json.dumps(found.get('ceilings', {}))}")
    return 0


def ceilings(machine: Machine) -> dict[str, Any]:
    """What this GPU reaches on the simplest of work."""
    torch = the_torch()
    if torch is None:
        return {}
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    heat(machine)
    product = machine.time(lambda: x @ x, 0.3)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = machine.time(lambda: target.copy_(source), 0.1)
    return {
        "bfloat16_matmul_tflops": round(2 * 8192**3 / product["milliseconds"] / 1e9, 1),
        "sm_clock_mhz": product["sm_clock_mhz"],
        "watts": product["watts"],
        "copy_tb_per_s": round(2 * (1 << 30) / copy["milliseconds"] / 1e9, 3),
    }


def one_call(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--one`: two calls of one pass; a profiler looks at the kernels of the second."""
    dtype, head_dim, seqlen, causal, direction = arguments.one
    made = Case.of(dtype, int(head_dim), causal == "causal", int(seqlen))
    case = Case(made.dtype, made.head_dim, made.causal, made.seqlen, 1, 1) if machine.dry else made
    values = numpy.random.default_rng(1).standard_normal((4, *case.shape), dtype=numpy.float32)
    rounded = [reference.to_bfloat16_bits(x) if dtype == "bfloat16" else x.astype(dtype) for x in values]
    placed = rounded if machine.dry else [machine.cupy.asarray(x) for x in rounded]
    query, key, value, grad_out = (cuflash.bfloat16(x) if dtype == "bfloat16" else x for x in placed)
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, is_causal=case.causal, return_lse=True)
    for _ in range(2):
        if direction == "forward":
            cuflash.scaled_dot_product_attention(query, key, value, is_causal=case.causal, return_lse=True)
        else:
            cuflash.scaled_dot_product_attention_backward(grad_out, query, key, value, out, lse, is_causal=case.causal)
    machine.synchronize()
    print(f"{case} {direction}")
    return 0


def worst(path: Path) -> int:
    """`--worst`: where the best other library is furthest ahead."""
    groups: dict[tuple[str, ...], dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["milliseconds"] and row["note"] == "":
                key = tuple(row[name] for name in ("dtype", "head_dim", "seqlen", "causal", "pass"))
                rate = groups.setdefault(key, {})
                name = "cuflash" if row["library"] == "cuflash" else "other"
                rate[name] = max(rate.get(name, 0.0), float(row["tflops"]))
    ratios = {key: rate["cuflash"] / rate["other"] for key, rate in groups.items() if len(rate) == 2}
    if not ratios:
        return 1
    dtype, head_dim, seqlen, causal, direction = min(ratios, key=lambda key: ratios[key])
    print(dtype, head_dim, seqlen, "causal" if causal == "1" else "full", direction)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="compare libraries on the cases that matter most (the default)")
    what.add_argument("--full", action="store_true", help="compare all libraries on all cases")
    what.add_argument("--tiles", action="store_true", help="time tiles")
    what.add_argument("--host", action="store_true", help="time the host's part of warm calls")
    what.add_argument("--facts", action="store_true", help="describe the machine")
    what.add_argument("--compile", action="store_true", help="compile ahead")
    what.add_argument("--one", nargs=5, metavar=("DTYPE", "HEAD_DIM", "SEQLEN", "causal|full", "PASS"), help="two calls, for a profiler")
    what.add_argument("--worst", type=Path, metavar="CSV", help="print the case where cuflash is furthest behind")
    parser.add_argument("--output", type=Path, help="folder for CSV and JSON; without it, nothing is written")
    parser.add_argument("--seconds", type=float, default=170.0, help="begin nothing after this time; default 170")
    parser.add_argument("--cases", default="", help="regular expression; only cases whose description it is found in")
    parser.add_argument("--libraries", default="", help="comma-separated: cuflash, flash, cudnn, efficient, flex, jax")
    parser.add_argument("--top", type=int, default=6, help="tiles to time, the model's best")
    parser.add_argument("--spread", type=int, default=6, help="tiles to time beyond those, evenly among the rest")
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
    machine = Machine(arguments.dry_run)
    for chosen, action in (
        (arguments.tiles, sweep_tiles), (arguments.host, host_cost), (arguments.facts, facts), (arguments.compile, compile_all), (arguments.one, one_call),
    ):  # fmt: skip
        if chosen:
            return action(machine, arguments)
    return compare_libraries(machine, arguments)


if __name__ == "__main__":
    sys.exit(main())
