"""Compile the C++ core into a shared library, once per source, compiler and processor.

Contract: `library_path()` returns a library that is complete and matches the sources, and that nobody else can have written: it is two files,
core-<fingerprint>.so and the checksum of its bytes, in a directory that others cannot write to. One that is damaged is built again. The first caller
builds it; others, in any process, wait or use it. With no C++ compiler on the PATH the `ziglang` wheel is used; without that either, SetupError says what to
install.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cuflash.errors import SetupError, SimulatorError
from cuflash.system import cache_directory, cache_limit, private_files
from cuflash.system.file_lock import FileLock
from cuflash.system.threads import results_of

PART = "simulator"
"""The part of the cache directory that cores lie in."""

LOCK_TIMEOUT = 900.0
"""Seconds to wait for another process that builds the core; a busy machine takes minutes."""

_log = logging.getLogger("cuflash")

SOURCES = Path(__file__).with_name("core")
FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-w",
)
MORE_FLAGS = {"matrix.cpp": "-O3"}
"""Of single sources. Products of 16-bit matrices take two thirds of the time then; what else -O3 makes larger takes as long, and twice as long to compile."""

COMPILERS = ("c++", "g++", "clang++")
NO_COMPILER = (
    "The simulator needs a C++ compiler once, to build its core, and found none ($CXX, c++, g++, clang++). Install one without root rights by: "
    "pip install ziglang"
)


@dataclass(frozen=True)
class Compiler:
    """A way to call a C++ compiler.

    Attributes:
        command: the first words of a command line.
        kind: "gcc", "clang" or "zig".
        version: text that changes with the compiler.
    """

    command: tuple[str, ...]
    kind: str
    version: str

    def flags(self) -> tuple[str, ...]:
        """What this compiler is told besides the sources."""
        if self.kind == "gcc":
            # Unique symbols would be shared between two builds that are loaded into one process.
            wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
            return (*FLAGS, "-march=native", "-fno-gnu-unique", *wide)
        if self.kind == "zig":
            return (*FLAGS, "-mcpu=native", "-fno-sanitize=undefined")
        return (*FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native")


def _probe(command: tuple[str, ...]) -> Compiler | None:
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    kind = "zig" if "ziglang" in command else "clang" if "clang" in result.stdout.lower() else "gcc"
    return Compiler(command, kind, result.stdout)


def find_compiler() -> Compiler:
    """The compiler to use: $CXX, then the system's, then the `ziglang` wheel.

    Raises:
        SetupError: there is none.
    """
    named = tuple(os.environ.get("CXX", "").split())
    candidates = [named] if named else []
    candidates += [(found,) for name in COMPILERS if (found := shutil.which(name))]
    if importlib.util.find_spec("ziglang") is not None:
        candidates.append((sys.executable, "-m", "ziglang", "c++"))
    for command in candidates:
        compiler = _probe(command)
        if compiler is not None:
            return compiler
    raise SetupError(NO_COMPILER)


def cpu_features() -> str:
    """Text that differs between processors for which `native` code differs."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    return platform.machine() + platform.processor()


def _fingerprint(compiler: Compiler) -> str:
    digest = hashlib.sha256()
    for part in (compiler.version, *compiler.command, *compiler.flags(), *MORE_FLAGS, *MORE_FLAGS.values(), cpu_features()):
        digest.update(part.encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise SetupError(f"The C++ compiler cannot be run ({error}): {' '.join(command[:2])}. {NO_COMPILER}") from error
    if result.returncode != 0:
        raise SimulatorError(f"Building the simulator's core failed:\n{' '.join(command)}\n{result.stderr.strip()}")


def _precompiled_headers(command: list[str], scratch: Path) -> list[str]:
    """Arguments that give a source the headers all of them share, read once for all: half of the time that a small source takes."""
    header = scratch / "precompiled.h"
    header.write_text(f'#include "{SOURCES / "machine.h"}"\n')
    _run([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
    return ["-include", str(header)]


def _compile(compiler: Compiler, folder: Path) -> bytes:
    """Build the library from all sources, in a directory inside `folder` that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="build-", suffix=".tmp", dir=folder) as scratch:
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
        objects = {source: Path(scratch, source.stem + ".o") for source in sources}
        command = [*compiler.command, *compiler.flags()]
        headers = _precompiled_headers(command, Path(scratch)) if compiler.kind == "gcc" else []

        def compile_one(source: Path) -> None:
            more = MORE_FLAGS.get(source.name)
            _run([*command, *([] if more is None else [more]), *headers, "-c", str(source), "-o", str(objects[source])])

        for _ in results_of(compile_one, sources, os.cpu_count() or 1):
            pass
        built = Path(scratch, "core.so")
        try:
            _run([*compiler.command, "-shared", "-o", str(built), *map(str, objects.values()), "-lpthread", "-lm"])
            return built.read_bytes()
        except FileNotFoundError as error:
            way_out = "Let CXX name a C++ compiler, or unset it." if os.environ.get("CXX") else NO_COMPILER
            raise SetupError(
                f"{' '.join(compiler.command)} ran without an error and made no file: it is no C++ compiler. {way_out}"
            ) from error


# ------------------------------------------------------------------------------------------------------------------------------ the library


def _checksum_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _whole(library: Path) -> Path | None:
    """The library, if it is there and every byte of it is what was written."""
    try:
        wanted = private_files.read(_checksum_path(library), 1000)
        content = private_files.read(library)
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.info("cuflash ignores the damaged core of the simulator %s (%s).", library, error)
        return None
    if hashlib.sha256(content).hexdigest().encode() != wanted.strip():
        _log.info("cuflash ignores the damaged core of the simulator %s (checksum).", library)
        return None
    cache_limit.used(library)
    return library


def _store(library: Path, content: bytes) -> None:
    private_files.write(library, content, executable=True)
    private_files.write(_checksum_path(library), hashlib.sha256(content).hexdigest().encode())


def build(compiler: Compiler, directory: Path) -> Path:
    """The library for `compiler` in `directory`, built if it is not there yet or damaged.

    Raises:
        SetupError, SimulatorError: it cannot be built.
        OSError: nothing can be written there.
    """
    library = directory / f"core-{_fingerprint(compiler)}.so"
    found = _whole(library)
    if found is not None:
        return found
    with contextlib.closing(FileLock(library.with_suffix(".lock"))) as lock:
        found = lock.wait(LOCK_TIMEOUT, lambda: _whole(library), "build the simulator's core")
        if found is None:
            message = "cuflash: building the simulator's core with %s, once, for half a minute or two, into %s"
            _log.warning(message, compiler.kind, directory)
            _store(library, _compile(compiler, directory))
            cache_limit.wrote(directory)
    return library


@functools.cache
def _private_directory() -> Path:
    """A directory of this process, for when the cache cannot be used.

    Raises:
        SetupError: there is no place for one.
    """
    try:
        holder = tempfile.TemporaryDirectory(prefix="cuflash-simulator-")
    except OSError as error:
        raise SetupError(
            f"The simulator's core needs a directory. The cache has none ({cache_directory.why_not(PART) or 'nothing can be written there'}) and there is "
            f"no temporary one ({error}): let CUFLASH_CACHE_DIR or TMPDIR name a directory that can be written."
        ) from error
    _keep_alive.append(holder)
    return Path(holder.name)


_keep_alive: list[tempfile.TemporaryDirectory[str]] = []


def library_path() -> Path:
    """The core for this machine, from the cache or built now.

    Raises:
        SetupError: there is no compiler, or no place to build in.
        SimulatorError: the compiler refused.
    """
    compiler = find_compiler()
    folder = cache_directory.find(PART)
    if folder is None:
        cache_directory.warn_once(cache_directory.why_not(PART))
        return build(compiler, _private_directory())
    try:
        return build(compiler, folder)
    except OSError as error:
        cache_directory.warn_once(str(error))
        return build(compiler, _private_directory())


def copy_that_can_be_loaded(library: Path) -> Path:
    """The same library in another directory, for when the one that it is in forbids to run anything.

    Raises:
        SetupError: see `_private_directory`.
        OSError: nothing can be written there.
    """
    copy = _private_directory() / library.name
    private_files.write(copy, private_files.read(library), executable=True)
    return copy


# ---------------------------------------------------------------------------------------------------------------------------- housekeeping


def cores() -> list[cache_limit.Group]:
    """What is kept of each core, whole or not; damage shows when one is loaded."""
    folder = cache_directory.find(PART)
    return [] if folder is None else [group for group in cache_limit.entries_of(folder) if group.paths[0].name.startswith("core-")]


def clear() -> int:
    """Remove all cores, whole or not, with what killed processes left; a process that has loaded one keeps it. Returns how many there were.

    Raises:
        OSError: a file that may not be removed.
    """
    folder = cache_directory.find(PART)
    if folder is None:
        return 0
    found = [path for path in folder.iterdir() if path.name.startswith("core-") or path.suffix in (".tmp", ".lock")]
    private_files.remove(found)
    return sum(path.suffix == ".so" for path in found)
