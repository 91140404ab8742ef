"""`cuflash.runtime`: what is packed into a kernel's struct, how kernels are loaded and launched, and what a warm call costs."""

from __future__ import annotations

import ctypes
import math
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from problems import checked

import cuflash
from cuflash.errors import CompileError
from cuflash.hardware import device
from cuflash.jit.compiler import Artifact, KernelResources
from cuflash.planning import planner
from cuflash.planning.argument_structs import FORWARD_ARGUMENTS, MERGE_PARTS, ROW_VIEW, Struct
from cuflash.planning.kernel_plan import LaunchShape
from cuflash.planning.kernel_specs import KernelSpec
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile
from cuflash.runtime import arguments, calls, launch
from cuflash.runtime.arguments import Arguments

POINTERS = {"query": 0x1000, "key": 2**63, "value": 0x3000, "out": 2**64 - 16, "lse": 0x5000}


def problem_of(**options: Any) -> Problem:
    query, key = numpy.zeros((2, 9, 4, 16), numpy.float16), numpy.zeros((2, 7, 2, 16), numpy.float16)
    return checked(query, key, key, enable_gqa=True, **options)


def unpacked(layout: Struct, data: Any) -> dict[str, Any]:
    """Every scalar of a struct by its C++ name."""
    assert memoryview(data).nbytes == layout.size
    return {path: struct.unpack_from("=" + scalar.format, data, offset)[0] for path, offset, scalar in layout.scalars()}


def forward(problem: Problem, vectorized: bool = True, addresses: dict[str, int] | None = None) -> dict[str, Any]:
    (kernel,) = planner.make_plan(problem, device.of_arch("sm_80")).kernels
    views = {"query": problem.query, "key": problem.key, "value": problem.value, "out": problem.query}
    values: dict[str, Any] = {name: arguments.tensor(name, view, vectorized) for name, view in views.items()}
    values |= {"lse": arguments.rows("lse", (36, 9, 1)), "geometry": arguments.geometry(problem, kernel.num_tiles)}
    values |= {"lengths": arguments.lengths(problem), "features": arguments.feature_values(problem.features, problem.scale)}
    return unpacked(FORWARD_ARGUMENTS, Arguments(FORWARD_ARGUMENTS, values, addresses or {}).fill(addresses or {}))


# --- What is packed -----------------------------------------------------------------------------------------------------------------------


def test_fill_writes_the_given_addresses_and_leaves_the_rest_alone() -> None:
    empty, filled = forward(problem_of()), forward(problem_of(), addresses=POINTERS)
    assert {name: filled[f"{name}.data"] for name in POINTERS} == POINTERS
    assert {name for name in empty if empty[name] != filled[name]} == {f"{name}.data" for name in POINTERS}
    assert not any(empty[f"{name}.data"] for name in POINTERS), "not given: null"


def test_a_template_is_filled_again_and_again() -> None:
    packed = Arguments(ROW_VIEW, arguments.rows("lse", (3, 2, 1)), ("lse",))
    assert [unpacked(ROW_VIEW, packed.fill({"lse": address, "out": 7}))["data"] for address in (1, 2, 1)] == [1, 2, 1]
    assert packed.names == ("lse",)


def test_fields_that_are_left_out_are_zero() -> None:
    assert not any(Arguments(FORWARD_ARGUMENTS, {}, ()).fill({}))
    (_, *others) = Arguments(MERGE_PARTS, {"listed": [{"lse": {"stride_head": 5}}]}, ()).fill({})
    assert sum(map(bool, others)) == 1


@pytest.mark.parametrize(
    "values",
    [{"qwery": {}}, {"query": {"stride_bach": 1}}, {"query": 5}, {"lse": {"data": {}}}, {"query": {"stride_batch": "query"}}],
    ids=["unknown", "unknown_within", "number_for_a_struct", "struct_for_a_number", "address_for_a_stride"],
)
def test_values_have_to_fit_the_struct(values: Any) -> None:
    with pytest.raises(AssertionError):
        Arguments(FORWARD_ARGUMENTS, values, ("query",))


def test_strides_are_packed_in_the_order_of_the_struct() -> None:
    packed = forward(problem_of())
    strides = [f"stride_{axis}" for axis in ("batch", "seqlen", "head", "dim")]
    assert [packed[f"query.{name}"] for name in (*strides, "vectorized")] == [9 * 64, 64, 16, 1, 1]
    assert [packed[f"key.{name}"] for name in (*strides, "vectorized")] == [7 * 32, 32, 16, 1, 1]
    assert [packed[f"lse.stride_{axis}"] for axis in ("batch", "head", "seqlen")] == [36, 9, 1]
    assert forward(problem_of(), vectorized=False)["query.vectorized"] == 0


def test_negative_and_64_bit_strides_are_packed_whole() -> None:
    x = numpy.lib.stride_tricks.as_strided(numpy.zeros(1, numpy.float16), (2, 9, 4, 16), (2 * 2**40, -2 * 2**33, -32, 2))
    y = numpy.zeros((2, 7, 4, 16), numpy.float16)
    packed = forward(checked(x, y, y))
    assert [packed[f"query.stride_{axis}"] for axis in ("batch", "seqlen", "head", "dim")] == [2**40, -(2**33), -16, 1]


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
    packed = forward(problem_of(scale=scale))
    assert tuple(packed[f"geometry.{name}"] for name in ("scale", "scale_log2", "score_sign")) == pytest.approx(
        (scale, scale_log2, sign), rel=1e-7
    )


def test_geometry() -> None:
    packed = forward(problem_of(is_causal=True, causal_alignment="bottom_right"))
    names = ("batch", "seqlen_q", "seqlen_kv", "num_heads_q", "num_heads_kv", "causal_offset", "num_tiles")
    assert [packed[f"geometry.{name}"] for name in names] == [2, 9, 7, 4, 2, -2, 1]


def recorded(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, dict[str, Any]]:
    """The structs that the kernels of a backward call get."""
    found: dict[str, dict[str, Any]] = {}

    class Recorder:
        def __init__(self, spec: KernelSpec) -> None:
            self.spec = spec

        def launch(self, shape: Any, packed: Any, *rest: Any) -> None:
            found[self.spec.name] = unpacked(self.spec.arguments, packed)

    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    monkeypatch.setattr(launch, "executable", lambda kernel, on: Recorder(kernel.spec))
    monkeypatch.setattr(calls, "_calls", {})
    query, key = numpy.zeros((2, 9, 4, 16), numpy.float16), numpy.zeros((2, 7, 2, 16), numpy.float16)
    lse = numpy.zeros((2, 4, 9), numpy.float32)
    cuflash.scaled_dot_product_attention_backward(query, query, key, key, query, lse, enable_gqa=True, **options)
    return found


def test_groups_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = recorded(monkeypatch)["backward_dkdv"]
    assert (packed["group_batch"], packed["group_heads"]) == (1, 2), "two query heads are summed into each key head"


@pytest.mark.parametrize("given", [False, True])
def test_without_a_gradient_of_lse_its_view_stays_null(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grad_lse = numpy.zeros((2, 4, 9), numpy.float32)
    packed = recorded(monkeypatch, grad_lse=grad_lse if given else None)["backward_delta"]
    wanted = [grad_lse.ctypes.data, 36, 9, 1] if given else [0] * 4
    assert [packed[f"grad_lse.{name}"] for name in ("data", "stride_batch", "stride_head", "stride_seqlen")] == wanted


def test_a_seed_is_packed_in_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for packed in recorded(monkeypatch, dropout_p=0.25, dropout_seed=(2**63 + 5, 7)).values():
        assert (packed["features.dropout_seed"], packed["features.dropout_offset"], packed["features.dropout_state"]) == (2**63 + 5, 7, 0)
        assert packed["features.dropout_limit"] == 2**30 - 1


def test_lists_of_tiles_are_made_with_the_geometry_of_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = recorded(monkeypatch, attn_mask=numpy.zeros((9, 7), bool))
    assert packed["visible_tiles"]["features.visible_tiles"] == packed["backward_dq"]["features.visible_tiles"] != 0
    assert packed["visible_tiles"]["geometry.num_tiles"] == packed["backward_dq"]["geometry.num_tiles"]
    assert "query.data" not in packed["visible_tiles"]


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
        planner.make_plan(problem, on).kernels[0]
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
    packed = Arguments(ROW_VIEW, arguments.rows("lse", (3, 2, 1)), ("lse",)).fill({"lse": 0x1000})
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
        seen.append((function, grid_and_block, shared, stream, extra, runtime.device, ctypes.string_at(address, len(bytes(packed)))))

    runtime = Runtime()
    gpu = launch._GpuExecutable.__new__(launch._GpuExecutable)
    gpu._pointer, gpu._device, gpu._driver_launch, gpu._runtime, gpu._thread = 77, 0, driver_launch, runtime, threading.local()
    for _ in range(2):
        gpu.launch(LaunchShape(12, 128, 4096), packed, 5, ())
    assert seen == [(77, [12, 1, 1, 128, 1, 1], 4096, 5, 0, 0, bytes(packed))] * 2
    assert runtime.device == current


@pytest.mark.parametrize("shared_bytes", [1024, 100_000])
def test_a_gpu_gets_the_bytes_that_were_fetched(shared_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of loading but the driver: no file stands between the checksum and the module."""
    done: list[tuple[Any, ...]] = []
    kernel = replace(planner.make_plan(problem_of(), device.of_arch("sm_80")).kernels[0], shape=LaunchShape(1, 128, shared_bytes))
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


SERIALIZED = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ... in the function 'forward_wgmma'"


@pytest.mark.parametrize("tile", [Tile(192, 80, 12, 2), Tile(128, 80, 8, 2)], ids=str)
@pytest.mark.parametrize("doctored", ["not", "fewer registers", "serialised"])
def test_a_compilation_of_which_warps_would_wait_for_ever_is_not_run(doctored: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setmaxnreg hands on are the registers that threads start with."""
    on = device.of_arch("sm_90", "gpu")
    query = numpy.zeros((1, 9, 1, 128), numpy.float16)
    (kernel,) = planner.make_plan(checked(query, query, query), on, tile={"forward_wgmma": tile}).kernels
    registers = {12: 128, 8: 168}[tile.num_warps] - 8 * (doctored == "fewer registers")
    log = SERIALIZED if doctored == "serialised" else ""
    artifact = Artifact(b"cubin", log, 0.0, (KernelResources("forward_wgmma", registers, 0, 0, 0, 0, 4),), "NVRTC 13.7")
    if doctored == "not":
        launch.refuse_what_would_hang(kernel, artifact)
        return
    monkeypatch.setattr(launch.cache, "fetch", lambda request: artifact)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())  # nothing is loaded
    with pytest.raises(CompileError, match=r"NVRTC 13\.7 .* Another kernel takes the call: .* tile={'forward': …}"):
        launch._GpuExecutable(kernel, on)


# --- Host cost ----------------------------------------------------------------------------------------------------------------------------


YARDSTICK_MICROSECONDS = 22.0


def test_a_warm_call_costs_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the launch, which does nothing here. benchmarks/bench_host_cost.py measures it; this keeps planning and checks out of the way.

    A call that is prepared anew costs ten times as much as one that is kept; the bounds are generous, since machines that test are busy. They are those of a
    machine that makes a dictionary of 200 numbers and their texts within 22 µs; one that is slower just now is given as much longer.
    """

    class Nothing:
        def launch(self, *arguments: Any) -> None:
            pass

    monkeypatch.setattr(launch, "executable", lambda kernel, on: Nothing())
    monkeypatch.setattr(calls, "_calls", {})
    # Small arrays: for large ones NumPy asks the operating system for memory every time.
    query, key, value = (numpy.zeros((2, 16, 4, 64), numpy.float16) for _ in range(3))
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True)
    least = {"forward": math.inf, "backward": math.inf, "yardstick": math.inf}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        least[name] = min(least[name], 1e6 * (time.perf_counter() - start))

    for _ in range(500):
        timed("forward", lambda: cuflash.scaled_dot_product_attention(query, key, value, return_lse=True))
        timed("backward", lambda: cuflash.scaled_dot_product_attention_backward(out, query, key, value, out, lse))
        timed("yardstick", lambda: {i: str(i) for i in range(200)})
    slowness = max(1.0, least["yardstick"] / YARDSTICK_MICROSECONDS)
    assert least["forward"] <= 60 * slowness
    assert least["backward"] <= 120 * slowness
