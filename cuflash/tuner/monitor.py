"""The clock of a GPU's SMs while it works, by the driver's library (NVML); without it, nothing is known and nothing is wrong."""

from __future__ import annotations

import ctypes
import importlib
import threading
from typing import Any

from cuflash.hardware.device import Device

_SM_CLOCK = 1  # of nvmlClockType_t
_AFTER_SECONDS = 0.02  # of launching, when the GPU is busy


class Monitor:
    """Reads the clock of one GPU."""

    def __init__(self, device: Device) -> None:
        self._library: Any = None
        self._read: int | None = None
        self._timer: threading.Timer | None = None
        if device.kind != "gpu":
            return
        try:
            bus = importlib.import_module("cupy").cuda.runtime.deviceGetPCIBusId(device.index)
            library, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
            name = bus if isinstance(bus, bytes) else str(bus).encode()
            if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByPciBusId_v2(name, ctypes.byref(handle)) == 0:
                self._library, self._handle = library, handle
        except (OSError, AttributeError):
            pass

    def watch(self) -> None:
        """Read it in a moment, while the launches that follow run."""
        self._read = None
        if self._library is not None:
            self._timer = threading.Timer(_AFTER_SECONDS, self._look)
            self._timer.start()

    def sm_clock(self) -> int | None:
        """MHz, as it was read since `watch`."""
        if self._timer is not None:
            self._timer.join()
            self._timer = None
        return self._read

    def _look(self) -> None:
        value = ctypes.c_uint()
        if self._library.nvmlDeviceGetClockInfo(self._handle, _SM_CLOCK, ctypes.byref(value)) == 0:
            self._read = int(value.value)
