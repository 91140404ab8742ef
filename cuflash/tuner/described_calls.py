"""A call as numbers and small arrays: all that another process needs to make one like it. Query, key and value are only described; whoever makes the call again
fills them with random numbers, while masks, lengths and ids keep their values, which decide how much there is to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy

from cuflash import reference
from cuflash.arrays.borrowing import bfloat16, borrow
from cuflash.cli.samples import Sample, numpy_arguments
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options
from cuflash.problem.problem import Problem

_DESCRIBED = ("query", "key", "value")


@dataclass(frozen=True)
class Described:
    """An array without its values.

    Attributes:
        shape: extents.
        axes: in the order in which they lie in memory, the one with the largest stride first.
        dtype: element type.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class DescribedCall:
    """A call.

    Attributes:
        operands: query, key and value.
        arguments: everything else that the public functions take, by name; arrays are NumPy's.
        varlen: of packed sequences.
    """

    operands: Mapping[str, Described]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    varlen: bool = False

    def operands_and_options(self, arrays: Mapping[str, Any], **more: Any) -> tuple[Operands, Options]:
        """What the launcher takes, of arrays on its device for everything that is one; `more` are other options."""
        given = {**self.arguments, **arrays}
        operands = Operands(**{name: value for name, value in given.items() if name in Operands._fields})
        options = {name: value for name, value in given.items() if name in Options._fields}
        if self.varlen:
            options.setdefault("causal_alignment", "bottom_right")
        return operands, Options(**{**options, **more}, varlen=self.varlen)


def of_sample(sample: Sample) -> DescribedCall:
    """The call of a sample."""
    shapes = sample.shapes()
    operands = {name: Described(shapes[name], tuple(range(len(shapes[name]))), sample.dtype) for name in _DESCRIBED}
    return DescribedCall(operands, {**numpy_arguments(sample), **sample.backward_options}, sample.is_packed)


def of_arguments(operands: Mapping[str, Any], arguments: Mapping[str, Any]) -> DescribedCall:
    """The call that a user would make with these arrays and other arguments, which have been checked."""
    described = {}
    for name in _DESCRIBED:
        array = borrow(operands[name], name)
        axes = sorted(range(len(array.shape)), key=lambda axis: (-abs(array.strides[axis]), axis))
        described[name] = Described(array.shape, tuple(axes), array.dtype)
    return DescribedCall(described, {name: _on_host(name, value) for name, value in arguments.items()}, "cu_seqlens_q" in arguments)


def _on_host(name: str, value: Any) -> Any:
    """Arrays as NumPy's, of whatever library and wherever they are; everything else as it is."""
    if name not in Operands._fields or value is None or isinstance(value, (int, tuple)):
        return value
    dtype = borrow(value, name).dtype
    values = reference.to_float64(value) if dtype in ("float16", "bfloat16", "float32") else numpy.array(_integers(value))
    if dtype == "bfloat16":
        return bfloat16(reference.to_bfloat16_bits(values.astype(numpy.float32)))
    return values.astype(dtype)


def _integers(value: Any) -> Any:
    """Of bool and integer arrays."""
    if hasattr(value, "get"):
        return value.get()
    return value.cpu().numpy() if hasattr(value, "cpu") else value


def extents(problem: Problem) -> str:
    """Of a call that was timed, for people."""
    heads = problem.num_heads_q if problem.num_heads_q == problem.num_heads_kv else f"{problem.num_heads_q}/{problem.num_heads_kv}"
    batch = problem.batch if problem.num_sequences is None else f"{problem.num_sequences} packed sequences"
    return f"batch {batch}, seqlen {problem.max_seqlen_q} x {problem.max_seqlen_kv}, heads {heads}"
