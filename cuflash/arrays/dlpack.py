"""Read DLPack capsules: the memory of any library's array, without that library's help and without a copy.

DLPack (https://dmlc.github.io/dlpack) is a C structure inside a Python capsule. The consumer of a capsule renames it, uses the structure as
long as it likes, and then calls the deleter inside, once. `ManagedTensor` does that.

Capsules are read here rather than through `numpy.from_dlpack`, which refuses bfloat16 and does not say whether memory was copied.
"""

from __future__ import annotations

import ctypes
from typing import Any

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
"""Device types of memory that cuflash can use: pinned host memory is the CPU's, managed memory a GPU's."""

_READ_ONLY, _IS_COPIED = 1, 2
_BFLOAT = 4
_TYPE_NAMES = {0: "int", 1: "uint", 2: "float", 3: "opaque", _BFLOAT: "bfloat", 5: "complex", 6: "bool"}


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; null means C-contiguous
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """What a capsule named "dltensor" holds."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    """What a capsule named "dltensor_versioned" holds, since DLPack 1.0."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# PYFUNCTYPE keeps the GIL: the C API needs it, and so do deleters that were written against the C API.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)

# A capsule keeps the address of its name, not the text, so these have to live as long as the process.
_PLAIN, _VERSIONED = b"dltensor", b"dltensor_versioned"
_USED_PLAIN, _USED_VERSIONED = b"used_dltensor", b"used_dltensor_versioned"


class ManagedTensor:
    """Owns what a DLPack capsule held; the producer's deleter is called exactly once, when this object dies.

    Attributes:
        pointer: address of element [0, …, 0]; 0 is possible for an empty tensor.
        shape: extents.
        strides: in elements.
        dtype: "float16", "bfloat16", "int64", "bool", …
        bits: per element.
        lanes: of a vector type; 1 for the usual scalar ones.
        major: of the DLPack version; when it is not 1, the attributes above are not set, because the structure is unknown.
        read_only: writing is forbidden, or would reach only a copy that the producer made for the export.
    """

    __slots__ = ("_address", "_deleter", "bits", "dtype", "lanes", "major", "pointer", "read_only", "shape", "strides")

    def __init__(self, capsule: object) -> None:
        """Take over `capsule`, which is used up by it; raises ValueError if it is no capsule, or a used one."""
        self._deleter = None
        content = _open(capsule)
        versioned = isinstance(content, _ManagedVersioned)
        _set_name(capsule, _USED_VERSIONED if versioned else _USED_PLAIN)
        self._address = ctypes.addressof(content)
        if content.deleter:
            self._deleter = _Deleter(content.deleter)
        self.major = int(content.major) if versioned else 1
        if self.major != 1:
            return
        self.read_only = versioned and bool(content.flags & (_READ_ONLY | _IS_COPIED))
        tensor = content.tensor
        self.pointer = int(tensor.data or 0) + int(tensor.byte_offset)
        self.shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
        self.strides = tuple(tensor.strides[: tensor.ndim]) if tensor.ndim and tensor.strides else _contiguous_strides(self.shape)
        self.bits, self.lanes = int(tensor.dtype.bits), int(tensor.dtype.lanes)
        name = _TYPE_NAMES.get(tensor.dtype.code, f"dlpack_type{tensor.dtype.code}_")
        self.dtype = name if name == "bool" else f"{name}{self.bits}"

    def __del__(self) -> None:
        deleter, self._deleter = self._deleter, None
        if deleter is not None:
            deleter(self._address)


def request(x: Any, stream: int | None) -> ManagedTensor:
    """Ask `x` for a capsule and take it over.

    Args:
        x: an object with `__dlpack__`.
        stream: raw CUDA stream on which the values have to be ready, 1 for the default one; None for arrays on the CPU.

    Raises:
        Whatever the producer raises.
    """
    options: dict[str, Any] = {} if stream is None else {"stream": stream}
    try:
        return ManagedTensor(x.__dlpack__(max_version=(1, 0), **options))
    except TypeError:  # a producer from before DLPack 1.0
        return ManagedTensor(x.__dlpack__(**options))


def retag_bfloat16(capsule: object) -> None:
    """Declare the 16-bit elements in an unused capsule to be bfloat16."""
    _open(capsule).tensor.dtype.code = _BFLOAT


def _open(capsule: object) -> Any:
    """The structure inside the capsule, which the capsule still owns."""
    if _is_valid(capsule, _VERSIONED):
        return _ManagedVersioned.from_address(_get_pointer(capsule, _VERSIONED))
    if _is_valid(capsule, _PLAIN):
        return _Managed.from_address(_get_pointer(capsule, _PLAIN))
    raise ValueError(f"{type(capsule).__name__} object is not an unused DLPack capsule")


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))
