"""Attention, forward and backward: products whose left operand comes from registers, softmax over tiles, causal edges, transposed operands."""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from cases import Array, Case, Mapped, Output, assert_within, normals

from cuflash.reference import attention, attention_backward, attention_naive, attention_naive_backward, compare

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_forward(
    query, key, value, out, lse, seqlen, scale, IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One head: rows of one tile of queries against all keys, with a running maximum and sum."""
    first = tl.program_id(0) * BLOCK_Q
    rows, columns = first + tl.arange(0, BLOCK_Q), tl.arange(0, D)
    q = tl.load(query + rows[:, None] * D + columns[None, :], mask=rows[:, None] < seqlen, other=0.0)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, D), tl.float32)
    end = tl.minimum(first + BLOCK_Q, seqlen) if IS_CAUSAL else seqlen
    for start in range(0, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = tl.load(key + keys[None, :] * D + columns[:, None], mask=keys[None, :] < seqlen, other=0.0)
        v = tl.load(value + keys[:, None] * D + columns[None, :], mask=keys[:, None] < seqlen, other=0.0)
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
    tl.store(out + rows[:, None] * D + columns[None, :], (total / denominator[:, None]).to(q.dtype), mask=rows[:, None] < seqlen)
    tl.store(lse + rows, largest / LOG2_E + tl.log(denominator), mask=rows < seqlen)


@triton.jit
def attention_delta(out, grad_out, delta, D: tl.constexpr, BLOCK: tl.constexpr):
    """delta = Σ out · grad_out of each row."""
    rows, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    products = tl.load(out + rows[:, None] * D + columns).to(tl.float32) * tl.load(grad_out + rows[:, None] * D + columns).to(tl.float32)
    tl.store(delta + rows, tl.sum(products, 1))


@triton.jit
def attention_backward_kv(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, seqlen, scale,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys: the scores are computed transposed, so that both products take them from registers."""
    first = tl.program_id(0) * BLOCK_K
    keys, columns = first + tl.arange(0, BLOCK_K), tl.arange(0, D)
    k = tl.load(key + keys[:, None] * D + columns)
    v = tl.load(value + keys[:, None] * D + columns)
    dk = tl.zeros((BLOCK_K, D), tl.float32)
    dv = tl.zeros((BLOCK_K, D), tl.float32)
    begin = first // BLOCK_Q * BLOCK_Q if IS_CAUSAL else 0
    for start in range(begin, seqlen, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q = tl.load(query + rows[:, None] * D + columns)
        do = tl.load(grad_out + rows[:, None] * D + columns)
        p = tl.exp2((tl.dot(k, q.T) * scale - tl.load(lse + rows)[None, :]) * LOG2_E)
        if IS_CAUSAL:
            p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
        dv = tl.dot(p.to(q.dtype), do, dv)
        ds = p * (tl.dot(v, do.T) - tl.load(delta + rows)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    tl.store(grad_key + keys[:, None] * D + columns, (dk * scale).to(k.dtype))
    tl.store(grad_value + keys[:, None] * D + columns, dv.to(k.dtype))


@triton.jit
def attention_backward_q(
    query, key, value, grad_out, lse, delta, grad_query, seqlen, scale,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries."""
    first = tl.program_id(0) * BLOCK_Q
    rows, columns = first + tl.arange(0, BLOCK_Q), tl.arange(0, D)
    q = tl.load(query + rows[:, None] * D + columns)
    do = tl.load(grad_out + rows[:, None] * D + columns)
    row_lse, row_delta = tl.load(lse + rows), tl.load(delta + rows)
    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    end = first + BLOCK_Q if IS_CAUSAL else seqlen
    for start in range(0, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = tl.load(key + keys[:, None] * D + columns)
        v = tl.load(value + keys[:, None] * D + columns)
        p = tl.exp2((tl.dot(q, k.T) * scale - row_lse[:, None]) * LOG2_E)
        if IS_CAUSAL:
            p = tl.where(rows[:, None] >= keys[None, :], p, 0.0)
        ds = p * (tl.dot(do, v.T) - row_delta[:, None])
        dq = tl.dot(ds.to(q.dtype), k, dq)
    tl.store(grad_query + rows[:, None] * D + columns, (dq * scale).to(q.dtype))


@triton.jit
def attention_mapped(
    query, key, value, out, seqlen, scale, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPECIALIZE: tl.constexpr
):
    """The forward pass without a mask, its operands copied by tensor maps, and where asked for by warps that do nothing else."""
    first = tl.program_id(0) * BLOCK_Q
    q = query.load([first, 0])
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, D), tl.float32)
    for start in tl.range(0, seqlen, BLOCK_K, warp_specialize=SPECIALIZE):
        scores = tl.dot(q, key.load([start, 0]).T) * (scale * LOG2_E)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        rescale = tl.exp2(largest - new_largest)
        denominator = denominator * rescale + tl.sum(weights, 1)
        total = tl.dot(weights.to(q.dtype), value.load([start, 0]), total * rescale[:, None])
        largest = new_largest
    out.store([first, 0], (total / denominator[:, None]).to(q.dtype))


class Problem:
    """One head of attention with everything that the kernels take and what has to come out in float64."""

    def __init__(self, dtype: str, seqlen: int, head_dim: int, is_causal: bool) -> None:
        self.dtype, self.seqlen, self.head_dim, self.is_causal = dtype, seqlen, head_dim, is_causal
        self.scale = head_dim**-0.5
        self.query, self.key, self.value, self.grad_out = (normals((seqlen, head_dim), dtype, seed) for seed in range(4))
        self.inputs = tuple(x[None, :, None, :] for x in (self.query, self.key, self.value))
        self.options: dict[str, Any] = {"is_causal": is_causal}

    @functools.cached_property
    def forward(self) -> tuple[Array, Array]:
        return attention(*self.inputs, **self.options)

    @functools.cached_property
    def saved(self) -> tuple[Array, Array, Array]:
        """Output, LSE and delta as a forward pass hands them on."""
        out, lse = self.forward
        rounded = out[0, :, 0].astype(self.query.dtype)
        delta = (rounded.astype("float64") * self.grad_out.astype("float64")).sum(1)
        return rounded, lse[0, 0].astype("float32"), delta.astype("float32")

    def check_forward(self, outputs: list[Array]) -> None:
        out, lse = self.forward
        naive, _ = attention_naive(*self.inputs, self.dtype, **self.options)
        _, naive_lse = attention_naive(*self.inputs, "float32", **self.options)
        compare(outputs[0][None, :, None, :], out, naive, name="out", dtype=self.dtype)
        if len(outputs) > 1:
            compare(outputs[1][None, None], lse, naive_lse, name="lse", dtype="float32")

    def check_gradients(self, names: tuple[str, ...], outputs: list[Array]) -> None:
        grad_out = self.grad_out[None, :, None, :]
        want = attention_backward(grad_out, *self.inputs, **self.options)
        naive = attention_naive_backward(grad_out, *self.inputs, self.dtype, **self.options)
        for name, got in zip(names, outputs, strict=True):
            compare(got[None, :, None, :], getattr(want, name), getattr(naive, name), name=f"gradient of {name}", dtype=self.dtype)


def forward_case(
    dtype: str, arch: str, is_causal: bool, seqlen: int = 200, head_dim: int = 64, blocks: tuple[int, int] = (64, 32), **more: Any
) -> Case:
    """`seqlen` is no multiple of a tile."""
    problem = Problem(dtype, seqlen, head_dim, is_causal)
    x = problem
    arguments = lambda: [x.query, x.key, x.value, Output((seqlen, head_dim), dtype), Output((seqlen,), "float32"), seqlen, x.scale]  # noqa: E731
    constants = {"IS_CAUSAL": is_causal, "D": head_dim, "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1]}
    name = f"attention-{dtype}-{'causal' if is_causal else 'full'}-{head_dim}"
    return Case(name, attention_forward, arch, (-(-seqlen // blocks[0]),), arguments, problem.check_forward, constants, **more)


def mapped_forward_case(dtype: str, specialize: bool, blocks: tuple[int, int] = (64, 64), head_dim: int = 64, **more: Any) -> Case:
    problem = Problem(dtype, 192 if blocks[0] == 64 else 256, head_dim, False)

    def arguments() -> list:
        tensors = [
            (problem.query, blocks[0]),
            (problem.key, blocks[1]),
            (problem.value, blocks[1]),
            (Output(problem.query.shape, dtype), blocks[0]),
        ]
        return [*(Mapped(array, (rows, head_dim)) for array, rows in tensors), problem.seqlen, problem.scale]

    constants = {"D": head_dim, "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1], "SPECIALIZE": specialize}
    name = f"mapped-attention-{dtype}-{head_dim}{'-specialized' if specialize else ''}"
    return Case(name, attention_mapped, "sm_90", (problem.seqlen // blocks[0],), arguments, problem.check_forward, constants, **more)


def backward_cases_of(dtype: str, arch: str, is_causal: bool, head_dim: int = 64, **more: Any) -> list[Case]:
    """All kernels of the backward pass, each on what the one before has to hand on."""
    problem = Problem(dtype, 128, head_dim, is_causal)
    grad = Output((problem.seqlen, head_dim), dtype)
    constants = {"IS_CAUSAL": is_causal, "D": head_dim, "BLOCK_Q": 64, "BLOCK_K": 64}
    name = f"{dtype}-{'causal' if is_causal else 'full'}-{head_dim}"

    def arguments(count: int) -> list:
        _, lse, delta = problem.saved
        grads = [grad] * count
        return [problem.query, problem.key, problem.value, problem.grad_out, lse, delta, *grads, problem.seqlen, problem.scale]

    def check_delta(outputs: list[Array]) -> None:
        out, _, _ = problem.saved
        terms = out.astype("float64") * problem.grad_out.astype("float64")
        assert_within(outputs[0], terms.sum(1), head_dim * 2.0**-24 * abs(terms).sum(1))

    return [
        Case(
            f"attention-delta-{name}", attention_delta, arch, (4,), lambda: [problem.saved[0], problem.grad_out, Output((128,), "float32")], check_delta,
            {"D": head_dim, "BLOCK": 32}, **more,
        ),
        Case(
            f"attention-grad-kv-{name}", attention_backward_kv, arch, (2,), functools.partial(arguments, 2),
            functools.partial(problem.check_gradients, ("key", "value")), constants, stages=2, **more,
        ),
        Case(
            f"attention-grad-q-{name}", attention_backward_q, arch, (2,), functools.partial(arguments, 1),
            functools.partial(problem.check_gradients, ("query",)), constants, stages=2, **more,
        ),
    ]  # fmt: skip


def attention_cases() -> list[Case]:
    cases = []
    for arch in ("sm_80", "sm_90"):
        cases += [forward_case("float16", arch, is_causal) for is_causal in (False, True)]
        cases.append(forward_case("bfloat16", arch, True, seqlen=256, head_dim=128, blocks=(128, 64), warps=8, exhaustive=arch == "sm_80"))
        cases.append(forward_case("bfloat16", arch, False, head_dim=32, exhaustive=True))
        for dtype in ("float16", "bfloat16"):
            for is_causal in (False, True):
                cases += backward_cases_of(
                    dtype, arch, is_causal, exhaustive=(dtype == "float16") == is_causal or (arch, dtype) == ("sm_80", "bfloat16")
                )
    for dtype in ("float16", "bfloat16"):
        cases += [mapped_forward_case(dtype, specialize) for specialize in (False, True)]
    cases.append(mapped_forward_case("bfloat16", True, blocks=(128, 64), head_dim=128, warps=8, stages=2))
    return cases
