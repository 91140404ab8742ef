"""Compiling ahead what a run needs, so that no case is timed while others wait for the compiler."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cases import Case, dry_cases, dry_feature_cases, feature_cases, quick_cases
from bench.machine import Machine
from bench.report import one_line
from cuflash.hardware import device
from cuflash.jit import cache
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from small_calls.arrays import requests_of as requests_of_calls
from small_calls.cases import check_cases, simulator_cases, tiny_cases


def plans_of(case: Case, on: device.Device, tile: Any = None, backward: bool | None = None) -> list[Plan]:
    """The plans of a case's two passes, or of one of them, for any device."""
    return [make_plan(case.problem, on, backward=each, tile=tile) for each in ((False, True) if backward is None else (backward,))]


def requests_of(cases: Iterable[Case], on: device.Device) -> list[Any]:
    """What has to be compiled for `on` before these cases run."""
    return list(dict.fromkeys(kernel.request(on) for case in cases for plan in plans_of(case, on) for kernel in plan.kernels))


def prefetch(cases: list[Case], machine: Machine) -> None:
    """Compile what the cases need before the first of them is timed."""
    requests = requests_of(cases, machine.device)
    started, compiled = time.perf_counter(), cache.statistics().compiles
    try:
        cache.fetch_many(requests, max_workers=os.cpu_count())
    except Exception as error:  # the cases that need it will say so; the others need not suffer
        print(f"WRONG {one_line(error)}")
    compiled = cache.statistics().compiles - compiled
    print(f"kernels: {len(requests)}, {compiled} of them compiled in {time.perf_counter() - started:.1f} s", flush=True)


def requests_like(cache_directory: Path, on: device.Device) -> list[Any]:
    """The kernels for `on` of all calls whose kernels for the simulator, posing as the same architecture, are in a cache directory."""
    found = []
    for entry in cache.contents(cache_directory / "kernels"):
        if entry.request.target == "ptx" and entry.request.arch == on.compile_arch:
            found.append(replace(entry.request, target="cubin"))
    return found


def compile_all(arguments: argparse.Namespace) -> int:
    """`--compile`: one failure does not keep the others from being compiled. With `--arch` no GPU has to be there."""
    on = device.of_arch(arguments.arch, "gpu") if arguments.arch is not None else Machine(arguments.dry_run).device
    small = arguments.dry_run or arguments.small
    wanted: dict[Any, None] = {}
    for calls in (check_cases(), tiny_cases(), simulator_cases()):
        wanted |= dict.fromkeys(requests_of_calls(calls[:1] if small else calls, on))
    cases = [*dry_cases(), *dry_feature_cases()[:1]] if small else [*quick_cases(), *feature_cases()]
    wanted |= dict.fromkeys(requests_of(cases, on))
    if arguments.like is not None:
        wanted |= dict.fromkeys(requests_like(arguments.like, on))
    started, failed, spilled = time.perf_counter(), 0, 0
    deadline = time.monotonic() + arguments.seconds
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [(request, pool.submit(cache.fetch, request)) for request in wanted]
        for request, task in tasks:
            try:
                artifact = task.result(timeout=max(0.1, deadline - time.monotonic()))
            except Exception as error:
                failed += 1
                task.cancel()
                print(f"WRONG {request.describe()}: {one_line(error)}")
                continue
            used = [f"{r.registers} registers, {r.spill_store_bytes}/{r.spill_load_bytes} bytes spilled" for r in artifact.resources]
            spilled += any(r.spill_store_bytes for r in artifact.resources)
            words = re.findall(r"(HEAD_DIM|TILE_Q|TILE_KV|NUM_WARPS|NUM_STAGES|CAUSAL) = (\w+)", request.config)
            print(
                f"{request.describe():48} {' '.join(f'{a.lower()}={b}' for a, b in words):80} {artifact.seconds:.1f} s, {'; '.join(used)}"
            )
        for _, task in tasks:
            task.cancel()
    print(f"SUMMARY: {len(wanted)} kernels in {time.perf_counter() - started:.0f} s, {failed} failed, {spilled} spill")
    return int(failed > 0)
