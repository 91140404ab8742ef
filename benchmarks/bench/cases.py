"""What is timed: lists of calls, and how many scores and FLOP each has.

Protocol of plain cases: batch = 16384 / seqlen, heads = 2048 / head_dim, no features. Every feature has one case of its own.

FLOP are counted from the scores that are visible: pairs of a query and a key that it sees, whatever a library really computes. Each score takes
2 · (head_dim + head_dim_v) forward and 2 · (3 · head_dim + 2 · head_dim_v) backward, where it is computed again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy

from cuflash import reference
from cuflash.cli.sample_features import ALONE, SampleFeatures, others_than
from cuflash.cli.samples import Sample, stand_in
from cuflash.hardware.device import Device
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from cuflash.planning.visits import all_tiles, visited_tiles
from cuflash.problem.problem import Problem
from cuflash.reference.features import Rules, rules_of

TOKENS, HIDDEN = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
SHAPES = (
    ("bfloat16", 128), ("bfloat16", 64), ("float32", 64), ("bfloat16", 256), ("float16", 128), ("float32", 128), ("float16", 64), ("float16", 256),
)  # fmt: skip
"""Element types and head dimensions, what matters most first."""


@dataclass(frozen=True)
class Case:
    """A call to time, both passes.

    Attributes:
        sample: the call.
        name: the feature that it shows; "" for a plain case.
    """

    sample: Sample
    name: str = ""

    @classmethod
    def plain(cls, dtype: str, head_dim: int, causal: bool, seqlen: int) -> Case:
        heads = HIDDEN // head_dim
        return cls(_square(max(1, TOKENS // seqlen), seqlen, heads, dtype=dtype, head_dim=head_dim, is_causal=causal))

    @property
    def head_dim_v(self) -> int:
        return self.sample.head_dim if self.sample.head_dim_v is None else self.sample.head_dim_v

    @property
    def seqlen(self) -> int:
        """Of queries; of packed sequences that of the longest."""
        return max(self.sample.packed_lengths[0]) if self.sample.is_packed else self.sample.seqlen_q

    @property
    def num_sequences(self) -> int:
        return len(self.sample.packed_lengths[0]) if self.sample.is_packed else self.sample.batch

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """`Sample.arguments`, made once."""
        return self.sample.arguments()

    @functools.cached_property
    def problem(self) -> Problem:
        """What both passes compute, from arrays that no memory stands behind."""
        arguments = dict(self.arguments)
        if "attn_mask" in arguments:
            arguments["attn_mask"] = stand_in(arguments["attn_mask"].shape, str(self.sample.features.attn_mask))
        shapes = self.sample.shapes()
        inputs = {name: stand_in(shapes[name], self.sample.dtype) for name in ("query", "key", "value")}
        plan: Plan = self.sample.plan(**inputs, **arguments, **self.sample.backward_options, return_lse=True, backward=True)
        return plan.problem

    @functools.cached_property
    def visible_scores(self) -> int:
        """Pairs of a query and a key that it sees, of all sequences and one head."""
        sample, problem = self.sample, self.problem
        kinds = problem.features.kinds
        if not (sample.is_packed or problem.seqlens_kv or kinds.lists_tiles or kinds.prefix):
            return int(sample.batch * problem.visible_pairs)
        return sum(int(rules.visible(b, 0).sum()) for rules, b in map(self.rules, range(self.num_sequences)))

    @property
    def visible_share(self) -> float:
        """Of all scores of all sequences."""
        lengths = (
            zip(*self.sample.packed_lengths, strict=True) if self.sample.is_packed else [(self.sample.seqlen_q, self.sample.seqlen_kv)]
        )
        scores = sum(queries * keys for queries, keys in lengths) * (1 if self.sample.is_packed else self.sample.batch)
        return self.visible_scores / scores

    def visited_share(self, on: Device) -> float | None:
        """Of all tiles, those that cuflash's forward kernel visits on a device; None where that depends on data."""
        problem = self.problem
        tile = next(kernel.tile for kernel in make_plan(problem, on).kernels if kernel.name == "forward")
        visited = visited_tiles(problem, tile, by_keys=False)
        return None if visited is None else visited / all_tiles(problem, tile)

    def rules(self, sequence: int) -> tuple[Rules, int]:
        """Which scores a sequence has, by definition: the rules, and as which of their batches it counts."""
        sample, options = self.sample, dict(self.arguments)
        shape, b = (sample.batch, sample.num_heads_q, sample.seqlen_q, sample.seqlen_kv), sequence
        if sample.is_packed:
            options = reference.options_of_sequence({"causal_alignment": "bottom_right", **options}, sequence)
            shape, b = (1, sample.num_heads_q, *(lengths[sequence] for lengths in sample.packed_lengths)), 0
        known = {name: option for name, option in options.items() if not name.startswith(("cu_seqlens", "max_seqlen"))}
        for name in ("scale", "enable_gqa", "layout", "allow_tf32"):
            known.pop(name, None)
        defaults = {"is_causal": False, "causal_alignment": "top_left"}
        return rules_of(shape, numpy.asarray, numpy.asarray, **{**defaults, **known}), b  # type: ignore[arg-type]  # options have values of many types

    def flops(self, direction: str) -> float:
        if direction == "both":
            return self.flops("forward") + self.flops("backward")
        dims = (self.sample.head_dim, self.head_dim_v)
        each = dims[0] + dims[1] if direction != "backward" else 3 * dims[0] + 2 * dims[1]
        return 2.0 * self.visible_scores * self.sample.num_heads_q * each

    def traffic(self, direction: str) -> int:
        """Bytes that have to cross memory at least: every operand and result once, masks left out."""
        if direction == "both":
            return self.traffic("forward_lse") + self.traffic("backward")
        sample, width = self.sample, 4 if self.sample.dtype == "float32" else 2
        sizes = {name: width * math.prod(shape) for name, shape in sample.shapes().items()}
        rows = sum(sample.packed_lengths[0]) if sample.is_packed else sample.batch * sample.seqlen_q
        lse, inputs = 4 * rows * sample.num_heads_q, sizes["query"] + sizes["key"] + sizes["value"]
        if direction == "backward":
            return 2 * inputs + 2 * sizes["grad_out"] + lse
        return inputs + sizes["grad_out"] + (lse if direction == "forward_lse" else 0)

    def __str__(self) -> str:
        sample = self.sample
        head_dim = f"d{sample.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != sample.head_dim else "")
        heads = f"h{sample.num_heads_q}" + (f"/{sample.num_heads_kv}" if sample.num_heads_kv != sample.num_heads_q else "")
        words = [
            self.name,
            sample.dtype,
            head_dim,
            f"s{self.seqlen}",
            f"b{self.num_sequences}",
            heads,
            "causal" if sample.is_causal else "",
        ]
        return " ".join(word for word in words if word)


def _square(batch: int, seqlen: int, heads: int, **others: Any) -> Sample:
    return Sample(batch=batch, seqlen_q=seqlen, seqlen_kv=seqlen, num_heads_q=heads, num_heads_kv=heads, **others)


# --- Lists --------------------------------------------------------------------------------------------------------------------------------


def quick_cases() -> list[Case]:
    """What matters most first: the list may be cut anywhere."""
    cases = [Case.plain(dtype, d, causal, s) for s in (8192, 2048) for dtype, d in SHAPES for causal in (True, False)]
    return cases + [
        Case.plain("bfloat16", d, causal, s) for s in (16384, 512, 4096, 1024) for d in (128, 64, 256) for causal in (True, False)
    ]


def full_cases() -> list[Case]:
    every = [Case.plain(*shape, causal, s) for s in SEQLENS for shape in SHAPES for causal in (True, False)]
    return [*dict.fromkeys(quick_cases() + every), *feature_cases()]


OF_THEIR_OWN_SIZE = ("window", "softcap", "alibi", "boolean_mask", "additive_mask", "dropout", "sinks", "segments")
"""Features whose cases name their numbers, for long sequences."""


def feature_cases() -> list[Case]:
    """One case for each feature, each kind of lengths and heads and each unusual head dimension; bfloat16 but for one."""
    return _feature_cases(4, 4096, 16, 128)


def _feature_cases(batch: int, seqlen: int, heads: int, head_dim: int) -> list[Case]:
    """The same cases in any size; seqlen is a multiple of 16."""
    full = _square(batch, seqlen, heads, dtype="bfloat16", head_dim=head_dim)
    causal = replace(full, is_causal=True)

    def having(sample: Sample, **features: Any) -> Sample:
        return replace(sample, features=SampleFeatures(**features))

    half = replace(full, batch=2 * batch, seqlen_q=seqlen // 2, seqlen_kv=seqlen // 2)  # a bias of every head has its square as its size
    shares = [seqlen >> i for i in range(1, 5)]  # half of the tokens lie in one sequence, a quarter in the next
    packed = (2 * seqlen, seqlen, *shares, *[seqlen // 16] * (2 * batch))
    return [
        Case(having(causal, window=(seqlen // 4 - 1, 0)), "window"),
        Case(having(causal, softcap=30.0), "softcap"),
        Case(having(causal, alibi=True), "alibi"),
        Case(having(full, attn_mask="bool", mask_axes="bk"), "key_padding"),
        Case(having(half, attn_mask="bfloat16", mask_axes="hqk", need_attn_mask_grad=True), "bias"),
        Case(having(causal, dropout=0.1), "dropout"),
        Case(having(causal, sinks=True), "sinks"),
        Case(having(causal, segments=8), "segments"),
        *(Case(replace(causal, features=ALONE[name]), name) for name in others_than(*OF_THEIR_OWN_SIZE, "prefix")),
        Case(replace(causal, lengths_q=packed), "varlen"),
        Case(replace(full, lengths_kv=tuple(max(1, 3 * seqlen // 4 >> 2 * b) for b in range(batch))), "seqlens_kv"),
        Case(replace(causal, head_dim=192, head_dim_v=128), "head_dim_192_128"),
        Case(replace(causal, head_dim=576, head_dim_v=512, num_heads_kv=1), "head_dim_576_512"),
        Case(replace(causal, head_dim=512, num_heads_q=max(1, heads // 4), num_heads_kv=max(1, heads // 4)), "head_dim_512"),
        Case(replace(causal, num_heads_kv=max(1, heads // 8)), "gqa"),
        Case(replace(full, seqlen_q=seqlen // 4), "cross"),
        Case(replace(causal, head_dim=head_dim // 2 + 8), "head_dim_of_8"),
        Case(replace(causal, head_dim=head_dim // 4 + 5), "odd_head_dim"),
        Case(replace(half, dtype="float32", is_causal=True), "float32"),
    ]


def dry_cases() -> list[Case]:
    """For the simulator: two plain cases."""
    return [
        Case(_square(1, 48, 2, dtype="bfloat16", head_dim=64, is_causal=True)),
        Case(_square(1, 32, 1, dtype="float32", head_dim=64)),
    ]


def dry_feature_cases() -> list[Case]:
    """For the simulator: every feature."""
    return _feature_cases(1, 48, 2, 64)
