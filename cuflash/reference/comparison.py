"""Results beside the judge's: errors in units of what is allowed, and conversions to and from float64 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

Precision = Literal["float16", "bfloat16", "float32"]
Float64 = NDArray[numpy.float64]
Round = Callable[[NDArray[Any]], NDArray[Any]]

EPSILON: dict[str, float] = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
"""Distance from 1 to the next larger number."""

# Units of EPSILON · max|want| that `compare` allows beyond twice the naive error. In 16 bits the final rounding is half a unit. In float32
# the naive product is a BLAS sum that can be nearly exact, while kernels use the GPU's exp2, good to 2 ulp, and add in another order.
_ROUNDING_UNITS: dict[str, float] = {"float16": 1.0, "bfloat16": 1.0, "float32": 8.0, "float64": 8.0}


def compare(
    got: Any, want64: Float64, naive: Float64, *, name: str, dtype: str | None = None, terms: Callable[[], Float64] | None = None
) -> None:
    """Assert that `got` is about as close to the truth as the naive formula in its precision.

    Shapes and the positions of NaN and infinities are compared first. Then the largest error has to be at most twice the naive one, plus a
    few units in the last place of the largest wanted value. Where the naive formula overflowed, its error does not count.

    Sums that cancel leave what their terms were rounded by in float32, however the naive formula fares: with one visible key dS = P (dP - delta) is the
    difference of two equal numbers. With `terms`, each element may be off by one float32 epsilon of the sum of its absolute terms too.

    Args:
        got: the result to be judged, any kind of array.
        want64: the truth.
        naive: what the naive formula gave.
        name: of the result, for the message.
        dtype: element type that `got` was rounded to; default its own.
        terms: gives the sum of absolute terms of each element; called only where it matters.

    Raises:
        AssertionError: with the worst index, its values, and both errors.
    """
    dtype = dtype or _dtype_name(got)
    got64 = to_float64(got)
    assert got64.shape == want64.shape, f"{name}: shape {got64.shape}, expected {want64.shape}"
    if got64.size == 0:
        return
    for what, marks in (("NaN", numpy.isnan), ("+inf", numpy.isposinf), ("-inf", numpy.isneginf)):
        wrong = marks(got64) != marks(want64)
        if wrong.any():
            index = tuple(int(i) for i in numpy.argwhere(wrong)[0])
            raise AssertionError(
                f"{name}: {what} in other places than expected, {int(wrong.sum())} of {wrong.size} elements; "
                f"first at {index}: got {got64[index]}, expected {want64[index]}"
            )
    finite = numpy.isfinite(want64)
    if not finite.any():
        return
    error = numpy.zeros(want64.shape)
    numpy.subtract(got64, want64, out=error, where=finite)
    numpy.abs(error, out=error)
    counted = finite & numpy.isfinite(naive)
    naive_error = float(numpy.abs(naive[counted] - want64[counted]).max()) if counted.any() else 0.0
    largest = float(numpy.abs(want64[finite]).max())
    tolerance = 2 * naive_error + _ROUNDING_UNITS[dtype] * EPSILON[dtype] * largest
    allowed = numpy.full(error.shape, tolerance)
    if terms is not None and (error > tolerance).any():
        allowed += EPSILON["float32"] * numpy.nan_to_num(terms(), posinf=0.0, neginf=0.0)
    excess = error - allowed
    worst = tuple(int(i) for i in numpy.unravel_index(int(excess.argmax()), excess.shape))
    assert excess[worst] <= 0.0, (
        f"{name}: error {error[worst]:.3e} at {worst}: got {got64[worst]:.8g}, expected {want64[worst]:.8g}; tolerance {allowed[worst]:.3e} "
        f"= 2 x naive error {naive_error:.3e} + {_ROUNDING_UNITS[dtype]:g} {dtype} epsilons of the largest value {largest:.3e} "
        f"+ {allowed[worst] - tolerance:.3e} for terms that cancel; "
        f"{int((excess > 0.0).sum())} of {error.size} elements are beyond it"
    )


# --- Conversions ------------------------------------------------------------------------------------------------------------------------


def to_float64(x: Any) -> Float64:
    """Any kind of array as a new float64 NumPy array: NumPy, `ml_dtypes`, CuPy, torch, JAX, or uint16 tagged as bfloat16."""
    if hasattr(x, "bits"):  # tagged uint16
        return from_bfloat16_bits(to_numpy(x.bits)).astype(numpy.float64)
    if type(x).__module__.partition(".")[0] == "torch":
        return numpy.array(x.detach().double().cpu().numpy())
    array = to_numpy(x)
    if array.dtype.name == "bfloat16":
        return from_bfloat16_bits(array.view(numpy.uint16)).astype(numpy.float64)
    return array.astype(numpy.float64)


def round_to(x: NDArray[Any], precision: str) -> NDArray[Any]:
    """`x`, rounded to the nearest number of `precision` (ties to even), in x's own type, float32 or float64."""
    if precision == "bfloat16":
        return from_bfloat16_bits(to_bfloat16_bits(x)).astype(x.dtype)
    with numpy.errstate(over="ignore"):
        return numpy.asarray(x.astype(precision).astype(x.dtype))


def to_bfloat16_bits(x: NDArray[Any]) -> NDArray[numpy.uint16]:
    """The bits of each value's nearest bfloat16 (ties to even): the upper half of the float32, after adding just under half a unit."""
    bits = numpy.ascontiguousarray(x, numpy.float32).view(numpy.uint32)
    lowest_kept = (bits >> 16) & 1
    rounded = ((bits + (0x7FFF + lowest_kept)) >> 16).astype(numpy.uint16)
    return numpy.where(numpy.isnan(x), numpy.uint16(0x7FC0), rounded).reshape(numpy.shape(x))


def from_bfloat16_bits(bits: NDArray[Any]) -> NDArray[numpy.float32]:
    """The float32 values whose upper halves are `bits`."""
    return numpy.asarray((bits.astype(numpy.uint32) << 16).view(numpy.float32))


def rounding_to(precision: str) -> Round:
    if precision not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"precision {precision!r} is none of float16, bfloat16, float32")
    return lambda x: round_to(x, precision)


def exact(x: NDArray[Any]) -> NDArray[Any]:
    return x


def to_numpy(x: Any) -> NDArray[Any]:
    return numpy.asarray(x.get() if hasattr(x, "get") and hasattr(x, "device") else x)


def _dtype_name(x: Any) -> str:
    return str(x.dtype).rpartition(".")[2]
