"""`cascade_attention`: what one call gives, with the keys that all sequences begin with read once."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from caches import CacheCall
from conftest import Target
from test_torch_and_dlpack import Exported

import cuflash
from cuflash import cascade
from cuflash.errors import DTypeError, KeywordError, OptionError, ShapeError

pytest.importorskip("cupy")

PREFIX, PAGE = 64, 16


def call(**options: Any) -> CacheCall:
    """Sequences of which the first four pages are the same."""
    made = CacheCall((64, 90, 200), 2, 2, 6, 2, room=256, page_size=PAGE, options=options)
    for name in ("keys", "values"):
        for rows in made.plain[name]:
            rows[:PREFIX] = made.plain[name][0][:PREFIX]
    return made


def arrays_of(made: CacheCall) -> dict[str, Any]:
    """With the pages of the first sequence's prefix in all rows of the table; those that others had are NaN."""
    given = made.arrays()
    table = given["page_table"]
    for name in ("key_cache", "value_cache"):
        given[name][table[1:, : PREFIX // PAGE].ravel()] = numpy.nan
    table[1:, : PREFIX // PAGE] = table[0, : PREFIX // PAGE]
    return given


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"is_causal": True, "softcap": 3.0, "sinks": numpy.linspace(-1, 2, 6, dtype="float32")}],
    ids=["causal", "sinks"],
)
def test_a_cascade_is_as_exact_as_one_call(options: dict[str, Any], simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = call(**options), []
    attend = cascade.attention_with_kvcache
    monkeypatch.setattr(
        cascade, "attention_with_kvcache", lambda *operands, **more: seen.append(operands[0].shape) or attend(*operands, **more)
    )
    for chosen, shapes in ((True, [(3, 2, 6, 32), (1, 6, 6, 32)]), (False, [(3, 2, 6, 32)])):
        seen.clear()
        given = arrays_of(made)
        out, lse = cuflash.cascade_attention(**given, prefix_length=PREFIX, cascade=chosen, return_lse=True)
        made.check_results(out, lse)
        assert seen == shapes
        row = given["page_table"][2, 200 // PAGE]
        assert Target.bits(given["key_cache"][row, 200 % PAGE]) == Target.bits(made.plain["key"][2, 0]), "appended"


@pytest.mark.parametrize(
    ("seqlen_q", "new", "calls"), [(3, 0, 1), (3, 1, 1), (3, 2, 2), (1, 0, 2)], ids=["no new keys", "one", "two", "one query"]
)
def test_a_causal_mask_that_hides_keys_of_the_prefix(
    seqlen_q: int, new: int, calls: int, simulator: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first queries end within it, there is one call: the one over the prefix has no mask."""
    made, seen = CacheCall((64, 70), seqlen_q, new, 6, 2, room=128, page_size=PAGE, options={"is_causal": True}), []
    for name in ("keys", "values"):
        made.plain[name][1][:PREFIX] = made.plain[name][0][:PREFIX]
    attend = cascade.attention_with_kvcache
    monkeypatch.setattr(
        cascade, "attention_with_kvcache", lambda *operands, **more: seen.append(operands[0].shape) or attend(*operands, **more)
    )
    made.check_results(*cuflash.cascade_attention(**arrays_of(made), prefix_length=PREFIX, cascade=True, return_lse=True))
    assert len(seen) == calls


def test_no_sequences(simulator: Target) -> None:
    given = arrays_of(call())
    empty = {name: given[name][:0] for name in ("query", "key", "value", "cache_seqlens", "page_table")}
    for chosen in (True, False, None):
        assert cuflash.cascade_attention(**given | empty, prefix_length=PREFIX, cascade=chosen).shape == (0, 2, 6, 32)


def test_arrays_of_one_number_are_filled_in_each_call(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of its own stream, which may be captured; nothing that an earlier call has filled is read."""
    fill, made = cascade._filled, []
    monkeypatch.setattr(cascade, "_filled", lambda *given: made.append(fill(*given)) or made[-1])
    for _ in range(2):
        cuflash.cascade_attention(**arrays_of(call()), prefix_length=PREFIX, cascade=True)
    first, second = made
    assert first is not second
    assert not numpy.shares_memory(first, second)


def test_without_a_prefix_it_is_one_call(simulator: Target) -> None:
    made = call(is_causal=True)
    out = cuflash.cascade_attention(**arrays_of(made), prefix_length=0, cascade=True)
    assert Target.bits(out) == Target.bits(cuflash.attention_with_kvcache(**arrays_of(made)))


@pytest.mark.parametrize(
    ("batch", "prefix", "room", "expected"),
    [
        (64, 8192, 9216, True),
        (256, 2048, 4096, True),
        (1, 8192, 9216, False),
        (2, 128, 9216, False),
        (64, 0, 1024, False),
        (4, 16, 512, False),
    ],
)
def test_when_it_pays(batch: int, prefix: int, room: int, expected: bool, simulator: Target) -> None:
    """With many sequences and long prefixes, not with one sequence or short ones; nothing is looked at but shapes."""
    query = numpy.zeros((batch, 1, 8, 128), "float16")
    cache = numpy.zeros((1, 16, 2, 128), "float16")
    lengths, table = numpy.zeros(batch, "int32"), numpy.zeros((batch, room // 16), "int32")
    for _ in range(2):
        assert cascade.pays(query, cache, cache.copy(), cache_seqlens=lengths, page_table=table, prefix_length=prefix) is expected


def test_what_cannot_be_used_is_named(simulator: Target) -> None:
    given = arrays_of(call())
    for wrong in (8, -16, 16 * 17, 2.0, True, None):
        with pytest.raises(OptionError, match=r"prefix_length: got .*expected a multiple of the page size of 16, up to 256"):
            cuflash.cascade_attention(**given, prefix_length=wrong)
    with pytest.raises(OptionError, match="cache_seqlens: got 64 keys; expected at least 80, the prefix_length"):
        cuflash.cascade_attention(**given, prefix_length=80)
    with pytest.raises(ShapeError, match=r"query: got 3 dimensions, \(3, 6, 32\); expected 4"):
        cuflash.cascade_attention(**given | {"query": given["query"][:, 0]}, prefix_length=16)
    with pytest.raises(KeywordError, match="window"):
        cuflash.cascade_attention(**given, prefix_length=16, window=(1, 0))
    for wrong in ("x", 2, 1):
        with pytest.raises(OptionError, match=f"cascade: got {wrong!r}; expected True or False"):
            cuflash.cascade_attention(**given, prefix_length=16, cascade=wrong)
    with pytest.raises(ShapeError, match=r"key: got 3 dimensions, \(3, 2, 32\); expected 4"):
        cuflash.cascade_attention(**given | {"key": given["key"][:, 0]}, prefix_length=16)


def test_arrays_with_nothing_but_dlpack(simulator: Target) -> None:
    """One call takes them; a cascade, which has to cut them, says what it needs."""
    made = call(is_causal=True)
    want = cuflash.cascade_attention(**arrays_of(made), prefix_length=PREFIX, cascade=False)
    names = ("query", "key_cache", "value_cache", "key", "value", "cache_seqlens", "page_table")
    given = arrays_of(made)
    wrapped = given | {name: Exported(given[name]) for name in names}
    for chosen in (False, None):
        out = cuflash.cascade_attention(**wrapped, prefix_length=PREFIX, cascade=chosen)
        assert Target.bits(numpy.from_dlpack(out)) == Target.bits(want)
    for name in ("query", "cache_seqlens", "page_table"):
        with pytest.raises(DTypeError, match=rf"{name}: got an object of type .*Exported; .*sliced.*from_dlpack\({name}\)"):
            cuflash.cascade_attention(**given | {name: Exported(given[name])}, prefix_length=PREFIX, cascade=True)
