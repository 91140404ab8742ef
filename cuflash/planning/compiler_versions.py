"""Which versions of NVRTC are trusted with the kernels of wgmma that a call takes by itself.

The assembler of CUDA 12.8 and 12.9 is said to put other things into registers of a product that is under way, its operand P or dS; from 13.3 on it does not (kernels.md, "Versions of the
assembler"). Whether it does so in these kernels the machine code says, of which tests read all that are compiled (tests/test_wgmma_machine_code.py, tests/test_other_compilers.py).
"""

from __future__ import annotations

from cuflash.errors import SetupError
from cuflash.jit import compiler

FIXED = (13, 3)
"""The first version whose assembler is said not to do that."""

READ = frozenset(((12, 8), (12, 9), (13, 0), (13, 1), (13, 2)))
"""Older ones whose machine code of the cases of tests/test_other_compilers.py was found to be right: each kernel without features and with some."""


def why_not() -> str | None:
    """Why the version at hand is not trusted, in words; None where it is, or where there is none, as for a plan on a machine that cannot run it."""
    try:
        version = compiler.nvrtc_version()
    except SetupError:
        return None
    if version >= FIXED or version in READ:
        return None
    read, fixed = ", ".join(map(_text, sorted(READ))), _text(FIXED)
    return f"NVRTC {_text(version)} may reuse registers of a product that is under way, as those before {fixed} are said to; of {read} the machine code was read"


def _text(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)
