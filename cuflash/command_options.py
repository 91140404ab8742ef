"""Options that several commands of `python -m cuflash` share: element types, head dimensions, and which score features, masks and lengths a call has.

`add_features` gives a parser the options of features, which are named as the fields of `cuflash.FeatureSet` and the arguments of the calls; `features_of` and
`lengths_of` read what they hold. Numbers make the arrays of a call that is profiled; for kernels that are compiled only, it matters whether an option is
there.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuflash.samples import Sample, SampleFeatures

DTYPES = ("float16", "bfloat16", "float32")


def positive(text: str) -> int:
    """A number of at least 1."""
    return _at_least(1, text, "a positive number")


def not_negative(text: str) -> int:
    """A number of at least 0."""
    return _at_least(0, text, "a number of at least 0")


def _at_least(least: int, text: str, expected: str) -> int:
    number = int(text)
    if not least <= number < 2**31:
        raise argparse.ArgumentTypeError(f"got {number}; expected {expected if number < least else 'a number below 2**31'}")
    return number


def add_cases(parser: argparse.ArgumentParser) -> None:
    """Add what a command that compiles takes several of."""
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128], help="head dimensions (default 64 128)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="element types (default bfloat16)")
    parser.add_argument("--forward-only", action="store_true", help="leave out the backward pass")


def add_features(parser: argparse.ArgumentParser) -> None:
    """Add the options of score features, masks, lengths and value's head dimension."""
    group = parser.add_argument_group(
        "score features, masks and lengths", "Whatever is left out is not used; docs/features.md says what each does."
    )
    group.add_argument("--head-dim-v", type=positive, metavar="N", help="head dimension of value (default: that of query and key)")
    group.add_argument(
        "--attn-mask", choices=("bool", *DTYPES), help="a mask of this element type: bool hides keys, the others are added to the scores"
    )
    group.add_argument(
        "--dropout", nargs="?", type=float, const=0.1, default=0.0, metavar="P", help="probability of dropping (0.1 if none is given)"
    )
    group.add_argument(
        "--window", nargs=2, type=int, metavar=("LEFT", "RIGHT"), help="keys that a query sees before and after itself; -1 for no limit"
    )
    group.add_argument("--softcap", type=float, metavar="CAP", help="scores stay within ±CAP")
    group.add_argument("--alibi", action="store_true", help="ALiBi's slopes")
    group.add_argument("--sinks", action="store_true", help="a logit for each head that takes part in the softmax")
    group.add_argument(
        "--segments", nargs="?", type=int, const=2, metavar="N", help="documents that each sequence consists of (2 if none is given)"
    )
    group.add_argument(
        "--prefix",
        nargs="?",
        type=not_negative,
        const=64,
        metavar="N",
        help="keys that every query sees, with --causal (64 if none is given)",
    )
    lengths = group.add_mutually_exclusive_group()
    lengths.add_argument(
        "--seqlens-kv",
        nargs="*",
        type=not_negative,
        metavar="N",
        help="numbers of keys of the rows of the batch (a half of --seqlen-kv if none are given)",
    )
    lengths.add_argument(
        "--varlen",
        nargs="*",
        type=not_negative,
        metavar="N",
        help="packed sequences of these lengths (--batch of --seqlen if none are given)",
    )


def features_of(options: argparse.Namespace, *, need_attn_mask_grad: bool = False) -> SampleFeatures:
    """The features that the options name; numbers are judged where they are used."""
    from cuflash.samples import SampleFeatures

    return SampleFeatures(
        attn_mask=options.attn_mask,
        need_attn_mask_grad=need_attn_mask_grad,
        dropout=options.dropout,
        window=None if options.window is None else tuple(options.window),
        softcap=options.softcap,
        alibi=options.alibi,
        sinks=options.sinks,
        segments=options.segments,
        prefix=options.prefix,
    )


def lengths_of(options: argparse.Namespace, batch: int, seqlen_q: int, seqlen_kv: int) -> Sample:
    """A sample that has nothing but its extents: a padded batch, one with numbers of keys, or packed sequences."""
    from cuflash.samples import Sample

    lengths_q = lengths_kv = None
    if options.varlen is not None:
        lengths_q = tuple(options.varlen) or (seqlen_q,) * batch
        lengths_kv = None if options.varlen else (seqlen_kv,) * batch
    elif options.seqlens_kv is not None:
        lengths_kv = tuple(options.seqlens_kv) or (seqlen_kv // 2,) * batch
    return Sample(batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, lengths_q=lengths_q, lengths_kv=lengths_kv)
