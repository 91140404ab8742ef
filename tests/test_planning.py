"""The room `cuflash.planning`: which kernels a problem takes, their grids, memory and text. Nothing here runs."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import checked

import cuflash
from cuflash.cli.samples import stand_in
from cuflash.errors import TileError, UnsupportedError
from cuflash.hardware import device
from cuflash.hardware.device import ARCHITECTURES
from cuflash.jit import cache
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import tile_choice
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import LaunchShape
from cuflash.planning.kernel_specs import BACKWARD_DK, BACKWARD_DKDV, BACKWARD_DQ, BACKWARD_DV, BACKWARD_FUSED, FORWARD
from cuflash.planning.offline import offline_kernels
from cuflash.planning.plan import Plan
from cuflash.planning.planner import backward_kernels, make_plan
from cuflash.planning.split_forward import MAX_QUERIES
from cuflash.problem.cache_call import MAX_SPLITS
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile
from cuflash.runtime import calls, launch

FEATURES = ("DROPOUT", "WINDOW", "SOFTCAP", "ALIBI", "SINKS", "SEGMENTS", "PREFIX")
SM_80 = device.of_arch("sm_80", "gpu")


def problem_of(
    q: tuple[int, ...], k: tuple[int, ...] | None = None, v: tuple[int, ...] | None = None, dtype: str = "float16", **options: Any
) -> Problem:
    """A problem of any size: the arrays say so without having the memory."""
    shapes = (q, k or q, v or k or q)
    return checked(*(stand_in(shape, dtype) for shape in shapes), enable_gqa=True, **options)


def plan_of(*shapes: Any, backward: bool = False, tile: Any = None, arch: str = "sm_80", **options: Any) -> Plan:
    return make_plan(problem_of(*shapes, **options), device.of_arch(arch, "gpu"), backward=backward, tile=tile)


# --- Which kernels ------------------------------------------------------------------------------------------------------------------------


def test_forward_is_one_kernel() -> None:
    plan = plan_of((2, 100, 4, 64), tile=Tile(64, 32, 4, 2))
    (kernel,) = plan.kernels
    assert (kernel.name, kernel.source, kernel.entry) == ("forward", "forward_mma.cu", "forward_mma")
    assert (kernel.num_threads, kernel.num_tiles, kernel.num_blocks) == (128, 2, 2 * 2 * 4)
    assert kernel.shared_bytes == 128 * (64 + 2 * 2 * 32)
    assert (kernel.group_batch, kernel.group_heads) == (1, 1)
    assert plan.workspace_bytes == 0


def test_backward_is_delta_then_the_gradients() -> None:
    plan = plan_of((2, 100, 8, 48), (2, 300, 2, 48), backward=True, tile=Tile(32, 64, 4, 2))
    delta, dkdv, dq = plan.kernels
    assert [kernel.name for kernel in plan.kernels] == ["backward_delta", "backward_dkdv", "backward_dq"]
    assert (dkdv.tile, dkdv.num_tiles, dkdv.num_blocks) == (Tile(32, 64, 4, 2), 5, 5 * 2 * 2)
    assert (dkdv.group_batch, dkdv.group_heads) == (1, 4)
    assert (dq.tile, dq.num_tiles, dq.num_blocks) == (Tile(64, 32, 4, 2), 2, 2 * 2 * 8)
    assert (delta.num_threads, delta.num_blocks, delta.shared_bytes) == (128, math.ceil(100 / 16) * 2 * 8, 0)


@pytest.mark.parametrize(
    ("key", "value", "dk", "dv"),
    [
        ((1, 50, 4, 64), (2, 50, 4, 64), (2, 2, 4), (1, 2, 8)),
        ((2, 50, 1, 64), (1, 50, 4, 64), (1, 8, 2), (2, 2, 4)),
        ((2, 50, 4, 64), (1, 50, 1, 64), (1, 2, 8), (2, 8, 1)),
    ],
    ids=["key_batch", "key_heads", "value_both"],
)
def test_keys_and_values_broadcast_differently_take_a_kernel_each(key: Any, value: Any, dk: Any, dv: Any) -> None:
    """Each sums over its own batches and heads: (group_batch, group_heads, (batch, head) pairs of its grid)."""
    plan = plan_of((2, 100, 8, 64), key, value, backward=True)
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    assert list(kernels) == ["backward_delta", "backward_dv", "backward_dk", "backward_dq"]
    for name, (group_batch, group_heads, pairs) in (("backward_dk", dk), ("backward_dv", dv)):
        kernel = kernels[name]
        assert (kernel.group_batch, kernel.group_heads, kernel.num_blocks // kernel.num_tiles) == (group_batch, group_heads, pairs)
        assert kernel.source == "backward_dkdv_mma.cu"
    assert "COMPUTE_DK = true" in kernels["backward_dk"].config
    assert "COMPUTE_DV = false" in kernels["backward_dk"].config
    assert "COMPUTE_DK = false" in kernels["backward_dv"].config
    assert "COMPUTE_DV = true" in kernels["backward_dv"].config


def test_keys_and_values_broadcast_alike_share_a_kernel() -> None:
    plan = plan_of((4, 100, 8, 80), (1, 50, 1, 80), backward=True)
    assert [kernel.name for kernel in plan.kernels] == ["backward_delta", "backward_dkdv", "backward_dq"]
    assert (plan.kernels[1].group_batch, plan.kernels[1].group_heads) == (4, 8)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_large_head_dims_take_a_kernel_each(arch: str) -> None:
    """Both accumulators of 256 columns would take 256 registers per thread and 16 rows."""
    assert backward_kernels(problem_of((1, 8, 1, 256)), device.of_arch(arch)) == (BACKWARD_DV, BACKWARD_DK, BACKWARD_DQ)
    assert backward_kernels(problem_of((1, 8, 1, 80)), device.of_arch(arch)) == (BACKWARD_DKDV, BACKWARD_DQ)


@pytest.mark.parametrize(
    "shapes", [((0, 5, 2, 8),), ((2, 0, 2, 8),), ((2, 5, 0, 8),), ((2, 5, 2, 8), (2, 0, 2, 8))], ids=["batch", "queries", "heads", "keys"]
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_nothing_to_compute_takes_no_kernel(shapes: Any, backward: bool) -> None:
    plan = plan_of(*shapes, backward=backward)
    assert plan.kernels == ()
    assert plan.workspace_bytes == 0
    assert "none: there is nothing to compute" in str(plan)


# --- What a kernel is compiled for --------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 70_000), st.integers(1, 70_000), st.integers(1, 4000), st.integers(1, 8), st.integers(1, 4),
    st.sampled_from(["top_left", "bottom_right"]), st.floats(-10, 10),
)  # fmt: skip
def test_lengths_batches_heads_and_scale_are_not_compiled_in(
    seqlen_q: int, seqlen_kv: int, batch: int, heads_kv: int, group: int, alignment: str, scale: float
) -> None:
    """Nor strides: they decide only which of two ways a call takes, and all kernels of both are known ahead."""
    varied = ((batch, seqlen_q, heads_kv * group, 64), (batch, seqlen_kv, heads_kv, 64))
    known = {kernel.request(SM_80) for kernel in offline_kernels(SM_80, dtype="float16", head_dim=64, is_causal=True, every_way=True)}
    for backward in (False, True):
        plan = plan_of(*varied, backward=backward, is_causal=True, causal_alignment=alignment, scale=scale)
        assert {kernel.request(SM_80) for kernel in plan.kernels} <= known


@pytest.mark.parametrize(
    "change", [{"dtype": "float32"}, {"is_causal": True}, {"arch": "sm_86"}, {"head_dim": 72}, {"tile": Tile(64, 16, 4, 1)}], ids=str
)
def test_what_is_compiled_in_changes_the_request(change: dict[str, Any]) -> None:
    def request(head_dim: int = 64, arch: str = "sm_80", **options: Any) -> Any:
        (kernel,) = plan_of((1, 20, 1, head_dim), arch=arch, **options).kernels
        return kernel.request(device.of_arch(arch, "gpu"))

    assert request(**change) != request()


def test_rows_on_16_bytes_have_kernels_of_their_own() -> None:
    """Nothing of the copies element by element is in them."""
    x = numpy.zeros((1, 40, 2, 32), "float16")
    wide = numpy.zeros((1, 40, 2, 40), "float16")

    def config(*arrays: Any) -> str:
        plan = cuflash.plan(*arrays)
        assert ("copies     element by element" in str(plan)) == ("VECTORIZED = false" in plan.kernels[0].config)
        return plan.kernels[0].config

    chunks, elements = config(x, x, x), config(wide[..., 1:33], x, x)
    assert chunks.replace("VECTORIZED = true", "VECTORIZED = false") == elements != chunks
    assert config(wide[..., 8:], wide[:, ::-1, :, :32], wide[..., :32]) == chunks
    assert config(x, x, wide[..., 4:36]) == elements
    assert config(x, x[:, :, :, ::-1], x) == elements
    assert "VECTORIZED = false" in config(*[numpy.zeros((1, 40, 2, 36), "float16")] * 3)
    texts = [cache.fetch(CompileRequest("forward_mma.cu", text, "sm_80", "ptx")).data.decode() for text in (chunks, elements)]
    assert ["ld.global.u16" in text or "ld.global.nc.u16" in text for text in texts] == [False, True]


def test_allow_tf32_matters_to_float32_alone() -> None:
    def configs(dtype: str) -> list[str]:
        return [plan_of((1, 5, 1, 64), dtype=dtype, allow_tf32=allow).kernels[0].config for allow in (False, True)]

    assert len(set(configs("float32"))) == 2
    assert len(set(configs("float16"))) == 1


def test_config_says_all_that_the_kernel_is_told() -> None:
    (kernel,) = plan_of((1, 5, 1, 72), tile=Tile(64, 48, 4, 2), is_causal=True).kernels
    assert kernel.config == (
        '#include "ptx/types.cuh"\nstruct Config {\n  using Element = float16;\n'
        "  static constexpr int CAPABILITY = 80;\n  static constexpr int HEAD_DIM = 72;\n  static constexpr int HEAD_DIM_V = 72;\n"
        "  static constexpr int HEAD_SLICES = 1;\n  static constexpr int SLICE_PIECES = 1;\n"
        "  static constexpr int TILE_Q = 64;\n  static constexpr int TILE_KV = 48;\n"
        "  static constexpr int NUM_WARPS = 4;\n  static constexpr int NUM_STAGES = 2;\n"
        f"  static constexpr int SHARED_BYTES = {160 * (64 + 4 * 48)};\n"
        "  static constexpr bool CAUSAL = true;\n  static constexpr bool VARLEN = false;\n"
        "  static constexpr bool SEQLENS_KV = false;\n  static constexpr bool IN_PLACES = false;\n  static constexpr bool ALLOW_TF32 = false;\n  static constexpr bool VECTORIZED = true;\n  using MaskElement = NoMask;\n"
        "  static constexpr bool PAIR_MASK = false;\n"
        + "".join(f"  static constexpr bool {name} = false;\n" for name in (*FEATURES, "COPIES_MASK"))
        + "};\n"
    )


def test_a_request_is_a_cubin_for_a_gpu_and_ptx_for_the_simulator() -> None:
    (kernel,) = plan_of((1, 5, 1, 64)).kernels
    assert kernel.request(device.of_arch("sm_90", "gpu")).target == "cubin"
    assert kernel.request(device.of_arch("sm_90", "gpu")).arch == "sm_90a"
    assert kernel.request(device.of_arch("sm_80")).target == "ptx"
    assert kernel.request(device.of_arch("sm_80")).arch == "sm_80"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_offline_kernels_are_those_of_a_call(arch: str) -> None:
    on = device.of_arch(arch, "gpu")
    for head_dim in (64, 256, 512):
        calls_ = [
            problem_of((batch, seqlen_q, heads, head_dim), (batch, seqlen_kv, 2, head_dim), is_causal=True)
            for batch, heads, seqlen_q, seqlen_kv in (
                (1, 2, 1, 40_000),
                (1, 4, 16, 40_000),
                (1, 2, 500, 500),
                (3, 2, 4000, 4000),
                (64, 2, 4000, 4000),
                (1, 32, 4000, 60),
                (1, 8, 600, 60),
                (1, 32, 20, 60),
            )
        ]
        of_calls = {
            kernel.request(on)
            for problem in calls_
            for backward in (False, True)
            for kernel in make_plan(problem, on, backward=backward).kernels
        }
        offline = [kernel.request(on) for kernel in offline_kernels(on, dtype="float16", head_dim=head_dim, is_causal=True, every_way=True)]
        assert set(offline) == of_calls
        assert len(offline) == len(of_calls)


# --- Memory and limits --------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 100), st.integers(1, 64), st.sampled_from([1, 64, 100, 128, 256, 576]))
def test_memory_is_linear_in_the_lengths(seqlen_q: int, seqlen_kv: int, batch: int, heads: int, head_dim: int) -> None:
    """Outputs; eight bytes per query row, sums of dQ in the place of which four arrays like it would fit, parts of few queries, and of few tiles of keys four blocks for each SM; no plan has room for a matrix of scores."""
    shapes = ((batch, seqlen_q, heads, head_dim), (batch, seqlen_kv, heads, head_dim))
    rows, keys = batch * heads * seqlen_q, batch * heads * seqlen_kv
    forward, with_lse, backward = plan_of(*shapes), plan_of(*shapes, return_lse=True), plan_of(*shapes, backward=True)
    parts = 4 * MAX_SPLITS * rows * (head_dim + 2) if seqlen_q <= MAX_QUERIES else 0
    assert (forward.output_bytes, with_lse.output_bytes) == (2 * rows * head_dim, 2 * rows * head_dim + 4 * rows)
    assert 0 <= forward.workspace_bytes == with_lse.workspace_bytes <= parts
    assert backward.output_bytes == 2 * (rows + 2 * keys) * head_dim
    is_fused = BACKWARD_FUSED in {kernel.spec for kernel in backward.kernels}
    parts_of_keys = 4 * 108 * 4 * 128 * 2 * head_dim if any(kernel.splits.chains for kernel in backward.kernels) else 0
    assert 0 <= backward.workspace_bytes - 8 * rows <= (4 * (1 + rows) + 8 * rows * head_dim if is_fused else parts_of_keys)


def test_gradients_of_broadcast_inputs_have_their_size() -> None:
    plan = plan_of((4, 100, 8, 64), (1, 50, 2, 64), (4, 50, 1, 64), backward=True)
    assert plan.output_bytes == 2 * 64 * (4 * 100 * 8 + 50 * 2 + 4 * 50)


def test_more_blocks_than_a_grid_has_are_refused() -> None:
    """2**31 - 1 in x, and far more than 65535 before that."""
    tile = Tile(16, 16, 1, 1)
    assert plan_of((65_536, 16, 32_767, 8), tile=tile).kernels[0].num_blocks == 65_536 * 32_767 > 2**31 - 2**17
    with pytest.raises(
        UnsupportedError, match=r"query: got 2147483648 tiles over batch and heads; expected at most 2147483647. Split the call"
    ):
        plan_of((65_536, 16, 32_768, 8), tile=tile)


# --- The public call ----------------------------------------------------------------------------------------------------------------------


def test_plan_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    query, key = numpy.zeros((2, 1000, 8, 64), numpy.float16), numpy.zeros((2, 500, 2, 64), numpy.float16)
    options: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right", "enable_gqa": True, "scale": 0.25}
    text = str(cuflash.plan(query, key, key, tile=Tile(64, 32, 4, 2), return_lse=True, **options))
    assert text.splitlines() == [
        "forward attention on cuflash simulator (sm_80)",
        "  problem    float16, batch 2, seqlen 1000 x 500, 8/2 heads, head_dim 64, causal (bottom_right), scale 0.25",
        "  products   tensor cores, float16 with float32 sums",
        "  kernel     forward: forward_mma.cu, tile_q=64, tile_kv=32, num_warps=4, num_stages=2, 256 blocks of 128 threads, 24576 bytes of shared memory",
        "  tile by    forward: pinned",
        "  tiles      forward visits 80 of 256 per head",
        "  memory     outputs 2.014 MiB, workspace 0 B; unfused attention would take 30.52 MiB more",
        "  work       0.513 GFLOP in matrix products over visible pairs; the same bits on every run",
    ]
    text = str(cuflash.plan(query, key, key, backward=True, **options))
    assert text.startswith("backward attention on cuflash simulator (sm_80)")
    for kernel in (
        "backward_delta: backward_delta.cu",
        "backward_dkdv: backward_dkdv_mma.cu",
        "queries of a tile of keys in 10 splits",
        "backward_dkdv_merge: backward_dkdv_merge.cu",
        "backward_dq: backward_dq_mma.cu",
    ):
        assert kernel in text
    assert "workspace 10.12 MiB; unfused attention would take 61.04 MiB more" in text


@pytest.mark.parametrize(
    ("dtype", "arch", "options", "words"),
    [
        ("float16", "sm_75", {}, "tensor cores, float16 with float32 sums"),
        ("float32", "sm_75", {}, "float32 units: the tensor cores of sm_75 take float16 only"),
        ("float32", "sm_80", {}, "tensor cores, 3 x TF32 (float32 accuracy)"),
        ("float32", "sm_90", {"allow_tf32": True}, "tensor cores, TF32"),
    ],
)
def test_plan_says_how_products_are_computed(dtype: str, arch: str, options: dict[str, Any], words: str) -> None:
    lines = str(plan_of((1, 5, 1, 64), dtype=dtype, arch=arch, **options)).splitlines()
    assert f"  products   {words}" in lines


@pytest.mark.parametrize(
    ("options", "at_most"),
    [
        ({}, False),
        ({"is_causal": True, "window": (20, 0)}, False),
        ({"alibi_slopes": numpy.zeros(1, "float32"), "softcap": 30.0, "dropout_p": 0.1, "dropout_seed": 1}, False),
        ({"attn_mask": numpy.zeros((100, 100), "bool")}, True),
        ({"attn_mask": numpy.full((100, 100), -numpy.inf, "float32")}, True),
        ({"segment_ids_q": numpy.zeros((1, 100), "int32"), "segment_ids_kv": numpy.ones((1, 100), "int32")}, True),
        ({"is_causal": True, "prefix_lengths": numpy.zeros(1, "int32")}, True),
        ({"seqlens_kv": numpy.zeros(1, "int32")}, True),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_work_that_data_may_reduce_is_at_most(options: dict[str, Any], at_most: bool) -> None:
    x = numpy.zeros((1, 100, 1, 64), "float16")
    for backward in (False, True):
        (work,) = (line for line in str(cuflash.plan(x, x, x, backward=backward, **options)).splitlines() if "GFLOP" in line)
        assert work.startswith("  work       at most ") is at_most


def test_plan_counts_in_words_and_names_an_architecture_once() -> None:
    x, cu = numpy.zeros((250, 1, 64), "float16"), numpy.array([0, 250], "int32")
    lines = str(cuflash.varlen_plan(x, x, x, cu, cu, 100, 120, tile=Tile(64, 32, 4, 2))).splitlines()
    assert ", 1 packed sequence of 250 x 250 tokens in all, each of at most 100 x 120, 1 head, head_dim 64" in lines[1]
    x = numpy.zeros((1, 5, 1, 64), "float16")
    one = str(cuflash.plan(x, x, x))
    assert one.splitlines()[0].count(device.simulator_arch()) == 1
    assert ", 1 head, " in one
    assert ", 1 block of " in one
    on_a_gpu = make_plan(problem_of((1, 5, 1, 64)), replace(SM_80, name="NVIDIA A100"))
    assert str(on_a_gpu).splitlines()[0] == "forward attention on NVIDIA A100, sm_80"


def test_plan_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `plan` shows is what is launched: same kernels, grids and threads, in that order."""
    launched: list[tuple[str, int, int, int]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def launch(self, shape: LaunchShape, *rest: Any) -> None:
            launched.append((self.name, shape))

    monkeypatch.setattr(launch, "executable", lambda kernel, on: Recorder(kernel.name))
    monkeypatch.setattr(calls, "_calls", {})
    query, key = numpy.zeros((2, 333, 4, 56), numpy.float16), numpy.zeros((2, 222, 2, 56), numpy.float16)
    out, lse = cuflash.scaled_dot_product_attention(query, key, key, enable_gqa=True, return_lse=True)
    cuflash.scaled_dot_product_attention_backward(query, query, key, key, out, lse, enable_gqa=True)
    planned = [
        *cuflash.plan(query, key, key, enable_gqa=True).kernels,
        *cuflash.plan(query, key, key, enable_gqa=True, backward=True).kernels,
    ]
    assert launched == [(kernel.name, kernel.shape) for kernel in planned]


def test_unknown_names_of_kernels_in_a_mapping_raise() -> None:
    for backward, name in ((True, "forward"), (True, "dq"), (True, "backward_delta"), (False, "backward_dq"), (False, "fwd")):
        with pytest.raises(TileError, match=f"a tile for '{name}'"):
            plan_of((1, 8, 1, 64), backward=backward, tile={name: Tile(64, 64, 4, 1)})


def test_planning_needs_neither_gpu_nor_compiler() -> None:
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "from cuflash.hardware import device\n"
        "from cuflash.planning import offline\n"
        "kernels = list(offline.offline_kernels(device.of_arch('sm_90', 'gpu'), dtype='bfloat16', head_dim=128))\n"
        "assert len(kernels) == 4, kernels\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_plans_are_values() -> None:
    first, second = plan_of((1, 20, 1, 64)), plan_of((1, 20, 1, 64))
    assert first == second
    assert hash(first) == hash(second)
    assert first.kernels[0].tile == tile_choice.default_tile(KernelCase(FORWARD, "float16", 64), SM_80)
