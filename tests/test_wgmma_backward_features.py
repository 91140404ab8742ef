"""The backward kernel of wgmma with score features, masks and lengths that are read on the device."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
from conftest import Target
from test_features import FEATURES
from test_features import inputs_of as featured
from test_lengths_in_places import OFFSETS_KV, OFFSETS_Q
from test_lengths_in_places import given as given_in_places
from test_sequences import int32, offsets, packed, padded
from test_wgmma_backward import KERNELS, NAME, SHORT, WGMMA, WIDE_KERNELS, asked_for, backward_of, checked, plan_of  # noqa: F401 (a fixture)
from test_wgmma_forward import MASKS, hopper, inputs_of, names  # noqa: F401 (a fixture)

import cuflash
from cuflash import Tile
from cuflash.simulator import SimulatorError, check
from cuflash.simulator.options import configure

pytest.importorskip("cupy")


def in_rows_of_16_bytes(mask: Any) -> Any:
    """The same mask, each row of which starts on 16 bytes, with ones between them."""
    padding = [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % 16)]
    filled = numpy.pad(mask, padding, constant_values=1)
    return filled[..., : mask.shape[-1]]


@pytest.mark.sample(1)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    on = Target("sm_90")
    options = dict(FEATURES[feature])
    if "attn_mask" in options:
        options["attn_mask"] = in_rows_of_16_bytes(options["attn_mask"])
    checked(on, *featured(on, "float16" if len(feature) % 2 else "bfloat16", 64), backward_tile=SHORT, **options)


# --- Masks of data ------------------------------------------------------------------------------------------------------------------------

LENGTHS = (150, 400)
RNG = numpy.random.default_rng(3)
IDS_Q = numpy.repeat(numpy.array([[5, 1, 2, 7, 3], [1, 1, 1, 4, 4]], numpy.int32), 30, axis=1)
IDS_KV = numpy.repeat(numpy.array([[1, 6, 2, 3], [4, 8, 8, 1]], numpy.int32), 100, axis=1)
"""Of two sequences: some queries and some keys have ids of nobody else, and tiles between others are hidden."""
BLOCKS = numpy.kron(RNG.random((2, 2, 5, 4)) < 0.4, numpy.ones((30, 100))).astype(bool) & (RNG.random((2, 2, *LENGTHS)) < 0.9)
HIDING: dict[str, dict[str, Any]] = {
    "documents": {"segment_ids_q": IDS_Q, "segment_ids_kv": IDS_KV},
    "causal documents": {"segment_ids_q": IDS_Q, "segment_ids_kv": IDS_KV, "is_causal": True, "causal_alignment": "bottom_right"},
    "mask of each head": {"attn_mask": BLOCKS},
    "mask of all": {"attn_mask": BLOCKS[0, 0], "window": (300, 20)},
    "additive mask of documents": {
        "attn_mask": numpy.linspace(-2, 2, 400, dtype=numpy.float16),
        "segment_ids_q": IDS_Q,
        "segment_ids_kv": IDS_KV,
    },
    "nothing is visible": {"attn_mask": numpy.zeros(LENGTHS, bool)},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", HIDING)
def test_tiles_that_data_hide(case: str) -> None:
    """A wrong place among the blocks that add to a tile of queries is a wrong sum, or a wait without end."""
    on = Target("sm_90")
    checked(on, *inputs_of(on, LENGTHS, heads=(2, 1), batches=(2, 2), dtype="bfloat16"), backward_tile=SHORT, **HIDING[case])


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", HIDING)
@pytest.mark.parametrize("head_dim", [256, 200])
def test_tiles_that_data_hide_in_wide_heads(head_dim: int, case: str, request: pytest.FixtureRequest) -> None:
    """Two kernels, each with a table of its own, since their tiles differ."""
    on = Target("sm_90")
    inputs = inputs_of(on, LENGTHS, head_dim, heads=(2, 1), batches=(2, 2), dtype="bfloat16")
    planned = names(cuflash.plan(*inputs, enable_gqa=True, backward=True, **HIDING[case]))
    assert [name for name in planned if name != "backward_row_sums"] == [
        WIDE_KERNELS[0], "visible_tiles", WIDE_KERNELS[1], "visible_tiles", *WIDE_KERNELS[2:],
    ]  # fmt: skip
    on.check(*inputs, enable_gqa=True, **HIDING[case])
    seeds = range(100 if request.config.getoption("--exhaustive") else 2)
    report = check(backward_of(*inputs, **HIDING[case]), seeds=seeds)
    assert len(report.runs) == 2 + len(seeds)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["bool", "float16", "float32"])
def test_masks_that_start_anywhere(dtype: str) -> None:
    """Rows lie 16 bytes apart, but none starts there: they are copied element by element."""
    on = Target("sm_90")
    values = numpy.random.default_rng(4).standard_normal((70, 208))
    mask = (values > 0 if dtype == "bool" else values.astype(dtype))[:, 1:191]
    checked(on, *inputs_of(on, (70, 190)), attn_mask=mask, backward_tile=SHORT)


KEPT_IN_REGISTERS: dict[str, dict[str, Any]] = {
    "mask of any bytes": {"attn_mask": RNG.choice(numpy.array([0, 1, 2, 128], "uint8"), (200, 272)).view(bool)[:, :270]},
    "documents": {
        "segment_ids_q": numpy.arange(400, dtype="int32").reshape(2, 200) // 41,
        "segment_ids_kv": numpy.arange(540, dtype="int32").reshape(2, 270) // 53,
    },
    "additive mask": {"attn_mask": RNG.standard_normal((200, 272)).astype("float16")[:, :270]},
}


@pytest.mark.parametrize("case", KEPT_IN_REGISTERS)
def test_k_and_v_stay_in_registers_beside_a_feature(case: str) -> None:
    """With the default tile, which leaves room for them."""
    on, options = Target("sm_90"), KEPT_IN_REGISTERS[case]
    inputs = inputs_of(on, (200, 270), heads=(2, 1), batches=(2, 2))
    plan = cuflash.plan(*inputs, enable_gqa=True, backward=True, **options)
    config = next(kernel.config for kernel in plan.kernels if kernel.name == NAME)
    assert " K_REGISTER_STEPS = 4;" in config
    assert " V_REGISTER_STEPS = 4;" in config
    checked(on, *inputs, **options)


def test_masks_whose_rows_lie_anywhere_are_for_others() -> None:
    on = Target("sm_90")
    plan = cuflash.plan(*inputs_of(on, (70, 190)), attn_mask=numpy.ones((70, 190), bool), backward=True)
    assert "not backward_wgmma.cu: rows of attn_mask do not start 16 bytes apart" in plan.choice


def test_prefixes_of_batches_that_share_keys() -> None:
    """One of them lets queries see keys that no query of the other batch sees."""
    on = Target("sm_90")
    inputs = inputs_of(on, (40, 300), batches=(2, 1))
    checked(on, *inputs, is_causal=True, prefix_lengths=int32(on, [10, 250]), backward_tile=SHORT)


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", range(12))
def test_windows(seed: int) -> None:
    """Which blocks add to a tile of queries follows from the window: a wrong place among them is a wrong sum, or a wait without end."""
    rng = numpy.random.default_rng(seed)
    lengths = (int(rng.integers(1, 300)), int(rng.integers(129, 500)))
    window = (int(rng.integers(0, 200)), None if seed % 3 == 0 else int(rng.integers(0, 200)))
    options = {"is_causal": seed % 4 < 2, "causal_alignment": "top_left" if seed % 2 else "bottom_right", "window": window}
    on = Target("sm_90")
    checked(on, *inputs_of(on, lengths), backward_tile=SHORT, **options)


# --- Lengths that are read on the device --------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("mask", MASKS)
def test_rows_have_their_own_numbers_of_keys(mask: str) -> None:
    """NaN and infinity behind the last key of a row are of no consequence, in the middle of a warpgroup's keys too."""
    on, lengths = Target("sm_90"), [150, 33, 0, 128, 1]
    inputs = padded(on, lengths, "bfloat16", (64, 64), heads=(2, 2))
    checked(on, *inputs, seqlens_kv=int32(on, lengths), backward_tile=SHORT, **MASKS[mask])


def test_keys_that_batches_share_have_one_length() -> None:
    on = Target("sm_90")
    inputs = inputs_of(on, (70, 90), batches=(2, 1))
    plan = cuflash.plan(*inputs, seqlens_kv=int32(on, [90, 30]), backward=True)
    assert "not backward_wgmma.cu: keys that batches share have one length there" in plan.choice


def with_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of packed sequences takes short tiles; the forward pass knows no such kernel."""
    monkeypatch.setattr(cuflash, "varlen_attention_backward", functools.partial(cuflash.varlen_attention_backward, tile=SHORT))


@pytest.mark.sample(1)
@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are empty, the last tile of one is not the first of the next, and one has several blocks of keys."""
    on, lengths_q, lengths_kv = Target("sm_90"), [40, 0, 70, 33, 5], [60, 20, 300, 0, 100]
    inputs = packed(on, (sum(lengths_q), sum(lengths_kv)), "float16", (64, 64), heads=(2, 1))
    with_tile(monkeypatch)
    on.check_packed(inputs, (offsets(on, lengths_q), offsets(on, lengths_kv)), enable_gqa=True, **MASKS[mask])


@pytest.mark.parametrize("name", ["both", "window"])
def test_rows_of_nobody_take_part_in_nothing(name: str) -> None:
    """Of sequences that use less than their places, with NaN and infinity behind: the same bits as of sequences that lie one behind the other, and zeros."""
    given, options, *rows = given_in_places(name)
    of_arrays = rows[0], rows[0], rows[1], rows[1]
    backward = functools.partial(cuflash.varlen_attention_backward, tile=SHORT)

    def gradients(arrays: Any, offsets: Any, **options: Any) -> Any:
        out, lse = cuflash.varlen_attention(*arrays[1:], *offsets, return_lse=True, **options)
        assert NAME in names(cuflash.varlen_plan(*arrays[1:], *offsets, 40, 80, backward=True, **options))
        return backward(*arrays, out, lse, *offsets, **options)

    in_places = gradients(given, (int32(Target("sm_90"), OFFSETS_Q), int32(Target("sm_90"), OFFSETS_KV)), **options)
    used = {option: options.pop(option) for option in ("seqused_q", "seqused_kv")}
    starts = [int32(Target("sm_90"), numpy.cumsum([0, *lengths]).tolist()) for lengths in used.values()]
    packed_alone = gradients([array[own] for array, own in zip(given, of_arrays, strict=True)], starts, **options)
    for got, want, own in zip(in_places[:3], packed_alone[:3], of_arrays[1:], strict=True):
        assert Target.bits(got[own]) == Target.bits(want)
        assert not numpy.delete(got, own, axis=0).any()


def test_neighbours_never_leak() -> None:
    """NaN in one sequence stays there, though tiles that reach past its ends are copied."""
    on, lengths_q, lengths_kv = Target("sm_90"), [30, 45, 100], [50, 17, 140]
    cu = offsets(on, lengths_q), offsets(on, lengths_kv)
    inputs = packed(on, (sum(lengths_q), sum(lengths_kv)), "float16", (64, 64))
    attend = functools.partial(cuflash.varlen_attention, is_causal=True, return_lse=True)

    def gradients(query: Any, key: Any, value: Any, grad_out: Any) -> Any:
        out, lse = attend(query, key, value, *cu)
        backward = cuflash.varlen_attention_backward(grad_out, query, key, value, out, lse, *cu, is_causal=True, tile=SHORT)
        return [on.host(gradient) for gradient in backward]

    clean = gradients(*inputs)
    for sequence in range(3):
        dirty_inputs = [on.as_numpy(x).copy() for x in inputs]
        starts = cu[0], cu[1], cu[1], cu[0]
        for x, start in zip(dirty_inputs, starts, strict=True):
            x[int(start[sequence]) : int(start[sequence + 1])] = numpy.nan
        dirty = gradients(*map(on.place, dirty_inputs))
        for before, after, start in zip(clean, dirty, starts, strict=False):
            outside = [*range(int(start[sequence])), *range(int(start[sequence + 1]), len(before))]
            numpy.testing.assert_array_equal(after[outside], before[outside])


@pytest.mark.sample(1)
@pytest.mark.parametrize("senseless", [[0, 100, 50, 150], [0, 150, 0, 150], [0, 400, -3, 150], [150, 0, 20, 150]], ids=str)
def test_senseless_offsets_end(senseless: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that lie upon each other share sums and turns: what they give is senseless, but nobody waits for ever."""
    from cuflash.runtime.prepared import PreparedCall

    monkeypatch.setattr(PreparedCall, "check_offsets", lambda *_: None)  # as on a GPU
    on = Target("sm_90")
    x = on.random((150, 1, 64), "float16", 1)
    cu, lse = numpy.array(senseless, numpy.int32), on.random((1, 150), "float32", 2)
    run = functools.partial(cuflash.varlen_attention_backward, x, x, x, x, x, lse, cu, cu, 150, 150, is_causal=True, tile=SHORT)
    fired = ""
    try:
        run()
    except SimulatorError as error:  # blocks of two sequences write the same rows of dK
        fired = error.check
    assert fired in ("", "race")
    with configure(schedule="random", seed=1, checks=False, max_instructions=2**22):
        assert all(gradient.shape == x.shape for gradient in run())


# --- The same bits ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", ["window", "dropout", "additive mask", "documents", "boolean mask", "lengths", "packed"])
def test_every_schedule_gives_the_same_bits(case: str, request: pytest.FixtureRequest) -> None:
    seeds = range(100 if request.config.getoption("--exhaustive") else 4)
    on = Target("sm_90")
    options: dict[str, Any] = {
        "window": {"window": (70, 20)},
        "dropout": {"dropout_p": 0.3, "dropout_seed": 5},
        "additive mask": {"attn_mask": numpy.linspace(-1, 1, 270, dtype=numpy.float32)},
        "documents": {"segment_ids_q": IDS_Q[:, :100], "segment_ids_kv": IDS_KV[:, :270], "is_causal": True},
        "boolean mask": {"attn_mask": in_rows_of_16_bytes(BLOCKS[:, :1, :100, :270])},
        "lengths": {"seqlens_kv": numpy.array([70, 250], "int32"), "is_causal": True},
    }.get(case, {})
    if case == "packed":
        query, key, value, grad_out = packed(on, (150, 250), "float16", (64, 64))
        cu = offsets(on, [70, 10, 70]), offsets(on, [150, 90, 10])
        out, lse = cuflash.varlen_attention(query, key, value, *cu, is_causal=True, return_lse=True)
        backward = functools.partial(cuflash.varlen_attention_backward, is_causal=True, tile=SHORT)
        call = functools.partial(backward, grad_out, query, key, value, out, lse, *cu)
    else:
        call = functools.partial(backward_of(*inputs_of(on, (100, 270), batches=(2, 2)), **options), tile=SHORT)
    report = check(call, seeds=seeds)
    assert set(report.kernels) >= set(KERNELS)
    assert len(report.runs) == 2 + len(seeds)


def test_tiles_are_shorter_where_features_take_registers() -> None:
    (kernel,) = (kernel for kernel in plan_of(128, softcap=5.0).kernels if kernel.name == NAME)
    assert kernel.tile == Tile(48, 128, 8, 2)
    assert names(plan_of(128, window=(100, 0))) == WGMMA
    assert names(plan_of(64, dropout_p=0.1, dropout_seed=1)) == WGMMA
