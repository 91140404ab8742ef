"""Fixtures of the simulator's tests; the functions behind them are in simulated.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from simulated import compile_cuda, run_cuda

from cuflash.simulator import Counters


@pytest.fixture(name="compile_cuda")
def compile_cuda_fixture() -> Callable[..., str]:
    """CUDA C++ -> PTX."""
    return compile_cuda


@pytest.fixture(name="run_cuda")
def run_cuda_fixture() -> Callable[..., Counters]:
    """Compile CUDA C++ and run it on arrays."""
    return run_cuda
