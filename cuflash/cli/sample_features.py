"""Score features and masks of a sample: the numbers that say which they are, the options of commands that name them, and their arrays.

A feature is one more field of `SampleFeatures`, what `arguments` makes of it, and an entry of `ALONE`. Commands, benchmarks, the sanitizers' cases, tests
and tables of the docs find it there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from cuflash.cli.option_types import DTYPES, not_negative
from cuflash.errors import OptionError

if TYPE_CHECKING:  # a command that only prints its options needs no NumPy
    import numpy
    from numpy.typing import NDArray

    from cuflash.cli.samples import Sample
    from cuflash.problem.features import FeatureSet

DROPOUT_SEED = (20230717, 3)
"""Seed and offset of every sample with dropout."""


def _option(default: Any, **argument: Any) -> Any:
    """A field that commands have an option for; `argument` is that of `argparse`."""
    return field(default=default, metadata=argument)


@dataclass(frozen=True)
class SampleFeatures:
    """Score features and masks with the numbers from which their arrays are made.

    Attributes:
        attn_mask: element type of a mask: "bool", "float16", "bfloat16" or "float32"; None without.
        mask_axes: which of the scores' axes (batch, head, query, key) the mask has; it is broadcast along the others.
        need_attn_mask_grad: the backward pass also gives the gradient of the mask.
        dropout: probability of dropping; 0.0 without.
        window, softcap: as in `cuflash.scaled_dot_product_attention`.
        alibi, sinks: whether there are slopes and sinks.
        segments: how many documents of equal length each sequence consists of; None without.
        prefix: length of every sequence's prefix; None without.
    """

    attn_mask: str | None = _option(
        None, choices=("bool", *DTYPES), help="a mask of this element type: bool hides keys, the others are added to the scores"
    )
    mask_axes: str = _option(
        "qk",
        metavar="AXES",
        help="axes that --attn-mask has, of b, h, q and k (default qk): bhqk for a mask of each head of each row, as a pair bias",
    )
    need_attn_mask_grad: bool = _option(False, action="store_true", help="the backward pass also gives the gradient of --attn-mask")
    dropout: float = _option(0.0, nargs="?", type=float, const=0.1, metavar="P", help="probability of dropping (0.1 if none is given)")
    window: tuple[int | None, int | None] | None = _option(
        None, nargs=2, type=int, metavar=("LEFT", "RIGHT"), help="keys that a query sees before and after itself; -1 for no limit"
    )
    softcap: float | None = _option(None, type=float, metavar="CAP", help="scores stay within ±CAP")
    alibi: bool = _option(False, action="store_true", help="ALiBi's slopes")
    sinks: bool = _option(False, action="store_true", help="a logit for each head that takes part in the softmax")
    segments: int | None = _option(
        None, nargs="?", type=int, const=2, metavar="N", help="documents that each sequence consists of (2 if none is given)"
    )
    prefix: int | None = _option(
        None, nargs="?", type=not_negative, const=64, metavar="N", help="keys that every query sees, with --causal (64 if none is given)"
    )

    def kinds(self) -> FeatureSet:
        """What kernels are compiled for: numbers that mean that a feature is not used leave it out.

        Raises:
            OptionError: a number outside its domain.
        """
        from cuflash.problem.features import FeatureSet, check_dropout_p, check_softcap, check_window

        used: dict[str, Any] = {flag.name: getattr(self, flag.name) not in (None, False) for flag in fields(FeatureSet)}
        used |= {
            "attn_mask": self.attn_mask,
            "dropout": check_dropout_p(self.dropout) > 0.0,
            "window": check_window(self.window) != (None, None),
            "softcap": check_softcap(self.softcap, 1.0) is not None,
        }
        return FeatureSet(**used)

    def arguments(self, sample: Sample, seed: int = 0) -> dict[str, Any]:
        """The keyword arguments of a call that has these features; arrays are NumPy's, an additive mask is float32.

        Raises:
            OptionError: documents of packed sequences, or none.
        """
        import numpy

        rng = numpy.random.default_rng((seed, 1))
        rows = sample.batch if sample.lengths_q is None else len(sample.lengths_q)
        made: dict[str, Any] = {name: value for name, value in (("window", self.window), ("softcap", self.softcap)) if value is not None}
        if self.dropout:
            made |= {"dropout_p": self.dropout, "dropout_seed": DROPOUT_SEED}
        if self.attn_mask is not None:
            made["attn_mask"] = self._mask((sample.batch, sample.num_heads_q, sample.seqlen_q, sample.seqlen_kv), rng)
        if self.alibi:  # the slopes of the paper, Press et al. 2022, arXiv 2108.12409
            made["alibi_slopes"] = numpy.exp2(-8.0 * numpy.arange(1, sample.num_heads_q + 1) / sample.num_heads_q).astype(numpy.float32)
        if self.sinks:
            made["sinks"] = rng.standard_normal(sample.num_heads_q, numpy.float32)
        if self.segments is not None:
            if sample.is_packed:
                hint = "Sequences that a call should cut further are sequences of their own."
                raise OptionError("segments", f"{self.segments} with packed sequences", "a padded batch", hint)
            if self.segments < 1:
                hint = "1 makes all of a sequence one document."
                raise OptionError("segments", self.segments, "a positive number of documents", hint)
            for name, seqlen in (("q", sample.seqlen_q), ("kv", sample.seqlen_kv)):
                ids = numpy.arange(seqlen) * self.segments // max(1, seqlen)
                made[f"segment_ids_{name}"] = numpy.tile(ids.astype(numpy.int32), (rows, 1))
        if self.prefix is not None:
            made["prefix_lengths"] = numpy.full(rows, self.prefix, numpy.int32)
        return made

    def _mask(self, shape: tuple[int, int, int, int], rng: numpy.random.Generator) -> NDArray[Any]:
        """A boolean mask that hides a quarter of the keys, of a mask without queries the last ones; or a normally distributed additive mask."""
        import numpy

        from cuflash import reference

        own = tuple(extent if axis in self.mask_axes else 1 for axis, extent in zip("bhqk", shape, strict=True))
        if self.attn_mask != "bool":
            values: NDArray[Any] = reference.round_to(rng.standard_normal(own, numpy.float32), str(self.attn_mask))
            return values
        if "q" in self.mask_axes:
            return numpy.asarray(rng.random(own) < 0.75)
        return numpy.array(numpy.broadcast_to(numpy.arange(own[3]) < max(1, 3 * own[3] // 4), own))


ALONE = {
    "window": SampleFeatures(window=(50, 20)),
    "softcap": SampleFeatures(softcap=10.0),
    "alibi": SampleFeatures(alibi=True),
    "boolean_mask": SampleFeatures(attn_mask="bool"),
    "additive_mask": SampleFeatures(attn_mask="float32", need_attn_mask_grad=True),
    "dropout": SampleFeatures(dropout=0.3),
    "sinks": SampleFeatures(sinks=True),
    "segments": SampleFeatures(segments=4),
    "prefix": SampleFeatures(prefix=90),
}
"""Each feature with numbers that suit a few hundred positions. A prefix needs a causal call."""

ONLY_PADDED = ("boolean_mask", "additive_mask", "segments")
"""Features that packed sequences do not take."""


def together(names: Iterable[str], **numbers: Any) -> SampleFeatures:
    """Several of `ALONE` in one call, with other `numbers`."""
    used = {
        entry.name: value
        for name in names
        for entry in fields(SampleFeatures)
        if (value := getattr(ALONE[name], entry.name)) != entry.default
    }
    return SampleFeatures(**used | numbers)


def others_than(*names: str) -> list[str]:
    """What of `ALONE` is not among these names."""
    return [name for name in ALONE if name not in names]
