"""Run calls of tangents, as `calls.py` runs the others: found by what was seen before, or checked, planned, and remembered."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cuflash.arrays.borrowing import Array, borrow
from cuflash.hardware import device
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from cuflash.problem.checks import make_problem
from cuflash.problem.operands import Operands, borrowed
from cuflash.problem.options import Options
from cuflash.problem.tangents import Tangents, TangentViews, borrowed_tangents, check_tangents
from cuflash.runtime import arguments, calls, launch
from cuflash.runtime.arguments import Value
from cuflash.runtime.prepared import PreparedCall, fill


def jvp(tangents: Tangents, operands: Operands, options: Options) -> tuple[Any, Any]:
    """The tangents of out and lse; `operands` has out and lse themselves."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():  # as in calls.py
        found: tuple[Any, Any] = torch._disable_dynamo(_jvp)(tangents, operands, options)
        return found
    return _jvp(tangents, operands, options)


def _jvp(tangents: Tangents, operands: Operands, options: Options) -> tuple[Any, Any]:
    key, call, addresses = calls.find("jvp", operands, options, tangents)
    if call is None:
        calls.refuse_pairs(operands, options)
        arrays = {
            **borrowed(operands, options),
            "out": borrow(operands.out, "out"),
            "lse": borrow(operands.lse, "lse"),
            **borrowed_tangents(tangents),
        }
        problem = replace(make_problem(arrays, options), of_tangents=True)
        calls.refuse_autograd(arrays, "Call cuflash.torch under torch.func.jvp; or pass {name}.detach().")
        views = check_tangents(problem, arrays)
        for name, view in (("out", views.out), *views.of_inputs):
            problem = problem.beside(view, arrays[name].pointer)
        planned = make_plan(problem, device.of_memory(*arrays["query"].device), tile=options.tile)
        executables = [launch.executable(kernel, planned.device) for kernel in planned.kernels]
        call = PreparedJvp(planned, executables, arrays, views)
        calls.keep(key, call)
        addresses |= {name: array.pointer for name, array in arrays.items()}
    found: tuple[Any, Any] = call.run(addresses)
    return found


class PreparedJvp(PreparedCall):
    """A call of tangents; `others` is where its inputs besides those of the forward call were found to be."""

    def __init__(self, plan: Plan, executables: Sequence[launch.Executable], inputs: Mapping[str, Array], others: TangentViews) -> None:
        super().__init__(plan, inputs)
        problem = self.problem
        views = {"query": problem.query, "key": problem.key, "value": problem.value, "out": others.out, **dict(others.of_inputs)}
        vectorized = {name: view.vectorized(problem.itemsize, inputs[name].pointer) for name, view in views.items()}
        out_dot = plan.outputs[0].name
        views[out_dot] = self.view_of(plan.outputs[0], problem.head_dim_v)
        vectorized[out_dot] = views[out_dot].aligned16(problem.itemsize)
        self.check_vectorized(vectorized)
        values: dict[str, Value] = {name: arguments.tensor(name, view, vectorized[name]) for name, view in views.items()}
        values["lse"] = arguments.rows("lse", others.lse_strides)
        stride_batch = 0 if problem.layout.varlen else problem.num_heads_q * problem.seqlen_q
        values["lse_dot"] = arguments.rows("lse_dot", (stride_batch, problem.seqlen_q, 1))
        values["sinks_dot"] = {"data": "sinks_dot", "stride_head": others.sinks_dot_stride}
        self.launches = self.fill_in(executables, values, set(inputs), {})

    def run(self, addresses: dict[str, int], given: Any = None) -> tuple[Any, Any]:
        out_dot, lse_dot, *_workspace = self.made(addresses)
        if self.launches:
            self.launch(addresses)
        else:
            for result in (out_dot, lse_dot):
                fill(result, 0.0)
        return self.framework.finish(out_dot), self.framework.finish(lse_dot)
