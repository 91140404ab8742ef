"""Random calls with any combination of types, head dimensions, shapes, strides, layouts, lengths and features, judged forward and backward by the reference.

A call is drawn from two numbers: `group` fixes what kernels are compiled for (`Kernels`), `index` everything else. The ordinary run takes a few hundred calls
of few groups; as a script it takes as many as it is asked for, of many groups, goes on where it was interrupted, and prints a table:

    python tests/test_random_configurations.py --count 20000 --processes 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy
import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from conftest import ELEMENTS, SIMULATED, VIEWS, GradientJudge, Target, rounded
from test_features import NOT_DRAWN, PAIRS

import cuflash
from cuflash import reference
from cuflash.cli.sample_features import ALONE, ONLY_PADDED, others_than
from cuflash.cli.samples import Sample
from cuflash.jit import cache
from cuflash.runtime import calls, launch

GROUPS = 13
ON_DEFAULT_TILES = 3
"""Groups of the ordinary run that take default tiles, of which each length of sequences has its own: a kernel each."""
CALLS_PER_GROUP = 3
SHARES = 4
"""One call in so many is also judged with the out and lse of more keys than it sees."""
LONGEST = [40, 40, 40, 200]
"""How long sequences are at most; most calls are short, since a call costs what its tiles cost."""

KINDS = [
    ("float16", 64, 64), ("bfloat16", 40, 40), ("float32", 32, 32), ("bfloat16", 48, 24), ("float16", 33, 71), ("float32", 16, 40), ("bfloat16", 8, 8),
    ("float16", 128, 128), ("float32", 72, 72), ("float16", 192, 128), ("bfloat16", 272, 264), ("float32", 24, 260), ("float16", 320, 16),
]  # fmt: skip
"""Element types and head dimensions, of query and key and of value. Above 256 heads are cut into slices."""
FEATURES = ("causal", "window", "softcap", "alibi", "boolean_mask", "additive_mask", "dropout", "sinks", "segments", "prefix")
FEATURES += tuple(others_than(*FEATURES))
SEQUENCES = ("equal", "seqlens_kv", "packed")
"""Whether all sequences of a call have the same lengths, rows of a batch numbers of keys of their own, or sequences lie packed behind each other."""


class Kernels(NamedTuple):
    """What kernels are compiled for."""

    dtype: str
    head_dim: int
    head_dim_v: int
    features: tuple[str, ...]
    mask_dtype: str
    sequences: str

    def names(self) -> tuple[str, ...]:
        """What the table counts."""
        dims = (
            "wide heads"
            if max(self.head_dim, self.head_dim_v) > 256
            else "head_dim_v of its own"
            if self.head_dim != self.head_dim_v
            else "equal"
        )
        return (*(self.features or ("no feature",)), self.dtype, f"head dimensions: {dims}", f"sequences: {self.sequences}")


class Call(NamedTuple):
    """One call: arrays in the caller's order, and options of both passes; packed sequences with their offsets and bounds."""

    query: Any
    key: Any
    value: Any
    grad_out: Any
    grad_lse: Any
    options: dict[str, Any]
    offsets: tuple[Any, Any] | None = None
    bounds: tuple[int | None, int | None] = (None, None)

    def describe(self) -> str:
        parts = [f"{self.query.dtype} q {self.query.shape} k {self.key.shape} v {self.value.shape}"]
        if self.offsets is not None:
            parts.append(f"offsets {self.offsets[0].tolist()} {self.offsets[1].tolist()} bounds {self.bounds}")
        for name, option in self.options.items():
            parts.append(
                f"{name}={option.dtype}{option.shape} strides {option.strides}" if hasattr(option, "strides") else f"{name}={option}"
            )
        return ", ".join(parts)


def kernels_of_group(seed: int, group: int) -> Kernels:
    """The first groups, those of the ordinary run, have several features and take kinds and forms of sequences in turn; all others have anything.

    Each feature alone: test_features.py.
    """
    draw = random.Random(f"{seed} group {group}")
    kind, sequences = draw.choice(KINDS), draw.choice(SEQUENCES)
    chosen = set(draw.sample(FEATURES, draw.choice([0, 2, 2, 3, 4, 6])))
    if group < GROUPS:
        kind, sequences = KINDS[group % len(KINDS)], SEQUENCES[group % 3]
        chosen |= set(draw.sample(FEATURES, 4))
    if "prefix" in chosen:
        chosen.add("causal")
    if {"boolean_mask", "additive_mask"} <= chosen:
        chosen.remove(draw.choice(["boolean_mask", "additive_mask"]))
    if sequences == "packed":
        chosen -= set(ONLY_PADDED)
    features = tuple(name for name in FEATURES if name in chosen)
    return Kernels(*kind, features, draw.choice(["float16", "bfloat16", "float32"]), sequences)


INPUTS = ("query", "key", "value")


class Extremes:
    """What in every other call is not normally distributed: a key that outweighs the others, at either end, and tiny or huge gradients of the output.

    Drawn by itself, so that everything else of a call is what it is without.
    """

    def __init__(self, kernels: Kernels, seed: int, group: int, index: int, scale: float | None) -> None:
        draw = random.Random(f"{seed} extremes {group} {index}")
        of_float16 = kernels.dtype == "float16" or "additive_mask" in kernels.features  # whose gradient may be float16, which ends at 65504
        sizes = [2.0**-8, 2.0**6] if of_float16 else [2.0**-40, 2.0**40]
        self.grad_size = draw.choice([1.0, 1.0, *sizes])
        self.dominant = draw.choice([None, None, 0, -1])
        self.gap = draw.choice([6.0, 17.0, 25.0]) / (kernels.head_dim**-0.5 if scale is None else scale)

    def apply(self, name: str, values: Any) -> Any:
        """The values of an input (batch, seqlen, heads, head_dim), changed in place."""
        if name == "grad_out":
            values *= self.grad_size
        elif self.dominant is not None and values.shape[1] > 0:
            if name == "query":
                values[..., 0] = 2
            elif name == "key":
                values[:, self.dominant, :, 0] = self.gap / 2
        return values


def draw_call(target: Target, seed: int, group: int, index: int) -> Call:
    """The call with the given numbers: always the same one."""
    kernels = kernels_of_group(seed, group)
    draw = random.Random(f"{seed} call {group} {index}")
    numbers = numpy.random.default_rng([seed, group, index])
    longest = draw.choice(LONGEST)
    wide = max(kernels.head_dim, kernels.head_dim_v) > 256
    longest = min(longest, 70) if wide else longest
    heads_kv, group_size, batch = draw.choice([1, 1, 2]), draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3])
    heads = heads_kv * group_size
    options: dict[str, Any] = {
        "enable_gqa": True,
        "causal_alignment": draw.choice(["top_left", "bottom_right"]),
        "scale": draw.choice([None, None, 0.2, -0.1]),
        "deterministic": draw.random() < 0.5,
        "is_causal": "causal" in kernels.features,
    }

    def length() -> int:
        return draw.choice([draw.randint(1, longest), min(longest, draw.choice([1, 16, 31, 64, 65, 128]))])

    extremes = Extremes(kernels, seed, group, index, options["scale"])

    def array(name: str, shape: tuple[int, int, int, int], layout: str = "bshd") -> Any:
        values = extremes.apply(name, numbers.standard_normal(shape))
        view = target.place(VIEWS[draw.choice(target.views)](rounded(values, kernels.dtype)))
        return view.transpose(["bshd".index(letter) for letter in layout])

    dims = kernels.head_dim, kernels.head_dim, kernels.head_dim_v
    heads_of_key, heads_of_value = (draw.choice([1, heads_kv, heads_kv]) for _ in range(2))
    if kernels.sequences == "packed":
        count = draw.randint(1, 4)
        lengths = [[draw.choice([0, length(), length(), length()]) for _ in range(count)] for _ in range(2)]
        tokens = [sum(x) + draw.choice([0, 0, 7]) for x in lengths]
        shapes = zip(INPUTS, (tokens[0], tokens[1], tokens[1]), (heads, heads_of_key, heads_of_value), dims, strict=True)
        query, key, value = (array(name, (1, *shape))[0] for name, *shape in shapes)
        for name in kernels.features:
            options |= draw_feature(name, (count, heads, max(lengths[0]), max(lengths[1])), kernels.mask_dtype, draw, numbers, target)
        ends = [target.place(numpy.concatenate([[0], numpy.cumsum(x)]).astype(numpy.int32)) for x in lengths]
        bounds = draw.choice([(None, None), (max(lengths[0]), max(lengths[1])), (max(lengths[0]), None)])
        grad_lse = None if draw.random() < 0.3 else target.place(numbers.standard_normal((heads, tokens[0])).astype(numpy.float32))
        return Call(query, key, value, array("grad_out", (1, tokens[0], heads, dims[2]))[0], grad_lse, options, (ends[0], ends[1]), bounds)

    seqlen_q, seqlen_kv = length(), length()
    if draw.random() < 0.3:
        seqlen_kv = seqlen_q
    layout = options["layout"] = draw.choice(["bshd", "bshd", "bhsd", "sbhd", "dhsb"])
    query = array("query", (batch, seqlen_q, heads, dims[0]), layout)
    key = array("key", (draw.choice([1, batch, batch]), seqlen_kv, heads_of_key, dims[1]), layout)
    value = array("value", (draw.choice([1, batch, batch]), seqlen_kv, heads_of_value, dims[2]), layout)
    shape = (batch, heads, seqlen_q, seqlen_kv)
    for name in kernels.features:
        options |= draw_feature(name, shape, kernels.mask_dtype, draw, numbers, target)
    if kernels.sequences == "seqlens_kv":
        own = [draw.choice([0, seqlen_kv, draw.randint(1, seqlen_kv)]) for _ in range(batch)]
        options["seqlens_kv"] = target.place(numpy.array(own, numpy.int32))
    grad_lse = None if draw.random() < 0.3 else target.place(numbers.standard_normal(shape[:3]).astype(numpy.float32))
    return Call(query, key, value, array("grad_out", (batch, seqlen_q, heads, dims[2]), layout), grad_lse, options)


def draw_feature(
    name: str, shape: tuple[int, int, int, int], mask_dtype: str, draw: random.Random, numbers: numpy.random.Generator, target: Target
) -> dict[str, Any]:
    """Arguments that ask for the feature."""
    batch, heads, seqlen_q, seqlen_kv = shape
    if name == "window":
        return {"window": (draw.choice([None, 0, draw.randint(0, 100)]), draw.randint(0, 100))}
    if name == "softcap":
        return {"softcap": draw.choice([1.0, 5.0, 30.0])}
    if name == "alibi":
        of = draw.choice([(heads,), (batch, heads)])
        return {"alibi_slopes": target.place(numbers.uniform(0.0, 0.3, of).astype(numpy.float32))}
    if name in ("boolean_mask", "additive_mask"):
        return {"attn_mask": target.place(draw_mask(shape, name, mask_dtype, draw, numbers))}
    if name == "dropout":
        seed = (draw.getrandbits(64), draw.getrandbits(64))
        on_device = target.place(numpy.array(seed, numpy.uint64))
        return {"dropout_p": draw.choice([0.1, 0.5, 0.8]), "dropout_seed": draw.choice([seed, seed[0], on_device])}
    if name == "sinks":
        return {"sinks": target.place(numbers.normal(0.0, 2.0, heads).astype(numpy.float32))}
    if name == "segments":
        ids = [numbers.integers(0, draw.choice([1, 3, 5]), (batch, seqlen)) for seqlen in (seqlen_q, seqlen_kv)]
        if draw.random() < 0.7:
            ids = [numpy.sort(x, axis=1) for x in ids]
        return dict(zip(("segment_ids_q", "segment_ids_kv"), (target.place(x.astype(numpy.int32)) for x in ids), strict=True))
    if name == "prefix":
        return {"prefix_lengths": target.place(numbers.integers(0, seqlen_kv + 5, batch).astype(numpy.int32))}
    if name == "causal":
        return {}
    drawn = ALONE[name].arguments(Sample(batch, seqlen_q, seqlen_kv, heads), draw.getrandbits(32))
    return {argument: target.place(value) if isinstance(value, numpy.ndarray) else value for argument, value in drawn.items()}


def draw_mask(shape: tuple[int, ...], name: str, dtype: str, draw: random.Random, numbers: numpy.random.Generator) -> Any:
    """A mask of any rank, broadcast along any axes, in any strides; some rows and blocks of it hide everything."""
    own = tuple(extent if draw.random() < 0.7 else 1 for extent in shape)[draw.randint(0, 3) :]
    visible = numbers.random(own) < draw.choice([0.3, 0.9, 1.0])
    if draw.random() < 0.5:
        visible[..., : draw.randint(0, own[-1])] = False
    if name == "boolean_mask":
        mask = visible
    else:
        biases = numpy.where(visible, numbers.standard_normal(own), -numpy.inf)
        if draw.random() < 0.3:  # rows of what stands for -inf elsewhere, and is not
            biases[numbers.random(own[:-1]) < 0.3] = draw.choice([float(ml_dtypes.finfo(ELEMENTS[dtype]).min), -1e9, -1e4])
        mask = rounded(biases, dtype)
    if draw.random() < 0.3:
        mask = numpy.ascontiguousarray(mask[..., ::-1])[..., ::-1]
    if draw.random() < 0.3 and len(own) > 1:
        mask = numpy.ascontiguousarray(mask.swapaxes(-1, -2)).swapaxes(-1, -2)
    if draw.random() < 0.2:
        mask = numpy.broadcast_to(mask, shape[4 - len(own) :])
    return mask


def judge(target: Target, call: Call) -> None:
    if call.offsets is not None:
        target.check_packed([call.query, call.key, call.value, call.grad_out], call.offsets, call.bounds, call.grad_lse, **call.options)
    else:
        target.check(call.query, call.key, call.value, grad_out=call.grad_out, grad_lse=call.grad_lse, **call.options)


def judge_share(target: Target, call: Call) -> None:
    """The gradients of a call whose out and lse are merged with those of keys that it does not see.

    Where an additive mask makes lse huge, float32 does not hold the share of these keys: tests/test_lse_of_more_keys.py.
    """
    inputs, packed, numbers = (call.query, call.key, call.value), call.offsets is not None, numpy.random.default_rng(5)
    function = "varlen_attention" if packed else "scaled_dot_product_attention"
    where = (*(call.offsets or ()), *(call.bounds if packed else ()))
    out, lse = getattr(cuflash, function)(*inputs, *where, return_lse=True, **call.options)
    own = target.host(lse)
    if numpy.abs(own[numpy.isfinite(own)]).max(initial=0) >= 128:
        return
    others = numpy.where(numpy.isfinite(own), own, 0) + numbers.normal(0, 2, own.shape)
    others[numbers.random(own.shape) < 0.1] = -numpy.inf
    if call.offsets is not None:
        others[:, int(call.offsets[0][-1]) :] = -numpy.inf  # tokens of no sequence see no key anywhere
    parts = (
        [out, target.place(rounded(numbers.standard_normal(out.shape), str(out.dtype)))],
        [lse, target.place(others.astype(numpy.float32))],
    )
    merged = cuflash.merge_attention(*parts, layout=call.options.get("layout", "bshd"))
    mask = call.options.get("attn_mask")
    need = {"need_attn_mask_grad": True} if mask is not None and mask.dtype != bool else {}
    grads = getattr(cuflash, f"{function}_backward")(
        call.grad_out, *inputs, *merged, *where, grad_lse=call.grad_lse, **call.options, **need
    )

    def gradients(out: Any = None, precision: Any = None, magnitudes: bool = False) -> reference.Gradients:
        options = {"out": merged[0], "lse": merged[1], "grad_lse": call.grad_lse, **call.options}
        options = {name: option for name, option in options.items() if name != "deterministic"}
        if call.offsets is not None:
            return reference.varlen_attention_backward(
                call.grad_out, *inputs, *call.offsets, precision=precision, magnitudes=magnitudes, **options
            )
        if precision is not None:
            return reference.attention_naive_backward(call.grad_out, *inputs, precision, **options)
        return reference.attention_backward(call.grad_out, *inputs, magnitudes=magnitudes, **options)

    judge_gradient = GradientJudge(gradients, merged[0], str(call.query.dtype))
    for name in ("query", "key", "value", "attn_mask", "sinks"):
        if getattr(grads, name) is not None:
            judge_gradient(name, getattr(grads, name))


@pytest.mark.parametrize(
    "group",
    [pytest.param(group, marks=[pytest.mark.small_tiles] if group >= ON_DEFAULT_TILES else []) for group in range(GROUPS)],
    ids="group{}".format,
)
def test_random_configurations(simulator: Target, group: int) -> None:
    for index in range(CALLS_PER_GROUP):
        call = draw_call(simulator, 0, group, index)
        print(f"group {group}, index {index}: {call.describe()}")  # pytest shows the last one if it fails
        judge(simulator, call)
        if index % SHARES == 0:
            judge_share(simulator, call)


def test_calls_are_drawn_the_same_every_time(simulator: Target) -> None:
    first, second = (draw_call(simulator, 3, 20, 5) for _ in range(2))
    assert first.describe() == second.describe()
    assert simulator.bits(first.query) == simulator.bits(second.query)


def test_the_ordinary_run_draws_everything() -> None:
    """Every feature, every pair but those of test_features.py, every kind, every form of sequences."""
    groups = [kernels_of_group(0, group) for group in range(GROUPS)]
    assert {name for kernels in groups for name in kernels.features} == set(FEATURES)
    assert {kernels[:3] for kernels in groups} == set(KINDS)
    assert {kernels.sequences for kernels in groups} == set(SEQUENCES)
    drawn = {frozenset(pair) for kernels in groups for pair in itertools.combinations(kernels.features, 2)}
    assert {frozenset(pair) for pair in PAIRS if "bottom_right" not in pair} - drawn <= {frozenset(pair) for pair in NOT_DRAWN}


# --- As a script --------------------------------------------------------------------------------------------------------------------------


def arch_of_group(kernels: Kernels, group: int) -> str:
    """Three groups of five on sm_80, one on sm_90, and one on sm_75, which has no bfloat16."""
    arch = ("sm_80", "sm_80", "sm_75", "sm_80", "sm_90")[group % 5]
    return "sm_90" if (arch, kernels.dtype) == ("sm_75", "bfloat16") else arch


def run_group(arch: str | None, seed: int, count: int, group: int) -> dict[str, Any]:
    """Judge the first `count` calls of a group; the result goes into the record as it is."""
    kernels = kernels_of_group(seed, group)
    arch = arch or arch_of_group(kernels, group)
    if arch != "gpu":
        os.environ["CUFLASH_SIMULATOR_ARCH"] = arch
    target = Target(arch)
    begin, failures = time.process_time(), []
    for index in range(count):
        call = draw_call(target, seed, group, index)
        try:
            judge(target, call)
            if index % SHARES == 0:
                judge_share(target, call)
        except Exception as error:
            failures.append(f"group {group}, index {index}, {arch}: {call.describe()}: {type(error).__name__}: {error}")
    calls._calls.clear()
    launch._executables.clear()
    cache.reset_memory()
    return {
        "group": group,
        "calls": count,
        "names": [*kernels.names(), target.device.name if target.is_gpu else f"simulator as {arch}"],
        "failures": failures,
        "seconds": time.process_time() - begin,
    }


def groups_of(count: int, per_group: int) -> Iterator[tuple[int, int]]:
    """(group, calls) until there are `count` calls."""
    for first in range(0, count, per_group):
        yield first // per_group, min(per_group, count - first)


def table(results: list[dict[str, Any]], seed: int) -> str:
    """How many calls there were with each property, and how many of them failed."""
    calls: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for result in results:
        for name in (*result["names"], "all"):
            calls[name] += result["calls"]
            failed[name] += len(result["failures"])
    lines = [
        "# Random calls, judged by the reference",
        "",
        "Written by `python tests/test_random_configurations.py`: calls drawn at random, forward and backward, every result compared with the float64 reference",
        f"as `reference.compare` does. Seed {seed}, on the simulator with all of its checks on,",
        f"{len(results)} sets of kernels, {sum(result['seconds'] for result in results) / 60:.0f} minutes of processor time.",
        "",
        "| with | calls | failed |",
        "|---|---|---|",
    ]
    order = (*FEATURES, "no feature", "float16", "bfloat16", "float32")
    names = [*(name for name in order if name in calls), *sorted(name for name in calls if name not in (*order, "all")), "all"]
    lines += [f"| {name} | {calls[name]} | {failed[name]} |" for name in names]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge random calls by the reference, and write a table.")
    parser.add_argument("--count", type=int, default=20_000, help="how many calls")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other calls")
    parser.add_argument("--per-group", type=int, default=100, help="calls that share compiled kernels")
    parser.add_argument(
        "--arch", choices=(*SIMULATED, "gpu"), help="what the simulator poses as, or a GPU; default one or another for each set of kernels"
    )
    parser.add_argument("--processes", type=int, default=2, help="to run at the same time")
    parser.add_argument("--record", type=Path, help="file for results of groups; those that it holds are not run again")
    parser.add_argument("--output", type=Path, help="file for the table; without it the table is printed")
    chosen = parser.parse_args()
    os.environ.setdefault("CUFLASH_SIMULATOR_THREADS", "1")
    record = chosen.record or Path(f"random_configurations_{chosen.arch or 'any'}_{chosen.seed}_{chosen.per_group}.jsonl")
    kept = {result["group"]: result for result in map(json.loads, record.read_text().splitlines())} if record.exists() else {}
    wanted = list(groups_of(chosen.count, chosen.per_group))
    results = [kept[group] for group, count in wanted if group in kept and kept[group]["calls"] == count]
    held = {result["group"] for result in results}
    begin = time.perf_counter()
    # A CUDA context does not survive a fork.
    with ProcessPoolExecutor(chosen.processes, get_context("spawn" if chosen.arch == "gpu" else None)) as pool, record.open("a") as file:
        waiting = [pool.submit(partial(run_group, chosen.arch, chosen.seed), count, group) for group, count in wanted if group not in held]
        for done in as_completed(waiting):
            result = done.result()
            results.append(result)
            print(json.dumps(result), file=file, flush=True)
            for failure in result["failures"]:
                print(f"FAILED --seed {chosen.seed} {failure}", flush=True)
            calls, failed = sum(result["calls"] for result in results), sum(len(result["failures"]) for result in results)
            print(f"{calls} calls of {chosen.count}, {failed} failed, {time.perf_counter() - begin:.0f} s", flush=True)
    text = table(results, chosen.seed)
    if chosen.output is None:
        print(text)
    else:
        chosen.output.write_text(text)
    return 1 if any(result["failures"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
