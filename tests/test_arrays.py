"""`arrays`, `dlpack`, `frameworks`: what is borrowed is what the owner holds, nothing is copied, and what is no plain array is refused."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash.arrays import dlpack, frameworks, libraries
from cuflash.arrays.borrowing import Array, bfloat16, borrow
from cuflash.arrays.frameworks import BFloat16Bits
from cuflash.arrays.signatures import pointer, signature
from cuflash.errors import ArgumentError, DeviceError, DTypeError, ShapeError

SHAPE = (2, 3, 4, 8)


def address_of(x: Any) -> int:
    return int(x.__array_interface__["data"][0])


# --- NumPy ------------------------------------------------------------------------------------------------------------------------------


def test_numpy_array() -> None:
    x = numpy.zeros(SHAPE, numpy.float16)
    array = borrow(x, "query")
    assert array.pointer == pointer(x) == address_of(x)
    assert (array.shape, array.strides) == (SHAPE, (96, 32, 8, 1))
    assert (array.dtype, array.itemsize, array.device) == ("float16", 2, ("cpu", 0))
    assert array.owner is x
    assert array.framework.name == array.framework.library == "numpy"
    assert not array.read_only
    assert repr(array) == "numpy array of float16, shape (2, 3, 4, 8), on cpu"


@st.composite
def views(draw: st.DrawFn) -> Any:
    """A NumPy view with any order of dimensions, steps of either sign, and broadcast dimensions."""
    base = numpy.zeros([draw(st.integers(1, 5)) for _ in range(4)], draw(st.sampled_from(["float16", "float32", "float64", "int8"])))
    steps = [draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in range(4)]
    x = base[tuple(slice(None, None, step) for step in steps)].transpose(draw(st.permutations(range(4))))
    return numpy.broadcast_to(x, (draw(st.integers(1, 3)), *x.shape)) if draw(st.booleans()) else x


@given(views())
def test_any_strides(x: Any) -> None:
    array = borrow(x, "x")
    assert tuple(stride * array.itemsize for stride in array.strides) == x.strides
    assert array.byte_range == numpy.lib.array_utils.byte_bounds(x)


def test_byte_range_of_an_empty_array() -> None:
    array = borrow(numpy.zeros((2, 0, 3))[::-1], "x")
    assert array.byte_range == (array.pointer, array.pointer)


def test_element_types_are_named_and_not_judged() -> None:
    for dtype in ("float64", "int32", "bool", "complex64", "object", "uint16"):
        assert borrow(numpy.zeros(3, dtype), "x").dtype == dtype
    assert borrow(numpy.zeros(3, "S0"), "x").shape == (3,)


def test_read_only() -> None:
    x = numpy.zeros(3)
    x.flags.writeable = False
    assert borrow(x, "x").read_only
    assert borrow(numpy.broadcast_to(x, (2, 3)), "x").read_only


def test_subclasses(tmp_path: Any) -> None:
    mapped = numpy.memmap(tmp_path / "x", numpy.float32, "w+", shape=(4, 4))
    assert borrow(mapped, "x").pointer == address_of(mapped)
    with pytest.raises(DTypeError) as caught:
        borrow(numpy.ma.masked_array(numpy.zeros(3)), "key")
    assert (caught.value.argument, caught.value.got) == ("key", "a masked array")
    assert "key.filled(0)" in caught.value.hint


def test_byte_swapped() -> None:
    with pytest.raises(DTypeError, match="byte-swapped float16") as caught:
        borrow(numpy.zeros(3, numpy.dtype("float16").newbyteorder()), "key")
    assert "newbyteorder" in caught.value.hint


def test_strides_between_elements() -> None:
    record = numpy.zeros(4, numpy.dtype([("a", "f2"), ("b", "i1")]))
    with pytest.raises(ShapeError) as caught:
        borrow(record["a"], "value")
    assert caught.value.argument == "value"
    assert caught.value.got == "a stride of 3 bytes in dimension 0"
    assert "2 bytes" in caught.value.expected
    assert "value.copy()" in caught.value.hint
    assert borrow(record["a"][:1], "value").shape == (1,)  # a single element has no stride


def test_unaligned_memory() -> None:
    x = numpy.zeros(17, numpy.uint8)[1:].view(numpy.float16)
    with pytest.raises(ShapeError, match="multiple of the element size, 2 bytes"):
        borrow(x, "query")


@pytest.mark.parametrize(
    ("x", "got", "hint"),
    [
        (None, "None", "Pass an array"),
        (1.5, "1.5", "Pass an array"),
        ([1.0, 2.0], "an object of type list", "numpy.asarray(x, dtype=numpy.float32)"),
        ("query", "'query'", "Pass an array"),
        (numpy.float32(1), "np.float32(1.0)", "numpy.asarray(x)"),
        (numpy.ndarray, "the class ndarray", ""),
        (memoryview(b"ab"), "an object of type memoryview", "Pass an array"),
    ],
)
def test_no_array(x: object, got: str, hint: str) -> None:
    with pytest.raises(DTypeError) as caught:
        borrow(x, "query")
    assert caught.value.argument == "query"
    assert got in caught.value.got
    assert "__dlpack__" in caught.value.expected
    assert hint in caught.value.hint
    assert signature(x) is None


def test_cuda_array_interface_names_cupy() -> None:
    class DeviceArray:
        __cuda_array_interface__: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(DTypeError, match=r"cupy\.asarray"):
        borrow(DeviceArray(), "query")


def test_signature_tells_apart_what_matters() -> None:
    x = numpy.zeros(SHAPE, numpy.float16)
    assert signature(x) == signature(numpy.ones(SHAPE, numpy.float16))
    different = [x, x[:1], x[:, ::-1], x.view("uint16"), x.astype("float32"), x.astype(">f2"), bfloat16(x.view("uint16")), x.T]
    assert len({signature(y) for y in different}) == len(different)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------------------------


def test_tagged_bits() -> None:
    bits = numpy.full((2, 3), 0x3FC0, numpy.uint16)
    tagged = bfloat16(bits)
    array = borrow(tagged, "query")
    assert (array.dtype, array.itemsize, array.owner) == ("bfloat16", 2, tagged)
    assert array.pointer == pointer(tagged) == address_of(bits)
    assert (tagged.shape, tagged.dtype) == ((2, 3), "bfloat16")
    assert (tagged.to_float32() == 1.5).all()
    result = array.framework.empty((4,), "bfloat16", array)
    assert isinstance(result, BFloat16Bits)
    assert result.bits.dtype == numpy.uint16
    assert array.framework.empty((4,), "float32", array).dtype == numpy.float32


def test_bits_have_to_be_uint16() -> None:
    with pytest.raises(DTypeError, match="an array of float32; expected an array of uint16"):
        bfloat16(numpy.zeros(3, numpy.float32))
    with pytest.raises(DTypeError, match="NumPy or CuPy array of uint16"):
        bfloat16([1, 2])


def test_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = borrow(numpy.zeros(3, ml_dtypes.bfloat16), "query")
    assert (array.dtype, array.itemsize) == ("bfloat16", 2)
    assert array.framework.empty((2,), "bfloat16", array).dtype == ml_dtypes.bfloat16


def test_without_ml_dtypes_results_are_tagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    array = borrow(numpy.zeros(3, numpy.float16), "query")
    assert isinstance(array.framework.empty((2,), "bfloat16", array), BFloat16Bits)


# --- DLPack -----------------------------------------------------------------------------------------------------------------------------

_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_DeleterType = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Producer:
    """An array of a made-up library that writes its DLPack structures by hand and counts the calls of their deleter."""

    def __init__(self, shape: tuple[int, ...] = (2, 3), *, versioned: bool = True, strides: bool = True, **changes: int) -> None:
        self.memory = (ctypes.c_float * 64)()
        self.deleted: list[int] = []
        self.versioned = versioned
        self.device = (changes.pop("device", dlpack.CPU), 0)
        self.structure = dlpack._ManagedVersioned() if versioned else dlpack._Managed()
        tensor = self.structure.tensor
        tensor.data = ctypes.addressof(self.memory)
        tensor.ndim = len(shape)
        tensor.dtype = dlpack._DataType(changes.pop("code", 2), changes.pop("bits", 32), changes.pop("lanes", 1))
        tensor.byte_offset = changes.pop("byte_offset", 0)
        self.extents = (ctypes.c_int64 * len(shape))(*shape)
        self.steps = (ctypes.c_int64 * len(shape))(*range(7, 7 + len(shape)))
        tensor.shape = ctypes.cast(self.extents, ctypes.POINTER(ctypes.c_int64))
        if strides:
            tensor.strides = ctypes.cast(self.steps, ctypes.POINTER(ctypes.c_int64))
        self.deleter = _DeleterType(self.deleted.append)
        if changes.pop("deleter", True):
            self.structure.deleter = ctypes.cast(self.deleter, ctypes.c_void_p).value
        if versioned:
            self.structure.major = changes.pop("major", 1)
            self.structure.flags = changes.pop("flags", 0)
        assert not changes

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> object:
        if not self.versioned and "max_version" in options:
            raise TypeError("unexpected keyword argument 'max_version'")
        return _new_capsule(ctypes.addressof(self.structure), b"dltensor_versioned" if self.versioned else b"dltensor", None)


@pytest.mark.parametrize("versioned", [True, False])
def test_capsule_is_read_and_its_deleter_called_once(versioned: bool) -> None:
    producer = Producer(versioned=versioned, byte_offset=8)
    array = borrow(producer, "query")
    assert array.pointer == ctypes.addressof(producer.memory) + 8
    assert (array.shape, array.strides, array.dtype, array.itemsize) == ((2, 3), (7, 8), "float32", 4)
    assert (array.framework.name, array.framework.library) == ("dlpack", __name__.partition(".")[0])
    assert not array.read_only
    gc.collect()
    assert producer.deleted == []
    del array
    gc.collect()
    assert producer.deleted == [ctypes.addressof(producer.structure)]


def test_capsule_without_strides_is_contiguous() -> None:
    assert borrow(Producer((2, 3, 4), strides=False), "x").strides == (12, 4, 1)


def test_capsule_of_no_dimensions() -> None:
    assert borrow(Producer(()), "x").strides == ()


def test_capsule_without_deleter() -> None:
    producer = Producer(deleter=0)
    borrow(producer, "x")
    assert producer.deleted == []


@pytest.mark.parametrize(("flags", "read_only"), [(0, False), (1, True), (2, True)])
def test_capsule_flags(flags: int, read_only: bool) -> None:
    assert borrow(Producer(flags=flags), "x").read_only is read_only


@pytest.mark.parametrize(
    ("code", "bits", "name"), [(2, 16, "float16"), (4, 16, "bfloat16"), (0, 64, "int64"), (6, 8, "bool"), (10, 8, "dlpack_type10_8")]
)
def test_capsule_types(code: int, bits: int, name: str) -> None:
    array = borrow(Producer(code=code, bits=bits), "x")
    assert (array.dtype, array.itemsize) == (name, bits // 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"major": 2}, ArgumentError, "DLPack version 2"),
        ({"lanes": 4}, DTypeError, "vectors of 4 lanes"),
        ({"byte_offset": 1}, ShapeError, "multiple of the element size"),
    ],
)
def test_refused_capsules_are_deleted_too(changes: dict[str, int], error: type[ArgumentError], message: str) -> None:
    producer = Producer(**changes)  # type: ignore[arg-type]
    with pytest.raises(error, match=message) as caught:
        borrow(producer, "value")
    assert caught.value.argument == "value"
    del caught
    gc.collect()
    assert len(producer.deleted) == 1


def test_a_class_of_the_caller_is_not_kept_alive() -> None:
    class Own(numpy.ndarray):
        pass

    x = numpy.ones((1, 8, 1, 8), numpy.float32).view(Own)
    assert type(cuflash.scaled_dot_product_attention(x, x, x)) in (Own, numpy.ndarray)
    known, classes = len(libraries.own_classes), weakref.ref(Own)
    assert Own in libraries._libraries_of_subclasses
    del x, Own
    gc.collect()
    assert classes() is None
    assert len(libraries.own_classes) == known


def test_other_devices() -> None:
    producer = Producer(device=10)
    with pytest.raises(DeviceError, match="device type 10"):
        borrow(producer, "query")
    assert producer.deleted == []


def test_used_capsule() -> None:
    capsule = numpy.zeros(3).__dlpack__()
    first = dlpack.ManagedTensor(capsule)
    with pytest.raises(ValueError, match="not an unused DLPack capsule"):
        dlpack.ManagedTensor(capsule)
    assert first.shape == (3,)


@pytest.mark.parametrize("failure", [RuntimeError("traced\nmore"), BufferError("no"), NotImplementedError()])
def test_failing_producers(failure: Exception) -> None:
    class Traced:
        def __dlpack_device__(self) -> tuple[int, int]:
            return dlpack.CPU, 0

        def __dlpack__(self, **options: Any) -> object:
            raise failure

    with pytest.raises(ArgumentError) as caught:
        borrow(Traced(), "query")
    assert type(failure).__name__ in caught.value.got
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is failure


def test_producer_that_gives_no_capsule() -> None:
    class Confused:
        def __dlpack_device__(self) -> tuple[int, int]:
            return dlpack.CPU, 0

        def __dlpack__(self, **options: Any) -> object:
            return 5

    with pytest.raises(ArgumentError, match="not an unused DLPack capsule"):
        borrow(Confused(), "query")


def test_memory_outlives_the_producer() -> None:
    class Wrapped:
        def __init__(self) -> None:
            self.x = numpy.full(1000, 3.0, numpy.float32)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.x.__dlpack_device__()

        def __dlpack__(self, **options: Any) -> object:
            return self.x.__dlpack__(**options)

    array = borrow(Wrapped(), "x")
    array.owner = None
    gc.collect()
    assert list((ctypes.c_float * 1000).from_address(array.pointer)) == [3.0] * 1000


def test_no_memory_is_leaked() -> None:
    x = numpy.zeros(3)
    before = sys.getrefcount(x)
    for _ in range(100):
        dlpack.request(x, None)
    assert sys.getrefcount(x) == before


# --- torch ------------------------------------------------------------------------------------------------------------------------------


def test_torch_tensor() -> None:
    torch = pytest.importorskip("torch")
    for name in ("float16", "bfloat16", "float32"):
        x = torch.zeros(SHAPE, dtype=getattr(torch, name)).transpose(1, 2)
        array = borrow(x, "query")
        assert array.pointer == x.data_ptr() == pointer(x)
        assert (array.shape, array.strides) == (tuple(x.shape), x.stride())
        assert (type(array.shape), type(array.strides)) == (tuple, tuple)
        assert (array.dtype, array.itemsize, array.device) == (name, x.element_size(), ("cpu", 0))
        assert array.framework.current_stream(0) == 0
        result = array.framework.empty((2, 3), name, array)
        assert (type(result), result.dtype, result.shape) == (torch.Tensor, x.dtype, (2, 3))
        assert array.framework.finish(result) is result


def test_torch_parameters_are_borrowed_and_not_written() -> None:
    torch = pytest.importorskip("torch")
    x = torch.nn.Parameter(torch.zeros(3))
    assert borrow(x, "x").read_only
    assert not borrow(x.detach(), "x").read_only


def test_torch_signature() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(SHAPE)
    assert signature(x) == signature(torch.ones(SHAPE))
    different = [
        x,
        x[:1],
        x.transpose(1, 2),
        x.half(),
        x.to("meta"),
        torch.zeros(SHAPE, requires_grad=True),
        torch.complex(x, x).conj().imag,
    ]
    assert len({signature(y) for y in different}) == len(different)
    with torch.no_grad():
        assert signature(torch.zeros(SHAPE, requires_grad=True)) == signature(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_tensors_without_plain_values() -> None:
    torch = pytest.importorskip("torch")
    x = torch.rand(4, 4)
    cases: list[tuple[Any, type[ArgumentError], str]] = [
        (x.to("meta"), DeviceError, "no values"),
        (x.to_sparse(), DTypeError, "to_dense()"),
        (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), DTypeError, "dequantize()"),
        (torch.complex(x, x).conj().imag, DTypeError, "resolve_neg()"),
        (torch._efficientzerotensor((4, 4)), DTypeError, "unwrapped"),
        (torch.nested.nested_tensor([x, x]), DTypeError, "to_padded_tensor"),
    ]
    for tensor, error, hint in cases:
        with pytest.raises(error) as caught:
            borrow(tensor, "key")
        assert caught.value.argument == "key"
        assert hint in caught.value.hint


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_wrappers() -> None:
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(DTypeError, match="memory of its own"):
        borrow(fake, "key")

    def f(x: Any) -> Any:
        with pytest.raises(DTypeError, match="memory of its own"):
            borrow(x, "key")
        with pytest.raises(DTypeError, match="memory of its own"):
            pointer(x)
        return x

    torch.func.vmap(f)(torch.zeros(2, 3))


def test_tagged_bits_reach_torch_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    bits = numpy.full((2, 3), 0x3F80, numpy.uint16)
    tensor = torch.from_dlpack(bfloat16(bits))
    assert tensor.dtype == torch.bfloat16
    bits[0, 0] = 0x4000
    assert tensor.tolist() == [[2, 1, 1], [1, 1, 1]]


# --- JAX --------------------------------------------------------------------------------------------------------------------------------


def test_jax_array() -> None:
    jax = pytest.importorskip("jax")
    for name in ("float16", "bfloat16", "float32"):
        x = jax.numpy.arange(24, dtype=name).reshape(1, 2, 3, 4)
        array = borrow(x, "query")
        assert array.pointer == x.unsafe_buffer_pointer()
        assert (array.shape, array.strides, array.dtype) == ((1, 2, 3, 4), (24, 12, 4, 1), name)
        assert (array.framework.name, array.framework.library, array.device) == ("dlpack", "jax", ("cpu", 0))
        assert array.read_only
        for shape in ((2, 5), (0, 5)):
            made = array.framework.empty(shape, name, array)
            (made.bits if name == "bfloat16" else made)[...] = 0
            result = array.framework.finish(made)
            assert (type(result), result.shape, str(result.dtype)) == (type(x), shape, name)
            assert not result.any()


def test_jax_tracer() -> None:
    jax = pytest.importorskip("jax")

    def f(x: Any) -> Any:
        with pytest.raises(ArgumentError, match="outside the transformation"):
            borrow(x, "query")
        return x

    jax.jit(f)(jax.numpy.zeros(3))


# --- Frameworks that are not there --------------------------------------------------------------------------------------------------------


def test_cupy_arrays_by_their_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        ptr, device_id = 4096, 1

    class CupyArray:
        dtype, shape, strides, size, data = numpy.dtype("float32"), (2, 3), (-12, 4), 6, Memory()

    class Module:
        ndarray = CupyArray

    monkeypatch.setitem(sys.modules, "cupy", Module)
    array = borrow(CupyArray(), "query")
    assert (array.pointer, array.strides, array.dtype, array.device) == (4096, (-3, 1), "float32", ("cuda", 1))
    assert array.framework is frameworks.CUPY
    assert repr(array).endswith("on cuda:1")
    assert pointer(CupyArray()) == 4096
    assert signature(CupyArray()) == (CupyArray, numpy.dtype("float32"), (2, 3), (-12, 4), 1)


def test_nothing_but_numpy_is_imported() -> None:
    code = "import sys, cuflash.problem, cuflash.reference; assert not {'cupy', 'torch', 'ml_dtypes', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arrays_can_be_made_by_hand() -> None:
    array = Array(64, (2, 2), (-2, 1), "float32", 4, ("cpu", 0), frameworks.NUMPY, None)
    assert array.byte_range == (56, 72)


def test_ints_too_long_to_print() -> None:
    with pytest.raises(DTypeError, match="an enormous int"):
        borrow(10**5000, "query")
