"""Which library a class of arrays belongs to.

CuPy and torch are looked up in `sys.modules` and never imported: an array of theirs cannot exist before their own import.
"""

from __future__ import annotations

import sys
import weakref

import numpy

from cuflash.arrays.frameworks import BFloat16Bits

own_classes: dict[type, str] = {BFloat16Bits: "bits", numpy.ndarray: "numpy"}
"""The libraries' own classes, as they are met; `signatures.py` adds its `Pinned`."""

_libraries_of_subclasses: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
"""Classes of the caller, which must not be kept alive here."""


def library_of(kind: type) -> str | None:
    """Which library's arrays `kind` belongs to: "numpy", "cupy", "torch", "bits", "pinned", or None for all others."""
    known = own_classes.get(kind) or _libraries_of_subclasses.get(kind)
    if known is not None:
        return known
    for library, base in (("numpy", "ndarray"), ("cupy", "ndarray"), ("torch", "Tensor")):
        array_type = getattr(sys.modules.get(library), base, None)
        if isinstance(array_type, type) and issubclass(kind, array_type):
            if kind is array_type or kind is getattr(getattr(sys.modules[library], "nn", None), "Parameter", None):
                own_classes[kind] = library
            else:
                _libraries_of_subclasses[kind] = library
            return library
    return None
