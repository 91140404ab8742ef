"""What a public call is checked into, from its arguments by name: as `cuflash.runtime.calls` does, without running anything."""

from __future__ import annotations

from typing import Any

from cuflash.problem.checks import make_problem
from cuflash.problem.operands import Operands, borrowed
from cuflash.problem.options import Options
from cuflash.problem.problem import Problem
from cuflash.runtime import calls
from cuflash.runtime.prepared import PreparedCall


def checked(query: Any, key: Any, value: Any, **arguments: Any) -> Problem:
    """The problem of a call with these arguments."""
    operands = Operands(query, key, value, **{name: arguments.pop(name) for name in Operands._fields if name in arguments})
    options = Options(**arguments, varlen=operands.cu_seqlens_q is not None)
    return make_problem(borrowed(operands, options), options)


def num_prepared() -> int:
    """How many calls are prepared and kept, however many ways there are to find one."""
    return len({id(call) for call in calls._calls.values() if isinstance(call, PreparedCall)})
