"""Calls that are ready to be launched again and again: kernels loaded, arguments filled in but for the addresses.

A prepared call knows its problem, its kernels and the forms of its results, and holds none of the caller's arrays. `run` takes the addresses of the
arguments, allocates the results, writes addresses into the structs and launches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from cuflash.arrays.borrowing import Array
from cuflash.arrays.frameworks import BFloat16Bits, Framework
from cuflash.arrays.signatures import Pinned, pointer, pointer_of_results, refuse_without_memory
from cuflash.planning import key_shares, operand_terms, query_splits
from cuflash.planning.argument_structs import MAPPED_TENSOR
from cuflash.planning.kernel_plan import Buffer, KernelPlan, LaunchShape
from cuflash.planning.kernel_specs import MERGE_ATTENTION, PART_TABLE, PARTS
from cuflash.planning.mapped_arrays import mask_view
from cuflash.planning.merge_kernels import row_groups, row_lanes
from cuflash.planning.plan import Plan
from cuflash.planning.split_cost import BEGIN_TILES, PART_TILES
from cuflash.problem import sequences
from cuflash.problem.features import Features
from cuflash.problem.layout import View
from cuflash.problem.problem import BackwardViews
from cuflash.runtime import arguments, kept_memory
from cuflash.runtime.arguments import Arguments, Change, Value
from cuflash.runtime.launch import Executable, fill_memory, simulated_memory
from cuflash.runtime.tensor_maps import TensorMap

if TYPE_CHECKING:
    from cuflash import simulator

NOTHING = Features()
FLOAT_BYTES = 4


class _InputGradients(NamedTuple):
    query: Any
    key: Any
    value: Any


class Gradients(_InputGradients):
    """Gradients of the inputs, each with the shape, dtype and kind of its input: `query`, `key`, `value`, which it unpacks to.

    Attributes:
        attn_mask: gradient of the additive mask, in its shape and dtype, with `need_attn_mask_grad`; else None.
        sinks: gradient of the sinks, float32 `(num_heads_q,)`; None without sinks.
    """

    attn_mask: Any = None
    sinks: Any = None


class _Launch(NamedTuple):
    """One kernel of a call, ready but for the addresses.

    Attributes:
        change: from the struct of the launch before it, where the two differ in what is no address.
    """

    executable: Executable
    shape: LaunchShape
    struct: Arguments
    change: Change | None


class PreparedCall:
    """One call with everything but the addresses decided.

    Attributes:
        writes: arguments of the caller's that kernels write into.
        results: names of what each call makes.
        reads_offsets: whether there are any in the host's memory to be checked in each call.
    """

    writes: tuple[str, ...] = ()

    def __init__(self, plan: Plan, inputs: Mapping[str, Array]) -> None:
        self.plan = plan
        self.problem = plan.problem
        self.device = plan.device
        self._is_simulated = plan.device.kind == "simulator"
        self.reads_offsets = self.problem.num_sequences is not None
        like = inputs["query"]
        self.framework: Framework = like.framework
        self.like = Array(0, (), (), like.dtype, like.itemsize, like.device, like.framework, None)  # does not keep the caller's array alive
        self.extents: dict[str, tuple[int, int]] = {}  # name -> lowest byte relative to the pointer, size in bytes
        self.launches: list[_Launch] = []
        made = (*plan.outputs, *plan.workspace)
        self.written = frozenset(buffer.name for buffer in made)  # what nothing but its kernels fills
        self.zeroed = tuple(buffer for buffer in plan.workspace if buffer.is_zeroed)
        self._unwritten = self.written.difference(buffer.name for buffer in self.zeroed)
        self._places = kept_memory.Places(plan.workspace)
        self._pointer = pointer_of_results(self.framework)
        self.keeps_workspace = self._places.may_be_kept and any(kernel.spec.splits_keys for kernel in plan.kernels)  # steps of generation
        self.make_results(plan.outputs)
        self.extents |= {buffer.name: (0, buffer.nbytes) for buffer in made}
        for name, array in inputs.items():
            self.add_extent(name, array)

    def make_results(self, buffers: Sequence[Buffer]) -> None:
        """Have each call make these, and its workspace with them."""
        self.results = tuple([buffer.name for buffer in buffers])
        workspace = (self._places.nbytes // FLOAT_BYTES,), "float32"
        self._make_workspace = self.framework.maker([workspace], self.like)
        made = [(buffer.shape, buffer.dtype) for buffer in buffers]
        self._made_places = () if self.keeps_workspace else self._places.offsets
        self._make = self.framework.maker([*made, workspace] if self._made_places else made, self.like)

    def made(self, addresses: dict[str, int]) -> list[Any]:
        """New results, and behind them memory for the workspace, which is to live until all is launched; where they lie is added to `addresses`."""
        made = self._make()
        pointer_of = self._pointer
        for name, result in zip(self.results, made):  # noqa: B905 (memory for the workspace has no name)
            addresses[name] = pointer_of(result) or refuse_without_memory(result, name)
        if self._made_places:
            begin = pointer_of(made[-1])
            for name, offset in self._made_places:
                addresses[name] = begin + offset
        return made

    def add_extent(self, name: str, array: Array) -> None:
        low, high = array.byte_range
        self.extents[name] = (low - array.pointer, high - low)

    def allocate(self, buffer: Buffer) -> tuple[Any, int]:
        """A new array of the caller's kind and its address."""
        made = self.framework.empty(buffer.shape, buffer.dtype, self.like)
        return made, pointer(made) or refuse_without_memory(made, buffer.name)

    def view_of(self, result: Buffer, head_dim: int) -> View:
        """The canonical view of a C-contiguous result."""
        strides = tuple(prod(result.shape[axis + 1 :]) for axis in range(len(result.shape)))
        like = self.like
        stand_in = Array(0, result.shape, strides, like.dtype, like.itemsize, like.device, like.framework, None)
        return self.problem.layout.view(stand_in, head_dim)

    def check_vectorized(self, arrays: Mapping[str, bool]) -> None:
        """Kernels that copy all arrays 16 bytes at a time get only such: what was planned is what is there."""
        others = [name for name, vectorized in arrays.items() if not vectorized]
        if self.problem.vectorized and others:
            raise RuntimeError(f"cuflash: planned as copies of 16 bytes, but not {', '.join(others)}: please report it")

    def launch(self, addresses: dict[str, int]) -> None:
        """Start all kernels on the caller's stream, with a workspace where it is not made with the results."""
        if not self.keeps_workspace:
            self.launch_all(addresses)
            return
        stream = self.stream()
        if self.framework.keeps_memory(stream) and not kept_memory.is_captured(self.device.kind, stream):
            self._launch_with_kept(addresses, stream)
            return
        held = self._make_workspace()  # given back when the launches are in the stream
        self._places.write(addresses, self._pointer(held[0]))
        self.launch_all(addresses, stream)

    def launch_all(self, addresses: dict[str, int], stream: int | None = None) -> None:
        """Start all kernels on `stream`, or on the caller's."""
        buffers: Sequence[simulator.Buffer] = ()
        if self._is_simulated:
            stream = 0
            if self.reads_offsets:
                self.check_offsets(addresses)
            buffers = simulated_memory(self.extents, addresses, self._unwritten)
        elif stream is None:
            stream = self.stream()
        if self.zeroed:
            self.clear_counters(addresses, stream)
        filled: Any = None
        for executable, shape, struct, change in self.launches:
            if change is None:
                filled = struct.fill(addresses)
            else:
                filled = filled[:]
                filled[change[0]] = change[1]
            executable.launch(shape, filled, stream, buffers)

    def stream(self) -> int:
        """The caller's, at this moment."""
        return 0 if self._is_simulated else self.framework.current_stream(self.device.index)

    def clear_counters(self, addresses: Mapping[str, int], stream: int) -> None:
        """Zeros where kernels count, before the first of them."""
        for buffer in self.zeroed:
            fill_memory(self.device, addresses[buffer.name], buffer.nbytes, stream)

    def fill_in(
        self,
        executables: Sequence[Executable],
        values: dict[str, Value],
        present: set[str],
        views: Mapping[str, tuple[str, View]],
        grad_attn_mask_strides: tuple[int, ...] = (0, 0, 0, 0),
    ) -> list[_Launch]:
        """The loaded kernels of the plan with their arguments filled in but for the addresses of what is `present` among the inputs and of what is allocated.

        Of `values`, a text stands for the address of that name (`arguments.py`): a buffer of the workspace is found under its own by every struct that has such a
        field. `views` has the operands that may be copied by maps: fields of the
        structs, which array each is, and its view.
        """
        problem = self.problem
        words = present | self.written
        if problem.features.kinds.dropout and "dropout_state" not in present:
            words |= {"dropout_seed", "dropout_offset"}
        values = {buffer.name: buffer.name for buffer in self.plan.workspace} | values
        if problem.features != NOTHING:
            values["features"] = arguments.feature_values(problem.features, problem.scale, problem.list_extents, grad_attn_mask_strides)
        launches: list[_Launch] = []
        for kernel, loaded in zip(self.plan.kernels, executables, strict=True):
            own: dict[str, Value] = {
                "geometry": arguments.geometry(problem, kernel.num_tiles, kernel.section_heads),
                "lengths": values.get("lengths", arguments.lengths(problem, kernel.packed_places)),
                "group_batch": kernel.group_batch, "group_heads": kernel.group_heads, "num_work": kernel.num_work, "num_tiles": kernel.num_tiles,
                "head_dim": kernel.head_dim, "num_splits": kernel.splits.number, "split_tiles": kernel.splits.tiles,
                "begin_tiles": BEGIN_TILES, "part_tiles": PART_TILES, "splits": query_splits.arguments(kernel, problem), "shares": key_shares.arguments(kernel),
            }  # fmt: skip
            own |= {
                field.name: {} for field in kernel.spec.arguments.fields if field.type is MAPPED_TENSOR
            }  # left out where it copies nothing of it
            of_terms = operand_terms.arrays(problem) if kernel.spec.takes_terms else None
            own |= {name: self.mapped(name, views, count, of_terms) for name, count in kernel.box_rows.items() if count}
            struct = kernel.spec.arguments
            filled_in = Arguments(struct, arguments.of_struct(struct, {**values, **own}), words)
            change = filled_in.change_of(launches[-1].struct) if launches else None
            launches.append(_Launch(loaded, kernel.shape, filled_in, change))
        return launches

    def mapped(
        self, field: str, views: Mapping[str, tuple[str, View]], box_rows: int, of_terms: Mapping[str, tuple[str, View]] | None = None
    ) -> Value:
        """An array that the TMA unit copies, so many rows at a time, for a field of a struct; `of_terms` are those of a kernel that takes terms."""
        mask = self.problem.features.attn_mask
        if field == "attn_mask" and mask is not None:
            name, view, dtype = field, mask_view(self.problem), "uint8" if mask.dtype == "bool" else mask.dtype
        elif of_terms is not None:
            (name, view), dtype = of_terms[field], operand_terms.DTYPE
        else:
            (name, view), dtype = views[field], self.problem.dtype
        return arguments.mapped_tensor(TensorMap(name, view, dtype, box_rows, self.device.index if self.device.kind == "gpu" else None))

    def check_offsets(self, addresses: dict[str, int]) -> None:
        """Packed offsets in the host's memory, whose values may differ from call to call."""
        problem = self.problem
        assert problem.num_sequences is not None
        for which, tokens, longest in (("q", problem.seqlen_q, problem.max_seqlen_q), ("kv", problem.seqlen_kv, problem.max_seqlen_kv)):
            sequences.check_offsets(
                which, addresses[f"cu_seqlens_{which}"], problem.num_sequences, tokens, longest, addresses.get(f"seqused_{which}", 0)
            )

    def _launch_with_kept(self, addresses: dict[str, int], stream: int) -> None:
        of, piece = kept_memory.take(self._places.nbytes, self.like, stream)
        self._places.write(addresses, piece.address)
        self.launch_all(addresses, stream)
        kept_memory.give_back(of, piece)

    def may_write(self, given: Mapping[str, Any], addresses: dict[str, int]) -> bool:
        """Whether those of the arrays that are written are surely as good as the ones that were checked, which had the same signatures; if not, they have to be
        checked again."""
        raise NotImplementedError

    def run(self, addresses: dict[str, int], given: Any = None) -> Any:
        """Allocate the results, launch, and return them; `given` is an array for the output. Each pass has its own."""
        raise NotImplementedError


class PreparedForward(PreparedCall):
    """A forward call; `given` is the array for the result, if there is one, and `given_view` what it was checked to be."""

    def __init__(
        self, plan: Plan, executables: Sequence[Executable], inputs: Mapping[str, Array], given: Array | None, given_view: View | None
    ) -> None:
        super().__init__(plan, inputs)
        problem = self.problem
        view = given_view or self.view_of(plan.outputs[0], problem.head_dim_v)
        if given is not None:
            self.writes = ("out",)
            self.add_extent("out", given)
            self.make_results(plan.outputs[1:])
        views = {**self.operands(), "out": ("out", view)}
        addresses = {name: array.pointer for name, array in inputs.items()} | {"out": given.pointer if given else 0}
        stride_batch = 0 if problem.layout.varlen else problem.num_heads_q * problem.seqlen_q
        vectorized = {name: view.vectorized(self.itemsize_of(array), addresses.get(array, 0)) for name, (array, view) in views.items()}
        self.check_vectorized(vectorized)
        values: dict[str, Value] = {name: arguments.tensor(array, view, vectorized[name]) for name, (array, view) in views.items()}
        values["lse"] = arguments.rows("lse", (stride_batch, problem.seqlen_q, 1))
        if any(kernel.spec == MERGE_ATTENTION for kernel in plan.kernels):
            values |= self.merged()
        self.launches = self.fill_in(executables, values | self.other_values(), set(inputs), {**views, "mapped_out": views["out"]})

    def itemsize_of(self, array: str) -> int:
        """Bytes per element of an array that `operands` names."""
        return self.problem.itemsize

    def operands(self) -> dict[str, tuple[str, View]]:
        """Fields of the argument structs: which array each is, an input or one of the workspace, and its view."""
        problem = self.problem
        return {"query": ("query", problem.query), "key": ("key", problem.key), "value": ("value", problem.value)}

    def other_values(self) -> dict[str, Value]:
        """Values of the structs that only some calls have."""
        return {}

    def merged(self) -> dict[str, Value]:
        """What the kernel that merges the parts of a call whose keys are split is told of them."""
        out, lse = (buffer for buffer in self.plan.workspace if buffer.name in PARTS)
        if (split := next((kernel for kernel in self.plan.kernels if kernel.splits.stream_k), None)) is not None:
            return self._merged_stream(split, out, lse)
        count, batch, heads, seqlen, head_dim = out.shape
        stride_head = seqlen * head_dim
        view = View((batch, seqlen, heads, head_dim), (heads * stride_head, head_dim, stride_head, 1))
        floats = prod(lse.shape[4:])  # of the LSE of a row
        part = {
            "out": arguments.tensor(out.name, view, view.aligned16(FLOAT_BYTES)),
            "lse": arguments.rows(lse.name, (heads * seqlen * floats, seqlen * floats, floats)),
        }
        strides = {"stride_part_out": batch * heads * stride_head, "stride_part_lse": batch * heads * seqlen * floats}
        # The order of a sum depends on the number of groups, and that on the room of the caches and the queries of the batch.
        groups = 1 if self.plan.problem.batch_invariant else row_groups(MERGE_ATTENTION, seqlen, head_dim, count)
        return {
            "seqlen_q": seqlen, "num_heads": heads, "lanes": row_lanes(head_dim), "groups": groups,
            "parts": {**strides, "num_parts": count, "one_array": True, "listed": [part]},
        }  # fmt: skip

    def _merged_stream(self, split: KernelPlan, out: Buffer, lse: Buffer) -> dict[str, Value]:
        """The same where each tile of grouped rows has parts of its own."""
        problem = self.problem
        count, tile_q, head_dim = out.shape
        view = View((count, tile_q, 1, head_dim), (0, head_dim, 0, 1))
        floats = lse.shape[2]
        part = {"out": arguments.tensor(out.name, view, view.aligned16(FLOAT_BYTES)), "lse": arguments.rows(lse.name, (0, 0, floats))}
        return {
            "seqlen_q": problem.seqlen_q, "num_heads": problem.num_heads_q, "lanes": row_lanes(head_dim),
            "groups": row_groups(MERGE_ATTENTION, problem.seqlen_q, head_dim, split.num_blocks),
            "parts": {"stride_part_out": tile_q * head_dim, "stride_part_lse": tile_q * floats, "one_array": True, "listed": [part]},
            "stream": {
                "part_table": PART_TABLE, "tile_q": tile_q, "num_tiles": split.num_tiles, "group": problem.heads_per_kv,
                "num_sequences": problem.num_sequences or 0, "cu_seqlens_q": "cu_seqlens_q",
            },
        }  # fmt: skip

    def may_write(self, given: Mapping[str, Any], addresses: dict[str, int]) -> bool:
        return may_be_written(given["out"]) and is_apart("out", self.extents, addresses)

    def run(self, addresses: dict[str, int], given: Any = None) -> Any:
        made = self.made(addresses)
        out = made[0] if given is None else given
        lse = made[self.results.index("lse")] if "lse" in self.results else None
        if self.launches:
            self.launch(addresses)
        else:
            fill(out, 0.0)
            if lse is not None:
                fill(lse, float("-inf"))
        if self.framework.hands_over:
            out, lse = (out if given is not None else self.framework.finish(out)), (None if lse is None else self.framework.finish(lse))
        return out if lse is None else (out, lse)


class PreparedBackward(PreparedCall):
    """A backward call; `others` is where its other inputs were found to be."""

    def __init__(self, plan: Plan, executables: Sequence[Executable], inputs: Mapping[str, Array], others: BackwardViews) -> None:
        super().__init__(plan, inputs)
        problem = self.problem
        views = {"query": problem.query, "key": problem.key, "value": problem.value, "out": others.out, "grad_out": others.grad_out}
        vectorized = {name: view.vectorized(problem.itemsize, inputs[name].pointer) for name, view in views.items()}
        for buffer, head_dim in zip(self.plan.outputs, (problem.head_dim, problem.head_dim, problem.head_dim_v), strict=False):
            view = views[buffer.name] = self.view_of(buffer, head_dim)
            vectorized[buffer.name] = view.aligned16(problem.itemsize)
        mask = problem.features.attn_mask
        grad_attn_mask_strides: tuple[int, ...] = (0, 0, 0, 0)
        if problem.features.need_attn_mask_grad and mask is not None:
            grad_attn_mask_strides = _contiguous_or_broadcast(mask.extents)
        self.check_vectorized(vectorized)
        values: dict[str, Value] = {name: arguments.tensor(name, view, vectorized[name]) for name, view in views.items()}
        values["lse"] = arguments.rows("lse", others.lse_strides)
        if others.grad_lse_strides is not None:
            values["grad_lse"] = arguments.rows("grad_lse", others.grad_lse_strides)
        values["num_turns"] = sum(buffer.shape[0] for buffer in self.plan.workspace if buffer.name == "turns")
        operands = {name: (name, view) for name, view in views.items()}
        self.launches = self.fill_in(executables, values, set(inputs), operands, grad_attn_mask_strides)

    def run(self, addresses: dict[str, int], given: Any = None) -> Gradients:
        gradients = self.gradients(addresses)
        of_inputs = Gradients(*gradients[:3])
        for name, gradient in zip(self.results[3:], gradients[3:], strict=True):
            setattr(of_inputs, name.removeprefix("grad_"), gradient)
        return of_inputs

    def gradients(self, addresses: dict[str, int]) -> list[Any]:
        """Allocate and launch, as `run`; the gradients in the order of `results`."""
        gradients = self.made(addresses)
        if self.launches:
            self.launch(addresses)
            del gradients[len(self.results) :]
        else:
            for gradient in gradients:
                fill(gradient, 0.0)
        return [self.framework.finish(gradient) for gradient in gradients] if self.framework.hands_over else gradients


def may_be_written(array: Any) -> bool:
    """Whether an array of a signature that was seen may be written, which signatures do not tell."""
    if type(array) is Pinned:  # ours
        return True
    is_recorded = getattr(array, "requires_grad", None)  # of a tensor, which has no flags
    return getattr(getattr(array, "flags", None), "writeable", True) if is_recorded is None else not is_recorded


def is_apart(name: str, extents: Mapping[str, tuple[int, int]], addresses: Mapping[str, int]) -> bool:
    """Whether an array shares no byte with what lies between the first and the last byte of each other one."""
    low, size = extents[name]
    first = addresses[name] + low
    for other_name, (low, other_size) in extents.items():
        if other_name == name or other_name not in addresses:
            continue
        other = addresses[other_name] + low
        if first < other + other_size and other < first + size:
            return False
    return True


def _contiguous_or_broadcast(extents: tuple[int, ...]) -> tuple[int, ...]:
    """C-contiguous strides, and 0 for an extent of 1."""
    strides, count = [], 1
    for extent in reversed(extents):
        strides.append(count if extent > 1 else 0)
        count *= extent
    return tuple(reversed(strides))


def fill(array: Any, number: float) -> None:
    """Give all elements of a result the same number."""
    if isinstance(array, BFloat16Bits):
        array.bits[...] = 0
    else:
        array[...] = number
