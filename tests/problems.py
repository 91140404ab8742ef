"""What a public call is checked into, from its arguments by name: as `runtime/calls.py` does, without running anything."""

from __future__ import annotations

from typing import Any

from cuflash.problem.checks import make_problem
from cuflash.problem.operands import Operands, borrowed
from cuflash.problem.options import Options
from cuflash.problem.problem import Problem


def checked(query: Any, key: Any, value: Any, **arguments: Any) -> Problem:
    """The problem of a call with these arguments."""
    operands = Operands(query, key, value, **{name: arguments.pop(name) for name in Operands._fields if name in arguments})
    options = Options(**arguments, varlen=operands.cu_seqlens_q is not None)
    return make_problem(borrowed(operands, options), options)
