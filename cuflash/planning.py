"""From a problem and a device to the kernels that will run: which, with which constants, in which grid, with how much memory.

Pure: nothing here touches a GPU, CuPy or a compiler, so a plan can be made for any architecture anywhere, and printed.

Memory beyond inputs and outputs is O(S): the forward pass needs none, the backward pass eight bytes per query row and head, with an additive mask
twelve. With a boolean mask or segments, the lists of visible tiles take four bytes for each pair of tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import NamedTuple

from cuflash import kernel_specs, tiles
from cuflash.arrays import describe
from cuflash.codegen import config_text
from cuflash.compiler import CompileRequest
from cuflash.device import Device
from cuflash.errors import TileError, UnsupportedError
from cuflash.features import NO_FEATURES, Features, FeatureSet, MaskLayout
from cuflash.kernel_specs import KernelSpec
from cuflash.problem import DTYPES, Problem
from cuflash.tiles import KernelCase, Tile
from cuflash.visits import all_tiles, visited_tiles

MAX_GRID = 2**31 - 1
_ITEMSIZES = {**DTYPES, "int32": 4}
ROW_STATISTICS_BYTES = 8
MAX_SHARED_SLICES = 5  # of a wide head, beyond which dK and dV take a kernel each

Tiles = Tile | Mapping[str, Tile] | None
"""What `tile=` takes: one tile; for the backward pass also a mapping from kernel names to tiles; or None for the defaults."""


@dataclass(frozen=True)
class Buffer:
    """Memory that a call allocates: a result, or workspace that is given back when its kernels have run. Only they write it.

    Attributes:
        name: of its address in the argument structs.
        shape: of a result in the caller's form.
        dtype: element type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * _ITEMSIZES[self.dtype]


class LaunchShape(NamedTuple):
    """What the driver is told of a launch, besides function, arguments and stream.

    Attributes:
        num_blocks: of the one-dimensional grid.
        num_threads: of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    num_blocks: int
    num_threads: int
    shared_bytes: int


@dataclass(frozen=True)
class KernelPlan:
    """One kernel launch.

    Attributes:
        case: which kernel, and for what it is compiled.
        tile: of a block; of a kernel without matrix products what it has of one.
        config: the text of `struct Config`.
        shape: of the launch.
        num_tiles: tiles that one (batch, head) is cut into.
        group_batch, group_heads: batches and query heads summed into one K/V gradient; 1 elsewhere.
    """

    case: KernelCase
    tile: Tile
    config: str
    shape: LaunchShape
    num_tiles: int
    group_batch: int = 1
    group_heads: int = 1

    @property
    def spec(self) -> KernelSpec:
        """The kernel."""
        return self.case.kernel

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.case.kernel.name

    @property
    def source(self) -> str:
        """File in kernels/."""
        return self.case.kernel.source

    @property
    def entry(self) -> str:
        """Name of the `extern "C"` function."""
        return self.case.kernel.entry

    @property
    def dtype(self) -> str:
        """Element type of query, key, value and the output."""
        return self.case.dtype

    @property
    def head_dim(self) -> int:
        """Of query and key."""
        return self.case.head_dim

    @property
    def head_dim_v(self) -> int:
        """Of value and the output; 0 of a kernel that has no value."""
        return self.case.head_dim_v

    @property
    def num_blocks(self) -> int:
        """Blocks of the one-dimensional grid."""
        return self.shape.num_blocks

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.shape.num_threads

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.shape.shared_bytes

    def request(self, device: Device) -> CompileRequest:
        """What to compile for `device`: a cubin for a GPU, PTX for the simulator."""
        return CompileRequest(self.source, self.config, device.compile_arch, "ptx" if device.kind == "simulator" else "cubin")


@dataclass(frozen=True)
class Plan:
    """Everything that a call will do. `print(plan)` says it in words.

    Attributes:
        problem: the checked problem.
        device: where it runs.
        backward: which pass.
        kernels: launches in order; empty when there is nothing to compute.
        outputs: what the call returns.
        workspace: device memory beyond inputs and outputs. Lists of visible tiles of each kernel follow those of the one before in the same memory.
    """

    problem: Problem
    device: Device
    backward: bool
    kernels: tuple[KernelPlan, ...]
    outputs: tuple[Buffer, ...]
    workspace: tuple[Buffer, ...]

    @property
    def output_bytes(self) -> int:
        """Memory of the arrays that the call returns."""
        return sum(buffer.nbytes for buffer in self.outputs)

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and outputs."""
        return sum(buffer.nbytes for buffer in self.workspace)

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        names = ", ".join(kernel.name for kernel in self.kernels)
        return f"<Plan of {names or 'nothing'} on {self.device.name}; print it for all there is to say>"

    def describe(self) -> str:
        """A few lines for people: problem, device, kernels with tiles and grids, memory, work."""
        problem = self.problem
        causal = f"causal ({problem.causal_alignment})" if problem.is_causal else "not causal"
        grouped = problem.num_heads_q != problem.num_heads_kv
        heads = f"{problem.num_heads_q}/{problem.num_heads_kv} heads" if grouped else _count(problem.num_heads_q, "head")
        flops = problem.flops_backward if self.backward else problem.flops_forward
        lengths = f"batch {problem.batch}, seqlen {problem.seqlen_q} x {problem.seqlen_kv}"
        if problem.num_sequences is not None:
            lengths = f"{_count(problem.num_sequences, 'packed sequence')} of {problem.seqlen_q} x {problem.seqlen_kv} tokens in all"
            lengths += f", each of at most {problem.max_seqlen_q} x {problem.max_seqlen_kv}"
        if problem.seqlens_kv:
            lengths += ", keys of each row up to its seqlens_kv"
        standard = (
            (problem.num_sequences or problem.batch)
            * problem.num_heads_q
            * problem.max_seqlen_q
            * problem.max_seqlen_kv
            * problem.itemsize
            * (4 if self.backward else 2)
        )
        where = self.device.name if self.device.arch in self.device.name else f"{self.device.name}, {self.device.arch}"
        lines = [
            f"{'backward' if self.backward else 'forward'} attention on {where}",
            f"  problem    {problem.dtype}, {lengths}, {heads}, "
            f"head_dim {tiles.head_dims(problem.head_dim, problem.head_dim_v)}, {causal}, scale {problem.scale:.6g}",
            f"  products   {_products(problem, self.device)}",
        ]
        for kernel in self.kernels:
            tile = f"{kernel.tile}, " if kernel.spec.is_tiled or kernel.spec == kernel_specs.VISIBLE_TILES else ""
            lines.append(
                f"  kernel     {kernel.name}: {kernel.source}, {tile}{_count(kernel.num_blocks, 'block')} of {kernel.num_threads} threads, "
                f"{kernel.shared_bytes} bytes of shared memory"
            )
        if not self.kernels:
            lines.append("  kernel     none: there is nothing to compute")
        if problem.features.kinds != NO_FEATURES:
            lines.insert(2, f"  features   {problem.features.describe()}")
        visits = [_visits(kernel, problem) for kernel in self.kernels if kernel.spec.is_tiled]
        ragged = problem.seqlens_kv or problem.num_sequences is not None
        if visits and (problem.is_causal or problem.features.kinds.hides_keys or ragged):
            lines.append(f"  tiles      {', '.join(visits)}")
        at_most = "at most " if problem.hides_by_data else ""
        lines += [
            f"  memory     outputs {_bytes(self.output_bytes)}, workspace {_bytes(self.workspace_bytes)}; unfused attention would take {_bytes(standard)} more",
            f"  work       {at_most}{flops / 1e9:.4g} GFLOP in matrix products over visible pairs; the same bits on every run",
        ]
        return "\n".join(lines)


def make_plan(problem: Problem, device: Device, *, backward: bool = False, tile: Tiles = None) -> Plan:
    """Choose kernels, tiles and grids.

    Args:
        problem: what to compute.
        device: where.
        backward: gradients instead of the output.
        tile: None for the default tiles. For the backward pass a single tile is meant for the dK/dV kernel, and the dQ kernel takes it with tile_q
            and tile_kv exchanged, backward_row_sums not at all; a mapping pins kernels by name, such as {"backward_dq": Tile(...)}.

    Raises:
        TileError: `tile` is not legal here, or names a kernel that does not run.
        UnsupportedError: more blocks than a grid can have.
    """
    kernels: tuple[KernelPlan, ...] = ()
    if not problem.is_empty:
        tiled = backward_kernels(problem, device) if backward else (kernel_specs.FORWARD,)
        _check_names(tile, tiled)
        planned = [kernel for kernel in (_tiled_kernel(spec, problem, device, tile) for spec in tiled) if kernel.num_blocks]
        if problem.features.kinds.lists_tiles:
            with_lists = [
                (_visible_tiles_kernel(kernel, problem, device), kernel) if kernel.spec.walks_lists else (kernel,) for kernel in planned
            ]
            planned = [kernel for launched in with_lists for kernel in launched]
        if backward:
            planned.insert(0, _delta_kernel(problem, device))
            if problem.features.kinds.sinks:
                planned.append(_sinks_kernel(problem, device))
        kernels = tuple(planned)
    for kernel in kernels:
        if kernel.num_blocks > MAX_GRID:
            hint = "Split the call along the batch."
            raise UnsupportedError("query", f"{kernel.num_blocks} tiles over batch and heads", f"at most {MAX_GRID}", hint)
    return Plan(problem, device, backward, kernels, _gradients(problem) if backward else _results(problem), _workspace(problem, kernels))


def backward_kernels(problem: Problem, device: Device) -> tuple[KernelSpec, ...]:
    """The tiled kernels that make the gradients.

    dK and dV come from one kernel where the accumulators of both fit the registers and they are summed over the same heads and batches.
    """
    same_groups = problem.key_shape[:3] == problem.value_shape[:3]
    joint = same_groups and not splits_dkdv(_case(kernel_specs.BACKWARD_DKDV, problem), device)
    kernels = [kernel_specs.BACKWARD_ROW_SUMS] if problem.features.kinds.additive_mask else []
    kernels += [kernel_specs.BACKWARD_DKDV] if joint else [kernel_specs.BACKWARD_DV, kernel_specs.BACKWARD_DK]
    kernels += [kernel_specs.BACKWARD_DQ]
    kernels += [kernel_specs.BACKWARD_MASK] if problem.features.need_attn_mask_grad else []
    return tuple(kernels)


@functools.lru_cache(maxsize=4096)
def splits_dkdv(case: KernelCase, device: Device) -> bool:
    """Whether no tile of the joint dK/dV kernel fits the registers with room to spare, or too many warps would compute the same exponentials."""
    if tiles.measured_tile(case, device) is not None:
        return False
    legal = tiles.legal_tiles_for(case, device)
    return (
        not legal or case.head_slices(device) > MAX_SHARED_SLICES or tiles.estimate_registers(case, legal[0], device) > tiles.MAX_REGISTERS
    )


def offline_kernels(
    device: Device,
    *,
    dtype: str,
    head_dim: int,
    head_dim_v: int | None = None,
    is_causal: bool = False,
    allow_tf32: bool = False,
    varlen: bool = False,
    seqlens_kv: bool = False,
    backward: bool = True,
    tile: Tiles = None,
    features: FeatureSet = NO_FEATURES,
    need_attn_mask_grad: bool = False,
) -> Iterable[KernelPlan]:
    """The kernels of the forward and, unless told otherwise, backward pass on `device`, for compiling ahead and for inspection."""
    problem = _representative(
        dtype, head_dim, head_dim_v or head_dim, is_causal, allow_tf32, varlen, seqlens_kv, features, need_attn_mask_grad
    )
    _check_names(tile, (kernel_specs.FORWARD, *(backward_kernels(problem, device) if backward else ())))
    yield from make_plan(problem, device, tile=_of_pass(tile, backward=False)).kernels
    if backward:
        yield from make_plan(problem, device, backward=True, tile=_of_pass(tile, backward=True)).kernels


def _of_pass(tile: Tiles, *, backward: bool) -> Tiles:
    """The part of a mapping that is for one pass."""
    if not isinstance(tile, Mapping):
        return tile
    return {name: pinned for name, pinned in tile.items() if kernel_specs.TILED_KERNELS[name].backward == backward}


def _representative(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    allow_tf32: bool,
    varlen: bool,
    seqlens_kv: bool,
    features: FeatureSet,
    need_attn_mask_grad: bool,
) -> Problem:
    from cuflash.problem import Layout, View

    view, view_v = (View((1, 1024, 1, dim), (1024 * dim, dim, dim, 1)) for dim in (head_dim, head_dim_v))
    mask = None if features.attn_mask is None else MaskLayout(features.attn_mask, (1024, 1024), (1, 1, 1024, 1024), (0, 0, 1024, 1))
    need_grad = need_attn_mask_grad and features.additive_mask
    return Problem(
        dtype=dtype, batch=1, seqlen_q=1024, seqlen_kv=1024, num_heads_q=1, num_heads_kv=1, batch_kv=1, head_dim=head_dim, scale=head_dim**-0.5,
        is_causal=is_causal, causal_alignment="top_left", deterministic=False, allow_tf32=allow_tf32, return_lse=True, query=view, key=view,
        value=view_v, key_shape=view.shape, value_shape=view_v.shape, layout=Layout(), head_dim_v=head_dim_v,
        max_seqlen_q=1024, max_seqlen_kv=1024, seqlens_kv=seqlens_kv, num_sequences=1 if varlen else None,
        features=Features(features, mask, need_grad),
    )  # fmt: skip


def _check_names(tile: Tiles, kernels: tuple[KernelSpec, ...]) -> None:
    """A mapping pins kernels that run, no others."""
    names = [kernel.name for kernel in kernels]
    for name in tile if isinstance(tile, Mapping) else ():
        if name not in names:
            raise TileError(
                "tile",
                f"a tile for {describe(name)}",
                "kernels that run: " + ", ".join(names),
                "Correct the name, or remove it; print(plan) lists the kernels.",
            )


def _case(spec: KernelSpec, problem: Problem) -> KernelCase:
    allow_tf32 = problem.allow_tf32 and problem.dtype == "float32"
    features = problem.features.kinds
    if not spec.drops:
        features = replace(features, dropout=False)
    return KernelCase(spec, problem.dtype, problem.head_dim, allow_tf32, problem.head_dim_v, features)


def _tiled_kernel(spec: KernelSpec, problem: Problem, device: Device, pinned: Tiles) -> KernelPlan:
    case = _case(spec, problem)
    tile = _choose_tile(case, device, pinned)
    shared_bytes = tiles.shared_bytes(case, tile, device)
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": case.head_dim_v,
        "HEAD_SLICES": case.head_slices(device),
        "HEAD_STEPS": case.head_steps(device),
        "TILE_Q": tile.tile_q,
        "TILE_KV": tile.tile_kv,
        "NUM_WARPS": tile.num_warps,
        "NUM_STAGES": tile.num_stages,
        "SHARED_BYTES": shared_bytes,
        "CAUSAL": problem.is_causal,
        "VARLEN": problem.num_sequences is not None,
        "SEQLENS_KV": problem.seqlens_kv,
        "ALLOW_TF32": case.allow_tf32,
        **case.features.constants(),
        **dict(spec.constants),
    }
    batch, heads, num_tiles = _owned(case, tile, problem)
    group_batch, group_heads = problem.batch // batch, problem.num_heads_q // heads
    if problem.num_sequences is not None:
        batch, num_tiles = problem.num_sequences + 1, max(1, num_tiles)  # blocks of one more fill what lies behind the last
    return KernelPlan(
        case, tile, config_text(problem.dtype, constants), LaunchShape(num_tiles * heads * batch, 32 * tile.num_warps, shared_bytes), num_tiles,
        group_batch, group_heads,
    )  # fmt: skip


def _owned(case: KernelCase, tile: Tile, problem: Problem) -> tuple[int, int, int]:
    """Batches and heads of the array whose rows blocks own, and tiles that one head of it is cut into."""
    if case.kernel.rows_of == "attn_mask":  # blocks own tiles of its gradient, and sum over the axes that it is broadcast along
        assert problem.features.attn_mask is not None
        batch, heads, rows, columns = problem.features.attn_mask.extents
        return batch, heads, ceil(rows / tile.tile_q) * ceil(columns / tile.tile_kv)
    shapes = {"query": problem.query.shape, "key": problem.key_shape, "value": problem.value_shape}
    batch, _, heads, _ = shapes[case.kernel.rows_of]
    seqlen = problem.max_seqlen_kv if case.kernel.owns_keys else problem.max_seqlen_q
    return batch, heads, ceil(seqlen / case.stationary_rows(tile))


def _choose_tile(case: KernelCase, device: Device, pinned: Tiles) -> Tile:
    if isinstance(pinned, Mapping):
        pinned = pinned.get(case.kernel.name)
    elif case.kernel.takes_single_tile == "transposed" and isinstance(pinned, Tile):
        pinned = pinned.transposed()
    elif case.kernel.takes_single_tile == "not":
        pinned = None
    return tiles.default_tile(case, device) if pinned is None else tiles.check_tile(case, pinned, device)


def _visible_tiles_kernel(of: KernelPlan, problem: Problem, device: Device) -> KernelPlan:
    """The kernel that lists which tiles the kernel `of` has to visit."""
    spec = kernel_specs.VISIBLE_TILES
    kinds = problem.features.kinds
    kinds = replace(
        NO_FEATURES,
        attn_mask="bool" if kinds.attn_mask == "bool" else None,
        **{name: getattr(kinds, name) for name in ("window", "segments", "prefix")},
    )
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "TILE_Q": of.tile.tile_q,
        "TILE_KV": of.tile.tile_kv,
        "NUM_WARPS": spec.num_warps,
        "BY_KEYS": of.spec.owns_keys,
        "CAUSAL": problem.is_causal,
        "VARLEN": False,
        "SEQLENS_KV": problem.seqlens_kv,
        **kinds.constants(),
    }
    batches, heads = problem.list_extents
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim, features=kinds), of.tile, config_text("float32", constants),
        LaunchShape(of.num_tiles * batches * heads, 32 * spec.num_warps, 4 * spec.num_warps), of.num_tiles,
    )  # fmt: skip


def _results(problem: Problem) -> tuple[Buffer, ...]:
    out = Buffer("out", problem.layout.from_canonical(problem.output_shape), problem.dtype)
    return (out, Buffer("lse", problem.lse_shape, "float32")) if problem.return_lse else (out,)


def _gradients(problem: Problem) -> tuple[Buffer, ...]:
    shapes = {"grad_query": problem.query.shape, "grad_key": problem.key_shape, "grad_value": problem.value_shape}
    gradients = [Buffer(name, problem.layout.from_canonical(shape), problem.dtype) for name, shape in shapes.items()]
    mask = problem.features.attn_mask
    if problem.features.need_attn_mask_grad and mask is not None:
        gradients.append(Buffer("grad_attn_mask", mask.shape, mask.dtype))
    if problem.features.kinds.sinks:
        gradients.append(Buffer("grad_sinks", (problem.num_heads_q,), "float32"))
    return tuple(gradients)


def _workspace(problem: Problem, kernels: tuple[KernelPlan, ...]) -> tuple[Buffer, ...]:
    """What the kernels of a call hand on to each other."""
    rows = problem.batch * problem.num_heads_q * problem.seqlen_q
    buffers = (
        Buffer("row_statistics", (rows, ROW_STATISTICS_BYTES // 4), "float32"),
        Buffer("log2_sums", (rows if problem.features.kinds.additive_mask else 0,), "float32"),
        Buffer("visible_tiles", (max((_list_entries(kernel, problem) for kernel in kernels), default=0),), "int32"),
    )
    needed = {name for kernel in kernels for name in kernel.spec.workspace}
    return tuple(buffer for buffer in buffers if buffer.name in needed and buffer.nbytes)


def _list_entries(kernel: KernelPlan, problem: Problem) -> int:
    """Length of the lists of visible tiles of one kernel: for each tile that blocks own, a count and at most one entry for each tile that they walk over."""
    if not (kernel.spec.is_tiled and kernel.spec.walks_lists):
        return 0
    walked = ceil(problem.seqlen_q / kernel.tile.tile_q) if kernel.spec.owns_keys else ceil(problem.seqlen_kv / kernel.tile.tile_kv)
    batches, heads = problem.list_extents
    return batches * heads * kernel.num_tiles * (1 + walked)


def _sinks_kernel(problem: Problem, device: Device) -> KernelPlan:
    """The gradient of the sinks, one block for each query head."""
    spec = kernel_specs.BACKWARD_SINKS
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "NUM_WARPS": spec.num_warps,
        "ADDITIVE_MASK": problem.features.kinds.additive_mask,
    }
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim), Tile(1, 1, spec.num_warps, 1), config_text("float32", constants),
        LaunchShape(problem.num_heads_q, 32 * spec.num_warps, 4 * spec.num_warps), 1,
    )  # fmt: skip


def _delta_kernel(problem: Problem, device: Device) -> KernelPlan:
    spec = kernel_specs.BACKWARD_DELTA
    chunks = ceil(problem.head_dim_v * problem.itemsize / 16)
    lanes = next(lanes for lanes in (1, 2, 4, 8, 16, 32) if lanes >= min(chunks, 32))
    rows = 32 * spec.num_warps // lanes
    constants = {"CAPABILITY": device.capability, "HEAD_DIM_V": problem.head_dim_v, "TILE_Q": rows, "NUM_WARPS": spec.num_warps}
    num_tiles = ceil(problem.seqlen_q / rows)
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim, head_dim_v=problem.head_dim_v), Tile(rows, 1, spec.num_warps, 1),
        config_text(problem.dtype, constants), LaunchShape(num_tiles * problem.num_heads_q * problem.batch, 32 * spec.num_warps, 0), num_tiles,
    )  # fmt: skip


def _visits(kernel: KernelPlan, problem: Problem) -> str:
    count = visited_tiles(problem, kernel.tile, by_keys=kernel.spec.owns_keys)
    of = f"of {all_tiles(problem, kernel.tile)} per head{' and sequence' if problem.num_sequences is not None else ''}"
    return f"{kernel.name} visits as many {of} as data leave visible" if count is None else f"{kernel.name} visits {count} {of}"


def _products(problem: Problem, device: Device) -> str:
    case = KernelCase(kernel_specs.FORWARD, problem.dtype, problem.head_dim)
    if case.uses_simt(device):
        return "float32 units: the tensor cores of sm_75 take float16 only"
    if problem.dtype == "float32":
        return "tensor cores, TF32" if problem.allow_tf32 else "tensor cores, 3 x TF32 (float32 accuracy)"
    return f"tensor cores, {problem.dtype} with float32 sums"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
