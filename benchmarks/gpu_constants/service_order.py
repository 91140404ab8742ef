"""In which order the tensor unit serves warpgroups: what rules predict for the tests, and which of them the clocks support.

A product occupies the unit for `cost` clocks. Products of one warpgroup are served in the order in which it issued them. The rules differ in the rest:

`rr`      in turn: the unit takes one product of every warpgroup that has any, whoever issued first; nothing bounds what is issued.
`fifo`    in order of issue: a batch that was issued earlier is served whole before a later one; nothing bounds what is issued.
`queue`   in order of issue, and the unit holds `depth` products, the one that it computes included. A warpgroup that wants to issue into a full unit waits.
          Those that wait get the entries in turn.

Service and issue are judged apart. Which product is served next is seen best from the measured clocks of issue; how many products the unit holds is seen
from when these clocks are late. All clocks count from the earliest begin of the test.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpu_constants import programs

PACE = 24.0
"""Clocks between two issues of a warpgroup that nothing holds up, the test's own stores of clocks included."""
DEPTHS = range(2, 17)
UNBOUNDED = 1 << 20
MEANING = {
    "rr": "in turn: one product of each warpgroup that has any, whoever issued first",
    "fifo": "in order of issue, without a bound that these tests reach",
    "queue": "in order of issue; the unit holds {depth} products, and whoever wants to issue one more waits",
    "neither": "no rule explains the clocks; see the raw clocks",
}

Issues = Sequence[Sequence[float]]


class Clocks(NamedTuple):
    """When each product of each warpgroup was issued, and when the last one of each warpgroup was complete."""

    issued: list[list[float]]
    done: list[float]


def completions(rule: str, issued: Issues, costs: Sequence[float]) -> list[tuple[float, int]]:
    """(clock of completion, warpgroup) of every product in the order of service, by `rr` or in order of issue, from the clocks of issue."""
    groups = range(len(issued))
    served, completed = [0] * len(issued), []
    now, last = 0.0, len(issued) - 1
    while left := [g for g in groups if served[g] < len(issued[g])]:
        now = max(now, min(issued[g][served[g]] for g in left))
        waiting = [g for g in left if issued[g][served[g]] <= now]
        if rule == "rr":
            last = min(waiting, key=lambda g: (g - last - 1) % len(issued))
        else:
            last = min(waiting, key=lambda g: issued[g][served[g]])
        now += costs[last]
        served[last] += 1
        completed.append((now, last))
    return completed


def ends(completed: Sequence[tuple[float, int]], groups: int) -> list[float]:
    """When each warpgroup's last product is complete."""
    last = dict(sorted((group, clock) for clock, group in completed))
    return [last[g] for g in range(groups)]


def predict(
    rule: str,
    lengths: Sequence[int],
    begin: Sequence[float],
    costs: Sequence[float],
    depth: int = UNBOUNDED,
    entries: Sequence[int] = (),
) -> Clocks:
    """All clocks of a test, from when each warpgroup begins. `queue` alone looks at `depth`, and at `entries`: the warpgroup of each entry, where that is known
    and shall not be predicted."""
    if rule != "queue":
        issued = [[b + PACE * i for i in range(length)] for b, length in zip(begin, lengths, strict=True)]
        return Clocks(issued, ends(completions(rule, issued, costs), len(lengths)))
    issued: list[list[float]] = [[] for _ in lengths]
    ready, completed = list(begin), list[tuple[float, int]]()
    last = len(lengths) - 1
    while left := [g for g in range(len(lengths)) if len(issued[g]) < lengths[g]]:
        left = [entries[len(completed)]] if entries else left
        room = completed[-depth][0] if len(completed) >= depth else 0.0
        now = max(room, min(ready[g] for g in left))
        waiting = [g for g in left if ready[g] <= now]
        last = min(waiting, key=lambda g: (g - last - 1) % len(lengths))
        issued[last].append(now)
        ready[last] = now + PACE
        start = max(now, completed[-1][0] if completed else 0.0)
        completed.append((start + costs[last], last))
    return Clocks(issued, ends(completed, len(lengths)))


def measured_ends(test: dict[str, Any]) -> list[float]:
    """Of the run whose clocks of issue are in the test: the last one."""
    return list(test.get("done_of_all_runs", [test["done"]])[-1])


def errors(tests: Sequence[dict[str, Any]], predicted: Sequence[Sequence[float]]) -> list[float]:
    """The largest error of each test in products. Each kernel has one latency, the same for all its tests, which is no part of a rule."""
    differences = [[m - p for m, p in zip(measured_ends(test), ends_, strict=True)] for test, ends_ in zip(tests, predicted, strict=True)]
    by_kernel: dict[Any, list[float]] = defaultdict(list)
    for test, difference in zip(tests, differences, strict=True):
        by_kernel[test.get("kernel")] += difference
    latency = {kernel: statistics.median(values) for kernel, values in by_kernel.items()}
    return [
        max(abs(d - latency[test.get("kernel")]) for d in difference) / max(test["costs"])
        for test, difference in zip(tests, differences, strict=True)
    ]


def late_issues(test: dict[str, Any], depth: int) -> Iterator[float]:
    """By how many products each clock of issue differs from the one that a unit of this depth lets expect: the warpgroup's previous issue and the pace,
    but not before the unit has completed the product `depth` places earlier."""
    issued = test["issue_clocks"]
    completed = completions("fifo", issued, test["costs"])
    in_order = sorted((clock, group, i) for group, clocks in enumerate(issued) for i, clock in enumerate(clocks))
    for place, (clock, group, i) in enumerate(in_order):
        if i == 0:
            continue
        room = completed[place - depth][0] if place >= depth else 0.0
        yield abs(max(issued[group][i - 1] + PACE, room) - clock) / max(test["costs"])


def entries_of(test: dict[str, Any]) -> list[int]:
    """The warpgroup of each product, in the order of issue."""
    return [group for _, group in sorted((clock, group) for group, clocks in enumerate(test["issue_clocks"]) for clock in clocks)]


def turns(test: dict[str, Any], depth: int) -> tuple[int, int]:
    """(turns, repetitions): how often an entry of a full unit went to another warpgroup than the one before, and how often to the same, while two had more."""
    issued = test["issue_clocks"]
    in_order = entries_of(test)
    count, found = [0] * len(issued), [0, 0]
    for place, (group, following) in enumerate(itertools.pairwise(in_order)):
        count[group] += 1
        waiting = [g for g in range(len(issued)) if 0 < count[g] < len(issued[g])]
        if place >= depth and group in waiting and len(waiting) > 1:
            found[following == group] += 1
    return found[0], found[1]


def judge(tests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rule that explains all tests of several warpgroups best, its depth, and the errors of all rules in products.

    A test has lengths, begin, costs, issue_clocks and done, each per warpgroup, and a kernel's name if there are several.
    """
    by_issue = {rule: [ends(completions(rule, t["issue_clocks"], t["costs"]), len(t["lengths"])) for t in tests] for rule in ("rr", "fifo")}
    apart = [
        max(abs(a - b) for a, b in zip(rr, fifo, strict=True)) >= max(test["costs"])
        for test, rr, fifo in zip(tests, by_issue["rr"], by_issue["fifo"], strict=True)
    ]

    def mean(predicted: Sequence[Sequence[float]]) -> float:
        values = [error for error, counts in zip(errors(tests, predicted), apart, strict=True) if counts]
        return round(statistics.fmean(values), 3) if values else float("nan")

    service = {rule: mean(predicted) for rule, predicted in by_issue.items()}
    lateness = {d: round(statistics.fmean(x for test in tests for x in late_issues(test, d)), 3) for d in (*DEPTHS, UNBOUNDED)}
    depth = min(DEPTHS, key=lambda d: lateness[d])
    from_begin = {
        rule: mean([predict(rule, t["lengths"], t["begin"], t["costs"], depth).done for t in tests]) for rule in ("rr", "fifo", "queue")
    }
    from_begin["queue, entries known"] = mean(
        [predict("queue", t["lengths"], t["begin"], t["costs"], depth, entries_of(t)).done for t in tests]
    )
    rule = "neither"
    if service["rr"] < 1 and service["fifo"] > 2 * service["rr"]:
        rule = "rr"
    elif service["fifo"] < 1 and service["rr"] > 2 * service["fifo"]:
        rule = "queue" if lateness[depth] < 0.6 * lateness[UNBOUNDED] else "fifo"
    taken = [turns(test, depth) for test in tests]
    return {
        "rule": rule,
        "depth": depth if rule == "queue" else None,
        "meaning": MEANING[rule].format(depth=depth),
        "tests_that_tell_rr_and_fifo_apart": sum(apart),
        "mean_largest_error_in_products_from_clocks_of_issue": service,
        "mean_largest_error_in_products_from_begin": from_begin,
        "mean_error_of_clocks_of_issue_in_products_by_depth": {"unbounded" if d == UNBOUNDED else str(d): x for d, x in lateness.items()},
        "entries_of_a_full_unit": {"in_turn": sum(t for t, _ in taken), "to_the_same_again": sum(r for _, r in taken)},
    }


def judge_kernels(tests: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The verdicts on the tests that the benchmark ran: `all` together, those of two and of three warpgroups, and each kernel's."""
    tests = [test | {"costs": programs.product_costs(test["kernel"], len(test["lengths"]))} for test in tests]
    parts = {"all": tests}
    for count, name in ((2, "two warpgroups"), (3, "three warpgroups")):
        parts[name] = [test for test in tests if len(test["lengths"]) == count]
    for test in tests:
        parts.setdefault(test["kernel"], []).append(test)
    return {name: judge(part) for name, part in parts.items() if part}
