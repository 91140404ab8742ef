"""The kernels of a case without its arrays, for compiling ahead and for inspection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from cuflash.hardware.device import Device
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import (
    kernel_cases,
    kernel_specs,
    mask_gradient,
    packed_tiles,
    split_forward,
    tile_choice,
    tuned_tiles,
    wgmma_backward,
    wgmma_forward,
    wide_forward,
)
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import (
    BACKWARD_DQ,
    BACKWARD_DQ_MASK,
    BACKWARD_FUSED,
    FORWARD,
    FORWARD_SPLIT,
    FORWARD_WGMMA_WIDE,
    KernelSpec,
)
from cuflash.planning.planner import backward_choices, backward_kernels, check_names, forward_kernels, kernels_of_their_own, make_plan
from cuflash.problem.features import BESIDE, NO_FEATURES, Features, FeatureSet, MaskLayout
from cuflash.problem.layout import Layout, View
from cuflash.problem.problem import DTYPES, Problem
from cuflash.problem.tile import Tile, Tiles

FEW_QUERIES = 32
"""With which kernels of dK and dV never share out queries."""
MANY_KEYS = 2**20
"""Of which there are splits to merge."""
MANY_HEADS = 256
"""With which blocks fill every card, so that none share out queries; or that share one key head, whose few blocks have so many that they gain most if they do."""

HIGH_DROPOUT = 0.75
"""With which kernels of wgmma compare what is drawn in another way: above `kernel_constants.MOST_OF_PACKED_DROPOUT`."""


def offline_kernels(
    device: Device,
    *,
    dtype: str,
    head_dim: int,
    head_dim_v: int | None = None,
    is_causal: bool = False,
    allow_tf32: bool = False,
    varlen: bool = False,
    seqlens_q: bool = False,
    seqlens_kv: bool = False,
    seqused: bool = False,
    backward: bool = True,
    tile: Tiles = None,
    features: FeatureSet = NO_FEATURES,
    need_attn_mask_grad: bool = False,
    vectorized: bool = True,
    every_way: bool = False,
    jvp: bool = False,
) -> Iterable[KernelPlan]:
    """The kernels of the forward and, unless told otherwise, backward pass on `device`, for compiling ahead and for inspection, each once.

    With `jvp` those of tangents instead.

    They are those of a call with one head of 1024 queries and keys, or where blocks would share out its queries, of many heads; with `every_way` also the others that calls of such a kind take where lengths, batch and
    heads decide which are faster, or `dropout_p` decides what is compiled. Where tables of tuned tiles have several for different lengths, those of all lengths.
    """
    problem = _representative(
        dtype,
        head_dim,
        head_dim_v or head_dim,
        is_causal,
        allow_tf32,
        varlen,
        seqlens_q,
        seqlens_kv,
        seqused,
        features,
        need_attn_mask_grad,
        vectorized,
    )
    if jvp:
        problem, backward = replace(problem, of_tangents=True), False
    forward = forward_kernels(problem, device, tile)
    check_names(tile, (*forward, *(backward_kernels(problem, device, tile) if backward else ())))
    found: dict[CompileRequest, KernelPlan] = {}
    for of_gradients in (False, True) if backward else (False,):
        pinned = _of_pass(tile, backward=of_gradients)
        of_pass = _unsplit(problem, device, pinned) if of_gradients else problem
        ways = _ways(of_pass, device, pinned, backward=of_gradients) if every_way else ((of_pass, pinned),)
        by_caller = pinned if isinstance(pinned, Mapping) else {}
        for of_a_kind, way in ways:
            kernels = make_plan(of_a_kind, device, backward=of_gradients, tile=way).kernels
            if way is None or isinstance(way, Mapping):
                kernels += tuple(_tuned_kernels(of_a_kind, device, kernels, of_gradients, way or {}, by_caller))
            if varlen and every_way:
                kernels += tuple(packed_tiles.list_kernels(kernels, of_a_kind, device))
            found |= {kernel.request(device): kernel for kernel in kernels if kernel.request(device) not in found}
    return list(found.values())


def _ways(problem: Problem, device: Device, pinned: Tiles, *, backward: bool) -> Iterator[tuple[Problem, Tiles]]:
    """What calls of a kind may differ in that decides what is compiled: calls, and tiles that pin kernels."""
    variants, mask = [problem.features], problem.features.attn_mask
    if mask is not None and not backward:  # rows that do not start on 16 bytes are copied by another configuration
        variants += [replace(features, attn_mask=replace(mask, aligned=False)) for features in variants]
    if mask is not None and backward and problem.features.need_attn_mask_grad:  # of one row for all queries the gradient is a sum
        variants += [replace(features, attn_mask=replace(mask, extents=(1, 1, 1, problem.seqlen_kv))) for features in variants]
    if problem.features.kinds.dropout and device.capability == 90:
        variants += [replace(features, dropout_p=HIGH_DROPOUT) for features in variants]
    for features in variants:
        yield from _ways_to_kernels(replace(problem, features=features), device, pinned, backward=backward)


def _ways_to_kernels(problem: Problem, device: Device, pinned: Tiles, *, backward: bool) -> Iterator[tuple[Problem, Tiles]]:
    """Calls, and tiles that pin kernels: one for each kernel that lengths, batch and heads may decide for."""
    yield problem, pinned
    specs: list[KernelSpec] = []
    if problem.of_tangents:  # of which no length decides anything
        return
    if backward:
        present = backward_kernels(problem, device, pinned)
        fused, wgmma = backward_choices(problem, device, pinned)
        if wgmma.depends_on_lengths:
            specs += [wgmma_backward.kernels(problem)[0], BACKWARD_FUSED if fused.is_taken else BACKWARD_DQ]
        if fused.depends_on_lengths and (wgmma.depends_on_lengths or not wgmma.is_taken):
            specs += [BACKWARD_FUSED, BACKWARD_DQ]
        if problem.features.need_attn_mask_grad and mask_gradient.why_not(problem) is None:
            specs.append(BACKWARD_DQ_MASK)
        for way in (
            wgmma_backward.kernels(problem),
            kernels_of_their_own(problem, device),
        ):  # whose blocks share out queries where there are few
            if set(way) & {*present, *specs} and way[0].shares_queries:
                default = {way[0].name: tile_choice.default_tile(case_of(way[0], problem), device)}
                named = pinned if isinstance(pinned, Tile) else {**default, **(pinned or {})}
                yield _with_heads(problem, MANY_HEADS, 1), named
                if any(kernel_cases.converts_sums(kernel, problem) for kernel in way):  # not of more queries than keys
                    yield _with_heads(_with_queries(problem, 2 * problem.seqlen_kv), MANY_HEADS), named
    else:
        present = forward_kernels(problem, device, pinned)
        if wgmma_forward.choose(replace(problem, return_lse=False), device, pinned).depends_on_lengths:
            specs += [wgmma_forward.kernel(problem), FORWARD]
        if (of_wide := wide_forward.choose(problem, device, pinned)) is not None and of_wide.depends_on_lengths:
            specs += [FORWARD_WGMMA_WIDE, FORWARD]
        few = replace(problem, seqlen_q=1, max_seqlen_q=1, seqlen_kv=MANY_KEYS, max_seqlen_kv=MANY_KEYS)
        for tile in split_forward.tiles_of_few_queries(problem, device, pinned):
            yield few, {FORWARD_SPLIT.name: tile}
    for spec in dict.fromkeys(specs):
        if spec not in present:
            of_a_kind = problem
            if spec in (BACKWARD_DQ, BACKWARD_DQ_MASK):
                of_a_kind = _with_queries(problem, FEW_QUERIES)
            elif backward and spec.maps_tensors:  # of one head its blocks share out queries
                of_a_kind = _with_heads(problem, MANY_HEADS)
            yield of_a_kind, {spec.name: tile_choice.default_tile(case_of(spec, problem), device)}


def _tuned_kernels(
    problem: Problem, device: Device, kernels: Iterable[KernelPlan], backward: bool, way: Mapping[str, Tile], by_caller: Mapping[str, Tile]
) -> Iterator[KernelPlan]:
    """Those with the tiles that tables have for other lengths, unless the caller pins them, and the kernels that they need beside them."""
    for kernel in kernels:
        if not kernel.spec.is_tiled or kernel.name in by_caller:
            continue
        for tile in tuned_tiles.of_all_lengths(kernel.case, problem, device):
            if tile != kernel.tile:
                others = make_plan(problem, device, backward=backward, tile={**way, kernel.name: tile}).kernels
                yield from (other for other in others if other not in kernels)


def _of_pass(tile: Tiles, *, backward: bool) -> Tiles:
    """The part of a mapping that is for one pass."""
    if not isinstance(tile, Mapping):
        return tile
    return {name: pinned for name, pinned in tile.items() if kernel_specs.TILED_KERNELS[name].backward == backward}


def _unsplit(problem: Problem, device: Device, pinned: Tiles) -> Problem:
    """The representative of backward calls, with so many heads that no block of wgmma shares out queries, or so few queries that none of mma.sync does."""
    sharing = [kernel for kernel in make_plan(problem, device, backward=True, tile=pinned).kernels if kernel.spec.shares_queries]
    if any(kernel.spec.maps_tensors for kernel in sharing):
        return _with_heads(problem, MANY_HEADS)
    return _with_queries(problem, FEW_QUERIES) if sharing else problem


def _with_queries(problem: Problem, number: int) -> Problem:
    return _with_elements_for_all(replace(problem, seqlen_q=number, max_seqlen_q=number), problem)


def _with_heads(problem: Problem, heads: int, key_heads: int | None = None) -> Problem:
    """The representative with so many heads, side by side; of keys as many, or so many."""
    heads_kv = heads if key_heads is None else key_heads

    def of_heads(view: View, heads: int) -> View:
        batch, rows, _, columns = view.shape
        return replace(view, shape=(batch, rows, heads, columns), strides=(rows * heads * columns, heads * columns, columns, 1))

    query, key, value = of_heads(problem.query, heads), of_heads(problem.key, heads_kv), of_heads(problem.value, heads_kv)
    other = replace(
        problem, num_heads_q=heads, num_heads_kv=heads_kv, query=query, key=key, value=value, key_shape=key.shape, value_shape=value.shape
    )
    return _with_elements_for_all(other, problem)


def _with_elements_for_all(other: Problem, like: Problem) -> Problem:
    """A representative whose mask has an element for each pair of query and key, if that of the one that it was made of has."""
    mask = other.features.attn_mask
    if mask is None or mask_gradient.why_not(like) is not None:
        return other
    extents = other.batch, other.num_heads_q, other.seqlen_q, other.seqlen_kv
    return replace(other, features=replace(other.features, attn_mask=replace(mask, extents=extents)))


def _representative(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    allow_tf32: bool,
    varlen: bool,
    seqlens_q: bool,
    seqlens_kv: bool,
    seqused: bool,
    features: FeatureSet,
    need_attn_mask_grad: bool,
    vectorized: bool,
) -> Problem:
    view, view_v = (View((1, 1024, 1, dim), (1024 * dim, dim, dim, 1)) for dim in (head_dim, head_dim_v))
    mask = (
        None
        if features.attn_mask is None
        else MaskLayout(features.attn_mask.removeprefix(BESIDE), (1024, 1024), (1, 1, 1024, 1024), (0, 0, 1024, 1))
    )
    itemsize = DTYPES[dtype]
    need_grad = need_attn_mask_grad and features.additive_mask
    return Problem(
        dtype=dtype, batch=1, seqlen_q=1024, seqlen_kv=1024, num_heads_q=1, num_heads_kv=1, batch_kv=1, head_dim=head_dim, scale=head_dim**-0.5,
        is_causal=is_causal, causal_alignment="top_left", deterministic=False, allow_tf32=allow_tf32, return_lse=True, query=view, key=view,
        value=view_v, key_shape=view.shape, value_shape=view_v.shape, layout=Layout(), head_dim_v=head_dim_v,
        max_seqlen_q=1024, max_seqlen_kv=1024, seqlens_q=seqlens_q, seqlens_kv=seqlens_kv, num_sequences=1 if varlen else None,
        in_places=varlen and seqused,
        features=Features(features, mask, need_grad), aligned=vectorized,
        vectorized=vectorized and view.aligned16(itemsize) and view_v.aligned16(itemsize),
    )  # fmt: skip
