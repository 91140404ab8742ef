"""Every kernel compiles for every architecture, without a GPU, and the machine code is what was meant: no spills, matrix instructions.

The simulator runs PTX, so registers and SASS are nowhere else looked at.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from cuflash.cli.inspection import Report, inspect_kernels
from cuflash.hardware import device
from cuflash.hardware.device import ARCHITECTURES, Device
from cuflash.jit import cache, compiler, disassembly
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import tile_choice, tile_model, tile_rules
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import BACKWARD_DQ_MASK, BACKWARD_MASK, TILED_KERNELS
from cuflash.planning.offline import offline_kernels
from cuflash.problem.features import NO_FEATURES, FeatureSet
from cuflash.problem.tile import Tile

pytest.importorskip("cupy")

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (64, 128, 256, 512)
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120")
"""One of each generation."""
BY_KEYS = [name for name, kernel in TILED_KERNELS.items() if kernel.owns_keys]
MAX_SECONDS = 3.0
YARDSTICK_SECONDS = 1.0
FEATURES = {
    "boolean_mask": FeatureSet(attn_mask="bool"),
    "additive_mask": FeatureSet(attn_mask="float32"),
    "narrow_mask": FeatureSet(attn_mask="float16"),
    **{flag.name: FeatureSet(**{flag.name: True}) for flag in fields(FeatureSet) if flag.name != "attn_mask"},
}
LENGTHS = ("varlen", "seqlens_kv")
"""Arguments of `offline_kernels` for sequences of different lengths."""
CAUSAL = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def reports_of(
    on: Device, dtype: str, head_dim: int, is_causal: bool = True, head_dim_v: int | None = None,
    features: FeatureSet = NO_FEATURES, varlen: bool = False, seqlens_kv: bool = False,
) -> list[Report]:  # fmt: skip
    options: dict[str, Any] = {
        "dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v, "is_causal": is_causal, "features": features, "varlen": varlen,
        "seqlens_kv": seqlens_kv,
    }  # fmt: skip
    kernels = list(offline_kernels(on, **options))
    for spec in (BACKWARD_MASK, BACKWARD_DQ_MASK) if features.additive_mask else ():  # both ways to the gradient of a mask
        tile = tile_choice.default_tile(KernelCase(spec, dtype, head_dim, head_dim_v=head_dim_v or 0, features=features), on)
        of_mask = offline_kernels(on, **options, need_attn_mask_grad=True, tile={spec.name: tile})
        kernels += [kernel for kernel in of_mask if kernel.spec == spec]
    return inspect_kernels((on, kernel) for kernel in kernels)


def named(report: Report) -> str:
    return f"{report.subject.label} with {report.subject.tile}"


def processor_seconds(request: CompileRequest) -> float:
    """Of a compilation now."""
    start = time.thread_time()
    compiler.compile_kernel(request)
    return time.thread_time() - start


def yardstick_seconds() -> float:
    """What the forward kernel of a head of 64 takes now: other work on the same core slows all compilations."""
    on = device.of_arch("sm_80", "gpu")
    return processor_seconds(next(iter(offline_kernels(on, dtype="float16", head_dim=64, is_causal=True))).request(on))


def is_quick(report: Report, compilation_seconds: Mapping[CompileRequest, float]) -> bool:
    """Whether it was compiled within `MAX_SECONDS`, or would be where the forward kernel of a head of 64 takes the usual `YARDSTICK_SECONDS`."""
    request = report.subject.request
    seconds = compilation_seconds.get(request, report.seconds)
    if seconds <= MAX_SECONDS:
        return True
    allowed = MAX_SECONDS * max(1.0, yardstick_seconds() / YARDSTICK_SECONDS)
    return seconds <= allowed or processor_seconds(request) <= allowed


@pytest.mark.sample(4)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="D{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_no_warnings_quick_and_on_tensor_cores(
    arch: str, dtype: str, head_dim: int, compilation_seconds: dict[CompileRequest, float]
) -> None:
    """With the default tiles; the causal kernels, which are the larger ones."""
    on = device.of_arch(arch, "gpu")
    reports = reports_of(on, dtype, head_dim)
    assert len(reports) in (4, 5)
    for report in reports:
        resources = report.resources
        tolerated = report.subject.request.tolerated_spills  # of tiles that were measured or predicted with their spills
        assert resources.spill_store_bytes <= tolerated, named(report)
        assert resources.spill_load_bytes <= 2 * tolerated, named(report)
        assert resources.stack_bytes <= tolerated, named(report)
        if not resources.spill_store_bytes:
            assert (resources.spill_load_bytes, resources.stack_bytes) == (0, 0), named(report)
        assert resources.static_shared_bytes == 0, named(report)
        assert report.warnings == (), named(report)
        assert report.occupancy.blocks >= 1, named(report)
        assert is_quick(report, compilation_seconds), f"{named(report)}: {report.seconds:.2f} seconds"
        assert report.subject.request.arch == (arch + "a" if on.capability >= 90 else arch)
        if report.opcodes is None:
            continue
        matrix = sorted({opcode for opcode in report.opcodes if disassembly.classify(opcode) == "matrix"})
        on_tensor_cores = report.subject.label in TILED_KERNELS and (arch != "sm_75" or dtype == "float16")
        assert bool(matrix) == on_tensor_cores, (named(report), matrix)
        assert all(opcode.startswith("HMMA") for opcode in matrix), (named(report), matrix)
        if on_tensor_cores:
            shape = {"float16": "1688" if arch == "sm_75" else "16816", "bfloat16": "16816", "float32": "1688"}[dtype]
            kind = {"float16": "F32", "bfloat16": "F32.BF16", "float32": "F32.TF32"}[dtype]
            assert matrix == [f"HMMA.{shape}.{kind}"], named(report)


def test_the_instructions_were_looked_at() -> None:
    """Without nvdisasm the test above checks no instruction; a machine that tests has it."""
    pytest.importorskip("nvidia.cu13")
    assert disassembly.find_nvdisasm() is not None
    on = device.of_arch("sm_80", "gpu")
    (report,) = inspect_kernels(
        (on, kernel) for kernel in offline_kernels(on, dtype="float16", head_dim=64, is_causal=True, backward=False)
    )
    assert report.opcodes


@pytest.mark.usefixtures("no_disassembly")
@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dim", [1, 40, 72, 96, 160, 192], ids="D{}".format)
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_other_head_dims_do_not_spill(arch: str, head_dim: int) -> None:
    """The types in turn: what fits registers is decided by the tile, whose choice is the same for all architectures of a generation."""
    dtype = DTYPES[head_dim // 8 % 3]
    for report in reports_of(device.of_arch(arch, "gpu"), dtype, head_dim, is_causal=head_dim % 16 == 0):
        assert not report.spills, f"{dtype}: {named(report)}"
        assert report.warnings == (), named(report)


@pytest.mark.usefixtures("no_disassembly")
@pytest.mark.sample(1)
@pytest.mark.parametrize("dims", [(192, 128), (64, 256), (576, 512), (71, 33), (8, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_two_head_dims_do_not_spill(arch: str, dtype: str, dims: tuple[int, int]) -> None:
    for report in reports_of(device.of_arch(arch, "gpu"), dtype, dims[0], head_dim_v=dims[1]):
        assert not report.spills, named(report)
        assert report.warnings == (), named(report)


@pytest.mark.usefixtures("no_disassembly")
@pytest.mark.sample(1)
@pytest.mark.parametrize("feature", [*FEATURES, *LENGTHS])
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="D{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_with_a_feature(arch: str, dtype: str, head_dim: int, feature: str) -> None:
    options = {"features": FEATURES[feature]} if feature in FEATURES else {feature: True}
    for report in reports_of(device.of_arch(arch, "gpu"), dtype, head_dim, **options):  # type: ignore[arg-type]
        # docs/log-features.md has the numbers
        known = (
            dtype == "float32" and report.subject.label in BY_KEYS and (feature == "varlen" or (feature == "window" and head_dim == 512))
        )
        tolerated = report.subject.request.tolerated_spills  # of tiles that were measured or predicted with their spills
        assert report.resources.spill_store_bytes <= max(tolerated, 64 if known else 0), f"{dtype} {head_dim}: {named(report)}"
        assert known or tolerated or not report.spills, f"{dtype} {head_dim}: {named(report)}"
        assert report.warnings == (), named(report)


@pytest.mark.sample(1)
@CAUSAL
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["forward", "backward"])
def test_tf32_takes_a_third_of_the_matrix_instructions(backward: bool, is_causal: bool) -> None:
    """One product instead of three, in kernels that are otherwise the same."""
    on = device.of_arch("sm_80", "gpu")
    exact, quick = (
        inspect_kernels(
            (on, kernel)
            for kernel in offline_kernels(on, dtype="float32", head_dim=64, is_causal=is_causal, allow_tf32=allow, backward=backward)
        )
        for allow in (False, True)
    )
    assert exact
    for one, other in zip(exact, quick, strict=True):
        assert not other.spills, named(other)
        if other.subject.label != "backward_delta" and one.subject.tile == other.subject.tile and one.mix and other.mix:
            assert one.mix["matrix"] == 3 * other.mix["matrix"]


@pytest.mark.sample(3)
@CAUSAL
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_simulated_architectures_compile_to_ptx(arch: str, is_causal: bool) -> None:
    """What the simulator is given: text for the same virtual architecture, with the kernel's name as its entry."""
    on = device.of_arch(arch)
    dtype = "float16" if arch == "sm_75" else "bfloat16"
    for kernel in offline_kernels(on, dtype=dtype, head_dim=40, is_causal=is_causal):
        artifact = cache.fetch(kernel.request(on))
        text = artifact.data.decode()
        assert f".target {on.compile_arch}\n" in text
        assert f".visible .entry {kernel.entry}(" in text
        assert artifact.warnings == ()
        assert ".local" not in text, "an array that is indexed at run time"


HIDES = "1348"
"""Number of NVRTC's warning that a declaration hides another one."""


@pytest.mark.usefixtures("no_disassembly")
@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "features", [NO_FEATURES, FeatureSet("float32", window=True, softcap=True, alibi=True, sinks=True)], ids=["plain", "features"]
)
@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 128), ("sm_90", 256), ("sm_120", 64)])
def test_few_queries_spill_nothing(arch: str, head_dim: int, features: FeatureSet) -> None:
    """With the default tile, and with the taller one that more rows take where it is legal."""
    on, case = device.of_arch(arch, "gpu"), KernelCase(TILED_KERNELS["forward_split"], "bfloat16", head_dim, features=features)
    usual = tile_choice.default_tile(case, on)
    tiles = [tile for tile in (usual, replace(usual, tile_q=32)) if tile_rules.broken_rule(case, tile, on) is None]
    for tile in tiles:
        kernels = offline_kernels(
            on,
            dtype="bfloat16",
            head_dim=head_dim,
            is_causal=True,
            features=features,
            seqlens_kv=True,
            backward=False,
            tile={"forward_split": tile},
        )
        (report,) = inspect_kernels((on, kernel) for kernel in kernels if kernel.spec.is_tiled)
        resources = report.resources
        assert (resources.spill_store_bytes, resources.stack_bytes, report.warnings) == (0, 0, ()), named(report)
        assert report.occupancy.blocks >= tile_model.blocks_per_sm(case, tile, on), named(report)


def test_no_declaration_hides_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In kernels with every feature, and of every kind; and what is looked for is found where it is."""
    on, everything = device.of_arch("sm_90"), FeatureSet("float16", *[True] * 7)
    hopper = FeatureSet(window=True, softcap=True, alibi=True, sinks=True)
    cases: list[dict[str, Any]] = [
        {"features": everything, "need_attn_mask_grad": True},
        {"features": everything, "need_attn_mask_grad": True, "tile": {"backward_mask": Tile(32, 32, 2, 1)}},
        {"tile": {"backward_fused": Tile(32, 32, 2, 2)}},
        {"features": hopper, "tile": {"forward_wgmma": Tile(192, 16, 12, 2)}, "backward": False},
        {"features": hopper, "tile": {"backward_wgmma": Tile(32, 128, 8, 2)}},
        {"features": replace(hopper, attn_mask="float16"), "tile": {"forward_split": Tile(16, 32, 2, 2)}, "backward": False},
    ]  # fmt: skip
    requests: dict[str, CompileRequest] = {}
    for case in cases:
        for kernel in offline_kernels(on, dtype="bfloat16", head_dim=16, is_causal=True, **case):
            requests.setdefault(kernel.source, kernel.request(on))
    named_here = {
        "forward_mma.cu",
        "forward_wgmma.cu",
        "forward_split_mma.cu",
        "backward_fused_mma.cu",
        "backward_wgmma.cu",
        "backward_mask_mma.cu",
    }
    assert named_here <= set(requests)
    for source, request in requests.items():
        assert hidden_in(request) == [], source
    (tmp_path / "hides.cu").write_text('extern "C" __global__ void hides(int* x) { int y = *x; { int y = 3; *x = y; } *x += y; }')
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(tmp_path))
    assert len(hidden_in(CompileRequest("hides.cu", "", "sm_90", "ptx"))) == 1


def hidden_in(request: CompileRequest) -> list[str]:
    """What the compiler's front end says, behind which most of its work lies."""
    nvrtc, directory = compiler._nvrtc(), compiler.kernels_directory()
    program = nvrtc.createProgram(f'{request.config}\n#include "{request.source}"\n', str(directory / "config"), (), ())
    nvrtc.compileProgram(program, (*compiler.options(request), f"-I{directory}", f"--diag-warn={HIDES}", "--fdevice-syntax-only"))
    log = nvrtc.getProgramLog(program)
    nvrtc.destroyProgram(program)
    return [line for line in log.splitlines() if f"#{HIDES}-D" in line]
