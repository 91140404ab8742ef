"""Torch's streams, devices and CUDA graphs. What only a GPU has is not collected without one; which functions of torch are asked is looked at without one too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from written_out import leaves

from cuflash.arrays import frameworks
from cuflash.torch import scaled_dot_product_attention

SHAPE = (1, 2, 40, 32)


def test_memory_is_asked_of_torchs_allocator_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the current device by what compiled graphs allocate with, which knows no other; on another device, or where a mode watches, by torch's own function."""
    asked: list[Any] = []

    def direct(*arguments: Any) -> Any:
        asked.append(arguments)
        return torch.empty(2, 3)

    def watched(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options))
        return torch.empty(2, 3)

    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cuda", direct)
    monkeypatch.setattr(torch, "empty_strided", watched)
    by_device = ((2, 3), (3, 1), {"dtype": torch.float16, "device": torch.device("cuda", 1)})
    for current, is_watched, wanted in (
        (1, False, ((2, 3), (3, 1), torch.float16)),
        (0, False, by_device),
        (1, True, by_device),
    ):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        make = frameworks.TORCH_CUDA.maker([((2, 3), "float16")], SimpleNamespace(device=("cuda", 1)))
        asked.clear()
        if is_watched:
            with FlopCounterMode(display=False):
                make()
        else:
            make()
        assert asked == [wanted]


def test_an_array_that_is_made_once_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether torch's quicker functions are there is asked, by an array, where something is made again and again."""
    asked = []

    def counted(function: Any) -> Any:
        return lambda *arguments, **options: (asked.append(arguments), function(*arguments, **options))[1]

    for owner, name in ((torch, "empty_strided"), (torch._C._dynamo.guards, "_empty_strided_cpu")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    assert frameworks.TORCH_CPU.empty((2, 3), "float32", SimpleNamespace(device=("cpu", 0))).stride() == (3, 1)
    assert asked == [((2, 3), (3, 1))]


def test_the_stream_is_torchs_current_one_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = {0: 0, 1: 77}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=handles[index]))
    assert [frameworks.TORCH_CUDA.current_stream(index) for index in handles] == [0, 77]
    handles[1] = 78
    assert frameworks.TORCH_CUDA.current_stream(1) == 78


class TestOnGpu:
    """Calls that are cold, found by their properties, and like the last one."""

    pytestmark = pytest.mark.gpu

    def test_work_is_in_the_current_stream(self) -> None:
        """What is computed there before is there when kernels read it, and results are when torch reads them, though the default stream is late."""
        inputs = leaves("cuda", *[SHAPE] * 3, dtype=torch.float16)
        grad_out = torch.randn(SHAPE, device="cuda", dtype=torch.float16)
        wanted = both(inputs, grad_out)
        stream = torch.cuda.Stream()
        for _ in range(3):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                late = [torch.full_like(x, float("nan")).requires_grad_() for x in inputs]
                torch.cuda._sleep(200_000_000)
                with torch.no_grad():
                    for x, y in zip(late, inputs, strict=True):
                        x.copy_(y)
                results = [x.clone() for x in both(late, grad_out)]
            assert not stream.query()  # nothing has waited
            stream.synchronize()
            for got, want in zip(results, wanted, strict=True):
                assert torch.equal(got, want)

    def test_nothing_waits_for_the_gpu(self) -> None:
        """As torch itself judges of its own functions, with lengths, seeds and slopes that are converted on the device."""
        inputs = leaves("cuda", *[SHAPE] * 3, dtype=torch.float16)
        grad_out, lengths = torch.randn(SHAPE, device="cuda", dtype=torch.float16), torch.tensor([30], device="cuda")
        slopes = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, device="cuda")
        seed = torch.tensor(7, device="cuda")
        for options in ({}, {"seqlens_kv": lengths, "dropout_p": 0.1}, {"alibi_slopes": slopes, "dropout_p": 0.1, "dropout_seed": seed}):
            both(inputs, grad_out, **options)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                both(inputs, grad_out, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_tensors_of_a_device_that_is_not_current(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one GPU, and another one is needed")
        inputs = leaves("cuda:1", *[SHAPE] * 3, dtype=torch.float16)
        grad_out = torch.randn(SHAPE, device="cuda:1", dtype=torch.float16)
        with torch.cuda.device(1):
            wanted = both(inputs, grad_out)
        for _ in range(3):
            for got, want in zip(both(inputs, grad_out), wanted, strict=True):
                assert got.device == inputs[0].device
                assert torch.equal(got, want)

    @pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_a_graph_of_both_passes(self, dropout_p: float, is_compiled: bool) -> None:
        """Replays read new values, and draw new dropout from the state of torch's generator."""
        attend = torch.compile(scaled_dot_product_attention, backend="aot_eager") if is_compiled else scaled_dot_product_attention
        inputs = leaves("cuda", *[SHAPE] * 3, dtype=torch.float16)
        grad_out = torch.randn(SHAPE, device="cuda", dtype=torch.float16)

        def call() -> list[Any]:
            return both(inputs, grad_out, attend, dropout_p=dropout_p)

        results, replay = captured(call)
        with torch.no_grad():
            for x in inputs:
                x.copy_(torch.randn_like(x))
        replayed = []
        for _ in range(2):
            replay()
            torch.cuda.synchronize()
            replayed.append([x.clone() for x in results])
        if dropout_p:
            assert not torch.equal(replayed[0][0], replayed[1][0])
            return
        for got, again, want in zip(*replayed, call(), strict=True):
            assert torch.equal(got, want)
            assert torch.equal(again, want)


def both(inputs: list[Any], grad_out: Any, attend: Callable[..., Any] = scaled_dot_product_attention, **options: Any) -> list[Any]:
    """out and gradients."""
    out = attend(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def captured(call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Results of a call in a graph, and what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay
