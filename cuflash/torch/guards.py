"""One look at several tensors: whether they are what others were, in all but their values and addresses.

Torch has such a look for what its compiler has specialised code for. It takes a fifth of the time in which Python asks a tensor for its properties one by one.
The class is internal to torch: where a version has none, nothing is alike, and calls are found by the properties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Guard = Callable[..., bool]
"""Tensors, as many as it was made of -> whether each has the class, dtype, shape, strides, device, dispatch keys (negation, wrappers) and requires_grad of its
counterpart, under the modes of torch in which the guard was made."""

_TensorGuards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


def guard(tensors: Sequence[Any]) -> Guard:
    """What knows tensors that are like these."""
    if _TensorGuards is None:
        return nothing_is_alike
    try:
        alike: Guard = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (TypeError, RuntimeError, AttributeError):  # another version's
        return nothing_is_alike
    return alike


def nothing_is_alike(*tensors: Any) -> bool:
    """A guard of no tensors."""
    return False
