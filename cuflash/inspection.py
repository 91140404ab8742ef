"""What the compiler made of the kernels, for any architecture and without a GPU: registers, spills, shared memory, occupancy, instructions.

`inspect_kernels(plans)` compiles every kernel to a cubin (through the cache) and returns one `Report` per kernel; `render(reports)` prints
them. A report is a value and raises nothing: a caller decides what `Report.failures` or `Report.spills` mean to it.

The instruction mix counts the instructions in the code, not how often they run. It needs nvdisasm, from the wheel `nvidia-cuda-nvdisasm`
or a CUDA toolkit on the PATH; without it the mix is missing and everything else is there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

from cuflash import cache, terminal_tables
from cuflash.compiler import CompileRequest, KernelResources
from cuflash.device import KIB, Device
from cuflash.tiles import head_dims

NVDISASM_HINT = "The instruction mix needs nvdisasm: pip install 'cuflash[inspect]'"

# -------------------------------------------------------------------------------------------------------------------------------- occupancy

WARP_SIZE = 32
MAX_REGISTERS_PER_THREAD = 255
_REGISTER_GRANULARITY = 256  # registers, per warp
_SUB_PARTITIONS = 4  # of an SM, each with a quarter of its registers; the warps of a block are dealt out to all four


@dataclass(frozen=True)
class SmLimits:
    """What one SM can hold at a time, besides registers and shared memory.

    Attributes:
        warps, blocks: at most so many.
        barriers: named barriers of all blocks together; None where they are never what runs out.
        reserved_shared_bytes: per block, taken by the system.
        shared_granularity: bytes that a block's shared memory is rounded up to.
    """

    warps: int
    blocks: int
    barriers: int | None
    reserved_shared_bytes: int = KIB
    shared_granularity: int = 128


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; barriers and granularity from cuda_occupancy.h.
SM_LIMITS: dict[int, SmLimits] = {
    75: SmLimits(warps=32, blocks=16, barriers=None, reserved_shared_bytes=0, shared_granularity=256),
    80: SmLimits(warps=64, blocks=32, barriers=None),
    86: SmLimits(warps=48, blocks=16, barriers=None),
    87: SmLimits(warps=48, blocks=16, barriers=None),
    89: SmLimits(warps=48, blocks=24, barriers=None),
    90: SmLimits(warps=64, blocks=32, barriers=64),
    100: SmLimits(warps=64, blocks=32, barriers=64),
    103: SmLimits(warps=64, blocks=32, barriers=64),
    120: SmLimits(warps=48, blocks=24, barriers=24),
    121: SmLimits(warps=48, blocks=24, barriers=24),
}


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel an SM holds at a time.

    Attributes:
        blocks: thread blocks (CTAs); 0 means that the kernel cannot be launched.
        warps: warps of these blocks.
        max_warps: warps that the SM could hold.
        limiter: what allows no further block: "registers", "shared memory", "warps", "barriers" or "blocks".
    """

    blocks: int
    warps: int
    max_warps: int
    limiter: str


def occupancy(device: Device, *, threads: int, registers: int, shared_bytes: int, barriers: int = 0) -> Occupancy:
    """Blocks per SM as the hardware allots them, assuming that the driver gives shared memory its largest share of the L1 cache.

    Args:
        device: whose SM.
        threads: of a block.
        registers: per thread.
        shared_bytes: static and dynamic shared memory of a block.
        barriers: named barriers of a block.
    """
    limits = SM_LIMITS[device.capability]
    warps = -(-threads // WARP_SIZE)
    allowed = {
        "registers": _blocks_by_registers(device.registers_per_sm, warps, registers),
        "shared memory": _blocks_by_shared_memory(device, shared_bytes),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "barriers": limits.barriers // barriers if limits.barriers and barriers else limits.blocks,
    }
    limiter = min(allowed, key=lambda resource: allowed[resource])
    blocks = allowed[limiter]
    return Occupancy(blocks, blocks * warps, limits.warps, limiter)


def _blocks_by_registers(registers_per_sm: int, warps: int, registers: int) -> int:
    """A warp's registers lie in one sub-partition, and a block takes room in all four as if its warps were a multiple of four."""
    if registers > MAX_REGISTERS_PER_THREAD:
        return 0
    registers_per_warp = _round_up(max(registers, 1) * WARP_SIZE, _REGISTER_GRANULARITY)
    if registers_per_warp * _round_up(warps, _SUB_PARTITIONS) > registers_per_sm:
        return 0
    warps_per_sub_partition = registers_per_sm // _SUB_PARTITIONS // registers_per_warp
    return warps_per_sub_partition * _SUB_PARTITIONS // warps


def _blocks_by_shared_memory(device: Device, shared_bytes: int) -> int:
    limits = SM_LIMITS[device.capability]
    if shared_bytes > device.shared_memory_per_block:
        return 0
    allocated = _round_up(shared_bytes + limits.reserved_shared_bytes, limits.shared_granularity)
    return device.shared_memory_per_sm // allocated if allocated else limits.blocks


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# -------------------------------------------------------------------------------------------------------------------------- instruction mix

CLASSES: tuple[str, ...] = ("matrix", "mufu", "fp32", "integer", "shared", "global", "local", "move", "control", "other")
"""Classes of instructions. "fp32" holds packed half arithmetic and conversions too; "local" is what spills and indexed arrays cause."""

_OPCODES: dict[str, str] = {
    "matrix": "HMMA IMMA BMMA DMMA QMMA OMMA HGMMA IGMMA BGMMA QGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA",
    "mufu": "MUFU",
    "fp32": "FADD FADD2 FMUL FMUL2 FFMA FFMA2 FMNMX FMNMX3 FSEL FSET FSETP FCHK FRND HADD2 HMUL2 HFMA2 HMNMX2 HSET2 HSETP2 F2F F2FP F2I "
    "F2IP I2F I2FP I2IP",
    "integer": "IADD IADD3 IMAD IMUL ISETP ISCADD IABS IMNMX IDP LEA LOP LOP3 PLOP3 SHF SHL SHR PRMT SEL POPC FLO BREV BMSK SGXT VIADD "
    "VIADDMNMX VIMNMX VIMNMX3 VABSDIFF P2R R2P",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global": "LD ST LDG STG LDGSTS RED REDG ATOM ATOMG CCTL TMALDG TMASTG TMAREDG TMAPF BLKCP BLKRED BLKPF",
    "local": "LDL STL",
    "move": "MOV MOVM S2R S2UR CS2R R2UR LDC SHFL VOTE REDUX MATCH",
    "control": "BRA BRX JMP CALL RET EXIT KILL BREAK BSSY BSYNC BMOV BAR SYNCS WARPSYNC WARPGROUP WARPGROUPSET DEPBAR LDGDEPBAR MEMBAR "
    "ERRBAR FENCE ARRIVES ELECT NANOSLEEP YIELD SETMAXREG CGABAR_ARV CGABAR_WAIT ACQBULK PREEXIT TMACMDFLUSH TMACCTL WARPGROUP_ARRIVE",
}
_CLASS_OF: dict[str, str] = {opcode: name for name, opcodes in _OPCODES.items() for opcode in opcodes.split()}

_SECTION = re.compile(r"^\.text\.(\S+):$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def classify(opcode: str) -> str:
    """The class of a SASS instruction with its modifiers: "HMMA.16816.F32" -> "matrix", "IMAD.MOV.U32" -> "move", "ULEA" -> "integer"."""
    if opcode.startswith("IMAD.MOV"):
        return "move"
    base = opcode.split(".")[0]
    if base == "LDCU":  # the one uniform instruction whose U stands at the end
        return "move"
    # The uniform datapath computes once per warp and prefixes its instructions with U.
    return _CLASS_OF.get(base) or _CLASS_OF.get(base.removeprefix("U")) or "other"


def instruction_counts(sass: str) -> dict[str, Counter[str]]:
    """nvdisasm's text -> for each function, how often each opcode (with modifiers) stands there; padding NOPs do not count."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in sass.splitlines():
        if section := _SECTION.match(line):
            current = counts.setdefault(section[1], Counter())
        elif line.startswith("//-----"):  # the next section, perhaps one of data
            current = None
        elif current is not None and (instruction := _INSTRUCTION.match(line)) and instruction[1] != "NOP":
            current[instruction[1]] += 1
    return counts


def find_nvdisasm() -> Path | None:
    """nvdisasm in the wheel `nvidia-cuda-nvdisasm` (any CUDA version), else on the PATH, else None."""
    package = importlib.util.find_spec("nvidia")
    for root in package.submodule_search_locations or () if package else ():
        for found in sorted(Path(root).glob("*/bin/nvdisasm*"), reverse=True):
            if found.stem == "nvdisasm":
                return found
    on_path = shutil.which("nvdisasm")
    return Path(on_path) if on_path else None


def disassemble(cubin: bytes) -> str | None:
    """SASS of a cubin, each instruction with its encoding; None without nvdisasm, or if it is too old for the cubin's architecture."""
    tool = find_nvdisasm()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory(prefix="cuflash-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        result = subprocess.run([tool, "-c", "-hex", path], capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else None


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
    """What inspection needs of a planned kernel; `cuflash.planning.KernelPlan` is one."""

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
        listings = list(pool.map(disassemble, [artifact.data for artifact in artifacts]))
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
    if any(report.opcodes is None for report in reports) and find_nvdisasm() is None:
        lines.append(NVDISASM_HINT)
    return lines


def render(reports: Sequence[Report], stream: TextIO | None = None) -> None:
    """Print a table and the remarks to `stream`, by default standard output: with rich if there is one and the stream is a terminal."""
    stream = stream or sys.stdout
    header, rows = table(reports)
    spilling = [number for number, report in enumerate(reports) if report.spills]
    terminal_tables.write(terminal_tables.Table(header, rows, marked=spilling), stream)
    for line in remarks(reports):
        stream.write(line + "\n")
