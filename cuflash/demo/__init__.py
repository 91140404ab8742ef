"""`python -m cuflash demo`: train a small transformer on cuflash's own source text with cuflash's attention, and prove that it is right.

`run(options)` trains, compares attention with the float64 formula, shows the plan and the memory, and draws the loss. It returns the exit status: 0
when the model learned and every result is right. Read next: `transformer.py`, the model and its gradients; `training.py`;
`verification.py`; `generation.py`, what it writes then.

On a GPU all arrays are CuPy's; without one they are NumPy's and attention runs on the simulator, whose first use compiles its core.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from cuflash.demo.generation import write
from cuflash.demo.training import Text, held_out_loss, own_text, train
from cuflash.demo.transformer import Shape, Transformer
from cuflash.demo.verification import CHECK_SHAPE, Case
from cuflash.errors import OptionError
from cuflash.hardware import device

STEPS = 300
PROMPT = b"    return "
LEARNED = 0.75
"""The loss on held-out text has to be below this share of the unigram entropy."""


@dataclass(frozen=True)
class Options:
    """What the command line can change.

    Attributes:
        steps: of training.
        seed: of parameters, batches and the operands of the check.
        dtype: of attention's operands.
        output: the picture of the loss; None for no picture.
    """

    steps: int = STEPS
    seed: int = 0
    dtype: str = "float16"
    output: Path | None = Path("cuflash-demo.png")


def run(options: Options) -> int:
    """Run all of it; returns 0, or 1 if the model did not learn or a result is wrong."""
    start = time.perf_counter()
    xp = _array_library()
    case = Case(xp, options.dtype, options.seed)
    print(f"cuflash on {case.plans()[0].device.name}, arrays of {xp.__name__}, attention in {options.dtype}")
    print("Compiling kernels (without a GPU also the simulator's core: a minute or two), unless they are cached", end=" … ", flush=True)
    case.run()
    print(f"{time.perf_counter() - start:.1f} s")
    model, learned = _train(xp, options)
    _write(model, options.seed)
    correct = _verify(case)
    print("\nWhat ran for the check:")
    for plan in case.plans():
        print(plan)
    memory = case.measure_memory()
    print(
        f"\nPeak memory of forward and backward beyond the inputs: {memory.cuflash / 2**20:.1f} MiB; "
        f"with all scores in memory (float32): {memory.standard / 2**20:.1f} MiB, {memory.standard / memory.cuflash:.0f} times as much"
    )
    print(f"\n{'All is well' if learned and correct else 'FAILED'} after {time.perf_counter() - start:.0f} s.")
    return 0 if learned and correct else 1


def _array_library() -> Any:
    """CuPy where it finds a GPU, else NumPy."""
    return importlib.import_module("cupy") if device.default().kind == "gpu" else numpy


# --- Training -----------------------------------------------------------------------------------------------------------------------------


def _train(xp: Any, options: Options) -> tuple[Transformer, bool]:
    """Train, report and draw; the model, and whether it learned."""
    text, shape = own_text(), Shape()
    model = Transformer(shape, xp, options.dtype, options.seed)
    size = sum(parameter.size for parameter in model.parameters.values())
    print(
        f"\nTraining {shape.num_layers} layers, {shape.num_heads} heads of {shape.head_dim}, {size} parameters, to predict the next byte of "
        f"{len(text.data)} bytes of cuflash's own source"
    )
    start = time.perf_counter()
    losses = []
    with _progress(options.steps) as report:
        for loss in train(model, text, options.steps, options.seed):
            losses.append(loss)
            report(len(losses), loss)
    seconds = time.perf_counter() - start
    final = held_out_loss(model, text)
    limit = LEARNED * text.unigram_entropy
    print(f"{options.steps} steps in {seconds:.1f} s. Nats per byte:")
    print(f"  {text.unigram_entropy:.3f}  knowing only how frequent each byte is (unigram entropy)")
    print(f"  {text.bigram_entropy:.3f}  knowing also the byte before (bigram entropy)")
    print(f"  {final:.3f}  the model, on text held out; required: below {limit:.3f}")
    if final >= limit:
        print(f"The model did not learn enough.{f' {STEPS} steps are meant to do.' if options.steps < STEPS else ''}")
    if options.output is not None:
        draw(losses, final, text, options.output)
    return model, final < limit


def _write(model: Transformer, seed: int) -> None:
    """Let the model write, and say how fast it does."""
    on = device.default()
    if on.capability < 80:
        print(f"It does not write: the kernel for caches needs sm_80 or later, and this is {on.arch}.")
        return
    write(model, PROMPT, 2, seed)  # compiles
    count = model.shape.seqlen - len(PROMPT)
    start = time.perf_counter()
    text = write(model, PROMPT, count, seed)
    rate = count / (time.perf_counter() - start)
    where = " on the simulator, which says nothing of a GPU's speed" if on.kind == "simulator" else ""
    print(f"It continues {PROMPT!r}, {rate:.0f} tokens per second through a cuflash.KVCache for each layer{where}:\n  {text!r}")


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, float], None]]:
    """How to report a step and its loss: a bar on a terminal with rich, else ten lines."""
    try:
        rich = importlib.import_module("rich.progress") if sys.stdout.isatty() else None
    except ImportError:
        rich = None
    if rich is None:

        def print_line(step: int, loss: float) -> None:
            if step == 1 or step * 10 // steps > (step - 1) * 10 // steps:
                print(f"  step {step:4} of {steps}   loss {loss:.3f}", flush=True)

        yield print_line
        return
    columns = (*rich.Progress.get_default_columns(), rich.TextColumn("{task.fields[loss]}"))
    with rich.Progress(*columns) as bar:
        task = bar.add_task("training", total=steps, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.3f}")


def check_picture(path: Path) -> None:
    """Refuse, before the training, a name of a kind of picture that matplotlib cannot draw.

    Raises:
        OptionError: its suffix is none of matplotlib's formats.
    """
    try:
        canvas = importlib.import_module("matplotlib.figure").Figure().canvas
    except ImportError:
        return  # draw() says so
    formats = sorted(canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        expected = "a file whose name ends in " + ", ".join(f".{name}" for name in formats)
        raise OptionError("--output", repr(str(path)), expected, f"Name a picture, such as {path.stem}.png.")


def draw(losses: list[float], final: float, text: Text, path: Path) -> None:
    """Write the loss of every step as a picture; without matplotlib, say what to install."""
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError:
        print("No picture: matplotlib is missing. pip install 'cuflash[demo]'")
        return
    figure = figure_module.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", linewidth=1, label="batch")
    axes.plot(len(losses), final, "o", color="tab:blue", label=f"held out: {final:.2f}")
    axes.axhline(text.unigram_entropy, color="gray", linestyle="--", label=f"unigram entropy: {text.unigram_entropy:.2f}")
    axes.axhline(text.bigram_entropy, color="gray", linestyle=":", label=f"bigram entropy: {text.bigram_entropy:.2f}")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="A byte-level transformer learns cuflash's source, attention by cuflash")
    axes.legend()
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        print(f"No picture: {error}")
        return
    print(f"The loss curve is in {path}")


# --- Verification -------------------------------------------------------------------------------------------------------------------------


def _verify(case: Case) -> bool:
    """Print a table of errors; whether all are small enough."""
    batch, seqlen, heads, head_dim = CHECK_SHAPE
    print(f"\nAgainst the float64 formula, causal, batch {batch}, seqlen {seqlen}, {heads} heads of {head_dim}; largest absolute errors:")
    print(f"  {'':12}{'cuflash':>10}{'naive':>10}   (naive: the plain formula in {case.dtype})")
    verdicts = case.verify()
    for verdict in verdicts:
        print(f"  {verdict.name:12}{verdict.error:10.2e}{verdict.naive_error:10.2e}   {verdict.complaint or 'ok'}")
    return not any(verdict.complaint for verdict in verdicts)
