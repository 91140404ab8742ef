"""Borrow the caller's arrays without copying.

`borrow(x, name)` turns a NumPy array, a CuPy array, a torch tensor or anything else that speaks DLPack into an `Array`: a pointer, a shape,
strides in elements, the name of the element type and the device. `Array.framework` makes results of the same kind and knows which stream
the caller works on. `signature` and `pointer` are the two halves of `borrow` that a warm call needs, as cheap as they can be.

CuPy and torch are looked up in `sys.modules` and never imported: an array of theirs cannot exist before their own import.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import reprlib
import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import numpy

from cuflash.arrays import dlpack, frameworks
from cuflash.arrays.dlpack import ManagedTensor
from cuflash.arrays.frameworks import BFloat16Bits, DLPackFramework, Framework
from cuflash.errors import ArgumentError, CuflashError, DeviceError, DTypeError, ShapeError

__all__ = [
    "CPU",
    "AnyArray",
    "Array",
    "BFloat16Bits",
    "Framework",
    "Pinned",
    "bfloat16",
    "borrow",
    "describe",
    "is_array",
    "pointer",
    "pointer_of_results",
    "readers",
    "refuse_without_memory",
    "seen",
    "signature",
]

CPU = ("cpu", 0)
_MAX_DESCRIPTION = 200  # characters

AnyArray: TypeAlias = Any
"""An array of the caller: of NumPy (also of `ml_dtypes.bfloat16`) or CuPy, a torch tensor, `BFloat16Bits`, or anything else with `__dlpack__`."""

_EXPECTED = "a NumPy array, a CuPy array, a torch tensor or another array with __dlpack__"


class Array:
    """A view of memory that somebody else owns; nothing is copied, and the owner stays alive as long as the view.

    Attributes:
        pointer: address of element [0, …, 0], in the address space of `device`.
        shape: extents.
        strides: in elements, one per extent; 0 and negative ones are allowed.
        dtype: name of the element type, such as "float16", "bfloat16", "float32", "float64", "int64".
        itemsize: bytes per element.
        device: ("cpu", 0) or ("cuda", index).
        framework: makes arrays of the same kind on the same sort of device.
        owner: the caller's object.
        read_only: results must not be written here: read-only or immutable memory, or a tensor that requires grad.
    """

    __slots__ = ("__weakref__", "_managed", "device", "dtype", "framework", "itemsize", "owner", "pointer", "read_only", "shape", "strides")

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        itemsize: int,
        device: tuple[str, int],
        framework: Framework,
        owner: object,
        read_only: bool = False,
        managed: ManagedTensor | None = None,
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.itemsize = itemsize
        self.device = device
        self.framework = framework
        self.owner = owner
        self.read_only = read_only
        self._managed = managed

    @property
    def byte_range(self) -> tuple[int, int]:
        """Address of the lowest byte of any element and of the byte after the highest; `(pointer, pointer)` for an empty array."""
        if 0 in self.shape:
            return self.pointer, self.pointer
        steps = [(extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True)]
        lowest, highest = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
        return self.pointer + lowest * self.itemsize, self.pointer + (highest + 1) * self.itemsize

    def __repr__(self) -> str:
        device = self.device[0] if self.device == CPU else f"{self.device[0]}:{self.device[1]}"
        return f"{self.framework.library} array of {self.dtype}, shape {self.shape}, on {device}"


def borrow(x: object, name: str) -> Array:
    """Look at the caller's array without copying it.

    Element types are not judged here: an array of float64 comes back with dtype "float64".

    Args:
        x: NumPy array (also of `ml_dtypes.bfloat16`), CuPy array, torch tensor, `BFloat16Bits`, or any object with `__dlpack__`.
        name: what the caller knows the argument by, for messages.

    Raises:
        DTypeError: not an array, or an array without plain values in memory (masked, byte-swapped, sparse, quantized, traced, …).
        DeviceError: the memory is neither on the CPU nor on a CUDA device.
        ShapeError: the memory layout cannot be expressed in whole, aligned elements.
        ArgumentError: the object's own `__dlpack__` failed.
    """
    reader = _borrowers.get(_library_of(type(x)) or "", _borrow_dlpack)
    array = reader(x, name)
    if array.pointer % min(array.itemsize or 1, 8) and 0 not in array.shape:
        got, expected = (
            f"memory at address {array.pointer:#x}",
            f"an address that is a multiple of the element size, {array.itemsize} bytes",
        )
        raise ShapeError(name, got, expected, f"Copy it: {name}.copy(), or .clone() for a tensor.")
    return array


def is_array(x: object) -> bool:
    """Whether `borrow` takes objects of this type for arrays."""
    return _library_of(type(x)) is not None or (not isinstance(x, type) and has_attribute(x, "__dlpack__"))


def signature(x: object) -> Hashable | None:
    """All that decides how a call on `x` is carried out, except the address: kind, element type, shape, strides, device.

    For a torch tensor, whether autograd would record the call is part of it too.

    Two arrays with equal signatures differ only in `pointer(x)`, so whatever `borrow` and later checks said of one holds for the other, as
    long as the pointers are equally aligned. Overlap with other memory and permission to write are not part of it.

    Returns:
        A hashable key, or None when there is no cheap one: then `borrow` has to be used.
    """
    reader = _signatures.get(_library_of(type(x)) or "")
    return reader(x) if reader else None


def pointer(x: Any) -> int:
    """The address of element [0, …, 0] of an array for which `signature` returned a key.

    Raises:
        DTypeError: a torch tensor that looks like any other, but is a wrapper without memory, as inside `torch.func.vmap`.
    """
    return _pointers[_libraries.get(type(x)) or _library_of(type(x)) or ""](x)


def pointer_of_results(framework: Framework) -> Callable[[Any], int]:
    """`pointer` of what a framework makes."""
    return operator.methodcaller("data_ptr") if framework.name == "torch" else pointer


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


def seen(x: object) -> tuple[Hashable, int] | None:
    """`signature` and `pointer` of an array together, for calls that look at many; None where there is no signature.

    Raises:
        As `pointer`.
    """
    both = readers.get(type(x))
    if both is not None:
        return both(x)
    library = _library_of(type(x)) or ""
    reader = _signatures.get(library)
    found = reader(x) if reader else None
    return None if found is None else (found, _pointers[library](x))


def bfloat16(bits: Any) -> BFloat16Bits:
    """Tag an array of uint16 as bfloat16, without a copy.

    Results of calls on tagged arrays come back tagged; `.bits` gets at the uint16 array.

    Args:
        bits: NumPy or CuPy array of uint16, any shape and strides; each element holds the bits of one bfloat16.

    Raises:
        DTypeError: not an array of NumPy or CuPy, or its elements are not uint16.
    """
    if _library_of(type(bits)) not in ("numpy", "cupy"):
        hint = "Other libraries have a bfloat16 of their own: use theirs."
        raise DTypeError("bits", describe(bits), "a NumPy or CuPy array of uint16", hint)
    if bits.dtype != numpy.uint16:
        hint = "Pass the bits of the values, such as x.view(numpy.uint16) of a bfloat16 array x, not numbers to be converted."
        raise DTypeError("bits", f"an array of {bits.dtype}", "an array of uint16", hint)
    return BFloat16Bits(bits)


def attribute(x: object, name: str, default: Any = None) -> Any:
    """An attribute of the caller's object, whose `__getattr__` may raise anything."""
    try:
        return getattr(x, name, default)
    except Exception:
        return default


def has_attribute(x: object, name: str) -> bool:
    """Whether the caller's object has an attribute."""
    missing = object()
    return attribute(x, name, missing) is not missing


def describe(x: object) -> str:
    """One short line about any object, for messages."""
    kind = type(x)
    if isinstance(x, type):
        return f"the class {x.__qualname__}"
    if x is None or isinstance(x, (bool, int, float, complex, str, numpy.generic)):
        try:
            return reprlib.repr(x)[:_MAX_DESCRIPTION]
        except ValueError:  # Python refuses to print ints of thousands of digits
            return "an enormous int"
        except Exception:  # of a subclass
            pass
    return f"an object of type {kind.__qualname__ if kind.__module__ == 'builtins' else f'{kind.__module__}.{kind.__qualname__}'}"


# --- One reader per library -------------------------------------------------------------------------------------------------------------

_libraries: dict[type, str] = {BFloat16Bits: "bits", Pinned: "pinned", numpy.ndarray: "numpy"}
_libraries_of_subclasses: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
"""Classes of the caller, which must not be kept alive here."""


def _library_of(kind: type) -> str | None:
    """Which library's arrays `kind` belongs to: "numpy", "cupy", "torch", "bits", "pinned", or None for all others."""
    known = _libraries.get(kind) or _libraries_of_subclasses.get(kind)
    if known is not None:
        return known
    for library, base in (("numpy", "ndarray"), ("cupy", "ndarray"), ("torch", "Tensor")):
        array_type = getattr(sys.modules.get(library), base, None)
        if isinstance(array_type, type) and issubclass(kind, array_type):
            if kind is array_type or kind is getattr(getattr(sys.modules[library], "nn", None), "Parameter", None):
                _libraries[kind] = library
                readers[kind] = _readers_of[library]
            else:
                _libraries_of_subclasses[kind] = library
            return library
    return None


def _borrow_numpy(x: Any, name: str) -> Array:
    if type(x) is not numpy.ndarray and isinstance(x, numpy.ma.MaskedArray):
        raise DTypeError(name, "a masked array", _EXPECTED, f"Fill the masked elements first: {name}.filled(0).")
    if not x.dtype.isnative:
        hint = f"Convert it: {name}.astype({name}.dtype.newbyteorder('='))."
        raise DTypeError(name, f"byte-swapped {x.dtype.name}", "elements in the byte order of this machine", hint)
    dtype, itemsize = _numpy_dtype(x.dtype)
    strides = _in_elements(x, itemsize, name)
    return Array(x.ctypes.data, x.shape, strides, dtype, itemsize, CPU, frameworks.NUMPY, x, not x.flags.writeable)


def _borrow_cupy(x: Any, name: str) -> Array:
    dtype, itemsize = _numpy_dtype(x.dtype)
    strides = _in_elements(x, itemsize, name)
    return Array(int(x.data.ptr), x.shape, strides, dtype, itemsize, ("cuda", x.data.device_id), frameworks.CUPY, x)


def _borrow_bits(x: BFloat16Bits, name: str) -> Array:
    array = borrow(x.bits, name)
    array.dtype = "bfloat16"
    array.framework = frameworks.NUMPY_BITS if array.framework is frameworks.NUMPY else frameworks.CUPY_BITS
    array.owner = x
    return array


def _borrow_torch(x: Any, name: str) -> Array:
    torch = sys.modules["torch"]
    if _has_functions_of_its_own(x):
        hint = f"Its memory need not hold its values: pass {name}.as_subclass(torch.Tensor) if it does. A CausalBias is is_causal=True with causal_alignment."
        raise DTypeError(name, f"a tensor of the subclass {type(x).__module__}.{type(x).__qualname__}", "a plain tensor", hint)
    if x.layout is not torch.strided or x.is_nested:
        got = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
        raise DTypeError(
            name, got, "a dense (strided) tensor", f"Convert it: {name}.to_dense(), or {name}.to_padded_tensor(0.0) if nested."
        )
    if x.is_quantized:
        raise DTypeError(name, f"a quantized tensor of {x.dtype}", "a tensor of plain floats", f"Convert it: {name}.dequantize().")
    if x.is_neg():
        raise DTypeError(name, "a lazily negated view", "values as they are in memory", f"Convert it: {name}.resolve_neg().")
    kind = x.device.type
    if kind not in ("cpu", "cuda"):
        hint = "A meta tensor has no values." if kind == "meta" else f"Move it: {name}.to('cuda') or {name}.cpu()."
        raise DeviceError(name, f"a torch tensor on {x.device}", "a tensor on the CPU or a CUDA device", hint)
    if _is_wrapper(x):
        raise _no_torch_memory(name, x, None)
    try:
        address = x.data_ptr()
    except RuntimeError as error:
        raise _no_torch_memory(name, x, error) from error
    shape = tuple(x.shape)
    if not address and 0 not in shape:
        raise _no_torch_memory(name, x, None)
    device, framework = (CPU, frameworks.TORCH_CPU) if kind == "cpu" else (("cuda", x.get_device()), frameworks.TORCH_CUDA)
    return Array(address, shape, x.stride(), _torch_dtype(x.dtype), x.element_size(), device, framework, x, x.requires_grad)


def _is_wrapper(x: Any) -> bool:
    """Whether tensors of this type (fake, distributed, functional, …) compute by intercepting torch's operators and have no memory."""
    dispatch, plain = type(x).__torch_dispatch__, sys.modules["torch"].Tensor.__torch_dispatch__
    return getattr(dispatch, "__func__", dispatch) is not getattr(plain, "__func__", plain)


def _has_functions_of_its_own(x: Any) -> bool:
    """Whether torch's functions mean something else for tensors of this type, such as `torch.nn.attention.bias.CausalBias`, whose memory is not initialised."""
    torch = sys.modules["torch"]
    function = getattr(type(x).__torch_function__, "__func__", type(x).__torch_function__)
    if function in (torch.Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return not x.is_nested and not _is_wrapper(x)  # which have messages of their own


def _no_torch_memory(name: str, x: object, error: Exception | None) -> DTypeError:
    got = describe(x) + (f" whose data_ptr() says: {str(error).partition(chr(10))[0]}" if error else "")
    hint = "Wrapped or traced tensors (vmap, grad, fake, distributed) have to be unwrapped."
    return DTypeError(name, got, "a tensor with memory of its own", hint)


def _borrow_dlpack(x: Any, name: str) -> Array:
    if not is_array(x):
        raise DTypeError(name, describe(x), _EXPECTED, _way_to_an_array(x, name))
    with _Exporting(name, x):
        kind, index = (int(number) for number in x.__dlpack_device__())
    if kind not in (dlpack.CPU, dlpack.CUDA, dlpack.CUDA_HOST, dlpack.CUDA_MANAGED):
        got = f"{describe(x)} on DLPack device type {kind}"
        raise DeviceError(name, got, "memory on the CPU or on a CUDA device", "Move the array to one of them with its own library.")
    cuda = kind in (dlpack.CUDA, dlpack.CUDA_MANAGED)
    with _Exporting(name, x):
        framework = DLPackFramework(*_library_and_import(x), cuda)
    stream = _stream_for_dlpack(framework, index, name) if cuda else None
    with _Exporting(name, x):
        tensor = dlpack.request(x, stream)
    if tensor.major != 1:
        raise ArgumentError(name, f"DLPack version {tensor.major}", "DLPack version 1 or older", f"Convert it: numpy.from_dlpack({name}).")
    if tensor.lanes != 1:
        raise DTypeError(name, f"vectors of {tensor.lanes} lanes", "scalar elements", "View the lanes as a last dimension.")
    device = ("cuda", index) if cuda else CPU
    # JAX arrays are immutable, but not all of its versions say so in the capsule.
    read_only = tensor.read_only or framework.library == "jax"
    itemsize = (tensor.bits + 7) // 8
    return Array(tensor.pointer, tensor.shape, tensor.strides, tensor.dtype, itemsize, device, framework, x, read_only, tensor)


def _stream_for_dlpack(framework: Framework, index: int, name: str) -> int:
    """The caller's stream as DLPack numbers them: it calls the default one 1."""
    try:
        return framework.current_stream(index) or 1
    except CuflashError:
        raise
    except Exception as error:  # what CuPy raises without a driver or such a GPU
        got = f"memory of GPU {index}, which CuPy cannot use ({str(error).partition(chr(10))[0]})"
        hint = "Install its driver, or pass NumPy arrays or CPU tensors, which run on the simulator."
        raise DeviceError(name, got, "a GPU with a driver that CuPy can use", hint) from error


class _Exporting:
    """Turns whatever another library raises while it exports an array into an ArgumentError."""

    def __init__(self, name: str, x: object) -> None:
        self._name, self._x = name, x

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception):
            got = f"{describe(self._x)}, whose DLPack export raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            hint = "Traced, sharded or abstract arrays have no memory to work on: call cuflash outside the transformation, on one device."
            if _is_deleted(self._x):
                hint = "It has been deleted, as arrays are that were donated to a call: keep it, or make it again."
            raise ArgumentError(self._name, got, "an array that can be exported through DLPack", hint) from error


def _is_deleted(x: Any) -> bool:
    """Whether an array of JAX has given its memory away."""
    try:
        return bool(x.is_deleted())
    except Exception:
        return False


def _library_and_import(x: Any) -> tuple[str, Callable[[Any], Any] | None]:
    """The name of the library that `x` comes from, and its `from_dlpack` if there is one where the array API standard wants it."""
    library = type(x).__module__.partition(".")[0]
    namespace: Any = sys.modules.get(library)
    if hasattr(x, "__array_namespace__"):
        namespace = x.__array_namespace__()
        library = str(getattr(namespace, "__name__", library)).partition(".")[0]
    found = getattr(namespace, "from_dlpack", None)
    return library, found if callable(found) else None


def _in_elements(x: Any, itemsize: int, name: str) -> tuple[int, ...]:
    """Strides of a NumPy or CuPy array, which come in bytes, in elements."""
    strides = x.strides
    if not itemsize:  # numpy.dtype("S0") and the like
        return (0,) * len(strides)
    for axis, stride in enumerate(strides):
        if stride % itemsize and x.shape[axis] > 1 and x.size:
            got, expected = (
                f"a stride of {stride} bytes in dimension {axis}",
                f"strides that are multiples of the element size, {itemsize} bytes",
            )
            raise ShapeError(name, got, expected, f"Copy it: {name}.copy().")
    return tuple([stride // itemsize for stride in strides])


@functools.lru_cache(maxsize=256)  # of structured types there are any number
def _numpy_dtype(dtype: numpy.dtype[Any]) -> tuple[str, int]:
    return dtype.name, dtype.itemsize


@functools.lru_cache(maxsize=64)
def _torch_dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(x: object) -> Hashable:
    """The class of an array, by a weak reference where it is the caller's own, which a kept call must not keep alive."""
    kind: Any = type(x)
    return kind if kind in _libraries else weakref.ref(kind)


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


def _pointer_numpy(x: Any) -> int:
    try:
        return _address_of(_first_byte_of(x))  # a third of the time, of contiguous memory that may be written
    except (TypeError, ValueError, BufferError):
        return x.ctypes.data  # type: ignore[no-any-return]


_address_of, _first_byte_of = ctypes.addressof, ctypes.c_char.from_buffer


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
        raise _no_torch_memory("tensor", x, error) from error
    return (found, address) if address or not x.numel() else None  # without memory: zeros that torch does not write down


def _pointer_cupy(x: Any) -> int:
    return x.data.ptr  # type: ignore[no-any-return]


def _pointer_torch(x: Any) -> int:
    try:
        return x.data_ptr()  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise _no_torch_memory("tensor", x, error) from error


def _pointer_bits(x: BFloat16Bits) -> int:
    return pointer(x.bits)


_borrowers: dict[str, Callable[[Any, str], Array]] = {
    "numpy": _borrow_numpy,
    "cupy": _borrow_cupy,
    "torch": _borrow_torch,
    "bits": _borrow_bits,
    "pinned": lambda x, name: borrow(x.array, name),
}
_signatures: dict[str, Callable[[Any], Hashable | None]] = {
    "numpy": _signature_numpy,
    "cupy": _signature_cupy,
    "torch": _signature_torch,
    "bits": _signature_bits,
    "pinned": lambda x: x.signature,
}
_pointers: dict[str, Callable[[Any], int]] = {
    "numpy": _pointer_numpy,
    "cupy": _pointer_cupy,
    "torch": _pointer_torch,
    "bits": _pointer_bits,
    "pinned": lambda x: x.pointer,
}


def _seen_bits(x: BFloat16Bits) -> tuple[Hashable, int] | None:
    look = seen(x.bits)
    return None if look is None else ((BFloat16Bits, look[0]), look[1])


Reader: TypeAlias = Callable[[Any], tuple[Hashable, int] | None]

_readers_of: dict[str, Reader] = {"numpy": _seen_numpy, "cupy": _seen_cupy, "torch": _seen_torch}
readers: dict[type, Reader] = {numpy.ndarray: _seen_numpy, BFloat16Bits: _seen_bits, Pinned: operator.attrgetter("seen")}
"""`seen` of arrays of exactly a library's own class: the least that a warm call does for each of its arrays."""


_INTEGERS = (
    "cu_seqlens_q", "cu_seqlens_kv", "seqlens_kv", "segment_ids_q", "segment_ids_kv", "prefix_lengths", "cache_seqlens", "page_table", "cache_batch_idx",
    "cache_leftpad", "seqused_q", "seqused_kv",
)  # fmt: skip
"""Arguments that are int32; others are floats, but for masks and seeds."""


def _way_to_an_array(x: object, name: str) -> str:
    if isinstance(x, (list, tuple, int)) and name in _INTEGERS:
        return "Make an array of it first: numpy.asarray(x, dtype=numpy.int32)."
    if isinstance(x, (list, tuple)) and name == "attn_mask":
        return "Make an array of it first: numpy.asarray(x, dtype=bool) if True means attend, dtype=numpy.float32 if it is added to the scores."
    if isinstance(x, (int, float)) and not isinstance(x, bool) and name == "attn_mask":
        return (
            "flash-attn has dropout_p in this place: pass what follows query, key and value by name, as in dropout_p=0.1, is_causal=True."
        )
    if isinstance(x, (list, tuple)):
        return "Make an array of it first: numpy.asarray(x, dtype=numpy.float32)."
    if has_attribute(x, "__cuda_array_interface__"):
        return "Make a CuPy array of it, which copies nothing: cupy.asarray(x)."
    if has_attribute(x, "__array_interface__") or has_attribute(x, "__array__"):
        return "Make a NumPy array of it: numpy.asarray(x)."
    return "Pass an array."
