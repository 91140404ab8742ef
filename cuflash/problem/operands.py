"""The operands of a call: its arrays and the seed of its dropout, whose values are read by kernels only. `borrowed` looks at all of them without copying."""

from __future__ import annotations

from typing import NamedTuple

from cuflash.arrays.borrowing import AnyArray, Array, borrow
from cuflash.problem.features import Seed, check_dropout_p, check_dropout_seed, drawn_from
from cuflash.problem.options import Options
from cuflash.problem.sequences import refuse_mask


class Operands(NamedTuple):
    """What a public function was given besides options (`options.py`). The fields are its arguments; a function that lacks one has None.

    `pair_mask` is the boolean attn_mask where an additive one is given beside it, which then is `attn_mask` here.
    """

    query: AnyArray
    key: AnyArray
    value: AnyArray
    attn_mask: AnyArray | None = None
    alibi_slopes: AnyArray | None = None
    sinks: AnyArray | None = None
    prefix_lengths: AnyArray | None = None
    dropout_seed: Seed = None
    out: AnyArray | None = None
    seqlens_kv: AnyArray | None = None
    segment_ids_q: AnyArray | None = None
    segment_ids_kv: AnyArray | None = None
    cu_seqlens_q: AnyArray | None = None
    cu_seqlens_kv: AnyArray | None = None
    grad_out: AnyArray | None = None
    lse: AnyArray | None = None
    grad_lse: AnyArray | None = None
    seqused_q: AnyArray | None = None
    seqused_kv: AnyArray | None = None
    pair_mask: AnyArray | None = None
    seqlens_q: AnyArray | None = None


_FORWARD = ("query", "key", "value")
_BACKWARD = (*_FORWARD, "grad_out", "out", "lse")
_VARLEN = ("cu_seqlens_q", "cu_seqlens_kv")


def borrowed(operands: Operands, options: Options, *, backward: bool = False) -> dict[str, Array]:
    """The arrays that the kernels read, by name: those that a call must have, and those that it was given. A seed in an array is "dropout_state".

    Raises:
        ArgumentError: no array, or one that `borrow` does not take; a seed that is none; a mask of packed sequences.
    """
    required = (*(_BACKWARD if backward else _FORWARD), *(_VARLEN if options.varlen else ()))
    others = ("dropout_seed",) if backward else ("dropout_seed", "out")
    arrays = {}
    if options.varlen:
        refuse_mask(operands.attn_mask)
    for name, operand in zip(Operands._fields, operands, strict=True):
        if name in required or (operand is not None and name not in others):
            arrays[name] = borrow(operand, name)
    check_dropout_seed(check_dropout_p(options.dropout_p), operands.dropout_seed)
    _, state = drawn_from(options.dropout_p, operands.dropout_seed)
    if state is not None:
        arrays["dropout_state"] = borrow(state, "dropout_seed")
    return arrays
