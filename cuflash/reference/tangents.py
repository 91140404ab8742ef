"""Judge forward-mode derivatives: the tangents of O and of lse along tangents of the inputs, head by head in float64, or as a small precision makes them.

    Ṡ = scale · (Q̇ Kᵀ + Q K̇ᵀ) ∘ slope      μ = Σ P ∘ Ṡ + p ṡ      Ȯ = (P ∘ Ṡ) V + P V̇ − μ O      lsė = μ

slope is that of a softcap, ṡ the tangent of the sink and p its share of the row. Dropout drops what V and V̇ are multiplied by, and nothing in μ.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from cuflash.reference.comparison import Float64, Precision, Round, exact, rounding_to, to_float64
from cuflash.reference.formulas import (
    dropped,
    each_head,
    from_bhsd,
    product_of,
    rules_of_call,
    scores_of_head,
    sink_of,
    softmax,
    to_bhsd,
)


def attention_jvp(
    query: Any,
    key: Any,
    value: Any,
    query_dot: Any = None,
    key_dot: Any = None,
    value_dot: Any = None,
    sinks_dot: Any = None,
    *,
    out: Any = None,
    magnitudes: bool = False,
    precision: Precision | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "bshd",
    causal_alignment: str = "top_left",
    **features: Any,
) -> tuple[Float64, Float64]:
    """The tangents of out and lse of `attention`.

    Args:
        query_dot, key_dot, value_dot, sinks_dot: tangents of the inputs, in their shapes; None for zero.
        out: the output that a forward pass gave, of which μ is taken off; None takes the exact one.
        magnitudes: what the sums would give if nothing in them cancelled, as for `attention_backward`. For `compare`.
        precision: None for the truth in float64; else float32 arithmetic with S, P, Ṡ, P ∘ Ṡ and the results rounded to it.
        query, key, value, …: as for `attention`.

    Returns:
        out_dot: shape of out. lse_dot: (batch, heads, seqlen_q). Both are 0 where no key is visible.
    """
    work: Any = numpy.float64 if precision is None else numpy.float32
    rounded: Round = exact if precision is None else rounding_to(precision)
    sized: Round = numpy.abs if magnitudes else exact
    q, k, v = (to_bhsd(x, layout, work) for x in (query, key, value))
    q_dot, k_dot, v_dot = (
        numpy.zeros_like(x) if dot is None else to_bhsd(dot, layout, work) for x, dot in ((q, query_dot), (k, key_dot), (v, value_dot))
    )
    given = None if out is None else to_bhsd(out, layout, work)
    of_sinks = numpy.zeros(q.shape[1], work) if sinks_dot is None else sized(to_float64(sinks_dot).astype(work))
    factor = work(q.shape[3] ** -0.5 if scale is None else scale)
    rules = rules_of_call(q, k, is_causal, causal_alignment, features)
    out_dot, lse_dot = numpy.zeros((*q.shape[:3], v.shape[3]), work), numpy.zeros(q.shape[:3], work)
    for b, h, at_k, at_v in each_head(q, k, v, enable_gqa):
        visible = rules.visible(b, h)
        scores, slope = scores_of_head(q[b, h], k[at_k], float(factor), rules, b, h, rounded)
        sink = sink_of(rules, h, work)
        weights, lse = softmax(scores, visible, rounded, sink)
        own = product_of(dropped(weights, rules, b, h, rounded), sized(v[at_v]), visible) if given is None else sized(given[b, h])
        if magnitudes:
            weights = weights * numpy.where(visible & (numpy.abs(scores) < 2.0**20), 1 + numpy.abs(scores), 1)
        with numpy.errstate(invalid="ignore"):
            moved = sized(q_dot[b, h]) @ sized(k[at_k]).T + sized(q[b, h]) @ sized(k_dot[at_k]).T
            scores_dot = numpy.where(visible, rounded(sized(factor) * moved) * slope, 0)
        weighed = weights * scores_dot
        share = numpy.exp(sink - numpy.where(numpy.isneginf(lse), numpy.inf, lse))
        mu = weighed.sum(axis=1) + share * of_sinks[h]
        products = product_of(dropped(rounded(weighed), rules, b, h, rounded), sized(v[at_v]), visible)
        products = products + product_of(dropped(weights, rules, b, h, rounded), sized(v_dot[at_v]), visible)
        out_dot[b, h] = rounded(products + work(1 if magnitudes else -1) * mu[:, None] * own)
        lse_dot[b, h] = mu
    return _as_float64(from_bhsd(out_dot, layout)), _as_float64(lse_dot)


def _as_float64(x: NDArray[Any]) -> Float64:
    return x.astype(numpy.float64)
