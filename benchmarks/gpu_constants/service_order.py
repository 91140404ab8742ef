"""In which order the tensor unit serves warpgroups: what two rules predict for the tests, and which of them the clocks support.

A product occupies the unit for `cost` clocks; products of one warpgroup are served in the order in which it issued them. `fifo`: the unit serves whatever was
issued first. `rr`: the unit takes one product of every warpgroup that has any, in turn. Issue takes one clock per product here, so under `fifo` a
batch that was begun earlier is served before a later one.
"""

from __future__ import annotations

from collections.abc import Sequence


def predict(rule: str, lengths: Sequence[int], delays: Sequence[int], costs: Sequence[float]) -> list[float]:
    """When each warpgroup's last product is complete, in clocks after the start."""
    issued = [[delay + i for i in range(length)] for length, delay in zip(lengths, delays, strict=True)]
    served = [0] * len(lengths)
    done = [0.0] * len(lengths)
    now, last = 0.0, len(lengths) - 1
    while any(count < length for count, length in zip(served, lengths, strict=True)):
        waiting = [g for g in range(len(lengths)) if served[g] < lengths[g] and issued[g][served[g]] <= now]
        if not waiting:
            now = min(issued[g][served[g]] for g in range(len(lengths)) if served[g] < lengths[g])
            continue
        if rule == "fifo":
            chosen = min(waiting, key=lambda g: issued[g][served[g]])
        else:
            chosen = min(waiting, key=lambda g: (g - last - 1) % len(lengths))
        last = chosen
        now += costs[chosen]
        served[chosen] += 1
        done[chosen] = now
    return done


def judge(tests: Sequence[dict]) -> dict:
    """The rule that explains all tests of several warpgroups best, with the errors of both in clocks.

    A test has lengths, begin, costs and done, each per warpgroup; `begin` and `done` count from the earliest begin.
    """
    errors: dict[str, list[float]] = {"rr": [], "fifo": []}
    for test in tests:
        apart = [predict(rule, test["lengths"], test["begin"], test["costs"]) for rule in errors]
        test["predicted"] = {rule: [round(x) for x in times] for rule, times in zip(errors, apart, strict=True)}
        unit = max(*test["costs"], 1e-9)
        if max(abs(a - b) for a, b in zip(*apart, strict=True)) < 2 * unit:
            continue  # both rules say the same
        for rule, times in zip(errors, apart, strict=True):
            errors[rule].append(max(abs(a - b) for a, b in zip(times, test["done"], strict=True)) / unit)
    means = {rule: sum(values) / len(values) if values else float("nan") for rule, values in errors.items()}
    better = min(means, key=lambda rule: means[rule])
    other = "fifo" if better == "rr" else "rr"
    clear = means[better] < 2 and means[other] > 2 * means[better]
    return {
        "rule": better if clear else "neither",
        "mean_largest_error_in_products": means,
        "tests_that_tell_them_apart": len(errors["rr"]),
        "meaning": {
            "rr": "in turn: one product of each warpgroup that has any, whoever issued first",
            "fifo": "in order of issue: a batch issued earlier is served whole before a later one",
            "neither": "no rule explains the clocks within two products; see the raw clocks",
        }[better if clear else "neither"],
    }
