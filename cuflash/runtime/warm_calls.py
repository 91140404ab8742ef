"""The door of the public calls: a call whose like was seen before is found by what it was given, before its arguments are sorted.

Of twenty operands and as many options most calls are given four, so this is the shortest way to a prepared call. Arrays of exactly a library's own class take it,
beside numbers, words and tuples of them. Everything else, and whatever comes for the first time, goes the way that `calls.py` describes; what was prepared there
is remembered here too. Dropout goes that way always: its seeds are numbers that differ from call to call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

from cuflash.arrays.signatures import readers
from cuflash.errors import DTypeError
from cuflash.hardware import device
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options
from cuflash.problem.tile import Tile
from cuflash.runtime import calls
from cuflash.runtime.prepared import PreparedCall

P = ParamSpec("P")
R = TypeVar("R")

Recall: TypeAlias = Callable[[Mapping[str, Any]], PreparedCall | None]
"""Arguments by name, with their defaults -> what `calls.py` has prepared for such a call."""


class Known(NamedTuple):
    """What the door has for a call."""

    call: PreparedCall


def remembers(recall: Recall) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The same public function, whose warm calls are run at the door."""

    def remembering(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        names = positional_names(signature)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            torch = sys.modules.get("torch")
            if torch is not None and torch.compiler.is_compiling():
                return function(*args, **kwargs)
            given = dict(zip(names, args))  # noqa: B905 (of too many the function says so)
            given.update(kwargs)
            addresses: dict[str, int] = {}
            key, known = None, None
            if len(given) == len(args) + len(kwargs):
                key, known = find(function, given, addresses)
            if known is None:
                result = function(*args, **kwargs)
                if key is not None:
                    learn(key, recall, signature, given)
                return result
            prepared = known.call
            if not prepared.writes:
                return prepared.run(addresses)  # type: ignore[no-any-return]
            if prepared.may_write(given, addresses):
                return prepared.run(addresses, given.get("out"))  # type: ignore[no-any-return]
            return function(*args, **kwargs)

        return call

    return remembering


def positional_names(signature: inspect.Signature) -> tuple[str, ...]:
    """Of the parameters that may be given by position."""
    return tuple(name for name, parameter in signature.parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


def find(function: object, given: Mapping[str, Any], addresses: dict[str, int]) -> tuple[Hashable | None, Any]:
    """The key of a call and what is known of it; where its arrays lie is added to `addresses`. The key is None where the call is none for the door."""
    if "dropout_seed" in given:
        return None, None
    if "dropout_p" in given and (type(given["dropout_p"]) not in calls.SCALARS or given["dropout_p"]):
        return None, None
    seen: list[Hashable] = [function, device.simulator_setting()]
    return calls.remembered(seen) if look(given, seen, addresses) else (None, None)


def look(given: Mapping[str, Any], seen: list[Hashable], addresses: dict[str, int]) -> bool:
    """Add what decides how a call is carried out to `seen`, and where its arrays lie to `addresses`; whether nothing is left that only others can judge."""
    seen += given  # names; of each argument there are two more things
    reader_of, scalars = readers.get, calls.SCALARS
    try:
        for name, x in given.items():
            kind: Any = type(x)
            reader = reader_of(kind)
            if reader is not None:
                array = reader(x)
                if array is None:
                    return False
                signature, address = array
                addresses[name] = address
                seen += signature, address & 15
            elif kind in scalars:
                seen += kind, x
            elif (kind is tuple and scalars.issuperset(map(type, x))) or kind is Tile:
                seen += calls.types_within(x), x
            else:
                return False
    except DTypeError:  # no memory, which `borrow` says more about
        return False
    at = addresses.get
    seen += at("key") == at("value"), at("key_cache") == at("value_cache")  # where values may be columns of their keys
    return True


def learn(key: Hashable, recall: Recall, signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    """Know a call from now on, if it was kept when it ran."""
    arguments = signature.bind(**given)
    arguments.apply_defaults()
    call = recall(arguments.arguments)
    if call is not None:
        calls.keep(key, Known(call))


def recall(direction: str, arguments: Mapping[str, Any], varlen: bool = False) -> Any | None:
    """What `calls.py` has prepared for a public call of these arguments by name, if its like has run; not of one with dropout."""
    if arguments["dropout_p"] or arguments.get("dropout_seed") is not None:
        return None
    operands = Operands(*[arguments.get(name) for name in Operands._fields])
    options = Options(**{name: arguments[name] for name in Options._fields if name in arguments}, varlen=varlen)
    _, call, _ = calls.find(direction, operands, options)
    return call
