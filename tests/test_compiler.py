"""`cuflash.jit.compiler`: cubins and PTX for every architecture, the compiler's report, and what a fingerprint depends on. Needs no GPU."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cuflash.errors import CompileError, OptionError, SetupError
from cuflash.jit import compiler
from cuflash.jit.compiler import CompileRequest

pytest.importorskip("cupy")

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")

SCALE = """
#include "tile/factor.cuh"
extern "C" __global__ void scale(float* x) {
    __shared__ float staged[64];
    staged[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = scaled(staged[63 - threadIdx.x]) + Config::OFFSET;
}
"""

# 1024 threads leave 64 registers each, and 128 values have to live across the barrier.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x) {
    float values[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) values[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = values[127 - i] * values[i];
}
"""

# Touching an accumulator while the matrix product is in flight makes ptxas wait after each one.
SERIALIZED = """
extern "C" __global__ void __launch_bounds__(128) serialized(float* out, unsigned long long operand) {
    float c[4] = {0.f, 0.f, 0.f, 0.f};
    for (int step = 0; step < 4; ++step) {
        asm volatile("wgmma.fence.sync.aligned;");
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(operand));
        c[0] += 1.f;
        asm volatile("wgmma.commit_group.sync.aligned;");
        asm volatile("wgmma.wait_group.sync.aligned 0;");
    }
    out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
"""

REQUEST = CompileRequest("scale.cu", "struct Config { static constexpr float OFFSET = 5.f; };", "sm_80", "cubin")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small kernels/ of our own."""
    folder = tmp_path / "kernels"
    (folder / "tile").mkdir(parents=True)
    (folder / "scale.cu").write_text(SCALE)
    (folder / "spilling.cu").write_text(SPILLING)
    (folder / "serialized.cu").write_text(SERIALIZED)
    (folder / "tile" / "factor.cuh").write_text("inline float scaled(float x) { return 3.f * x; }\n")
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(folder))
    compiler.refresh()
    return folder


# -------------------------------------------------------------------------------------------------------------------------------- artifacts


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cubin_for_every_architecture(arch: str) -> None:
    artifact = compiler.compile_kernel(replace(REQUEST, arch=arch))
    assert artifact.data.startswith(b"\x7fELF")
    section_offset = int.from_bytes(artifact.data[40:48], "little")
    program_offset = int.from_bytes(artifact.data[32:40], "little")
    assert section_offset < len(artifact.data)
    assert program_offset < len(artifact.data)
    resources = artifact.resources_of("scale")
    assert 1 <= resources.registers <= 64
    assert (resources.static_shared_bytes, resources.barriers) == (256, 1)
    assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0
    assert artifact.warnings == ()
    assert artifact.seconds > 0
    assert artifact.compiler == "NVRTC {}.{}".format(*compiler.nvrtc_version())


@pytest.mark.parametrize(("arch", "target"), [("sm_75", "sm_75"), ("sm_80", "sm_80"), ("sm_90", "sm_90"), ("sm_90a", "sm_90a")])
def test_ptx_is_text_that_names_its_source_without_the_machine(kernels: Path, arch: str, target: str) -> None:
    artifact = compiler.compile_kernel(replace(REQUEST, arch=arch, target="ptx"))
    text = artifact.data.decode()
    assert f".target {target}\n" in text
    assert ".visible .entry scale(" in text
    assert '"kernels/scale.cu"' in text
    assert str(kernels) not in text
    assert "\0" not in text
    assert artifact.resources == ()


def test_text_in_the_working_directory_is_not_included(kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tile").mkdir(parents=True)
    for name in ("scale.cu", "tile/factor.cuh"):
        (elsewhere / name).write_text("#error from the working directory\n")
    monkeypatch.chdir(elsewhere)
    assert compiler.compile_kernel(REQUEST).resources


@pytest.mark.usefixtures("kernels")
def test_cubin_is_whole_whether_or_not_the_binding_cuts_it() -> None:
    whole = compiler.compile_kernel(REQUEST).data
    assert compiler._complete_elf(whole) == whole
    assert compiler._complete_elf(whole[:-1]) == whole


@pytest.mark.usefixtures("kernels")
def test_threads_compile_side_by_side() -> None:
    requests = [replace(REQUEST, arch=arch) for arch in ("sm_80", "sm_90a")] * 2
    data: dict[int, bytes] = {}

    def work(index: int) -> None:
        data[index] = compiler.compile_kernel(requests[index]).data

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert data[0] == data[2]
    assert data[1] == data[3]
    assert data[0] != data[1]


# ------------------------------------------------------------------------------------------------------------------------ compiler's report


@pytest.mark.usefixtures("kernels")
def test_spills_are_seen() -> None:
    resources = compiler.compile_kernel(CompileRequest("spilling.cu", "", "sm_80", "cubin")).resources_of("spilling")
    assert resources.registers == 64
    assert resources.spill_store_bytes > 0
    assert resources.spill_load_bytes > 0
    assert resources.stack_bytes > 0


@pytest.mark.usefixtures("kernels")
def test_serialized_wgmma_is_a_warning() -> None:
    artifact = compiler.compile_kernel(CompileRequest("serialized.cu", "", "sm_90a", "cubin"))
    assert any("serialized" in line for line in artifact.warnings)


@pytest.mark.usefixtures("kernels")
def test_warning_of_the_front_end_is_kept() -> None:
    artifact = compiler.compile_kernel(replace(REQUEST, config=REQUEST.config + "\n__device__ void idle() { int unused_name; }"))
    (warning,) = artifact.warnings
    assert "unused_name" in warning


def test_report_of_several_kernels_and_of_a_called_function() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
ptxas         .     1392 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 1400 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Compile time = 87.333 ms
ptxas info    : Function properties for helper
ptxas         .     0 bytes stack frame, 1892 bytes spill stores, 2208 bytes spill loads
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 11 registers, used 2 barriers, 1024 bytes smem, 364 bytes cmem[0]"""
    first, second = compiler.parse_resources(log)
    assert first == compiler.KernelResources("first", 64, 12 + 1892, 4 + 2208, 1400, 0, 1)
    assert second == compiler.KernelResources("second", 11, 0, 0, 0, 1024, 2)
    assert compiler.parse_resources("") == ()


def test_unknown_entry_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="absent"):
        compiler.Artifact(b"", "", 0.0, (), "").resources_of("absent")


# ----------------------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.usefixtures("kernels")
def test_compile_error_carries_log_and_configuration() -> None:
    request = replace(REQUEST, config='struct Config { static_assert(false, "TILE_Q is odd"); };')
    with pytest.raises(CompileError) as caught:
        compiler.compile_kernel(request)
    assert "TILE_Q is odd" in caught.value.log
    assert caught.value.config == request.config
    assert all(text in str(caught.value) for text in ("scale.cu for sm_80 (cubin)", "static assertion failed", request.config))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("arch", ["sm_70", "sm_99", "80", "compute_80", "sm_", None])
def test_wrong_architecture_lists_the_right_ones(arch: str) -> None:
    with pytest.raises(OptionError, match=r"sm_75, sm_80.*sm_120"):
        compiler.compile_kernel(replace(REQUEST, arch=arch))


def test_architecture_newer_than_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldNvrtc:
        def getVersion(self) -> tuple[int, int]:
            return 12, 2

        def getSupportedArchs(self) -> tuple[int, ...]:
            return 75, 80, 86, 90

    monkeypatch.setattr(compiler, "_nvrtc", OldNvrtc)
    with pytest.raises(OptionError, match=r"one of sm_75, sm_80, sm_86, sm_90\. NVRTC 12\.2 does not know it; install a newer one: pip"):
        compiler.options(replace(REQUEST, arch="sm_120a"))


def test_suffix_is_dropped_where_it_means_nothing() -> None:
    assert "-arch=sm_80" in compiler.options(replace(REQUEST, arch="sm_80a"))
    assert "-arch=compute_90a" in compiler.options(replace(REQUEST, arch="sm_90a", target="ptx"))
    assert "-arch=compute_90" in compiler.options(replace(REQUEST, arch="sm_90", target="ptx"))


@pytest.mark.usefixtures("kernels")
def test_wrong_source_and_target() -> None:
    with pytest.raises(OptionError, match=r"scale\.cu, serialized\.cu, spilling\.cu"):
        compiler.compile_kernel(replace(REQUEST, source="absent.cu"))
    with pytest.raises(OptionError, match="'cubin' or 'ptx'"):
        compiler.options(replace(REQUEST, target="sass"))  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["CuPy", "NVRTC"])
def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    class Cuda:
        class nvrtc:
            @staticmethod
            def getVersion() -> tuple[int, int]:
                raise RuntimeError("libnvrtc not found")

    def import_module(name: str) -> type:
        if missing == "CuPy":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return Cuda

    compiler._load_nvrtc.cache_clear()
    monkeypatch.setattr("cuflash.jit.compiler.importlib.import_module", import_module)
    try:
        with pytest.raises(SetupError, match=rf"needs {missing}.*pip install 'cuflash\[cuda12\]'"):
            compiler.nvrtc_version()
    finally:
        compiler._load_nvrtc.cache_clear()


# ---------------------------------------------------------------------------------------------------------------- directory and fingerprint


def test_kernels_of_this_checkout_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUFLASH_KERNELS_DIR", raising=False)
    assert any(compiler.kernels_directory().glob("*.cu"))


def test_missing_kernels_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(tmp_path / "absent"))
    with pytest.raises(SetupError, match=r"absent.*CUFLASH_KERNELS_DIR"):
        compiler.kernels_directory()


@pytest.mark.usefixtures("kernels")
def test_fingerprint_depends_on_every_part_of_the_request() -> None:
    requests = [
        REQUEST,
        replace(REQUEST, source="spilling.cu"),
        replace(REQUEST, config=REQUEST.config + " "),
        replace(REQUEST, arch="sm_86"),
        replace(REQUEST, target="ptx"),
    ]
    prints = [compiler.fingerprint(request) for request in requests]
    assert len(set(prints)) == len(requests)
    assert prints == [compiler.fingerprint(request) for request in requests]
    assert all(len(text) == 64 and int(text, 16) for text in prints)


def test_fingerprint_depends_on_every_file(kernels: Path) -> None:
    seen = {compiler.fingerprint(REQUEST)}

    def changed() -> bool:
        size = len(seen)
        seen.add(compiler.fingerprint(REQUEST))
        return len(seen) > size

    header = kernels / "tile" / "factor.cuh"
    header.write_text(header.read_text() + "// edited\n")
    assert changed()
    (kernels / "tile" / "new.cuh").write_text("")
    assert changed()
    (kernels / "tile" / "new.cuh").rename(kernels / "tile" / "newer.cuh")
    assert changed()
    (kernels / ".scale.cu.swp").write_text("what an editor leaves")
    assert not changed()


def test_fingerprint_depends_on_compiler_version(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiler.fingerprint(REQUEST)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 1))
    assert compiler.fingerprint(REQUEST) != before


def test_refresh_sees_an_edit_that_kept_size_and_time(kernels: Path) -> None:
    before = compiler.fingerprint(REQUEST)
    header = kernels / "tile" / "factor.cuh"
    status = header.stat()
    header.write_text(header.read_text().replace("3.f", "4.f"))
    os.utime(header, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert compiler.fingerprint(REQUEST) == before
    compiler.refresh()
    assert compiler.fingerprint(REQUEST) != before


def test_fingerprint_does_not_depend_on_the_place(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiler.fingerprint(REQUEST)
    moved = kernels.rename(kernels.with_name("moved"))
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(moved))
    assert compiler.fingerprint(REQUEST) == before
