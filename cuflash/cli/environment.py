"""What this machine has for cuflash, what would run here, and what to install when something is missing.

Contract: `facts()` returns sections of (name, value) pairs for people and never raises for a missing package, driver or compiler: the value says how
to get it. Nothing is compiled or installed.
"""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata

import numpy

import cuflash
from cuflash.errors import CuflashError, OptionError, SetupError
from cuflash.hardware import device
from cuflash.hardware.device import Device
from cuflash.jit import cache, compiler, kernel_files
from cuflash.planning.planner import make_plan
from cuflash.system import cache_directory, cache_limit
from cuflash.tuned import store

Section = tuple[str, list[tuple[str, str]]]

_OPTIONAL = {
    "ml_dtypes": "for bfloat16 arrays of NumPy and CuPy",
    "torch": "for calls on its tensors",
    "rich": "for progress bars and tables",
    "matplotlib": "for the demo's picture",
    "platformdirs": "for the cache directory of this system",
    "ziglang": "a C++ compiler for the simulator",
    "nvidia-cuda-nvdisasm": "for the instruction mix in `inspect`",
}


def facts() -> list[Section]:
    """Everything, in the order to read it in."""
    return [
        ("cuflash", [("version", cuflash.__version__), ("python", f"{platform.python_version()} on {platform.platform()}"), *_settings()]),
        ("GPU", _gpus()),
        ("compilers", [("NVRTC", _nvrtc()), ("C++ for the simulator", _cpp_compiler()), ("kernels", _kernels())]),
        ("cache", _cache()),
        ("tuned tiles", [(on.name, store.summary(on)) for on in _devices()]),
        ("packages", [("numpy", numpy.__version__), *((name, _version(name, use)) for name, use in _OPTIONAL.items())]),
    ]


def _devices() -> list[Device]:
    """The one that calls without a GPU's arrays would run on."""
    try:
        return [device.default()]
    except CuflashError:  # which the section of GPUs says
        return []


def sample_plan() -> str:
    """What a call with middle-sized arguments would run on this machine, or why nothing would."""
    try:
        on = device.default()
        x = numpy.empty((1, 1024, 8, 64), numpy.float16)
        return make_plan(cuflash.plan(x, x, x, is_causal=True).problem, on).describe() + "\n" + _readiness(on)
    except CuflashError as error:
        return f"Nothing runs here: {error}"


def _readiness(on: Device) -> str:
    """Whether the planned kernel could be compiled and run."""
    try:
        compiler.nvrtc_version()
        if on.kind == "simulator":
            importlib.import_module("cuflash.simulator.build").find_compiler()
    except SetupError as error:
        return f"It cannot run yet: {error}"
    if on.kind == "simulator":
        return "There is no GPU here, so kernels run on the simulator: exact and slow. Give it NumPy arrays or CPU tensors."
    return "CuPy arrays and CUDA tensors run on the GPU, NumPy arrays and CPU tensors on the simulator."


def _settings() -> list[tuple[str, str]]:
    return [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("CUFLASH_")]


def _gpus() -> list[tuple[str, str]]:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return [("CuPy", f"cannot be imported ({error}): {compiler.INSTALL_HINT}")]
    except OSError as error:
        return [("CuPy", f"cannot be imported ({error}): set CUPY_CACHE_DIR to a directory that can be written")]
    rows = [("CuPy", cupy.__version__)]
    if not cupy.is_available():
        return [*rows, ("driver", "none that CuPy can use"), ("GPU", "none")]
    runtime = cupy.cuda.runtime
    rows.append(("driver", f"CUDA {_cuda_version(runtime.driverGetVersion())}"))
    for index in range(runtime.getDeviceCount()):
        try:
            found = device.gpu(index)
            memory = runtime.getDeviceProperties(index)["totalGlobalMem"]
            value = (
                f"{found.name}, {found.arch}, {found.num_sms} SMs, {_size(memory)}, {_size(found.shared_memory_per_block)} of shared memory"
            )
        except CuflashError as error:
            value = str(error)
        rows.append((f"GPU {index}", value))
    return rows


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _nvrtc() -> str:
    try:
        return compiler.nvrtc_text()
    except SetupError as error:
        return str(error)


def _cpp_compiler() -> str:
    try:
        found = importlib.import_module("cuflash.simulator.build").find_compiler()
    except SetupError as error:
        return str(error)
    return f"{' '.join(found.command)} ({found.version.strip().splitlines()[0]})"


def _kernels() -> str:
    try:
        return str(compiler.kernels_directory())
    except SetupError as error:
        return str(error)


def _cache() -> list[tuple[str, str]]:
    folder = cache.directory()
    if folder is None:
        return [
            ("directory", f"none: {cache_directory.why_not(kernel_files.PART)}. Let CUFLASH_CACHE_DIR name one that only you can write to.")
        ]
    entries = cache.contents()
    saved = sum(entry.seconds for entry in entries)
    others = len(cache_limit.entries_of(folder)) - len(entries)
    return [
        ("directory", str(folder.parent)),
        ("kernels", f"{len(entries)}, {_size(sum(entry.size for entry in entries))}, {saved:.0f} s of compilation"),
        *(
            [("damaged", f"{others} kernels, compiled again when they are needed; python -m cuflash cache --clear removes them")]
            if others
            else []
        ),
        ("decoded programs", _groups(importlib.import_module("cuflash.simulator.program_cache").contents())),
        ("simulator cores", _groups(importlib.import_module("cuflash.simulator.build").cores())),
        ("limit of each", _limit()),
    ]


def _groups(groups: list[cache_limit.Group]) -> str:
    return f"{len(groups)}, {_size(sum(group.size for group in groups))}"


def _limit() -> str:
    try:
        limit = cache_limit.limit_bytes()
    except OptionError as error:
        return str(error)
    return "none" if limit is None else f"{_size(limit)} (CUFLASH_CACHE_LIMIT)"


def _version(distribution: str, use: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return f"not installed, optional: {use}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
