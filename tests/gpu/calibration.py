"""The harness of these tests: one source per family of instructions, run on the simulator and, where there is one, on a GPU, from the same PTX.

A test calls `both(name, source, kernel, arguments, …)`. On the simulator alone the result is compared with what NumPy expects. On a GPU it is also compared
with the GPU's: `differ` says how far they may be apart. What was run and what differs goes to the JSON file that CUFLASH_CALIBRATION_OUT names,
with inputs and both outputs, so that it can be studied without a GPU: arrays are base64 of zlib of their bytes, see `decode`. Each worker of pytest-xdist
writes a file of its own beside that one: out.gw0.json, out.gw1.json, …
"""

from __future__ import annotations

import base64
import functools
import json
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from gpu_process import STAND_IN, Argument, GpuProcess, run_on_simulator

PRELUDE = """
typedef unsigned u32; typedef unsigned short u16; typedef unsigned long long u64;
struct __align__(64) Map { char bytes[128]; };
__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void init(u32 b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void fences() { asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void expect(u32 b, u32 n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ u32 test(u32 b, u32 parity) {
  u32 done;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(b), "r"(parity) : "memory");
  return done;
}
__device__ __forceinline__ bool wait(u32 b, u32 parity) {  // gives up after some milliseconds
  for (int i = 0; i < 20000; ++i) {
    u32 done;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(b), "r"(parity) : "memory");
    if (done) return true;
  }
  return false;
}
"""


@functools.cache
def compile_ptx(source: str) -> bytes:
    """CUDA C++ to PTX for sm_90a by NVRTC."""
    pytest.importorskip("cupy")
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(PRELUDE + source, "calibration.cu", (), ())
    try:
        nvrtc.compileProgram(program, ("-arch=compute_90a", "-std=c++17", "-default-device"))
    except nvrtc.NVRTCError as error:
        raise AssertionError(nvrtc.getProgramLog(program)) from error
    ptx = nvrtc.getPTX(program)
    return (ptx.encode() if isinstance(ptx, str) else ptx).rstrip(b"\0")


def encode(array: Any) -> dict[str, Any]:
    data = base64.b64encode(zlib.compress(numpy.ascontiguousarray(array).tobytes(), 9)).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def decode(entry: dict[str, Any]) -> Any:
    """An array of the JSON file."""
    return numpy.frombuffer(zlib.decompress(base64.b64decode(entry["data"])), entry["dtype"]).reshape(entry["shape"])


class Record:
    """What was run; written every two seconds and at the end."""

    def __init__(self) -> None:
        path = os.environ.get("CUFLASH_CALIBRATION_OUT")
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        self._path = Path(path).with_suffix(f".{worker}.json" if worker else ".json") if path else None
        self._written = time.monotonic()
        self.cases: list[dict[str, Any]] = []

    def add(self, case: dict[str, Any]) -> None:
        self.cases.append(case)
        if time.monotonic() > self._written + 2:
            self.write()

    def write(self) -> None:
        if self._path and self.cases:
            temporary = self._path.with_name(self._path.name + ".part")
            temporary.write_text(json.dumps({"cases": self.cases}))
            temporary.replace(self._path)
        self._written = time.monotonic()


# --- How far apart ------------------------------------------------------------------------------------------------------------------------


def ordered(values: Any) -> Any:
    """float32 as integers whose differences are units in the last place; both zeros are 0."""
    bits = values.view(numpy.int32).astype(numpy.int64)
    return numpy.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def ulps(a: Any, b: Any) -> Any:
    """Distance of float32 values in units in the last place; 0 if both are NaN."""
    both = numpy.isnan(a) & numpy.isnan(b)
    one = numpy.isnan(a) ^ numpy.isnan(b)
    return numpy.where(both, 0, numpy.where(one, 1 << 40, numpy.abs(ordered(a) - ordered(b))))


def unequal(a: Any, b: Any) -> Any:
    """Whether the bits differ; NaN of any payload is one value for float32."""
    kind = numpy.dtype(f"u{a.dtype.itemsize}")
    different = a.view(kind) != b.view(kind)
    return different & ~(numpy.isnan(a) & numpy.isnan(b)) if a.dtype.kind == "f" else different


class Both:
    """Runs a kernel on the simulator and, if `gpu`, on the GPU."""

    def __init__(self, gpu: GpuProcess | None, record: Record) -> None:
        self._gpu, self._record = gpu, record

    def __call__(
        self,
        name: str,
        source: str,
        kernel: str,
        arguments: Sequence[Argument],
        *,
        expected: Any = None,
        output: int = 0,
        max_ulps: int = 0,
        bound: Any = None,
        only_record: bool = False,
        keep: int = 1 << 16,
        grid: int = 1,
        block: int = 32,
        shared: int = 0,
    ) -> Any:
        """Array `output` (a number among the arrays) as the simulator leaves it, after it has been compared.

        Args:
            expected: what it must be, bit by bit, on either.
            max_ulps: how far GPU and simulator may be apart, for float32.
            bound: instead, an array of absolute differences that are allowed.
            only_record: they may be apart as they like.
            keep: bytes of arrays that are recorded even if nothing differs.
        """
        ptx = compile_ptx(source)
        arguments = list(arguments)
        inputs = [value for kind, value in arguments if kind == "array"]
        case: dict[str, Any] = {"case": name, "kernel": kernel, "output": output}
        measured = None if self._gpu is None else self._measure(case, ptx, kernel, arguments, grid, block, shared)[output]
        try:
            simulated = run_on_simulator(ptx, kernel, arguments, grid, block, shared)[output]
        except Exception as error:
            if measured is not None:  # no compiler for the simulator's core, perhaps: what the GPU gave is still worth keeping
                self._record.add(case | {"simulator_error": str(error)[:500], "gpu": encode(measured)})
            raise
        if measured is not None and expected is not None:
            case["not_as_expected"] = int(unequal(measured, expected.astype(measured.dtype).reshape(measured.shape)).sum())
        if expected is not None:
            wrong = numpy.flatnonzero(unequal(simulated, expected.astype(simulated.dtype).reshape(simulated.shape)).reshape(-1))
            assert wrong.size == 0, f"{name}: the simulator is not what NumPy expects at {wrong[:8]} and {wrong.size} places in all"
        if measured is None:
            return simulated
        different = unequal(measured, simulated)
        case["different"], case["of"] = int(different.sum()), int(different.size)
        if measured.dtype == numpy.float32:
            apart = ulps(measured, simulated)
            case["max_ulps"] = int(apart.max())
            case["ulps"] = {str(int(k)): int(n) for k, n in zip(*numpy.unique(numpy.minimum(apart, 64), return_counts=True), strict=True)}
        if different.any() or measured.nbytes <= keep:
            self._keep(case, inputs, measured, simulated, different)
        self._record.add(case)
        if only_record:
            return simulated
        if bound is not None:
            with numpy.errstate(invalid="ignore"):
                far = different & ~(numpy.abs(measured.astype(numpy.float64) - simulated) <= bound)
        elif max_ulps:
            far = apart > max_ulps
        else:
            far = different
        where = numpy.flatnonzero(far.reshape(-1))
        shown = [(int(i), measured.reshape(-1)[i], simulated.reshape(-1)[i]) for i in where[:6]]
        assert where.size == 0, f"{name}: {where.size} of {far.size} differ; (index, GPU, simulator): {shown}"
        return simulated

    def refuse(
        self,
        name: str,
        source: str,
        kernel: str,
        arguments: Sequence[Argument],
        *,
        gpu: str,
        simulator: str,
        block: int = 32,
        shared: int = 0,
    ) -> None:
        """Checks that the GPU and the simulator end the kernel with errors in which these words are."""
        launch = (compile_ptx(source), kernel, list(arguments), 1, block, shared)
        if self._gpu is not None:
            case = {"case": name, "kernel": kernel, "refused": False}
            try:
                self._gpu.run(*launch)
            except RuntimeError as error:
                case |= {"refused": gpu in str(error), "error": str(error)}
            self._record.add(case)
            assert case["refused"] or STAND_IN, f"{name}: {case.get('error', 'the GPU ran it')}"
        from cuflash.simulator import SimulatorError

        with pytest.raises(SimulatorError, match=simulator):
            run_on_simulator(*launch)

    def _measure(self, case: dict[str, Any], *launch: Any) -> list[Any]:
        assert self._gpu is not None
        try:
            return self._gpu.run(*launch)
        except RuntimeError as error:
            self._record.add(case | {"error": str(error)})
            raise

    @staticmethod
    def _keep(case: dict[str, Any], inputs: list[Any], measured: Any, simulated: Any, different: Any) -> None:
        """All of it if it is small, else the elements that differ (of elementwise kernels with their inputs)."""
        if measured.nbytes <= 1 << 18:
            case |= {"gpu": encode(measured), "simulator": encode(simulated)}
            case["inputs"] = [encode(array) for array in inputs if array.nbytes <= 1 << 18]
            return
        places = numpy.flatnonzero(different.reshape(-1))
        places = places[:: max(1, places.size // 4096)]
        case["places"] = encode(places.astype(numpy.int64))
        case["gpu"], case["simulator"] = encode(measured.reshape(-1)[places]), encode(simulated.reshape(-1)[places])
        case["inputs_at_places"] = [encode(array.reshape(-1)[places]) for array in inputs if array.size == measured.size]
