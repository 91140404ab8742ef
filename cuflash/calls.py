"""Run the public calls: a call whose like was seen before runs as it was prepared then; another one is checked and prepared first.

A new call is a straight line: borrow the arrays, check them into a `Problem`, plan, load the kernels, prepare, run. All but the last step depends only on
what `arrays.signature` sees, so its result is kept as a `PreparedCall`, and a warm call looks it up and runs it.

The functions here take the arguments of a public function by name, all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable, Mapping
from operator import itemgetter
from typing import Any

from cuflash import device, features, launch
from cuflash.arrays import Array, attribute, borrow, describe, pointer, signature
from cuflash.errors import CompilationForbiddenError, DTypeError, OptionError, UnsupportedError
from cuflash.launch import Executable
from cuflash.options import check_bool
from cuflash.planning import Plan, Tiles, make_plan
from cuflash.prepared import Gradients, PreparedBackward, PreparedForward
from cuflash.problem import Problem, check_backward, check_out, make_problem
from cuflash.tiles import Tile
from cuflash.tuning import warmup_call

Arguments = Mapping[str, Any]

_INPUTS = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv")
_RESULTS = ("out", "grad_out", "lse")
_OPTIONAL = ("grad_lse", "seqlens_kv", *features.ARRAYS)
_NOT_OF_PROBLEM = (*_RESULTS, "grad_lse", "tile", "backward")


def forward(function: str, arguments: Arguments) -> Any:
    """What the public `function` returns for its arguments: the output, or with `return_lse` the output and lse."""
    given = arguments["out"]
    key, call, pointers = _find(function, arguments)
    if call is not None and (given is None or call.may_write(given, pointers)):
        return call.run(pointers, given)

    problem, inputs = _check(arguments, _INPUTS)
    refuse_autograd(inputs)
    on = device.of_memory(*inputs["query"].device)
    out = None if given is None else borrow(given, "out")
    view = None if out is None else check_out(problem, problem.layout, out, _by_argument(inputs))
    planned = make_plan(problem, on, tile=arguments["tile"])
    kernels = _load(planned, arguments["tile"])
    call = PreparedForward(planned, kernels, inputs, out, view)
    keep(key, call)
    pointers |= {name: array.pointer for name, array in inputs.items()}
    if out is not None:
        pointers["out"] = out.pointer
    return call.run(pointers, given)


def backward(function: str, arguments: Arguments) -> Gradients:
    """What the public backward `function` returns for its arguments."""
    key, call, pointers = _find(function, arguments)
    if call is None:
        for name in ("out", "lse"):  # the two that come from the forward call are easily mixed up
            if arguments[name] is None or isinstance(arguments[name], tuple):
                hint = f"Unpack it: out, lse = cuflash.{function.removesuffix('_backward')}(..., return_lse=True)."
                raise DTypeError(name, describe(arguments[name]), f"the {name} of the forward call", hint)
        problem, inputs = _check(arguments, (*_INPUTS, *_RESULTS))
        refuse_autograd(inputs)
        on = device.of_memory(*inputs["query"].device)
        views = check_backward(problem, problem.layout, inputs["grad_out"], inputs["out"], inputs["lse"], inputs.get("grad_lse"))
        planned = make_plan(problem, on, backward=True, tile=arguments["tile"])
        kernels = _load(planned, arguments["tile"])
        call = PreparedBackward(planned, kernels, inputs, views)
        keep(key, call)
        pointers |= {name: array.pointer for name, array in inputs.items()}
    gradients: Gradients = call.run(pointers)
    return gradients


def plan(arguments: Arguments) -> Plan:
    """The plan of a call with these arguments."""
    backward = check_bool("backward", arguments["backward"])
    if check_bool("need_attn_mask_grad", arguments.get("need_attn_mask_grad", False)) and not backward:
        hint = "Pass backward=True too; the forward pass is the same with and without."
        raise OptionError("need_attn_mask_grad", "True with backward=False", "backward=True with it", hint)
    problem, inputs = _check(arguments, _INPUTS)
    on = device.of_memory(*inputs["query"].device)
    return make_plan(problem, on, backward=backward, tile=arguments["tile"])


def _check(arguments: Arguments, required: tuple[str, ...]) -> tuple[Problem, dict[str, Array]]:
    """Borrow the arrays of a call and check it."""
    optional = [name for name in _OPTIONAL if arguments.get(name) is not None]
    if "cu_seqlens_q" in arguments:
        optional = [name for name in optional if name != "attn_mask"]  # refused, whatever it is
    names = [*(name for name in required if name in arguments), *optional]
    inputs = {name: borrow(arguments[name], name) for name in names}
    _, state = features.drawn_from(arguments["dropout_p"], arguments["dropout_seed"])
    if state is not None:
        features.check_dropout_seed(features.check_dropout_p(arguments["dropout_p"]), state)
        inputs["dropout_state"] = borrow(state, "dropout_seed")
    checked: dict[str, Any] = {name: inputs.get(name, argument) for name, argument in arguments.items() if name not in _NOT_OF_PROBLEM}
    checked["dropout_seed"] = inputs.get("dropout_state", arguments["dropout_seed"])
    return make_problem(**checked), inputs


def _by_argument(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays by what the caller knows them by."""
    return {"dropout_seed" if name == "dropout_state" else name: array for name, array in inputs.items()}


def _load(plan: Plan, tile: Tiles) -> list[Executable]:
    """The kernels of a plan, compiled if they are not in the cache."""
    try:
        return [launch.executable(kernel, plan.device) for kernel in plan.kernels]
    except CompilationForbiddenError as error:
        call = warmup_call(plan, tile)
        raise error if call is None else CompilationForbiddenError(error.missing, f"Compile it beforehand: {call}") from None


def refuse_autograd(inputs: Mapping[str, Array], backward: str = "scaled_dot_product_attention_backward") -> None:
    """A tensor that autograd records would silently lose its gradient here; `backward` is the function that computes it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    for name, array in inputs.items():
        if attribute(array.owner, "requires_grad"):
            hint = f"Pass {name}.detach() or call under torch.no_grad(), and compute gradients with {backward}."
            raise UnsupportedError(name, "a tensor that requires grad", "a tensor outside of autograd", hint)


# --- Calls that are kept ------------------------------------------------------------------------------------------------------------------

_MAX_CALLS = 4096
_calls: dict[Hashable, Any] = {}

_Values = Callable[[Arguments], tuple[Any, ...]]
_getters: dict[str, tuple[tuple[str, ...], _Values, _Values]] = {}
"""Public function -> names of its arrays, what gets these, and what gets its other arguments but the seed."""


def _getters_of(function: str, arguments: Arguments) -> tuple[tuple[str, ...], _Values, _Values]:
    arrays = tuple(name for name in (*_INPUTS, *_RESULTS, *_OPTIONAL) if name in arguments)
    others = itemgetter(*(name for name in arguments if name not in arrays and name != "dropout_seed"))
    return _getters.setdefault(function, ((*arrays, "dropout_state"), itemgetter(*arrays), others))


def _find(function: str, arguments: Arguments) -> tuple[Hashable | None, Any, dict[str, int]]:
    """The key of a call, what was prepared for it, and what is written into its argument structs: addresses, and the words of a seed.

    The key is all that the preparation depends on; on addresses it depends for their alignment only, and on seeds not at all. It is None where it cannot be
    had cheaply. Types are part of it, those of what options hold too: True and 1 are not the same option, nor are the windows (1, 0) and (True, 0).
    """
    names, arrays, others = _getters.get(function) or _getters_of(function, arguments)
    pointers, state = features.drawn_from(arguments["dropout_p"], arguments["dropout_seed"])
    values = others(arguments)
    seen: list[Hashable] = [function, device.simulator_arch(), bool(pointers), values, _types_of(values)]
    for name, operand in zip(names, (*arrays(arguments), state), strict=True):
        if operand is None:
            seen.append(None)
            continue
        kind = signature(operand)
        if kind is None:
            return None, None, pointers
        address = pointers[name] = pointer(operand)
        seen += (kind, address & 15)
    key, call = kept(seen)
    return key, call, pointers


def kept(seen: list[Hashable]) -> tuple[Hashable | None, Any]:
    """The key that a call with these properties is kept by, and the call; the key is None where an option cannot be hashed, such as a mapping of tiles."""
    key = tuple(seen)
    try:
        return key, _calls.get(key)
    except TypeError:
        return None, None


_SCALARS = frozenset((type(None), bool, int, float, str))


def _types_of(values: Collection[Any]) -> tuple[Hashable, ...]:
    """The type of each value, and behind them the types of what they hold."""
    types = tuple(map(type, values))
    if _SCALARS.issuperset(types):
        return types
    return types + tuple([_types_within(value) for value in values if type(value) not in _SCALARS])


def _types_within(value: object) -> tuple[Hashable, ...]:
    if isinstance(value, tuple):
        return _types_of(value)
    if isinstance(value, Tile):
        return _types_of(vars(value).values())
    if isinstance(value, Mapping):
        return (*_types_of(value), *_types_of(value.values()))
    return ()


def keep(key: Hashable | None, call: Any) -> None:
    """Find a prepared call again by its key."""
    if key is None:
        return
    if len(_calls) >= _MAX_CALLS:
        _calls.clear()
    _calls[key] = call
