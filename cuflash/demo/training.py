"""What the demo learns, and how: the text of cuflash itself, byte by byte, with AdamW.

The text is cut into windows one byte longer than the model sees; every tenth is held out. `train` yields the loss of each step, so that the caller
decides how to show it. The same seed gives the same batches on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from cuflash.demo.transformer import AdamW, Array, Transformer
from cuflash.jit import compiler

BATCH = 8
MAX_BYTES = 300_000
PEAK_RATE = 4e-3
WARMUP_STEPS = 20

_HELD_OUT = 10  # one window of so many
_HELD_OUT_WINDOWS = 64  # about so many are looked at, spread over the text


@dataclass(frozen=True)
class Text:
    """Bytes to learn.

    Attributes:
        data: the bytes.
        num_files: that they come from.
    """

    data: NDArray[numpy.uint8]
    num_files: int

    @property
    def unigram_entropy(self) -> float:
        """Nats per byte that the best guess costs which knows only how frequent each byte is."""
        return _entropy(numpy.bincount(self.data))

    @property
    def bigram_entropy(self) -> float:
        """The same for a guess that also knows the byte before: what a model without attention can reach at best."""
        pairs = numpy.bincount(256 * self.data[:-1].astype(numpy.int64) + self.data[1:])
        return _entropy(pairs) - self.unigram_entropy

    def windows(self, length: int) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint8]]:
        """Windows to train on and windows held out, each `(windows, length)`."""
        count = len(self.data) // length
        windows = self.data[: count * length].reshape(count, length)
        is_held_out = numpy.arange(count) % _HELD_OUT == 0
        return windows[~is_held_out], windows[is_held_out]


def _entropy(counts: NDArray[Any]) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * numpy.log(probabilities)).sum())


def own_text() -> Text:
    """The sources of this package and its kernels in alphabetical order, up to `MAX_BYTES`."""
    package = Path(__file__).resolve().parent.parent
    kernels = compiler.kernels_directory()
    named = {f"kernels/{path.relative_to(kernels).as_posix()}": path for path in kernels.rglob("*.cu*")}
    named |= {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    contents = [named[name].read_bytes() for name in sorted(named)]
    return Text(numpy.frombuffer(b"".join(contents)[:MAX_BYTES], numpy.uint8), len(contents))


def train(model: Transformer, text: Text, steps: int, seed: int) -> Iterator[float]:
    """Train, yielding the loss of each step in nats per byte, measured before the step."""
    windows, _ = text.windows(model.shape.seqlen + 1)
    generator = numpy.random.default_rng(seed)
    optimizer = AdamW(model.parameters, model.xp)
    for step in range(steps):
        chosen = windows[generator.choice(len(windows), BATCH, replace=False)]
        loss, gradients = model.loss_and_gradients(*_tokens_and_targets(model, chosen))
        optimizer.update(gradients, learning_rate(step, steps))
        yield loss


def learning_rate(step: int, steps: int) -> float:
    """A linear rise, then a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_RATE * rise * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def held_out_loss(model: Transformer, text: Text) -> float:
    """Mean loss in nats per byte on text that `train` never showed."""
    _, windows = text.windows(model.shape.seqlen + 1)
    chosen = windows[:: max(1, len(windows) // _HELD_OUT_WINDOWS)]
    losses = [model.loss(*_tokens_and_targets(model, chosen[first : first + BATCH])) for first in range(0, len(chosen), BATCH)]
    return sum(losses) / len(losses)


def _tokens_and_targets(model: Transformer, windows: NDArray[numpy.uint8]) -> tuple[Array, Array]:
    """Each byte but the last, and the byte after each."""
    tokens = model.xp.asarray(windows.astype(numpy.int64))
    return tokens[:, :-1], tokens[:, 1:]
