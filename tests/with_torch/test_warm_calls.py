"""The door of `cuflash.torch`: warm calls, recorded or not, are a few functions, and everything that changes a call goes past it."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from python_calls import num_calls
from torch._subclasses.fake_tensor import FakeTensorMode
from written_out import SHAPE, assert_close, leaves

import cuflash
from cuflash.errors import CuflashError, UnsupportedError
from cuflash.runtime import calls, launch, prepared
from cuflash.torch import guards, last_calls, operators, scaled_dot_product_attention
from cuflash.torch.functions import Call
from cuflash.torch.guards import Likeness
from cuflash.torch.inputs import TENSORS
from cuflash.torch.warm_calls import Known


class NoLauncher:
    """A kernel that does nothing."""

    def launch(self, *arguments: Any) -> None:
        pass


class Nothing(torch.autograd.Function):  # type: ignore[misc]
    """A function of three tensors that does nothing: what torch itself takes."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        ctx.save_for_backward(query, key, value)
        return torch.empty(SHAPE)

    @staticmethod
    def backward(ctx: Any, grad_out: Any) -> Any:
        return ctx.saved_tensors


def test_a_warm_call_is_a_few_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond an autograd function that does nothing; the long way is three times as many."""
    monkeypatch.setattr(launch, "executable", lambda kernel, on: NoLauncher())
    monkeypatch.setattr(prepared, "simulated_memory", lambda *arguments: ())
    monkeypatch.setattr(calls, "_calls", {})
    inputs, grad_out = [torch.zeros(SHAPE, requires_grad=True) for _ in range(3)], torch.zeros(SHAPE)
    plain = [x.detach() for x in inputs]
    of_torch = num_calls(lambda: torch.autograd.grad(Nothing.apply(*inputs), inputs, grad_out))
    assert num_calls(lambda: scaled_dot_product_attention(*plain, is_causal=True)) <= 16
    assert num_calls(lambda: scaled_dot_product_attention(*inputs, is_causal=True)) <= 18
    assert num_calls(lambda: torch.autograd.grad(scaled_dot_product_attention(*inputs, is_causal=True), inputs, grad_out)) <= of_torch + 29
    assert any(isinstance(known, Known) for known in calls._calls.values())


def test_a_warm_operator_is_a_few_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, recorded and not, and the gradients."""
    monkeypatch.setattr(launch, "executable", lambda kernel, on: NoLauncher())
    monkeypatch.setattr(prepared, "simulated_memory", lambda *arguments: ())
    monkeypatch.setattr(calls, "_calls", {})
    inputs, grad_out = [torch.zeros(SHAPE, requires_grad=True) for _ in range(3)], torch.zeros(SHAPE)
    plain = [x.detach() for x in inputs]
    forward, backward = torch.ops.cuflash.attention.default, torch.ops.cuflash.attention_backward.default
    out, lse = forward(*plain, is_causal=True)
    more = 0 if operators._IS_RECENT else 16  # Dynamo is switched off
    assert num_calls(lambda: forward(*plain, is_causal=True)) <= 20 + more
    assert num_calls(lambda: forward(*inputs, is_causal=True)) <= 23 + more
    assert num_calls(lambda: backward(grad_out, None, out, lse, *plain, is_causal=True)) <= 23 + more


def gradient_for(x: Any) -> Any:
    """One that is no constant."""
    return torch.linspace(-1.0, 1.0, x.numel(), device=x.device).reshape(x.shape).to(x.dtype)


def warm(inputs: Any, **options: Any) -> list[Any]:
    """out and gradients of a call whose like has run twice."""
    grad_out = gradient_for(inputs[0])
    for _ in range(3):
        out = scaled_dot_product_attention(*inputs, **options)
        grads = torch.autograd.grad(out, inputs, grad_out.to(out.dtype))
    return [out, *grads]


def test_what_hooks_make_of_saved_tensors_is_looked_at_anew(device: Any) -> None:
    """A view of other strides is saved, and what comes back is contiguous, as from the CPU's memory."""
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves(device, SHAPE, SHAPE, SHAPE)]
    wanted = warm(inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x):
        got = warm(inputs)
    again = warm(inputs)
    for want, *others in zip(wanted, got, again, strict=True):
        for other in others:
            assert torch.equal(other, want)


def test_saved_tensors_of_other_strides_at_the_same_address(device: Any) -> None:
    """What memory that was freed and allocated again may look like: the values are the same, in another order."""
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves(device, SHAPE, SHAPE, SHAPE)]
    wanted = warm(inputs)

    def rewritten(x: Any) -> Any:
        values = x.detach().clone(memory_format=torch.contiguous_format)
        return torch.as_strided(x.detach(), x.shape, values.stride()).copy_(values)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, rewritten):
        out = scaled_dot_product_attention(*inputs)
    grad_out = gradient_for(out)
    for got, want in zip(torch.autograd.grad(out, inputs, grad_out), wanted[1:], strict=True):
        assert torch.equal(got, want)


def test_gradients_twice_and_gradients_of_some(device: Any) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    wanted = warm(inputs)
    out = scaled_dot_product_attention(*inputs)
    grad_out = gradient_for(out)
    for _ in range(2):
        for got, want in zip(torch.autograd.grad(out, inputs, grad_out, retain_graph=True), wanted[1:], strict=True):
            assert torch.equal(got, want)
    (got,) = torch.autograd.grad(out, inputs[1:2], grad_out)
    assert torch.equal(got, wanted[2])
    query, key, value = inputs[0], inputs[1].detach(), inputs[2]
    for _ in range(3):
        got, _ = torch.autograd.grad(scaled_dot_product_attention(query, value=value, key=key), (query, value), grad_out)
        assert torch.equal(got, wanted[1])


def test_what_transforms_casts_or_differentiates_twice_goes_past_the_door(device: Any) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    out, *_ = warm(inputs)
    with torch.autocast(device.type, torch.bfloat16):
        assert scaled_dot_product_attention(*inputs).dtype == torch.bfloat16
    assert scaled_dot_product_attention(*inputs).dtype == inputs[0].dtype
    plain = [x.detach() for x in inputs]
    for _ in range(3):
        assert not scaled_dot_product_attention(*plain).requires_grad
    assert_close(torch.func.vmap(scaled_dot_product_attention)(*(x[None] for x in plain))[0], out)
    first, *_ = torch.autograd.grad(scaled_dot_product_attention(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        first.sum().backward()
    first, *_ = torch.autograd.grad(scaled_dot_product_attention(*inputs), inputs, gradient_for(out), create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        first.sum().backward()


def test_gradients_of_one_tensor_are_added_in_one_order(device: Any) -> None:
    """A sum of three depends on it: keywords in another order change nothing."""
    (x,) = leaves(device, SHAPE)
    calls.forget()
    (wanted,) = warm_gradients(x, lambda: scaled_dot_product_attention(x, x, x))
    assert any(isinstance(known, Known) for known in calls._calls.values())
    (got,) = warm_gradients(x, lambda: scaled_dot_product_attention(value=x, key=x, query=x))
    assert torch.equal(got, wanted)


def warm_gradients(x: Any, call: Callable[[], Any]) -> Any:
    for _ in range(3):
        out = call()
        grads = torch.autograd.grad(out, x, gradient_for(out))
    return grads


def test_another_architecture_for_the_backward_pass_is_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "executable", lambda kernel, on: NoLauncher())
    monkeypatch.setattr(prepared, "simulated_memory", lambda *arguments: ())
    monkeypatch.setattr(calls, "_calls", {})
    inputs, grad_out, archs = [torch.zeros(SHAPE, requires_grad=True) for _ in range(3)], torch.zeros(SHAPE), []
    of_prepared = prepared.PreparedBackward.gradients

    def recording(call: Any, addresses: dict[str, int]) -> Any:
        archs.append(call.device.arch)
        return of_prepared(call, addresses)

    monkeypatch.setattr(prepared.PreparedBackward, "gradients", recording)
    for arch in ("sm_80", "sm_80", "sm_80", "sm_90", "sm_90", "sm_80"):
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
        out = scaled_dot_product_attention(*inputs)
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", arch)
        torch.autograd.grad(out, inputs, grad_out)
    assert archs == ["sm_80", "sm_80", "sm_80", "sm_90", "sm_90", "sm_80"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_results_without_memory_are_refused(device: Any) -> None:
    """A mode makes them of plain tensors: kernels would write to address 0."""
    query, key, value = (x.detach().transpose(1, 2) for x in leaves(device, SHAPE, SHAPE, SHAPE))
    for _ in range(3):
        cuflash.scaled_dot_product_attention(query, key, value)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises((CuflashError, RuntimeError), match=r"memory|data pointer"):
            cuflash.scaled_dot_product_attention(query, key, value)


def test_a_version_that_changed_is_refused(device: Any) -> None:
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    warm(inputs)
    out = scaled_dot_product_attention(*inputs)
    with torch.no_grad():
        inputs[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_zeros_without_memory_are_refused_warm(device: Any) -> None:
    plain = [x.detach() for x in leaves(device, SHAPE, SHAPE, SHAPE)]
    for _ in range(3):
        scaled_dot_product_attention(*plain)
    with pytest.raises(CuflashError, match="memory"):
        scaled_dot_product_attention(torch._efficientzerotensor(SHAPE, device=device), *plain[1:])


SMALL, LONGER = (1, 2, 8, 32), (1, 2, 24, 32)


def test_calls_that_take_turns(device: Any) -> None:
    """Lengths, strides and addresses that differ from those of the last call with the same options: each has the bits of its first call."""
    of_shape, of_other = leaves(device, *[SMALL] * 3), leaves(device, *[LONGER] * 3)
    permuted = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in of_shape]
    shifted = [torch.cat([x.detach().flatten(), x.new_zeros(1)])[1:].unflatten(0, SMALL).requires_grad_() for x in of_shape]  # 4 bytes on
    shared = [of_shape[0], *[of_shape[1].detach().requires_grad_() for _ in range(2)]]  # keys are the values' memory
    kinds = [of_shape, of_other, permuted, shifted, shared]
    wanted = [gradients_of(inputs) for inputs in kinds]
    for inputs, want in [*zip(kinds, wanted, strict=True)] * 2 + [*zip(kinds[::-1], wanted[::-1], strict=True)]:
        for _ in range(2):
            for got, expected in zip(gradients_of(inputs), want, strict=True):
                assert torch.equal(got, expected)


def gradients_of(inputs: Any, **options: Any) -> list[Any]:
    """out and gradients of one call."""
    out = scaled_dot_product_attention(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, gradient_for(out))]


def test_gradients_of_lse_and_out_in_turns(device: Any) -> None:
    """One graph with grad_out alone, with grad_lse beside it, and with grad_lse alone."""
    inputs = leaves(device, SHAPE, SHAPE, SHAPE)
    grad_out, grad_lse = torch.ones(SHAPE, device=device).cumsum(-1), torch.ones(SHAPE[:3], device=device).cumsum(-1)
    ways: list[tuple[Any, Any]] = [(grad_out, None), (grad_out, grad_lse), (None, grad_lse)]
    wanted: dict[int, Any] = {}
    for _ in range(4):
        for way, (of_out, of_lse) in enumerate(ways):
            out, lse = scaled_dot_product_attention(*inputs, return_lse=True)
            both = [(x, grad) for x, grad in ((out, of_out), (lse, of_lse)) if grad is not None]
            grads = torch.autograd.grad([x for x, _ in both], inputs, [grad for _, grad in both], retain_graph=True)
            for got, want in zip(grads, wanted.setdefault(way, grads), strict=True):
                assert torch.equal(got, want)
    for mixed, *parts in zip(*(wanted[way] for way in (1, 0, 2)), strict=True):
        assert_close(mixed, sum(parts))


PLAIN: dict[str, Any] = {
    "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False, "causal_alignment": "top_left", "tile": None, "deterministic": False,
    "allow_tf32": False, "window": None, "softcap": None, "layout": "bhsd", "batch_first": True, "num_heads": None,
}  # fmt: skip


def test_operators_run_again_what_was_prepared(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call like the last one no argument is sorted; another one in between, and a window, have their own results."""
    asked = []
    of_calls = {name: getattr(calls, name) for name in ("forward", "backward")}
    for name, function in of_calls.items():
        monkeypatch.setattr(calls, name, lambda *arguments, name=name, function=function: (asked.append(name), function(*arguments))[1])

    def run(inputs: Any, **options: Any) -> list[Any]:
        call = Call(False, {**PLAIN, **options})
        out = operators.attend(call, (*inputs, *(None,) * (len(TENSORS) - 3)), False)
        return [out, *torch.autograd.grad(out, inputs, gradient_for(out))]

    of_shape, longer = leaves(device, *[SMALL] * 3), leaves(device, *[LONGER] * 3)
    cases: list[tuple[Any, dict[str, Any]]] = [(of_shape, {}), (longer, {}), (of_shape, {"window": (3, 0)})]
    wanted = [gradients_of(inputs, **options) for inputs, options in cases]
    for (inputs, options), want in [*zip(cases, wanted, strict=True)] * 2:
        for turn in range(3):
            asked.clear()
            for got, expected in zip(run(inputs, **options), want, strict=True):
                assert torch.equal(got, expected)
            assert turn < 1 or not asked
    assert any(isinstance(last, last_calls._Last) for last in calls._calls.values())


def test_operators_look_first_at_the_call_that_ran_last(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation after training, and training again: one look for each call but the first."""
    looks: list[Any] = []
    of_likeness = Likeness.addresses
    monkeypatch.setattr(Likeness, "addresses", lambda self, tensors: (looks.append(self), of_likeness(self, tensors))[1])
    recorded = leaves(device, *[SMALL] * 3)
    kinds = [recorded, [x.detach() for x in recorded], [x.detach() for x in leaves(device, *[LONGER] * 3)]]
    nothing = (None,) * (len(TENSORS) - 3)
    calls.forget()
    for inputs in kinds * 2:
        for turn in range(3):
            looks.clear()
            operators.attend(Call(False, PLAIN), (*inputs, *nothing), False)
            assert turn < 1 or len(looks) == 1


def test_operators_whose_gradients_are_of_lse_alone(device: Any) -> None:
    """The gradient of out is none of the operator's arguments then, and zeros are made for the kernels."""
    inputs = leaves(device, *[SMALL] * 3)
    _, lse = scaled_dot_product_attention(*inputs, return_lse=True)
    grad_lse = gradient_for(lse)
    wanted = torch.autograd.grad(lse, inputs, grad_lse)
    for _ in range(3):
        _, lse = operators.attend(Call(False, PLAIN), (*inputs, *(None,) * (len(TENSORS) - 3)), True)
        for got, want in zip(torch.autograd.grad(lse, inputs, grad_lse), wanted, strict=True):
            assert torch.equal(got, want)


def test_memory_that_was_freed_is_refused(device: Any) -> None:
    """As sharded parameters free theirs between the passes."""
    inputs = leaves(device, *[SMALL] * 3)
    warm(inputs)
    out = scaled_dot_product_attention(*inputs)
    inputs[1].untyped_storage().resize_(0)
    with pytest.raises(CuflashError, match=r"key: .* memory"):
        torch.autograd.grad(out, inputs, torch.ones(SMALL, device=device).cumsum(-1))
    for _ in range(2):
        with pytest.raises(CuflashError, match=r"key: .* memory"):
            scaled_dot_product_attention(*inputs)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_tensors_of_the_older_layout_are_refused_warm(device: Any) -> None:
    plain = [x.detach() for x in leaves(device, *[SMALL] * 3)]
    for _ in range(3):
        scaled_dot_product_attention(*plain)
    with pytest.raises(CuflashError, match="older layout"):
        scaled_dot_product_attention(torch.nested.nested_tensor([plain[0][0]]), *plain[1:])


def test_a_result_that_was_changed_is_refused(device: Any) -> None:
    inputs = leaves(device, *[SMALL] * 3)
    warm(inputs)
    for changed in (0, 1):
        for _ in range(2):
            results = scaled_dot_product_attention(*inputs, return_lse=True)
            with torch.no_grad():
                results[changed].add_(1.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(results[0], inputs, torch.ones(SMALL, device=device).cumsum(-1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_saves_what_the_first_pass_saved(device: Any, use_reentrant: bool) -> None:
    """The first call, a warm one, and one of which everything is forgotten before it is computed again."""
    inputs = leaves(device, *[SMALL] * 3)
    wanted = gradients_of(inputs, scale=0.7)
    calls.forget()
    for turn in range(4):
        out = torch.utils.checkpoint.checkpoint(
            lambda *x: scaled_dot_product_attention(*x, scale=0.7), *inputs, use_reentrant=use_reentrant
        )
        if turn == 2:
            calls.forget()
        grad_out = gradient_for(out)
        for x in inputs:
            x.grad = None
        out.backward(grad_out)
        for got, want in zip((out, *(x.grad for x in inputs)), wanted, strict=True):
            assert torch.equal(got, want)


def test_calls_within_hooks_and_of_several_threads(device: Any) -> None:
    of_shape, longer = leaves(device, *[SMALL] * 3), leaves(device, *[LONGER] * 3)
    wanted = {id(inputs): warm(inputs) for inputs in (of_shape, longer)}
    wrong: list[Any] = []

    def look(inputs: Any, results: Any) -> None:
        wrong.extend(1 for got, want in zip(results, wanted[id(inputs)], strict=True) if not torch.equal(got, want))

    def run(inputs: Any, within: Any) -> None:
        def hook(grad: Any) -> None:
            with torch.enable_grad():
                look(within, gradients_of(within))

        out = scaled_dot_product_attention(*inputs)
        out.register_hook(hook)
        grad_out = gradient_for(out)
        look(inputs, (out, *torch.autograd.grad(out, inputs, grad_out)))

    def several(*given: Any) -> None:
        for _ in range(2):
            run(*given)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(several, *given) for given in ((of_shape, longer), (longer, of_shape), (of_shape, of_shape))]:
            done.result()
    assert not wrong


@pytest.mark.parametrize("names", ["none", "others"])
def test_without_what_is_internal_to_torch(device: Any, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    """A version that has none of it, and one whose functions of these names take other arguments: the same results, on longer ways."""
    inputs = leaves(device, *[SMALL] * 3)
    wanted = warm(inputs)
    calls.forget()
    other = None if names == "none" else Other
    monkeypatch.setattr(guards, "_TensorGuards", other)
    for name in ("_empty_strided_cpu", "_empty_strided_cuda"):
        monkeypatch.setattr(torch._C._dynamo.guards, name, other)
    for got, want in zip(warm(inputs), wanted, strict=True):
        assert torch.equal(got, want)
    calls.forget()


class Other:
    """Made of anything, and takes nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def check(self) -> bool:
        return True


def test_what_likeness_is() -> None:
    query, key, value = (torch.zeros(2, 8) for _ in range(3))
    alike = Likeness(("query", "key", "value"), (query, key, value))
    assert alike.addresses((value, query, key)) == {"query": value.data_ptr(), "key": query.data_ptr(), "value": key.data_ptr()}
    others = [
        torch.zeros(2, 8, dtype=torch.float16), torch.zeros(2, 7), torch.zeros(8, 2).T, torch.zeros(2, 8, requires_grad=True),
        torch.zeros(2, 8, device="meta"), torch.zeros(17)[1:].view(2, 8), torch._efficientzerotensor((2, 8)), torch.nn.Parameter(query, False),
        torch.zeros(2, 8, dtype=torch.complex64).conj().imag,
    ]  # fmt: skip
    for other in others:
        assert alike.addresses((query, key, other)) is None
        assert alike.addresses((other, key, value)) is None
    assert alike.addresses((query, key, key.detach())) is None  # values begin where keys do
    released = torch.zeros(2, 8)
    released.untyped_storage().resize_(0)
    assert alike.addresses((query, key, released)) is None
    assert Likeness(("query", "key", "value"), (query, key, key)).addresses((query, key, key)) is None


def test_inference_mode_has_results_of_its_own(device: Any) -> None:
    """Those of the mode cannot be recorded, and those outside of it can, whichever call came first."""
    plain = [x.detach() for x in leaves(device, *[SMALL] * 3)]
    for _ in range(3):
        with torch.inference_mode():
            assert scaled_dot_product_attention(*plain).is_inference()
        out = scaled_dot_product_attention(*plain)
        assert not out.is_inference()
        (out.requires_grad_() * out).sum().backward()


def made_for_each_call(device: Any) -> dict[str, dict[str, Any]]:
    """Options with which a call has tensors that nobody gave: converted ones, a state of dropout; or such as go by another name."""
    mask = torch.ones(SMALL[2], SMALL[2], dtype=torch.bool, device=device).tril(2)
    bias = torch.linspace(-1.0, 1.0, SMALL[2] ** 2, device=device).reshape(mask.shape)
    return {
        "dropout": {"dropout_p": 0.3}, "seed": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5, 7], device=device)},
        "lengths": {"seqlens_kv": torch.tensor([6], device=device)}, "bias": {"attn_bias": bias}, "mask and bias": {"attn_mask": mask, "attn_bias": bias},
    }  # fmt: skip


@pytest.mark.parametrize("way", ["dropout", "seed", "lengths", "bias", "mask and bias"])
def test_tensors_that_are_made_for_each_call(device: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No argument is sorted from the third call on; values that have changed in their place count, and so does the generator."""
    asked: list[str] = []
    for name in ("forward", "backward"):
        function = getattr(calls, name)
        monkeypatch.setattr(calls, name, lambda *arguments, name=name, function=function: (asked.append(name), function(*arguments))[1])
    inputs, options = leaves(device, *[SMALL] * 3), made_for_each_call(device)[way]

    def results(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        return gradients_of(inputs, **options)

    wanted = [results(seed) for seed in (1, 2)]
    results(1), asked.clear()
    for seed in (1, 2, 1):
        for got, want in zip(results(seed), wanted[seed - 1], strict=True):
            assert torch.equal(got, want)
    assert not asked
    assert torch.equal(wanted[0][0], wanted[1][0]) is (way != "dropout")
    for x in options.values():
        if isinstance(x, torch.Tensor) and x.dtype != torch.bool:
            x.sub_(x)
    changed = results(1)
    calls.forget()
    for got, want in zip(changed, results(1), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(changed[0], wanted[0][0]) is (way == "dropout")


def with_arrays(device: Any) -> dict[str, dict[str, Any]]:
    """Options whose tensors signatures have in another order than operators: two that look alike, a converted one, masks, a seed."""
    of_heads = [torch.tensor(x, device=device) for x in ([0.5, -1.0], [0.3, 0.9])]
    mask = torch.ones(SMALL[2], SMALL[2], dtype=torch.bool, device=device).tril(2)
    return {
        "sinks and slopes": {"is_causal": True, "alibi_slopes": of_heads[1], "sinks": of_heads[0].requires_grad_()},
        "lengths and sinks": {"seqlens_kv": torch.tensor([6], device=device), "sinks": of_heads[0]},
        "mask and bias": {"attn_mask": mask, "attn_bias": torch.linspace(-1.0, 1.0, SMALL[2] ** 2, device=device).reshape(mask.shape)},
        "seed and sinks": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5, 7], device=device), "sinks": of_heads[0]},
    }  # fmt: skip


@pytest.mark.parametrize("way", ["sinks and slopes", "lengths and sinks", "mask and bias", "seed and sinks"])
def test_recomputation_by_the_door_saves_in_the_order_of_a_first_call(device: Any, way: str) -> None:
    """A call that is computed again is a known one by then: checkpointing takes what it saves for what the first one saved, by its place."""
    inputs, options = leaves(device, *[SMALL] * 3), with_arrays(device)[way]
    inputs += [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]

    def attend(query: Any, key: Any, value: Any, *others: Any) -> Any:
        return scaled_dot_product_attention(query, key, value, **options)

    def results(run: Callable[[], Any]) -> list[Any]:
        out = run()
        return [out, *torch.autograd.grad(out, inputs, gradient_for(out))]

    wanted = results(lambda: attend(*inputs))
    calls.forget()
    for turn in range(3):
        got = results(lambda: torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False))
        for have, want in zip(got, wanted, strict=True):
            assert torch.equal(have, want), turn


def test_one_tensor_as_two_operands_says_nothing_of_the_next_call(device: Any) -> None:
    query, key, value = (x.detach() for x in leaves(device, *[SMALL] * 3))
    of_heads = [torch.tensor(x, device=device) for x in ([0.5, 1.0], [2.0, 0.1])]

    def attend(sinks: Any, slopes: Any) -> Any:
        return scaled_dot_product_attention(query, key, value, is_causal=True, sinks=sinks, alibi_slopes=slopes)

    calls.forget()
    wanted = attend(*of_heads)
    calls.forget()
    for _ in range(3):
        attend(of_heads[0], of_heads[0])
    for _ in range(3):
        assert torch.equal(attend(*of_heads), wanted)
