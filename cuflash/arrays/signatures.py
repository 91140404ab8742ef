"""What a warm call looks at of its arrays, as cheap as it can be.

`signature` and `pointer` are the two halves of `borrow` that such a call needs; `seen` gives both; `readers` are those of exactly a library's own class.
"""

from __future__ import annotations

import ctypes
import operator
import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import numpy

from cuflash.arrays.borrowing import AnyArray, without_memory
from cuflash.arrays.descriptions import describe
from cuflash.arrays.frameworks import BFloat16Bits, Framework
from cuflash.arrays.libraries import library_of, own_classes
from cuflash.errors import DTypeError


def signature(x: object) -> Hashable | None:
    """All that decides how a call on `x` is carried out, except the address: kind, element type, shape, strides, device.

    For a torch tensor, whether autograd would record the call is part of it too.

    Two arrays with equal signatures differ only in `pointer(x)`, so whatever `borrow` and later checks said of one holds for the other, as
    long as the pointers are equally aligned. Overlap with other memory and permission to write are not part of it.

    Returns:
        A hashable key, or None when there is no cheap one: then `borrow` has to be used.
    """
    reader = _signatures.get(library_of(type(x)) or "")
    return reader(x) if reader else None


def pointer(x: Any) -> int:
    """The address of element [0, …, 0] of an array for which `signature` returned a key.

    Raises:
        DTypeError: a torch tensor that looks like any other, but is a wrapper without memory, as inside `torch.func.vmap`.
    """
    return _pointers[own_classes.get(type(x)) or library_of(type(x)) or ""](x)


def seen(x: object) -> tuple[Hashable, int] | None:
    """`signature` and `pointer` of an array together, for calls that look at many; None where there is no signature.

    Raises:
        As `pointer`.
    """
    both = readers.get(type(x))
    if both is not None:
        return both(x)
    library = library_of(type(x)) or ""
    if type(x) in own_classes and library in _readers_of:
        readers[type(x)] = _readers_of[library]
    reader = _signatures.get(library)
    found = reader(x) if reader else None
    return None if found is None else (found, _pointers[library](x))


def pointer_of_results(framework: Framework) -> Callable[[Any], int]:
    """`pointer` of what a framework makes."""
    return sys.modules["torch"].Tensor.data_ptr if framework.name == "torch" else pointer


def refuse_without_memory(result: Any, name: str) -> int:
    """The address of a result that `pointer_of_results` gave as 0, which only an empty one may have.

    Raises:
        DTypeError: a mode of torch has made a tensor without memory, such as `FakeTensorMode` around a call on plain tensors.
    """
    if 0 in result.shape:
        return 0
    hint = "A mode of torch makes tensors without memory here: call cuflash.torch, which knows such modes, or leave the mode for this call."
    raise DTypeError(name, describe(result), "a result with memory of its own", hint)


class _Known:
    """Stands for equal signatures, and is hashed and compared by identity, which takes no time."""

    __slots__ = ("__weakref__",)


_known: weakref.WeakValueDictionary[Hashable, _Known] = weakref.WeakValueDictionary()


class Pinned:
    """An array of ours that stays where it is and as it is: what calls look at of it is looked at once. They take it in the place of the array.

    Attributes:
        array: kept alive.
        signature: equal for those whose arrays have equal ones.
        pointer: of the array.
    """

    __slots__ = ("array", "pointer", "seen", "signature")

    def __init__(self, array: AnyArray) -> None:
        self.array, self.signature, self.pointer = array, _known.setdefault(signature(array), _Known()), pointer(array)
        self.seen = self.signature, self.pointer


own_classes[Pinned] = "pinned"


def _kind(x: object) -> Hashable:
    """The class of an array, by a weak reference where it is the caller's own, which a kept call must not keep alive."""
    kind: Any = type(x)
    return kind if kind in own_classes else weakref.ref(kind)


def _signature_numpy(x: Any) -> Hashable:
    return _kind(x), x.dtype, x.shape, x.strides


def _signature_cupy(x: Any) -> Hashable:
    return _kind(x), x.dtype, x.shape, x.strides, x.data.device_id


def _signature_torch(x: Any) -> Hashable | None:
    try:
        recorded = x.requires_grad and sys.modules["torch"].is_grad_enabled()
        return _kind(x), x.dtype, x.shape, x.stride(), x.device, x.is_neg(), recorded
    except RuntimeError:  # no strides: sparse, nested, …
        return None


def _signature_bits(x: BFloat16Bits) -> Hashable:
    return BFloat16Bits, signature(x.bits)


_signatures: dict[str, Callable[[Any], Hashable | None]] = {
    "numpy": _signature_numpy,
    "cupy": _signature_cupy,
    "torch": _signature_torch,
    "bits": _signature_bits,
    "pinned": lambda x: x.signature,
}

_address_of, _first_byte_of = ctypes.addressof, ctypes.c_char.from_buffer


def _pointer_numpy(x: Any) -> int:
    try:
        return _address_of(_first_byte_of(x))  # a third of the time, of contiguous memory that may be written
    except (TypeError, ValueError, BufferError):
        return x.ctypes.data  # type: ignore[no-any-return]


def _pointer_cupy(x: Any) -> int:
    return x.data.ptr  # type: ignore[no-any-return]


def _pointer_torch(x: Any) -> int:
    try:
        return x.data_ptr()  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise without_memory("tensor", x, error) from error


def _pointer_bits(x: BFloat16Bits) -> int:
    return pointer(x.bits)


_pointers: dict[str, Callable[[Any], int]] = {
    "numpy": _pointer_numpy,
    "cupy": _pointer_cupy,
    "torch": _pointer_torch,
    "bits": _pointer_bits,
    "pinned": lambda x: x.pointer,
}


# Signature and pointer in one function: to call two takes longer than what they do.


def _seen_numpy(x: Any) -> tuple[Hashable, int]:
    try:
        address = _address_of(_first_byte_of(x))
    except (TypeError, ValueError, BufferError):
        address = x.ctypes.data
    return (numpy.ndarray, x.dtype, x.shape, x.strides), address


def _seen_cupy(x: Any) -> tuple[Hashable, int]:
    data = x.data
    return (type(x), x.dtype, x.shape, x.strides, data.device_id), data.ptr


def _seen_torch(x: Any) -> tuple[Hashable, int] | None:
    try:
        found = type(x), x.dtype, x.shape, x.stride(), x.device, x.is_neg(), x.requires_grad and sys.modules["torch"].is_grad_enabled()
    except RuntimeError:
        return None
    try:
        address = x.data_ptr()
    except RuntimeError as error:
        raise without_memory("tensor", x, error) from error
    return (found, address) if address or not x.numel() else None  # without memory: zeros that torch does not write down


def _seen_bits(x: BFloat16Bits) -> tuple[Hashable, int] | None:
    look = seen(x.bits)
    return None if look is None else ((BFloat16Bits, look[0]), look[1])


Reader: TypeAlias = Callable[[Any], tuple[Hashable, int] | None]

_readers_of: dict[str, Reader] = {"numpy": _seen_numpy, "cupy": _seen_cupy, "torch": _seen_torch}

readers: dict[type, Reader] = {numpy.ndarray: _seen_numpy, BFloat16Bits: _seen_bits, Pinned: operator.attrgetter("seen")}
"""`seen` of arrays of exactly a library's own class: the least that a warm call does for each of its arrays."""
