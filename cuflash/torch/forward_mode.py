"""Forward-mode derivatives of attention, exact and in O(seqlen) memory, by the kernels of the two passes.

With Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ) and μ = rowsum(P ∘ Ṡ):  Ȯ = (P ∘ Ṡ) V − μ ∘ O + P V̇,  lsė = μ.

No kernel computes this as such; two calls do. Write A = [Q̇, Q] and B = [K, K̇], side by side along the head dimension, so that Ṡ = scale A Bᵀ.
1. A forward call gives W = P B, and P V̇ beside it. Then μ = scale · rowsum(A ∘ W).
2. A backward call takes [Q, 0] for the query, [K, V] for the key, B for the value, A for the gradient of its output W. Its scores are those of Q Kᵀ, its dP is A Bᵀ, its delta
   rowsum(A ∘ W), so that its dQ = scale · P ∘ (A Bᵀ − delta) [K, V]. What stands under V is (P ∘ Ṡ) V − μ ∘ O.

A tangent that is not there leaves out its half of A and B. Masks of every kind, windows, ALiBi, sinks, grouped heads, lengths and packed sequences are in P, and change nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cuflash.errors import UnsupportedError
from cuflash.problem.problem import MAX_HEAD_DIM
from cuflash.torch.inputs import TENSORS

Attend = Callable[[Any, tuple[Any, ...]], tuple[Any, Any]]
Gradients = Callable[..., tuple[Any, ...]]


def derivative(
    attend: Attend, gradients: Gradients, call: Any, tensors: tuple[Any, ...], tangents: tuple[Any, ...], out: Any, lse: Any
) -> tuple[Any, Any]:
    """Tangents of out and lse.

    Args:
        attend: (call, tensors) → out and lse.
        gradients: (call, tensors, out, lse, grad_out) → gradients in the order of the tensors.
        call: whose tangents; without its tile, which is for other head dimensions.
        tensors, tangents: in the order of `TENSORS`; a tangent is None for zero.
        out, lse: what the call gave.

    Raises:
        UnsupportedError: dropout, softcap, the tangent of a mask or of sinks, or head dimensions whose sum is too large for a kernel.
    """
    _check(call, tensors, tangents)
    query, key, value, *others = tensors
    query_dot, key_dot, value_dot = tangents[:3]
    axis, head_dim = _head_axis(call), query.shape[_head_axis(call)]
    changed = call.replaced(scale=call.options["scale"] if call.options["scale"] is not None else head_dim**-0.5, tile=None)

    def beside(*parts: Any) -> Any:
        """Along the head dimension, those that are there."""
        there = [x for x in parts if x is not None]
        return torch.cat(_of_one_batch(there, axis), axis) if len(there) > 1 else there[0]

    if query_dot is None and key_dot is None:
        return attend(changed, (query, key, value_dot, *others))[0], torch.zeros_like(lse)
    left = beside(query_dot, None if key_dot is None else query)
    right = beside(None if query_dot is None else key, key_dot)
    width = right.shape[axis]
    if value_dot is None:
        mixed, moved = attend(changed, (query, key, right, *others))[0], None
    elif width + value_dot.shape[axis] <= MAX_HEAD_DIM:
        mixed, moved = attend(changed, (query, key, beside(right, value_dot), *others))[0].split([width, value_dot.shape[axis]], axis)
    else:
        mixed, moved = (attend(changed, (query, key, x, *others))[0] for x in (right, value_dot))

    sums = (left.float() * mixed.float()).sum(axis)  # the layout without d
    order = [1, 0] if call.packed else [call.options["layout"].replace("d", "").index(letter) for letter in "bhs"]
    lse_dot = changed.options["scale"] * sums.permute(order)

    nothing = query.new_zeros([*query.shape[:axis], out.shape[axis], *query.shape[axis + 1 :]])
    given = (beside(query, nothing), beside(key, value), right, *others)
    out_dot = gradients(changed, given, mixed, lse, left)[0].narrow(axis, head_dim, out.shape[axis])
    return (out_dot if moved is None else out_dot + moved), lse_dot


def _head_axis(call: Any) -> int:
    return 2 if call.packed else call.options["layout"].index("d")


def _of_one_batch(parts: list[Any], axis: int) -> list[Any]:
    """Key and value may be broadcast along batch and heads, each for itself."""
    shape = [max(x.shape[i] for x in parts) for i in range(parts[0].dim())]
    return [x.expand([*shape[:axis], x.shape[axis], *shape[axis + 1 :]]) for x in parts]


def _check(call: Any, tensors: tuple[Any, ...], tangents: tuple[Any, ...]) -> None:
    hint = (
        "Use torch.func.vjp or autograd; or, for small shapes, torch's own attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
    )
    for name, tangent in zip(TENSORS[3:], tangents[3:], strict=True):
        if tangent is not None:
            raise UnsupportedError(name, "a forward-mode derivative by it", "derivatives by query, key and value", hint)
    for name in ("dropout_p", "softcap"):
        if call.options[name]:
            raise UnsupportedError(name, f"{call.options[name]} under a forward-mode derivative", "none", hint)
    axis = _head_axis(call)
    both = [tensors[1].shape[axis] * 2, tensors[1].shape[axis] + tensors[2].shape[axis]]
    if max(both) > MAX_HEAD_DIM:
        got = f"head dimensions {tensors[1].shape[axis]} and {tensors[2].shape[axis]} under a forward-mode derivative"
        raise UnsupportedError("key", got, f"twice head_dim, and head_dim with that of value, at most {MAX_HEAD_DIM}", hint)
