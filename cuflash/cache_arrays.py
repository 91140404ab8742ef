"""The arrays of a cache for generation: what it asks of NumPy, CuPy or torch."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType
from typing import Any

import numpy

from cuflash.arrays.descriptions import describe
from cuflash.errors import OptionError
from cuflash.problem.cache_scales import E4M3, TYPES


class ArrayLibrary:
    """What a cache asks of NumPy, CuPy or torch."""

    def __init__(self, xp: Any, device: Any) -> None:
        """Refuse other libraries."""
        known = (numpy, sys.modules.get("cupy"), sys.modules.get("torch"))
        if xp is None or not any(xp is library for library in known):
            got = f"the module {xp.__name__}" if isinstance(xp, ModuleType) else describe(xp)
            hint = "Keep arrays of others yourself, and call attention_with_kvcache."
            raise OptionError("xp", got, "numpy, cupy or torch", hint)
        self._is_torch = xp is not numpy and xp is sys.modules.get("torch")
        if device is not None and not self._is_torch:
            hint = "Leave it out; CuPy's arrays lie on its current device: with cupy.cuda.Device(1): …."
            raise OptionError("device", describe(device), "None with NumPy and CuPy", hint)
        self._xp, self._device = xp, device

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of a type of the library's, or of a name.

        Raises:
            OptionError: of no type that it knows.
        """
        if not self._is_torch:
            element = self._element(dtype)
            try:
                return self._xp.empty(shape, element)
            except (TypeError, ValueError):
                hint = (
                    "NumPy knows bfloat16 through the package ml_dtypes: pip install ml_dtypes."
                    if element == "bfloat16"
                    else f"Pass {TYPES}."
                )
                raise OptionError("dtype", describe(dtype), f"a type of {self._xp.__name__}'s, or its name", hint) from None
        of_torch = getattr(self._xp, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(of_torch, self._xp.dtype):
            raise OptionError(
                "dtype", describe(dtype), "a type of torch's, or its name", "Pass torch.float16, torch.bfloat16 or torch.float8_e4m3fn."
            )
        with self._plain():
            return self._xp.empty(shape, dtype=of_torch, device=self._device)

    def _element(self, dtype: Any) -> Any:
        """A type of NumPy's or CuPy's, which know that of 8-bit caches by its bits, or through `ml_dtypes`."""
        if isinstance(dtype, str) and dtype in (E4M3, "bfloat16") and self._xp is numpy:
            with contextlib.suppress(ImportError):
                import ml_dtypes

                return getattr(ml_dtypes, dtype)
        return "uint8" if isinstance(dtype, str) and dtype == E4M3 else dtype

    def int32(self, numbers: Any) -> Any:
        """A copy, which a GPU is not waited for."""
        if not self._is_torch:
            return self._xp.asarray(numbers)
        with self._plain():
            return self._xp.from_numpy(numbers).to(self._device or self._xp.get_default_device(), non_blocking=True)

    def _plain(self) -> contextlib.AbstractContextManager[object]:
        """Tensors that are made under torch.inference_mode() could not be changed outside of it."""
        mode: contextlib.AbstractContextManager[object] = self._xp.inference_mode(False)
        return mode
