"""A stand-in for CuPy on a machine without a GPU: arrays in host memory that pose as a GPU's, and kernels that run on the simulator.

    PYTHONPATH=tests/stand_in:. python anything.py

It has what cuflash's GPU branch, the benchmarks and the tests use, and refuses what a GPU would refuse: memory of another device, a launch without a current
context, more shared memory than was asked for, NumPy arrays among its own. `cupy.cuda` is the device. What it does not show is time: everything has ended when
it returns, so a missing synchronisation goes unnoticed. Environment:

    STAND_IN_ARCH       architecture that it poses as; default sm_90
    STAND_IN_DEVICES    how many there are; default 2
    STAND_IN_LOSS       "N FILE": the N-th launch of a process loses the GPU, for the life of that process, if it can create FILE, which there must not be
                        before; "kernel:N FILE": so does the first launch of its N-th kernel
"""

from __future__ import annotations

import operator
from typing import Any

import numpy

from cupy import cuda, lib, random, raw
from cupy.cuda import get_default_memory_pool, is_available

__all__ = ["cuda", "get_default_memory_pool", "is_available", "lib", "ndarray", "random"]
__version__ = "0.0.0+stand.in"

cuda.function = raw  # type: ignore[attr-defined]  # which needs the rest of cuda


class Flags:
    """As CuPy's, which know nothing of `writeable`."""

    def __init__(self, host: Any) -> None:
        self.c_contiguous, self.f_contiguous, self.owndata = host.flags.c_contiguous, host.flags.f_contiguous, True


class ndarray:
    """An array on a device. `_host` is the NumPy array of the same memory."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None) -> None:
        dtype, extents = numpy.dtype(dtype), (shape,) if isinstance(shape, int) else tuple(shape)
        self.data = cuda.alloc(int(numpy.prod(extents)) * dtype.itemsize) if memptr is None else memptr
        memory = self.data.mem
        self._host = numpy.ndarray(extents, dtype, memory.bytes, self.data.ptr - memory.ptr, strides)

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    flags = property(lambda self: Flags(self._host))
    device = property(lambda self: cuda.Device(self.data.device_id))
    T = property(lambda self: self._of(self._host.T))

    def get(self) -> Any:
        """A copy in NumPy, in the order of the elements in memory where that is contiguous."""
        cuda.check_alive()
        return self._host.copy(order="A")

    def set(self, values: Any) -> None:
        cuda.check_alive()
        self._host[...] = values

    def item(self) -> Any:
        return self.get().item()

    def _of(self, host: Any) -> ndarray:
        """A result of NumPy: a view of this memory, or else a new array on its device."""
        host, memory = numpy.asarray(host), self.data.mem
        if memory.ptr <= host.ctypes.data < memory.ptr + memory.size:
            return ndarray(host.shape, host.dtype, self.data + (host.ctypes.data - self.data.ptr), host.strides)
        with cuda.Device(self.data.device_id):
            return asarray(host)

    def __getitem__(self, key: Any) -> ndarray:
        return self._of(self._host[_host(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        cuda.check_alive()
        self._host[_host(key)] = _host(value)

    def __iadd__(self, value: Any) -> ndarray:
        cuda.check_alive()
        self._host += _host(value)
        return self

    def __abs__(self) -> ndarray:
        cuda.check_alive()
        return self._of(abs(self._host))

    def __len__(self) -> int:
        return len(self._host)

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **_: Any) -> Any:
        from cuflash.arrays import dlpack

        capsule = self._host.__dlpack__(max_version=max_version) if max_version else self._host.__dlpack__()
        where = dlpack._open(capsule).tensor.device
        where.kind, where.index = self.__dlpack_device__()
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.data.device_id


def _host(x: Any) -> Any:
    """What NumPy gets for an operand, an index or a value: device arrays and scalars are allowed, NumPy arrays are not."""
    if isinstance(x, tuple):
        return tuple(map(_host, x))
    if isinstance(x, numpy.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    return x._host if isinstance(x, ndarray) else x


def _method(name: str) -> Any:
    def call(self: ndarray, *arguments: Any, **options: Any) -> ndarray:
        cuda.check_alive()
        return self._of(getattr(self._host, name)(*map(_host, arguments), **options))

    return call


def _operator(function: Any, swapped: bool) -> Any:
    def call(self: ndarray, other: Any) -> ndarray:
        cuda.check_alive()
        operands = (_host(other), self._host) if swapped else (self._host, _host(other))
        return self._of(function(*operands))

    return call


for _name in ("astype", "view", "reshape", "swapaxes", "transpose", "ravel", "squeeze", "copy", "sum", "max", "min", "any", "all"):
    setattr(ndarray, _name, _method(_name))
for _name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "lshift", "rshift"):
    for _prefix in ("", "r"):
        setattr(ndarray, f"__{_prefix}{_name}__", _operator(getattr(operator, f"__{_name}__"), _prefix == "r"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _operator(getattr(operator, f"__{_name}__"), False))


# --- Making arrays ------------------------------------------------------------------------------------------------------------------------


def empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(shape, dtype)


def full(shape: Any, value: Any, dtype: Any = None) -> ndarray:
    made = ndarray(shape, numpy.asarray(value).dtype if dtype is None else dtype)
    made.set(value)
    return made


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 0, dtype)


def ones(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 1, dtype)


def empty_like(x: ndarray) -> ndarray:
    return empty(x.shape, x.dtype)


def zeros_like(x: ndarray) -> ndarray:
    return zeros(x.shape, x.dtype)


def asarray(x: Any, dtype: Any = None) -> ndarray:
    """As CuPy: a device array as it is, everything else copied to the current device."""
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype)
    values = numpy.asarray(x, dtype)
    made = ndarray(values.shape, values.dtype)
    made.set(values)
    return made


array = asarray


def ascontiguousarray(x: Any) -> ndarray:
    x = asarray(x)
    return x if x.flags.c_contiguous else x.copy()


def arange(*arguments: Any, **options: Any) -> ndarray:
    return asarray(numpy.arange(*arguments, **options))


def sin(x: ndarray, out: ndarray) -> ndarray:
    """Nothing: it is only asked for to keep a stream busy, and streams of this device never are."""
    cuda.check_alive()
    return out
