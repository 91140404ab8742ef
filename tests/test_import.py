"""`import cuflash` is quick and loads nothing heavy, and what is missing is named with the command that installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("numpy", "cupy", "torch", "ml_dtypes", "rich", "matplotlib", "ctypes", "subprocess")

CALL = """
import numpy, cuflash
x = numpy.zeros((1, 16, 1, 16), numpy.float16)
try:
    cuflash.scaled_dot_product_attention(x, x, x)
except cuflash.SetupError as error:
    print(error)
"""


def run_python(code: str, **environment: str) -> str:
    """Standard output of a new interpreter that sees the package as this one does."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True)
    return result.stdout


def test_import_takes_less_than_a_fifth_of_a_second() -> None:
    code = "import time; start = time.perf_counter(); import cuflash; print(time.perf_counter() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.2


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys; before = set(sys.modules); import cuflash, json; print(json.dumps([m for m in {HEAVY} if m in set(sys.modules) - before]))"
    assert json.loads(run_python(code)) == []


def test_every_public_name_is_there() -> None:
    code = "import cuflash; print(all(getattr(cuflash, name) is not None for name in cuflash.__all__), len(dir(cuflash)) == len(cuflash.__all__))"
    assert run_python(code).split() == ["True", "True"]


def test_a_wrong_name_is_an_attribute_error() -> None:
    import cuflash

    with pytest.raises(AttributeError, match="no attribute 'attention_please'"):
        _ = cuflash.attention_please


def test_without_cupy_a_call_says_what_to_install() -> None:
    message = run_python("import sys; sys.modules['cupy'] = None" + CALL)
    assert "CuPy" in message
    assert "pip install 'cuflash[cuda12]'" in message


def test_without_a_compiler_the_simulator_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ziglang'] = None" + CALL
    message = run_python(code, PATH=str(tmp_path), CXX="", CUFLASH_CACHE_DIR=str(tmp_path))
    assert "C++ compiler" in message
    assert "pip install ziglang" in message
