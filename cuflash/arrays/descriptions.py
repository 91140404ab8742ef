"""Objects of the caller in words, for messages: whatever their `__getattr__` and `__repr__` do."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy

_MAX_DESCRIPTION = 200  # characters


def attribute(x: object, name: str, default: Any = None) -> Any:
    """An attribute of the caller's object, whose `__getattr__` may raise anything."""
    try:
        return getattr(x, name, default)
    except Exception:
        return default


def has_attribute(x: object, name: str) -> bool:
    """Whether the caller's object has an attribute."""
    missing = object()
    return attribute(x, name, missing) is not missing


def describe(x: object) -> str:
    """One short line about any object, for messages."""
    kind = type(x)
    if isinstance(x, type):
        return f"the class {x.__qualname__}"
    if x is None or isinstance(x, (bool, int, float, complex, str, numpy.generic)):
        try:
            return reprlib.repr(x)[:_MAX_DESCRIPTION]
        except ValueError:  # Python refuses to print ints of thousands of digits
            return "an enormous int"
        except Exception:  # of a subclass
            pass
    return f"an object of type {kind.__qualname__ if kind.__module__ == 'builtins' else f'{kind.__module__}.{kind.__qualname__}'}"
