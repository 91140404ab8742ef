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
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple, ParamSpec

import torch
from torch.autograd import forward_ad

from cuflash.hardware import device
from cuflash.runtime import calls, warm_calls
from cuflash.runtime.prepared import PreparedBackward, PreparedForward
from cuflash.torch import inputs
from cuflash.torch.functions import Call, Tensors, gradients
from cuflash.torch.guards import Likeness, data_ptr
from cuflash.torch.inputs import TENSORS, address_name

P = ParamSpec("P")

_is_transformed, _num_modes, _is_traced = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._is_tracing,
)
_is_cast, _is_grad_enabled = torch._C._is_any_autocast_enabled, torch.is_grad_enabled
_is_dynamo_tracing = torch.compiler.is_dynamo_compiling
_CLASSES = frozenset((torch.Tensor, torch.nn.Parameter))
_LENGTHS = frozenset(("seqlens_q", "seqlens_kv", "prefix_lengths", "cu_seqlens_q", "cu_seqlens_kv"))
_INPUTS = ("query", "key", "value")
_MAX_OPTIONS = 256


class Asked(NamedTuple):
    """What a public function makes of its arguments.

    Attributes:
        call: its options.
        tensors: in the order of `TENSORS`.
        plain: all that were given are of torch's own types, or None.
        return_lse: whether the caller wants it.
        restore: brings out, or lse, into the caller's shape; None where that is theirs.
    """

    call: Call
    tensors: Tensors
    plain: bool
    return_lse: bool
    restore: inputs.Restore | None = None


class _Last(NamedTuple):
    """The last backward pass that was found: what knows tensors like its, the architecture that the simulator posed as, and what was prepared."""

    likeness: Likeness
    setting: bytes | None
    prepared: PreparedBackward


class _Made(NamedTuple):
    """An operand that is made anew for each call.

    Attributes:
        position: of what it is made of among the tensors that were given, whose place it takes; None for one that is made of nothing, and comes behind them.
    """

    name: str
    position: int | None
    make: Callable[[Any], Any]


class Known:
    """What the door has for a call.

    Attributes:
        forward: the prepared call, with lse where autograd records it.
        is_recorded: whether it does.
        return_lse: whether the caller wants it.
        names: by which kernels know the tensors of the call, in the order in which it has them.
        likeness: that of the tensors that were given, once it was found again.
    """

    def __init__(self, asked: Asked, names: tuple[str, ...], made: list[_Made], is_recorded: bool, forward: PreparedForward) -> None:
        """`names` are those of `TENSORS`, of the tensors that were given."""
        self.forward, self.is_recorded, self.return_lse = forward, is_recorded, asked.return_lse
        self._call, self._made = asked.call, made
        self._tensors = (*names, *(each.name for each in made if each.position is None))
        self.names = tuple(map(address_name, names))
        self._saved = (*map(address_name, self._tensors), "out", "lse")
        self._has_inputs_alone = self._tensors == _INPUTS
        mask = asked.tensors[TENSORS.index("attn_mask")]
        self._needs_mask = is_recorded and mask is not None and mask.requires_grad
        self.likeness: Likeness | None = None
        self._last: dict[int, _Last] = {}  # by the number of tensors: those of out, lse and the call, and grad_out, and maybe grad_lse

    def run(self, tensors: Tensors, addresses: dict[str, int]) -> Any:
        """The call of these tensors, which lie there."""
        if self._made:
            tensors = self._with_made(tensors, addresses)
        return _apply((self, addresses), *tensors) if self.is_recorded else self.forward.run(addresses)

    def _with_made(self, tensors: Tensors, addresses: dict[str, int]) -> Tensors:
        operands = [*tensors]
        for name, position, make in self._made:
            if position is None:
                made = make(tensors[0])
                operands.append(made)
            else:
                made = operands[position] = make(tensors[position])
            addresses[address_name(name)] = made.data_ptr()
        return tuple(operands)

    def gradients(self, saved: Tensors, grad_out: Any, grad_lse: Any) -> Sequence[Any]:
        """Those of the tensors of the call, of what the forward pass has saved. Hooks may have made other tensors of it."""
        if grad_out is None or _is_grad_enabled() or _is_transformed() or forward_ad._current_level >= 0 or _is_dynamo_tracing():
            return self._new_gradients(saved, grad_out, grad_lse)
        tensors = (*saved, grad_out) if grad_lse is None else (*saved, grad_out, grad_lse)
        setting = device.simulator_setting()
        last = self._last.get(len(tensors))
        if last is not None and last.setting == setting:
            addresses = last.likeness.addresses(tensors)
            if addresses is not None:
                found: Sequence[Any] = last.prepared.gradients(addresses)
                return found if self._has_inputs_alone else self._by_name(last.prepared, found)
        return self._looked_for(setting, tensors, saved, grad_out, grad_lse)

    def _looked_for(self, setting: bytes | None, tensors: Tensors, saved: Tensors, grad_out: Any, grad_lse: Any) -> Sequence[Any]:
        """Gradients of tensors that are not as the last ones."""
        names = (*self._saved, "grad_out") if grad_lse is None else (*self._saved, "grad_out", "grad_lse")
        addresses: dict[str, int] = {}
        seen: list[Hashable] = [self, setting]
        if not warm_calls.look(dict(zip(names, tensors, strict=True)), seen, addresses):
            return self._new_gradients(saved, grad_out, grad_lse)
        key, prepared = calls.remembered(seen)
        if prepared is None:
            return self._learned_gradients(key, saved, grad_out, grad_lse)
        self._last[len(tensors)] = _Last(Likeness(names, tensors, may_be_nested=False), setting, prepared)  # autograd saves none
        return self._by_name(prepared, prepared.gradients(addresses))

    def _learned_gradients(self, key: Hashable, saved: Tensors, grad_out: Any, grad_lse: Any) -> Sequence[Any]:
        """Those of a call whose like has not run."""
        grads = self._new_gradients(saved, grad_out, grad_lse)
        tensors, out, lse = self._sorted(saved)
        operands, options = self._call.asked_backward(tensors, out, lse, grad_out, grad_lse, self._needs_mask)
        _, prepared, _ = calls.find("backward", operands, options)
        if prepared is not None and operands.grad_out is grad_out:
            calls.keep(key, prepared)
        return grads

    def _by_name(self, prepared: PreparedBackward, gradients: Sequence[Any]) -> list[Any]:
        named = dict(zip(prepared.results, gradients, strict=True))
        return [named.get(f"grad_{name}") for name in self._tensors]

    def _new_gradients(self, saved: Tensors, grad_out: Any, grad_lse: Any) -> Tensors:
        found = gradients(self._call, *self._sorted(saved), grad_out, grad_lse, self._needs_mask)
        named = dict(zip(TENSORS[: len(found)], found, strict=True))
        return tuple(map(named.get, self._tensors))

    def _sorted(self, saved: Tensors) -> tuple[Tensors, Any, Any]:
        """The tensors of the call in the order of `TENSORS`, out and lse."""
        *tensors, out, lse = saved
        by_name = dict(zip(self._tensors, tensors, strict=True))
        return tuple(map(by_name.get, TENSORS)), out, lse


class _Warm(torch.autograd.Function):  # type: ignore[misc]
    """A known call that is recorded."""

    @staticmethod
    def forward(ctx: Any, found: tuple[Known, dict[str, int]], *tensors: Any) -> Any:
        known, addresses = found
        ctx.known = known
        out, lse = known.forward.run(addresses)
        ctx.save_for_backward(*tensors, out, lse)
        if not known.return_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: Any = None) -> Tensors:
        return (None, *ctx.known.gradients(ctx.saved_tensors, grad_out, grad_lse))


_apply = super(torch.autograd.Function, _Warm).apply  # as in functions.py
_Warm._backward_cls.apply = _Warm.backward  # which the method of this name looks for in each pass


class _Form:
    """Calls whose arguments have the same names and classes.

    Attributes:
        is_known: these are such as the door knows: plain tensors, and what is compared at a glance.
        names: of the arguments.
        tensors: of their values, the tensors, in the order of `TENSORS`: that in which every way to a call saves them, as checkpointing asks for, and in which
            autograd adds up the gradients of one tensor.
        tensor_names: theirs.
        operands: which of `TENSORS` each of them is.
        options: of the values, the others.
        tuples: where tuples are among the values.
        last: by options and what else is compared at a glance, the last call with them.
    """

    def __init__(self, names: Sequence[str], parameters: Collection[str], args: Tensors, kwargs: Mapping[str, Any]) -> None:
        """`names` are those of parameters that may be given by position, `parameters` those of all."""
        kinds = (*map(type, args), *map(type, kwargs.values()))
        self.names = (*names[: len(args)], *kwargs)
        tensors = [name for name, kind in zip(self.names, kinds, strict=False) if kind in _CLASSES]
        others = [i for i, kind in enumerate(kinds) if kind not in _CLASSES]
        operand_of = {name: name for name in tensors}
        if "attn_bias" in tensors:  # is the mask that is added, and a boolean one stands beside it
            operand_of |= {"attn_bias": "attn_mask"} | ({"attn_mask": "pair_mask"} if "attn_mask" in tensors else {})
        self.is_known = (
            len({*self.names}.intersection(parameters)) == len(kinds)
            and all(name in tensors for name in _INPUTS)
            and all(operand in TENSORS for operand in operand_of.values())  # no scale or length, which are read on the host
            and all(kinds[i] in calls.SCALARS or kinds[i] is tuple for i in others)
            and not any(
                self.names[i] == "dropout_seed" and kinds[i] is not NoneType for i in others
            )  # numbers that differ from call to call
        )
        if self.is_known:
            self.tensor_names = sorted(tensors, key=lambda name: TENSORS.index(operand_of[name]))
            self.operands = tuple(map(operand_of.__getitem__, self.tensor_names))
            self.tensors = operator.itemgetter(*map(self.names.index, self.tensor_names))
            self.options: Callable[[Tensors], Hashable] = operator.itemgetter(*others) if others else type
            self.tuples = [i for i in others if kinds[i] is tuple]
            self.last: dict[Hashable, Known] = {}

    def with_types(self, key: Hashable, values: Tensors) -> Hashable | None:
        """The key of options among which are tuples: with the types of what these hold. None where that cannot be hashed."""
        key = (key, *[calls.types_within(values[i]) for i in self.tuples])
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def keep(self, key: Hashable, known: Known) -> None:
        """Have a call be the last one with its options."""
        if len(self.last) >= _MAX_OPTIONS:
            self.last.clear()
        self.last[key] = known


def remembers(attend: Callable[[Any], Any]) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
    """The public function whose arguments another function makes into what is asked, with warm calls run at the door.

    Args:
        attend: carries out what is asked; what is not `Asked` is a result.
    """

    def remembering(function: Callable[P, Any]) -> Callable[P, Any]:
        signature = inspect.signature(function)
        names, parameters = warm_calls.positional_names(signature), frozenset(signature.parameters)
        kept = calls.kept

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            if _is_dynamo_tracing() or _is_transformed() or _num_modes() or _is_cast() or _is_traced() or forward_ad._current_level >= 0:
                return attend(function(*args, **kwargs))
            kinds = (function, len(args), *kwargs, *map(type, args), *map(type, kwargs.values()))
            form = kept(kinds)
            if form is None:
                form = _Form(names, parameters, args, kwargs)
                if form.is_known:
                    calls.keep(kinds, form)
            if not form.is_known:
                return attend(function(*args, **kwargs))
            values = (*args, *kwargs.values())
            key: Any = (_is_grad_enabled(), device.simulator_setting(), form.options(values))
            if form.tuples:
                key = form.with_types(key, values)
            last = form.last.get(key)
            if last is not None:
                tensors = form.tensors(values)
                addresses = last.likeness.addresses(tensors)
                if addresses is not None:
                    return last.run(tensors, addresses)
            if key is None:
                return attend(function(*args, **kwargs))
            return _looked_for(functools.partial(function, *args, **kwargs), attend, form, values, key)

        return call

    return remembering


def _looked_for(ask: Callable[[], Any], attend: Callable[[Any], Any], form: _Form, values: Tensors, last_key: Hashable) -> Any:
    """A call that is not like the last one with its options, which is remembered by that key."""
    given = dict(zip(form.names, values, strict=True))
    seen: list[Hashable] = [form, _is_grad_enabled(), device.simulator_setting()]
    if not warm_calls.look(given, seen, {}):
        return attend(ask())
    key, known = calls.remembered(seen)
    if known is None:
        asked = ask()
        result = attend(asked)
        if type(asked) is Asked:
            _learn(key, asked, form, given)
        return result
    tensors = form.tensors(values)
    if known.likeness is None:
        known.likeness = Likeness(known.names, tensors)
    form.keep(last_key, known)
    return known.run(tensors, dict(zip(known.names, map(data_ptr, tensors), strict=True)))


def _learn(key: Hashable, asked: Asked, form: _Form, given: Mapping[str, Any]) -> None:
    """Know a call from now on, if cuflash ran it on the very tensors that it was given, and on such as are made of them without a record of autograd."""
    if asked.restore is not None or asked.call.seed is not None:
        return
    of_operands = {name: x for name, x in zip(TENSORS, asked.tensors, strict=True) if x is not None}
    made: list[_Made] = []
    for position, (name, operand) in enumerate(zip(form.tensor_names, form.operands, strict=True)):
        if of_operands.get(operand) is given[name]:
            continue
        if operand not in _LENGTHS or given[name].dtype != torch.int64:
            return
        made.append(_Made(operand, position, inputs.lengths))
    if asked.call.dropout_p and "dropout_seed" not in form.operands:
        made.append(_Made("dropout_seed", None, _drawn_for))
    if {*form.operands, *(each.name for each in made)} != {*of_operands}:
        return
    is_recorded = torch.is_grad_enabled() and any(x.requires_grad for x in of_operands.values())
    with torch.no_grad():  # as under autograd's functions
        _, call, _ = calls.find("forward", *asked.call.asked_forward(asked.tensors, is_recorded or asked.return_lse))
    if call is not None:
        calls.keep(key, Known(asked, form.operands, made, is_recorded, call))


def _drawn_for(query: Any) -> Any:
    """The state of dropout, on the device of the query."""
    return inputs.drawn(query.device)
