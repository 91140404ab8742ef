"""Jagged nested tensors, and torch's registry of flash kernels, through which torch's own functions run on cuflash."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nested._internal.nested_tensor import NestedTensor
from written_out import assert_close, assert_same_gradients, attention, leaves

from cuflash.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from cuflash.torch import registry, scaled_dot_product_attention

HEADS, DIM = 2, 32
LENGTHS = (20, 1, 28)


def jagged(device: Any, lengths: tuple[int, ...] = LENGTHS, offsets: Any = None) -> tuple[list[Any], Any]:
    """Sequences that require grad, and the nested tensor (batch, heads, sequence, head_dim) of them."""
    sequences = leaves(device, *[(n, HEADS, DIM) for n in lengths])
    if offsets is None:
        return sequences, torch.nested.as_nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
    return sequences, torch.nested.nested_tensor_from_jagged(torch.cat(sequences), offsets).transpose(1, 2)


def test_nested_tensors_of_the_older_layout_are_named(device: Any) -> None:
    query = torch.nested.nested_tensor([torch.zeros(HEADS, n, DIM, device=device) for n in LENGTHS])
    with pytest.raises(DTypeError, match=r"query: got a nested tensor of the older layout; .* Make it with layout=torch.jagged"):
        scaled_dot_product_attention(query, query, query)


@pytest.mark.parametrize("case", ["self", "other_lengths"])
def test_nested_tensors(device: Any, case: str) -> None:
    """Out, lse and gradients are those of each sequence for itself."""
    queries, query = jagged(device)
    options: dict[str, Any] = {"is_causal": True, "window": (10, None)} if case == "self" else {"softcap": 3.0}
    if case == "self":
        keys, key = jagged(device, offsets=query.offsets())
        values, value = jagged(device, offsets=query.offsets())
        window = {"is_causal": True, "window": (10, -1)}
    else:
        keys, key = jagged(device, (5, 48, 7))
        values, value = jagged(device, (5, 48, 7), key.offsets())
        window = {"softcap": 3.0}
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, **options)
    assert out.shape == query.shape
    wanted = [attention(*(x.transpose(0, 1) for x in row), **window) for row in zip(queries, keys, values, strict=True)]
    got = [x for of_row in zip(out.unbind(), lse.unbind(), strict=True) for x in of_row]
    assert_same_gradients(tuple(got), tuple(x for of_row in wanted for x in of_row), [*queries, *keys, *values])
    assert isinstance(scaled_dot_product_attention(query, key, value, **options), NestedTensor)


def test_what_does_not_go_with_nested_tensors(device: Any) -> None:
    _, x = jagged(device)
    with pytest.raises(UnsupportedError, match="attn_mask: got an argument beside nested tensors"):
        scaled_dot_product_attention(x, x, x, torch.ones(28, 28, dtype=torch.bool, device=device))
    with pytest.raises(DTypeError, match="value: got a tensor that is not nested"):
        scaled_dot_product_attention(x, x, x.transpose(1, 2).values())
    with pytest.raises(ShapeError, match="query: got a nested tensor of 4 dimensions that is jagged in dimension 1"):
        scaled_dot_product_attention(x.transpose(1, 2), x, x)


# --- torch's registry ---------------------------------------------------------------------------------------------------------------------

needs_registry = pytest.mark.skipif(not registry.register(), reason="this torch has no registry of flash kernels")


@pytest.fixture
def active() -> Any:
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        list_flash_attention_impls,
        restore_flash_attention_impl,
    )

    assert "CUFLASH" in list_flash_attention_impls()
    assert current_flash_attention_impl() is None
    activate_flash_attention_impl("CUFLASH")
    assert current_flash_attention_impl() == "CUFLASH"
    yield
    restore_flash_attention_impl()
    assert current_flash_attention_impl() is None


@needs_registry
@pytest.mark.usefixtures("active")
def test_packed_sequences_of_torchs_own_function(device: Any) -> None:
    from torch.nn.attention.varlen import varlen_attn

    inputs = leaves(device, *[(48, HEADS, DIM)] * 3)
    offsets = torch.tensor([0, 20, 48], dtype=torch.int32, device=device)
    out = varlen_attn(*inputs, offsets, offsets, 28, 28, window_size=(-1, 0))
    parts = [attention(*(x[a:b].transpose(0, 1) for x in inputs), is_causal=True)[0].transpose(0, 1) for a, b in ((0, 20), (20, 48))]
    assert_same_gradients((out,), (torch.cat(parts),), inputs)


@needs_registry
@pytest.mark.usefixtures("active")
def test_lengths_and_pages_of_torchs_own_function(device: Any) -> None:
    """`seqused_k` of packed keys, and keys in pages, whose other rows are NaN."""
    from torch.nn.attention.varlen import varlen_attn

    if "seqused_k" not in inspect.signature(varlen_attn).parameters:
        pytest.skip("an older function")
    query = torch.randn(7, 2, 16, device=device).half()
    keys, values = (torch.full((4, 16, 1, 16), torch.nan, device=device).half() for _ in range(2))
    for pages, used in ((slice(0, 2), 20), (slice(2, 4), 9)):
        for array in (keys, values):
            array[pages].view(32, 1, 16)[:used] = torch.randn(used, 1, 16).half().to(device)
    offsets, places, used = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3, 7], [0, 32, 64], [20, 9]))
    options = {"window_size": (-1, 0), "seqused_k": used, "enable_gqa": True}
    with torch.no_grad():
        out = varlen_attn(query, keys.view(64, 1, 16), values.view(64, 1, 16), offsets, places, 4, 32, **options)
        table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
        paged = varlen_attn(query, keys, values, offsets, None, 4, 32, **options, block_table=table, num_splits=2)
    for begin, end, page, length in ((0, 3, 0, 20), (3, 7, 2, 9)):
        own = (x[page : page + 2].view(32, 1, 16)[:length].transpose(0, 1) for x in (keys, values))
        want = attention(query[begin:end].transpose(0, 1), *own, is_causal=True, bottom_right=True)[0]
        for got in (out, paged):
            assert_close(got[begin:end].transpose(0, 1), want)


@needs_registry
@pytest.mark.usefixtures("active")
def test_operators_of_flash_attention(device: Any) -> None:
    """Padded batches in both orders of dimensions; dropout's state goes from one pass to the other."""
    inputs = leaves(device, *[(2, HEADS, 48, DIM)] * 3)
    grad_out = torch.randn_like(inputs[0])
    wanted = attention(*inputs, is_causal=True, scale=0.2)
    out = torch.ops.aten._scaled_dot_product_flash_attention(*inputs, 0.0, True, scale=0.2)
    assert_close(out[0], wanted[0])
    assert_close(out[1], wanted[1])
    other = torch.ops.aten._flash_attention_forward(*(x.transpose(1, 2) for x in inputs), None, None, 48, 48, 0.0, True, False, scale=0.2)
    assert torch.equal(other[0].transpose(1, 2), out[0])
    torch.manual_seed(5)
    dropped = torch.ops.aten._scaled_dot_product_flash_attention(*inputs, 0.4, True)[0]
    torch.manual_seed(5)
    same = scaled_dot_product_attention(*inputs, dropout_p=0.4, is_causal=True)
    assert torch.equal(dropped, same)
    for a, b in zip(torch.autograd.grad(dropped, inputs, grad_out), torch.autograd.grad(same, inputs, grad_out), strict=True):
        assert torch.equal(a, b)


@needs_registry
@pytest.mark.usefixtures("active")
def test_what_the_operators_ask_for_and_cuflash_has_not(device: Any) -> None:
    x = torch.randn(1, 4, 1, 8, device=device)
    with pytest.raises(UnsupportedError, match=r"return_debug_mask: got True.*restore_flash_attention_impl"):
        torch.ops.aten._flash_attention_forward(x, x, x, None, None, 4, 4, 0.0, False, True)


def test_pages_without_lengths_are_named_as_torch_names_them(device: Any) -> None:
    pages, table = torch.zeros(4, 16, 1, 16, device=device).half(), torch.zeros(1, 2, dtype=torch.int32, device=device)
    with pytest.raises(OptionError, match="seqused_k: got None beside block_table"):
        registry._forward(pages[:1, :2], pages, pages, None, None, 2, 32, 0.0, False, False, block_table=table)
