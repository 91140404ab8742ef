"""Tiles for users, compilation ahead of time, and how often anything is compiled: once per kernel, whatever the lengths, threads or processes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest

import cuflash
from cuflash import tuning
from cuflash.errors import CompileError, OptionError, TileError
from cuflash.hardware import device
from cuflash.jit import cache, compiler
from cuflash.jit.cache import Statistics
from cuflash.planning import offline, tile_choice, tile_rules
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.problem.tile import Tile

if TYPE_CHECKING:
    from conftest import Target

REPOSITORY = Path(__file__).resolve().parents[1]


def arrays_of(seqlen_q: int = 20, seqlen_kv: int = 20, heads: int = 1, batch: int = 1, head_dim: int = 8, seed: int = 0) -> list[Any]:
    rng = numpy.random.default_rng(seed)
    return [rng.standard_normal((batch, length, heads, head_dim)).astype(numpy.float16) for length in (seqlen_q, seqlen_kv, seqlen_kv)]


@pytest.fixture
def compiles_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of which kernels are compiled: what comes out is of no use."""
    artifact = compiler.Artifact(b"nothing", "", 0.0, (), "none")
    monkeypatch.setattr(compiler, "compile_kernel", lambda request: artifact)


def both_calls(*inputs: Any, **options: Any) -> None:
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **options)
    cuflash.scaled_dot_product_attention_backward(out, *inputs, out, lse, **options)


# --- legal_tiles --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", TILED_KERNELS)
@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90a"])
def test_legal_tiles_starts_with_the_default(arch: str, kernel: Any) -> None:
    on = device.of_arch(arch, "gpu")
    listed = cuflash.legal_tiles(64, "float16", kernel=kernel, arch=arch)
    case = KernelCase(TILED_KERNELS[kernel], "float16", 64)
    if tile_rules.lacking(case, on) is not None:
        assert listed == ()
        return
    assert listed[0] == tile_choice.default_tile(case, on)
    assert len(listed) > 5
    for tile in listed:
        assert tile_choice.check_tile(case, tile, on) is tile


def test_legal_tiles_of_this_machine(simulator: Target) -> None:
    assert simulator.device.arch == "sm_80"
    if device.default().kind == "simulator":
        assert cuflash.legal_tiles(64) == cuflash.legal_tiles(64, "bfloat16", kernel="forward", arch="sm_80")


def test_allow_tf32_matters_to_float32_alone() -> None:
    assert cuflash.legal_tiles(64, "float16", arch="sm_80", allow_tf32=True) == cuflash.legal_tiles(64, "float16", arch="sm_80")
    exact, quick = (
        tile_choice.legal_tiles_for(KernelCase(TILED_KERNELS["forward"], "float32", 64, allow), device.of_arch("sm_80", "gpu"))
        for allow in (False, True)
    )
    assert cuflash.legal_tiles(64, "float32", arch="sm_80", allow_tf32=True) == quick
    assert cuflash.legal_tiles(64, "float32", arch="sm_80") == exact


@pytest.mark.parametrize(("kernel", "head_dim"), [("backward_dkdv", 128), ("backward_dk", 336), ("backward_dv", 80)])
def test_legal_tiles_with_features_are_those_that_a_call_takes(kernel: Any, head_dim: int) -> None:
    """An additive mask takes shared memory of the kernels of dK and dV, so that a tile at the limit does not fit with it."""
    features = cuflash.FeatureSet(attn_mask="float32")
    case = KernelCase(TILED_KERNELS[kernel], "float16", head_dim, features=features)
    on = device.of_arch("sm_80", "gpu")
    listed = cuflash.legal_tiles(head_dim, "float16", kernel=kernel, arch="sm_80", features=features)
    for tile in listed:
        assert tile_choice.check_tile(case, tile, on) is tile
    at_the_limit = set(cuflash.legal_tiles(head_dim, "float16", kernel=kernel, arch="sm_80")) - set(listed)
    assert at_the_limit
    for tile in at_the_limit:
        with pytest.raises(TileError, match="shared memory"):
            tile_choice.check_tile(case, tile, on)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 577}, "head_dim"),
        ({"head_dim": True}, "head_dim"),
        ({"head_dim": 64.0}, "head_dim"),
        ({"head_dim": 64, "dtype": "float64"}, "dtype"),
        ({"head_dim": 64, "dtype": numpy.float16}, "dtype"),
        ({"head_dim": 64, "arch": "sm_70"}, "arch"),
        ({"head_dim": 64, "kernel": "backward"}, "kernel"),
        ({"head_dim": 64, "features": "softcap"}, "features"),
        ({"head_dim": 64, "features": cuflash.FeatureSet(attn_mask="int8")}, "features"),
    ],
    ids=str,
)
def test_legal_tiles_refuses(call: dict[str, Any], argument: str) -> None:
    with pytest.raises(OptionError) as caught:
        cuflash.legal_tiles(**call)
    assert caught.value.argument == argument


# --- warmup -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernels that calls of few queries take: tests/test_planning.py has which ones warmup compiles."""
    monkeypatch.setenv("CUFLASH_DECODE", "0")


@pytest.mark.usefixtures("cold_cache", "no_few_queries")
def test_after_warmup_a_call_compiles_nothing(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler forbidden, as in a service that must not stall."""
    kernels = cuflash.warmup(8, target.half, is_causal=True)
    assert kernels == 4
    assert cache.statistics() == Statistics(compiles=4, disk_hits=0, memory_hits=0)
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    inputs = [target.random((1, 20, 2, 8), target.half, seed) for seed in (1, 2, 3)]
    target.check(*inputs, is_causal=True)
    assert cache.statistics().compiles == 4
    with pytest.raises(CompileError, match=r"not in the cache.*CUFLASH_COMPILE=forbid.*cuflash.warmup"):
        target.run(*inputs, is_causal=False)
    assert cache.statistics().compiles == 4


def test_calls_with_a_cache_are_compiled_by_their_plan(cold_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query, caches = numpy.ones((1, 1, 2, 16), "float16"), numpy.ones((2, 4, 16, 2, 16), "float16")
    given = {"cache_seqlens": numpy.array([20], "int32"), "page_table": numpy.array([[2, 0, 3, 1]], "int32"), "num_splits": 2}
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    with pytest.raises(CompileError, match=r"cuflash.warmup_plan\(cuflash.kvcache_plan\(…\)\), with the arguments of this call"):
        cuflash.attention_with_kvcache(query, *caches, query, query, **given)
    monkeypatch.delenv("CUFLASH_COMPILE")
    plan = cuflash.kvcache_plan(query, *caches, query, query, **given)
    assert cuflash.warmup_plan(plan) == len(plan.kernels) == 2
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    assert cuflash.attention_with_kvcache(query, *caches, query, query, **given).shape == query.shape
    with pytest.raises(OptionError, match=r"plan: got 3; expected a cuflash\.Plan"):
        cuflash.warmup_plan(3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("cold_cache", "simulator", "no_few_queries", "compiles_in_no_time")
def test_warmup_takes_all_combinations_once() -> None:
    """Two types, two head dimensions, both masks; of the backward pass two kernels for each mask, and delta, which knows none."""
    seen: list[tuple[int, int]] = []
    count = cuflash.warmup([8, 16], ["float16", "bfloat16"], backward=False, progress=lambda done, total: seen.append((done, total)))
    assert count == cache.statistics().compiles == 2 * 2 * 2
    assert seen == [(i, count) for i in range(1, count + 1)]
    assert cuflash.warmup(8, "float16") == 2 * 3 + 1
    count += 2 * 2 + 1
    assert cuflash.warmup([8, 16], ["float16", "bfloat16"], backward=False) == 8
    assert cache.statistics().compiles == count
    assert len(cache.contents()) == count


@pytest.mark.usefixtures("cold_cache", "simulator", "no_few_queries", "compiles_in_no_time")
def test_warmup_of_the_forward_pass_alone() -> None:
    assert cuflash.warmup(8, "float16", is_causal=False, backward=False) == 1
    (entry,) = cache.contents()
    assert entry.request.source == "forward_mma.cu"


@pytest.mark.usefixtures("cold_cache", "simulator", "no_few_queries")
def test_warmup_for_another_machine() -> None:
    """A cubin for an architecture that is not here, for an image that is built elsewhere."""
    cuflash.warmup(8, "float16", is_causal=False, backward=False, arch="sm_90")
    (entry,) = cache.contents()
    assert (entry.request.arch, entry.request.target) == ("sm_90a", "cubin")


@pytest.mark.usefixtures("cold_cache", "simulator")
def test_warmup_with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of the same tiles as in the calls; a mapping may name those of both passes."""
    pinned = {"forward": Tile(32, 16, 2, 1), "backward_dq": Tile(16, 32, 1, 1)}
    assert cuflash.warmup(8, "float16", is_causal=False, tile=Tile(32, 32, 2, 1)) == 4
    assert cuflash.warmup(8, "float16", is_causal=False, tile=pinned) == 4
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    inputs = arrays_of()
    both_calls(*inputs, tile=Tile(32, 32, 2, 1))
    cuflash.scaled_dot_product_attention(*inputs, tile={"forward": pinned["forward"]})
    with pytest.raises(TileError, match="a tile for 'dq'"):
        cuflash.warmup(8, "float16", tile={"dq": Tile(16, 32, 1, 1)})


def test_warmup_refuses_what_a_call_would_refuse() -> None:
    for call, argument in (
        ({"head_dim": [64, 577]}, "head_dim"),
        ({"head_dim": 64, "dtype": ["float16", "int8"]}, "dtype"),
        ({"head_dim": 64, "arch": "sm_60"}, "arch"),
    ):
        with pytest.raises(OptionError) as caught:
            cuflash.warmup(**call)
        assert caught.value.argument == argument
    with pytest.raises(TileError):
        cuflash.warmup(64, arch="sm_80", tile=Tile(60, 64, 4, 1))


# --- Compile counts -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cold_cache", "simulator")
def test_two_hundred_lengths_compile_each_kernel_once() -> None:
    """Nor do batch sizes, heads, scales, strides, alignment or an LSE that is asked for. Few queries have a kernel of their own, and one that merges."""
    draw = random.Random(0)
    lengths = set()
    while len(lengths) < 200:
        lengths.add((draw.randint(1, 150), draw.randint(1, 150)))
    for seqlen_q, seqlen_kv in sorted(lengths):
        inputs = arrays_of(seqlen_q, seqlen_kv, heads=draw.choice([1, 2]), batch=draw.choice([1, 2]))
        if draw.random() < 0.3:
            inputs[1] = inputs[1][:, ::-1]
        options = {"scale": draw.choice([None, 0.5]), "causal_alignment": draw.choice(["top_left", "bottom_right"]), "is_causal": True}
        cuflash.scaled_dot_product_attention(*inputs, **options)
        both_calls(*inputs, **options)
    assert cache.statistics().compiles == 6
    assert sorted(entry.request.source for entry in cache.contents()) == [
        "backward_delta.cu", "backward_dkdv_mma.cu", "backward_dq_mma.cu", "forward_mma.cu", "forward_split_mma.cu", "merge_attention.cu",
    ]  # fmt: skip


@pytest.mark.usefixtures("cold_cache", "simulator")
def test_threads_that_call_at_once_compile_each_kernel_once() -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(6)

    def work() -> None:
        try:
            start.wait()
            both_calls(*arrays_of())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert cache.statistics().compiles == 4


CALL = """
import numpy, cuflash
from cuflash.jit import cache, compiler
x = numpy.ones((1, 9, 1, 8), numpy.float16)
out, lse = cuflash.scaled_dot_product_attention(x, x, x, return_lse=True)
grads = cuflash.scaled_dot_product_attention_backward(out, x, x, x, out, lse)
assert (out == 1).all() and abs(grads.value.astype(float).sum() - 72) < 0.1
print("compiles", cache.statistics().compiles)
"""


@pytest.mark.usefixtures("cold_cache", "simulator")
def test_processes_that_start_at_once_compile_each_kernel_once() -> None:
    """Two of them (in test_cache.py four) on an empty cache, through the public call; and one more afterwards compiles nothing, with the compiler forbidden."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUFLASH_SIMULATOR_THREADS": "1"}
    command = [sys.executable, "-c", CALL]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 2, results
    assert sum(int(re.fullmatch(r"compiles (\d+)", out.strip())[1]) for out, _ in results) == 4  # type: ignore[index]
    late = subprocess.run(
        command, env={**environment, "CUFLASH_COMPILE": "forbid"}, capture_output=True, text=True, check=False, timeout=120
    )
    assert late.stdout.strip() == "compiles 0", late.stderr


@pytest.mark.usefixtures("simulator")
def test_a_forbidden_compilation_names_the_kernel_and_the_cache(cold_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    with pytest.raises(CompileError) as caught:
        cuflash.scaled_dot_product_attention(*arrays_of())
    assert "forward_mma.cu" in str(caught.value)
    assert str(cold_cache) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cold_cache", "simulator")
def test_a_plan_compiles_nothing() -> None:
    for backward in (False, True):
        assert cuflash.plan(*arrays_of(), backward=backward).kernels
    assert list(offline.offline_kernels(device.of_arch("sm_90", "gpu"), dtype="float16", head_dim=64))
    assert cache.statistics() == Statistics(0, 0, 0)


@pytest.mark.parametrize(("arguments", "argument"), [((64, numpy.float16), "dtype"), (("64",), "head_dim"), ((64, None), "dtype")])
def test_warmup_names_a_bad_argument(arguments: tuple[object, ...], argument: str) -> None:
    with pytest.raises(OptionError) as caught:
        cuflash.warmup(*arguments)  # type: ignore[arg-type]
    assert caught.value.argument == argument


@pytest.mark.parametrize(("dtype", "name"), [(numpy.float16, "float16"), (numpy.dtype("float32"), "float32")])
def test_warmup_says_the_name_of_a_type(dtype: Any, name: str) -> None:
    with pytest.raises(OptionError) as caught:
        cuflash.warmup(64, dtype)
    assert caught.value.hint == f'Pass its name: "{name}".'


FORBIDDEN: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "is_causal=False"),
    "features": (
        {"softcap": 20.0, "attn_mask": numpy.zeros((16, 16), "float32"), "prefix_lengths": numpy.zeros(1, "int32"), "is_causal": True},
        'is_causal=True, features=cuflash.FeatureSet(attn_mask="float32", softcap=True, prefix=True)',
    ),
    "rows off 16 bytes": ({}, "is_causal=False, vectorized=False"),
    "lengths": ({"seqlens_kv": numpy.array([9], "int32")}, "is_causal=False, seqlens_kv=True"),
    "tile": (
        {"tile": {"forward": Tile(32, 16, 2, 1)}},
        'is_causal=False, tile={"forward": cuflash.Tile(tile_q=32, tile_kv=16, num_warps=2, num_stages=1)}, backward=False',
    ),
}


@pytest.mark.usefixtures("cold_cache", "simulator")
@pytest.mark.parametrize(("options", "written"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_forbidden_compilation_shows_the_call_that_mends_it(
    options: dict[str, Any], written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line to paste, after which the call compiles nothing. Of the kernels that it names, those of the backward pass among them, this test compiles the call's."""
    monkeypatch.setattr(device, "default", lambda: device.of_arch("sm_80"))
    x = [numpy.zeros((1, 16, 1, 24), "float16") for _ in range(3)]
    if "vectorized" in written:
        x[1] = numpy.zeros((1, 16, 1, 25), "float16")[..., 1:]
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    with pytest.raises(CompileError) as caught:
        cuflash.scaled_dot_product_attention(*x, **options)
    call = f'cuflash.warmup(24, "float16", {written})'
    assert str(caught.value).endswith(f"and CUFLASH_COMPILE=forbid. Compile it beforehand: {call}, or unset CUFLASH_COMPILE.")
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("CUFLASH_COMPILE")
    needed, fetch_many = [kernel.request(device.default()) for kernel in cuflash.plan(*x, **options).kernels], cache.fetch_many
    monkeypatch.setattr(cache, "fetch_many", lambda requests, **_: fetch_many([request for request in requests if request in needed]))
    assert eval(call, {"cuflash": cuflash}) > 0
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    cuflash.scaled_dot_product_attention(*x, **options)


@pytest.mark.usefixtures("cold_cache", "simulator", "no_few_queries")
def test_plans_compile_what_no_call_of_warmup_has_a_case_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as packed sequences that use a part of their places; the message says so."""
    x, cu = [numpy.ones((20, 1, 24), "float16")] * 3, numpy.array([0, 20], "int32")
    used = {"seqused_kv": numpy.array([9], "int32")}
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    with pytest.raises(CompileError, match=r"cuflash\.warmup_plan\(cuflash\.varlen_plan\(…\)\), with the arguments of this call"):
        cuflash.varlen_attention(*x, cu, cu, **used)
    monkeypatch.delenv("CUFLASH_COMPILE")
    assert cuflash.warmup_plan(cuflash.varlen_plan(*x, cu, cu, **used)) == 1
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    assert cuflash.varlen_attention(*x, cu, cu, **used).any()


@pytest.mark.usefixtures("simulator")
def test_the_call_that_compiles_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that the kernels depend on; where no call compiles them there is none."""
    monkeypatch.setattr(device, "default", lambda: device.of_arch("sm_80"))
    tokens, cu = numpy.zeros((20, 2, 64), "float32"), numpy.array([0, 20], "int32")
    packed_plan = cuflash.varlen_plan(tokens, tokens, tokens[..., :32], cu, cu, allow_tf32=True, window=(3, 0), backward=True)
    assert tuning.warmup_call(packed_plan, None) == (
        'cuflash.warmup(64, "float32", is_causal=False, head_dim_v=32, allow_tf32=True, varlen=True, features=cuflash.FeatureSet(window=True))'
    )
    x = numpy.zeros((2, 20, 4, 64), "float16")
    differently = cuflash.plan(x, x[:1], x[:, :, :1], backward=True)
    assert tuning.warmup_call(differently, None) is None
    both, only_backward = Tile(64, 64, 4, 1), Tile(16, 128, 8, 1)
    call = tuning.warmup_call(cuflash.plan(x, x, x, backward=True, tile=both), both)
    assert call == 'cuflash.warmup(64, "float16", is_causal=False, tile=cuflash.Tile(tile_q=64, tile_kv=64, num_warps=4, num_stages=1))'
    assert tuning.warmup_call(cuflash.plan(x, x, x, backward=True, tile=only_backward), only_backward) is None
    monkeypatch.setattr(device, "default", lambda: device.of_arch("sm_90", "gpu"))
    assert tuning.warmup_call(cuflash.plan(x, x, x), None) is None


# --- Features ----------------------------------------------------------------------------------------------------------------------------


def test_warmup_of_features_compiles_what_a_call_with_them_needs(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    features = cuflash.FeatureSet(window=True, attn_mask="float16", dropout=True)
    cuflash.warmup(24, "float16", is_causal=False, features=features, need_attn_mask_grad=True)
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    inputs = [simulator.random((1, 20, 1, 24), "float16", seed) for seed in (1, 2, 3)]
    mask = numpy.zeros((20, 20), numpy.float16)
    simulator.run(*inputs, window=(3, 3), attn_mask=mask, dropout_p=0.5, dropout_seed=1)


@pytest.mark.usefixtures("cold_cache", "simulator", "compiles_in_no_time")
def test_warmup_compiles_the_gradient_of_a_mask_where_it_is_needed() -> None:
    features = [cuflash.FeatureSet(attn_mask="float16"), cuflash.FeatureSet(softcap=True)]
    without = cuflash.warmup(8, "float16", is_causal=True, features=features)
    assert "backward_mask_mma.cu" not in {entry.request.source for entry in cache.contents()}
    assert cuflash.warmup(8, "float16", is_causal=True, features=features, need_attn_mask_grad=True) == without + 2
    assert [entry.request.source for entry in cache.contents()].count("backward_mask_mma.cu") == 1
    assert [entry.request.config for entry in cache.contents() if "STORES_GRAD_MASK = true" in entry.request.config] != []


def test_warmup_refuses_the_gradient_of_no_mask() -> None:
    boolean, additive = cuflash.FeatureSet(attn_mask="bool"), cuflash.FeatureSet(attn_mask="float16")
    with pytest.raises(
        OptionError, match=r"need_attn_mask_grad: got True without an additive mask; expected features with .*attn_mask=\"float32\""
    ):
        cuflash.warmup(64, features=boolean, need_attn_mask_grad=True)
    with pytest.raises(OptionError, match="need_attn_mask_grad: got True with backward=False; expected backward=True"):
        cuflash.warmup(64, features=additive, need_attn_mask_grad=True, backward=False)
    with pytest.raises(OptionError, match="need_attn_mask_grad"):
        cuflash.warmup(64, features=additive, need_attn_mask_grad=1)  # type: ignore[arg-type]


@pytest.mark.usefixtures("cold_cache", "simulator", "no_few_queries", "compiles_in_no_time")
def test_warmup_of_a_prefix_is_causal() -> None:
    """By default both kinds are compiled, of which a prefix has the causal one alone; the other set has both."""
    features = [cuflash.FeatureSet(prefix=True), cuflash.FeatureSet(softcap=True)]
    assert cuflash.warmup(8, "float16", backward=False, features=features) == 3
    configs = [entry.request.config for entry in cache.contents()]
    assert sorted(("PREFIX = true" in config, "CAUSAL = true" in config) for config in configs) == [
        (False, False),
        (False, True),
        (True, True),
    ]


def test_warmup_of_impossible_features() -> None:
    with pytest.raises(OptionError, match="pass is_causal=True"):
        cuflash.warmup(64, is_causal=False, features=cuflash.FeatureSet(prefix=True))
    with pytest.raises(OptionError, match="a mask of bool or float16"):
        cuflash.warmup(64, features=cuflash.FeatureSet(attn_mask="int8"))
    for refused in (cuflash.FeatureSet(attn_mask="bool"), cuflash.FeatureSet(segments=True)):
        with pytest.raises(OptionError, match=r"with varlen=True; expected the features of cuflash\.varlen_attention"):
            cuflash.warmup(64, varlen=(False, True), features=refused)
