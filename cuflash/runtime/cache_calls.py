"""Run calls that attend to a cache, as `calls.py` runs the others: found by what was seen before, or checked, planned, and remembered."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any

from cuflash.arrays.borrowing import Array, borrow
from cuflash.hardware import device
from cuflash.planning.kernel_specs import CACHE_APPEND
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from cuflash.problem.cache_call import CacheOperands, CacheOptions, borrowed_operands, check_positions, make_cache_problem
from cuflash.problem.checks import check_out
from cuflash.problem.layout import View
from cuflash.runtime import calls, launch
from cuflash.runtime.arguments import Value, Values
from cuflash.runtime.prepared import PreparedForward, may_be_written


def attend(operands: CacheOperands, options: CacheOptions) -> Any:
    """The output, or with `return_lse` the output and lse."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():  # as in calls.py
        return torch._disable_dynamo(_attend)(operands, options)
    return _attend(operands, options)


def _attend(operands: CacheOperands, options: CacheOptions) -> Any:
    key, call, addresses = _find(operands, options)
    if call is not None and call.may_write(operands._asdict(), addresses):
        return call.run(addresses, operands.out)

    arrays, planned = _planned(operands, options)
    calls.refuse_autograd(arrays, "Caches have no gradients: call it within torch.no_grad(), or pass {name}.detach().")
    out = None if operands.out is None else borrow(operands.out, "out")
    view = None if out is None else check_out(planned.problem, out, arrays)
    executables = [launch.executable(kernel, planned.device) for kernel in planned.kernels]
    call = PreparedCacheCall(planned, executables, arrays, out, view)
    calls.keep(key, call)
    addresses |= {name: array.pointer for name, array in arrays.items()}
    if out is not None:
        addresses["out"] = out.pointer
    return call.run(addresses, operands.out)


def plan(operands: CacheOperands, options: CacheOptions) -> Plan:
    """What the call would run."""
    return _planned(operands, options)[1]


def _planned(operands: CacheOperands, options: CacheOptions) -> tuple[dict[str, Array], Plan]:
    arrays = borrowed_operands(operands)
    problem = make_cache_problem(arrays, options)
    return arrays, make_plan(problem, device.of_memory(*arrays["query"].device), tile=options.tile)


def _find(operands: CacheOperands, options: CacheOptions) -> tuple[Hashable | None, Any, dict[str, int]]:
    """The key of a call, what was prepared for it, and the addresses of its arrays, as `calls.find`."""
    addresses: dict[str, int] = {}
    seen: list[Hashable] = [_find, device.simulator_setting(), *calls.hashable(options)]
    is_known = calls.looked_at(CacheOperands._fields, operands, seen, addresses)
    key, call = calls.remembered(seen) if is_known else (None, None)
    return key, call, addresses


def recall(arguments: Mapping[str, Any]) -> Any | None:
    """What is prepared for a call of these arguments, if its like has run."""
    operands = CacheOperands(*[arguments[name] for name in CacheOperands._fields])
    _, call, _ = _find(operands, CacheOptions(*[arguments[name] for name in CacheOptions._fields]))
    return call


class PreparedCacheCall(PreparedForward):
    """A call with everything but the addresses decided; arrays have the names of the arguments."""

    def __init__(
        self,
        plan: Plan,
        executables: Sequence[launch.Executable],
        inputs: Mapping[str, Array],
        given: Array | None,
        given_view: View | None,
    ) -> None:
        super().__init__(plan, executables, inputs, given, given_view)
        self._appends = plan.problem.cache is not None and plan.problem.cache.new is not None
        self.reads_offsets = True
        if "key" in inputs:
            self.writes = ("key_cache", "value_cache", *self.writes)
        # First byte and end, relative to the address, of what a call writes into, and with its name of what must not lie there.
        self._caches = [self._span(name) for name in ("key_cache", "value_cache")]
        self._appended = [(name, *self._span(name)) for name in ("query", "key", "value") if name in inputs]
        self._distance = inputs["value_cache"].pointer - inputs["key_cache"].pointer  # at which caches were found to share nothing

    def _span(self, name: str) -> tuple[int, int]:
        low, size = self.extents[name]
        return low, low + size

    def itemsize_of(self, array: str) -> int:
        return self.problem.kv_itemsize if array in ("key_cache", "value_cache") else self.problem.itemsize

    def operands(self) -> dict[str, tuple[str, View]]:
        problem, cache = self.problem, self.problem.cache
        assert cache is not None
        query = ("query", problem.query)
        views = {"query": query, "key": ("key_cache", problem.key), "value": ("value_cache", problem.value)}
        if cache.new is not None:
            views |= {"new_key": ("key", cache.new.key), "new_value": ("value", cache.new.value)}
        if cache.rotary is not None and any(kernel.spec == CACHE_APPEND for kernel in self.plan.kernels):
            (rotated,) = CACHE_APPEND.workspace
            shape = problem.query.shape
            stride_batch, stride_seqlen, stride_head = (prod(shape[axis:]) for axis in (1, 2, 3))
            of_workspace = (rotated, View(shape, (stride_batch, stride_seqlen, stride_head, 1)))
            views |= {"given_query": query, rotated: of_workspace, "query": of_workspace}
        return views

    def other_values(self) -> dict[str, Value]:
        problem, cache = self.problem, self.problem.cache
        assert cache is not None
        lengths: Values = {
            "cu_seqlens_q": "cu_seqlens_q", "seqlens_kv": "cache_seqlens", "num_sequences": problem.num_sequences or 0, "bottom_right": True,
        }  # fmt: skip
        places: Values = {
            "page_table": "page_table", "batch_indices": "cache_batch_idx", "leftpad": "cache_leftpad", "stride_page_table": cache.stride_page_table,
            "page_size": cache.page_size, "num_rows": cache.num_rows, "new_keys": cache.new_keys,
        }  # fmt: skip
        scales: Values = {"key": _scale("key_scale", cache.scales.key), "value": _scale("value_scale", cache.scales.value)}
        values: dict[str, Value] = {"lengths": lengths, "cache": places, "scales": scales, "head_dim_v": problem.head_dim_v}
        if (rotary := cache.rotary) is not None:
            values["rotary"] = {
                "cos": "rotary_cos", "sin": "rotary_sin", "stride_cos": rotary.strides[0], "stride_sin": rotary.strides[1], "dim": rotary.dim,
                "rows": rotary.rows, "interleaved": rotary.interleaved, "queries_advance": problem.queries_advance,
            }  # fmt: skip
        return values

    def may_write(self, given: Mapping[str, Any], addresses: dict[str, int]) -> bool:
        """Whether caches and `out` of the same signature are surely as good to write as those that were checked; if not, they have to be checked again."""
        if self._appends and not self._may_append(given, addresses):
            return False
        return given.get("out") is None or super().may_write(given, addresses)

    def _may_append(self, given: Mapping[str, Any], addresses: dict[str, int]) -> bool:
        if not (may_be_written(given["key_cache"]) and may_be_written(given["value_cache"])):
            return False
        keys, values = addresses["key_cache"], addresses["value_cache"]
        (key_low, key_high), (value_low, value_high) = self._caches
        if values - keys != self._distance and self._share(values - keys):
            return False
        key_begin, key_end, value_begin, value_end = keys + key_low, keys + key_high, values + value_low, values + value_high
        for name, low, high in self._appended:
            address = addresses[name]
            begin, end = address + low, address + high
            if (key_begin < end and begin < key_end) or (value_begin < end and begin < value_end):
                return False
        return True

    def _share(self, distance: int) -> bool:
        """Whether the bytes between the ends of key and value cache overlap, so many bytes apart."""
        (key_low, key_high), (value_low, value_high) = self._caches
        return distance + value_low < key_high and key_low < distance + value_high

    def check_offsets(self, addresses: dict[str, int]) -> None:
        check_positions(self.problem, addresses)


def _scale(name: str, strides: tuple[int, int]) -> Values:
    """`HeadView` of the array of this name."""
    return {"data": name, "stride_batch": strides[0], "stride_head": strides[1]}
