"""Compile the C++ core into a shared library, once per source, compiler and processor.

Contract: `library_path()` returns a library that is complete and matches the sources. The first caller builds it; others, in any process, wait
or use it. With no C++ compiler on the PATH the `ziglang` wheel is used; without that either, SetupError says what to install.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuflash.errors import SetupError, SimulatorError

SOURCES = Path(__file__).with_name("core")
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-w",
)
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
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    kind = "zig" if "ziglang" in command else "clang" if "clang" in result.stdout.lower() else "gcc"
    return Compiler(command, kind, result.stdout)


def find_compiler() -> Compiler:
    """The compiler to use: $CXX, then the system's, then the `ziglang` wheel.

    Raises:
        SetupError: there is none.
    """
    candidates = [tuple(os.environ["CXX"].split())] if os.environ.get("CXX") else []
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
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    return platform.machine() + platform.processor()


def cache_directory() -> Path:
    """Where built libraries are kept: below `CUFLASH_CACHE_DIR` or the user's cache directory."""
    if os.environ.get("CUFLASH_CACHE_DIR"):
        return Path(os.environ["CUFLASH_CACHE_DIR"]).expanduser() / "simulator"
    try:
        import platformdirs
    except ImportError:
        return Path.home() / ".cache" / "cuflash" / "simulator"
    return Path(platformdirs.user_cache_dir("cuflash")) / "simulator"


def _fingerprint(compiler: Compiler) -> str:
    digest = hashlib.sha256()
    for part in (compiler.version, *compiler.command, *compiler.flags(), cpu_features()):
        digest.update(part.encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SimulatorError(f"Building the simulator's core failed:\n{' '.join(command)}\n{result.stderr.strip()}")


def _compile(compiler: Compiler, target: Path) -> None:
    """Build `target` from all sources; objects go to a temporary directory, the library is renamed into place."""
    with tempfile.TemporaryDirectory(prefix="cuflash-build-") as scratch:
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
        objects = [Path(scratch) / (path.stem + ".o") for path in sources]

        def compile_one(source: Path, object_file: Path) -> None:
            _run([*compiler.command, *compiler.flags(), "-c", str(source), "-o", str(object_file)])

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, sources, objects))
        built = Path(scratch) / target.name
        _run([*compiler.command, "-shared", "-o", str(built), *map(str, objects), "-lpthread", "-lm"])
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        shutil.copy(built, temporary)
        os.replace(temporary, target)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, where the file system has locks."""
    with path.open("w") as handle:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@functools.cache
def _private_directory() -> Path:
    """A directory of this process, for when the cache cannot be written."""
    holder = tempfile.TemporaryDirectory(prefix="cuflash-simulator-")
    _keep_alive.append(holder)
    return Path(holder.name)


_keep_alive: list[tempfile.TemporaryDirectory[str]] = []


def build(compiler: Compiler, directory: Path) -> Path:
    """The library for `compiler` in `directory`, built if it is not there yet."""
    target = directory / f"core-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / (target.stem + ".lock")):
        if not target.exists():
            message = "cuflash: building the simulator's core with %s, once, for half a minute or two, into %s"
            logging.getLogger("cuflash").warning(message, compiler.kind, directory)
            _compile(compiler, target)
    return target


def library_path() -> Path:
    """The core for this machine, from the cache or built now."""
    compiler = find_compiler()
    try:
        return build(compiler, cache_directory())
    except OSError:
        return build(compiler, _private_directory())
