"""The judge's score features and masks are judged: by loops over single pairs, and their gradients by finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from cuflash.reference import attention, attention_backward
from cuflash.reference.features import dropout_mask

B, H, SQ, SKV, D = 2, 2, 4, 5, 3
Floats = NDArray[numpy.float64]


def random(*shape: int, seed: int) -> Floats:
    return numpy.random.default_rng([seed, *shape]).standard_normal(shape)


MASK = numpy.where(numpy.random.default_rng(1).random((B, 1, SQ, SKV)) < 0.2, -numpy.inf, random(B, 1, SQ, SKV, seed=2))
CASES: dict[str, dict[str, Any]] = {
    "window": {"window": (1, 1)},
    "causal_window": {"window": (2, None), "is_causal": True, "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi_slopes": numpy.array([0.3, 0.7])},
    "alibi_bottom_right": {"alibi_slopes": random(B, H, seed=3), "causal_alignment": "bottom_right"},
    "boolean_mask": {"attn_mask": numpy.random.default_rng(4).random((H, SQ, SKV)) < 0.6},
    "additive_mask": {"attn_mask": MASK},
    "row_of_mask": {"attn_mask": random(SKV, seed=5)},
    "dropout": {"dropout_p": 0.4, "dropout_seed": (3, 9)},
    "sinks": {"sinks": numpy.array([0.5, -numpy.inf])},
    "segments": {
        "segment_ids_q": numpy.array([[0, 0, 1, 2], [1, 1, 1, 1]]),
        "segment_ids_kv": numpy.array([[0, 1, 1, 0, 0], [1, 1, 0, 0, 1]]),
    },
    "prefix": {"prefix_lengths": numpy.array([3, 0]), "is_causal": True},
    "many": {
        "softcap": 0.9,
        "alibi_slopes": numpy.array([0.3, 0.7]),
        "attn_mask": MASK,
        "sinks": numpy.array([0.5, 0.1]),
        "window": (2, 2),
        "dropout_p": 0.2,
        "dropout_seed": 8,
    },
}


def score_of(b: int, h: int, i: int, j: int, product: float, options: dict[str, Any]) -> float:
    """The score of one pair, -inf where it is masked."""
    shift = SKV - SQ if options.get("causal_alignment") == "bottom_right" else 0
    left, right = options.get("window", (None, None))
    causal = not options.get("is_causal") or j <= i + shift or ("prefix_lengths" in options and j < options["prefix_lengths"][b])
    within = (left is None or j >= i + shift - left) and (right is None or j <= i + shift + right)
    together = "segment_ids_q" not in options or options["segment_ids_q"][b, i] == options["segment_ids_kv"][b, j]
    if not (causal and within and together):
        return -math.inf
    score = product
    if "softcap" in options:
        score = options["softcap"] * math.tanh(score / options["softcap"])
    if "alibi_slopes" in options:
        slopes = options["alibi_slopes"]
        score -= float(slopes[h] if slopes.ndim == 1 else slopes[b, h]) * abs(i + shift - j)
    if "attn_mask" in options:
        mask = numpy.broadcast_to(options["attn_mask"], (B, H, SQ, SKV))
        element = mask[b, h, i, j]
        score = (score if element else -math.inf) if mask.dtype == bool else score + float(element)
    return score


def inputs() -> list[Floats]:
    return [random(B, length, H, D, seed=seed) for seed, length in ((11, SQ), (12, SKV), (13, SKV))]


@pytest.mark.parametrize("case", CASES)
def test_against_loops(case: str) -> None:
    options = CASES[case]
    q, k, v = inputs()
    out, lse = attention(q, k, v, scale=0.8, **options)
    for b in range(B):
        for h in range(H):
            kept = numpy.ones((SQ, SKV), bool)
            if "dropout_p" in options:
                seed = options["dropout_seed"]
                kept = dropout_mask((b, h), (SQ, SKV), options["dropout_p"], seed if isinstance(seed, tuple) else (seed, 0))
            for i in range(SQ):
                weights = [math.exp(score_of(b, h, i, j, 0.8 * float(q[b, i, h] @ k[b, j, h]), options)) for j in range(SKV)]
                total = sum(weights) + (math.exp(options["sinks"][h]) if "sinks" in options else 0.0)
                want = numpy.zeros(D)
                for j in range(SKV):
                    if total and kept[i, j]:
                        want += weights[j] / total / (1 - options.get("dropout_p", 0.0)) * v[b, j, h]
                numpy.testing.assert_allclose(out[b, i, h], want, rtol=1e-12, atol=1e-14)
                numpy.testing.assert_allclose(lse[b, h, i], math.log(total) if total else -math.inf, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_gradients_against_finite_differences(case: str) -> None:
    """Of query, key, value, an additive mask and sinks; a row that sees nothing gives its LSE no weight."""
    options = dict(CASES[case])
    variables: dict[str, Any] = dict(zip(("query", "key", "value"), inputs(), strict=True))
    for name in ("attn_mask", "sinks"):
        if name in options and options[name].dtype != bool:
            variables[name] = options.pop(name)
    grad_out = random(B, SQ, H, D, seed=21)
    _, lse = attention(**variables, **options)
    grad_lse = numpy.where(numpy.isneginf(lse), 0.0, random(B, H, SQ, seed=22))

    def loss(values: dict[str, Any]) -> float:
        out, rows = attention(**values, **options)
        return float((out * grad_out).sum() + (numpy.where(numpy.isneginf(rows), 0.0, rows) * grad_lse).sum())

    gradients = attention_backward(grad_out, **variables, grad_lse=grad_lse, **options)
    for name, values in variables.items():
        got = getattr(gradients, name)
        assert got.shape == values.shape
        for index in numpy.ndindex(values.shape):
            if not numpy.isfinite(values[index]):
                assert got[index] == 0.0
                continue
            step = numpy.zeros(values.shape)
            step[index] = 1e-5
            difference = (loss({**variables, name: values + step}) - loss({**variables, name: values - step})) / 2e-5
            assert abs(got[index] - difference) < 1e-7 * max(1.0, abs(difference)), (name, index)


def test_a_masked_key_has_no_influence_even_if_it_is_nan() -> None:
    q, k, v = inputs()
    mask = numpy.ones((SQ, SKV), bool)
    mask[:, 2] = False
    want = attention(q, k, v, attn_mask=mask)
    k[:, 2], v[:, 2] = numpy.nan, numpy.inf
    got = attention(q, k, v, attn_mask=mask)
    assert all(numpy.array_equal(*pair) for pair in zip(got, want, strict=True))
