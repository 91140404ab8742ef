"""`attention_with_kvcache` with packed queries: chunks of prompts, steps of generation and sequences without a query in one call."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy
import pytest
from caches import CacheCall, PackedCall
from conftest import Target

import cuflash
from cuflash import Tile
from cuflash.errors import OptionError, ShapeError, SimulatorError
from cuflash.runtime import cache_calls

pytest.importorskip("cupy")

TILE = {"forward_split": Tile(16, 64, 4, 2)}
QUERIES, LENGTHS = (1, 0, 13, 5, 1), (250, 9, 0, 77, 0)


FORMS: dict[str, dict[str, Any]] = {
    "rows": {"options": {"tile": TILE}},
    "pages_split": {"page_size": 16, "options": {"is_causal": True, "num_splits": 3, "tile": TILE}},
    "rotary": {"page_size": 100, "rotary_dim": 16, "options": {"is_causal": True, "num_splits": 2, "tile": TILE}},
    "rotary_at_one_place": {"rotary_dim": 32, "interleaved": True, "options": {"tile": TILE}},
    "window_sinks": {"options": {"window": (40, 7), "sinks": numpy.linspace(-1, 2, 6, dtype="float32"), "num_splits": 2, "tile": TILE}},
    "alibi": {"picks_rows": True, "options": {"is_causal": True, "alibi_slopes": numpy.linspace(0.1, 1, 6, dtype="float32"), "tile": TILE}},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_each_sequence_has_what_a_call_of_its_own_gives(form: str, simulator: Target) -> None:
    new = form not in ("rows", "window_sinks")
    PackedCall(QUERIES, LENGTHS, new=new, heads_q=6, heads_kv=2, **FORMS[form]).check(simulator, max_seqlen_q=13)


def test_padding_on_the_left(simulator: Target) -> None:
    calls = PackedCall((2, 3), (40, 90), new=True, leftpad=(30,), options={"is_causal": True, "tile": TILE})
    calls.check(simulator)


def test_packed_and_padded_calls_have_the_same_bits(simulator: Target) -> None:
    """Of sequences with equally many queries."""
    given = CacheCall((5, 130, 250), 2, 2, 4, 2, page_size=16, options={"is_causal": True, "num_splits": 3, "tile": TILE}).arrays()
    tokens = {name: given[name].reshape(-1, *given[name].shape[2:]) for name in ("query", "key", "value")}
    offsets = numpy.arange(0, 7, 2, dtype="int32")
    packed, packed_lse = cuflash.attention_with_kvcache(**given | tokens, cu_seqlens_q=offsets, max_seqlen_q=2, return_lse=True)
    out, lse = cuflash.attention_with_kvcache(**given, return_lse=True)
    assert Target.bits(packed) == Target.bits(out)
    assert Target.bits(packed_lse.reshape(4, 3, 2).transpose(1, 0, 2)) == Target.bits(lse)


def test_offsets_that_make_no_sense_never_leave_the_arrays(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU does not look at them before; sequences longer than max_seqlen_q have zeros behind it."""
    monkeypatch.setattr(cache_calls, "check_positions", lambda *_: None)
    given = PackedCall((4, 2, 7), (5, 60, 0), new=True, rotary_dim=8, options={"is_causal": True, "num_splits": 2, "tile": TILE}).arrays()
    tokens = len(given["query"])
    for offsets in ([0, tokens, tokens, tokens], [2**31 - 1, -(2**31), 3, 2], [5, 4, 3, 2], [0, 0, 0, 0]):
        senseless = offsets[0] > 0  # of which the simulator says that blocks write the same rows in no order, or that nobody wrote some
        with pytest.raises(SimulatorError, match=r"\[(race|uninitialized)\]") if senseless else contextlib.nullcontext():
            out, lse = cuflash.attention_with_kvcache(
                **given | {"cu_seqlens_q": numpy.array(offsets, "int32")}, max_seqlen_q=7, return_lse=True
            )
            if offsets[1] == tokens:  # one sequence with all tokens, of which rows of two heads fill one tile of 16
                assert numpy.isfinite(lse[:, :8]).all()
                assert numpy.isneginf(lse[:, 8:]).all()
                assert not out[8:].any()
            elif not any(offsets):
                assert not out.any()


def test_no_tokens(simulator: Target) -> None:
    """Nothing is computed and nothing appended, as in `varlen_attention`."""
    given = PackedCall((0, 0), (5, 60), new=True, heads_q=2, heads_kv=1, rotary_dim=8, page_size=16, options={"is_causal": True}).arrays()
    given |= {name: numpy.zeros((0, heads, 32), "float16") for name, heads in (("query", 2), ("key", 1), ("value", 1))}
    before = {name: given[name].copy() for name in ("key_cache", "value_cache")}
    of_no_sequences = {
        "cu_seqlens_q": given["cu_seqlens_q"][:1],
        "cache_seqlens": given["cache_seqlens"][:0],
        "page_table": given["page_table"][:0],
    }
    rotary = ("rotary_cos", "rotary_sin", "rotary_interleaved")
    for changed in (
        {},
        {"key": None, "value": None} | dict.fromkeys(rotary),
        dict.fromkeys(rotary) | {"max_seqlen_q": 4},
        of_no_sequences,
    ):
        for _ in range(2):
            out, lse = cuflash.attention_with_kvcache(**given | changed, return_lse=True)
            assert (out.shape, lse.shape) == ((0, 2, 32), (2, 0))
    assert "nothing to compute" in str(cuflash.kvcache_plan(**given))
    for name, cache in before.items():
        assert Target.bits(given[name]) == Target.bits(cache)


def test_what_cannot_be_used_is_named(simulator: Target) -> None:
    given = PackedCall((4, 2), (5, 60), new=True).arrays()

    def refused(error: type[Exception], match: str, **changed: Any) -> None:
        with pytest.raises(error, match=match):
            cuflash.attention_with_kvcache(**given | changed)

    refused(OptionError, r"max_seqlen_q: got 3; expected at least 4", max_seqlen_q=3)
    refused(OptionError, r"cu_seqlens_q: got a last offset of 11; expected at most 9", cu_seqlens_q=numpy.array([0, 4, 11], "int32"))
    refused(ShapeError, r"cache_seqlens: .*expected \(3,\)", cu_seqlens_q=numpy.array([0, 4, 5, 6], "int32"))
    refused(ShapeError, r"query: got 4 dimensions.*3 dimensions \(tokens, heads, head_dim\) with cu_seqlens_q", query=given["query"][None])
    refused(
        ShapeError,
        r"query: got shape \(9, 0, 32\), read as \(tokens, heads, head_dim\); .*one head and column",
        query=given["query"][:, :0],
    )
    refused(ShapeError, r"key: got shape \(8, 1, 32\).*expected \(9, 1, 32\)", key=given["key"][1:])
    refused(OptionError, r"attn_mask: .*packed sequences have scores of different shapes", attn_mask=numpy.ones((1, 1), bool))
    refused(OptionError, r"cache_seqlens: got 297 at 0; expected 0 to 296", cache_seqlens=numpy.array([297, 0], "int32"))
    padded = CacheCall((5,)).arrays()
    with pytest.raises(OptionError, match="max_seqlen_q: got 5; expected None without cu_seqlens_q"):
        cuflash.attention_with_kvcache(**padded, max_seqlen_q=5)
