"""Borrow the caller's arrays without copying.

`borrow(x, name)` turns a NumPy array, a CuPy array, a torch tensor or anything else that speaks DLPack into an `Array`: a pointer, a shape,
strides in elements, the name of the element type and the device. `Array.framework` makes results of the same kind and knows which stream
the caller works on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy

from cuflash.arrays import dlpack, frameworks
from cuflash.arrays.descriptions import describe, has_attribute
from cuflash.arrays.dlpack import ManagedTensor
from cuflash.arrays.frameworks import BFloat16Bits, DLPackFramework, Framework
from cuflash.arrays.libraries import library_of
from cuflash.errors import ArgumentError, CuflashError, DeviceError, DTypeError, ShapeError

CPU = ("cpu", 0)

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
    reader = _borrowers.get(library_of(type(x)) or "", _borrow_dlpack)
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
    return library_of(type(x)) is not None or (not isinstance(x, type) and has_attribute(x, "__dlpack__"))


def bfloat16(bits: Any) -> BFloat16Bits:
    """Tag an array of uint16 as bfloat16, without a copy.

    Results of calls on tagged arrays come back tagged; `.bits` gets at the uint16 array.

    Args:
        bits: NumPy or CuPy array of uint16, any shape and strides; each element holds the bits of one bfloat16.

    Raises:
        DTypeError: not an array of NumPy or CuPy, or its elements are not uint16.
    """
    if library_of(type(bits)) not in ("numpy", "cupy"):
        hint = "Other libraries have a bfloat16 of their own: use theirs."
        raise DTypeError("bits", describe(bits), "a NumPy or CuPy array of uint16", hint)
    if bits.dtype != numpy.uint16:
        hint = "Pass the bits of the values, such as x.view(numpy.uint16) of a bfloat16 array x, not numbers to be converted."
        raise DTypeError("bits", f"an array of {bits.dtype}", "an array of uint16", hint)
    return BFloat16Bits(bits)


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
        raise without_memory(name, x, None)
    try:
        address = x.data_ptr()
    except RuntimeError as error:
        raise without_memory(name, x, error) from error
    shape = tuple(x.shape)
    if not address and 0 not in shape:
        raise without_memory(name, x, None)
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


def without_memory(name: str, x: object, error: Exception | None) -> DTypeError:
    """What is raised of a tensor that has no memory; `error` is what torch says when it is asked for the address."""
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


_borrowers: dict[str, Callable[[Any, str], Array]] = {
    "numpy": _borrow_numpy,
    "cupy": _borrow_cupy,
    "torch": _borrow_torch,
    "bits": _borrow_bits,
    "pinned": lambda x, name: borrow(x.array, name),  # `signatures.Pinned` holds an array of ours
}

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
