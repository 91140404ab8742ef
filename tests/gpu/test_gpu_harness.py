"""The harness itself, without a GPU: what differs is found and written down, and a kernel that fails or hangs costs its process only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from calibration import Both, Record, compile_ptx, decode, ulps
from gpu_process import GpuProcess, run_on_simulator

DOUBLES = """
extern "C" __global__ void doubles(float* y, const float* x) { y[threadIdx.x] = 2 * x[threadIdx.x]; }
extern "C" __global__ void fails(float* y, const float* x) { y[1000000] = x[0]; }
extern "C" __global__ void hangs(float* y, const float* x) { while (((volatile float*)y)[0] == 0) {} }
"""
X = numpy.arange(32, dtype=numpy.float32) + 1


def arguments() -> list[tuple[str, Any]]:
    return [("array", numpy.zeros(32, numpy.float32)), ("array", X)]


@pytest.fixture
def process() -> Iterator[GpuProcess]:
    found = GpuProcess(stand_in=True)
    yield found
    found.close()


class Wrong(GpuProcess):
    """A GPU whose results are larger by so many units in the last place in one element."""

    def __init__(self, apart: int) -> None:
        super().__init__(stand_in=True)
        self._apart = apart

    def run(self, ptx: bytes, kernel: str, *launch: Any, **_: Any) -> list[Any]:
        arrays = run_on_simulator(ptx, kernel, *launch)
        arrays[0].view(numpy.int32)[3] += self._apart
        return arrays


def test_a_difference_fails_and_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_CALIBRATION_OUT", str(tmp_path / "out.json"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # whose name would be part of the file's
    record = Record()
    with pytest.raises(AssertionError, match="1 of 32 differ"):
        Both(Wrong(1), record)("doubles", DOUBLES, "doubles", arguments())
    Both(Wrong(1), record)("within one", DOUBLES, "doubles", arguments(), max_ulps=1, expected=2 * X)
    Both(Wrong(2), record)("within a bound", DOUBLES, "doubles", arguments(), bound=1e-5)
    with pytest.raises(AssertionError, match="1 of 32 differ"):
        Both(Wrong(2), record)("beyond one", DOUBLES, "doubles", arguments(), max_ulps=1)
    record.write()
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["different"] for case in cases] == [1, 1, 1, 1]
    assert [case["max_ulps"] for case in cases] == [1, 1, 2, 2]
    assert cases[1]["not_as_expected"] == 1
    gpu, simulator = decode(cases[0]["gpu"]), decode(cases[0]["simulator"])
    assert numpy.flatnonzero(gpu != simulator).tolist() == [3]
    assert (decode(cases[0]["inputs"][1]) == X).all()


def test_an_expectation_that_the_simulator_misses_fails() -> None:
    with pytest.raises(AssertionError, match="not what NumPy expects"):
        Both(None, Record())("doubles", DOUBLES, "doubles", arguments(), expected=2 * X + (X == 5))


def test_a_failure_or_a_hang_costs_a_process(process: GpuProcess) -> None:
    ptx = compile_ptx(DOUBLES)
    assert (process.run(ptx, "doubles", arguments(), 1, 32, 0)[0] == 2 * X).all()
    with pytest.raises(RuntimeError, match="global-bounds"):
        process.run(ptx, "fails", arguments(), 1, 32, 0)
    assert (process.run(ptx, "doubles", arguments(), 1, 32, 0)[0] == 2 * X).all()
    with pytest.raises(RuntimeError, match=r"no answer within 0\.5 s"):
        process.run(ptx, "hangs", arguments(), 1, 32, 0, seconds=0.5)
    assert (process.run(ptx, "doubles", arguments(), 1, 32, 0)[0] == 2 * X).all()


def test_units_in_the_last_place() -> None:
    a = numpy.array([1.0, 0.0, numpy.nan, 1e-45, numpy.inf, numpy.nan], numpy.float32)
    b = numpy.array([1.0000001, -0.0, numpy.nan, -1e-45, 3.4028235e38, 1.0], numpy.float32)
    assert ulps(a, b).tolist() == [1, 0, 0, 2, 1, 1 << 40]
