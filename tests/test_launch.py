"""`cuflash.launch`: the packed argument structs are those that the kernels are compiled with, byte for byte."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest

from cuflash import compiler, device, launch, planning
from cuflash.arrays import borrow
from cuflash.compiler import CompileRequest
from cuflash.errors import CompileError
from cuflash.launch import BACKWARD_TENSORS, FORWARD_TENSORS, ArgumentTemplate
from cuflash.problem import Problem, View, make_problem

SM_80 = device.of_arch("sm_80", "gpu")
RESULTS = {"out": View((2, 9, 4, 16), (576, 64, 16, 1))}
GEOMETRY = ("batch", "seqlen_q", "seqlen_kv", "num_heads_q", "num_heads_kv", "causal_offset", "scale", "scale_log2", "score_sign", "num_tiles")


def problem_of(**options: Any) -> Problem:
    query, key = numpy.zeros((2, 9, 4, 16), numpy.float16), numpy.zeros((2, 7, 2, 16), numpy.float16)
    return make_problem(borrow(query, "query"), borrow(key, "key"), borrow(key, "value"), enable_gqa=True, **options)


def forward(problem: Problem, vectorized: bool = True) -> ArgumentTemplate:
    (kernel,) = planning.make_plan(problem, SM_80).kernels
    return launch.forward_template(problem, kernel, problem.query, (36, 9, 1), dict.fromkeys(FORWARD_TENSORS, vectorized))


def backward(problem: Problem, grad_lse_strides: tuple[int, int, int] | None = (36, 9, 1)) -> ArgumentTemplate:
    kernel = planning.make_plan(problem, SM_80, backward=True).kernels[1]
    views = {name: problem.key if name in ("key", "value", "grad_key", "grad_value") else problem.query for name in BACKWARD_TENSORS}
    return launch.backward_template(problem, kernel, views, (36, 9, 1), grad_lse_strides, dict.fromkeys(BACKWARD_TENSORS, True))


# --- Against kernels/arguments.cuh --------------------------------------------------------------------------------------------------------

pointer_fields = {name: f"{name}.data" for name in (*BACKWARD_TENSORS, "lse", "grad_lse")} | {"row_statistics": "row_statistics"}


def compile_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assertions: list[str]) -> str:
    """Compile the assertions behind the real arguments.cuh; returns PTX."""
    pytest.importorskip("cupy")
    kernels = compiler.kernels_directory()
    (tmp_path / "check.cu").write_text(
        f'#include "{kernels}/arguments.cuh"\n#define OFFSET(S, field) __builtin_offsetof(S, field)\n'
        + "\n".join(f'static_assert({condition}, "{condition}");' for condition in assertions)
        + '\nextern "C" __global__ void forward(const __grid_constant__ ForwardArguments a) {}'
        + '\nextern "C" __global__ void backward(const __grid_constant__ BackwardArguments a) {}\n'
    )
    for entry in kernels.iterdir():
        if entry.is_dir():
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "arguments.cuh").symlink_to(kernels / "arguments.cuh")
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(tmp_path))
    config = '#include "ptx/types.cuh"\nstruct Config { using Element = float16; static constexpr int CAPABILITY = 80; };\n'
    return compiler.compile_kernel(CompileRequest("check.cu", config, "sm_80", "ptx")).data.decode()


def test_sizes_and_offsets_are_those_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler says where each field lies. Mere order is not enough: C++ pads."""
    packed = {"ForwardArguments": forward(problem_of()), "BackwardArguments": backward(problem_of())}
    assertions = []
    for struct_name, template in packed.items():
        assertions.append(f"sizeof({struct_name}) == {template.size}")
        for name, offset in template.offsets.items():
            assertions.append(f"OFFSET({struct_name}, {pointer_fields[name]}) == {offset}")
        geometry = template.size - launch._GEOMETRY.size - (launch._GROUP.size if struct_name == "BackwardArguments" else 0)
        for i, name in enumerate(GEOMETRY):
            assertions.append(f"OFFSET({struct_name}, geometry.{name}) == {geometry + 4 * i}")
    assertions += [f"OFFSET(BackwardArguments, group_{name}) == {packed['BackwardArguments'].size - at}" for name, at in (("batch", 8), ("heads", 4))]
    for i, name in enumerate(("data", "stride_batch", "stride_seqlen", "stride_head", "stride_dim", "vectorized")):
        assertions.append(f"OFFSET(TensorView, {name}) == {8 * i}")
    for i, name in enumerate(("data", "stride_batch", "stride_head", "stride_seqlen")):
        assertions.append(f"OFFSET(RowView, {name}) == {8 * i}")
    assertions.append(f"sizeof(RowStatistics) == {planning.ROW_STATISTICS_BYTES}")
    ptx = compile_with(tmp_path, monkeypatch, assertions)
    for name, template in (("forward", packed["ForwardArguments"]), ("backward", packed["BackwardArguments"])):
        assert f".param .align 8 .b8 {name}_param_0[{template.size}]" in ptx


def test_a_wrong_offset_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    with pytest.raises(CompileError) as caught:
        compile_with(tmp_path, monkeypatch, ["OFFSET(ForwardArguments, lse.data) == 8"])
    assert "static assertion failed" in caught.value.log


# --- What is packed -----------------------------------------------------------------------------------------------------------------------


def view_at(packed: bytes, offset: int) -> tuple[Any, ...]:
    return struct.unpack_from("=Q4qi", packed, offset)


def geometry_of(packed: bytes, template: ArgumentTemplate) -> dict[str, Any]:
    return dict(zip(GEOMETRY, struct.unpack_from("=6i3fi", packed, template.offsets["lse"] + 32), strict=True))


def test_fill_writes_the_given_addresses_and_leaves_the_template_alone() -> None:
    template = forward(problem_of())
    pointers = {"query": 0x1000, "key": 2**63, "value": 0x3000, "out": 2**64 - 16}
    packed = template.fill(pointers)
    assert len(packed) == template.size
    assert [view_at(packed, template.offsets[name])[0] for name in FORWARD_TENSORS] == list(pointers.values())
    assert struct.unpack_from("=Q", packed, template.offsets["lse"]) == (0,), "not asked for: null"
    empty = template.fill({})
    assert [view_at(empty, template.offsets[name])[0] for name in FORWARD_TENSORS] == [0] * 4
    assert template.fill({"lse": 0x5000}) != empty
    with pytest.raises(KeyError):
        template.fill({"grad_lse": 1})


def test_strides_are_packed_in_the_order_of_the_struct() -> None:
    template = forward(problem_of())
    packed = template.fill({})
    assert view_at(packed, template.offsets["query"]) == (0, 9 * 64, 64, 16, 1, 1)
    assert view_at(packed, template.offsets["key"]) == (0, 7 * 32, 32, 16, 1, 1)
    assert struct.unpack_from("=Q3q", packed, template.offsets["lse"]) == (0, 36, 9, 1)
    assert view_at(forward(problem_of(), vectorized=False).fill({}), 0)[-1] == 0


def test_negative_and_64_bit_strides_are_packed_whole() -> None:
    x = numpy.lib.stride_tricks.as_strided(numpy.zeros(1, numpy.float16), (2, 9, 4, 16), (2 * 2**40, -2 * 2**33, -32, 2))
    y = numpy.zeros((2, 7, 4, 16), numpy.float16)
    template = forward(make_problem(borrow(x, "query"), borrow(y, "key"), borrow(y, "value")))
    assert view_at(template.fill({}), 0) == (0, 2**40, -(2**33), -16, 1, 1)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.5, (0.5, 0.5 * math.log2(math.e), 1.0)), (-0.5, (-0.5, 0.5 * math.log2(math.e), -1.0)), (0.0, (0.0, 1.0, 0.0)), (2.0**127, (2.0**127, 2.0**127 * math.log2(math.e), 1.0))],
    ids=["positive", "negative", "zero", "largest"],
)
def test_scale_is_split_into_size_and_sign(scale: float, expected: tuple[float, ...]) -> None:
    """The running maximum needs a factor that does not reverse the order of scores."""
    template = forward(problem_of(scale=scale))
    geometry = geometry_of(template.fill({}), template)
    assert (geometry["scale"], geometry["scale_log2"], geometry["score_sign"]) == pytest.approx(expected, rel=1e-7)


def test_geometry() -> None:
    template = forward(problem_of(is_causal=True, causal_alignment="bottom_right"))
    geometry = geometry_of(template.fill({}), template)
    names = ("batch", "seqlen_q", "seqlen_kv", "num_heads_q", "num_heads_kv", "causal_offset", "num_tiles")
    assert [geometry[name] for name in names] == [2, 9, 7, 4, 2, -2, 1]


def test_without_a_gradient_of_lse_its_pointer_stays_null() -> None:
    template = backward(problem_of(), grad_lse_strides=None)
    packed = template.fill({name: 0x1000 for name in (*BACKWARD_TENSORS, "lse", "row_statistics")})
    assert struct.unpack_from("=Q3q", packed, template.offsets["grad_lse"]) == (0, 0, 0, 0)
    assert struct.unpack_from("=Q", packed, template.offsets["row_statistics"]) == (0x1000,)
    assert struct.unpack_from("=2i", packed, template.size - 8) == (1, 2), "two query heads are summed into each key head"


def test_a_kernel_is_loaded_once_for_all_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Loaded:
        def __init__(self, kernel: Any, on: Any) -> None:
            loaded.append((kernel.name, on.arch))

    monkeypatch.setattr(launch, "_SimulatorExecutable", Loaded)
    launch._load.cache_clear()
    on = device.of_arch("sm_80")
    kernels = [planning.make_plan(problem_of(is_causal=causal), on).kernels[0] for causal in (False, False, True)]
    first, second, causal = (launch.executable(kernel, on) for kernel in kernels)
    assert first is second
    assert causal is not first
    assert launch.executable(kernels[0], device.of_arch("sm_86")) is not first
    assert loaded == [("forward", "sm_80"), ("forward", "sm_80"), ("forward", "sm_86")]
    launch._load.cache_clear()
