"""Lists of the tiles that packed sequences have (kernels/packed_tiles.cu): what is in them, which calls make one, and that they change no bit of any result."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy
import pytest
from conftest import Target

import cuflash
from cuflash import Tile
from cuflash.cli.samples import Sample, problem_of
from cuflash.hardware import device
from cuflash.planning import kernel_specs, packed_tiles
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.offline import offline_kernels
from cuflash.planning.planner import make_plan
from cuflash.problem.problem import Problem
from cuflash.runtime import arguments, calls, launch
from cuflash.runtime.prepared import PreparedCall

pytest.importorskip("cupy")

ON = device.of_arch("sm_80")
ALWAYS, NEVER = -(2**31), 2**31
LENGTHS_Q, LENGTHS_KV = (1, 0, 300, 64, 65, 0, 17, 128, 40), (5, 30, 333, 64, 0, 0, 170, 3, 41)


def offsets_of(lengths: tuple[int, ...]) -> Any:
    return numpy.cumsum([0, *lengths], dtype="int32")


def packed_problem(causal: str | None, **changes: Any) -> Problem:
    """Of those lengths, with rows behind the last sequence, and room for a longer one."""
    sample = Sample(
        lengths_q=LENGTHS_Q, lengths_kv=LENGTHS_KV, num_heads_q=4, num_heads_kv=2, head_dim=32, is_causal=causal is not None, causal_alignment=causal
    )  # fmt: skip
    problem = problem_of(sample, backward=False)
    return replace(problem, max_seqlen_q=320, max_seqlen_kv=340, **changes)


def list_kernel(kernel: str, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> KernelPlan:
    """Of the kernel of that name, with tiles of 64 rows."""
    monkeypatch.setattr(packed_tiles, "EMPTY_BLOCKS", ALWAYS)
    tile = {"backward_dkdv": Tile(64, 64, 4, 1), "backward_dq": Tile(64, 64, 4, 1)} if kernel != "forward" else Tile(64, 64, 4, 2)
    kernels = make_plan(problem, ON, backward=kernel != "forward", tile=tile).kernels
    return next(before for before, of in itertools.pairwise(kernels) if of.name == kernel)


def run(kernel: KernelPlan, problem: Problem, words: dict[str, Any]) -> list[tuple[int, int]]:
    """The list that the kernel makes: tiles and their sequences."""
    memory = words | {"packed_tiles": numpy.zeros(2 * (1 + kernel.packed_places), "int32")}
    addresses = {name: array.ctypes.data for name, array in memory.items()}
    extents = {name: (0, array.nbytes) for name, array in memory.items()}
    values = {
        "geometry": arguments.geometry(problem, kernel.num_tiles),
        "lengths": arguments.lengths(problem, kernel.packed_places),
    }
    struct = arguments.Arguments(kernel.spec.arguments, values, set(memory)).fill(addresses)
    buffers = launch.simulated_memory(extents, addresses, {"packed_tiles"})
    launch.executable(kernel, ON).launch(kernel.shape, struct, 0, buffers)
    count, zero = memory["packed_tiles"][:2]
    assert zero == 0
    return [(int(tile), int(of)) for tile, of in memory["packed_tiles"][2 : 2 + 2 * min(count, kernel.packed_places)].reshape(-1, 2)]


def expected(
    kernel: str, causal: str | None, places: tuple[int, ...], used_q: tuple[int, ...], used_kv: tuple[int, ...]
) -> list[tuple[int, int]]:
    """The same by sorting what tiles walk over."""
    found = []
    for sequence, (place, seqlen_q, seqlen_kv) in enumerate(zip(places, used_q, used_kv, strict=True)):
        offset = seqlen_kv - seqlen_q if causal == "bottom_right" else 0
        for tile in range(-(-place // 64)):
            if kernel == "backward_dkdv":
                seen = seqlen_q - (min(max(64 * tile - offset, 0), seqlen_q) if causal else 0)
                length = seen if 64 * tile < seqlen_kv else 0
            else:
                seen = min(max(64 * (tile + 1) + offset, 0), seqlen_kv) if causal else seqlen_kv
                length = seen if 64 * tile < seqlen_q else 0
            found.append((-length, sequence, tile))
    return [(tile, sequence) for _, sequence, tile in sorted(found)]


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
@pytest.mark.parametrize("kernel", ["forward", "backward_dkdv", "backward_dq"])
def test_every_tile_is_listed_once_and_the_longest_first(kernel: str, causal: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = packed_problem(causal)
    words = {"cu_seqlens_q": offsets_of(LENGTHS_Q), "cu_seqlens_kv": offsets_of(LENGTHS_KV)}
    places = LENGTHS_KV if kernel == "backward_dkdv" else LENGTHS_Q
    found = run(list_kernel(kernel, problem, monkeypatch), problem, words)
    assert found == expected(kernel, causal, places, LENGTHS_Q, LENGTHS_KV)


def test_tiles_of_a_place_that_its_sequence_does_not_use_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = packed_problem("bottom_right", in_places=True)
    used_q, used_kv = tuple(of // 3 for of in LENGTHS_Q), tuple(of // 2 for of in LENGTHS_KV)
    words = {"cu_seqlens_q": offsets_of(LENGTHS_Q), "cu_seqlens_kv": offsets_of(LENGTHS_KV)}
    words |= {"seqused_q": numpy.array(used_q, "int32"), "seqused_kv": numpy.array(used_kv, "int32")}
    found = run(list_kernel("forward", problem, monkeypatch), problem, words)
    assert found == expected("forward", "bottom_right", LENGTHS_Q, used_q, used_kv)
    assert len(found) == sum(-(-of // 64) for of in LENGTHS_Q)


def test_offsets_that_make_no_sense_stay_within_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that overlap have more tiles than there are places."""
    problem = packed_problem("bottom_right")
    total = sum(LENGTHS_Q)
    words = {
        "cu_seqlens_q": numpy.array([0, total, 0, total, -5, 2**31 - 1, 7, total, 0, total], "int32"),
        "cu_seqlens_kv": offsets_of(LENGTHS_KV),
    }
    kernel = list_kernel("forward", problem, monkeypatch)
    found = run(kernel, problem, words)
    assert len(found) == len(set(found)) == kernel.packed_places


def test_tiles_that_are_too_many_to_count_stay_behind_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many sequences that overlap that the number of their tiles is no int: those of the first one, which have least to walk over, have no place."""
    kernel = list_kernel("forward", packed_problem(None), monkeypatch)
    kernel = replace(kernel, num_tiles=2**25, packed_places=100, shape=kernel.shape._replace(num_blocks=1))
    rows, sequences = 64 * 2**25 - 2**13, 140
    problem = packed_problem(None, seqlen_q=rows, seqlen_kv=rows, num_sequences=sequences)
    cu_q, cu_kv = (numpy.array([0, first] + [0, rows] * (sequences // 2 - 1) + [0], "int32") for first in (rows, 5))
    found = run(kernel, problem, {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv})
    assert found == []


# --- Calls --------------------------------------------------------------------------------------------------------------------------------

WGMMA = {"CUFLASH_FORWARD_WGMMA": "1", "CUFLASH_BACKWARD_WGMMA": "1"}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("way", ["two kernels", "fused", "wgmma"])
def test_a_list_changes_no_bit(way: str, causal: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Both passes, with rows of nobody before, between and behind sequences."""
    if way == "wgmma" and not request.config.getoption("--exhaustive"):
        pytest.skip("compiles kernels of a second architecture: --exhaustive")
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90" if way == "wgmma" else "sm_80")
    for name, value in ({"CUFLASH_FUSED_BACKWARD": str(int(way == "fused"))} if way != "wgmma" else WGMMA).items():
        monkeypatch.setenv(name, value)
    head_dim = 64 if way == "wgmma" else 32
    rng = numpy.random.default_rng(0)
    cu_q, cu_kv = offsets_of(LENGTHS_Q) + 3, offsets_of(LENGTHS_KV)
    cu_q[0] = 0
    query = rng.standard_normal((cu_q[-1] + 70, 4, head_dim)).astype("float16")
    key, value = rng.standard_normal((2, cu_kv[-1] + 9, 2, head_dim)).astype("float16")
    options = {"max_seqlen_q": 320, "max_seqlen_kv": 340, "is_causal": causal, "enable_gqa": True}
    options |= {"seqused_q": numpy.array([of // 2 for of in LENGTHS_Q], "int32")} if way == "two kernels" else {}
    results = []
    for most in (NEVER, ALWAYS):
        monkeypatch.setattr(packed_tiles, "EMPTY_BLOCKS", most)
        monkeypatch.setattr(calls, "_calls", {})
        out, lse = cuflash.varlen_attention(query, key, value, cu_q, cu_kv, return_lse=True, **options)
        gradients = cuflash.varlen_attention_backward(out, query, key, value, out, lse, cu_q, cu_kv, **options)
        prepared = {id(of): of for of in calls._calls.values() if isinstance(of, PreparedCall)}.values()
        listed = [kernel.packed_places > 0 for of in prepared for kernel in of.plan.kernels if kernel.spec.is_tiled]
        assert len(listed) >= 2
        assert set(listed) == {most == ALWAYS}
        results.append([array.tobytes() for array in (out, lse, *gradients[:3])])
    assert results[0] == results[1]


def plan_of(lengths: tuple[int, ...], **changes: Any) -> Any:
    sample = Sample(lengths_q=lengths, num_heads_q=16, num_heads_kv=8, head_dim=64, is_causal=True, **changes)
    return make_plan(problem_of(sample, backward=False), device.of_arch("sm_80", "gpu"))


def test_lengths_that_differ_make_a_list() -> None:
    """The grid is for the tiles that there are at most; lengths that are much alike make none, and neither do padded batches and few blocks."""
    alike, differing, few = plan_of((1000, 1024) * 8), plan_of((64,) * 63 + (4096,)), plan_of((64, 512))
    assert [kernel.name for kernel in alike.kernels] == [kernel.name for kernel in few.kernels] == ["forward"]
    before, forward = differing.kernels
    assert before.spec == kernel_specs.PACKED_TILES
    places = (63 * 64 + 4096) // forward.tile.tile_q + 64 + 1
    assert forward.num_blocks == 16 * places < 16 * 65 * (4096 // forward.tile.tile_q) / 10
    assert {of.name: of.nbytes for of in differing.workspace} == {"packed_tiles": 8 * (1 + places)}
    assert "a list of those that there are" in str(differing)
    assert "a list" not in str(alike)


def test_warmup_compiles_what_makes_lists() -> None:
    """A call must not have to compile it because lengths differ."""
    on = device.of_arch("sm_80", "gpu")
    kernels = offline_kernels(on, dtype="float16", head_dim=64, is_causal=True, varlen=True, every_way=True)
    compiled = {kernel.request(on) for kernel in kernels}
    sample = Sample(lengths_q=(64,) * 63 + (4096,), num_heads_q=16, num_heads_kv=8, head_dim=64, is_causal=True)
    for backward in (False, True):
        plan = make_plan(problem_of(sample, backward=backward), on, backward=backward)
        made = [kernel for kernel in plan.kernels if kernel.spec == kernel_specs.PACKED_TILES]
        assert made
        assert {kernel.request(on) for kernel in made} <= compiled


def test_many_sequences_of_one_token(simulator: Target) -> None:
    """A list of its own accord: 300 sequences of one query and key, and one of 500."""
    del simulator
    cu = offsets_of((1,) * 150 + (500,) + (1,) * 150)
    rng = numpy.random.default_rng(1)
    query, key, value = rng.standard_normal((3, cu[-1], 2, 32)).astype("float16")
    out, lse = cuflash.varlen_attention(query, key, value, cu, cu, max_seqlen_q=500, max_seqlen_kv=500, is_causal=True, return_lse=True)
    expected_out, expected_lse = cuflash.reference.varlen_attention(query, key, value, cu, cu, is_causal=True)[:2]
    assert numpy.abs(out - expected_out).max() < 2e-3
    assert numpy.abs(lse - expected_lse).max() < 1e-3
