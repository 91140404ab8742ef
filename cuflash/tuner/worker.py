"""Candidates are run in a process of their own: a kernel that accesses memory that is not its own takes the whole process's GPU away, for life.

`Workers` is the evaluator of a run. It keeps one process, asks it for one candidate after the other, and starts another one where it dies, answers nothing for
too long, or says that its GPU is lost. What the process is asked for is compiled before, in threads of this one. `main` is the process.

The process answers twice: READY when it has the default tile's result, and then the candidate's `Timing`. What happens before READY, and what is out of memory or
missing at any time (`Trouble`), is no candidate's fault and ends the run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from cuflash.errors import CuflashError, SetupError, TuningError
from cuflash.hardware.device import Device
from cuflash.jit import cache
from cuflash.jit.compiler import Artifact
from cuflash.problem.tile import Tile
from cuflash.tuned import store
from cuflash.tuned.table import HUNG, SLOW_TO_COMPILE, UNTIMED, Timing
from cuflash.tuner.session import OutOfTime
from cuflash.tuner.tasks import Task

COMPILE_TIMEOUT = 120.0
ANSWER_TIMEOUT = {"gpu": 120.0, "simulator": 3600.0}
"""Seconds. On a GPU a candidate takes less than one; the simulator may have to be built."""

LOST = 70
"""Exit status of a process whose GPU is lost."""

READY = "ready"

GRACE = 5.0
"""Seconds after the end of the budget that a candidate which was begun before still has."""

_FROM_OUTSIDE = {-getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)}
"""Statuses of a process that somebody else ended: a user, or a system without memory."""

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl

_WORDS = 200  # of an error, in a table


@dataclass(frozen=True)
class Question:
    """One candidate, for the process."""

    task: Task
    tile: Tile
    give_up_at: float | None


@dataclass(frozen=True)
class Trouble:
    """What the process answers where no candidate is to blame."""

    words: str
    is_missing: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        """What an exception says."""
        words = _words(error)
        return cls(words if isinstance(error, CuflashError) else f"{type(error).__name__}: {words}", isinstance(error, ImportError))

    def error(self) -> CuflashError:
        """To raise in the process that tunes."""
        return SetupError(self.words) if self.is_missing else TuningError(self.words)


class Workers:
    """Times candidates in a process that may crash.

    Args:
        device: that is tuned.
        ahead: threads that compile.
        answer_timeout: seconds after which a candidate counts as hanging.
    """

    def __init__(self, device: Device, *, ahead: int | None = None, answer_timeout: float | None = None) -> None:
        self.device, self.timer = device, "model" if device.kind == "simulator" else "events"
        self._answer_timeout = ANSWER_TIMEOUT[device.kind] if answer_timeout is None else answer_timeout
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(ahead or max(1, min(8, cores - 1)), thread_name_prefix="cuflash-compile")
        self._compiled: dict[tuple[Task, Tile], list[Future[Artifact]]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._errors: IO[bytes] | None = None

    def compile_ahead(self, candidates: Sequence[tuple[Task, Tile]]) -> int:
        """Begin to compile candidates, in the order in which they will be tried; returns how many kernels they have."""
        begun: dict[Any, Future[Artifact]] = {}
        for task, tile in candidates:
            requests = [kernel.request(self.device) for kernel in task.planned(tile, self.device)]
            for request in requests:
                if request not in begun:
                    begun[request] = self._pool.submit(cache.fetch, request)
            self._compiled[task, tile] = [begun[request] for request in requests]
        return len(begun)

    def wait_for_compiled(self) -> list[str]:
        """Until all are compiled; what went wrong, a line for each kernel."""
        futures = dict.fromkeys(future for each in self._compiled.values() for future in each)
        return [_words(error) for future in futures if (error := future.exception()) is not None]

    def evaluate(self, task: Task, tile: Tile, give_up_at: float | None, seconds_left: float | None = None) -> Timing:
        """See `session.Evaluator`."""
        until = float("inf") if seconds_left is None else time.monotonic() + seconds_left + GRACE
        note = self._wait_for_compiler(task, tile, until)
        timing = Timing(tile, note=note) if note else self._ask(Question(task, tile, give_up_at), until)
        if tile == task.default and timing.milliseconds is None and timing.note != UNTIMED:
            raise TuningError(f"The default tile of {task.kernel.name}, Tile({tile}), cannot be timed: {timing.note}")
        return timing

    def time_again(self, task: Task, tile: Tile, seconds_left: float | None) -> Timing:
        """See `session.Evaluator`."""
        return self.evaluate(task, tile, None, seconds_left)

    def _wait_for_compiler(self, task: Task, tile: Tile, until: float) -> str:
        """What the compiler has against a candidate, or nothing."""
        for future in self._compiled.pop((task, tile), ()):
            try:
                future.result(_seconds(COMPILE_TIMEOUT, until))
            except concurrent.futures.TimeoutError:  # another class than the built-in one before Python 3.11
                _check_time(until)
                return f"{SLOW_TO_COMPILE}more than {COMPILE_TIMEOUT:.0f} s"
            except SetupError:
                raise
            except CuflashError as error:
                return f"did not compile: {_words(error)}"
        return ""

    def _ask(self, question: Question, until: float) -> Timing:
        """What the process says of a candidate, or how it ended.

        Raises:
            TuningError, SetupError, OutOfTime: see `session.Evaluator`.
        """
        connection, is_ready = self._running(), False
        with contextlib.suppress(OSError):  # it has ended: what it said before that is read below
            connection.send(question)
        try:
            while True:
                if not connection.poll(_seconds(self._answer_timeout, until)):
                    return self._hanging(question.tile, is_ready, until)
                answer = connection.recv()
                if answer != READY:
                    break
                is_ready = True
        except (EOFError, OSError):
            status, words = self._last_words()
            if not is_ready:
                raise TuningError(f"The process that runs candidates ended before the default tile's result: {words}") from None
            if status in _FROM_OUTSIDE:
                raise TuningError(f"The process that runs candidates was ended by {words}: by the system, if memory was short") from None
            return Timing(question.tile, note=f"crashed: {words}")
        if isinstance(answer, Trouble):
            self._end()
            raise answer.error()
        timing: Timing = answer
        if timing.note.startswith("crashed"):
            self._end()
        return timing

    def _hanging(self, tile: Tile, is_ready: bool, until: float) -> Timing:
        """End a process that does not answer."""
        self._end()
        _check_time(until)
        words = f"no answer for {self._answer_timeout:.0f} s"
        if not is_ready:
            raise TuningError(f"The default tile's result does not come: {words}")
        return Timing(tile, note=f"{HUNG}{words}")

    def close(self) -> None:
        """End the process, and what was not begun to compile."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _running(self) -> Any:
        if self._process is None or self._process.poll() is not None:
            self._end()
            ours, theirs = Pipe()
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
            # A group of its own, so that Ctrl-C reaches the process that tunes alone; in the same session, so that whoever ends that ends both.
            program = f"import os, sys; os.setpgrp(); sys.path[:] = {sys.path!r}; from cuflash.tuner import worker; worker.main({theirs.fileno()}, {os.getpid()})"
            variables = {**os.environ, store.VARIABLE: "off"}
            self._process = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=(theirs.fileno(),), env=variables, stdin=subprocess.DEVNULL, stdout=self._errors,
                stderr=self._errors,
            )  # fmt: skip
            theirs.close()
            self._connection = ours
            ours.send(self.device)
        return self._connection

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._errors is not None:
            self._errors.close()
        self._process = self._connection = self._errors = None

    def _last_words(self) -> tuple[int | None, str]:
        """How the process ended, as a status, and in words with the last line that it printed."""
        assert self._process is not None
        assert self._errors is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.poll()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._end()
        ended = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        return status, f"{ended}{'; ' + lines[-1][:_WORDS] if lines else ''}"


def _seconds(most: float, until: float) -> float:
    """To wait."""
    return max(0.0, min(most, until - time.monotonic()))


def _check_time(until: float) -> None:
    if time.monotonic() >= until:
        raise OutOfTime


def _words(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:_WORDS]


# --- The process --------------------------------------------------------------------------------------------------------------------------


def main(descriptor: int, parent: int) -> None:
    """Answer questions until there are no more."""
    _end_with(parent)
    connection = Connection(descriptor)
    device: Device = connection.recv()
    benches = _Benches(device)
    while True:
        try:
            question: Question = connection.recv()
        except EOFError:
            return
        try:
            bench = benches.of(question)
        except Exception as error:
            connection.send(Trouble.of(error))
            os._exit(LOST)
        connection.send(READY)
        answer = _answer(bench, question)
        connection.send(answer)
        if isinstance(answer, Trouble) or answer.note.startswith("crashed"):
            os._exit(LOST)


def _end_with(parent: int) -> None:
    """Never outlive the process that tunes: one that hangs in a kernel does not see that nobody waits for it. Linux alone has a way."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(LOST)


def _answer(bench: Any, question: Question) -> Timing | Trouble:
    """What comes of a candidate."""
    try:
        timing: Timing = bench.evaluate(question.task, question.tile, question.give_up_at)
        return timing
    except ImportError as error:  # SetupError too
        return Trouble.of(error)
    except CuflashError as error:
        return Timing(question.tile, note=f"failed: {_words(error)}")
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():  # CuPy's own, and the driver's
            return Trouble.of(error)
        return Timing(question.tile, note=f"crashed: {type(error).__name__}: {_words(error)}")  # what CuPy raises of a GPU that is lost


class _Benches:
    """The arrays of a call are made once for all its candidates."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._bench: Any = None
        self._of: tuple[bytes, bool] | None = None

    def of(self, question: Question) -> Any:
        """The `Bench` of a candidate, which has the default tile's result.

        Raises:
            TuningError: that is wrong.
            SetupError: CuPy is missing.
        """
        from cuflash.tuner.measuring import Bench, library_of

        wanted = pickle.dumps(question.task.call), question.task.backward
        if self._of != wanted:
            self._bench = self._of = None  # before the next one takes memory
            if self._device.kind == "simulator":
                os.environ["CUFLASH_SIMULATOR_ARCH"] = self._device.arch
            else:
                library_of(self._device).cuda.runtime.setDevice(self._device.index)
            self._bench, self._of = Bench(question.task.call, question.task.backward, self._device), wanted
        if self._bench.wrong_default:
            raise TuningError(self._bench.wrong_default)
        return self._bench
