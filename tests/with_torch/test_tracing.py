"""Calls under tracing: registered operators that pass torch's own checks, one compilation for all lengths, export, checkpointing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from written_out import SHAPE, assert_close, assert_same_gradients, attention, leaves

import cuflash
from cuflash.errors import UnsupportedError
from cuflash.torch import merge_attention, operators, scaled_dot_product_attention, varlen_attention
from cuflash.torch.functions import Call
from cuflash.torch.inputs import TENSORS
from cuflash.torch.operators import _options_of

BATCH, HEADS, SEQLEN, DIM = SHAPE
OPERATOR, BACKWARD = torch.ops.cuflash.attention.default, torch.ops.cuflash.attention_backward.default


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def operator_arguments(packed: bool, tensors: dict[str, Any], **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Tensors and options as an operator takes them."""
    defaults: dict[str, Any] = {
        "dropout_p": 0.0, "is_causal": True, "scale": None, "enable_gqa": False, "causal_alignment": "top_left", "tile": None, "allow_tf32": False,
        "window": None, "softcap": None, **({} if packed else {"layout": "bhsd"}),
    }  # fmt: skip
    return [tensors.get(name) for name in TENSORS], _options_of(Call(packed, defaults | options))


def permuted(x: Any) -> Any:
    """The same values, dense, with strides in another order."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


# --- torch's own checks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["permuted", "with_mask_and_sinks", "empty"])
def test_opcheck_of_padded_batches(device: Any, case: str) -> None:
    shape = (0, *SHAPE[1:]) if case == "empty" else SHAPE
    query, key, value, mask, sinks = leaves(device, shape, shape, shape, (1, HEADS, SEQLEN, SEQLEN), (HEADS,))
    tensors = {"query": permuted(query), "key": permuted(key), "value": value}
    if case == "with_mask_and_sinks":
        tensors |= {"attn_mask": mask, "sinks": sinks}
    opcheck(OPERATOR, *operator_arguments(False, tensors))


def test_opcheck_of_packed_sequences(device: Any) -> None:
    query, key, value = leaves(device, *[(SEQLEN, HEADS, DIM)] * 3)
    offsets = torch.tensor([0, 20, 48], dtype=torch.int32, device=device)
    tensors = {"query": query, "key": key, "value": value, "cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}
    opcheck(OPERATOR, *operator_arguments(True, tensors, max_seqlen_q=28, max_seqlen_kv=28))


def test_opcheck_of_merging(device: Any) -> None:
    outs, lses = leaves(device, SHAPE, SHAPE), leaves(device, SHAPE[:3], SHAPE[:3])
    opcheck(torch.ops.cuflash.merge.default, (outs, lses, "bhsd"))


def test_opcheck_of_tangents(device: Any) -> None:
    query, key, value, query_dot, key_dot, mask, sinks = (
        x.detach() for x in leaves(device, *[SHAPE] * 5, (1, HEADS, SEQLEN, SEQLEN), (HEADS,))
    )
    pairs = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=device).tril()
    tensors = {"query": permuted(query).detach(), "key": key, "value": value, "attn_mask": mask, "pair_mask": pairs, "sinks": sinks}
    given, options = operator_arguments(False, tensors)
    results = OPERATOR(*given, **options)
    opcheck(torch.ops.cuflash.attention_jvp.default, (query_dot, key_dot, None, sinks, *results, *given), options)


def test_opcheck_of_gradients(device: Any) -> None:
    query, key, value, mask, sinks = (x.detach() for x in leaves(device, *[SHAPE] * 3, (1, HEADS, SEQLEN, SEQLEN), (HEADS,)))
    of_all = torch.ops.cuflash.attention_backward_of_all.default, {"attn_mask": mask, "sinks": sinks}, {"need_attn_mask_grad": True}
    for operator, tensors, wanted in ((BACKWARD, {}, {}), of_all):
        given, options = operator_arguments(False, {"query": query, "key": permuted(key).detach(), "value": value, **tensors})
        out, lse = OPERATOR(*given, **options)
        opcheck(operator, (out.cos(), None, out, lse, *given), options | wanted)


def test_traced_forward_mode_is_an_operator(device: Any) -> None:
    """A graph of jvp, and of vmap of it."""
    inputs, tangents = ([x.detach() for x in leaves(device, *[SHAPE] * 3)] for _ in range(2))

    def call(*given: Any) -> Any:
        return jvp(lambda *x: scaled_dot_product_attention(*x, is_causal=True), given[:3], given[3:])[1]

    graph = make_fx(call)(*inputs, *tangents)
    assert [node.target for node in graph.graph.nodes].count(torch.ops.cuflash.attention_jvp.default) == 1
    assert torch.equal(graph(*inputs, *tangents), call(*inputs, *tangents))
    several = [x.unsqueeze(0) for x in (*inputs, *tangents)]
    assert torch.equal(make_fx(vmap(call))(*several)(*several)[0], call(*inputs, *tangents))


# --- torch.compile ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_compiled_transforms(device: Any, transform: str) -> None:
    """Where operators have no derivative under a transform, the graph ends at the call."""
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))

    def loss(query: Any) -> Any:
        return scaled_dot_product_attention(query, key, value, is_causal=True).square().sum()

    function = grad(loss) if transform == "grad" else lambda x: jvp(loss, (x,), (x.cos(),))[1]
    assert_close(torch.compile(function, backend="aot_eager")(query), function(query).double())


def test_one_compilation_for_all_lengths(device: Any) -> None:
    """No graph break, and no second compilation for another length; out, lse and gradients against float64."""

    def function(query: Any, key: Any, value: Any) -> Any:
        return scaled_dot_product_attention(query * 2.0, key, value, is_causal=True, return_lse=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seqlen in (48, 40, 33):
        inputs = leaves(device, *[(BATCH, HEADS, seqlen, DIM)] * 3)
        query, key, value = inputs
        assert_same_gradients(compiled(*inputs), attention(query * 2.0, key, value, is_causal=True), inputs)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3
    assert [node.target for node in counter.graphs[-1].graph.nodes].count(OPERATOR) == 1


def test_graphs_have_what_a_call_has(device: Any) -> None:
    """No argument that is as its default: each is converted several times in each call."""
    given: dict[Any, tuple[int, Any]] = {}

    def look(graph: Any, inputs: Any) -> Any:
        given.update({node.target: (len(node.args), node.kwargs) for node in graph.graph.nodes if node.target in (OPERATOR, BACKWARD)})
        return make_boxed_func(graph.forward)

    inputs = leaves(device, *[SHAPE] * 3)
    function = functools.partial(scaled_dot_product_attention, is_causal=True)
    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=look))(*inputs).sum().backward()
    assert given == {OPERATOR: (3, {"is_causal": True}), BACKWARD: (7, {"is_causal": True})}


def test_operators_are_closed_to_dynamo(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.compile leaves a function to Python, Dynamo would compile each function below."""
    (query,) = (x.detach() for x in leaves(device, SHAPE))
    seen: list[Any] = []
    run = operators._forward.run
    monkeypatch.setattr(
        operators._forward, "run", lambda *arguments: (seen.append(torch._C._dynamo.eval_frame.set_eval_frame(None)), run(*arguments))[1]
    )

    def function(x: Any) -> Any:
        for _ in range(2):
            torch._dynamo.graph_break()
            out, _ = OPERATOR(x, x, x)
        return out

    counter = CompileCounterWithBackend("eager")
    assert torch.equal(torch.compile(function, backend=counter)(query), scaled_dot_product_attention(query, query, query))
    assert not counter.frame_count
    assert seen == [None, None]


def test_compiled_packed_sequences(device: Any) -> None:
    """The number of tokens and the longest sequence are symbols too."""

    def function(query: Any, offsets: Any, longest: int) -> Any:
        return varlen_attention(query, query, query, offsets, offsets, longest, longest)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for ends in ([20, 48], [3, 40], [30, 33]):
        (query,) = leaves(device, (ends[1], HEADS, DIM))
        offsets = torch.tensor([0, *ends], device=device)
        longest = max(ends[0], ends[1] - ends[0])
        got = compiled(query, offsets, longest)
        grad_out = torch.randn_like(got)
        want = function(query, offsets, longest)
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(out, query, grad_out)[0] for out in (got, want)))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_compiled_features_equal_eager_ones(device: Any) -> None:
    """All that is an argument of the operator arrives: numbers, words, tensors and the tile."""
    *inputs, mask = leaves(device, *[SHAPE] * 3, (SEQLEN, SEQLEN))
    lengths = torch.tensor([48, 20], device=device)
    slopes = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, device=device)

    def function(*inputs: Any) -> Any:
        return scaled_dot_product_attention(
            *inputs, scale=0.2, window=(30, None), softcap=5.0, alibi_slopes=slopes, seqlens_kv=lengths, causal_alignment="bottom_right",
            tile=cuflash.Tile(16, 32, 1, 2), return_lse=True,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(*inputs, mask), function(*inputs, mask)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    grads = [torch.randn_like(x) for x in want]
    with torch.no_grad():
        assert not compiled(*inputs, mask)[0].requires_grad
    for a, b in zip(torch.autograd.grad(got, [*inputs, mask], grads), torch.autograd.grad(want, [*inputs, mask], grads), strict=True):
        assert torch.equal(a, b)


def test_compiled_merging(device: Any) -> None:
    inputs = leaves(device, *[SHAPE] * 3)

    def function(query: Any, key: Any, value: Any) -> Any:
        halves = [scaled_dot_product_attention(query, key[:, :, i::2], value[:, :, i::2], return_lse=True) for i in range(2)]
        return merge_attention([out for out, _ in halves], [lse for _, lse in halves])

    assert_same_gradients(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), attention(*inputs), inputs)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None)], ids=str)
def test_vmap_of_traced_calls_is_one_call(device: Any, dims: tuple[int | None, ...]) -> None:
    """Samples become rows of the batch, forward and backward, as in eager mode: the bits are the same."""
    inputs = [x.detach() for x in leaves(device, *[SHAPE if dim is None else (3, *SHAPE) for dim in dims])]

    def loss(*inputs: Any) -> Any:
        return scaled_dot_product_attention(*inputs, is_causal=True).square().sum()

    want = vmap(grad(loss, argnums=(0, 1, 2)), dims)(*inputs)
    graph = make_fx(vmap(grad(loss, argnums=(0, 1, 2)), dims))(*inputs)
    targets = [node.target for node in graph.graph.nodes]
    assert [targets.count(x) for x in (OPERATOR, BACKWARD)] == [1, 1]
    for a, b in zip(graph(*inputs), want, strict=True):
        assert torch.equal(a, b)


def test_vmap_of_traced_calls_with_sinks_and_masks(device: Any) -> None:
    """Sample by sample where no row of the batch can have its own."""
    query, key, value, sinks = (x.detach() for x in leaves(device, *[SHAPE] * 3, (3, HEADS)))
    mask = torch.randn(3, SEQLEN, SEQLEN, device=device)

    def function(sinks: Any, mask: Any) -> Any:
        return grad(lambda *x: scaled_dot_product_attention(query, key, value, x[1], sinks=x[0]).square().sum(), argnums=(0, 1))(
            sinks, mask
        )

    for a, b in zip(make_fx(vmap(function))(sinks, mask)(sinks, mask), vmap(function)(sinks, mask), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace(device: Any) -> None:
    """An operator too, whose result follows the lengths of later inputs."""
    (query,) = (x.detach() for x in leaves(device, SHAPE))
    traced = torch.jit.trace(lambda x: scaled_dot_product_attention(x, x, x, is_causal=True), query)
    other = query[:, :, :40]
    assert torch.equal(traced(other), scaled_dot_product_attention(other, other, other, is_causal=True))


@pytest.mark.filterwarnings("ignore")
def test_plain_calls_break_the_graph(device: Any) -> None:
    """cuflash's own functions, which torch.compile cannot look into: what is around them is compiled."""
    query, key, value = (x.detach() for x in leaves(device, *[SHAPE] * 3))

    def function(x: Any) -> Any:
        x = x * 2.0
        out, lse = cuflash.scaled_dot_product_attention(x, key, value, layout="bhsd", return_lse=True)
        return (cuflash.scaled_dot_product_attention_backward(out, x, key, value, out, lse, layout="bhsd").query + 1.0).sin()

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter)
    for _ in range(2):
        assert torch.equal(compiled(query), function(query))
    assert counter.frame_count >= 2
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes if node.op != "placeholder"]
    assert len(targets) < 20  # nothing of the calls themselves


def test_a_mapping_of_tiles_is_refused(device: Any) -> None:
    query, key, value = leaves(device, *[SHAPE] * 3)
    with pytest.raises(UnsupportedError, match=r"tile: got dict"):
        make_fx(lambda q: scaled_dot_product_attention(q, key, value, tile={}))(query)


# --- Export, and modes that watch operators -----------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def forward(self, query: Any, key: Any, value: Any) -> Any:
        return scaled_dot_product_attention(query, key, value, is_causal=True)


def test_export(device: Any) -> None:
    inputs = [x.detach() for x in leaves(device, *[SHAPE] * 3)]
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    program = torch.export.export(Model(), tuple(inputs), dynamic_shapes={name: {2: seqlen} for name in ("query", "key", "value")})
    others = [x[:, :, :40] for x in inputs]
    assert_close(program.module()(*others), attention(*others, is_causal=True)[0])


def test_make_fx_sees_one_operator(device: Any) -> None:
    inputs = [x.detach() for x in leaves(device, *[SHAPE] * 3)]
    graph = make_fx(Model())(*inputs)
    assert next(node.target for node in graph.graph.nodes if node.op == "call_function") is OPERATOR


def with_dropout(*inputs: Any) -> Any:
    return scaled_dot_product_attention(*inputs, dropout_p=0.3)


def results_of(function: Any, inputs: list[Any]) -> list[Any]:
    """Output and gradients of a call that draws from a generator in a known state."""
    torch.manual_seed(3)
    out = function(*inputs)
    torch.manual_seed(4)  # who computes again has to go back
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


def test_checkpointing_draws_the_same_dropout_again(device: Any) -> None:
    """In eager mode, selectively, and compiled: the bits of a call without checkpointing."""
    inputs = leaves(device, *[SHAPE] * 3)
    want = results_of(with_dropout, inputs)
    calls = []

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((operator, ctx.is_recompute))
        saved = torch.utils.checkpoint.CheckpointPolicy
        return saved.MUST_SAVE if operator is OPERATOR else saved.PREFER_RECOMPUTE

    def plain(*inputs: Any) -> Any:
        return checkpoint(with_dropout, *inputs, use_reentrant=False)

    def selective(*inputs: Any) -> Any:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(with_dropout, *inputs, use_reentrant=False, context_fn=contexts)

    for function in (plain, selective, torch.compile(with_dropout, backend="aot_eager"), torch.compile(plain, backend="aot_eager")):
        for a, b in zip(results_of(function, inputs), want, strict=True):
            assert torch.equal(a, b)
    assert (OPERATOR, False) in calls
