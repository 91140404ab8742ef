"""Random calls with any combination of types, shapes, strides, layouts and features, judged forward and backward by the reference.

A call is drawn from two numbers: `group` fixes what kernels are compiled for (element type, head_dim, which features), `index` everything else. The ordinary
run takes a few hundred calls of few groups; as a script it takes as many as it is asked for, of many groups, and prints a table:

    python tests/test_random_configurations.py --count 20000 --seed 1
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from conftest import SIMULATED, VIEWS, Target, rounded

GROUPS = 27
CALLS_PER_GROUP = 12
MAX_SEQLEN = 200

KINDS = [("float16", 64), ("bfloat16", 40), ("float32", 32), ("bfloat16", 8), ("float16", 128), ("float32", 72)]
FEATURES = ("causal", "window", "softcap", "alibi", "boolean_mask", "additive_mask", "dropout", "sinks", "segments", "prefix")


class Call(NamedTuple):
    """One call: arrays in canonical order, and options of both passes."""

    features: tuple[str, ...]
    query: Any
    key: Any
    value: Any
    grad_out: Any
    grad_lse: Any
    options: dict[str, Any]

    def describe(self) -> str:
        parts = [f"{self.query.dtype} q {self.query.shape} k {self.key.shape} v {self.value.shape}"]
        for name, option in self.options.items():
            parts.append(
                f"{name}={option.dtype}{option.shape} strides {option.strides}" if hasattr(option, "strides") else f"{name}={option}"
            )
        return ", ".join(parts)


def kernels_of_group(seed: int, group: int) -> tuple[str, int, tuple[str, ...], str]:
    """Element type, head_dim, features and type of an additive mask. The first groups have one feature each, then any number."""
    draw = random.Random(f"{seed} group {group}")
    dtype, head_dim = draw.choice(KINDS[:3] if group < GROUPS else KINDS)
    count = draw.choice([0, 2, 2, 3, 4, 6])
    chosen = {FEATURES[group]} if group < len(FEATURES) else set(draw.sample(FEATURES, count))
    if "prefix" in chosen:
        chosen.add("causal")
    if {"boolean_mask", "additive_mask"} <= chosen:
        chosen.remove(draw.choice(["boolean_mask", "additive_mask"]))
    return dtype, head_dim, tuple(name for name in FEATURES if name in chosen), draw.choice(["float16", "bfloat16", "float32"])


def draw_call(target: Target, seed: int, group: int, index: int) -> Call:
    """The call with the given numbers: always the same one."""
    dtype, head_dim, features, mask_dtype = kernels_of_group(seed, group)
    draw = random.Random(f"{seed} call {group} {index}")
    numbers = numpy.random.default_rng([seed, group, index])
    seqlen_q, seqlen_kv = (draw.choice([draw.randint(1, MAX_SEQLEN), draw.choice([1, 16, 31, 64, 65, 128])]) for _ in range(2))
    if draw.random() < 0.3:
        seqlen_kv = seqlen_q
    if {"dropout", "sinks"} & set(
        features
    ):  # delta comes from a rounded O: with a key or two, and those scaled, that is all there is of a gradient
        seqlen_q, seqlen_kv = max(seqlen_q, 33), max(seqlen_kv, 33)
    heads_kv, group_size, batch = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3])
    heads = heads_kv * group_size
    layout = draw.choice(["bshd", "bshd", "bhsd", "sbhd", "dhsb"])

    def array(seqlen: int, of_heads: int, of_batch: int) -> Any:
        values = numbers.standard_normal((of_batch, seqlen, of_heads, head_dim))
        view = target.place(VIEWS[draw.choice(target.views)](rounded(values, dtype)))
        return view.transpose(["bshd".index(letter) for letter in layout])

    query = array(seqlen_q, heads, batch)
    key = array(seqlen_kv, draw.choice([1, heads_kv, heads_kv]), draw.choice([1, batch, batch]))
    value = array(seqlen_kv, draw.choice([1, heads_kv, heads_kv]), draw.choice([1, batch, batch]))
    options: dict[str, Any] = {
        "enable_gqa": True,
        "layout": layout,
        "causal_alignment": draw.choice(["top_left", "bottom_right"]),
        "scale": draw.choice([None, None, 0.2, -0.1]),
        "deterministic": draw.random() < 0.5,
        "is_causal": "causal" in features,
    }
    shape = (batch, heads, seqlen_q, seqlen_kv)
    for name in features:
        options |= draw_feature(name, shape, mask_dtype, draw, numbers, target)
    grad_lse = None if draw.random() < 0.3 else target.place(numbers.standard_normal(shape[:3]).astype(numpy.float32))
    return Call(features, query, key, value, array(seqlen_q, heads, batch), grad_lse, options)


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
    return {}


def draw_mask(shape: tuple[int, ...], name: str, dtype: str, draw: random.Random, numbers: numpy.random.Generator) -> Any:
    """A mask of any rank, broadcast along any axes, in any strides; some rows and blocks of it hide everything."""
    own = tuple(extent if draw.random() < 0.7 else 1 for extent in shape)[draw.randint(0, 3) :]
    visible = numbers.random(own) < draw.choice([0.3, 0.9, 1.0])
    if draw.random() < 0.5:
        visible[..., : draw.randint(0, own[-1])] = False
    mask = visible if name == "boolean_mask" else rounded(numpy.where(visible, numbers.standard_normal(own), -numpy.inf), dtype)
    if draw.random() < 0.3:
        mask = numpy.ascontiguousarray(mask[..., ::-1])[..., ::-1]
    if draw.random() < 0.3 and len(own) > 1:
        mask = numpy.ascontiguousarray(mask.swapaxes(-1, -2)).swapaxes(-1, -2)
    if draw.random() < 0.2:
        mask = numpy.broadcast_to(mask, shape[4 - len(own) :])
    return mask


def judge(target: Target, call: Call) -> None:
    target.check(call.query, call.key, call.value, grad_out=call.grad_out, grad_lse=call.grad_lse, **call.options)


@pytest.mark.parametrize("group", range(GROUPS), ids="group{}".format)
def test_random_configurations(simulator: Target, group: int) -> None:
    for index in range(CALLS_PER_GROUP):
        call = draw_call(simulator, 0, group, index)
        print(f"group {group}, index {index}: {call.describe()}")  # pytest shows the last one if it fails
        judge(simulator, call)


def test_calls_are_drawn_the_same_every_time(simulator: Target) -> None:
    first, second = (draw_call(simulator, 3, 20, 5) for _ in range(2))
    assert first.describe() == second.describe()
    assert simulator.bits(first.query) == simulator.bits(second.query)


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge random calls by the reference, and print a table of features.")
    parser.add_argument("--count", type=int, default=20_000, help="how many calls")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other calls")
    parser.add_argument("--per-group", type=int, default=50, help="calls that share compiled kernels")
    parser.add_argument("--arch", default="sm_80", choices=SIMULATED, help="what the simulator poses as")
    chosen = parser.parse_args()
    os.environ["CUFLASH_SIMULATOR_ARCH"] = chosen.arch
    target = Target(chosen.arch)
    calls: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    failed, begin = 0, time.perf_counter()
    for number in range(chosen.count):
        group, index = divmod(number, chosen.per_group)
        call = draw_call(target, chosen.seed, group, index)
        names = (*(call.features or ("no feature",)), str(call.query.dtype))
        calls.update(names)
        try:
            judge(target, call)
        except Exception as error:
            failed += 1
            failures.update(names)
            print(
                f"FAILED --seed {chosen.seed}, group {group}, index {index}: {call.describe()}\n  {type(error).__name__}: {error}",
                flush=True,
            )
        if (number + 1) % 1000 == 0:
            print(f"{number + 1} calls, {failed} failed, {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"\n{'feature':16}{'calls':>8}{'failed':>8}")
    for name, count in sorted(calls.items()):
        print(f"{name:16}{count:8}{failures[name]:8}")
    print(f"{'all':16}{chosen.count:8}{failed:8}   seed {chosen.seed}, {chosen.arch}, {time.perf_counter() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
