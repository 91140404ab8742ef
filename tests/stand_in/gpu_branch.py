"""Tests of what cuflash does for CuPy arrays, on the stand-in of a GPU. tests/test_stand_in.py runs them in a process that imports it as `cupy`."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import cupy
import ml_dtypes
import numpy
import pytest
from test_tensor_maps import Driver

import cuflash
from cuflash import reference
from cuflash.errors import DeviceError
from cuflash.hardware import device
from cuflash.jit import cache
from cuflash.planning import wgmma_backward, wgmma_forward
from cuflash.runtime import calls, launch, tensor_maps
from cuflash.runtime.arguments import Arguments

pytestmark = pytest.mark.small_tiles

attention, attention_backward = cuflash.scaled_dot_product_attention, cuflash.scaled_dot_product_attention_backward


@pytest.fixture(autouse=True)
def launches() -> Iterator[list[Any]]:
    """What the test has launched, on device 0 and its default stream before and after."""
    cupy.cuda.launches.clear()
    yield cupy.cuda.launches
    assert cupy.cuda.runtime.getDevice() == 0
    assert cupy.cuda.get_current_stream() is cupy.cuda.Stream.null


def inputs(dtype: Any = numpy.float16, seqlen: int = 40) -> list[Any]:
    return [cupy.asarray(numpy.random.default_rng(seed).standard_normal((1, seqlen, 2, 64)).astype(dtype)) for seed in (1, 2, 3)]


def both(*arrays: Any, **options: Any) -> list[Any]:
    out, lse = attention(*arrays, return_lse=True, **options)
    return [out, lse, *attention_backward(out, *arrays, out, lse, **options)]


def same(got: list[Any], want: list[Any]) -> bool:
    return all((x.get() == y.get()).all() for x, y in zip(got, want, strict=True))


def test_results_are_cupy_arrays_and_right() -> None:
    arrays = inputs()
    out, lse, *grads = both(*arrays, is_causal=True)
    assert all(isinstance(x, cupy.ndarray) and x.data.device_id == 0 for x in (out, lse, *grads))
    want, want_lse = reference.attention(*arrays, is_causal=True)
    numpy.testing.assert_allclose(out.get(), want, atol=2e-3)
    numpy.testing.assert_allclose(lse.get(), want_lse, atol=1e-5)
    for got, wanted in zip(grads, reference.attention_backward(out, *arrays, is_causal=True)[:3], strict=True):
        numpy.testing.assert_allclose(got.get(), wanted, atol=8e-3)


def test_bfloat16_with_and_without_a_type_for_it() -> None:
    typed = inputs(ml_dtypes.bfloat16)
    tagged = [cuflash.bfloat16(x.view(numpy.uint16)) for x in typed]
    want, got = both(*typed), both(*tagged)
    assert want[0].dtype == ml_dtypes.bfloat16
    assert [type(x) for x in got] == [cuflash.arrays.frameworks.BFloat16Bits, cupy.ndarray, *[cuflash.arrays.frameworks.BFloat16Bits] * 3]
    assert same([getattr(x, "bits", x) for x in got], [x if x.dtype == numpy.float32 else x.view(numpy.uint16) for x in want])


def test_out_is_written_and_returned() -> None:
    arrays = inputs()
    out = cupy.zeros((1, 2, 40, 64), numpy.float16).swapaxes(1, 2)
    assert attention(*arrays, out=out) is out
    assert same([out], [attention(*arrays)])


def test_kernels_go_to_the_current_stream(launches: list[Any]) -> None:
    arrays, stream = inputs(), cupy.cuda.Stream(non_blocking=True)
    both(*arrays)
    assert {launched.stream for launched in launches} == {0}
    launches.clear()
    with stream:
        both(*arrays)
        cuflash.dropout_mask((1, 2, 40, 40), 0.5, 7, like=arrays[0])
    assert {launched.stream for launched in launches} == {stream.ptr}
    assert len(launches) == 5


def test_the_device_is_that_of_the_arrays(launches: list[Any]) -> None:
    """And the stream is the one that is current there; the caller's device is current again."""
    want = both(*inputs())
    with cupy.cuda.Device(1):
        arrays, stream = inputs(), cupy.cuda.Stream()
    launches.clear()
    with cupy.cuda.Device(1), stream, cupy.cuda.Device(0):
        got = both(*arrays)
        assert cupy.cuda.runtime.getDevice() == 0
    assert {(launched.device, launched.stream) for launched in launches} == {(1, stream.ptr)}
    assert {x.data.device_id for x in got} == {1}
    assert same(got, want)


def test_arrays_on_two_devices_are_refused() -> None:
    query, key, value = inputs()
    with cupy.cuda.Device(1):
        key = inputs()[1]
    with pytest.raises(DeviceError, match="key"):
        attention(query, key, value)
    with pytest.raises(DeviceError, match="value"):
        attention(query, query, value.get())


def test_a_thread_that_has_not_used_the_gpu_yet() -> None:
    """CUDA has no current context there until something sets the device."""
    arrays = inputs()
    want, out, found = both(*arrays), cupy.empty((1, 40, 2, 64), numpy.float16), []

    def first_use() -> None:
        try:
            found.append(attention(*arrays, out=out))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=first_use)
    thread.start()
    thread.join()
    assert found[0] is out, found
    assert same([out], want[:1])


def test_lengths_and_seeds_stay_on_the_device() -> None:
    arrays = [x[0] for x in inputs()]
    offsets = cupy.asarray(numpy.array([0, 15, 15, 40], numpy.int32))
    seed = cupy.asarray(numpy.array([7, 3], numpy.int64))
    out, lse = cuflash.varlen_attention(*arrays, offsets, offsets, 25, 25, return_lse=True, dropout_p=0.4, dropout_seed=seed)
    options = {"dropout_p": 0.4, "dropout_seed": (7, 3)}
    want, want_lse = reference.varlen_attention(*arrays, offsets, offsets, **options)
    numpy.testing.assert_allclose(out.get(), want, atol=3e-3)
    numpy.testing.assert_allclose(lse.get(), want_lse, atol=1e-5)
    grads = cuflash.varlen_attention_backward(out, *arrays, out, lse, offsets, offsets, 25, 25, dropout_p=0.4, dropout_seed=seed)
    wanted = reference.varlen_attention_backward(out, *arrays, offsets, offsets, **options)
    for got, true in zip(grads, wanted[:3], strict=True):
        numpy.testing.assert_allclose(got.get(), true, atol=1e-2)


def test_the_mask_of_dropout_is_on_the_device_of_like() -> None:
    like = inputs()[0]
    kept = cuflash.dropout_mask((1, 2, 40, 40), 0.3, 7, like=like)
    assert isinstance(kept, cupy.ndarray)
    assert (kept.get() == cuflash.dropout_mask((1, 2, 40, 40), 0.3, 7, like=like.get())).all()


def test_features_take_arrays_of_the_device() -> None:
    arrays = inputs()
    options = {
        "attn_mask": cupy.asarray(numpy.tri(40, dtype=bool)[None, None]),
        "alibi_slopes": cupy.asarray(numpy.array([0.5, 0.25], numpy.float32)),
        "sinks": cupy.asarray(numpy.array([0.5, -1.0], numpy.float32)),
        "window": (20, 5),
        "softcap": 5.0,
    }
    out, _, *grads = both(*arrays, **options)
    numpy.testing.assert_allclose(out.get(), reference.attention(*arrays, **options)[0], atol=3e-3)
    for got, true in zip(grads, reference.attention_backward(out, *arrays, **options)[:3], strict=True):
        numpy.testing.assert_allclose(got.get(), true, atol=1e-2)


class Elsewhere:
    """An array of a library that only speaks DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_arrays_of_another_library_on_the_gpu(launches: list[Any]) -> None:
    arrays, stream = inputs(), cupy.cuda.Stream()
    want = attention(*arrays)
    launches.clear()
    with stream:
        out = attention(*map(Elsewhere, arrays))
    assert same([out], [want])
    assert [launched.stream for launched in launches] == [stream.ptr]


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are loaded from memory."""
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setattr(launch, "_executables", {})
    monkeypatch.setattr(calls, "_calls", {})
    cache.reset_memory()
    arrays = inputs()
    numpy.testing.assert_allclose(attention(*arrays).get(), reference.attention(*arrays)[0], atol=2e-3)


def test_more_shared_memory_than_48_kib_is_asked_for(launches: list[Any]) -> None:
    arrays, tile = inputs(), cuflash.Tile(128, 128, 8, 3)
    assert cuflash.plan(*arrays, tile=tile).kernels[0].shared_bytes > 48 * 1024
    attention(*arrays, tile=tile)
    assert [launched.name for launched in launches] == ["forward_mma"]


def test_no_memory_is_left_behind() -> None:
    arrays = inputs()
    both(*arrays)
    before = len(cupy.cuda.live_memory())
    both(*arrays)
    assert len(cupy.cuda.live_memory()) == before


def test_a_cache_grows_on_the_device(launches: list[Any]) -> None:
    """Few new keys come with attention, more by a kernel before it; on the current stream, and no memory but that of the cache."""
    cache = cuflash.KVCache(1, 2, 64, page_size=16, xp=cupy)
    query, key, value = inputs(seqlen=45)
    want = reference.attention(query, key, value, is_causal=True)[0]
    for begin, end in ((0, 40), (40, 41), (41, 45)):
        out = cache.attend(query[:, begin:end], key[:, begin:end], value[:, begin:end], num_splits=2)
        numpy.testing.assert_allclose(out.get().astype("float32"), want[:, begin:end], atol=2e-3)
    assert [launched.name for launched in launches] == ["cache_append", *["forward_split_mma", "merge_attention"] * 3]
    assert (cache.lengths, cache.seqlens.get().tolist(), cache.keys.shape) == ([45], [45], (4, 16, 2, 64))


def test_a_step_of_generation_allocates_its_result_alone() -> None:
    """In a default stream: parts and rotated queries lie where those of the step before lay; with `out` nothing is allocated."""
    cache = cuflash.KVCache(1, 2, 64, page_size=16, xp=cupy)
    query, key, value = inputs(seqlen=16)
    angles = cupy.asarray(numpy.ones((64, 8), "float32"))
    options = {"rotary_cos": angles, "rotary_sin": angles, "rotary_interleaved": True, "num_splits": 2}
    asked_for: list[int] = []
    out = cache.attend(query[:, :8], key[:, :8], value[:, :8], **options)[:, :1]
    cache.attend(query[:, 8:9], key[:, 8:9], value[:, 8:9], **options)
    pool = cupy.get_default_memory_pool()

    def counted(size: int) -> Any:
        asked_for.append(size)
        return pool.malloc(size)

    with cupy.cuda.using_allocator(counted):
        for i in (9, 10, 11):
            cache.attend(query[:, i : i + 1], key[:, i : i + 1], value[:, i : i + 1], **options)
        assert asked_for == [out.size * 2] * 3
        cache.attend(query[:, 12:13], key[:, 12:13], value[:, 12:13], out=out, **options)
        assert len(asked_for) == 3


def test_a_captured_step_has_workspace_of_its_own() -> None:
    """A graph writes to it at every replay, so it is not what the default stream keeps; nor is that of streams that may end, whose handle another may get."""
    query, key, value = inputs(seqlen=45)
    lengths, stream, other = cupy.asarray(numpy.array([45], "int32")), cupy.cuda.Stream(), cupy.cuda.Stream()
    seen: list[set[int]] = []

    def step() -> Any:
        workspaces.clear()
        out = cuflash.attention_with_kvcache(query[:, :1], key, value, cache_seqlens=lengths, num_splits=2)
        seen.append(set(workspaces))
        return out

    workspaces: list[int] = []
    fill = Arguments.fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arguments, "fill", lambda self, words: workspaces.append(words["partial_out"]) or fill(self, words))
        want = step().copy()
        step()
        with other:
            step()
        with stream:
            step()
            stream.begin_capture()
            out = step()
            graph = stream.end_capture()
            graph.launch(stream)
    assert all(len(addresses) == 1 for addresses in seen)
    assert seen[0] == seen[1]
    assert seen[0].isdisjoint(set().union(*seen[2:])), seen
    assert same([out], [want])


@pytest.mark.parametrize("dtype", [numpy.float16, ml_dtypes.bfloat16])
def test_tensor_maps_come_from_the_driver(dtype: Any, launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the arrays of each call, once for those that stay, and for the output of each, which is a new array."""
    driver = Driver(for_simulator=True)
    driver.has_context = lambda: cupy.cuda._here.has_context
    monkeypatch.setattr(tensor_maps, "_driver_function", lambda: driver.function)
    monkeypatch.setenv(wgmma_forward.VARIABLE, "1")
    calls._calls.clear()
    query, key, value = inputs(dtype, 70)
    assert [kernel.name for kernel in cuflash.plan(query, key, value).kernels] == ["forward_wgmma"]
    want = reference.attention(query, key, value)[0]
    outs = [attention(query, key, value) for _ in range(2)]
    for out in outs:
        numpy.testing.assert_allclose(out.get().astype("float32"), want, atol=2e-2)
    assert [address for _, _, address, *_ in driver.calls] == [x.data.ptr for x in (query, key, value, *outs)]
    others = query.copy(), key.copy(), value, cupy.empty_like(query)
    new_thread = threading.Thread(
        target=lambda: attention(*others[:3], out=others[3])
    )  # has no context, and needs no memory that would give it one
    new_thread.start()
    new_thread.join()
    numpy.testing.assert_allclose(others[3].get().astype("float32"), want, atol=2e-2)
    assert len(driver.calls) == 9, "another kind of call, since out is given"
    assert [launched.name for launched in launches] == ["forward_wgmma"] * 3
    calls._calls.clear()


def test_tensor_maps_of_a_backward_call(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the output is copied by one, too."""
    driver = Driver(for_simulator=True)
    driver.has_context = lambda: cupy.cuda._here.has_context
    monkeypatch.setattr(tensor_maps, "_driver_function", lambda: driver.function)
    monkeypatch.setenv(wgmma_backward.VARIABLE, "1")
    monkeypatch.setattr(calls, "_calls", {})
    arrays = inputs(seqlen=70)
    out, _, *grads = both(*arrays, is_causal=True)
    assert [launched.name for launched in launches][1:] == ["backward_delta", "backward_wgmma"]
    assert {address for _, _, address, *_ in driver.calls} == {x.data.ptr for x in (*arrays, out)}
    for got, wanted in zip(grads, reference.attention_backward(out, *arrays, is_causal=True)[:3], strict=True):
        numpy.testing.assert_allclose(got.get(), wanted, atol=8e-3)


def test_blocks_that_stay_count_their_tiles_from_0_in_each_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter is set to 0 in the stream, and by the graph, on the device of the arrays."""
    driver = Driver(for_simulator=True)
    driver.has_context = lambda: cupy.cuda._here.has_context
    monkeypatch.setattr(tensor_maps, "_driver_function", lambda: driver.function)
    monkeypatch.setenv(wgmma_forward.VARIABLE, "1")
    monkeypatch.setattr(device, "of_memory", lambda kind, index: dataclasses.replace(device.gpu(index), num_sms=1))
    monkeypatch.setattr(calls, "_calls", {})
    with cupy.cuda.Device(1):
        arrays, stream = inputs(seqlen=70), cupy.cuda.Stream(non_blocking=True)
    assert cuflash.plan(*arrays, is_causal=True).kernels[0].counts_work
    want = attention(*arrays, is_causal=True)
    with cupy.cuda.Device(1), stream:
        stream.begin_capture()
        out = attention(*arrays, is_causal=True)
        graph = stream.end_capture()
        for _ in range(2):
            out[...] = 0
            graph.launch(stream)
            assert same([out], [want])


def test_a_failing_launch_is_an_error_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept last: it loses the GPU. What CuPy says reaches the caller, every later use says it too, and the current device is the caller's."""
    with cupy.cuda.Device(1):
        arrays = inputs()
    fill = Arguments.fill
    monkeypatch.setattr(Arguments, "fill", lambda self, pointers: fill(self, pointers | {"key": 16} if "key" in pointers else pointers))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="illegal memory access"):
        attention(*arrays)
    monkeypatch.undo()
    assert cupy.cuda.runtime.getDevice() == 0
    for use in (lambda: attention(*arrays), lambda: arrays[0].get(), cupy.cuda.runtime.deviceSynchronize):
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            use()
