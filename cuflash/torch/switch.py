"""cuflash in the place of `torch.nn.functional.scaled_dot_product_attention`, and an account of what it could not do.

While it is on, the function's name in `torch.nn.functional` stands for `_attention` here, which whoever looks the function up there finds: torch's modules,
and most libraries. Two of torch's modules bypass the function, which the account says: `nn.MultiheadAttention` where it returns weights, and the fast path
that it and `nn.TransformerEncoderLayer` take in evaluation, which is switched off for the while.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from cuflash.arrays.descriptions import describe
from cuflash.errors import ArgumentError, OptionError, SetupError, UnsupportedError
from cuflash.torch.attention import scaled_dot_product_attention

POLICIES = ("force", "fallback", "raise")
_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Report:
    """What has happened since `enable`.

    Attributes:
        calls: how many calls of attention ran on cuflash.
        traced: how often `torch.compile` or `torch.export` came by a call for cuflash, maybe more than once for each; how often what they made runs is not
            counted.
        others: reason -> how many calls torch ran for it, or were refused.
        fast_path: torch's fast path for modules in evaluation is switched off, so that they call the function.
    """

    calls: int
    traced: int
    others: dict[str, int]
    fast_path: bool

    def __str__(self) -> str:
        lines = [f"{self.calls} calls of attention on cuflash, {self.traced} while tracing, {sum(self.others.values())} on torch"]
        lines += [f"  {count} × {reason}" for reason, count in sorted(self.others.items(), key=lambda item: -item[1])]
        if self.fast_path:
            lines.append(
                "torch's fast path for nn.MultiheadAttention and nn.TransformerEncoderLayer in evaluation, which bypasses attention, is off meanwhile"
            )
        return "\n".join(lines)


class _State:
    """What is on, and what has been counted."""

    def __init__(self) -> None:
        self.policy: str | None = None
        self.simulate = False
        self.calls = 0
        self.traced = 0
        self.others: Counter[str] = Counter()
        self.fast_path: bool | None = None  # what it was before


_state = _State()
Arguments = tuple[Any, Any, Any, Any, Any, Any, Any, Any]
_changing = threading.RLock()
_torch_attention = functional.scaled_dot_product_attention
_torch_multi_head = functional.multi_head_attention_forward


def enable(policy: str = "fallback", *, simulate: bool = False) -> None:
    """Put cuflash in the place of torch's attention until `disable`, for all threads, and begin a new account.

    Args:
        policy: what happens to calls that cuflash cannot run: "fallback" hands them to torch and counts them in `report()`; "raise" raises the error that says
            why; "force" is "raise" with simulate=True.
        simulate: run tensors on the CPU on the simulator, which is right and slow; else they count among what cuflash cannot run.

    Raises:
        OptionError: another policy.
    """
    if policy not in POLICIES:
        hint = "fallback hands to torch what cuflash cannot run, raise and force do not."
        raise OptionError("policy", describe(policy), "'force', 'fallback' or 'raise'", hint)
    with _changing:
        was = _state.fast_path if _state.policy else torch.backends.mha.get_fastpath_enabled()
        _state.__init__()  # type: ignore[misc]
        _state.policy, _state.simulate, _state.fast_path = policy, simulate or policy == "force", was
        torch.backends.mha.set_fastpath_enabled(False)
        functional.scaled_dot_product_attention = _attention
        functional.multi_head_attention_forward = _multi_head


def disable() -> None:
    """Give torch its attention back; `report` still tells what happened."""
    with _changing:
        if _state.policy is None:
            return
        _state.policy = None
        functional.scaled_dot_product_attention = _torch_attention
        functional.multi_head_attention_forward = _torch_multi_head
        torch.backends.mha.set_fastpath_enabled(_state.fast_path)


@contextlib.contextmanager
def use(policy: str = "fallback", *, simulate: bool = False) -> Iterator[None]:
    """`enable` for the time of a `with` block, or of a function that it decorates; what was on before is on again afterwards."""
    before = (_state.policy, _state.simulate)
    enable(policy, simulate=simulate)
    try:
        yield
    finally:
        if before[0] is None:
            disable()
        else:
            with _changing:
                _state.policy, _state.simulate = before


def report() -> Report:
    """What ran where since `enable`, and why; print it."""
    with _changing:
        return Report(_state.calls, _state.traced, dict(_state.others), bool(_state.fast_path))


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None, enable_gqa: bool = False
) -> Any:  # fmt: skip
    """What stands for torch's function."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if torch.compiler.is_compiling():
        return _traced(arguments)
    try:
        refused = _refused(query, attn_mask, is_causal)
        if refused is not None:
            raise refused
        result = scaled_dot_product_attention(*arguments)
    except (ArgumentError, SetupError) as error:
        _state.others[str(error)] += 1
        if _state.policy != "fallback":
            raise
        return _on_torch(arguments)
    _state.calls += 1
    return result


def _traced(arguments: Arguments) -> Any:
    """The same where an error of cuflash's cannot be caught: what is looked at are the type and the device."""
    query = arguments[0]
    kind = query.device.type
    if _state.policy == "fallback" and not (query.dtype in _SUPPORTED and (kind == "cuda" or (kind == "cpu" and _state.simulate))):
        _note_traced(f"query: got a tensor of {query.dtype} on {kind} in a traced call")
        return _on_torch(arguments)
    _note_traced(None)
    return scaled_dot_product_attention(*arguments)


def _note_traced(reason: str | None) -> None:
    if reason is None:
        _state.traced += 1
    else:
        _state.others[reason] += 1


# As torch.compiler.assume_constant_result does, which would load all of Dynamo here: tracing runs the function, the traced code does not, nor depends on the counts.
_note_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _on_torch(arguments: Arguments) -> Any:
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = arguments
    return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _refused(query: Any, attn_mask: Any, is_causal: bool) -> ArgumentError | None:
    """What cuflash could run and torch's function would not want, or nobody on the simulator."""
    if getattr(getattr(query, "device", None), "type", None) == "cpu" and not _state.simulate:
        return UnsupportedError(
            "query", "a tensor on the CPU", "a CUDA tensor", "cuflash runs it on a simulator, for tests: simulate=True allows that."
        )
    if is_causal and attn_mask is not None:
        return UnsupportedError(
            "attn_mask", "a mask with is_causal=True", "one of the two, as in torch", "Call cuflash.torch's function for both."
        )
    return None


def _multi_head(*args: Any, **kwargs: Any) -> Any:
    """torch's function behind `nn.MultiheadAttention`, with a note where it forms probabilities."""
    need_weights = kwargs["need_weights"] if "need_weights" in kwargs else args[15] if len(args) > 15 else True
    if need_weights:
        hint = "torch forms the probabilities itself, since no kernel of cuflash does."
        error = UnsupportedError("nn.MultiheadAttention", "need_weights=True", "need_weights=False", hint)
        _state.others[str(error)] += 1
        if _state.policy != "fallback":
            raise error
    return _torch_multi_head(*args, **kwargs)
