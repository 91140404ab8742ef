"""Tensor maps: the 128 bytes by which the TMA unit knows an array and the boxes that are copied from it.

On a GPU the driver encodes them, on the CPU the simulator. A map holds an address, so each address where an array has lain has one, which is kept.
Encoding reads no memory of a GPU and waits for nothing; a CUDA graph captures the bytes with the launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

from cuflash.errors import DeviceError, SetupError
from cuflash.problem.layout import View

NBYTES = 128
ROW_BYTES = 128
"""Of a box, which is what the swizzle spans."""

_ALIGNMENT = 128
_MAX_MAPS = 64  # of one array that lies here and there, such as in every layer of a model
_TYPES = {"uint8": 0, "float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_ITEMSIZES = {"uint8": 1, "float16": 2, "bfloat16": 2}
_SWIZZLE_128B, _PROMOTION_256B = 3, 3  # CUtensorMapSwizzle, CUtensorMapL2promotion

Encode: TypeAlias = Callable[[int, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], bytes]
"""(address, dtype, extents, strides in bytes of all but the first, box), innermost dimension first -> the map."""


class TensorMap:
    """The map of one array, for boxes of 128 bytes of columns and some rows.

    Attributes:
        name: of the array's address among those of a launch.
        head_factor, batch_factor: what the number of a head or batch is multiplied by to have its coordinate: 0 along an axis that is broadcast, of which the map has one place, else 1.
    """

    def __init__(self, name: str, view: View, dtype: str, box_rows: int, gpu: int | None) -> None:
        """`gpu` is the index of the device that the array lies on, None for the simulator's."""
        batch, seqlen, heads, head_dim = view.shape
        stride_b, stride_s, stride_h, _ = view.strides
        self.name = name
        self.batch_factor, self.head_factor = int(stride_b != 0 and batch > 1), int(stride_h != 0 and heads > 1)
        axes = ((seqlen, stride_s), (heads if self.head_factor else 1, stride_h), (batch if self.batch_factor else 1, stride_b))
        itemsize = _ITEMSIZES[dtype]
        self._dtype, self._box = dtype, (ROW_BYTES // itemsize, box_rows, 1, 1)
        self._extents = (head_dim, *(extent for extent, _ in axes))
        row = -(-head_dim * itemsize // 16) * 16  # an axis of one place may have any stride that holds a row
        self._strides = tuple(stride * itemsize if extent > 1 else row for extent, stride in axes)
        self._encode: Encode = _encode_for_simulator if gpu is None else functools.partial(encode_on_gpu, gpu)
        self._maps: dict[int, bytes] = {}

    def at(self, address: int) -> bytes:
        """The map of the array at this address."""
        found = self._maps.get(address)
        if found is None:
            found = self._encode(address, self._dtype, self._extents, self._strides, self._box)
            if len(self._maps) >= _MAX_MAPS:
                self._maps.clear()
            self._maps[address] = found
        return found


def _encode_for_simulator(address: int, dtype: str, extents: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    from cuflash.simulator.tensor_map import encode_tiled

    return encode_tiled(address, dtype, extents, strides, box, swizzle="128B", l2_promotion="256B")


def encode_on_gpu(gpu: int, address: int, dtype: str, extents: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """The driver's `cuTensorMapEncodeTiled`, with the context of the device current: a new thread has none.

    Raises:
        SetupError: a driver without it.
        DeviceError: it refuses; the message has what it was given.
    """
    rank = len(extents)
    room = ctypes.create_string_buffer(NBYTES + _ALIGNMENT)
    begin = -ctypes.addressof(room) % _ALIGNMENT
    function = _driver_function()
    with _current(gpu):
        status = function(
            ctypes.addressof(room) + begin, _TYPES[dtype], rank, address, (ctypes.c_uint64 * rank)(*extents), (ctypes.c_uint64 * (rank - 1))(*strides),
            (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank), 0, _SWIZZLE_128B, _PROMOTION_256B, 0,
        )  # fmt: skip
    if status != 0:
        got = f"a tensor at {address:#x} of extents {extents}, strides {strides} and box {box}, with error {status}"
        way_out = "Report this. Set CUFLASH_FORWARD_WGMMA=0 and CUFLASH_BACKWARD_WGMMA=0, and leave kernels of wgmma out of tile, and those of mma.sync take the call."
        raise DeviceError("device", got, "a tensor map from cuTensorMapEncodeTiled", way_out)
    return room.raw[begin : begin + NBYTES]


@contextlib.contextmanager
def _current(gpu: int) -> Iterator[None]:
    """Inside, the device's primary context is this thread's."""
    from cupy.cuda import runtime

    previous = runtime.getDevice()
    runtime.setDevice(gpu)  # also where it is the same: this is what makes the context
    try:
        yield
    finally:
        if previous != gpu:
            runtime.setDevice(previous)


@functools.cache
def _driver_function() -> Callable[..., int]:
    """`cuTensorMapEncodeTiled` of the library that CuPy has loaded, too."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise SetupError(f"Tensor maps need a driver of CUDA 12 or newer ({error}).") from error
    number, pointer = ctypes.c_uint32, ctypes.c_void_p
    function.argtypes = (pointer, number, number, pointer, pointer, pointer, pointer, pointer, number, number, number, number)
    function.restype = ctypes.c_int
    return function
