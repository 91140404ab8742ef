"""Forward-mode derivatives of attention, exact and in O(seqlen) memory, by the kernels of the two passes.

With Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ) and μ = rowsum(P ∘ Ṡ):  Ȯ = (P ∘ Ṡ) V − μ ∘ O + P V̇,  lsė = μ.

No kernel computes this as such; calls of the two passes do. Write A = [Q̇, Q] and B = [K, K̇], side by side along the head dimension, so that Ṡ = scale A Bᵀ.
1. A forward call gives W = P B, and P V̇ beside it. Then μ = scale · rowsum(A ∘ W).
2. A backward call takes [Q, 0] for the query, [K, V] for the key, B for the value, A for the gradient of its output W. Its scores are those of Q Kᵀ, its dP is A Bᵀ, its delta
   rowsum(A ∘ W), so that its dQ = scale · P ∘ (A Bᵀ − delta) [K, V]. What stands under V is (P ∘ Ṡ) V − μ ∘ O.

With a softcap the slope f of the scores comes in, which a forward call does not have: Ṡ is f ∘ scale A Bᵀ. With dropout, which drops P where it multiplies V and V̇ but not in μ, delta
would be another. Then the backward call has W = 0, so that delta is 0. What stands under V is (P ∘ Ṡ) V, and under a column of ones μ, where nothing is dropped.

A tangent that is not there leaves out its half of A and B. Masks of every kind, windows, ALiBi, sinks, grouped heads, lengths and packed sequences are in P, and change nothing here.
The tangent of a sink, whose share of a row is p, adds p ṡ to lsė and takes p ṡ O off Ȯ.
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

_ONES = 8
"""Columns of ones, of which one is looked at: rows stay multiples of 16 bytes."""


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
        UnsupportedError: the tangent of a mask, or head dimensions whose sum is too large for a kernel.
    """
    _check(call, tensors, tangents)
    calls = _Calls(attend, gradients, call, tensors, lse)
    query_dot, key_dot, value_dot = tangents[:3]
    if query_dot is None and key_dot is None:
        out_dot = torch.zeros_like(out) if value_dot is None else calls.attended(value_dot)
        lse_dot = torch.zeros_like(lse)
    else:
        left = calls.beside(query_dot, None if key_dot is None else calls.query)
        right = calls.beside(None if query_dot is None else calls.key, key_dot)
        way = _by_sums if call.dropout_p or call.options["softcap"] else _by_mixing
        out_dot, lse_dot = way(calls, left, right, value_dot, out)
    if tangents[4] is not None:
        share = torch.exp(tensors[4].view(-1, 1) - lse).where(lse > float("-inf"), 0.0) * tangents[4].view(-1, 1)  # (…, heads, queries)
        lse_dot = lse_dot + share
        out_dot = (out_dot - calls.beside_columns(share) * out).to(out.dtype)
    return out_dot, lse_dot


def _by_mixing(calls: _Calls, left: Any, right: Any, value_dot: Any, out: Any) -> tuple[Any, Any]:
    """The tangents by W, with the delta of the backward call."""
    axis, width = calls.axis, right.shape[calls.axis]
    if value_dot is None:
        mixed, moved = calls.attended(right), None
    elif width + value_dot.shape[axis] <= MAX_HEAD_DIM:
        mixed, moved = calls.attended(calls.beside(right, value_dot)).split([width, value_dot.shape[axis]], axis)
    else:
        mixed, moved = (calls.attended(x) for x in (right, value_dot))
    lse_dot = calls.call.options["scale"] * calls.of_rows((left.float() * mixed.float()).sum(axis))
    out_dot = calls.scored(calls.call, left, right, mixed, calls.value)
    return (out_dot if moved is None else out_dot + moved), lse_dot


def _by_sums(calls: _Calls, left: Any, right: Any, value_dot: Any, out: Any) -> tuple[Any, Any]:
    """The tangents by sums over columns of V and of ones, without a delta."""
    axis, call, value = calls.axis, calls.call, calls.value
    ones = value.new_ones([*value.shape[:axis], _ONES, *value.shape[axis + 1 :]])
    nothing = left.new_zeros(1).expand(left.shape)
    if call.dropout_p:
        out_dot = calls.scored(call, left, right, nothing, value)
        sums = calls.scored(call.replaced(dropout_p=0.0), left, right, nothing, ones)
    else:
        out_dot, sums = calls.scored(call, left, right, nothing, calls.beside(value, ones)).split([value.shape[axis], _ONES], axis)
    row_sums = sums.narrow(axis, 0, 1).float()
    out_dot = out_dot - row_sums * out
    if value_dot is not None:
        out_dot = out_dot + calls.attended(value_dot)
    return out_dot.to(out.dtype), calls.of_rows(row_sums.squeeze(axis))


class _Calls:
    """The calls of the two passes whose scores are those of one call.

    Attributes:
        call: it, with its scale as a number and the default tile.
        query, key, value, others: its tensors.
        axis: of the head dimension.
    """

    def __init__(self, attend: Attend, gradients: Gradients, call: Any, tensors: tuple[Any, ...], lse: Any) -> None:
        self._attend, self._gradients, self._lse = attend, gradients, lse
        self.query, self.key, self.value, *self.others = tensors
        self.axis = _head_axis(call)
        scale = call.options["scale"]
        self.call = call.replaced(scale=self.query.shape[self.axis] ** -0.5 if scale is None else scale, tile=None)
        self._order = [1, 0] if call.packed else [call.options["layout"].replace("d", "").index(letter) for letter in "bhs"]

    def attended(self, value: Any) -> Any:
        """P times another value, dropped where the call drops."""
        return self._attend(self.call, (self.query, self.key, value, *self.others))[0]

    def scored(self, call: Any, left: Any, right: Any, mixed: Any, columns: Any) -> Any:
        """scale · P ∘ (left rightᵀ − delta) times columns, with delta = rowsum(left ∘ mixed)."""
        head_dim, width = self.query.shape[self.axis], columns.shape[self.axis]
        nothing = self.query.new_zeros([*self.query.shape[: self.axis], width, *self.query.shape[self.axis + 1 :]])
        given = (self.beside(self.query, nothing), self.beside(self.key, columns), right, *self.others)
        return self._gradients(call, given, mixed, self._lse, left)[0].narrow(self.axis, head_dim, width)

    def beside(self, *parts: Any) -> Any:
        """Along the head dimension, those that are there."""
        there = [x for x in parts if x is not None]
        return torch.cat(_of_one_batch(there, self.axis), self.axis) if len(there) > 1 else there[0]

    def of_rows(self, x: Any) -> Any:
        """A number for each row, in the layout without d, in the order of lse."""
        return x.permute(self._order)

    def beside_columns(self, x: Any) -> Any:
        """The reverse, as one column."""
        return x.permute([self._order.index(axis) for axis in range(x.dim())]).unsqueeze(self.axis)


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
        if tangent is not None and name != "sinks":
            raise UnsupportedError(name, "a forward-mode derivative by it", "derivatives by query, key, value and sinks", hint)
    axis = _head_axis(call)
    ones = _ONES if call.dropout_p or call.options["softcap"] else 0
    both = [tensors[1].shape[axis] * 2, tensors[1].shape[axis] + tensors[2].shape[axis] + ones]
    if max(both) > MAX_HEAD_DIM:
        got = f"head dimensions {tensors[1].shape[axis]} and {tensors[2].shape[axis]} under a forward-mode derivative"
        expected = f"twice head_dim, and head_dim with that of value{' and 8' * bool(ones)}, at most {MAX_HEAD_DIM}"
        raise UnsupportedError("key", got, expected, hint)
