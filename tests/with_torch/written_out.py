"""The judge: attention written out in torch's float64, whose gradients autograd gives, and how far float32 kernels may be from it."""

from __future__ import annotations

from typing import Any

import torch

SHAPE = (2, 2, 48, 32)
"""(batch, heads, seqlen, head_dim) of most tests, which so share their kernels."""


def leaves(device: Any, *shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[Any]:
    """Normal random tensors that require grad."""
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *, is_causal: bool = False, scale: float | None = None, sinks: Any = None, kept: Any = None,
    dropout_p: float = 0.0, bottom_right: bool = False, window: tuple[int, int] = (-1, -1), softcap: float = 0.0, slopes: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(out, lse) of (…, heads, seqlen, head_dim) in float64; grouped heads as they come."""
    query, key, value = query.double(), key.double(), value.double()
    if key.dim() > 2 and query.shape[-3] != key.shape[-3] != 1:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.mT)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seqlen_q, seqlen_kv = scores.shape[-2:]
    rows, columns = torch.arange(seqlen_q)[:, None].to(query.device), torch.arange(seqlen_kv).to(query.device)
    distance = columns - rows - (seqlen_kv - seqlen_q if bottom_right else 0)
    if slopes is not None:
        scores = scores - slopes.double()[..., None, None] * distance.abs()
    visible = (distance <= 0) if is_causal else torch.ones_like(distance, dtype=torch.bool)
    left, right = window
    visible = visible & ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            scores = scores + attn_mask.double()
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
    probabilities = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    if kept is not None:
        probabilities = probabilities * kept / (1.0 - dropout_p)
    return probabilities @ value, lse


def assert_close(got: Any, want: Any, name: str = "") -> None:
    """float32 results within 2⁻¹⁶ of the largest number; 16-bit ones within what their type can hold."""
    bound = {torch.float32: 2.0**-16, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}[got.dtype]
    assert got.shape == want.shape, name
    assert torch.isfinite(got).all(), name
    assert (got.double() - want.double()).abs().max() <= bound * want.abs().max().clamp(min=1e-3), name


def assert_same_gradients(results: tuple[Any, ...], wanted: tuple[Any, ...], inputs: list[Any]) -> None:
    """Results, and their gradients by every input for random gradients of the results."""
    for got, want in zip(results, wanted, strict=True):
        assert_close(got, want, "result")
    grads = [torch.randn_like(got) for got in results]
    got = torch.autograd.grad(results, inputs, grads)
    want = torch.autograd.grad(wanted, inputs, [grad.double() for grad in grads])
    for i, (a, b, x) in enumerate(zip(got, want, inputs, strict=True)):
        assert a.dtype == x.dtype
        assert a.shape == x.shape
        assert_close(a, b, f"gradient {i}")
