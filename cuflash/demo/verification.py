"""Two proofs beside the training: results against the float64 formula, and peak memory against attention that stores its scores.

The judge is `cuflash.reference`: the error of a result may be at most about twice the error that the plain formula makes when it is computed in the
same precision.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy

import cuflash
from cuflash import reference
from cuflash.demo.products import dot
from cuflash.demo.transformer import Array, narrow, operand

CHECK_SHAPE = (1, 2000, 4, 64)
"""(batch, seqlen, heads, head_dim): long enough for many tiles, and no multiple of any."""


@dataclass(frozen=True)
class Verdict:
    """One result beside the truth.

    Attributes:
        name: of the result.
        error: largest absolute error.
        naive_error: that of the plain formula in the same precision.
        complaint: what `reference.compare` objects to; empty when it does not.
    """

    name: str
    error: float
    naive_error: float
    complaint: str


@dataclass(frozen=True)
class Memory:
    """Peak bytes that forward and backward take beyond their inputs."""

    cuflash: int
    standard: int


class Case:
    """Random operands of `CHECK_SHAPE` on the array library's device, and the calls on them."""

    def __init__(self, xp: Any, dtype: str, seed: int, shape: tuple[int, int, int, int] = CHECK_SHAPE) -> None:
        self.xp, self.dtype = xp, dtype
        generator = numpy.random.default_rng(seed)
        values = generator.standard_normal((4, *shape), dtype=numpy.float32)
        self.query, self.key, self.value, self.grad_out = (operand(narrow(xp.asarray(each), dtype), dtype) for each in values)

    def run(self) -> dict[str, Any]:
        """All results of a forward and a backward call, by name."""
        out, lse = cuflash.scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True, return_lse=True)
        gradients = cuflash.scaled_dot_product_attention_backward(self.grad_out, self.query, self.key, self.value, out, lse, is_causal=True)
        return {"out": out, "lse": lse, **{f"grad_{name}": gradient for name, gradient in gradients._asdict().items()}}

    def plans(self) -> tuple[cuflash.Plan, cuflash.Plan]:
        """What `run` launches, forward and backward."""
        operands = (self.query, self.key, self.value)
        forward = cuflash.plan(*operands, is_causal=True, return_lse=True)
        return forward, cuflash.plan(*operands, is_causal=True, backward=True)

    def verify(self) -> list[Verdict]:
        """Compare every result with the float64 formula."""
        query, key, value, grad_out = (reference.to_float64(x) for x in (self.query, self.key, self.value, self.grad_out))
        precision = cast(reference.Precision, self.dtype)
        truth = (
            *reference.attention(query, key, value, is_causal=True),
            *reference.attention_backward(grad_out, query, key, value, is_causal=True),
        )
        naive = (
            *reference.attention_naive(query, key, value, precision, is_causal=True),
            *reference.attention_naive_backward(grad_out, query, key, value, precision, is_causal=True),
        )
        judged = zip(self.run().items(), truth, naive, strict=True)
        return [self._judge(name, got, want, yardstick) for (name, got), want, yardstick in judged]

    def _judge(self, name: str, got: Any, want: Array, naive: Array) -> Verdict:
        complaint = ""
        try:
            reference.compare(got, want, naive, name=name, dtype="float32" if name == "lse" else self.dtype)
        except AssertionError as error:
            complaint = str(error)
        largest = [float(numpy.abs(each - want).max()) for each in (reference.to_float64(got), naive)]
        return Verdict(name, largest[0], largest[1], complaint)

    def measure_memory(self) -> Memory:
        """Peak memory of `run`, and of the same computation with the scores of every pair in memory."""
        query, key, value, grad_out = (
            self.xp.asarray(reference.to_float64(x), "float32") for x in (self.query, self.key, self.value, self.grad_out)
        )
        self.run()  # compiles, so that only arrays are counted below
        return Memory(_peak(self.xp, self.run), _peak(self.xp, lambda: standard_attention(self.xp, query, key, value, grad_out)))


def standard_attention(xp: Any, query: Array, key: Array, value: Array, grad_out: Array) -> tuple[Array, ...]:
    """Causal attention and its gradients as matrix products and a softmax, float32: out, grad_query, grad_key, grad_value."""
    q, k, v, grad = (x.transpose(0, 2, 1, 3) for x in (query, key, value, grad_out))
    scale = float(q.shape[3] ** -0.5)
    weights = dot(q, k.transpose(0, 1, 3, 2)) * xp.float32(scale)
    weights += xp.triu(xp.full(weights.shape[2:], -xp.inf, xp.float32), 1)
    weights = xp.exp(weights - weights.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = dot(weights, v)
    grad_scores = weights * (dot(grad, v.transpose(0, 1, 3, 2)) - (grad * out).sum(axis=-1, keepdims=True)) * xp.float32(scale)
    results = out, dot(grad_scores, k), dot(grad_scores.transpose(0, 1, 3, 2), q), dot(weights.transpose(0, 1, 3, 2), grad)
    return tuple(x.transpose(0, 2, 1, 3) for x in results)


def _peak(xp: Any, call: Callable[[], Any]) -> int:
    """Most bytes in use at a time by arrays that `call` makes: from a pool of its own with CuPy, traced with NumPy."""
    if xp is numpy:
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    pool = xp.cuda.MemoryPool()
    with xp.cuda.using_allocator(pool.malloc):
        call()
        return int(pool.total_bytes())
