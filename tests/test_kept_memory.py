"""Workspace that is kept from step to step: nothing is allocated but results, and nobody has the bytes of somebody else."""

from __future__ import annotations

import threading
from typing import Any

import numpy
import pytest
from caches import CacheCall
from conftest import Target

import cuflash
from cuflash.arrays import frameworks
from cuflash.arrays.borrowing import borrow
from cuflash.planning.kernel_plan import Buffer
from cuflash.runtime import kept_memory
from cuflash.runtime.kept_memory import Places, give_back, take

pytest.importorskip("cupy")

LIKE = borrow(numpy.zeros(1, "float16"), "x")


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that were asked for since nothing was kept."""
    shapes: list[tuple[int, ...]] = []
    empty = frameworks._NumPy.empty

    def counted(self: Any, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        shapes.append(shape)
        return empty(self, shape, dtype, like)

    monkeypatch.setattr(frameworks._NumPy, "empty", counted)
    monkeypatch.setattr(kept_memory, "_kept", kept_memory._OfThread())
    return shapes


def test_a_step_allocates_its_result_alone(simulator: Target, allocated: list[tuple[int, ...]]) -> None:
    """Parts of splits lie where those of the step before lay; with `out` nothing is allocated at all."""
    call = CacheCall((5, 130, 250), 1, 1, page_size=16, rotary_dim=32, options={"is_causal": True, "num_splits": 3})
    given = call.arrays()
    first, lse = cuflash.attention_with_kvcache(**given, return_lse=True)
    call.check_results(first, lse)
    assert len(allocated) == 3, "out, lse and a piece"
    assert {buffer.name for buffer in cuflash.kvcache_plan(**given).workspace} == {"partial_out", "partial_lse"}
    allocated.clear()
    for _ in range(3):
        numpy.testing.assert_array_equal(cuflash.attention_with_kvcache(**given, return_lse=True)[0], first)
    assert allocated == [first.shape, lse.shape] * 3
    out = numpy.empty_like(first)
    cuflash.attention_with_kvcache(**given, out=out)
    allocated.clear()
    out[...] = 0
    for _ in range(3):
        assert cuflash.attention_with_kvcache(**given, out=out) is out
    assert not allocated
    numpy.testing.assert_array_equal(out, first)


def test_calls_of_other_sizes_have_the_same_piece(simulator: Target, allocated: list[tuple[int, ...]]) -> None:
    """Each is right, in memory that others have used before; it grows with the largest."""
    small, large = (CacheCall((40, 299), heads_q=heads, options={"num_splits": 2}) for heads in (2, 4))
    for call in (small, large, small, large):
        call.check(simulator)
    pieces = [shape for shape in allocated if len(shape) == 1]
    assert len(pieces) == 2
    assert pieces[0] < pieces[1]


def test_what_is_large_is_not_kept(simulator: Target, allocated: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory, "MAX_BYTES", 64)
    given = CacheCall((40, 299), room=301, options={"num_splits": 2}).arrays()
    for _ in range(2):
        cuflash.attention_with_kvcache(**given)
    assert len(allocated) == 4, "out and a piece for both parts, each time"


def test_threads_streams_and_nested_calls_have_memory_of_their_own(allocated: list[tuple[int, ...]]) -> None:
    of, piece = take(1000, LIKE, 5)
    _, nested = take(1000, LIKE, 5)
    _, other_stream = take(1000, LIKE, 6)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(take(1000, LIKE, 5)[1].address))
    give_back(of, piece)
    thread.start()
    thread.join()
    assert len({piece.address, nested.address, other_stream.address, *found}) == 4
    assert take(900, LIKE, 5)[1] is piece
    assert len(allocated) == 4


def test_few_streams_are_remembered(allocated: list[tuple[int, ...]]) -> None:
    for stream in range(20):
        give_back(*take(10, LIKE, stream))
    assert [stream for _, _, stream in kept_memory._kept.pieces] == [*range(12, 20)]


def test_who_keeps_nothing() -> None:
    """torch's graphs want their pools back, a CuPy stream's handle may come back as another's, and a library's framework is made for each array."""
    assert LIKE.framework.keeps_memory(0)
    assert frameworks._Torch(cuda=False).keeps_memory(0)
    assert not frameworks._Torch(cuda=True).keeps_memory(0)
    assert [frameworks._CuPy(bits=False).keeps_memory(stream) for stream in (0, 1, 2, 0x7F00_0000)] == [True, True, True, False]
    assert not frameworks.DLPackFramework("jax", None, cuda=True).keeps_memory(0)


def test_buffers_neither_touch_nor_share() -> None:
    """An access behind the end of one hits nothing, which the simulator reports."""
    places = Places([Buffer("a", (64,), "float32"), Buffer("b", (1,), "int32"), Buffer("c", (100,), "float16")])
    assert places.offsets == [("a", 0), ("b", 512), ("c", 768)]
    assert places.nbytes == 1024
    assert places.may_be_kept
    assert not Places([]).may_be_kept
    assert not Places([Buffer("a", (kept_memory.MAX_BYTES,), "float32")]).may_be_kept


def test_what_is_kept_is_given_back_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all threads, those that have ended aside, and not what a call is using."""
    monkeypatch.setattr(kept_memory, "_kept", kept_memory._OfThread())
    cuflash.clear_workspace()
    of, piece = take(4096, LIKE, 0)
    assert cuflash.clear_workspace() == 0
    give_back(of, piece)
    waits, ends = threading.Event(), threading.Event()

    def other() -> None:
        give_back(*take(8192, LIKE, 0))
        waits.set()
        ends.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert waits.wait(10)
    assert cuflash.clear_workspace() == 4096 + 8192
    assert cuflash.clear_workspace() == 0
    ends.set()
    thread.join()
    assert take(4096, LIKE, 0)[1].address
