"""Compare the machine code of the default kernels of two checkouts: what is the same, and what registers, spills and loops became where it is not.

python benchmarks/machine_code.py BEFORE [AFTER] [--arch sm_80 …] [--head-dim 64 …] [--dtype float16 …] [--all]

BEFORE and AFTER are folders of checkouts, AFTER by default this one. Each plans calls of its own with `cuflash.plan`, a public function, in a process of
its own; the compiler, its options and nvdisasm are those of this checkout. Needs no GPU: NVRTC through CuPy, nvdisasm, and about two seconds for a kernel.

Two kernels are the same if their instructions are, without addresses and line information. The loop of a kernel is the shortest one that has half of its matrix
instructions, or where it has none half of its multiply-adds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuflash.hardware import device
from cuflash.jit import cache, disassembly
from cuflash.jit.compiler import CompileRequest

HERE = Path(__file__).resolve().parents[1]
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100")

PLANNING = """
import itertools, json, sys
import numpy, cuflash
for dtype, head_dim, is_causal, backward in json.loads(sys.argv[1]):
    bits = numpy.zeros((2, 1024, 4, head_dim), "uint16" if dtype == "bfloat16" else dtype)
    x = cuflash.bfloat16(bits) if dtype == "bfloat16" else bits
    for kernel in cuflash.plan(x, x, x, is_causal=is_causal, backward=backward).kernels:
        tile = kernel.tile
        tile = f"{tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages}"
        case = [dtype, head_dim, is_causal, kernel.name]
        print(json.dumps({"case": case, "source": kernel.source, "config": kernel.config, "tile": tile}))
"""
"""What a checkout is asked. It uses names only that every version has."""


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel.

    Attributes:
        tile: of the plan.
        registers: per thread.
        spills: bytes stored and loaded.
        instructions: without addresses; a label stands for itself.
        loop: how many stand in its loop; 0 where there is none.
    """

    tile: str
    registers: int
    spills: int
    instructions: tuple[str, ...]
    loop: int

    @property
    def length(self) -> int:
        """Instructions in the code."""
        return sum(not line.endswith(":") for line in self.instructions)


# --- Machine code -------------------------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;|^(\.L\w+):")
_BRANCH = re.compile(r"\bBRA\S*.*?`\((\.L\w+)\)")


def instructions_of(listing: str, entry: str) -> tuple[str, ...]:
    """The lines of one function of nvdisasm's text: instructions, and labels with a colon. What fills up the end is left out."""
    body = listing.partition(f"\n.text.{entry}:\n")[2].partition("\n//-----")[0]
    found = [f"{match[2]}:" if match[2] else " ".join(match[1].split()) for match in map(_LINE.match, body.splitlines()) if match]
    return tuple(line for line in found if line != "NOP")


def loop_of(instructions: Sequence[str]) -> int:
    """How many instructions stand in the loop of the products; 0 where nothing is multiplied in a loop."""
    labels = {line.removesuffix(":"): index for index, line in enumerate(instructions) if line.endswith(":")}
    classes = [disassembly.classify(re.sub(r"^@!?U?P\w+ ", "", line).split()[0]) if not line.endswith(":") else "" for line in instructions]
    hot = [name == "matrix" for name in classes]
    if not any(hot):
        hot = ["FFMA" in line for line in instructions]
    lengths = [0]
    for index, line in enumerate(instructions):
        branch = _BRANCH.search(line)
        start = labels.get(branch[1], index) if branch else index
        if start < index and 2 * sum(hot[start:index]) >= max(1, sum(hot)):
            lengths.append(sum(not other.endswith(":") for other in instructions[start : index + 1]))
    return min(lengths[1:], default=0)


# --- Checkouts ----------------------------------------------------------------------------------------------------------------------------

Case = tuple[str, str, int, bool, str]
"""Architecture, element type, head dimension, whether causal, kernel."""


def codes_of(checkout: Path, archs: Iterable[str], calls: Sequence[tuple[str, int, bool, bool]]) -> dict[Case, Code]:
    """The machine code of the kernels of these calls as a checkout plans and writes them."""
    os.environ["CUFLASH_KERNELS_DIR"] = str(checkout / "kernels")
    cache.reset_memory()  # which knows a kernel by its constants
    codes: dict[Case, Code] = {}
    for arch in archs:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "CUFLASH_SIMULATOR_ARCH": arch}
        asked = subprocess.run(
            [sys.executable, "-c", PLANNING, json.dumps(calls)], env=environment, cwd=checkout, text=True, capture_output=True, check=False
        )
        if asked.returncode:
            raise SystemExit(f"{checkout} plans nothing:\n{asked.stderr}")
        for line in asked.stdout.splitlines():
            kernel = json.loads(line)
            dtype, head_dim, is_causal, name = kernel["case"]
            codes[arch, dtype, head_dim, is_causal, name] = _compiled(kernel, arch)
    return codes


def _compiled(kernel: dict[str, Any], arch: str) -> Code:
    artifact = cache.fetch(CompileRequest(kernel["source"], kernel["config"], device.of_arch(arch, "gpu").compile_arch, "cubin"))
    (resources,) = artifact.resources
    listing = disassembly.disassemble(bytes(artifact.data))
    if listing is None:
        raise SystemExit(disassembly.NVDISASM_HINT)
    instructions = instructions_of(listing, resources.entry)
    spills = resources.spill_store_bytes + resources.spill_load_bytes
    return Code(kernel["tile"], resources.registers, spills, instructions, loop_of(instructions))


# --- What is printed ----------------------------------------------------------------------------------------------------------------------


def rows_of(before: dict[Case, Code], after: dict[Case, Code], *, every: bool) -> list[str]:
    """A table: a row for each kernel, with a causal mask and without, or for `every` one that differs. Kernels of one checkout alone are named below it."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in before:
        if case in after:
            arch, dtype, head_dim, is_causal, name = case
            alone = (arch, dtype, str(head_dim)) if every else ()
            if not every or before[case].instructions != after[case].instructions:
                groups.setdefault((name, "causal" if is_causal else "none", *alone), []).append(case)
    heading = ["kernel", "mask", *(("arch", "dtype", "D") if every else ()), "kernels", "the same", "with another tile", "registers", "bytes spilled", "instructions", "in the loop"]  # fmt: skip
    rows = [_row(heading), "|" + "---|" * len(heading)]
    for group, cases in sorted(groups.items()):
        pairs = [(before[case], after[case]) for case in cases]
        same = sum(old.instructions == new.instructions for old, new in pairs)
        tiles = sum(old.tile != new.tile for old, new in pairs)
        columns = [
            _change([(getattr(old, name), getattr(new, name)) for old, new in pairs]) for name in ("registers", "spills", "length", "loop")
        ]
        rows.append(_row([*group, str(len(cases)), str(same), str(tiles), *columns]))
    for side, others in ((before, after), (after, before)):
        alone = sorted({case[-1] for case in side if case not in others})
        if alone:
            rows.append(f"\nOnly {'before' if side is before else 'after'}: {', '.join(alone)}.")
    return rows


def _change(pairs: list[tuple[int, int]]) -> str:
    """One number before and after, or by how much several changed."""
    if len(set(pairs)) == 1:
        old, new = pairs[0]
        return str(old) if old == new else f"{old} → {new}"
    changes = [new - old for old, new in pairs]
    if not any(changes):
        return "as many"
    return f"{min(changes):+d} to {max(changes):+d}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, nargs="?", default=HERE, help="another one (default: this one)")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help=f"architectures (default {' '.join(ARCHS)})")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128, 256], help="head dimensions (default 64 128 256)")
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"], help="element types (default float16 float32)")
    parser.add_argument("--mask", nargs="+", choices=("causal", "none"), default=["causal", "none"], help="which calls (default both)")
    parser.add_argument("--all", action="store_true", help="a row for each kernel that differs")
    given = parser.parse_args()
    calls = [
        (dtype, head_dim, mask == "causal", backward)
        for dtype in given.dtype for head_dim in given.head_dim for mask in given.mask for backward in (False, True)
    ]  # fmt: skip
    before, after = (codes_of(checkout.resolve(), given.arch, calls) for checkout in (given.before, given.after))
    print("\n".join(rows_of(before, after, every=given.all)))


if __name__ == "__main__":
    main()
