"""Peers of benchmarks that are not installed here, as the benchmarks call them: on a stand-in that says what it was asked for."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest

from bench import cases, comparison, torch_libraries
from bench.calls import Library, NotSupported
from bench.cases import Case
from bench.machine import Machine
from bench.operands import Operands

torch = pytest.importorskip("torch")


class RaggedPrefill:
    """What FlashInfer documents of its wrapper for packed sequences, by torch's own attention, one sequence after the other."""

    def __init__(self, workspace: Any, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr: Any, kv_indptr: Any, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, *, head_dim_vo: int, causal: bool,
        window_left: int, logits_soft_cap: float | None, q_data_type: Any, kv_data_type: Any,
    ) -> None:  # fmt: skip
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        assert q_data_type == kv_data_type in (torch.bfloat16, torch.float32)
        self.offsets, self.causal, self.window_left = [x.tolist() for x in (qo_indptr, kv_indptr)], causal, window_left
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo)

    def run(self, query: Any, key: Any, value: Any) -> Any:
        assert (query.shape[1], key.shape[1], query.shape[2], value.shape[2]) == self.shape
        parts, (rows, columns) = [], self.offsets
        for b in range(len(rows) - 1):
            q, k, v = (x[o[b] : o[b + 1]].transpose(0, 1) for x, o in ((query, rows), (key, columns), (value, columns)))
            i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None, :]
            i = i + k.shape[1] - q.shape[1]
            mask = (i >= j) | (not self.causal)
            mask &= (i - j <= self.window_left) | (self.window_left < 0)
            out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)


@pytest.mark.parametrize("name", ["", "window", "varlen", "gqa", "cross", "head_dim_192_128"])
def test_flashinfer_is_asked_for_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=RaggedPrefill))
    case = next(case for case in [*cases.dry_cases(), *cases.dry_feature_cases()] if case.name == name)
    operands = Operands(Case(replace(case.sample, dtype="bfloat16"), name), Machine(dry=True))
    found = torch_libraries.flashinfer_calls(operands)
    error, note = comparison.checked(Library("flashinfer", "flashinfer", "", torch_libraries.flashinfer_calls), operands, found, "forward")
    assert note == ""
    assert error is not None
    assert error < 2e-2
    assert found.of("backward") is None
    assert found.of("both") is None


def test_what_flashinfer_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=RaggedPrefill))
    reasons = {}
    for case in cases.dry_feature_cases():
        try:
            torch_libraries.flashinfer_calls(Operands(case, Machine(dry=True)))
        except NotSupported as error:
            reasons[case.name] = str(error)
    assert reasons["dropout"] == "flashinfer has no dropout"
    assert reasons["alibi"] == "flashinfer has no ALiBi"
    assert reasons["bias"] == "flashinfer has no attn_mask"
