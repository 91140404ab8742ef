"""Files that nobody else can have written: what cuflash keeps on disk is later run as code, so it is read as ssh reads its keys.

Contract: `why_not_private` says whether others could put something into a directory. `read` gives the content of a regular file that belongs to this
user or root and that no one else may write to, whatever lies there instead: it follows no link, waits for nothing and reads no more than a limit.
`write` replaces a file as a whole. All of them raise OSError and nothing else.

A user-private group, named like the user and with no other member, counts as the user. Others may add to a directory with the sticky bit, such as
/tmp, but not replace what is in it, so it may stand above a private directory. In a container, directories above may belong to a user whom it does
not know.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path

MAX_BYTES = 256 * 2**20
"""Of any file that cuflash keeps; the largest cubins have a few hundred KiB."""

_CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_HAS_OWNERS = hasattr(os, "geteuid")


class RefusedFileError(OSError):
    """There is something, but not a file that can be trusted."""


def why_not_private(folder: Path) -> str | None:
    """Why others could change what is in a directory, with the way out; None if they cannot.

    Raises:
        OSError: it cannot be looked at.
    """
    real = Path(os.path.realpath(folder))
    if not _HAS_OWNERS:
        return None
    for place in (real, *real.parents):
        status = os.lstat(place)
        above = place != real
        if not stat.S_ISDIR(status.st_mode):
            return f"{place} is not a directory"
        if not (_is_ours(status) or (above and _is_unknown_here(status.st_uid))):
            return f"{place} belongs to user {status.st_uid}, who could put other code there"
        if _others_may_write(status) and not (above and status.st_mode & stat.S_ISVTX):
            return f"others may write to {place} and could put other code there; chmod go-w {place} forbids it"
    return None


def make_directory(folder: Path) -> None:
    """Make a directory, and those above it, that nobody else can write to; does nothing where there is one."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_directory(folder.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755)


def open_descriptor(path: Path, flags: int, mode: int = 0o644) -> int:
    """Open a regular file that nobody else can write to, without following a link or waiting for whoever holds the other end.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: it cannot be opened; RefusedFileError if it is no such file.
    """
    descriptor = os.open(path, flags | _CAREFULLY, mode)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedFileError(f"{path} is not a regular file")
        if _HAS_OWNERS and not _is_ours(status):
            raise RefusedFileError(f"{path} belongs to user {status.st_uid}")
        if _HAS_OWNERS and _others_may_write(status):
            raise RefusedFileError(f"others may write to {path}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: it cannot be read; RefusedFileError if it is no file that can be trusted, or larger than `limit` bytes.
    """
    with open(open_descriptor(path, os.O_RDONLY), "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise RefusedFileError(f"{path} has more than {limit} bytes")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise RefusedFileError(f"{path} has more than {limit} bytes")
    return content


def write(path: Path, content: bytes, *, executable: bool = False) -> None:
    """Replace a file, so that a reader sees all of it or what was there before; what is in its way is put aside."""
    temporary = temporary_beside(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFULLY, 0o755 if executable else 0o644)
        with open(descriptor, "wb") as file:
            file.write(content)
        try:
            os.replace(temporary, path)
        except IsADirectoryError:
            os.rename(path, temporary_beside(path))
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove(paths: Iterable[Path]) -> None:
    """Remove files, and directories that stand in their place, without following links.

    Raises:
        OSError: one that may not be removed.
    """
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A name in the same directory that nobody else uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _others_may_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and status.st_gid != 0 and not _is_private_group(status.st_gid)


@functools.lru_cache(maxsize=64)
def _is_private_group(number: int) -> bool:
    """Whether a group is there for this user alone, as many systems make one for each."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except (KeyError, OSError):
        return False
    return user.pw_gid == number and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _is_unknown_here(user: int) -> bool:
    """Whether a number stands for all users whom a container does not know, the administrator of the machine among them."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        known = Path("/proc/self/uid_map").read_text().split()
    except (OSError, ValueError):
        return False
    return user == overflow and known != ["0", "0", "4294967295"]
