"""Attention, forward and backward: products whose left operand comes from registers, softmax over tiles, causal edges, transposed operands."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import triton
import triton.language as tl
from cases import Array, Case, Mapped, Output, assert_within, normals

from bench.triton_attention import LOG2_E, attention_backward_kv, attention_backward_q, attention_delta, attention_forward
from cuflash.reference import attention, attention_backward, attention_naive, attention_naive_backward, compare


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
    """Attention with everything that the kernels take and what has to come out in float64."""

    def __init__(self, dtype: str, seqlen: int, head_dim: int, is_causal: bool, batch: int = 1, heads: int = 1) -> None:
        self.dtype, self.seqlen, self.head_dim, self.is_causal = dtype, seqlen, head_dim, is_causal
        self.batch, self.heads, self.scale = batch, heads, head_dim**-0.5
        self.shape = (batch, seqlen, heads, head_dim)
        self.query, self.key, self.value, self.grad_out = (normals(self.shape, dtype, seed) for seed in range(4))
        self.inputs = (self.query, self.key, self.value)
        self.options: dict[str, Any] = {"is_causal": is_causal}

    @functools.cached_property
    def forward(self) -> tuple[Array, Array]:
        return attention(*self.inputs, **self.options)

    @functools.cached_property
    def saved(self) -> tuple[Array, Array, Array]:
        """Output, LSE and delta as a forward pass hands them on."""
        out, lse = self.forward
        rounded = out.astype(self.query.dtype)
        delta = numpy.einsum("bshd,bshd->bhs", rounded.astype("float64"), self.grad_out.astype("float64"))
        return rounded, lse.astype("float32"), delta.astype("float32")

    @property
    def rows(self) -> Output:
        """A number for each row."""
        return Output((self.batch, self.heads, self.seqlen), "float32")

    @property
    def numbers(self) -> list[Any]:
        """The kernels' arguments behind the arrays: the length, and from one row to the next."""
        return [self.seqlen, self.heads * self.head_dim]

    def grid(self, block: int) -> tuple[int, int, int]:
        return (-(-self.seqlen // block), self.heads, self.batch)

    def check_forward(self, outputs: list[Array]) -> None:
        out, lse = self.forward
        naive, _ = attention_naive(*self.inputs, self.dtype, **self.options)
        _, naive_lse = attention_naive(*self.inputs, "float32", **self.options)
        compare(outputs[0].reshape(self.shape), out, naive, name="out", dtype=self.dtype)
        if len(outputs) > 1:
            compare(outputs[1], lse, naive_lse, name="lse", dtype="float32")

    def check_gradients(self, names: tuple[str, ...], outputs: list[Array]) -> None:
        want = attention_backward(self.grad_out, *self.inputs, **self.options)
        naive = attention_naive_backward(self.grad_out, *self.inputs, self.dtype, **self.options)
        for name, got in zip(names, outputs, strict=True):
            compare(got, getattr(want, name), getattr(naive, name), name=f"gradient of {name}", dtype=self.dtype)


def forward_case(
    dtype: str, arch: str, is_causal: bool, seqlen: int = 200, head_dim: int = 64, blocks: tuple[int, int] = (64, 32),
    batch: int = 1, heads: int = 1, **more: Any,
) -> Case:  # fmt: skip
    """`seqlen` is no multiple of a tile."""
    problem = Problem(dtype, seqlen, head_dim, is_causal, batch, heads)

    def arguments() -> list:
        return [*problem.inputs, Output(problem.shape, dtype), problem.rows, *problem.numbers, problem.scale]

    constants = {"IS_CAUSAL": is_causal, "D": head_dim, "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1]}
    name = f"attention-{dtype}-{'causal' if is_causal else 'full'}-{head_dim}" + (f"-{batch}x{heads}" if batch * heads > 1 else "")
    return Case(name, attention_forward, arch, problem.grid(blocks[0]), arguments, problem.check_forward, constants, **more)


def mapped_forward_case(dtype: str, specialize: bool, blocks: tuple[int, int] = (64, 64), head_dim: int = 64, **more: Any) -> Case:
    problem = Problem(dtype, 192 if blocks[0] == 64 else 256, head_dim, False)

    def arguments() -> list:
        query, key, value = (x.reshape(-1, head_dim) for x in problem.inputs)
        tensors = [(query, blocks[0]), (key, blocks[1]), (value, blocks[1]), (Output(query.shape, dtype), blocks[0])]
        return [*(Mapped(array, (rows, head_dim)) for array, rows in tensors), problem.seqlen, problem.scale]

    constants = {"D": head_dim, "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1], "SPECIALIZE": specialize}
    name = f"mapped-attention-{dtype}-{head_dim}{'-specialized' if specialize else ''}"
    return Case(name, attention_mapped, "sm_90", (problem.seqlen // blocks[0],), arguments, problem.check_forward, constants, **more)


def backward_cases_of(
    dtype: str, arch: str, is_causal: bool, head_dim: int = 64, batch: int = 1, heads: int = 1, **more: Any
) -> list[Case]:
    """All kernels of the backward pass, each on what the one before has to hand on."""
    problem = Problem(dtype, 128, head_dim, is_causal, batch, heads)
    grad = Output(problem.shape, dtype)
    constants = {"IS_CAUSAL": is_causal, "D": head_dim, "BLOCK_Q": 64, "BLOCK_K": 64}
    name = f"{dtype}-{'causal' if is_causal else 'full'}-{head_dim}" + (f"-{batch}x{heads}" if batch * heads > 1 else "")

    def arguments(count: int) -> list:
        _, lse, delta = problem.saved
        return [*problem.inputs, problem.grad_out, lse, delta, *[grad] * count, *problem.numbers, problem.scale]

    def delta_arguments() -> list:
        return [problem.saved[0], problem.grad_out, problem.rows, *problem.numbers]

    def check_delta(outputs: list[Array]) -> None:
        out, _, _ = problem.saved
        terms = (out.astype("float64") * problem.grad_out.astype("float64")).transpose(0, 2, 1, 3)
        assert_within(outputs[0], terms.sum(3), head_dim * 2.0**-24 * abs(terms).sum(3))

    return [
        Case(f"attention-delta-{name}", attention_delta, arch, problem.grid(32), delta_arguments, check_delta, {"D": head_dim, "BLOCK": 32}, **more),
        Case(
            f"attention-grad-kv-{name}", attention_backward_kv, arch, problem.grid(64), functools.partial(arguments, 2),
            functools.partial(problem.check_gradients, ("key", "value")), constants, stages=2, **more,
        ),
        Case(
            f"attention-grad-q-{name}", attention_backward_q, arch, problem.grid(64), functools.partial(arguments, 1),
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
    cases.append(forward_case("float16", "sm_80", True, seqlen=72, head_dim=32, batch=2, heads=2))  # where heads and sequences begin
    cases += backward_cases_of("float16", "sm_80", True, head_dim=32, batch=2, heads=2)
    for dtype in ("float16", "bfloat16"):
        cases += [mapped_forward_case(dtype, specialize) for specialize in (False, True)]
    cases.append(mapped_forward_case("bfloat16", True, blocks=(128, 64), head_dim=128, warps=8, stages=2))
    return cases
