"""Run the public calls: a call whose like was seen before runs as it was prepared then; another one is checked and prepared first.

A new call is a straight line: borrow the arrays, check them into a `Problem`, plan, load the kernels, prepare, run. All but the last step depends only on
the options and on what `signatures.seen` sees but addresses, so its result is remembered as a `PreparedCall`, and a warm call looks it up and runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cuflash.arrays import signatures
from cuflash.arrays.borrowing import Array, borrow
from cuflash.arrays.descriptions import attribute, describe
from cuflash.errors import DTypeError, OptionError, UnsupportedError
from cuflash.hardware import device
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from cuflash.problem import features
from cuflash.problem.cache_call import CacheOptions
from cuflash.problem.checks import check_backward, check_out, make_problem
from cuflash.problem.operands import Operands, borrowed
from cuflash.problem.options import Options, check_bool
from cuflash.problem.tangents import Tangents
from cuflash.problem.tile import Tile
from cuflash.runtime import launch
from cuflash.runtime.prepared import Gradients, PreparedBackward, PreparedForward


def forward(operands: Operands, options: Options) -> Any:
    """The output, or with `return_lse` the output and lse."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():  # the graph breaks: tracing on into addresses and kernels would end in a crash
        return torch._disable_dynamo(_forward)(operands, options)
    return _forward(operands, options)


def backward(operands: Operands, options: Options) -> Gradients:
    """The gradients."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        gradients: Gradients = torch._disable_dynamo(_backward)(operands, options)
        return gradients
    return _backward(operands, options)


def _forward(operands: Operands, options: Options) -> Any:
    key, call, addresses = find("forward", operands, options)
    if call is not None and (operands.out is None or call.may_write({"out": operands.out}, addresses)):
        return call.run(addresses, operands.out)

    arrays = borrowed(operands, options)
    problem = make_problem(arrays, options)
    refuse_autograd(arrays)
    out = None if operands.out is None else borrow(operands.out, "out")
    view = None if out is None else check_out(problem, out, _by_argument(arrays))
    if out is not None and view is not None:
        problem = replace(problem.beside(view, out.pointer), out=view)
    planned = make_plan(problem, device.of_memory(*arrays["query"].device), tile=options.tile)
    executables = [launch.executable(kernel, planned.device) for kernel in planned.kernels]
    call = PreparedForward(planned, executables, arrays, out, view)
    keep(key, call)
    addresses |= {name: array.pointer for name, array in arrays.items()}
    if out is not None:
        addresses["out"] = out.pointer
    return call.run(addresses, operands.out)


def _backward(operands: Operands, options: Options) -> Gradients:
    key, call, addresses = find("backward", operands, options)
    if call is None:
        refuse_pairs(operands, options)
        arrays = borrowed(operands, options, backward=True)
        problem = make_problem(arrays, options)
        refuse_autograd(arrays)
        views = check_backward(problem, arrays["grad_out"], arrays["out"], arrays["lse"], arrays.get("grad_lse"))
        problem = problem.of_gradients(views, arrays["grad_out"].pointer, arrays["out"].pointer)
        planned = make_plan(problem, device.of_memory(*arrays["query"].device), backward=True, tile=options.tile)
        executables = [launch.executable(kernel, planned.device) for kernel in planned.kernels]
        call = PreparedBackward(planned, executables, arrays, views)
        keep(key, call)
        addresses |= {name: array.pointer for name, array in arrays.items()}
    gradients: Gradients = call.run(addresses)
    return gradients


def plan(operands: Operands, options: Options, backward: object = False, jvp: object = False) -> Plan:
    """What the call would run; of the backward pass and of tangents without looking at what only these are given."""
    of_gradients, of_tangents = check_bool("backward", backward), check_bool("jvp", jvp)
    if of_gradients and of_tangents:
        raise OptionError("jvp", "True with backward=True", "one of the two", "Make two plans: gradients and tangents come from two calls.")
    if check_bool("need_attn_mask_grad", options.need_attn_mask_grad) and not of_gradients:
        hint = (
            "Leave it out: a mask has no tangent."
            if of_tangents
            else "Pass backward=True too; the forward pass is the same with and without."
        )
        raise OptionError("need_attn_mask_grad", "True with backward=False", "backward=True with it", hint)
    arrays = borrowed(operands, options)
    problem = replace(make_problem(arrays, options), of_tangents=of_tangents)
    return make_plan(problem, device.of_memory(*arrays["query"].device), backward=of_gradients, tile=options.tile)


def refuse_pairs(operands: Operands, options: Options) -> None:
    """`out` and `lse` come from the forward call together, and are easily mixed up."""
    for name, operand in (("out", operands.out), ("lse", operands.lse)):
        if operand is None or isinstance(operand, tuple):
            function = "varlen_attention" if options.varlen else "scaled_dot_product_attention"
            hint = f"Unpack it: out, lse = cuflash.{function}(..., return_lse=True)."
            raise DTypeError(name, describe(operand), f"the {name} of the forward call", hint)


def _by_argument(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays by what the caller knows them by."""
    return {"dropout_seed" if name == "dropout_state" else name: array for name, array in arrays.items()}


_GRADIENTS = (
    "Call cuflash.torch, which autograd records; or pass {name}.detach() and compute gradients with scaled_dot_product_attention_backward."
)


def refuse_autograd(arrays: Mapping[str, Array], hint: str = _GRADIENTS) -> None:
    """A tensor that autograd records would silently lose its gradient here; `hint` says where it is to be had, of an argument {name}."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    for name, array in arrays.items():
        if attribute(array.owner, "requires_grad"):
            raise UnsupportedError(name, "a tensor that requires grad", "a tensor outside of autograd", hint.format(name=name))


# --- Calls that are remembered ------------------------------------------------------------------------------------------------------------

_MAX_CALLS = 4096
_calls: dict[Hashable, Any] = {}

_NAMES = tuple("dropout_state" if name == "dropout_seed" else name for name in Operands._fields)


def find(
    direction: str, operands: Operands, options: Options, tangents: Tangents | None = None
) -> tuple[Hashable | None, Any, dict[str, int]]:
    """The key of a call, what was prepared for it, and what is written into its argument structs: addresses, and the words of a seed.

    The key is all that the preparation depends on; on addresses it depends for their alignment, and whether values begin where keys do; on seeds not at all. It is None where it cannot be
    had cheaply. Types are part of it, those of what options hold too: True and 1 are not the same option, nor are the windows (1, 0) and (True, 0).
    """
    addresses, state = features.drawn_from(options.dropout_p, operands.dropout_seed)
    seen: list[Hashable] = [direction, device.simulator_setting(), bool(addresses), *hashable(options)]
    if operands.dropout_seed is not None:
        operands = operands._replace(dropout_seed=state)
    is_known = looked_at(_NAMES, operands, seen, addresses)
    if tangents is not None:
        is_known = is_known and looked_at(Tangents._fields, tangents, seen, addresses)
    key, call = remembered(seen) if is_known else (None, None)
    return key, call, addresses


def hashable(options: Options | CacheOptions) -> tuple[Hashable, Hashable, Hashable]:
    """What a key has of options: themselves, a dict of tiles, which cannot be hashed, as its items, and the types."""
    tiles = tuple(options.tile.items()) if type(options.tile) is dict else None
    return options if tiles is None else options._replace(tile=None), tiles, _types_of(options)


def looked_at(names: Sequence[str], operands: Sequence[object], seen: list[Hashable], addresses: dict[str, int]) -> bool:
    """Add what a call depends on of its arrays to `seen`, and where they lie to `addresses`; whether there is no array that only `borrow` can judge."""
    for name, operand in zip(names, operands):  # noqa: B905 (they are of one length, and to look costs)
        if operand is None:
            seen.append(None)
            continue
        try:
            look = signatures.seen(operand)
        except DTypeError:  # no memory, which `borrow` says more about
            return False
        if look is None:
            return False
        kind, address = look
        addresses[name] = address
        seen += (kind, address & 15)
    seen.append(addresses.get(names[1]) == addresses.get(names[2]))  # keys and values
    return True


def remembered(seen: list[Hashable]) -> tuple[Hashable | None, Any]:
    """The key that a call with these properties is remembered by, and the call; the key is None where an option cannot be hashed, such as a list."""
    key = tuple(seen)
    try:
        return key, _calls.get(key)
    except TypeError:
        return None, None


SCALARS = frozenset((type(None), bool, int, float, str))
"""Types of options that hold nothing else."""


def _types_of(values: Collection[Any]) -> tuple[Hashable, ...]:
    """The type of each value, and behind them the types of what they hold."""
    types = tuple(map(type, values))
    if SCALARS.issuperset(types):
        return types
    return types + tuple([types_within(value) for value in values if type(value) not in SCALARS])


def types_within(value: object) -> tuple[Hashable, ...]:
    """The types of what an option holds."""
    if isinstance(value, tuple):
        return _types_of(value)
    if isinstance(value, Tile):
        return _types_of(vars(value).values())
    if isinstance(value, Mapping):
        return (*_types_of(value), *_types_of(value.values()))
    return ()


def kept(key: Hashable) -> Any:
    """What is remembered by a key of nothing but what can be hashed."""
    return _calls.get(key)


def keep(key: Hashable | None, call: Any) -> None:
    """Find a prepared call again by its key."""
    if key is None:
        return
    if len(_calls) >= _MAX_CALLS:
        _calls.clear()
    _calls[key] = call


def forget() -> None:
    """Prepare every call anew: what they depend on besides their arguments, such as tables of tuned tiles, has changed."""
    _calls.clear()
