"""Calls of operators that are like one of the last ones with their options: what was prepared for it runs again, after one look at the tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from cuflash.hardware import device
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options
from cuflash.runtime import calls
from cuflash.runtime.prepared import Gradients
from cuflash.torch.guards import Likeness
from cuflash.torch.inputs import address_name

Tensors = tuple[Any, ...]
_MAX_LIKENESSES = 4
"""Tensors with and without a gradient, inside of inference mode and outside, in training and evaluation in turns."""


class _Last(NamedTuple):
    """The last calls with tensors of some names and some options.

    Attributes:
        tensors: of all arguments, those.
        prepared: what knows tensors like a call's, and what runs what was prepared for it; the last one that ran comes first.
    """

    tensors: Callable[[Sequence[Any]], Sequence[Any]]
    prepared: list[tuple[Likeness, Callable[[dict[str, int]], Any]]]


class Remembering:
    """Carries out an operator of tensors, or None, and options."""

    def __init__(
        self, direction: str, names: Sequence[str], asked: Callable[[Tensors, Mapping[str, Any]], tuple[Operands, Options]]
    ) -> None:
        """`names` are those of the tensors; `asked` gives what cuflash is asked."""
        self._direction, self._names, self._asked = direction, tuple(names), asked
        self._is_forward = direction == "forward"

    def run(self, arguments: Tensors, options: Mapping[str, Any]) -> Any:
        """What cuflash gives: out and lse, or the gradients in the order of `PreparedBackward.results`.

        Args:
            arguments: as many as the operator was given.
            options: that differ from their defaults.
        """
        key: tuple[Any, ...] = (self, device.simulator_setting(), *map(type, arguments), *options.items())
        try:
            last = calls.kept(key)
        except TypeError:  # limits come as a list
            values = [(name, tuple(x) if type(x) is list else x) for name, x in options.items()]
            key = (self, device.simulator_setting(), *map(type, arguments), *values)
            last = calls.kept(key)
        if last is not None:
            given = last.tensors(arguments)
            entries = last.prepared
            for place, entry in enumerate(entries):
                addresses = entry[0].addresses(given)
                if addresses is not None:
                    if place:
                        entries[:] = [entry, *[other for other in entries if other is not entry]]
                    return entry[1](addresses)
        return self._learned(key, last, arguments, options)

    def _learned(self, key: Hashable, last: Any, arguments: Tensors, options: Mapping[str, Any]) -> Any:
        """The results of a call that is like none of the last ones, which is the last one from now on."""
        asked = self._asked(arguments, options)
        results: Any = calls.forward(*asked) if self._is_forward else _listed(calls.backward(*asked))
        places = [i for i, x in enumerate(arguments) if x is not None]
        given = [arguments[i] for i in places]
        if {id(x) for x in asked[0] if x is not None} != {*map(id, given)}:  # one was made into another one, or there is one besides
            return results
        _, prepared, _ = calls.find(self._direction, *asked)
        if prepared is not None:
            if last is None:
                last = _Last(operator.itemgetter(*places), [])
                calls.keep(key, last)
            likeness = Likeness([address_name(self._names[i]) for i in places], given, may_be_nested=self._is_forward)
            run = prepared.run if self._is_forward else prepared.gradients
            last.prepared[:] = [(likeness, run), *last.prepared[: _MAX_LIKENESSES - 1]]
        return results


def _listed(gradients: Gradients) -> list[Any]:
    return [*gradients, *[x for x in (gradients.attn_mask, gradients.sinks) if x is not None]]
