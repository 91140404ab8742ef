"""Small calls that reach every kernel, element type and code path: for tools that are slow, for the judge, and for the simulator."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any

from cuflash.cli.sample_features import ALONE, ONLY_PADDED, SampleFeatures, others_than, together
from cuflash.cli.samples import Sample
from cuflash.problem.tile import Tile, Tiles


@dataclass(frozen=True)
class Case:
    """One forward and one backward call.

    Attributes:
        sample: the call.
        view: "aligned"; "odd", rows that do not start on 16 bytes; "bhsd", the other order of the middle dimensions in memory.
        with_grad_lse: a gradient also flows in through LSE.
        fused: one kernel makes all gradients, where a device has it.
        wgmma: the forward kernel is that of wgmma, where a device has it, and so is the backward kernel, where it takes the call.
        cached: the forward kernel is that of few queries, where a device has it, and a call with a paged cache appends as many keys as there are queries.
    """

    sample: Sample
    view: str = "aligned"
    with_grad_lse: bool = False
    fused: bool = False
    wgmma: bool = False
    cached: bool = False

    @classmethod
    def of(
        cls,
        dtype: str,
        head_dim: int,
        seqlen_q: int = 70,
        seqlen_kv: int = 100,
        batch: int = 1,
        heads: int = 1,
        heads_kv: int = 0,
        **others: Any,
    ) -> Case:
        """The usual case; `view`, `with_grad_lse`, `fused`, `wgmma` and `cached` are the case's, all others the sample's."""
        own = {name: others.pop(name) for name in ("view", "with_grad_lse", "fused", "wgmma", "cached") if name in others}
        shape = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv, "num_heads_q": heads, "num_heads_kv": heads_kv or heads}
        return cls(Sample(dtype=dtype, head_dim=head_dim, **shape, **others), **own)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """`Sample.arguments`, made once."""
        return self.sample.arguments()

    def tile(self, capability: int, *, backward: bool) -> Tiles:
        """What pins the kernels of a pass on such a device; None for the default ones."""
        widest = max(self.sample.head_dim, self.sample.head_dim_v or 0)
        if self.wgmma and capability == 90:
            return self._tile_of_wgmma(widest, backward=backward)
        if backward:
            return {"backward_fused": Tile(32, 64, 4, 2)} if self.fused and capability >= 80 else None
        return {"forward_split": Tile(16, 64, 4, 2)} if self.cached and capability >= 80 else None

    def _tile_of_wgmma(self, widest: int, *, backward: bool) -> Tiles:
        """With features smaller ones, whose registers suffice for all of them."""
        featured = self.sample.features != SampleFeatures()
        if self.sample.dtype == "float32":
            return None if backward else {"forward_wgmma_float32": Tile(192, 48, 12, 2) if widest <= 64 else Tile(128, 64, 8, 1)}
        if backward and widest <= 128:
            return {"backward_wgmma": Tile(32 if featured else 64, 128, 8, 2)}
        if backward:
            return {"backward_wgmma_dv": Tile(80, 128, 8, 2), "backward_wgmma_dkdq": Tile(48, 128, 8, 2)} if widest <= 256 else None
        if widest > 256:
            return {"forward_wgmma_wide": Tile(64, 32, 8, 2)}
        return {"forward_wgmma": Tile(128, 32 if featured else 80, 8, 2) if featured or widest > 128 else Tile(192, 80, 12, 2)}

    @property
    def is_plain(self) -> bool:
        """A padded batch without features or cache, whose heads the usual kernels take."""
        sample = self.sample
        usual = sample.head_dim_v is None and sample.head_dim <= 256 and sample.lengths_q is None and sample.lengths_kv is None
        return usual and not self.cached and sample.features == SampleFeatures()

    @property
    def has_tangents(self) -> bool:
        """Tangents are computed too, by a kernel that knows all features."""
        return self.sample.features.sinks and not self.sample.is_packed

    @property
    def longest(self) -> int:
        """Queries of the longest sequence."""
        return max(self.sample.packed_lengths[0]) if self.sample.is_packed else self.sample.seqlen_q

    def __str__(self) -> str:
        sample = self.sample
        heads = f"h{sample.num_heads_q}" + (f"/{sample.num_heads_kv}" if sample.num_heads_kv != sample.num_heads_q else "")
        words = [sample.dtype, f"d{sample.head_dim}" + (f"/{sample.head_dim_v}" if sample.head_dim_v else "")]
        words += (
            [f"packed{list(sample.packed_lengths[0])}"]
            if sample.is_packed
            else [f"s{sample.seqlen_q}x{sample.seqlen_kv}", f"b{sample.batch}"]
        )
        words += (
            [heads, self.view]
            + (["grad_lse"] if self.with_grad_lse else [])
            + (["fused"] if self.fused else [])
            + (["wgmma"] if self.wgmma else [])
            + (["cached"] if self.cached else [])
        )
        options = {name: getattr(sample, name) for name in ("is_causal", "causal_alignment", "scale", "allow_tf32")} | {
            "lengths_kv": sample.lengths_kv
        }
        used = {name: value for name, value in asdict(sample.features).items() if value != getattr(SampleFeatures(), name)}
        return " ".join(words + [f"{name}={value}" for name, value in (options | used).items() if value])


DTYPES = ("bfloat16", "float16", "float32")
CAUSAL = {"is_causal": True}
BOTTOM_RIGHT = {"is_causal": True, "causal_alignment": "bottom_right"}

MANY = together(others_than("additive_mask", "prefix"), dropout=0.2, window=(60, 30), softcap=20.0, segments=2)
"""All features that go together, with the kernels of visible tiles, sinks and dropout masks."""
PACKED = {"lengths_q": (70, 0, 33, 5), "lengths_kv": (100, 20, 0, 7)}
UNLIKE = {"heads": 16, "lengths_q": (3,) * 40 + (600,), "lengths_kv": (3,) * 40 + (600,)}
"""Packed sequences whose lengths differ so much that blocks find their work in a list."""
PACKED_FEATURES = together(others_than(*ONLY_PADDED), dropout=0.2, window=(60, 30), softcap=20.0, prefix=9)


def bias(dtype: str) -> SampleFeatures:
    """An additive mask of each head, whose gradient is summed over the batch by a kernel of its own."""
    return SampleFeatures(attn_mask=dtype, mask_axes="hqk", need_attn_mask_grad=True)


WGMMA_FEATURES = {
    "bool_mask": SampleFeatures(attn_mask="bool", mask_axes="bqk"),
    "additive_mask": SampleFeatures(attn_mask="bfloat16", mask_axes="hqk"),
    "segments": SampleFeatures(segments=3),
    "scores": SampleFeatures(window=(200, 30), softcap=20.0, alibi=True, sinks=True, dropout=0.2),
    "all": together(others_than("additive_mask", "prefix"), dropout=0.2, window=(200, 30), softcap=20.0, segments=2),
}
"""What the kernels of wgmma copy by tensor maps, look up in tables of visible tiles, or compute beside products. Rows of masks start 16 bytes apart if their keys are a multiple of 16."""


def tiny_cases() -> list[Case]:
    """For tools that slow a kernel down a thousandfold."""
    cases = [Case.of(dtype, head_dim, **CAUSAL) for head_dim in (64, 128, 256) for dtype in DTYPES]
    for dtype in DTYPES:
        cases += [
            Case.of(dtype, 64),
            Case.of(dtype, 40, 40, 33, 2, 2, 1, **BOTTOM_RIGHT, view="odd", with_grad_lse=True),
            Case.of(dtype, 64, features=MANY),
        ]
    cases += [
        *(Case.of(dtype, 64, heads=2, heads_kv=1, **CAUSAL, fused=True) for dtype in ("bfloat16", "float16")),
        *(Case.of(dtype, head_dim, heads=2, heads_kv=1, **CAUSAL, wgmma=True) for dtype, head_dim in (("bfloat16", 64), ("float16", 128))),
        *(Case.of("bfloat16", head_dim, heads=2, heads_kv=1, **CAUSAL, wgmma=True) for head_dim in (256, 512)),
        *(Case.of("float32", head_dim, heads=2, heads_kv=1, **CAUSAL, wgmma=True) for head_dim in (64, 128)),
        Case.of("bfloat16", 64, 200, 208, wgmma=True, features=WGMMA_FEATURES["all"]),
        *(Case.of(dtype, 64, queries, 160, 2, 6, 2, **BOTTOM_RIGHT, cached=True) for dtype, queries in (("bfloat16", 5), ("float16", 20))),
        *(Case.of(dtype, 64, batch=2, features=bias(dtype)) for dtype in ("bfloat16", "float32")),
        *(Case.of(dtype, 64, heads=2, **PACKED, **CAUSAL, features=PACKED_FEATURES) for dtype in ("bfloat16", "float32")),
        Case.of("bfloat16", 64, **UNLIKE, **CAUSAL),
        Case.of("bfloat16", 64, batch=2, **BOTTOM_RIGHT, lengths_kv=(100, 41), features=SampleFeatures(prefix=12, segments=2)),
        Case.of("bfloat16", 576, head_dim_v=512, **CAUSAL),
        Case.of("float32", 512, **CAUSAL),
    ]
    return [*cases, Case.of("float32", 64, allow_tf32=True)]


def check_cases() -> list[Case]:
    """For the judge: several tiles in every direction, ends that no tile divides. What most calls look like comes first."""
    cases = [Case.of(dtype, d, 515, 515, 2, 3, **causal) for causal in ({}, CAUSAL) for d in (64, 128, 256) for dtype in DTYPES]
    for dtype in DTYPES:
        cases += [
            Case.of(dtype, 64, 300, 515, 2, 4, 2, **BOTTOM_RIGHT, with_grad_lse=True),
            Case.of(dtype, 128, 515, 300, 1, 2, 1, **CAUSAL, view="bhsd", with_grad_lse=True),
            Case.of(dtype, 80, 200, 333, 1, 2, scale=-0.3, view="odd"),
            Case.of(dtype, 7, 100, 130, 1, 2, **CAUSAL),
            Case.of(dtype, 64, 3000, 3000, **CAUSAL),
        ]
    return [
        *cases,
        *(Case.of(dtype, 64, 515, 515, 2, 4, 2, **causal, fused=True) for causal in ({}, CAUSAL) for dtype in ("bfloat16", "float16")),
        *(
            Case.of("bfloat16", head_dim, 515, 700, 2, 4, 2, **causal, wgmma=True)
            for causal in ({}, CAUSAL, BOTTOM_RIGHT)
            for head_dim in (64, 128)
        ),
        *(Case.of("float16", head_dim, 515, 300, 2, 4, 2, **BOTTOM_RIGHT, wgmma=True, view="bhsd") for head_dim in (64, 128)),
        Case.of("bfloat16", 512, 130, 300, 2, 4, 2, **BOTTOM_RIGHT, wgmma=True),
        *(Case.of("float32", head_dim, 515, 700, 8, 8, 2, **CAUSAL, wgmma=True, view="odd") for head_dim in (64, 128)),
        # More tiles than an H100 has SMs, so that blocks take them from a counter.
        *(Case.of("bfloat16", head_dim, 515, 200, 8, 8, 2, **CAUSAL, wgmma=True) for head_dim in (64, 256)),
        Case.of("bfloat16", 64, 515, 200, 8, 8, 2, **CAUSAL, wgmma=True, features=SampleFeatures(segments=2)),
        *(
            Case.of("bfloat16", head_dim, 515, 704, 2, 2, wgmma=True, features=features)
            for head_dim in (64, 128)
            for features in WGMMA_FEATURES.values()
        ),
        Case.of(
            "bfloat16",
            64,
            heads=8,
            heads_kv=2,
            lengths_q=(350, 0, 165, 500, 5, 600),
            lengths_kv=(200, 20, 0, 90, 7, 600),
            **CAUSAL,
            wgmma=True,
        ),
        *(Case.of("bfloat16", 64, **UNLIKE, **CAUSAL, wgmma=wgmma) for wgmma in (False, True)),
        *(
            Case.of(dtype, head_dim, queries, 640, 2, 10, 2, **BOTTOM_RIGHT, cached=True)
            for dtype, queries in (("bfloat16", 7), ("float16", 20))
            for head_dim in (64, 128, 256)
        ),
        *lone_feature_cases(),
        *(case for dtype in DTYPES for case in combined_cases(dtype)),
        Case.of("float32", 64, 515, 515, allow_tf32=True),
    ]


def lone_feature_cases() -> list[Case]:
    """Every score feature alone; additive masks are among the `combined_cases`."""
    used = [ALONE[name] for name in others_than("additive_mask")]
    used.append(SampleFeatures(attn_mask="bool", mask_axes="bk"))
    return [Case.of("bfloat16", 64, 200, 333, 2, is_causal=one.prefix is not None, features=one) for one in used]


def combined_cases(dtype: str) -> list[Case]:
    """Features together, gradients of masks, every kind of lengths and unusual head dimensions."""
    lengths = {"lengths_q": (150, 0, 65, 5), "lengths_kv": (200, 20, 0, 7)}
    return [
        Case.of(dtype, 128, 200, 333, 2, **BOTTOM_RIGHT, features=MANY, with_grad_lse=True),
        Case.of(dtype, 64, 200, 233, 2, 2, features=bias(dtype)),
        Case.of(dtype, 64, 200, 233, 2, features=replace(bias("float32"), mask_axes="qk", sinks=True)),
        Case.of(dtype, 64, 200, 333, 3, 2, 1, **BOTTOM_RIGHT, lengths_kv=(333, 0, 250), with_grad_lse=True),
        Case.of(dtype, 64, heads=4, heads_kv=2, **lengths, **CAUSAL, with_grad_lse=True),
        Case.of(dtype, 64, heads=2, **lengths, **CAUSAL, features=PACKED_FEATURES),
        Case.of(dtype, 192, 200, 200, 1, 2, head_dim_v=128, **CAUSAL),
        Case.of(dtype, 576, 150, 150, 1, 2, 1, head_dim_v=512, **CAUSAL),
        Case.of(dtype, 512, 150, 150, **CAUSAL),
    ]


def simulator_cases() -> list[Case]:
    """For the simulator: few, and small."""
    cases = [Case.of(dtype, head_dim, 200, 200, **CAUSAL) for dtype in DTYPES for head_dim in (64, 128)]
    cases += [
        Case.of("bfloat16", 64, 200, 333, 1, 2, 1, view="odd", with_grad_lse=True),
        Case.of("bfloat16", 64, 200, 200, **CAUSAL, fused=True),
    ]
    cases += [Case.of("bfloat16", 64, 100, 200, features=MANY), Case.of("bfloat16", 64, 100, 200, features=bias("bfloat16"))]
    cases += [Case.of("bfloat16", head_dim, 200, 208, **CAUSAL, wgmma=True) for head_dim in (64, 128, 256)]
    cases += [Case.of("float32", 128, 200, 208, **CAUSAL, wgmma=True)]
    cases += [Case.of("bfloat16", 64, 200, 208, wgmma=True, features=features) for features in WGMMA_FEATURES.values()]
    cases += [
        Case.of("bfloat16", 512, 70, 100, **CAUSAL, wgmma=True),
        Case.of("bfloat16", 64, 5, 160, 2, 6, 2, **BOTTOM_RIGHT, cached=True),
    ]
    return [
        *cases,
        Case.of("bfloat16", 64, **PACKED, **CAUSAL, features=PACKED_FEATURES),
        Case.of("bfloat16", 576, 70, 100, head_dim_v=512),
    ]


def dry_cases(cases: list[Case]) -> list[Case]:
    """Few of them that the simulator makes quickly, with all that a list has of features."""
    small = [case for case in cases if case.longest < 300 and case.sample.dtype == "bfloat16"]
    plain = [case for case in small if case.is_plain]
    return plain[:2] + [case for case in small if not case.is_plain]
