"""What a user does about tiles and compilation ahead of a call: list legal tiles, warm the cache up. Tiles are timed by `cuflash.autotune` (tuner/)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from itertools import product
from typing import Any

from cuflash.arrays.descriptions import attribute, describe
from cuflash.errors import ArgumentError, CompilationForbiddenError, OptionError
from cuflash.hardware import device
from cuflash.hardware.device import Device
from cuflash.jit import cache
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import tile_choice
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import FORWARD, FORWARD_JVP, TILED_KERNELS
from cuflash.planning.merge_kernels import kernels_of_chunks
from cuflash.planning.offline import offline_kernels
from cuflash.planning.plan import Plan
from cuflash.problem.features import FEATURE_OF, MASK_KINDS, NO_FEATURES, FeatureSet
from cuflash.problem.options import check_bool
from cuflash.problem.other_names import explains_features
from cuflash.problem.problem import DTYPES, MAX_HEAD_DIM
from cuflash.problem.tile import Tile, Tiles


@explains_features(FEATURE_OF)
def legal_tiles(
    head_dim: int,
    dtype: str = "bfloat16",
    *,
    head_dim_v: int | None = None,
    kernel: str = FORWARD.name,
    arch: str | None = None,
    is_causal: bool = False,
    allow_tf32: bool = False,
    features: FeatureSet = NO_FEATURES,
) -> tuple[Tile, ...]:
    """List the tiles that fit a device, the default one first: what a call takes for which no table of tuned tiles has another (docs/tuning.md).

    Args:
        head_dim: of query and key, 1 … 576.
        dtype: "float16", "bfloat16" or "float32".
        head_dim_v: of value, default head_dim.
        kernel: "forward", on sm_90 "forward_wgmma", "forward_wgmma_float32" for float32, and above 256 columns "forward_wgmma_wide", for few queries "forward_split", "backward_dkdv", "backward_dk", "backward_dv", "backward_dq",
            "backward_fused" or on sm_90 "backward_wgmma", with an additive mask also "backward_row_sums",
            "backward_mask" and "backward_dq_mask", as `print(plan)` names them.
        arch: "sm_80", "sm_90", …; None for the GPU of this machine, or the simulator without one.
        is_causal: as in the call; some defaults depend on it.
        allow_tf32: as in the call.
        features: which score features and masks the call uses, some of which take shared memory or registers.

    Raises:
        OptionError: an argument outside its domain.
    """
    if not isinstance(kernel, str) or kernel not in TILED_KERNELS:
        expected = "one of " + ", ".join(TILED_KERNELS)
        raise OptionError("kernel", describe(kernel), expected, "print(cuflash.plan(...)) names the kernels of a call.")
    own = head_dim if head_dim_v is None else head_dim_v
    case = KernelCase(
        TILED_KERNELS[kernel],
        _checked_dtype(dtype),
        _checked_head_dim("head_dim", head_dim),
        check_bool("allow_tf32", allow_tf32) and dtype == "float32",
        _checked_head_dim("head_dim_v", own),
        _checked_features(features),
        is_causal=check_bool("is_causal", is_causal),
    )
    return tile_choice.legal_tiles_for(case, target(arch))


@explains_features(FEATURE_OF)
def warmup(
    head_dim: int | Iterable[int],
    dtype: str | Iterable[str] = "bfloat16",
    *,
    head_dim_v: int | None = None,
    is_causal: bool | Iterable[bool] = (False, True),
    backward: bool = True,
    arch: str | None = None,
    tile: Tiles = None,
    allow_tf32: bool = False,
    varlen: bool | Iterable[bool] = False,
    seqlens_q: bool = False,
    seqlens_kv: bool = False,
    features: FeatureSet | Iterable[FeatureSet] = NO_FEATURES,
    need_attn_mask_grad: bool = False,
    vectorized: bool | Iterable[bool] = True,
    jvp: bool = False,
    merge: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compile ahead, in threads, every kernel of the given cases, so that later calls find them in the cache.

    Args:
        head_dim, dtype, is_causal: one value or several; all combinations are compiled, but a prefix is for causal attention alone.
        head_dim_v: of value, for all of them; default each head_dim itself.
        backward: also the kernels of the backward pass.
        arch: the architecture to compile for; None for the GPU of this machine, or the simulator without one. A machine that has such a GPU finds the
            kernels in a copy of the cache directory, if its NVRTC is of the same version: `python -m cuflash warmup --arch … --into DIR`.
        tile, allow_tf32: as in the call.
        varlen: kernels of `varlen_attention` instead of `scaled_dot_product_attention`, or both of them; those of `seqused_q` and `seqused_kv` are for
            `warmup_plan`.
        seqlens_q, seqlens_kv: kernels of calls with `seqlens_q`, or `seqlens_kv`; those with both are the ones with `seqlens_q`.
        features: which score features and masks the calls use, such as `cuflash.FeatureSet(window=True, softcap=True)`; one or several sets.
        need_attn_mask_grad: also the kernel that gives the gradient of an additive mask.
        vectorized: kernels of calls whose arrays have rows that start on 16 bytes and a contiguous head_dim; False for those of calls where one has not, and
            (True, False) for both. They are the same where head_dim does not fill up 16 bytes.
        jvp: also the kernels of tangents, whichever inputs have some: `scaled_dot_product_attention_jvp`, with varlen `varlen_attention_jvp`.
        merge: also the kernels of `merge_attention` and, with backward, its gradient, for each dtype: of any head_dim, number of parts and layout, of parts of
            float32 too. `warmup([], dtype, merge=True)` compiles these alone.
        progress: called with (kernels done, kernels in all).

    Returns:
        How many kernels are now in the cache that these cases need.

    Raises:
        OptionError, TileError: as the call.
        CompileError: the compiler refused a kernel.
    """
    on = target(arch)
    head_dims, dtypes, causals, sets = _several(head_dim), _several(dtype), _several(is_causal), _several(features)
    _check_need_attn_mask_grad(need_attn_mask_grad, sets, backward)
    of_tangents, of_chunks, backward = check_bool("jvp", jvp), check_bool("merge", merge), check_bool("backward", backward)
    requests: dict[CompileRequest, None] = {}
    for one_head_dim, one_dtype, causal, one_varlen, feature_set, in_chunks in product(
        head_dims, dtypes, causals, _several(varlen), sets, _several(vectorized)
    ):
        if causal is False and True in causals and isinstance(feature_set, FeatureSet) and feature_set.prefix:
            continue
        for tangents in (False, True) if of_tangents else (False,):
            kernels = kernels_of_case(
                on, head_dim=one_head_dim, dtype=one_dtype, head_dim_v=head_dim_v, is_causal=causal, backward=backward and not tangents,
                tile=_of_direction(tile, tangents), allow_tf32=allow_tf32, varlen=one_varlen,
                seqlens_q=check_bool("seqlens_q", seqlens_q) and not one_varlen, seqlens_kv=check_bool("seqlens_kv", seqlens_kv) and not one_varlen,
                features=feature_set,
                need_attn_mask_grad=need_attn_mask_grad and not tangents, vectorized=in_chunks, every_way=True, jvp=tangents,
            )  # fmt: skip
            requests |= dict.fromkeys(kernel.request(on) for kernel in kernels)
    for one_dtype in dtypes if of_chunks else ():
        requests |= dict.fromkeys(kernel.request(on) for kernel in kernels_of_chunks(on, _checked_dtype(one_dtype), backward=backward))
    cache.fetch_many(list(requests), progress=None if progress is None else lambda done, total, _: progress(done, total))
    return len(requests)


def warmup_plan(plan: Plan) -> int:
    """Compile ahead the kernels of one plan, for calls that `warmup` has no case of: those with a cache, and others whose arrays there are already.

    A step of generation and a chunk of a prompt may have other kernels, and so may caches with room for more keys, of which more are split: plan each of them.

    Args:
        plan: what `plan`, `varlen_plan` or `kvcache_plan` gives; for the device of the arrays that it was given.

    Returns:
        How many kernels are now in the cache that it needs.

    Raises:
        CompileError: the compiler refused a kernel.
    """
    if not isinstance(plan, Plan):
        raise OptionError("plan", describe(plan), "a cuflash.Plan", "Pass cuflash.kvcache_plan(…) with the arguments of the call.")
    requests = dict.fromkeys(kernel.request(plan.device) for kernel in plan.kernels)
    cache.fetch_many(list(requests))
    return len(requests)


def warmup_call(plan: Plan, tile: Tiles) -> str | None:
    """The call of `warmup` on this machine that compiles the kernels of a plan, ready to be pasted.

    Args:
        plan: of a call.
        tile: that the call was given.

    Returns:
        None where no call compiles them: gradients that keys and values sum over different heads, or kernels for the simulator beside a GPU.
    """
    problem, features = plan.problem, plan.problem.features.kinds
    case: dict[str, Any] = {"is_causal": problem.is_causal}
    if problem.head_dim_v != problem.head_dim:
        case["head_dim_v"] = problem.head_dim_v
    if tile is not None:
        case["tile"] = tile
        if not plan.backward:  # where it may not fit
            case["backward"] = False
    allow_tf32, varlen = problem.allow_tf32 and problem.dtype == "float32", problem.num_sequences is not None
    used = {"allow_tf32": allow_tf32, "varlen": varlen, "seqlens_q": problem.seqlens_q, "seqlens_kv": problem.seqlens_kv}
    case |= {name: True for name, is_used in used.items() if is_used}
    if not problem.vectorized and problem.head_dim * problem.itemsize % 16 == 0 == problem.head_dim_v * problem.itemsize % 16:
        case["vectorized"] = False
    if features != NO_FEATURES:
        case["features"] = features
    on = device.default()
    try:
        kernels = kernels_of_case(on, head_dim=problem.head_dim, dtype=problem.dtype, every_way=True, **case)
    except ArgumentError:  # the tile of a backward pass that the forward pass cannot have
        return None
    if not {kernel.request(plan.device) for kernel in plan.kernels} <= {kernel.request(on) for kernel in kernels}:
        return None
    options = ", ".join(f"{name}={_written(value)}" for name, value in case.items())
    return f'cuflash.warmup({problem.head_dim}, "{problem.dtype}", {options})'


def with_warmup(error: CompilationForbiddenError, plan: Plan, tile: Tiles) -> CompilationForbiddenError:
    """The same error of a call, which names the call of `warmup` that compiles its kernels, or of `warmup_plan` where there is none."""
    problem = plan.problem
    call = None if problem.cache is not None or problem.of_tangents else warmup_call(plan, tile)
    if call is None:
        made = "kvcache_plan" if problem.cache is not None else "varlen_plan" if problem.layout.varlen else "plan"
        options = ", jvp=True" if problem.of_tangents else ", backward=True" if plan.backward else ""
        tangents = "; a tangent whose rows do not all start on 16 bytes takes the place of its input" if problem.of_tangents else ""
        call = f"cuflash.warmup_plan(cuflash.{made}(…{options})), with the arguments of this call{tangents}"
    return CompilationForbiddenError(error.missing, f"Compile it beforehand: {call}")


def _written(value: object) -> str:
    """The expression of an argument of `warmup`."""
    if isinstance(value, FeatureSet):
        used = {field.name: getattr(value, field.name) for field in fields(value) if getattr(value, field.name) != field.default}
        return "cuflash.FeatureSet(" + ", ".join(f"{name}={_written(part)}" for name, part in used.items()) + ")"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_written(name)}: {_written(tile)}" for name, tile in value.items()) + "}"
    if isinstance(value, str):
        return f'"{value}"'
    return f"cuflash.{value!r}" if isinstance(value, Tile) else repr(value)


def kernels_of_case(
    on: Device,
    *,
    head_dim: object,
    dtype: object,
    head_dim_v: object = None,
    is_causal: object = False,
    backward: bool = True,
    tile: Tiles = None,
    allow_tf32: object = False,
    varlen: object = False,
    seqlens_q: bool = False,
    seqlens_kv: bool = False,
    features: object = NO_FEATURES,
    need_attn_mask_grad: bool = False,
    vectorized: object = True,
    every_way: bool = False,
    jvp: bool = False,
) -> list[KernelPlan]:
    """Check one case as `warmup` takes several, and plan its kernels for `on`, with `every_way` those of all lengths, with `jvp` those of tangents instead.

    Raises:
        OptionError, TileError: as the call.
    """
    causal, of_varlen, backward = check_bool("is_causal", is_causal), check_bool("varlen", varlen), check_bool("backward", backward)
    return list(
        offline_kernels(
            on,
            dtype=_checked_dtype(dtype),
            head_dim=_checked_head_dim("head_dim", head_dim),
            head_dim_v=None if head_dim_v is None else _checked_head_dim("head_dim_v", head_dim_v),
            is_causal=causal,
            allow_tf32=check_bool("allow_tf32", allow_tf32),
            varlen=of_varlen,
            seqlens_q=seqlens_q,
            seqlens_kv=seqlens_kv,
            features=_checked_features_of_case(features, causal, of_varlen),
            need_attn_mask_grad=need_attn_mask_grad,
            vectorized=check_bool("vectorized", vectorized),
            every_way=every_way,
            backward=backward,
            tile=tile,
            jvp=jvp,
        )
    )


def _of_direction(tile: Tiles, tangents: bool) -> Tiles:
    """The part of a mapping that is for the kernel of tangents, or for the others."""
    if not isinstance(tile, Mapping):
        return tile
    return {name: pinned for name, pinned in tile.items() if (name == FORWARD_JVP.name) == tangents}


def target(arch: str | None) -> Device:
    """The device that `arch` names: offline for a GPU's architecture; None for this machine's GPU, else the simulator."""
    if arch is not None:
        return device.of_arch(device.normalize_arch(arch), "gpu")
    return device.default()


def _several(values: object) -> list[object]:
    """One value or an iterable of them; text is one value."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        return [values]
    try:
        return list(values)
    except Exception:  # an array without dimensions, say: no value that the checks would take
        return [values]


def _check_need_attn_mask_grad(wanted: object, sets: list[object], backward: bool) -> None:
    if not check_bool("need_attn_mask_grad", wanted):
        return
    if not backward:
        raise OptionError(
            "need_attn_mask_grad", "True with backward=False", "backward=True with it", "The backward pass gives the gradient."
        )
    if not any(isinstance(features, FeatureSet) and features.additive_mask for features in sets):
        hint = 'Add cuflash.FeatureSet(attn_mask="float32") or the mask\'s own element type; only a mask that is added to the scores has a gradient.'
        raise OptionError("need_attn_mask_grad", "True without an additive mask", "features with an additive attn_mask", hint)


def _checked_features(features: object) -> FeatureSet:
    if not isinstance(features, FeatureSet):
        raise OptionError("features", describe(features), "a cuflash.FeatureSet", "Write cuflash.FeatureSet(window=True).")
    if features.attn_mask not in (None, *MASK_KINDS):
        raise OptionError(
            "features", describe(features.attn_mask), "a mask of " + " or ".join(MASK_KINDS), "Pass the name of the mask's element type."
        )
    return features


def _checked_features_of_case(given: object, is_causal: bool, varlen: bool) -> FeatureSet:
    features = _checked_features(given)
    if features.prefix and not is_causal:
        raise OptionError("features", "prefix without is_causal", "is_causal=True", "Prefixes lift a causal mask: pass is_causal=True.")
    if varlen and (features.attn_mask is not None or features.segments):
        got = f"{'segments' if features.attn_mask is None else 'attn_mask'} with varlen=True"
        hint = "Packed sequences do not see each other anyway; for others pad, and leave varlen out."
        raise OptionError("features", got, "the features of cuflash.varlen_attention", hint)
    return features


def _checked_dtype(dtype: object) -> str:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        hint = "Pass the name of a supported element type."
        name = attribute(dtype, "__name__") or _text(dtype).removeprefix("torch.")
        if name in DTYPES:
            hint = f'Pass its name: "{name}".'
        raise OptionError("dtype", describe(dtype) if name not in DTYPES else repr(dtype), "one of " + ", ".join(DTYPES), hint)
    return dtype


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # of the caller's own class
        return ""


def _checked_head_dim(name: str, head_dim: object) -> int:
    if not isinstance(head_dim, int) or isinstance(head_dim, bool) or not 1 <= head_dim <= MAX_HEAD_DIM:
        raise OptionError(name, describe(head_dim), f"an int from 1 to {MAX_HEAD_DIM}", "Pass the head dimension of the arrays.")
    return int(head_dim)
