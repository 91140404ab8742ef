"""`cuflash.planning.argument_structs` lists the fields of the structs that the kernels are compiled with: the compiler says so of every size and offset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from cuflash.errors import CompileError
from cuflash.jit import compiler
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import argument_structs, kernel_cases
from cuflash.planning.argument_structs import FLOAT, INT, WORD, Field, Scalar, Struct
from cuflash.planning.kernel_specs import KERNELS, KernelSpec

STRUCTS = [value for value in vars(argument_structs).values() if isinstance(value, Struct)]
CONFIG = '#include "ptx/types.cuh"\nstruct Config { using Element = float16; static constexpr int CAPABILITY = 80; };\n'


def assertions_of(struct: Struct) -> list[str]:
    """What the compiler has to agree to."""
    offsets = [f"OFFSET({struct}, {path}) == {offset}" for path, offset, _ in struct.scalars()]
    sizes = [f"sizeof((({struct}*)0)->{path}) == {scalar.size}" for path, _, scalar in struct.scalars()]
    return [f"sizeof({struct}) == {struct.size}", f"alignof({struct}) == {struct.alignment}", *offsets, *sizes]


def compile_assertions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assertions: Iterable[str], declarations: str = "") -> None:
    """Compile them behind the real headers."""
    pytest.importorskip("cupy")
    kernels = compiler.kernels_directory()
    (tmp_path / "check.cu").write_text(
        f'#include "{kernels}/merge_arguments.cuh"\n#define OFFSET(S, field) __INTADDR__(&((S*)0)->field)\n{declarations}\n'
        + "\n".join(f'static_assert({condition}, "{condition}");' for condition in assertions)
        + '\nextern "C" __global__ void check() {}\n'
    )
    for entry in kernels.iterdir():
        if entry.is_dir() or entry.suffix == ".cuh":
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(tmp_path))
    compiler.compile_kernel(CompileRequest("check.cu", CONFIG, "sm_80", "ptx"))


def test_sizes_and_offsets_are_those_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mere order is not enough: C++ pads."""
    assert {kernel.arguments for kernel in KERNELS} <= set(STRUCTS)
    assertions = [assertion for struct in STRUCTS for assertion in assertions_of(struct)]
    assertions += [f"sizeof(RowStatistics) == {kernel_cases.ROW_STATISTICS_BYTES}", f"LISTED_PARTS == {argument_structs.LISTED_PARTS}"]
    assert len(assertions) > 500
    compile_assertions(tmp_path, monkeypatch, assertions)


@pytest.mark.parametrize("wrong", ["OFFSET(ForwardArguments, lse.data) == 8", "sizeof(Geometry) == 48"])
def test_a_wrong_number_would_be_noticed(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompileError) as caught:
        compile_assertions(tmp_path, monkeypatch, [wrong])
    assert "static assertion failed" in caught.value.log


def test_padding_and_larger_alignments_are_those_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as tensor maps have, which are 128 bytes on a multiple of 64."""
    tensor_map = Scalar("128s", 128, 64)
    inner = Struct("Inner", (Field("few", INT), Field("data", WORD), Field("last", FLOAT)))
    outer = Struct("Outer", (Field("first", INT), Field("maps", tensor_map, 2), Field("listed", inner, 3), Field("last", FLOAT)))
    assert (inner.size, outer.offsets, outer.size) == (24, {"first": 0, "maps": 64, "listed": 320, "last": 392}, 448)
    declarations = (
        "struct alignas(64) Map { char bytes[128]; };\nstruct Inner { int few; void* data; float last; };\n"
        "struct Outer { int first; Map maps[2]; Inner listed[3]; float last; };"
    )
    compile_assertions(tmp_path, monkeypatch, assertions_of(outer), declarations)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_each_kernel_takes_the_struct_that_it_is_given(kernel: KernelSpec) -> None:
    text = (compiler.kernels_directory() / kernel.source).read_text(encoding="utf-8")
    assert f" {kernel.entry}(const __grid_constant__ {kernel.arguments} " in text
