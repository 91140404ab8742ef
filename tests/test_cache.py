"""`cuflash.jit.cache`: whichever thread or process comes first compiles, once, and no state of the disk is an error. Needs no GPU."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cuflash.errors import CompileError, OptionError
from cuflash.jit import cache, compiler, kernel_files
from cuflash.jit.cache import Statistics
from cuflash.jit.compiler import Artifact, CompileRequest

pytest.importorskip("cupy")

REPOSITORY = Path(__file__).resolve().parents[1]
SCALE = """
#include "offset.cuh"
extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR + OFFSET; }
"""

REQUEST = CompileRequest("scale.cu", "constexpr float FACTOR = 5.f;", "sm_80", "cubin")
OTHERS = [replace(REQUEST, config=f"constexpr float FACTOR = {factor}.f;") for factor in range(3)]


@pytest.fixture(autouse=True)
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernels/ and a cache directory of our own, and a process that remembers nothing."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "scale.cu").write_text(SCALE)
    (folder / "offset.cuh").write_text("constexpr float OFFSET = 1.f;\n")
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(folder))
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUFLASH_COMPILE", raising=False)
    cache.reset_memory()
    return folder


@pytest.fixture
def unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory that cannot be made, even by root: it would lie below a regular file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "file" / "cache"))


def entry_files(suffix: str) -> list[Path]:
    folder = cache.directory()
    assert folder is not None
    return sorted(folder.glob("*" + suffix))


def fetch_as_new_process(request: CompileRequest = REQUEST) -> tuple[Artifact, Statistics]:
    cache.reset_memory()
    return cache.fetch(request), cache.statistics()


CHILD = """
import json, sys, time
from cuflash.jit import cache, compiler
requests = [compiler.CompileRequest(*fields) for fields in json.loads(sys.argv[1])]
compile_kernel = compiler.compile_kernel
def slowly(request):
    time.sleep(float(sys.argv[2]))
    return compile_kernel(request)
compiler.compile_kernel = slowly
compiler.nvrtc_version()
print("ready", flush=True)
sys.stdin.readline()
for request in requests:
    cache.fetch(request)
statistics = cache.statistics()
print(statistics.compiles, statistics.disk_hits)
"""


def start_child(requests: list[CompileRequest], delay: float) -> subprocess.Popen[str]:
    """Another process that fetches `requests`, spending at least `delay` seconds on each compilation, as soon as it is sent a line."""
    fields = json.dumps([[r.source, r.config, r.arch, r.target] for r in requests])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", CHILD, fields, str(delay)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def await_ready(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"


# -------------------------------------------------------------------------------------------------------------------------- memory and disk


def test_memory_then_disk_then_compiler() -> None:
    compiled = cache.fetch(REQUEST)
    assert cache.statistics() == Statistics(compiles=1, disk_hits=0, memory_hits=0)
    assert cache.fetch(REQUEST) is compiled
    assert cache.statistics() == Statistics(compiles=1, disk_hits=0, memory_hits=1)
    read, statistics = fetch_as_new_process()
    assert read == compiled
    assert statistics == Statistics(compiles=0, disk_hits=1, memory_hits=0)


def test_ptx_is_kept_too() -> None:
    compiled = cache.fetch(replace(REQUEST, target="ptx"))
    read, statistics = fetch_as_new_process(replace(REQUEST, target="ptx"))
    assert read == compiled
    assert statistics.compiles == 0
    assert len(entry_files(".ptx")) == 1


def test_edited_header_recompiles(kernels: Path) -> None:
    before = cache.fetch(REQUEST)
    (kernels / "offset.cuh").write_text("constexpr float OFFSET = 2.25f;\n")
    after, statistics = fetch_as_new_process()
    assert statistics.compiles == 1
    assert after.data != before.data
    (kernels / "offset.cuh").write_text("constexpr float OFFSET = 1.f;\n")
    again, statistics = fetch_as_new_process()
    assert statistics.compiles == 0, "the entry of the first text is still there"
    assert again == before


def test_text_edited_during_compilation_is_not_stored(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel = compiler.compile_kernel

    def compile_and_edit(request: CompileRequest) -> Artifact:
        artifact = compile_kernel(request)
        (kernels / "offset.cuh").write_text("constexpr float OFFSET = 17.f;\n")
        return artifact

    monkeypatch.setattr(compiler, "compile_kernel", compile_and_edit)
    cache.fetch(REQUEST)
    assert cache.contents() == []


def test_contents_and_clear() -> None:
    assert cache.contents() == []
    cache.fetch_many([REQUEST, *OTHERS])
    entries = cache.contents()
    assert {entry.request for entry in entries} == {REQUEST, *OTHERS}
    assert all(0 <= entry.age < 60 and entry.seconds > 0 and entry.size > entry.path.stat().st_size > 0 for entry in entries)
    folder = cache.directory()
    assert folder is not None
    (folder / "left by a killed process.tmp").write_text("")
    assert cache.clear() == 4
    assert list(folder.iterdir()) == []
    cache.fetch(REQUEST)
    assert cache.statistics().compiles == 5


def test_nothing_but_entries_is_left_behind() -> None:
    cache.fetch(REQUEST)
    folder = cache.directory()
    assert folder is not None
    assert {path.suffix for path in folder.iterdir()} == {".cubin", ".json"}


# -------------------------------------------------------------------------------------------------------------------------- damaged entries


def flip_a_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "garbage", "missing", "a directory"])
def test_damaged_entry_is_rebuilt(suffix: str, damage: str) -> None:
    compiled = cache.fetch(REQUEST)
    (path,) = entry_files(suffix)
    content = path.read_bytes()
    path.unlink()
    if damage == "a directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"flipped": flip_a_byte(content), "truncated": content[:-7], "empty": b"", "garbage": b"[\xff\x00]"}[damage])
    rebuilt, statistics = fetch_as_new_process()
    assert statistics == Statistics(compiles=1, disk_hits=0, memory_hits=0)
    assert rebuilt.data == compiled.data
    assert fetch_as_new_process()[1] == Statistics(compiles=0, disk_hits=1, memory_hits=0)


def test_record_that_was_altered_is_rebuilt() -> None:
    compiled = cache.fetch(REQUEST)
    (path,) = entry_files(".json")
    text = path.read_text()
    registers = f'"registers": {compiled.resources[0].registers}'
    assert registers in text
    path.write_text(text.replace(registers, '"registers": 1'))
    rebuilt, statistics = fetch_as_new_process()
    assert statistics.compiles == 1
    assert rebuilt.resources == compiled.resources


def test_damaged_entries_are_not_listed() -> None:
    cache.fetch_many(OTHERS)
    entry_files(".json")[0].write_text("{}")
    entry_files(".cubin")[-1].unlink()
    assert len(cache.contents()) == 1


# ----------------------------------------------------------------------------------------------------------------------- unusable directory


@pytest.mark.usefixtures("unusable")
@pytest.mark.filterwarnings("error")
def test_directory_that_cannot_be_made(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cuflash"):
        artifacts = cache.fetch_many([REQUEST, *OTHERS])
    assert all(artifact.data for artifact in artifacts)
    assert cache.fetch(REQUEST) is artifacts[0]
    assert cache.statistics() == Statistics(compiles=4, disk_hits=0, memory_hits=1)
    (record,) = caplog.records
    assert "CUFLASH_CACHE_DIR" in record.getMessage()
    assert cache.directory() is None
    assert cache.contents() == []
    assert cache.clear() == 0


def test_write_that_fails_leaves_no_trace(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, destination: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING, "cuflash"):
        assert cache.fetch(REQUEST).data
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    folder = cache.directory()
    assert folder is not None
    assert list(folder.iterdir()) == []


def test_read_only_directory_is_read(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.fetch(REQUEST)

    open_file = os.open

    def read_only(path: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with caplog.at_level(logging.WARNING, "cuflash"):
        assert fetch_as_new_process()[1].disk_hits == 1
        assert caplog.records == []
        cache.fetch(OTHERS[0])
    assert len(caplog.records) == 1


def test_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUFLASH_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def without_platformdirs(name: str) -> object:
        raise ModuleNotFoundError(name)

    if sys.platform == "linux":
        assert cache.directory() == tmp_path / "xdg" / "cuflash" / "kernels"
    monkeypatch.setattr("cuflash.system.cache_directory.importlib.import_module", without_platformdirs)
    assert cache.directory() == tmp_path / "xdg" / "cuflash" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == tmp_path / "home" / ".cache" / "cuflash" / "kernels"


# ------------------------------------------------------------------------------------------------------------------------------ environment


def test_forbidden_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.fetch(REQUEST)
    cache.reset_memory()
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    assert cache.fetch(REQUEST).data
    with pytest.raises(CompileError) as caught:
        cache.fetch(OTHERS[0])
    assert all(text in str(caught.value) for text in ("scale.cu for sm_80", str(cache.directory()), "unset CUFLASH_COMPILE"))
    assert OTHERS[0].config not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert cache.statistics() == Statistics(compiles=0, disk_hits=1, memory_hits=0)


def test_unknown_value_of_cuflash_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_COMPILE", "never")
    with pytest.raises(OptionError, match="CUFLASH_COMPILE: got 'never'; expected 'allow' or 'forbid'"):
        cache.fetch(REQUEST)
    monkeypatch.setenv("CUFLASH_COMPILE", "allow")
    assert cache.fetch(REQUEST).data


# ---------------------------------------------------------------------------------------------------------------------------------- threads


def test_threads_compile_a_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel = compiler.compile_kernel

    def slowly(request: CompileRequest) -> Artifact:
        time.sleep(0.1)
        return compile_kernel(request)

    monkeypatch.setattr(compiler, "compile_kernel", slowly)
    artifacts: list[Artifact] = []
    threads = [threading.Thread(target=lambda: artifacts.append(cache.fetch(REQUEST))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(artifacts) == 8
    assert all(artifact is artifacts[0] for artifact in artifacts)
    assert cache.statistics() == Statistics(compiles=1, disk_hits=0, memory_hits=7)


def test_failure_does_not_block_the_next_attempt(kernels: Path) -> None:
    good = (kernels / "offset.cuh").read_text()
    (kernels / "offset.cuh").write_text("#error half written\n")
    for _ in range(2):
        with pytest.raises(CompileError, match="half written"):
            cache.fetch(REQUEST)
    (kernels / "offset.cuh").write_text(good)
    assert cache.fetch(REQUEST).data


def test_fetch_many_keeps_order_and_reports_progress() -> None:
    calls: list[tuple[int, int, CompileRequest]] = []
    requests = [OTHERS[0], REQUEST, OTHERS[0], OTHERS[1]]
    artifacts = cache.fetch_many(requests, max_workers=2, progress=lambda *call: calls.append(call))
    assert [artifact.data for artifact in artifacts] == [cache.fetch(request).data for request in requests]
    assert [(done, total) for done, total, _ in calls] == [(1, 3), (2, 3), (3, 3)]
    assert {request for _, _, request in calls} == set(requests)
    assert cache.statistics().compiles == 3
    assert cache.fetch_many([]) == []


def test_fetch_many_raises_what_fetch_raises() -> None:
    with pytest.raises(CompileError, match="FACTOR"):
        cache.fetch_many([REQUEST, replace(REQUEST, config="")])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_child_forked_during_a_compilation_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    started, finish = threading.Event(), threading.Event()
    compile_kernel = compiler.compile_kernel

    def wait_in_parent(request: CompileRequest) -> Artifact:
        started.set()
        finish.wait(20)
        return compile_kernel(request)

    monkeypatch.setattr(compiler, "compile_kernel", wait_in_parent)
    monkeypatch.setattr(cache, "LOCK_TIMEOUT", 0.1)
    thread = threading.Thread(target=cache.fetch, args=(REQUEST,))
    thread.start()
    assert started.wait(20)
    child = os.fork()
    if child == 0:  # only this thread lives on here, and what the other held is held for ever
        code = 1
        try:
            monkeypatch.setattr(compiler, "compile_kernel", lambda request: Artifact(b"", "", 0.0, (), ""))
            cache.fetch(REQUEST)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 10
    status = None
    while status is None and time.monotonic() < deadline:
        pid, code = os.waitpid(child, os.WNOHANG)
        status = code if pid else None
        time.sleep(0.01)
    finish.set()
    thread.join()
    if status is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == 0


# -------------------------------------------------------------------------------------------------------------------------------- processes


def test_four_processes_on_an_empty_cache_compile_each_kernel_once() -> None:
    children = [start_child(OTHERS, delay=0.2) for _ in range(4)]
    for child in children:
        await_ready(child)
    for child in children:
        go(child)
    counts = [tuple(map(int, child.communicate(timeout=60)[0].split())) for child in children]
    assert all(child.returncode == 0 for child in children)
    assert sum(compiles for compiles, _ in counts) == len(OTHERS)
    assert sum(hits for _, hits in counts) == 3 * len(OTHERS)
    assert entry_files(".lock") == entry_files(".tmp") == []
    late = start_child(OTHERS, delay=0)
    assert late.communicate("\n", timeout=60)[0].split() == ["ready", "0", "3"], "a later process compiles nothing"


def test_killed_holder_of_the_lock_does_not_hold_up_others() -> None:
    child = start_child([REQUEST], delay=60)
    await_ready(child)
    go(child)
    deadline = time.monotonic() + 20
    while not entry_files(".lock") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert entry_files(".lock")
    time.sleep(0.1)  # from creating the file to locking it
    child.kill()
    child.communicate()
    start = time.monotonic()
    assert cache.fetch(REQUEST).data
    assert time.monotonic() - start < 5
    assert cache.statistics().compiles == 1
    assert entry_files(".lock") == []


@pytest.fixture
def held_lock() -> Iterator[object]:
    """The lock of `REQUEST`, held by somebody who never lets go."""
    fcntl = pytest.importorskip("fcntl")
    folder = cache.directory()
    assert folder is not None
    with open(folder / f"{compiler.fingerprint(REQUEST)}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@pytest.mark.usefixtures("held_lock")
def test_lock_that_is_never_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT", 0.2)
    assert cache.fetch(REQUEST).data
    assert fetch_as_new_process()[1].disk_hits == 1, "it was stored without the lock"


@pytest.mark.usefixtures("held_lock")
def test_entry_that_appears_while_waiting_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    place = kernel_files.place_of(REQUEST)
    artifact = compiler.compile_kernel(REQUEST)
    timer = threading.Timer(0.2, kernel_files.write, (place, REQUEST, artifact))
    timer.start()
    assert cache.fetch(REQUEST) == artifact
    timer.join()
    assert cache.statistics() == Statistics(compiles=0, disk_hits=1, memory_hits=0)


def test_file_system_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert cache.fetch(REQUEST).data
    assert fetch_as_new_process()[1].disk_hits == 1
