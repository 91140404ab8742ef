"""Results against the formula in float64, by the error that the plain formula makes in the same precision; and the bits of two runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy

from cuflash import reference
from cuflash.cli.sample_features import DROPOUT_SEED
from cuflash.reference.features import dropout_mask
from small_calls.arrays import MERGED_PARTS, NAMES, bits_of, operands_of, run, values_of
from small_calls.cases import Case


def noise_of(case: Case, values: dict[str, Any], name: str, truth: dict[str, Any]) -> Any:
    """What rounding may leave of gradients in which terms cancel; it is relative to the terms, `compare` to the result.

    In float32 that is the last place of every sum. The gradient of a sink is -Σ P_sink · delta over all rows, whose delta = Σ dO ∘ O has the error of O: in 16 bits
    that of its last rounding, in float32 two units for the sums behind it. Of independent errors, four standard deviations are allowed.
    """
    sample = case.sample
    if name == "grad_sinks":
        of_sinks = numpy.exp(case.arguments["sinks"][:, None] - truth["lse"]).swapaxes(-1, -2)  # the axes of out but the last
        terms = of_sinks[..., None] * values["grad_out"] * truth["out"]
        deviation = reference.EPSILON[sample.dtype] * (2.0 if sample.dtype == "float32" else 12**-0.5)
        return 4 * deviation * numpy.sqrt((terms**2).sum(axis=(*range(terms.ndim - 2), terms.ndim - 1)))
    if sample.dtype != "float32" or not name.startswith("grad"):
        return 0.0
    scale = abs(sample.head_dim**-0.5 if sample.scale is None else sample.scale)
    product = numpy.linalg.norm(values["grad_out"], axis=-1).max() * numpy.linalg.norm(values["value"], axis=-1).max()
    largest = max(numpy.abs(values["key"]).max(), numpy.abs(values["query"]).max())
    kept_factor = 1.0 / (1.0 - sample.features.dropout)
    return float(2.0**-22 * scale * product * largest * sample.head_dim**-0.5 * kept_factor)


def whereabouts(wrong: Any) -> str:
    """Which part of an array is wrong, along each axis: patterns tell tiles, warps and ends apart."""
    parts = []
    for axis in range(wrong.ndim):
        found = numpy.flatnonzero(wrong.any(axis=tuple(other for other in range(wrong.ndim) if other != axis)))
        listed = ",".join(map(str, found[:8])) + (",…" if len(found) > 8 else "")
        parts.append(f"axis {axis}: {len(found)} of {wrong.shape[axis]}, {found.min()} to {found.max()} ({listed})")
    return "; ".join(parts)


def expected(case: Case, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Truth in float64, and what the plain formula gives in the case's precision, by the names of results."""
    sample, dtype = case.sample, case.sample.dtype
    operands = [values[name] for name in ("query", "key", "value")]
    options = {name: x for name, x in case.arguments.items() if name != "allow_tf32" and not name.startswith("max_seqlen")}
    backward = {**options, "grad_lse": values.get("grad_lse")}
    precise: Any = dtype
    if sample.is_packed:
        truth = [*reference.varlen_attention(*operands, **options)]
        naive = [*reference.varlen_attention(*operands, precision=precise, **options)]
        naive[1] = reference.varlen_attention(*operands, precision="float32", **options)[1]
        grads = [reference.varlen_attention_backward(values["grad_out"], *operands, precision=p, **backward) for p in (None, precise)]
    else:
        truth = [*reference.attention(*operands, **options)]
        naive = [*reference.attention_naive(*operands, precise, **options)]
        naive[1] = reference.attention_naive(*operands, "float32", **options)[1]
        grads = [
            reference.attention_backward(values["grad_out"], *operands, **backward),
            reference.attention_naive_backward(values["grad_out"], *operands, precise, **backward),
        ]
    both = []
    for results, gradients in zip((truth, naive), grads, strict=True):
        named = dict(zip(NAMES, (*results, *gradients), strict=True))
        both.append(named | {f"grad_{name}": getattr(gradients, name) for name in ("attn_mask", "sinks")})
    if sample.features.dropout and not sample.is_packed:
        lengths = (sample.seqlen_q, sample.seqlen_kv)
        masks = [
            [dropout_mask((b, h), lengths, sample.features.dropout, DROPOUT_SEED) for h in range(sample.num_heads_q)]
            for b in range(sample.batch)
        ]
        both[0]["dropout_mask"] = both[1]["dropout_mask"] = numpy.array(masks, numpy.float64)
    if case.has_tangents:
        tangents = (*operands, *operands, values["sinks"])
        both[0] |= zip(("out_dot", "lse_dot"), reference.attention_jvp(*tangents, **options), strict=True)
        both[1]["out_dot"] = reference.attention_jvp(*tangents, precision=precise, **options)[0]
        both[1]["lse_dot"] = reference.attention_jvp(*tangents, precision="float32", **options)[1]
    for results in both if case.cached else ():
        results |= {"cached_out": results["out"], "cached_lse": results["lse"]}
    if sample.features.sinks:
        for results in both:
            sees = numpy.isfinite(results["lse"]).swapaxes(-1, -2)[..., None]  # the axes of out
            results |= {"merged_out": results["out"], "merged_lse": results["lse"] + numpy.log(MERGED_PARTS)}
            results["grad_part"] = numpy.where(sees, values["grad_out"] / MERGED_PARTS, 0)
    return both[0], both[1]


def judge(case: Case, values: dict[str, Any], results: dict[str, Any]) -> tuple[str, list[str]]:
    """A line of relative errors, and complaints: what is beyond the error of the plain formula in the same precision."""
    truth, naive = expected(case, values)
    figures, complaints = [], []
    for name, result in results.items():
        want, yardstick = truth[name], naive[name]
        got = reference.to_float64(result)
        finite = numpy.isfinite(want)
        error = float(numpy.linalg.norm(got[finite] - want[finite]) / max(float(numpy.linalg.norm(want[finite])), 1e-300))
        figures.append(f"{name} {error:.1e}")
        if case.sample.allow_tf32:
            if not error < 5e-3:
                complaints.append(f"{name}: relative error {error:.3e}, expected below 5e-3 in TF32")
            continue
        noise = noise_of(case, values, name, truth)
        try:
            with numpy.errstate(invalid="ignore"):
                near = numpy.abs(got - want) <= noise
            dtype = "float32" if name in ("lse", "lse_dot", "dropout_mask", "merged_lse", "cached_lse") else case.sample.dtype
            reference.compare(numpy.where(near, want, got), want, yardstick, name=name, dtype=dtype)
        except AssertionError as complaint:
            with numpy.errstate(invalid="ignore"):
                largest = 2 * numpy.nanmax(numpy.abs(numpy.where(finite, yardstick - want, 0))) + noise
                wrong = ~(numpy.abs(numpy.where(finite, got - want, 0)) <= largest) | (numpy.isfinite(got) != finite)
            complaints.append(str(complaint) + (f"\n      wrong at {whereabouts(wrong)}" if wrong.any() else ""))
    return ", ".join(figures), complaints


def check_one(case: Case, xp: Any, keep: Path | None) -> tuple[str, list[str]]:
    values = values_of(case)
    operands = operands_of(case, values, xp)
    results = run(case, operands)
    first = {name: bits_of(array) for name, array in results.items()}
    line, complaints = judge(case, values, results)
    second = {name: bits_of(array) for name, array in run(case, operands).items()}
    for name in first:
        different = first[name] != second[name]
        if different.any():
            complaints.append(
                f"{name}: {int(different.sum())} of {different.size} elements differ between two runs; at {whereabouts(different)}"
            )
    if complaints and keep is not None:
        keep_results(keep, str(case), first)
    return line, complaints


KEPT_BYTES = 6 << 20
"""Of all wrong results together: what is kept has to come back from the machine that made it."""


def keep_results(folder: Path, case: str, results: dict[str, Any]) -> None:
    """Write the bits of a wrong case's results into a folder, unless that then holds more than `KEPT_BYTES`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (re.sub(r"[^\w.-]+", "_", case)[:180] + ".npz")
    numpy.savez_compressed(file, **results)
    if sum(kept.stat().st_size for kept in folder.iterdir()) > KEPT_BYTES:
        file.unlink()
