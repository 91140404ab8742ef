"""The door of cuflash's calls in torch's terms, as `runtime/warm_calls.py` is that of cuflash's own.

A call whose like was seen before runs as it was prepared then, and is recorded by an autograd function of the tensors that it has, whose backward pass finds what
was prepared for it in the same way. Whatever traces, watches, transforms or casts sends a call on to the function behind the door.

There are two ways to find a call. The first one asks whether it is the last one again that had these options, tensors like its in all but values and addresses
(`guards.py`). The second one looks at each tensor, as cuflash's own door does.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from cuflash.hardware import device
from cuflash.problem.options import Options
from cuflash.runtime import calls, warm_calls
from cuflash.runtime.prepared import PreparedBackward, PreparedForward
from cuflash.torch.functions import Call, Tensors, gradients
from cuflash.torch.guards import Guard, Likeness, are_aligned, data_ptr, guard
from cuflash.torch.inputs import TENSORS

P = ParamSpec("P")
R = TypeVar("R")

_INPUTS = ("query", "key", "value")
_NO_OPTIONS = frozenset((*TENSORS, "return_lse"))

_is_transformed, _num_modes, _is_traced = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._is_tracing,
)
_is_cast, _is_grad_enabled = torch._C._is_any_autocast_enabled, torch.is_grad_enabled
_CLASSES = frozenset((torch.Tensor, torch.nn.Parameter))


class _Last(NamedTuple):
    """The last backward pass that was found: what knows tensors like its, the architecture that the simulator posed as, and what was prepared."""

    alike: Guard
    setting: bytes | None
    prepared: PreparedBackward


class Known:
    """What the door has for a call.

    Attributes:
        forward: the prepared call, with lse where autograd records it.
        is_recorded: whether it does.
        return_lse: whether the caller wants it.
        given: names of the tensors in the order in which they were given.
        forms: class, type and strides of each tensor that is saved, once one of these calls was recorded.
        likeness: that of the tensors of the call in the order in which they were given, once it was found again.
    """

    def __init__(
        self,
        packed: bool,
        arguments: Mapping[str, Any],
        given: tuple[str, ...],
        names: tuple[str, ...],
        is_recorded: bool,
        forward: PreparedForward,
    ) -> None:
        self.forward, self.given, self.is_recorded, self.return_lse = forward, given, is_recorded, arguments["return_lse"]
        self._tensors = operator.itemgetter(*names)
        self._names = names
        self._saved = (*names, "out", "lse")
        self._where_saved = operator.itemgetter(*self._saved)
        self._packed = packed
        self._options = {name: arguments[name] for name in Options._fields if name in arguments and name not in _NO_OPTIONS}
        mask = arguments["attn_mask"]
        self._needs_mask = is_recorded and mask is not None and mask.requires_grad
        self.forms: list[tuple[type, torch.dtype, tuple[int, ...]]] = []
        self.likeness: Likeness | None = None
        self._last: dict[int, _Last] = {}  # by the number of tensors: those of out, lse and the call, and grad_out, and maybe grad_lse

    def run(self, given: Mapping[str, Any], addresses: dict[str, int]) -> Any:
        """The call of these tensors, which lie there."""
        return _apply((self, addresses), *self._tensors(given)) if self.is_recorded else self.forward.run(addresses)

    def gradients(self, saved: Tensors, addresses: dict[str, int], grad_out: Any, grad_lse: Any) -> Sequence[Any]:
        """Those of the tensors of the call.

        Args:
            saved: what the forward pass has saved. Hooks may have made other tensors of it.
            addresses: where that lay.
        """
        if _is_grad_enabled() or _is_transformed() or forward_ad._current_level >= 0 or torch.compiler.is_compiling():
            return self._new_gradients(saved, grad_out, grad_lse)
        setting = device.simulator_setting()
        tensors = (*saved, grad_out) if grad_lse is None else (*saved, grad_out, grad_lse)
        last = self._last.get(len(tensors))
        if last is not None and last.alike(*tensors) and last.setting == setting:
            lie_at = tuple(map(data_ptr, tensors))
            if lie_at[: len(saved)] == self._where_saved(addresses) and are_aligned(lie_at):
                addresses = addresses.copy()  # a graph that is retained runs again
                addresses["grad_out"] = lie_at[len(saved)]
                if grad_lse is not None:
                    addresses["grad_lse"] = lie_at[-1]
                return self._of_prepared(last.prepared, addresses)
        return self._looked_for(setting, tensors, saved, addresses, grad_out, grad_lse)

    def _looked_for(
        self, setting: bytes | None, tensors: Tensors, saved: Tensors, addresses: dict[str, int], grad_out: Any, grad_lse: Any
    ) -> Sequence[Any]:
        """Gradients of tensors that are not as the last ones."""
        own = addresses.copy()
        seen: list[Hashable] = [self, setting, addresses["out"] & 15, addresses["lse"] & 15]
        if not warm_calls.look({"grad_out": grad_out} if grad_lse is None else {"grad_out": grad_out, "grad_lse": grad_lse}, seen, own):
            return self._new_gradients(saved, grad_out, grad_lse)
        key, prepared = calls.remembered(seen)
        if not self._is_as_saved(saved, addresses):
            return self._new_gradients(saved, grad_out, grad_lse)
        if prepared is None:
            return self._learned_gradients(key, saved, grad_out, grad_lse)
        if are_aligned([*map(data_ptr, tensors)]):
            self._last[len(tensors)] = _Last(guard(tensors), setting, prepared)
        return self._of_prepared(prepared, own)

    def _of_prepared(self, prepared: PreparedBackward, addresses: dict[str, int]) -> Sequence[Any]:
        found: Sequence[Any] = prepared.gradients(addresses)
        return found if self._names == _INPUTS else self._by_name(prepared, found)

    def _is_as_saved(self, saved: Tensors, addresses: dict[str, int]) -> bool:
        """Whether tensors lie where they were saved, in the form that those of such calls have."""
        for name, x, form in zip(self._saved, saved, self.forms):  # noqa: B905 (they are of one length)
            if form != (type(x), x.dtype, x.stride()) or addresses[name] != x.data_ptr():
                return False
        return True

    def _learned_gradients(self, key: Hashable, saved: Tensors, grad_out: Any, grad_lse: Any) -> Sequence[Any]:
        """Those of a call whose like has not run."""
        grads = self._new_gradients(saved, grad_out, grad_lse)
        given = {**dict(zip(self._saved, saved, strict=True)), "grad_out": grad_out, "grad_lse": grad_lse}
        call = warm_calls.recall(
            "backward", {**self._options, **given, "tile": None, "need_attn_mask_grad": self._needs_mask}, self._packed
        )
        if call is not None:
            calls.keep(key, call)
        return grads

    def _by_name(self, prepared: PreparedBackward, gradients: Sequence[Any]) -> list[Any]:
        named = {name: gradient for (name, _), gradient in zip(prepared.results, gradients, strict=True)}
        return [named.get(f"grad_{name}") for name in self._names]

    def _new_gradients(self, saved: Tensors, grad_out: Any, grad_lse: Any) -> Tensors:
        *tensors, out, lse = saved
        by_name = dict(zip(self._names, tensors, strict=True))
        options = self._options if self._packed else {**self._options, "batch_first": True, "num_heads": None}
        found = gradients(Call(self._packed, options), tuple(map(by_name.get, TENSORS)), out, lse, grad_out, grad_lse, self._needs_mask)
        named = dict(zip(TENSORS[: len(found)], found, strict=True))
        return tuple(map(named.get, self._names))


class _Warm(torch.autograd.Function):  # type: ignore[misc]
    """A known call that is recorded."""

    @staticmethod
    def forward(ctx: Any, found: tuple[Known, dict[str, int]], *tensors: Any) -> Any:
        known, addresses = ctx.found = found
        out, lse = known.forward.run(addresses)
        ctx.save_for_backward(*tensors, out, lse)
        if not known.forms:
            known.forms = [(type(x), x.dtype, x.stride()) for x in (*tensors, out, lse)]
        if not known.return_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: Any = None) -> Tensors:
        known, addresses = ctx.found
        return (None, *known.gradients(ctx.saved_tensors, addresses, grad_out, grad_lse))


_apply = super(torch.autograd.Function, _Warm).apply  # as in functions.py


def remembers(packed: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The same public function, whose warm calls are run at the door.

    Args:
        packed: as `Call` has it.
    """

    def remembering(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        names = warm_calls.positional_names(signature)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            if (
                torch.compiler.is_compiling()
                or _is_transformed()
                or _num_modes()
                or _is_cast()
                or _is_traced()
                or forward_ad._current_level >= 0
            ):
                return function(*args, **kwargs)
            given = dict(zip(names, args))  # noqa: B905 (of too many the function says so)
            given.update(kwargs)
            if len(given) != len(args) + len(kwargs):
                return function(*args, **kwargs)
            tensors: list[Any] = []
            last_key, last = _last_of(function, given, tensors)
            addresses = None if last is None else last.likeness.addresses(tensors)
            if addresses is not None:
                return last.run(given, addresses)
            addresses = {}
            key, known = warm_calls.find(function, given, addresses)
            if known is None:
                result = function(*args, **kwargs)
                if key is not None:
                    _learn(key, packed, signature, given)
                return result
            if last_key is not None and known is not last:
                if known.likeness is None:
                    known.likeness = Likeness(known.given, tensors)
                calls.keep(last_key, known)
            return known.run(given, addresses)

        return call

    return remembering


def _last_of(function: object, given: Mapping[str, Any], tensors: list[Any]) -> tuple[Hashable | None, Any]:
    """What the last call with the options of this one is remembered by, and what is known of it; the tensors are added to `tensors`.

    Both are None where an argument is neither a plain tensor nor what is compared at a glance.
    """
    seen: list[Hashable] = [function, _is_grad_enabled(), device.simulator_setting()]
    for name, x in given.items():
        kind: Any = type(x)
        if kind in _CLASSES:
            tensors.append(x)
            seen.append(name)
        elif kind in calls.SCALARS:
            seen += name, kind, x
        elif kind is tuple:
            seen += name, calls.types_within(x), x
        else:
            return None, None
    return calls.remembered(seen)


def _learn(key: Hashable, packed: bool, signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    """Know a call from now on, if cuflash ran it on the very tensors that it was given."""
    bound = signature.bind(**given)
    bound.apply_defaults()
    arguments = bound.arguments
    given_tensors = {name for name, x in given.items() if isinstance(x, torch.Tensor)}
    if not given_tensors.issubset(TENSORS):  # numbers in tensors, and what was made into something else
        return
    names = tuple(name for name in TENSORS if name in given_tensors)  # in the order in which autograd adds up the gradients of one tensor
    is_recorded = torch.is_grad_enabled() and any(given[name].requires_grad for name in names)
    with torch.no_grad():  # as under autograd's functions
        call = warm_calls.recall("forward", {**arguments, "return_lse": is_recorded or arguments["return_lse"]}, packed)
    if call is not None:
        calls.keep(key, Known(packed, arguments, tuple(x for x in given if x in given_tensors), names, is_recorded, call))
