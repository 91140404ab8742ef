"""Options that several commands of `python -m cuflash` share: a call's extents, element types, head dimensions, score features, masks and lengths.

`add_features` gives a parser the options of features, which are the fields of `SampleFeatures` (`sample_features.py`), and those of lengths; `features_of` and
`lengths_of` read what they hold, and refuse what would be without effect. Numbers make the arrays of a call that is profiled; for kernels that are compiled
only, it matters whether an option is there.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuflash.cli.cached_calls import cache_of
from cuflash.cli.option_types import DTYPES, not_negative, positive
from cuflash.errors import OptionError

if TYPE_CHECKING:
    from cuflash.cli.sample_features import SampleFeatures
    from cuflash.cli.samples import Sample


def add_cases(parser: argparse.ArgumentParser) -> None:
    """Add what a command that compiles takes several of."""
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128], help="head dimensions (default 64 128)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="element types (default bfloat16)")
    parser.add_argument("--forward-only", action="store_true", help="leave out the backward pass")


def add_call(parser: argparse.ArgumentParser) -> None:
    """Add a pass, and everything about a call but features."""
    parser.add_argument("--pass", dest="direction", choices=("forward", "backward"), default="forward", help="(default forward)")
    add_shape(parser)
    parser.add_argument(
        "--causal-alignment",
        choices=("top_left", "bottom_right"),
        help="which corner of the scores the diagonal of --causal and --window starts from: bottom_right for decoding (default top_left)",
    )
    parser.add_argument("--layout", default="bshd", help="order of dimensions (default bshd)")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add extents, element type and tile of a call."""
    parser.add_argument("--batch", type=positive, default=1, help="(default %(default)s)")
    parser.add_argument("--seqlen", type=positive, default=256, help="of queries, and of keys unless told otherwise (default %(default)s)")
    parser.add_argument("--seqlen-kv", type=positive, help="of keys and values")
    parser.add_argument("--heads", type=positive, default=1, help="of queries, and of keys unless told otherwise (default %(default)s)")
    parser.add_argument("--heads-kv", type=positive, help="of keys and values")
    parser.add_argument("--head-dim", type=positive, default=64, help="(default 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="(default float16)")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--allow-tf32", action="store_true", help="one TF32 product for float32 instead of three")
    parser.add_argument("--tile", nargs=4, type=positive, metavar=("TILE_Q", "TILE_KV", "NUM_WARPS", "NUM_STAGES"))


def add_features(parser: argparse.ArgumentParser, *, has_arrays: bool = True) -> None:
    """Add the options of score features, masks, lengths and value's head dimension.

    Args:
        parser: of the command.
        has_arrays: whether the command makes a call; kernels that are compiled only are the same for masks of all shapes.
    """
    group = parser.add_argument_group(
        "score features, masks and lengths", "Whatever is left out is not used; docs/features.md says what each does."
    )
    group.add_argument("--head-dim-v", type=positive, metavar="N", help="head dimension of value (default: that of query and key)")
    for option in _feature_options():
        if option.name == "mask_axes" and not has_arrays:
            parser.set_defaults(mask_axes=option.default)
            continue
        group.add_argument("--" + option.name.replace("_", "-"), default=option.default, **option.metadata)
    group.add_argument(
        "--seqlens-q",
        nargs="*",
        type=not_negative,
        metavar="N",
        help="numbers of queries of the rows of the batch (a half of --seqlen if none are given)",
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


def features_of(options: argparse.Namespace, *, is_causal: bool) -> SampleFeatures:
    """The features that the options name; numbers are judged where they are used.

    Args:
        options: of the command.
        is_causal: whether the command makes a causal call or compiles kernels of one.

    Raises:
        OptionError: an option without the one that it needs.
    """
    from cuflash.cli.sample_features import SampleFeatures

    if options.seqlens_q is not None and options.varlen is not None:
        hint = "Give packed sequences their lengths: --varlen 100 20."
        raise OptionError("--seqlens-q", "it with --varlen", "a padded batch", hint)
    if options.prefix is not None and not is_causal:
        raise OptionError(
            "--prefix", f"{options.prefix} without --causal", "--causal with it", "A prefix lifts the causal mask: add --causal."
        )
    if "".join(axis for axis in "bhqk" if axis in options.mask_axes) != options.mask_axes or not options.mask_axes:
        hint = "An axis that is left out is one along which the mask is broadcast."
        raise OptionError("--mask-axes", repr(options.mask_axes), "some of the letters bhqk, in this order", hint)
    if options.mask_axes != "qk" and options.attn_mask is None:
        raise OptionError("--mask-axes", "it without --attn-mask", "--attn-mask with it", "Add --attn-mask bool, or of floats: float16.")
    if options.need_attn_mask_grad and options.attn_mask in (None, "bool"):
        got = "it without --attn-mask" if options.attn_mask is None else "it with --attn-mask bool"
        hint = "Only a mask of floats that is added to the scores has a gradient: add --attn-mask float32, or leave it out."
        raise OptionError("--need-attn-mask-grad", got, "an additive --attn-mask: " + ", ".join(DTYPES), hint)
    if "forward_only" in options:
        has_backward, way = not options.forward_only, "Leave out --forward-only."
    elif "backward" in options:
        has_backward, way = options.backward, "Add --backward."
    else:
        has_backward, way = options.direction == "backward", "Add --pass backward."
    if options.need_attn_mask_grad and not has_backward:
        raise OptionError("--need-attn-mask-grad", "it without the backward pass", "the backward pass, which gives it", way)
    named: dict[str, Any] = {option.name: getattr(options, option.name) for option in _feature_options()}
    named = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    return SampleFeatures(**named)


def _feature_options() -> list[Field[Any]]:
    """The fields of `SampleFeatures` that have options."""
    from cuflash.cli.sample_features import SampleFeatures

    return [field for field in fields(SampleFeatures) if field.metadata]


def lengths_of(options: argparse.Namespace, batch: int, seqlen_q: int, seqlen_kv: int) -> Sample:
    """A sample that has nothing but its extents: a padded batch, one with numbers of queries or keys, or packed sequences.

    Raises:
        OptionError: a row with more queries or keys than there are.
    """
    from cuflash.cli.samples import Sample

    lengths_q = lengths_kv = seqlens_q = None
    if options.varlen is not None:
        lengths_q = tuple(options.varlen) or (seqlen_q,) * batch
        lengths_kv = None if options.varlen else (seqlen_kv,) * batch
    elif options.seqlens_kv is not None:
        lengths_kv = tuple(options.seqlens_kv) or (seqlen_kv // 2,) * batch
        if max(lengths_kv) > seqlen_kv:
            hint = "Give the longest row's number of keys as --seqlen-kv."
            raise OptionError("--seqlens-kv", f"{max(lengths_kv)} of {seqlen_kv} keys", f"numbers from 0 to {seqlen_kv}", hint)
    if options.seqlens_q is not None:
        seqlens_q = tuple(options.seqlens_q) or (seqlen_q // 2,) * batch
        if max(seqlens_q) > seqlen_q:
            hint = "Give the longest row's number of queries as --seqlen."
            raise OptionError("--seqlens-q", f"{max(seqlens_q)} of {seqlen_q} queries", f"numbers from 0 to {seqlen_q}", hint)
    return Sample(batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, lengths_q=lengths_q, lengths_kv=lengths_kv, seqlens_q=seqlens_q)


def sample_of(options: argparse.Namespace) -> Sample:
    """The call that the options of a command for one call describe."""
    made = replace(
        lengths_of(options, options.batch, options.seqlen, options.seqlen_kv or options.seqlen),
        num_heads_q=options.heads,
        num_heads_kv=options.heads_kv or options.heads,
        head_dim=options.head_dim,
        head_dim_v=options.head_dim_v,
        dtype=options.dtype,
        is_causal=options.causal,
        allow_tf32=options.allow_tf32,
        features=features_of(options, is_causal=options.causal),
        cache=cache_of(options),
    )
    if "layout" not in options:
        return made
    return replace(made, causal_alignment=options.causal_alignment, layout=options.layout)


def make_writable(option: str, folder: Path) -> None:
    """Make a folder, if need be, before the work whose results are to be written into it.

    Raises:
        OptionError: of `option`, which named the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(option, f"{str(folder)!r}: {error.strerror}", "a folder that can be written", "Name another one.") from error


def check_writable(option: str, path: Path) -> None:
    """Fail before the work whose result is to be written to `path`, and leave the file as it is.

    Raises:
        OptionError: of `option`, which named the file.
    """
    existed = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        hint = "Name a file in a folder that exists and that you may write to."
        raise OptionError(option, f"{str(path)!r}: {error.strerror}", "a file that can be written", hint) from error
    if not existed:
        path.unlink()
