"""Make arrays of the caller's kind, and know the stream that the caller works on.

One `Framework` stands for one array library on one sort of device. Only NumPy is imported; CuPy and torch are when a function here needs
them, which is after the caller handed in an array of theirs.

NumPy and CuPy have no bfloat16 of their own. With `ml_dtypes` installed its `bfloat16` is used; without it, `BFloat16Bits` holds the bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol, TypeAlias

import numpy

from cuflash.arrays import dlpack
from cuflash.errors import SetupError


class BFloat16Bits:
    """bfloat16 values held as the uint16 array of their bits, for use where `ml_dtypes` is not installed. Made by `cuflash.bfloat16`.

    Attributes:
        bits: the NumPy or CuPy array of uint16, shared and not copied.
        shape: extents of `bits`.
        dtype: "bfloat16".
    """

    __slots__ = ("bits",)

    dtype = "bfloat16"

    def __init__(self, bits: Any) -> None:
        self.bits = bits

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)

    @property
    def flags(self) -> Any:
        """Of `bits`, such as whether they may be written."""
        return self.bits.flags

    def to_float32(self) -> Any:
        """A new float32 array of the same shape and library with the same values: every bfloat16 is the upper half of a float32."""
        return (self.bits.astype("uint32") << 16).view("float32")

    def __dlpack__(self, **options: Any) -> Any:
        """A DLPack capsule of element type bfloat16, so that `torch.from_dlpack` and its like take the values without a copy."""
        capsule = self.bits.__dlpack__(**options)
        dlpack.retag_bfloat16(capsule)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.bits.__dlpack_device__()
        return kind, index

    def __repr__(self) -> str:
        return f"BFloat16Bits({self.bits!r})"


class HasDevice(Protocol):
    """Anything that says where its memory is: ("cpu", 0) or ("cuda", index)."""

    device: tuple[str, int]


Form: TypeAlias = tuple[tuple[int, ...], str]
"""Shape and element type of an array."""


class Framework:
    """How one array library allocates and which stream it works on.

    Attributes:
        name: "numpy", "cupy", "torch" or "dlpack".
        library: the same, except that DLPack arrays give the name of their library, such as "jax".
        hands_over: whether `finish` makes something else of a result.
    """

    name: str
    library: str
    hands_over = False

    def empty(self, shape: tuple[int, ...], dtype: str, like: HasDevice) -> Any:
        """A new C-contiguous array with unset values, on the device of `like`; for a "dlpack" library a stand-in until `finish`."""
        raise NotImplementedError

    def maker(self, forms: Sequence[Form], like: HasDevice) -> Callable[[], list[Any]]:
        """What makes arrays of these forms again and again."""
        return lambda: [self.empty(shape, dtype, like) for shape, dtype in forms]

    def finish(self, result: Any) -> Any:
        """Turn what `empty` gave, once it is filled, into the caller's kind of array, without a copy where the library allows it."""
        return result

    def keeps_memory(self, stream: int) -> bool:
        """Whether memory for work in this stream may be held beyond a call, to be used by the next one in the stream. Not where a stream's handle may come
        back as another stream's, where the library may be allocating from a pool of a graph, or where nobody would find it again."""
        return False

    def current_stream(self, device_index: int) -> int:
        """The raw CUDA stream that the caller's library works on at the moment; 0, the default stream, for arrays on the CPU."""
        return 0


class _NumPy(Framework):
    name = library = "numpy"

    def __init__(self, bits: bool) -> None:
        self._bits = bits  # the caller holds bfloat16 as tagged uint16

    def empty(self, shape: tuple[int, ...], dtype: str, like: HasDevice) -> Any:
        if dtype != "bfloat16":
            return numpy.empty(shape, dtype)
        element = _element_type(dtype, self._bits)
        return BFloat16Bits(numpy.empty(shape, numpy.uint16)) if element is None else numpy.empty(shape, element)

    def keeps_memory(self, stream: int) -> bool:
        return True


_DEFAULT_STREAMS = (0, 1, 2)  # the default stream, the legacy one, and that of the thread, which never end


class _CuPy(Framework):
    name = library = "cupy"

    def __init__(self, bits: bool) -> None:
        self._bits = bits

    def empty(self, shape: tuple[int, ...], dtype: str, like: HasDevice) -> Any:
        cupy = _import_cupy()
        element = _element_type(dtype, self._bits)
        with cupy.cuda.Device(like.device[1]):
            return BFloat16Bits(cupy.empty(shape, numpy.uint16)) if element is None else cupy.empty(shape, element)

    def keeps_memory(self, stream: int) -> bool:
        return stream in _DEFAULT_STREAMS

    def current_stream(self, device_index: int) -> int:
        return int(_import_cupy().cuda.get_current_stream(device_index).ptr)


class _Torch(Framework):
    name = library = "torch"

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda

    def empty(self, shape: tuple[int, ...], dtype: str, like: HasDevice) -> Any:
        return self._watched_maker(shape, dtype, like)()

    def maker(self, forms: Sequence[Form], like: HasDevice) -> Callable[[], list[Any]]:
        import torch

        watched = [self._watched_maker(shape, dtype, like) for shape, dtype in forms]
        allocate = _past_the_dispatcher("_empty_strided_cuda" if self._cuda else "_empty_strided_cpu")
        direct = watched if allocate is None else [functools.partial(allocate, *make.args, make.keywords["dtype"]) for make in watched]
        num_modes, current, index = torch._C._len_torch_dispatch_stack, torch.cuda.current_device, like.device[1]
        is_elsewhere = (lambda: current() != index) if self._cuda else bool

        def make_all() -> list[Any]:
            made = []
            for make in watched if num_modes() or is_elsewhere() else direct:
                made.append(make())  # no comprehension: that is a call, which takes as long as an array
            return made

        return make_all

    def _watched_maker(self, shape: tuple[int, ...], dtype: str, like: HasDevice) -> functools.partial[Any]:
        """By a function that torch's modes see, which is quicker than `torch.empty`."""
        import torch

        device = torch.device("cuda", like.device[1]) if self._cuda else torch.device("cpu")
        strides = tuple(prod(max(extent, 1) for extent in shape[axis + 1 :]) for axis in range(len(shape)))  # of an extent of 0 as of 1
        return functools.partial(torch.empty_strided, shape, strides, dtype=getattr(torch, dtype), device=device)

    def keeps_memory(self, stream: int) -> bool:
        return not self._cuda  # torch.compile warms graphs up in a pool that it wants back whole, and torch's allocator is quick

    def current_stream(self, device_index: int) -> int:
        if not self._cuda:
            return 0
        import torch

        return int(torch.cuda.current_stream(device_index).cuda_stream)


def _past_the_dispatcher(name: str) -> Callable[..., Any] | None:
    """What graphs of torch's compiler allocate with: shape, strides and type -> a tensor on the current device.

    It takes less than half the time of torch's own functions. It is internal to torch: None where a version has none of this name, or one that is called in another way.
    """
    import torch

    allocate = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), name, None)
    try:
        return allocate if allocate is not None and isinstance(allocate((0,), (1,), torch.float32), torch.Tensor) else None
    except (TypeError, RuntimeError):
        return None


class DLPackFramework(Framework):
    """Any other library: results are allocated with NumPy or CuPy and handed over through the library's own `from_dlpack`."""

    name = "dlpack"
    hands_over = True

    def __init__(self, library: str, from_dlpack: Callable[[Any], Any] | None, cuda: bool) -> None:
        self.library = library
        self._from_dlpack = from_dlpack
        self._allocator: Framework = CUPY_BITS if cuda else NUMPY_BITS

    def empty(self, shape: tuple[int, ...], dtype: str, like: HasDevice) -> Any:
        return self._allocator.empty(shape, dtype, like)

    def finish(self, result: Any) -> Any:
        return result if self._from_dlpack is None else self._from_dlpack(result)

    def current_stream(self, device_index: int) -> int:
        return self._allocator.current_stream(device_index)


def _element_type(dtype: str, bits: bool) -> Any:
    """What NumPy and CuPy know the type as; None for a bfloat16 that has to be tagged uint16."""
    if dtype != "bfloat16":
        return dtype
    if bits:
        return None
    try:
        import ml_dtypes
    except ImportError:
        return None
    return ml_dtypes.bfloat16


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise SetupError("Arrays on a GPU need CuPy: pip install cupy-cuda12x (or cupy-cuda13x, by the driver's CUDA version).") from error
    return cupy


NUMPY, NUMPY_BITS = _NumPy(bits=False), _NumPy(bits=True)
CUPY, CUPY_BITS = _CuPy(bits=False), _CuPy(bits=True)
TORCH_CPU, TORCH_CUDA = _Torch(cuda=False), _Torch(cuda=True)
