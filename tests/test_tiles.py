"""Tiles: what is legal, what is said about the rest, defaults for every case, and pinned tiles that really run."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import num_prepared

import cuflash
from cuflash.errors import TileError
from cuflash.hardware import device
from cuflash.hardware.device import ARCHITECTURES, Device
from cuflash.jit import cache
from cuflash.planning import kernel_cases, measured_tiles, predicted_tiles, tile_choice, tile_model, tile_rules
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.planning.offline import offline_kernels
from cuflash.problem.features import MASK_DTYPES, FeatureSet
from cuflash.problem.tile import Tile

if TYPE_CHECKING:
    from conftest import Target

DTYPES = ("float16", "bfloat16", "float32")
KEEPS_QUERIES = ("forward", "backward_dq")


def case(kernel: Any = "forward", dtype: str = "bfloat16", head_dim: int = 64) -> KernelCase:
    return KernelCase(TILED_KERNELS[kernel], dtype, head_dim)


def on(arch: str = "sm_80") -> Device:
    return device.of_arch(arch, "gpu")


def tiles_named_in(message: str) -> list[Tile]:
    return [
        Tile(*map(int, numbers))
        for numbers in re.findall(r"Tile\(tile_q=(\d+), tile_kv=(\d+), num_warps=(\d+), num_stages=(\d+)\)", message)
    ]


# --- Legality -----------------------------------------------------------------------------------------------------------------------------

BROKEN = {
    "tile_q_0": (case(), Tile(0, 64, 4, 2), "tile_q must be a positive int, got 0"),
    "negative_stages": (case(), Tile(64, 64, 4, -1), "num_stages must be a positive int, got -1"),
    "bool_warps": (case(), Tile(64, 64, True, 2), "num_warps must be a positive int, got True"),
    "float_tile": (case(), Tile(64, 64.0, 4, 2), "tile_kv must be a positive int, got 64.0"),  # type: ignore[arg-type]
    "17_warps": (case(), Tile(272, 64, 17, 1), "num_warps must be at most 16"),
    "forward_rows": (case(), Tile(48, 64, 2, 1), "tile_q must be a multiple of 16 * num_warps = 32"),
    "dq_rows": (case("backward_dq"), Tile(100, 64, 4, 1), "tile_q must be a multiple of 16 * num_warps = 64"),
    "dkdv_rows": (case("backward_dkdv"), Tile(64, 48, 2, 1), "tile_kv must be a multiple of 16 * num_warps = 32"),
    "forward_streamed": (case(), Tile(64, 40, 4, 1), "tile_kv must be a multiple of 16"),
    "dkdv_streamed": (case("backward_dkdv"), Tile(24, 64, 4, 1), "tile_q must be a multiple of 16"),
    "five_stages": (case(), Tile(64, 16, 4, 5), "num_stages must be at most 4"),
    "shared_memory": (case(), Tile(128, 128, 8, 4), "shared memory: 147456 bytes needed, 101376 available on sm_86"),
    "registers": (case(head_dim=256), Tile(64, 64, 2, 1), "registers: at least 344 per thread needed, 255 available with 2 warps"),
    "slices": (case(head_dim=512), Tile(16, 16, 1, 1), "num_warps must be a multiple of 2, the slices of the head"),
    "rows_of_slices": (case(head_dim=512), Tile(48, 16, 4, 1), "tile_q must be a multiple of 16 * num_warps / 2 slices of the head = 32"),
    "stages_of_steps": (
        case(dtype="float32", head_dim=512),
        Tile(16, 16, 4, 2),
        "num_stages must be 1 on sm_86, whose shared memory this head passes through in pieces",
    ),
    "registers_of_16_warps": (
        case(head_dim=240),
        Tile(256, 16, 16, 1),
        "registers: at least 152 per thread needed, 128 available with 16 warps",
    ),
}


@pytest.mark.parametrize(("kernel_case", "tile", "rule"), list(BROKEN.values()), ids=list(BROKEN))
def test_a_broken_rule_is_named(kernel_case: KernelCase, tile: Tile, rule: str) -> None:
    device_of_case = on("sm_80" if "128 available with 16 warps" in rule else "sm_86")  # what fits the larger shared memory only
    with pytest.raises(TileError) as caught:
        tile_choice.check_tile(kernel_case, tile, device_of_case)
    assert rule in caught.value.expected
    assert f"{kernel_case.kernel} with {kernel_case.dtype}, head_dim {kernel_case.head_dim}" in caught.value.expected
    nearest = tiles_named_in(caught.value.hint)
    assert len(nearest) == 3
    for legal in nearest:
        assert tile_choice.check_tile(kernel_case, legal, device_of_case) == legal


def test_stages_need_asynchronous_copies() -> None:
    with pytest.raises(TileError, match=r"num_stages must be 1 on sm_75, which has no asynchronous copies.*num_stages=1\)"):
        tile_choice.check_tile(case(dtype="float16"), Tile(64, 64, 4, 2), on("sm_75"))
    assert tile_choice.check_tile(case(dtype="float16"), Tile(64, 64, 4, 2), on("sm_80")) == Tile(64, 64, 4, 2)


@pytest.mark.parametrize("tile", [(64, 64, 4, 2), "64x64", 64, {"tile_q": 64}], ids=["tuple", "str", "int", "dict"])
def test_what_is_no_tile_is_told_how_to_be_one(tile: Any) -> None:
    with pytest.raises(TileError, match=re.escape("Write cuflash.Tile(tile_q=64, tile_kv=64, num_warps=4, num_stages=2).")):
        tile_choice.check_tile(case(), tile, on())


def test_shared_memory_is_filled_to_the_last_byte() -> None:
    """Both sides of the limit: sm_75 has 64 KiB, which D = 128 fills with 128 rows of Q and 64 of K and V."""
    kernel_case, turing = case(dtype="float16", head_dim=128), on("sm_75")
    assert kernel_cases.shared_bytes(kernel_case, Tile(128, 64, 8, 1), turing) == 65536 == turing.shared_memory_per_block
    assert tile_rules.broken_rule(kernel_case, Tile(128, 64, 8, 1), turing) is None
    assert "shared memory" in (tile_rules.broken_rule(kernel_case, Tile(128, 80, 8, 1), turing) or "")


@pytest.mark.parametrize(
    ("kernel", "tile", "expected"),
    [
        ("forward", Tile(64, 32, 4, 2), 128 * (64 + 2 * 2 * 32)),
        ("backward_dq", Tile(64, 32, 4, 2), 128 * (2 * 64 + 2 * 2 * 32)),
        ("backward_dkdv", Tile(32, 64, 4, 2), 128 * (2 * 64 + 2 * 2 * 32) + 2 * 32 * 8),
        ("backward_dk", Tile(32, 64, 4, 2), 128 * (2 * 64 + 2 * 2 * 32) + 2 * 32 * 8),
        ("backward_dv", Tile(32, 64, 4, 2), 128 * (64 + 2 * 2 * 32) + 2 * 32 * 8),
    ],
)
def test_shared_bytes(kernel: str, tile: Tile, expected: int) -> None:
    """Rows of 64 elements of 16 bits, and lse and delta of each query where cp.async brings them."""
    assert kernel_cases.shared_bytes(case(kernel), tile, on()) == expected


@pytest.mark.parametrize(
    ("dtype", "arch", "head_dim", "expected"),
    [
        ("float16", "sm_80", 1, 32), ("float16", "sm_80", 40, 96), ("bfloat16", "sm_80", 72, 160), ("float32", "sm_80", 72, 384),
        ("bfloat16", "sm_75", 40, 256), ("float16", "sm_75", 40, 96), ("float32", "sm_80", 1, 128),
    ],
)  # fmt: skip
def test_row_bytes(dtype: str, arch: str, head_dim: int, expected: int) -> None:
    """head_dim rounded up to 16, in 32-bit tiles to 32; bfloat16 is widened where only the float32 units can take it."""
    assert kernel_cases.row_bytes(case(dtype=dtype, head_dim=head_dim), on(arch)) == (expected, expected)


@pytest.mark.parametrize(
    ("kernel", "dtype", "head_dim", "arch", "slices", "steps"),
    [
        ("forward", "bfloat16", 256, "sm_80", 1, 1), ("forward", "bfloat16", 257, "sm_80", 2, 1), ("forward", "bfloat16", 512, "sm_86", 2, 1),
        ("backward_dkdv", "bfloat16", 512, "sm_80", 4, 1), ("backward_dq", "float32", 512, "sm_80", 4, 1), ("backward_dq", "float32", 512, "sm_86", 4, 2),
        ("forward", "float16", 512, "sm_75", 2, 1), ("backward_dq", "float16", 512, "sm_75", 2, 2), ("backward_dq", "float32", 576, "sm_75", 4, 8),
    ],
)  # fmt: skip
def test_slices_and_steps_of_wide_heads(kernel: Any, dtype: str, head_dim: int, arch: str, slices: int, steps: int) -> None:
    """Slices by what accumulators the registers hold, steps by what pieces the shared memory holds."""
    kernel_case = case(kernel, dtype, head_dim)
    assert (kernel_case.head_slices(on(arch)), kernel_case.slice_pieces(on(arch))) == (slices, steps)


def test_transposed() -> None:
    assert Tile(16, 128, 8, 3).transposed() == Tile(128, 16, 8, 3)
    assert Tile(16, 128, 8, 3).transposed().transposed() == Tile(16, 128, 8, 3)


def test_text() -> None:
    assert str(Tile(16, 128, 8, 3)) == "tile_q=16, tile_kv=128, num_warps=8, num_stages=3"


# --- Defaults and lists -------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_supported_case_has_a_default(arch: str) -> None:
    """Every kernel, type and head dimension, on the smallest shared memory as well."""
    for dtype in DTYPES:
        for head_dim in (1, 16, 17, *range(24, 577, 96), 128, 256, 512, 576):
            for kernel in ("forward", "backward_dk", "backward_dv", "backward_dq"):
                kernel_case = case(kernel, dtype, head_dim)
                tile = tile_choice.default_tile(kernel_case, on(arch))
                assert tile_choice.check_tile(kernel_case, tile, on(arch)) is tile, kernel_case
                assert tile == tile_choice.legal_tiles_for(kernel_case, on(arch))[0]


@settings(max_examples=40)
@given(st.sampled_from(DTYPES), st.integers(1, 576), st.integers(1, 576), st.sampled_from(ARCHITECTURES))
def test_every_pair_of_head_dims_has_a_default(dtype: str, head_dim: int, head_dim_v: int, arch: str) -> None:
    for kernel in ("forward", "backward_dk", "backward_dv", "backward_dq"):
        kernel_case = KernelCase(TILED_KERNELS[kernel], dtype, head_dim, False, head_dim_v)
        tile = tile_choice.default_tile(kernel_case, on(arch))
        assert kernel_cases.shared_bytes(kernel_case, tile, on(arch)) <= on(arch).shared_memory_per_block
        assert (kernel_case.head_slices(on(arch)) > 1) == (max(head_dim, head_dim_v) > 256)
        assert kernel_case.head_slices(on(arch)) > 1 or kernel_case.slice_pieces(on(arch)) == 1


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90"])
def test_defaults_do_not_pass_the_register_file_by_the_estimate(arch: str) -> None:
    """A tile that is expected to spill may only be the default where every other one is expected to spill too."""
    for dtype in DTYPES:
        for head_dim in (32, 64, 128, 256):
            for kernel in ("forward", "backward_dq"):
                kernel_case = case(kernel, dtype, head_dim)
                legal = tile_choice.legal_tiles_for(kernel_case, on(arch))
                fits = [tile for tile in legal if tile_model.estimate_registers(kernel_case, tile, on(arch)) <= 255]
                known = tile_choice.known_tile(kernel_case, on(arch))  # of which the compiler says whether it spills
                assert legal[0] in (fits if known is None else [known]) or not fits, kernel_case


@given(
    st.sampled_from(list(TILED_KERNELS)),
    st.sampled_from(DTYPES),
    st.integers(1, 576),
    st.sampled_from(ARCHITECTURES),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_check_tile_accepts_all_that_is_listed(kernel: Any, dtype: str, head_dim: int, arch: str, allow_tf32: bool, draw: Any) -> None:
    kernel_case = KernelCase(TILED_KERNELS[kernel], dtype, head_dim, allow_tf32)
    legal = tile_choice.legal_tiles_for(kernel_case, on(arch))
    assert len(set(legal)) == len(legal)
    for tile in draw.sample(legal, min(len(legal), 10)):
        assert tile_choice.check_tile(kernel_case, tile, on(arch)) is tile
        assert kernel_cases.shared_bytes(kernel_case, tile, on(arch)) <= on(arch).shared_memory_per_block


@given(
    st.sampled_from(list(TILED_KERNELS)), st.sampled_from(DTYPES), st.integers(1, 576), st.sampled_from(ARCHITECTURES),
    st.builds(Tile, *[st.integers(-16, 300)] * 2, st.integers(-1, 20), st.integers(-1, 6)),
)  # fmt: skip
def test_a_tile_is_accepted_or_answered_with_legal_ones(kernel: Any, dtype: str, head_dim: int, arch: str, tile: Tile) -> None:
    kernel_case = KernelCase(TILED_KERNELS[kernel], dtype, head_dim)
    if tile_rules.broken_rule(kernel_case, tile, on(arch)) is None:
        assert tile_choice.check_tile(kernel_case, tile, on(arch)) is tile
        assert kernel_cases.shared_bytes(kernel_case, tile, on(arch)) <= on(arch).shared_memory_per_block
        return
    with pytest.raises(TileError) as caught:
        tile_choice.check_tile(kernel_case, tile, on(arch))
    legal = tile_choice.legal_tiles_for(kernel_case, on(arch))
    nearest = tiles_named_in(caught.value.hint)
    assert len(nearest) == min(3, len(legal))
    assert set(nearest) <= set(legal)
    assert str(tile) in caught.value.got


def test_the_nearest_tile_is_near() -> None:
    with pytest.raises(TileError) as caught:
        tile_choice.check_tile(case(), Tile(64, 60, 4, 2), on())
    assert tiles_named_in(caught.value.hint)[0] == Tile(64, 64, 4, 2)


# --- Pinned tiles run ---------------------------------------------------------------------------------------------------------------------

FORWARD = [
    Tile(16, 16, 1, 1), Tile(16, 128, 1, 2), Tile(32, 64, 1, 3), Tile(32, 48, 2, 1), Tile(64, 32, 2, 2), Tile(48, 80, 3, 2), Tile(96, 32, 3, 1),
    Tile(64, 112, 4, 2), Tile(128, 64, 4, 3), Tile(80, 16, 5, 4), Tile(112, 64, 7, 2), Tile(128, 32, 8, 3), Tile(256, 16, 8, 1), Tile(256, 32, 16, 1),
]  # fmt: skip
BACKWARD = [
    Tile(16, 16, 1, 1), Tile(64, 16, 1, 2), Tile(16, 32, 1, 3), Tile(32, 64, 2, 1), Tile(48, 48, 3, 2), Tile(80, 64, 4, 2), Tile(16, 128, 4, 3),
    Tile(112, 64, 4, 1), Tile(32, 128, 8, 2), Tile(16, 256, 8, 1), Tile(16, 80, 5, 4),
]  # fmt: skip


def named(tile: Tile) -> str:
    return f"{tile.tile_q}x{tile.tile_kv}_w{tile.num_warps}_s{tile.num_stages}"


def without_stages_on_turing(target: Target, tile: Tile) -> Tile:
    """The same tile where there is cp.async; sm_75 knows one stage only."""
    return tile if target.device.capability >= 80 else Tile(tile.tile_q, tile.tile_kv, tile.num_warps, 1)


@pytest.mark.sample(3)
@pytest.mark.parametrize("tile", FORWARD, ids=named)
def test_pinned_forward_tile(target: Target, tile: Tile) -> None:
    """Every tile of a call is legal and used, one row of tiles after the other, masked and not."""
    tile = without_stages_on_turing(target, tile)
    query = target.random((1, 150, 2, 40), target.half, 1)
    key, value = (target.random((1, 170, 1, 40), target.half, seed) for seed in (2, 3))
    for options in ({}, {"is_causal": True}):
        target.check(query, key, value, backward=False, tile=tile, enable_gqa=True, **options)


@pytest.mark.sample(2)
@pytest.mark.parametrize("tile", BACKWARD, ids=named)
def test_pinned_backward_tile(target: Target, tile: Tile) -> None:
    """One tile for all: the dQ kernel takes it transposed."""
    tile = without_stages_on_turing(target, tile)
    query = target.random((1, 150, 2, 40), target.half, 1)
    key, value = (target.random((1, 170, 1, 40), target.half, seed) for seed in (2, 3))
    for options in ({}, {"is_causal": True, "causal_alignment": "bottom_right"}):
        target.check(query, key, value, backward_tile=tile, enable_gqa=True, **options)


@pytest.mark.sample(1)
@pytest.mark.parametrize("tile", [Tile(32, 32, 2, 2), Tile(48, 16, 3, 1), Tile(16, 64, 1, 3), Tile(64, 48, 4, 2)], ids=named)
def test_pinned_float32_tile(target: Target, tile: Tile) -> None:
    tile = without_stages_on_turing(target, tile)
    inputs = [target.random((1, 100, 1, 32), "float32", seed) for seed in (1, 2, 3)]
    target.check(*inputs, tile=tile, backward_tile=tile.transposed(), is_causal=True)


@pytest.mark.parametrize("pinned", [
    {"backward_dq": Tile(32, 96, 2, 1)},
    {"backward_dkdv": Tile(48, 16, 1, 1)},
    {"backward_dq": Tile(48, 16, 3, 1), "backward_dkdv": Tile(16, 64, 2, 1)},
    {},
], ids=["dq", "dkdv", "both", "none"])  # fmt: skip
def test_tiles_by_kernel(target: Target, pinned: dict[str, Tile]) -> None:
    inputs = [target.random((1, 130, 1, 40), target.half, seed) for seed in (1, 2, 3)]
    target.check(*inputs, backward_tile=pinned)
    planned = {kernel.name: kernel.tile for kernel in cuflash.plan(*inputs, backward=True, tile=pinned).kernels}
    for name, tile in pinned.items():
        assert planned[name] == tile


def test_calls_with_tiles_by_kernel_are_kept(simulator: Target) -> None:
    """By what the mapping holds, types included."""
    inputs = [simulator.random((1, 30, 1, 40), simulator.half, seed) for seed in (1, 2, 3)]
    for pinned, more in ((Tile(32, 32, 2, 1), 1), (Tile(32, 32, 2, 1), 0), (Tile(32, 16, 2, 1), 1), (Tile(32, 32, 2, 1), 0)):
        before = num_prepared()
        cuflash.scaled_dot_product_attention(*inputs, tile={"forward": pinned})
        assert num_prepared() == before + more
    with pytest.raises(TileError):
        cuflash.scaled_dot_product_attention(*inputs, tile={"forward": Tile(32.0, 32, 2, 1)})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["backward_dk", "backward_dv"])
def test_tiles_of_the_kernels_for_dk_and_dv_alone(target: Target, name: str) -> None:
    """They run where K and V are broadcast differently."""
    query, value = (target.random((2, 70, 1, 40), target.half, seed) for seed in (1, 2))
    key = target.random((1, 70, 1, 40), target.half, 3)
    target.check(query, key, value, backward_tile={name: Tile(48, 64, 2, 1)})


def test_a_tile_changes_rounding_only(target: Target) -> None:
    """The same problem in two tilings: not the same bits, as a proof that the tile is taken, but the same numbers."""
    inputs = [target.random((1, 200, 1, 64), "float32", seed) for seed in (1, 2, 3)]
    small, large = (target.run(*inputs, tile=tile, backward=False) for tile in (Tile(16, 16, 1, 1), Tile(32, 64, 2, 1)))
    assert small.bits() != large.bits()
    assert abs(target.host(small.out) - target.host(large.out)).max() < 1e-5


def test_an_illegal_tile_of_a_call_is_refused_before_anything_runs(target: Target) -> None:
    inputs = [target.random((1, 16, 1, 64), target.half, seed) for seed in (1, 2, 3)]
    with pytest.raises(TileError, match=r"tile: got Tile\(tile_q=60.*multiple of 16 \* num_warps = 64.*Nearest legal tiles: Tile"):
        cuflash.scaled_dot_product_attention(*inputs, tile=Tile(60, 64, 4, 1))
    with pytest.raises(TileError, match="backward_dq"):
        target.run(*inputs, backward_tile={"backward_dq": Tile(60, 64, 4, 1)})


@pytest.mark.parametrize("name", ["forward", "dq", "backward_delta", "backward_dk", ""], ids=lambda name: name or "empty")
def test_a_tile_for_a_kernel_that_does_not_run_is_refused(simulator: Target, name: str) -> None:
    inputs = [simulator.random((1, 16, 1, 64), "bfloat16", seed) for seed in (1, 2, 3)]
    with pytest.raises(TileError, match="kernels that run: backward_dkdv, backward_dq"):
        simulator.run(*inputs, backward_tile={name: Tile(64, 64, 4, 1)})


def test_a_mapping_for_the_forward_pass_names_its_one_kernel(simulator: Target) -> None:
    inputs = [simulator.random((1, 16, 1, 64), "bfloat16", seed) for seed in (1, 2, 3)]
    (kernel,) = cuflash.plan(*inputs, tile={"forward": Tile(32, 16, 2, 1)}).kernels
    assert kernel.tile == Tile(32, 16, 2, 1)
    with pytest.raises(TileError, match="forward"):
        cuflash.scaled_dot_product_attention(*inputs, tile={"backward_dq": Tile(64, 64, 4, 1)})


@pytest.mark.parametrize(("arch", "kernel", "head_dim"), measured_tiles.TILES, ids=str)
def test_measured_tiles_are_defaults_of_16_bit_types(arch: str, kernel: Any, head_dim: int) -> None:
    device_, measured = on(arch), Tile(*measured_tiles.TILES[arch, kernel, head_dim])
    for dtype in ("float16", "bfloat16"):
        assert tile_choice.default_tile(case(kernel, dtype, head_dim), device_) == measured
    others = [case(kernel, "float32", head_dim), case(kernel, "float16", head_dim + 1)]
    with_sinks = replace(case(kernel, "float16", head_dim), features=FeatureSet(sinks=True))
    fitting = [Tile(*tile) for tile, alone in measured_tiles.WITH_FEATURE.get((arch, kernel, head_dim), {}).items() if "sinks" in alone]
    assert tile_choice.measured_tile(with_sinks, device_) == (fitting[0] if fitting else None), "one feature that leaves it room"
    assert all(tile_choice.measured_tile(other, device_) is None for other in others)


@pytest.mark.parametrize(("arch", "kernel", "head_dim"), predicted_tiles.TILES, ids=str)
def test_predicted_tiles_are_defaults_where_nothing_was_measured(arch: str, kernel: Any, head_dim: int) -> None:
    assert (arch, kernel, head_dim) not in measured_tiles.TILES
    device_, predicted = on(arch), Tile(*predicted_tiles.TILES[arch, kernel, head_dim])
    plain = case(kernel, "float16", head_dim)
    assert tile_choice.default_tile(plain, device_) == predicted
    assert tile_choice.tolerated_spills(plain, predicted, device_) == tile_choice.TOLERATED_SPILLS
    assert tile_choice.tolerated_spills(case(kernel, "float32", head_dim), predicted, device_) == 0
    assert tile_choice.tolerated_spills(plain, Tile(16, 16, 1, 1), device_) == 0


def of_mask(name: str) -> str | None:
    """The element type of a mask that an entry of a table is about, odd or not; None where it is about another feature."""
    return next((dtype for dtype in MASK_DTYPES if name in (dtype, f"odd {dtype}")), None)


@pytest.mark.parametrize(("arch", "kernel", "head_dim"), predicted_tiles.FLOAT32, ids=str)
def test_predicted_tiles_of_float32_are_those_of_calls_without_features(arch: str, kernel: Any, head_dim: int) -> None:
    device_, predicted = on(arch), Tile(*predicted_tiles.FLOAT32[arch, kernel, head_dim])
    plain = case(kernel, "float32", head_dim)
    assert tile_choice.default_tile(plain, device_) == predicted
    for other in (
        replace(plain, allow_tf32=True),
        replace(plain, head_dim_v=head_dim + 8),
        replace(plain, features=FeatureSet(sinks=True)),
    ):
        assert tile_choice.known_tile(other, device_) is None


@pytest.mark.parametrize(("arch", "kernel", "head_dim"), {**measured_tiles.WITH_FEATURE, **predicted_tiles.WITH_FEATURE}, ids=str)
def test_tiles_of_calls_with_features(arch: str, kernel: Any, head_dim: int) -> None:
    """Every feature has at most one tile, and calls with several take the last of theirs, which leaves most room."""
    table = {**measured_tiles.WITH_FEATURE, **predicted_tiles.WITH_FEATURE}[arch, kernel, head_dim]
    device_, plain = on(arch), case(kernel, "float16", head_dim)

    def of_features(*names: str) -> KernelCase:
        mask = next((name for name in names if of_mask(name)), None)
        features = FeatureSet(of_mask(mask or ""), **{name: True for name in names if name != mask})
        return replace(plain, features=features, mask_in_chunks=not (mask or "").startswith("odd "))

    def chosen(*names: str) -> Tile:
        return tile_choice.default_tile(of_features(*names), device_)

    some = min(next(iter(table.values())))
    tolerated = tile_choice.tolerated_spills(of_features(some), chosen(some), device_)
    timed = (arch, kernel, head_dim) in measured_tiles.WITH_FEATURE
    assert tolerated == (0 if timed else tile_choice.TOLERATED_SPILLS), "those of an H100 were not timed with features"
    placed = [(place, name) for place, alone in enumerate(table.values()) for name in sorted(alone)]
    assert len({name for _, name in placed}) == len(placed)
    tiles = [Tile(*tile) for tile in table]
    for place, name in placed:
        assert chosen(name) == tiles[place]
    for (place, name), (other_place, other) in itertools.combinations(placed, 2):
        if not of_mask(name) and not of_mask(other):
            assert chosen(name, other) == tiles[max(place, other_place)]


def test_a_feature_without_a_tile_leaves_the_choice_to_the_model() -> None:
    plain, device_ = case("forward", "float16", 64), on("sm_86")
    for features in (FeatureSet(window=True), FeatureSet("float32", window=True)):
        assert tile_choice.known_tile(replace(plain, features=features), device_) is None
        assert tile_choice.tolerated_spills(replace(plain, features=features), Tile(128, 96, 4, 1), device_) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize(("arch", "kernel", "head_dim"), {**measured_tiles.WITH_FEATURE, **predicted_tiles.WITH_FEATURE}, ids=str)
def test_tiles_leave_room_for_a_feature(arch: str, kernel: Any, head_dim: int) -> None:
    """Causal, which takes more registers than full; measured ones spill nothing, as their table says."""
    pytest.importorskip("cupy")
    measured = measured_tiles.WITH_FEATURE.get((arch, kernel, head_dim), {})
    for tile, alone in (measured or predicted_tiles.WITH_FEATURE[arch, kernel, head_dim]).items():
        for name in sorted(alone):
            if name.startswith("odd "):
                continue
            features = FeatureSet(attn_mask=name) if name in MASK_DTYPES else FeatureSet(**{name: True})
            planned = offline_kernels(on(arch), dtype="bfloat16", head_dim=head_dim, is_causal=True, features=features)
            (found,) = (of for of in planned if of.name == kernel)
            assert found.tile == Tile(*tile)
            request = replace(found.request(on(arch)), target="cubin")
            spilled = cache.fetch(request).resources_of(found.entry).spill_store_bytes
            assert spilled <= (0 if measured else tile_choice.TOLERATED_SPILLS), name
