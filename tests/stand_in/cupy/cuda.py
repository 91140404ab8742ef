"""The device of the stand-in: memory, streams, graphs, launches, and NVRTC that gives PTX where a cubin is asked for."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cupy_backends
import numpy
from cupy_backends.cuda.libs import nvrtc as real_nvrtc

import cupy

ARCH = os.environ.get("STAND_IN_ARCH", "sm_90")
DEVICES = int(os.environ.get("STAND_IN_DEVICES", "2"))


class _Here(threading.local):
    """What a thread of the host has: its current device, whether a context is current, and its stream on each device."""

    def __init__(self) -> None:
        self.device, self.has_context = 0, False
        self.streams: dict[int, Stream] = {}
        self.allocator: Callable[[int], MemoryPointer] | None = None


_here = _Here()


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


# --- A device that may be lost ------------------------------------------------------------------------------------------------------------


class _State:
    lost = ""
    launches = 0

    def __init__(self) -> None:
        self.functions: list[Any] = []  # that were launched, each once


_state = _State()


def check_alive() -> None:
    """Raise as everything does once a kernel has gone wrong."""
    if _state.lost:
        raise CUDARuntimeError(f"cudaErrorLaunchFailure: unspecified launch failure ({_state.lost})")


def _count_launch(function: Any) -> None:
    is_first = function not in _state.functions
    if is_first:
        _state.functions.append(function)
    _state.launches += 1
    number, _, path = os.environ.get("STAND_IN_LOSS", "0").partition(" ")
    of_kernels = number.startswith("kernel:")
    if int(number.removeprefix("kernel:")) == (is_first and len(_state.functions) if of_kernels else _state.launches) > 0:
        with contextlib.suppress(FileExistsError), open(path, "x"):
            _state.lost = f"launch {number} of this process"


# --- Devices ------------------------------------------------------------------------------------------------------------------------------


def _set_device(index: int) -> None:
    if not 0 <= index < DEVICES:
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
    _here.device, _here.has_context = index, True


def _properties(index: int) -> dict[str, Any]:
    from cuflash.hardware import device

    documented = device.of_arch(ARCH, "gpu")
    return {
        "name": f"Stand-in {index}".encode(),
        "major": documented.capability // 10,
        "minor": documented.capability % 10,
        "multiProcessorCount": documented.num_sms,
        "sharedMemPerBlockOptin": documented.shared_memory_per_block,
        "sharedMemPerMultiprocessor": documented.shared_memory_per_sm,
        "regsPerMultiprocessor": documented.registers_per_sm,
        "totalGlobalMem": 1 << 30,
    }


class Device:
    """A device; current within `with`."""

    def __init__(self, index: int | None = None) -> None:
        self.id = _here.device if index is None else index
        self._previous: list[int] = []

    def __enter__(self) -> Device:
        self._previous.append(_here.device)
        _set_device(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        _here.device = self._previous.pop()

    def synchronize(self) -> None:
        check_alive()


def _memset_async(address: int, value: int, size: int, stream: int) -> None:
    check_alive()
    on = _streams.get(stream)
    if on is None or on.device not in (None, _here.device):
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid resource handle")
    if not any(memory.ptr <= address and address + size <= memory.ptr + memory.size for memory in live_memory()):
        raise CUDARuntimeError("cudaErrorInvalidValue: invalid argument")
    if on.captured is None:
        ctypes.memset(address, value, size)
    else:
        on.captured.append(lambda: ctypes.memset(address, value, size) and None)


def _is_capturing(stream: int) -> bool:
    check_alive()
    return _streams[stream].captured is not None


runtime = SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError,
    memsetAsync=_memset_async,
    streamIsCapturing=_is_capturing,
    getDevice=lambda: _here.device,
    setDevice=_set_device,
    getDeviceCount=lambda: DEVICES,
    getDeviceProperties=_properties,
    deviceGetPCIBusId=lambda index: f"0000:{index:02x}:00.0",
    deviceSynchronize=check_alive,
    driverGetVersion=lambda: 13000,
    runtimeGetVersion=lambda: 13000,
)


def is_available() -> bool:
    return DEVICES > 0


# --- Memory -------------------------------------------------------------------------------------------------------------------------------

_memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()


class Memory:
    """One allocation, of exactly the bytes that were asked for, so that the simulator sees what reaches beyond them."""

    def __init__(self, size: int) -> None:
        check_alive()
        _here.has_context = True
        self.size, self.device_id = size, _here.device
        space = numpy.full(size + 512, 0xFF, numpy.uint8)  # NaN, as what is left over from others may be
        begin = -space.ctypes.data % 512
        self.bytes = space[begin : begin + size]
        self.ptr = self.bytes.ctypes.data if size else 0
        if size:
            _memories[self.ptr] = self
        for stream in list(_streams.values()):
            if stream.captured is not None:
                stream.held.append(self)


def live_memory() -> list[Memory]:
    """All allocations that something still holds."""
    return list(_memories.values())


class MemoryPointer:
    """An address in an allocation."""

    def __init__(self, mem: Memory, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        check_alive()
        ctypes.memset(self.ptr, value, size)


class MemoryPool:
    """Counts what it gave. Nothing is used a second time: an address that is stale finds no memory."""

    def __init__(self) -> None:
        self._total = 0

    def malloc(self, size: int) -> MemoryPointer:
        self._total += -(-size // 512) * 512
        return MemoryPointer(Memory(size), 0)

    def total_bytes(self) -> int:
        return self._total

    def free_all_blocks(self) -> None:
        pass


_default_pool = MemoryPool()
_allocators: list[Callable[[int], MemoryPointer]] = [_default_pool.malloc]


def alloc(size: int) -> MemoryPointer:
    return (_here.allocator or _allocators[-1])(size)


def set_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> None:
    _allocators.append(allocator or (lambda size: MemoryPointer(Memory(size), 0)))


@contextlib.contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    previous, _here.allocator = _here.allocator, allocator
    try:
        yield
    finally:
        _here.allocator = previous


def get_default_memory_pool() -> MemoryPool:
    return _default_pool


# --- Streams, events, graphs --------------------------------------------------------------------------------------------------------------

_streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
_stream_numbers = itertools.count(0x5000)


class Stream:
    """A stream; current within `with`.

    Attributes:
        ptr: 0 for the default stream.
        captured: launches that a capture has seen; None outside of one.
        held: memory that was allocated during the capture, which its replays write to.
    """

    null: Stream

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr = 0 if null else next(_stream_numbers)
        self.device = None if null else _here.device  # the default stream is that of any device
        self.captured: list[Callable[[], None]] | None = None
        self.held: list[Memory] = []
        self._previous: list[tuple[int, Stream]] = []
        _streams[self.ptr] = self

    def __enter__(self) -> Stream:
        self._previous.append((_here.device, get_current_stream()))
        _here.streams[_here.device] = self
        return self

    def __exit__(self, *_: object) -> None:
        device, before = self._previous.pop()
        _here.streams[device] = before

    def synchronize(self) -> None:
        check_alive()
        if self.captured is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")

    def begin_capture(self) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self.captured, self.held = [], []

    def end_capture(self) -> Graph:
        assert self.captured is not None
        graph, self.captured, self.held = Graph(self.captured, self.held), None, []
        return graph


Stream.null = Stream(null=True)


def get_current_stream(device_id: int | None = None) -> Stream:
    return _here.streams.get(_here.device if device_id is None else device_id, Stream.null)


class Graph:
    """Captured launches; as with CuPy, whoever holds the graph has to hold the memory of other arrays."""

    def __init__(self, launches: list[Callable[[], None]], held: list[Memory]) -> None:
        self._launches, self._held = launches, held

    def launch(self, stream: Stream | None = None) -> None:
        for launch in self._launches:
            launch()


class Event:
    """A moment of the host's clock."""

    def record(self, stream: Stream | None = None) -> None:
        check_alive()
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        check_alive()


def get_elapsed_time(start: Event, end: Event) -> float:
    return 1000 * (end.at - start.at)


# --- Launches -----------------------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One that was made, or captured."""

    name: str
    device: int
    stream: int
    captured: bool


launches: list[Launch] = []
"""All launches of this process, for tests to look at."""

_functions: dict[int, Any] = {}


def handle_of(function: Any) -> int:
    """A handle for the driver; functions live as long as the process."""
    handle = 0x10000 + 16 * len(_functions)
    _functions[handle] = function
    return handle


def _refuse(error: str) -> None:
    raise CUDADriverError(error)


def _launch_kernel(
    handle: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared_bytes: int, stream: int, parameters: int, extra: int
) -> None:
    function, on = _functions[handle], _streams.get(stream)
    if _state.lost:
        _refuse("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")
    if not _here.has_context:
        _refuse("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
    if function.device != _here.device or on is None or on.device not in (None, _here.device):
        _refuse("CUDA_ERROR_INVALID_HANDLE: invalid resource handle")
    if shared_bytes > function.max_dynamic_shared_size_bytes or max(gy, gz) > 65535 or extra:
        _refuse("CUDA_ERROR_INVALID_VALUE: invalid argument")
    address = ctypes.c_void_p.from_address(parameters).value
    arguments, device = ctypes.string_at(address, function.simulated.param_bytes), _here.device
    launches.append(Launch(function.simulated.name, device, stream, on.captured is not None))

    def run() -> None:
        _count_launch(function)
        check_alive()
        buffers = [(memory.ptr, memory.size, "an array") for memory in live_memory() if memory.device_id == device]
        try:
            function.simulated.launch((gx, gy, gz), (bx, by, bz), shared_bytes, arguments, buffers)
        except Exception as error:
            _state.lost = str(error)
            raise CUDADriverError(f"CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered ({error})") from error

    if on.captured is None:
        run()
    else:
        on.captured.append(run)


def _set_attribute(handle: int, attribute: int, value: int) -> None:
    assert attribute == _MAX_DYNAMIC_SHARED_SIZE_BYTES
    _functions[handle].max_dynamic_shared_size_bytes = value


_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

driver = SimpleNamespace(
    CUDADriverError=CUDADriverError,
    launchKernel=_launch_kernel,
    funcSetAttribute=_set_attribute,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=_MAX_DYNAMIC_SHARED_SIZE_BYTES,
)


# --- NVRTC --------------------------------------------------------------------------------------------------------------------------------


def _compile_program(program: int, flags: tuple[str, ...]) -> None:
    kept = [flag.replace("-arch=sm_", "-arch=compute_") for flag in flags if not flag.startswith("--ptxas-options")]
    real_nvrtc.compileProgram(program, tuple(kept))


def _version() -> tuple[int, int]:
    """Unlike that of any real one, so that PTX under the name of a cubin has fingerprints of its own in every cache."""
    major, minor = real_nvrtc.getVersion()
    return 1000 + major, minor


def _cubin(program: int) -> bytes:
    ptx = real_nvrtc.getPTX(program)
    return (ptx.encode() if isinstance(ptx, str) else bytes(ptx)).rstrip(b"\0")


def _real_environment() -> Any:
    """CuPy's own module that finds the libraries that were installed beside it; its NVRTC looks for it in `cupy`."""
    path = Path(cupy_backends.__path__[0]).parent / "cupy" / "_environment.py"
    found = importlib.util.spec_from_file_location("cupy._environment", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


cupy._environment = _real_environment()
nvrtc = SimpleNamespace(
    NVRTCError=real_nvrtc.NVRTCError,
    createProgram=real_nvrtc.createProgram,
    compileProgram=_compile_program,
    destroyProgram=real_nvrtc.destroyProgram,
    getCUBIN=_cubin,
    getPTX=real_nvrtc.getPTX,
    getProgramLog=real_nvrtc.getProgramLog,
    getSupportedArchs=real_nvrtc.getSupportedArchs,
    getVersion=_version,
)
