"""Forward-mode derivatives against those of attention written out in float64, in any combination of tangents and features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode
from written_out import SHAPE, assert_close, attention, leaves

import cuflash
from cuflash.errors import UnsupportedError
from cuflash.runtime import jvp_calls
from cuflash.torch import merge_attention, scaled_dot_product_attention, varlen_attention

BATCH, HEADS, SEQLEN, DIM = SHAPE


def plain(device: Any, *shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[Any]:
    return [x.detach() for x in leaves(device, *shapes, dtype=dtype)]


def compare(call: Any, wanted: Any, inputs: list[Any], tangents: list[Any]) -> None:
    """(out, lse) and their tangents."""
    got, got_dots = jvp(call, tuple(inputs), tuple(tangents))
    want, want_dots = jvp(wanted, tuple(x.double() for x in inputs), tuple(x.double() for x in tangents))
    for a, b in zip((*got, *got_dots), (*want, *want_dots), strict=True):
        assert_close(a, b)


@pytest.mark.sample(3)
@pytest.mark.parametrize("of", [(0, 1, 2), (0,), (1,), (2,), (0, 2)], ids=str)
def test_tangents_of_some_inputs(device: Any, of: tuple[int, ...]) -> None:
    inputs = plain(device, *[SHAPE] * 3)

    def with_given(function: Any) -> Any:
        def call(*given: Any) -> Any:
            all_inputs = [x.to(given[0].dtype) for x in inputs]
            for i, x in zip(of, given, strict=True):
                all_inputs[i] = x
            return function(*all_inputs)

        return call

    compare(
        with_given(lambda *x: scaled_dot_product_attention(*x, is_causal=True, return_lse=True)), with_given(lambda *x: attention(*x, is_causal=True)),
        [inputs[i] for i in of], plain(device, *[SHAPE] * len(of)),
    )  # fmt: skip


def test_features_and_grouped_heads(device: Any) -> None:
    """A mask, ALiBi, sinks, a window and a scale, with value of another head dimension."""
    shapes = [(BATCH, 4, 40, DIM), (BATCH, HEADS, SEQLEN, DIM), (BATCH, HEADS, SEQLEN, 24)]
    mask, slopes, sinks = torch.randn(4, 40, SEQLEN, device=device), torch.rand(4, device=device), torch.randn(4, device=device)
    options: dict[str, Any] = {"scale": 0.3, "is_causal": True, "sinks": sinks, "window": (20, 3)}
    compare(
        lambda *x: scaled_dot_product_attention(*x, mask, enable_gqa=True, alibi_slopes=slopes, return_lse=True, **options),
        lambda *x: attention(*x, mask, slopes=slopes, **options),
        plain(device, *shapes), plain(device, *shapes),
    )  # fmt: skip


def test_another_layout_and_16_bits(device: Any) -> None:
    shape = (BATCH, SEQLEN, HEADS, DIM)
    inputs, tangents = plain(device, *[shape] * 3, dtype=torch.float16), plain(device, *[shape] * 3, dtype=torch.float16)

    def wanted(*x: Any) -> Any:
        out, lse = attention(*(y.transpose(1, 2) for y in x))
        return out.transpose(1, 2), lse

    def call(*x: Any) -> Any:
        out, lse = scaled_dot_product_attention(*x, layout="bshd", return_lse=True)
        return out, lse.half()  # to the bound of 16 bits

    compare(call, wanted, inputs, tangents)


def test_packed_sequences(device: Any) -> None:
    inputs, tangents = plain(device, *[(SEQLEN, HEADS, DIM)] * 3), plain(device, *[(SEQLEN, HEADS, DIM)] * 3)
    offsets = torch.tensor([0, 20, 48], dtype=torch.int32, device=device)

    def wanted(*x: Any) -> Any:
        parts = [attention(*(y[a:b].transpose(0, 1) for y in x), is_causal=True) for a, b in ((0, 20), (20, 48))]
        return torch.cat([out.transpose(0, 1) for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    compare(lambda *x: varlen_attention(*x, offsets, offsets, 28, 28, is_causal=True, return_lse=True), wanted, inputs, tangents)


def test_dual_tensors_and_gradients_beside_them(device: Any) -> None:
    """Tensors that require grad and have tangents; gradients are those without."""
    inputs, tangents = leaves(device, *[SHAPE] * 3), plain(device, *[SHAPE] * 3)
    want, want_dot = jvp(scaled_dot_product_attention, tuple(x.detach() for x in inputs), tuple(tangents))
    with forward_ad.dual_level():
        dual = scaled_dot_product_attention(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        out, tangent = forward_ad.unpack_dual(dual)
    assert torch.equal(out, want)
    assert torch.equal(tangent, want_dot)
    grads = torch.autograd.grad(out.sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad(scaled_dot_product_attention(*inputs).sum(), inputs), strict=True):
        assert torch.equal(a, b)


def test_vmap_of_tangents(device: Any) -> None:
    """Several directions at one point, and the Jacobian by a number."""
    inputs = plain(device, *[SHAPE] * 3)
    directions = torch.randn(3, *SHAPE, device=device)
    got = vmap(lambda t: jvp(lambda x: scaled_dot_product_attention(x, *inputs[1:]), (inputs[0],), (t,))[1])(directions)
    for i in range(3):
        assert_close(got[i], jvp(lambda x: attention(x, *inputs[1:])[0], (inputs[0].double(),), (directions[i].double(),))[1])
    factor = torch.tensor(1.5, device=device)
    got = jacfwd(lambda c: scaled_dot_product_attention(c * inputs[0], *inputs[1:]))(factor)
    assert_close(got, jacfwd(lambda c: attention(c * inputs[0].double(), *inputs[1:])[0])(factor.double()))


@pytest.mark.parametrize("with_dropout", [False, True], ids=["softcap", "dropout"])
def test_softcap_dropout_and_sinks(device: Any, with_dropout: bool) -> None:
    """Tangents of all inputs and of the sinks; dropout drops the same pairs in all of its calls, and nothing in lse."""
    inputs, tangents = plain(device, *[SHAPE] * 3, (HEADS,)), plain(device, *[SHAPE] * 3, (HEADS,))
    options: dict[str, Any] = {"softcap": 1.5}
    judged: dict[str, Any] = {"softcap": 1.5}
    if with_dropout:
        options = {"dropout_p": 0.3, "dropout_seed": 7}
        judged = {"dropout_p": 0.3, "kept": cuflash.dropout_mask((BATCH, HEADS, SEQLEN, SEQLEN), 0.3, 7, like=inputs[0])}

    def call(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return scaled_dot_product_attention(query, key, value, sinks=sinks, return_lse=True, **options)

    def wanted(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return attention(query, key, value, sinks=sinks, **judged)

    compare(call, wanted, inputs, tangents)


def test_tangents_of_sinks_alone(device: Any) -> None:
    """In another layout, with rows that see no key but the sink, and a sink that has no share."""
    shape = (BATCH, SEQLEN, HEADS, DIM)
    inputs, sinks = plain(device, *[shape] * 3), torch.tensor([0.3, float("-inf")], device=device)
    visible = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=device)
    visible[5] = False

    def call(sinks: Any) -> Any:
        return scaled_dot_product_attention(*inputs, visible, sinks=sinks, layout="bshd", return_lse=True)

    (out, lse), (out_dot, lse_dot) = jvp(call, (sinks,), (torch.ones_like(sinks),))
    share = torch.exp(sinks[:, None] - lse).nan_to_num()
    assert (share[:, 0, 5] == 1).all()
    assert_close(lse_dot, share)
    assert_close(out_dot, -share.transpose(1, 2)[..., None] * out)


def test_merging(device: Any) -> None:
    """Tangents go through the merge of attention over two chunks of keys, and are those of one call; a row sees one chunk alone."""
    inputs, tangents = plain(device, *[SHAPE] * 3), plain(device, *[SHAPE] * 3)
    visible = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=device)
    visible[3, :24] = visible[4] = False

    def call(query: Any, key: Any, value: Any) -> Any:
        chunks = (slice(0, 24), slice(24, 48))
        parts = [scaled_dot_product_attention(query, key[:, :, c], value[:, :, c], visible[:, c], return_lse=True) for c in chunks]
        return merge_attention([out for out, _ in parts], [lse for _, lse in parts])

    got, got_dots = jvp(call, tuple(inputs), tuple(tangents))
    want, want_dots = jvp(lambda *x: scaled_dot_product_attention(*x, visible, return_lse=True), tuple(inputs), tuple(tangents))
    for a, b in zip((*got, *got_dots), (*want, *want_dots), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert_close(a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0))


def test_merging_one_tensor_of_parts(device: Any) -> None:
    """By the tangents of outs and lses, and of lses alone."""
    outs, out_dots, lses, lse_dots = plain(device, *[(2, *SHAPE)] * 2, *[(2, *SHAPE[:3])] * 2)

    def wanted(outs: Any, lses: Any) -> Any:
        return (torch.softmax(lses, 0)[..., None] * outs).sum(0), torch.logsumexp(lses, 0)

    compare(merge_attention, wanted, [outs, lses], [out_dots, lse_dots])
    compare(lambda x: merge_attention(outs, x), lambda x: wanted(outs.double(), x), [lses], [lse_dots])


def test_what_has_no_forward_mode(device: Any) -> None:
    """Refused by name, not silently zero."""
    inputs = plain(device, *[SHAPE] * 3)
    mask = torch.randn(SEQLEN, SEQLEN, device=device)
    with pytest.raises(UnsupportedError, match="attn_mask: got a forward-mode derivative by it"):
        jvp(lambda m: scaled_dot_product_attention(*inputs, m), (mask,), (mask,))

    def tangent(query: Any) -> Any:
        return jvp(lambda x: scaled_dot_product_attention(x, *inputs[1:]), (query,), (torch.ones_like(query),))[1].sum()

    with pytest.raises(UnsupportedError, match="attention: got a derivative of its forward-mode derivative"):
        grad(tangent)(inputs[0])


def test_one_kernel_makes_both_tangents(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what the forward call gave; no operand is copied."""
    inputs, tangents = plain(device, *[SHAPE] * 3), plain(device, *[SHAPE] * 3)
    run, seen = jvp_calls.PreparedJvp.run, []

    def recorded(call: Any, addresses: dict[str, int], given: Any = None) -> Any:
        seen.append(([kernel.name for kernel in call.plan.kernels], dict(addresses)))
        return run(call, addresses, given)

    monkeypatch.setattr(jvp_calls.PreparedJvp, "run", recorded)
    jvp(scaled_dot_product_attention, tuple(inputs), tuple(tangents))
    ((kernels, addresses),) = seen
    assert kernels == ["forward_jvp"]
    given = dict(zip(("query", "key", "value", "query_dot", "key_dot", "value_dot"), (*inputs, *tangents), strict=True))
    assert {name: addresses[name] for name in given} == {name: x.data_ptr() for name, x in given.items()}


def test_a_tangent_of_value_has_derivatives(device: Any) -> None:
    """It is attention over another value."""
    inputs, (value_dot,) = plain(device, *[SHAPE] * 3), plain(device, SHAPE)

    def tangent(query: Any) -> Any:
        return jvp(lambda x: scaled_dot_product_attention(query, inputs[1], x), (inputs[2],), (value_dot,))[1].square().sum()

    want = grad(lambda query: attention(query, *(x.double() for x in (inputs[1], value_dot)))[0].square().sum())(inputs[0].double())
    assert_close(grad(tangent)(inputs[0]), want)


@pytest.mark.parametrize("shared", [False, True], ids=["each", "one_key"])
def test_vmap_of_points_and_tangents(device: Any, shared: bool) -> None:
    """Samples are rows of one call; a key that all share may have a batch of one."""
    inputs, tangents = plain(device, *[(3, *SHAPE)] * 3), plain(device, *[(3, *SHAPE)] * 3)
    if shared:
        inputs[1], tangents[1] = plain(device, *[(1, *SHAPE[1:])] * 2)
    dims = (0, None if shared else 0, 0)

    def both(query: Any, key: Any, value: Any, *dots: Any) -> Any:
        return jvp(lambda *x: scaled_dot_product_attention(*x, is_causal=True), (query, key, value), dots)[1]

    got = vmap(both, in_dims=dims * 2)(*inputs, *tangents)
    for i in range(3):
        own = [x if dim is None else x[i] for x, dim in zip((*inputs, *tangents), dims * 2, strict=True)]
        assert_close(got[i], both(*own))


def test_dual_tensors_under_a_mode_that_watches_operators(device: Any) -> None:
    """Tangents that eager calls give, where operators alone would lose them."""
    query, key, value, query_dot = plain(device, *[SHAPE] * 4)

    def tangents() -> list[Any]:
        with forward_ad.dual_level():
            halves = [scaled_dot_product_attention(forward_ad.make_dual(query, query_dot), x, x, return_lse=True) for x in (key, value)]
            merged, _ = merge_attention([out for out, _ in halves], [lse for _, lse in halves])
            return [forward_ad.unpack_dual(x).tangent for x in (*halves[0], merged)]

    want = tangents()
    with FlopCounterMode(display=False):
        got = tangents()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
