"""flash-attn's functions: signatures, defaults, results and gradients, over a part of flash-attn's own parametrisation."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from written_out import assert_close, assert_same_gradients, attention, leaves

from cuflash import flash_attn, varlen_plan
from cuflash.errors import ArgumentError, DTypeError, OptionError, ShapeError, UnsupportedError

TAIL = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
PACKED_HEAD = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {TAIL})",
    "flash_attn_qkvpacked_func": f"(qkv, {TAIL})",
    "flash_attn_kvpacked_func": f"(q, kv, {TAIL})",
    "flash_attn_varlen_func": f"(q, k, v, {PACKED_HEAD}, {TAIL}, block_table=None, seqused_k=None)",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {TAIL})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
        "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False, k_descale=None, v_descale=None)"
    ),
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {PACKED_HEAD}, {TAIL})",
}
Q, K = 113, 203  # lengths of flash-attn's tests
HEADS, DIM = 2, 32


def test_signatures_are_those_of_flash_attn_2() -> None:
    """And behind them what flash-attn 3 and vLLM add for caches."""
    assert set(SIGNATURES) == set(flash_attn.__all__)
    for name, signature in SIGNATURES.items():
        found = inspect.signature(getattr(flash_attn, name))
        bare = found.replace(
            parameters=[p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()],
            return_annotation=inspect.Signature.empty,
        )
        assert str(bare) == signature


def judged(q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
    """out in flash-attn's order, and lse."""
    options["bottom_right"] = True
    out, lse = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
    return out.transpose(1, 2), lse


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"causal": True}, {"is_causal": True}),
        ({"softmax_scale": 0.1, "window_size": (30, 10)}, {"scale": 0.1, "window": (30, 10)}),
        ({"causal": True, "window_size": (40, -1), "softcap": 5.0}, {"is_causal": True, "window": (40, -1), "softcap": 5.0}),
        ({"causal": True, "alibi": True, "deterministic": True}, {"is_causal": True, "alibi": True}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_padded_batches(device: Any, given: dict[str, Any], meant: dict[str, Any]) -> None:
    """Grouped heads without asking; without return_attn_probs one result, with it three."""
    inputs = leaves(device, (2, Q, HEADS, DIM), (2, K, 1, DIM), (2, K, 1, DIM))
    if "alibi" in given:
        slopes = torch.rand(2, HEADS, device=device)
        given, meant = (
            {**{k: x for k, x in d.items() if k != "alibi"}, name: slopes} for d, name in ((given, "alibi_slopes"), (meant, "slopes"))
        )
    out, lse, probabilities = flash_attn.flash_attn_func(*inputs, return_attn_probs=True, **given)
    assert probabilities is None
    assert_same_gradients((out, lse), judged(*inputs, **meant), inputs)
    assert torch.equal(flash_attn.flash_attn_func(*inputs, **given), out)


def test_queries_that_see_no_key_give_zero(device: Any) -> None:
    """More queries than keys: the last one sees all keys, the first ones none."""
    inputs = leaves(device, (1, K, HEADS, DIM), (1, Q, HEADS, DIM), (1, Q, HEADS, DIM))
    out = flash_attn.flash_attn_func(*inputs, causal=True)
    assert (out[:, : K - Q] == 0).all()
    assert_same_gradients((out,), judged(*inputs, is_causal=True)[:1], inputs)


def test_dropped_probabilities_are_negative(device: Any) -> None:
    """The kept ones, divided by their share, give out; absolute values of a row add up to 1."""
    q, k, v = leaves(device, (2, Q, HEADS, DIM), (2, K, 1, DIM), (2, K, 1, DIM))
    slopes = torch.rand(HEADS, device=device)
    torch.manual_seed(2)
    out, lse, signed = flash_attn.flash_attn_func(q, k, v, 0.2, None, True, (70, -1), 4.0, slopes, return_attn_probs=True)
    assert (signed.shape, signed.dtype, signed.requires_grad) == ((2, HEADS, Q, K), torch.float32, False)
    assert_close(signed.abs().sum(-1), torch.ones_like(lse))
    assert 0.1 < (signed < 0).sum() / (signed != 0).sum() < 0.3
    assert_close(out.transpose(1, 2), signed.clamp(min=0.0) / 0.8 @ v.transpose(1, 2))
    torch.manual_seed(2)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, 0.2, None, True, (70, -1), 4.0, slopes), out)


def test_packed_forms(device: Any) -> None:
    """Views of one tensor, whose gradient is one tensor: equal to the call on three."""
    (qkv,) = leaves(device, (2, Q, 3, HEADS, DIM))
    q, k, v = (qkv.detach()[:, :, i].clone().requires_grad_() for i in range(3))
    want = flash_attn.flash_attn_func(q, k, v, causal=True)
    grad_out = torch.randn_like(want)
    wanted = torch.stack(torch.autograd.grad(want, (q, k, v), grad_out), 2)
    got = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, qkv, grad_out)[0], wanted)
    kv = qkv.detach()[:, :, 1:].clone().requires_grad_()
    got = flash_attn.flash_attn_kvpacked_func(q, kv, causal=True)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, kv, grad_out)[0], wanted[:, :, 1:])


OFFSETS = [0, 40, 40, 113]


def of_sequences(q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
    """Each sequence on its own, packed again."""
    pairs = [(a, b) for a, b in itertools.pairwise(OFFSETS) if b > a]
    parts = [judged(*(x[None, a:b] for x in (q, k, v)), **options) for a, b in pairs]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)


def test_packed_sequences(device: Any) -> None:
    inputs = leaves(device, (Q, HEADS, DIM), (Q, 1, DIM), (Q, 1, DIM))
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=device)
    out, lse, probabilities = flash_attn.flash_attn_varlen_func(*inputs, offsets, offsets, 73, 73, causal=True, return_attn_probs=True)
    assert probabilities is None
    assert_same_gradients((out, lse), of_sequences(*inputs, is_causal=True), inputs)
    assert torch.equal(flash_attn.flash_attn_varlen_func(*inputs, offsets, offsets, 73, 73, causal=True), out)
    q, k, v = inputs
    assert torch.equal(flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), offsets, offsets, 73, 73, causal=True), out)
    qkv = torch.stack((q, *(x.expand(-1, HEADS, -1) for x in (k, v))), 1)
    assert torch.equal(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, offsets, 73, causal=True), out)


def test_dropped_probabilities_of_packed_sequences(device: Any) -> None:
    q, k, v = leaves(device, (Q, HEADS, DIM), (Q, 1, DIM), (Q, 1, DIM))
    offsets = torch.tensor(OFFSETS, device=device)
    out, _, signed = flash_attn.flash_attn_varlen_func(q, k, v, offsets, offsets, 73, 73, 0.2, causal=True, return_attn_probs=True)
    assert signed.shape == (3, HEADS, 73, 73)
    assert (signed[1] == 0).all()
    assert (signed < 0).any()
    for i, (begin, end) in ((0, (0, 40)), (2, (40, 113))):
        kept = signed[i, :, : end - begin, : end - begin].clamp(min=0.0) / 0.8
        assert_close(out[begin:end].transpose(0, 1), kept @ v[begin:end].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(device: Any, dtype: Any) -> None:
    inputs = leaves(device, *[(2, Q, HEADS, DIM)] * 3, dtype=dtype)
    assert_same_gradients((flash_attn.flash_attn_func(*inputs, causal=True),), judged(*inputs, is_causal=True)[:1], inputs)


# --- A cache ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_step_with_a_cache(device: Any, page_size: int | None) -> None:
    """Lengths of each row, a number for all, or the whole cache; new keys are written into it, rotated as flash-attn rotates them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    q, k, v = random(2, 3, HEADS, DIM), random(2, 3, 1, DIM), random(2, 3, 1, DIM)
    rows = [random(2, 64, 1, DIM) for _ in range(2)]
    table = None
    caches = [x.clone() for x in rows]
    if page_size is not None:
        table = torch.arange(8, dtype=torch.int32, device=device).reshape(2, 4)
        caches = [x.reshape(8, page_size, 1, DIM) for x in caches]
    angles = torch.rand(64, DIM // 4, generator=generator).to(device)
    lengths = torch.tensor([40, 7], dtype=torch.int32, device=device)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q,
        *caches,
        k,
        v,
        angles.cos(),
        angles.sin(),
        cache_seqlens=lengths,
        block_table=table,
        causal=True,
        softmax_scale=0.2,
        return_softmax_lse=True,
    )
    for b, length in enumerate([40, 7]):
        at = slice(length, length + 3)
        new_q, new_k = (rotated(x[b].float(), angles[at]) for x in (q, k))
        keys, values = (torch.cat([x[b, :length], new.to(x.dtype)])[None].float() for x, new in zip(rows, (new_k, v[b]), strict=True))
        want, want_lse = judged(new_q[None].to(torch.bfloat16).float(), keys, values, is_causal=True, scale=0.2)
        torch.testing.assert_close(out[b], want[0].to(torch.bfloat16), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse[b], want_lse[0].to(torch.float32), atol=1e-3, rtol=1e-3)
        for cache, new in zip(caches, (new_k, v[b]), strict=True):
            torch.testing.assert_close(cache.reshape(2, 64, 1, DIM)[b, at], new.to(torch.bfloat16))
    whole = flash_attn.flash_attn_with_kvcache(q, *caches, block_table=table)
    assert torch.equal(whole, flash_attn.flash_attn_with_kvcache(q, *caches, cache_seqlens=64, block_table=table))
    with pytest.raises(OptionError, match="cache_seqlens"):
        flash_attn.flash_attn_with_kvcache(q, *caches, k, v, block_table=table)
    with pytest.raises(ShapeError, match="rotary_cos: got 63 positions; expected at least 64"):
        flash_attn.flash_attn_with_kvcache(q, *caches, k, v, angles[:63], angles[:63], lengths, block_table=table)
    recorded = q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match=r"query: .*Caches have no gradients: .*torch.no_grad\(\), or pass query.detach\(\)"):
        flash_attn.flash_attn_with_kvcache(recorded, *caches, block_table=table)
    with torch.no_grad():
        assert torch.equal(whole, flash_attn.flash_attn_with_kvcache(recorded, *caches, block_table=table))
        flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, block_table=table)
        parameter = caches[1].clone().requires_grad_()
        with pytest.raises(ArgumentError, match=r"value_cache: .*requires grad"):  # in a warm call too
            flash_attn.flash_attn_with_kvcache(q, caches[0], parameter, k, v, cache_seqlens=lengths, block_table=table)


def test_packed_sequences_of_few_queries(device: Any) -> None:
    """They take the kernel that shares out keys among blocks, and its lse gives their gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, DIM, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for tokens, heads in ((5, HEADS), (180, 1), (180, 1))
    )
    starts, offsets = (torch.tensor(numbers, device=device, dtype=torch.int32) for numbers in ([0, 3, 5], [0, 150, 180]))
    plan = varlen_plan(*(x.detach() for x in (q, k, v)), starts, offsets, 3, 150, enable_gqa=True, is_causal=True, return_lse=True)
    assert "forward_split" in [kernel.name for kernel in plan.kernels]
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, starts, offsets, 3, 150, causal=True, return_attn_probs=True)
    grad_out = torch.randn(out.shape, generator=generator).to(device, torch.bfloat16)
    got = torch.autograd.grad(out, (q, k, v), grad_out)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wants = [
        judged(exact[0][None, begin:end], *(x[None, first:last] for x in exact[1:]), is_causal=True)
        for begin, end, first, last in ((0, 3, 0, 150), (3, 5, 150, 180))
    ]
    want = torch.cat([found[0] for found, _ in wants])
    torch.testing.assert_close(out.double(), want.double(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, torch.cat([found[0] for _, found in wants], 1).float(), atol=1e-4, rtol=1e-4)
    for found, true in zip(got, torch.autograd.grad(want, exact, grad_out.double()), strict=True):
        torch.testing.assert_close(found.double(), true, atol=3e-2, rtol=3e-2)


def test_packed_queries_and_keys_in_pages(device: Any) -> None:
    """Lengths from offsets or as they are, of pages or of places; what lies behind is NaN."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, HEADS, DIM, generator=generator).to(device, torch.bfloat16)
    k, v = (torch.full((8, 16, 1, DIM), float("nan")) for _ in range(2))
    table = torch.randperm(8, generator=generator).reshape(2, 4)
    rows = [torch.randn(2, count, DIM, generator=generator).bfloat16().float() for count in (40, 7)]
    for b, both in enumerate(rows):
        for x, own in zip((k, v), both, strict=True):
            for position, row in enumerate(own):
                x[table[b, position // 16], position % 16, 0] = row
    k, v, table = k.to(device, torch.bfloat16), v.to(device, torch.bfloat16), table.to(device)
    starts, counts = (torch.tensor(numbers, device=device) for numbers in ([0, 3, 5], [40, 7]))
    offsets = torch.tensor([0, 40, 47], device=device)
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, starts, offsets, 3, 40, causal=True, block_table=table, return_attn_probs=True)
    for b, (begin, end) in enumerate(((0, 3), (3, 5))):
        keys, values = (x[None, :, None].to(device) for x in rows[b])
        want, want_lse = judged(q[None, begin:end].float(), keys, values, is_causal=True)
        torch.testing.assert_close(out[begin:end].float(), want[0].float(), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse[:, begin:end], want_lse[0].float(), atol=1e-3, rtol=1e-3)
    given = {"causal": True, "block_table": table, "seqused_k": counts}
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, starts, None, 3, 40, **given), out)

    places = [torch.full((64, 1, DIM), float("nan"), device=device, dtype=torch.bfloat16) for _ in range(2)]
    for i, place in enumerate(places):
        place[:40, 0], place[50:57, 0] = (own[i].to(device, torch.bfloat16) for own in rows)
    begins = torch.tensor([0, 50, 64], device=device)
    in_places = flash_attn.flash_attn_varlen_func(q, *places, starts, begins, 3, 50, causal=True, seqused_k=counts)
    torch.testing.assert_close(in_places, out, atol=2e-2, rtol=2e-2)
    with pytest.raises(OptionError, match="seqused_k: got None beside block_table"):
        flash_attn.flash_attn_varlen_func(q, k, v, starts, None, 3, 40, block_table=table)
    for given in ({"block_table": table.tolist()}, {"seqused_k": counts.tolist()}):
        with pytest.raises(DTypeError, match=f"{next(iter(given))}: got an object of type list; expected a torch tensor"):
            flash_attn.flash_attn_varlen_func(q, k, v, starts, offsets, 3, 40, **given)
    with pytest.raises(DTypeError, match="block_table: got an object of type list"):
        flash_attn.flash_attn_with_kvcache(q[:2, None], k, v, block_table=table.tolist())
    for given in ({"block_table": table}, {"seqused_k": counts}):
        with pytest.raises(UnsupportedError, match=f"dropout_p: got 0.5; expected 0.0 with {next(iter(given))}"):
            flash_attn.flash_attn_varlen_func(q, k, v, starts, offsets, 3, 40, 0.5, **given)


def test_a_cache_in_8_bits(device: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, heads, 16, generator=generator).half().to(device) for heads in (2, 1, 1))
    caches = [torch.randn(2, 32, 1, 16, generator=generator).to(device, torch.float8_e4m3fn) for _ in range(2)]
    scales = [torch.full((2, 1), number, device=device) for number in (0.5, 2.0)]
    lengths = torch.tensor([20, 3], dtype=torch.int32, device=device)
    out = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, k_descale=scales[0], v_descale=scales[1])
    for b, length in enumerate((20, 3)):
        torch.testing.assert_close(caches[0][b, length].float(), (k[b, 0].float() / 0.5).to(torch.float8_e4m3fn).float())
        keys, values = (x[None, b, : length + 1].float() * scale[b, 0] for x, scale in zip(caches, scales, strict=True))
        torch.testing.assert_close(out[b].float(), judged(q[None, b].float(), keys, values)[0][0].float(), atol=2e-3, rtol=2e-3)


def rotated(x: Any, angles: Any) -> Any:
    """(rows, heads, head_dim), of which pairs of neighbours turn by the angles of their row."""
    result, width = x.clone(), 2 * angles.shape[1]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, other = x[..., 0:width:2], x[..., 1:width:2]
    result[..., 0:width:2] = one * cos - other * sin
    result[..., 1:width:2] = one * sin + other * cos
    return result
