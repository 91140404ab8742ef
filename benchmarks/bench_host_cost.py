"""What a warm call costs on the host, up to the launch: microseconds of Python, with a launcher that does nothing.

    pytest benchmarks/bench_host_cost.py --benchmark-enable

One call of a kind has gone before, so nothing is checked, planned or compiled any more: what is timed is the look-up, the allocation of the
results and the packed arguments, as for a GPU: what the simulator needs besides, its record of written bytes, is left out. The goal is 25 µs for the
forward pass on a quiet machine.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest

import cuflash
from cuflash.runtime import cache_calls, calls, launch, prepared

SHAPE = (2, 128, 4, 64)


class NoLauncher:
    """A kernel that takes no time."""

    def launch(self, *arguments: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "executable", lambda kernel, device: NoLauncher())
    monkeypatch.setattr(prepared, "simulated_memory", lambda *arguments: ())
    monkeypatch.setattr(calls, "_calls", {})


def numpy_inputs() -> list[Any]:
    return [numpy.zeros(SHAPE, numpy.float16) for _ in range(3)]


def tagged_inputs() -> list[Any]:
    return [cuflash.bfloat16(numpy.zeros(SHAPE, numpy.uint16)) for _ in range(3)]


def torch_inputs() -> list[Any]:
    torch = pytest.importorskip("torch")
    return [torch.zeros(SHAPE, dtype=torch.float16) for _ in range(3)]


def cupy_inputs() -> list[Any]:
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("needs a GPU")
    return [cupy.zeros(SHAPE, cupy.float16) for _ in range(3)]


INPUTS = pytest.mark.parametrize("make", [numpy_inputs, tagged_inputs, torch_inputs, cupy_inputs], ids=["numpy", "tagged", "torch", "cupy"])


@INPUTS
def test_forward(benchmark: Any, make: Any) -> None:
    benchmark(cuflash.scaled_dot_product_attention, *make(), is_causal=True)


@INPUTS
def test_forward_with_lse(benchmark: Any, make: Any) -> None:
    benchmark(cuflash.scaled_dot_product_attention, *make(), is_causal=True, return_lse=True)


@INPUTS
def test_backward(benchmark: Any, make: Any) -> None:
    inputs = make()
    out, lse = cuflash.scaled_dot_product_attention(*inputs, is_causal=True, return_lse=True)
    benchmark(cuflash.scaled_dot_product_attention_backward, out, *inputs, out, lse, is_causal=True)


CONVERSIONS = {"numpy": "asarray", "torch": "from_numpy", "cupy": "asarray"}


@pytest.mark.parametrize("library", list(CONVERSIONS))
@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
def test_step_of_generation(benchmark: Any, library: str, rotary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token for each sequence, appended to pages and attended from: seven to nine arrays, two kernels. What a GPU's tables hold nobody checks."""
    convert = getattr(pytest.importorskip(library), CONVERSIONS[library])
    if library == "cupy" and not pytest.importorskip("cupy").is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(cache_calls, "check_positions", lambda *arguments: None)
    shapes = [(4, 1, 8, 64), (256, 16, 2, 64), (256, 16, 2, 64), (4, 1, 2, 64), (4, 1, 2, 64)]
    arrays = [convert(numpy.zeros(shape, "float16")) for shape in shapes]
    options = {"cache_seqlens": convert(numpy.zeros(4, "int32")), "page_table": convert(numpy.zeros((4, 64), "int32")), "is_causal": True}
    if rotary:
        cos, sin = (convert(numpy.zeros((1024, 32), "float32")) for _ in range(2))
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}
    benchmark(cuflash.attention_with_kvcache, *arrays, **options)


def test_forward_into_an_array(benchmark: Any) -> None:
    """With `out=`, which has to be looked at for overlaps each time."""
    query, key, value = numpy_inputs()
    out = numpy.empty_like(query)
    benchmark(cuflash.scaled_dot_product_attention, query, key, value, is_causal=True, out=out)
