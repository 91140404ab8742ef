"""FlashAttention-2's own kernels through the timing model: what docs/performance.md puts beside the kernels of this library.

    python benchmarks/flash_attention_2.py --library …/torch/lib/libtorch_cuda.so     # writes benchmarks/results/flash_attention_2.json

torch's CUDA library holds FlashAttention-2, compiled for each architecture. cuobjdump takes the cubins out; of each case the kernel is read that the library would launch
for a sequence that its tiles divide, by its launch templates (flash_fwd_launch_template.h, flash_bwd_launch_template.h of version 2.8.3). The model is that of
`python -m cuflash predict`, so that both libraries' figures have the same errors. Needs no GPU.

What is kept are clocks of an SM for each pair of query and key of a head in the steady state, of the kernel with the products alone. Not counted are what its backward
pass does before and behind, which is about what `backward_delta` and `backward_dq_convert` do.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cuflash.hardware import device, occupancy
from cuflash.jit import disassembly
from cuflash.timing import sass
from cuflash.timing.control_flow import is_matrix, steady_trace, tile_loop
from cuflash.timing.machine import multiprocessor
from cuflash.timing.multiprocessor import STEADY_TRIPS, WARMING, steady_clocks_of_roles
from cuflash.timing.operations import Role, operations

RESULTS = Path(__file__).resolve().parent / "results" / "flash_attention_2.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_120")
HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Choice:
    """What the launch templates take: tile_q, tile_kv, warps, bytes of shared memory, and the constants by which the kernel's name is known."""

    tile_q: int
    tile_kv: int
    warps: int
    shared_bytes: int
    constants: str


def forward_choice(arch: str, head_dim: int, causal: bool) -> Choice:
    """As `run_mha_fwd_hdim64`, `…128` and `…256` choose, without dropout."""
    on = device.of_arch(arch)
    if head_dim == 64:
        tile = (128, 128, 4)
    elif head_dim == 128:
        small = (64, 64, 4) if causal else (128, 32, 4)
        tile = small if on.capability in (86, 87, 89) else (128, 64, 4)
    else:
        fits_once = on.shared_memory_per_block >= 2 * 256 * (128 + 2 * 64) and on.shared_memory_per_sm < 4 * 256 * (64 + 2 * 64)
        tile = (128, 64, 8) if fits_once else (64, 64, 4)
    tile_q, tile_kv, warps = tile
    return Choice(tile_q, tile_kv, warps, 2 * head_dim * (tile_q + 2 * tile_kv), _mangled(head_dim, *tile, False, False))


def backward_choice(arch: str, head_dim: int) -> Choice:
    """As `run_mha_bwd_hdim64`, `…128` and `…256` choose, without dropout."""
    on = device.of_arch(arch)
    large = on.shared_memory_per_block >= 144 * 1024
    double_buffered, v_in_registers = True, not large
    if head_dim == 64:
        tile, layout = ((128, 128, 8), (4, 4, 4)) if large else ((64, 128, 8), (2, 4, 4))
    elif head_dim == 128:
        tile, layout = ((64, 128, 8), (2, 4, 2)) if large else ((64, 64, 8), (4, 2, 2))
    else:
        tile, layout = ((64, 64, 8), (4, 2, 2)) if large else ((64, 32, 8), (4, 1, 2))
        double_buffered = on.shared_memory_per_block >= 176 * 1024
    tile_q, tile_kv, warps = tile
    keys, scores = 4 * tile_kv * head_dim, 2 * tile_q * tile_kv
    with_scores = max(keys, keys // 2 + 2 * scores) if v_in_registers else keys + 2 * scores
    shared = 2 * tile_q * head_dim * (3 if double_buffered else 2) + with_scores
    return Choice(tile_q, tile_kv, warps, shared, _mangled(head_dim, *tile, *layout, v_in_registers, not double_buffered))


def _mangled(*constants: int) -> str:
    return "".join(f"Lb{int(value)}E" if isinstance(value, bool) else f"Li{value}E" for value in constants)


def entry_pattern(choice: Choice, head_dim: int, *, backward: bool, causal: bool) -> re.Pattern[str]:
    """The kernel of a choice: float16, lengths that tiles divide, nothing but a causal mask."""
    even = head_dim <= 128
    flags = [False, causal, False, False, even, True, False] + ([] if backward else [False])
    name = "flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel" if backward else "flash_fwd_kernel"
    return re.compile(rf"{name}I\d+Flash_(?:fwd|bwd)_kernel_traitsI{choice.constants}N7cutlass6half_tE.*EE{_mangled(*flags)}EE")


@dataclass(frozen=True)
class Case:
    """One kernel's steady state, as it is kept."""

    arch: str
    head_dim: int
    causal: bool
    backward: bool
    tile: str
    registers: int
    blocks: int
    clocks_per_pair: float


def predict(cubin: Path, entry: str, arch: str, head_dim: int, choice: Choice, cuobjdump: str) -> tuple[int, int, float]:
    """Registers, resident blocks, and clocks of an SM for a pair of query and key."""
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Function {re.escape(entry)}:\s+REG:(\d+)", usage)
    assert found is not None, f"{entry} is not among the resources of {cubin}"
    registers = int(found[1])
    functions = sass.read_functions(cubin.read_bytes())
    function = functions[entry]
    backward = "flash_bwd" in entry
    expected = (5 if backward else 2) * head_dim * choice.tile_q * choice.tile_kv // (2048 * choice.warps)
    trace = steady_trace(function, tile_loop(function), expected)
    matrix = sum(map(is_matrix, trace.instructions))
    if matrix != expected:
        print(f"flash_attention_2.py: {entry}: {matrix} products in the trace, {expected} expected", file=sys.stderr)
    held = occupancy.occupancy(device.of_arch(arch), threads=32 * choice.warps, registers=registers, shared_bytes=choice.shared_bytes)
    machine = multiprocessor(arch)
    role = Role(tuple(operations(trace.instructions, machine)), choice.warps)
    clocks = steady_clocks_of_roles([role], machine, blocks=held.blocks, trips=STEADY_TRIPS, warming=WARMING)
    return registers, held.blocks, clocks * expected / matrix / held.blocks / (choice.tile_q * choice.tile_kv)


def cases(archs: Sequence[str], library: Path, cuobjdump: str) -> Iterator[Case]:
    """All cases of these architectures."""
    for arch in archs:
        with tempfile.TemporaryDirectory(prefix="cuflash-") as folder:
            subprocess.run([cuobjdump, "--extract-elf", f".{arch}.cubin", library], cwd=folder, stdout=subprocess.DEVNULL, check=True)
            names = {path: _entries(path) for path in Path(folder).glob("*.cubin")}
            for backward in (False, True):
                for head_dim in HEAD_DIMS:
                    for causal in (False, True):
                        choice = backward_choice(arch, head_dim) if backward else forward_choice(arch, head_dim, causal)
                        pattern = entry_pattern(choice, head_dim, backward=backward, causal=causal)
                        cubin, entry = next((path, name) for path, of in names.items() for name in of if pattern.search(name))
                        found = predict(cubin, entry, arch, head_dim, choice, cuobjdump)
                        tile = f"{choice.tile_q}x{choice.tile_kv} w{choice.warps}"
                        yield Case(arch, head_dim, causal, backward, tile, *found[:2], round(found[2], 5))


def _entries(cubin: Path) -> list[str]:
    return sorted({name.decode() for name in re.findall(rb"\.text\.(\w*flash_(?:fwd_kernel|bwd_dq_dk_dv)\w*)\0", cubin.read_bytes())})


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict and keep."""
    parser = argparse.ArgumentParser(description="FlashAttention-2's own kernels through the timing model.")
    parser.add_argument("--library", type=Path, required=True, help="torch's libtorch_cuda.so")
    parser.add_argument("--cuobjdump", help="which one (default: beside nvdisasm)")
    parser.add_argument("--origin", default="", help="of the library, for the record: versions of torch and of the compiler")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated (default all)")
    options = parser.parse_args(arguments)
    nvdisasm = disassembly.find_nvdisasm()
    cuobjdump = options.cuobjdump or str((nvdisasm or Path("nvdisasm")).with_name("cuobjdump"))
    found = []
    for case in cases(options.arch or ARCHITECTURES, options.library.resolve(), cuobjdump):
        print(case, flush=True)
        found.append(asdict(case))
    if not options.arch:
        RESULTS.write_text(json.dumps({"origin": options.origin, "cases": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
