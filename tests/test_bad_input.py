"""Bad calls: each is answered by one error that names the argument, what came, what was expected and the way out."""

from __future__ import annotations

import inspect
import math
import pickle
import random
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import numpy
import pytest
from problems import checked

import cuflash
from cuflash.arrays.borrowing import bfloat16, borrow
from cuflash.errors import ArgumentError, CuflashError, DeviceError, DTypeError, KeywordError, OptionError, ShapeError, UnsupportedError
from cuflash.problem import other_names
from cuflash.problem.checks import check_backward, check_out, make_problem
from cuflash.problem.features import FEATURE_OF
from cuflash.problem.options import Options
from cuflash.problem.problem import BackwardViews, Problem

B, SQ, SKV, H, D = 2, 6, 10, 4, 8


def zeros(*shape: int, dtype: Any = numpy.float16) -> Any:
    return numpy.zeros(shape, dtype)


def valid() -> dict[str, Any]:
    return {"query": zeros(B, SQ, H, D), "key": zeros(B, SKV, H, D), "value": zeros(B, SKV, H, D)}


def forward(call: dict[str, Any]) -> Problem:
    """The checks of the public call."""
    options = {name: option for name, option in call.items() if name not in ("query", "key", "value", "out")}
    inputs = {name: borrow(call[name], name) for name in ("query", "key", "value")}
    problem = checked(**{name: call[name] for name in inputs}, **options)
    if "out" in call:
        check_out(problem, borrow(call["out"], "out"), inputs)
    return problem


def valid_backward() -> dict[str, Any]:
    return {**valid(), "grad_out": zeros(B, SQ, H, D), "out": zeros(B, SQ, H, D), "lse": zeros(B, H, SQ, dtype="float32")}


def backward(call: dict[str, Any]) -> BackwardViews:
    """The checks of the public backward call."""
    problem = forward({name: argument for name, argument in call.items() if name not in ("grad_out", "out", "lse", "grad_lse")})
    others = {name: borrow(call[name], name) for name in ("grad_out", "out", "lse")}
    grad_lse = borrow(call["grad_lse"], "grad_lse") if "grad_lse" in call else None
    return check_backward(problem, **others, grad_lse=grad_lse)


def error_of(call: dict[str, Any], check: Callable[[dict[str, Any]], object] = forward) -> ArgumentError:
    with pytest.raises(ArgumentError) as caught:
        check(call)
    error = caught.value
    assert error.argument
    assert error.got
    assert error.expected
    assert error.hint
    assert "\n" not in str(error)
    return error


# --- Each check and its message ---------------------------------------------------------------------------------------------------------

OPTION_CASES: list[tuple[dict[str, Any], type[ArgumentError], str, str, str, str]] = [
    ({"dropout_p": 0.1}, OptionError, "dropout_seed", "None with dropout_p > 0", "an int, a pair", "the same one to the backward pass"),
    ({"dropout_p": 1.5}, OptionError, "dropout_p", "1.5", "from 0.0 to 1.0", "evaluation"),
    ({"dropout_p": math.nan}, OptionError, "dropout_p", "nan", "from 0.0 to 1.0", "evaluation"),
    ({"dropout_p": None}, OptionError, "dropout_p", "None", "from 0.0 to 1.0", "evaluation"),
    ({"is_causal": 1}, OptionError, "is_causal", "1", "True or False", "is_causal=True"),
    ({"is_causal": "no"}, OptionError, "is_causal", "'no'", "True or False", "is_causal=False"),
    ({"enable_gqa": None}, OptionError, "enable_gqa", "None", "True or False", "enable_gqa=True"),
    ({"return_lse": 0}, OptionError, "return_lse", "0", "True or False", "return_lse=True"),
    ({"deterministic": []}, OptionError, "deterministic", "an object of type list", "True or False", "deterministic=True"),
    ({"allow_tf32": 1.0}, OptionError, "allow_tf32", "1.0", "True or False", "allow_tf32=True"),
    ({"batch_first": "yes"}, OptionError, "batch_first", "'yes'", "True or False", "batch_first=True"),
    ({"scale": True}, OptionError, "scale", "True", "a finite float", "head_dim ** -0.5"),
    ({"scale": 1j}, OptionError, "scale", "1j", "a finite float", "head_dim ** -0.5"),
    ({"scale": "0.1"}, OptionError, "scale", "'0.1'", "a finite float", "float(scale)"),
    ({"scale": Decimal("0.1")}, OptionError, "scale", "Decimal", "a finite float", "float(scale)"),
    ({"scale": zeros(1)}, OptionError, "scale", "numpy.ndarray", "a finite float", "float(scale)"),
    ({"scale": math.nan}, OptionError, "scale", "nan", "a finite float", "head_dim"),
    ({"scale": -math.inf}, OptionError, "scale", "-inf", "a finite float", "head_dim"),
    ({"scale": 1e300}, OptionError, "scale", "1e+300", "2**127", "head_dim"),
    ({"scale": 10**400}, OptionError, "scale", "1000", "2**127", "head_dim"),
    ({"scale": 10**5000}, OptionError, "scale", "an enormous int", "2**127", "head_dim"),
    ({"scale": numpy.float16("nan")}, OptionError, "scale", "nan", "a finite float", "head_dim"),
    ({"layout": "bhs"}, OptionError, "layout", "'bhs'", "the letters b, s, h, d", "h the heads"),
    ({"layout": "BHSD"}, OptionError, "layout", "'BHSD'", "the letters b, s, h, d", "layout='bhsd'"),
    ({"layout": None}, OptionError, "layout", "None", "the letters b, s, h, d", "h the heads"),
    ({"layout": "bhsd", "batch_first": False}, OptionError, "batch_first", "layout='bhsd'", "one of the two", "leave batch_first out"),
    ({"num_heads": 0}, OptionError, "num_heads", "0", "a positive int", "heads of the query"),
    ({"num_heads": True}, OptionError, "num_heads", "True", "a positive int", "heads of the query"),
    ({"num_heads": 4.0}, OptionError, "num_heads", "4.0", "a positive int", "heads of the query"),
    ({"num_heads": 3}, OptionError, "num_heads", "3", "4, the heads in query's shape (2, 6, 4, 8)", "3 dimensions"),
    (
        {"causal_alignment": "bottom"},
        OptionError,
        "causal_alignment",
        "'bottom'",
        "'top_left' or 'bottom_right'",
        "the last query sees all keys",
    ),
    ({"causal_alignment": 1}, OptionError, "causal_alignment", "1", "'top_left' or 'bottom_right'", "same for equal lengths"),
]

ARRAY_CASES: list[tuple[dict[str, Any], type[ArgumentError], str, str, str, str]] = [
    # element types
    (
        {"query": zeros(B, SQ, H, D, dtype="float64")},
        DTypeError,
        "query",
        "float64",
        "float16, bfloat16 or float32",
        "query.astype(numpy.float32)",
    ),
    (
        {"value": zeros(B, SKV, H, D, dtype="int32")},
        DTypeError,
        "value",
        "int32",
        "float16, bfloat16 or float32",
        "value.astype(numpy.float32)",
    ),
    ({"key": zeros(B, SKV, H, D, dtype="uint16")}, DTypeError, "key", "uint16", "bfloat16", "cuflash.bfloat16(key)"),
    ({"key": zeros(B, SKV, H, D, dtype="float32")}, DTypeError, "key", "float32", "float16, like query", "key.astype(numpy.float16)"),
    (
        {"value": bfloat16(zeros(B, SKV, H, D, dtype="uint16"))},
        DTypeError,
        "value",
        "bfloat16",
        "float16, like query",
        "value.astype(numpy.float16)",
    ),
    (
        {"query": bfloat16(zeros(B, SQ, H, D, dtype="uint16"))},
        DTypeError,
        "key",
        "float16",
        "bfloat16, like query",
        "key.astype(ml_dtypes.bfloat16)",
    ),
    # ranks
    (
        {"query": zeros(SQ, D)},
        ShapeError,
        "query",
        "2 dimensions, (6, 8)",
        "4 dimensions (batch, seqlen, heads, head_dim)",
        "x[None, :, None, :]",
    ),
    ({"key": zeros(B, SKV, 3, H, D)}, ShapeError, "key", "5 dimensions", "4 dimensions", "qkv[:, :, 0]"),
    ({"key": zeros()}, ShapeError, "key", "0 dimensions", "4 dimensions", "Reshape"),
    ({"value": zeros(B, SKV, H * D)}, ShapeError, "value", "3 dimensions, (2, 10, 32)", "4 dimensions, like query", "same form"),
    # head_dim
    ({"query": zeros(B, SQ, H, 0)}, ShapeError, "query", "head_dim 0", "from 1 to 576", "layout="),
    ({"query": zeros(B, SQ, H, 577)}, UnsupportedError, "query", "head_dim 577", "at most 576", "layout="),
    ({"key": zeros(B, SKV, H, 9)}, ShapeError, "key", "head_dim 9 in (2, 10, 4, 9)", "head_dim 8, like query with (2, 6, 4, 8)", "layout="),
    ({"value": zeros(B, SKV, H, 577)}, UnsupportedError, "value", "head_dim 577", "at most 576", "layout="),
    ({"value": zeros(B, SKV, H, 0)}, ShapeError, "value", "head_dim 0", "from 1 to 576", "layout="),
    # batches
    ({"key": zeros(3, SKV, H, D)}, ShapeError, "key", "batch 3 in (3, 10, 4, 8)", "batch 2, like query with (2, 6, 4, 8), or 1", "layout="),
    ({"query": zeros(1, SQ, H, D)}, ShapeError, "key", "batch 2", "batch 1", "expand query to batch 2"),
    # heads
    ({"key": zeros(B, SKV, 2, D), "value": zeros(B, SKV, 2, D)}, ShapeError, "key", "2 heads", "4 heads, like query", "enable_gqa=True"),
    ({"value": zeros(B, SKV, 2, D)}, ShapeError, "value", "2 heads in (2, 10, 2, 8)", "4 heads", "2 query heads per key head"),
    ({"key": zeros(B, SKV, 3, D), "enable_gqa": True}, ShapeError, "key", "3 heads", "or a divisor of 4", "layout="),
    ({"key": zeros(B, SKV, 8, D)}, ShapeError, "key", "8 heads", "4 heads", "layout="),
    ({"key": zeros(B, SKV, 0, D)}, ShapeError, "key", "0 heads", "4 heads", "layout="),
    ({"value": zeros(B, SKV, 2, D), "enable_gqa": True}, ShapeError, "value", "2 heads", "4 heads, like key", "come in pairs"),
    # lengths
    (
        {"value": zeros(B, SQ, H, D)},
        ShapeError,
        "value",
        "seqlen 6 in (2, 6, 4, 8)",
        "seqlen 10, like key with (2, 10, 4, 8)",
        "one value for each key",
    ),
    # three dimensions
    (
        {"query": zeros(B, SQ, 32), "key": zeros(B, SKV, 32), "value": zeros(B, SKV, 32), "num_heads": 5},
        ShapeError,
        "query",
        "num_heads=5",
        "divisible by 5",
        "consists of",
    ),
    (
        {"query": zeros(B, SQ, 32), "key": zeros(B, SKV, 30), "value": zeros(B, SKV, 32), "num_heads": 4},
        ShapeError,
        "key",
        "(2, 10, 30)",
        "multiple of 8",
        "num_heads=",
    ),
    (
        {"query": zeros(B, SQ, 32), "key": zeros(B, SKV, 16), "value": zeros(B, SKV, 16), "num_heads": 4},
        ShapeError,
        "key",
        "2 heads",
        "4 heads",
        "enable_gqa=True",
    ),
    (
        {"query": zeros(B, SQ, 32), "key": zeros(B, SKV, 64), "value": zeros(B, SKV, 64), "num_heads": 4},
        ShapeError,
        "key",
        "8 heads",
        "4 heads",
        "num_heads=",
    ),
    (
        {"query": zeros(B, SQ, 1024), "key": zeros(B, SKV, 1024), "value": zeros(B, SKV, 1024), "num_heads": 1},
        UnsupportedError,
        "query",
        "head_dim 1024",
        "at most 576",
        "num_heads= says",
    ),
    (
        {"query": zeros(40, H, D), "key": zeros(40, H, D), "value": zeros(40, H, D)},
        OptionError,
        "num_heads",
        "None with a query of 3 dimensions, (40, 4, 8)",
        "the heads in (batch, seqlen, heads * head_dim)",
        "call varlen_attention if they are packed sequences, (tokens, heads, head_dim)",
    ),
    # score features and masks
    (
        {"attn_mask": zeros(B, SQ, SKV)},
        ShapeError,
        "attn_mask",
        "(2, 6, 10)",
        "(batch, heads, seqlen_q, seqlen_kv)",
        "heads: mask[:, None].",
    ),
    ({"attn_mask": zeros(B, SKV)}, ShapeError, "attn_mask", "(2, 10)", "= (2, 4, 6, 10)", "mask[:, None, None, :]"),
    ({"attn_mask": zeros(3, SQ, SKV)}, ShapeError, "attn_mask", "(3, 6, 10)", "= (2, 4, 6, 10)", "mask[:, None, None, :]"),
    ({"window": 128}, OptionError, "window", "128", "a pair (left, right)", "window=(127, 0)"),
    ({"window": (128, -2)}, OptionError, "window", "(128, -2)", "ints from 0 on, with None or -1 for no limit", "window=(127, 0)"),
    ({"window": (1,)}, OptionError, "window", "a tuple of 1: (1,)", "a pair (left, right)", "window=(127, 0)"),
    ({"softcap": -30.0}, OptionError, "softcap", "-30.0", "a positive float below 2**126, or None", "Leave it out for no cap"),
    ({"alibi_slopes": [0.5] * H}, DTypeError, "alibi_slopes", "list", "a NumPy array", "numpy.asarray(x, dtype=numpy.float32)"),
    (
        {"segment_ids_q": zeros(SQ, dtype="int32"), "segment_ids_kv": zeros(1, SKV, dtype="int32")},
        ShapeError,
        "segment_ids_q",
        "shape (6,)",
        "(2, 6) or (1, 6)",
        "a batch of 1 is broadcast",
    ),
    (
        {"query": zeros(B, SQ, 32), "key": zeros(B, SKV, 32), "value": zeros(B, SKV, 32), "layout": "bhsd"},
        OptionError,
        "layout",
        "'bhsd'",
        "3 dimensions",
        "Leave layout out",
    ),
    # no arrays
    ({"query": None}, DTypeError, "query", "None", "a NumPy array", "Pass an array"),
    ({"value": [[1.0]]}, DTypeError, "value", "list", "a NumPy array", "numpy.asarray(x, dtype=numpy.float32)"),
    # outputs
    ({"out": zeros(B, SKV, H, D)}, ShapeError, "out", "shape (2, 10, 4, 8)", "(2, 6, 4, 8), the shape of the output", "form of query"),
    ({"out": zeros(B, SQ, H, D, dtype="float32")}, DTypeError, "out", "float32", "float16, like query", "Pass an array of that type."),
    ({"out": numpy.broadcast_to(zeros(1), (B, SQ, H, D))}, ArgumentError, "out", "read-only", "may be written", "writable"),
]


@pytest.mark.parametrize(("changes", "kind", "argument", "got", "expected", "hint"), OPTION_CASES + ARRAY_CASES)
def test_message(changes: dict[str, Any], kind: type[ArgumentError], argument: str, got: str, expected: str, hint: str) -> None:
    forward(valid())
    error = error_of({**valid(), **changes})
    assert type(error) is kind
    assert error.argument == argument
    assert got in error.got
    assert expected in error.expected
    assert hint in error.hint
    assert isinstance(error, (CuflashError, ValueError))


def test_extents_beyond_32_bits() -> None:
    x = numpy.broadcast_to(zeros(1, 1, 1, D), (1, 2**31, 1, D))
    error = error_of({**valid(), "query": x})
    assert type(error) is UnsupportedError
    assert str(2**31 - 2**13) in error.expected


def test_strides_between_elements_are_refused() -> None:
    record = numpy.zeros((B, SQ, H, D), numpy.dtype([("a", "f2"), ("b", "i1")]))
    assert error_of({**valid(), "query": record["a"]}).argument == "query"


def test_options_come_before_shapes() -> None:
    assert error_of({"query": zeros(3), "key": zeros(3), "value": zeros(3), "layout": "bhs"}).argument == "layout"


def test_element_types_come_before_shapes() -> None:
    assert error_of({**valid(), "key": zeros(3, dtype="float64")}).got == "float64"


# --- Names of arguments --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "keyword", "expected", "hint"),
    [
        ("scaled_dot_product_attention", "softmax_scale", "scale", "head_dim ** -0.5"),
        ("scaled_dot_product_attention", "window_size", "window", "-1 for no limit"),
        ("scaled_dot_product_attention", "causal", "is_causal and causal_alignment", "bottom_right"),
        ("scaled_dot_product_attention", "key_padding_mask", "attn_mask", "~key_padding_mask[:, None, None, :]"),
        ("scaled_dot_product_attention", "return_attn_probs", "return_lse", "(out, lse)"),
        ("scaled_dot_product_attention", "block_table", "no such argument here", "attention_with_kvcache"),
        ("scaled_dot_product_attention", "cu_seqlens_k", "no such argument here", "cu_seqlens_kv is an argument of varlen_attention,"),
        ("scaled_dot_product_attention", "need_attn_mask_grad", "no such argument here", "scaled_dot_product_attention_backward"),
        ("scaled_dot_product_attention_backward", "dout", "grad_out", "first argument"),
        ("scaled_dot_product_attention_backward", "return_lse", "no such argument here", "return_lse is an argument of "),
        ("varlen_attention", "cu_seqlens_k", "cu_seqlens_kv", "offsets"),
        ("varlen_attention", "max_seqlen_k", "max_seqlen_kv", "int"),
        ("varlen_attention", "segment_ids", "no such argument for packed sequences", "offsets of its own"),
        ("varlen_attention", "segment_ids_q", "no such argument for packed sequences", "offsets of its own"),
        ("varlen_attention", "cache_seqlens", "no such argument here", "cu_seqlens_kv"),
        ("varlen_attention_backward", "dropout", "dropout_p and dropout_seed", "the same one in the backward call"),
        ("scaled_dot_product_attention", "descale_q", "no such argument", "FP8"),
        ("scaled_dot_product_attention", "head_mask", "no such argument", "Multiply out"),
        ("scaled_dot_product_attention", "num_splits", "no such argument here", "attention_with_kvcache"),
        ("scaled_dot_product_attention", "pack_gqa", "tile", "cuflash.legal_tiles"),
        ("scaled_dot_product_attention", "rotary_cos", "no such argument here", "rotate them before"),
        ("scaled_dot_product_attention", "k_cache", "no such argument here", "seqlens_kv"),
        ("kvcache_plan", "k_cache", "key_cache and value_cache", "pages"),
        ("scaled_dot_product_attention", "leftpad_k", "no such argument here", "boolean attn_mask"),
        ("scaled_dot_product_attention", "qkv", "query and key and value", "strided views"),
        ("scaled_dot_product_attention", "position_bias", "attn_mask", "added to the scores"),
        ("scaled_dot_product_attention", "escale_k", "one of its arguments", "help(cuflash.scaled_dot_product_attention)"),
        ("scaled_dot_product_attention", "seglens_kv", "seqlens_kv", "help(cuflash.scaled_dot_product_attention)"),
        ("varlen_attention", "seqlens_q", "no such argument for packed sequences", "cu_seqlens_q says how many queries"),
        ("varlen_attention", "query_seq_lengths", "seqused_q", "of packed sequences, those of their places"),
        ("varlen_attention", "key_value_seq_lengths", "seqused_kv", "of packed sequences, those of their places"),
        ("plan", "out", "no such argument here", "out is an argument of "),
        ("plan", "is_casual", "is_causal", "help(cuflash.plan)"),
        ("plan", "xyzzy", "one of its arguments", "help(cuflash.plan)"),
    ],
)
def test_keywords_of_others(function: str, keyword: str, expected: str, hint: str) -> None:
    """Before anything else, so that no required argument under its other name is called missing."""
    with pytest.raises(KeywordError) as caught:
        getattr(cuflash, function)(**{keyword: 1})
    assert isinstance(caught.value, TypeError)
    assert caught.value.argument == keyword
    assert caught.value.got == f"a keyword argument that {function} does not have"
    assert caught.value.expected == expected
    assert hint in caught.value.hint


def test_no_hint_for_packed_sequences_names_what_they_refuse() -> None:
    """But for saying whose argument it is."""
    for row in other_names.OTHER_NAMES:
        with pytest.raises(KeywordError) as caught:
            cuflash.varlen_attention(**{row.names[0]: 1})
        if set(re.findall(r"\w+", caught.value.hint)) & other_names._ONLY_PADDED.keys() - {"layout"}:
            assert "scaled_dot_product_attention" in caught.value.hint


def test_all_keywords_of_others_are_reported_at_once() -> None:
    x = zeros(B, SQ, H, D)
    with pytest.raises(KeywordError) as caught:
        cuflash.scaled_dot_product_attention(x, x, x, softmax_scale=1.0, causal=True, window_size=(-1, -1), xyzzy=1)  # type: ignore[call-arg]
    assert caught.value.argument == "softmax_scale, causal, window_size, xyzzy"
    assert caught.value.got == "keyword arguments that scaled_dot_product_attention does not have"
    assert caught.value.expected == (
        "softmax_scale → scale, causal → is_causal and causal_alignment, window_size → window, xyzzy → one of its arguments"
    )
    for keyword in ("softmax_scale", "causal", "window_size"):
        assert f"{keyword}: {other_names._ROWS[keyword].difference}" in caught.value.hint


@pytest.mark.parametrize(
    ("keyword", "of_warmup", "of_set"),
    [
        ("window", "features: Write features=cuflash.FeatureSet(window=True).", None),
        ("alibi_slopes", "features: Write features=cuflash.FeatureSet(alibi=True).", "alibi: Write cuflash.FeatureSet(alibi=True)."),
        (
            "segment_ids",
            "features: Write features=cuflash.FeatureSet(segments=True).",
            "segments: Write cuflash.FeatureSet(segments=True).",
        ),
        (
            "attn_bias",
            'features: Write features=cuflash.FeatureSet(attn_mask="bool").',
            'attn_mask: Write cuflash.FeatureSet(attn_mask="bool").',
        ),
        ("prefix", "features: Write features=cuflash.FeatureSet(prefix=True).", None),
        ("windows", "one of its arguments: help(cuflash.warmup) lists them.", "window: help(cuflash.FeatureSet) lists them."),
        ("backwards", "backward: help(cuflash.warmup) lists them.", "one of its arguments: help(cuflash.FeatureSet) lists them."),
    ],
)
def test_keywords_that_warmup_and_feature_sets_do_not_have(keyword: str, of_warmup: str, of_set: str | None) -> None:
    for function, answer, arguments in ((cuflash.warmup, of_warmup, (64,)), (cuflash.FeatureSet, of_set, ())):
        if answer is None:
            continue
        with pytest.raises(KeywordError) as caught:
            function(*arguments, **{keyword: True})  # type: ignore[operator]
        assert caught.value.argument == keyword
        assert f"{caught.value.expected}: {caught.value.hint}" == answer


def test_a_feature_set_is_still_a_class_of_values() -> None:
    features = cuflash.FeatureSet("bool", window=True)
    assert list(inspect.signature(cuflash.FeatureSet).parameters) == [field.name for field in fields(features)]
    assert pickle.loads(pickle.dumps(features)) == replace(cuflash.FeatureSet(window=True), attn_mask="bool") == features
    assert hash(features) != hash(cuflash.FeatureSet())


def test_the_features_of_a_call_are_those_of_a_set() -> None:
    assert {*FEATURE_OF.values()} == {field.name for field in fields(cuflash.FeatureSet)}
    assert FEATURE_OF.keys() <= {*other_names._functions["scaled_dot_product_attention"]}


def test_other_names_are_not_ours() -> None:
    ours = {name for names in other_names._functions.values() for name in names}
    for row in other_names.OTHER_NAMES:
        assert not ours.intersection(row.names)
        assert ours.issuperset(row.ours)
        assert row.difference.endswith(".")
    theirs = [name for row in other_names.OTHER_NAMES for name in row.names]
    assert len(theirs) == len(set(theirs))
    assert ours.issuperset(other_names._ONLY_PADDED)


def test_signatures_are_those_of_the_functions() -> None:
    for name in ("scaled_dot_product_attention", "varlen_attention_backward", "plan"):
        function = getattr(cuflash, name)
        assert set(inspect.signature(function).parameters) == set(other_names._functions[name])
        assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
        assert function.__doc__


def test_a_plan_of_the_forward_pass_has_no_mask_gradient() -> None:
    mask = zeros(SQ, SKV)
    assert "backward_mask" in str(cuflash.plan(**valid(), attn_mask=mask, need_attn_mask_grad=True, backward=True))
    with pytest.raises(OptionError) as caught:
        cuflash.plan(**valid(), attn_mask=mask, need_attn_mask_grad=True)
    assert caught.value.argument == "need_attn_mask_grad"
    assert "backward=True" in caught.value.hint
    with pytest.raises(OptionError, match="need_attn_mask_grad: got an object of type"):
        cuflash.plan(**valid(), attn_mask=mask, need_attn_mask_grad=mask)
    with pytest.raises(OptionError, match="backward: got 1; expected True or False"):
        cuflash.plan(**valid(), backward=1)


# --- Arguments as other libraries have them -----------------------------------------------------------------------------------------------


def packed_call(**options: Any) -> Any:
    x, cu = zeros(12, H, D), numpy.array([0, 6, 12], numpy.int32)
    return cuflash.varlen_attention(x, x, x, cu, cu, **options)


def test_positions_of_other_libraries() -> None:
    """flash-attn has dropout_p behind value, or behind max_seqlen_k; xformers has scale in the sixth place."""
    x, cu = zeros(B, SQ, H, D), numpy.array([0, 6], numpy.int32)
    for dropout_p in (0.0, 0.1, 0, numpy.float64(0.1)):
        with pytest.raises(DTypeError) as caught:
            cuflash.scaled_dot_product_attention(x, x, x, dropout_p, None, True)  # type: ignore[arg-type]
        assert caught.value.argument == "attn_mask"
        assert caught.value.hint.startswith("flash-attn has dropout_p in this place")
    with pytest.raises(OptionError) as refused:
        cuflash.varlen_attention(x[0], x[0], x[0], cu, cu, 6, 6, 0.1, None, True)  # type: ignore[arg-type, misc]
    assert refused.value.argument == "is_causal"
    assert "flash-attn has dropout_p" in refused.value.hint
    assert "xformers scale" in refused.value.hint


@pytest.mark.parametrize("mask", [zeros(12, 12), [[True]], "causal", 0.0], ids=["array", "list", "text", "number"])
def test_packed_sequences_refuse_any_mask_at_once(mask: object) -> None:
    """No hint leads to a mask that would be refused next, and no type of ours is named."""
    with pytest.raises(OptionError) as caught:
        packed_call(attn_mask=mask)
    assert caught.value.argument == "attn_mask"
    assert caught.value.expected.startswith("None, since packed sequences")
    assert "cuflash." not in caught.value.got


@pytest.mark.parametrize("keyword", ["attention_mask", "key_padding_mask", "attn_bias", "mask", "position_bias"])
@pytest.mark.parametrize("function", ["varlen_attention", "varlen_attention_backward", "varlen_plan"])
def test_masks_of_others_lead_packed_sequences_to_nothing_that_is_refused(function: str, keyword: str) -> None:
    with pytest.raises(KeywordError) as caught:
        getattr(cuflash, function)(**{keyword: 1})
    assert caught.value.expected == "no such argument for packed sequences"
    assert "cu_seqlens" in caught.value.hint
    assert "attn_mask=" not in caught.value.hint


@pytest.mark.parametrize(
    "seed", [1.5, "1", True, numpy.random.default_rng(), [1, 2], (1, 2, 3), (1.5, 2), object()], ids=lambda seed: type(seed).__name__
)
def test_what_is_no_seed(seed: Any) -> None:
    x = zeros(B, SQ, H, D)
    for call in (
        lambda: cuflash.scaled_dot_product_attention(x, x, x, dropout_p=0.1, dropout_seed=seed),
        lambda: cuflash.dropout_mask((1, 1, 8, 8), 0.1, seed, like=x),
    ):
        with pytest.raises(OptionError) as caught:
            call()
        assert caught.value.argument == "dropout_seed"
        assert caught.value.expected == "an int, a pair (seed, offset), or an array of two (u)int64 on the device"
        assert ("as a tuple" if isinstance(seed, (list, tuple)) else "random.getrandbits(63)") in caught.value.hint
    assert cuflash.plan(x, x, x, dropout_p=0.0, dropout_seed=seed)  # not looked at


@pytest.mark.parametrize("bound", [numpy.array(6), 6.0, numpy.float32(6)], ids=repr)
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_kv"])
def test_a_bound_of_lengths_in_an_array(name: str, bound: Any) -> None:
    with pytest.raises(OptionError) as caught:
        packed_call(**{name: bound})
    assert caught.value.argument == name
    assert caught.value.hint == f"Convert it: {name}=int({name})."
    with pytest.raises(OptionError) as caught:
        packed_call(**{name: -1})
    assert "Leave it out" in caught.value.hint


def test_a_window_in_an_array() -> None:
    x = zeros(B, SQ, H, D)
    assert cuflash.plan(x, x, x, window=numpy.array([3, -1])).problem == cuflash.plan(x, x, x, window=(3, -1)).problem  # type: ignore[arg-type]
    for wrong in (
        numpy.array([3.0, 0.0]),
        numpy.array(3),
        numpy.array([[3, 0], [3, 0]]),
        numpy.array([3, 0, 0]),
        numpy.array([True, False]),
    ):
        with pytest.raises(OptionError, match="window: got"):
            cuflash.plan(x, x, x, window=wrong)  # type: ignore[arg-type]


def test_out_that_overlaps_a_seed() -> None:
    """The argument is named as the caller knows it."""
    x, memory = zeros(B, SQ, H, D), zeros(B, SQ, H, D)
    with pytest.raises(ArgumentError) as caught:
        cuflash.scaled_dot_product_attention(x, x, x, dropout_p=0.1, dropout_seed=memory.ravel()[:8].view(numpy.int64), out=memory)
    assert caught.value.got == "an array that shares memory with dropout_seed"


# --- Swapped layouts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gqa", [False, True])
def test_heads_and_sequence_the_other_way_round(gqa: bool) -> None:
    heads_kv = 2 if gqa else H
    call = {"query": zeros(B, H, SQ, D), "key": zeros(B, heads_kv, SKV, D), "value": zeros(B, heads_kv, SKV, D), "enable_gqa": gqa}
    error = error_of(call)
    assert type(error) is ShapeError
    assert 'layout="bhsd"' in error.hint
    assert "10 heads" in error.got
    forward({**call, "layout": "bhsd"})


def test_the_default_layout_is_proposed_too() -> None:
    error = error_of({**valid(), "layout": "bhsd"})
    assert 'layout="bshd"' in error.hint


def test_no_layout_is_proposed_that_would_not_fit() -> None:
    error = error_of({**valid(), "key": zeros(B, SKV, 5, D), "value": zeros(B, SKV, 5, D)})
    assert "other way round" not in error.hint


# --- out and the backward pass ------------------------------------------------------------------------------------------------------------


def test_out_that_overlaps_itself() -> None:
    x = numpy.lib.stride_tricks.as_strided(zeros(1000), (B, SQ, H, D), (2, 2, 2, 2))
    error = error_of({**valid(), "out": x})
    assert "elements share memory" in error.got
    assert error.argument == "out"


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_out_that_overlaps_an_input(name: str) -> None:
    call = valid()
    call["key"] = call["value"] = zeros(B, SQ, H, D)
    call["value"] = call["value"].copy()
    call["out"] = call[name][:, ::-1]
    error = error_of(call)
    assert error.got == f"an array that shares memory with {name}"
    assert name in error.expected
    assert "leave out= away" in error.hint


@pytest.mark.parametrize(
    ("changes", "kind", "argument", "got", "expected", "hint"),
    [
        ({"grad_out": zeros(B, SKV, H, D)}, ShapeError, "grad_out", "(2, 10, 4, 8)", "(2, 6, 4, 8)", "form of query"),
        ({"grad_out": zeros(B, SQ, H, D, dtype="float32")}, DTypeError, "grad_out", "float32", "float16", "grad_out.astype(numpy.float16)"),
        ({"out": zeros(B, SQ, H)}, ShapeError, "out", "(2, 6, 4)", "(2, 6, 4, 8)", "form of query"),
        ({"lse": zeros(B, H, SQ)}, DTypeError, "lse", "float16", "float32", "lse.astype(numpy.float32)"),
        (
            {"lse": zeros(B, SQ, H, dtype="float32")},
            ShapeError,
            "lse",
            "(2, 6, 4)",
            "(2, 4, 6), which is (batch, heads, seqlen_q)",
            "return_lse=True",
        ),
        ({"lse": None}, DTypeError, "lse", "None", "a NumPy array", "Pass an array"),
        (
            {"out": zeros(B, H, SQ, dtype="float32"), "lse": zeros(B, SQ, H, D)},
            ShapeError,
            "lse",
            f"beside out of {(B, H, SQ)}",
            "no head_dim",
            "out and lse are exchanged",
        ),
        ({"grad_lse": zeros(B, H, SKV, dtype="float32")}, ShapeError, "grad_lse", "(2, 4, 10)", "(2, 4, 6)", "shape of lse"),
        ({"grad_lse": zeros(B, H, SQ, dtype="float64")}, DTypeError, "grad_lse", "float64", "float32", "astype(numpy.float32)"),
    ],
)
def test_backward_message(changes: dict[str, Any], kind: type[ArgumentError], argument: str, got: str, expected: str, hint: str) -> None:
    backward(valid_backward())
    error = error_of({**valid_backward(), **changes}, backward)
    assert type(error) is kind
    assert error.argument == argument
    assert got in error.got
    assert expected in error.expected
    assert hint in error.hint


# --- Libraries and devices --------------------------------------------------------------------------------------------------------------


def test_mixed_libraries() -> None:
    torch = pytest.importorskip("torch")
    error = error_of({**valid(), "key": torch.zeros(B, SKV, H, D, dtype=torch.float16)})
    assert type(error) is DeviceError
    assert error.got == "a torch array, while query is a numpy array"
    assert "numpy.asarray(key)" in error.hint
    error = error_of({**valid(), "query": torch.zeros(B, SQ, H, D, dtype=torch.float16)})
    assert "torch.as_tensor(key)" in error.hint


def test_torch_casts_are_torch_casts() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(B, SQ, H, D)
    assert "query.to(torch.float32)" in error_of({"query": x.double(), "key": x, "value": x}).hint
    assert "key.to(torch.bfloat16)" in error_of({"query": x.bfloat16(), "key": x, "value": x}).hint


def test_torch_out_that_requires_grad() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(B, SQ, H, D)
    error = error_of({"query": x, "key": x, "value": x, "out": torch.zeros(B, SQ, H, D, requires_grad=True)})
    assert "requires grad" in error.got
    assert "out.detach()" in error.hint


def test_torch_meta_tensors() -> None:
    torch = pytest.importorskip("torch")
    error = error_of({**valid(), "query": torch.zeros(B, SQ, H, D, device="meta")})
    assert type(error) is DeviceError
    assert "meta" in error.got


def test_different_gpus() -> None:
    inputs = {name: borrow(x, name) for name, x in valid().items()}
    inputs["key"].device = ("cuda", 1)
    with pytest.raises(DeviceError, match="key: got cuda:1; expected the CPU, like query"):
        make_problem(inputs, Options())


# --- Fuzz -------------------------------------------------------------------------------------------------------------------------------

GARBAGE: list[Any] = [
    None,
    3,
    1.5,
    "x",
    b"x",
    [],
    [[1.0]],
    {},
    (),
    object(),
    print,
    numpy.float32(1),
    numpy.ndarray,
    Ellipsis,
    slice(3),
    range(4),
    1j,
    numpy.dtype("float16"),
]
INPUTS = ("query", "key", "value")
FLAGS = ("is_causal", "enable_gqa", "batch_first", "return_lse", "deterministic", "allow_tf32")


def break_rank(rng: random.Random, call: dict[str, Any]) -> None:
    name = rng.choice(INPUTS)
    x = call[name]
    call[name] = rng.choice([x[0], x[None], x[0, 0], x.ravel(), x[0, 0, 0, 0, ...] if x.ndim == 4 else x[None, None], x[None, None, None]])


def break_extent(rng: random.Random, call: dict[str, Any]) -> None:
    name = rng.choice(INPUTS)
    axes = {"query": (0, 2, 3), "key": (0, 1, 2, 3), "value": (0, 1, 2, 3)}[name]
    shape = list(call[name].shape)
    axis = rng.choice(axes)
    bad = (0, 1000, 2000) if (name, axis) == ("value", 3) else (0, 3, 5, 7, 11, 1000, 2000)  # value has a head_dim of its own
    shape[axis] = rng.choice([n for n in bad if n != shape[axis] and (n or axis > 1)])
    call[name] = numpy.zeros(shape, call[name].dtype)


def break_dtype(rng: random.Random, call: dict[str, Any]) -> None:
    name = rng.choice(INPUTS)
    dtype = rng.choice(["float64", "int8", "int64", "uint16", "bool", "complex64", "object", "S4", "U2", "M8[s]", ">f2", ">f4", "V8"])
    call[name] = numpy.zeros(call[name].shape, dtype)


def mix_dtypes(rng: random.Random, call: dict[str, Any]) -> None:
    name = rng.choice(INPUTS)
    call[name] = call[name].astype("float32" if call[name].dtype == "float16" else "float16")


def break_layout(rng: random.Random, call: dict[str, Any]) -> None:
    call["layout"] = rng.choice(["bhsd", "BSHD", "bshdd", "bsh", "", "bbbb", "dhsb", None, 5, ("b", "s", "h", "d"), b"bshd", "bsḣd"])


def break_flag(rng: random.Random, call: dict[str, Any]) -> None:
    call[rng.choice(FLAGS)] = rng.choice([0, 1, None, "True", 1.0, numpy.array([True]), numpy.int8(1), object()])


def break_scale(rng: random.Random, call: dict[str, Any]) -> None:
    numbers = [
        math.nan,
        math.inf,
        -math.inf,
        1e39,
        -1e300,
        10**400,
        10**5000,
        True,
        numpy.True_,
        numpy.float32("inf"),
        numpy.longdouble("nan"),
    ]
    call["scale"] = rng.choice([*numbers, "1", 1j, numpy.complex64(1), [0.1], numpy.zeros(1), Decimal(1), b"1", object()])


def break_dropout(rng: random.Random, call: dict[str, Any]) -> None:
    call["dropout_seed"] = rng.choice([None, 1])
    call["dropout_p"] = rng.choice([-0.1, 1.1, math.nan, math.inf, None, "0", True, False, 1j, [], 10**400])


def break_other_option(rng: random.Random, call: dict[str, Any]) -> None:
    name, values = rng.choice([
        ("attn_mask", [zeros(SQ, SKV + 1), True, "causal", 0, [], zeros(SQ, SKV, dtype="int32"), zeros(1, B, H, SQ, SKV)]),
        ("window", [(1,), (1, -2), "both", 4, (True, 1), (0.5, 1), (None, "0")]),
        ("softcap", [-1.0, "30", math.inf, math.nan, True, 1e-300]),
        ("alibi_slopes", [zeros(H), zeros(H + 1, dtype="float32"), [0.5] * H]),
        ("sinks", [zeros(H), zeros(B, H, dtype="float32"), 1.0]),
        ("segment_ids_q", [zeros(B, SQ, dtype="int32"), zeros(B, dtype="int32"), 0]),
        ("prefix_lengths", [zeros(B, dtype="int32"), zeros(B, dtype="int64")]),
        ("need_attn_mask_grad", [True, 1, None]),
        ("num_heads", [0, -1, 5, 10**30, True, 2.0, "4", [], numpy.bool_(True), numpy.array(4)]),
        ("causal_alignment", ["", "top", None, 0, ["top_left"], "TOP_LEFT", numpy.array(["top_left", "top_left"])]),
    ])  # fmt: skip
    call[name] = rng.choice(values)


def break_type(rng: random.Random, call: dict[str, Any]) -> None:
    call[rng.choice((*INPUTS, "out"))] = rng.choice(GARBAGE)


def break_out(rng: random.Random, call: dict[str, Any]) -> None:
    x = call["query"]
    overlapping = numpy.lib.stride_tricks.as_strided(x.copy(), x.shape, (0, *x.strides[1:]))
    swapped, tagged = x.astype(x.dtype.newbyteorder()), bfloat16(zeros(*x.shape, dtype="uint16"))
    shapes = [zeros(B, SQ, H, D + 1, dtype=x.dtype), zeros(B, H, SQ, D, dtype=x.dtype), x[0]]
    call["out"] = rng.choice(
        [*shapes, x, x[:, ::-1], x.astype("float64"), numpy.broadcast_to(x[:1], x.shape), overlapping, swapped, tagged]
    )


def break_memory(rng: random.Random, call: dict[str, Any]) -> None:
    name = rng.choice(INPUTS)
    x = call[name]
    wide = numpy.zeros((*x.shape, 3), numpy.uint8).view(numpy.dtype([("x", "u1"), ("y", "u2")]))["y"][..., 0]
    call[name] = rng.choice(
        [numpy.zeros(x.nbytes + 1, numpy.uint8)[1:].view(x.dtype).reshape(x.shape), wide.view("float16"), numpy.ma.masked_array(x)]
    )


def break_library(rng: random.Random, call: dict[str, Any]) -> None:
    torch = sys.modules.get("torch")
    name = rng.choice(INPUTS)
    if torch is None:
        call[name] = rng.choice([memoryview(call[name]), call[name].tolist(), call[name].dtype])
        return
    x = torch.tensor(call[name])
    call[name] = rng.choice([x, x.to("meta"), x.to_sparse(), x.double()])


def break_backward(rng: random.Random, call: dict[str, Any]) -> None:
    name = rng.choice(("grad_out", "out", "lse", "grad_lse"))
    x = zeros(B, H, SQ, dtype="float32") if "lse" in name else call["query"]
    call.update({key: argument for key, argument in valid_backward().items() if key not in call})
    call[name] = rng.choice([x[0], x[..., :-1], x.astype("float64"), x[None], *GARBAGE])


OPTION_BREAKS = [break_layout, break_flag, break_scale, break_dropout, break_other_option]
ARRAY_BREAKS = [break_rank, break_extent, break_dtype, mix_dtypes, break_type, break_out, break_memory, break_library, break_backward]
BREAKS = OPTION_BREAKS + ARRAY_BREAKS
ARGUMENTS = {
    *INPUTS,
    *FLAGS,
    "out",
    "grad_out",
    "lse",
    "grad_lse",
    "layout",
    "scale",
    "dropout_p",
    "dropout_seed",
    "attn_mask",
    "need_attn_mask_grad",
    "window",
    "softcap",
    "alibi_slopes",
    "sinks",
    "segment_ids_q",
    "segment_ids_kv",
    "prefix_lengths",
    "num_heads",
    "causal_alignment",
}


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_bad_calls(seed: int) -> None:
    rng = random.Random(seed)
    for index in range(100):
        call = valid()
        dtype = rng.choice(["float16", "float32"])
        for name in INPUTS:
            call[name] = call[name].astype(dtype)
        # One change of any kind after up to two of other options: changes of arrays could undo each other.
        last = BREAKS[(index + seed) % len(BREAKS)]
        chosen = [*(change for change in rng.sample(OPTION_BREAKS, rng.randint(0, 2)) if change is not last), last]
        for change in chosen:
            change(rng, call)
        print(f"call {index}: {[change.__name__ for change in chosen]}")  # pytest shows the last one if it fails
        error = error_of(call, backward if "grad_out" in call else forward)
        assert error.argument in ARGUMENTS
        assert len(str(error)) < 600


def test_grouped_heads_are_not_taken_for_a_swapped_layout() -> None:
    error = error_of({"query": zeros(2, 64, 8, D), "key": zeros(2, 64, 2, D), "value": zeros(2, 64, 2, D)})
    assert error.argument == "key"
    assert error.hint.startswith("For grouped queries, 4 query heads per key head, pass enable_gqa=True.")


@pytest.mark.parametrize("name", ["out", "lse"])
@pytest.mark.parametrize("wrong", [None, (1, 2)])
def test_backward_says_where_out_and_lse_come_from(name: str, wrong: object) -> None:
    x, lse = zeros(B, SQ, H, D), zeros(B, H, SQ, dtype="float32")
    operands = {"out": x, "lse": lse, name: wrong}
    with pytest.raises(DTypeError) as caught:
        cuflash.scaled_dot_product_attention_backward(x, x, x, x, **operands)
    assert caught.value.argument == name
    assert "return_lse=True" in caught.value.hint
