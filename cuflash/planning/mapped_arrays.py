"""Which arrays the TMA unit can copy or store: those that a tensor map describes (runtime/tensor_maps.py)."""

from __future__ import annotations

from collections.abc import Iterable

from cuflash.problem.layout import View
from cuflash.problem.problem import Problem

MASK_BYTES = {"bool": 1, "float16": 2, "bfloat16": 2}
"""Bytes of an element of masks that the TMA unit copies, by type."""

_MAX_STRIDE_BYTES = 2**40


def why_not(arrays: Iterable[tuple[str, View]], itemsize: int, *, aligned: bool, aligned_with: Iterable[str] = ()) -> str | None:
    """Why some of these arrays cannot be copied, in words; None where all can.

    Args:
        arrays: what they are called, and how they lie.
        itemsize: bytes of an element.
        aligned: all start on 16 bytes.
        aligned_with: others that `aligned` is about, too.
    """
    named = list(arrays)
    for name, view in named:
        if (reason := _why_unmapped(view, itemsize)) is not None:
            return f"the TMA unit cannot copy {name}, {reason}"
    if aligned:
        return None
    names = [*aligned_with, *(name for name, _ in named)]
    return f"the TMA unit copies what starts on 16 bytes, and one of {', '.join(names[:-1])} and {names[-1]} does not"


def _why_unmapped(view: View, itemsize: int) -> str | None:
    """Why no tensor map describes an array; None where one does. Batch and heads may be broadcast."""
    (_, seqlen, _, head_dim), (_, stride_seqlen, _, stride_dim) = view.shape, view.strides
    if stride_dim != 1:
        return f"whose head_dim has a stride of {stride_dim}"
    if seqlen > 1 and stride_seqlen == 0:
        return "whose rows are all one"
    if seqlen > 1 and 0 < stride_seqlen < head_dim:
        return "whose rows overlap"
    for axis, extent, stride in zip(("batches", "rows", "heads"), view.shape, view.strides, strict=False):
        stride_bytes = stride * itemsize
        if extent > 1 and (stride_bytes % 16 or not 0 <= stride_bytes < _MAX_STRIDE_BYTES):
            return f"whose {axis} lie {stride_bytes} bytes apart, no multiple of 16 from 0 to 2^40"
    return None


def maps_out(problem: Problem) -> bool:
    """Whether a tensor map describes the output of a call, and leaves out what a tile has behind the last query: all sequences have the same number of them."""
    if problem.num_sequences is not None or problem.uses_places or not problem.vectorized:
        return False
    return problem.out is None or _why_unmapped(problem.out, problem.itemsize) is None


def mask_view(problem: Problem) -> View:
    """The mask of a call as an array of (batch, query, heads, key)."""
    mask = problem.features.attn_mask
    assert mask is not None
    (batch, heads, queries, keys), (stride_b, stride_h, stride_q, stride_k) = mask.extents, mask.strides
    return View((batch, queries, heads, keys), (stride_b, stride_q, stride_h, stride_k))


def maps_mask(problem: Problem) -> bool:
    """Whether a tensor map describes the mask of a call, if it is of a type of which there are maps."""
    mask = problem.features.attn_mask
    if mask is None or mask.dtype not in MASK_BYTES or mask.extents[2:] != (problem.seqlen_q, problem.seqlen_kv):
        return False
    return mask.aligned and _why_unmapped(mask_view(problem), MASK_BYTES[mask.dtype]) is None
