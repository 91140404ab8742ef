"""The tangents of a call: derivatives of its inputs along a direction, of which forward mode makes those of its results; and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cuflash.arrays.borrowing import AnyArray, Array, borrow
from cuflash.errors import DTypeError, OptionError, ShapeError
from cuflash.problem.checks import cast_to, check_results, check_same_kind
from cuflash.problem.layout import View
from cuflash.problem.problem import Problem, Shape3

OF_INPUTS = ("query_dot", "key_dot", "value_dot")


class Tangents(NamedTuple):
    """What a public function was given of tangents, None for zero. The fields are its arguments."""

    query_dot: AnyArray | None = None
    key_dot: AnyArray | None = None
    value_dot: AnyArray | None = None
    sinks_dot: AnyArray | None = None


@dataclass(frozen=True)
class TangentViews:
    """Where a call finds its tangents, and what the forward call gave.

    Attributes:
        of_inputs: of the tangents of query, key and value that are there, by name, with the extents of query, key and value in the problem.
        out: (batch, seqlen_q, num_heads_q, head_dim_v).
        lse_strides: of (batch, num_heads_q, seqlen_q), in elements.
        sinks_dot_stride: from head to head, 0 without a tangent of the sinks.
    """

    of_inputs: tuple[tuple[str, View], ...]
    out: View
    lse_strides: Shape3
    sinks_dot_stride: int


def borrowed_tangents(tangents: Tangents) -> dict[str, Array]:
    """Those that are there, by name."""
    return {name: borrow(tangent, name) for name, tangent in zip(tangents._fields, tangents, strict=True) if tangent is not None}


def check_tangents(problem: Problem, arrays: Mapping[str, Array]) -> TangentViews:
    """Check what a call of tangents gets besides the operands of the forward call.

    Args:
        problem: the forward call.
        arrays: of the call, by name: each tangent that is there has library, device, dtype and shape of its input, any strides; `out` and `lse` are what the
            forward call gave.

    Raises:
        OptionError: no tangent at all, or one of sinks that the call does not have.
        DeviceError, DTypeError, ShapeError: an array differs from its input, or from what the forward call made.
    """
    given = [name for name in Tangents._fields if name in arrays]
    if not given:
        hint = "Pass the tangent of an input; without any, those of out and lse are zero."
        raise OptionError(OF_INPUTS[0], "None, and so are all other tangents", "at least one tangent", hint)
    if "sinks_dot" in given and "sinks" not in arrays:
        raise OptionError(
            "sinks_dot", "an array without sinks", "sinks with it", "Pass the sinks of the forward call, or leave sinks_dot out."
        )
    for name in given:
        _check_like(name, arrays[name], arrays[name.removesuffix("_dot")])
    check_same_kind({name: arrays[name] for name in ("query", "out", "lse")})
    views = tuple((name, _view(problem, name, arrays[name])) for name in OF_INPUTS if name in arrays)
    sinks_dot_stride = arrays["sinks_dot"].strides[0] if "sinks_dot" in arrays else 0
    return TangentViews(views, *check_results(problem, arrays["out"], arrays["lse"]), sinks_dot_stride)


def _check_like(name: str, tangent: Array, of: Array) -> None:
    own = name.removesuffix("_dot")
    check_same_kind({own: of, name: tangent})
    if tangent.dtype != of.dtype:
        raise DTypeError(name, tangent.dtype, f"{of.dtype}, like {own}", f"Cast it: {cast_to(name, tangent, of.dtype)}.")
    if tangent.shape != of.shape:
        raise ShapeError(name, f"shape {tangent.shape}", f"{of.shape}, like {own}", "A tangent has the shape of its input.")


def _view(problem: Problem, name: str, tangent: Array) -> View:
    if name == OF_INPUTS[2]:
        return problem.layout.view(tangent, problem.head_dim_v).broadcast(problem.batch, problem.num_heads_kv)
    view = problem.layout.view(tangent, problem.head_dim)
    return view if name == OF_INPUTS[0] else view.broadcast(problem.batch, problem.num_heads_kv)
