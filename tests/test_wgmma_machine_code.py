"""The machine code of the wgmma forward kernel: nothing spills, nothing is serialised, and products in flight have their registers to themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy
import pytest
from test_kernels_compile import is_quick, named

import cuflash
from cuflash.cli.inspection import Report, inspect_kernels
from cuflash.hardware import device
from cuflash.jit import cache, disassembly
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import tile_choice
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import FORWARD_WGMMA
from cuflash.planning.offline import offline_kernels
from cuflash.problem.features import NO_FEATURES, FeatureSet
from cuflash.problem.tile import Tile
from cuflash.timing import sass
from cuflash.timing.control_flow import find_loops, hides_on_fma, steady_trace, tile_loop
from cuflash.timing.sass import Function, Instruction

pytest.importorskip("cupy")

ON = device.of_arch("sm_90", "gpu")
CASES = pytest.mark.parametrize(
    ("dtype", "head_dim", "is_causal"), [("float16", 64, True), ("bfloat16", 64, False), ("float16", 128, False), ("bfloat16", 128, True)]
)


def default_tile(dtype: str, head_dim: int, is_causal: bool) -> Tile:
    return tile_choice.default_tile(KernelCase(FORWARD_WGMMA, dtype, head_dim, is_causal=is_causal), ON)


def report_of(
    dtype: str,
    head_dim: int,
    is_causal: bool,
    tile: Tile | None = None,
    features: FeatureSet = NO_FEATURES,
    head_dim_v: int = 0,
    **lengths: bool,
) -> Report:
    case = KernelCase(FORWARD_WGMMA, dtype, head_dim, head_dim_v=head_dim_v, features=features, is_causal=is_causal)
    kernels = offline_kernels(
        ON, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v or None, is_causal=is_causal, backward=False, features=features, **lengths,
        tile={"forward_wgmma": tile or tile_choice.default_tile(case, ON)},
    )  # fmt: skip
    (report,) = inspect_kernels((ON, kernel) for kernel in kernels if kernel.name == "forward_wgmma")
    return report


def code_of(report: Report) -> Function:
    pytest.importorskip("nvidia.cu13")  # nvdisasm
    return sass.read_functions(cache.fetch(report.subject.request).data)[report.resources.entry]


def loops_of(function: Function) -> list[Function]:
    """The code of loops, without branches from behind the end back to a wait that was in vain."""
    loops = [function[loop.head : loop.last + 1] for loop in find_loops(function)]
    return [loop for loop in loops if not any(i.base == "EXIT" for i in loop)]


def assert_as_meant(report: Report, spilled: int = 0) -> None:
    """At most so many bytes are spilled."""
    resources = report.resources
    assert resources.spill_store_bytes <= spilled, named(report)
    assert spilled or resources.spill_load_bytes == resources.stack_bytes == 0, named(report)
    assert report.warnings == (), named(report)  # C7510 to C7519 among them
    assert resources.static_shared_bytes == 0
    assert resources.registers == 65536 // report.subject.num_threads // 8 * 8, (
        "of which setmaxnreg hands on all: with fewer it waits for ever"
    )
    assert report.occupancy.blocks == 1
    if disassembly.find_nvdisasm() is not None:
        assert report.listing is not None
        assert_left_alone(sass.parse_listing(report.listing)[report.resources.entry])


def assert_left_alone(function: Function) -> None:
    """Nobody touches the registers of products in flight, in any loop.

    Some assemblers put other things into the registers of an A that a product still reads (those of CUDA 12.8 and 12.9 are said to).
    """
    inner = [loop for loop in loops_of(function) if any(i.base == "HGMMA" for i in loop)]
    assert inner
    for loop in inner:
        busy_registers = [(instruction, busy) for instruction, busy in in_flight(loop) if busy]
        assert busy_registers
        assert [instruction for instruction, busy in busy_registers if registers_of(instruction) & busy] == []


@pytest.mark.sample(2)
@CASES
def test_no_spills_no_serialised_products_quick_and_hot_loops(
    dtype: str, head_dim: int, is_causal: bool, compilation_seconds: dict[CompileRequest, float]
) -> None:
    report = report_of(dtype, head_dim, is_causal)
    assert_as_meant(report)
    assert is_quick(report, compilation_seconds), f"{named(report)}: {report.seconds:.2f} seconds"
    if disassembly.find_nvdisasm() is not None:
        assert_hot_loops(report, dtype, head_dim, is_causal)


@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dim", [192, 256])
@pytest.mark.parametrize("features", [NO_FEATURES, FeatureSet(attn_mask="float32"), FeatureSet(dropout=True)], ids=str)
def test_two_warpgroups_with_most_registers(features: FeatureSet, head_dim: int) -> None:
    """Nothing is cut and there are no lists, so the warp that copies has to do with 24."""
    assert_as_meant(report_of("bfloat16", head_dim, False, features=features))


ALL = FeatureSet(window=True, softcap=True, alibi=True, sinks=True)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "features"),
    [(256, 0, NO_FEATURES), (256, 0, FeatureSet(window=True)), (64, 0, ALL), (128, 0, ALL), (96, 0, FeatureSet(alibi=True)), (192, 128, FeatureSet(softcap=True))],
    ids=str,
)  # fmt: skip
def test_other_head_dims_and_features_fit_the_registers(head_dim: int, head_dim_v: int, features: FeatureSet) -> None:
    report = report_of("float16", head_dim, True, features=features, head_dim_v=head_dim_v)
    assert_as_meant(report)


@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_scales_that_are_not_positive_fit_the_registers(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide heads then have no Q in registers, with which they spilled."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setenv("CUFLASH_FORWARD_WGMMA", "1")
    (kernel,) = cuflash.plan(*[numpy.zeros((1, 300, 1, head_dim), "float16")] * 3, scale=-0.1).kernels
    (report,) = inspect_kernels([(ON, kernel)])
    assert_as_meant(report)


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("lengths", ["varlen", "seqlens_kv"])
def test_lengths_fit_the_registers(lengths: str, head_dim: int) -> None:
    assert_as_meant(report_of("bfloat16", head_dim, True, **{lengths: True}))


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "features",
    [FeatureSet(attn_mask=kind) for kind in ("bool", "bfloat16", "float32")] + [FeatureSet(segments=True), FeatureSet(prefix=True), FeatureSet(dropout=True)], ids=str
)  # fmt: skip
def test_masks_and_dropout_fit_the_registers(features: FeatureSet, head_dim: int) -> None:
    assert_as_meant(report_of("float16", head_dim, True, features=features))


def test_other_segments_are_hidden_on_the_fma_unit() -> None:
    """The assembler makes no selections of it, in the first step and in the loop, whose ALU has no time for them."""
    tile, features = Tile(192, 112, 12, 2), FeatureSet(segments=True)
    code = code_of(report_of("float16", 64, True, tile, features))
    assert sum(map(hides_on_fma, code)) == 2 * tile.tile_kv // 2
    loop = tile_loop(code, masked=True)
    assert sum(map(hides_on_fma, steady_trace(code, loop, masked=True).instructions)) == tile.tile_kv // 2
    assert not any(map(hides_on_fma, steady_trace(code, loop).instructions))


@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_warps", [8, 12])
def test_the_longest_tiles_fit_the_registers(num_warps: int, head_dim: int) -> None:
    """Those that the rules allow, of which there is none longer by 16 keys."""
    legal = tile_choice.legal_tiles_for(KernelCase(FORWARD_WGMMA, "bfloat16", head_dim), ON)
    tile = max((tile for tile in legal if tile.num_warps == num_warps), key=lambda tile: (tile.tile_kv, tile.num_stages))
    assert_as_meant(report_of("bfloat16", head_dim, True, tile))


def assert_hot_loops(report: Report, dtype: str, head_dim: int, is_causal: bool) -> None:
    """Products of both kinds, and copies of boxes."""
    function, tile = code_of(report), default_tile(dtype, head_dim, is_causal)
    kind = "F32" if dtype == "float16" else "F32.BF16"
    scores, outputs = f"HGMMA.64x{tile.tile_kv}x16.{kind}", f"HGMMA.64x{head_dim}x16.{kind}"
    loops = loops_of(function)
    hot = [loop for loop in loops if {scores, outputs} <= {i.opcode for i in loop}]
    assert len(hot) == 2, "tiles that all rows see, and the others"
    for loop in hot:
        opcodes = [i.opcode for i in loop]
        assert opcodes.count(scores) == head_dim // 16 + (tile.tile_kv // 16 if scores == outputs else 0)
        assert opcodes.count(outputs) == tile.tile_kv // 16 + (head_dim // 16 if scores == outputs else 0)
        assert opcodes.count("WARPGROUP.DEPBAR.LE") == 3, "for scores, for O, and for O where a reference rises"
        assert opcodes.count("MUFU.EX2") == tile.tile_kv // 2 + 2
        assert not {"LDL", "STL", "LDS", "STS", "LDG", "STG"} & {i.base for i in loop}
    assert sum(i.base == "UTMALDG" for loop in loops for i in loop) >= 2 * head_dim // 64
    if is_causal:
        assert_counter_is_not_waited_for(function)


def assert_counter_is_not_waited_for(function: Function) -> None:
    """Q, K and V of a tile are asked for between the question which tile is next and the first look at the answer."""
    asked = next(index for index, instruction in enumerate(function) if instruction.base == "ATOMG")
    answered = function[asked].control.write_scoreboard
    looked = next(index for index in range(asked + 1, len(function)) if answered in function[index].control.waits)
    assert sum(instruction.base == "UTMALDG" for instruction in function[asked:looked]) >= 3


def registers_of(instruction: Instruction) -> set[int]:
    """Of an address one, or two where it says so; of what is moved as many as the instruction says."""
    wide = 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1
    found = re.findall(r"(\[)?\bR(\d+)\b(\.64)?", instruction.operands)
    return {int(number) + i for address, number, is_pair in found for i in range((2 if is_pair else 1) if address else wide)}


def in_flight(code: Function) -> Iterator[tuple[Instruction, set[int]]]:
    """Every instruction but products, from top to bottom, with the registers of D and A that products before it may still use."""
    groups: list[set[int]] = [set()]
    is_reached = True  # by what stands before; not behind a branch that is always taken
    jumping: dict[int, list[list[set[int]]]] = {}  # groups of those who come by a branch, by where it goes to
    for index, instruction in enumerate(code, code[0].address // sass.INSTRUCTION_BYTES):
        for others in jumping.pop(index, ()):
            longer, shorter = sorted((groups, others), key=len, reverse=True) if is_reached else (others, [])
            is_reached = True
            groups = [*longer[: len(longer) - len(shorter)], *map(set.union, longer[len(longer) - len(shorter) :], shorter)]
        if instruction.base == "HGMMA":
            rows, columns = map(int, re.findall(r"\d+", instruction.opcode)[:2])
            operands = [int(operand[1:]) for operand in re.findall(r"\bR\d+\b", instruction.operands)]
            groups[-1] |= set(range(operands[0], operands[0] + rows * columns // 128))
            if not instruction.operands.split(", ")[1].startswith("gdesc"):
                groups[-1] |= set(range(operands[1], operands[1] + 4))
            if "gsb0" in instruction.operands:
                groups.append(set())
            continue
        if instruction.opcode == "WARPGROUP.DEPBAR.LE":
            pending = int(instruction.operands.split(", ")[1], 16)
            groups = groups[-1 - pending :]
        if instruction.base == "BRA" and instruction.target is not None and instruction.target > index:  # BSSY only names where lanes meet
            jumping.setdefault(instruction.target, []).append([set(group) for group in groups])
        if is_reached:
            yield instruction, set().union(*groups)
        if instruction.base == "BRA" and not instruction.predicate:
            is_reached = False
