"""How far a tile's result is from the one it has to be, row by row.

Contract: rows lie along the last axis, and each is measured by its own largest value. A causal call's late rows are small beside its early ones: late tiles of a
value's gradient are a thousandth of the first at 4096 queries, so that a bound by the whole array's largest value would let zeros pass for them.
"""

from __future__ import annotations

from typing import Any

import numpy

ALLOWED = {"float16": 2.0**-8, "bfloat16": 2.0**-5, "float32": 2.0**-16, "tf32": 2.0**-7}
"""Of the largest value of a row: how far two tiles may be apart, which add in different orders. A tile that reads or writes a wrong element is further off."""

FLOOR = 2.0**-16
"""Of the largest value of all rows: what rounding in float32 leaves where the terms of a row cancel."""


def excess(got: Any, want: Any, allowed: float, floor: float = FLOOR) -> float:
    """The largest difference, in units of what is allowed in its row: at most 1 for a result that is right. NaN is never right, and infinities are if they agree.

    Args:
        got, want: arrays of floating point of one shape, NumPy's or CuPy's.
        allowed, floor: see `ALLOWED` and `FLOOR`.
    """
    if not want.size:
        return 0.0
    with numpy.errstate(invalid="ignore"):  # infinity minus infinity
        difference = abs(got - want)
    difference[got == want] = 0.0
    magnitude = abs(want)
    magnitude[magnitude == numpy.inf] = 0.0
    limit = allowed * magnitude.max(axis=-1, keepdims=True) + (floor * float(magnitude.max()) + 1e-30)
    return float((difference / limit).max())
