"""`KVCache`: pages that sequences take as they grow, and give back."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from conftest import Target

import cuflash
from cuflash.errors import DTypeError, OptionError, ShapeError

pytest.importorskip("cupy")


def test_steps_of_any_length_are_one_causal_call(simulator: Target) -> None:
    """Pages run out and are doubled; tokens that were speculated wrongly are taken back, and a sequence begins anew in pages of another one."""
    rng = numpy.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 60, heads, 32)).astype("float16") for heads in (4, 2, 2))
    cache = cuflash.KVCache(2, 2, 32, page_size=8)
    wrong = rng.standard_normal((2, 5, 2, 32)).astype("float16")

    def check(begin: int, end: int) -> None:
        parts = [x[:, begin:end] for x in (query, key, value)]
        out = cache.attend(*parts)
        want = cuflash.scaled_dot_product_attention(
            parts[0], key[:, :end], value[:, :end], is_causal=True, causal_alignment="bottom_right", enable_gqa=True
        )
        numpy.testing.assert_allclose(out.astype("float32"), want.astype("float32"), atol=2e-3)
        assert cache.lengths == [end, end] == cache.seqlens.tolist()
        used = [page for pages in cache._pages for page in pages]
        assert sorted(used + cache._free) == list(range(len(cache.keys)))

    for begin, end in ((0, 13), (13, 14), (14, 40)):
        check(begin, end)
    cache.attend(query[:, :5], wrong, wrong)
    for b in range(2):
        cache.truncate(b, 40)
    check(40, 41)
    pages = len(cache.keys)
    for b in (1, 0):
        cache.truncate(b)
    assert cache.lengths == [0, 0]
    check(0, 60)
    assert len(cache.keys) == pages


def test_pages_as_long_as_sequences_are_a_contiguous_cache(simulator: Target) -> None:
    cache = cuflash.KVCache(2, 1, 32, page_size=64)
    x = numpy.random.default_rng(0).standard_normal((2, 40, 1, 32)).astype("float16")
    for begin, end in ((0, 39), (39, 40)):
        cache.attend(x[:, begin:end], x[:, begin:end], -x[:, begin:end])
    assert cache.keys.shape == (2, 64, 1, 32)
    assert cache.page_table.shape == (2, 1)
    rows = cache.page_table[:, 0]
    numpy.testing.assert_array_equal(cache.keys[rows, :40], x)
    numpy.testing.assert_array_equal(cache.values[rows, :40], -x)


def test_a_failed_call_takes_nothing_that_is_lost(simulator: Target) -> None:
    cache = cuflash.KVCache(1, 1, 32, page_size=8)
    x: Any = numpy.zeros((1, 20, 1, 32), "float16")
    with pytest.raises(ShapeError, match=r"key: .*4 dimensions"):
        cache.attend(x, x[:, 0], x[:, 0])
    with pytest.raises(ShapeError, match="value"):
        cache.attend(x, x, x[:, :1])
    assert cache.lengths == [0]
    assert cache.attend(x, x, x).shape == x.shape
    assert (cache.lengths, len(cache._pages[0])) == ([20], 3)


def test_rotary_tables_that_end_with_the_pages(simulator: Target) -> None:
    """Spare columns of the table, for whose keys there are no positions, are no room."""
    cache = cuflash.KVCache(1, 1, 32, page_size=8)
    x: Any = numpy.ones((1, 20, 1, 32), "float16")
    tables = {name: numpy.ones((24, 4), "float32") for name in ("rotary_cos", "rotary_sin")} | {"rotary_interleaved": True}
    assert cache.attend(x, x, x, **tables).shape == x.shape
    assert cache.page_table.shape == (1, 4)
    cache.attend(x[:, :4], x[:, :4], x[:, :4], **tables)
    with pytest.raises(ShapeError, match="rotary_cos: got 24 positions; expected at least 32"):
        cache.attend(x[:, :1], x[:, :1], x[:, :1], **tables)


def test_what_cannot_be_used_is_named() -> None:
    for name, value in (("page_size", 0), ("batch", True), ("head_dim", -1), ("head_dim_v", 0), ("head_dim_v", -3), ("num_heads", 2.0)):
        with pytest.raises(OptionError, match=f"{name}: got {value}"):
            cuflash.KVCache(**{"batch": 1, "num_heads": 1, "head_dim": 32, name: value})
    assert cuflash.KVCache(numpy.int64(1), numpy.int32(2), 32, head_dim_v=numpy.int64(16)).values.shape == (1, 64, 2, 16)
    with pytest.raises(OptionError, match=r"xp: got the module math; expected numpy, cupy or torch.*attention_with_kvcache"):
        cuflash.KVCache(1, 1, 32, xp=math)
    with pytest.raises(OptionError, match="device: got 'cuda'; expected None with NumPy and CuPy"):
        cuflash.KVCache(1, 1, 32, device="cuda")
    with pytest.raises(OptionError, match=r"dtype: got 'fp8'; expected a type of numpy's, or its name.*float8_e4m3fn"):
        cuflash.KVCache(1, 1, 32, dtype="fp8")
    for scale in (0.5, [0.5]):
        with pytest.raises(DTypeError, match=r"value_scale: got .*NumPy array"):
            cuflash.KVCache(1, 1, 32, dtype="float8_e4m3fn", value_scale=scale)
    cache = cuflash.KVCache(1, 1, 32)
    x: Any = numpy.zeros((1, 1, 1, 32), "float16")
    for name in ("layout", "page_table", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q", "max_seqlen_q"):
        with pytest.raises(OptionError, match=f"{name}: got .*the cache has its own"):
            cache.attend(x, x, x, **{name: "bhsd"})
    with pytest.raises(OptionError, match="length: got 1; expected an int from 0 to 0, what sequence 0 has"):
        cache.truncate(0, 1)
    with pytest.raises(OptionError, match=r"cu_seqlens_q: got .*the cache has its own"):
        cache.attend(x[0], x[0], x[0], cu_seqlens_q=numpy.array([0, 1], "int32"))
    for key in ([[[[0.0]]]], None):
        with pytest.raises(DTypeError, match=r"key: got .*NumPy array"):
            cache.attend(x, key, x)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 1.0), r"length: got 1.0; expected an int from 0 to 3, what sequence 0 has.*grows by attend"),
        ((0, None), "length: got None"),
        ((0, True), "length: got True"),
        ((0, -1), "length: got -1"),
        ((0, 4), "length: got 4"),
        ((5, 0), "sequence: got 5; expected an int from 0 to 1"),
        ((-1, 0), "sequence: got -1"),
        ((0.0, 1), "sequence: got 0.0"),
        ((False, 1), "sequence: got False"),
        ((None,), "sequence: got None"),
    ],
    ids=str,
)
def test_what_truncate_cannot_use_is_named(given: Any, message: str, simulator: Target) -> None:
    cache = cuflash.KVCache(2, 1, 32, page_size=8)
    x: Any = numpy.ones((2, 3, 1, 32), "float16")
    cache.attend(x, x, x)
    with pytest.raises(OptionError, match=message):
        cache.truncate(*given)
    assert cache.lengths == [3, 3] == cache.seqlens.tolist()
    cache.truncate(numpy.int64(1), numpy.int32(2))
    assert cache.lengths == [3, 2] == cache.seqlens.tolist()
    assert all(type(length) is int for length in cache.lengths)
