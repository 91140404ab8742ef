"""`KVCache`: pages that sequences take as they grow, and give back."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from conftest import Target

import cuflash
from cuflash.errors import OptionError, ShapeError

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


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(OptionError, match="page_size: got 0"):
        cuflash.KVCache(1, 1, 32, page_size=0)
    cache = cuflash.KVCache(1, 1, 32)
    with pytest.raises(OptionError, match="length: got 1; expected 0 to 0"):
        cache.truncate(0, 1)
