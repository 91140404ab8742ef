"""The core is built once, by whatever compiler there is, and says what to install when there is none."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cuflash.errors import SetupError, SimulatorError
from cuflash.simulator import build, native
from cuflash.system import cache_directory

SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def small_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile at once, in place of the real ones."""
    sources = tmp_path / "core"
    sources.mkdir()
    (sources / "machine.h").touch()
    (sources / "answer.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    return sources


def test_builds_once_and_again_when_a_source_changes(small_core: Path) -> None:
    first = build.library_path()
    time = first.stat().st_mtime_ns
    assert build.library_path() == first
    assert first.stat().st_mtime_ns == time
    assert first.parent == Path(os.environ["CUFLASH_CACHE_DIR"]) / "simulator"
    (small_core / "answer.cpp").write_text(SMALL.replace("42", "43"))
    assert build.library_path() != first


@pytest.mark.usefixtures("small_core")
def test_many_processes_build_one_library(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from cuflash.simulator import build;"
        f"build.SOURCES = Path({str(tmp_path / 'core')!r}); print(build.library_path())"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 1
    assert [path.name for path in Path(paths.pop()).parent.glob("*.so*")] != []


DAMAGE = ["truncated", "zeroed", "empty", "garbage", "a directory", "a FIFO", "no checksum", "others may write", "a link"]


def damage_core(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "no checksum":
        path.with_suffix(".sha256").unlink()
    elif damage == "others may write":
        path.chmod(0o777)
    elif damage in ("a directory", "a FIFO", "a link"):
        path.unlink()
        (path.parent / "elsewhere").write_bytes(content)
        {"a directory": path.mkdir, "a FIFO": lambda: os.mkfifo(path), "a link": lambda: path.symlink_to("elsewhere")}[damage]()
    else:
        half = len(content) // 2
        path.write_bytes({"truncated": content[:half], "zeroed": bytes(len(content)), "empty": b"", "garbage": b"no library"}[damage])


@pytest.mark.usefixtures("small_core")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_core_is_built_again(damage: str) -> None:
    """Loaded unchecked, a truncated one is SIGBUS in every process, a zeroed one SIGILL."""
    path = build.library_path()
    damage_core(path, damage)
    assert build.library_path() == path
    ctypes.CDLL(str(path))
    modified = path.stat().st_mtime_ns
    build.library_path()
    assert path.stat().st_mtime_ns == modified, "built once"
    assert build.clear() == 1
    assert [left.name for left in path.parent.iterdir() if left.name != "elsewhere"] == []


@pytest.mark.usefixtures("small_core")
def test_core_in_a_directory_that_others_can_write_to_is_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build.library_path()
    cache_directory.reset_warning()
    path.parent.chmod(0o777)
    assert build.library_path().parent != path.parent
    assert "others may write to" in caplog.text


def test_core_that_may_not_be_run_where_it_is_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system mounted with noexec."""
    path, load = build.library_path(), ctypes.CDLL

    def refuse(name: str, *arguments: Any) -> Any:
        if Path(name).parent == path.parent:
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name, *arguments)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert native.core.__wrapped__().instructions == native.core().instructions
    monkeypatch.setattr(build, "copy_that_can_be_loaded", lambda library: path)
    with pytest.raises(SetupError, match="noexec"):
        native.core.__wrapped__()


@pytest.mark.usefixtures("small_core")
def test_no_directory_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "file"))

    def no_directory(**_: Any) -> Any:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(build, "_private_directory", build._private_directory.__wrapped__)
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", no_directory)
    with pytest.raises(SetupError, match="TMPDIR"):
        build.library_path()


@pytest.mark.usefixtures("small_core")
def test_a_program_that_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/true")
    with pytest.raises(SetupError, match=r"/bin/true.*is no C\+\+ compiler.*CXX"):
        build.library_path()


@pytest.mark.usefixtures("small_core")
def test_without_more_threads_one_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert build.library_path().exists()


@pytest.mark.usefixtures("small_core")
def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "file"))  # no directory can be made below a file
    assert build.library_path().exists()


def test_compile_errors_are_shown(small_core: Path) -> None:
    (small_core / "answer.cpp").write_text("int broken( {")
    with pytest.raises(SimulatorError, match=r"Building the simulator's core failed[\s\S]*answer\.cpp"):
        build.library_path()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install ziglang"):
        build.library_path()


def test_the_ziglang_wheel_is_the_last_resort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler().kind == "zig"


def test_cxx_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrapper = tmp_path / "my-g++"
    wrapper.write_text('#!/bin/sh\necho "g++ (made up) 99"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    compiler = build.find_compiler()
    assert compiler.command == (str(wrapper),)
    assert "made up" in compiler.version


def test_default_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUFLASH_CACHE_DIR", raising=False)
    folder = cache_directory.find(build.PART)
    assert folder is not None
    assert folder.name == "simulator"
    assert "cuflash" in str(folder)


def test_zig_takes_our_flags(small_core: Path, tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    compiler = build._probe((sys.executable, "-m", "ziglang", "c++"))
    assert compiler is not None
    assert compiler.kind == "zig"
    build._run([*compiler.command, *compiler.flags(), "-c", str(small_core / "answer.cpp"), "-o", str(tmp_path / "answer.o")])
    assert (tmp_path / "answer.o").stat().st_size > 0


@pytest.mark.exhaustive  # its first link on a machine builds the C++ library, for two and a half minutes
@pytest.mark.usefixtures("small_core")
def test_zig_builds(tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    compiler = build._probe((sys.executable, "-m", "ziglang", "c++"))
    assert compiler is not None
    assert build.build(compiler, tmp_path).exists()


@pytest.mark.skipif(not os.environ.get("CUFLASH_TEST_ZIG"), reason="builds the whole core once more: set CUFLASH_TEST_ZIG=1")
def test_the_core_as_zig_builds_it() -> None:
    """The table is the same whichever compiler built the core."""
    compiler = build._probe((sys.executable, "-m", "ziglang", "c++"))
    assert compiler is not None
    core = native.Core(build.build(compiler, build.library_path().parent))
    assert core.instructions == native.core().instructions
