"""`--streams`: whether calls run where and when they should, on streams, in CUDA graphs, in threads and on a second GPU."""

from __future__ import annotations

import argparse
import threading
import traceback
from collections.abc import Callable
from typing import Any

import cuflash
from small_calls.arrays import NAMES, bits_of, operands_of, run, the_gpu, values_of
from small_calls.cases import CAUSAL, Case


class Skipped(Exception):
    """A check that this machine cannot make; the message says why."""


def streams(arguments: argparse.Namespace) -> int:
    """Whether calls run where and when they should."""
    xp = the_gpu(arguments.dry_run)
    small = arguments.dry_run or arguments.small
    case = Case.of("bfloat16", 64, 70, 70, 1, 2, **CAUSAL) if small else Case.of("bfloat16", 128, 1111, 1111, 2, 4, **CAUSAL)
    values = values_of(case)
    want = {name: bits_of(array) for name, array in run(case, operands_of(case, values, xp)).items()}

    def same(results: dict[str, Any]) -> None:
        for name in NAMES:
            different = int((bits_of(results[name]) != want[name]).sum())
            assert different == 0, f"{name}: {different} of {want[name].size} elements differ from those of the default stream"

    def in_threads() -> None:
        failures: list[str] = []

        def one() -> None:
            try:
                same(run(case, operands_of(case, values, xp)))
            except Exception as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]

    def on_another_stream() -> None:
        operands = operands_of(case, values, xp)
        late, busy = xp.zeros_like(operands["query"].bits), xp.ones(1 << (16 if small else 26), "float32")
        xp.cuda.Device().synchronize()
        stream = xp.cuda.Stream(non_blocking=True)
        with stream:
            for _ in range(30):  # keeps the stream busy, so that a call on another one would read zeros
                xp.sin(busy, out=busy)
            late[...] = operands["query"].bits
            results = run(case, {**operands, "query": cuflash.bfloat16(late)})
        stream.synchronize()
        same(results)

    def capture(library: str) -> None:
        """Forward and backward in one graph; replayed on other values in the same memory."""
        operands = operands_of(case, {name: 0.5 * array for name, array in values.items()}, xp)
        final = operands_of(case, values, xp)
        if library == "torch":
            import torch

            operands, final = (
                {name: None if x is None else torch.from_dlpack(x) for name, x in each.items()} for each in (operands, final)
            )
            run(case, operands)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(graph):
                results = run(case, operands)
            for name, x in final.items():
                if x is not None:
                    operands[name].copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            same({name: xp.from_dlpack(x.view(torch.int16) if x.dtype == torch.bfloat16 else x) for name, x in results.items()})
            return
        stream = xp.cuda.Stream(non_blocking=True)
        xp.cuda.Device().synchronize()
        with stream:
            warm = [run(case, operands) for _ in range(2)]  # memory that the pool can give again during capture
            stream.synchronize()
            del warm
            stream.begin_capture()
            try:
                results = run(case, operands)
            finally:
                graph = stream.end_capture()
            for name, x in final.items():
                if x is not None:
                    operands[name].bits[...] = x.bits
            graph.launch(stream)
        stream.synchronize()
        same(results)

    def torch_stream() -> None:
        import torch

        operands = {name: None if x is None else torch.from_dlpack(x) for name, x in operands_of(case, values, xp).items()}
        late, busy = torch.zeros_like(operands["query"]), torch.ones(1 << 26, device="cuda")
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(30):
                busy.sin_()
            late.copy_(operands["query"])
            results = run(case, {**operands, "query": late})
        stream.synchronize()
        same({name: xp.from_dlpack(x.view(torch.int16) if x.dtype == torch.bfloat16 else x) for name, x in results.items()})

    def second_device() -> None:
        if xp.cuda.runtime.getDeviceCount() < 2:
            raise Skipped("one GPU only")
        with xp.cuda.Device(1):
            operands = operands_of(case, values, xp)
        results = run(case, operands)  # device 0 is current
        assert xp.cuda.runtime.getDevice() == 0, "the current device changed"
        with xp.cuda.Device(1):
            same(results)

    checks: dict[str, Callable[[], None]] = {"four threads": in_threads}
    if not arguments.dry_run:
        checks |= {
            "another stream, CuPy": on_another_stream,
            "another stream, torch": torch_stream,
            "CUDA graph, CuPy": lambda: capture("cupy"),
            "CUDA graph, torch": lambda: capture("torch"),
            "second GPU": second_device,
        }
    wrong = 0
    for name, one in checks.items():
        try:
            one()
            verdict = "ok"
        except (ImportError, Skipped) as error:
            verdict = f"skipped: {error}"
        except Exception as error:
            wrong += 1
            verdict = f"WRONG {type(error).__name__}: {error}\n{traceback.format_exc()}"
        print(f"{name:24} {verdict}", flush=True)
    print(f"SUMMARY: {wrong} of {len(checks)} checks wrong")
    return int(wrong > 0)
