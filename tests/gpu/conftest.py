"""Each test here runs on the simulator, and once more on a GPU of compute capability 9.0 if there is one (marked `gpu`).

Needs NumPy, CuPy and pytest only, also without the conftest.py above: `pytest --confcutdir tests/gpu tests/gpu -m gpu`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from calibration import Both, Record
from gpu_process import STAND_IN, GpuProcess


@functools.cache
def _has_hopper() -> bool:
    if STAND_IN:
        return True
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.is_available()) and cupy.cuda.Device(0).compute_capability == "90"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; everything else also runs on the simulator")


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    found = Record()
    yield found
    found.write()


@pytest.fixture(scope="session")
def gpu_process() -> Iterator[GpuProcess]:
    process = GpuProcess()
    yield process
    process.close()


@pytest.fixture(params=["simulator", *([pytest.param("gpu", marks=pytest.mark.gpu)] if _has_hopper() else [])])
def both(request: pytest.FixtureRequest, record: Record) -> Both:
    gpu = request.getfixturevalue("gpu_process") if request.param == "gpu" else None
    return Both(gpu, record)
