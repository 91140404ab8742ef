"""Caches in e4m3: what is stored enters products exactly, what is appended is rounded once, and scales belong to heads, or to sequences and heads."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy
import pytest
from caches import CacheCall
from conftest import HAS_GPU, Target

import cuflash
from cuflash import Tile, reference
from cuflash.errors import ArgumentError, DTypeError, OptionError
from cuflash.hardware import device
from cuflash.planning import kernel_specs, split_forward

pytest.importorskip("cupy")

E4M3 = ml_dtypes.float8_e4m3fn
TILE = {"forward_split": Tile(16, 64, 4, 2)}


@pytest.fixture(params=["sm_80", "sm_90", *([pytest.param("gpu", marks=pytest.mark.gpu)] if HAS_GPU else [])])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """sm_90 has instructions for e4m3, sm_80 does without. CuPy has no such type."""
    if request.param != "gpu":
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", request.param)
    return Target(request.param)


class Bits(CacheCall):
    """A call whose arrays are placed with the bits of its caches, which is how CuPy has them."""

    def arrays(self) -> dict[str, Any]:
        given = super().arrays()
        return given | {name: given[name].view("uint8") for name in ("key_cache", "value_cache")}

    def appended(self, b: int) -> tuple[Any, Any]:
        keys, values = super().appended(b)
        return keys.view("uint8"), values.view("uint8")


CALLS: dict[str, CacheCall] = {
    "rows": CacheCall((0, 5, 130, 250), 1, 1, 4, 2, 32, scales="heads"),
    "pages": CacheCall((0, 70, 33), 3, 3, 6, 2, 64, 32, room=100, page_size=16, rotary_dim=16, scales="sequences", options={"is_causal": True}),
    "odd": CacheCall((7, 90), 2, 0, 5, 1, 40, 72, room=100, leftpad=(3, 11), scales="sequences", options={"num_splits": 3}),
    "features": CacheCall((60, 90), 2, 2, 2, 1, 32, room=100, scales="heads", options={"is_causal": True, "window": (40, 0), "softcap": 3.0}),
    "unscaled": CacheCall((64, 3), 17, 1, 2, 2, 16, room=80, picks_rows=True, scales="none", dtype="bfloat16"),
    "bfloat16": CacheCall((64, 31), 1, 1, 8, 2, 64, room=80, page_size=1, scales="sequences", dtype="bfloat16", options={"scale": -0.3}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_calls_of_every_form(name: str, decoder: Target) -> None:
    call = CALLS[name]
    call.options.setdefault("tile", TILE)
    if decoder.is_gpu:
        call = Bits(**{field: getattr(call, field) for field in CacheCall.__dataclass_fields__})
    call.check(decoder)


def codes(dtype: Any = E4M3) -> Any:
    return numpy.arange(256, dtype="uint8").view(E4M3).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_is_what_it_is(dtype: str, decoder: Target) -> None:
    """A sequence of one key gives its value, and products with unit vectors give its columns."""
    element = {"float16": numpy.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    query = numpy.broadcast_to(numpy.eye(16), (16, 1, 16, 16)).astype(element)
    cache = codes().reshape(16, 1, 1, 16)
    lengths = numpy.ones(16, "int32")
    out, lse = (
        numpy.asarray(decoder.as_numpy(x), float)
        for x in cuflash.attention_with_kvcache(
            *(decoder.place(x) for x in (query, cache.view("uint8"), cache.view("uint8"))),
            cache_seqlens=decoder.place(lengths), scale=1.0, return_lse=True, tile=TILE,
        )
    )  # fmt: skip
    want = codes(float).reshape(16, 16)
    has_nan = numpy.isnan(want).any(1)
    assert has_nan.sum() == 2  # of the last number of either sign
    numpy.testing.assert_allclose(lse[~has_nan, :, 0], want[~has_nan], rtol=1e-6, atol=1e-5)  # neighbours are 2^-9 apart or more
    numpy.testing.assert_array_equal(out[~has_nan, 0], numpy.broadcast_to(want[~has_nan, None], (14, 16, 16)))
    assert numpy.isnan(lse[has_nan]).all()
    assert numpy.isnan(out[has_nan]).all()


def test_every_float16_is_rounded_once(decoder: Target) -> None:
    """To the nearest, ties to even; what is too large becomes the largest number, and NaN stays NaN."""
    new = numpy.arange(2**16, dtype="uint16").view("float16").reshape(64, 16, 1, 64)
    cache = numpy.zeros((64, 16, 1, 64), "uint8")
    caches = [decoder.place(cache.copy()) for _ in range(2)]
    arrays = [decoder.place(x) for x in (new[:, :1], new, new)]
    cuflash.attention_with_kvcache(
        arrays[0], *caches, *arrays[1:], cache_seqlens=decoder.place(numpy.zeros(64, "int32")), is_causal=True, tile=TILE
    )
    with numpy.errstate(invalid="ignore"):
        want = numpy.clip(new.astype("float32"), -448, 448).astype(E4M3)
    for got in caches:
        got = decoder.as_numpy(got).view(E4M3)
        is_nan = numpy.isnan(new)
        assert numpy.isnan(got[is_nan]).all()
        numpy.testing.assert_array_equal(got[~is_nan].view("uint8"), want[~is_nan].view("uint8"))


def test_new_scales_compile_nothing_and_mean_what_they_say(simulator: Target) -> None:
    """The numbers are read on the device: the same prepared call takes others."""
    given = CALLS["rows"].arrays() | {"key": None, "value": None}
    first = cuflash.attention_with_kvcache(**given)
    twice = cuflash.attention_with_kvcache(**given | {"value_scale": given["value_scale"] * numpy.float32(2)})
    numpy.testing.assert_array_equal(twice.astype(float), 2 * first.astype(float))


def test_a_cascade_and_a_cache_that_grows(simulator: Target) -> None:
    rng = numpy.random.default_rng(3)
    query, key, value = (rng.standard_normal((2, 40, heads, 32)).astype("float16") for heads in (4, 2, 2))
    scales = {"key_scale": numpy.float32([0.01, 0.02]), "value_scale": numpy.float32([0.03, 0.01])}
    cache = cuflash.KVCache(2, 2, 32, page_size=8, dtype="float8_e4m3fn", **scales)
    assert cache.keys.dtype == E4M3
    for begin, end in ((0, 32), (32, 40)):
        out = cache.attend(query[:, begin:end], key[:, begin:end], value[:, begin:end])
    kept = [
        (x.astype("float32") / scale[:, None]).astype(E4M3).astype("float32") * scale[:, None]
        for x, scale in zip((key, value), scales.values(), strict=True)
    ]
    want, _ = reference.attention(query, *kept, is_causal=True, enable_gqa=True)
    numpy.testing.assert_allclose(out.astype("float32"), want[:, 32:], atol=2e-3)
    with pytest.raises(OptionError, match=r"key_scale: got .*the cache has its own"):
        cache.attend(query, key, value, **scales)

    table = numpy.array([[0, 1, 2], [0, 1, 3]], "int32")
    given = {"cache_seqlens": numpy.array([20, 24], "int32"), "page_table": table, "prefix_length": 16, **scales}
    outs = [cuflash.cascade_attention(query[:, :1], cache.keys, cache.values, cascade=cascade, **given) for cascade in (False, True)]
    numpy.testing.assert_allclose(*(x.astype("float32") for x in outs), atol=2e-3)


def test_half_the_bytes_are_asked_for() -> None:
    on = device.of_arch("sm_90", "gpu")
    traffic = []
    for scales in ("", "heads"):
        given = CacheCall((4000,), heads_q=8, heads_kv=2, head_dim=128, room=4096, page_size=16, scales=scales).arrays()
        plan = cuflash.kvcache_plan(**given)
        kernel = next(kernel for kernel in plan.kernels if kernel.spec == kernel_specs.FORWARD_SPLIT)
        traffic.append(split_forward.traffic(kernel, plan.problem, on))
    wide, narrow = traffic
    assert wide.key_bytes == 2 * narrow.key_bytes
    assert narrow.bytes_in_flight >= 48 * 1024


_GIVEN = CALLS["rows"].arrays()
_BAD: list[tuple[str, dict[str, Any], type[ArgumentError], str]] = [
    ("one cache", {"value_cache": _GIVEN["value_cache"].astype("float16")}, DTypeError, "value_cache: got float16; expected float8_e4m3fn, like key_cache.*key_scale"),
    ("another type", {"key_cache": _GIVEN["key_cache"].view(ml_dtypes.float8_e5m2)}, DTypeError, "key_cache: got float8_e5m2"),
    ("another type of both", {name: _GIVEN[name].view(ml_dtypes.float8_e5m2) for name in ("key_cache", "value_cache")}, DTypeError, "key_cache: got float8_e5m2; expected float16, bfloat16 or float8_e4m3fn"),
    ("query", {"query": _GIVEN["query"].astype(E4M3)}, DTypeError, "query: got float8_e4m3fn"),
    ("new keys", {"key": _GIVEN["key"].astype(E4M3)}, DTypeError, "key: got float8_e4m3fn"),
    ("16 bits", {name: _GIVEN[name].astype("float16") for name in ("key_cache", "value_cache")}, OptionError, "key_scale: got an array with a key_cache of float16"),
    ("scale type", {"key_scale": numpy.ones(2)}, DTypeError, "key_scale: got float64; expected float32"),
    ("scale shape", {"key_scale": numpy.ones(4, "float32")}, ArgumentError, r"key_scale: got shape \(4,\); expected \(2,\), or \(4, 2\)"),
    ("a number", {"value_scale": 0.5}, DTypeError, "value_scale: got 0.5; expected a NumPy array"),
    ("zero", {"value_scale": numpy.float32([1, 0])}, OptionError, "value_scale: got 0.0 for head 1; expected positive finite numbers.*448"),
    ("nan", {"key_scale": numpy.full((4, 2), numpy.nan, "float32")}, OptionError, "key_scale: got nan for head 0"),
    ("flash-attn's name", {"k_descale": numpy.ones(2, "float32")}, ArgumentError, "k_descale.*key_scale"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), [pytest.param(*case, id=name) for name, *case in _BAD])
def test_what_cannot_be_used_is_named(changed: dict[str, Any], error: type[ArgumentError], message: str, simulator: Target) -> None:
    with pytest.raises(error, match=message):
        cuflash.attention_with_kvcache(**_GIVEN | changed)
