"""The demo: its model's gradients, its training, its verdicts and its exit status."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy
import pytest

from cuflash import demo
from cuflash.__main__ import main
from cuflash.demo import generation, training, verification
from cuflash.demo.transformer import Shape, Transformer, narrow, operand, widen
from cuflash.demo.verification import Case
from cuflash.reference import round_to

SMALL = Shape(seqlen=32, width=32, num_heads=2)


def test_gradients_of_the_model_are_those_of_its_loss() -> None:
    model = Transformer(SMALL, numpy, "float32", seed=1)
    generator = numpy.random.default_rng(2)
    tokens, targets = generator.integers(0, 256, (2, 3, SMALL.seqlen))
    _, gradients = model.loss_and_gradients(tokens, targets)
    assert gradients.keys() == model.parameters.keys()
    for name, parameter in model.parameters.items():
        before, step = parameter.copy(), 1e-3 * numpy.abs(parameter).mean()
        direction = numpy.sign(gradients[name])  # the steepest one, so that the difference stands out of the rounding
        parameter[...] = before + step * direction
        above = model.loss(tokens, targets)
        parameter[...] = before - step * direction
        below = model.loss(tokens, targets)
        parameter[...] = before
        expected = float(numpy.abs(gradients[name]).sum())
        assert (above - below) / (2 * step) == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrowing_rounds_to_nearest(dtype: str) -> None:
    x = numpy.random.default_rng(0).standard_normal((50, 8), dtype=numpy.float32)
    assert numpy.array_equal(widen(operand(narrow(x, dtype), dtype)), round_to(x, dtype))


def test_writing_step_by_step_is_what_the_model_computes_at_once() -> None:
    """A prompt, then byte for byte, over several pages of the caches."""
    model = Transformer(SMALL, numpy, "float16", seed=1)
    tokens = numpy.random.default_rng(2).integers(0, 256, SMALL.seqlen)
    want, _ = model._forward(tokens[None])
    writer = generation.Writer(model)
    steps = [tokens[:7], *tokens[7:, None]]
    got = numpy.concatenate([writer.logits(step) for step in steps])
    assert writer.caches[0].lengths == [SMALL.seqlen]
    assert numpy.abs(got - want).max() < 2e-2
    assert numpy.abs(want).max() > 1
    text = generation.write(model, b"def ", 12, seed=3)
    assert (text[:4], len(text)) == (b"def ", 16)
    assert text == generation.write(model, b"def ", 12, seed=3)


def test_text_and_training_are_deterministic() -> None:
    text = training.own_text()
    assert 100_000 < len(text.data) <= training.MAX_BYTES
    assert numpy.array_equal(text.data, training.own_text().data)
    assert 0 < text.bigram_entropy < text.unigram_entropy < numpy.log(256)
    losses = [list(training.train(Transformer(SMALL, numpy, seed=5), text, steps=3, seed=5)) for _ in range(2)]
    assert losses[0] == losses[1]


def test_held_out_windows_are_not_trained_on() -> None:
    data = numpy.arange(1000, dtype=numpy.uint16).astype(numpy.uint8)
    train, held_out = training.Text(data, 1).windows(10)
    assert len(train) + len(held_out) == 100
    assert len(held_out) == 10


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, and the check against the float64 formula on a small case."""
    shape = (1, 100, 2, 32)
    monkeypatch.setattr(demo, "CHECK_SHAPE", shape)
    monkeypatch.setattr(Case.__init__, "__defaults__", (shape,))
    monkeypatch.setattr(demo, "Shape", lambda: Shape(seqlen=64, width=64, num_heads=2, num_layers=1))


@pytest.mark.usefixtures("small_demo")
def test_the_loss_falls_and_the_demo_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Far below where training starts, in a seventh of its steps. The text is these sources, and changes with them.
    monkeypatch.setattr(demo, "LEARNED", 1.0)
    status = demo.run(demo.Options(steps=40, output=tmp_path / "loss.png"))
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "step   40 of 40" in printed
    assert re.search(
        r"It continues b'    return ', [1-9][0-9]* tokens per second .*on the simulator, which says nothing of a GPU", printed
    ), printed
    assert (tmp_path / "loss.png").stat().st_size > 5000


@pytest.mark.usefixtures("small_demo")
def test_without_enough_steps_the_command_fails_with_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "loss.png"
    assert main(("demo", "--steps", "2", "--output", str(picture), "--dtype", "bfloat16")) == 1
    printed = capsys.readouterr().out
    assert "The model did not learn enough" in printed
    assert printed.count(" ok\n") == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_demo")
def test_a_wrong_result_fails_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = Case.run

    def wrong(case: Case) -> dict[str, Any]:
        results = right(case)
        results["grad_key"][0, 7, 1, 3] += 0.5
        return results

    monkeypatch.setattr(Case, "run", wrong)
    monkeypatch.setattr(demo, "LEARNED", 10.0)
    assert demo.run(demo.Options(steps=1, output=None)) == 1
    printed = capsys.readouterr().out
    assert "grad_key: error 5.0" in printed
    assert printed.count(" ok\n") == 4


def test_without_matplotlib_the_demo_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    real = importlib.import_module

    def without_matplotlib(name: str, package: str | None = None) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_matplotlib)
    demo.draw([3.0, 2.0], 2.0, training.own_text(), tmp_path / "loss.png")
    assert "pip install 'cuflash[demo]'" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


def test_standard_attention_agrees_and_takes_more_memory() -> None:
    case = Case(numpy, "float32", 0, (1, 300, 2, 16))
    results = case.run()
    plain = verification.standard_attention(numpy, case.query, case.key, case.value, case.grad_out)
    for name, got in zip(("out", "grad_query", "grad_key", "grad_value"), plain, strict=True):
        assert numpy.abs(got - results[name]).max() < 1e-4, name
    memory = case.measure_memory()
    assert memory.standard > 4 * memory.cuflash
