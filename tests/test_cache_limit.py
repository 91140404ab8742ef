"""`cuflash.system.cache_limit`: what was used least recently goes first, and nobody minds. Needs no GPU."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from cuflash.errors import OptionError
from cuflash.jit import cache, compiler
from cuflash.jit.compiler import Artifact, CompileRequest
from cuflash.system import cache_limit
from cuflash.system.file_lock import FileLock

KIB = 1024


def request(number: int) -> CompileRequest:
    return CompileRequest("scale.cu", str(number), "sm_80", "cubin")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own with a limit of 1 MiB, and a compiler that makes 100 KiB of anything."""
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUFLASH_CACHE_LIMIT", "1")
    monkeypatch.setattr(compiler, "fingerprint", lambda request: f"{int(request.config):064x}")
    monkeypatch.setattr(compiler, "compile_kernel", lambda request: Artifact(bytes(100 * KIB), "", 1.0, (), "NVRTC 12.9"))
    monkeypatch.setattr(cache_limit, "_SWEEP_EVERY", 2)
    cache.reset_memory()
    return tmp_path / "kernels"


def kept() -> list[int]:
    return sorted(int(entry.request.config) for entry in cache.contents())


def used_long_ago(folder: Path, number: int, hours: float) -> None:
    for path in folder.glob(f"{number:064x}.*"):
        os.utime(path, (time.time() - 3600 * hours,) * 2)


def test_the_least_recently_used_goes_first(folder: Path) -> None:
    for number in range(10):
        cache.fetch(request(number))
        used_long_ago(folder, number, 100 - number)
    cache.reset_memory()
    cache.fetch(request(0))  # read from disk, hence used now
    for number in range(10, 13):
        cache.fetch(request(number))
    assert 0 in kept()
    assert 1 not in kept()
    assert {10, 11, 12} <= set(kept())
    assert sum(entry.size for entry in cache.contents()) <= 1024 * KIB + 100 * KIB


def test_the_first_write_of_a_process_sweeps(folder: Path) -> None:
    for number in range(30):
        cache_limit.forget_writes()
        cache.fetch(request(number))
    assert len(kept()) <= 11


def test_no_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_LIMIT", "0")
    for number in range(20):
        cache.fetch(request(number))
    assert len(kept()) == 20


def test_the_default_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_LIMIT", "")
    assert cache_limit.limit_bytes() == cache_limit.DEFAULT * KIB * KIB


@pytest.mark.parametrize("value", ["-1", "1.5", "many", "٣", "9" * 5000, " 1"])
def test_a_bad_limit_is_named_before_anything_is_compiled(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_LIMIT", value)
    with pytest.raises(OptionError, match="CUFLASH_CACHE_LIMIT") as caught:
        cache.fetch(request(1))
    assert len(str(caught.value)) < 2000
    assert cache.statistics().compiles == 0


def test_what_killed_processes_left_is_swept_too(folder: Path) -> None:
    cache.fetch(request(0))
    old, new = folder / "old.tmp", folder / "new.tmp"
    for path, age in ((old, 7200), (new, 10)):
        path.write_text("")
        os.utime(path, (time.time() - age,) * 2)
    cache_limit.sweep(folder, 1024 * KIB)
    assert not old.exists()
    assert new.exists()
    assert kept() == [0]


def test_many_threads_write_beside_a_sweep(folder: Path) -> None:
    errors: list[BaseException] = []

    def fetch(first: int) -> None:
        try:
            for number in range(first, first + 8):
                assert len(cache.fetch(request(number)).data) == 100 * KIB
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in (900, 901):  # a sweep that some thread began may have looked before the others wrote; one of two writes sweeps
        cache.fetch(request(number))
    assert len(kept()) <= 11


def test_a_sweep_that_another_process_hindered_is_made_up_for(folder: Path) -> None:
    cache.fetch(request(0))
    with contextlib.closing(FileLock(folder / "sweep.lock")) as lock:
        assert lock.try_acquire()
        for number in range(1, 30):
            cache.fetch(request(number))
        assert len(kept()) == 30
    cache.fetch(request(30))
    assert len(kept()) <= 11


def test_marking_an_entry_as_used_writes_once_an_hour(folder: Path) -> None:
    cache.fetch(request(0))
    (path,) = folder.glob("*.cubin")
    before = path.stat().st_mtime_ns
    cache_limit.used(path)
    assert path.stat().st_mtime_ns == before
    used_long_ago(folder, 0, 2)
    cache_limit.used(path)
    assert time.time() - path.stat().st_mtime < 60
    cache_limit.used(folder / "nothing")
