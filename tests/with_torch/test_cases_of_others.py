"""The cases by which torch tests its function and flash-attn its own, at sizes for the simulator, judged by their tolerances. Every run takes a sample of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from cuflash.flash_attn import flash_attn_func
from cuflash.torch import scaled_dot_product_attention

# --- torch --------------------------------------------------------------------------------------------------------------------------------

MASKS = ["none", "boolean", "additive", "of_keys", "of_heads", "causal"]


@pytest.mark.sample(8)
@pytest.mark.parametrize("ranks", [3, 4, 5])
@pytest.mark.parametrize("seqlens", [(8, 8), (8, 24), (33, 17), (64, 64)], ids=str)
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("grouped", [False, True], ids=["heads", "gqa"])
def test_cases_of_torch(device: Any, mask_kind: str, seqlens: tuple[int, int], ranks: int, grouped: bool) -> None:
    """Shapes, masks, grouped heads and a scale: torch's results and gradients in float64, to torch's tolerances of float32."""
    leading = (2, 2)[: ranks - 3]
    seqlen_q, seqlen_kv = seqlens
    shapes = [(*leading, 4, seqlen_q, 32), *[(*leading, 2 if grouped else 4, seqlen_kv, 32)] * 2]
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    batch = (*leading[:1], *(1,) * (len(leading) - 1))
    visible = torch.rand(seqlen_q, seqlen_kv, device=device) < 0.7
    visible[:, 0] = True
    mask = {
        "none": None, "causal": None, "boolean": visible, "additive": torch.randn(seqlen_q, seqlen_kv, device=device),
        "of_keys": torch.arange(seqlen_kv, device=device) < torch.tensor([[seqlen_kv // 2 + 1]], device=device),
        "of_heads": torch.randn(*batch, 4, 1, seqlen_kv, device=device),
    }[mask_kind]  # fmt: skip
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    given = None if mask is None or mask.dtype == torch.bool else mask.double()
    options: dict[str, Any] = {"is_causal": mask_kind == "causal", "scale": 0.3, "enable_gqa": grouped}
    want = torch_attention(*doubles, mask if given is None else given, **options)
    got = scaled_dot_product_attention(*inputs, mask, **options)
    torch.testing.assert_close(got.double(), want, rtol=1.3e-6 * 4, atol=1e-5)
    grad_out = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, inputs, grad_out), torch.autograd.grad(want, doubles, grad_out.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1.3e-6 * 4, atol=3e-5)


# --- flash-attn ---------------------------------------------------------------------------------------------------------------------------

SEQLENS = [(113, 203), (128, 217), (108, 256), (256, 128), (64, 128), (1023, 1024)]
HEAD_DIMS = [32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256]


@pytest.mark.sample(4)
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("seen", ["full", "causal", "local", "causal_local"])
@pytest.mark.parametrize("score", ["plain", "alibi", "softcap"])
def test_cases_of_flash_attn(device: Any, seqlens: tuple[int, int], d: int, seen: str, score: str) -> None:
    """flash-attn's bound: no further from float64 than twice what attention written out in the same type is. Types and key heads take turns."""
    turn = SEQLENS.index(seqlens) + HEAD_DIMS.index(d)
    dtype, heads_kv = (torch.float16, torch.bfloat16)[turn % 2], 1 + turn // 2 % 2
    if seqlens[0] > 256:
        d = min(d, 64)  # what the simulator does in a second
    seqlen_q, seqlen_k = seqlens
    torch.manual_seed(d + seqlen_q)
    q = torch.randn(1, seqlen_q, 2, d, device=device, dtype=dtype).requires_grad_()
    k, v = (torch.randn(1, seqlen_k, heads_kv, d, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    left, right = (20, 0 if seen == "causal_local" else 9) if "local" in seen else (-1, -1)
    is_causal = "causal" in seen
    slopes = torch.rand(2, device=device) * 0.3 if score == "alibi" else None
    softcap = 15.0 if score == "softcap" else 0.0
    out = flash_attn_func(q, k, v, causal=is_causal, window_size=(left, right), softcap=softcap, alibi_slopes=slopes, deterministic=True)

    def written_out(kind: Any) -> tuple[Any, list[Any]]:
        """Scores and probabilities in one type; rows that see nothing give zero."""
        inputs = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        heads = [x.transpose(1, 2).repeat_interleave(2 // x.shape[2], 1) for x in inputs]
        scores = (heads[0] * d**-0.5) @ heads[1].mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(seqlen_k, device=device) - torch.arange(seqlen_q, device=device)[:, None] - (seqlen_k - seqlen_q)
        if slopes is not None:
            scores = scores - (slopes[:, None, None] * distance.abs()).to(kind)
        visible = torch.ones_like(distance, dtype=torch.bool)
        if is_causal:
            visible &= distance <= 0
        if left >= 0:
            visible &= (distance >= -left) & (distance <= right)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible.any(1)[:, None], 0.0)
        return (weights @ heads[2]).transpose(1, 2), inputs

    grad_out = torch.randn_like(out)
    results = {}
    for kind in (torch.float64, dtype):
        made, inputs = written_out(kind)
        results[kind] = [made, *torch.autograd.grad(made, inputs, grad_out.to(kind))]
    for name, got, want, naive in zip(
        ("out", "dq", "dk", "dv"),
        [out, *torch.autograd.grad(out, (q, k, v), grad_out)],
        results[torch.float64],
        results[dtype],
        strict=True,
    ):
        want = torch.nan_to_num(want)
        error, of_naive = ((x.double() - want).abs().max() for x in (got, torch.nan_to_num(naive)))
        assert error <= 2 * of_naive + 1e-5, f"{name}: {error:.2e} against {of_naive:.2e}"
