"""The backward kernel of wgmma and TMA: as exact as the others, the same bits under every schedule, and chosen as the plan says."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
from conftest import Target
from kernel_mutations import BROADCAST_KEY
from test_sequences import offsets, packed
from test_wgmma_forward import MASKS, hopper, inputs_of, names  # noqa: F401 (a fixture)

import cuflash
from cuflash import Tile
from cuflash.errors import CompileError, TileError
from cuflash.hardware import device
from cuflash.jit.compiler import Artifact, KernelResources
from cuflash.planning import kernel_specs, measured_tiles, query_splits, tile_choice, wgmma_backward
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import UNSPLIT
from cuflash.planning.kernel_specs import BACKWARD_WGMMA
from cuflash.runtime import calls, launch
from cuflash.simulator import check
from cuflash.simulator.options import configure

pytest.importorskip("cupy")

NAME = "backward_wgmma"
SHORT = {NAME: Tile(32, 128, 8, 2)}
"""Many tiles of few queries."""
KERNELS = ("backward_delta", "backward_wgmma", "backward_dq_convert")
CONVERTING_KERNELS = KERNELS[:-1]
"""With a causal mask alone, where blocks make dQ of the sums that they add up."""


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel wherever it can run, whose blocks share out no queries; of those that do is test_query_splits.py."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setenv(wgmma_backward.VARIABLE, "1")
    monkeypatch.setattr(query_splits, "choose", lambda *_: UNSPLIT)
    monkeypatch.setattr(calls, "_calls", {})  # those that were made for others


def checked(on: Target, *inputs: Any, backward_tile: Any = None, **options: Any) -> Any:
    """The results, judged, of this kernel and no other."""
    assert NAME in names(cuflash.plan(*inputs, enable_gqa=True, backward=True, tile=backward_tile, **options))
    return on.check(*inputs, enable_gqa=True, backward_tile=backward_tile, **options)


# --- Right --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(200, 300), (300, 130), (1, 1), (65, 193)], ids=str)
@pytest.mark.parametrize("case", [("bfloat16", 64), ("float16", 128)], ids=str)
def test_lengths_and_grouped_heads(hopper: Target, case: tuple[str, int], lengths: tuple[int, int], mask: str) -> None:  # noqa: F811
    """Default tiles. Ends that no tile divides, warpgroups without keys, keys that no query sees, queries that see no key."""
    dtype, head_dim = case
    checked(hopper, *inputs_of(hopper, lengths, head_dim, heads=(2, 1), dtype=dtype), **MASKS[mask])


@pytest.mark.sample(1)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_batches_that_share_keys(hopper: Target, mask: str) -> None:  # noqa: F811
    """Their gradients are summed in one block, over heads and batches."""
    inputs = inputs_of(hopper, (70, 190), heads=(4, 2), batches=(2, 1))
    checked(hopper, *inputs, backward_tile=SHORT, **MASKS[mask])


HEAD_DIMS = [
    ("bfloat16", 8, 8),
    ("float16", 40, 40),
    ("bfloat16", 72, 72),
    ("float16", 96, 96),
    ("bfloat16", 64, 128),
    ("float16", 104, 24),
    ("bfloat16", 192, 128),
    ("float16", 136, 128),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", HEAD_DIMS, ids=str)
def test_head_dims(hopper: Target, case: tuple[str, int, int]) -> None:  # noqa: F811
    """Of which slabs of 64 columns hold more than there is, of which some warps have no columns of dQ, and value's own."""
    dtype, head_dim, head_dim_v = case
    query, key, _ = inputs_of(hopper, (70, 190), head_dim, dtype=dtype)
    value = inputs_of(hopper, (70, 190), head_dim_v, dtype=dtype)[2]
    checked(hopper, query, key, value, is_causal=True, causal_alignment="bottom_right")


WIDE_HEADS = [("bfloat16", 256, 256), ("float16", 200, 136), ("bfloat16", 128, 256), ("float16", 256, 64), ("bfloat16", 8, 160)]
WIDE_KERNELS = ("backward_delta", "backward_wgmma_dv", "backward_wgmma_dkdq", "backward_dq_convert")


@pytest.mark.sample(1)
@pytest.mark.parametrize("mask", ["full", "bottom_right"])
@pytest.mark.parametrize("case", WIDE_HEADS, ids=str)
def test_wide_heads_in_two_kernels(hopper: Target, case: tuple[str, int, int], mask: str) -> None:  # noqa: F811
    """With dO in a ring of its own and in that of Q, with values that are wider than the keys in whose place they leave, and by the same bits under each schedule."""
    dtype, head_dim, head_dim_v = case
    inputs = (
        *inputs_of(hopper, (200, 190), head_dim, heads=(2, 1), dtype=dtype)[:2],
        inputs_of(hopper, (200, 190), head_dim_v, heads=(2, 1), dtype=dtype)[2],
    )
    assert names(cuflash.plan(*inputs, enable_gqa=True, backward=True, **MASKS[mask])) == list(WIDE_KERNELS)
    hopper.check(*inputs, enable_gqa=True, **MASKS[mask])
    report = check(backward_of(*inputs, **MASKS[mask]), seeds=range(3))
    assert len(report.runs) == 5


@pytest.mark.parametrize(
    ("head_dim", "options", "steps"),
    [(256, {}, 6), (256, {"is_causal": True}, 6), (192, {}, 12), (256, {"window": (99, 0)}, 0), (256, {"seqlens_kv": numpy.array([300, 9], "int32")}, 6)],
    ids=str,
)  # fmt: skip
def test_k_stays_in_registers_as_far_as_they_have_room(head_dim: int, options: dict[str, Any], steps: int) -> None:
    """Where dV is made alone, in calls without features."""
    of_values, of_others = [kernel for kernel in plan_of(head_dim, **options).kernels if kernel.name in WIDE_KERNELS[1:3]]
    assert f" K_REGISTER_STEPS = {steps};" in of_values.config
    assert " K_REGISTER_STEPS = 0;" in of_others.config


def test_three_slabs_take_more_queries() -> None:
    """Of columns of Q, whose last one warpgroups share out by halves of the queries."""
    assert {kernel.name: kernel.tile for kernel in plan_of(192).kernels if kernel.spec.is_tiled} == {
        "backward_wgmma_dv": Tile(80, 128, 8, 2),
        "backward_wgmma_dkdq": Tile(64, 128, 8, 2),
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("feature", ["window", "softcap", "alibi", "dropout", "float mask", "packed"])
def test_wide_heads_with_features(feature: str) -> None:
    on = Target("sm_90")
    if feature == "packed":
        lengths_q, lengths_kv = [40, 0, 70, 5], [60, 20, 200, 100]
        inputs = packed(on, (sum(lengths_q), sum(lengths_kv)), "float16", (256, 256), heads=(2, 1))
        on.check_packed(inputs, (offsets(on, lengths_q), offsets(on, lengths_kv)), enable_gqa=True, is_causal=True)
        return
    options: dict[str, Any] = {
        "window": {"window": (70, 20)}, "softcap": {"softcap": 5.0}, "alibi": {"alibi_slopes": numpy.array([0.5], "float32")},
        "dropout": {"dropout_p": 0.3, "dropout_seed": 5}, "float mask": {"attn_mask": numpy.linspace(-1, 1, 190, dtype=numpy.float32)},
    }[feature]  # fmt: skip
    inputs = inputs_of(on, (110, 190), 256)
    assert names(cuflash.plan(*inputs, backward=True, **options))[-3:] == list(WIDE_KERNELS[1:])
    on.check(*inputs, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tile", [Tile(64, 128, 8, 1), Tile(96, 128, 8, 3), Tile(32, 128, 8, 3)], ids=str)
def test_tiles(hopper: Target, tile: Tile) -> None:  # noqa: F811
    checked(hopper, *inputs_of(hopper, (200, 270)), is_causal=True, backward_tile={NAME: tile})


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [{"scale": -0.5}, {"scale": 0.0, "is_causal": True}], ids=str)
def test_scales(hopper: Target, options: dict[str, Any]) -> None:  # noqa: F811
    checked(hopper, *inputs_of(hopper, (70, 190)), backward_tile=SHORT, **options)


def test_scores_of_hundreds(hopper: Target) -> None:  # noqa: F811
    """Probabilities that are 0 or 1."""
    query, key, value = inputs_of(Target("sm_90"), (100, 150))
    query[...] *= numpy.asarray(30, query.dtype)
    checked(hopper, *map(hopper.place, (query, key, value)), is_causal=True, backward_tile=SHORT)


def test_rows_beyond_the_end_are_not_read(hopper: Target) -> None:  # noqa: F811
    """NaN behind the last key, and behind the last query."""
    checked(hopper, *inputs_of(hopper, (70, 90), heads=(2, 2), view="sliced"), backward_tile=SHORT)


def test_keys_that_no_query_sees_may_hold_anything(hopper: Target) -> None:  # noqa: F811
    """In the middle of a warpgroup's rows, in all rows of another, and in all of a block."""
    inputs = inputs_of(Target("sm_90"), (40, 300))
    out, lse = cuflash.scaled_dot_product_attention(*inputs, is_causal=True, return_lse=True)
    backward = functools.partial(cuflash.scaled_dot_product_attention_backward, is_causal=True, tile=SHORT)
    clean = backward(*map(hopper.place, (out, *inputs, out, lse)))
    for x in inputs[1:]:
        x[:, 40:] = numpy.nan
    dirty = backward(*map(hopper.place, (out, *inputs, out, lse)))
    for name, before, after in zip(("query", "key", "value"), clean, dirty, strict=True):
        assert Target.bits(before) == Target.bits(after), name


# --- The same bits ------------------------------------------------------------------------------------------------------------------------


def backward_of(*inputs: Any, **options: Any) -> Any:
    """The backward call, with the results of the forward one."""
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, enable_gqa=True, **options)
    call = functools.partial(cuflash.scaled_dot_product_attention_backward, enable_gqa=True, **options)
    return functools.partial(call, out, *inputs, out, lse)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "case",
    [
        ("bfloat16", 64, 64, 2, "causal"),
        ("float16", 128, 128, 1, "bottom_right"),
        ("float16", 64, 64, 3, "full"),
        ("bfloat16", 192, 128, 2, "causal"),
    ],
    ids=str,
)
def test_every_schedule_gives_the_same_bits(case: tuple[str, int, int, int, str], request: pytest.FixtureRequest) -> None:
    """Those of dQ, too, which blocks add up. Only a schedule finds a wait that never ends."""
    dtype, head_dim, head_dim_v, stages, mask = case
    seeds = range(100 if request.config.getoption("--exhaustive") else 6)
    on = Target("sm_90")
    inputs = (
        inputs_of(on, (100, 300), head_dim, heads=(2, 1), dtype=dtype)[:2]
        + inputs_of(on, (100, 300), head_dim_v, heads=(2, 1), dtype=dtype)[2:]
    )
    call = functools.partial(backward_of(*inputs, **MASKS[mask]), tile={NAME: Tile(32, 128, 8, stages)})
    report = check(call, seeds=seeds)
    assert report.kernels == (KERNELS if mask == "full" else CONVERTING_KERNELS)
    assert len(report.runs) == 2 + len(seeds)


@pytest.mark.sample(1)
@pytest.mark.parametrize("schedule", ["late", "random"])
def test_blocks_that_run_side_by_side_wait_for_each_other(schedule: Any) -> None:
    inputs = inputs_of(Target("sm_90"), (100, 700))
    run = functools.partial(backward_of(*inputs), tile=SHORT)
    with configure(threads=1):
        alone = [Target.bits(grad) for grad in run()]
    with configure(threads=4, schedule=schedule, seed=1):
        assert [Target.bits(grad) for grad in run()] == alone


# --- Chosen -------------------------------------------------------------------------------------------------------------------------------


def plan_of(head_dim: int = 64, dtype: str = "float16", head_dim_v: int = 0, view: str = "contiguous", **options: Any) -> cuflash.Plan:
    on = Target("sm_90")
    x = on.random((2, 500, 4, head_dim), dtype, 1, view)
    value = on.random((2, 500, 4, head_dim_v), dtype, 1) if head_dim_v else x
    return cuflash.plan(x, x, value, backward=True, **options)


WGMMA = ["backward_delta", "backward_wgmma", "backward_dq_convert"]
OTHERS = ["backward_delta", "backward_dkdv", "backward_dq"]


CONVERTING_CALLS: dict[str, tuple[tuple[int, int], dict[str, Any], bool]] = {
    "causal": ((300, 300), {"is_causal": True}, True),
    "more keys": ((100, 300), {"is_causal": True, "causal_alignment": "bottom_right"}, True),
    "softcap": ((300, 300), {"is_causal": True, "softcap": 5.0}, True),
    "full": ((300, 300), {}, False),
    "more queries": ((300, 100), {"is_causal": True}, False),
    "window": ((300, 300), {"is_causal": True, "window": (70, 0)}, False),
    "segments": (
        (300, 300),
        {"is_causal": True, "segment_ids_q": numpy.zeros((1, 300), "int32"), "segment_ids_kv": numpy.zeros((1, 300), "int32")},
        False,
    ),
    "lengths": ((300, 300), {"is_causal": True, "seqlens_kv": numpy.array([200], "int32")}, False),
}


@pytest.mark.parametrize("case", CONVERTING_CALLS)
def test_who_makes_dq_of_the_sums(case: str) -> None:
    """The blocks themselves, where each has some of its own that are about as many as those of others."""
    lengths, options, converts = CONVERTING_CALLS[case]
    plan = cuflash.plan(*inputs_of(Target("sm_90"), lengths), backward=True, **options)
    assert ("backward_dq_convert" not in names(plan)) == converts
    assert NAME in names(plan)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "case",
    [("bfloat16", 128, (300, 300)), ("float16", 72, (130, 390)), ("bfloat16", 64, (513, 513)), ("float16", 256, (300, 300))],
    ids=str,
)
def test_blocks_that_make_dq_of_their_sums(hopper: Target, case: tuple[str, int, tuple[int, int]]) -> None:  # noqa: F811
    """Several blocks for each head, tiles of queries that two of them begin and end in, rows behind the last query, and heads that share keys."""
    dtype, head_dim, lengths = case
    inputs = inputs_of(hopper, lengths, head_dim, heads=(2, 1), dtype=dtype)
    hopper.check(*inputs, enable_gqa=True, is_causal=True)
    report = check(backward_of(*inputs, is_causal=True), seeds=range(3))
    assert "backward_dq_convert" not in report.kernels


def test_it_is_asked_for() -> None:
    plan = plan_of()
    assert names(plan) == WGMMA
    assert "choice     backward_wgmma.cu, as asked for; it has run on the simulator only" in str(plan)
    assert "16 blocks of 384 threads" not in str(plan)
    assert "32 blocks of 384 threads" in str(plan)
    assert str(plan).isascii()


def test_a_mapping_pins_either_way() -> None:
    assert names(plan_of(tile={"backward_dq": Tile(64, 64, 4, 2)})) == OTHERS
    assert "backward_fused" in names(plan_of(tile={"backward_fused": Tile(32, 64, 4, 2)}))
    with pytest.raises(TileError, match="kernels that run: backward_wgmma"):
        plan_of(tile={**SHORT, "backward_dq": Tile(64, 64, 4, 2)})
    wrong = {
        (64, Tile(64, 64, 4, 2)): "num_warps must be 8",
        (64, Tile(32, 256, 8, 2)): "tile_kv must be at most 16 rows for each warp",
        (
            64,
            Tile(80, 128, 8, 2),
        ): "tile_q must be 48 or a multiple of 32 where two warpgroups share out the queries of the last 64 columns of dQ",
        (64, Tile(160, 128, 8, 1)): "registers: at least 252 per thread needed, 240 available with 8 warps",
        (128, Tile(96, 128, 8, 1)): "registers: at least 252 per thread needed, 240 available with 8 warps",
    }
    for (head_dim, tile), rule in wrong.items():
        with pytest.raises(TileError, match=rule):
            plan_of(head_dim, tile={NAME: tile})


def test_a_single_tile_is_for_whichever_takes_it() -> None:
    assert names(plan_of(tile=Tile(32, 128, 8, 2))) == WGMMA
    assert names(plan_of(tile=Tile(64, 64, 4, 2))) == OTHERS


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({"dtype": "float32"}, "it takes 16-bit types, and this is float32"),
    "head_dim": ({"head_dim": 100}, "it takes multiples of 8 up to 192 for head_dim, 128 for value's, and this is 100"),
    "head_dim_v": ({"head_dim_v": 264}, "it takes multiples of 8 up to 256 for head_dim, and this is 64/264"),
    "elements apart": ({"view": "strided_elements"}, "the TMA unit cannot copy query, whose head_dim has a stride of 3"),
    "unaligned": ({"view": "unaligned_base"}, "the TMA unit copies what starts on 16 bytes, and one of query, key and value does not"),
    "mask": ({"attn_mask": numpy.ones((500, 500), bool)}, "rows of attn_mask do not start 16 bytes apart, and would be copied element by element"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_the_plan_says_why_it_is_not_taken(case: str) -> None:
    options, reason = REASONS[case]
    plan = plan_of(**options)
    assert NAME not in names(plan)
    assert f"not backward_wgmma.cu: {reason}" in plan.choice
    with pytest.raises(TileError, match="kernels that run: ") as caught:
        plan_of(**options, tile=SHORT)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("head_dim", "named"), [(64, "backward_wgmma"), (256, "backward_wgmma_dv")])
def test_the_plan_names_kernels_that_a_mapping_may_pin(head_dim: int, named: str) -> None:
    for_others = Tile(64, 64, 4, 2)
    choice = plan_of(head_dim, tile=for_others).choice
    assert f"not backward_wgmma.cu: a single tile is for dK and dV; a mapping may name {named};" in choice
    tile = tile_choice.default_tile(KernelCase(kernel_specs.TILED_KERNELS[named], "float16", head_dim), device.of_arch("sm_90", "gpu"))
    assert named in names(plan_of(head_dim, tile={named: tile}))


def test_key_and_value_with_other_heads_take_kernels_of_their_own() -> None:
    query, key, value, _ = BROADCAST_KEY.arrays("float16")
    assert "gradients of different batches or heads" in cuflash.plan(query, key, value, enable_gqa=True, backward=True).choice


@pytest.mark.sample(1)
@pytest.mark.parametrize("gradient", ["expanded", "unaligned"])
def test_a_gradient_of_the_output_that_cannot_be_copied_takes_the_others(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a call that is given one knows how it lies; the results are the same as of a copy of it."""
    planned: list[list[str]] = []
    make_plan = calls.make_plan

    def recorded(*arguments: Any, **options: Any) -> Any:
        plan = make_plan(*arguments, **options)
        planned.append(names(plan))
        return plan

    monkeypatch.setattr(calls, "make_plan", recorded)
    on = Target("sm_90")
    inputs = inputs_of(on, (70, 90))
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True)
    grad_out = (
        on.random(out.shape, "bfloat16", 5, "unaligned_base") if gradient == "unaligned" else numpy.broadcast_to(out[:, :1], out.shape)
    )
    backward = functools.partial(
        cuflash.scaled_dot_product_attention_backward, query=inputs[0], key=inputs[1], value=inputs[2], out=out, lse=lse
    )
    given = backward(grad_out)
    copied = backward(grad_out.copy())
    assert planned[1:] == [OTHERS, WGMMA]
    for one, other in zip(given, copied, strict=True):
        numpy.testing.assert_allclose(on.host(one).astype("float64"), on.host(other).astype("float64"), atol=0.03, rtol=0.03)


@pytest.mark.parametrize(("head_dim", "name"), [(128, "backward_wgmma"), (256, "backward_wgmma_dv")])
def test_a_compilation_of_which_warps_would_wait_for_ever_is_not_run(head_dim: int, name: str) -> None:
    """What setmaxnreg hands on are the registers that threads start with."""
    kernel = plan_of(head_dim).kernels[1]

    def compiled(registers: int) -> Artifact:
        return Artifact(b"cubin", "", 0.0, (KernelResources(kernel.entry, registers, 0, 0, 0, 0, 4),), "NVRTC 13.7")

    launch.refuse_what_would_hang(kernel, compiled(168))
    with pytest.raises(CompileError, match=rf"set {wgmma_backward.VARIABLE}=0, leave {name} out of tile, or pin tile={{'backward_dq': …}}"):
        launch.refuse_what_would_hang(kernel, compiled(160))


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_other_architectures_say_so_if_it_is_asked_for(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", arch)
    assert f"not backward_wgmma.cu: its instructions are those of sm_90, and this is {arch}" in plan_of().choice
    assert cuflash.legal_tiles(64, kernel=NAME, arch=arch) == ()
    monkeypatch.delenv(wgmma_backward.VARIABLE)
    assert "wgmma" not in plan_of().choice


def test_memory_grows_with_the_length() -> None:
    """Four bytes for each element of dQ, a turn for each tile, the row statistics."""
    plan = plan_of(128)
    tiles = 2 * 4 * 7  # of 80 queries
    assert {buffer.name: buffer.nbytes for buffer in plan.workspace} == {
        "row_statistics": 8 * 2 * 4 * 500, "query_sums": 4 * tiles * 80 * 128, "turns": 4 * (1 + tiles),
    }  # fmt: skip


@pytest.mark.parametrize(("seqlen", "section"), [(2048, 2**25 // (2048 * 128 * (2 + 2 + 4))), (8192, 132 // 16)])
def test_heads_come_in_sections(seqlen: int, section: int) -> None:
    """That fit 32 MiB of the cache, since sums of dQ are added up in L2 or in memory, or with which 16 blocks of each head run side by side."""
    strides = (seqlen * 4096, 4096, 256, 2)
    x = numpy.lib.stride_tricks.as_strided(numpy.zeros(1, "float16"), (4, seqlen, 16, 128), strides, writeable=False)
    kernel = cuflash.plan(x, x, x, backward=True).kernels[1]
    assert kernel.name == NAME
    assert kernel.section_heads == section, "and a divisor of 64"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_legal_tiles_fit_the_registers_that_warps_hand_each_other(head_dim: int) -> None:
    on = device.of_arch("sm_90", "gpu")
    legal = tile_choice.legal_tiles_for(KernelCase(BACKWARD_WGMMA, "float16", head_dim), on)
    assert legal[0] == Tile(*measured_tiles.TILES["sm_90", NAME, head_dim])
    for tile in legal:
        assert (tile.tile_kv, tile.num_warps) == (128, 8)
        assert head_dim + tile.tile_q + 28 <= 240
