"""What the trained model writes: a step for each byte, whose keys and values join those before it in a `cuflash.KVCache` of each layer."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

import cuflash
from cuflash.demo.products import dot
from cuflash.demo.transformer import Array, Transformer

_PAGE_SIZE = 16
_TEMPERATURE = 0.7


class Writer:
    """One text that a model continues.

    Attributes:
        caches: one for each layer, float16 whatever attention is trained in.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        heads, head_dim = model.shape.num_heads, model.shape.head_dim
        self.caches = [cuflash.KVCache(1, heads, head_dim, page_size=_PAGE_SIZE, xp=model.xp) for _ in range(model.shape.num_layers)]
        cos, sin = model.rotation
        self._rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}

    def logits(self, tokens: Array) -> Array:
        """Take the tokens `(seqlen,)` that come next; what the model says of each one's successor, `(seqlen, vocabulary)`."""
        model, weights = self._model, self._model.parameters
        x = weights["embedding"][tokens]
        for layer, cache in enumerate(self.caches):
            x = x + self._attention(model.normed(x, f"{layer}.attention"), f"{layer}.attention", cache)
            x = x + model.transformed(model.normed(x, f"{layer}.mlp"), f"{layer}.mlp")
        return dot(model.normed(x, ""), weights["embedding"].T)

    def _attention(self, x: Array, name: str, cache: cuflash.KVCache) -> Array:
        shape, weights = self._model.shape, self._model.parameters
        qkv = dot(x, weights[f"{name}.qkv"]).reshape(1, len(x), 3, shape.num_heads, shape.head_dim).astype("float16")
        out = cache.attend(*(qkv[:, :, index] for index in range(3)), **self._rotary)
        return dot(out.astype("float32").reshape(x.shape), weights[f"{name}.out"])


def write(model: Transformer, prompt: bytes, count: int, seed: int) -> bytes:
    """The prompt and so many bytes more, drawn as the model finds them likely. They have to fit its positions."""
    writer, generator = Writer(model), numpy.random.default_rng(seed)
    tokens = list(prompt)
    next_ones = tokens
    for _ in range(count):
        logits = writer.logits(model.xp.asarray(numpy.array(next_ones, "int32")))[-1]
        next_ones = [_drawn(_on_host(logits), generator)]
        tokens += next_ones
    return bytes(tokens)


def _drawn(logits: NDArray[numpy.float32], generator: numpy.random.Generator) -> int:
    weights = numpy.exp((logits - logits.max()).astype(float) / _TEMPERATURE)
    return int(generator.choice(len(weights), p=weights / weights.sum()))


def _on_host(x: Any) -> NDArray[numpy.float32]:
    return x if isinstance(x, numpy.ndarray) else x.get()
