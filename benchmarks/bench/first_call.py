"""What the first call of a new process takes: with nothing compiled, and with its kernels in the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.machine import ROOT, Machine
from cuflash.simulator import build

PROGRAM = """
import json, sys, time
started = time.perf_counter()
import numpy
import cuflash
xp = numpy if sys.argv[1] == "numpy" else __import__("cupy")
imported = time.perf_counter()
query, key, value = (xp.zeros((1, int(sys.argv[2]), 2, 64), "float16") for _ in range(3))
if xp is not numpy:
    xp.cuda.runtime.deviceSynchronize()
called = time.perf_counter()
cuflash.scaled_dot_product_attention(query, key, value, is_causal=True)
if xp is not numpy:
    xp.cuda.runtime.deviceSynchronize()
done = time.perf_counter()
from cuflash.jit import cache
print(json.dumps({"import_seconds": imported - started, "call_seconds": done - called, "kernels_compiled": cache.statistics().compiles}))
"""


def empty_cache(folder: Path, machine: Machine) -> Path:
    """A new cache directory without kernels. The simulator's core is taken along: it is built once per machine, not once per program."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    if machine.dry:
        core = build.library_path()
        place = folder / build.PART
        place.mkdir(mode=0o700)
        for file in core.parent.glob(core.stem + "*"):
            shutil.copy2(file, place)
    return folder


def first_call(cache_directory: Path, machine: Machine) -> dict[str, Any]:
    """Seconds of importing and of the first call in a new process, and how many kernels it compiled."""
    command = [sys.executable, "-c", PROGRAM, "numpy" if machine.dry else "cupy", "32" if machine.small else "2048"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "CUFLASH_CACHE_DIR": str(cache_directory), "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
