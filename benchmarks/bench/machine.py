"""Where everything runs: the GPU or a stand-in for it, its clocks, and the versions of what is installed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy

from cuflash.hardware import device
from cuflash.hardware.architectures import architecture
from cuflash.tuner import checkout

ROOT = Path(__file__).resolve().parents[2]


class Monitor:
    """Clocks, power and temperature of a GPU, from the driver's library; without it everything is None."""

    def __init__(self, bus_id: str | None) -> None:
        self._library: Any = None
        if bus_id is None:
            return
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            handle = ctypes.c_void_p()
            if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(handle)) == 0:
                self._library, self._handle = library, handle
        except (OSError, AttributeError):
            pass

    def _read(self, function: str, *arguments: int) -> int | None:
        if self._library is None:
            return None
        value = ctypes.c_uint()
        status = getattr(self._library, function)(self._handle, *arguments, ctypes.byref(value))
        return None if status else int(value.value)

    def sm_clock(self) -> int | None:
        return self._read("nvmlDeviceGetClockInfo", 1)

    def watts(self) -> float | None:
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    def celsius(self) -> int | None:
        return self._read("nvmlDeviceGetTemperature", 0)


def output_of(*command: str) -> str:
    """What a command prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).strip()


@functools.cache
def commit() -> str:
    """The commit and whether files differ from it; in a copy without history a hash of library and kernels."""
    return checkout.commit() or f"tree-{tree_hash()}"


@functools.cache
def tree_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("cuflash/**/*.py"), *ROOT.glob("kernels/**/*.cu*")]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def version_of(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


@functools.cache
def the_torch() -> Any:
    """torch, or None."""
    try:
        import torch
    except Exception:
        return None
    return torch


class Machine:
    """Where everything runs, and how it is timed.

    Attributes:
        dry: without a GPU.
        small: tiny shapes, and few of them.
        gpu, driver: names for the tables.
        monitor: see `Monitor`.
    """

    def __init__(self, dry: bool, small: bool = False) -> None:
        self.dry, self.small = dry, dry or small
        self.scratch: Any = None  # of `fill_queue`
        bus_id = None
        self.gpu, self.driver = "simulator", ""
        if not dry:
            import cupy

            if not cupy.is_available():
                sys.exit("CuPy finds no GPU here; --dry-run tests this program without one.")
            self.cupy = cupy
            self.gpu = device.gpu(0).name
            bus_id = cupy.cuda.runtime.deviceGetPCIBusId(0)
            bus_id = bus_id.decode() if isinstance(bus_id, bytes) else bus_id
            self.driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0").partition("\n")[0]
        self.monitor = Monitor(bus_id)
        self.date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")

    @property
    def device(self) -> device.Device:
        return device.of_arch(device.simulator_arch()) if self.dry else device.gpu(0)

    def head(self) -> dict[str, Any]:
        return {"date": self.date, "commit": commit(), "gpu": self.gpu, "driver": self.driver}

    def synchronize(self) -> None:
        if not self.dry:
            self.cupy.cuda.runtime.deviceSynchronize()


def heat(machine: Machine) -> None:
    """Half a second of work, so that the first case does not find a GPU asleep."""
    torch = the_torch()
    if machine.dry or torch is None:
        return
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    started = time.monotonic()
    while time.monotonic() - started < 0.5:
        x @ x
        torch.cuda.synchronize()


def fill_queue(machine: Machine) -> None:
    """Some 200 µs of writing, more than L2 holds: a call behind it finds none of its operands there, and the host has time to launch it."""
    if machine.scratch is None:
        machine.scratch = machine.cupy.empty(4 * architecture(machine.device.arch).l2_bytes, numpy.uint8)
    for _ in range(2):
        machine.scratch.data.memset_async(0, machine.scratch.nbytes)


def usable(machine: Machine) -> bool:
    try:
        machine.synchronize()
        machine.cupy.zeros(1).get()
    except Exception:
        return False
    return True
