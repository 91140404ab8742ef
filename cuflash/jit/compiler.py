"""Kernel text to machine code: one NVRTC call through CuPy, for any architecture, with or without a GPU.

`compile_kernel` turns a `CompileRequest` into an `Artifact`: a cubin for a GPU, or PTX for the simulator. The program that NVRTC gets is
the request's configuration followed by an `#include` of its source. The kernels include only each other, so no CUDA headers are needed.

Contract: this module reads `kernels/` and nothing else; it writes nothing and remembers no artifact (`cache.py` does). `fingerprint`
covers everything that an artifact depends on, so equal fingerprints mean interchangeable artifacts. All functions may be called from
several threads; NVRTC runs without the interpreter lock, so threads compile side by side.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cuflash.arrays.descriptions import describe
from cuflash.errors import CompileError, OptionError, SetupError
from cuflash.hardware.device import ARCHITECTURES, normalize_arch

Target = Literal["cubin", "ptx"]

INSTALL_HINT = "pip install 'cuflash[cuda12]'   (for CUDA 13 drivers: pip install 'cuflash[cuda13]')"

# Raised by hand when this module makes something else of the same input, so that artifacts of an older cuflash are not taken for its own.
_ARTIFACT_FORMAT = 1


@dataclass(frozen=True)
class CompileRequest:
    """What to compile; hashable, and all that `cache.fetch` needs.

    Attributes:
        source: file below `kernels/`, such as "forward_mma.cu".
        config: C++ text put in front of the source: macros and `struct Config`.
        arch: "sm_75", "sm_80", "sm_90a", …; the suffix unlocks the instructions of one architecture only (wgmma, TMA).
        target: "cubin" for a GPU, "ptx" for the simulator.
        tolerated_spills: bytes of spill stores with which the code of the highest level is taken, see `SECOND_ATTEMPT`.
    """

    source: str
    config: str
    arch: str
    target: Target
    tolerated_spills: int = 0

    def describe(self) -> str:
        """One line for people: "forward_mma.cu for sm_80 (cubin)"."""
        return f"{self.source} for {self.arch} ({self.target})"


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says of one kernel.

    Attributes:
        entry: name of the `extern "C"` kernel.
        registers: 32-bit registers per thread at launch.
        spill_store_bytes: bytes of spill-store instructions, those of called functions that were not inlined included.
        spill_load_bytes: likewise of spill loads.
        stack_bytes: local memory per thread, spills and indexed arrays together.
        static_shared_bytes: `__shared__` variables per block; dynamic shared memory is not known to ptxas.
        barriers: named barriers per block.
    """

    entry: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    barriers: int


@dataclass(frozen=True)
class Artifact:
    """What came out of the compiler.

    Attributes:
        data: the cubin (an ELF file), or PTX as UTF-8 text without a trailing NUL.
        log: what NVRTC and ptxas printed.
        seconds: wall-clock time of the compilation, also when the artifact was read from the disk later.
        resources: one record per kernel of a cubin, in ptxas' order; empty for PTX.
        compiler: "NVRTC 12.9".
    """

    data: bytes
    log: str
    seconds: float
    resources: tuple[KernelResources, ...]
    compiler: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines of the log that deserve attention: warnings, and ptxas' C75xx notes that it serialises or patches wgmma."""
        return tuple(line.strip() for line in self.log.splitlines() if _WARNING.search(line))

    def resources_of(self, entry: str) -> KernelResources:
        """The record of the kernel called `entry`; KeyError if the artifact has none."""
        for resources in self.resources:
            if resources.entry == entry:
                return resources
        raise KeyError(entry)


# ------------------------------------------------------------------------------------------------------------------------------------ NVRTC


def nvrtc_version() -> tuple[int, int]:
    """Version of the NVRTC library that CuPy loads, such as (12, 9).

    Raises:
        SetupError: CuPy or NVRTC is missing; the message is the command that installs both.
    """
    major, minor = _nvrtc().getVersion()
    return int(major), int(minor)


def nvrtc_text() -> str:
    """The same as people write it: "12.9"."""
    return ".".join(map(str, nvrtc_version()))


_first_use = threading.Lock()


def _nvrtc() -> Any:
    """CuPy's NVRTC binding, with the library behind it loaded. Imported at the first compilation: importing CuPy takes half a second.

    The first use of the library loads others behind it. Threads that compile before that has ended fail, so all but one wait.
    """
    with _first_use:
        return _load_nvrtc()


@functools.cache
def _load_nvrtc() -> Any:
    try:
        nvrtc = importlib.import_module("cupy.cuda").nvrtc
    except ImportError as error:
        raise SetupError(f"Compiling a kernel needs CuPy, which cannot be imported ({error}). {INSTALL_HINT}") from error
    except OSError as error:
        raise SetupError(
            f"CuPy cannot be imported ({error}). It makes a directory of its own: set CUPY_CACHE_DIR to one that can be written."
        ) from error
    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy loads the library here; which exception it raises depends on its version
        raise SetupError(f"Compiling a kernel needs NVRTC, which CuPy cannot load ({error}). {INSTALL_HINT}") from error
    return nvrtc


class _Compiling:
    """Around calls of NVRTC's compiler, which has handlers of its own for these signals meanwhile and puts back those that there were, but with SA_RESTART.

    With that flag whatever waits in the main thread would go on waiting, and Ctrl-C would be heard when the wait is over. It is taken away when no thread
    compiles, since a handler that NVRTC is about to put back must not be written over.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._lock, self._compiling = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._compiling += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._compiling -= 1
            if not self._compiling:
                for number in self.SIGNALS:
                    signal.siginterrupt(number, True)


_compiling = _Compiling()

SECOND_ATTEMPT = ("--ptxas-options=-O1",)
"""What a kernel that spills registers is compiled with again. At its highest level ptxas moves loads so far ahead that a kernel whose accumulators
fill most of the registers spills a few of them; -O1 moves less. On an H100 tiles that spill 8 to 160 bytes were as fast as the best that spill none, or
faster (docs/performance.md), so a request may tolerate a few."""


def compile_kernel(request: CompileRequest) -> Artifact:
    """Compile, and do nothing else; `cache.fetch` is what callers normally want. A cubin that spills is compiled a second time, see `SECOND_ATTEMPT`.

    Raises:
        CompileError: NVRTC or ptxas refused; carries the log and the configuration.
        OptionError: an architecture, target or source that does not exist.
        SetupError: CuPy, NVRTC or the kernels' text is missing.
    """
    artifact = _compile(request, options(request))
    if not _spills(artifact) or max(kernel.spill_store_bytes for kernel in artifact.resources) <= request.tolerated_spills:
        return artifact
    patient = _compile(request, (*options(request), *SECOND_ATTEMPT))
    chosen = artifact if _spills(patient) else patient
    return replace(chosen, seconds=artifact.seconds + patient.seconds)


def _spills(artifact: Artifact) -> bool:
    return any(kernel.spill_store_bytes or kernel.spill_load_bytes for kernel in artifact.resources)


def _compile(request: CompileRequest, flags: tuple[str, ...]) -> Artifact:
    nvrtc = _nvrtc()
    directory = kernels_directory()
    flags = (*flags, f"-I{directory}")
    if not (directory / request.source).is_file():
        names = ", ".join(sorted(path.name for path in directory.glob("*.cu"))) or "a .cu file, but there is none"
        raise OptionError("source", repr(request.source), f"a file below {directory}: {names}", "Check the plan that asked for it.")
    # NVRTC looks for includes first where the program claims to be. A relative name would make that the caller's working directory.
    program_name = str(directory / f"{Path(request.source).stem}.config")
    program = nvrtc.createProgram(f'{request.config}\n#include "{request.source}"\n', program_name, (), ())
    try:
        start = time.perf_counter()
        try:
            with _compiling:
                nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            message = f"NVRTC {nvrtc_text()} cannot compile {request.describe()}: {error}"
            raise CompileError(message, log=nvrtc.getProgramLog(program), config=request.config) from None
        seconds = time.perf_counter() - start
        log = nvrtc.getProgramLog(program).strip("\0 \n")
        is_cubin = request.target == "cubin"
        data = _complete_elf(nvrtc.getCUBIN(program)) if is_cubin else _relative_line_info(nvrtc.getPTX(program), directory)
    finally:
        nvrtc.destroyProgram(program)
    return Artifact(data, log, seconds, parse_resources(log) if is_cubin else (), f"NVRTC {nvrtc_text()}")


def options(request: CompileRequest) -> tuple[str, ...]:
    """NVRTC's options for a request, without the include path, which differs between machines and not between artifacts.

    Raises:
        OptionError: an unknown architecture or target, or an architecture that this NVRTC does not know.
    """
    if request.target not in ("cubin", "ptx"):
        raise OptionError("target", describe(request.target), "'cubin' or 'ptx'", "A GPU loads a cubin, the simulator PTX.")
    machine = _machine(request.arch)
    common = ("-std=c++17", "-default-device", "-lineinfo", "--display-error-number")
    if request.target == "cubin":
        return (f"-arch=sm_{machine}", *common, "--ptxas-options=-v")
    return (f"-arch=compute_{machine}", *common)


def _machine(arch: str) -> str:
    """Check "sm_90a" and return "90a". Before Hopper there is nothing for a suffix to unlock and NVRTC refuses it, so it is dropped."""
    match = re.fullmatch(r"sm_([0-9]{2,4})([af]?)", arch) if isinstance(arch, str) else None
    if match is None:
        expected = "one of " + ", ".join(ARCHITECTURES) + ", from sm_90 on also with the suffix 'a'"
        raise OptionError("arch", describe(arch), expected, "Name a supported architecture.")
    capability, suffix = int(match[1]), match[2]
    normalize_arch(f"sm_{capability}")
    known = _nvrtc().getSupportedArchs()
    if capability not in known:
        expected = "one of " + ", ".join(name for name in ARCHITECTURES if int(name.removeprefix("sm_")) in known)
        hint = f"NVRTC {nvrtc_text()} does not know it; install a newer one: {INSTALL_HINT}"
        raise OptionError("arch", repr(arch), expected, hint)
    return f"{capability}{suffix if capability >= 90 else ''}"


# ------------------------------------------------------------------------------------------------------------------------- kernels and keys


def kernels_directory() -> Path:
    """Where the kernels' text lies.

    `$CUFLASH_KERNELS_DIR`, else `cuflash/kernels` in a wheel, else `kernels` beside the package in a checkout.

    Raises:
        SetupError: none of them exists.
    """
    override = os.environ.get("CUFLASH_KERNELS_DIR")
    package = Path(__file__).resolve().parents[1]
    candidates = [Path(override).resolve()] if override else [package / "kernels", package.parent / "kernels"]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    places = " or ".join(map(str, candidates))
    way_out = "Unset CUFLASH_KERNELS_DIR, or let it name a copy of kernels/." if override else f"Install cuflash again: {INSTALL_HINT}"
    raise SetupError(f"The kernels' text is missing: there is no {places}. {way_out}")


def fingerprint(request: CompileRequest) -> str:
    """64 hexadecimal digits that change with anything an artifact depends on.

    That is every file below `kernels/` (name and bytes; headers matter as much as the source), configuration, source, architecture, target,
    options and NVRTC version. The place of `kernels/` does not matter: equal checkouts share their artifacts.

    An edit of a kernel is noticed at the next call; while nothing was edited, a call costs one `stat` per file (tens of microseconds).
    """
    parts = (
        _ARTIFACT_FORMAT,
        _tree_digest(kernels_directory()),
        request.config,
        request.source,
        request.arch,
        request.target,
        options(request),
        nvrtc_version(),
        *([request.tolerated_spills] if request.tolerated_spills else []),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def text_digest() -> str:
    """64 hexadecimal digits of all files below `kernels/`; as cheap as `fingerprint`.

    Raises:
        SetupError: the kernels' text is missing.
    """
    return _tree_digest(kernels_directory())


def refresh() -> None:
    """Forget the digest of `kernels/`. Needed only after an edit that changed neither size nor time stamp of a file."""
    _digests.clear()


_Stamp = tuple[tuple[str, int, int], ...]
_digests: dict[Path, tuple[_Stamp, str]] = {}


def _tree_digest(directory: Path) -> str:
    """SHA-256 of names and contents of all files; read again only when a name, size or time stamp changed."""
    found = ((os.path.relpath(entry.path, directory), entry.stat()) for entry in _files(directory))
    stamp = tuple(sorted((name, status.st_size, status.st_mtime_ns) for name, status in found))
    known = _digests.get(directory)
    if known is not None and known[0] == stamp:
        return known[1]
    digest = hashlib.sha256()
    for name, _, _ in stamp:
        content = (directory / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    _digests[directory] = (stamp, digest.hexdigest())
    return digest.hexdigest()


def _files(directory: str | Path) -> Iterator[os.DirEntry[str]]:
    """All files of a tree but hidden ones and what an editor leaves beside them."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.endswith("~"):
                continue
            if entry.is_dir():
                yield from _files(entry.path)
            elif entry.is_file():
                yield entry


# -------------------------------------------------------------------------------------------------------------------------- compiler output

_WARNING = re.compile(r"\bwarning\s*[#:]|\(C75\d\d\)")
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_BARRIERS = re.compile(r"used (\d+) barriers")
_CUMULATIVE_STACK = re.compile(r"(\d+) bytes cumulative stack size")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_resources(log: str) -> tuple[KernelResources, ...]:
    """Read the report of `ptxas -v`, kernel by kernel.

    A kernel's report ends where the next one starts. Between them stand also the functions that it calls and that were not inlined.
    """
    _, *pieces = _ENTRY.split(log)
    return tuple(_resources(entry, report) for entry, report in zip(pieces[::2], pieces[1::2], strict=True))


def _resources(entry: str, report: str) -> KernelResources:
    frames = [tuple(map(int, found)) for found in _STACK.findall(report)]
    own_frame = frames[0][0] if frames else 0
    return KernelResources(
        entry=entry,
        registers=_first_number(_REGISTERS, report),
        spill_store_bytes=sum(stores for _, stores, _ in frames),
        spill_load_bytes=sum(loads for _, _, loads in frames),
        stack_bytes=max(own_frame, _first_number(_CUMULATIVE_STACK, report)),
        static_shared_bytes=_first_number(_SHARED, report),
        barriers=_first_number(_BARRIERS, report),
    )


def _first_number(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    return int(match[1]) if match else 0


def _complete_elf(cubin: bytes) -> bytes:
    """Put back the last byte of a cubin, which CuPy's `getCUBIN` cuts off as if it ended a string.

    A 64-bit ELF file ends with its section or program headers; their offsets, sizes and counts stand in the file's own header. The missing
    byte is the top one of a small little-endian number, hence zero. A CuPy that returns the whole file is recognised; its bytes stay alone.
    """
    program_offset, section_offset = struct.unpack_from("<QQ", cubin, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", cubin, 54)
    size = max(program_offset + program_size * program_count, section_offset + section_size * section_count)
    return cubin + b"\0" * (size - len(cubin)) if size - len(cubin) == 1 else cubin


def _relative_line_info(ptx: bytes | str, directory: Path) -> bytes:
    """Let the `.file` lines of PTX say "kernels/tile/load.cuh", wherever `kernels/` lies, so that they do not depend on the machine."""
    text = ptx.encode() if isinstance(ptx, str) else ptx
    return text.rstrip(b"\0").replace(b'"%s%s' % (os.fsencode(directory), os.sep.encode()), b'"kernels/')
