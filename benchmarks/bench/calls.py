"""What one library does for one case: its calls, and the words in which it says that it cannot."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from bench.cases import Case
from bench.operands import Operands

WORDS = {"alibi": "ALiBi", "varlen": "packed sequences", "seqlens_kv": "key lengths"}
"""What the reasons call features whose names are short."""
KNOWN = ("attn_mask", "dropout", "window", "softcap", "alibi", "sinks", "segments", "prefix", "varlen", "seqlens_kv")
"""Features that each library is known to have or to lack; no library has another one."""


class NotSupported(Exception):
    """A library cannot do a case; the message says why."""


@dataclass
class Calls:
    """A library on the operands of one case.

    Attributes:
        forward: gives out, and nothing else is computed.
        forward_lse: gives out as training needs it, with the LSE that the backward pass takes; None where a library has no such call.
        backward: gives the gradients of query, key, value and of an additive mask; None where a library has no backward pass.
        as_operands: turns what both give into arrays like the operands, given the name of what it is or is the gradient of.
        wait: ends what a call started, where events do not see it.
        note: what the table has to say of the times.
        context: entered around all calls of the case; entering it costs the host more than a call.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any] | None
    as_operands: Callable[[str, Any], Any] = lambda name, x: x
    wait: Callable[[], None] | None = None
    note: str = ""
    forward_lse: Callable[[], Any] | None = None
    context: Callable[[], Any] = contextlib.nullcontext

    def of(self, direction: str) -> Callable[[], Any] | None:
        """The call of a pass: "forward", "forward_lse", "backward", or "both", one behind the other as in a step of training; None where there is none."""
        if direction != "both":
            call: Callable[[], Any] | None = getattr(self, direction)
            return call
        before, after = self.forward_lse or self.forward, self.backward
        if after is None:
            return None

        def both() -> Any:
            before()
            return after()

        return both


@dataclass(frozen=True)
class Library:
    """Something to time.

    Attributes:
        name, backend, version: for the tables.
        prepare: makes `Calls`; raises `NotSupported`, or what the library raises for a case that it does not take.
        takes: whether it is worth asking.
    """

    name: str
    backend: str
    version: str
    prepare: Callable[[Operands], Calls]
    takes: Callable[[Case], bool] = lambda case: True

    @property
    def label(self) -> str:
        """What `--libraries` calls it."""
        return "jax" if self.name == "jax" else self.backend


def cuflash_calls(operands: Operands, forward_tile: Any = None, backward_tile: Any = None) -> Calls:
    """The two calls, with tiles pinned or the default ones."""
    sample, arrays = operands.case.sample, operands.arrays
    inputs = [arrays[name] for name in ("query", "key", "value")]
    forward = functools.partial(sample.forward, *inputs, tile=forward_tile, **operands.arguments)
    out, lse = forward(return_lse=True)
    backward = functools.partial(
        sample.backward, arrays["grad_out"], *inputs, out, lse, tile=backward_tile, **operands.arguments, **sample.backward_options
    )

    def gradients() -> list[Any]:
        found = backward()
        return [*found, found.attn_mask] if sample.features.need_attn_mask_grad else list(found)

    return Calls(forward, gradients, forward_lse=lambda: forward(return_lse=True)[0])


def refuse(case: Case, library: str, *lacking: str) -> None:
    """Raise if the case uses anything that is `lacking`, or not `KNOWN`."""
    sample = case.sample
    kinds = sample.features.kinds()
    used = {flag.name: True for flag in fields(kinds) if flag.name != "attn_mask" and getattr(kinds, flag.name)}
    used |= {"attn_mask": sample.features.attn_mask is not None, "varlen": sample.is_packed}
    used["seqlens_kv"] = sample.lengths_kv is not None and not sample.is_packed
    missing = [WORDS.get(name, name) for name in used if used[name] and (name in lacking or name not in KNOWN)]
    if missing:
        raise NotSupported(f"{library} has no {' and no '.join(missing)}")


def torch_calls(
    operands: Operands, call: Callable[..., Any], context: Callable[[], Any], *, transpose: bool = True, mask: Any = None, note: str = ""
) -> Calls:
    """Calls of `call(query, key, value[, mask])` with autograd; `mask` is given where its gradient is wanted."""
    torch = operands.torch

    def turned(x: Any) -> Any:
        return x.transpose(1, 2) if transpose else x  # a view: the memory is the same

    inputs = [turned(operands.arrays[name]) for name in ("query", "key", "value")] + ([] if mask is None else [mask])
    grad_out = turned(operands.arrays["grad_out"])

    leaves = [x.detach().requires_grad_() for x in inputs]
    with context():
        out = call(*leaves)

    def forward() -> Any:
        with torch.no_grad():
            return call(*inputs)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    def as_operands(name: str, x: Any) -> Any:
        return x.detach() if name == "attn_mask" else turned(x.detach())

    with context():
        forward()
    return Calls(forward, backward, as_operands, note=note, forward_lse=lambda: call(*leaves), context=context)
