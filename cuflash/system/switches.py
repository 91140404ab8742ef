"""Environment variables that are on, off, or leave it to the program."""

from __future__ import annotations

import os

from cuflash.errors import OptionError


def setting(name: str) -> bool | None:
    """What the variable says: True of 1, False of 0; None if it is unset or empty.

    Raises:
        OptionError: another value.
    """
    value = os.environ.get(name) or None
    if value not in (None, "0", "1"):
        raise OptionError(name, repr(value), "'0' or '1'", "Correct or unset the environment variable.")
    return None if value is None else value == "1"
