"""Markdown tables of a constants.json, for docs/h100.md. A row whose record the file lacks is left out; a file of an older run may lack some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpu_constants import programs, service_order

Records = dict[str, dict[str, Any]]
LEFT_OUT = ("from a kernel's begin to the next one's", "launches in a row, GPU")
"""Starts of names of records that this benchmark no longer makes, because they measured the host."""


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(number(x) if isinstance(x, float) else str(x) for x in line) + " |" for line in lines)


def order(records: Records) -> str:
    verdicts = service_order.judge_kernels(records["order of service between warpgroups"]["tests"])

    def row(name: str, verdict: dict[str, Any]) -> list[str]:
        by_issue, from_begin = (verdict[f"mean_largest_error_in_products_from_{source}"] for source in ("clocks_of_issue", "begin"))
        entries = verdict["entries_of_a_full_unit"]
        return [
            name,
            verdict["rule"],
            verdict["depth"] or "–",
            *[f"{by_issue[rule]:.2f}" for rule in ("rr", "fifo")],
            *[f"{from_begin[rule]:.2f}" for rule in ("rr", "fifo", "queue", "queue, entries known")],
            f"{entries['in_turn']} of {sum(entries.values())}",
        ]

    head = [
        "tests",
        "verdict",
        "depth",
        "rr, issue known",
        "fifo, issue known",
        "rr",
        "fifo",
        "queue",
        "queue, entries known",
        "entries in turn",
    ]
    return table(head, [row(name, verdict) for name, verdict in verdicts.items()])


def depth_seen(records: Records) -> str:
    """Of the warpgroup that issues last of two or three: then the unit is full, and that product is the last to be complete."""
    rows = []
    for kernel, (n, rs) in programs.TIMELINES.items():
        runs = [run for run in records[f"{kernel}: clocks between completions, alone"]["runs"] if len(run["delays"]) > 1]
        waits = [max(done[-1] for done in run["done"]) - max(run["issued"]) for run in runs]
        rows.append([n, "RS" if rs else "SS", f"{min(waits)} to {max(waits)}", f"{min(waits) * 2 / n:.2f} to {max(waits) * 2 / n:.2f}"])
    return table(["N", "A from", "clocks", "products"], rows)


def wgmma(records: Records) -> str:
    rows = []
    for n in programs.SHAPES:
        found = [records[f"wgmma m64n{n}k16 {kind}, {groups} warpgroups"]["value"] for kind in ("ss", "rs") for groups in (1, 2, 3)]
        rows.append([n, n // 2, *[f"{clocks:.1f}" for clocks in found]])
    return table(["N", "N/2", "SS, 1 warpgroup", "2", "3", "RS, 1 warpgroup", "2", "3"], rows)


def instructions(records: Records) -> str:
    rows = []
    for name in programs.INSTRUCTIONS:
        latency, throughput = records.get(f"{name}: latency"), records.get(f"{name}: throughput")
        if throughput:
            rows.append([f"`{name}`", latency["value"] if latency else "–", f"{throughput['value']:.2f}"])
    return table(["instruction", "latency", "clocks per warp instruction and sub-partition"], rows)


def bandwidths(records: Records) -> str:
    found: dict[str, dict[str, Any]] = {}
    columns: list[str] = []
    for name, record in records.items():
        start, _, rest = name.partition("L2 to SM, ")
        if start or not rest:
            continue
        parts = rest.split(", ")
        place = next(i for i, part in enumerate(parts) if part.endswith(" SMs"))
        column = parts[place] + (", the same addresses" if parts[-1] == "the same addresses" else "")
        kind = ", ".join(
            part for i, part in enumerate(parts) if i != place and not part.endswith("addresses") and part != "addresses of its own"
        )
        columns += [column] if column not in columns else []
        found.setdefault(kind, {})[column] = record["value"]
    return table(["", *columns], [[kind, *[row.get(column, "–") for column in columns]] for kind, row in found.items()])


def listed(records: Records, measurement: str, start: str = "", digits: int = 1) -> str:
    rows = [
        [name, f"{record['value']:.{digits}f}", f"{record['low']:.{digits}f} to {record['high']:.{digits}f}", record["unit"]]
        for name, record in records.items()
        if record["measurement"] == measurement and name.startswith(start) and not name.startswith(LEFT_OUT)
    ]
    return table(["", "median", "range", "unit"], rows)


def clocks(records: Records) -> str:
    rows = []
    for name, record in records.items():
        if record["measurement"] == "clocks":
            rows.append(
                [
                    name.removeprefix("clock, "),
                    f"{record['value']:.3f}",
                    f"{record['low']:.3f} to {record['high']:.3f}",
                    record.get("tflops", "–"),
                ]
            )
    return table(["", "GHz", "range", "TFLOP/s"], rows)


def assumed(records: Records) -> str:
    """What a timing model in use before the measurement took for granted, beside it."""

    def value(name: str) -> str:
        return number(records[name]["value"])

    def spread(names: Iterable[str], digits: int = 1) -> str:
        values = [records[name]["value"] for name in names]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    sms = max(int(name.split()[5]) for name in records if name.startswith("L2 to SM, bulk copies, ") and "multicast" not in name)
    verdict = service_order.judge_kernels(records["order of service between warpgroups"]["tests"])["all"]
    first = [records[f"timeline_{n}_ss: clocks between completions, alone"]["first"] - n // 2 for n in (64, 128)]
    one_run = [
        records[f"wgmma m64n{n}k16 {kind}, {g} warpgroups"]["value"] * 2 / n
        for n in programs.SHAPES
        for kind in ("ss", "rs")
        for g in (2, 3)
    ]
    rows = [
        ["order of service", "in turn, product by product", service_order.MEANING[verdict["rule"]].format(depth=verdict["depth"])],
        ["products that the tensor unit holds", "16 per warpgroup", f"{verdict['depth']} in all"],
        ["clocks of m64nNk16", "N/2", f"{min(one_run):.3f} to {max(one_run):.3f} times N/2"],
        ["clocks before a product's computation", "16 + 32", f"{max(first)}, fence and issue included"],
        ["MUFU, clocks per warp instruction", "8", value("mufu_ex2: throughput")],
        ["FP32", "1", value("ffma: throughput")],
        ["ALU, conversions", "2", spread(f"{x}: throughput" for x in ("fmnmx", "lop3", "prmt", "f2fp_bf16"))],
        ["shared memory, bytes per clock", "128", f"{512 * 4 / records['ldsm_x4: throughput']['value']:.0f}"],
        ["L2 to SM, bytes per clock and SM, all SMs", "24", f"{value(f'L2 to SM, tensor copies, {sms} SMs, addresses of its own')}; "
         f"{value(f'L2 to SM, tensor copies, {sms} SMs, the same addresses')} where all read the same"],
        ["latency of TMA", "700", f"{value('latency of a bulk copy of 2048 bytes from L2')} (2 KB), "
         f"{value('latency of a tensor copy of 64x128 elements from L2')} (16 KB), nothing else on the way"],
        ["hand-over by mbarrier", "30", spread(name for name in records if name.startswith("mbarrier hand-over"))],
        ["hand-over by named barrier", "20", spread(name for name in records if name.startswith("named barrier hand-over"))],
        ["red, bytes per clock and SM", "16", f"{value(f'red.add.v4.f32, {sms} SMs, a region of its own')} (all SMs), "
         f"{value('red.add.v4.f32, 1 SMs, a region of its own')} (one)"],
        ["clock where wgmma never waits, GHz", "1.53", spread((n for n in records if n.startswith("clock, all SMs")), 2)],
    ]  # fmt: skip
    return table(["", "assumed", "measured"], rows)


def document(report: dict[str, Any]) -> str:
    """All tables, each below a heading."""
    records = {record["name"]: record for record in report["constants"]}
    parts = {
        "Order of service": order(records),
        "From the end of the last issue into a full unit to its completion": depth_seen(records),
        "wgmma, clocks per m64nNk16": wgmma(records),
        "Instructions, clocks": instructions(records),
        "Hand-overs": listed(records, "handovers"),
        "L2 to SM, bytes per clock and SM": bandwidths(records),
        "Latencies of L2": listed(records, "loads", "latency", 0),
        "Reductions into L2": listed(records, "reductions"),
        "The SM's clock": clocks(records),
        "Launches": listed(records, "launches"),
        "What was assumed before": assumed(records),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items()) + "\n"
