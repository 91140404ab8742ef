"""The forward kernel for few queries, which shares out the keys of a sequence among blocks ("splits") and among the warps of a block.

Calls with a cache (cuflash/decoding.py) take it always. Other calls, of packed sequences too, take it if no sequence has more than `MAX_QUERIES` queries: then a tile of the other forward kernels has
several times as many rows as there are queries, and each key head's keys are fetched no more often by this one. A mapping of tiles that names a forward kernel,
a single tile, which is for the others, CUFLASH_DECODE=0, CUFLASH_FORWARD_WGMMA=1 without CUFLASH_DECODE=1, or tables of tuned tiles, where both were timed on one
call, come before. What it cannot do stays on the other forward kernels, and so do packed sequences of few queries among many tokens that can be nobody's, which parts would have rows for.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from cuflash.errors import OptionError, UnsupportedError
from cuflash.hardware.device import Device
from cuflash.planning import asked_for, merge_kernels, split_cost, stream_k, tile_choice, tile_model, tile_rules, tuned_tiles, wgmma_forward
from cuflash.planning.kernel_cases import KernelCase, case_of, operand_bytes
from cuflash.planning.kernel_plan import Buffer, KernelPlan, Splits
from cuflash.planning.kernel_specs import FORWARD, FORWARD_SPLIT, FORWARD_WGMMA, MERGE_ATTENTION, PART_TABLE, PARTS
from cuflash.problem.cache_call import STREAM_K
from cuflash.problem.features import UNLIMITED
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles
from cuflash.system import switches

if TYPE_CHECKING:
    from cuflash.planning.plan import Plan

VARIABLE = "CUFLASH_DECODE"
"""Environment variable; 0: calls with a cache alone have the kernel, and those that pin it. Looked at when a call is planned, so not by calls whose like was made before."""

MAX_QUERIES = 16
"""Of an ordinary call that takes the kernel by itself: with more, the others read keys less often."""
_MAX_ROWS = 2**31 - 2**10  # grouped; with the empty ones of the last tile they are 32-bit numbers
INVARIANT_KEYS = 1024
"""Of a split, where a row's bits must not depend on the batch."""

_UNKNOWN_FEATURES = ("dropout", "segments", "prefix")


# --- Whether it runs ----------------------------------------------------------------------------------------------------------------------


def is_taken(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether the kernel makes the output of a call."""
    return problem.cache is not None or _choose(problem, device, tile)[0]


def _choose(problem: Problem, device: Device, tile: Tiles) -> tuple[bool, str]:
    """Whether a call without a cache takes the kernel, and why or why not; no words where there is no choice.

    Raises:
        OptionError: a value of the variable that is neither 0 nor 1.
    """
    by_name = asked_for.named(FORWARD_SPLIT, tile, (FORWARD, FORWARD_WGMMA))
    few, name = problem.max_seqlen_q <= MAX_QUERIES, FORWARD_SPLIT.source
    places = 0 if problem.num_sequences is None else MAX_QUERIES * problem.num_sequences
    if by_name is False or not (few or by_name):
        return False, ""
    if (reason := why_not(problem, device)) is not None:
        return False, f"not {name}: {reason}"
    if by_name:
        return True, f"{name}, which the tile is for; {asked_for.SIMULATED}"
    if places and problem.seqlen_q > places:  # parts have rows of all tokens
        had = f"{problem.num_sequences} sequences of at most {MAX_QUERIES} queries have {places} of the {problem.seqlen_q} tokens at most"
        return False, f"not {name}: {had}"
    if isinstance(tile, Tile):
        return False, f"not {name}: a single tile is for kernels of many queries; a mapping may name {FORWARD_SPLIT.name}"
    if (wanted := switches.setting(VARIABLE)) is False:
        return False, f"not {name}, by {VARIABLE}=0"
    if wanted is None and wgmma_forward.is_asked_for(problem, device, tile) and wgmma_forward.why_not(problem, device) is None:
        return False, f"not {name}, by {wgmma_forward.VARIABLE}=1"
    timed = tuned_tiles.faster_way([[case_of(kernel, problem)] for kernel in (FORWARD_SPLIT, FORWARD)], problem, device)
    if timed is not None:
        number, part, how = timed
        return number == 0, f"{'' if number == 0 else 'not '}{name}, by tables {how} to take {part:.2f} times as long as {FORWARD.source}"
    return True, f"{name}, since a tile of the others has rows for more than {MAX_QUERIES} queries; {asked_for.SIMULATED}"


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the kernel cannot do, in words; None where it can run."""
    if (lacking := tile_rules.lacking(case_of(FORWARD_SPLIT, problem), device)) is not None:
        return lacking
    for name in _UNKNOWN_FEATURES:
        if getattr(problem.features.kinds, name):
            return f"it knows no {name}"
    return why_not_grouped(problem)


def why_not_grouped(problem: Problem) -> str | None:
    """What no kernel can do whose rows are the queries of all heads that share a key head, in words."""
    if problem.seqlens_q:
        return "it knows no seqlens_q"
    if (rows := problem.seqlen_q * problem.heads_per_kv) > _MAX_ROWS:
        return f"it counts queries of all heads that share a key head up to {_MAX_ROWS}, and these are {rows}"
    return None


def check(problem: Problem, device: Device, why_not_wide: str) -> None:
    """Raise where a call with a cache asks for what the kernel cannot do; other calls do not come here then. `why_not_wide`: why the kernel of wider heads does not
    run, nothing where it is out of the question.

    Raises:
        UnsupportedError: it cannot run.
    """
    if (reason := why_not(problem, device)) is not None:
        cache = problem.cache
        assert cache is not None
        steps = ["write new keys into the cache"] if cache.new is not None else []
        steps += ["rotate query and new keys before"] if cache.rotary is not None else []
        steps += ["gather the pages of each sequence into one row"] if cache.page_size else []
        call = "call scaled_dot_product_attention(query, keys, values, seqlens_kv=…, causal_alignment='bottom_right', enable_gqa=True)"
        hint = ", ".join([*steps, call])
        raise UnsupportedError(
            "query",
            f"a call that the kernel for caches cannot do: {'; '.join(filter(None, (reason, why_not_wide)))}",
            "float16 or bfloat16, a head_dim of at most 256, on sm_80 or later; wider ones on sm_90 without CUFLASH_FORWARD_WGMMA=0",
            f"{hint[0].upper()}{hint[1:]}.",
        )


def explain(problem: Problem, device: Device, tile: Tiles) -> str:
    """Why the kernel runs, or does not though there are few queries; nothing where it always does, or there are many."""
    return "" if problem.cache is not None else _choose(problem, device, tile)[1]


def may_choose(problem: Problem, device: Device) -> bool:
    """Whether an ordinary call has few queries, the kernel can run, and nobody has ruled it out."""
    few = problem.cache is None and problem.max_seqlen_q <= MAX_QUERIES
    return few and why_not(problem, device) is None and switches.setting(VARIABLE) is not False


def tiles_of_few_queries(problem: Problem, device: Device, tile: Tiles) -> tuple[Tile, ...]:
    """Default tiles that calls of this kind take where they have few queries, for one query and for more; none where such calls take other kernels."""
    few = replace(problem, seqlen_q=1, max_seqlen_q=1)
    if problem.cache is not None or not is_taken(few, device, tile):
        return ()
    return tuple(dict.fromkeys((default_tile(few, device), default_tile(replace(problem, max_seqlen_q=2 * MAX_QUERIES), device))))


# --- How it runs --------------------------------------------------------------------------------------------------------------------------


def default_tile(problem: Problem, device: Device) -> Tile:
    """The default tile of the kernel, with as many rows as there are, up to 32."""
    case = case_of(FORWARD_SPLIT, problem)
    tile = tile_choice.default_tile(case, device)
    taller = replace(tile, tile_q=32)
    fits = _grouped_rows(problem) > tile.tile_q and tile_rules.broken_rule(case, taller, device) is None
    return taller if fits else tile


def row_tiles(problem: Problem, tile: Tile) -> int:
    """Tiles of grouped rows of one key head."""
    return ceil(_grouped_rows(problem) / tile.tile_q)


def output_tiles(problem: Problem, tile: Tile) -> int:
    """The same of all key heads of all sequences."""
    return row_tiles(problem, tile) * problem.num_heads_kv * problem.sequences


def owned_row_tiles(problem: Problem, tile: Tile) -> int:
    """Tiles of grouped rows of one key head that there are blocks for, one at least; they also clear rows of places that sequences do not use."""
    return max(1, ceil(problem.owned_queries * problem.heads_per_kv / tile.tile_q))


def key_tiles(problem: Problem, tile: Tile, skipped_keys: int = 0) -> int:
    """Tiles of the longest sequence's keys that its queries see, but for so many keys."""
    return max(1, ceil((_visible_keys(problem) - skipped_keys) / tile.tile_kv))


def _grouped_rows(problem: Problem) -> int:
    """Of a key head in the longest sequence."""
    return problem.max_seqlen_q * problem.heads_per_kv


def splits_of(case: KernelCase, problem: Problem, tile: Tile, device: Device) -> Splits:
    """As the call says; or of fixed size where it wants the same bits in any batch; or as many as are fastest by a small model, or stream-K.

    Raises:
        OptionError: it wants stream-K, which its kernel cannot do.
    """
    if problem.batch_invariant:
        of_split = max(1, INVARIANT_KEYS // tile.tile_kv)
        return Splits(max(1, ceil(problem.max_seqlen_kv / (of_split * tile.tile_kv))), of_split)
    if problem.num_splits is not None:
        return Splits(problem.num_splits)
    tiles = key_tiles(problem, tile)
    reason = stream_k.why_not(case.kernel, problem, row_tiles(problem, tile), tiles)
    if problem.stream_k and reason is not None:
        raise OptionError("num_splits", repr(STREAM_K), f"None or a number, since {reason}", "Leave it out.")
    resident, of_all = resident_blocks(case, tile, device), output_tiles(problem, tile)
    beside = split_cost.fastest_number(of_all, tiles, resident, split_cost.FITTED)  # as equal shares count parts
    if problem.stream_k or (reason is None and split_cost.stream_k_is_faster(of_all, problem.sequences, tiles, resident, beside)):
        return Splits(1, stream_k=True)
    return Splits(fastest_number(case, problem, tile, device))


def fastest_number(case: KernelCase, problem: Problem, tile: Tile, device: Device) -> int:
    """Of splits of full caches."""
    resident = resident_blocks(case, tile, device)
    return split_cost.fastest_number(output_tiles(problem, tile), key_tiles(problem, tile), resident, _costs(case, tile, device))


def num_blocks(splits: Splits, problem: Problem, case: KernelCase, tile: Tile, device: Device) -> int:
    """Of the launch: of each sequence, key head and tile of rows as many as there are splits, or as many as the device holds at a time."""
    tiles = owned_row_tiles(problem, tile) * problem.num_heads_kv
    if splits.stream_k:
        most = tiles * problem.sequences * (key_tiles(problem, tile) + split_cost.BEGIN_TILES)
        return min(most, resident_blocks(case, tile, device))
    sequences = problem.sequences + (problem.num_sequences is not None)  # one more fills what lies behind the last packed one
    return tiles * sequences * splits.number


def resident_blocks(case: KernelCase, tile: Tile, device: Device) -> int:
    """Blocks that the device holds at a time."""
    return tile_model.blocks_per_sm(case, tile, device) * device.num_sms


def _costs(case: KernelCase, tile: Tile, device: Device) -> split_cost.SplitCosts:
    """Of the kernel with this tile."""
    if case.kernel == FORWARD_SPLIT:
        return split_cost.PREDICTED
    tile_bytes = tile.tile_kv * operand_bytes(case, device)[1]
    block = split_cost.FITTED.block * split_cost.FITTED_BYTES / tile_bytes
    return split_cost.SplitCosts(block, 8.0 * tile.tile_q * case.head_dim_v / tile_bytes)  # float32, written and read


def predicted_cost(plan: Plan, skipped_keys: int = 0) -> float:
    """Time of a planned call with a cache in key tiles of one block, with as many splits as would be fastest; so many keys of each sequence are not seen."""
    problem, device = plan.problem, plan.device
    kernel = next((kernel for kernel in plan.kernels if kernel.spec == FORWARD_SPLIT), None)
    if kernel is None:
        return 0.0
    blocks = output_tiles(problem, kernel.tile)
    tiles = key_tiles(problem, kernel.tile, skipped_keys)
    resident = resident_blocks(kernel.case, kernel.tile, device)
    return split_cost.cost_of_splits(blocks, tiles, resident, split_cost.fastest_number(blocks, tiles, resident))


def predicted_share(plan: Plan) -> float | None:
    """Of the bandwidth of memory that the kernel has by the same model, with the splits of the plan and full caches: 1 where all blocks that the device holds
    copy keys all the time. None of a plan without the kernel."""
    problem, device = plan.problem, plan.device
    kernel = next((kernel for kernel in plan.kernels if kernel.spec.splits_keys), None)
    if kernel is None:
        return None
    blocks = output_tiles(problem, kernel.tile)
    tiles = key_tiles(problem, kernel.tile)
    resident = resident_blocks(kernel.case, kernel.tile, device)
    if kernel.splits.stream_k:
        share = ceil(blocks * tiles / resident)
        costs = split_cost.PREDICTED
        return blocks * tiles / resident / (share + costs.alone * costs.block + costs.merge + costs.part * ceil(tiles / share))
    costs = _costs(kernel.case, kernel.tile, device)
    return blocks * tiles / resident / split_cost.cost_of_splits(blocks, tiles, resident, kernel.splits.number, costs)


def _visible_keys(problem: Problem) -> int:
    """Most keys that the queries of a sequence see."""
    low, high = problem.features.window_low, problem.features.window_high
    high = min(high, 0) if problem.is_causal else high
    if low == -UNLIMITED or high == UNLIMITED:
        return problem.max_seqlen_kv
    return max(0, min(problem.max_seqlen_kv, high - low + problem.max_seqlen_q))


class Traffic(NamedTuple):
    """What a launch asks of memory.

    Attributes:
        key_bytes: of keys and values that queries see, each counted once, with sequences as long as they have room for.
        resident: blocks that an SM holds at a time.
        waves: of blocks.
        bytes_in_flight: copies that the blocks of an SM wait for while each works on a stage.
    """

    key_bytes: int
    resident: int
    waves: int
    bytes_in_flight: int


def traffic(kernel: KernelPlan, problem: Problem, device: Device) -> Traffic:
    """Of the planned kernel."""
    columns = problem.kv_itemsize * (problem.head_dim + problem.head_dim_v)  # bytes of a key and a value
    resident = tile_model.blocks_per_sm(kernel.case, kernel.tile, device)
    keys = problem.sequences * _visible_keys(problem)
    if problem.num_sequences is not None and problem.cache is None:
        keys = min(keys, problem.seqlen_kv)  # packed keys of all sequences
    return Traffic(
        problem.num_heads_kv * keys * columns,
        resident,
        ceil(kernel.num_blocks / (resident * device.num_sms)),
        resident * (kernel.tile.num_stages - 1) * kernel.tile.tile_kv * columns,
    )


# --- What comes after it ------------------------------------------------------------------------------------------------------------------


def merging_kernels(split: KernelPlan, problem: Problem, device: Device) -> tuple[KernelPlan, ...]:
    """The kernel that merges the parts; none of a single one."""
    if not split.splits.makes_parts:
        return ()
    num_tiles = merge_kernels.merge_blocks(MERGE_ATTENTION, problem.seqlen_q, problem.head_dim_v)
    num_blocks = num_tiles * problem.num_heads_q * problem.batch
    merging = merge_kernels.merge_kernel(
        MERGE_ATTENTION, device, problem.dtype, num_blocks, num_tiles=num_tiles, head_dim=problem.head_dim_v, part_dtype="float32",
        parts_have_sums=True, log2_parts=not problem.features.kinds.additive_mask, stream_k=split.splits.stream_k,
    )  # fmt: skip
    return (merging,)


def workspace(problem: Problem, kernels: tuple[KernelPlan, ...]) -> tuple[Buffer, ...]:
    """The parts. The LSE of each is reference and sum, one behind the other, since scores may be huge."""
    split = next((kernel for kernel in kernels if kernel.splits.makes_parts), None)
    if split is None:
        return ()
    rows: tuple[int, ...] = (split.splits.number, problem.batch, problem.num_heads_q, problem.seqlen_q)
    table: tuple[Buffer, ...] = ()
    if split.splits.stream_k:
        rows = (2 * split.num_blocks, split.tile.tile_q)
        table = (Buffer(PART_TABLE, (problem.sequences, split.num_tiles, problem.num_heads_kv, 2), "int32"),)
    return Buffer(PARTS[0], (*rows, problem.head_dim_v), "float32"), Buffer(PARTS[1], (*rows, 2), "float32"), *table
