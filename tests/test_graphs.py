"""CUDA graphs: what a captured call reads anew when it is replayed. Only a GPU has them; docs/cuda_graphs.md shows the same to users."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from conftest import Target

import cuflash
from cuflash import reference

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> Target:
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("there is no GPU")
    return Target("gpu")


def replay(call: Callable[[], Any], change: Callable[[], None]) -> Any:
    """What a captured `call` gives after `change`, with memory of its own for the graph as long as it is there.

    `change` copies arrays of the device onto others and computes nothing, so that CuPy compiles no kernel of its own here.
    """
    import cupy

    call()  # compiles, which a capture must not do
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            results = call()
        finally:
            graph = stream.end_capture()
    change()
    cupy.cuda.Device().synchronize()
    for _ in range(2):
        graph.launch(stream)
    stream.synchronize()
    return results


def both(*inputs: Any, **options: Any) -> tuple[Any, ...]:
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **options)
    return out, lse, *cuflash.scaled_dot_product_attention_backward(out, *inputs, out, lse, **options)


def assert_same(got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        assert Target.bits(x) == Target.bits(y), index


def test_new_values_in_the_same_memory(gpu: Target) -> None:
    inputs = [gpu.random((2, 300, 3, 64), "float16", seed) for seed in (1, 2, 3)]
    others = [gpu.random((2, 300, 3, 64), "float16", seed) for seed in (4, 5, 6)]

    def change() -> None:
        for array, other in zip(inputs, others, strict=True):
            array[...] = other

    got = replay(lambda: both(*inputs, is_causal=True), change)
    assert_same(got, both(*others, is_causal=True))


def test_the_counter_of_tiles_is_zero_at_each_replay(gpu: Target) -> None:
    """More tiles of queries than there are SMs, which see different numbers of keys: blocks of `forward_wgmma` take them from a counter."""
    if gpu.device.capability != 90:
        pytest.skip("the GPU is no sm_90")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("there is no driver to make tensor maps")
    shape = (8, 400, 12, 64)
    inputs = [gpu.random(shape, "float16", seed) for seed in (1, 2, 3)]
    others = [gpu.random(shape, "float16", seed) for seed in (4, 5, 6)]
    options: dict[str, Any] = {"is_causal": True, "tile": {"forward_wgmma": cuflash.Tile(192, 128, 12, 2)}, "return_lse": True}
    assert cuflash.plan(*inputs, **options).kernels[-1].counts_work

    def change() -> None:
        for array, other in zip(inputs, others, strict=True):
            array[...] = other

    got = replay(lambda: cuflash.scaled_dot_product_attention(*inputs, **options), change)
    assert_same(got, cuflash.scaled_dot_product_attention(*others, **options))


def test_a_replay_draws_another_dropout_mask(gpu: Target) -> None:
    inputs = [gpu.random((2, 130, 2, 64), "float16", seed) for seed in (1, 2, 3)]
    seed = gpu.place(numpy.array([7, 0], numpy.int64))
    options = {"dropout_p": 0.3, "dropout_seed": seed}

    next_seed = gpu.place(numpy.array([7, 1], numpy.int64))

    def next_offset() -> None:
        seed[...] = next_seed

    got = replay(lambda: both(*inputs, **options), next_offset)
    assert_same(got, both(*inputs, dropout_p=0.3, dropout_seed=(7, 1)))
    assert Target.bits(got[0]) != Target.bits(both(*inputs, dropout_p=0.3, dropout_seed=(7, 0))[0])


def test_lengths_of_packed_sequences_are_read_by_each_replay(gpu: Target) -> None:
    inputs = [gpu.random((1, 400, 2, 64), "float16", seed)[0] for seed in (1, 2, 3)]
    offsets, others = (gpu.place(numpy.array(each, numpy.int32)) for each in ([0, 100, 250, 400], [0, 0, 290, 310]))

    def call() -> tuple[Any, ...]:
        out, lse = cuflash.varlen_attention(*inputs, offsets, offsets, 300, 300, return_lse=True)
        return out, lse, *cuflash.varlen_attention_backward(out, *inputs, out, lse, offsets, offsets, 300, 300)

    def change() -> None:
        offsets[...] = others

    got = replay(call, change)
    assert_same(got, call())
    want, _ = reference.varlen_attention(*inputs, offsets, offsets)
    numpy.testing.assert_allclose(gpu.host(got[0]), want, atol=4e-3)


def test_key_lengths_are_read_by_each_replay(gpu: Target) -> None:
    inputs = [gpu.random((3, 200, 2, 64), "float16", seed) for seed in (1, 2, 3)]
    lengths, others = (gpu.place(numpy.array(each, numpy.int32)) for each in ([200, 10, 0], [1, 150, 200]))

    def change() -> None:
        lengths[...] = others

    got = replay(lambda: both(*inputs, seqlens_kv=lengths), change)
    assert_same(got, both(*inputs, seqlens_kv=lengths))
    want, _ = reference.attention(*inputs, seqlens_kv=lengths)
    numpy.testing.assert_allclose(gpu.host(got[0]), want, atol=4e-3)


@pytest.mark.parametrize("num_splits", [3, "stream-K"])
def test_lengths_and_pages_of_a_cache_are_read_by_each_replay(num_splits: int | str, gpu: Target) -> None:
    """A captured step of decoding: with other lengths and pages it appends and attends elsewhere."""
    query, key, value = (gpu.random((2, 1, heads, 32), "float16", seed) for seed, heads in enumerate((4, 2, 2)))
    caches = [gpu.random((8, 16, 2, 32), "float16", seed) for seed in (8, 9)]
    lengths, others = (gpu.place(numpy.array(each, numpy.int32)) for each in ([3, 40], [63, 0]))
    table, turned = (gpu.place(numpy.array(each, numpy.int32).reshape(2, 4)) for each in ([*range(8)], [*reversed(range(8))]))

    def call() -> tuple[Any, ...]:
        options = {"cache_seqlens": lengths, "page_table": table, "num_splits": num_splits, "return_lse": True}
        return cuflash.attention_with_kvcache(query, *caches, key, value, **options)  # type: ignore[no-any-return]

    def change() -> None:
        lengths[...] = others
        table[...] = turned

    got = replay(call, change)
    assert_same(got, call())
    assert Target.bits(caches[0][4, 15]) == Target.bits(key[0, 0])
    assert Target.bits(caches[1][3, 0]) == Target.bits(value[1, 0])
