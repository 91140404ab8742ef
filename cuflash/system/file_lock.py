"""An advisory lock between processes on one file; released by the system when its holder dies.

Contract: only a way to save work. Where a file cannot be locked (no fcntl, a read-only directory, some network file systems, something else in its
place) the lock is always granted, and whoever waits gives up after a time. The file is opened without following a link and is never written to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cuflash.system import private_files

T = TypeVar("T")

_log = logging.getLogger("cuflash")
_POLL = 0.02  # seconds between two looks at a lock that another process holds


class FileLock:
    """The lock on `path`; None is granted always.

    The holder removes the file when it is done. A process that still waits on the removed file then has to look whether the work was done.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._held = False
        if path is not None:
            with contextlib.suppress(OSError):
                self._descriptor = private_files.open_descriptor(path, os.O_CREAT | os.O_RDWR)

    def try_acquire(self) -> bool:
        """Without waiting; False only if another process holds the lock."""
        if self._descriptor is None:
            return True
        try:
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except (ImportError, OSError):
            return True
        self._held = True
        return True

    def wait(self, timeout: float, look: Callable[[], T | None], work: str) -> T | None:
        """Wait until the lock is ours, and look again and again whether its holder has done the work.

        Args:
            timeout: seconds after which to give up.
            look: gives the result of the work, or None if it is not there yet.
            work: what the holder does, for the message after giving up.
        Returns:
            what `look` gave; None means: do it.
        """
        deadline = time.monotonic() + timeout
        while not self.try_acquire():
            found = look()
            if found is not None:
                return found
            if time.monotonic() > deadline:
                _log.warning("cuflash waited %.0f s for another process to %s (%s) and now does it itself.", timeout, work, self.path)
                return None
            time.sleep(_POLL)
        return look()

    def is_current(self) -> bool:
        """Whether a later process would wait for this lock; False if its file was removed by whoever held it before. True where nothing was locked."""
        if not self._held or self._descriptor is None:
            return True
        try:
            there, own = os.lstat(str(self.path)), os.fstat(self._descriptor)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def close(self) -> None:
        """Release the lock if it is held."""
        if self._descriptor is None:
            return
        if self._held:
            import fcntl

            if self.is_current():  # else it is the file of a later lock, whose holder would lose it
                with contextlib.suppress(OSError):
                    os.unlink(str(self.path))
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a forked child may share the descriptor, so closing it is not enough
        os.close(self._descriptor)
        self._descriptor = None
