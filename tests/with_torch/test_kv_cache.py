"""`KVCache` on tensors: the same numbers as on arrays."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import cuflash
from cuflash.errors import OptionError


def test_a_cache_of_tensors_gives_what_one_of_arrays_does(device: Any) -> None:
    """It doubles its pages, turns positions, and takes tokens back."""
    if device.type == "cuda":
        pytest.importorskip("cupy")
    rng = numpy.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 45, heads, 32)).astype("float16") for heads in (4, 2, 2))
    angles = numpy.outer(numpy.arange(64), 0.5 ** numpy.arange(16)).astype("float32")
    tables = {"rotary_cos": numpy.cos(angles), "rotary_sin": numpy.sin(angles)}
    arrays, tensors = (
        cuflash.KVCache(2, 2, 32, page_size=8),
        cuflash.KVCache(2, 2, 32, page_size=8, dtype=torch.float16, xp=torch, device=device),
    )
    on_device = {name: torch.from_numpy(table).to(device) for name, table in tables.items()}
    for begin, end in ((0, 20), (20, 21), (21, 45)):
        step = [x[:, begin:end] for x in (query, key, value)]
        want = arrays.attend(*step, **tables, rotary_interleaved=False)
        got = tensors.attend(*(torch.from_numpy(x).to(device) for x in step), **on_device, rotary_interleaved=False)
        assert torch.equal(got.cpu(), torch.from_numpy(want))
        for cache in (arrays, tensors):
            cache.truncate(1, end)
    assert tensors.lengths == tensors.seqlens.tolist() == [45, 45]
    assert (tensors.keys.dtype, tensors.keys.device.type, tensors.page_table.dtype) == (torch.float16, device.type, torch.int32)
    assert torch.equal(tensors.page_table.cpu(), torch.from_numpy(arrays.page_table))


def test_a_cache_in_8_bits_gives_what_one_of_arrays_does(device: Any) -> None:
    if device.type == "cuda":
        pytest.importorskip("cupy")
    rng = numpy.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 20, heads, 16)).astype("float16") for heads in (2, 1, 1))
    scale = numpy.float32([0.01])
    arrays = cuflash.KVCache(2, 1, 16, page_size=8, dtype="float8_e4m3fn", key_scale=scale)
    on_device = torch.from_numpy(scale).to(device)
    tensors = cuflash.KVCache(2, 1, 16, page_size=8, dtype="float8_e4m3fn", key_scale=on_device, xp=torch, device=device)
    for begin, end in ((0, 5), (5, 20)):  # its pages are doubled in between
        step = [x[:, begin:end] for x in (query, key, value)]
        want, got = arrays.attend(*step), tensors.attend(*(torch.from_numpy(x).to(device) for x in step))
        assert torch.equal(got.cpu(), torch.from_numpy(want))
    assert tensors.keys.dtype == torch.float8_e4m3fn


def test_names_of_types(device: Any) -> None:
    assert cuflash.KVCache(1, 1, 32, dtype="bfloat16", xp=torch, device=device).values.dtype == torch.bfloat16
    with pytest.raises(OptionError, match="dtype: got 'float17'"):
        cuflash.KVCache(1, 1, 32, dtype="float17", xp=torch)


@pytest.mark.parametrize("attends_within", [True, False], ids=["pages are taken in it too", "only made in it"])
def test_a_cache_made_in_inference_mode_works_outside(device: Any, attends_within: bool) -> None:
    """And the reverse: steps within and without may take turns."""
    if device.type == "cuda":
        pytest.importorskip("cupy")
    x = torch.randn(2, 20, 1, 32, device=device).half()
    with torch.inference_mode():
        cache = cuflash.KVCache(2, 1, 32, page_size=8, dtype=torch.float16, xp=torch, device=device)
        if attends_within:
            cache.attend(x, x, x)
    for _ in range(2):
        cache.attend(x, x, x)
    cache.truncate(1, 7)
    with torch.inference_mode():
        cache.attend(x, x, x)
    cache.truncate(0, 3)
    assert cache.lengths == cache.seqlens.tolist() == [3, 27]
    assert not any(array.is_inference() for array in (cache.keys, cache.values, cache.seqlens, cache.page_table))
