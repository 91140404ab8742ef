"""Where kernels run: a GPU through CuPy and the driver, or the simulator, which has no time but shows that a measurement runs to its end.

Both have the same methods. `launch` takes arguments in the kernel's order: arrays of the machine, `bytes` (structs and tensor maps, aligned to 64 bytes if
they are 128 long), or (struct format, value).
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from gpu_constants import programs

Argument = Any


def pack(arguments: Sequence[Argument], address_of: Callable[[Any], int]) -> tuple[bytes, list[int]]:
    """(parameter block, offset of each argument) as C lays them out."""
    block, offsets = b"", []
    for argument in arguments:
        if isinstance(argument, bytes):
            data, alignment = argument, 64 if len(argument) == 128 else 4
        elif isinstance(argument, tuple):
            data = struct.pack("<" + argument[0], argument[1])
            alignment = len(data)
        else:
            data, alignment = struct.pack("<Q", address_of(argument)), 8
        block += bytes(-len(block) % alignment)
        offsets.append(len(block))
        block += data
    return block, offsets


class Gpu:
    """The first GPU that CuPy finds."""

    dry = False

    def __init__(self, cubins: Path | None) -> None:
        import cupy

        self._cupy, self._cubins = cupy, cubins
        self._functions: dict[str, tuple[Any, int]] = {}
        self._modules: dict[str, Any] = {}
        cupy.cuda.Device(0).use()
        cupy.zeros(1)  # makes the context
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name = properties["name"].decode()
        self.num_sms = int(properties["multiProcessorCount"])
        runtime, driver = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()
        self.facts = {
            "gpu": self.name,
            "num_sms": self.num_sms,
            "compute_capability": f"{properties['major']}.{properties['minor']}",
            "l2_bytes": int(properties["l2CacheSize"]),
            "driver": driver,
            "runtime": runtime,
        }

    def array(self, shape: Any, dtype: Any) -> Any:
        return self._cupy.zeros(shape, dtype)

    def put(self, array: Any) -> Any:
        return self._cupy.asarray(array)

    def get(self, array: Any) -> Any:
        return self._cupy.asnumpy(array)

    def wait(self) -> None:
        self._cupy.cuda.runtime.deviceSynchronize()

    def _module(self, program: str) -> Any:
        module = self._modules.get(program)
        if module is None:
            path = self._cubins / f"{program}.cubin" if self._cubins else None
            data = path.read_bytes() if path is not None and path.is_file() else programs.compile_program(program, "cubin")[0]
            module = self._cupy.cuda.function.Module()
            module.load(data)
            self._modules[program] = module
        return module

    def launch(self, program: str, kernel: str, grid: int, block: int, shared: int, *arguments: Argument) -> None:
        if kernel not in self._functions:
            function = self._module(program).get_function(kernel)
            if shared > 40 * 1024:  # with static shared memory beside it
                self._cupy.cuda.driver.funcSetAttribute(function.ptr, 8, shared)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._functions[kernel] = function, shared
        function, allowed = self._functions[kernel]
        if shared > max(allowed, 40 * 1024):
            self._cupy.cuda.driver.funcSetAttribute(function.ptr, 8, shared)
            self._functions[kernel] = function, shared
        data, offsets = pack(arguments, lambda array: array.data.ptr)
        parameters = ctypes.create_string_buffer(data, max(len(data), 8))
        pointers = (ctypes.c_void_p * max(len(offsets), 1))(*[ctypes.addressof(parameters) + offset for offset in offsets])
        stream = self._cupy.cuda.get_current_stream().ptr
        self._cupy.cuda.driver.launchKernel(function.ptr, grid, 1, 1, block, 1, 1, shared, stream, ctypes.addressof(pointers), 0)

    def tensor_map(self, array: Any, columns: int, rows: int, box: tuple[int, int]) -> bytes:
        """Of a matrix of 2-byte elements with 128-byte swizzle."""
        storage = ctypes.create_string_buffer(256)
        address = (ctypes.addressof(storage) + 127) // 128 * 128
        dims = (ctypes.c_uint64 * 2)(columns, rows)
        strides = (ctypes.c_uint64 * 1)(2 * columns)
        boxes = (ctypes.c_uint32 * 2)(*box)
        steps = (ctypes.c_uint32 * 2)(1, 1)
        encode = _driver().cuTensorMapEncodeTiled
        encode.restype = ctypes.c_int
        code = encode(
            ctypes.c_void_p(address), ctypes.c_int(9), ctypes.c_uint32(2), ctypes.c_void_p(array.data.ptr), dims, strides, boxes, steps,
            ctypes.c_int(0), ctypes.c_int(3), ctypes.c_int(2), ctypes.c_int(0),
        )  # fmt: skip
        if code != 0:
            raise RuntimeError(f"cuTensorMapEncodeTiled returned {code}")
        return ctypes.string_at(address, 128)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class Simulated:
    """cuflash's simulator; needs no GPU and tells no time."""

    dry = True
    name, num_sms = "simulator", 4

    def __init__(self, cubins: Path | None = None) -> None:
        self.facts = {"gpu": self.name, "num_sms": self.num_sms}
        self._modules: dict[str, Any] = {}

    def array(self, shape: Any, dtype: Any) -> Any:
        return aligned(numpy.zeros(shape, dtype))

    def put(self, array: Any) -> Any:
        return aligned(array)

    def get(self, array: Any) -> Any:
        return array.copy()

    def wait(self) -> None:
        pass

    def launch(self, program: str, kernel: str, grid: int, block: int, shared: int, *arguments: Argument) -> None:
        from cuflash.simulator import Buffer, Module, Options

        if kernel not in self._modules:
            self._modules[kernel] = Module(programs.compile_program(program, "ptx")[0], kernel)
        block_of_parameters, _ = pack(arguments, lambda array: array.ctypes.data)
        buffers = [Buffer(a.ctypes.data, a.nbytes, f"argument {i}") for i, a in enumerate(arguments) if isinstance(a, numpy.ndarray)]
        buffers += [Buffer(a.ctypes.data, a.nbytes, "tensor") for a in self._tensors if a.nbytes]
        options = Options(checks=False, max_instructions=1 << 24)
        self._modules[kernel].launch((grid, 1, 1), (block, 1, 1), shared, block_of_parameters, buffers, options)

    _tensors: tuple[Any, ...] = ()

    def tensor_map(self, array: Any, columns: int, rows: int, box: tuple[int, int]) -> bytes:
        from cuflash.simulator.tensor_map import encode_tiled

        self._tensors = (array,)
        return encode_tiled(array.ctypes.data, "bfloat16", (columns, rows), (2 * columns,), box, swizzle="128B")


def aligned(array: Any) -> Any:
    """A copy at an address that is a multiple of 256."""
    storage = numpy.empty(array.nbytes + 256, numpy.uint8)
    start = -storage.ctypes.data % 256
    copy = storage[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
