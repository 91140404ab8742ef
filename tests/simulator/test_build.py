"""The core is built once, by whatever compiler there is, and says what to install when there is none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuflash import cache_directory
from cuflash.errors import SetupError, SimulatorError
from cuflash.simulator import build, native

SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def small_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile at once, in place of the real ones."""
    sources = tmp_path / "core"
    sources.mkdir()
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
