"""The kernels of a case without its arrays, for compiling ahead and for inspection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from cuflash.hardware.device import Device
from cuflash.planning import kernel_specs, tuned_tiles
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.planner import backward_kernels, check_names, forward_kernels, make_plan
from cuflash.problem.features import BESIDE, NO_FEATURES, Features, FeatureSet, MaskLayout
from cuflash.problem.problem import DTYPES, Problem
from cuflash.problem.tile import Tile, Tiles


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
    vectorized: bool = True,
    jvp: bool = False,
) -> Iterable[KernelPlan]:
    """The kernels of the forward and, unless told otherwise, backward pass on `device`, for compiling ahead and for inspection; with `jvp` those of tangents instead.

    Where tables of tuned tiles have several for different lengths, those of all lengths.
    """
    problem = _representative(
        dtype, head_dim, head_dim_v or head_dim, is_causal, allow_tf32, varlen, seqlens_kv, features, need_attn_mask_grad, vectorized
    )
    if jvp:
        problem, backward = replace(problem, of_tangents=True), False
    forward = forward_kernels(problem, device, tile)
    check_names(tile, (*forward, *(backward_kernels(problem, device, tile) if backward else ())))
    for of_gradients in (False, True) if backward else (False,):
        pinned = _of_pass(tile, backward=of_gradients)
        kernels = make_plan(problem, device, backward=of_gradients, tile=pinned).kernels
        yield from kernels
        if pinned is None or isinstance(pinned, Mapping):
            yield from _tuned_kernels(problem, device, kernels, of_gradients, pinned or {})


def _tuned_kernels(
    problem: Problem, device: Device, kernels: Iterable[KernelPlan], backward: bool, pinned: Mapping[str, Tile]
) -> Iterator[KernelPlan]:
    """Those with the tiles that tables have for other lengths, and the kernels that they need beside them."""
    for kernel in kernels:
        if not kernel.spec.is_tiled or kernel.name in pinned:
            continue
        for tile in tuned_tiles.of_all_lengths(kernel.case, problem, device):
            if tile != kernel.tile:
                others = make_plan(problem, device, backward=backward, tile={**pinned, kernel.name: tile}).kernels
                yield from (other for other in others if other not in kernels)


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
    vectorized: bool,
) -> Problem:
    from cuflash.problem.layout import Layout, View

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
        max_seqlen_q=1024, max_seqlen_kv=1024, seqlens_kv=seqlens_kv, num_sequences=1 if varlen else None,
        features=Features(features, mask, need_grad), aligned=vectorized,
        vectorized=vectorized and view.aligned16(itemsize) and view_v.aligned16(itemsize),
    )  # fmt: skip
