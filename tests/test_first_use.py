"""The first calls of a process come from several threads at once: what is loaded then is loaded by one of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("cupy")

COMPILE = """
import os, signal, threading, time
from cuflash.jit import compiler
from cuflash.hardware import device
from cuflash.planning import offline
kernels = offline.offline_kernels(device.of_arch("sm_80", "gpu"), dtype="float16", head_dim=32)
(request,) = (kernel.request(device.of_arch("sm_80", "gpu")) for kernel in kernels if kernel.name == "backward_delta")  # the smallest
"""

EIGHT_COMPILATIONS = """
start, failures = threading.Barrier(8), []

def compile_one():
    start.wait()
    try:
        compiler.compile_kernel(request)
    except Exception as error:
        failures.append(repr(error))

threads = [threading.Thread(target=compile_one) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failures)
"""


def test_threads_compile_in_a_fresh_process() -> None:
    """NVRTC loads a library of built-in functions at its first use; who compiles beside that failed."""
    done = subprocess.run([sys.executable, "-c", COMPILE + EIGHT_COMPILATIONS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


INTERRUPTED_WAIT = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
threads = [threading.Thread(target=compiler.compile_kernel, args=(request,)) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
done = threading.Event()
threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
threading.Timer(3.0, done.set).start()
begin = time.monotonic()
try:
    done.wait()
except KeyboardInterrupt:
    print(time.monotonic() - begin < 2.0)
"""


def test_ctrl_c_ends_a_wait_after_a_compilation() -> None:
    """NVRTC leaves signals such that what waits goes on waiting, and Python's handler had its turn when the wait was over."""
    done = subprocess.run([sys.executable, "-c", COMPILE + INTERRUPTED_WAIT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
