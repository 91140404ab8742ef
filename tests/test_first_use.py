"""The first calls of a process come from several threads at once: what is loaded then is loaded by one of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("cupy")

EIGHT_COMPILATIONS = """
import threading
from cuflash.jit import compiler
from cuflash.hardware import device
from cuflash.planning import offline
kernels = offline.offline_kernels(device.of_arch("sm_80", "gpu"), dtype="float16", head_dim=32)
request = next(iter(kernels)).request(device.of_arch("sm_80", "gpu"))
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
    done = subprocess.run([sys.executable, "-c", EIGHT_COMPILATIONS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
