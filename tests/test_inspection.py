"""`hardware.occupancy`, `jit.disassembly`, `cli.inspection`: the occupancy calculation, reading SASS, reports and their table. Needs no GPU."""

from __future__ import annotations

import importlib
import io
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cuflash.cli import inspection
from cuflash.cli.inspection import Expectations, Report, Subject
from cuflash.hardware.architectures import KIB
from cuflash.hardware.device import Device, of_arch
from cuflash.hardware.occupancy import occupancy
from cuflash.jit import cache, disassembly
from cuflash.jit.compiler import CompileRequest
from cuflash.jit.disassembly import classify

pytest.importorskip("cupy")

needs_nvdisasm = pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason=disassembly.NVDISASM_HINT)

KERNELS = {
    "tidy.cu": """
extern "C" __global__ void __launch_bounds__(128) tidy(float* x) {
    __shared__ float staged[128];
    staged[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(staged[127 - threadIdx.x]));
    unsigned a[4] = {1, 2, 3, 4}, b[2] = {5, 6};
    float c[4] = {power, power, power, power};
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    x[threadIdx.x] = c[0] * c[1] + c[2] * c[3];
}
""",
    "spilling.cu": """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x) {
    float values[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) values[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = values[127 - i] * values[i];
}
""",
}


@pytest.fixture(autouse=True)
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernels/ and a cache directory of our own."""
    (tmp_path / "kernels").mkdir()
    for name, text in KERNELS.items():
        (tmp_path / "kernels" / name).write_text(text)
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    cache.reset_memory()


def subject(
    name: str = "tidy", arch: str = "sm_80", threads: int = 128, shared: int = 0, expectations: Expectations | None = None
) -> Subject:
    device = of_arch(arch, "gpu")
    request = CompileRequest(f"{name}.cu", "", device.compile_arch, "cubin")
    return Subject(name, request, device, threads, shared, "float16", 64, "128x64 w4 s2", 64, expectations or Expectations())


def report(name: str = "tidy", **arguments: object) -> Report:
    (only,) = inspection.inspect([subject(name, **arguments)])  # type: ignore[arg-type]
    return only


# -------------------------------------------------------------------------------------------------------------------------------- occupancy


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "barriers", "blocks", "limiter"),
    [
        ("sm_80", 128, 255, 0, 1, 2, "registers"),  # 8192 a warp: two warps in each quarter of the SM
        ("sm_80", 128, 168, 0, 1, 3, "registers"),
        ("sm_80", 128, 169, 0, 1, 2, "registers"),  # rounded up to 176
        ("sm_80", 256, 255, 0, 1, 1, "registers"),
        ("sm_90", 384, 168, 0, 1, 1, "registers"),
        ("sm_80", 96, 128, 0, 1, 5, "registers"),  # 16 warps, three of them a block
        ("sm_80", 1024, 65, 0, 1, 0, "registers"),
        ("sm_80", 128, 32, 81 * KIB, 1, 2, "shared memory"),
        ("sm_80", 128, 32, 82 * KIB, 1, 1, "shared memory"),  # with the reserved KiB no longer two
        ("sm_80", 128, 32, 163 * KIB, 1, 1, "shared memory"),
        ("sm_80", 128, 32, 164 * KIB, 1, 0, "shared memory"),
        ("sm_75", 128, 32, 32 * KIB, 1, 2, "shared memory"),  # nothing is reserved on Turing
        ("sm_75", 128, 32, 10844, 1, 5, "shared memory"),  # rounded up to a multiple of 256
        ("sm_86", 32, 32, 0, 1, 16, "blocks"),
        ("sm_89", 32, 32, 0, 1, 24, "blocks"),
        ("sm_90", 32, 32, 0, 1, 32, "blocks"),
        ("sm_80", 256, 32, 0, 1, 8, "registers"),
        ("sm_86", 256, 32, 0, 1, 6, "warps"),
        ("sm_75", 256, 32, 0, 1, 4, "warps"),
        ("sm_90", 64, 32, 0, 5, 12, "barriers"),
        ("sm_120", 64, 32, 0, 2, 12, "barriers"),
        ("sm_80", 64, 32, 0, 5, 32, "registers"),
    ],
)
def test_occupancy(arch: str, threads: int, registers: int, shared: int, barriers: int, blocks: int, limiter: str) -> None:
    found = occupancy(of_arch(arch), threads=threads, registers=registers, shared_bytes=shared, barriers=barriers)
    assert (found.blocks, found.limiter) == (blocks, limiter)
    assert found.warps == blocks * -(-threads // 32) <= found.max_warps


# -------------------------------------------------------------------------------------------------------------------------- instruction mix


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32", "matrix"),
        ("HGMMA.64x8x16.F32.BF16", "matrix"),
        ("MUFU.EX2", "mufu"),
        ("FFMA.FTZ", "fp32"),
        ("F2FP.BF16.F32.PACK_AB", "fp32"),
        ("IMAD.WIDE.U32", "integer"),
        ("IMAD.MOV.U32", "move"),
        ("ULEA", "integer"),
        ("LDSM.16.M88.4", "shared"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("UTMALDG.4D", "global"),
        ("LDGDEPBAR", "control"),
        ("STL.128", "local"),
        ("ULDC.64", "move"),
        ("LDCU.64", "move"),
        ("BAR.SYNC.DEFER_BLOCKING", "control"),
        ("WARPGROUP.ARRIVE", "control"),
        ("NEVERSEEN.X", "other"),
    ],
)
def test_classes_of_instructions(opcode: str, expected: str) -> None:
    assert classify(opcode) == expected
    assert expected in disassembly.CLASSES


def test_sass_is_counted_by_function() -> None:
    sass = """//--------------------- .text.first                  --------------------------
first:
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/              @!PT LDS RZ, [RZ] ;
        /*0030*/            @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_1:
        /*0040*/                   NOP;
//--------------------- .nv.shared.first   --------------------------
        /*0000*/ \t.byte\t0xff, 0xff
        /*0000*/                   EXIT ;
//--------------------- .text.second   --------------------------
.text.second:
        /*0000*/                   EXIT ;
"""
    assert disassembly.instruction_counts(sass) == {
        "first": Counter({"LDC": 1, "BRA": 1, "LDS": 1, "UIADD3": 1}),
        "second": Counter({"EXIT": 1}),
    }


@needs_nvdisasm
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_mix_of_a_compiled_kernel(arch: str) -> None:
    mix = report(arch=arch, expectations=Expectations(matrix="")).mix
    assert mix is not None
    assert list(mix) == list(disassembly.CLASSES)
    assert mix["matrix"] == mix["mufu"] == 1
    assert mix["shared"] == 2
    assert mix["global"] == 2
    assert mix["local"] == mix["other"] == 0
    assert mix["fp32"] >= 2
    assert mix["control"] >= 2


def test_without_nvdisasm_everything_else_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disassembly, "find_nvdisasm", lambda: None)
    found = report(expectations=Expectations(matrix="HGMMA"))
    assert found.mix is None
    assert found.resources.registers > 0
    assert found.failures == (), "what is not known is not judged"
    assert disassembly.NVDISASM_HINT in inspection.remarks([found])
    assert "-" in inspection.table([found])[1][0]


def test_nvdisasm_is_found_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cuflash.jit.disassembly.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / name))
    assert disassembly.find_nvdisasm() == tmp_path / "nvdisasm"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert disassembly.find_nvdisasm() is None


@needs_nvdisasm
def test_what_nvdisasm_refuses_is_no_error() -> None:
    assert disassembly.disassemble(b"not a cubin") is None


# ---------------------------------------------------------------------------------------------------------------------------------- reports


def test_tidy_kernel() -> None:
    found = report(shared=80 * KIB)
    assert not found.spills
    assert found.failures == found.warnings == ()
    assert found.resources.static_shared_bytes == 512
    assert (found.occupancy.blocks, found.occupancy.limiter) == (2, "shared memory")
    assert found.seconds > 0


def test_spills_are_a_failure_unless_tolerated() -> None:
    found = report("spilling", threads=1024)
    assert found.spills
    assert len(found.failures) == 1
    assert found.failures[0].startswith("spills ")
    assert report("spilling", threads=1024, expectations=Expectations(spills=True)).failures == ()


@needs_nvdisasm
def test_every_broken_expectation_is_named() -> None:
    found = report(shared=100 * KIB, expectations=Expectations(max_registers=4, min_blocks=2, matrix="HGMMA"))
    registers, blocks, matrix = found.failures
    assert registers == f"{found.resources.registers} registers, expected at most 4"
    assert blocks == "1 blocks per SM for want of shared memory, expected at least 2"
    assert "HGMMA" in matrix
    assert "HMMA.16816.F32" in matrix


@dataclass(frozen=True)
class Tile:
    tile_q: int = 128
    tile_kv: int = 64
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Plan:
    """What planning hands to inspection, in small."""

    name: str = "forward"
    dtype: str = "bfloat16"
    head_dim: int = 128
    head_dim_v: int = 96
    tile: Tile = Tile()
    num_threads: int = 128
    shared_bytes: int = 4096

    def request(self, device: Device) -> CompileRequest:
        return CompileRequest("tidy.cu", "", device.compile_arch, "ptx" if device.kind == "simulator" else "cubin")


def test_plans_are_compiled_to_cubins_for_their_devices() -> None:
    devices = [of_arch("sm_90", "gpu"), of_arch("sm_86", "simulator")]
    reports = inspection.inspect_kernels([(device, Plan()) for device in devices])
    assert [(found.subject.request.arch, found.subject.request.target) for found in reports] == [("sm_90a", "cubin"), ("sm_86", "cubin")]
    assert {found.subject.tile for found in reports} == {"128x64 w4 s2"}
    assert [row[3] for row in inspection.table(reports)[1]] == ["128/96", "128/96"]
    assert all(found.subject.shared_bytes == 4096 and found.resources.registers for found in reports)


# -------------------------------------------------------------------------------------------------------------------------------- rendering


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_table_as_text() -> None:
    stream = io.StringIO()
    inspection.render([report(), report("spilling", threads=1024)], stream)
    header, rule, tidy, spilling, remark = stream.getvalue().splitlines()
    assert header.split()[:6] == ["arch", "kernel", "dtype", "D", "tile", "regs"]
    assert set(rule) == {"-"}
    assert len(header) == len(tidy) == len(spilling)
    assert tidy.split()[:3] == ["sm_80", "tidy", "float16"]
    assert remark.startswith("sm_80 spilling float16 64: spills ")


def test_table_in_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "250")
    stream = Terminal()
    inspection.render([report()], stream)
    assert "┃" in stream.getvalue()
    assert "…" not in stream.getvalue()


def test_a_narrow_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    inspection.render([report()], stream)
    assert "…" not in stream.getvalue()
    assert "sm_80" in stream.getvalue()


def test_terminal_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = importlib.import_module

    def without_rich(name: str) -> object:
        if name.startswith("rich"):
            raise ModuleNotFoundError(name)
        return import_module(name)

    reports = [report()]
    monkeypatch.setattr("cuflash.cli.inspection.importlib.import_module", without_rich)
    stream = Terminal()
    inspection.render(reports, stream)
    assert stream.getvalue().startswith("  arch") or stream.getvalue().startswith(" arch")


def test_nothing_to_render() -> None:
    stream = io.StringIO()
    inspection.render([], stream)
    assert stream.getvalue().startswith("arch")


def test_warnings_stand_below_the_table() -> None:
    found = replace(report(), warnings=("ptxas info : (C7510) Potential Performance Loss",))
    assert inspection.remarks([found])[0] == "sm_80 tidy float16 64: ptxas info : (C7510) Potential Performance Loss"
