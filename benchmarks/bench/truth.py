"""One head of attention and its gradients by the formula, in float64, some rows of scores at a time: with torch on the GPU, else with NumPy.

`cuflash.reference` says the same for whole calls, but keeps all scores and computes on the CPU, which takes too long for what is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from cuflash.reference.features import Rules

ROWS_AT_A_TIME = 2048


@dataclass
class Head:
    """One head of one sequence.

    Attributes:
        xp: torch or numpy, whose float64 arrays the others are.
        query, key, value, grad_out: (seqlen, head_dim).
        scale: multiplies the scores.
        rules, batch, head: what is done with scores, and as which batch and head the rules know this one.
        plain: nothing but a causal mask, so that rows can be masked without masks of all scores, which would be large.
    """

    xp: Any
    query: Any
    key: Any
    value: Any
    grad_out: Any
    scale: float
    rules: Rules
    batch: int
    head: int
    plain: bool

    def __post_init__(self) -> None:
        at = self.batch, self.head
        self._visible = None if self.plain else self.rules.visible(*at)
        self._bias, self._kept = (None, None) if self.plain else (self.rules.bias(*at), self.rules.kept(*at))

    def out_and_gradients(self, *, of_mask: bool = False) -> dict[str, Any]:
        """out, and the gradients of query, key and value by their names; with `of_mask` also of what is added to the scores, attn_mask."""
        xp, value, grad_out = self.xp, self.value, self.grad_out
        out, grad_query, grad_key, grad_value = (xp.zeros_like(x) for x in (grad_out, self.query, self.key, value))
        of_masks = []
        for begin in range(0, len(self.query), ROWS_AT_A_TIME):
            rows = slice(begin, min(begin + ROWS_AT_A_TIME, len(self.query)))
            scores, slope = self._scores(rows)
            weights, kept = self._softmax(scores), 1.0
            if self._kept is not None:
                kept = self._like_query(self._kept[rows] * self.rules.kept_factor)
            out[rows] = (weights * kept) @ value
            delta = (grad_out[rows] * out[rows]).sum(-1)[:, None]
            grad_scores = weights * ((grad_out[rows] @ value.T) * kept - delta)
            of_masks += [grad_scores] if of_mask else []
            grad_products = self.scale * slope * grad_scores
            grad_query[rows] = grad_products @ self.key
            grad_key += grad_products.T @ self.query[rows]
            grad_value += (weights * kept).T @ grad_out[rows]
        found = {"out": out, "query": grad_query, "key": grad_key, "value": grad_value}
        return found | ({"attn_mask": xp.concatenate(of_masks)} if of_mask else {})

    def _scores(self, rows: slice) -> tuple[Any, Any]:
        """Scores of some rows, -inf where a key is hidden; and their derivative by the scaled products."""
        xp, softcap = self.xp, self.rules.softcap
        scores, slope = self.scale * self.query[rows] @ self.key.T, 1.0
        if softcap is not None:
            scores = softcap * xp.tanh(scores / softcap)
            slope = 1.0 - (scores / softcap) ** 2
        if self._bias is not None:
            scores = scores + self._like_query(self._bias[rows])
        hidden = self._hidden(rows)
        return scores if hidden is None else xp.where(self._like_query(hidden), -xp.inf, scores), slope

    def _hidden(self, rows: slice) -> Any:
        if self._visible is not None:
            return ~self._visible[rows]
        if not self.rules.is_causal:
            return None
        last = numpy.arange(rows.start, rows.stop) + self.rules.shift(self.batch)
        return numpy.arange(len(self.key))[None, :] > last[:, None]

    def _softmax(self, scores: Any) -> Any:
        """Probabilities; 0 in rows that see nothing."""
        xp = self.xp
        sink = None if self.rules.sinks is None else float(self.rules.sinks[self.head])
        largest = xp.amax(scores, -1)[:, None]
        if sink is not None:
            largest = xp.where(largest > sink, largest, sink)
        largest = xp.where(largest == -xp.inf, 0.0, largest)
        exponentials = xp.exp(scores - largest)
        total = exponentials.sum(-1)[:, None]
        if sink is not None:
            total = total + xp.exp(sink - largest)
        return exponentials / xp.where(total == 0.0, 1.0, total)

    def _like_query(self, x: Any) -> Any:
        """A NumPy array where the query is."""
        return x if self.xp is numpy else self.xp.as_tensor(x, device=self.query.device)
