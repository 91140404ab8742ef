"""A launch ends with Ctrl-C, and with whatever else a handler of a signal raises; and takes the threads that it gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from simulated import compile_cuda, pack

from cuflash.simulator import Module, Options

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = 'extern "C" __global__ void endless(int* out) { for (volatile int i = 0; ; ++i) if (i < 0) out[0] = i; }'
LIMIT = 2**40  # instructions: hours


@pytest.fixture(autouse=True)
def ctrl_c_is_heeded() -> Iterator[None]:
    """A shell lets what it runs in the background ignore it, and launches here end with nothing else."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def launch(threads: int, schedule: str = "late") -> None:
    out = np.zeros(1, np.int32)
    options = Options(threads, schedule, max_instructions=LIMIT)  # type: ignore[arg-type]
    Module(compile_cuda(ENDLESS)).launch((4, 1, 1), (32, 1, 1), 0, pack([out]), [(out.ctypes.data, out.nbytes, "out")], options)


def send_soon(number: int, seconds: float = 0.3) -> float:
    """Send this process a signal; returns when, as `time.monotonic` counts."""
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
    return time.monotonic() + seconds


@pytest.mark.parametrize("schedule", ["late", "random"])
@pytest.mark.parametrize("threads", [1, 3])
def test_ctrl_c_ends_a_launch_within_a_second(threads: int, schedule: str) -> None:
    Module(compile_cuda(ENDLESS))  # decoding comes before
    sent = send_soon(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        launch(threads, schedule)
    assert time.monotonic() - sent < 1.0
    assert threading.active_count() < 20


def test_any_handler_may_end_a_launch_and_another_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class TimeIsOverError(Exception):
        pass

    def stop(*_: object) -> None:
        raise TimeIsOverError

    previous = signal.signal(signal.SIGALRM, stop), signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        send_soon(signal.SIGUSR1, 0.1)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(TimeIsOverError):
            launch(2)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGALRM, previous[0])
        signal.signal(signal.SIGUSR1, previous[1])


def test_a_call_is_interrupted_too_and_works_afterwards() -> None:
    script = """
import os, signal, threading, time, numpy, cuflash
x = numpy.ones((1, 8192, 4, 64), numpy.float16)
small = x[:, :64]
before = cuflash.scaled_dot_product_attention(small, small, small)
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
sent = time.monotonic() + 1.0
try:
    cuflash.scaled_dot_product_attention(x, x, x)
    print("too fast")
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - sent < 1.5)
print((cuflash.scaled_dot_product_attention(small, small, small) == before).all())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUFLASH_SIMULATOR_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split("\n")[:2] == ["interrupted True", "True"], result.stderr


IN_A_THREAD = """
import os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from simulated import compile_cuda, pack
from cuflash.simulator import Module, Options
signal.signal(signal.SIGINT, signal.default_int_handler)
def launch(source, limit):
    out = np.zeros(1, np.int32)
    module = Module(compile_cuda(source))
    module.launch((4, 1, 1), (32, 1, 1), 0, pack([out]), [(out.ctypes.data, out.nbytes, "out")], Options(2, max_instructions=limit))
    return out[0]
def interrupt(after=0.5):
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
"""


def run_in_a_process(script: str) -> subprocess.CompletedProcess[str]:
    """With the functions above; a launch that does not end is an error, and the process is gone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    command = [sys.executable, "-c", f"ENDLESS, LIMIT = {ENDLESS!r}, {LIMIT}{IN_A_THREAD}{script}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "way", ["with ThreadPoolExecutor() as pool: [pool.submit(work) for _ in range(2)]; interrupt(); time.sleep(30)", "work_in_threads()"]
)
def test_ctrl_c_ends_launches_of_other_threads_too(way: str) -> None:
    """Python waits for its threads at the end, so that a launch which went on would keep the process for hours."""
    result = run_in_a_process(f"""
ended = []
def work():
    try:
        launch(ENDLESS, LIMIT)
    except KeyboardInterrupt:
        ended.append(time.monotonic())
def work_in_threads():
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads: thread.start()
    interrupt()
    for thread in threads: thread.join()
launch(ENDLESS.replace(" ; ++i", " i < 1; ++i"), LIMIT)  # compiled and decoded
try:
    {way}
except KeyboardInterrupt:
    raised = time.monotonic()
while len(ended) < 2 and time.monotonic() < raised + 5: time.sleep(0.01)
print([abs(moment - raised) < 1.0 for moment in ended], signal.getsignal(signal.SIGINT) is signal.default_int_handler)
interrupt(0.1)
try:
    time.sleep(30)
except KeyboardInterrupt:
    print("again", flush=True)
os._exit(0)  # whatever still runs
""")
    assert result.stdout.split("\n")[:2] == ["[True, True] True", "again"], result.stdout + result.stderr


def test_a_handler_of_the_program_leaves_launches_of_other_threads_alone() -> None:
    """It may want them to finish: it is Python's own handler that stands for an end."""
    result = run_in_a_process("""
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(time.monotonic()))
long = 'extern "C" __global__ void k(int* out) { for (volatile int i = 0; i < 1500000; ++i) if (i < 0) out[0] = i; if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = 7; }'
launch(long.replace("1500000", "1"), LIMIT)
begun = time.monotonic()
launch(long.replace("1500000", "100000"), LIMIT)
long = long.replace("1500000", str(int(100000 / (time.monotonic() - begun))))  # a second's, on any machine
results = []
def work():
    begun = time.monotonic()
    results.append((launch(long, LIMIT), begun, time.monotonic()))
thread = threading.Thread(target=work)
thread.start()
interrupt(0.2)
while thread.is_alive() or not seen: time.sleep(0.01)
print(results[0][0], results[0][1] < seen[0] < results[0][2])
""")
    assert result.stdout == "7 True\n", result.stdout + result.stderr


def test_other_threads_run_python_during_a_launch() -> None:
    counted = 0
    done = threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.is_set():
            counted += 1
            time.sleep(0.005)

    thread = threading.Thread(target=count)
    thread.start()
    send_soon(signal.SIGINT, 0.5)
    with pytest.raises(KeyboardInterrupt):
        launch(1)
    done.set()
    thread.join()
    assert counted > 20


def test_threads_that_cannot_be_started_are_done_without() -> None:
    """As in a container with a limit of process ids. Root is under no such limit, so memory for the stacks is what runs out."""
    script = """
import resource, numpy as np
from simulated import compile_cuda, pack
from cuflash.simulator import Module, Options
module = Module(compile_cuda('extern "C" __global__ void k(int* out) { out[blockIdx.x * 32 + threadIdx.x] = blockIdx.x; }'))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 60 * 2**20, -1))
out = np.zeros((500, 32), np.int32)
module.launch((500, 1, 1), (32, 1, 1), 0, pack([out]), [(out.ctypes.data, out.nbytes, "out")], Options(400))
print((out == np.arange(500)[:, None]).all())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode in (0, 1), result.stderr
    assert result.stdout.strip() == "True" or "[memory]" in result.stderr, result.stderr
