"""Tensor maps: what the driver and the simulator are told of an array, and when."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
from conftest import Target

import cuflash
from cuflash.errors import DeviceError, SetupError
from cuflash.planning import wgmma_forward
from cuflash.planning.argument_structs import FORWARD_WGMMA_ARGUMENTS
from cuflash.problem.layout import View
from cuflash.runtime import arguments, tensor_maps
from cuflash.runtime.arguments import Arguments
from cuflash.runtime.tensor_maps import TensorMap
from cuflash.simulator.tensor_map import encode_tiled

SHAPE, STRIDES = (3, 500, 4, 64), (500 * 256, 256, 64, 1)


class Driver:
    """In the place of `cuTensorMapEncodeTiled`: keeps what it is given, and writes the address as the map, or a map of the simulator.

    Attributes:
        calls: (alignment of the map's place, type, address, extents, strides, box, steps, interleave, swizzle, promotion, fill) of each call.
        status: what it answers.
        has_context: whether this thread has a current context; as in a new one, not at first.
    """

    def __init__(self, for_simulator: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status = 0
        self.has_context: Callable[[], bool] = lambda: False
        self._for_simulator = for_simulator
        pointer, number = ctypes.c_void_p, ctypes.c_uint32
        self.function = ctypes.CFUNCTYPE(ctypes.c_int, pointer, number, number, *[pointer] * 5, *[number] * 4)(self._encode)

    @contextlib.contextmanager
    def current(self, gpu: int) -> Iterator[None]:
        before, self.has_context = self.has_context, lambda: True
        yield
        self.has_context = before

    def _encode(
        self, place: int, dtype: int, rank: int, address: int, extents: int, strides: int, box: int, steps: int, *modes: int
    ) -> int:
        def read(at: int, count: int, of: Any) -> tuple[int, ...]:
            return tuple((of * count).from_address(at))

        long, word = ctypes.c_uint64, ctypes.c_uint32
        lists = read(extents, rank, long), read(strides, rank - 1, long), read(box, rank, word), read(steps, rank, word)
        self.calls.append((place % 64, dtype, address, *lists, *modes))
        if not self.has_context():
            return 201  # CUDA_ERROR_INVALID_CONTEXT
        made = address.to_bytes(8, "little") * 16
        if self._for_simulator:
            made = encode_tiled(address, {6: "float16", 9: "bfloat16"}[dtype], *lists[:3], swizzle="128B")
        ctypes.memmove(place, made, 128)
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(tensor_maps, "_driver_function", lambda: made.function)
    monkeypatch.setattr(tensor_maps, "_current", made.current)
    return made


def map_of(shape: Any = SHAPE, strides: Any = STRIDES, dtype: str = "bfloat16", gpu: int | None = 1) -> TensorMap:
    return TensorMap("key", View(shape, strides), dtype, 80, gpu)


def test_what_the_driver_is_told(driver: Driver) -> None:
    """Extents from the innermost outwards, strides in bytes; no interleaving, 128-byte swizzle, promotion to 256 bytes, zeros outside."""
    assert map_of().at(4096) == (4096).to_bytes(8, "little") * 16
    map_of(dtype="float16").at(8192)
    same = ((64, 500, 4, 3), (512, 128, 256000), (64, 80, 1, 1), (1, 1, 1, 1), 0, 3, 3, 0)
    assert driver.calls == [(0, 9, 4096, *same), (0, 6, 8192, *same)]


def test_a_map_is_made_for_an_address_once(driver: Driver) -> None:
    made = map_of()
    assert [made.at(address)[0:2] for address in (256, 256, 512, 512, 256)] == [b"\0\1", b"\0\1", b"\0\2", b"\0\2", b"\0\1"]
    assert [call[2] for call in driver.calls] == [256, 512]


def test_maps_of_more_addresses_than_are_kept(driver: Driver) -> None:
    made, most = map_of(), tensor_maps._MAX_MAPS
    addresses = [256 * (1 + layer) for layer in range(most)]
    for address in addresses * 2:
        assert made.at(address)[:8] == address.to_bytes(8, "little")
    assert len(driver.calls) == most
    for address in (16, *addresses):
        assert made.at(address)[:8] == address.to_bytes(8, "little")
    assert len(driver.calls) == 2 * most + 1
    assert len(made._maps) == 1


@pytest.mark.parametrize(
    ("shape", "strides", "extents", "strides_bytes", "steps"),
    [
        ((3, 500, 4, 64), (0, 64, 0, 1), (64, 500, 1, 1), (128, 128, 128), (0, 0)),
        ((3, 500, 4, 64), (32000, 64, 0, 1), (64, 500, 1, 3), (128, 128, 64000), (0, 1)),
        ((1, 500, 1, 64), (7, 64, 3, 1), (64, 500, 1, 1), (128, 128, 128), (0, 0)),
        ((2, 1, 4, 64), (256, 5, 64, 1), (64, 1, 4, 2), (128, 128, 512), (1, 1)),
    ],
    ids=str,
)
def test_axes_of_one_place(driver: Driver, shape: Any, strides: Any, extents: Any, strides_bytes: Any, steps: tuple[int, int]) -> None:
    """Whatever their stride says: broadcast ones are never multiplied by a coordinate, and the driver takes no stride that does not hold a row."""
    made = map_of(shape, strides)
    made.at(4096)
    assert driver.calls[0][3:5] == (extents, strides_bytes)
    assert (made.head_factor, made.batch_factor) == steps


def test_the_simulator_is_told_the_same() -> None:
    want = encode_tiled(4096, "bfloat16", (64, 500, 4, 3), (512, 128, 256000), (64, 80, 1, 1), swizzle="128B")
    assert map_of(gpu=None).at(4096) == want


def test_a_refusal_says_what_was_refused(driver: Driver) -> None:
    driver.status = 1
    with pytest.raises(DeviceError, match=r"0x1000 of extents \(64, 500, 4, 3\).* with error 1"):
        map_of().at(4096)


def test_a_driver_without_tensor_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    tensor_maps._driver_function.cache_clear()
    with pytest.raises(SetupError, match="a driver of CUDA 12 or newer"):
        map_of().at(4096)


def test_maps_lie_in_the_struct_where_the_kernel_looks(driver: Driver) -> None:
    """Beside words and numbers, on both sides of them."""
    made = map_of()
    values = {"key": arguments.mapped_tensor(made), "out": {"data": "out"}, "value": arguments.mapped_tensor(map_of())}
    struct = Arguments(FORWARD_WGMMA_ARGUMENTS, values, {"key", "out"})
    assert struct.names == ("key", "key", "out")
    for address in (256, 1024):
        image = bytes(struct.fill({"key": address, "out": 77}))
        assert len(image) == FORWARD_WGMMA_ARGUMENTS.size
        offsets = FORWARD_WGMMA_ARGUMENTS.offsets
        for name in ("key", "value"):
            assert image[offsets[name] : offsets[name] + 136] == address.to_bytes(8, "little") * 16 + b"\1\0\0\0\1\0\0\0"
        assert image[offsets["out"] :][:9] == (77).to_bytes(8, "little") + b"\0"
        assert image[:128] == bytes(128)


def test_a_warm_call_finds_arrays_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And encodes nothing for those that stay."""
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setenv(wgmma_forward.VARIABLE, "1")
    encoded: list[int] = []

    def encode(address: int, *others: Any) -> bytes:
        encoded.append(address)
        return encode_tiled(address, *others, swizzle="128B")

    monkeypatch.setattr(tensor_maps, "_encode_for_simulator", encode)
    query, key, value, other = (Target("sm_90").random((1, 67, 1, 64), "float16", seed) for seed in range(4))
    outs = [numpy.empty_like(query) for _ in range(2)]

    def attend(key: Any, out: Any) -> bytes:
        return Target.bits(cuflash.scaled_dot_product_attention(query, key, value, out=out))

    first = attend(key, outs[0])
    assert encoded == [x.ctypes.data for x in (query, key, value, outs[0])]
    second = attend(other, outs[0])
    assert encoded[4:] == [other.ctypes.data]
    assert attend(other, outs[1]) == second
    assert encoded[5:] == [outs[1].ctypes.data]
    assert attend(key, outs[0]) == first
    assert len(encoded) == 6
    key[...] = other
    assert attend(key, outs[1]) == second != first
    assert len(encoded) == 6
    assert numpy.isfinite(outs[0]).all()
