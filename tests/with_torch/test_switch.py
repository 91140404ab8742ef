"""cuflash in the place of torch's function: modules run through it with equal results, and what it cannot do is told, raised or left to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from written_out import SHAPE, assert_close, leaves

from cuflash.errors import DTypeError, OptionError, UnsupportedError
from cuflash.torch import disable, enable, report, use

WIDTH, HEADS, SEQLEN = 64, 2, 48
ORIGINAL = functional.scaled_dot_product_attention, functional.multi_head_attention_forward


def run(module: Any, x: Any, **arguments: Any) -> list[Any]:
    """Output and gradients, of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = module(x, **arguments) if isinstance(module, nn.TransformerEncoderLayer) else module(x, x, x, **arguments)[0]
    return [out, *torch.autograd.grad(out.square().mean(), [x, *module.parameters()])]


def same(got: list[Any], want: list[Any]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def padding(device: Any) -> Any:
    return torch.arange(SEQLEN, device=device) >= torch.tensor([[SEQLEN], [20]], device=device)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("masked", ["plain", "causal", "padded", "attn_mask"])
def test_multihead_attention(device: Any, masked: str, batch_first: bool) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, device=device)
    x = torch.randn((2, SEQLEN, WIDTH) if batch_first else (SEQLEN, 2, WIDTH), device=device)
    causal = nn.Transformer.generate_square_subsequent_mask(SEQLEN, device=device)
    arguments: dict[str, Any] = {
        "plain": {}, "causal": {"attn_mask": causal, "is_causal": True}, "padded": {"key_padding_mask": padding(device)},
        "attn_mask": {"attn_mask": torch.randn(SEQLEN, SEQLEN, device=device)},
    }[masked]  # fmt: skip
    want = run(module, x, need_weights=False, **arguments)
    with use("force"):
        got = run(module, x, need_weights=False, **arguments)
    assert report().calls == 1
    assert report().others == {}
    same(got, want)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer(device: Any, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, dropout=0.0, batch_first=True, norm_first=norm_first, device=device)
    x = torch.randn(2, SEQLEN, WIDTH, device=device)
    want = run(layer, x, src_key_padding_mask=padding(device))
    with use("force"):
        got = run(layer, x, src_key_padding_mask=padding(device))
    assert report().calls == 1
    same(got, want)


@pytest.mark.parametrize("kind", ["attention", "encoder_layer", "encoder"])
def test_modules_in_evaluation_do_not_take_torchs_fast_path(device: Any, kind: str) -> None:
    """It would bypass the function that is replaced; the report says that it is off, and it is on again afterwards."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True, device=device)
    module = {"attention": layer.self_attn, "encoder_layer": layer, "encoder": nn.TransformerEncoder(layer, 2)}[kind].eval()
    x = torch.randn(2, SEQLEN, WIDTH, device=device)

    def call() -> Any:
        return module(x, x, x, need_weights=False)[0] if kind == "attention" else module(x)

    with torch.no_grad():
        want = call()
        with use("force"):
            assert not torch.backends.mha.get_fastpath_enabled()
            got = call()
    assert torch.backends.mha.get_fastpath_enabled()
    assert report().calls == (2 if kind == "encoder" else 1)
    assert "fast path for nn.MultiheadAttention and nn.TransformerEncoderLayer in evaluation" in str(report())
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


# --- Policies and the report --------------------------------------------------------------------------------------------------------------


def test_fallback_is_counted_with_its_reason(device: Any) -> None:
    query, key, value = leaves(device, *[SHAPE] * 3)
    doubles = [x.double() for x in (query, key, value)]
    with use(simulate=True):
        assert torch.equal(functional.scaled_dot_product_attention(*doubles), ORIGINAL[0](*doubles))
        functional.scaled_dot_product_attention(*doubles, is_causal=True)
        assert_close(functional.scaled_dot_product_attention(query, key, value, scale=0.5), ORIGINAL[0](*doubles, scale=0.5))
    counted = report()
    assert counted.calls == 1
    ((reason, count),) = counted.others.items()
    assert count == 2
    assert reason.startswith("query: got float64; expected float16, bfloat16 or float32")
    assert str(counted).splitlines()[:2] == ["1 calls of attention on cuflash, 0 while tracing, 2 on torch", f"  2 × {reason}"]


@pytest.mark.parametrize("policy", ["raise", "force"])
def test_raise_and_force_raise(device: Any, policy: str) -> None:
    query, key, value = leaves(device, *[SHAPE] * 3)
    with use(policy, simulate=True), pytest.raises(DTypeError, match="query: got float64"):
        functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert sum(report().others.values()) == 1
    with use(policy, simulate=True), pytest.raises(UnsupportedError, match="attn_mask: got a mask with is_causal=True"):
        functional.scaled_dot_product_attention(
            query, key, value, torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=device), is_causal=True
        )


def test_weights_are_torchs_own_and_said_to_be(device: Any) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, device=device)
    x = torch.randn(2, SEQLEN, WIDTH, device=device)
    want = module(x, x, x)[1]
    with use(simulate=True):
        assert torch.equal(module(x, x, x)[1], want)
    ((reason, _),) = report().others.items()
    assert "need_weights=True" in reason
    with use("raise", simulate=True), pytest.raises(UnsupportedError, match="need_weights=True"):
        module(x, x, x)


def test_tensors_on_the_cpu_are_left_to_torch() -> None:
    """Unless the simulator is asked for."""
    query, key, value = leaves("cpu", *[SHAPE] * 3)
    with use():
        assert torch.equal(functional.scaled_dot_product_attention(query, key, value), ORIGINAL[0](query, key, value))
    assert report().calls == 0
    assert "simulate=True" in str(report())
    with use("raise"), pytest.raises(UnsupportedError, match="a tensor on the CPU"):
        functional.scaled_dot_product_attention(query, key, value)


def test_the_switch_and_blocks_within_it(device: Any) -> None:
    assert functional.scaled_dot_product_attention is ORIGINAL[0]
    query, key, value = leaves(device, *[SHAPE] * 3)
    enable("force")
    try:
        with use("fallback", simulate=True):
            functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
        with pytest.raises(DTypeError):
            functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
        enable("force")  # begins a new account, and does not take cuflash's function for torch's
        assert report().others == {}
        functional.scaled_dot_product_attention(query, key, value)
    finally:
        disable()
    disable()
    assert (functional.scaled_dot_product_attention, functional.multi_head_attention_forward) == ORIGINAL
    assert torch.backends.mha.get_fastpath_enabled()
    assert report().calls == 1
    with pytest.raises(OptionError, match="policy: got 'always'"):
        enable("always")
    assert functional.scaled_dot_product_attention is ORIGINAL[0]


def test_an_error_in_a_block_switches_it_off(device: Any) -> None:
    with pytest.raises(ZeroDivisionError), use("force"):
        raise ZeroDivisionError
    assert functional.scaled_dot_product_attention is ORIGINAL[0]


def test_compiled_modules(device: Any) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, dropout=0.0, batch_first=True, device=device)
    x = torch.randn(2, SEQLEN, WIDTH, device=device)
    want = run(layer, x)
    torch._dynamo.reset()
    with use("force"):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = x.clone().requires_grad_()
        out = compiled(y)
        got = [out, *torch.autograd.grad(out.square().mean(), [y, *layer.parameters()])]
        counted = report()
        compiled(y)
    assert counted.traced + counted.calls > 0  # Dynamo of old versions hands the module on as a whole, to what traces operators
    assert report() == counted  # the second run compiled nothing
    same(got, want)


def test_compiled_calls_that_cuflash_cannot_run(device: Any) -> None:
    query, key, value = (x.detach().double() for x in leaves(device, *[SHAPE] * 3))
    torch._dynamo.reset()
    with use(simulate=True):
        got = torch.compile(lambda *x: functional.scaled_dot_product_attention(*x), fullgraph=True, backend="eager")(query, key, value)
    assert torch.equal(got, ORIGINAL[0](query, key, value))
    assert "query: got a tensor of torch.float64" in str(report())
