"""Kernels ready to run: `executable` turns a `KernelPlan` into something that launches.

On a GPU that is a function of a cubin loaded through CuPy, on the CPU a decoded PTX module of the simulator. Both are compiled on first use and kept.
"""

from __future__ import annotations

import array
import ctypes
import threading
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy

from cuflash.errors import CompileError
from cuflash.hardware.device import Device
from cuflash.jit import cache
from cuflash.jit.compiler import Artifact
from cuflash.planning import wgmma_backward, wgmma_forward
from cuflash.planning.kernel_plan import KernelPlan, LaunchShape
from cuflash.planning.kernel_specs import BACKWARD_DQ, FORWARD

if TYPE_CHECKING:
    from cuflash.simulator import Buffer


class Executable(Protocol):
    """A loaded kernel."""

    def launch(self, shape: LaunchShape, arguments: array.array[int], stream: int, buffers: Sequence[Buffer]) -> None:
        """Start the kernel on `stream`; on the simulator, run it to its end within `buffers`."""


_OneParameter = ctypes.c_void_p * 1


class _GpuExecutable:
    def __init__(self, kernel: KernelPlan, device: Device) -> None:
        import cupy

        artifact = cache.fetch(kernel.request(device))
        if kernel.spec.hands_on_registers:
            refuse_what_would_hang(kernel, artifact)
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

    def launch(self, shape: LaunchShape, arguments: array.array[int], stream: int, buffers: Sequence[Buffer]) -> None:
        block = ctypes.c_char.from_buffer(arguments)  # the first byte of the struct, which is kept alive by it
        parameters = _OneParameter(ctypes.addressof(block))
        num_blocks, num_threads, shared_bytes = shape
        previous = self._runtime.getDevice()
        if previous != self._device or not getattr(self._thread, "ready", False):
            self._runtime.setDevice(self._device)  # makes the primary context current in this thread
            self._thread.ready = True
        try:
            self._driver_launch(self._pointer, num_blocks, 1, 1, num_threads, 1, 1, shared_bytes, stream, ctypes.addressof(parameters), 0)
        finally:
            if previous != self._device:
                self._runtime.setDevice(previous)


_SERIALIZED = "(C75"
"""In the notes of ptxas on products that it had to serialise, such as C7510 and C7512."""


def refuse_what_would_hang(kernel: KernelPlan, artifact: Artifact) -> None:
    """Check what a kernel presumes whose warps hand registers to each other (`setmaxnreg`).

    They are those of the block, and a warp waits for as many as it asks for: with fewer than its source presumes it would wait for ever.

    Raises:
        CompileError: another compiler gives each thread other registers, or serialises products, for which it puts waits elsewhere.
    """
    if not artifact.resources:  # PTX, of which no assembler has said anything: a stand-in of a GPU runs it
        return
    presumed = kernel.registers_at_launch
    registers = artifact.resources_of(kernel.entry).registers
    serialized = [line for line in artifact.warnings if _SERIALIZED in line]
    if registers == presumed and not serialized:
        return
    got = (
        f"has {registers} registers per thread, and it hands on what {presumed} are" if registers != presumed else "has serialised products"
    )
    variable, other = (wgmma_backward.VARIABLE, BACKWARD_DQ) if kernel.spec.backward else (wgmma_forward.VARIABLE, FORWARD)
    way_out = f"Another kernel takes the call: set {variable}=0, leave {kernel.name} out of tile, or pin tile={{'{other.name}': …}}."
    message = f"{kernel.source} as {artifact.compiler} compiles it, with {kernel.num_threads} threads, {got}: it is not run. {way_out}"
    raise CompileError(message, log="\n".join(serialized), config=kernel.config)


class _SimulatorExecutable:
    def __init__(self, kernel: KernelPlan, device: Device) -> None:
        from cuflash import simulator

        # The base of shared memory is the compiler's to choose: no kernel may count on more than it declares.
        self._module = simulator.Module(cache.fetch(kernel.request(device)).data, kernel.entry, keep=True, aligned_as_declared=True)

    def launch(self, shape: LaunchShape, arguments: array.array[int], stream: int, buffers: Sequence[Buffer]) -> None:
        self._module.launch(
            (shape.num_blocks, 1, 1), (shape.num_threads, 1, 1), shape.shared_bytes, memoryview(arguments).cast("B"), buffers
        )


def fill_memory(device: Device, address: int, nbytes: int, stream: int, byte: int = 0) -> None:
    """The same byte all over memory of the device, in the order of the stream; a CUDA graph captures it."""
    if device.kind == "simulator":
        ctypes.memset(address, byte, nbytes)
        return
    from cupy.cuda import runtime

    previous = runtime.getDevice()
    if previous != device.index:
        runtime.setDevice(device.index)
    try:
        runtime.memsetAsync(address, byte, nbytes, stream)
    finally:
        if previous != device.index:
            runtime.setDevice(previous)


def simulated_memory(extents: Mapping[str, tuple[int, int]], addresses: Mapping[str, int], written: Container[str]) -> list[Buffer]:
    """What the kernels of a call may touch; reading what is in `written` before a kernel has written it is an error."""
    from cuflash.simulator import Buffer

    return [
        Buffer(addresses[name] + low, size, name, numpy.zeros(size, numpy.uint8) if name in written else None)
        for name, (low, size) in extents.items()
        if name in addresses
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
