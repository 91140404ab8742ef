"""cuflash's MultiheadAttention and TransformerEncoderLayer against torch's: state dicts that fit both ways, equal outputs, weights and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from written_out import assert_close

import cuflash.torch as ours
from cuflash.torch import modules

WIDTH, HEADS, SEQLEN, OTHER = 64, 2, 40, 48


def both(kind: str, *args: Any, device: Any, **kwargs: Any) -> tuple[Any, Any]:
    """cuflash's module and torch's of the same parameters, which are those of the same seed."""
    made = []
    for source in (ours, nn):
        torch.manual_seed(3)
        made.append(getattr(source, kind)(*args, device=device, **kwargs))
    mine, theirs = made
    state = theirs.state_dict()
    assert list(mine.state_dict()) == list(state)
    for name, x in mine.state_dict().items():
        assert torch.equal(x, state[name])
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def compare(mine: Any, theirs: Any, inputs: list[Any], call: Any) -> None:
    """Results, and gradients of inputs and parameters for random gradients of the results; torch computes in float64."""
    theirs = theirs.double()
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    got, want = call(mine, *inputs), call(theirs, *doubles)
    assert [x is None for x in got] == [x is None for x in want]
    got, want = ([x for x in results if x is not None] for results in (got, want))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert_close(a, b)
    grads = [torch.randn_like(x) for x in got]
    of_mine = torch.autograd.grad(got, [*inputs, *mine.parameters()], grads)
    of_theirs = torch.autograd.grad(want, [*doubles, *theirs.parameters()], [x.double() for x in grads])
    for a, b in zip(of_mine, of_theirs, strict=True):
        assert_close(a, b)


def as_floats(mask: Any, x: Any) -> Any:
    """The additive form of a mask whose True hides."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(mask, float("-inf"))


MASKS = ["plain", "padded", "pairs", "padded_pairs", "float_pairs", "padded_floats", "of_heads", "causal", "causal_padded"]


def masks(kind: str, x: Any, seqlen_q: int, seqlen_kv: int) -> dict[str, Any]:
    """torch's arguments, of which every query sees a key."""
    device = x.device
    padding = torch.arange(seqlen_kv, device=device) >= torch.tensor([[seqlen_kv], [20]], device=device)
    generator = torch.Generator().manual_seed(4)
    pairs = (torch.rand(seqlen_q, seqlen_kv, generator=generator) < 0.3).to(device)
    pairs[:, 0] = False
    causal = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool, device=device).triu(1)
    bias = torch.randn(2 * HEADS, seqlen_q, seqlen_kv, generator=generator).to(device, x.dtype)
    made: dict[str, Any] = {
        "plain": {}, "padded": {"key_padding_mask": padding}, "pairs": {"attn_mask": pairs},
        "padded_pairs": {"key_padding_mask": padding, "attn_mask": pairs}, "float_pairs": {"attn_mask": bias[0]},
        "padded_floats": {"key_padding_mask": as_floats(padding, x), "attn_mask": bias[0]}, "of_heads": {"attn_mask": bias},
        "causal": {"attn_mask": causal, "is_causal": True}, "causal_padded": {"key_padding_mask": padding, "attn_mask": causal, "is_causal": True},
    }[kind]  # fmt: skip
    return made


@pytest.mark.sample(7)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("masked", MASKS)
def test_multihead_attention(device: Any, masked: str, batch_first: bool) -> None:
    """Self-attention and weights of each head for batch_first, else other keys and values without weights."""
    mine, theirs = both("MultiheadAttention", WIDTH, HEADS, batch_first=batch_first, device=device)
    seqlen_kv = SEQLEN if batch_first else OTHER
    shapes = [(2, SEQLEN, WIDTH)] if batch_first else [(SEQLEN, 2, WIDTH), (seqlen_kv, 2, WIDTH), (seqlen_kv, 2, WIDTH)]
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]

    def call(module: Any, *inputs: Any) -> Any:
        query, key, value = inputs * 3 if batch_first else inputs
        arguments = masks(masked, query, SEQLEN, seqlen_kv)
        return module(query, key, value, need_weights=batch_first, average_attn_weights=False, **arguments)

    compare(mine, theirs, inputs, call)


@pytest.mark.parametrize("case", ["other_widths", "added_keys", "one_sequence", "averaged"])
def test_constructors_and_ranks(device: Any, case: str) -> None:
    options: dict[str, Any] = {
        "other_widths": {"kdim": 24, "vdim": 40, "bias": False},
        "added_keys": {"add_bias_kv": True, "add_zero_attn": True},
    }.get(case, {})
    mine, theirs = both("MultiheadAttention", WIDTH, HEADS, batch_first=True, device=device, **options)
    batch = () if case == "one_sequence" else (2,)
    widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    inputs = [
        torch.randn(*batch, n, width, device=device).requires_grad_() for n, width in zip((SEQLEN, OTHER, OTHER), widths, strict=True)
    ]

    def call(module: Any, query: Any, key: Any, value: Any) -> Any:
        arguments = masks("padded_pairs", query, SEQLEN, OTHER)
        if case == "one_sequence":
            arguments["key_padding_mask"] = arguments["key_padding_mask"][1]
        return module(query, key, value, need_weights=case != "added_keys", **arguments)

    compare(mine, theirs, inputs, call)


def test_dropout_of_the_weights_is_that_of_the_output(device: Any) -> None:
    """What comes out is what the returned weights make of value; in evaluation nothing is dropped."""
    mine, theirs = both("MultiheadAttention", WIDTH, HEADS, dropout=0.4, batch_first=True, device=device)
    x = torch.randn(2, SEQLEN, WIDTH, device=device)
    out, weights = mine(x, x, x, average_attn_weights=False)
    assert 0.3 < (weights == 0).float().mean() < 0.5
    value = mine._projected(x, x, x)[2].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    assert_close(out, mine.out_proj((weights @ value).transpose(1, 2).flatten(2)).double())
    with torch.no_grad():
        for a, b in zip(mine.eval()(x, x, x), theirs.double().eval()(*[x.double()] * 3), strict=True):
            assert_close(a, b)


def test_a_query_that_sees_no_key_gives_zero(device: Any) -> None:
    mine, _ = both("MultiheadAttention", WIDTH, HEADS, batch_first=True, device=device)
    x = torch.randn(1, SEQLEN, WIDTH, device=device)
    out, weights = mine(x, x, x, key_padding_mask=torch.ones(1, SEQLEN, dtype=torch.bool, device=device))
    assert torch.equal(out[0, 0], mine.out_proj.bias)
    assert (weights == 0).all()


@pytest.mark.sample(2)
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm_first", "norm_last"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
def test_transformer_encoder_layer(device: Any, batch_first: bool, norm_first: bool) -> None:
    mine, theirs = both("TransformerEncoderLayer", WIDTH, HEADS, 96, 0.0, batch_first=batch_first, norm_first=norm_first, device=device)
    inputs = [torch.randn((2, SEQLEN, WIDTH) if batch_first else (SEQLEN, 2, WIDTH), device=device).requires_grad_()]

    def call(module: Any, x: Any) -> Any:
        arguments = masks("causal_padded" if norm_first else "padded_pairs", x, SEQLEN, SEQLEN)
        return [module(x, arguments["attn_mask"], arguments["key_padding_mask"], is_causal=norm_first)]

    compare(mine, theirs, inputs, call)


def test_encoders_in_evaluation_run_on_cuflash(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fast path is not taken, alone or in nn.TransformerEncoder; copies and pickles stay what they are."""
    mine, theirs = both("TransformerEncoderLayer", WIDTH, HEADS, 96, batch_first=True, device=device)
    encoders = [nn.TransformerEncoder(layer, 2).eval() for layer in (mine, theirs.double())]
    assert all(type(layer.self_attn) is ours.MultiheadAttention for layer in encoders[0].layers)
    calls = []
    run = modules.scaled_dot_product_attention
    monkeypatch.setattr(modules, "scaled_dot_product_attention", lambda *args, **options: calls.append(1) or run(*args, **options))
    x = torch.randn(2, SEQLEN, WIDTH, device=device)
    padding = masks("padded", x, SEQLEN, SEQLEN)["key_padding_mask"]
    with torch.no_grad():
        got, want = encoders[0](x, src_key_padding_mask=padding), encoders[1](x.double(), src_key_padding_mask=padding)
    assert len(calls) == 2
    seen = ~padding
    assert_close(got[seen], want[seen])
