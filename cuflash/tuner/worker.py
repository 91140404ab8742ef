"""Candidates are run in a process of their own: a kernel that accesses memory that is not its own takes the whole process's GPU away, for life.

`Workers` is the evaluator of a run. It keeps one process, asks it for one candidate after the other, and starts another one where it dies, answers nothing for
too long, or says that its GPU is lost. What the process is asked for is compiled before, in threads of this one. `main` is the process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from cuflash.errors import CuflashError, SetupError
from cuflash.hardware.device import Device
from cuflash.jit import cache
from cuflash.jit.compiler import Artifact
from cuflash.problem.tile import Tile
from cuflash.tuned import store
from cuflash.tuned.table import Timing
from cuflash.tuner.described_calls import DescribedCall
from cuflash.tuner.tasks import Task

COMPILE_TIMEOUT = 120.0
ANSWER_TIMEOUT = {"gpu": 120.0, "simulator": 3600.0}
"""Seconds. On a GPU a candidate takes less than one; the simulator may have to be built."""

LOST = 70
"""Exit status of a process whose GPU is lost."""

_WORDS = 200  # of an error, in a table


@dataclass(frozen=True)
class Question:
    """One candidate, for the process."""

    call: DescribedCall
    task: Task
    tile: Tile
    give_up_at: float | None


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

    def compile_ahead(self, tasks: list[Task]) -> int:
        """Begin to compile all candidates, in the order in which they will be tried; returns how many kernels they have."""
        begun: dict[Any, Future[Artifact]] = {}
        for task in tasks:
            for tile in task.tiles:
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

    def evaluate(self, task: Task, tile: Tile, give_up_at: float | None) -> Timing:
        """See `session.Evaluator`."""
        for future in self._compiled.pop((task, tile), ()):
            try:
                future.result(COMPILE_TIMEOUT)
            except TimeoutError:
                return Timing(tile, note=f"took more than {COMPILE_TIMEOUT:.0f} s to compile")
            except SetupError:
                raise
            except CuflashError as error:
                return Timing(tile, note=f"did not compile: {_words(error)}")
        connection = self._running()
        try:
            connection.send(Question(task.call, task, tile, give_up_at))
            if not connection.poll(self._answer_timeout):
                self._end()
                return Timing(tile, note=f"hung: no answer for {self._answer_timeout:.0f} s")
            answer: Timing = connection.recv()
        except (EOFError, OSError):
            return Timing(tile, note=f"crashed: {self._last_words()}")
        if answer.note.startswith("crashed"):
            self._end()
        return answer

    def close(self) -> None:
        """End the process, and what was not begun to compile."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _running(self) -> Any:
        if self._process is None or self._process.poll() is not None:
            self._end()
            ours, theirs = Pipe()
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
            program = f"import sys; sys.path[:] = {sys.path!r}; from cuflash.tuner import worker; worker.main({theirs.fileno()})"
            variables = {**os.environ, store.VARIABLE: "off"}
            self._process = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=(theirs.fileno(),), env=variables, stdin=subprocess.DEVNULL, stdout=self._errors,
                stderr=self._errors, start_new_session=True,
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

    def _last_words(self) -> str:
        """How the process ended, and the last line that it printed."""
        assert self._process is not None
        assert self._errors is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.poll()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._end()
        ended = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        return f"{ended}{'; ' + lines[-1][:_WORDS] if lines else ''}"


def _words(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:_WORDS]


# --- The process --------------------------------------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Answer questions until there are no more."""
    connection = Connection(descriptor)
    device: Device = connection.recv()
    if device.kind == "simulator":
        os.environ["CUFLASH_SIMULATOR_ARCH"] = device.arch
    else:
        import cupy

        cupy.cuda.runtime.setDevice(device.index)
    answers = _Answers(device)
    while True:
        try:
            question: Question = connection.recv()
        except EOFError:
            return
        try:
            answer = answers.to(question)
        except CuflashError as error:
            answer = Timing(question.tile, note=f"failed: {_words(error)}")
        except Exception as error:  # what CuPy raises of a GPU that is lost
            connection.send(Timing(question.tile, note=f"crashed: {type(error).__name__}: {_words(error)}"))
            os._exit(LOST)
        connection.send(answer)


class _Answers:
    """The arrays of a call are made once for all its candidates."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._bench: Any = None
        self._of: tuple[bytes, bool] | None = None

    def to(self, question: Question) -> Timing:
        from cuflash.tuner.measuring import Bench

        wanted = pickle.dumps(question.call), question.task.backward
        if self._of != wanted:
            self._bench = self._of = None  # before the next one takes memory
            self._bench, self._of = Bench(question.call, question.task.backward, self._device), wanted
        timing: Timing = self._bench.evaluate(question.task, question.tile, question.give_up_at)
        return timing
