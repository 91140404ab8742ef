"""What each kernel is: its file, what its blocks keep and stream, what they multiply, and what their tiles were fitted with.

All that depends on which kernel it is, is said here once, as a `KernelSpec`: the rules of tiles and the model behind their defaults, plans, counts of visited
tiles and the list of tunable kernels follow from it. Another kernel is another `KernelSpec`, and a branch in `planner.py` that chooses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cuflash.planning import argument_structs
from cuflash.planning.argument_structs import (
    BACKWARD_ARGUMENTS,
    BACKWARD_WGMMA_ARGUMENTS,
    FORWARD_ARGUMENTS,
    FORWARD_JVP_ARGUMENTS,
    FORWARD_SPLIT_ARGUMENTS,
    FORWARD_WGMMA_ARGUMENTS,
    FORWARD_WGMMA_WIDE_ARGUMENTS,
    MERGE_ARGUMENTS,
    Struct,
)

Operand = Literal["query", "key", "value", "grad_out", "query_dot", "key_dot", "value_dot"]
Scores = Literal["S", "dP", "S_dot"]
Output = Literal["O", "dQ", "dK", "dV", "O_dot"]

_WIDE_AS_VALUE = ("value", "grad_out", "value_dot", "dP", "O", "dV", "O_dot")
"""Operands and outputs with head_dim_v columns, and scores that are sums over them; the others have head_dim."""

_TANGENTS = ("S_dot", "O_dot")
"""Of a product by its two factors' tangents: a sum of two products."""


WARPGROUP_ROWS = 64
"""Of a product of wgmma."""
WARP_ROWS = WARPGROUP_ROWS // 4
"""Those of them that a warp has."""

MAX_TILE = 2**20
"""Of anything in a tile; what is possible is far less."""


@dataclass(frozen=True)
class Costs:
    """What the model of tiles was fitted with (docs/log-compiler.md).

    Attributes:
        registers: per thread, besides accumulators and operands of 16-bit or TF32 products.
        boolean_mask_registers: more with a boolean mask.
        float32_dropout_registers: more with dropout where float32 products are three of TF32 each.
        streams_through_registers: where there are no asynchronous copies, the next streamed tile waits in registers.
        instructions: of each score, besides products.
        barriers: of each streamed tile.
        uncovered_cycles: of each streamed tile where only one is in flight.
        small_blocks: from sm_100 on, products of many instructions spill unless blocks have few warps.
    """

    registers: int
    boolean_mask_registers: int
    float32_dropout_registers: int
    streams_through_registers: bool
    instructions: int
    barriers: int
    uncovered_cycles: int
    small_blocks: bool


_FORWARD_COSTS = Costs(74, 44, 0, True, 6, 2, 150, False)
_BACKWARD_COSTS = Costs(88, 0, 0, False, 9, 1, 400, True)
_JOINT_COSTS = Costs(88, 0, 44, False, 9, 1, 400, True)


@dataclass(frozen=True, repr=False)
class KernelSpec:
    """One kernel. Its name and its implementation say which it is.

    The fields from `rows_of` to `costs` are those of a tiled kernel: one with matrix products, whose tile is chosen for each case and may be pinned.

    Attributes:
        name: as plans and `tile={name: …}` have it.
        source: file in kernels/; its stem is the entry point.
        arguments: its one parameter.
        implementation: the instructions of its products, "mma" for mma.sync, "wgmma", or "threads" where it has none.
        backward: belongs to the backward pass.
        workspace: memory besides inputs and outputs that it reads or writes, of `Plan.workspace`.
        num_warps: of a block, if that is fixed; of a tiled kernel its tile says it.
        rows_of: the array whose batches, heads and rows the blocks divide among themselves; of a mask, tiles of rows and columns.
        stationary: operands of which a block holds the rows that it owns.
        streamed: operands whose tiles pass through shared memory.
        statistics: row statistics pass through with them, from sm_80 on.
        scores: matrices of scores that are computed for each pair of tiles.
        outputs: what is summed over the pairs.
        added_up: of the outputs, what blocks add up among each other, a tile at a time; scores meet in shared memory for it.
        sums_scores: the sum has the form of scores, as the gradient of a mask has.
        online_softmax: the output is rescaled whenever a row finds a larger maximum.
        warps_per_product: that issue one matrix instruction together; 4 of wgmma, and a block has a multiple of them.
        warps_share: rows that the warps of a block share out among themselves: those that it keeps, or those of each streamed tile, and then each warp has the
            outputs of all stationary rows, which are added up at the end.
        column_groups: groups of warps that have the same rows, and share out the columns of the outputs.
        block_warps: how many warps a tile may have; empty for any number.
        copying_warps: of a block, besides those of its tile: they copy, or wait for other blocks, and compute nothing.
        stays: its blocks compute one tile after the other, as many blocks as run at one time.
        takes_terms: its operands are numbers of float32 as sums of bfloat16 that another kernel has split (operand_terms.py).
        maps_masks: the TMA unit copies masks where it can.
        maps_outputs: it stores the output where it can, and there is room.
        copies_masks: masks pass through shared memory, copied by threads, where they lie in chunks of 16 bytes.
        max_warp_rows: most rows that a warp may own, a multiple of 16.
        streamed_multiple: of rows of a streamed tile.
        min_stages, max_stages: streamed tiles in flight.
        walks_lists: with features that hide tiles by data, blocks walk over lists of visible tiles. False where it is not worth making them: a kernel that
            seldom visits any tile, or one that adds up the tiles of many heads.
        drops: dropout means something to it.
        splits_keys: blocks share out the keys of a sequence, and another kernel merges their parts.
        is_tuned: autotune times its tiles. False of a kernel that seldom does anything.
        takes_single_tile: how a pass takes the one tile that a caller pins for all of its kernels: as it is, with queries and keys exchanged, or not at all.
        constants: of `Config`, besides those of every tiled kernel.
        costs: see there.
    """

    name: str
    source: str = field(compare=False)
    arguments: Struct = field(compare=False)
    implementation: Literal["mma", "wgmma", "threads"] = "threads"
    backward: bool = field(default=False, compare=False)
    workspace: tuple[str, ...] = field(default=(), compare=False)
    num_warps: int = field(default=0, compare=False)
    rows_of: Literal["query", "key", "value", "attn_mask"] = field(default="query", compare=False)
    stationary: tuple[Operand, ...] = field(default=(), compare=False)
    streamed: tuple[Operand, ...] = field(default=(), compare=False)
    statistics: bool = field(default=False, compare=False)
    scores: tuple[Scores, ...] = field(default=(), compare=False)
    outputs: tuple[Output, ...] = field(default=(), compare=False)
    added_up: tuple[Output, ...] = field(default=(), compare=False)
    sums_scores: bool = field(default=False, compare=False)
    online_softmax: bool = field(default=False, compare=False)
    warps_per_product: int = field(default=1, compare=False)
    warps_share: Literal["stationary", "streamed"] = field(default="stationary", compare=False)
    column_groups: int = field(default=1, compare=False)
    block_warps: tuple[int, ...] = field(default=(), compare=False)
    copying_warps: int = field(default=0, compare=False)
    stays: bool = field(default=False, compare=False)
    takes_terms: bool = field(default=False, compare=False)
    maps_masks: bool = field(default=False, compare=False)
    maps_outputs: bool = field(default=False, compare=False)
    copies_masks: bool = field(default=False, compare=False)
    max_warp_rows: int = field(default=MAX_TILE, compare=False)
    streamed_multiple: int = field(default=16, compare=False)
    min_stages: int = field(default=1, compare=False)
    max_stages: int = field(default=4, compare=False)
    walks_lists: bool = field(default=True, compare=False)
    drops: bool = field(default=True, compare=False)
    splits_keys: bool = field(default=False, compare=False)
    is_tuned: bool = field(default=True, compare=False)
    takes_single_tile: Literal["as_it_is", "transposed", "not"] = field(default="as_it_is", compare=False)
    constants: tuple[tuple[str, bool], ...] = field(default=(), compare=False)
    costs: Costs = field(default=_BACKWARD_COSTS, compare=False)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<kernel {self.name}>"

    @property
    def entry(self) -> str:
        """Name of the `extern "C"` function."""
        return self.source.removesuffix(".cu")

    @property
    def is_tiled(self) -> bool:
        """It has matrix products and a tile of its own."""
        return bool(self.scores)

    @property
    def maps_tensors(self) -> bool:
        """Its operands are copied by the TMA unit, which knows them by tensor maps."""
        return self.implementation == "wgmma"

    @property
    def hands_on_registers(self) -> bool:
        """Its warps that copy give theirs to the others."""
        return self.copying_warps > 0

    @property
    def owns_keys(self) -> bool:
        """Blocks own keys and stream queries; those of the others own queries and stream keys."""
        return self.rows_of in ("key", "value")

    @property
    def shares_queries(self) -> bool:
        """Its blocks may share out the queries of a tile of keys (query_splits.py)."""
        return self.is_tiled and KEY_PARTS in self.workspace

    @property
    def shares_keys(self) -> bool:
        """Its blocks may share out the keys of the last tiles of queries (key_shares.py)."""
        return ROW_PARTS[1] in self.workspace

    @property
    def walks_table(self) -> bool:
        """Where data hide tiles, its blocks walk over a table of the places of tiles in the place of lists (kernels/tile/visible_tiles.cuh)."""
        return bool(self.added_up) or (self.owns_keys and self.maps_tensors)

    @property
    def reads_value(self) -> bool:
        """Anything in it has the columns of value."""
        return any(name in _WIDE_AS_VALUE for name in (*self.stationary, *self.streamed))

    @property
    def products(self) -> tuple[int, int]:
        """How many matrix products run over columns of query and key, and how many over those of value and output."""
        of = [name for made in (*self.scores, *self.outputs) for name in ((made, made) if made in _TANGENTS else (made,))]
        over_value = sum(name in _WIDE_AS_VALUE for name in of)
        return len(of) - over_value, over_value

    def output_columns(self, head_dim: int, head_dim_v: int) -> int:
        """Columns of the outputs that a block sums up by itself, of heads with these columns."""
        return sum(columns_of(name, head_dim, head_dim_v) for name in self.outputs if name not in self.added_up)


def columns_of(name: Operand | Output, head_dim: int, head_dim_v: int) -> int:
    """Columns of an operand or output, of heads with these columns."""
    return head_dim_v if name in _WIDE_AS_VALUE else head_dim


# --- Forward pass -------------------------------------------------------------------------------------------------------------------------

FORWARD = KernelSpec(
    "forward", "forward_mma.cu", FORWARD_ARGUMENTS, "mma",
    rows_of="query", stationary=("query",), streamed=("key", "value"), scores=("S",), outputs=("O",), online_softmax=True, copies_masks=True,
    costs=_FORWARD_COSTS,
)  # fmt: skip

ROW_PARTS = ("row_parts", "row_arrivals")
"""What each warp of forward_wgmma gives whose block has a share of the keys (key_shares.py), or what those of forward_wgmma_float32 keep of O; and of how many with the same rows it lies there."""

FORWARD_WGMMA = KernelSpec(
    "forward_wgmma", "forward_wgmma.cu", FORWARD_WGMMA_ARGUMENTS, "wgmma",
    rows_of="query", stationary=("query",), streamed=("key", "value"), scores=("S",), outputs=("O",), online_softmax=True, warps_per_product=4,
    block_warps=(8, 12), copying_warps=4, stays=True, max_warp_rows=16, workspace=("next_work", *ROW_PARTS), maps_masks=True, maps_outputs=True,
    costs=_FORWARD_COSTS,
)  # fmt: skip
"""Hopper's own instructions (wgmma_forward.py)."""

TERMS = 3
"""Of bfloat16, whose sum is a number of float32."""

TERM_PRODUCTS = 6
"""Of the nine products of the terms of two numbers, those that are computed."""

_TERMS_OF_OPERANDS = "query_terms", "key_terms", "value_terms"

FORWARD_WGMMA_FLOAT32 = KernelSpec(
    "forward_wgmma_float32", "forward_wgmma_float32.cu", FORWARD_WGMMA_ARGUMENTS, "wgmma",
    rows_of="query", stationary=("query",), streamed=("key", "value"), scores=("S",), outputs=("O",), online_softmax=True, warps_per_product=4,
    block_warps=(8, 12), copying_warps=4, stays=True, takes_terms=True, max_warp_rows=16, workspace=("next_work", ROW_PARTS[0], *_TERMS_OF_OPERANDS), costs=_FORWARD_COSTS,
)  # fmt: skip
"""The same to float32 accuracy."""

OPERAND_TERMS = KernelSpec(
    "operand_terms", "operand_terms.cu", argument_structs.OPERAND_TERMS_ARGUMENTS, workspace=_TERMS_OF_OPERANDS, num_warps=4
)
"""Query, key and value as sums of bfloat16, before that kernel (operand_terms.py)."""

PARTS = ("partial_out", "partial_lse")
"""What each range of the keys gives, where they are shared out among blocks."""

PART_TABLE = "part_table"
"""Of stream-K: which blocks have parts of each output tile."""

FORWARD_WGMMA_WIDE = KernelSpec(
    "forward_wgmma_wide", "forward_wgmma_wide.cu", FORWARD_WGMMA_WIDE_ARGUMENTS, "wgmma", workspace=PARTS,
    rows_of="query", stationary=("query",), streamed=("key", "value"), scores=("S",), outputs=("O",), online_softmax=True, warps_per_product=4,
    column_groups=2, block_warps=(8,), copying_warps=4, max_warp_rows=16, min_stages=2, splits_keys=True, costs=_FORWARD_COSTS,
)  # fmt: skip
"""Hopper's own instructions for heads above 256 columns (wide_forward.py)."""

FORWARD_SPLIT = KernelSpec(
    "forward_split", "forward_split_mma.cu", FORWARD_SPLIT_ARGUMENTS, "mma", workspace=(*PARTS, PART_TABLE),
    rows_of="query", stationary=("query",), streamed=("key", "value"), scores=("S",), outputs=("O",), online_softmax=True, warps_share="streamed",
    min_stages=2, walks_lists=False, splits_keys=True, costs=_FORWARD_COSTS,
)  # fmt: skip
"""Few queries and many keys (split_forward.py)."""

FORWARD_JVP = KernelSpec(
    "forward_jvp", "forward_jvp_mma.cu", FORWARD_JVP_ARGUMENTS, "mma",
    rows_of="query", stationary=("query", "query_dot"), streamed=("key", "key_dot", "value", "value_dot"), scores=("S", "S_dot"), outputs=("O_dot",),
    costs=_JOINT_COSTS,
)  # fmt: skip
"""Tangents of the output and of lse (cuflash/jvp.py)."""

CACHE_APPEND = KernelSpec(
    "cache_append", "cache_append.cu", argument_structs.CACHE_APPEND_ARGUMENTS, workspace=("rotated_query",), num_warps=4
)
"""New keys and values to a cache, with rotary embedding."""

# --- Backward pass, in the order of a call ------------------------------------------------------------------------------------------------

_ROWS = ("row_statistics", "log2_sums")
"""What backward kernels know of each query row; the second with an additive mask only."""

KEY_PARTS = "key_parts"
"""What each block gives to dK and dV, where blocks share out queries."""

_SUMS = ("query_sums", "turns")
"""What is dQ once it is scaled and converted, and who may add to it next; of the fused kernels only."""

BACKWARD_DELTA = KernelSpec(
    "backward_delta", "backward_delta.cu", BACKWARD_ARGUMENTS, backward=True, workspace=(*_ROWS, "turns"), num_warps=4
)
BACKWARD_ROW_SUMS = KernelSpec(
    "backward_row_sums", "backward_row_sums_mma.cu", BACKWARD_ARGUMENTS, "mma", backward=True, workspace=_ROWS,
    rows_of="query", stationary=("query",), streamed=("key",), scores=("S",),
    walks_lists=False, drops=False, is_tuned=False, takes_single_tile="not",
)  # fmt: skip
BACKWARD_FUSED = KernelSpec(
    "backward_fused", "backward_fused_mma.cu", BACKWARD_ARGUMENTS, "mma", backward=True, workspace=(*_ROWS, *_SUMS),
    rows_of="key", stationary=("key", "value"), streamed=("query", "grad_out"), statistics=True, scores=("S", "dP"), outputs=("dK", "dV", "dQ"),
    added_up=("dQ",), constants=(("TRANSPOSED_SUMS", False),), costs=_JOINT_COSTS,
)  # fmt: skip
BACKWARD_WGMMA = KernelSpec(
    "backward_wgmma", "backward_wgmma.cu", BACKWARD_WGMMA_ARGUMENTS, "wgmma", backward=True, workspace=(*_ROWS, *_SUMS, KEY_PARTS),
    rows_of="key", stationary=("key", "value"), streamed=("query", "grad_out"), statistics=True, scores=("S", "dP"), outputs=("dK", "dV", "dQ"),
    added_up=("dQ",), warps_per_product=4, block_warps=(8,), copying_warps=4, max_warp_rows=16, constants=(("TRANSPOSED_SUMS", True), ("COMPUTE_DK", True), ("COMPUTE_DV", True)), costs=_JOINT_COSTS,
)  # fmt: skip
"""The fused kernel with Hopper's own instructions (wgmma_backward.py)."""
BACKWARD_WGMMA_DV = KernelSpec(
    "backward_wgmma_dv", "backward_wgmma.cu", BACKWARD_WGMMA_ARGUMENTS, "wgmma", backward=True, workspace=(*_ROWS, KEY_PARTS),
    rows_of="value", stationary=("key",), streamed=("query", "grad_out"), statistics=True, scores=("S",), outputs=("dV",),
    warps_per_product=4, block_warps=(8,), copying_warps=4, max_warp_rows=16, constants=(("TRANSPOSED_SUMS", True), ("COMPUTE_DK", False), ("COMPUTE_DV", True)),
)  # fmt: skip
BACKWARD_WGMMA_DKDQ = KernelSpec(
    "backward_wgmma_dkdq", "backward_wgmma.cu", BACKWARD_WGMMA_ARGUMENTS, "wgmma", backward=True, workspace=(*_ROWS, *_SUMS, KEY_PARTS),
    rows_of="key", stationary=("key", "value"), streamed=("query", "grad_out"), statistics=True, scores=("S", "dP"), outputs=("dK", "dQ"),
    added_up=("dQ",), warps_per_product=4, block_warps=(8,), copying_warps=4, max_warp_rows=16,
    constants=(("TRANSPOSED_SUMS", True), ("COMPUTE_DK", True), ("COMPUTE_DV", False)), costs=_JOINT_COSTS,
)  # fmt: skip
"""The same in two kernels, for heads whose dK and dV do not fit the registers together."""
BACKWARD_DQ_CONVERT = KernelSpec("backward_dq_convert", "backward_dq_convert.cu", BACKWARD_ARGUMENTS, backward=True, workspace=_SUMS)
BACKWARD_DKDV_MERGE = KernelSpec(
    "backward_dkdv_merge", "backward_dkdv_merge.cu", BACKWARD_ARGUMENTS, backward=True, workspace=(KEY_PARTS,), num_warps=8
)
"""dK and dV of what blocks give that share out queries (query_splits.py)."""
BACKWARD_DKDV = KernelSpec(
    "backward_dkdv", "backward_dkdv_mma.cu", BACKWARD_ARGUMENTS, "mma", backward=True, workspace=(*_ROWS, KEY_PARTS),
    rows_of="key", stationary=("key", "value"), streamed=("query", "grad_out"), statistics=True, scores=("S", "dP"), outputs=("dK", "dV"),
    constants=(("TRANSPOSED_SUMS", False), ("COMPUTE_DK", True), ("COMPUTE_DV", True)), costs=_JOINT_COSTS,
)  # fmt: skip
BACKWARD_DV = KernelSpec(
    "backward_dv", "backward_dkdv_mma.cu", BACKWARD_ARGUMENTS, "mma", backward=True, workspace=(*_ROWS, KEY_PARTS),
    rows_of="value", stationary=("key",), streamed=("query", "grad_out"), statistics=True, scores=("S",), outputs=("dV",),
    constants=(("TRANSPOSED_SUMS", False), ("COMPUTE_DK", False), ("COMPUTE_DV", True)),
)  # fmt: skip
BACKWARD_DK = KernelSpec(
    "backward_dk", "backward_dkdv_mma.cu", BACKWARD_ARGUMENTS, "mma", backward=True, workspace=(*_ROWS, KEY_PARTS),
    rows_of="key", stationary=("key", "value"), streamed=("query", "grad_out"), statistics=True, scores=("S", "dP"), outputs=("dK",),
    constants=(("TRANSPOSED_SUMS", False), ("COMPUTE_DK", True), ("COMPUTE_DV", False)),
)  # fmt: skip
BACKWARD_DQ = KernelSpec(
    "backward_dq", "backward_dq_mma.cu", BACKWARD_ARGUMENTS, "mma", backward=True, workspace=_ROWS,
    rows_of="query", stationary=("query", "grad_out"), streamed=("key", "value"), scores=("S", "dP"), outputs=("dQ",), takes_single_tile="transposed",
    constants=(("STORES_GRAD_MASK", False),),
)  # fmt: skip
BACKWARD_DQ_MASK = KernelSpec(
    "backward_dq_mask", "backward_dq_mma.cu", BACKWARD_ARGUMENTS, "mma", backward=True, workspace=_ROWS,
    rows_of="query", stationary=("query", "grad_out"), streamed=("key", "value"), scores=("S", "dP"), outputs=("dQ",), takes_single_tile="transposed",
    constants=(("STORES_GRAD_MASK", True),),
)  # fmt: skip
"""dQ, and the gradient of an additive mask where nothing of it is summed (mask_gradient.py)."""
BACKWARD_MASK = KernelSpec(
    "backward_mask", "backward_mask_mma.cu", BACKWARD_ARGUMENTS, "mma", backward=True, workspace=_ROWS,
    rows_of="attn_mask", stationary=("query", "grad_out"), streamed=("key", "value"), scores=("S", "dP"), sums_scores=True, max_stages=1, walks_lists=False,
)  # fmt: skip
BACKWARD_SINKS = KernelSpec("backward_sinks", "backward_sinks.cu", BACKWARD_ARGUMENTS, backward=True, workspace=_ROWS, num_warps=8)

# --- Beside both --------------------------------------------------------------------------------------------------------------------------

VISIBLE_TILES = KernelSpec(
    "visible_tiles", "visible_tiles.cu", argument_structs.VISIBLE_TILES_ARGUMENTS, workspace=("visible_tiles",), num_warps=4
)
"""Lists, for the tiles that blocks of the next kernel own, the tiles that they have to visit."""
PACKED_TILES = KernelSpec(
    "packed_tiles", "packed_tiles.cu", argument_structs.PACKED_TILES_ARGUMENTS, workspace=("packed_tiles",), num_warps=4
)
"""A list of the tiles that packed sequences have, for the blocks of the next kernel (packed_tiles.py)."""
DROPOUT_MASK = KernelSpec("dropout_mask", "dropout_mask.cu", argument_structs.DROPOUT_MASK_ARGUMENTS, num_warps=4)
MERGE_ATTENTION = KernelSpec("merge_attention", "merge_attention.cu", MERGE_ARGUMENTS, workspace=PARTS, num_warps=4)
MERGE_ATTENTION_BACKWARD = KernelSpec(
    "merge_attention_backward", "merge_attention_backward.cu", MERGE_ARGUMENTS, backward=True, num_warps=4
)
MERGE_TABLE = KernelSpec("merge_table", "merge_table.cu", argument_structs.MERGE_TABLE_ARGUMENTS, num_warps=4)

KERNELS: tuple[KernelSpec, ...] = (
    FORWARD, FORWARD_WGMMA, FORWARD_WGMMA_FLOAT32, OPERAND_TERMS, FORWARD_WGMMA_WIDE, FORWARD_SPLIT, FORWARD_JVP, CACHE_APPEND,
    BACKWARD_DELTA, BACKWARD_ROW_SUMS, BACKWARD_FUSED, BACKWARD_WGMMA, BACKWARD_WGMMA_DV, BACKWARD_WGMMA_DKDQ, BACKWARD_DQ_CONVERT, BACKWARD_DKDV_MERGE, BACKWARD_DKDV, BACKWARD_DK, BACKWARD_DV, BACKWARD_DQ, BACKWARD_DQ_MASK,
    BACKWARD_MASK, BACKWARD_SINKS,
    VISIBLE_TILES, PACKED_TILES, DROPOUT_MASK, MERGE_ATTENTION, MERGE_ATTENTION_BACKWARD, MERGE_TABLE,
)  # fmt: skip

TILED_KERNELS: dict[str, KernelSpec] = {kernel.name: kernel for kernel in KERNELS if kernel.is_tiled}
"""Name -> kernel, of those whose tiles may be pinned."""
