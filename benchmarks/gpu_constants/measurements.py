"""The measurements. Each is a generator of records (name, value, unit, how, and raw numbers where they matter); the file constants.py runs them.

A clock is read by the SM itself. Everything is repeated; the value is the median, `low` and `high` are the extremes.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy

from gpu_constants import programs, service_order

Record = dict[str, Any]
SHARED_TENSOR = 3 * 64 * 128 + 256 * 128 + 1024
STREAM_SHARED = 4 * 32768 + 1024
ALONE = 160 * 1024
"""Shared memory of a block that shall have an SM for itself."""
MEGABYTE = 1 << 20


def record(name: str, values: Sequence[float], unit: str, how: str, **more: Any) -> Record:
    values = [float(v) for v in values]
    summary = {"value": round(statistics.median(values), 4), "low": round(min(values), 4), "high": round(max(values), 4)}
    return {"name": name, **summary, "unit": unit, "how": how, **more}


def spans(results: Any, warps: int) -> Any:
    """Clocks from the first begin to the last end of each block. A block whose waits failed has a warp whose begin is its end: NaN."""
    pairs = results[: results.size // (2 * warps) * 2 * warps].reshape(-1, warps, 2).astype(numpy.int64)
    used = pairs[:, :, 1] != 0
    begin = numpy.where(used, pairs[:, :, 0], numpy.iinfo(numpy.int64).max).min(axis=1)
    span = (pairs[:, :, 1].max(axis=1) - begin).astype(numpy.float64)
    failed = (used & (pairs[:, :, 0] == pairs[:, :, 1])).any(axis=1) | ~used.any(axis=1)
    return numpy.where(failed, numpy.nan, span)


class Runner:
    """Launches a kernel a few times and returns the spans of its blocks."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.repetitions = 1 if machine.dry else 5

    def count(self, number: int) -> int:
        return 2 if self.machine.dry else number

    def spans(self, program: str, kernel: str, grid: int, block: int, shared: int, *arguments: Any, warps: int | None = None) -> list[Any]:
        warps = block // 32 if warps is None else warps
        found = []
        for repetition in range(self.repetitions + 1):
            results = self.machine.array(2 * grid * warps, numpy.uint64)
            self.machine.launch(program, kernel, grid, block, shared, results, *arguments)
            self.machine.wait()
            if repetition or self.machine.dry:  # the first one warms up
                found.append(spans(self.machine.get(results), warps))
        return found


# --- Order of service ---------------------------------------------------------------------------------------------------------------------


def _order_log(machine: Any, kernel: str, lengths: Sequence[int], delays: Sequence[int]) -> Any:
    """(groups, 44) clocks: begin, issued, done of four warps, then warp 0's clock after each issue."""
    logs = machine.array((3, 44), numpy.uint32)
    work = numpy.array([*lengths, *[0] * (3 - len(lengths)), *delays, *[0] * (3 - len(delays))], numpy.int32).tobytes()
    machine.launch(kernel, kernel, 1, 128 * len(lengths), SHARED_TENSOR, logs, work, ("f", 123.456))
    machine.wait()
    return machine.get(logs)[: len(lengths)].astype(numpy.int64)


def _times(log: Any) -> dict[str, list[int]]:
    origin = int(log[:, [0, 3, 6, 9]].min())
    return {
        "begin": [int(row[[0, 3, 6, 9]].min()) - origin for row in log],
        "issued": [int(row[[1, 4, 7, 10]].max()) - origin for row in log],
        "done": [int(row[[2, 5, 8, 11]].max()) - origin for row in log],
    }


def _median_times(machine: Any, kernel: str, lengths: Sequence[int], delays: Sequence[int]) -> tuple[dict[str, list[int]], Any]:
    logs = [_order_log(machine, kernel, lengths, delays) for _ in range(2 if machine.dry else 6)][1:]
    runs = [_times(log) for log in logs]
    middle = {key: [int(statistics.median(run[key][g] for run in runs)) for g in range(len(lengths))] for key in runs[0]}
    middle["done_of_all_runs"] = [run["done"] for run in runs]
    return middle, logs[-1]


def order_of_service(machine: Any) -> Iterator[Record]:
    tests = []
    kernels = list(programs.ORDERS) if not machine.dry else ["order_64_ss"]
    for kernel in kernels:
        costs = programs.product_costs(kernel, 3)
        times, log = _median_times(machine, kernel, (32,), (0,))
        yield record(
            f"{kernel}: clocks per product, one warpgroup",
            [float(numpy.diff(log[0, 28:44]).mean())],
            "clocks",
            "mean distance of the later half of 32 issues, by when the unit is full; with N = 64 it is the distance of the test's own instructions",
            done=times["done"][0],
            issue_clocks=(log[0, 12:44] - log[0, 0]).tolist(),
        )
        unit = max(costs)
        cases = [((a, b), (0, int(unit * d))) for a, b in ((16, 16), (32, 4), (4, 32), (32, 16)) for d in (0.3, 2.5)]
        cases += [((a, b), (int(unit * 2.5), 0)) for a, b in ((16, 16), (4, 32))]
        cases += [((16, 16, 16), (0, int(unit * 0.6), int(unit * 1.2))), ((32, 4, 8), (0, int(unit * 2), int(unit * 4)))]
        for lengths, delays in cases if not machine.dry else cases[:1] + cases[-1:]:
            times, log = _median_times(machine, kernel, lengths, delays)
            tests.append(
                {
                    "kernel": kernel,
                    "lengths": lengths,
                    "delays": delays,
                    **times,
                    "issue_clocks": [[int(x) - int(log[:, 0].min()) for x in log[g, 12 : 12 + length]] for g, length in enumerate(lengths)],
                }
            )
    yield {
        "name": "order of service between warpgroups",
        "value": service_order.judge_kernels(tests)["all"]["rule"],
        "unit": "rule",
        "how": "Batches of wgmma of two and three warpgroups, begun at known times; which rule explains when each is issued and done",
        "verdicts": service_order.judge_kernels(tests),
        "tests": tests,
    }


def timelines(machine: Any) -> Iterator[Record]:
    for kernel, (n, _) in programs.TIMELINES.items():
        if machine.dry and n != 64:
            continue
        runs = []
        for delays in ((0,), (0, 0), (0, n // 4), (0, n), (n, 0), (0, 2 * n), (0, n // 4, n // 2)):
            for _ in range(2 if machine.dry else 4):
                logs = machine.array((3, 10), numpy.uint32)
                work = numpy.array([8, 8, 8, *delays, *[0] * (3 - len(delays))], numpy.int32).tobytes()
                machine.launch(kernel, kernel, 1, 128 * len(delays), SHARED_TENSOR, logs, work, ("f", 123.456))
                machine.wait()
                log = machine.get(logs)[: len(delays)].astype(numpy.int64)
            log -= log[:, 0].min()
            runs.append({"delays": delays, "begin": log[:, 0].tolist(), "issued": log[:, 1].tolist(), "done": log[:, 2:].tolist()})
        alone = runs[0]["done"][0]
        yield record(
            f"{kernel}: clocks between completions, alone",
            [b - a for a, b in itertools.pairwise(alone)],
            "clocks",
            "eight products, each a commit group, each waited for; `runs` has the clocks of one to three warpgroups with these delays",
            first=alone[0],
            runs=runs,
        )


# --- Throughput of wgmma ------------------------------------------------------------------------------------------------------------------


def wgmma(machine: Any) -> Iterator[Record]:
    runner = Runner(machine)
    trips = runner.count(32)
    for n in programs.SHAPES if not machine.dry else (64, 112):
        for kind in ("ss", "rs"):
            for groups in (1, 2, 3):
                nanoseconds = machine.array(2, numpy.uint64)
                found = runner.spans(
                    f"wgmma_{n}", f"wgmma_{n}_{kind}", 1, 128 * groups, SHARED_TENSOR, nanoseconds, ("i", trips), ("f", 123.456)
                )
                cycles = [float(s[0]) / (16 * trips * groups) for s in found]
                yield record(
                    f"wgmma m64n{n}k16 {kind}, {groups} warpgroups",
                    cycles,
                    "clocks per product",
                    f"{trips} batches of 16 per warpgroup, one batch in flight; the ideal is N/2",
                    share_of_ideal=round(n / 2 / statistics.median(cycles), 4) if min(cycles) > 0 else None,
                )


def clocks(machine: Any) -> Iterator[Record]:
    """The SM's clock with nothing else to do, and while all SMs run wgmma, in slices of some milliseconds."""

    def gigahertz(results: Any, nanoseconds: Any, warps: int) -> list[float]:
        times = machine.get(nanoseconds).reshape(-1, 2).astype(numpy.int64)
        elapsed = times[:, 1] - times[:, 0]
        pairs = machine.get(results).reshape(-1, warps, 2).astype(numpy.int64)[:, 0]
        return [float(c) / float(t) for c, t in zip(pairs[:, 1] - pairs[:, 0], elapsed, strict=True) if t > 0]

    rates = []
    for _ in range(1 if machine.dry else 5):
        results, nanoseconds = machine.array(2, numpy.uint64), machine.array(2, numpy.uint64)
        machine.launch("handover", "clock_rate", 1, 32, 0, results, nanoseconds, ("Q", 50 if machine.dry else 4_000_000))
        machine.wait()
        rates += gigahertz(results, nanoseconds, 1)
    yield record("clock, one warp in all", rates or [0.0], "GHz", "clocks of the SM per nanosecond of the global timer")
    for n, kind, groups in ((256, "ss", 2), (128, "rs", 3), (64, "ss", 1)):
        if machine.dry and n != 64:
            continue
        per_trip = 16 * n / 2 * groups
        trips = 2 if machine.dry else int(20_000_000 / per_trip)  # about 12 ms
        slices, launched = [], []
        for _ in range(1 if machine.dry else 40):
            results, nanoseconds = (
                machine.array(2 * machine.num_sms * 4 * groups, numpy.uint64),
                machine.array(2 * machine.num_sms, numpy.uint64),
            )
            launched.append((results, nanoseconds))
            machine.launch(
                f"wgmma_{n}", f"wgmma_{n}_{kind}", machine.num_sms, 128 * groups, max(SHARED_TENSOR, ALONE), results, nanoseconds,
                ("i", trips), ("f", 123.456),
            )  # fmt: skip
        machine.wait()
        products = []
        for results, nanoseconds in launched:
            rate = gigahertz(results, nanoseconds, 4 * groups)
            slices.append(round(statistics.median(rate), 4) if rate else 0.0)
            products += [s / (16 * trips * groups) for s in spans(machine.get(results), 4 * groups)]
        settled = slices[len(slices) // 2 :]
        yield record(
            f"clock, all SMs run wgmma m64n{n}k16 {kind}, {groups} warpgroups",
            settled,
            "GHz",
            "as above; the later half of launches in a row. `slices` has all of them",
            slices=slices,
            clocks_per_product=round(float(numpy.nanmedian(products)), 3),
            tflops=round(
                float(2 * 64 * n * 16 * machine.num_sms * statistics.median(settled) / max(numpy.nanmedian(products), 1e-9) / 1000), 1
            ),
        )


# --- Instructions -------------------------------------------------------------------------------------------------------------------------


def instructions(machine: Any) -> Iterator[Record]:
    runner = Runner(machine)
    half = len(programs.INSTRUCTIONS) // 2
    per_step = {"fmnmx": 2}
    operands = (("I", 0x3F7FF000), ("I", 0x3F000000), ("I", 0xDEADBEEF))
    for index, name in enumerate(programs.INSTRUCTIONS):
        program = f"instructions_{int(index >= half)}"
        trips = runner.count(32)
        steps = per_step.get(name, 1)
        if not name.startswith("st"):
            found = runner.spans(program, f"{name}_latency", 1, 32, 512, ("i", trips), *operands)
            yield record(f"{name}: latency", [float(s[0]) / (64 * trips * steps) for s in found], "clocks", "one warp, one chain")
        by_warps = {}
        for warps in (4, 8, 16):
            found = runner.spans(program, f"{name}_throughput", 1, 32 * warps, 512 * warps, ("i", trips), *operands)
            by_warps[warps] = [float(s[0]) / (64 * trips * steps * warps / 4) for s in found]
        best = min(by_warps.values(), key=statistics.median)
        yield record(
            f"{name}: throughput",
            best,
            "clocks per warp instruction and sub-partition",
            "8 chains per warp; the best of 1, 2 and 4 warps per sub-partition",
            by_warps={k: round(statistics.median(v), 4) for k, v in by_warps.items()},
        )


# --- Hand-overs ---------------------------------------------------------------------------------------------------------------------------


def handovers(machine: Any) -> Iterator[Record]:
    runner = Runner(machine)
    trips = runner.count(256)

    def one(name: str, kernel: str, block: int, per_trip: float, how: str, *arguments: Any) -> Record:
        found = runner.spans("handover", kernel, 1, block, 0, ("i", trips), *arguments)
        return record(name, [float(s[0]) / (trips * per_trip) for s in found], "clocks", how)

    for partner in (1, 4):
        where = "another sub-partition" if partner == 1 else "the same sub-partition"
        yield one(
            f"mbarrier hand-over, warp of {where}",
            "mbarrier_turns",
            160,
            2,
            "arrive to the end of the other's try_wait, in turns",
            ("i", partner),
        )
    yield one("mbarrier: arrive and wait, alone", "mbarrier_alone", 32, 1, "one thread, one barrier")
    yield one("mbarrier: try_wait on a complete phase", "mbarrier_ready", 32, 1, "one warp")
    for threads in (64, 256):
        how = "bar.arrive to the end of the other half's bar.sync, in turns"
        yield one(f"named barrier hand-over, {threads} threads, number in the instruction", f"named_turns_{threads}", threads, 2, how)
        yield one(f"named barrier hand-over, {threads} threads, number in a register", "named_turns", threads, 2, how)
    for threads in (32, 128, 256, 384, 512):
        yield one(f"bar.sync 0, {threads} threads", "block_barrier", threads, 8, "in a row")
    for threads in (128, 384):
        yield one(
            f"bar.sync of 128 threads, {threads // 128} warpgroups at a time, number in a register",
            "warpgroup_barrier",
            threads,
            8,
            "in a row",
        )
    for threads in (32, 128, 384):
        yield one(f"st.shared and fence.proxy.async, {threads} threads", "proxy_fence", threads, 4, "in a row")


def launches(machine: Any) -> Iterator[Record]:
    count = 2 if machine.dry else 500
    for grid in (1, machine.num_sms):
        issue, single = [], []
        for _ in range(1 if machine.dry else 5):
            machine.wait()
            begin = time.perf_counter()
            for _ in range(count):
                machine.launch("handover", "nothing", grid, 128, 0)
            issue.append((time.perf_counter() - begin) / count * 1e6)
            machine.wait()
            begin = time.perf_counter()
            for _ in range(max(count // 10, 1)):
                machine.launch("handover", "nothing", grid, 128, 0)
                machine.wait()
            single.append((time.perf_counter() - begin) / max(count // 10, 1) * 1e6)
        yield record(
            f"launches in a row, host, {grid} blocks",
            issue,
            "microseconds",
            "empty kernels through cuLaunchKernel, this script's Python included; the GPU is faster than this host",
        )
        yield record(f"launch and wait, {grid} blocks", single, "microseconds", "an empty kernel, then a wait for it")
    count = 2 if machine.dry else 200
    stamps = machine.array(count, numpy.uint64)
    ours = [stamps[i : i + 1] for i in range(count)]
    busy = machine.array(2, numpy.uint64), machine.array(2, numpy.uint64)
    # The stream is busy until all are queued: otherwise the distance would be the host's.
    machine.launch("handover", "clock_rate", 1, 32, 0, *busy, ("Q", 50 if machine.dry else 20_000_000))
    for own in ours:
        machine.launch("handover", "timer", 1, 32, 0, own)
    machine.wait()
    yield record(
        "from a queued kernel's begin to the next one's",
        numpy.diff(machine.get(stamps).astype(numpy.int64)),
        "nanoseconds",
        "tiny kernels of one stream, queued behind a long one, by the global timer",
    )


# --- Memory -------------------------------------------------------------------------------------------------------------------------------


def loads(machine: Any) -> Iterator[Record]:
    runner = Runner(machine)
    size = MEGABYTE // 4 if machine.dry else 16 * MEGABYTE
    data = machine.array(size, numpy.uint8)
    chunks = 8 if machine.dry else 256
    footprint = ("I", size)
    odd = 32768 * 37
    tensor = machine.tensor_map(data, 128, size // 256, (64, 128))

    def rates(found: list[Any], nbytes: int) -> list[float]:
        return [float(nbytes / numpy.nanmedian(s)) if not numpy.isnan(s).all() else 0.0 for s in found]

    kernels: list[tuple[str, str, tuple[Any, ...], int, str]] = [
        ("bulk copies", "bulk_stream", (data,), 1, "two of 16 KB per stage"),
        ("tensor copies", "tensor_stream", (tensor,), 1, "boxes of 64x128 2-byte elements, 128-byte swizzle"),
        ("bulk copies, multicast to a cluster of 2", "bulk_multicast", (data,), 2, "each block brings 16 KB for both; bytes that arrive"),
        (
            "tensor copies, multicast to a cluster of 2",
            "tensor_multicast",
            (tensor,),
            2,
            "each block brings one box for both; bytes that arrive",
        ),
    ]
    for grid in (1, 2, machine.num_sms // 2, machine.num_sms):
        for name, kernel, source, cluster, how in kernels:
            if grid % cluster:
                continue
            for step, where in ((odd, "addresses of its own"), (0, "the same addresses")) if grid > 2 else ((odd, "addresses of its own"),):
                found = runner.spans("memory", kernel, grid, 32, STREAM_SHARED, *source, footprint, ("I", step), ("i", chunks))
                yield record(
                    f"L2 to SM, {name}, {grid} SMs, {where}",
                    rates(found, chunks * 32768),
                    "bytes per clock and SM",
                    f"4 stages of 32 KB in flight; {how}; {size >> 20} MB in L2",
                )
    for grid in (1, machine.num_sms):
        for threads in (128, 512):
            trips = chunks * 32768 // (8 * 16 * threads)
            found = runner.spans("memory", "load_stream", grid, threads, ALONE, data, footprint, ("I", 65536 * 37), ("i", trips), ("I", 1))
            yield record(
                f"L2 to SM, ld.global.v4, {grid} SMs, {threads} threads",
                rates(found, trips * 8 * 16 * threads),
                "bytes per clock and SM",
                "8 loads of 16 bytes in flight per thread, past L1",
            )
    for nbytes in (128, 2048, 8192, 16384, 32768):
        copies = runner.count(64)
        found = _latencies(machine, "bulk_latency", copies, data, ("I", size // 2), ("I", nbytes), ("i", copies))
        yield record(f"latency of a bulk copy of {nbytes} bytes from L2", found, "clocks", "issue to the end of the wait, one at a time")
    copies = runner.count(64)
    found = _latencies(machine, "tensor_latency", copies, tensor, ("I", size // 2), ("i", copies))
    yield record("latency of a tensor copy of 64x128 elements from L2", found, "clocks", "as above; 16 KB with 128-byte swizzle")
    chain = numpy.zeros(size // 4, numpy.uint32)
    hops = numpy.arange(0, 4096, dtype=numpy.int64) * 1237 % 2048 * (size // 4096)
    chain[hops[:-1] // 4] = hops[1:]
    data = machine.put(chain)
    number = runner.count(1024)
    found = runner.spans("memory", "load_latency", 1, 32, 0, data, ("i", number), ("I", 1))
    yield record("latency of ld.global from L2", [float(s[0]) / number for s in found], "clocks", "a chain of loads past L1")


def _latencies(machine: Any, kernel: str, copies: int, *arguments: Any) -> list[float]:
    for _ in range(2):
        results = machine.array(2 * copies, numpy.uint64)
        machine.launch("memory", kernel, 1, 32, 33 * 1024, results, *arguments)
        machine.wait()
    pairs = machine.get(results).reshape(-1, 2).astype(numpy.int64)
    return [float(x) for x in (pairs[:, 1] - pairs[:, 0])[copies // 4 :]]


def reductions(machine: Any) -> Iterator[Record]:
    runner = Runner(machine)
    sms = machine.num_sms
    region = 32768 if machine.dry else 65536
    data = machine.array(sms * region // 4, numpy.float32)
    trips = 4 if machine.dry else 512
    for name, kernel, words in (("red.add.f32", "reduce_f32", 1), ("red.add.v4.f32", "reduce_v4_f32", 4)):
        for grid in (1, sms):
            cases = [("a region of its own", region, region), ("the same region", region, 0), ("the same 4 KB", 4096, 0)]
            for where, bytes_, step in cases if grid > 1 else cases[:1]:
                found = runner.spans("memory", kernel, grid, 256, ALONE, data, ("I", bytes_), ("I", step), ("i", trips))
                rate = [float(4 * words * 256 * trips / numpy.median(s)) for s in found]
                yield record(
                    f"{name}, {grid} SMs, {where}", rate, "bytes per clock and SM", f"256 threads, {bytes_ >> 10} KB, a fence at the end"
                )
    for nbytes in (4096, 16384):
        for grid in (1, sms):
            cases = [("a region of its own", region, region), ("the same region", region, 0)]
            for where, bytes_, step in cases if grid > 1 else cases[:1]:
                number = trips // 4
                arguments = (data, ("I", bytes_), ("I", step), ("I", nbytes), ("i", number))
                found = runner.spans("memory", "bulk_reduce", grid, 32, ALONE, *arguments)
                rate = [float(nbytes * number / numpy.median(s)) for s in found]
                yield record(f"bulk reduction of {nbytes} bytes, {grid} SMs, {where}", rate, "bytes per clock and SM", "three in flight")


MEASUREMENTS: dict[str, tuple[Callable[[Any], Iterator[Record]], int]] = {
    # In the order of their value, with the seconds that each may take.
    "order_of_service": (order_of_service, 10),
    "timelines": (timelines, 6),
    "wgmma": (wgmma, 8),
    "instructions": (instructions, 10),
    "handovers": (handovers, 6),
    "loads": (loads, 8),
    "clocks": (clocks, 8),
    "reductions": (reductions, 6),
    "launches": (launches, 5),
}
