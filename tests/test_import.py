"""`import cuflash` is quick and loads nothing heavy, and what is missing is named with the command that installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
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


@pytest.mark.parametrize("module", ["cuflash.torch", "cuflash.flash_attn"])
def test_without_torch_what_needs_it_says_what_to_install(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None\nimport cuflash\ntry:\n    import {module}\nexcept cuflash.SetupError as error:\n    print(error)"
    assert run_python(code).strip() == "cuflash.torch needs torch: pip install torch."


def test_without_a_compiler_the_simulator_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ziglang'] = None" + CALL
    message = run_python(code, PATH=str(tmp_path), CXX="", CUFLASH_CACHE_DIR=str(tmp_path))
    assert "C++ compiler" in message
    assert "pip install ziglang" in message


def test_a_wheel_has_the_kernels_and_says_that_it_is_typed(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="pip install -e '.[test]' installs it")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(built).namelist())
    kernels = {f"cuflash/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.cu*")}
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "cuflash" / "simulator" / "core").iterdir()}
    assert len(kernels) > 20
    assert {"cuflash/py.typed", *kernels, *core} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"cuflash"}
