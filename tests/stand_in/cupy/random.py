"""`cupy.random`: NumPy's numbers on the device."""

from __future__ import annotations

from typing import Any

import numpy

import cupy


class RandomState:
    def __init__(self, seed: int) -> None:
        self._generator = numpy.random.default_rng(seed)

    def standard_normal(self, size: Any, dtype: Any = float) -> Any:
        return cupy.asarray(self._generator.standard_normal(size, dtype))
