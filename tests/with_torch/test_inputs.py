"""What torch's users pass: mask objects, subclasses, integers of any width, tensors of one element, ranks from two on, broadcasts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as torch_attention
from written_out import SHAPE, assert_close, assert_same_gradients, attention, leaves

import cuflash
from cuflash.errors import DeviceError, DTypeError, KeywordError, OptionError, ShapeError, UnsupportedError
from cuflash.runtime import calls, launch, prepared
from cuflash.torch import plan, scaled_dot_product_attention, varlen_attention

BATCH, HEADS, SEQLEN, DIM = SHAPE
SHORTER = (BATCH, HEADS, 40, DIM)


# --- Masks and subclasses -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(40, 48), (48, 40)], ids=str)
def test_causal_biases_of_torch(device: Any, lengths: tuple[int, int]) -> None:
    """They are arguments, not memory: whatever their memory holds changes nothing."""
    query, key, value = leaves(device, *[(BATCH, HEADS, n, DIM) for n in (lengths[0], lengths[1], lengths[1])])
    for bias, bottom_right in ((causal_upper_left(*lengths), False), (causal_lower_right(*lengths), True)):
        got = scaled_dot_product_attention(query, key, value, bias)
        assert_close(got, attention(query, key, value, is_causal=True, bottom_right=bottom_right)[0])


def test_causal_biases_that_do_not_fit(device: Any) -> None:
    query, key, value = leaves(device, *[SHAPE] * 3)
    with pytest.raises(ShapeError, match="attn_mask: got a CausalBias for 8 queries and 48 keys; expected one for 48 and 48"):
        scaled_dot_product_attention(query, key, value, causal_upper_left(8, 48))
    with pytest.raises(OptionError, match="is_causal: got True with a CausalBias"):
        scaled_dot_product_attention(query, key, value, causal_upper_left(48, 48), is_causal=True)


def test_plain_calls_refuse_a_causal_bias(device: Any) -> None:
    """Its memory is not initialised, so that adding it would give anything."""
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    with pytest.raises(DTypeError, match=r"attn_mask: got .*CausalBias"):
        cuflash.scaled_dot_product_attention(query, key, value, causal_upper_left(48, 48), layout="bhsd")


class Logged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def test_unknown_subclasses_are_refused_by_name(device: Any) -> None:
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    for name in ("query", "key", "value", "attn_mask", "sinks"):
        tensors = {"query": query, "key": key, "value": value, name: query.as_subclass(Logged)}
        with pytest.raises(DTypeError, match=rf"{name}: got a tensor of the subclass .*Logged.*{name}.as_subclass"):
            scaled_dot_product_attention(**tensors)
    want = scaled_dot_product_attention(query, key, value)
    for kind in (Plain, torch.nn.Parameter):
        assert torch.equal(scaled_dot_product_attention(query.as_subclass(kind) if kind is Plain else kind(query), key, value), want)


def test_nested_tensors_and_what_is_no_tensor(device: Any) -> None:
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    nested = torch.nested.nested_tensor(list(query.transpose(1, 2)), layout=torch.jagged)
    with pytest.raises(DTypeError, match=r"key: got a tensor that is not nested beside nested ones"):
        scaled_dot_product_attention(nested.transpose(1, 2), key, value)
    with pytest.raises(DTypeError, match=r"key: got a nested tensor.*varlen_attention"):
        scaled_dot_product_attention(query, nested, value)
    with pytest.raises(DTypeError, match=r"key: got an object of type numpy\.ndarray; expected a torch tensor"):
        scaled_dot_product_attention(query, key.cpu().numpy(), value)
    with pytest.raises(DeviceError, match=r"key: got .* on meta"):
        scaled_dot_product_attention(query, key.to("meta"), value)


def test_sparse_tensors_are_refused_by_name(device: Any) -> None:
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    with pytest.raises(DTypeError, match=r"query: got a tensor of layout torch.sparse_coo.*query.to_dense\(\)"):
        scaled_dot_product_attention(query.to_sparse(), key, value)
    with pytest.raises(DTypeError, match=r"attn_mask: got a tensor of layout torch.sparse_coo"):
        scaled_dot_product_attention(query, key, value, torch.eye(SEQLEN, device=device).to_sparse())


def test_meta_tensors_have_shapes_alone(device: Any) -> None:
    query, key, value = (x.detach().to("meta") for x in leaves(device, *[SHAPE] * 3))
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True)
    assert (out.is_meta, out.shape, out.stride(), lse.shape, lse.dtype) == (True, query.shape, query.stride(), SHAPE[:3], torch.float32)


# --- A boolean mask beside an additive bias ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_mask_beside_a_bias(device: Any, is_causal: bool) -> None:
    """T5: a bias of heads that all rows of the batch share, and keys of each row that are padding; the bias has its gradient, summed over the batch."""
    *inputs, bias = leaves(device, *[SHAPE] * 3, (1, HEADS, SEQLEN, SEQLEN))
    mask = (torch.arange(SEQLEN, device=device) < torch.tensor([[SEQLEN], [20]], device=device))[:, None, None, :]
    want = attention(*inputs, torch.where(mask, bias, float("-inf")), is_causal=is_causal)
    for given in (mask, mask.expand(-1, -1, SEQLEN, -1)):
        results = scaled_dot_product_attention(*inputs, given, attn_bias=bias, is_causal=is_causal, return_lse=True)
        assert_close(results[0], want[0])
    assert_same_gradients(results, want, [*inputs, bias])


def test_a_bias_alone_is_an_additive_mask(device: Any) -> None:
    *inputs, bias = leaves(device, (48, 32), (40, 32), (40, 32), (48, 40))
    assert torch.equal(scaled_dot_product_attention(*inputs, attn_bias=bias), scaled_dot_product_attention(*inputs, bias))
    mask = torch.arange(40, device=device) < 30
    got = scaled_dot_product_attention(*inputs, mask, attn_bias=bias)
    assert_close(got, attention(*inputs, torch.where(mask, bias, float("-inf")))[0])


def test_a_mask_of_pairs_beside_a_bias(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its own shape and with its own strides, beside a mask of keys: nothing is copied, in either pass, and the bias has its gradient."""
    *inputs, bias = leaves(device, *[SHAPE] * 3, (1, HEADS, SEQLEN, SEQLEN))
    pairs = torch.rand(BATCH, 1, SEQLEN, SEQLEN, device=device) < 0.7
    pairs[..., 0] = True
    pairs = pairs.transpose(2, 3).contiguous().transpose(2, 3)
    ids = (torch.arange(SEQLEN, device=device) < torch.tensor([[SEQLEN], [20]], device=device)).int()
    seen: list[dict[str, int]] = []
    for kind in (prepared.PreparedForward, prepared.PreparedBackward):
        run = kind.run
        monkeypatch.setattr(
            kind, "run", lambda call, addresses, given=None, run=run: seen.append(dict(addresses)) or run(call, addresses, given)
        )
    options: dict[str, Any] = {"segment_ids_q": torch.ones_like(ids), "segment_ids_kv": ids}
    results = scaled_dot_product_attention(*inputs, pairs, attn_bias=bias, return_lse=True, **options)
    visible = pairs & ids[:, None, None, :].bool()
    want = attention(*inputs, torch.where(visible, bias, float("-inf")))
    assert_same_gradients(results, want, [*inputs, bias])
    assert len(seen) == 2
    for addresses in seen:
        assert (addresses["attn_mask"], addresses["pair_mask"]) == (bias.data_ptr(), pairs.data_ptr())
    planned = plan(*(x.detach() for x in inputs), pairs, attn_bias=bias.detach())
    assert "a boolean mask (2, 1, 48, 48) beside it" in str(planned)


def test_masks_and_biases_that_cannot_be_taken_apart(device: Any) -> None:
    query, key, value, bias = (x.detach() for x in leaves(device, *[SHAPE] * 3, (SEQLEN, SEQLEN)))
    mask = bias > 0
    for attn_mask, attn_bias, match in (
        (mask[:5], bias, r"attn_mask: got shape \(5, 48\); expected one that broadcasts to"),
        (bias, bias, r"attn_mask: got a tensor of torch.float32 beside attn_bias"),
        (None, bias[..., :5], r"attn_bias: got shape .*5\); expected one that broadcasts to"),
        (None, mask, r"attn_bias: got a boolean tensor"),
        (None, bias.to_sparse(), r"attn_mask: got a tensor of layout torch.sparse_coo"),
        (None, bias.as_subclass(Logged), r"attn_bias: got a tensor of the subclass"),
    ):
        with pytest.raises((DTypeError, ShapeError, UnsupportedError), match=match):
            scaled_dot_product_attention(query, key, value, attn_mask, attn_bias=attn_bias)


# --- Numbers ------------------------------------------------------------------------------------------------------------------------------


def test_integers_of_64_bits_and_tensors_of_one_element(device: Any) -> None:
    query, key, value = leaves(device, *[SHAPE] * 3)
    lengths = [48, 20]
    want = scaled_dot_product_attention(
        query, key, value, seqlens_kv=torch.tensor(lengths, dtype=torch.int32, device=device), scale=0.25, softcap=4.0, window=(30, 5)
    )
    for number in (torch.tensor, lambda x: torch.tensor([x], device=device)):
        got = scaled_dot_product_attention(
            query, key, value, seqlens_kv=torch.tensor(lengths, device=device), scale=number(0.25), softcap=number(4.0), window=(number(30), number(5)),
            dropout_p=number(0.0),
        )  # fmt: skip
        assert torch.equal(got, want)
    got = scaled_dot_product_attention(
        query, key, value, seqlens_kv=torch.tensor([2**40, 20], device=device), scale=0.25, softcap=4.0, window=torch.tensor([30, 5])
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_seeds_and_longest_lengths_of_one_element(device: Any, shape: tuple[int, ...]) -> None:
    def number(x: int) -> Any:
        return torch.tensor(x, device=device).reshape(shape)

    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    want = scaled_dot_product_attention(query, key, value, dropout_p=0.3, dropout_seed=7)
    assert torch.equal(scaled_dot_product_attention(query, key, value, dropout_p=0.3, dropout_seed=number(7)), want)
    assert plan(query, key, value, dropout_p=0.3, dropout_seed=number(7)).kernels
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    offsets = torch.tensor([0, 20, SEQLEN], dtype=torch.int32, device=device)
    want = varlen_attention(*packed, offsets, offsets, 28, 28)
    assert torch.equal(varlen_attention(*packed, offsets, offsets, number(28), number(28)), want)


def test_offsets_of_64_bits_are_checked_as_those_of_32(device: Any) -> None:
    if device.type != "cpu":
        pytest.skip("values on a GPU are not read")
    query, key, value = leaves(device, *[(SEQLEN, HEADS, DIM)] * 3)
    for wrong in ([1, 48], [0, 2**32 + 48], [0, -5]):
        offsets = torch.tensor(wrong)
        with pytest.raises(OptionError, match="cu_seqlens_q"):
            varlen_attention(query, key, value, offsets, offsets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_and_slopes_of_16_bits(device: Any, dtype: Any) -> None:
    query, key, value, sinks = leaves(device, *[SHAPE] * 3, (HEADS,))
    sinks = sinks.detach().to(dtype).requires_grad_()
    slopes = torch.tensor([0.5, 0.25], dtype=dtype, device=device)
    results = scaled_dot_product_attention(query, key, value, sinks=sinks, alibi_slopes=slopes, return_lse=True)
    wanted = attention(query, key, value, sinks=sinks, slopes=slopes)
    assert_same_gradients(results, wanted, [query, key, value, sinks])


def test_slopes_that_require_grad_are_refused(device: Any) -> None:
    query, key, value, slopes = leaves(device, *[SHAPE] * 3, (HEADS,))
    with pytest.raises(UnsupportedError, match="alibi_slopes: got a tensor that requires grad"):
        scaled_dot_product_attention(query, key, value, alibi_slopes=slopes)
    with torch.no_grad():
        scaled_dot_product_attention(query, key, value, alibi_slopes=slopes)


def test_float64_is_refused_by_name(device: Any) -> None:
    query, key, value = leaves(device, *[SHAPE] * 3)
    with pytest.raises(DTypeError, match=r"query: got float64.*query.to\(torch.float32\)"):
        scaled_dot_product_attention(query.double(), key.double(), value.double())


# --- Shapes -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "mask"),
    [
        (((48, 32), (40, 32), (40, 32)), (48, 40)),
        (((2, 48, 32), (2, 40, 32), (2, 40, 32)), (2, 48, 40)),
        (((2, 48, 32), (1, 40, 32), (1, 40, 32)), (48, 40)),
        (((3, 2, 2, 48, 32), (3, 1, 2, 40, 32), (2, 2, 40, 32)), (3, 1, 2, 48, 40)),
        (((1, 2, 48, 32), (2, 2, 40, 32), (2, 2, 40, 32)), (2, 1, 48, 40)),
        (((2, 1, 48, 32), (2, 2, 40, 32), (1, 2, 40, 32)), (40,)),
        (((48, 32), (2, 2, 40, 32), (2, 2, 40, 32)), (48, 40)),
    ],
    ids=str,
)  # fmt: skip
def test_ranks_and_broadcasts_are_torchs(device: Any, shapes: tuple[tuple[int, ...], ...], mask: tuple[int, ...]) -> None:
    """Shapes, numbers and gradients are those of torch's function, with and without a mask, and lse has the shape of out."""
    inputs = leaves(device, *shapes)
    for attn_mask in (None, torch.randn(mask, device=device)):
        out, lse = scaled_dot_product_attention(*inputs, attn_mask, return_lse=True)
        want = torch_attention(*(x.double() for x in inputs), None if attn_mask is None else attn_mask.double())
        assert lse.shape == out.shape[:-1]
        assert_same_gradients((out,), (want,), inputs)
        assert torch.equal(scaled_dot_product_attention(*inputs, attn_mask), out)


def test_one_dimension_is_refused(device: Any) -> None:
    with pytest.raises(ShapeError, match=r"key: got shape \(32,\)"):
        scaled_dot_product_attention(torch.zeros(4, 32), torch.zeros(32), torch.zeros(4, 32))


def test_another_layout(device: Any) -> None:
    inputs = leaves(device, *[SHAPE] * 3)
    transposed = [x.transpose(1, 2) for x in inputs]
    out = scaled_dot_product_attention(*transposed, layout="bshd", is_causal=True)
    assert_close(out, attention(*inputs, is_causal=True)[0].transpose(1, 2))
    bias = causal_lower_right(SEQLEN, SEQLEN)
    assert torch.equal(scaled_dot_product_attention(*transposed, bias, layout="bshd"), out)


# --- Plans --------------------------------------------------------------------------------------------------------------------------------


def test_a_plan_is_that_of_the_call(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's terms, of tensors that require grad, forward and backward; nothing runs, and the generator stays where it is."""
    *inputs, mask = leaves(device, *[SHAPE[1:]] * 3, (SEQLEN, SEQLEN))
    given: list[dict[str, Any]] = [
        {
            "attn_mask": mask,
            "seqlens_kv": torch.tensor([20], device=device),
            "sinks": torch.zeros(HEADS, dtype=torch.bfloat16, device=device),
        },
        {"attn_mask": causal_lower_right(SEQLEN, SEQLEN), "dropout_p": 0.1, "scale": torch.tensor(0.5)},
        {"attn_bias": mask, "attn_mask": torch.ones(SEQLEN, dtype=torch.bool, device=device), "window": torch.tensor([5, 0])},
    ]
    run: list[str] = []
    monkeypatch.setattr(calls, "_calls", {})
    monkeypatch.setattr(launch, "executable", lambda kernel, device: None)  # nothing is compiled
    monkeypatch.setattr(prepared.PreparedCall, "launch_all", lambda self, addresses: run.append(str(self.plan)))
    for options in given:
        before = torch.get_rng_state()
        plans = [str(plan(*inputs, return_lse=True, **options)), str(plan(*inputs, backward=True, **options))]
        assert (run, torch.equal(torch.get_rng_state(), before)) == ([], True)
        scaled_dot_product_attention(*inputs, **options).sum().backward()
        assert run == plans
        run.clear()
    with pytest.raises(DTypeError, match="query: got float64"):
        plan(*(x.double() for x in inputs))


def test_a_tensor_that_is_missing_is_named(device: Any) -> None:
    tensors = dict(zip(("query", "key", "value"), (x.detach() for x in leaves(device, *[SHAPE] * 3)), strict=True))
    for name in tensors:
        for function in (scaled_dot_product_attention, plan):
            with pytest.raises(DTypeError, match=f"{name}: got None; expected a torch tensor"):
                function(**{**tensors, name: None})


def test_the_gradient_of_a_mask_is_asked_for_as_torch_does(device: Any) -> None:
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    for function in (scaled_dot_product_attention, plan):
        with pytest.raises(KeywordError, match=r"need_attn_mask_grad: got .*attn_mask\.requires_grad_\(\)"):
            function(query, key, value, torch.zeros(SEQLEN, SEQLEN), need_attn_mask_grad=True)


def test_probabilities_of_several_elements_are_refused_by_name(device: Any) -> None:
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))
    several = torch.tensor([0.1, 0.2])
    for dropout_p in (several, several.numpy()):
        for function in (scaled_dot_product_attention, plan):
            with pytest.raises(OptionError, match=r"dropout_p: got an object of type .*; expected a probability from 0\.0 to 1\.0"):
                function(query, key, value, dropout_p=dropout_p)
    offsets = torch.tensor([0, SEQLEN])
    with pytest.raises(OptionError, match=r"dropout_p: got an object of type torch\.Tensor"):
        varlen_attention(*(x[0].transpose(0, 1) for x in (query, key, value)), offsets, offsets, dropout_p=several)


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        (((2, 3), (3, 3), (3, 3)), None, r"key: got batches \(3, 3\) in \(3, 3, .*; expected batches that broadcast to \(2, 3\)"),
        (((2, 3), (1, 3), (2, 5)), None, r"value: got batches \(2, 5\).*; expected batches that broadcast to \(2, 3\)"),
        (
            ((2, 3), (2, 3), (2, 3)),
            (5, 1, 1, 48, 48),
            r"attn_mask: got shape \(5, 1, 1, 48, 48\); expected one that broadcasts to \(2, 3, ",
        ),
        (
            ((2, 3), (2, 3), (2, 3)),
            (1, 2, 3, 1, 48, 48),
            r"attn_mask: got shape \(1, 2, 3, 1, 48, 48\); expected one that broadcasts to \(2, 3, ",
        ),
    ],
    ids=str,
)
def test_batches_that_do_not_fit_are_refused_by_name(
    device: Any, shapes: tuple[tuple[int, ...], ...], mask: tuple[int, ...] | None, message: str
) -> None:
    query, key, value = (x.detach() for x in leaves(device, *[(*batches, *SHAPE[1:]) for batches in shapes]))
    attn_mask = None if mask is None else torch.zeros(mask, device=device)
    with pytest.raises(ShapeError, match=message):
        scaled_dot_product_attention(query, key, value, attn_mask)
