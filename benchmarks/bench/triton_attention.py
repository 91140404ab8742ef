"""Attention written in Triton, forward and backward, as a user of Triton writes it: what cuflash is compared with where Triton is installed.

Contract of the kernels: arrays are contiguous, (batch, seqlen, heads, head_dim), query's heads are key's, head_dim is a power of two; lse and delta are
(batch, heads, seqlen). The forward pass takes any length, the backward pass multiples of its blocks. Programs: blocks of rows, heads, sequences.

tests/simulator_against_triton runs the kernels on the simulator; `Attention` needs a GPU, and torch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_of_head(seqlen, row_stride, D: tl.constexpr):
    """Where the rows of this program's head begin in an array, and in those that have one number for each row."""
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    return sequence * seqlen * row_stride + head * D, (sequence * tl.num_programs(1) + head) * seqlen


@triton.jit
def attention_forward(
    query, key, value, out, lse, seqlen, row_stride, scale,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One head: rows of one tile of queries against all keys, with a running maximum and sum."""
    at, of_rows = first_of_head(seqlen, row_stride, D)
    query, key, value, out = query + at, key + at, value + at, out + at
    lse = lse + of_rows
    first = tl.program_id(0) * BLOCK_Q
    rows, columns = first + tl.arange(0, BLOCK_Q), tl.arange(0, D)
    q = tl.load(query + rows[:, None] * row_stride + columns[None, :], mask=rows[:, None] < seqlen, other=0.0)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, D), tl.float32)
    end = tl.minimum(first + BLOCK_Q, seqlen) if IS_CAUSAL else seqlen
    for start in range(0, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = tl.load(key + keys[None, :] * row_stride + columns[:, None], mask=keys[None, :] < seqlen, other=0.0)
        v = tl.load(value + keys[:, None] * row_stride + columns[None, :], mask=keys[:, None] < seqlen, other=0.0)
        visible = keys[None, :] < seqlen
        if IS_CAUSAL:
            visible &= rows[:, None] >= keys[None, :]
        scores = tl.where(visible, tl.dot(q, k) * (scale * LOG2_E), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        rescale = tl.exp2(largest - new_largest)
        denominator = denominator * rescale + tl.sum(weights, 1)
        total = tl.dot(weights.to(q.dtype), v, total * rescale[:, None])
        largest = new_largest
    tl.store(out + rows[:, None] * row_stride + columns[None, :], (total / denominator[:, None]).to(q.dtype), mask=rows[:, None] < seqlen)
    tl.store(lse + rows, largest / LOG2_E + tl.log(denominator), mask=rows < seqlen)


@triton.jit
def attention_delta(out, grad_out, delta, seqlen, row_stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """delta = Σ out · grad_out of each row."""
    at, of_rows = first_of_head(seqlen, row_stride, D)
    out, grad_out = out + at, grad_out + at
    delta = delta + of_rows
    rows, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    products = tl.load(out + rows[:, None] * row_stride + columns).to(tl.float32) * tl.load(
        grad_out + rows[:, None] * row_stride + columns
    ).to(tl.float32)
    tl.store(delta + rows, tl.sum(products, 1))


@triton.jit
def attention_backward_kv(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, seqlen, row_stride, scale,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys: the scores are computed transposed, so that both products take them from registers."""
    at, of_rows = first_of_head(seqlen, row_stride, D)
    query, key, value = query + at, key + at, value + at
    grad_out, grad_key, grad_value = grad_out + at, grad_key + at, grad_value + at
    lse, delta = lse + of_rows, delta + of_rows
    first = tl.program_id(0) * BLOCK_K
    keys, columns = first + tl.arange(0, BLOCK_K), tl.arange(0, D)
    k = tl.load(key + keys[:, None] * row_stride + columns)
    v = tl.load(value + keys[:, None] * row_stride + columns)
    dk = tl.zeros((BLOCK_K, D), tl.float32)
    dv = tl.zeros((BLOCK_K, D), tl.float32)
    begin = first // BLOCK_Q * BLOCK_Q if IS_CAUSAL else 0
    for start in range(begin, seqlen, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q = tl.load(query + rows[:, None] * row_stride + columns)
        do = tl.load(grad_out + rows[:, None] * row_stride + columns)
        p = tl.exp2((tl.dot(k, q.T) * scale - tl.load(lse + rows)[None, :]) * LOG2_E)
        if IS_CAUSAL:
            p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
        dv = tl.dot(p.to(q.dtype), do, dv)
        ds = p * (tl.dot(v, do.T) - tl.load(delta + rows)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    tl.store(grad_key + keys[:, None] * row_stride + columns, (dk * scale).to(k.dtype))
    tl.store(grad_value + keys[:, None] * row_stride + columns, dv.to(k.dtype))


@triton.jit
def attention_backward_q(
    query, key, value, grad_out, lse, delta, grad_query, seqlen, row_stride, scale,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries."""
    at, of_rows = first_of_head(seqlen, row_stride, D)
    query, key, value = query + at, key + at, value + at
    grad_out, grad_query = grad_out + at, grad_query + at
    lse, delta = lse + of_rows, delta + of_rows
    first = tl.program_id(0) * BLOCK_Q
    rows, columns = first + tl.arange(0, BLOCK_Q), tl.arange(0, D)
    q = tl.load(query + rows[:, None] * row_stride + columns)
    do = tl.load(grad_out + rows[:, None] * row_stride + columns)
    row_lse, row_delta = tl.load(lse + rows), tl.load(delta + rows)
    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    end = first + BLOCK_Q if IS_CAUSAL else seqlen
    for start in range(0, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = tl.load(key + keys[:, None] * row_stride + columns)
        v = tl.load(value + keys[:, None] * row_stride + columns)
        p = tl.exp2((tl.dot(q, k.T) * scale - row_lse[:, None]) * LOG2_E)
        if IS_CAUSAL:
            p = tl.where(rows[:, None] >= keys[None, :], p, 0.0)
        ds = p * (tl.dot(do, v.T) - row_delta[:, None])
        dq = tl.dot(ds.to(q.dtype), k, dq)
    tl.store(grad_query + rows[:, None] * row_stride + columns, (dq * scale).to(q.dtype))


class Attention:
    """Both passes on torch's CUDA tensors.

    Args:
        arrays: query, key, value and grad_out, (batch, seqlen, heads, head_dim).

    The gradients are of the last forward pass; the results are written over by the next call.
    """

    def __init__(self, arrays: dict[str, Any], *, is_causal: bool) -> None:
        query = arrays["query"]
        self._inputs = [arrays[name].contiguous() for name in ("query", "key", "value")]
        self._grad_out = arrays["grad_out"].contiguous()
        self._batch, self._seqlen, self._heads, head_dim = query.shape
        self._numbers = (self._seqlen, self._heads * head_dim)
        self._scale, self._head_dim, self._is_causal = head_dim**-0.5, head_dim, is_causal
        self.out, *self.gradients = (query.new_empty(query.shape) for _ in range(4))
        self._lse, self._delta = (query.new_empty((self._batch, self._heads, self._seqlen), dtype=self._torch.float32) for _ in range(2))

    @property
    def _torch(self) -> Any:
        import torch

        return torch

    def _grid(self, rows: int) -> tuple[int, int, int]:
        return (triton.cdiv(self._seqlen, rows), self._heads, self._batch)

    def forward(self) -> Any:
        """The output; the LSE is kept for `backward`."""
        block_q, block_k, warps, stages = FORWARD_BLOCKS[self._head_dim]
        attention_forward[self._grid(block_q)](
            *self._inputs, self.out, self._lse, *self._numbers, self._scale, IS_CAUSAL=self._is_causal, D=self._head_dim, BLOCK_Q=block_q,
            BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return self.out

    def backward(self) -> list[Any]:
        """The gradients of query, key and value."""
        rows, warps, stages = BACKWARD_BLOCKS[self._head_dim]
        attention_delta[self._grid(32)](self.out, self._grad_out, self._delta, *self._numbers, D=self._head_dim, BLOCK=32)
        grad_query, grad_key, grad_value = self.gradients
        for kernel, results in ((attention_backward_kv, (grad_key, grad_value)), (attention_backward_q, (grad_query,))):
            kernel[self._grid(rows)](
                *self._inputs, self._grad_out, self._lse, self._delta, *results, *self._numbers, self._scale, IS_CAUSAL=self._is_causal,
                D=self._head_dim, BLOCK_Q=rows, BLOCK_K=rows, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return self.gradients


FORWARD_BLOCKS = {32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)}
"""head_dim -> rows of queries and of keys, warps, stages: what Triton's own tutorial and a few tries of others settle on; nothing searches here."""
BACKWARD_BLOCKS = {32: (64, 4, 2), 64: (64, 4, 2), 128: (64, 8, 2), 256: (32, 8, 1)}
"""head_dim -> rows of both, warps, stages."""
