"""How much memory a call takes beyond what is there before it, its results included."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

from bench.machine import Machine
from bench.operands import Operands


def peak_memory(operands: Operands, machine: Machine, call: Callable[[], Any], library: str) -> int | None:
    """Bytes at the peak of a call: of torch's or CuPy's allocator, on the simulator those that Python traces; None where nobody counts them."""
    if library == "jax":
        return None
    if machine.dry:
        return None if operands.torch is not None else _traced(call)
    if library in ("cupy", "numpy") or operands.torch is None:
        return _of_cupy(machine.cupy, call)
    return _of_torch(operands.torch, call)


def _of_torch(torch: Any, call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.max_memory_allocated() - before)


def _of_cupy(cupy: Any, call: Callable[[], Any]) -> int | None:
    """What the pool hands out and takes back; None of an allocator without hooks."""
    if not hasattr(cupy.cuda, "MemoryHook"):
        return None

    class Peak(cupy.cuda.MemoryHook):  # type: ignore[misc]  # CuPy may be missing
        name = "peak"
        now = most = 0

        def malloc_postprocess(self, **event: Any) -> None:
            self.now += event["mem_size"]
            self.most = max(self.most, self.now)

        def free_postprocess(self, **event: Any) -> None:
            self.now -= event["mem_size"]

    with Peak() as peak:
        result = call()
    del result
    return int(peak.most)


def _traced(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = call()
        most = tracemalloc.get_traced_memory()[1]
        del result
        return most - before
    finally:
        tracemalloc.stop()
