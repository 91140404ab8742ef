"""Anything in place of any argument of any public function: an error of cuflash, never one of Python, and never a crash. Needs no GPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest

import cuflash
from cuflash.errors import CuflashError, DeviceError, DTypeError, KeywordError, OptionError
from cuflash.runtime import launch

LONGEST_MESSAGE = 2000


class Raising:
    """Whatever one does with it fails."""

    def _fail(self, *_: object) -> Any:
        raise ZeroDivisionError("of a class of the caller")

    __repr__ = __str__ = __len__ = __index__ = __float__ = __bool__ = __iter__ = _fail


class RaisingAttributes:
    """Asked for what it does not have, it raises something else than AttributeError."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(name)


class RaisingInt(int):
    def __repr__(self) -> str:
        raise ZeroDivisionError("of a class of the caller")

    __str__ = __repr__


class NoDriver:
    """An array on a GPU, on a machine without one."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: object) -> Any:
        raise RuntimeError("no driver")


ODD: list[Any] = [
    None, True, 0, -1, 3, 2**31, 2**64, -(2**70), 10**5000, 1.5, math.nan, math.inf, 1j, "", "bshd", "x" * 10**6, b"bytes", (), (1, 2), [], [None] * 5, {}, {"a": 1}, {1},
    range(3), object(), int, len, Raising(), RaisingAttributes(), RaisingInt(3), Fraction(1, 3), numpy.float16(1), numpy.zeros(0), numpy.zeros((1, 2, 3, 4)), numpy.array("text"),
    numpy.array([None]), numpy.zeros(3, "complex64"), numpy.zeros(2, "uint32"), numpy.zeros((1,) * 20, "float16"), numpy.ma.zeros(3), numpy.zeros(2, "i4,f4"),
    NoDriver(), lambda: None,
]  # fmt: skip


def arrays() -> dict[str, Any]:
    return {name: numpy.zeros((1, 4, 2, 8), numpy.float16) for name in ("query", "key", "value")}


def packed() -> dict[str, Any]:
    x = {name: numpy.zeros((6, 2, 8), numpy.float16) for name in ("query", "key", "value")}
    offsets = numpy.array([0, 2, 6], numpy.int32)
    return {**x, "cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}


def backward(call: dict[str, Any]) -> dict[str, Any]:
    query = call["query"]
    lse = numpy.zeros((1, 2, 4) if query.ndim == 4 else (2, 6), numpy.float32)
    return {"grad_out": query.copy(), **call, "out": query.copy(), "lse": lse}


def parts() -> dict[str, Any]:
    return {
        "outs": [numpy.zeros((1, 4, 2, 8), numpy.float16) for _ in range(2)],
        "lses": [numpy.zeros((1, 2, 4), numpy.float32) for _ in range(2)],
    }


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "plan": (cuflash.plan, arrays),
    "varlen_plan": (cuflash.varlen_plan, packed),
    "scaled_dot_product_attention": (cuflash.scaled_dot_product_attention, arrays),
    "scaled_dot_product_attention_backward": (cuflash.scaled_dot_product_attention_backward, lambda: backward(arrays())),
    "varlen_attention": (cuflash.varlen_attention, packed),
    "varlen_attention_backward": (cuflash.varlen_attention_backward, lambda: backward(packed())),
    "dropout_mask": (cuflash.dropout_mask, lambda: {"shape": (1, 1, 4, 4), "dropout_p": 0.5, "dropout_seed": 1, "like": arrays()["query"]}),
    "merge_attention": (cuflash.merge_attention, parts),
    "merge_attention_backward": (cuflash.merge_attention_backward, lambda: {"grad_out": parts()["outs"][0], **parts(), "out": parts()["outs"][0], "lse": parts()["lses"][0]}),
    "legal_tiles": (cuflash.legal_tiles, lambda: {"head_dim": 16}),
    "warmup": (cuflash.warmup, lambda: {"head_dim": 16, "dtype": "float16", "arch": "sm_80"}),
    "bfloat16": (cuflash.bfloat16, lambda: {"bits": numpy.zeros(3, numpy.uint16)}),
    "FeatureSet": (cuflash.FeatureSet, dict),
    "Tile": (lambda **tile: cuflash.plan(**arrays(), tile=cuflash.Tile(**tile)), lambda: dict(zip(("tile_q", "tile_kv", "num_warps", "num_stages"), (64, 64, 4, 1), strict=True))),
}  # fmt: skip


class NoKernel:
    def launch(self, *_: object) -> None:
        pass


def raised_by(function: Callable[..., Any], call: dict[str, Any]) -> Exception | None:
    try:
        function(**call)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", CALLS)
def test_anything_in_place_of_any_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "executable", lambda kernel, on: NoKernel())
    monkeypatch.setattr("cuflash.tuning.cache.fetch_many", lambda *_, **__: [])
    function, valid = CALLS[name]
    parameters = list(inspect.signature(function).parameters) if name != "Tile" else list(valid())
    for argument in parameters:
        for odd in ODD:
            error = raised_by(function, {**valid(), argument: odd})
            place = f"{name}({argument}={type(odd).__name__})"
            if error is not None and not isinstance(error, CuflashError):
                raise AssertionError(place) from error
            assert error is None or len(str(error)) < LONGEST_MESSAGE, place


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("bfloat16", "Tile")])
def test_a_keyword_of_a_megabyte(name: str) -> None:
    function, valid = CALLS[name]
    for count in (1, 3):
        error = raised_by(function, {**valid(), **{number * 10**6: 1 for number in "xyz"[:count]}})
        assert isinstance(error, KeywordError), error
        assert len(str(error)) < LONGEST_MESSAGE
        assert "x" * 101 not in str(error)


def test_names_and_strings_of_a_megabyte() -> None:
    """Wherever they stand, about a hundred characters of them are repeated."""
    x, long = arrays(), "x" * 10**6
    tile = cuflash.Tile(64, 64, 4, 1)
    for options in ({"tile": {long: tile}}, {"layout": long}, {"attn_mask": long}, {"window": (long, long)}, {"seqlens_kv": [long]}):
        error = raised_by(cuflash.plan, {**x, **options})
        assert isinstance(error, CuflashError), options.keys()
        assert "x" * 101 not in str(error), options.keys()


def test_an_array_whose_attributes_raise_is_named() -> None:
    for argument in ("query", "value", "attn_mask", "sinks", "seqlens_kv", "prefix_lengths", "alibi_slopes"):
        with pytest.raises(DTypeError, match="RaisingAttributes") as caught:
            cuflash.scaled_dot_product_attention(**{**arrays(), argument: RaisingAttributes()})
        assert caught.value.argument == argument
    with pytest.raises(OptionError, match="RaisingAttributes") as seed:
        cuflash.scaled_dot_product_attention(**arrays(), dropout_p=0.5, dropout_seed=RaisingAttributes())
    assert seed.value.argument == "dropout_seed"


def test_a_keyword_that_dropout_mask_does_not_have() -> None:
    with pytest.raises(KeywordError, match="unknown"):
        cuflash.dropout_mask((1, 1, 4, 4), 0.5, 1, like=arrays()["query"], unknown=1)


def test_an_array_of_a_gpu_without_a_driver() -> None:
    with pytest.raises(DeviceError, match="driver"):
        cuflash.scaled_dot_product_attention(NoDriver(), NoDriver(), NoDriver())


def test_a_key_of_jax_as_a_seed() -> None:
    call = {**arrays(), "dropout_p": 0.5, "dropout_seed": numpy.zeros(2, numpy.uint32)}
    with pytest.raises(DTypeError, match="A key of JAX"):
        cuflash.plan(**call)


def test_a_deleted_array_is_called_that() -> None:
    class Deleted:
        def __dlpack_device__(self) -> tuple[int, int]:
            raise RuntimeError("Array has been deleted with shape=float16[3]")

        def __dlpack__(self, **_: object) -> Any:
            raise AssertionError

        def is_deleted(self) -> bool:
            return True

    with pytest.raises(cuflash.ArgumentError, match="It has been deleted"):
        cuflash.plan(**{**arrays(), "key": Deleted()})
