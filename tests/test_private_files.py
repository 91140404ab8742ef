"""`cuflash.system.private_files`, and what the cache makes of files and directories that others could have written. Needs no GPU."""

from __future__ import annotations

import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cuflash.jit import cache, compiler, kernel_files
from cuflash.jit.compiler import Artifact, CompileRequest
from cuflash.system import cache_directory, private_files
from cuflash.system.file_lock import FileLock
from cuflash.system.private_files import RefusedFileError

REQUEST = CompileRequest("scale.cu", "", "sm_80", "cubin")
ARTIFACT = Artifact(b"machine code", "", 1.0, (), "NVRTC 12.9")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own; nothing is compiled."""
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "fingerprint", lambda request: 64 * "a")
    monkeypatch.setattr(compiler, "compile_kernel", lambda request: ARTIFACT)
    cache.reset_memory()
    return tmp_path / "cache" / "kernels"


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file belong to another user."""
    if os.geteuid() == 0:
        os.chown(path, 4242, 4242)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)


def entry(folder: Path) -> Path:
    cache.fetch(REQUEST)
    cache.reset_memory()
    return folder / (64 * "a" + ".cubin")


def compiles() -> int:
    """Whether the entry on disk was taken (0) or not (1)."""
    before = cache.statistics().compiles
    assert cache.fetch(REQUEST) == ARTIFACT
    return cache.statistics().compiles - before


# --- Directories --------------------------------------------------------------------------------------------------------------------------


def test_what_we_make_is_private(folder: Path) -> None:
    previous = os.umask(0)
    try:
        path = entry(folder)
    finally:
        os.umask(previous)
    for made in (folder.parent, folder, path, path.with_suffix(".json")):
        assert not stat.S_IMODE(made.stat().st_mode) & 0o022, made
    assert compiles() == 0


@pytest.mark.parametrize("where", ["the directory", "one above"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_directory_that_others_can_write_to_is_not_used(folder: Path, where: str, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    entry(folder)
    place = folder if where == "the directory" else folder.parent
    os.chmod(place, mode)
    if os.geteuid() == 0:
        os.chown(place, 0, 4242)  # a group that is not root's own
    sticky_above = where == "one above" and mode & stat.S_ISVTX
    with caplog.at_level(logging.WARNING, "cuflash"):
        assert compiles() == (0 if sticky_above else 1)
        assert compiles() == 0
    if sticky_above:
        assert not caplog.records
        return
    (record,) = caplog.records
    assert str(place) in record.getMessage()
    assert "chmod go-w" in record.getMessage()
    assert cache.directory() is None
    assert cache.contents() == []


def test_directory_of_another_user_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(folder)
    give_away(folder, monkeypatch)
    with caplog.at_level(logging.WARNING, "cuflash"):
        assert compiles() == 1
    assert "belongs to user" in caplog.text


def test_a_link_to_a_private_directory_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "link"))
    assert cache.directory() == tmp_path / "elsewhere" / "kernels"


def test_a_group_of_this_user_alone_counts_as_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chmod(tmp_path, 0o775)
    if os.geteuid() == 0:
        os.chown(tmp_path, 0, 4242)
    monkeypatch.setattr(private_files, "_is_private_group", lambda number: True)
    assert private_files.why_not_private(tmp_path) is None
    monkeypatch.setattr(private_files, "_is_private_group", lambda number: False)
    assert "others may write" in str(private_files.why_not_private(tmp_path))


def test_above_a_directory_there_may_be_users_whom_a_container_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours").mkdir(mode=0o700)
    lstat = os.lstat

    def unknown_above(path: Path) -> os.stat_result:
        status = lstat(path)
        return status if path == tmp_path / "ours" else os.stat_result((*status[:4], 65534, *status[5:10]))

    monkeypatch.setattr(os, "lstat", unknown_above)
    monkeypatch.setattr(private_files, "_is_unknown_here", lambda user: user == 65534)
    assert private_files.why_not_private(tmp_path / "ours") is None
    monkeypatch.setattr(private_files, "_is_unknown_here", lambda user: False)
    assert "belongs to user 65534" in str(private_files.why_not_private(tmp_path / "ours"))


# --- Files --------------------------------------------------------------------------------------------------------------------------------


def replace_by(path: Path, what: str) -> None:
    """Put something else in the place of a file."""
    content = path.read_bytes()
    path.unlink()
    if what == "a FIFO":
        os.mkfifo(path)
    elif what == "a socket":
        previous = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s")
        os.rename("s", path)
        os.chdir(previous)
    elif what == "a link":
        elsewhere = path.parent.parent / "elsewhere"
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
    elif what == "a link to nothing":
        path.symlink_to("nowhere")
    elif what == "an endless device":
        path.symlink_to("/dev/zero")
    elif what == "a directory":
        path.mkdir()
        (path / "in it").write_text("")
    elif what == "nested JSON":
        path.write_text(200_000 * "[")


ODD = ["a FIFO", "a socket", "a link", "a link to nothing", "an endless device", "a directory", "nested JSON"]


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("suffix", [".cubin", ".json"])
def test_what_is_no_file_is_a_damaged_entry(folder: Path, suffix: str, what: str) -> None:
    path = entry(folder).with_suffix(suffix)
    replace_by(path, what)
    start = time.monotonic()
    assert len(cache.contents()) == (1 if suffix == ".cubin" and what not in ("a link to nothing",) else 0)
    assert compiles() == 1
    assert time.monotonic() - start < 5
    cache.reset_memory()
    assert compiles() == 0, "it was replaced"
    assert cache.clear() == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("fault", ["others may write to it", "it belongs to another"])
def test_file_that_others_could_have_written_is_not_taken(folder: Path, suffix: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = entry(folder).with_suffix(suffix)
    if fault == "others may write to it":
        os.chmod(path, 0o666)
    elif os.geteuid() == 0:
        give_away(path, monkeypatch)
    else:
        pytest.skip("only root can give a file away")
    assert compiles() == 1
    cache.reset_memory()
    assert compiles() == 0, "it was replaced"


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(log=5),
        lambda record: record.update(seconds="long"),
        lambda record: record.update(seconds=-1),
        lambda record: record.update(seconds=float("nan")),
        lambda record: record.update(compiler=None),
        lambda record: record.update(resources=[{}]),
        lambda record: record.update(resources=[[]]),
        lambda record: record.update(resources=5),
        lambda record: record.pop("sha256"),
    ],
)
def test_a_record_of_other_types_is_damaged_though_its_checksum_is_right(
    folder: Path, change: Callable[[dict[str, object]], object]
) -> None:
    import json

    path = entry(folder).with_suffix(".json")
    content = json.loads(path.read_text())
    change(content["record"])
    content["sha256"] = kernel_files._record_checksum(content["record"])
    path.write_text(json.dumps(content))
    assert compiles() == 1


def test_no_more_is_read_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    private_files.write(path, bytes(1001))
    assert len(private_files.read(path, 1001)) == 1001
    with pytest.raises(RefusedFileError, match="more than 1000 bytes"):
        private_files.read(path, 1000)


# --- Locks --------------------------------------------------------------------------------------------------------------------------------


def test_a_lock_follows_no_link_and_empties_no_file(folder: Path) -> None:
    folder.mkdir(parents=True)
    victim = folder.parent / "victim"
    victim.write_text("precious")
    lock = folder / (64 * "a" + ".lock")
    lock.symlink_to(victim)
    assert compiles() == 1
    assert victim.read_text() == "precious"
    lock.unlink()
    lock.write_text("not empty")
    held = FileLock(lock)
    assert held.try_acquire()
    assert lock.read_text() == "not empty"
    held.close()


@pytest.mark.parametrize("what", ["a FIFO", "a directory", "a socket"])
def test_a_lock_that_is_no_file_is_granted(folder: Path, what: str) -> None:
    folder.mkdir(parents=True)
    lock = folder / (64 * "a" + ".lock")
    lock.write_text("")
    replace_by(lock, what)
    start = time.monotonic()
    assert compiles() == 1
    assert time.monotonic() - start < 5


def test_whoever_waits_for_a_lock_gives_up_with_a_message(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True)
    held, waiting = FileLock(folder / "lock"), FileLock(folder / "lock")
    assert held.try_acquire()
    with caplog.at_level(logging.WARNING, "cuflash"):
        assert waiting.wait(0.1, lambda: None, "do something long") is None
    assert "waited 0 s for another process to do something long" in caplog.text
    assert waiting.wait(10.0, lambda: "done", "do it") == "done"
    held.close()
    waiting.close()


# --- No directory at all ------------------------------------------------------------------------------------------------------------------


def test_no_home_and_no_user(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As in `docker run --user 12345`."""
    import pwd

    def nobody(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("CUFLASH_CACHE_DIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with caplog.at_level(logging.WARNING, "cuflash"):
        assert compiles() == 1
        assert compiles() == 0
    assert len(caplog.records) == 1
    assert "names no home directory" in caplog.text


@pytest.mark.parametrize("value", ["~nouser/x", "/proc/nothing", "\udcff\udcfe", "x" * 5000])
def test_a_directory_that_cannot_be(value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", value)
    with caplog.at_level(logging.WARNING, "cuflash"):
        assert compiles() == 1
    if value != "\udcff\udcfe":  # a name in bytes that are no text is a name
        assert len(caplog.records) == 1
        assert cache_directory.why_not("kernels")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUFLASH_CACHE_LIMIT", "")
    assert cache.directory() == tmp_path / "cuflash" / "kernels"
    assert compiles() == 1
