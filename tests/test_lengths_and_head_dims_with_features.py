"""Score features and masks where sequences have lengths of their own, and with head dimensions that are wide or differ."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from conftest import Target
from test_features import FEATURES, SKV, SQ, H, additive_mask, boolean_mask, inputs_of, placed
from test_sequences import offsets, packed

import cuflash
from cuflash import Tile
from cuflash.errors import OptionError
from cuflash.reference.features import dropout_mask

ALIGNMENTS = pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
LENGTHS = [37, SKV]
"""Keys of the two rows of a batch: the last tile of the first one is not full, and the one after it is empty."""
LENGTHS_Q, LENGTHS_KV = [40, 0, 70, 33], [60, 20, 37, 0]
PACKED = {name: options for name, options in FEATURES.items() if name not in ("boolean_mask", "additive_mask", "segments", "prefix")}


# --- Head dimensions ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("dims", [(24, 40), (72, 33)], ids=str)
@pytest.mark.parametrize("feature", ["softcap", "boolean_mask", "additive_mask", "dropout", "sinks"])
def test_value_with_a_head_dim_of_its_own(simulator: Target, feature: str, dims: tuple[int, int]) -> None:
    simulator.check(*inputs_of(simulator, "bfloat16", dims[0], head_dim_v=dims[1]), enable_gqa=True, **FEATURES[feature])


WIDE = [("sm_80", "float16", 320, 272), ("sm_80", "float32", 40, 264), ("sm_75", "float16", 272, 16)]


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", WIDE, ids=str)
@pytest.mark.parametrize("feature", ["window", "softcap", "alibi", "boolean_mask", "additive_mask", "dropout", "sinks"])
def test_wide_heads(case: tuple[str, str, int, int], feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of warps add their parts of the scores up before anything else happens to them."""
    arch, dtype, head_dim, head_dim_v = case
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", arch)
    target = Target(arch)
    inputs = inputs_of(target, dtype, head_dim, (20, 37), head_dim_v)
    options = dict(FEATURES[feature])
    if "attn_mask" in options:
        options["attn_mask"] = boolean_mask(20, 37) if feature == "boolean_mask" else additive_mask(H, 20, 37)
    target.check(*inputs, enable_gqa=True, **options)


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", [(1, 37), (20, 1), (1, 1)], ids=str)
def test_wide_heads_that_pass_through_shared_memory_in_steps(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on sm_75: not even the smallest tiles fit. Everything at once, with a mask whose gradient is summed over queries, keys, or both."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_75")
    target = Target("sm_75")
    inputs = inputs_of(target, "float32", 520, (20, 37), 264)
    assert all("SLICE_PIECES = 1;" not in kernel.config for kernel in cuflash.plan(*inputs, enable_gqa=True).kernels)
    together = {**FEATURES["window"], **FEATURES["softcap"], **FEATURES["dropout"], **FEATURES["sinks"]}
    target.check(*inputs, enable_gqa=True, attn_mask=additive_mask(*shape), **together)


# --- Rows with numbers of keys of their own -----------------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@ALIGNMENTS
@pytest.mark.parametrize("feature", FEATURES)
def test_rows_with_their_own_numbers_of_keys(simulator: Target, feature: str, alignment: str) -> None:
    """Windows, ALiBi and the causal diagonal are those of the row; NaN behind its last key changes nothing."""
    query, key, value = inputs_of(simulator, "bfloat16")
    key[0, LENGTHS[0] :], value[0, LENGTHS[0] :] = numpy.nan, numpy.inf
    options = {"causal_alignment": alignment, **FEATURES[feature]}
    results = simulator.check(query, key, value, enable_gqa=True, seqlens_kv=numpy.array(LENGTHS, numpy.int32), **options)
    assert results.grads is not None
    for grad in results.grads[1:]:
        assert not simulator.host(grad)[0, LENGTHS[0] :].any()


@pytest.mark.sample(1)
@pytest.mark.parametrize("feature", ["window", "boolean_mask", "additive_mask", "segments", "sinks", "dropout"])
def test_rows_without_keys(simulator: Target, feature: str) -> None:
    lengths = numpy.array([0, 65], numpy.int32)
    results = simulator.check(*inputs_of(simulator, "bfloat16"), enable_gqa=True, seqlens_kv=lengths, is_causal=True, **FEATURES[feature])
    assert not simulator.host(results.out)[0].any()


def test_a_shared_key_of_which_rows_see_different_parts(simulator: Target) -> None:
    """dK and dV add up over rows whose walks start and end elsewhere; the prefix of the second row lifts the diagonal for keys the first does not see."""
    query = simulator.random((2, 40, 4, 32), "bfloat16", 1)
    key, value = (simulator.random((1, 130, 1, 32), "bfloat16", seed) for seed in (2, 3))
    for options in (
        {"window": (10, 3), "seqlens_kv": numpy.array([30, 130], numpy.int32)},
        {"window": (None, 100), "is_causal": True, "prefix_lengths": numpy.array([0, 120], numpy.int32)},
        {"attn_mask": boolean_mask(2, 1, 40, 130), "seqlens_kv": numpy.array([130, 3], numpy.int32)},
    ):
        simulator.check(query, key, value, causal_alignment="bottom_right", **options)


# --- Packed sequences ---------------------------------------------------------------------------------------------------------------------


def of_packed(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a batch as options of as many sequences as there are."""
    own = dict(options)
    if "prefix_lengths" in own:
        own["prefix_lengths"] = numpy.array([10, 0, 35, 3], numpy.int32)
    return own


@pytest.mark.sample(2)
@ALIGNMENTS
@pytest.mark.parametrize("feature", [*PACKED, "prefix"])
def test_packed_sequences(simulator: Target, feature: str, alignment: str) -> None:
    inputs = packed(simulator, (sum(LENGTHS_Q), sum(LENGTHS_KV)), "bfloat16", (32, 24), heads=(4, 2))
    cu = offsets(simulator, LENGTHS_Q), offsets(simulator, LENGTHS_KV)
    simulator.check_packed(inputs, cu, (70, 60), enable_gqa=True, **{"causal_alignment": alignment, **of_packed(FEATURES[feature])})


def test_packed_sequences_with_everything(target: Target) -> None:
    together: dict[str, Any] = {"is_causal": True, "prefix_lengths": numpy.array([10, 0, 35, 3], numpy.int32)}
    for name in ("window", "softcap", "dropout", "sinks"):
        together |= FEATURES[name]
    together["alibi_slopes"] = (
        numpy.random.default_rng(0).uniform(0, 0.3, (4, 4)).astype(numpy.float32)
    )  # a slope for each sequence and head
    inputs = packed(target, (sum(LENGTHS_Q) + 5, sum(LENGTHS_KV) + 9), target.half, (72, 40), heads=(4, 2))
    cu = offsets(target, LENGTHS_Q), offsets(target, LENGTHS_KV)
    target.check_packed(inputs, cu, enable_gqa=True, **placed(target, together))


def test_packed_sequences_of_wide_heads(simulator: Target) -> None:
    together = {**FEATURES["window"], **FEATURES["softcap"], **FEATURES["dropout"], **FEATURES["sinks"]}
    inputs = packed(simulator, (30, 50), "float16", (272, 264))
    sinks = {"sinks": numpy.array([0.5, 1.0], numpy.float32)}
    simulator.check_packed(inputs, (offsets(simulator, [10, 20]), offsets(simulator, [33, 17])), **together | sinks)


def test_dropout_counts_positions_in_the_sequence(simulator: Target) -> None:
    """Sequence i draws what row i of a padded batch draws, which `dropout_mask` gives."""
    seed = {"dropout_p": 0.4, "dropout_seed": 11}
    query, key = numpy.zeros((SQ + 20, 1, 16), numpy.float16), numpy.zeros((SKV + 30, 1, 16), numpy.float16)
    value = numpy.zeros((SKV + 30, 1, SKV), numpy.float16)
    value[30 : 30 + SKV, 0] = numpy.eye(SKV)  # out of the second sequence is its matrix of probabilities
    cu = offsets(simulator, [20, SQ]), offsets(simulator, [30, SKV])
    out = cuflash.varlen_attention(query, key, value, *cu, **seed)
    kept = simulator.host(out)[20:, 0] != 0
    assert (kept == numpy.asarray(cuflash.dropout_mask((2, 1, SQ, SKV), 0.4, 11, like=query))[1, 0]).all()
    assert (kept == dropout_mask((1, 0), (SQ, SKV), 0.4, (11, 0))).all()


def test_packed_sequences_take_no_mask(simulator: Target) -> None:
    query, key, value, grad_out = packed(simulator, (10, 10), "float16")
    cu = offsets(simulator, [10]), offsets(simulator, [10])
    out, lse = cuflash.varlen_attention(query, key, value, *cu, return_lse=True)
    for call in (
        lambda mask: cuflash.varlen_attention(query, key, value, *cu, attn_mask=mask),
        lambda mask: cuflash.varlen_attention_backward(grad_out, query, key, value, out, lse, *cu, attn_mask=mask),
        lambda mask: cuflash.varlen_plan(query, key, value, *cu, attn_mask=mask),
    ):
        with pytest.raises(OptionError, match="seqlens_kv") as caught:
            call(numpy.ones((10, 10), bool))
        assert caught.value.argument == "attn_mask"


def test_remembered_calls_read_lengths_and_features_anew(simulator: Target) -> None:
    """A kept call sees another seed, and what arrays hold when its kernels run."""
    inputs = packed(simulator, (60, 60), "float16")
    cu, prefix = (offsets(simulator, [40, 20]), offsets(simulator, [20, 40])), numpy.array([3, 5], numpy.int32)
    options: dict[str, Any] = {"is_causal": True, "prefix_lengths": prefix, "dropout_p": 0.3}
    for round_, lengths in enumerate(([40, 20], [33, 27])):
        cu[0][...], prefix[...] = offsets(simulator, lengths), [10 * round_, 5]
        simulator.check_packed(inputs, cu, (60, 60), dropout_seed=round_, **options)


@pytest.mark.parametrize("tile", [Tile(16, 16, 1, 1), Tile(64, 32, 4, 2)], ids=str)
def test_bits_depend_on_no_tile_but_by_rounding(simulator: Target, tile: Tile) -> None:
    """The same dropped elements and hidden keys, whatever the tiles."""
    options = {
        **FEATURES["window"],
        **FEATURES["dropout"],
        "seqlens_kv": numpy.array(LENGTHS, numpy.int32),
        "causal_alignment": "bottom_right",
    }
    simulator.check(*inputs_of(simulator, "float16"), enable_gqa=True, tile=tile, backward_tile=tile.transposed(), **options)
