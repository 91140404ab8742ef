"""Rows whose scores are all huge, as left padding with the most negative number of a type makes them: lse has no bits left for the sum of such a row.

The forward pass, every gradient, and what finding the sums costs where nothing is huge.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy
import pytest
from conftest import ELEMENTS, Target, poisoned, rounded
from test_features import FEATURES, SKV, SQ, B, H, additive_mask, inputs_of, placed

import cuflash
from cuflash import Tile
from cuflash.planning.kernel_plan import LaunchShape
from cuflash.runtime import launch

PADDED = 20
"""Queries that only see padding, in the first row of the batch, and one more in every row."""


def padding_mask(fill: float, dtype: str = "float32", heads: int = 1, seqlens: tuple[int, int] = (SQ, SKV)) -> Any:
    """Ordinary numbers, -inf here and there, and rows that are nothing but `fill`."""
    mask = additive_mask(B, heads, *seqlens, dtype=dtype)
    mask[0, :, :PADDED] = fill
    mask[:, :, seqlens[0] // 2] = fill
    return mask


LOWEST = {dtype: float(ml_dtypes.finfo(ELEMENTS[dtype]).min) for dtype in ELEMENTS}
MASKS = [*((LOWEST[dtype], dtype) for dtype in LOWEST), (-1e9, "float32"), (-1e9, "bfloat16"), (-1e4, "float16"), (1e4, "float32")]


# --- Results ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["half", "float32"])
@pytest.mark.parametrize(("fill", "mask_dtype"), MASKS)
def test_rows_in_which_every_key_is_padding(target: Target, fill: float, mask_dtype: str, dtype: str) -> None:
    """P came out as 1 instead of 1/n, and at the lowest number as 0; rows beside them are ordinary."""
    inputs = inputs_of(target, target.half if dtype == "half" else dtype)
    results = target.check(*inputs, enable_gqa=True, attn_mask=target.place(padding_mask(fill, mask_dtype)))
    lse = target.host(results.lse)
    assert numpy.abs(lse[0, :, :PADDED] / float(rounded(fill, mask_dtype)) - 1).max() < 1e-3
    assert numpy.abs(lse[1, :, :PADDED]).max() < 20


@pytest.mark.parametrize("fill", [-128.0, -1e3, -1e4, -65504.0, -1e6, -1e9, -(2.0**100)])
def test_equal_scores_have_equal_probabilities(target: Target, fill: float) -> None:
    """Queries of zeros: the scores of a row are the same number and P is 1/n, to float32's precision whatever that number is."""
    query, key, value = inputs_of(target, "float32")
    values = target.as_numpy(query).copy()
    values[0, :PADDED] = values[:, SQ // 2] = 0
    mask = padding_mask(fill, heads=H)
    results = target.check(target.place(values), key, value, enable_gqa=True, attn_mask=target.place(mask))
    assert not numpy.isnan(target.host(results.grad_attn_mask)).any()


def test_rows_whose_largest_score_passes_128(target: Target) -> None:
    """There the forward kernel leaves one way to exponents for the other: rows that rise or fall through it key by key, some behind keys that they do not see."""
    mask = numpy.zeros((SQ, SKV), numpy.float32)
    mask[0::4] = numpy.linspace(-300, 300, SKV)
    mask[1::4] = numpy.linspace(300, -300, SKV)
    mask[2::4] = numpy.linspace(-127, -129, SKV)
    mask[3::4, : SKV // 2] = -numpy.inf
    mask[7::8, SKV // 2 :] = 130
    target.check(*inputs_of(target, "float16"), enable_gqa=True, attn_mask=target.place(mask), tile={"forward": Tile(64, 16, 4, 1)})


@pytest.mark.parametrize("highest", [60.0, 100.5, -100.5])
def test_references_that_rise_below_128(target: Target, highest: float) -> None:
    """Scores that are the mask's numbers, and rise from tile to tile of float32: keys of an earlier reference weigh as much as they should beside the others."""
    _, key, value = inputs_of(target, "float32")
    steps = numpy.sort(numpy.random.default_rng(6).integers(0, 600, (SQ, SKV)))[:, ::-1]
    mask = (highest - steps / 256).astype(numpy.float32)
    query = target.place(numpy.zeros((B, SQ, H, 32), numpy.float32))
    target.check(query, key, value, enable_gqa=True, attn_mask=target.place(mask), tile={"forward": Tile(64, 16, 4, 1)})


@pytest.mark.parametrize("dtype", ["half", "float32"])
def test_padding_beside_scores_that_are_a_little_larger(target: Target, dtype: str) -> None:
    """Twice the padding, where a causal mask of finfo.min / 2 was added to one of its own, or keys that differ by a few units in the last place."""
    mask = padding_mask(-65504.0, heads=H)
    mask[0, :, :PADDED] += numpy.random.default_rng(5).integers(-3, 4, (H, PADDED, SKV)) / 2
    mask[:, :, SQ // 2, ::2] *= 2
    inputs = inputs_of(target, target.half if dtype == "half" else dtype)
    target.check(*inputs, enable_gqa=True, attn_mask=target.place(mask))


def test_gradients_of_padding_flow_through_lse_too(simulator: Target) -> None:
    """The gradient of lse alone is P: whole rows of it sum to 1."""
    inputs = inputs_of(simulator, "float32")
    mask = padding_mask(LOWEST["float32"], heads=H)
    zeros, ones = numpy.zeros((B, SQ, H, 32), numpy.float32), numpy.ones((B, H, SQ), numpy.float32)
    results = simulator.check(*inputs, enable_gqa=True, attn_mask=mask, grad_out=zeros, grad_lse=ones)
    numpy.testing.assert_allclose(results.grad_attn_mask.sum(axis=-1), 1, rtol=1e-5)
    numpy.testing.assert_allclose(results.grad_attn_mask[0, :, :PADDED], 1 / SKV, rtol=1e-5)


# --- With everything else -----------------------------------------------------------------------------------------------------------------

COMBINATIONS: dict[str, dict[str, Any]] = {
    **{name: FEATURES[name] for name in ("window", "softcap", "alibi", "dropout", "sinks", "segments", "prefix", "causal", "bottom_right")},
    "seqlens_kv": {"seqlens_kv": numpy.array([37, SKV], numpy.int32)},
    "seqlens_kv_bottom_right": {"seqlens_kv": numpy.array([37, 60], numpy.int32), "is_causal": True, "causal_alignment": "bottom_right"},
    "sinks_that_are_as_low": {"sinks": numpy.array([-1e9, -2e9, -1e9, -0.5e9], numpy.float32)},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_with_another_feature(simulator: Target, name: str, dtype: str) -> None:
    simulator.check(*inputs_of(simulator, dtype), enable_gqa=True, attn_mask=padding_mask(-1e9), **COMBINATIONS[name])


def test_with_tf32(simulator: Target) -> None:
    """TF32 has 10 mantissa bits, hence errors of 2^-11 of each factor; rows whose P is off are wrong by their length."""
    inputs, mask = inputs_of(simulator, "float32"), padding_mask(-1e9)
    quick, exact = (simulator.run(*inputs, enable_gqa=True, attn_mask=mask, allow_tf32=allow_tf32) for allow_tf32 in (True, False))
    assert quick.grads is not None
    assert exact.grads is not None
    for got, want in zip(quick.grads, exact.grads, strict=True):
        assert numpy.abs(got - want).max() < 2**-8 * numpy.abs(want).max()


def test_with_everything(target: Target) -> None:
    together: dict[str, Any] = {"seqlens_kv": numpy.array([37, SKV], numpy.int32)}
    for name in ("window", "softcap", "alibi", "dropout", "segments", "prefix"):
        together |= FEATURES[name]
    together["sinks"] = numpy.array([-1e9, -2e9, 1, -0.5e9], numpy.float32)
    target.check(*inputs_of(target, target.half), enable_gqa=True, **placed(target, {"attn_mask": padding_mask(-1e9), **together}))


@pytest.mark.parametrize(
    ("shape", "huge"),
    [((SQ, SKV), (slice(0, PADDED),)), ((B, 1, 1, SKV), (0,)), ((1, 1, SQ, 1), (..., slice(0, PADDED), slice(None))), ((1,), (0,))],
    ids=str,
)
def test_masks_of_other_shapes(simulator: Target, shape: tuple[int, ...], huge: Any) -> None:
    """Key padding that hides all keys of a sequence, and masks with one number for a row or for everything."""
    mask = numpy.random.default_rng(4).standard_normal(shape).astype(numpy.float32)
    mask[huge] = LOWEST["float32"]
    simulator.check(*inputs_of(simulator, "bfloat16"), enable_gqa=True, attn_mask=mask)


@pytest.mark.parametrize("of", ["key", "value", "both"])
def test_broadcast_keys(simulator: Target, of: str) -> None:
    query, key, value = inputs_of(simulator, "bfloat16")
    key, value = (x[:1, :, :1] if of in (name, "both") else x for name, x in (("key", key), ("value", value)))
    simulator.check(query, key, value, enable_gqa=True, attn_mask=padding_mask(-1e9))


HEAD_DIMS = [
    ("sm_80", "bfloat16", 128, 128), ("sm_80", "float16", 256, 256), ("sm_90", "bfloat16", 512, 512), ("sm_80", "float32", 288, 72),
    ("sm_80", "float16", 40, 264), ("sm_75", "float16", 520, 520),
]  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", HEAD_DIMS, ids=str)
def test_other_head_dims(case: tuple[str, str, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of their own for dK and dV, slices, and heads that pass through shared memory in steps."""
    arch, dtype, head_dim, head_dim_v = case
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", arch)
    target = Target(arch)
    inputs = inputs_of(target, dtype, head_dim, (40, 50), head_dim_v)
    target.check(*inputs, enable_gqa=True, attn_mask=target.place(padding_mask(-1e9, seqlens=(40, 50))))


@pytest.mark.parametrize("view", ["transposed", "unaligned_base"])
def test_other_strides(target: Target, view: str) -> None:
    inputs = [target.restride(x, view) for x in inputs_of(target, target.half)]
    target.check(*inputs, enable_gqa=True, attn_mask=target.place(padding_mask(-1e9)))


def test_rows_that_see_nothing_beside_padding(simulator: Target) -> None:
    """-inf stays what it is, in the same tiles, and NaN in their gradient of lse goes nowhere."""
    mask = padding_mask(LOWEST["float32"])
    mask[0, :, 5:8] = -numpy.inf
    grad_lse = simulator.random((B, H, SQ), "float32", 3)
    grad_lse[0, :, 5:8] = numpy.nan
    inputs = inputs_of(simulator, "bfloat16")
    results = simulator.run(*inputs, enable_gqa=True, attn_mask=mask, grad_lse=grad_lse)
    assert results.grads is not None
    assert numpy.isneginf(results.lse[0, :, 5:8]).all()
    assert not simulator.host(results.grads[0])[0, 5:8].any()
    grad_lse[0, :, 5:8] = 0
    assert simulator.run(*inputs, enable_gqa=True, attn_mask=mask, grad_lse=grad_lse).bits() == results.bits()


# --- What it costs ------------------------------------------------------------------------------------------------------------------------


def test_only_blocks_with_huge_rows_compute_anything(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 64 rows for each of 8 heads; a block multiplies Q Kᵀ only where one of its rows is huge."""
    counted: dict[str, int] = {}

    def launch_and_count(self: Any, shape: LaunchShape, arguments: Any, stream: int, buffers: Any) -> None:
        counters = self._module.launch((shape.num_blocks, 1, 1), (shape.num_threads, 1, 1), shape.shared_bytes, bytes(arguments), buffers)
        counted[self._module.name] = counters.matrix_instructions

    monkeypatch.setattr(launch._SimulatorExecutable, "launch", launch_and_count)

    def multiplied(mask: Any) -> int:
        tile = {"backward_row_sums": Tile(64, 32, 4, 2)}
        simulator.run(*inputs_of(simulator, "bfloat16"), enable_gqa=True, attn_mask=mask, backward_tile=tile)
        return counted["backward_row_sums_mma"]

    mask = additive_mask(B, H, SQ, SKV)
    assert multiplied(mask) == 0
    mask[1, 2, 67] = -1e9
    of_a_block = multiplied(mask)
    mask[1, 3] = -1e9
    assert multiplied(mask) == 3 * of_a_block > 0


def test_a_row_does_not_depend_on_its_neighbours(simulator: Target) -> None:
    """An ordinary row gives the same bits whether a huge one is in its block or not, and a huge one whatever the tile."""
    inputs, mask = inputs_of(simulator, "bfloat16"), additive_mask(B, H, SQ, SKV)
    alone = simulator.run(*inputs, enable_gqa=True, attn_mask=mask)
    mask[0, 0, 30] = -1e9
    beside = simulator.run(*inputs, enable_gqa=True, attn_mask=mask)
    assert alone.grads is not None
    assert beside.grads is not None
    rows = numpy.arange(SQ) != 30
    assert simulator.bits(alone.grads[0][0, rows]) == simulator.bits(beside.grads[0][0, rows])
    in_other_tiles = simulator.run(*inputs, enable_gqa=True, attn_mask=mask, backward_tile={"backward_row_sums": Tile(16, 48, 1, 3)})
    numpy.testing.assert_allclose(simulator.host(in_other_tiles.grads[0]), simulator.host(beside.grads[0]), rtol=0.01, atol=1e-6)  # type: ignore[index]


def test_only_additive_masks_launch_the_kernel() -> None:
    query = numpy.zeros((1, 64, 2, 32), numpy.float16)
    for options, launched in (
        ({}, False),
        ({"attn_mask": numpy.ones((64, 64), bool)}, False),
        ({"softcap": 2.0}, False),
        ({"attn_mask": numpy.ones((64, 64), numpy.float16)}, True),
    ):
        plan = cuflash.plan(query, query, query, backward=True, **options)
        assert ("backward_row_sums" in [kernel.name for kernel in plan.kernels]) == launched
        assert sum(buffer.nbytes for buffer in plan.workspace if buffer.dtype == "float32") == (12 if launched else 8) * 64 * 2
        assert "backward_row_sums" not in [kernel.name for kernel in cuflash.plan(query, query, query, **options).kernels]


def test_what_the_kernel_does_not_write_is_not_read(simulator: Target) -> None:
    """Keys behind the diagonal are NaN, and so is everything around the inputs."""
    query, key, value = (simulator.restride(x, "sliced") for x in inputs_of(simulator, "bfloat16", seqlens=(SQ, 2 * SQ)))
    for x in (key, value):
        x[:, SQ:] = poisoned((), x)
    simulator.check(query, key, value, enable_gqa=True, is_causal=True, attn_mask=padding_mask(-1e9, seqlens=(SQ, 2 * SQ)))
