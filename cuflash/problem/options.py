"""The options of a call, which decide how it is carried out, and their checks: each takes what the caller passed and returns it in the type it should have.

Types are strict, because a truthy string or a scale of True is a mistake; NumPy's bools, ints and floats are as good as Python's.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Literal, NamedTuple, TypeAlias

import numpy

from cuflash.arrays.descriptions import describe
from cuflash.errors import OptionError
from cuflash.problem.layout import CANONICAL
from cuflash.problem.tile import Tiles

CausalAlignment = Literal["top_left", "bottom_right"]
_CAUSAL_ALIGNMENTS: tuple[CausalAlignment, ...] = ("top_left", "bottom_right")

MAX_SCALE = 2.0**127
"""Beyond it, scale * log2(e) overflows float32, in which the kernels hold it."""


Window: TypeAlias = tuple[int | None, int | None] | None


class Options(NamedTuple):
    """What a public function was given besides operands (`operands.py`), unchecked, in the types that its signature promises.

    The fields are the arguments of `cuflash.scaled_dot_product_attention` and its kin; a function that lacks one has its default. `varlen` is no argument: it
    says that the call is one of packed sequences. Attention builds this tuple by position, which costs a warm call a third of what keywords do.
    """

    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    causal_alignment: str = "top_left"
    return_lse: bool = False
    tile: Tiles = None
    deterministic: bool = False
    allow_tf32: bool = False
    dropout_p: float = 0.0
    window: Window = None
    softcap: float | None = None
    layout: str = CANONICAL
    batch_first: bool = True
    num_heads: int | None = None
    need_attn_mask_grad: bool = False
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    varlen: bool = False


def check_bool(name: str, value: object) -> bool:
    """True or False."""
    if isinstance(value, (bool, numpy.bool_)):
        return bool(value)
    hint = f"Write {name}=True or {name}=False."
    if name == "is_causal" and real(value) is not None and not isinstance(value, int):
        hint = "In this place flash-attn has dropout_p of packed sequences, xformers scale: pass them by name, as in dropout_p=0.1, is_causal=True."
    raise OptionError(name, describe(value), "True or False", hint)


def check_scale(scale: object) -> float | None:
    """A finite float, or None for the default."""
    if scale is None:
        return None
    number = real(scale)
    if number is not None and abs(number) <= MAX_SCALE:
        return number
    expected = "a finite float of at most 2**127 in magnitude, or None"
    raise OptionError(
        "scale", describe(scale), expected, "Leave it out for head_dim ** -0.5; convert an array of one element: float(scale)."
    )


def check_causal_alignment(value: object) -> CausalAlignment:
    """One of "top_left" and "bottom_right"."""
    for known in _CAUSAL_ALIGNMENTS:
        if isinstance(value, str) and value == known:
            return known
    hint = "top_left: query i sees keys 0 to i; bottom_right: the last query sees all keys. They are the same for equal lengths."
    raise OptionError("causal_alignment", describe(value), "'top_left' or 'bottom_right'", hint)


def check_num_heads(num_heads: object) -> int | None:
    """A positive int, or None."""
    if num_heads is None:
        return None
    if isinstance(num_heads, numbers.Integral) and not isinstance(num_heads, bool):
        count = operator.index(num_heads)
        if count > 0:
            return count
    raise OptionError("num_heads", describe(num_heads), "a positive int, or None", "Pass the number of heads of the query.")


def check_layout(layout: object, batch_first: object) -> str:
    """The order of dimensions as four letters; `batch_first=False` is short for "hbsd"."""
    first = check_bool("batch_first", batch_first)
    if not isinstance(layout, str) or sorted(layout) != sorted(CANONICAL):
        expected = "the letters b, s, h, d in the order of the dimensions, such as 'bshd' or 'bhsd'"
        hint = "b is the batch, s the sequence, h the heads, d the head dimension."
        if isinstance(layout, str) and sorted(layout.lower()) == sorted(CANONICAL):
            hint = f"Write it in lower case: layout={layout.lower()!r}."
        raise OptionError("layout", describe(layout), expected, hint)
    if first:
        return layout
    if layout != CANONICAL:
        got = f"False together with layout={layout!r}"
        raise OptionError("batch_first", got, "one of the two", "layout says the order of all dimensions: leave batch_first out.")
    return "hbsd"


def real(value: object) -> float | None:
    """The float that a real number is, infinite if it is out of range; None for anything that is no real number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf
