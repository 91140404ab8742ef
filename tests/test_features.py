"""Score features and masks: each alone and in pairs, forward and all gradients against the reference, and what a user relies on around them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy
import pytest
from conftest import ELEMENTS, Target, rounded
from problems import num_prepared

import cuflash
from cuflash import reference
from cuflash.cli.sample_features import ALONE, others_than
from cuflash.cli.samples import Sample
from cuflash.errors import OptionError

pytestmark = pytest.mark.small_tiles

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
for name in others_than(*FEATURES):
    FEATURES[name] = ALONE[name].arguments(Sample(B, SQ, SKV, H, HK))
PAIRS = [
    pair for pair in itertools.combinations(FEATURES, 2) if pair not in {("boolean_mask", "additive_mask"), ("causal", "bottom_right")}
]
NOT_DRAWN = [("softcap", "bottom_right"), ("alibi", "additive_mask"), ("alibi", "segments")]
"""Pairs that no call of the ordinary run of test_random_configurations.py has; the others are tested here with `--exhaustive`."""


def inputs_of(
    target: Target, dtype: str, head_dim: int = 32, seqlens: tuple[int, int] = (SQ, SKV), head_dim_v: int | None = None
) -> list[Any]:
    shapes = [(B, seqlens[0], H, head_dim), (B, seqlens[1], HK, head_dim), (B, seqlens[1], HK, head_dim_v or head_dim)]
    return [target.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]


def placed(target: Target, options: dict[str, Any]) -> dict[str, Any]:
    return {name: target.place(option) if isinstance(option, numpy.ndarray) else option for name, option in options.items()}


# --- Each alone, and in pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(11)
@pytest.mark.parametrize("dtype", ["half", "float32"])
@pytest.mark.parametrize("feature", FEATURES)
def test_alone(target: Target, feature: str, dtype: str) -> None:
    inputs = inputs_of(target, target.half if dtype == "half" else dtype)
    target.check(*inputs, enable_gqa=True, **placed(target, FEATURES[feature]))


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, id="-".join(pair), marks=[] if pair in NOT_DRAWN else [pytest.mark.exhaustive]) for pair in PAIRS]
)
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


@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dim", [8, 72, 128, 256])
@pytest.mark.parametrize("feature", ["softcap", "boolean_mask", "additive_mask", "dropout"])
def test_other_head_dims(simulator: Target, feature: str, head_dim: int) -> None:
    """Above 128, dK and dV are made by a kernel each, which have to draw the same numbers."""
    simulator.check(*inputs_of(simulator, "float16", head_dim), enable_gqa=True, **FEATURES[feature])


# --- Attention masks ----------------------------------------------------------------------------------------------------------------------

MASK_SHAPES = [
    (B, H, SQ, SKV),
    (SQ, SKV),
    (SKV,),
    (B, 1, 1, SKV),
    (1, H, SQ, 1),
    (B, 1, SQ, 1),
    (H, 1, SKV),
    (1,),
    (1, 1, 1, 1),
    (B, H, 1, 1),
]


@pytest.mark.sample(10)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bool", "float16", "bfloat16", "float32"])
def test_masks_of_all_shapes_and_types(simulator: Target, dtype: str, shape: tuple[int, ...]) -> None:
    """Whatever the query's type is; the gradient of an additive mask has the mask's shape and is summed over the other axes."""
    mask = boolean_mask(*shape) if dtype == "bool" else additive_mask(*shape, dtype=dtype)
    results = simulator.check(*inputs_of(simulator, "bfloat16"), enable_gqa=True, attn_mask=mask)
    assert (results.grad_attn_mask is None) == (dtype == "bool")
    if dtype != "bool":
        assert results.grad_attn_mask.shape == shape


def strided(mask: Any, view: str) -> Any:
    """The same mask in other strides."""
    if view == "expanded":
        return numpy.broadcast_to(mask[:1, :1], (B, H, SQ, SKV))
    if view == "last_stride_0":
        return numpy.broadcast_to(mask[..., :1], mask.shape)
    if view == "transposed":
        return numpy.ascontiguousarray(mask.swapaxes(-1, -2)).swapaxes(-1, -2)
    if view == "reversed":
        return numpy.ascontiguousarray(mask[..., ::-1, ::-1])[..., ::-1, ::-1]
    buffer = numpy.zeros(mask.size + 1, mask.dtype)  # "unaligned"
    buffer[1:] = mask.reshape(-1)
    return buffer[1:].reshape(mask.shape)


@pytest.mark.sample(3)
@pytest.mark.parametrize("view", ["expanded", "last_stride_0", "transposed", "reversed", "unaligned"])
@pytest.mark.parametrize("dtype", ["bool", "float16"])
def test_masks_are_read_by_stride(target: Target, dtype: str, view: str) -> None:
    """The same bits as a contiguous copy of the mask gives."""
    mask = boolean_mask(B, H, SQ, SKV) if dtype == "bool" else additive_mask(B, H, SQ, SKV, dtype=dtype)
    moved = strided(mask, view)
    inputs = inputs_of(target, target.half)
    got = target.run(*inputs, enable_gqa=True, attn_mask=target.place(moved))
    want = target.run(*inputs, enable_gqa=True, attn_mask=target.place(numpy.ascontiguousarray(moved)))
    assert got.bits() == want.bits()


@pytest.mark.sample(2)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seqlens", [(64, 64), (70, 66), (33, 98)], ids=str)
@pytest.mark.parametrize("dtype", ["bool", "float16", "float32"])
def test_masks_that_are_read_in_pairs_of_keys(simulator: Target, dtype: str, seqlens: tuple[int, int], is_causal: bool) -> None:
    """Keys that are neighbours in memory are read two at a time, those of the other view one by one: right, and the same bits."""
    mask = boolean_mask(*seqlens) if dtype == "bool" else additive_mask(*seqlens, dtype=dtype)
    inputs = inputs_of(simulator, "bfloat16", seqlens=seqlens)
    simulator.check(*inputs, enable_gqa=True, attn_mask=mask, is_causal=is_causal)
    got = simulator.run(*inputs, enable_gqa=True, attn_mask=mask, is_causal=is_causal)
    want = simulator.run(*inputs, enable_gqa=True, attn_mask=strided(mask, "reversed"), is_causal=is_causal)
    assert got.bits() == want.bits()


COPIED_MASKS: list[tuple[str, tuple[int, ...], Any]] = [
    ("bool", (B, H, 70, 144), {}),
    ("bool", (1, 1, 70, 144), {"is_causal": True}),
    ("bool", (B, 1, 1, 144), {"window": (30, None)}),
    ("float16", (B, 1, 70, 144), {"tile": cuflash.Tile(64, 48, 4, 2)}),
    ("float16", (1, H, 1, 144), {"is_causal": True, "alibi_slopes": numpy.linspace(0.1, 0.5, H).astype(numpy.float32)}),
    ("bfloat16", (70, 144), {"softcap": 2.0}),
    ("bfloat16", (70, 144), {"segment_ids_q": segment_ids(70), "segment_ids_kv": segment_ids(144)}),
    ("float32", (B, H, 70, 144), {"tile": cuflash.Tile(32, 64, 2, 3)}),
    ("float32", (H, 70, 144), {"sinks": numpy.linspace(-1, 3, H).astype(numpy.float32)}),
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("dtype", "shape", "others"), COPIED_MASKS, ids=lambda value: "_".join(value) if isinstance(value, dict) else str(value)
)
def test_masks_that_are_copied_in_chunks(simulator: Target, dtype: str, shape: tuple[int, ...], others: dict[str, Any]) -> None:
    """Rows that start on 16 bytes pass through shared memory, the last tiles of queries and keys not full; others have a kernel of their own."""
    mask = boolean_mask(*shape) if dtype == "bool" else additive_mask(*shape, dtype=dtype)
    inputs = inputs_of(simulator, "float16", seqlens=(70, 144))
    options = {"enable_gqa": True, **others}
    for chunks, given in ((True, mask), (False, strided(mask, "unaligned"))):
        plan = cuflash.plan(*inputs, attn_mask=given, **options)
        assert f"COPIES_MASK = {str(chunks).lower()};" in plan.kernels[-1].config
        simulator.check(*inputs, attn_mask=given, backward=False, **options)


@pytest.mark.parametrize("tile", [(64, 48, 4, 2), (48, 16, 1, 2)], ids=str)
def test_warps_copy_rows_of_a_mask_for_themselves_alone(simulator: Target, tile: tuple[int, ...]) -> None:
    """An odd number of chunks in a row leaves more lanes than a warp has rows: the others raced with the next warp, or wrote into the next stage."""
    inputs = inputs_of(simulator, "float16", seqlens=(70, 144))
    simulator.check(*inputs, attn_mask=boolean_mask(70, 144), tile=cuflash.Tile(*tile), backward=False, enable_gqa=True)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["bool", "float16", "float32"])
def test_mask_of_width_43_from_an_odd_address(target: Target, dtype: str) -> None:
    mask = boolean_mask(37, 43) if dtype == "bool" else additive_mask(37, 43, dtype=dtype)
    buffer = numpy.zeros(37 * 43 + 3, mask.dtype)
    buffer[3:] = mask.reshape(-1)
    target.check(*inputs_of(target, target.half, seqlens=(37, 43)), enable_gqa=True, attn_mask=target.place(buffer[3:].reshape(37, 43)))


def test_a_mask_far_apart(target: Target) -> None:
    """Strides beyond 32 bits; nothing between the elements is touched."""
    mask = additive_mask(1, 1, 2, 11, dtype="float16")
    far = target.place_far(mask, (0, 0, 2**31 + 7, 5), 2**31 + 100)
    inputs = [target.random((1, length, 1, 32), target.half, seed) for seed, length in enumerate((2, 11, 11))]
    out = cuflash.scaled_dot_product_attention(*inputs, attn_mask=far)
    want, _ = reference.attention(*inputs, attn_mask=mask)
    numpy.testing.assert_allclose(target.host(out), want, atol=0.02)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_mask_wider_than_65536(simulator: Target, kind: str) -> None:
    """Only the last few keys are visible."""
    visible = numpy.arange(65600) > 65536
    mask = visible if kind == "boolean" else numpy.where(visible, numpy.float32(1), -numpy.inf).astype(numpy.float32)
    inputs = [simulator.random((1, length, 1, 16), "float16", seed) for seed, length in enumerate((2, 65600, 65600))]
    simulator.check(*inputs, attn_mask=mask, backward=False)


def masked_rows(kind: str) -> dict[str, Any]:
    """Options that hide all keys from queries 3 and 4."""
    visible = boolean_mask(SQ, SKV, share=0.9)
    visible[3:5] = False
    visible[:, 0] |= True
    visible[3:5] = False
    if kind == "boolean":
        return {"attn_mask": visible}
    if kind == "additive":
        return {"attn_mask": numpy.where(visible, numpy.float32(0.5), -numpy.inf).astype(numpy.float32)}
    ids = numpy.zeros((B, SQ), numpy.int32)
    ids[:, 3:5] = -1
    return {"segment_ids_q": ids, "segment_ids_kv": numpy.zeros((B, SKV), numpy.int32)}


@pytest.mark.sample(2)
@pytest.mark.parametrize("others", [{}, {"is_causal": True}, {"softcap": 5.0}, {"dropout_p": 0.5, "dropout_seed": 3}], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive", "segments"])
def test_rows_that_see_nothing(simulator: Target, kind: str, others: dict[str, Any]) -> None:
    """O is 0, LSE is -inf, and no gradient comes from them or goes to them."""
    results = simulator.check(*inputs_of(simulator, "bfloat16"), enable_gqa=True, **masked_rows(kind), **others)
    assert results.grads is not None
    assert not simulator.host(results.out)[:, 3:5].any()
    assert numpy.isneginf(simulator.host(results.lse)[:, :, 3:5]).all()
    assert not simulator.host(results.grads[0])[:, 3:5].any()
    if kind == "additive":
        assert not results.grad_attn_mask[3:5].any()


def test_nothing_is_visible_at_all(target: Target) -> None:
    results = target.check(*inputs_of(target, target.half), enable_gqa=True, attn_mask=target.place(numpy.zeros((SQ, SKV), bool)))
    assert results.grads is not None
    assert not any(target.host(x).any() for x in (results.out, *results.grads))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_most_negative_number_is_finite(simulator: Target, dtype: str) -> None:
    """A common stand-in for -inf hides a key beside others. In a row that has nothing else it is a score like any other: the mean of V, and no NaN."""
    import ml_dtypes

    lowest = ml_dtypes.finfo(ELEMENTS[dtype]).min
    mask = numpy.where(boolean_mask(SQ, SKV), 0, lowest).astype(ELEMENTS[dtype])
    mask[:, 0] = 0
    simulator.check(*inputs_of(simulator, "bfloat16"), enable_gqa=True, attn_mask=mask)
    mask[3] = lowest
    query, key, value = inputs_of(simulator, "bfloat16")
    results = simulator.check(query, key, value, enable_gqa=True, attn_mask=mask)
    if dtype != "float16":  # in which the scores still count beside -65504
        mean = simulator.host(value).mean(axis=1).repeat(H // HK, axis=1)
        numpy.testing.assert_allclose(simulator.host(results.out)[:, 3], mean, atol=0.01)


def test_boolean_and_causal_is_the_intersection(target: Target) -> None:
    mask = boolean_mask(SQ, SKV)
    inputs = inputs_of(target, target.half)
    both = target.run(*inputs, enable_gqa=True, attn_mask=target.place(mask), is_causal=True)
    joined = target.run(*inputs, enable_gqa=True, attn_mask=target.place(mask & numpy.tri(SQ, SKV, dtype=bool)))
    assert numpy.array_equal(target.host(both.out), target.host(joined.out))


def test_without_the_flag_there_is_no_gradient_of_the_mask(simulator: Target) -> None:
    query, key, value = inputs_of(simulator, "bfloat16")
    options = {"attn_mask": additive_mask(SQ, SKV), "enable_gqa": True}
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True, **options)
    grads = cuflash.scaled_dot_product_attention_backward(out, query, key, value, out, lse, **options)
    assert grads.attn_mask is None
    assert len(grads) == 3


# --- Dropout ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, (2**63, 2**64 - 1), (3, -7)], ids=str)
@pytest.mark.parametrize("dropout_p", [1e-12, 0.1, 0.5, 1.0])
def test_dropout_mask_is_philox_bit_for_bit(target: Target, dropout_p: float, seed: Any) -> None:
    like = target.random((1, 1, 1, 8), target.half, 0)
    got = target.as_numpy(cuflash.dropout_mask((2, 3, 37, 43), dropout_p, seed, like=like))
    assert got.dtype == numpy.bool_
    pair = seed if isinstance(seed, tuple) else (seed, 0)
    for b in range(2):
        for h in range(3):
            assert numpy.array_equal(got[b, h], reference_mask((b, h), (37, 43), dropout_p, pair))


def reference_mask(at: tuple[int, int], lengths: tuple[int, int], dropout_p: float, pair: tuple[int, int]) -> Any:
    from cuflash.reference.features import dropout_mask

    return dropout_mask(at, lengths, dropout_p, pair)


def test_philox_of_the_paper() -> None:
    """Known answers of Philox 4x32-7 from the Random123 distribution."""
    from cuflash.reference.features import philox

    assert [int(word) for word in philox((0, 0, 0, 0), (0, 0))] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = 0xFFFFFFFF
    assert [int(word) for word in philox((ones,) * 4, (ones, ones))] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


def test_dropout_draws_the_share_that_it_should(simulator: Target) -> None:
    kept = cuflash.dropout_mask((4, 4, 128, 128), 0.3, 11, like=simulator.random((1, 1, 1, 8), "float16", 0))
    count = kept.size
    assert abs(kept.mean() - 0.7) < 5 * math.sqrt(0.21 / count)
    flat = kept.reshape(16, -1).astype(float)
    assert abs(numpy.corrcoef(flat)[numpy.triu_indices(16, 1)]).max() < 0.05, "heads draw independently"


def test_dropout_is_the_same_for_all_tiles(simulator: Target) -> None:
    """An identity as V makes the dropped probabilities visible: what is 0 is what `dropout_mask` says."""
    query, key = (simulator.random((1, 64, 1, 64), "float32", seed) for seed in (1, 2))
    value = numpy.eye(64, dtype=numpy.float32).reshape(1, 64, 1, 64)
    kept = cuflash.dropout_mask((1, 1, 64, 64), 0.4, 5, like=query)
    for tile in (cuflash.Tile(16, 16, 1, 1), cuflash.Tile(32, 48, 1, 2), cuflash.Tile(64, 32, 4, 2)):
        out = cuflash.scaled_dot_product_attention(query, key, value, dropout_p=0.4, dropout_seed=5, tile=tile)
        assert numpy.array_equal(out[0, :, 0] != 0, kept[0, 0])


@pytest.mark.parametrize("tile", [cuflash.Tile(32, 16, 1, 1), cuflash.Tile(48, 64, 2, 2)], ids=str)
def test_gradients_with_dropout_for_all_tiles(simulator: Target, tile: cuflash.Tile) -> None:
    """The backward kernels draw for transposed tiles, and in tiles of their own."""
    simulator.check(*inputs_of(simulator, "bfloat16"), enable_gqa=True, dropout_p=0.4, dropout_seed=5, backward_tile=tile)


def test_dropout_seed_on_the_device(target: Target) -> None:
    """Two words that a replayed graph finds changed give another mask; the same numbers as an int or a pair give the same bits."""
    inputs = inputs_of(target, target.half)
    for dtype in (numpy.int64, numpy.uint64):
        state = target.place(numpy.array([77, 3], dtype))
        on_device = target.run(*inputs, enable_gqa=True, dropout_p=0.3, dropout_seed=state)
        assert on_device.bits() == target.run(*inputs, enable_gqa=True, dropout_p=0.3, dropout_seed=(77, 3)).bits()
        state[1] += 1
        changed = target.run(*inputs, enable_gqa=True, dropout_p=0.3, dropout_seed=state)
        assert changed.bits() == target.run(*inputs, enable_gqa=True, dropout_p=0.3, dropout_seed=(77, 4)).bits()
        assert changed.bits() != on_device.bits()
        got = target.as_numpy(cuflash.dropout_mask((B, H, SQ, SKV), 0.3, state, like=inputs[0]))
        assert numpy.array_equal(got[1, 2], reference_mask((1, 2), (SQ, SKV), 0.3, (77, 4)))


def test_segments_and_slopes_of_one_row_are_those_of_all(target: Target) -> None:
    inputs = inputs_of(target, target.half)
    one = {
        "segment_ids_q": segment_ids(SQ)[:1],
        "segment_ids_kv": segment_ids(SKV)[:1],
        "alibi_slopes": numpy.linspace(0.1, 1, H, dtype="float32")[None],
    }
    all_rows = {name: numpy.repeat(x, B, axis=0) for name, x in one.items()}
    results = [target.run(*inputs, enable_gqa=True, **placed(target, options)).bits() for options in (one, all_rows)]
    assert results[0] == results[1]
    target.check(*inputs, enable_gqa=True, **placed(target, all_rows))


def test_a_seed_without_dropout_is_not_looked_at(simulator: Target) -> None:
    """So that evaluation differs from training in dropout_p only."""
    inputs = inputs_of(simulator, simulator.half)
    without = simulator.run(*inputs, enable_gqa=True).bits()
    assert simulator.run(*inputs, enable_gqa=True, dropout_p=0.0, dropout_seed=7).bits() == without


def test_seeds_do_not_make_new_calls(simulator: Target) -> None:
    """What is kept of a call does not depend on the seed."""

    inputs = inputs_of(simulator, "bfloat16")
    cuflash.scaled_dot_product_attention(*inputs, enable_gqa=True, dropout_p=0.25, dropout_seed=1)
    before = num_prepared()
    outs = {
        simulator.bits(cuflash.scaled_dot_product_attention(*inputs, enable_gqa=True, dropout_p=0.25, dropout_seed=seed))
        for seed in range(5)
    }
    assert num_prepared() == before
    assert len(outs) == 5


def test_lse_is_that_of_all_probabilities(target: Target) -> None:
    inputs = inputs_of(target, target.half)
    dropped = target.run(*inputs, enable_gqa=True, dropout_p=0.9, dropout_seed=1, backward=False)
    assert target.bits(dropped.lse) == target.bits(target.run(*inputs, enable_gqa=True, backward=False).lse)


def test_everything_dropped(target: Target) -> None:
    results = target.check(*inputs_of(target, target.half), enable_gqa=True, dropout_p=1.0, dropout_seed=1, grad_lse=None)
    assert results.grads is not None
    assert not any(target.host(x).any() for x in (results.out, *results.grads))


# --- Windows, softcap, ALiBi, sinks, prefixes ---------------------------------------------------------------------------------------------


@pytest.mark.sample(8)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("window", [(0, 0), (None, 0), (3, None), (-1, 70), (500, 500), (0, None), (33, 1), (2**40, 2)], ids=str)
@pytest.mark.parametrize("seqlens", [(70, 200), (200, 70), (1, 130), (130, 1)], ids=str)
def test_windows(simulator: Target, seqlens: tuple[int, int], window: Any, alignment: str) -> None:
    for is_causal in (False, True):
        simulator.check(
            *inputs_of(simulator, "bfloat16", seqlens=seqlens),
            enable_gqa=True,
            window=window,
            causal_alignment=alignment,
            is_causal=is_causal,
        )


def test_an_unlimited_window_is_none(simulator: Target) -> None:
    inputs = inputs_of(simulator, "bfloat16")
    for window in [(None, None), (-1, -1), [None, -1]]:
        assert "window" not in cuflash.plan(*inputs, enable_gqa=True, window=window).describe()


@pytest.mark.parametrize("scale", [0.0, -0.3, 100.0], ids="scale={}".format)
@pytest.mark.parametrize("softcap", [0.5, 30.0, 63.0, 175.0, 1e4])
def test_softcap(target: Target, softcap: float, scale: float) -> None:
    target.check(*inputs_of(target, target.half), enable_gqa=True, softcap=softcap, scale=scale)


def test_softcap_of_enormous_scores(target: Target) -> None:
    """Scores of 10¹⁰ come out as ±softcap, and gradients as 0, not NaN."""
    query, key, value = inputs_of(target, "float32")
    target.check(query * numpy.float32(1e5), key * numpy.float32(1e5), value, enable_gqa=True, softcap=5.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("softcap", [5.0, 88.0])
def test_softcap_of_enormous_scores_in_quotients(simulator: Target, softcap: float, dtype: str) -> None:
    """Of 16 bits, in rows of which some have such scores beside others, some alone, and some none."""
    query, key, value = inputs_of(simulator, dtype, seqlens=(64, 96))
    query[:, :20] *= numpy.asarray(1e4, query.dtype)
    query[:, 10:20] = numpy.abs(query[:, 10:20])
    key[:, ::3] = numpy.abs(key[:, ::3]) * numpy.asarray(1e4, key.dtype)
    key[:, 1] = 0
    for scale in (1.0, -1.0):
        options = {"enable_gqa": True, "softcap": softcap, "scale": scale}
        simulator.check(query, key, value, **options, tile=cuflash.Tile(64, 32, 4, 1), backward=False)


def test_softcap_of_the_largest_factor(simulator: Target) -> None:
    """Kernels take scale / softcap times 2 log2(e), which has to be finite: a product of 0 is a score of 0."""
    query, key, value = inputs_of(simulator, "bfloat16", seqlens=(64, 96))
    query[:, ::2] = 0
    options = {"enable_gqa": True, "softcap": 2.0**-100, "tile": cuflash.Tile(64, 32, 4, 1)}
    out = cuflash.scaled_dot_product_attention(query, key, value, scale=2.0**26, **options)
    assert numpy.isfinite(out.astype("float32")).all()
    with pytest.raises(OptionError, match=r"scale / softcap"):
        cuflash.scaled_dot_product_attention(query, key, value, scale=2.0**27, **options)


@pytest.mark.parametrize("scale", [-0.3, 100.0], ids="scale={}".format)
def test_softcap_of_tiles_without_hidden_pairs(simulator: Target, scale: float) -> None:
    """Exponents are quotients, of which enormous scores would make NaN; later tiles raise references."""
    inputs = inputs_of(simulator, "bfloat16", seqlens=(64, 96))
    simulator.check(*inputs, enable_gqa=True, softcap=2.0, scale=scale, tile=cuflash.Tile(64, 32, 4, 1), backward=False)


WARPS_OF_32_ROWS = cuflash.Tile(32, 64, 2, 2)
"""Of the backward pass, for keys and, the other way round, for queries: their kernels share divisions and mix draws with products."""


@pytest.mark.parametrize("options", [{"softcap": 2.0, "scale": 100.0}, {"softcap": 175.0, "is_causal": True}], ids=str)
def test_gradients_of_capped_scores_by_warps_of_32_rows(simulator: Target, options: dict[str, Any]) -> None:
    """In tiles without hidden pairs, in others, and of caps for which the quick tanh is not good enough."""
    inputs = inputs_of(simulator, "bfloat16", seqlens=(64, 160))
    plan = cuflash.plan(*inputs, enable_gqa=True, **options, backward=True, tile=WARPS_OF_32_ROWS)
    assert {kernel.name for kernel in plan.kernels} >= {"backward_dkdv", "backward_dq"}
    simulator.check(*inputs, enable_gqa=True, **options, backward_tile=WARPS_OF_32_ROWS)


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"dropout_p": 0.4, "dropout_seed": 5}], ids=str)
def test_a_nan_in_a_query_reaches_the_gradients_that_it_should(simulator: Target, options: dict[str, Any]) -> None:
    """Its own, those of the keys that it sees, where dropout leaves the pair out, too, as 0 times NaN is NaN, and none of other queries."""
    query, key, value = (x.copy() for x in inputs_of(simulator, "float16", seqlens=(96, 96)))
    grad = query.copy()
    query[:, 40, :, 3] = numpy.nan
    options |= {"is_causal": True, "enable_gqa": True}
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True, **options)
    grads = cuflash.scaled_dot_product_attention_backward(grad, query, key, value, out, lse, **options, tile=WARPS_OF_32_ROWS)
    is_nan = [numpy.isnan(x.astype("float32")) for x in grads]
    rows = numpy.arange(96)
    assert numpy.array_equal(is_nan[0].any(axis=(0, 2, 3)), rows == 40)
    assert is_nan[1][:, :41].all()
    assert numpy.array_equal(is_nan[2].any(axis=-1), numpy.broadcast_to(rows[:, None] < 41, (B, 96, HK)))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi(target: Target, per_batch: bool, alignment: str) -> None:
    slopes = random(1).random((B, H) if per_batch else (H,), dtype=numpy.float32)
    target.check(*inputs_of(target, "float32"), enable_gqa=True, alibi_slopes=target.place(slopes), causal_alignment=alignment)


@pytest.mark.parametrize("seqlen_kv", [0, 1, 90])
def test_sinks_of_rows_without_keys(target: Target, seqlen_kv: int) -> None:
    """Where nothing else is visible the sink is all there is: O is 0, LSE is the sink."""
    sinks = numpy.array([-numpy.inf, -2.0, 0.0, 40.0], numpy.float32)
    options: dict[str, Any] = {"sinks": target.place(sinks), "is_causal": True, "causal_alignment": "bottom_right", "enable_gqa": True}
    results = target.check(*inputs_of(target, target.half, seqlens=(120, seqlen_kv)), **options)
    lse = target.host(results.lse)[:, :, : 120 - seqlen_kv]
    assert numpy.array_equal(lse, numpy.broadcast_to(sinks[None, :, None], lse.shape))
    assert not target.host(results.out)[:, : 120 - seqlen_kv].any()


@pytest.mark.parametrize("lengths", [(0, 0), (1, 90), (33, 64), (-5, 1000)], ids=str)
def test_prefixes(target: Target, lengths: tuple[int, int]) -> None:
    target.check(
        *inputs_of(target, target.half), enable_gqa=True, is_causal=True, prefix_lengths=target.place(numpy.array(lengths, numpy.int32))
    )


@pytest.mark.parametrize("others", [{}, FEATURES["segments"]], ids=["alone", "segments"])
def test_prefixes_of_some_sequences_reach_keys_that_others_do_not_see(target: Target, others: dict[str, Any]) -> None:
    """In a window, which ends the walk over queries: the first sequence alone would leave out tiles of keys altogether."""
    options = {"is_causal": True, "prefix_lengths": numpy.array([0, 85], numpy.int32), "window": (89, 92), **others}
    target.check(
        *(x[:, :n] for x, n in zip(inputs_of(target, target.half), (16, SKV, SKV), strict=True)),
        enable_gqa=True,
        **placed(target, options | ({"segment_ids_q": segment_ids(SQ)[:, :16]} if others else {})),
    )


def test_segments_in_any_order(target: Target) -> None:
    """Ids need not be sorted, and may be strided."""
    ids = [random(seed).integers(-3, 3, (B, 2 * n)).astype(numpy.int32)[:, ::2] for seed, n in ((1, SQ), (2, SKV))]
    target.check(*inputs_of(target, target.half), enable_gqa=True, segment_ids_q=target.place(ids[0]), segment_ids_kv=target.place(ids[1]))


# --- Determinism and work -----------------------------------------------------------------------------------------------------------------


def test_the_same_bits_on_every_run(simulator: Target) -> None:
    options = FEATURES["additive_mask"] | FEATURES["dropout"] | FEATURES["sinks"] | FEATURES["segments"] | {"deterministic": True}
    inputs, runs = inputs_of(simulator, "bfloat16"), set()
    for seed in range(12):
        with simulator.schedule(seed):
            runs.add(simulator.run(*inputs, enable_gqa=True, **options).bits())
    assert len(runs) == 1
