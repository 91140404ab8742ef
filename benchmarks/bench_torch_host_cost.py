"""What `cuflash.torch` costs on the host up to the launch, beside torch's own attention: microseconds, with a launcher that does nothing.

    python benchmarks/bench_torch_host_cost.py

Tensors are on the CPU. As in bench_host_cost.py, what the simulator needs besides is left out. torch's function computes a single query and key of 8
numbers, so that its time is what it costs to call it. Each number is the least of many short runs of thread time, which take turns with those of all other
lines: what else the machine does slows all of them down alike, or none. Where a core is shared with another busy thread, all are half as much again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import checkpoint

import cuflash
import cuflash.torch
from cuflash.runtime import launch, prepared
from cuflash.torch import inputs

SHAPE, TINY = (1, 2, 32, 64), (1, 1, 1, 8)


class NoLauncher:
    """A kernel that takes no time."""

    def launch(self, *arguments: Any) -> None:
        pass


def microseconds(cases: dict[str, Callable[[], Any]], rounds: int = 100, calls: int = 10) -> dict[str, float]:
    """The least that each case took in any round."""
    best = dict.fromkeys(cases, float("inf"))
    for call in cases.values():
        for _ in range(50):
            call()
    for _ in range(rounds):
        for name, call in cases.items():
            for _ in range(10):  # what the other cases have driven out of the caches comes back
                call()
            start = time.thread_time_ns()
            for _ in range(calls):
                call()
            best[name] = min(best[name], (time.thread_time_ns() - start) / calls / 1000.0)
    return best


def operator_that_allocates() -> Callable[..., Any]:
    """An operator of three tensors with a gradient that does nothing but allocate what attention does: the least that a compiled call takes."""
    results, gradients = (
        "(Tensor query, Tensor key, Tensor value)",
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse)",
    )
    torch.library.define("cuflash_nothing::forward", f"{results} -> (Tensor, Tensor)")
    torch.library.define("cuflash_nothing::backward", f"{gradients} -> (Tensor, Tensor, Tensor)")

    def forward(query: Any, key: Any, value: Any) -> Any:
        return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)

    def backward(grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any) -> Any:
        return tuple([x.new_empty(x.shape) for x in (query, key, value)])

    for name, function in (("forward", forward), ("backward", backward)):
        torch.library.impl(f"cuflash_nothing::{name}", "CompositeExplicitAutograd", torch._disable_dynamo(function))
        torch.library.register_fake(f"cuflash_nothing::{name}", function)

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.set_materialize_grads(False)

    of_gradients = torch.ops.cuflash_nothing.backward.default
    torch.library.register_autograd(
        "cuflash_nothing::forward", lambda ctx, grad_out, grad_lse: of_gradients(grad_out, *ctx.saved_tensors), setup_context=save
    )
    operator: Callable[..., Any] = torch.ops.cuflash_nothing.forward.default
    return operator


def cases() -> dict[str, Callable[[], Any]]:
    plain = [torch.randn(SHAPE, dtype=torch.float16) for _ in range(3)]
    recorded = [x.clone().requires_grad_() for x in plain]
    tiny = [torch.randn(TINY).requires_grad_() for _ in range(3)]
    options: dict[str, Any] = {"layout": "bhsd", "is_causal": True}
    out, lse = cuflash.scaled_dot_product_attention(*plain, return_lse=True, **options)
    grad_out, grad_tiny = torch.ones_like(out), torch.ones(TINY)
    ours, theirs = cuflash.torch.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention

    class Nothing(torch.autograd.Function):
        """An autograd function of three tensors that does nothing but allocate what attention does."""

        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            out, lse = torch.empty(SHAPE, dtype=torch.float16), torch.empty(SHAPE[:3])
            ctx.save_for_backward(query, key, value, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
            return tuple(torch.empty(SHAPE, dtype=torch.float16) for _ in range(3))

    allocating = operator_that_allocates()

    def compiled() -> dict[str, Callable[[], Any]]:
        """Compiled functions: the first does next to nothing, which is what torch's compiler and autograd take for any of them."""
        functions: dict[str, tuple[Callable[..., Any], list[Any], Any]] = {
            "a sum of three tensors": (lambda query, key, value: query + key + value, recorded, grad_out),
            "an operator that only allocates": (lambda *x: allocating(*x)[0], recorded, grad_out),
            "torch": (lambda *x: theirs(*x, is_causal=True), tiny, grad_tiny), "cuflash.torch": (lambda *x: ours(*x, is_causal=True), recorded, grad_out),
        }  # fmt: skip
        made: dict[str, Callable[[], Any]] = {}
        for backend in ("aot_eager", "inductor"):
            for name, (function, leaves, grad) in functions.items():
                call = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
                made[f"compiled, {backend}, forward: {name}"] = functools.partial(call, *[x.detach() for x in leaves])
                made[f"compiled, {backend}, forward and backward: {name}"] = both(call, leaves, grad)
        return made

    def of_operators() -> dict[str, Callable[[], Any]]:
        """Operators that eager code calls, recorded, and under selective checkpointing, which keeps their results."""
        operators: dict[str, Callable[..., Any]] = {
            "an operator that only allocates": allocating, "cuflash.torch": functools.partial(torch.ops.cuflash.attention.default, is_causal=True)
        }  # fmt: skip
        kept = [operator.func if isinstance(operator, functools.partial) else operator for operator in operators.values()]
        contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, kept)

        def checkpointed(call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *x: checkpoint.checkpoint(call, *x, use_reentrant=False, context_fn=contexts)

        functions = {
            "an operator that only allocates": lambda *x: allocating(*x)[0],
            "cuflash.torch": functools.partial(ours, is_causal=True),
        }
        return {
            f"operator, forward and backward: {name}": both(lambda *x, call=call: call(*x)[0], recorded, grad_out) for name, call in operators.items()
        } | {
            f"selective checkpointing, forward and backward: {name}": both(checkpointed(call), recorded, grad_out) for name, call in functions.items()
        }  # fmt: skip

    def without_grad(call: Callable[..., Any], *arguments: Any) -> Any:
        return lambda: call(*arguments, is_causal=True)

    def of_features() -> dict[str, Callable[[], Any]]:
        """Forward alone, and both passes, of calls for which more than a launch has to be done: a state drawn, lengths converted. Three dimensions go the long way."""
        of_three = [x[0].detach().requires_grad_() for x in recorded]
        ways: dict[str, tuple[list[Any], dict[str, Any]]] = {
            "dropout": (recorded, {"dropout_p": 0.1}), "lengths of 64 bits": (recorded, {"seqlens_kv": torch.tensor([20])}),
            "attn_bias": (recorded, {"attn_bias": torch.zeros(SHAPE[2], SHAPE[2])}), "three dimensions": (of_three, {}),
        }  # fmt: skip
        made: dict[str, Callable[[], Any]] = {}
        for name, (leaves, options) in ways.items():
            call = functools.partial(ours, is_causal=True, **options)
            made[f"{name}, forward: cuflash.torch"] = functools.partial(call, *[x.detach() for x in leaves])
            made[f"{name}, forward and backward: cuflash.torch"] = both(call, leaves, grad_out if leaves is recorded else grad_out[0])
        return made

    def both(call: Callable[..., Any], leaves: list[Any], grad: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(*leaves), leaves, grad)

    return {
        "forward, no gradient: cuflash.torch": without_grad(ours, *plain),
        "forward, no gradient: cuflash": lambda: cuflash.scaled_dot_product_attention(*plain, **options),
        "forward, no gradient: torch": without_grad(theirs, *[x.detach() for x in tiny]),
        "forward, recorded: cuflash.torch": without_grad(ours, *recorded),
        "forward, recorded: torch": without_grad(theirs, *tiny),
        "forward, recorded: an autograd function that does nothing": lambda: Nothing.apply(*recorded),
        "forward and backward: cuflash.torch": both(lambda *x: ours(*x, is_causal=True), recorded, grad_out),
        "forward and backward: torch": both(lambda *x: theirs(*x, is_causal=True), tiny, grad_tiny),
        "forward and backward: an autograd function that does nothing": both(lambda *x: Nothing.apply(*x)[0], recorded, grad_out),
        "backward: cuflash": lambda: cuflash.scaled_dot_product_attention_backward(grad_out, *plain, out, lse, **options),
        **compiled(), **of_operators(), **of_features(),
        "part: checks of the inputs": lambda: (inputs.check_tensors((*plain, *(None,) * 11)), inputs.four_dimensions(*plain, None), inputs.autocast(*plain)),
        "part: one torch.empty": lambda: torch.empty(SHAPE, dtype=torch.float16, device="cpu"),
    }  # fmt: skip


def main() -> None:
    launch.executable = lambda kernel, device: NoLauncher()  # type: ignore[assignment, return-value]
    prepared.simulated_memory = lambda *arguments: []  # type: ignore[assignment]
    print(f"torch {torch.__version__}")
    least = microseconds(cases())
    for name, time_of in least.items():
        print(f"{time_of:7.1f} µs  {name}")
    for name, time_of in least.items():
        way, _, whose = name.partition(": ")
        beside = least.get(f"{way}: an operator that only allocates")
        if whose == "cuflash.torch" and beside is not None:
            print(f"{time_of - beside:7.1f} µs  {way}: cuflash.torch beyond an operator that only allocates")


if __name__ == "__main__":
    main()
