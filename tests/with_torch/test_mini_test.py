"""benchmarks/mini_test.py at a reduced size: all ways train alike, and a way that cannot do a case has its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mini_test

IN_USE = [way for way in mini_test.WAYS if way != "flash-attn"]


def results(tmp_path: Path, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    assert mini_test.main(("--small", "--steps", "2", "--json", str(tmp_path / "found.json"), *arguments)) == 0
    return {(each["case"], each["way"]): each for each in json.loads((tmp_path / "found.json").read_text())}


@pytest.mark.skipif(mini_test.ON_GPU, reason="runs in 16 bits on a GPU, where losses differ by rounding")
def test_all_ways_have_the_same_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path, "--ways", *IN_USE, "--cases", "plain", "mask")
    assert len(found) == 2 * len(IN_USE)
    for case in ("plain", "mask"):
        want = found[case, "standard"]["losses"]
        assert want[0] > want[1] > want[2]
        for way in IN_USE:
            assert found[case, way]["losses"] == pytest.approx(want, rel=1e-6), way
    assert found["plain", "standard"]["losses"][0] != found["mask", "standard"]["losses"][0]
    out = capsys.readouterr().out
    assert "on the simulator, whose times mean nothing" in out
    assert out.count("from standard") == 2 * len(IN_USE)


def test_with_dropout_each_way_trains(tmp_path: Path) -> None:
    found = results(tmp_path, "--ways", "cuflash", "arrays", "--cases", "dropout")
    for each in found.values():
        assert each["losses"][0] > each["losses"][2] > 0
        assert each["microseconds"] > 0


def test_what_a_way_cannot_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", mini_test)  # as if it were installed
    found = results(tmp_path, "--ways", "flash-attn", "--cases", "plain", "mask")
    assert [found[case, "flash-attn"]["note"] for case in ("plain", "mask")] == ["it takes 16-bit types", "it knows no mask"]
    assert results(tmp_path, "--ways", "arrays", "--cases", "plain", "--dtype", "bfloat16")["plain", "arrays"]["microseconds"] is None


def test_a_way_that_fails_keeps_no_other_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image\nand more")

    monkeypatch.setattr(mini_test, "sdpa", failing)
    found = results(tmp_path, "--ways", "sdpa", "standard", "--cases", "plain")
    assert found["plain", "sdpa"]["note"] == "CUDA error: no kernel image"
    assert found["plain", "standard"]["microseconds"] > 0


@pytest.mark.parametrize("shape", [*mini_test.FULL, *mini_test.SMALL])
def test_gradients_are_not_subnormal(shape: mini_test.Shape) -> None:
    """Of the output, in float16, where an error is one: 2 * scale / number."""
    scale, number = mini_test.Problem(shape, "plain", mini_test.torch.float16).loss_scale, shape.batch * shape.seqlen * shape.width
    assert 2.0**-4 < 2 * scale / number <= 0.25


def test_the_full_size_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if mini_test.ON_GPU:
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        mini_test.main(())
    assert "there is no GPU here: --small tests this program on the simulator" in capsys.readouterr().err
    assert [(shape.batch, shape.seqlen, shape.width) for shape in mini_test.FULL] == [(32, 128, 500), (32, 500, 128)]
