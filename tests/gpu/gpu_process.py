"""A GPU in a process of its own: a kernel that hangs or breaks the context ends that process and nothing else.

`GpuProcess.run` hands over PTX, arguments and the shape of a launch, and gets the arrays back. Arguments are, in the kernel's order: (`"array"`, NumPy array),
(`"map"`, dict) for a tensor map of one of the arrays, (struct format, value) for a scalar. The arrays that come back are all of them, in order.

With CUFLASH_GPU_STAND_IN=1 in the environment the process runs kernels on the simulator, which rehearses everything but the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy

Argument = tuple[str, Any]
STAND_IN = os.environ.get("CUFLASH_GPU_STAND_IN") == "1"
DTYPES = {"uint8": 0, "uint16": 1, "uint32": 2, "int32": 3, "float16": 6, "float32": 7, "bfloat16": 9}
SWIZZLES = ("none", "32B", "64B", "128B")


def pack(arguments: Sequence[Argument], addresses: Sequence[int], encode: Callable[..., bytes]) -> tuple[bytes, list[int]]:
    """(parameter block, offset of each argument) as C lays them out; `addresses` are those of the arrays."""
    block, offsets, arrays = b"", [], iter(addresses)
    for kind, value in arguments:
        if kind == "map":
            data, alignment = encode(address=addresses[value["array"]], **{k: v for k, v in value.items() if k != "array"}), 64
        elif kind == "array":
            data, alignment = struct.pack("<Q", next(arrays)), 8
        else:
            data = struct.pack("<" + kind, value)
            alignment = len(data)
        block += bytes(-len(block) % alignment)
        offsets.append(len(block))
        block += data
    return block, offsets


# --- The simulator ------------------------------------------------------------------------------------------------------------------------


def aligned(array: Any) -> Any:
    """A copy at an address that is a multiple of 256, as device memory is."""
    storage = numpy.empty(array.nbytes + 256, numpy.uint8)
    copy = storage[-storage.ctypes.data % 256 :][: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run_on_simulator(ptx: bytes, kernel: str, arguments: Sequence[Argument], grid: int, block: int, shared: int) -> list[Any]:
    from cuflash.simulator import Buffer, Module
    from cuflash.simulator.tensor_map import encode_tiled

    arrays = [aligned(value) for kind, value in arguments if kind == "array"]
    parameters, _ = pack(arguments, [array.ctypes.data for array in arrays], encode_tiled)
    buffers = [Buffer(array.ctypes.data, array.nbytes, f"array {i}") for i, array in enumerate(arrays)]
    Module(ptx, kernel).launch((grid, 1, 1), (block, 1, 1), shared, parameters, buffers)
    return [numpy.array(array) for array in arrays]


# --- The GPU ------------------------------------------------------------------------------------------------------------------------------


def encode_by_driver(
    address: int,
    dtype: str,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    swizzle: str = "none",
    oob_fill: str = "zero",
) -> bytes:
    """What `cuflash.simulator.tensor_map.encode_tiled` does, by `cuTensorMapEncodeTiled`."""
    driver = ctypes.CDLL("libcuda.so.1")
    storage = ctypes.create_string_buffer(256)
    at = (ctypes.addressof(storage) + 127) // 128 * 128
    rank = len(dims)
    code = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), ctypes.c_int(DTYPES[dtype]), ctypes.c_uint32(rank), ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*dims), (ctypes.c_uint64 * max(rank - 1, 1))(*strides_bytes), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank), ctypes.c_int(0), ctypes.c_int(SWIZZLES.index(swizzle)), ctypes.c_int(0),
        ctypes.c_int(int(oob_fill == "nan")),
    )  # fmt: skip
    if code:
        raise RuntimeError(f"cuTensorMapEncodeTiled returned {code} for {dtype} {tuple(dims)}, box {tuple(box)}, swizzle {swizzle}")
    return ctypes.string_at(at, 128)


_modules: dict[bytes, Any] = {}
_functions: dict[tuple[bytes, str], Any] = {}


def run_on_gpu(ptx: bytes, kernel: str, arguments: Sequence[Argument], grid: int, block: int, shared: int) -> list[Any]:
    import cupy

    cupy.cuda.Device(0).use()
    arrays = [cupy.asarray(value) for kind, value in arguments if kind == "array"]  # also makes the context
    if ptx not in _modules:
        _modules[ptx] = cupy.cuda.function.Module()
        _modules[ptx].load(ptx + b"\0")  # the driver's assembler
    if (ptx, kernel) not in _functions:
        function = _functions[ptx, kernel] = _modules[ptx].get_function(kernel)
        if shared > 40 * 1024:
            cupy.cuda.driver.funcSetAttribute(function.ptr, 8, shared)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    function = _functions[ptx, kernel]
    data, offsets = pack(arguments, [array.data.ptr for array in arrays], encode_by_driver)
    parameters = ctypes.create_string_buffer(data, len(data))
    pointers = (ctypes.c_void_p * len(offsets))(*[ctypes.addressof(parameters) + offset for offset in offsets])
    cupy.cuda.driver.launchKernel(function.ptr, grid, 1, 1, block, 1, 1, shared, 0, ctypes.addressof(pointers), 0)
    cupy.cuda.runtime.deviceSynchronize()
    return [cupy.asnumpy(array) for array in arrays]


def _serve(connection: Any, path: list[str], stand_in: bool) -> None:
    sys.path[:] = path
    run = run_on_simulator if stand_in else run_on_gpu
    while True:
        request = connection.recv()
        try:
            connection.send((True, run(*request)))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))


class GpuProcess:
    """Starts a process at the first run, and a new one after any failure."""

    def __init__(self, stand_in: bool = STAND_IN) -> None:
        self._stand_in, self._process, self._connection = stand_in, None, None

    def run(
        self, ptx: bytes, kernel: str, arguments: Sequence[Argument], grid: int, block: int, shared: int, seconds: float = 15
    ) -> list[Any]:
        """The arrays after the launch.

        Raises:
            RuntimeError: the launch failed, or did not end within `seconds`.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, list(sys.path), self._stand_in), daemon=True)
            self._process.start()
            other.close()
            seconds += 30  # to import CuPy and make a context
        self._connection.send((ptx, kernel, list(arguments), grid, block, shared))
        answer: tuple[bool, Any] = (False, f"no answer within {seconds} s")
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll(seconds):
                answer = self._connection.recv()
        if not answer[0]:
            self.close()  # the context may be lost
            raise RuntimeError(f"{kernel}: {answer[1]}")
        return answer[1]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
        self._process = self._connection = None
