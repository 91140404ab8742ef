"""`attention_with_kvcache`: caches of every form, appending, rotary embedding, lengths, splits. What no sequence uses of a cache is NaN and infinity."""

from __future__ import annotations

import pytest
from caches import CacheCall
from conftest import Target

pytest.importorskip("cupy")


def test_smoke(simulator: Target) -> None:
    CacheCall((0, 5, 130, 299)).check(simulator)
    CacheCall((0, 5, 130, 299), seqlen_q=3, options={"is_causal": True}).check(simulator)
    CacheCall((0, 5, 130, 250), seqlen_q=3, new=3, options={"is_causal": True}).check(simulator)
    CacheCall((0, 5, 130, 250), seqlen_q=3, new=3, page_size=16, options={"is_causal": True}).check(simulator)
    CacheCall((0, 5, 130, 250), seqlen_q=3, new=3, page_size=1, options={"is_causal": True}).check(simulator)
    CacheCall((0, 5, 130, 250), seqlen_q=3, new=5, picks_rows=True, leftpad=(0, 2, 70, 10), options={"is_causal": True}).check(simulator)
    CacheCall((0, 5, 130, 250), seqlen_q=3, new=2, rotary_dim=20, interleaved=True, options={"is_causal": True}).check(simulator)
    CacheCall((0, 5, 130, 250), seqlen_q=3, new=2, rotary_dim=32).check(simulator)
