"""docs/tutorial.md: its blocks run one after the other, as a reader would type them, and print what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy
import pytest
from test_tuning_page import Instant

from cuflash.__main__ import main
from cuflash.runtime import calls
from cuflash.tuned import store
from cuflash.tuner import api, tasks

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", PAGE, re.M | re.S)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its table of tiles lies elsewhere, and candidates are those of the tuning page's test, for which nobody has to wait."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    monkeypatch.delenv(store.VARIABLE, raising=False)
    monkeypatch.setattr(store, "own_path", lambda on: tmp_path / "own.json")
    monkeypatch.setattr(api, "Workers", Instant)
    monkeypatch.setitem(tasks.EFFORTS, "quick", 1)
    calls.forget()
    names: dict[str, Any] = {}
    told = 0
    assert PAGE.count("```python") == len(BLOCKS) >= 10
    for block, printed in BLOCKS:
        exec(compile(block, "docs/tutorial.md", "exec"), names)
        output = capsys.readouterr().out
        if printed:
            assert output == printed
            told += 1
        else:
            assert "False" not in output
    assert told == PAGE.count("```text") >= 7
    calls.forget()
    assert len(names["found"].entries) == 1
    assert len(names["legal"]) > 100
    assert "the user's table" in str(names["tuned"])
    assert (tmp_path / "own.json").exists()
    assert numpy.isfinite(names["theirs"].astype(float)).all()


def test_its_commands_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Both take what the page passes; without the prediction itself, which takes seconds."""
    predict, explain = re.findall(r"^python -m cuflash (.*)$", PAGE, re.M)
    assert predict.split()[1:] == explain.split()[1:]
    assert main([*explain.split(), "--no-predict"]) == 0
    assert "causal" in capsys.readouterr().out
