"""Judge attention: the plain formula in float64, the same formula as a framework computes it in a small precision, and their comparison.

    S = scale · Q Kᵀ      P = softmax(S)      O = P V      lse = log Σ exp(S)
    dV = Pᵀ dO      dP = dO Vᵀ      dS = P ∘ (dP - Σ P ∘ dP + dlse)      dQ = scale · dS K      dK = scale · dSᵀ Q      Σ P ∘ dP = Σ dO ∘ O

`attention` and `attention_backward` are the truth. `attention_naive` and `attention_naive_backward` round S, P, O, dP, dS to the precision
of the inputs, as unfused operators do that store them. The error they make says how large an error is acceptable; `compare` asserts it.

Score features and masks are defined in `features.py`. Nothing here is fast, and nothing is shared with the library under test: one sequence and one
head at a time, NumPy only. A row that sees no key has O = 0, lse = -inf and no gradient. A masked key has no influence at all, even if it is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from cuflash.reference.comparison import Float64, Precision, Round, exact, rounding_to, to_float64, to_numpy
from cuflash.reference.features import Rules, rules_of


class _InputGradients(NamedTuple):
    query: Float64
    key: Float64
    value: Float64


class Gradients(_InputGradients):
    """Gradients of query, key and value, which it unpacks to; of an additive mask and of sinks where there are any."""

    attn_mask: Float64 | None = None
    sinks: Float64 | None = None


# --- Truth ------------------------------------------------------------------------------------------------------------------------------


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    magnitudes: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "bshd",
    causal_alignment: str = "top_left",
    **features: Any,
) -> tuple[Float64, Float64]:
    """Attention in float64.

    Args:
        query: four dimensions in the order of `layout`, any float type, any kind of array that `to_float64` understands.
        key, value: same; batch and heads are the query's or 1, and heads may be a divisor of the query's if `enable_gqa`. The head_dim of value
            may differ from that of query and key.
        magnitudes: what the sums would give if nothing in them cancelled: P |V|, and for lse the largest scale · |q|·|k| of each row. For `compare`.
        is_causal: query i sees keys j <= i, shifted by seqlen_kv - seqlen_q for "bottom_right".
        scale: default head_dim ** -0.5.
        features: score features and masks, and `seqlens_kv`, as in `cuflash.scaled_dot_product_attention`; see `features.py`.

    Returns:
        out: shape of query in its layout, with the head_dim of value.
        lse: (batch, heads, seqlen_q), natural logarithm; -inf where no key is visible.
    """
    return _forward(query, key, value, magnitudes, numpy.float64, exact, is_causal, scale, enable_gqa, layout, causal_alignment, features)


def attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    *,
    out: Any = None,
    lse: Any = None,
    grad_lse: Any = None,
    magnitudes: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "bshd",
    causal_alignment: str = "top_left",
    **features: Any,
) -> Gradients:
    """Gradients in float64 of Σ grad_out ∘ out + Σ grad_lse ∘ lse with respect to query, key and value.

    Args:
        grad_out: shape of the output, in `layout`.
        out: the output that a forward pass gave, in `layout`. The backward pass takes Σ P ∘ dP from it as Σ dO ∘ O, so that what O was rounded by is a part of
            its input, not of its error. None takes the exact sum.
        lse: (batch, heads, seqlen_q), the logarithm of a sum over more keys than these, so that P = exp(S - lse); with the `out` of all of these keys. None takes
            the sum over these keys.
        grad_lse: (batch, heads, seqlen_q), or None for 0.
        magnitudes: what the sums would give if nothing in them cancelled: everything is taken by its absolute value, and P as 1 + |S| times what it is, since that is how many
            epsilons a score that is rounded to float32 leaves it off by; where |S| is above 2²⁰, and nothing is left of differences between scores, as it is. For `compare`.
        query, key, value, …: as for `attention`.

    Returns:
        Three arrays of the shapes of query, key and value; a broadcast input gets the sum over all its uses, and so does an additive mask
        (`attn_mask`, in its shape). `sinks` has the gradient of the sinks.
    """
    return _backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        grad_lse,
        magnitudes,
        numpy.float64,
        exact,
        is_causal,
        scale,
        enable_gqa,
        layout,
        causal_alignment,
        features,
    )


# --- The yardstick ----------------------------------------------------------------------------------------------------------------------


def attention_naive(
    query: Any,
    key: Any,
    value: Any,
    precision: Precision,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "bshd",
    causal_alignment: str = "top_left",
    **features: Any,
) -> tuple[Float64, Float64]:
    """`attention` with float32 arithmetic and S, P and O rounded to `precision`; the values are returned as float64."""
    out, lse = _forward(
        query, key, value, False, numpy.float32, rounding_to(precision), is_causal, scale, enable_gqa, layout, causal_alignment, features
    )
    return out.astype(numpy.float64), lse.astype(numpy.float64)


def attention_naive_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    precision: Precision,
    *,
    out: Any = None,
    lse: Any = None,
    grad_lse: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "bshd",
    causal_alignment: str = "top_left",
    **features: Any,
) -> Gradients:
    """`attention_backward` with float32 arithmetic and S, P, dP, dS and the gradients rounded to `precision`; returned as float64."""
    rounded = rounding_to(precision)
    grads = _backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        grad_lse,
        False,
        numpy.float32,
        rounded,
        is_causal,
        scale,
        enable_gqa,
        layout,
        causal_alignment,
        features,
    )
    in_float64 = Gradients(*(grad.astype(numpy.float64) for grad in grads))
    for name in ("attn_mask", "sinks"):
        grad = getattr(grads, name)
        setattr(in_float64, name, None if grad is None else grad.astype(numpy.float64))
    return in_float64


# --- The formula ------------------------------------------------------------------------------------------------------------------------


def _forward(
    query: Any,
    key: Any,
    value: Any,
    magnitudes: bool,
    work: Any,
    rounded: Round,
    is_causal: bool,
    scale: float | None,
    gqa: bool,
    layout: str,
    alignment: str,
    features: Mapping[str, Any],
) -> tuple[NDArray[Any], NDArray[Any]]:
    q, k, v = (to_bhsd(x, layout, work) for x in (query, key, value))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    rules = rules_of_call(q, k, is_causal, alignment, features)
    out = numpy.zeros((*q.shape[:3], v.shape[3]), work)
    lse = numpy.zeros(q.shape[:3], work)
    for b, h, at_k, at_v in each_head(q, k, v, gqa):
        visible = rules.visible(b, h)
        scores, _ = scores_of_head(q[b, h], k[at_k], factor, rules, b, h, rounded)
        weights, lse[b, h] = softmax(scores, visible, rounded, sink_of(rules, h, work))
        out[b, h] = rounded(product_of(dropped(weights, rules, b, h, rounded), numpy.abs(v[at_v]) if magnitudes else v[at_v], visible))
        if magnitudes:
            with numpy.errstate(invalid="ignore"):
                products = abs(factor) * (numpy.abs(q[b, h]) @ numpy.abs(k[at_k]).T)
            lse[b, h] = numpy.where(visible, products, 0).max(axis=1, initial=0.0)
    return from_bhsd(out, layout), lse


def _backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    grad_lse: Any,
    magnitudes: bool,
    work: Any,
    rounded: Round,
    is_causal: bool,
    scale: float | None,
    gqa: bool,
    layout: str,
    alignment: str,
    features: Mapping[str, Any],
) -> Gradients:
    grad, q, k, v = (to_bhsd(x, layout, work) for x in (grad_out, query, key, value))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    rules = rules_of_call(q, k, is_causal, alignment, features)
    given_lse = None if lse is None else to_float64(lse).astype(work)
    grad_rows = numpy.zeros(q.shape[:3], work) if grad_lse is None else to_float64(grad_lse).astype(work)
    products = None if out is None else grad * to_bhsd(out, layout, work)
    sized: Round = numpy.abs if magnitudes else exact  # a factor of a product whose terms are added up
    minus = work(1 if magnitudes else -1)
    grad_q, grad_k, grad_v = (numpy.zeros(x.shape, work) for x in (q, k, v))
    wants_mask = rules.attn_mask is not None and rules.attn_mask.dtype != numpy.bool_
    grad_masked = numpy.zeros(rules.shape if wants_mask else (0,), work)
    grad_sinks = numpy.zeros(q.shape[1], work)
    for b, h, at_k, at_v in each_head(q, k, v, gqa):
        visible = rules.visible(b, h)
        scores, slope = scores_of_head(q[b, h], k[at_k], factor, rules, b, h, rounded)
        weights, row_lse = softmax(scores, visible, rounded, sink_of(rules, h, work))
        if given_lse is not None:
            weights, row_lse = rounded(weights * _share(row_lse, given_lse[b, h])[:, None]), given_lse[b, h]
        if magnitudes:
            weights = weights * numpy.where(visible & (numpy.abs(scores) < 2.0**20), 1 + numpy.abs(scores), 1)
        with numpy.errstate(invalid="ignore"):
            grad_weights = dropped(numpy.where(visible, rounded(sized(grad[b, h]) @ sized(v[at_v].T)), 0), rules, b, h, exact)
            row_sums = (weights * grad_weights if products is None else sized(products[b, h])).sum(axis=1, keepdims=True)
            delta = row_sums + minus * sized(grad_rows[b, h][:, None])
            grad_scores = rounded(numpy.where(visible, weights * (grad_weights + minus * delta), 0))
            if wants_mask:
                grad_masked[b, h] = grad_scores
            if rules.sinks is not None:
                grad_sinks[h] += (
                    minus * (numpy.where(numpy.isneginf(row_lse), 0, numpy.exp(work(rules.sinks[h]) - row_lse)) * delta[:, 0]).sum()
                )
            grad_scores = rounded(numpy.where(visible, grad_scores * slope, 0)) if rules.softcap else grad_scores
        scaling = sized(work(factor))
        grad_q[b, h] = rounded(scaling * product_of(grad_scores, sized(k[at_k]), visible))
        grad_k[at_k] += rounded(scaling * product_of(grad_scores.T, sized(q[b, h]), visible.T))
        grad_v[at_v] += rounded(product_of(dropped(weights, rules, b, h, rounded).T, sized(grad[b, h]), visible.T))
    gradients = Gradients(*(from_bhsd(rounded(x), layout) for x in (grad_q, grad_k, grad_v)))
    if wants_mask:
        gradients.attn_mask = rules.reduce_mask_grad(grad_masked)
    if rules.sinks is not None:
        gradients.sinks = grad_sinks
    return gradients


def each_head(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], gqa: bool) -> Iterator[tuple[int, int, tuple[int, int], tuple[int, int]]]:
    """Each (batch, head) of the query with the (batch, head) of the key and of the value that it attends to."""
    batch, heads = q.shape[:2]
    for x in (k, v):
        divides = gqa and x.shape[1] > 0 and heads % x.shape[1] == 0
        if x.shape[0] not in (1, batch) or not (x.shape[1] in (1, heads) or divides):
            raise ValueError(f"(batch, heads) {x.shape[:2]} of key or value do not fit the query's {(batch, heads)}")

    def shared(x: NDArray[Any], b: int, h: int) -> tuple[int, int]:
        return (b if x.shape[0] > 1 else 0), h // (heads // x.shape[1])

    for b in range(batch):
        for h in range(heads):
            yield b, h, shared(k, b, h), shared(v, b, h)


def rules_of_call(q: NDArray[Any], k: NDArray[Any], is_causal: bool, alignment: str, features: Mapping[str, Any]) -> Rules:
    """Masks and score features of a call with inputs in the order batch, heads, seqlen, head_dim."""
    shape = (*q.shape[:3], k.shape[2])
    return rules_of(shape, to_numpy, to_float64, is_causal=is_causal, causal_alignment=alignment, **features)


def scores_of_head(
    q: NDArray[Any], k: NDArray[Any], factor: float, rules: Rules, b: int, h: int, rounded: Round
) -> tuple[NDArray[Any], NDArray[Any] | float]:
    """Scores of one head, and their derivative by scale · q·k."""
    work = q.dtype.type
    slope: NDArray[Any] | float = 1.0
    with numpy.errstate(invalid="ignore", over="ignore"):
        scores = rounded(work(factor) * (q @ k.T))
        if rules.softcap is not None:
            squashed = numpy.tanh(scores / work(rules.softcap))
            scores, slope = rounded(work(rules.softcap) * squashed), 1 - squashed * squashed
        bias = rules.bias(b, h)
        if bias is not None:
            scores = rounded(scores + bias.astype(q.dtype))
    return scores, slope


def sink_of(rules: Rules, h: int, work: Any) -> float:
    return work(-numpy.inf if rules.sinks is None else rules.sinks[h])  # type: ignore[no-any-return]


def dropped(weights: NDArray[Any], rules: Rules, b: int, h: int, rounded: Round) -> NDArray[Any]:
    """What dropout leaves of the probabilities, or of the gradient that flows back to them."""
    kept = rules.kept(b, h)
    if kept is None:
        return weights
    return rounded(numpy.where(kept, weights * weights.dtype.type(rules.kept_factor), 0))


def softmax(scores: NDArray[Any], visible: NDArray[numpy.bool_], rounded: Round, sink: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """P and the logarithm of each row's sum, which the sink is part of; a row with neither a visible key nor a sink gives zeros and -inf."""
    if scores.shape[1] == 0:
        return scores, numpy.full(scores.shape[0], sink, scores.dtype)
    scores = numpy.where(visible, scores, -numpy.inf)
    row_max = numpy.maximum(scores.max(axis=1, keepdims=True), sink)
    seen = (visible.any(axis=1, keepdims=True) | (sink > -numpy.inf)) & ~numpy.isneginf(row_max)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        shift = numpy.where(seen, row_max, 0)
        exponentials = numpy.where(visible & seen, numpy.exp(scores - shift), 0)
        row_sum = exponentials.sum(axis=1, keepdims=True) + numpy.exp(sink - shift)
        weights = exponentials / numpy.where(seen, row_sum, 1)
        lse = numpy.where(seen, row_max + numpy.log(row_sum), -numpy.inf)
    return rounded(weights), lse[:, 0]


def _share(lse: NDArray[Any], of_all: NDArray[Any]) -> NDArray[Any]:
    """The share of each row's sum that keys with this lse have in the sum of all keys; 0 without any."""
    return numpy.exp(lse - numpy.where(numpy.isneginf(of_all), 0, of_all))  # type: ignore[no-any-return]


def product_of(weights: NDArray[Any], x: NDArray[Any], visible: NDArray[numpy.bool_]) -> NDArray[Any]:
    """`weights @ x`, where an invisible row of `x` adds nothing even if it is not finite."""
    if numpy.isfinite(x).all():
        return numpy.asarray(weights @ x)
    product = weights @ numpy.where(numpy.isfinite(x), x, 0)
    with numpy.errstate(invalid="ignore"):
        for row, column in numpy.argwhere(~numpy.isfinite(x)):
            seen = visible[:, row]
            product[seen, column] += weights[seen, row] * x[row, column]
    return numpy.asarray(product)


def to_bhsd(x: Any, layout: str, work: Any) -> NDArray[Any]:
    if sorted(layout) != sorted("bhsd"):
        raise ValueError(f"layout {layout!r} is not an order of b, s, h, d")
    return numpy.asarray(to_float64(x).astype(work).transpose([layout.index(letter) for letter in "bhsd"]))


def from_bhsd(x: NDArray[Any], layout: str) -> NDArray[Any]:
    return numpy.asarray(x.transpose(["bhsd".index(letter) for letter in layout]))
