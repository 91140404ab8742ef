"""Calls that autograd records: gradients against float64, what is saved and copied, dropout's seeds, transforms of torch.func."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, jvp, vmap
from written_out import SHAPE, assert_close, assert_same_gradients, attention, leaves

import cuflash
from cuflash.errors import KeywordError, UnsupportedError
from cuflash.runtime import launch, prepared
from cuflash.runtime.prepared import PreparedForward
from cuflash.torch import merge_attention, plan, scaled_dot_product_attention, varlen_attention

BATCH, HEADS, SEQLEN, DIM = SHAPE


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_out_lse_and_gradients(device: Any, is_causal: bool) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    results = scaled_dot_product_attention(*inputs, is_causal=is_causal, return_lse=True)
    assert_same_gradients(results, attention(*inputs, is_causal=is_causal), inputs)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_few_queries(device: Any, masked: bool) -> None:
    """The kernel that shares out keys among blocks has run, and its lse gives the gradients."""
    inputs = leaves(device, (2, 4, 5, 32), (2, 2, 300, 32), (2, 2, 300, 32), dtype=torch.float16)
    mask = torch.rand(2, 1, 5, 300, device=device) > 0.3
    options = {"attn_mask": mask} if masked else {"is_causal": True, "causal_alignment": "bottom_right"}
    planned = plan(*inputs, enable_gqa=True, return_lse=True, **options)
    assert [kernel.name for kernel in planned.kernels] == ["forward_split", "merge_attention"]
    results = scaled_dot_product_attention(*inputs, enable_gqa=True, return_lse=True, **options)
    wanted = attention(*inputs, mask) if masked else attention(*inputs, is_causal=True, bottom_right=True)
    assert_same_gradients(results, wanted, inputs)


def test_the_order_of_arguments_is_torchs(device: Any) -> None:
    query, key, value = leaves(device, (2, 4, 48, 32), SHAPE, SHAPE)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, None, 0.0, True, scale=0.25, enable_gqa=True)
    assert_close(scaled_dot_product_attention(query, key, value, None, 0.0, True, 0.25, True), want)
    assert_close(scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25, enable_gqa=True), want)


def test_gradients_are_bit_for_bit_those_of_the_plain_calls(device: Any) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE, dtype=torch.float16)
    out = scaled_dot_product_attention(*inputs, is_causal=True)
    grad_out = torch.randn_like(out)
    plain = [x.detach() for x in inputs]
    options: dict[str, Any] = {"is_causal": True, "layout": "bhsd"}
    want, lse = cuflash.scaled_dot_product_attention(*plain, return_lse=True, **options)
    assert torch.equal(out, want)
    wanted = cuflash.scaled_dot_product_attention_backward(grad_out, *plain, want, lse, **options)
    for got, plain_grad in zip(torch.autograd.grad(out, inputs, grad_out), wanted, strict=True):
        assert torch.equal(got, plain_grad)


def test_the_gradient_of_a_sum_compiles_nothing_of_its_own(device: Any) -> None:
    """One number, expanded: it is written out once, and the kernels are those of any other gradient."""
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    out = scaled_dot_product_attention(*inputs)
    want = torch.autograd.grad(out, inputs, torch.full_like(out, 1.0), retain_graph=True)
    known = dict(launch._executables)
    for got, grad_input in zip(torch.autograd.grad(out.sum(), inputs), want, strict=True):
        assert torch.equal(got, grad_input)
    assert launch._executables == known


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_gradients_under_vmap_drop_what_was_dropped(device: Any, randomness: str) -> None:
    """Attention is linear in value, so that value times its gradient is the loss; the keys of a sample have a batch of one, and are broadcast."""
    query, key, value = (x.detach() for x in leaves(device, (2, *SHAPE), *[(2, 1, *SHAPE[1:])] * 2))

    def loss(value: Any, query: Any, key: Any) -> Any:
        return scaled_dot_product_attention(query, key, value, dropout_p=0.5, dropout_seed=3).sum()

    grads, losses = vmap(grad_and_value(loss), randomness=randomness)(value, query, key)
    assert grads.shape == value.shape
    assert_close((grads * value).flatten(1).sum(1), losses.double())
    if randomness == "different":

        def of_mask(mask: Any, query: Any) -> Any:
            return scaled_dot_product_attention(query, query, query, mask, 0.5, dropout_seed=3).sum()

        with pytest.raises(UnsupportedError, match="attn_mask: got its gradient under vmap"):
            vmap(grad(of_mask), (None, 0), randomness=randomness)(torch.zeros(SEQLEN, SEQLEN, device=device), query)


@pytest.mark.parametrize("masks", [1, BATCH], ids=["one_mask", "a_mask_each"])
def test_mask_and_sinks_have_gradients(device: Any, masks: int) -> None:
    """An additive mask that is broadcast over the batch, or is not, and a logit for each head; both together."""
    *inputs, mask, sinks = leaves(device, SHAPE, SHAPE, SHAPE, (masks, HEADS, SEQLEN, SEQLEN), (HEADS,))
    results = scaled_dot_product_attention(*inputs, mask, sinks=sinks, return_lse=True)
    assert_same_gradients(results, attention(*inputs, mask, sinks=sinks), [*inputs, mask, sinks])


def test_batches_of_gradients(device: Any) -> None:
    """Several gradients of out and lse in one pass, each as alone: of a first call and of warm ones, compiled, and in `torch.autograd.functional.jacobian`."""
    shape = (1, 2, 9, 16)
    *inputs, _, _ = tensors = leaves(device, *[shape] * 3, (9, 9), (2,))

    def attend(query: Any, key: Any, value: Any, mask: Any, sinks: Any) -> Any:
        return scaled_dot_product_attention(query, key, value, mask, sinks=sinks, return_lse=True)

    for attention_of in (attend, attend, torch.compile(attend, backend="aot_eager")):
        results = attention_of(*tensors)
        batches = [torch.stack([x.detach().cos(), x.detach().sin()]) for x in results]
        got = torch.autograd.grad(results, tensors, batches, retain_graph=True, is_grads_batched=True)
        wanted = [torch.autograd.grad(results, tensors, each, retain_graph=True) for each in zip(*batches, strict=True)]
        for of_tensor, *each in zip(got, *wanted, strict=True):
            assert torch.equal(of_tensor, torch.stack(each))
    query, key, value = (x.detach() for x in inputs)

    def sums(query: Any) -> Any:
        return scaled_dot_product_attention(query, key, value).sum(dim=(0, 1, 2))[:2]

    def of_halves(query: Any) -> Any:
        halves = [scaled_dot_product_attention(query, key[:, :, i::2], value[:, :, i::2], return_lse=True) for i in range(2)]
        return merge_attention([out for out, _ in halves], [lse for _, lse in halves])[0].sum(dim=(0, 1, 2))[:2]

    for function in (sums, of_halves):
        jacobian = functools.partial(torch.autograd.functional.jacobian, function)
        one_by_one = jacobian(query)
        assert torch.equal(jacobian(query, vectorize=True), one_by_one)
    narrow = [x.detach() for x in leaves(device, *[(1, 1, 3, 4)] * 3)]
    jacobian = functools.partial(torch.autograd.functional.jacobian, scaled_dot_product_attention, tuple(narrow), vectorize=True)
    for of_tangents, of_gradients in zip(jacobian(strategy="forward-mode"), jacobian(), strict=True):
        assert_close(of_tangents, of_gradients.double())


def test_a_boolean_mask(device: Any) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    mask = torch.rand(BATCH, 1, SEQLEN, SEQLEN, device=device) < 0.7
    mask[:, :, 5] = False
    out = scaled_dot_product_attention(*inputs, mask)
    assert_same_gradients((out,), (attention(*inputs, mask)[0],), inputs)
    assert (out[:, :, 5] == 0).all()


@pytest.mark.parametrize("of", ["out", "lse"])
def test_a_loss_of_one_result(device: Any, of: str) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    index = ("out", "lse").index(of)
    got = scaled_dot_product_attention(*inputs, return_lse=True)[index]
    want = attention(*inputs)[index]
    used = inputs[: 3 - index]  # lse does not depend on value
    for a, b in zip(torch.autograd.grad(got.sum(), used), torch.autograd.grad(want.sum(), used), strict=True):
        assert_close(a, b)


def test_only_some_inputs_require_grad(device: Any) -> None:
    query, key, value = leaves(device, SHAPE, SHAPE, SHAPE)
    key = key.detach()
    scaled_dot_product_attention(query, key, value).square().sum().backward()
    attention_grads = torch.autograd.grad(attention(query, key, value)[0].square().sum(), (query, value))
    assert_close(query.grad, attention_grads[0])
    assert_close(value.grad, attention_grads[1])


def test_without_gradients_nothing_is_recorded_and_no_lse_computed(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = PreparedForward.run
    monkeypatch.setattr(PreparedForward, "run", lambda call, *given: seen.append(call.problem.return_lse) or run(call, *given))
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    with torch.no_grad():
        assert not scaled_dot_product_attention(*inputs).requires_grad
    with torch.inference_mode():
        assert scaled_dot_product_attention(*inputs).is_inference()
    assert scaled_dot_product_attention(*inputs).requires_grad
    assert seen == [False, False, True]


def test_kernels_read_the_inputs_where_they_are(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one projection, forward and backward: the addresses at the launcher are the tensors' own."""
    seen: list[dict[str, int]] = []
    launch_all = prepared.PreparedCall.launch_all
    monkeypatch.setattr(
        prepared.PreparedCall, "launch_all", lambda self, pointers: seen.append(dict(pointers)) or launch_all(self, pointers)
    )
    (projection,) = leaves(device, (BATCH, SEQLEN, 3, HEADS, DIM))
    query, key, value = projection.transpose(1, 3).unbind(2)
    out = scaled_dot_product_attention(query, key, value)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    assert len(seen) == 2
    for pointers in seen:
        assert [pointers[name] for name in ("query", "key", "value")] == [x.data_ptr() for x in (query, key, value)]
    assert seen[0]["out"] == seen[1]["out"] == out.data_ptr()
    assert seen[1]["grad_out"] == grad_out.data_ptr()
    assert seen[0]["lse"] == seen[1]["lse"]


def test_a_second_derivative_raises_and_says_so(device: Any) -> None:
    query, key, value = leaves(device, SHAPE, SHAPE, SHAPE)
    for attend in (scaled_dot_product_attention, lambda *x: torch.ops.cuflash.attention(*x)[0]):
        out = attend(query, key, value)
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        with pytest.raises(UnsupportedError, match="second derivative"):
            first.sum().backward()
    merged, _ = merge_attention([query, key], [x[..., 0] for x in (query, key)])
    (first,) = torch.autograd.grad(merged.square().sum(), query, create_graph=True)
    with pytest.raises(UnsupportedError, match="merge_attention: got a second derivative"):
        first.sum().backward()


def test_a_second_derivative_of_torch_func_raises(device: Any) -> None:
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    first = grad(lambda x: scaled_dot_product_attention(x, key, value).square().sum())
    with pytest.raises(UnsupportedError, match="second derivative"):
        grad(lambda x: first(x).sum())(query)


def test_a_tangent_of_a_gradient_of_dual_tensors_raises(device: Any) -> None:
    """Whether query, or the gradient of out alone, has a tangent; also where such calls are known."""
    inputs = leaves(device, *[SHAPE] * 3)
    query, grad_out, tangent = inputs[0], torch.ones(SHAPE, device=device).cumsum(-1), torch.ones(SHAPE, device=device)
    for _ in range(3):
        out = scaled_dot_product_attention(*inputs)
        torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
    with forward_ad.dual_level():
        torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
        with pytest.raises(UnsupportedError, match="attention: got a second derivative"):
            torch.autograd.grad(out, inputs, forward_ad.make_dual(grad_out, tangent))
        of_dual = scaled_dot_product_attention(forward_ad.make_dual(query, tangent), *inputs[1:])
        with pytest.raises(UnsupportedError, match=r"attention: got a second derivative.* outside of the dual level"):
            torch.autograd.grad(of_dual, inputs, grad_out, retain_graph=True)
    torch.autograd.grad(of_dual, inputs, grad_out)


def test_a_tangent_of_a_gradient_raises(device: Any) -> None:
    """Forward mode over reverse mode, as in `torch.func.hessian`."""
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    first = grad(lambda x: scaled_dot_product_attention(x, key, value).square().sum())
    with pytest.raises(UnsupportedError, match="attention: got a second derivative"):
        jvp(first, (query,), (query,))
    first = grad(lambda x: merge_attention([x, key], [query[..., 0], key[..., 0]])[0].square().sum())
    with pytest.raises(UnsupportedError, match="merge_attention: got a second derivative"):
        jvp(first, (query,), (query,))


def test_what_was_saved_must_not_be_changed(device: Any) -> None:
    query, key, value = leaves(device, *[SHAPE] * 3)
    out = scaled_dot_product_attention(query, key, value)
    loss = out.clone().sum()
    out.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Dropout ------------------------------------------------------------------------------------------------------------------------------


def test_dropout_draws_from_torchs_generator(device: Any) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)

    def call() -> Any:
        return scaled_dot_product_attention(*inputs, dropout_p=0.3)

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)


def test_gradients_with_dropout_are_those_of_the_same_mask(device: Any) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    seed = torch.tensor([7, 9], device=device)
    kept = cuflash.dropout_mask((BATCH, HEADS, SEQLEN, SEQLEN), 0.3, seed, like=inputs[0])
    for given in (seed, (7, 9)):
        results = scaled_dot_product_attention(*inputs, dropout_p=0.3, dropout_seed=given, return_lse=True)
        assert_same_gradients(results, attention(*inputs, kept=kept, dropout_p=0.3), inputs)


# --- Packed sequences and merging ---------------------------------------------------------------------------------------------------------


def test_packed_sequences(device: Any) -> None:
    inputs = leaves(device, *[(SEQLEN, HEADS, DIM)] * 3)
    (sinks,) = leaves(device, (HEADS,))
    offsets = torch.tensor([0, 20, 20, 48], device=device)  # int64, as cumsum gives them
    results = varlen_attention(*inputs, offsets, offsets, torch.tensor(28), 28, is_causal=True, sinks=sinks, return_lse=True)
    parts = [attention(*(x[a:b].transpose(0, 1) for x in inputs), is_causal=True, sinks=sinks) for a, b in ((0, 20), (20, 48))]
    out, lse = torch.cat([part[0].transpose(0, 1) for part in parts]), torch.cat([part[1] for part in parts], 1)
    assert_same_gradients(results, (out, lse), [*inputs, sinks])


@pytest.mark.parametrize("form", ["lists", "tensors"])
def test_merging_chunks_of_keys(device: Any, form: str) -> None:
    """Autograd goes through the merge into both chunks, and gives the gradients of one call."""
    query, key, value = inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    parts = [
        scaled_dot_product_attention(query, key[:, :, rows], value[:, :, rows], return_lse=True) for rows in (slice(0, 24), slice(24, 48))
    ]
    outs, lses = zip(*parts, strict=True)
    results = merge_attention(outs, lses) if form == "lists" else merge_attention(torch.stack(outs), torch.stack(lses))
    assert_same_gradients(results, attention(*inputs), inputs)


def test_merging_packed_sequences(device: Any) -> None:
    outs, lses = leaves(device, *[(SEQLEN, HEADS, DIM)] * 2), leaves(device, *[(HEADS, SEQLEN)] * 2)
    weights = torch.softmax(torch.stack(lses).double(), 0).mT[..., None]
    want = (weights * torch.stack(outs).double()).sum(0), torch.logsumexp(torch.stack(lses).double(), 0)
    assert_same_gradients(merge_attention(outs, lses), want, [*outs, *lses])


# --- torch.func and autocast --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 2, 1)], ids=str)
def test_vmap(device: Any, dims: tuple[int | None, ...]) -> None:
    shapes = [(*SHAPE[:dim], 3, *SHAPE[dim:]) if dim is not None else SHAPE for dim in dims]
    inputs = [x.detach() for x in leaves(device, *shapes)]
    got = vmap(scaled_dot_product_attention, dims)(*inputs)
    for i in range(3):
        sample = [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims, strict=True)]
        assert_close(got[i], attention(*sample)[0])


def test_vmap_of_masks_lengths_and_sinks(device: Any) -> None:
    query, key, value = (x.detach() for x in leaves(device, (3, *SHAPE), SHAPE, SHAPE))
    mask = torch.rand(3, SEQLEN, SEQLEN, device=device) < 0.7
    mask[..., 0] = True
    got = vmap(scaled_dot_product_attention, (0, None, None, 0))(query, key, value, mask)
    for i in range(3):
        assert_close(got[i], attention(query[i], key, value, mask[i])[0])
    sinks = torch.randn(3, HEADS, device=device)
    got = vmap(lambda q, s: scaled_dot_product_attention(q, key, value, sinks=s))(query, sinks)
    for i in range(3):
        assert_close(got[i], attention(query[i], key, value, sinks=sinks[i])[0])
    lengths = torch.tensor([[48, 20], [1, 48], [7, 9]], device=device)
    got = vmap(lambda n: scaled_dot_product_attention(query[0], key, value, seqlens_kv=n))(lengths)
    for i in range(3):
        hidden = torch.arange(SEQLEN, device=device) < lengths[i][:, None, None, None]
        assert_close(got[i], attention(query[0], key, value, hidden)[0])
    one_row = (query[:, :1], key[:1], value[:1])  # of the batch of each sample, whose length all share
    got = vmap(lambda q: scaled_dot_product_attention(q, *one_row[1:], seqlens_q=lengths[0, 1:], seqlens_kv=lengths[0, 1:]))(one_row[0])
    shorter = [x[..., :20, :] for x in one_row]
    for i in range(3):
        assert_close(got[i][:, :, :20], attention(shorter[0][i], *shorter[1:])[0])


def test_padded_queries_may_hold_anything(device: Any) -> None:
    """NaN behind the lengths reaches no gradient of key and value, in eager calls, traced ones and for samples with lengths of their own."""
    query, key, value = leaves(device, *[SHAPE] * 3)
    lengths, padded = torch.tensor([48, 20], device=device), slice(20, None)
    with torch.no_grad():
        query[1, :, padded] = torch.nan
    grad_out = torch.randn(SHAPE, device=device, dtype=query.dtype)
    grad_out[1, :, padded] = torch.nan
    out = scaled_dot_product_attention(query, key, value, seqlens_q=lengths)
    grads = torch.autograd.grad(out, (query, key, value), grad_out)
    assert not out[1, :, padded].any()
    assert not grads[0][1, :, padded].any()
    for row, length in enumerate((48, 20)):
        rows = [x[row : row + 1] for x in (query[:, :, :length], key, value)]
        want = attention(*rows)[0]
        assert_close(out[row : row + 1, :, :length], want)
        exact = torch.autograd.grad(want, rows, grad_out[row : row + 1, :, :length].to(want.dtype))
        for of_call, own, rows_of in zip(grads, exact, (length, SEQLEN, SEQLEN), strict=True):
            assert_close(of_call[row : row + 1, :, :rows_of], own)

    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    traced = compiled(query, key, value, seqlens_q=lengths)
    assert torch.equal(traced, out)
    for got, want in zip(torch.autograd.grad(traced, (query, key, value), grad_out), grads, strict=True):
        assert torch.equal(got, want)
    samples = vmap(lambda n: scaled_dot_product_attention(query.detach(), key.detach(), value.detach(), seqlens_q=n))(
        torch.stack([lengths, lengths // 2])
    )
    assert torch.equal(samples[0], out)
    assert not samples[1, 0, :, 24:].any()


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None)], ids=str)
def test_gradients_of_each_sample(device: Any, dims: tuple[int | None, ...]) -> None:
    """vmap over grad, as for per-sample gradients: the gradient of what samples share comes for each of them."""
    inputs = [x.detach() for x in leaves(device, *[SHAPE if dim is None else (3, *SHAPE) for dim in dims])]

    def loss(*inputs: Any) -> Any:
        return scaled_dot_product_attention(*inputs, is_causal=True).square().sum()

    got = vmap(grad(loss, argnums=(0, 1, 2)), dims)(*inputs)
    for i in range(3):
        sample = [(x if dim is None else x[i]).clone().requires_grad_() for x, dim in zip(inputs, dims, strict=True)]
        want = torch.autograd.grad(attention(*sample, is_causal=True)[0].square().sum(), sample)
        for a, b in zip(got, want, strict=True):
            assert_close(a[i], b)


def test_vmap_of_merging(device: Any) -> None:
    """Outs of each sample, and lses that all share; with gradients of each sample."""
    outs, lses = (x.detach() for x in leaves(device, (3, 2, *SHAPE), (2, *SHAPE[:3])))

    def loss(outs: Any, lses: Any) -> Any:
        out, lse = merge_attention(outs, lses)
        return out.square().sum() + lse.sum(), out

    got, merged = vmap(grad(loss, argnums=(0, 1), has_aux=True), (0, None))(outs, lses)
    for i in range(3):
        want, of_one = grad(loss, argnums=(0, 1), has_aux=True)(outs[i], lses)
        assert torch.equal(merged[i], of_one)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a[i], b)


def test_vmap_of_no_samples(device: Any) -> None:
    """Results and gradients have the shapes that they have with samples: of rows of one batch, and of samples one by one."""
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    none, sinks, lses = query.new_zeros(0, *SHAPE), query.new_zeros(0, HEADS), query.new_zeros(0, 2, *SHAPE[:3])

    def loss(query: Any, key: Any, value: Any, sinks: Any = None) -> Any:
        return scaled_dot_product_attention(query, key, value, sinks=sinks).square().sum()

    assert vmap(scaled_dot_product_attention)(none, none, none).shape == (0, *SHAPE)
    assert vmap(scaled_dot_product_attention, (0, None, None))(none, key, value).shape == (0, *SHAPE)
    assert vmap(lambda s: scaled_dot_product_attention(query, key, value, sinks=s))(sinks).shape == (0, *SHAPE)
    for dims, given in (((0, None, None), (none, key, value)), ((0, 0, 0, 0), (none, none, none, sinks))):
        grads = vmap(grad(loss, argnums=tuple(range(len(dims)))), dims)(*given)
        assert [x.shape for x in grads] == [(0, *(x.shape if dim is None else x.shape[1:])) for x, dim in zip(given, dims, strict=True)]
    out, lse = vmap(merge_attention)(none.new_zeros(0, 2, *SHAPE), lses)
    assert (out.shape, lse.shape) == ((0, *SHAPE), (0, *SHAPE[:3]))


def test_vmap_and_dropout(device: Any) -> None:
    """As torch's own random functions: refused, or a mask for all samples, or one for each."""
    query, key, value = (x.detach() for x in leaves(device, SHAPE, SHAPE, SHAPE))
    queries = query.expand(3, *SHAPE)

    def call(x: Any) -> Any:
        return scaled_dot_product_attention(x, key, value, dropout_p=0.3, dropout_seed=11)

    with pytest.raises(UnsupportedError, match="randomness='error'"):
        vmap(call)(queries)
    same = vmap(call, randomness="same")(queries)
    assert torch.equal(same[0], same[2])
    different = vmap(call, randomness="different")(queries)
    assert torch.equal(different[0], same[0])
    assert not torch.equal(different[0], different[2])


def test_autocast_casts_all_inputs_alike(device: Any) -> None:
    query, key, value = leaves(device, SHAPE, SHAPE, SHAPE)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, lse = scaled_dot_product_attention(query, key.bfloat16(), value, return_lse=True)
        packed = varlen_attention(
            *(x.flatten(0, 1).transpose(0, 1) for x in (query, key, value)), *[torch.tensor([0, 4], device=device)] * 2
        )
    assert (out.dtype, lse.dtype, packed.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert_close(out, attention(query, key, value)[0])
    out.sum().backward()
    assert query.grad.dtype == torch.float32


def test_a_wrong_keyword_is_answered(device: Any) -> None:
    query, key, value = leaves(device, SHAPE, SHAPE, SHAPE)
    with pytest.raises(KeywordError, match=r"softmax_scale.*scale"):
        scaled_dot_product_attention(query, key, value, softmax_scale=1.0)
