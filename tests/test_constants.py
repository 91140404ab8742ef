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
from gpu_constants.service_order import PACE, judge, judge_kernels, predict

ROOT = Path(__file__).resolve().parents[1]


def test_two_equal_batches_by_all_rules() -> None:
    def done(rule: str, depth: int = 8) -> list[float]:
        return predict(rule, (16, 16), (0, 500), (128, 128), depth).done

    assert done("fifo") == [16 * 128, 32 * 128]
    # In turn: four products of the first before the second comes, then alternately.
    assert done("rr") == [28 * 128, 32 * 128]
    # The second comes to a unit that is full of the first one's products, of which eleven have entered, and then gets every other entry.
    assert done("queue") == [(11 + 2 * 5) * 128, 32 * 128]


def test_a_short_batch_does_not_wait_in_turn() -> None:
    # Two products of the long batch, then alternately, the newcomer first.
    assert predict("rr", (32, 4), (0, 256), (128, 128)).done == [36 * 128, (2 + 2 * 4 - 1) * 128]
    assert predict("fifo", (32, 4), (0, 800), (128, 128)).done == [32 * 128, 36 * 128]


def test_a_unit_without_work_waits() -> None:
    assert predict("fifo", (1, 1), (10, 500), (100, 50)).done == [110, 550]
    assert predict("queue", (1, 1), (10, 500), (100, 50), 1).done == [110, 550]


def test_a_full_unit_holds_up_issue() -> None:
    clocks = predict("queue", (6,), (0,), (128,), 3)
    assert clocks.issued == [[0, PACE, 2 * PACE, 128, 256, 384]]
    assert clocks.done == [6 * 128]


def test_entries_that_are_known_are_not_predicted() -> None:
    assert predict("queue", (2, 2), (0, 0), (128, 128), 2, (1, 1, 0, 0)).done == [4 * 128, 2 * 128]


def made_up_tests(rule: str, depth: int) -> list[dict[str, Any]]:
    """Clocks that a rule gives, off by less than half a product."""
    rng = numpy.random.default_rng(0)
    tests: list[dict[str, Any]] = []
    for lengths, begin in (
        ((16, 16), (0, 40)),
        ((32, 4), (0, 320)),
        ((4, 32), (320, 0)),
        ((32, 16), (0, 40)),
        ((16, 16, 16), (0, 77, 154)),
    ):
        costs = (128.0,) * len(lengths)
        clocks = predict(rule, lengths, begin, costs, depth)
        issued = [numpy.sort(numpy.add(row, rng.integers(0, 9, len(row)))).tolist() for row in clocks.issued]
        done = [x + float(rng.integers(-60, 60)) for x in clocks.done]
        tests.append({"lengths": lengths, "begin": begin, "costs": costs, "issue_clocks": issued, "done": done})
    return tests


@pytest.mark.parametrize(("rule", "depth"), [("rr", 99), ("fifo", 99), ("queue", 4), ("queue", 7), ("queue", 10)])
def test_the_verdict_is_the_rule_that_made_the_clocks(rule: str, depth: int) -> None:
    verdict = judge(made_up_tests(rule, depth))
    assert verdict["rule"] == rule
    assert verdict["depth"] == (depth if rule == "queue" else None)
    assert min(verdict["mean_largest_error_in_products_from_begin"].values()) < 0.5
    if rule == "queue":
        assert f"holds {depth} products" in verdict["meaning"]


def test_clocks_that_no_rule_explains_have_no_verdict() -> None:
    tests = made_up_tests("queue", 7)
    for test in tests:
        test["done"] = [1000.0, *[9000.0] * (len(test["lengths"]) - 1)]
    assert judge(tests)["rule"] == "neither"


H100 = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "constants.json"


def test_the_verdict_on_the_h100_is_what_the_page_says() -> None:
    records = {record["name"]: record for record in json.loads(H100.read_text())["constants"]}
    verdicts = judge_kernels(records["order of service between warpgroups"]["tests"])
    unsaturated = verdicts.pop("order_64_ss")
    assert unsaturated["rule"] == "neither"
    for name, verdict in verdicts.items():
        assert (verdict["rule"], verdict["depth"]) == ("queue", 7), name
        assert verdict["mean_largest_error_in_products_from_begin"]["queue, entries known"] < 0.5, name
    page = (ROOT / "docs" / "h100.md").read_text()
    assert "serves `wgmma` in order of issue" in page
    assert "holds seven products" in page


def test_the_tables_of_the_h100_are_printed() -> None:
    """If this fails, replace the block by what `constants.py --table` prints."""
    page = (ROOT / "docs" / "h100.md").read_text()
    begin, end = f"<!-- constants.py --table {H100.relative_to(ROOT)} -->\n\n", "\n<!-- end of constants.py -->"
    assert page.count(begin) == page.count(end) == 1
    assert page.partition(begin)[2].partition(end)[0] == _script("--table", str(H100)).stdout


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
