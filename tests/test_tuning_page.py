"""docs/tuning.md: its commands and its example run, with candidates that nobody has to wait for, and what it says of the output is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cuflash.__main__ import main
from cuflash.runtime import calls
from cuflash.tuned import store
from cuflash.tuned.table import Table, Timing
from cuflash.tuner import api, tasks
from cuflash.tuner.tasks import Task

PAGE = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text(encoding="utf-8")
COMMANDS = [command for command in re.findall(r"^ *((?:\w+=\S+ )?python -m cuflash .*)$", PAGE, re.M) if "--fit" not in command]
"""All but that of tests/test_fitting.py."""
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)

NUMBERS = dict(tasks.EFFORTS)


class Instant:
    """An evaluator for which the second candidate is the fastest."""

    timer = "events"

    def __init__(self, on: object) -> None:
        pass

    def compile_ahead(self, candidates: list[tuple[Task, object]]) -> int:
        return len(candidates)

    def wait_for_compiled(self) -> list[str]:
        return []

    def evaluate(self, task: Task, tile: object, give_up_at: float | None, seconds_left: float | None) -> Timing:
        number = task.tiles.index(tile)  # type: ignore[arg-type]
        return Timing(task.tiles[number], *[1.0 if number == 1 else 2.0] * 3, repeats=9)

    def time_again(self, task: Task, tile: object, seconds_left: float | None) -> Timing:
        return self.evaluate(task, tile, None, seconds_left)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    monkeypatch.delenv(store.VARIABLE, raising=False)
    monkeypatch.setattr(store, "own_path", lambda on: tmp_path / "own.json")
    monkeypatch.setattr(api, "Workers", Instant)
    for effort in ("quick", "standard"):
        monkeypatch.setitem(tasks.EFFORTS, effort, 1)
    monkeypatch.chdir(tmp_path)
    calls.forget()


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert words[:3] == ["python", "-m", "cuflash"]
    return main(words[3:])


def test_the_commands_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the page, one after the other."""
    assert len(COMMANDS) == 7
    outputs = []
    for command in COMMANDS:
        assert run(command, monkeypatch) == 0, command
        outputs.append(capsys.readouterr().out)
    before, both, few, whole, compiled, shared, after = outputs
    assert "tile by    forward: predicted by the timing model" in before
    assert re.search(r"^ +2 +1 +2\.00x +2 +0 .* forward, bfloat16, head_dim 128, seqlen up to 4096, causal$", both, re.M), both
    assert len(re.findall("backward_d.*, seqlen up to 4096, causal$", both, re.M)) == 2
    assert len(re.findall(r"^ +2 +1 +2\.00x +2 ", whole, re.M)) == 2 * 3 * 4 * 4, "head dimensions, lengths, classes, kernels"
    assert re.search(r" forward_split, bfloat16, head_dim 128, seqlen up to 4 x 8192, full, seqlens_kv, few blocks$", few, re.M), few
    assert re.search(r"\d+ kernels of 8 tasks for sm_90, 0 failed", compiled)
    assert "kept in " in shared
    assert re.search(r"tile by    forward: timed for seqlen up to 1024 x 1024 \(CUFLASH_TUNING\)", after), after


def test_the_plan_says_what_the_page_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (COMMANDS[1], COMMANDS[0]):
        assert run(command, monkeypatch) == 0
    says = " ".join(re.search(r"`(tile by    forward: .*?)`", PAGE, re.S)[1].split())  # type: ignore[index]
    assert says in " ".join(capsys.readouterr().out.split())
    assert set(Table.from_text((tmp_path / "own.json").read_bytes()).device) >= {"name", "arch"}


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLE, "docs/tuning.md", "exec"), {})
    out = capsys.readouterr().out
    assert "done; kept in " in out
    assert "tile by    forward: timed for seqlen up to 64 x 64 (the user's table)" in out


def test_the_numbers_of_the_page() -> None:
    assert f"{NUMBERS['quick']}, {NUMBERS['standard']} or all" in PAGE
