"""Kernels ready to run, and the packing of their one argument struct.

`executable` turns a `KernelPlan` into something that launches: on a GPU a function of a cubin loaded through CuPy, on the CPU a decoded PTX module of
the simulator. `ForwardArguments` and `BackwardArguments` mirror the structs of kernels/arguments.cuh: a template of bytes is packed once per call
signature, and a warm call copies it and writes the addresses.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cuflash import cache
from cuflash.device import Device
from cuflash.planning import KernelPlan
from cuflash.problem import Problem, View

Buffer = tuple[int, int, str]
"""Address, size in bytes and name of memory that a kernel may touch."""

_TENSOR_VIEW = struct.Struct("=Q4qii")
_ROW_VIEW = struct.Struct("=Q3q")
_GEOMETRY = struct.Struct("=6i3fi")
_GROUP = struct.Struct("=2i")

_LOG2_E = 1.4426950408889634


# --- Argument structs ---------------------------------------------------------------------------------------------------------------------


def _pack_view(view: View | None, vectorized: bool) -> bytes:
    if view is None:
        return bytes(_TENSOR_VIEW.size)
    stride_b, stride_s, stride_h, stride_d = view.strides
    return _TENSOR_VIEW.pack(0, stride_b, stride_s, stride_h, stride_d, vectorized, 0)


def _pack_rows(strides: tuple[int, int, int] | None) -> bytes:
    return bytes(_ROW_VIEW.size) if strides is None else _ROW_VIEW.pack(0, *strides)


def _pack_geometry(problem: Problem, num_tiles: int) -> bytes:
    scale = problem.scale
    return _GEOMETRY.pack(
        problem.batch, problem.seqlen_q, problem.seqlen_kv, problem.num_heads_q, problem.num_heads_kv,
        max(-(2**31) + 1, min(2**31 - 1, problem.causal_offset)),
        scale, abs(scale) * _LOG2_E if scale else 1.0, math.copysign(1.0, scale) if scale else 0.0, num_tiles,
    )  # fmt: skip


FORWARD_TENSORS = ("query", "key", "value", "out")
BACKWARD_TENSORS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")


class ArgumentTemplate:
    """The bytes of an argument struct with null pointers, and where each pointer goes.

    Attributes:
        size: bytes.
        offsets: byte offset of each pointer by name.
    """

    def __init__(self, parts: Sequence[tuple[str | None, bytes]]) -> None:
        self.offsets: dict[str, int] = {}
        packed = bytearray()
        for name, data in parts:
            if name is not None:
                self.offsets[name] = len(packed)
            packed += data
        self._bytes = bytes(packed)
        self.size = len(packed)

    def fill(self, pointers: dict[str, int]) -> bytearray:
        """A copy with the given addresses written."""
        packed = bytearray(self._bytes)
        for name, address in pointers.items():
            struct.pack_into("=Q", packed, self.offsets[name], address)
        return packed


def forward_template(problem: Problem, kernel: KernelPlan, out: View, lse_strides: tuple[int, int, int], vectorized: dict[str, bool]) -> ArgumentTemplate:
    """`ForwardArguments` of kernels/arguments.cuh."""
    views = {"query": problem.query, "key": problem.key, "value": problem.value, "out": out}
    return ArgumentTemplate(
        [
            *((name, _pack_view(views[name], vectorized[name])) for name in FORWARD_TENSORS),
            ("lse", _pack_rows(lse_strides)),
            (None, _pack_geometry(problem, kernel.num_tiles)),
        ]
    )


def backward_template(
    problem: Problem,
    kernel: KernelPlan,
    views: dict[str, View],
    lse_strides: tuple[int, int, int],
    grad_lse_strides: tuple[int, int, int] | None,
    vectorized: dict[str, bool],
) -> ArgumentTemplate:
    """`BackwardArguments` of kernels/arguments.cuh."""
    return ArgumentTemplate(
        [
            *((name, _pack_view(views[name], vectorized[name])) for name in BACKWARD_TENSORS),
            ("lse", _pack_rows(lse_strides)),
            ("grad_lse", _pack_rows(grad_lse_strides)),
            ("row_statistics", bytes(8)),
            (None, _pack_geometry(problem, kernel.num_tiles)),
            (None, _GROUP.pack(kernel.group_batch, kernel.group_heads)),
        ]
    )


# --- Executables --------------------------------------------------------------------------------------------------------------------------


class Executable(Protocol):
    """A loaded kernel."""

    def launch(self, num_blocks: int, num_threads: int, shared_bytes: int, arguments: bytearray, stream: int, buffers: Sequence[Buffer]) -> None:
        """Start the kernel on `stream`; on the simulator, run it to its end within `buffers`."""


class _GpuExecutable:
    def __init__(self, kernel: KernelPlan, device: Device) -> None:
        import cupy

        request = kernel.request(device)
        artifact = cache.fetch(request)
        with cupy.cuda.Device(device.index):
            path = cache.path_of(request)
            if path is not None:
                function = cupy.RawModule(path=str(path)).get_function(kernel.entry)
            else:  # nowhere to write: RawModule reads files only
                with tempfile.TemporaryDirectory(prefix="cuflash-") as directory:
                    file = Path(directory, "kernel.cubin")
                    file.write_bytes(artifact.data)
                    function = cupy.RawModule(path=str(file)).get_function(kernel.entry)
            if kernel.shared_bytes > 48 * 1024:
                function.max_dynamic_shared_size_bytes = kernel.shared_bytes
        self._function = function  # keeps the module loaded
        self._pointer = function.kernel.ptr
        self._device = device.index
        self._driver_launch = cupy.cuda.driver.launchKernel
        self._runtime = cupy.cuda.runtime
        self._thread = threading.local()

    def launch(self, num_blocks: int, num_threads: int, shared_bytes: int, arguments: bytearray, stream: int, buffers: Sequence[Buffer]) -> None:
        block = (ctypes.c_char * len(arguments)).from_buffer(arguments)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        previous = self._runtime.getDevice()
        if previous != self._device or not getattr(self._thread, "ready", False):
            self._runtime.setDevice(self._device)  # makes the primary context current in this thread
            self._thread.ready = True
        try:
            self._driver_launch(self._pointer, num_blocks, 1, 1, num_threads, 1, 1, shared_bytes, stream, ctypes.addressof(parameters), 0)
        finally:
            if previous != self._device:
                self._runtime.setDevice(previous)


class _SimulatorExecutable:
    def __init__(self, kernel: KernelPlan, device: Device) -> None:
        from cuflash import simulator

        self._module = simulator.Module(cache.fetch(kernel.request(device)).data, kernel.entry)

    def launch(self, num_blocks: int, num_threads: int, shared_bytes: int, arguments: bytearray, stream: int, buffers: Sequence[Buffer]) -> None:
        self._module.launch((num_blocks, 1, 1), (num_threads, 1, 1), shared_bytes, arguments, buffers)


@functools.lru_cache(maxsize=4096)
def _load(source: str, config: str, kernel: _KernelKey, device: Device) -> Executable:
    return _SimulatorExecutable(kernel.plan, device) if device.kind == "simulator" else _GpuExecutable(kernel.plan, device)


class _KernelKey:
    """Carries a plan past `lru_cache` without taking part in its key: grids differ from call to call, the kernel does not."""

    def __init__(self, plan: KernelPlan) -> None:
        self.plan = plan

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _KernelKey)


def executable(kernel: KernelPlan, device: Device) -> Executable:
    """The loaded kernel; compiled and loaded once per process, device and configuration."""
    return _load(kernel.source, kernel.config, _KernelKey(kernel), device)
