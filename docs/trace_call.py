"""Follow one call from its arguments to the launch of a kernel, and fill docs/one-call.md with what is seen at each step. No GPU is needed.

python docs/trace_call.py          # rewrites the page; tests/test_docs.py compares
"""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

from cuflash.hardware import device
from cuflash.hardware.occupancy import occupancy
from cuflash.jit import cache, compiler, disassembly
from cuflash.jit.compiler import CompileRequest
from cuflash.planning.argument_structs import WORD
from cuflash.planning.planner import make_plan
from cuflash.problem.checks import make_problem
from cuflash.problem.operands import Operands, borrowed
from cuflash.problem.options import Options
from cuflash.runtime.prepared import PreparedForward

PAGE = Path(__file__).resolve().parent / "one-call.md"
INSTRUCTIONS = {
    "ldmatrix": "ldmatrix", "mma.sync": "mma.sync", "ex2.approx": "exponentials", "cp.async.cg": "copies of 16 bytes", "bar.sync": "barriers", "st.global": "stores of results"
}  # fmt: skip

operands = Operands(*(numpy.zeros((2, 300, 8, 64), "float16") for _ in range(3)))
options = Options(is_causal=True, window=(127, 0))
arrays = borrowed(operands, options)
problem = make_problem(arrays, options)
plan = make_plan(problem, device.of_arch("sm_80", "gpu"))
(kernel,) = plan.kernels
request = kernel.request(plan.device)


def _block(language: str, text: str) -> list[str]:
    return [f"```{language}", *text.strip("\n").splitlines(), "```"]


def typed_call() -> list[str]:
    changed = [f"{name}={value!r}" for name, value in options._asdict().items() if value != Options._field_defaults[name]]
    return _block("python", f"operands = Operands(query, key, value)\noptions = Options({', '.join(changed)})")


def problem_fields() -> list[str]:
    names = ("dtype", "batch", "seqlen_q", "seqlen_kv", "num_heads_q", "head_dim", "scale", "is_causal", "query")
    features = (f"features.{name} = {getattr(problem.features, name)}" for name in ("window_low", "window_high"))
    return _block("", "\n".join([*(f"{name} = {getattr(problem, name)}" for name in names), *features]))


def plan_text() -> list[str]:
    return _block("", str(plan))


def config() -> list[str]:
    return _block("cpp", kernel.config)


def ptx() -> list[str]:
    text = bytes(cache.fetch(CompileRequest(request.source, request.config, request.arch, "ptx")).data).decode()
    entry = re.search(r"\.visible \.entry \w+\(\n.*?\n\)", text, re.S)
    assert entry is not None
    counts = {name: len(re.findall(rf"^\s+(?:@\S+ )?{re.escape(opcode)}", text, re.M)) for opcode, name in INSTRUCTIONS.items()}
    return [
        *_block("", entry[0]),
        "",
        f"In its text by {compiler_version()}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".",
    ]


def sass() -> list[str]:
    artifact = cache.fetch(request)
    (resources,) = artifact.resources
    listing = disassembly.disassemble(bytes(artifact.data))
    if listing is None:
        raise SystemExit(disassembly.NVDISASM_HINT)
    classes = dict.fromkeys(disassembly.CLASSES, 0)
    for opcode, count in disassembly.instruction_counts(listing)[kernel.entry].items():
        classes[disassembly.classify(opcode)] += count
    held = occupancy(plan.device, threads=kernel.num_threads, registers=resources.registers, shared_bytes=kernel.shared_bytes)
    spilled = resources.spill_store_bytes + resources.spill_load_bytes
    return [
        f"{resources.registers} registers per thread and {spilled} bytes of spills: an SM holds {held.blocks} blocks at a time, for want of more {held.limiter}.",
        "",
        "| " + " | ".join(classes) + " |",
        "|" + "---|" * len(classes),
        "| " + " | ".join(map(str, classes.values())) + " |",
    ]


def launch() -> list[str]:
    """What the driver is told, and the bytes of the struct that are not 0."""
    executable: Any = None  # nothing is loaded
    (prepared,) = PreparedForward(plan, [executable], arrays, None, None).launches
    addresses = {name: index + 1 for index, name in enumerate(prepared.struct.names)}
    data = bytes(prepared.struct.fill(addresses))
    rows = [
        f"{kernel.num_blocks} blocks of {kernel.num_threads} threads, {kernel.shared_bytes} bytes of shared memory, and {len(data)} bytes of `{kernel.spec.arguments}`:",
        "",
    ]
    rows += ["| offset | field | value |", "|---|---|---|"]
    named = {address: name for name, address in addresses.items()}
    for path, offset, scalar in kernel.spec.arguments.scalars():
        (value,) = struct.unpack_from("=" + scalar.format, data, offset)
        if value:
            shown = f"address of {named[int(value)]}" if scalar is WORD else f"{value:g}" if scalar.format == "f" else str(value)
            rows.append(f"| {offset} | `{path}` | {shown} |")
    return rows


def backward() -> list[str]:
    """The plan of the backward pass, and what its kernels have to do with each other."""
    planned = make_plan(problem, plan.device, backward=True)
    rows = [
        "| kernel | its blocks own rows of | and keep | they stream | and compute | workspace that it writes or reads |",
        "|---|---|---|---|---|---|",
    ]
    used = {buffer.name for buffer in planned.workspace}
    for kernel in planned.kernels:
        spec = kernel.spec
        computed = (*spec.scores, *spec.outputs)
        cells = (spec.stationary, spec.streamed, computed, [name for name in spec.workspace if name in used])
        rows.append(f"| `{spec.name}` | {spec.rows_of} | " + " | ".join(", ".join(cell) for cell in cells) + " |")
    return [*_block("", str(planned)), "", *rows]


STEPS = {
    "options": typed_call,
    "problem": problem_fields,
    "plan": plan_text,
    "config": config,
    "ptx": ptx,
    "sass": sass,
    "launch": launch,
    "backward": backward,
}


def compiler_version() -> str:
    """Whose PTX and machine code the page shows."""
    return f"NVRTC {compiler.nvrtc_text()}"


OF_THE_COMPILER = ("ptx", "sass")
"""What another version of NVRTC may make otherwise."""


def filled(page: str, steps: tuple[str, ...] = tuple(STEPS)) -> str:
    """The page with these steps seen anew."""

    def step(match: re.Match[str]) -> str:
        return "\n".join([match[1], *(STEPS[match[2]]() if match[2] in steps else [match[3].rstrip("\n")]), match[4]])

    return re.sub(r"(<!-- generated: (\w+) -->)\n(.*?)(<!-- end of \2 -->)", step, page, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
