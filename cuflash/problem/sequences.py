"""Check the lengths of a call whose sequences differ in length: arrays that stay on the device, and the bounds that a grid is made for.

Nothing here waits for a GPU: there, values are the kernels' business, which clamp what makes no sense (kernels/tile/sequence.cuh). In the host's memory
reading them costs nothing, and `check_offsets` does.
"""

from __future__ import annotations

import ctypes
import itertools
import numbers
import operator
from collections.abc import Mapping
from typing import NamedTuple

from cuflash.arrays.borrowing import Array, is_array
from cuflash.arrays.descriptions import describe
from cuflash.errors import DTypeError, OptionError, ShapeError


class Lengths(NamedTuple):
    """What a problem keeps of its lengths.

    Attributes:
        max_seqlen_q, max_seqlen_kv: no sequence is longer.
        seqlens_kv, seqlens_q: rows of the batch have numbers of keys, or of queries, of their own.
        num_sequences: packed ones; None for padded batches.
        in_places: these have lengths besides their offsets.
    """

    max_seqlen_q: int
    max_seqlen_kv: int
    seqlens_kv: bool = False
    num_sequences: int | None = None
    in_places: bool = False
    seqlens_q: bool = False


def check_seqlens(name: str, lengths: Array, query: Array, expected: int) -> None:
    """int32, one dimension of `expected` elements, contiguous.

    Raises:
        DTypeError, ShapeError: it is something else.
    """
    if lengths.dtype != "int32":
        cast = f"{name}.to(torch.int32)" if query.framework.library == "torch" else f"{name}.astype('int32')"
        raise DTypeError(name, lengths.dtype, "int32", f"Cast it: {cast}.")
    if len(lengths.shape) != 1 or (expected >= 0 and lengths.shape[0] != expected):
        shape, hint = "one dimension, (sequences + 1,)", "Pass where each sequence starts, and where the last one ends."
        if expected >= 0:
            of = "packed sequence" if name.startswith("seqused") else "row of the batch"
            shape = f"({expected},), a length for each {of}"
            hint = f"Pass the number of {'queries' if name.endswith('_q') else 'keys'} of each sequence."
        raise ShapeError(name, f"shape {lengths.shape}", shape, hint)
    if lengths.shape[0] > 1 and lengths.strides[0] != 1:
        raise ShapeError(
            name, f"a stride of {lengths.strides[0]}", "contiguous elements", f"Copy it: {name}.copy(), or .contiguous() for a tensor."
        )


def check_cu_seqlens(cu_seqlens: tuple[Array, Array], max_seqlens: tuple[object, object], query: Array, totals: tuple[int, int]) -> Lengths:
    """Check offsets and bounds of packed sequences; return what `Problem` keeps of them.

    Args:
        cu_seqlens: where sequences of queries and of keys start, and where the last ones end.
        max_seqlens: no sequence is longer; None stands for all tokens.
        query: whose library and device the offsets have.
        totals: tokens of the query and of the key.

    Raises:
        DTypeError, ShapeError: offsets of another type or shape.
        OptionError: a bound that is no length.
    """
    names = ("cu_seqlens_q", "cu_seqlens_kv")
    for name, offsets in zip(names, cu_seqlens, strict=True):
        check_seqlens(name, offsets, query, -1)
        if offsets.shape[0] == 0:
            raise ShapeError(name, "shape (0,)", "(sequences + 1,)", "Offsets of no sequence are the single number 0.")
    (count,), (count_kv,) = cu_seqlens[0].shape, cu_seqlens[1].shape
    if count != count_kv:
        hint = "Every sequence of queries has its sequence of keys, which may be empty."
        raise ShapeError(names[1], f"shape ({count_kv},)", f"({count},), like cu_seqlens_q", hint)
    return Lengths(
        _bound("max_seqlen_q", max_seqlens[0], totals[0]), _bound("max_seqlen_kv", max_seqlens[1], totals[1]), num_sequences=count - 1
    )


def check_lengths_in_places(arrays: Mapping[str, Array], query: Array, num_sequences: int) -> bool:
    """Check how much packed sequences use of what their offsets give them, and say whether anything says so."""
    names = [name for name in ("seqused_q", "seqused_kv") if name in arrays]
    for name in names:
        check_seqlens(name, arrays[name], query, num_sequences)
    return bool(names)


def check_offsets(which: str, address: int, num_sequences: int, tokens: int, longest: int, used: int = 0) -> None:
    """Check the values of packed offsets in the host's memory.

    What kernels do with others is not specified. Lengths in `seqlens_kv` and `prefix_lengths` have no such check: all of them mean something, since
    those out of range are clamped.

    Args:
        which: "q" or "kv".
        address: of `num_sequences + 1` contiguous int32.
        tokens: of the arrays that they divide.
        longest: the bound on the length of a sequence.
        used: address of as many int32 as there are sequences, which use no more rows; 0 without.

    Raises:
        OptionError: offsets that do not start at 0, descend, or lie beyond the tokens; or a sequence is longer than its bound.
    """
    name, bound = f"cu_seqlens_{which}", f"max_seqlen_{which}"
    offsets = [*(ctypes.c_int32 * (num_sequences + 1)).from_address(address)]
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    if offsets[0] != 0:
        hint = "The first sequence starts at token 0: offsets are [0, *cumsum(lengths)]."
        raise OptionError(name, f"a first offset of {offsets[0]}", "0", hint)
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        got = f"{offsets[at]} followed by {offsets[at + 1]} at {at}"
        raise OptionError(name, got, "offsets that do not descend", "Offsets are [0, *cumsum(lengths)], not lengths.")
    if offsets[-1] > tokens:
        hint = "The last offset is the number of tokens of all sequences."
        raise OptionError(name, f"a last offset of {offsets[-1]}", f"at most {tokens}, the tokens that there are", hint)
    if used:
        limits = (ctypes.c_int32 * num_sequences).from_address(used)
        lengths = [min(length, max(limit, 0)) for length, limit in zip(lengths, limits, strict=True)]
    if max(lengths, default=0) > longest:
        hint = f"Pass {bound}={max(lengths)}, or leave it out."
        says = f"seqused_{which}" if used else name
        raise OptionError(bound, longest, f"at least {max(lengths)}, the longest sequence in {says}", hint)


def refuse_mask(attn_mask: object) -> None:
    """Packed sequences have scores of different shapes, which no array holds.

    Raises:
        OptionError: there is a mask.
    """
    if attn_mask is not None:
        hint = "Use is_causal, window, alibi_slopes or prefix_lengths; or pad, and pass attn_mask with seqlens_kv to scaled_dot_product_attention."
        raise OptionError("attn_mask", describe(attn_mask), "None, since packed sequences do not see each other anyway", hint)


def _bound(name: str, bound: object, total: int) -> int:
    """The longest length that a sequence can have."""
    if bound is None:
        return total
    if isinstance(bound, numbers.Integral) and not isinstance(bound, bool) and operator.index(bound) >= 0:
        return min(operator.index(bound), total)
    hint = "Leave it out if it is not known: then blocks are started for all tokens of every sequence, and most end at once."
    if is_array(bound) or (isinstance(bound, numbers.Real) and not isinstance(bound, numbers.Integral)):
        hint = f"Convert it: {name}=int({name})."
    raise OptionError(name, describe(bound), "an int of at least 0, or None", hint)
