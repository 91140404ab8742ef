"""`cuflash.launch`: the packed argument structs are those that the kernels are compiled with, byte for byte."""

from __future__ import annotations

import ctypes
import math
import struct
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

import cuflash
from cuflash import calls, compiler, device, launch, planning
from cuflash.arrays import borrow
from cuflash.compiler import Artifact, CompileRequest
from cuflash.errors import CompileError
from cuflash.launch import BACKWARD_TENSORS, FORWARD_TENSORS, ArgumentTemplate
from cuflash.problem import Problem, make_problem

GEOMETRY = (
    "batch",
    "seqlen_q",
    "seqlen_kv",
    "num_heads_q",
    "num_heads_kv",
    "causal_offset",
    "scale",
    "scale_log2",
    "score_sign",
    "num_tiles",
)
POINTERS = {name: f"{name}.data" for name in (*BACKWARD_TENSORS, "lse", "grad_lse")} | {"row_statistics": "row_statistics"}
"""Names of pointers in Python -> fields in C++."""
FEATURES = {name: f"{name}.data" for name in ("alibi_slopes", "sinks", "segment_ids_q", "segment_ids_kv", "prefix_lengths")} | {
    "attn_mask": "mask.data",
    "grad_attn_mask": "grad_mask.data",
    **{name: name for name in ("grad_sinks", "visible_tiles", "dropout_state", "dropout_seed", "dropout_offset", "log2_sums")},
}
"""Names of 64-bit words in Python -> fields of FeatureArguments."""
FEATURE_NUMBERS = (
    "list_batches", "list_heads", "window_low", "window_high", "score_factor", "softcap", "dropout_limit", "dropout_scale",
)  # fmt: skip


def problem_of(**options: Any) -> Problem:
    query, key = numpy.zeros((2, 9, 4, 16), numpy.float16), numpy.zeros((2, 7, 2, 16), numpy.float16)
    return make_problem(borrow(query, "query"), borrow(key, "key"), borrow(key, "value"), enable_gqa=True, **options)


def forward(problem: Problem, vectorized: bool = True) -> tuple[ArgumentTemplate, bytes]:
    (kernel,) = planning.make_plan(problem, device.of_arch("sm_80")).kernels
    template = launch.forward_template(problem, problem.query, (36, 9, 1), dict.fromkeys(FORWARD_TENSORS, vectorized))
    return template, launch.forward_tail(problem, kernel) + launch.lengths_template(problem).fill({})


def backward(problem: Problem, grad_lse_strides: tuple[int, int, int] | None = (36, 9, 1)) -> tuple[ArgumentTemplate, bytes]:
    kernel = planning.make_plan(problem, device.of_arch("sm_80"), backward=True).kernels[1]
    views = {name: problem.key if name in ("key", "value", "grad_key", "grad_value") else problem.query for name in BACKWARD_TENSORS}
    template = launch.backward_template(views, (36, 9, 1), grad_lse_strides, dict.fromkeys(BACKWARD_TENSORS, True))
    return template, launch.backward_tail(problem, kernel) + launch.lengths_template(problem).fill({})


def offset_of(template: ArgumentTemplate, name: str) -> int:
    """Where `fill` writes an address: found by writing one that occurs nowhere else."""
    return template.fill({name: 0x1122334455667788}).index(struct.pack("=Q", 0x1122334455667788))


# --- Against kernels/arguments.cuh --------------------------------------------------------------------------------------------------------


def compile_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assertions: list[str], header: str = "arguments.cuh") -> str:
    """Compile the assertions behind the real header; returns PTX."""
    pytest.importorskip("cupy")
    kernels = compiler.kernels_directory()
    (tmp_path / "check.cu").write_text(
        f'#include "{kernels}/{header}"\n#define OFFSET(S, field) __INTADDR__(&((S*)0)->field)\n'
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
    features = launch.features_template(problem_of())
    assert features.size == len(launch.NO_FEATURE_BYTES)
    sizes = {name: template.size + len(tail) for name, (template, tail) in packed.items()} | {
        "VisibleTilesArguments": 4 * len(GEOMETRY) + launch.lengths_template(problem_of()).size
    }
    assertions = []
    for struct_name, (template, tail) in packed.items():
        assert len(template.fill({})) == template.size
        assert sizes[struct_name] == template.size + len(tail)
        assertions += [f"OFFSET({struct_name}, {POINTERS[name]}) == {offset_of(template, name)}" for name in template.names]
        assertions += [f"OFFSET({struct_name}, geometry.{name}) == {template.size + 4 * i}" for i, name in enumerate(GEOMETRY)]
    for struct_name, offset in sizes.items():
        assertions.append(f"sizeof({struct_name}) == {offset + features.size}")
        assertions += [
            f"OFFSET({struct_name}, features.{FEATURES[name]}) == {offset + offset_of(features, name)}" for name in features.names
        ]
    numbers = offset_of(features, "dropout_offset") + 8
    assertions += [
        f"OFFSET(VisibleTilesArguments, features.{name}) == {sizes['VisibleTilesArguments'] + numbers + 4 * i}"
        for i, name in enumerate(FEATURE_NUMBERS)
    ]
    group = packed["BackwardArguments"][0].size + 4 * len(GEOMETRY)
    assertions += [f"OFFSET(BackwardArguments, group_batch) == {group}", f"OFFSET(BackwardArguments, group_heads) == {group + 4}"]
    for struct_name, (template, tail) in packed.items():
        lengths = template.size + len(tail) - launch.lengths_template(problem_of()).size
        for i, name in enumerate(("cu_seqlens_q", "cu_seqlens_kv", "seqlens_kv", "num_sequences")):
            assertions.append(f"OFFSET({struct_name}, lengths.{name}) == {lengths + 8 * i}")
        assertions.append(f"OFFSET({struct_name}, lengths.bottom_right) == {lengths + 28}")
    for i, name in enumerate(("data", "stride_batch", "stride_seqlen", "stride_head", "stride_dim", "vectorized")):
        assertions.append(f"OFFSET(TensorView, {name}) == {8 * i}")
    for i, name in enumerate(("data", "stride_batch", "stride_head", "stride_seqlen")):
        assertions.append(f"OFFSET(RowView, {name}) == {8 * i}")
    assertions.append(f"sizeof(RowStatistics) == {planning.ROW_STATISTICS_BYTES}")
    ptx = compile_with(tmp_path, monkeypatch, assertions)
    for name, (template, tail) in (("forward", packed["ForwardArguments"]), ("backward", packed["BackwardArguments"])):
        assert f".param .align 8 .b8 {name}_param_0[{template.size + len(tail) + features.size}]" in ptx


def test_a_wrong_offset_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    with pytest.raises(CompileError) as caught:
        compile_with(tmp_path, monkeypatch, ["OFFSET(ForwardArguments, lse.data) == 8"])
    assert "static assertion failed" in caught.value.log


# --- What is packed -----------------------------------------------------------------------------------------------------------------------


def view_of(template: ArgumentTemplate, name: str, pointers: dict[str, int] | None = None) -> tuple[Any, ...]:
    """A packed TensorView: address, four strides, vectorized."""
    return struct.unpack_from("=Q4qi", template.fill(pointers or {}), offset_of(template, name))


def rows_of(template: ArgumentTemplate, name: str) -> tuple[Any, ...]:
    """A packed RowView: address, three strides."""
    return struct.unpack_from("=Q3q", template.fill({}), offset_of(template, name))


def geometry_of(tail: bytes) -> dict[str, Any]:
    return dict(zip(GEOMETRY, struct.unpack_from("=6i3fi", tail), strict=True))


def test_fill_writes_the_given_addresses_and_leaves_the_template_alone() -> None:
    template, _ = forward(problem_of())
    empty = template.fill({})
    pointers = {"query": 0x1000, "key": 2**63, "value": 0x3000, "out": 2**64 - 16}
    assert {name: view_of(template, name, pointers)[0] for name in FORWARD_TENSORS} == pointers
    assert [view_of(template, name, pointers)[1:] for name in FORWARD_TENSORS] == [view_of(template, name)[1:] for name in FORWARD_TENSORS]
    assert rows_of(template, "lse")[0] == 0, "not asked for: null, and the kernel leaves it out"
    assert template.fill({}) == empty


def test_strides_are_packed_in_the_order_of_the_struct() -> None:
    template, _ = forward(problem_of())
    assert view_of(template, "query") == (0, 9 * 64, 64, 16, 1, 1)
    assert view_of(template, "key") == (0, 7 * 32, 32, 16, 1, 1)
    assert rows_of(template, "lse") == (0, 36, 9, 1)
    assert view_of(forward(problem_of(), vectorized=False)[0], "query")[-1] == 0


def test_negative_and_64_bit_strides_are_packed_whole() -> None:
    x = numpy.lib.stride_tricks.as_strided(numpy.zeros(1, numpy.float16), (2, 9, 4, 16), (2 * 2**40, -2 * 2**33, -32, 2))
    y = numpy.zeros((2, 7, 4, 16), numpy.float16)
    template, _ = forward(make_problem(borrow(x, "query"), borrow(y, "key"), borrow(y, "value")))
    assert view_of(template, "query") == (0, 2**40, -(2**33), -16, 1, 1)


@pytest.mark.parametrize(
    ("scale", "scale_log2", "sign"),
    [
        (0.5, 0.5 * math.log2(math.e), 1.0),
        (-0.5, 0.5 * math.log2(math.e), -1.0),
        (0.0, 1.0, 0.0),
        (2.0**127, 2.0**127 * math.log2(math.e), 1.0),
    ],
    ids=["positive", "negative", "zero", "largest"],
)
def test_scale_is_split_into_size_and_sign(scale: float, scale_log2: float, sign: float) -> None:
    """The running maximum needs a factor that does not reverse the order of scores."""
    geometry = geometry_of(forward(problem_of(scale=scale))[1])
    assert (geometry["scale"], geometry["scale_log2"], geometry["score_sign"]) == pytest.approx((scale, scale_log2, sign), rel=1e-7)


def test_geometry() -> None:
    geometry = geometry_of(forward(problem_of(is_causal=True, causal_alignment="bottom_right"))[1])
    names = ("batch", "seqlen_q", "seqlen_kv", "num_heads_q", "num_heads_kv", "causal_offset", "num_tiles")
    assert [geometry[name] for name in names] == [2, 9, 7, 4, 2, -2, 1]


def test_groups_of_the_backward_pass() -> None:
    _, tail = backward(problem_of())
    assert struct.unpack_from("=2i", tail, 4 * len(GEOMETRY)) == (1, 2), "two query heads are summed into each key head"


def test_without_a_gradient_of_lse_its_pointer_stays_null() -> None:
    template, _ = backward(problem_of(), grad_lse_strides=None)
    assert rows_of(template, "grad_lse") == (0, 0, 0, 0)
    assert rows_of(backward(problem_of())[0], "grad_lse") == (0, 36, 9, 1)


# --- Executables --------------------------------------------------------------------------------------------------------------------------


def test_a_kernel_is_loaded_once_for_all_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Loaded:
        def __init__(self, kernel: Any, on: Any) -> None:
            loaded.append(on.arch)

    monkeypatch.setattr(launch, "_SimulatorExecutable", Loaded)
    monkeypatch.setattr(launch, "_executables", {})
    on, other = device.of_arch("sm_80"), device.of_arch("sm_86")
    short, long, causal = (
        planning.make_plan(problem, on).kernels[0]
        for problem in (problem_of(), problem_of(return_lse=True, scale=2.0), problem_of(is_causal=True))
    )
    first = launch.executable(short, on)
    assert launch.executable(long, on) is first
    assert launch.executable(causal, on) is not first
    assert launch.executable(short, other) is not first
    assert loaded == ["sm_80", "sm_80", "sm_86"]


@pytest.mark.parametrize("current", [0, 1], ids=["same_device", "other_device"])
def test_a_gpu_launch_passes_the_struct_by_address_and_keeps_the_current_device(current: int) -> None:
    """All of it but the driver: what the kernel would read at the address of its parameter is what was packed."""
    template, tail = forward(problem_of())
    arguments = bytearray(template.fill({"query": 0x1000}) + tail)
    seen: list[Any] = []

    class Runtime:
        device = current

        def getDevice(self) -> int:
            return self.device

        def setDevice(self, index: int) -> None:
            self.device = index

    def driver_launch(function: int, *numbers: int) -> None:
        *grid_and_block, shared, stream, parameters, extra = numbers
        (address,) = struct.unpack("=Q", ctypes.string_at(parameters, 8))
        seen.append((function, grid_and_block, shared, stream, extra, runtime.device, ctypes.string_at(address, len(arguments))))

    runtime = Runtime()
    gpu = launch._GpuExecutable.__new__(launch._GpuExecutable)
    gpu._pointer, gpu._device, gpu._driver_launch, gpu._runtime, gpu._thread = 77, 0, driver_launch, runtime, threading.local()
    for _ in range(2):
        gpu.launch(12, 128, 4096, arguments, 5, ())
    assert seen == [(77, [12, 1, 1, 128, 1, 1], 4096, 5, 0, 0, bytes(arguments))] * 2
    assert runtime.device == current


@pytest.mark.parametrize("shared_bytes", [1024, 100_000])
def test_a_gpu_gets_the_bytes_that_were_fetched(shared_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of loading but the driver: no file stands between the checksum and the module."""
    done: list[tuple[Any, ...]] = []
    kernel = replace(planning.make_plan(problem_of(), device.of_arch("sm_80")).kernels[0], shared_bytes=shared_bytes)
    on = replace(device.of_arch("sm_80"), kind="gpu", index=3)

    class Module:
        def load(self, cubin: bytes) -> None:
            done.append(("load", cubin))

        def get_function(self, name: str) -> Any:
            done.append(("function", name))
            return SimpleNamespace(ptr=77)

    class Current:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            done.append(("enter", self.index))

        def __exit__(self, *_: object) -> None:
            done.append(("leave", self.index))

    driver = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        launchKernel=None,
        funcSetAttribute=lambda *numbers: done.append(("set", *numbers)),
    )
    cuda = SimpleNamespace(Device=Current, driver=driver, runtime=None, function=SimpleNamespace(Module=Module))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(launch.cache, "fetch", lambda request: Artifact(b"cubin", "", 0.0, (), ""))
    loaded = launch._GpuExecutable(kernel, on)
    setting = [("set", 77, 8, shared_bytes)] if shared_bytes > 48 * 1024 else []
    assert done == [("enter", 3), ("load", b"cubin"), ("function", kernel.entry), *setting, ("leave", 3)]
    assert (loaded._pointer, loaded._device) == (77, 3)


# --- Host cost ----------------------------------------------------------------------------------------------------------------------------


def test_a_warm_call_costs_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the launch, which does nothing here. benchmarks/bench_host_cost.py measures it; this keeps planning and checks out of the way.

    A call that is prepared anew costs ten times as much as one that is kept; the bound is generous, since machines that test are busy.
    """

    class Nothing:
        def launch(self, *arguments: Any) -> None:
            pass

    monkeypatch.setattr(launch, "executable", lambda kernel, on: Nothing())
    monkeypatch.setattr(calls, "_calls", {})
    # Small arrays: for large ones NumPy asks the operating system for memory every time.
    query, key, value = (numpy.zeros((2, 16, 4, 64), numpy.float16) for _ in range(3))
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True)
    microseconds = {"forward": [0.0] * 500, "backward": [0.0] * 500}
    for i in range(500):
        start = time.perf_counter()
        cuflash.scaled_dot_product_attention(query, key, value, return_lse=True)
        half_way = time.perf_counter()
        cuflash.scaled_dot_product_attention_backward(out, query, key, value, out, lse)
        microseconds["forward"][i] = 1e6 * (half_way - start)
        microseconds["backward"][i] = 1e6 * (time.perf_counter() - half_way)
    assert min(microseconds["forward"]) <= 60
    assert min(microseconds["backward"]) <= 120
