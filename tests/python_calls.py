"""How many functions in Python a call runs: a bound on it is disturbed by no load of the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def num_calls(call: Callable[[], object]) -> int:
    """Of a warm call, those of the libraries that it uses included."""
    for _ in range(3):
        call()
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count
