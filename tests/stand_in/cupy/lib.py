"""`cupy.lib.stride_tricks`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def _as_strided(x: Any, shape: Any, strides: Any) -> Any:
    return type(x)(shape, x.dtype, x.data, strides)


stride_tricks = SimpleNamespace(as_strided=_as_strided)
