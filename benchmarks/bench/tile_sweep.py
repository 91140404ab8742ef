"""`--tiles`: whole passes with one kernel's tile pinned, beside what the model behind the default thinks of the tile."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.calls import cuflash_calls
from bench.cases import Case, dry_cases
from bench.compilation import plans_of
from bench.machine import Machine, heat, usable
from bench.operands import ALLOWED_ERROR, Operands
from bench.report import TILE_COLUMNS, Table, one_line, shape_columns
from bench.timing import time_call
from cuflash.hardware import device
from cuflash.jit import cache
from cuflash.planning import planner, tile_choice, tile_model, tile_rules, wgmma_backward, wgmma_forward
from cuflash.planning.kernel_cases import KernelCase


def chosen_tiles(case: KernelCase, on: device.Device, top: int, spread: int) -> list[tuple[int, int, Any]]:
    """(rank, how many there are, tile): the model's best, and some of the rest, evenly, in case that it is wrong."""
    legal = tile_choice.legal_tiles_for(case, on)
    fitting = [rank for rank, tile in enumerate(legal) if tile_model.estimate_registers(case, tile, on) <= tile_rules.MAX_REGISTERS]
    rest = [rank for rank in fitting if rank >= top]
    picked = [*range(min(top, len(legal))), *rest[:: max(1, len(rest) // spread if spread else len(rest) + 1)][:spread]]
    return [(rank, len(legal), legal[rank]) for rank in picked]


def tiled_kernels(case: Case, on: device.Device) -> list[KernelCase]:
    """All of both passes, those of every way to the same results, whatever variables rule out or ask for."""
    with unset(wgmma_forward.VARIABLE, wgmma_backward.VARIABLE):
        plans = [*plans_of(case, on), *(plan for backward in (False, True) for plan in _other_ways(case, on, backward))]
    return list({kernel.name: kernel.case for plan in plans for kernel in plan.kernels if kernel.spec.is_tiled}.values())


def _other_ways(case: Case, on: device.Device, backward: bool) -> list[Any]:
    (plan,) = plans_of(case, on, None, backward)
    ways = planner.other_ways(plan.problem, on, backward=backward)
    return [of for pinned in ways for of in plans_of(case, on, pinned, backward)]


@contextlib.contextmanager
def unset(*names: str) -> Iterator[None]:
    """Environment variables that are put back in the end."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def sweep_tiles(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--tiles`: whole passes with one kernel's tile pinned. Compilation runs ahead in threads while earlier tiles are timed."""
    on, deadline = machine.device, time.monotonic() + arguments.seconds
    shapes = [("bfloat16", 128, True), ("bfloat16", 64, True), ("float32", 64, True), ("bfloat16", 256, True), ("bfloat16", 128, False)]
    shapes += [("float32", 128, True), ("float16", 128, True), ("bfloat16", 64, False)]
    cases = dry_cases()[:1] if machine.small else [Case.plain(dtype, head_dim, causal, 4096) for dtype, head_dim, causal in shapes]
    cases = [case for case in cases if re.search(arguments.cases, str(case))]
    table = Table(arguments.output and arguments.output / "tiles.csv", TILE_COLUMNS)
    work: list[tuple[Case, str, int, int, Any, Any, Any]] = []
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2))
    for case in cases:
        for kernel_case in tiled_kernels(case, on):
            name = kernel_case.kernel.name
            for rank, count, tile in chosen_tiles(
                kernel_case, on, 2 if machine.small else arguments.top, 1 if machine.small else arguments.spread
            ):
                pinned = {name: tile}
                plan = plans_of(case, on, pinned, kernel_case.kernel.backward)[0]
                kernel = next(kernel for kernel in plan.kernels if kernel.name == name)
                others = [pool.submit(cache.fetch, other.request(on)) for other in plan.kernels if other is not kernel]
                work.append((case, name, rank, count, pinned, kernel, [pool.submit(cache.fetch, kernel.request(on)), *others]))
    operands: Operands | None = None
    best: dict[tuple[Case, str], list[tuple[float, int, Any]]] = {}
    done = wrong = 0
    for case, name, rank, count, pinned, kernel, artifacts in work:
        if time.monotonic() > deadline:
            print(f"out of time after {done} of {len(work)} tiles")
            break
        if operands is None or operands.case != case:
            operands = Operands(case, machine)
            heat(machine)
        kernel_case, tile = kernel.case, kernel.tile
        first = tile_model.estimate_cycles(kernel_case, tile_choice.default_tile(kernel_case, on), on)
        row: dict[str, Any] = {
            **machine.head(), "kernel": name, **shape_columns(case), "tile_q": tile.tile_q, "tile_kv": tile.tile_kv, "num_warps": tile.num_warps,
            "num_stages": tile.num_stages, "rank": rank, "of": count, "modelled": tile_model.estimate_cycles(kernel_case, tile, on) / first,
            "shared_bytes": kernel.shared_bytes,
        }  # fmt: skip
        direction = "backward" if kernel.spec.backward else "forward"
        try:
            compiled = [task.result(timeout=max(1.0, deadline - time.monotonic())) for task in artifacts]
            if compiled[0].resources:
                used = compiled[0].resources_of(kernel.entry)
                row |= {"registers": used.registers, "spill_bytes": used.spill_store_bytes + used.spill_load_bytes}
            if direction == "forward":
                calls = cuflash_calls(operands, forward_tile=pinned)
                call, errors = calls.forward, operands.errors({"out": calls.forward()})
            else:
                calls = cuflash_calls(operands, backward_tile=pinned)
                call, errors = calls.backward, operands.errors(dict(zip(("query", "key", "value"), calls.backward(), strict=True)))
            error = max(errors, default=0.0)
            if not error <= ALLOWED_ERROR[case.sample.dtype]:
                wrong += 1
                row["note"] = f"wrong: relative error {error:.1e}"
                print(f"WRONG {case} {name} {tile}: relative error {error:.1e}", flush=True)
            else:
                times = time_call(machine, call, 0.03)
                row |= {column: times[column] for column in ("milliseconds", "milliseconds_p20", "milliseconds_p80")}
                row["tflops"] = case.flops(direction) / times["milliseconds"] / 1e9
                best.setdefault((case, name), []).append((times["milliseconds"], rank, tile))
        except Exception as error:
            wrong += 1
            row["note"] = one_line(error)
            print(f"WRONG {case} {name} {tile}: {one_line(error)}", flush=True)
            if not machine.dry and not usable(machine):
                print("the GPU answers nothing any more")
                break
        table.add(row)
        done += 1
    pool.shutdown(wait=False, cancel_futures=True)
    print("the whole pass, with one kernel's tile pinned: the default's time, and the best tile's")
    for (case, name), times_ in best.items():
        default = next((ms for ms, rank, _ in times_ if rank == 0), math.nan)
        ms, rank, tile = min(times_, key=lambda each: each[0])
        print(
            f"{case!s:40} {name:13} default {default:8.3f} ms, best {ms:8.3f} ms ({default / ms:.2f}x): rank {rank:3}, {tile}; {len(times_)} timed"
        )
    print(f"SUMMARY: {done} of {len(work)} tiles timed, {wrong} wrong")
    return int(wrong > 0)
