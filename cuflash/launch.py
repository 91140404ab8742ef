"""Kernels ready to run, and the packing of their one argument struct.

`executable` turns a `KernelPlan` into something that launches: on a GPU a function of a cubin loaded through CuPy, on the CPU a decoded PTX module of
the simulator. `ForwardArguments` and `BackwardArguments` mirror the structs of kernels/arguments.cuh: a template of bytes is packed once per call
signature, and a warm call copies it and writes the addresses.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy

from cuflash import cache
from cuflash.device import Device
from cuflash.features import Features
from cuflash.planning import KernelPlan
from cuflash.problem import Problem, View

if TYPE_CHECKING:
    from cuflash.simulator import Buffer


Strides3 = tuple[int, int, int]
"""Strides of (batch, head, query), in elements."""

_TENSOR_VIEW = struct.Struct("=Q4qii")
_ROW_VIEW = struct.Struct("=Q3q")
_GEOMETRY = struct.Struct("=6i3fi")
_GROUP = struct.Struct("=2i")
_FEATURE_NUMBERS = struct.Struct("=4i2fIf")
_LENGTHS = struct.Struct("=3Q2i")

_LOG2_E = 1.4426950408889634


# --- Argument structs ---------------------------------------------------------------------------------------------------------------------


def _pack_view(view: View, vectorized: bool) -> bytes:
    stride_b, stride_s, stride_h, stride_d = view.strides
    return _TENSOR_VIEW.pack(0, stride_b, stride_s, stride_h, stride_d, vectorized, 0)


def _pack_rows(strides: Strides3 | None) -> bytes:
    return bytes(_ROW_VIEW.size) if strides is None else _ROW_VIEW.pack(0, *strides)


def _pack_geometry(problem: Problem, num_tiles: int) -> bytes:
    (scale,) = struct.unpack("=f", struct.pack("=f", problem.scale))  # as the kernels hold it: what underflows there is 0
    return _GEOMETRY.pack(
        problem.batch, problem.seqlen_q, problem.seqlen_kv, problem.num_heads_q, problem.num_heads_kv,
        max(-(2**31) + 1, min(2**31 - 1, problem.causal_offset)),
        scale, abs(scale) * _LOG2_E if scale else 1.0, math.copysign(1.0, scale) if scale else 0.0, num_tiles,
    )  # fmt: skip


def features_template(problem: Problem, mask_grad_strides: tuple[int, ...] = (0, 0, 0, 0)) -> ArgumentTemplate:
    """`FeatureArguments` of kernels/feature_arguments.cuh. Its 64-bit words are filled in as addresses are."""
    features = problem.features
    return _features_template(features, problem.list_extents, problem.scale, mask_grad_strides)


def _features_template(features: Features, lists: tuple[int, int], scale: float, mask_grad_strides: tuple[int, ...]) -> ArgumentTemplate:
    mask = (0, 0, 0, 0) if features.attn_mask is None else features.attn_mask.strides
    unit = 1.0 if features.kinds.additive_mask else _LOG2_E  # of scores, as in kernels/tile/score.cuh
    factor = scale * unit if features.softcap is None else scale / features.softcap
    threshold = math.ceil(features.dropout_p * 2.0**32)
    kept_factor = 0.0 if features.dropout_p in (0.0, 1.0) else 1.0 / (1.0 - features.dropout_p)
    numbers = _FEATURE_NUMBERS.pack(
        *lists, features.window_low, features.window_high, factor, (features.softcap or 0.0) * unit, max(threshold - 1, 0), kept_factor
    )
    word = bytes(8)
    strides = struct.Struct("=2q").pack
    return ArgumentTemplate(
        [
            ("attn_mask", word + struct.pack("=4q", *mask)),
            ("grad_attn_mask", word + struct.pack("=4q", *mask_grad_strides)),
            ("alibi_slopes", word + strides(*features.alibi_strides)),
            ("sinks", word + strides(0, features.sinks_stride)),
            ("grad_sinks", word),
            ("segment_ids_q", word + strides(*features.segment_ids_q_strides)),
            ("segment_ids_kv", word + strides(*features.segment_ids_kv_strides)),
            ("prefix_lengths", word + strides(features.prefix_stride, 0)),
            ("visible_tiles", word),
            ("dropout_state", word),
            ("dropout_seed", word),
            ("dropout_offset", word + numbers),
            ("log2_sums", word),
        ]
    )


def dropout_mask_arguments(extents: tuple[int, ...], num_tiles: int, dropout_p: float, pointers: Mapping[str, int]) -> bytearray:
    """`DropoutMaskArguments` of kernels/arguments.cuh."""
    batch, heads, seqlen_q, seqlen_kv = extents
    geometry = _GEOMETRY.pack(batch, seqlen_q, seqlen_kv, heads, heads, 0, 1.0, 1.0, 1.0, num_tiles)
    features = _features_template(Features(dropout_p=dropout_p), (1, 1), 1.0, (0, 0, 0, 0))
    return bytearray(pointers["dropout_mask"].to_bytes(8, "little") + geometry + features.fill(pointers))


NO_FEATURE_BYTES = bytes(280)
"""`FeatureArguments` of a kernel that reads none of them."""

FORWARD_TENSORS = ("query", "key", "value", "out")
BACKWARD_TENSORS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")


class ArgumentTemplate:
    """The bytes of an argument struct with places for addresses.

    Attributes:
        names: pointers in the order of the struct.
        size: bytes of the struct without the tail.
    """

    def __init__(self, parts: Sequence[tuple[str, bytes]]) -> None:
        self.names = tuple(name for name, _ in parts)
        self._parts = [(name, data[8:]) for name, data in parts]  # what follows each pointer
        layout = struct.Struct("=" + "".join(f"Q{len(rest)}s" for _, rest in self._parts))
        self.size, self._pack = layout.size, layout.pack

    def fill(self, pointers: Mapping[str, int]) -> bytes:
        """The struct with the given addresses; a name that is not given is null."""
        return self._pack(*[piece for name, rest in self._parts for piece in (pointers.get(name, 0), rest)])


def forward_template(problem: Problem, out: View, lse_strides: Strides3, vectorized: Mapping[str, bool]) -> ArgumentTemplate:
    """`ForwardArguments` of kernels/arguments.cuh up to its geometry."""
    views = {"query": problem.query, "key": problem.key, "value": problem.value, "out": out}
    parts = [(name, _pack_view(views[name], vectorized[name])) for name in FORWARD_TENSORS]
    return ArgumentTemplate([*parts, ("lse", _pack_rows(lse_strides))])


def forward_tail(problem: Problem, kernel: KernelPlan) -> bytes:
    """The rest of `ForwardArguments` up to its lengths, which differs between kernels."""
    return _pack_geometry(problem, kernel.num_tiles)


def backward_template(
    views: Mapping[str, View], lse_strides: Strides3, grad_lse_strides: Strides3 | None, vectorized: Mapping[str, bool]
) -> ArgumentTemplate:
    """`BackwardArguments` of kernels/arguments.cuh up to its geometry."""
    parts = [(name, _pack_view(views[name], vectorized[name])) for name in BACKWARD_TENSORS]
    return ArgumentTemplate(
        [*parts, ("lse", _pack_rows(lse_strides)), ("grad_lse", _pack_rows(grad_lse_strides)), ("row_statistics", bytes(8))]
    )


def backward_tail(problem: Problem, kernel: KernelPlan) -> bytes:
    """The rest of `BackwardArguments` up to its lengths, which differs between kernels; of kernels that read no tensors only the geometry."""
    geometry = _pack_geometry(problem, kernel.num_tiles)
    return geometry + _GROUP.pack(kernel.group_batch, kernel.group_heads) if kernel.reads_tensors else geometry


LENGTHS = ("cu_seqlens_q", "cu_seqlens_kv", "seqlens_kv")


def lengths_template(problem: Problem) -> ArgumentTemplate:
    """`SequenceLengths` of kernels/arguments.cuh, which the features follow."""
    packed = _LENGTHS.pack(0, 0, 0, problem.num_sequences or 0, problem.causal_alignment == "bottom_right")
    return ArgumentTemplate([(name, packed[8 * i : 8 * i + 8] if i < 2 else packed[16:]) for i, name in enumerate(LENGTHS)])


# --- Executables --------------------------------------------------------------------------------------------------------------------------


class Executable(Protocol):
    """A loaded kernel."""

    def launch(
        self, num_blocks: int, num_threads: int, shared_bytes: int, arguments: bytearray, stream: int, buffers: Sequence[Buffer]
    ) -> None:
        """Start the kernel on `stream`; on the simulator, run it to its end within `buffers`."""


class _GpuExecutable:
    def __init__(self, kernel: KernelPlan, device: Device) -> None:
        import cupy

        artifact = cache.fetch(kernel.request(device))
        driver = cupy.cuda.driver
        with cupy.cuda.Device(device.index):  # whose context the module is loaded into
            module = cupy.cuda.function.Module()
            module.load(artifact.data)  # the bytes that were checked, not a file that may have changed since
            self._function = module.get_function(kernel.entry)  # keeps the module loaded
            self._pointer = self._function.ptr
            if kernel.shared_bytes > 48 * 1024:
                driver.funcSetAttribute(self._pointer, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared_bytes)
        self._device = device.index
        self._driver_launch = driver.launchKernel
        self._runtime = cupy.cuda.runtime
        self._thread = threading.local()

    def launch(
        self, num_blocks: int, num_threads: int, shared_bytes: int, arguments: bytearray, stream: int, buffers: Sequence[Buffer]
    ) -> None:
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

        # The base of shared memory is the compiler's to choose: no kernel may count on more than it declares.
        self._module = simulator.Module(cache.fetch(kernel.request(device)).data, kernel.entry, keep=True, aligned_as_declared=True)

    def launch(
        self, num_blocks: int, num_threads: int, shared_bytes: int, arguments: bytearray, stream: int, buffers: Sequence[Buffer]
    ) -> None:
        self._module.launch((num_blocks, 1, 1), (num_threads, 1, 1), shared_bytes, arguments, buffers)


def simulated_memory(extents: Mapping[str, tuple[int, int]], pointers: Mapping[str, int], written: Container[str]) -> list[Buffer]:
    """What the kernels of a call may touch; reading what is in `written` before a kernel has written it is an error."""
    from cuflash.simulator import Buffer

    return [
        Buffer(pointers[name] + low, size, name, numpy.zeros(size, numpy.uint8) if name in written else None)
        for name, (low, size) in extents.items()
        if name in pointers
    ]


_executables: dict[tuple[str, str, Device], Executable] = {}
_loading = threading.Lock()


def executable(kernel: KernelPlan, device: Device) -> Executable:
    """The loaded kernel; compiled and loaded once per process, device and configuration."""
    key = (kernel.source, kernel.config, device)
    loaded = _executables.get(key)
    if loaded is None:
        made = _SimulatorExecutable(kernel, device) if device.kind == "simulator" else _GpuExecutable(kernel, device)
        with _loading:
            loaded = _executables.setdefault(key, made)
    return loaded
