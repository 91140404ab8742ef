"""One look at several tensors: whether they are what others were, in all but their values and addresses.

Torch has such a look for what its compiler has specialised code for. It takes a fifth of the time in which Python asks tensors for their properties one by one.
The class is internal to torch: where a version has none, nothing is alike, and calls are found by the properties. Nor is anything alike where one tensor is given
twice.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

Guard = Callable[..., bool]
"""Tensors, as many as it was made of -> whether each has the class, dtype, shape, strides, device, requires_grad and dispatch keys (negation, wrappers) of its
counterpart, under the modes of torch in which the guard was made."""

_TensorGuards = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)

data_ptr = torch.Tensor.data_ptr
_or = operator.or_
_is_nested = operator.attrgetter("is_nested")
"""Of the older layout, which is of torch's plain class: torch's look asks for its sizes, and ends the process."""


def guard(tensors: Sequence[Any]) -> Guard:
    """What knows tensors that are like these."""
    if _TensorGuards is None:
        return nothing_is_alike
    try:
        alike: Guard = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        alike(*tensors)
    except (TypeError, RuntimeError, AttributeError):  # another version's
        return nothing_is_alike
    return alike


def nothing_is_alike(*tensors: Any) -> bool:
    """The guard of tensors that cannot have one."""
    return False


def are_aligned(addresses: Sequence[int]) -> bool:
    """Whether all are of memory, on 16 bytes."""
    return all(addresses) and not functools.reduce(operator.or_, addresses) & 15


class Likeness:
    """What prepared calls depend on of their tensors: each is like its counterpart, all begin on 16 bytes, and values begin where keys do if they did so."""

    __slots__ = ("_alike", "_has_one_memory", "_key", "_may_be_nested", "_names", "_value")

    def __init__(self, names: Sequence[str], tensors: Sequence[Any], may_be_nested: bool = True) -> None:
        """That of these tensors of a call, key and value among them; `may_be_nested` says whether such come as others of the older layout."""
        lie_at = [*map(data_ptr, tensors)]
        self._names, self._may_be_nested = tuple(names), may_be_nested
        self._key, self._value = self._names.index("key"), self._names.index("value")
        self._alike = guard(tensors) if are_aligned(lie_at) else nothing_is_alike
        self._has_one_memory = lie_at[self._key] == lie_at[self._value]

    def addresses(self, tensors: Sequence[Any]) -> dict[str, int] | None:
        """Where tensors lie, by name, if they are such ones; else None."""
        if (self._may_be_nested and True in map(_is_nested, tensors)) or not self._alike(*tensors):
            return None
        lie_at = [*map(data_ptr, tensors)]
        if 0 in lie_at or functools.reduce(_or, lie_at) & 15 or (lie_at[self._key] == lie_at[self._value]) is not self._has_one_memory:
            return None
        return dict(zip(self._names, lie_at))  # noqa: B905 (they are of one length)
