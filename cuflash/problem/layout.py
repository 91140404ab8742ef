"""Reduce every form of the caller's arrays to canonical (batch, seqlen, heads, head_dim) order, and bring results back into that form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from cuflash.arrays.borrowing import Array

CANONICAL = "bshd"
_WORDS = {"b": "batch", "s": "seqlen", "h": "heads", "d": "head_dim"}

Shape4 = tuple[int, int, int, int]


@dataclass(frozen=True)
class View:
    """Where an array's elements are, relative to its pointer, in canonical order.

    Attributes:
        shape: (batch, seqlen, heads, head_dim).
        strides: same order, in elements.
    """

    shape: Shape4
    strides: Shape4

    def aligned16(self, itemsize: int) -> bool:
        """Whether every row of head_dim elements is contiguous and starts at a multiple of 16 bytes, provided that the pointer does."""
        *outer, last = zip(self.shape, self.strides, strict=True)
        row_is_contiguous = last[1] == 1 or last[0] == 1
        return row_is_contiguous and all(stride * itemsize % 16 == 0 for extent, stride in outer if extent > 1)

    def vectorized(self, itemsize: int, address: int) -> bool:
        """Whether kernels copy rows 16 bytes at a time if the array is at this address."""
        return address % 16 == 0 and self.aligned16(itemsize)

    def broadcast(self, batch: int, heads: int) -> View:
        """The view with these extents of batch and heads; where they were 1, the stride becomes 0."""
        (own_batch, seqlen, own_heads, head_dim), (stride_b, stride_s, stride_h, stride_d) = self.shape, self.strides
        strides = (stride_b if own_batch == batch else 0, stride_s, stride_h if own_heads == heads else 0, stride_d)
        return View((batch, seqlen, heads, head_dim), strides)


@dataclass(frozen=True)
class Layout:
    """The form in which the caller holds query, key, value and the results.

    Attributes:
        order: the letters b, s, h, d in the order of the caller's dimensions.
        flat: heads and head_dim are one dimension of extent heads * head_dim, so that arrays have three dimensions; `order` ends in "hd".
        varlen: sequences of any length lie one behind the other in (tokens, heads, head_dim); canonically that is a batch of one, with stride 0.
    """

    order: str = CANONICAL
    flat: bool = False
    varlen: bool = False

    @property
    def ndim(self) -> int:
        return 3 if self.flat or self.varlen else 4

    def to_canonical(self, values: Sequence[int]) -> Shape4:
        """Reorder four values, one per letter of `order`, to (batch, seqlen, heads, head_dim); of three, the batch is 1."""
        if self.varlen:
            return (1, *values)  # type: ignore[return-value]
        batch, seqlen, heads, head_dim = (values[self.order.index(letter)] for letter in CANONICAL)
        return batch, seqlen, heads, head_dim

    def from_canonical(self, shape: Shape4) -> tuple[int, ...]:
        """The caller's shape of an array of canonical `shape`."""
        if self.varlen:
            return shape[1:]
        ordered = tuple(shape[CANONICAL.index(letter)] for letter in self.order)
        return (*ordered[:2], ordered[2] * ordered[3]) if self.flat else ordered

    def view(self, array: Array, head_dim: int) -> View:
        """The canonical view of an array in this layout; `head_dim` says where a flat dimension is cut, and has to divide it.

        Where an extent is 1 the array's stride says nothing, and 0 stands for it: no address that a kernel makes up is less aligned than the elements.
        """
        shape, strides = array.shape, array.strides
        if self.varlen:
            shape, strides = (1, *shape), (0, *strides)
        elif self.flat:
            shape = self.to_canonical((*shape[:2], shape[2] // head_dim, head_dim))
            strides = self.to_canonical((*strides[:2], strides[2] * head_dim, strides[2]))
        else:
            shape, strides = self.to_canonical(shape), self.to_canonical(strides)
        meaningful = tuple(0 if extent == 1 else stride for extent, stride in zip(shape, strides, strict=True))
        return View(shape, meaningful)  # type: ignore[arg-type]

    def describe(self) -> str:
        """The shape in words, such as "(batch, seqlen, heads, head_dim)"."""
        if self.varlen:
            return "(tokens, heads, head_dim)"
        words = [_WORDS[letter] for letter in self.order]
        return f"({words[0]}, {words[1]}, heads * head_dim)" if self.flat else f"({', '.join(words)})"


def overlaps_itself(array: Array) -> bool:
    """Whether two elements may share memory: sorted by size, each stride has to step over all that the smaller ones reach."""
    if 0 in array.shape:
        return False
    reach = 0
    for stride, extent in sorted((abs(stride), extent) for extent, stride in zip(array.shape, array.strides, strict=True) if extent > 1):
        if stride <= reach:
            return True
        reach += (extent - 1) * stride
    return False


def is_first_columns(of: Array, view: View, other: Array, other_view: View) -> bool:
    """Whether an array is the first columns of another one, in the same memory."""
    same = (of.pointer, of.dtype, view.shape[:3], view.strides) == (other.pointer, other.dtype, other_view.shape[:3], other_view.strides)
    return same and view.shape[3] <= other_view.shape[3]


def share_memory(left: Array, right: Array) -> bool:
    """Whether any element of `left` lies in memory of `right`; interleaved views of one buffer do not share.

    Exact but for extremely irregular strides, which count as sharing.
    """
    (low_left, high_left), (low_right, high_right) = left.byte_range, right.byte_range
    if left.device != right.device or low_left >= high_right or low_right >= high_left:
        return False
    patience = 10_000  # candidate solutions; ordinary views need a handful
    try:
        return numpy.shares_memory(_addresses(left), _addresses(right), patience)  # type: ignore[arg-type]
    except numpy.exceptions.TooHardError:
        return True


def _addresses(array: Array) -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.void]]:
    """A NumPy array with the addresses of `array`, for comparison only: they may be a GPU's."""
    byte_strides = tuple(stride * array.itemsize for stride in array.strides)
    return numpy.asarray(_Interface((array.pointer, True), array.shape, byte_strides, f"|V{array.itemsize}"))


class _Interface:
    """An object that NumPy sees as an array, see numpy.org/doc/stable/reference/arrays.interface.html."""

    def __init__(self, data: tuple[int, bool], shape: tuple[int, ...], strides: tuple[int, ...], typestr: str) -> None:
        self.__array_interface__ = {"version": 3, "data": data, "shape": shape, "strides": strides, "typestr": typestr}
