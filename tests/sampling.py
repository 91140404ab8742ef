"""Which cases the ordinary run of the tests leaves out. `--exhaustive` runs all.

Compiling its kernels is most of what a case costs, on a machine that has compiled none. Of cases that need the same kernels each runs; of others

- each runs on one simulated architecture only: the architectures take turns, and each file begins with another one. Where a test has fewer sets of kernels than
  there are architectures, all run on the usual one, which tests that ask for no architecture take: they share kernels with those;
- where a test is marked `sample(n)`, n run.

The choice is made of names alone, so that it is the same in every process and on every machine.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy
import pytest

_SAME_KERNELS = {
    "alignment", "at", "axis", "bad", "count", "dropout_p", "fill", "gap", "given_out", "heads_kv", "heads_q", "key_shape", "layout", "lengths", "maxima", "offsets_q", "order",
    "packing", "query_shape", "scale", "score", "seqlen", "seqlen_kv", "seqlen_q", "shapes", "shift", "sign", "size", "softcap", "tokens", "view",
}  # fmt: skip
"""Parameters of tests that no kernel is compiled for: cases that differ in them alone share their kernels, if they share the architecture."""


def on_other_architectures(items: list[pytest.Item], architectures: Sequence[str], usual: str) -> set[pytest.Item]:
    """Of tests that take `target`: the items whose kernels have their turn on another simulated architecture."""
    of_kernels: dict[str, dict[tuple[tuple[str, int], ...], list[pytest.Item]]] = {}
    numbers: dict[tuple[str, str], dict[int, int]] = {}  # of a parameter's values, as they appear: the same in every process
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("target") in architectures:
            test = _test_of(item)
            chosen_by = []
            for name in sorted(call.params.keys() - {"target"} - _SAME_KERNELS):
                known = numbers.setdefault((test, name), {})
                chosen_by.append((name, known.setdefault(id(call.params[name]), len(known))))
            of_kernels.setdefault(test, {}).setdefault(tuple(chosen_by), []).append(item)
    return {
        item
        for test, kernels in of_kernels.items()
        for turns in [architectures if len(kernels) >= len(architectures) else [usual]]
        for turn, key in enumerate(sorted(kernels, key=_scrambled), _scrambled(test.split("::")[0]))  # by file: its tests share kernels
        for item in kernels[key]
        if item.callspec.params["target"] != turns[turn % len(turns)]  # type: ignore[attr-defined]
    }


def beyond_samples(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of tests marked `sample(n)`: all but n cases, and but n on a GPU."""
    cases: dict[tuple[str, bool], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            on_gpu = item.callspec.params.get("target") == "gpu"  # type: ignore[attr-defined]
            cases.setdefault((_test_of(item), on_gpu), []).append(item)
    return {item for of_test in cases.values() for item in set(of_test) - _sample(of_test, of_test[0].get_closest_marker("sample").args[0])}


def _sample(cases: list[pytest.Item], count: int) -> set[pytest.Item]:
    """So many of a test's cases, in which the values of each parameter appear about equally often, and so do pairs of them."""
    cases = sorted(cases, key=lambda item: _scrambled(item.name))
    of_cases = [[(name, id(value)) for name, value in item.callspec.params.items()] for item in cases]  # type: ignore[attr-defined]
    values, number_of_value = _numbered(of_cases)
    pairs, number_of_pair = _numbered([list(itertools.combinations(of_case, 2)) for of_case in of_cases])
    number_of_values = Counter(name for name, _ in number_of_value)
    weights = numpy.array([number_of_values[name] for name, _ in number_of_value])
    taken_values, taken_pairs = numpy.zeros(len(number_of_value), int), numpy.zeros(len(number_of_pair), int)
    chosen: list[int] = []
    while len(chosen) < min(count, len(cases)):
        repeats = (taken_values * weights)[values].sum(axis=1)
        repeats[chosen] = numpy.iinfo(int).max
        best = int(numpy.lexsort((taken_pairs[pairs].sum(axis=1), repeats))[0])  # the first of equals
        chosen.append(best)
        taken_values[values[best]] += 1
        taken_pairs[pairs[best]] += 1
    return {cases[number] for number in chosen}


def _numbered(of_cases: list[list[Any]]) -> tuple[Any, dict[Any, int]]:
    """What each case has, as numbers in a matrix with a row for each, and the number of everything that any has."""
    numbers: dict[Any, int] = {}
    rows = [[numbers.setdefault(each, len(numbers)) for each in of_case] for of_case in of_cases]
    return numpy.array(rows, int).reshape(len(rows), -1), numbers


def _test_of(item: pytest.Item) -> str:
    return f"{item.path.name}::{item.originalname}"  # type: ignore[attr-defined]


def _scrambled(key: object) -> int:
    return zlib.crc32(repr(key).encode())
