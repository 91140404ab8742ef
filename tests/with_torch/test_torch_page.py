"""docs/torch.md and the README's lines for torch: their examples run. cuflash and torch may be imported in either order, and cuflash alone loads no torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def examples(page: str) -> list[str]:
    return [text for text in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S) if "cuflash.torch" in text]


def test_the_example_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(text for text in examples("docs/torch.md") if "cuflash.torch.report()" in text)
    made: dict[str, Any] = {}
    exec(example, made)
    assert made["query"].grad.abs().sum() > 0
    assert made["encoded"].shape == (2, 32, 64)
    assert capsys.readouterr().out.startswith("1 calls of attention on cuflash")


def test_the_example_with_transformers() -> None:
    pytest.importorskip("transformers")
    import torch

    made: dict[str, Any] = {}
    exec(next(text for text in examples("docs/torch.md") if "register_transformers" in text), made)
    assert made["model"](torch.arange(12)[None]).logits.shape == (1, 12, 100)


def test_the_example_with_several_ranks() -> None:
    """Of which there is one here; tests/with_torch/test_ring.py has more."""
    example = "import torch\nimport cuflash.torch\n" + next(text for text in examples("docs/torch.md") if "init_process_group" in text)
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", example + "print(whole.shape, query.grad.abs().sum() > 0)"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **ranks}, timeout=300,
    )  # fmt: skip
    assert done.stdout.startswith("torch.Size([1, 2, 64, 32]) tensor(True)"), done.stderr


def test_the_examples_with_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as in one session."""
    exec("".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cupy_and_torch.md").read_text(encoding="utf-8"), re.S)), {})
    assert capsys.readouterr().out.startswith("key: got ")


def test_the_example_of_the_readme() -> None:
    import torch

    from cuflash.torch import disable

    (example,) = examples("README.md")
    original = torch.nn.functional.scaled_dot_product_attention
    made: dict[str, Any] = {}
    try:
        exec(example, made)
        assert torch.nn.functional.scaled_dot_product_attention is not original
    finally:
        disable()
    assert made["value"].grad.abs().sum() > 0


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout


@pytest.mark.parametrize("first", ["torch", "cuflash, cuflash.torch"])
def test_both_orders_of_import(first: str) -> None:
    code = f"import {first}; import torch, cuflash.torch; x = torch.zeros(1, 1, 4, 8); print(cuflash.torch.scaled_dot_product_attention(x, x, x).shape)"
    assert run(code).strip() == "torch.Size([1, 1, 4, 8])"


def test_a_call_on_numpy_arrays_loads_no_torch() -> None:
    code = "import cuflash, numpy, sys; x = numpy.zeros((1, 4, 1, 8), 'float32'); cuflash.scaled_dot_product_attention(x, x, x); print('torch' in sys.modules)"
    assert run(code).strip() == "False"
