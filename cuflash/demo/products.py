"""Matrix products for the demo, so that on a GPU it needs nothing but what cuflash needs.

CuPy's own `@` calls cuBLAS, a library of some 600 MB. The matrices here are small enough for one thread per element of the result.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy


def dot(a: Any, b: Any) -> Any:
    """`a @ b` for float32 arrays of NumPy or CuPy, any strides: (…, rows, inner) @ (…, inner, columns), with equal leading dimensions."""
    if isinstance(a, numpy.ndarray):
        return a @ b
    import cupy

    *_, rows, inner = a.shape
    result = cupy.empty((*a.shape[:-1], b.shape[-1]), cupy.float32)
    return _kernel()(a, b, rows, inner, b.shape[-1], result)


@functools.cache
def _kernel() -> Any:
    """Element i of the flattened result; CuPy turns the flat indices of `raw` operands into strided ones."""
    import cupy

    return cupy.ElementwiseKernel(
        "raw float32 a, raw float32 b, int64 rows, int64 inner, int64 columns",
        "float32 result",
        """
        const long long row = i / columns, column = i % columns, matrix = row / rows;
        float sum = 0;
        for (long long k = 0; k < inner; ++k) sum += a[row * inner + k] * b[(matrix * inner + k) * columns + column];
        result = sum;
        """,
        "cuflash_demo_dot",
    )
