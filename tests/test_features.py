"""Score features and masks: each alone and in pairs, forward and all gradients against the reference, and what a user relies on around them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy
import pytest
from conftest import ELEMENTS, Target, rounded

import cuflash
from cuflash import reference

B, H, HK, SQ, SKV = 2, 4, 2, 70, 90
"""Two tiles of queries and of keys on every target, neither of them full."""


def random(seed: int) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


def boolean_mask(*shape: int, seed: int = 7, share: float = 0.6) -> Any:
    return random(seed).random(shape) < share


def additive_mask(*shape: int, dtype: str = "float32", seed: int = 8) -> Any:
    """Normal numbers, and one in eight -inf."""
    values = random(seed).standard_normal(shape)
    return rounded(numpy.where(random(seed + 1).random(shape) < 1 / 8, -math.inf, values), dtype)


def segment_ids(seqlen: int, seed: int = 9) -> Any:
    """A few documents, one after the other, other ones in each sequence."""
    return numpy.sort(random(seed).integers(0, 4, (B, seqlen)), axis=1).astype(numpy.int32)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": (20, 5)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": numpy.linspace(0.1, 0.5, H).astype(numpy.float32)},
    "boolean_mask": {"attn_mask": boolean_mask(B, H, SQ, SKV)},
    "additive_mask": {"attn_mask": additive_mask(SQ, SKV)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": (2**63 + 5, 2**40)},
    "sinks": {"sinks": numpy.linspace(-1, 3, H).astype(numpy.float32)},
    "segments": {"segment_ids_q": segment_ids(SQ), "segment_ids_kv": segment_ids(SKV)},
    "prefix": {"prefix_lengths": numpy.array([0, 50], numpy.int32), "is_causal": True},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
}
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if pair not in {("boolean_mask", "additive_mask"), ("causal", "bottom_right")}]


def inputs_of(target: Target, dtype: str, head_dim: int = 32, seqlens: tuple[int, int] = (SQ, SKV)) -> list[Any]:
    shapes = [(B, seqlens[0], H, head_dim), (B, seqlens[1], HK, head_dim), (B, seqlens[1], HK, head_dim)]
    return [target.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]


def placed(target: Target, options: dict[str, Any]) -> dict[str, Any]:
    return {name: target.place(option) if isinstance(option, numpy.ndarray) else option for name, option in options.items()}


# --- Each alone, and in pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["half", "float32"])
@pytest.mark.parametrize("feature", FEATURES)
def test_alone(target: Target, feature: str, dtype: str) -> None:
    inputs = inputs_of(target, target.half if dtype == "half" else dtype)
    target.check(*inputs, enable_gqa=True, **placed(target, FEATURES[feature]))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(simulator: Target, pair: tuple[str, str]) -> None:
    """Where kernels and reference would take them in another order, they differ."""
    options = FEATURES[pair[0]] | FEATURES[pair[1]]
    simulator.check(*inputs_of(simulator, "bfloat16"), enable_gqa=True, **options)


def test_all_together(target: Target) -> None:
    together: dict[str, Any] = {}
    for name in FEATURES:
        if name != "boolean_mask":
            together |= FEATURES[name]
    target.check(*inputs_of(target, target.half), enable_gqa=True, **placed(target, together))


@pytest.mark.parametrize("head_dim", [8, 72, 128, 256])
@pytest.mark.parametrize("feature", ["softcap", "boolean_mask", "additive_mask", "dropout"])
def test_other_head_dims(simulator: Target, feature: str, head_dim: int) -> None:
    """Above 128, dK and dV are made by a kernel each, which have to draw the same numbers."""
    simulator.check(*inputs_of(simulator, "float16", head_dim), enable_gqa=True, **FEATURES[feature])
