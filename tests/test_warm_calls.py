"""The door of the public calls: what is found there is what the long way would have found, at the price of a few function calls."""

from __future__ import annotations

import threading
from typing import Any

import numpy
import pytest
from python_calls import num_calls

import cuflash
from cuflash.planning.argument_structs import FORWARD_ARGUMENTS
from cuflash.runtime import cache_calls, calls, launch, prepared, warm_calls

SHAPE = (2, 16, 4, 64)


class Launcher:
    """A kernel that does nothing but keep what it was given."""

    def __init__(self) -> None:
        self.structs: list[bytes] = []

    def launch(self, shape: Any, struct: Any, *others: Any) -> None:
        self.structs.append(bytes(struct))

    def addresses(self) -> list[dict[str, int]]:
        """Of the arrays of each forward launch."""
        places = {name: FORWARD_ARGUMENTS.offsets[name] for name in ("query", "key", "value", "out")}
        return [{name: int.from_bytes(struct[at : at + 8], "little") for name, at in places.items()} for struct in self.structs]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    made = Launcher()
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    monkeypatch.setattr(launch, "executable", lambda kernel, on: made)
    monkeypatch.setattr(prepared, "simulated_memory", lambda *arguments: ())
    monkeypatch.setattr(cache_calls, "check_positions", lambda *arguments: None)
    monkeypatch.setattr(calls, "_calls", {})
    return made


def inputs(dtype: Any = numpy.float16) -> list[Any]:
    return [numpy.zeros(SHAPE, dtype) for _ in range(3)]


def test_a_warm_call_is_a_few_functions(launcher: Launcher) -> None:
    """A bound that no load of the machine disturbs: the long way is twice as many. The launcher is one for each kernel, torch's questions are three."""
    arrays = inputs()
    out, lse = cuflash.scaled_dot_product_attention(*arrays, return_lse=True)
    caches = [numpy.zeros((8, 16, 2, 64), numpy.float16) for _ in range(2)]
    step = [numpy.zeros((4, 1, heads, 64), numpy.float16) for heads in (8, 2, 2)]
    places = {"cache_seqlens": numpy.zeros(4, "int32"), "page_table": numpy.zeros((4, 2), "int32")}
    assert num_calls(lambda: cuflash.scaled_dot_product_attention(*arrays, is_causal=True)) <= 24
    assert num_calls(lambda: cuflash.scaled_dot_product_attention_backward(out, *arrays, out, lse)) <= 46
    assert num_calls(lambda: cuflash.attention_with_kvcache(step[0], *caches, *step[1:], is_causal=True, **places)) <= 42


def test_each_call_has_its_own_addresses(launcher: Launcher) -> None:
    for _ in range(3):
        query, key, value = inputs()
        out = numpy.empty_like(query)
        assert cuflash.scaled_dot_product_attention(query, key, value, out=out) is out
        wanted = {"query": query, "key": key, "value": value, "out": out}
        assert launcher.addresses()[-1] == {name: array.ctypes.data for name, array in wanted.items()}


def test_threads_share_what_is_prepared_and_nothing_else(launcher: Launcher) -> None:
    """Each launch has the three arrays of one thread."""
    given = [inputs() for _ in range(4)]
    cuflash.scaled_dot_product_attention(*given[0])

    def work(arrays: list[Any]) -> None:
        for _ in range(50):
            cuflash.scaled_dot_product_attention(*arrays)

    threads = [threading.Thread(target=work, args=(arrays,)) for arrays in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = {tuple(array.ctypes.data for array in arrays) for arrays in given}
    launched = [(found["query"], found["key"], found["value"]) for found in launcher.addresses()]
    assert len(launched) == 201
    assert set(launched) == known


def test_what_a_signature_refuses_is_refused_warm(launcher: Launcher) -> None:
    arrays = inputs()
    for _ in range(3):
        cuflash.scaled_dot_product_attention(*arrays, None, 0.0, True, layout="bshd")
    for refused in (
        lambda: cuflash.scaled_dot_product_attention(*arrays, None, 0.0, True, None, False, "bshd"),
        lambda: cuflash.scaled_dot_product_attention(*arrays, None, 0.0, True, layout="bshd", query=arrays[0]),
        lambda: cuflash.scaled_dot_product_attention(*arrays[:2], None, 0.0, True, layout="bshd"),
    ):
        with pytest.raises((TypeError, ValueError)):
            refused()


def test_what_lies_elsewhere_or_otherwise_is_another_call(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides, types, alignment and the architecture are looked at, whichever way the arguments are written."""
    found = []
    run = prepared.PreparedForward.run
    monkeypatch.setattr(prepared.PreparedForward, "run", lambda call, *given: found.append(call) or run(call, *given))

    def call_of(*arrays: Any, **options: Any) -> Any:
        for _ in range(2):
            cuflash.scaled_dot_product_attention(*arrays, **options)
        assert found[-1] is found[-2]
        return found[-1]

    arrays = inputs()
    usual = call_of(*arrays)
    assert call_of(query=arrays[0], key=arrays[1], value=arrays[2]) is usual
    assert call_of(arrays[0], value=arrays[2], key=arrays[1]) is usual
    assert call_of(*arrays, scale=None, is_causal=False) is usual
    strided = numpy.zeros((2, 4, 16, 64), numpy.float16).transpose(0, 2, 1, 3)
    shifted = numpy.zeros(strided.size + 1, numpy.float16)[1:].reshape(SHAPE)
    others = [
        call_of(strided, *arrays[1:]),
        call_of(shifted, *arrays[1:]),
        call_of(*inputs(numpy.float32)),
        call_of(*arrays, is_causal=True),
    ]
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    others.append(call_of(*arrays))
    assert len({usual, *others}) == 6


def test_forgotten_calls_are_prepared_anew(launcher: Launcher) -> None:
    arrays = inputs()
    for _ in range(2):
        cuflash.scaled_dot_product_attention(*arrays)
    assert any(isinstance(known, warm_calls.Known) for known in calls._calls.values())
    calls.forget()
    assert not calls._calls


def test_a_result_that_overlaps_is_refused_warm(launcher: Launcher) -> None:
    memory = numpy.zeros((2, *SHAPE), numpy.float16)
    arrays = inputs()
    for _ in range(2):
        cuflash.scaled_dot_product_attention(*arrays, out=memory[0])
    with pytest.raises(cuflash.ArgumentError, match="out"):
        cuflash.scaled_dot_product_attention(memory[0], *arrays[1:], out=memory[0])
    memory.flags.writeable = False
    with pytest.raises(cuflash.ArgumentError, match="out"):
        cuflash.scaled_dot_product_attention(*arrays, out=memory[0])


def test_seeds_and_dropout_go_the_long_way(launcher: Launcher) -> None:
    """Each number would be a call of its own."""
    arrays = inputs()
    for seed in range(3):
        cuflash.scaled_dot_product_attention(*arrays, dropout_p=0.5, dropout_seed=seed)
        cuflash.scaled_dot_product_attention(*arrays, dropout_seed=seed)
    assert not any(isinstance(known, warm_calls.Known) for known in calls._calls.values())
