"""Environment variables that are on or off."""

from __future__ import annotations

import os

from cuflash.errors import OptionError


def is_on(name: str) -> bool:
    """Whether the variable is 1; unset, empty and 0 are off.

    Raises:
        OptionError: another value.
    """
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise OptionError(name, repr(value), "'0' or '1'", "Correct or unset the environment variable.")
    return value == "1"
