"""benchmarks/constants.py without a GPU: the rules of service, the verdict on made-up clocks, and a whole dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from gpu_constants import programs
from gpu_constants.measurements import spans
from gpu_constants.service_order import judge, predict

ROOT = Path(__file__).resolve().parents[1]


def test_two_equal_batches_by_both_rules() -> None:
    assert predict("fifo", (16, 16), (0, 300), (128, 128)) == [16 * 128, 32 * 128]
    # In turn: three products of the first before the second comes, then alternately.
    assert predict("rr", (16, 16), (0, 300), (128, 128)) == [29 * 128, 32 * 128]


def test_a_short_batch_does_not_wait_in_turn() -> None:
    # Two products of the long batch, then alternately, the newcomer first.
    assert predict("rr", (32, 4), (0, 256), (128, 128)) == [36 * 128, (2 + 2 * 4 - 1) * 128]
    assert predict("fifo", (32, 4), (0, 256), (128, 128)) == [32 * 128, 36 * 128]


def test_a_unit_without_work_waits() -> None:
    assert predict("fifo", (1, 1), (10, 500), (100, 50)) == [110, 550]


@pytest.mark.parametrize("rule", ["rr", "fifo"])
def test_the_verdict_is_the_rule_that_made_the_clocks(rule: str) -> None:
    rng = numpy.random.default_rng(0)
    tests: list[dict[str, Any]] = []
    for lengths, begin in (((16, 16), (0, 40)), ((32, 4), (0, 320)), ((4, 32), (320, 0)), ((16, 16, 16), (0, 77, 154))):
        costs = (128.0,) * len(lengths)
        done = [x + float(rng.integers(-60, 60)) for x in predict(rule, lengths, begin, costs)]
        tests.append({"lengths": lengths, "begin": begin, "costs": costs, "done": done})
    assert judge(tests)["rule"] == rule


def test_clocks_that_no_rule_explains_have_no_verdict() -> None:
    test = {"lengths": (16, 16), "begin": (0, 40), "costs": (128.0, 128.0), "done": [1000.0, 9000.0]}
    assert judge([test])["rule"] == "neither"


def test_spans_of_blocks() -> None:
    pairs = numpy.array([[[10, 50], [12, 60]], [[100, 140], [0, 0]], [[5, 5], [0, 0]]], numpy.uint64)  # the third one's wait failed
    found = spans(pairs.reshape(-1), 2)
    assert found[:2].tolist() == [50, 40]
    assert numpy.isnan(found[2])


def test_every_instruction_has_a_kernel() -> None:
    text = (programs.FOLDER / "instructions.cu").read_text()
    for name in programs.INSTRUCTIONS:
        assert f"({name}, " in text or f"struct {name} " in text


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "constants.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    ran = _script("--dry-run", "--output", str(tmp_path), "--seconds", "120", "--only", "handovers", "reductions", "timelines")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "constants.json").read_text())
    assert not report["failures"]
    assert {record["measurement"] for record in report["constants"]} == {"handovers", "reductions", "timelines"}
    assert all(record["value"] >= 0 and record["unit"] and record["how"] for record in report["constants"])


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    ran = _script("--dry-run", "--output", str(tmp_path), "--seconds", "0.2", "--only", "handovers", "launches")
    assert ran.returncode == 1
    failures = json.loads((tmp_path / "constants.json").read_text())["failures"]
    assert [failure["measurement"] for failure in failures] == ["handovers", "launches"]
