"""Tangents of attention: the judge against finite differences, and the kernel against the judge, for tangents, features, layouts and lengths of all kinds."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from conftest import poison_new_memory

import cuflash
from cuflash import Tile, reference
from cuflash.cli.inspection import inspect_kernels
from cuflash.errors import CompilationForbiddenError, CuflashError, OptionError
from cuflash.hardware import device
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import tile_choice, tile_rules
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import FORWARD_JVP
from cuflash.planning.offline import offline_kernels
from cuflash.problem.features import NO_FEATURES, FeatureSet
from cuflash.reference import attention, attention_jvp, compare
from cuflash.runtime import jvp_calls

if TYPE_CHECKING:
    from conftest import Target

pytestmark = pytest.mark.small_tiles

BATCH, QUERIES, KEYS, HEADS, DIM = 2, 70, 90, 2, 16
SHAPE = (BATCH, QUERIES, HEADS, DIM)
SHAPES = (SHAPE, *[(BATCH, KEYS, HEADS, DIM)] * 2)
NAMES = ("query_dot", "key_dot", "value_dot")


def mask_of(kind: str, *shape: int) -> Any:
    """A mask that hides a quarter of all pairs and one query entirely, or is added to the scores."""
    rng = numpy.random.default_rng(7)
    if kind == "float32":
        return rng.standard_normal(shape).astype(numpy.float32)
    visible = rng.random(shape) < 0.75
    visible[..., 5, :] = False
    return visible


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (20, 3), "scale": -0.4},
    "boolean_mask": {"attn_mask": mask_of("bool", BATCH, 1, QUERIES, KEYS)},
    "additive_mask": {"attn_mask": mask_of("float32", HEADS, QUERIES, KEYS)},
    "alibi": {"alibi_slopes": numpy.array([0.1, 0.5], numpy.float32), "is_causal": True},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": numpy.array([0.4, -numpy.inf], numpy.float32)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": (7, 3)},
    "prefix": {"prefix_lengths": numpy.array([33, 0], numpy.int32), "is_causal": True},
    "seqlens_kv": {"seqlens_kv": numpy.array([50, 0], numpy.int32)},
    "segments": {
        "segment_ids_q": numpy.repeat([[0, 1]] * BATCH, QUERIES // 2, 1).astype(numpy.int32),
        "segment_ids_kv": numpy.repeat([[1, 0], [0, 1]], KEYS // 2, 1).astype(numpy.int32),
    },
    "all": {
        "attn_mask": mask_of("float32", QUERIES, KEYS), "alibi_slopes": numpy.array([0.1, 0.5], numpy.float32), "softcap": 1.5, "window": (40, 10),
        "sinks": numpy.array([0.4, 1.0], numpy.float32), "dropout_p": 0.3, "dropout_seed": 5, "is_causal": True,
    },
}  # fmt: skip


def random_inputs(target: Target, dtype: str, shapes: Any = SHAPES, view: str = "contiguous") -> tuple[list[Any], list[Any]]:
    """Query, key and value, and their tangents."""
    inputs = [target.random(shape, dtype, seed, view) for seed, shape in enumerate(shapes)]
    return inputs, [target.random(shape, dtype, 10 + seed, view) for seed, shape in enumerate(shapes)]


def on_device(target: Target, options: dict[str, Any]) -> dict[str, Any]:
    return {name: target.place(x) if isinstance(x, numpy.ndarray) else x for name, x in options.items()}


def results_of(target: Target, inputs: list[Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """out and lse that a forward call gives, of the judge: so that no kernel but that of tangents is compiled."""
    out, lse = attention(*inputs, **options)
    return target.place(out.astype(target.as_numpy(inputs[0]).dtype)), target.place(lse.astype(numpy.float32))


def check(
    target: Target, inputs: list[Any], tangents: list[Any], sinks_dot: Any = None, tile: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Assert that both tangents are as exact as the naive formula in the same precision."""
    dtype = str(inputs[0].dtype)
    out, lse = results_of(target, inputs, options)
    got = cuflash.scaled_dot_product_attention_jvp(
        *tangents, *inputs, out, lse, sinks_dot=sinks_dot, tile=tile, **on_device(target, options)
    )
    judge = functools.partial(attention_jvp, *inputs, *tangents, sinks_dot, out=out, **options)
    want, naive, naive_rows = judge(), judge(precision=dtype), judge(precision="float32")
    assert (str(got[0].dtype), str(got[1].dtype)) == (dtype, "float32")
    compare(got[0], want[0], naive[0], name="out_dot", terms=lambda: judge(magnitudes=True)[0])
    compare(got[1], want[1], naive_rows[1], name="lse_dot", terms=lambda: judge(magnitudes=True)[1])
    return got


# --- The judge ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_the_judge_is_the_limit_of_differences(name: str) -> None:
    rng = numpy.random.default_rng(1)
    options = dict(OPTIONS[name])
    inputs, tangents = ([rng.standard_normal(shape) for shape in SHAPES] for _ in range(2))
    sinks_dot = numpy.array([0.3, 0.7]) if "sinks" in options else None

    def at(step: float) -> tuple[Any, Any]:
        moved = dict(options)
        if sinks_dot is not None:
            moved["sinks"] = options["sinks"] + step * sinks_dot
        return attention(*(x + step * dot for x, dot in zip(inputs, tangents, strict=True)), **moved)

    step = 1e-5
    want = attention_jvp(*inputs, *tangents, sinks_dot, **options)
    for before, behind, tangent in zip(at(-step), at(step), want, strict=True):
        with numpy.errstate(invalid="ignore"):
            difference = numpy.where(numpy.isneginf(before), 0.0, (behind - before) / (2 * step))
        assert numpy.abs(difference - tangent).max() < 1e-8 * (1 + numpy.abs(tangent).max())


# --- The kernel ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", OPTIONS)
def test_features(target: Target, name: str) -> None:
    sinks_dot = target.place(numpy.array([0.3, 0.7], numpy.float32)) if "sinks" in OPTIONS[name] else None
    dtype = "float32" if name in ("all", "softcap") else target.half
    check(target, *random_inputs(target, dtype), sinks_dot, **OPTIONS[name])


@pytest.mark.sample(3)
@pytest.mark.parametrize("of", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_tangents_that_are_not_there_are_zero(simulator: Target, of: tuple[int, ...]) -> None:
    """To the bit what zeros give; memory of no tangent is read, which the simulator watches."""
    inputs, tangents = random_inputs(simulator, simulator.half)
    given = [tangent if i in of else None for i, tangent in enumerate(tangents)]
    got = check(simulator, inputs, given)
    zeros = [tangent if i in of else numpy.zeros_like(tangent) for i, tangent in enumerate(tangents)]
    for a, b in zip(got, check(simulator, inputs, zeros), strict=True):
        assert simulator.bits(a) == simulator.bits(b)


def test_a_tangent_of_the_sinks_alone(simulator: Target) -> None:
    """Rows that see no key have nothing but the sink."""
    inputs, _ = random_inputs(simulator, simulator.half)
    options = {**OPTIONS["boolean_mask"], **OPTIONS["sinks"]}
    sinks_dot = numpy.array([0.5, 2.0], numpy.float32)
    _, lse_dot = check(simulator, inputs, [None] * 3, sinks_dot, **options)
    assert (lse_dot[:, 0, 5] == 0.5).all()
    assert not lse_dot[:, 1].any()


@pytest.mark.parametrize("layout", ["bhsd", "sbhd"])
def test_grouped_heads_in_other_layouts_and_head_dims(target: Target, layout: str) -> None:
    """Value has a head_dim of its own, and the batch of key is broadcast."""
    shapes = [
        tuple({"b": b, "h": h, "s": s, "d": d}[letter] for letter in layout)
        for b, s, h, d in ((2, QUERIES, 4, DIM), (1, KEYS, 2, DIM), (2, KEYS, 2, 24))
    ]
    check(target, *random_inputs(target, target.half, shapes), enable_gqa=True, layout=layout)


@pytest.mark.sample(2)
def test_views(simulator: Target, view: str) -> None:
    inputs, tangents = random_inputs(simulator, simulator.half)
    check(simulator, inputs, [simulator.restride(x, view) for x in tangents])


WIDE = pytest.mark.parametrize("head_dims", [(256, 256), (320, 40), (40, 576)], ids=str)


def check_wide(target: Target, dtype: str, head_dim: int, head_dim_v: int) -> None:
    shapes = [(1, 20, 1, head_dim), (1, 40, 1, head_dim), (1, 40, 1, head_dim_v)]
    check(target, *random_inputs(target, dtype, shapes), is_causal=True)


def test_a_wide_head(simulator: Target) -> None:
    """In slices."""
    check_wide(simulator, "float16", 272, 16)


@pytest.mark.exhaustive
@WIDE
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_wide_heads(target: Target, dtype: str, head_dims: tuple[int, int]) -> None:
    """In pieces too."""
    check_wide(target, dtype, *head_dims)


@WIDE
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_120"])
def test_every_head_has_a_tile(arch: str, dtype: str, head_dims: tuple[int, int]) -> None:
    """The shared memory of sm_75 does not hold six operands of 256 columns in float32: they are cut into slices, as wide heads are."""
    on = device.of_arch(arch, "gpu")
    case = KernelCase(FORWARD_JVP, dtype, head_dims[0], head_dim_v=head_dims[1])
    assert tile_rules.broken_rule(case, tile_choice.default_tile(case, on), on) is None
    is_cut = max(head_dims) > 256 or (arch == "sm_75" and dtype != "float16")
    assert (case.head_slices(on) > 1) == is_cut


def test_tiles_several_stages_and_more_of_them_than_keys(simulator: Target) -> None:
    inputs, tangents = random_inputs(simulator, "float16")
    first = check(simulator, inputs, tangents, tile=Tile(32, 16, 2, 3), is_causal=True)
    with simulator.schedule(1):
        again = check(simulator, inputs, tangents, tile={"forward_jvp": Tile(32, 16, 2, 3)}, is_causal=True)
    assert [simulator.bits(x) for x in first] == [simulator.bits(x) for x in again]


def test_rows_of_huge_scores_with_a_mask(simulator: Target) -> None:
    """float32's lse has no bits left for the logarithm of such a row's sum; backward_row_sums finds it."""
    inputs, tangents = random_inputs(simulator, "float32")
    mask = numpy.zeros((QUERIES, KEYS), numpy.float32)
    mask[3], mask[4] = numpy.finfo(numpy.float32).min, 1e6
    out_dot, _ = check(simulator, inputs, tangents, attn_mask=mask)
    assert numpy.isfinite(out_dot).all()
    kernels = cuflash.plan(*inputs, mask, jvp=True).kernels
    assert [kernel.name for kernel in kernels] == ["backward_row_sums", "forward_jvp"]


def test_the_share_of_a_sink_as_huge_as_the_scores(simulator: Target) -> None:
    """What the sink's own gradient is made of: it is not lse, which has no bits left for it, that says how large the share is."""
    inputs, _ = random_inputs(simulator, "float32")
    inputs[0][...] = 0
    mask = numpy.repeat([-1e3, -1e9, 1e6, -3e38], [QUERIES - 30, 10, 10, 10]).astype(numpy.float32)[:, None]
    mask = numpy.ascontiguousarray(numpy.broadcast_to(mask, (QUERIES, KEYS)))
    for huge in (-1e9, 1e6, -3e38):
        options = {"attn_mask": mask, "sinks": numpy.full(HEADS, huge, numpy.float32)}
        out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **options)
        sinks_dot = numpy.array([1.0, 2.0], numpy.float32)
        _, lse_dot = cuflash.scaled_dot_product_attention_jvp(None, None, None, *inputs, out, lse, sinks_dot=sinks_dot, **options)
        as_huge = mask[:, 0] == numpy.float32(huge)
        numpy.testing.assert_allclose(lse_dot[:, :, as_huge] / sinks_dot[:, None], 1 / (KEYS + 1), rtol=1e-5)


@pytest.mark.parametrize("in_places", [False, True])
def test_packed_sequences(simulator: Target, in_places: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one, one without keys, tokens behind the last one, and sequences that use less than their places."""
    poison_new_memory(monkeypatch)
    inputs, tangents = random_inputs(simulator, "float16", [(75, HEADS, DIM)] * 3)
    cu = [numpy.array(offsets, numpy.int32) for offsets in ([0, 20, 20, 50, 60], [0, 30, 40, 70, 70])]
    used = (
        {"seqused_q": numpy.array([20, 0, 11, 5], numpy.int32), "seqused_kv": numpy.array([7, 0, 30, 0], numpy.int32)} if in_places else {}
    )
    options: dict[str, Any] = {"is_causal": True, "sinks": numpy.array([0.4, -1.0], numpy.float32)}
    sinks_dot = numpy.array([0.3, 0.7], numpy.float32)
    out, lse = (numpy.asarray(x) for x in reference.varlen_attention(*inputs, *cu, **options, **used))
    got = cuflash.varlen_attention_jvp(
        *tangents, *inputs, out.astype(numpy.float16), lse.astype(numpy.float32), *cu, 30, 30, sinks_dot=sinks_dot, **options, **used
    )
    want_out, want_lse, naive = numpy.zeros(out.shape), numpy.zeros(lse.shape), numpy.zeros(out.shape)
    for i in range(4):
        queries, keys = (slice(offsets[i], offsets[i] + length[i]) for offsets, length in zip(cu, _lengths(cu, used), strict=True))
        own = [x[None, rows] for x, rows in zip((*inputs, *tangents), (queries, keys, keys) * 2, strict=True)]
        judge = functools.partial(attention_jvp, *own, sinks_dot, causal_alignment="bottom_right", **options)
        for found, tangent in ((want_out, judge()[0]), (naive, judge(precision="float16")[0])):
            found[queries] = tangent[0]
        want_lse[:, queries] = judge()[1][0]
    compare(got[0], want_out, naive, name="out_dot")
    compare(got[1], want_lse, want_lse, name="lse_dot", dtype="float32")


def _lengths(cu: list[Any], used: dict[str, Any]) -> list[Any]:
    return [used.get(name, numpy.diff(offsets)) for name, offsets in zip(("seqused_q", "seqused_kv"), cu, strict=True)]


# --- The call -----------------------------------------------------------------------------------------------------------------------------


def test_nothing_to_compute(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_memory(monkeypatch)
    inputs, tangents = random_inputs(simulator, "float16", [SHAPE, *[(BATCH, 0, HEADS, DIM)] * 2])
    out, lse = results_of(simulator, inputs, {})
    out_dot, lse_dot = cuflash.scaled_dot_product_attention_jvp(*tangents, *inputs, out, lse)
    assert (out_dot.shape, lse_dot.shape) == (out.shape, lse.shape)
    assert not out_dot.any()
    assert not lse_dot.any()


def test_a_warm_call_is_not_prepared_again(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for another set of tangents."""
    inputs, tangents = random_inputs(simulator, "float16")
    out, lse = results_of(simulator, inputs, {})
    call = functools.partial(cuflash.scaled_dot_product_attention_jvp, query=inputs[0], key=inputs[1], value=inputs[2], out=out, lse=lse)
    want = call(*tangents)
    made: list[Any] = []
    prepare = jvp_calls.PreparedJvp
    monkeypatch.setattr(jvp_calls, "PreparedJvp", lambda *arguments: made.append(arguments) or prepare(*arguments))
    for a, b in zip(want, call(*tangents), strict=True):
        assert simulator.bits(a) == simulator.bits(b)
    assert not made
    call(tangents[0], None, None)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("changed", "argument", "words"),
    [
        ({"query_dot": numpy.zeros((1, 2, 3, 4), numpy.float16)}, "query_dot", "the shape of its input"),
        ({"key_dot": numpy.zeros(SHAPES[1], numpy.float32)}, "key_dot", "float16, like key"),
        ({"value_dot": 3}, "value_dot", "Pass an array"),
        ({"sinks_dot": numpy.zeros(HEADS, numpy.float32)}, "sinks_dot", "without sinks"),
        ({"query_dot": None, "key_dot": None, "value_dot": None}, "query_dot", "at least one tangent"),
        ({"lse": None}, "lse", "Unpack it"),
        ({"out": numpy.zeros((1, 2, 3, 4), numpy.float16)}, "out", "the shape of the output"),
        ({"tile": Tile(64, 24, 4, 1)}, "tile", "forward_jvp"),
        ({"tile": {"forward": Tile(64, 32, 4, 1)}}, "tile", "kernels that run: forward_jvp"),
    ],
)
def test_what_does_not_fit_is_named(simulator: Target, changed: dict[str, Any], argument: str, words: str) -> None:
    inputs, tangents = random_inputs(simulator, "float16")
    out, lse = results_of(simulator, inputs, {})
    given: dict[str, Any] = dict(zip((*NAMES, "query", "key", "value", "out", "lse"), (*tangents, *inputs, out, lse), strict=True))
    with pytest.raises(CuflashError, match=words) as caught:
        cuflash.scaled_dot_product_attention_jvp(**{**given, **changed})
    assert caught.value.argument == argument  # type: ignore[attr-defined]


def test_plans(simulator: Target) -> None:
    inputs, _ = random_inputs(simulator, "float16")
    plan = cuflash.plan(*inputs, jvp=True)
    assert [kernel.name for kernel in plan.kernels] == ["forward_jvp"]
    assert [buffer.name for buffer in plan.outputs] == ["out_dot", "lse_dot"]
    assert "tangents of attention" in str(plan)
    with pytest.raises(OptionError, match="jvp: got True with backward=True"):
        cuflash.plan(*inputs, jvp=True, backward=True)
    with pytest.raises(OptionError, match=r"need_attn_mask_grad.*Leave it out: a mask has no tangent"):
        cuflash.plan(*inputs, jvp=True, need_attn_mask_grad=True)


def test_a_call_that_may_not_compile_names_the_way_out(simulator: Target, cold_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, tangents = random_inputs(simulator, "float16")
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    with pytest.raises(CompilationForbiddenError, match=r"cuflash\.warmup_plan\(cuflash\.plan\(…, jvp=True\)\)"):
        cuflash.scaled_dot_product_attention_jvp(*tangents, *inputs, *results_of(simulator, inputs, {}))


def test_the_way_out_compiles_for_a_tangent_of_any_stride(simulator: Target, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan sees no tangents; one whose rows do not start on 16 bytes is planned in the place of its input."""
    query = numpy.zeros((1, 8, 1, 16), "float16")
    tangent = numpy.zeros((1, 8, 1, 17), "float16")[..., :16]
    out, lse = cuflash.scaled_dot_product_attention(query, query, query, return_lse=True)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    with pytest.raises(CompilationForbiddenError, match="a tangent whose rows do not all start on 16 bytes takes the place of its input"):
        cuflash.scaled_dot_product_attention_jvp(tangent, None, None, query, query, query, out, lse)
    monkeypatch.delenv("CUFLASH_COMPILE")
    cuflash.warmup_plan(cuflash.plan(tangent, query, query, jvp=True))
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    assert cuflash.scaled_dot_product_attention_jvp(tangent, None, None, query, query, query, out, lse)[0].shape == query.shape


def test_warmup_compiles_tangents_too(simulator: Target, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, tangents = random_inputs(simulator, "float16")
    results = results_of(simulator, inputs, {})
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    alone = cuflash.warmup(inputs[0].shape[-1], "float16", is_causal=False, backward=False)
    assert cuflash.warmup(inputs[0].shape[-1], "float16", is_causal=False, backward=False, jvp=True) == alone + 1
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    cuflash.scaled_dot_product_attention_jvp(*tangents, *inputs, *results)


def test_warmup_gives_each_direction_its_tile(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[CompileRequest] = []
    monkeypatch.setattr("cuflash.tuning.cache.fetch_many", lambda requests, **_: compiled.extend(requests))
    tiles = {"forward": cuflash.legal_tiles(16, "float16")[-1], "forward_jvp": cuflash.Tile(32, 32, 2, 1)}
    cuflash.warmup(16, "float16", is_causal=False, backward=False, jvp=True, tile=tiles)
    (of_tangents,) = (request.config for request in compiled if request.source == "forward_jvp_mma.cu")
    assert "TILE_Q = 32;" in of_tangents
    assert "TILE_KV = 32;" in of_tangents


# --- Machine code -------------------------------------------------------------------------------------------------------------------------


def check_no_spills(arch: str, dtype: str, head_dim: int, features: FeatureSet) -> None:
    """With the default tiles, of causal calls."""
    on = device.of_arch(arch, "gpu")
    kernels = offline_kernels(on, dtype=dtype, head_dim=head_dim, is_causal=True, features=features, jvp=True)
    (report,) = (found for found in inspect_kernels((on, kernel) for kernel in kernels) if found.subject.label == FORWARD_JVP.name)
    assert not report.spills, f"{report.subject.tile}: {report.resources}"
    assert report.warnings == ()


def test_a_common_head_does_not_spill() -> None:
    check_no_spills("sm_90", "bfloat16", 64, NO_FEATURES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("feature", ["", "boolean_mask", "attn_mask", "softcap", "dropout", "window", "sinks"])
def test_no_spills(arch: str, dtype: str, head_dim: int, feature: str) -> None:
    masks = {"boolean_mask": "bool", "attn_mask": "float32"}
    check_no_spills(
        arch,
        dtype,
        head_dim,
        FeatureSet(attn_mask=masks[feature]) if feature in masks else FeatureSet(**({feature: True} if feature else {})),
    )
