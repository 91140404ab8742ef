"""What the compiler made of the kernels, for any architecture and without a GPU: registers, spills, shared memory, occupancy, instructions.

`inspect_kernels(plans)` compiles every kernel to a cubin (through the cache) and returns one `Report` per kernel; `render(reports)` prints
them. A report is a value and raises nothing: a caller decides what `Report.failures` or `Report.spills` mean to it.

The instruction mix counts the instructions in the code, not how often they run. It needs nvdisasm, from the wheel `nvidia-cuda-nvdisasm`
or a CUDA toolkit on the PATH; without it the mix is missing and everything else is there.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from cuflash.hardware.device import Device
from cuflash.hardware.occupancy import MAX_REGISTERS_PER_THREAD, Occupancy, occupancy
from cuflash.jit import cache, disassembly
from cuflash.jit.compiler import CompileRequest, KernelResources
from cuflash.jit.disassembly import CLASSES, NVDISASM_HINT, classify, instruction_counts
from cuflash.planning.kernel_cases import head_dims

# ---------------------------------------------------------------------------------------------------------------------------------- reports


@dataclass(frozen=True)
class Expectations:
    """What a kernel must fulfil; whatever it does not is named in `Report.failures`.

    Attributes:
        max_registers: per thread.
        spills: whether spilling is tolerated.
        min_blocks: blocks per SM; 1 means that the kernel can be launched at all.
        matrix: matrix instructions must be there, such as "HGMMA", or any for "". None expects nothing. Not judged without nvdisasm.
    """

    max_registers: int = MAX_REGISTERS_PER_THREAD
    spills: bool = False
    min_blocks: int = 1
    matrix: str | None = None


@dataclass(frozen=True)
class Subject:
    """One kernel to inspect.

    Attributes:
        label: the kernel's name for people, such as "forward".
        request: what to compile; its target must be "cubin".
        device: whose occupancy to compute; its architecture is the request's.
        num_threads: threads of a block.
        shared_bytes: dynamic shared memory of a block.
        dtype, head_dim, head_dim_v, tile: for the table only; a head_dim_v of 0 is that of a kernel that has no value.
        expectations: see there.
    """

    label: str
    request: CompileRequest
    device: Device
    num_threads: int
    shared_bytes: int = 0
    dtype: str = ""
    head_dim: int = 0
    tile: str = ""
    head_dim_v: int = 0
    expectations: Expectations = Expectations()


@dataclass(frozen=True)
class Report:
    """What came out for one kernel.

    Attributes:
        subject: what was asked.
        resources: registers, spills, static shared memory, barriers.
        occupancy: blocks per SM.
        opcodes: SASS opcode with modifiers -> occurrences in the code; None without nvdisasm.
        seconds: compile time.
        warnings: of the compiler.
        failures: the expectations that do not hold, one sentence each.
        cubin: the machine code.
        listing: the same as text, with encodings; None without nvdisasm.
    """

    subject: Subject
    resources: KernelResources
    occupancy: Occupancy
    opcodes: Counter[str] | None
    seconds: float
    warnings: tuple[str, ...]
    failures: tuple[str, ...]
    cubin: bytes = field(default=b"", repr=False)
    listing: str | None = field(default=None, repr=False)

    @property
    def spills(self) -> bool:
        """Whether registers overflow into local memory."""
        return self.resources.spill_store_bytes + self.resources.spill_load_bytes > 0

    @property
    def mix(self) -> dict[str, int] | None:
        """Instructions by class, in the order of `CLASSES`; None without nvdisasm."""
        if self.opcodes is None:
            return None
        mix = dict.fromkeys(CLASSES, 0)
        for opcode, count in self.opcodes.items():
            mix[classify(opcode)] += count
        return mix


class TilePlan(Protocol):
    """What the table shows of a tile."""

    @property
    def tile_q(self) -> int: ...
    @property
    def tile_kv(self) -> int: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


class KernelPlan(Protocol):
    """What inspection needs of a planned kernel; `cuflash.planning.kernel_plan.KernelPlan` is one."""

    @property
    def name(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def tile(self) -> TilePlan: ...
    @property
    def dtype(self) -> str: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def head_dim_v(self) -> int: ...

    def request(self, device: Device) -> CompileRequest: ...


def inspect_kernels(
    plans: Iterable[tuple[Device, KernelPlan]],
    expectations: Expectations | None = None,
    progress: cache.Progress | None = None,
) -> list[Report]:
    """Inspect planned kernels, each compiled to a cubin for its device's architecture even where the device is the simulator.

    Raises: what `cache.fetch` raises.
    """
    subjects = [_subject(device, plan, expectations or Expectations()) for device, plan in plans]
    return inspect(subjects, progress)


def _subject(device: Device, plan: KernelPlan, expectations: Expectations) -> Subject:
    tile = f"{plan.tile.tile_q}x{plan.tile.tile_kv} w{plan.tile.num_warps} s{plan.tile.num_stages}"
    request = dataclasses.replace(plan.request(device), arch=device.compile_arch, target="cubin")
    return Subject(
        plan.name, request, device, plan.num_threads, plan.shared_bytes, plan.dtype, plan.head_dim, tile, plan.head_dim_v, expectations
    )


def inspect(subjects: Iterable[Subject], progress: cache.Progress | None = None) -> list[Report]:
    """Compile all subjects, several at a time, and report on every kernel of each, in order.

    Raises: what `cache.fetch` raises.
    """
    subjects = list(subjects)
    artifacts = cache.fetch_many([subject.request for subject in subjects], progress=progress)
    with ThreadPoolExecutor(4) as pool:
        listings = list(pool.map(disassembly.disassemble, [artifact.data for artifact in artifacts]))
    reports = []
    for subject, artifact, listing in zip(subjects, artifacts, listings, strict=True):
        counts = None if listing is None else instruction_counts(listing)
        for resources in artifact.resources:
            opcodes = None if counts is None else counts.get(resources.entry)
            report = _report(subject, resources, opcodes, artifact.seconds, artifact.warnings)
            reports.append(dataclasses.replace(report, cubin=artifact.data, listing=listing))
    return reports


def _report(
    subject: Subject, resources: KernelResources, opcodes: Counter[str] | None, seconds: float, warnings: tuple[str, ...]
) -> Report:
    resident = occupancy(
        subject.device,
        threads=subject.num_threads,
        registers=resources.registers,
        shared_bytes=resources.static_shared_bytes + subject.shared_bytes,
        barriers=resources.barriers,
    )
    report = Report(subject, resources, resident, opcodes, seconds, warnings, ())
    return dataclasses.replace(report, failures=tuple(_failures(report)))


def _failures(report: Report) -> Iterable[str]:
    wanted, resources = report.subject.expectations, report.resources
    if resources.registers > wanted.max_registers:
        yield f"{resources.registers} registers, expected at most {wanted.max_registers}"
    if report.spills and not wanted.spills:
        yield f"spills {resources.spill_store_bytes} bytes of stores and {resources.spill_load_bytes} bytes of loads, expected none"
    if report.occupancy.blocks < wanted.min_blocks:
        yield f"{report.occupancy.blocks} blocks per SM for want of {report.occupancy.limiter}, expected at least {wanted.min_blocks}"
    if wanted.matrix is not None and report.opcodes is not None:
        matrix = [opcode for opcode in report.opcodes if classify(opcode) == "matrix"]
        if not any(opcode.startswith(wanted.matrix) for opcode in matrix):
            yield f"no matrix instruction {wanted.matrix}*, only {', '.join(matrix) or 'none at all'}"


# -------------------------------------------------------------------------------------------------------------------------------- rendering

_HEADER = ("arch", "kernel", "dtype", "D", "tile", "regs", "spill B", "static B", "dynamic B", "CTA/SM", "limit", *CLASSES, "s")


def table(reports: Sequence[Report]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows as text. "spill B" is bytes stored + loaded, "s" compile seconds, "-" what is not known."""
    rows = []
    for report in reports:
        subject, resources, mix = report.subject, report.resources, report.mix
        rows.append(
            (
                subject.device.arch,
                subject.label,
                subject.dtype or "-",
                head_dims(subject.head_dim, subject.head_dim_v or subject.head_dim) if subject.head_dim else "-",
                subject.tile or "-",
                str(resources.registers),
                f"{resources.spill_store_bytes}+{resources.spill_load_bytes}" if report.spills else "0",
                str(resources.static_shared_bytes),
                str(subject.shared_bytes),
                str(report.occupancy.blocks),
                report.occupancy.limiter,
                *("-" if mix is None else str(mix[name]) for name in CLASSES),
                f"{report.seconds:.2f}",
            )
        )
    return _HEADER, rows


def remarks(reports: Sequence[Report]) -> list[str]:
    """What stands below the table: failures, compiler warnings, and how to get a missing instruction mix."""
    lines = []
    for report in reports:
        name = f"{report.subject.device.arch} {report.subject.label} {report.subject.dtype} {report.subject.head_dim or ''}".strip()
        lines += [f"{name}: {text}" for text in (*report.failures, *report.warnings)]
    if any(report.opcodes is None for report in reports) and disassembly.find_nvdisasm() is None:
        lines.append(NVDISASM_HINT)
    return lines


def render(reports: Sequence[Report], stream: TextIO | None = None) -> None:
    """Print a table and the remarks to `stream`, by default standard output: with rich if there is one and the stream is a terminal."""
    stream = stream or sys.stdout
    header, rows = table(reports)
    fits = _plain_width(header, rows) <= shutil.get_terminal_size().columns  # rich would cut cells where the plain table only wraps lines
    if not (stream.isatty() and fits and _render_with_rich(header, rows, [report.spills for report in reports], stream)):
        stream.write(_plain_table(header, rows))
    for line in remarks(reports):
        stream.write(line + "\n")


def _plain_width(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> int:
    """Columns of the table with rich's three characters between cells."""
    return sum(max(map(len, column)) + 3 for column in zip(header, *rows, strict=True)) + 1


def _plain_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:])) + "\n"


def _render_with_rich(header: tuple[str, ...], rows: list[tuple[str, ...]], marked: list[bool], stream: TextIO) -> bool:
    """The table in a terminal's width, spilling kernels in red; False without rich."""
    try:
        console = importlib.import_module("rich.console").Console(file=stream)
        view = importlib.import_module("rich.table").Table(header_style="bold")
    except ImportError:
        return False
    for name in header:
        view.add_column(name, justify="right")
    for row, mark in zip(rows, marked, strict=True):
        view.add_row(*row, style="red" if mark else None)
    console.print(view)
    return True
