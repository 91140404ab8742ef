"""Caches in 8 bits: element types of a call that has one, and the scales that its numbers are multiplied by."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

from cuflash.arrays.borrowing import Array
from cuflash.errors import DTypeError, OptionError, ShapeError
from cuflash.problem.cache import Scales
from cuflash.problem.checks import cast_to, check_dtypes
from cuflash.problem.problem import DTYPES, Problem

E4M3 = "float8_e4m3fn"
_BITS = "uint8"
"""Taken for e4m3: NumPy and CuPy have no type of their own for it."""
_CACHES = ("key_cache", "value_cache")


def check_types(arrays: Mapping[str, Array]) -> str:
    """Query and new keys and values are of one type, and the caches too, or both in 8 bits.

    Returns:
        The element type of the caches where it is another one; else "".
    """
    if not any(arrays[name].dtype in (E4M3, _BITS) for name in _CACHES):
        for name in _CACHES:
            if arrays[name].dtype not in (*DTYPES, "uint16"):
                hint = f"Cast it: {cast_to(name, arrays[name], 'float16')}."
                raise DTypeError(name, arrays[name].dtype, f"float16, bfloat16 or {E4M3}", hint)
        check_dtypes({name: arrays[name] for name in ("query", *_CACHES, "key", "value") if name in arrays})
        return ""
    check_dtypes({name: arrays[name] for name in ("query", "key", "value") if name in arrays})
    for name, other in (_CACHES, _CACHES[::-1]):
        if arrays[name].dtype not in (E4M3, _BITS):
            got, expected = arrays[name].dtype, f"{arrays[other].dtype}, like {other}"
            raise DTypeError(name, got, expected, f"Keep both caches in one type; numbers in 8 bits have {other.partition('_')[0]}_scale.")
    return E4M3


def check_scales(arrays: Mapping[str, Array], dtype: str, sequences: int, heads_kv: int) -> Scales:
    """float32, one for each key head, or for each sequence and key head; of a cache in 8 bits only."""
    return Scales(*(_check_scale(name, arrays, dtype, sequences, heads_kv) for name in ("key_scale", "value_scale")))


def _check_scale(name: str, arrays: Mapping[str, Array], dtype: str, sequences: int, heads_kv: int) -> tuple[int, int]:
    if name not in arrays:
        return 0, 0
    scale, cache = arrays[name], f"{name.partition('_')[0]}_cache"
    if not dtype:
        hint = f"Leave it out: the numbers of {cache} are meant as they are."
        raise OptionError(name, f"an array with a {cache} of {arrays[cache].dtype}", "None", hint)
    if scale.dtype != "float32":
        raise DTypeError(name, scale.dtype, "float32", f"Cast it: {cast_to(name, scale, 'float32')}.")
    if scale.shape not in ((heads_kv,), (sequences, heads_kv)):
        expected = f"({heads_kv},), or ({sequences}, {heads_kv})"
        raise ShapeError(name, f"shape {scale.shape}", expected, "Pass one scale for each key head, or for each sequence and key head.")
    strides = (0, *scale.strides) if len(scale.shape) == 1 else scale.strides
    return strides[0], strides[1]


def check_values(problem: Problem, addresses: Mapping[str, int]) -> None:
    """Check scales that lie in the host's memory.

    Raises:
        OptionError: one that is not positive and finite.
    """
    cache = problem.cache
    assert cache is not None
    for name, (stride_sequence, stride_head) in (("key_scale", cache.scales.key), ("value_scale", cache.scales.value)):
        if name not in addresses:
            continue
        for sequence in range(problem.sequences if stride_sequence else min(1, problem.sequences)):
            for head in range(problem.num_heads_kv):
                at = addresses[name] + 4 * (sequence * stride_sequence + head * stride_head)
                number = ctypes.c_float.from_address(at).value
                if not 0.0 < number < math.inf:
                    hint = "Take the largest magnitude that occurs, divided by 448."
                    raise OptionError(name, f"{number} for head {head}", "positive finite numbers", hint)
