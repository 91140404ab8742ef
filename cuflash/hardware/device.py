"""What a plan needs to know of the machine: a frozen `Device`, either a GPU or the simulator posing as one."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cuflash.arrays.descriptions import describe
from cuflash.errors import CuflashError, DeviceError, OptionError, SetupError
from cuflash.hardware.architectures import TABLE

ARCHITECTURES: tuple[str, ...] = tuple(TABLE)


@dataclass(frozen=True)
class Device:
    """One device as plans see it.

    Attributes:
        kind: "gpu" or "simulator".
        index: CUDA ordinal; 0 for the simulator.
        arch: "sm_80", "sm_90", … without the architecture-specific suffix.
        name: for people.
        num_sms: streaming multiprocessors.
        shared_memory_per_block: bytes a block may opt in to.
        shared_memory_per_sm: bytes that the resident blocks of an SM share.
        registers_per_sm: 32-bit registers.
    """

    kind: Literal["gpu", "simulator"]
    index: int
    arch: str
    name: str
    num_sms: int
    shared_memory_per_block: int
    shared_memory_per_sm: int
    registers_per_sm: int = 65536

    @property
    def capability(self) -> int:
        """75, 80, 86, …"""
        return int(self.arch.removeprefix("sm_"))

    @property
    def compile_arch(self) -> str:
        """The NVRTC architecture: Hopper and later get the suffix that unlocks their own instructions."""
        return self.arch + ("a" if self.capability >= 90 else "")


_HINT = "Name a supported architecture, such as sm_80 for an A100, sm_89 for an RTX 4090, sm_90 for an H100."


def normalize_arch(arch: object, argument: str = "arch") -> str:
    """Return `arch` without an `a`/`f` suffix, or raise with the list of supported ones; `argument` is what the caller knows it by."""
    plain = arch[:-1] if isinstance(arch, str) and arch[-1:] in ("a", "f") else arch
    if not isinstance(plain, str) or plain not in TABLE:
        raise OptionError(argument, describe(arch), "one of " + ", ".join(ARCHITECTURES), _HINT)
    return plain


@functools.lru_cache(maxsize=64)
def of_arch(arch: str, kind: Literal["gpu", "simulator"] = "simulator") -> Device:
    """A device of the given architecture with its documented limits: for the simulator and for offline planning."""
    plain = normalize_arch(arch)
    row = TABLE[plain]
    name = f"cuflash simulator ({plain})" if kind == "simulator" else f"{plain} (offline)"
    return Device(kind, 0, plain, name, row.num_sms, row.shared_memory_per_block, row.shared_memory_per_sm)


def simulator_arch() -> str:
    """The architecture that the simulator poses as: `CUFLASH_SIMULATOR_ARCH`, else sm_80."""
    return normalize_arch(os.environ.get("CUFLASH_SIMULATOR_ARCH") or "sm_80", "CUFLASH_SIMULATOR_ARCH")


_ENVIRONMENT: Mapping[bytes, bytes] = vars(os.environ).get("_data", os.environb)  # what lies below it, a tenth of the time away


def simulator_setting() -> bytes | None:
    """`CUFLASH_SIMULATOR_ARCH` as it stands there, unchecked: a part of what warm calls are found by."""
    return _ENVIRONMENT.get(b"CUFLASH_SIMULATOR_ARCH")


@functools.cache
def gpu(index: int) -> Device:
    """Query CUDA device `index` through CuPy.

    Raises:
        DeviceError: the GPU is older than Turing.
    """
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    capability = properties["major"] * 10 + properties["minor"]
    name = properties["name"].decode()
    if capability < 75:
        raise DeviceError(
            "device", f"{name} (sm_{capability})", "compute capability 7.5 or newer", "cuflash needs tensor cores of Turing or later."
        )
    return Device(
        "gpu",
        index,
        f"sm_{capability}",
        name,
        properties["multiProcessorCount"],
        properties["sharedMemPerBlockOptin"],
        properties["sharedMemPerMultiprocessor"],
        properties["regsPerMultiprocessor"],
    )


def of_memory(kind: str, index: int) -> Device:
    """The device that works on memory of `kind`, "cpu" or "cuda"."""
    if kind == "cpu":
        return of_arch(simulator_arch())
    try:
        return gpu(index)
    except CuflashError:
        raise
    except ImportError as error:
        raise SetupError("Arrays on a GPU need CuPy: pip install 'cuflash[cuda12]' (or 'cuflash[cuda13]').") from error
    except Exception as error:  # what CuPy raises without a driver or such a GPU
        raise no_gpu(index, error) from error


def no_gpu(index: int, error: Exception) -> DeviceError:
    """The error for arrays on a GPU that CuPy cannot get at."""
    reason = str(error).partition("\n")[0][:200]
    hint = "Install its driver, or pass NumPy arrays or CPU tensors, which run on the simulator."
    return DeviceError("device", f"memory of GPU {index}, which CuPy cannot use ({reason})", "a GPU with a driver that CuPy can use", hint)


def default() -> Device:
    """The current GPU if CuPy finds one, else the simulator."""
    try:
        import cupy
    except (ImportError, OSError):  # not there, or without a directory that it may write
        return of_arch(simulator_arch())
    return gpu(cupy.cuda.runtime.getDevice()) if cupy.is_available() else of_arch(simulator_arch())
