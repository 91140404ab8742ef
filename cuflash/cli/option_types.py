"""What options of commands take: element types, and counts as types for `argparse`."""

from __future__ import annotations

import argparse

DTYPES = ("float16", "bfloat16", "float32")


def positive(text: str) -> int:
    """A number of at least 1."""
    return _at_least(1, text, "a positive number")


def not_negative(text: str) -> int:
    """A number of at least 0."""
    return _at_least(0, text, "a number of at least 0")


def _at_least(least: int, text: str, expected: str) -> int:
    number = int(text)
    if not least <= number < 2**31:
        raise argparse.ArgumentTypeError(f"got {number}; expected {expected if number < least else 'a number below 2**31'}")
    return number
