"""What a training step allocates, as torch's profiler counts it: results, gradients and a few bytes for each row, and no copy of anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cuflash
from cuflash.torch import scaled_dot_product_attention

BATCH, HEADS, SEQLEN, DIM = 1, 2, 192, 32


def peak_of(step: Callable[[], Any], device: Any) -> int:
    """Bytes beyond what there was before, at their most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    now = most = 0
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_training_step_holds_results_and_a_few_bytes_for_each_row(device: Any, layout: str) -> None:
    """Views of one projection go in; neither they nor gradients are copied, and no scores are formed."""
    order = (2, 0, 3, 1, 4) if layout == "bhsd" else (2, 0, 1, 3, 4)
    projection = torch.randn(BATCH, SEQLEN, 3, HEADS, DIM, device=device, dtype=torch.float16)
    query, key, value = (x.detach().requires_grad_() for x in projection.permute(order).unbind())

    def step() -> Any:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, layout=layout)
        return torch.autograd.grad(out, (query, key, value), out.detach())

    step()  # compiles
    rows, one = BATCH * HEADS * SEQLEN, projection.nbytes // 3
    results = 4 * one + 4 * rows  # out, three gradients, lse
    workspace = 8 * rows
    most = peak_of(step, device)
    assert results <= most <= results + workspace + 4096
    assert most < results + rows * SEQLEN  # a byte for each score would be more


def test_a_step_of_generation_holds_its_result_alone(device: Any) -> None:
    """Whose parts are merged from workspace that is kept on the CPU; on a GPU torch's allocator has it from the step before."""
    cache = cuflash.KVCache(2, 1, DIM, page_size=16, dtype=torch.float16, xp=torch, device=device)
    query, key, value = (torch.randn(2, 16, heads, DIM, device=device, dtype=torch.float16) for heads in (2, 1, 1))

    def step(begin: int, end: int, **options: Any) -> Any:
        own = slice(begin, end)
        return cache.attend(query[:, own], key[:, own], value[:, own], num_splits=2, **options)

    step(0, 8)
    out = step(8, 9)
    if device.type == "cuda":
        before = torch.cuda.memory_stats()["num_device_alloc"]
        step(9, 10)
        assert torch.cuda.memory_stats()["num_device_alloc"] == before
        return
    assert peak_of(lambda: step(9, 10), device) == out.nbytes
    assert peak_of(lambda: step(10, 11, out=out), device) == 0
