"""Attention over disjoint sets of keys, merged: `merge_attention` and its gradient.

A call is checked once for each signature of its arrays and remembered as a `_Merge`, which holds kernels and argument structs filled in but for the addresses;
a warm call looks it up, as those of attention do (`calls.py`).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from cuflash.arrays.borrowing import AnyArray, Array, borrow, is_array
from cuflash.arrays.descriptions import describe
from cuflash.arrays.frameworks import BFloat16Bits
from cuflash.arrays.signatures import pointer, refuse_without_memory, signature
from cuflash.errors import CompilationForbiddenError, DTypeError, OptionError, ShapeError, UnsupportedError
from cuflash.hardware import device
from cuflash.planning.argument_structs import LISTED_PARTS, MERGE_PART
from cuflash.planning.kernel_plan import LaunchShape
from cuflash.planning.kernel_specs import MERGE_ATTENTION, MERGE_ATTENTION_BACKWARD, MERGE_TABLE
from cuflash.planning.merge_kernels import merge_blocks, merge_kernel, row_groups, row_lanes
from cuflash.planning.planner import MAX_GRID
from cuflash.problem.checks import cast_to, check_dtypes, check_may_be_written, check_same_kind
from cuflash.problem.layout import CANONICAL, Layout, Shape4
from cuflash.problem.options import check_layout
from cuflash.problem.other_names import explains_keywords
from cuflash.problem.problem import DTYPES, MAX_EXTENT
from cuflash.runtime import arguments, calls, launch
from cuflash.runtime.arguments import Arguments, Value, Values
from cuflash.runtime.prepared import is_apart, may_be_written

_TABLE_SHAPE = LaunchShape(1, LISTED_PARTS, 0)


class MergeGradients(NamedTuple):
    """Gradients of the parts of `merge_attention`: a tuple of arrays for a list or tuple, one array for one array."""

    outs: Any
    lses: Any


@explains_keywords
def merge_attention(outs: Any, lses: Any, *, layout: str = CANONICAL, out: AnyArray | None = None) -> tuple[Any, Any]:
    """Merge attention of the same queries over disjoint sets of keys into attention over all of these keys.

    lse = log Σ exp(lses[i]), out = Σ exp(lses[i] - lse) · outs[i], in float32 and one pass over the parts, whatever their number.

    Args:
        outs: what attention over each set of keys gave: a list or tuple of arrays, or one array with the parts along a first axis of its own. Each is
            `(batch, seqlen_q, num_heads, head_dim)` in the order that `layout` says, or `(batch, seqlen_q, num_heads * head_dim)`, or of packed sequences
            `(tokens, num_heads, head_dim)`; float16, bfloat16 or float32; any strides, kinds of arrays as for attention.
        lses: their lse, in either form too: float32 `(batch, num_heads, seqlen_q)` whatever the layout, of packed sequences `(num_heads, tokens)`.
        layout: as in `scaled_dot_product_attention`.
        out: array for the result; shape and kind of each of outs, any strides, memory of its own. Its dtype is that of outs, or float16 or bfloat16 where they
            are float32: parts that are not rounded yet are rounded once.

    Returns:
        out: like each of outs, or the array that was passed; 0 where no part saw a key.
        lse: like each of lses; -inf there. One part comes back as it is.

    An lse of -inf says that a part saw no key in that row; what its out holds there, NaN too, changes nothing. In other rows NaN in out stays NaN, and NaN
    or +inf in an lse makes the row NaN.

    Sinks belong to one part: give them to one of the forward calls, or else they are counted more than once.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, UnsupportedError: an argument that cannot be used.

    Source: Dao et al. 2022, FlashAttention, arXiv 2205.14135, section 3.1, the softmax of a concatenation.
    """
    call, addresses = _find(False, layout, outs, lses, {} if out is None else {"out": out})
    merged, lse = call.run(addresses, out)
    return merged, lse


@explains_keywords
def merge_attention_backward(
    grad_out: AnyArray, outs: Any, lses: Any, out: AnyArray, lse: AnyArray, grad_lse: AnyArray | None = None, *, layout: str = CANONICAL
) -> MergeGradients:
    """Compute the gradients of `merge_attention`.

    With w = exp(lses[i] - lse): grad of outs[i] = w · dO, grad of lses[i] = w · (rowsum(dO ∘ outs[i]) - rowsum(dO ∘ out) + dlse).

    The backward pass of attention does not need them: `scaled_dot_product_attention_backward` takes the merged out and lse. They are for a loss that depends
    on the parts otherwise, or for parts that are no attention.

    Args:
        grad_out: gradient of `out`; its shape, dtype and kind; any strides.
        outs, lses: as in the forward call, or some of the parts.
        out, lse: what the forward call returned, of all parts; out of 16 bits where outs are float32, if it was passed so.
        grad_lse: gradient of `lse`, its shape and dtype, or None for zero.
        layout: as in the forward call.

    Returns:
        MergeGradients(outs, lses), each in the form and of the dtype of its argument: a tuple for a list or tuple, one array for one array. A part has no
        gradient in rows where its lse is -inf.

    Raises:
        CuflashError: as the forward call.
    """
    given = {"grad_out": grad_out, "out": out, "lse": lse} | ({} if grad_lse is None else {"grad_lse": grad_lse})
    call, addresses = _find(True, layout, outs, lses, given)
    return MergeGradients(*call.run(addresses))


# --- Calls that are remembered ------------------------------------------------------------------------------------------------------------


def _find(is_backward: bool, layout: str, outs: Any, lses: Any, given: dict[str, Any]) -> tuple[_Merge, list[int]]:
    """What is prepared for a call, and the addresses of its arrays: the parts of outs, those of lses, and the others."""
    listed = isinstance(outs, (list, tuple)), isinstance(lses, (list, tuple))
    arrays = [*(outs if listed[0] else (outs,)), *(lses if listed[1] else (lses,)), *given.values()]
    seen: list[Hashable] = [_find, is_backward, device.simulator_setting(), layout, listed, len(outs) if listed[0] else 1, tuple(given)]
    addresses = []
    for array in arrays:
        kind = signature(array)
        if kind is None:
            break
        addresses.append(pointer(array))
        seen += (kind, addresses[-1] & 15)
    key, call = calls.remembered(seen) if len(addresses) == len(arrays) else (None, None)
    if call is None or not (is_backward or call.may_write(given, addresses)):
        borrowed = {name: _borrow_parts(parts, name) for name, parts in (("outs", outs), ("lses", lses))}
        others = {name: borrow(array, name) for name, array in given.items()}
        parts = _Parts(borrowed["outs"], listed[0]), _Parts(borrowed["lses"], listed[1])
        try:
            call = _Merge(is_backward, layout, *parts, others)
        except CompilationForbiddenError as error:
            dtype = others["out"].dtype if "out" in others else parts[0].arrays[0].dtype
            raise CompilationForbiddenError(error.missing, f'Compile it beforehand: cuflash.warmup([], "{dtype}", merge=True)') from None
        calls.keep(key, call)
        addresses = [array.pointer for array in chain(*borrowed.values(), others.values())]
    return call, addresses


def _borrow_parts(parts: Any, name: str) -> list[Array]:
    """The arrays of a list, or the one array that holds all parts."""
    if not isinstance(parts, (list, tuple)):
        if not is_array(parts):
            hint = "Pass what the calls of attention returned: [out_1, out_2] and [lse_1, lse_2]."
            raise ShapeError(name, describe(parts), "a list or tuple of arrays, or one array with the parts along its first axis", hint)
        return [borrow(parts, name)]
    if not parts:
        raise ShapeError(name, "no parts", "at least one part", _NO_PARTS)
    if isinstance(parts[0], (list, tuple)):
        hint = "Of pairs (out, lse) as the calls return them: merge_attention(*zip(*pairs))."
        raise ShapeError(f"{name}[0]", f"a {type(parts[0]).__name__} of {len(parts[0])}", "an array", hint)
    return [borrow(part, f"{name}[{i}]") for i, part in enumerate(parts)]


@dataclass(frozen=True)
class _Parts:
    """`outs` or `lses` as they came: a list of arrays, or one array with the parts along its first axis."""

    arrays: list[Array]
    listed: bool

    @property
    def number(self) -> int:
        return len(self.arrays) if self.listed else self.arrays[0].shape[0]

    @property
    def step(self) -> int:
        """Elements from part to part of one array."""
        return 0 if self.listed else self.arrays[0].strides[0]

    def part(self, i: int) -> Array:
        """One part as an array of its own, which does not keep the caller's alive."""
        whole, axes = (self.arrays[i], 0) if self.listed else (self.arrays[0], 1)
        address = whole.pointer + (0 if self.listed else i * self.step * whole.itemsize)
        return Array(address, whole.shape[axes:], whole.strides[axes:], whole.dtype, whole.itemsize, whole.device, whole.framework, None)

    def named(self, name: str) -> dict[str, Array]:
        """The arrays by what a message calls them."""
        return {f"{name}[{i}]" if self.listed else name: array for i, array in enumerate(self.arrays)}


# --- Checks -------------------------------------------------------------------------------------------------------------------------------


def _check_parts(outs: _Parts, lses: _Parts, order: str) -> tuple[Layout, Shape4]:
    """The form of outs, and the canonical shape of each."""
    for name, parts in (("outs", outs), ("lses", lses)):
        if not parts.listed and not parts.arrays[0].shape:
            raise ShapeError(name, "an array without dimensions", "the parts along its first axis", "Pass a list of arrays, or stack them.")
        if not parts.number:
            raise ShapeError(name, f"no parts in shape {parts.arrays[0].shape}", "at least one part", _NO_PARTS)
        for i in range(1, len(parts.arrays)):
            if parts.arrays[i].shape != parts.arrays[0].shape:
                got, expected = f"shape {parts.arrays[i].shape}", f"{parts.arrays[0].shape}, like {name}[0]"
                raise ShapeError(f"{name}[{i}]", got, expected, "Parts differ in their keys, not in their queries and heads.")
    if outs.number != lses.number:
        raise ShapeError(
            "lses",
            f"{lses.number} parts",
            f"{outs.number}, one for each of outs",
            "One array has the parts along its first axis, a list one array for each part.",
        )
    out_shape, lse_shape = outs.part(0).shape, lses.part(0).shape
    if len(lse_shape) > len(out_shape):
        got, expected = f"parts of shape {lse_shape} beside outs of {out_shape}", "lse, which has no head_dim"
        raise ShapeError("lses", got, expected, "outs and lses are exchanged: outs come first.")
    check_dtypes(outs.named("outs"))
    for name, array in lses.named("lses").items():
        if array.dtype != "float32":
            raise DTypeError(name, array.dtype, "float32", f"Cast it: {cast_to(name, array, 'float32')}.")
    out, lse = outs.part(0), lses.part(0)
    form = _form_of(out.shape, lse.shape, order)
    heads = lse.shape[0] if form.varlen else lse.shape[1]
    if form.flat and (heads == 0 or out.shape[2] % heads):
        expected = f"a last dimension divisible by {heads}, the heads of lses"
        raise ShapeError("outs", f"parts of shape {out.shape}", expected, f"Parts are read as {form.describe()}.")
    head_dim = out.shape[2] // heads if form.flat else out.shape[-1] if form.varlen else out.shape[form.order.index("d")]
    if not head_dim:
        raise ShapeError("outs", f"head_dim 0 in {out.shape}", "at least 1", f"Parts are read as {form.describe()}.")
    shape = form.view(out, head_dim).shape
    expected_lse = (shape[2], shape[1]) if form.varlen else (shape[0], shape[2], shape[1])
    if lse.shape != expected_lse:
        words = "(heads, tokens)" if form.varlen else "(batch, heads, seqlen_q) in every layout"
        hint = f"Parts of outs, {out.shape}, are read as {form.describe()}; say otherwise with layout=."
        raise ShapeError("lses", f"parts of shape {lse.shape}", f"{expected_lse}, which is {words}", hint)
    if max(shape) > MAX_EXTENT:
        raise UnsupportedError("outs", f"parts of shape {out.shape}", f"extents of at most {MAX_EXTENT}", "Split the call.")
    return form, shape


_NO_PARTS = "Without any keys out is 0 and lse -inf."


def _form_of(out: tuple[int, ...], lse: tuple[int, ...], order: str) -> Layout:
    """Packed sequences have an lse of two dimensions; heads that are part of the last dimension are counted by lse."""
    if (len(out), len(lse)) == (4, 3):
        return Layout(order)
    if (len(out), len(lse)) == (3, 3):
        if order in ("bshd", "sbhd"):
            return Layout(order, flat=True)
        expected = "'bshd' or 'sbhd' for arrays of 3 dimensions, where the last one is heads * head_dim"
        raise OptionError("layout", repr(order), expected, "Leave layout out, or pass arrays of 4 dimensions.")
    if (len(out), len(lse)) == (3, 2):
        if order == CANONICAL:
            return Layout(varlen=True)
        raise OptionError("layout", repr(order), "no layout for packed sequences, (tokens, heads, head_dim)", "Leave layout out.")
    expected = "outs of 4 dimensions with lses (batch, heads, seqlen_q), or of packed sequences 3 with (heads, tokens)"
    hint = "One array has the parts along a first axis of its own; a list holds one array for each part."
    raise ShapeError("outs", f"parts of shape {out} with lses of shape {lse}", expected, hint)


def _check_like(name: str, array: Array, part: Array, of: str, dtype: str) -> None:
    """`array` has the shape of each part of `of`, and the element type `dtype`."""
    if array.dtype != dtype:
        hint = "Pass an array of that type." if name == "out" else f"Cast it: {cast_to(name, array, dtype)}."
        raise DTypeError(name, array.dtype, f"{dtype}, like {of if dtype == part.dtype else 'out'}", hint)
    if array.shape != part.shape:
        hint = "Pass what merge_attention returned, or an array of that shape for it."
        raise ShapeError(name, f"shape {array.shape}", f"{part.shape}, the shape of each of {of}", hint)


# --- A prepared call ----------------------------------------------------------------------------------------------------------------------


class _Result(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str


class _Merge:
    """A call of either function with everything but the addresses decided."""

    def __init__(self, is_backward: bool, layout: str, outs: _Parts, lses: _Parts, others: dict[str, Array]) -> None:
        named = outs.named("outs") | lses.named("lses") | others
        check_same_kind(named)
        way = f"pass {{name}}.detach() and compute gradients with {MERGE_ATTENTION_BACKWARD.name}"
        calls.refuse_autograd(named, f"Call cuflash.torch, which autograd records; or {way}.")
        self.form, self.shape = _check_parts(outs, lses, check_layout(layout, True))
        out, lse = outs.part(0), lses.part(0)
        self.dtype = out.dtype  # of the result: of parts of float32 the caller's array may have another
        if "out" in others and out.dtype == "float32" and others["out"].dtype in DTYPES:
            self.dtype = others["out"].dtype
        for name, array in others.items():
            _check_like(name, array, *((lse, "lses", "float32") if "lse" in name else (out, "outs", self.dtype)))
        if not is_backward and "out" in others:
            check_may_be_written(others["out"], {name: array for name, array in named.items() if name != "out"})

        self.count = outs.number
        self.listed = outs.listed, lses.listed
        self.one_array = not outs.listed and not lses.listed
        self.device = device.of_memory(*out.device)
        self.framework = out.framework
        self.like = Array(0, (), (), out.dtype, out.itemsize, out.device, out.framework, None)
        self.names = [*(f"outs[{i}]" for i in range(len(outs.arrays))), *(f"lses[{i}]" for i in range(len(lses.arrays))), *others]
        self.memory = {}  # name -> lowest byte relative to the address, size in bytes
        for name, array in zip(self.names, named.values(), strict=True):
            low, high = array.byte_range
            self.memory[name] = low - array.pointer, high - low
        self.derived = [  # parts of one array beside a list: name, array, bytes from its start
            (f"{name}[{i}]", f"{name}[0]", i * parts.step * parts.arrays[0].itemsize)
            for name, parts in (("outs", outs), ("lses", lses))
            if not parts.listed and not self.one_array
            for i in range(1, self.count)
        ]
        self.is_backward = is_backward
        self._prepare_kernels()
        own = self._backward_values(out, lse, others) if self.is_backward else self._forward_values(out, lse, others.get("out"))
        groups = self._groups(outs, lses)
        given = {*self.names, *(name for name, _, _ in self.derived), *(result.name for result in self.results)}
        given |= {"table"} if len(groups) > 1 else set()
        self.arguments = Arguments(self.spec.arguments, own | {"parts": groups[0]}, given)
        self.tables = [Arguments(MERGE_TABLE.arguments, {"parts": group}, given) for group in groups] if len(groups) > 1 else []
        for result in self.results:
            self.memory[result.name] = (0, prod(result.shape) * (4 if result.dtype == "float32" else out.itemsize))
        self.memory["table"] = (0, self.count * MERGE_PART.size)
        self.written = {"table", *(result.name for result in self.results)}
        self.make = self.framework.maker([(result.shape, result.dtype) for result in self.results], self.like)

    def _prepare_kernels(self) -> None:
        batch, seqlen, heads, head_dim = self.shape
        self.spec = MERGE_ATTENTION_BACKWARD if self.is_backward else MERGE_ATTENTION
        self.lanes, self.groups = row_lanes(head_dim), row_groups(self.spec, seqlen, head_dim, self.count)
        self.num_tiles = merge_blocks(self.spec, seqlen, head_dim)
        self.launch_shape = LaunchShape(self.num_tiles * heads * batch, 32 * self.spec.num_warps, 0)
        num_blocks = self.launch_shape.num_blocks
        if num_blocks > MAX_GRID:
            raise UnsupportedError("outs", f"{num_blocks} blocks of rows", f"at most {MAX_GRID}", "Split the call along the batch.")
        if num_blocks:
            kernel = merge_kernel(self.spec, self.device, self.dtype, num_blocks, part_dtype=self.like.dtype)
            self.kernel = launch.executable(kernel, self.device)
        if num_blocks and self.count > LISTED_PARTS and not self.one_array:
            self.table_kernel = launch.executable(merge_kernel(MERGE_TABLE, self.device, "float32", 1), self.device)

    def _forward_values(self, out: Array, lse: Array, given: Array | None) -> dict[str, Value]:
        self.results = [_Result("lse", lse.shape, "float32")]
        if given is None:
            self.results.insert(0, _Result("out", out.shape, out.dtype))
        result = _contiguous(out) if given is None else given
        return {"out": self._tensor("out", result), "lse": self._rows("lse", _contiguous(lse)), **self._sizes()}

    def _backward_values(self, out: Array, lse: Array, others: dict[str, Array]) -> dict[str, Value]:
        self.results = [
            _Result("grad_outs", (self.count, *out.shape), out.dtype), _Result("grad_lses", (self.count, *lse.shape), "float32"),
        ]  # fmt: skip
        grad_outs, grad_lses = _contiguous(out), _contiguous(lse)
        stride_grad_outs, stride_grad_lses = prod(out.shape), prod(lse.shape)
        return {
            "out": self._tensor("out", others["out"]),
            "grad_out": self._tensor("grad_out", others["grad_out"]),
            "grad_outs": self._tensor("grad_outs", grad_outs, stride_grad_outs),
            "lse": self._rows("lse", others["lse"]),
            "grad_lse": self._rows("grad_lse", others.get("grad_lse", grad_lses)),
            "grad_lses": self._rows("grad_lses", grad_lses),
            "stride_grad_outs": stride_grad_outs,
            "stride_grad_lses": stride_grad_lses,
            **self._sizes(),
        }

    def _sizes(self) -> dict[str, Value]:
        _, seqlen, heads, head_dim = self.shape
        return {
            "seqlen_q": seqlen,
            "num_heads": heads,
            "head_dim": head_dim,
            "num_tiles": self.num_tiles,
            "lanes": self.lanes,
            "groups": self.groups,
        }

    def _groups(self, outs: _Parts, lses: _Parts) -> list[Values]:
        """`MergeParts` for each group of parts that fit it; parts of one array are one."""
        steps = (outs.step, lses.step) if self.one_array else (0, 0)
        last = 1 if self.one_array else self.count
        return [
            {
                "table": "table", "stride_part_out": steps[0], "stride_part_lse": steps[1], "num_parts": self.count, "first": first, "one_array": self.one_array,
                "listed": [
                    {"out": self._tensor(f"outs[{i}]", outs.part(i), steps[0]), "lse": self._rows(f"lses[{i}]", lses.part(i))}
                    for i in range(first, min(first + LISTED_PARTS, last))
                ],
            }
            for first in range(0, last, LISTED_PARTS)
        ]  # fmt: skip

    def _tensor(self, name: str, array: Array, step: int = 0) -> Values:
        """`TensorView` of an array, or of the first of arrays that are `step` elements apart."""
        view = self.form.view(array, self.shape[3])
        aligned = view.vectorized(array.itemsize, array.pointer) and step * array.itemsize % 16 == 0
        return arguments.tensor(name, view, aligned)

    def _rows(self, name: str, array: Array) -> Values:
        """`RowView` of an array with the shape of an lse."""
        batch, heads, seqlen = (0, *array.strides) if self.form.varlen else array.strides
        return arguments.rows(name, (batch, heads, seqlen))

    # --- Running --------------------------------------------------------------------------------------------------------------------------

    def may_write(self, given: dict[str, Any], addresses: list[int]) -> bool:
        """Whether the caller's array for the result, if there is one, is as good as the one that was checked, which had the same signature."""
        return not given or (may_be_written(given["out"]) and is_apart("out", self.memory, dict(zip(self.names, addresses, strict=True))))

    def run(self, addresses: list[int], given: Any = None) -> tuple[Any, Any]:
        """Launch on arguments at these addresses, in the order of `names`; the two results, of which `given` may be the first."""
        made = self.make()
        if self.launch_shape.num_blocks:
            named_addresses = dict(zip(self.names, addresses, strict=True))
            for name, array, offset in self.derived:
                named_addresses[name] = named_addresses[array] + offset
            for result, memory in zip(self.results, made, strict=True):
                named_addresses[result.name] = pointer(memory) or refuse_without_memory(memory, result.name)
            self._launch(named_addresses)
        if not self.is_backward:
            return self.framework.finish(made[0]) if given is None else given, self.framework.finish(made[-1])
        return self._in_form(made[0], self.listed[0]), self._in_form(made[1], self.listed[1])

    def _launch(self, named_addresses: dict[str, int]) -> None:
        on_gpu = self.device.kind == "gpu"
        stream = self.framework.current_stream(self.device.index) if on_gpu else 0
        if self.tables:
            table = self.framework.empty(
                (self.count * MERGE_PART.size // 4,), "int32", self.like
            )  # freed when all launches are in the stream
            named_addresses["table"] = pointer(table)
        buffers = () if on_gpu else launch.simulated_memory(self.memory, named_addresses, self.written)
        for group in self.tables:
            self.table_kernel.launch(_TABLE_SHAPE, group.fill(named_addresses), stream, buffers)
        self.kernel.launch(self.launch_shape, self.arguments.fill(named_addresses), stream, buffers)

    def _in_form(self, gradients: Any, listed: bool) -> Any:
        """Gradients of all parts in one array, or a tuple of them, as the argument came."""
        if not listed:
            return self.framework.finish(gradients)
        tagged = isinstance(gradients, BFloat16Bits)
        each = (BFloat16Bits(gradients.bits[i]) if tagged else gradients[i] for i in range(self.count))
        return tuple(self.framework.finish(gradient) for gradient in each)


def _contiguous(part: Array) -> Array:
    """A C-contiguous array of the shape of `part`."""
    strides = [prod(part.shape[axis + 1 :]) for axis in range(len(part.shape))]
    return Array(0, part.shape, tuple(strides), part.dtype, part.itemsize, part.device, part.framework, None)
