"""`--simulator`: the same PTX on a GPU and on the simulator. Not the same bits, since tensor cores add in another way, but nearly."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import numpy

import cuflash
from cuflash import reference
from small_calls.arrays import bits_of, operands_of, run, the_gpu, values_of
from small_calls.cases import Case


def ordered(bits: Any) -> Any:
    """Bits of floating-point numbers as integers whose differences count the numbers in between."""
    sign = 1 << (8 * bits.itemsize - 1)
    whole = bits.astype(numpy.int64)
    return numpy.where(whole & sign, sign - whole, whole)


def compare_with_simulator(cases: list[Case], arguments: argparse.Namespace) -> int:
    """The same PTX on both: not the same bits, since tensor cores add in another way, but nearly."""
    xp = the_gpu(arguments.dry_run)
    if not arguments.dry_run:
        capability = cuflash.plan(*[operands_of(cases[0], values_of(cases[0]), xp)[name] for name in ("query", "key", "value")]).device.arch
        os.environ.setdefault("CUFLASH_SIMULATOR_ARCH", capability)
    wrong, identical, rows, deadline = 0, [], [], time.monotonic() + arguments.seconds
    for done, case in enumerate(cases):
        if time.monotonic() > deadline:
            print(f"out of time after {done} of {len(cases)} cases")
            break
        values = values_of(case)
        ours, theirs = (run(case, operands_of(case, values, library)) for library in (xp, numpy))
        print(case)
        for name in ours:
            ours_bits, theirs_bits = bits_of(ours[name]), bits_of(theirs[name])
            distance = numpy.abs(ordered(ours_bits) - ordered(theirs_bits))
            got, want = reference.to_float64(ours[name]), reference.to_float64(theirs[name])
            finite = numpy.isfinite(want)
            error = float(numpy.linalg.norm((got - want)[finite]) / max(float(numpy.linalg.norm(want[finite])), 1e-300))
            limit = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-5}["float32" if name == "lse" else case.sample.dtype]
            bad = not error < limit or bool((numpy.isfinite(got) != finite).any())
            share, wrong = float((distance == 0).mean()), wrong + bad
            identical.append(share)
            rows.append(
                {"case": str(case), "result": name, "identical": share, "relative_difference": error, "most_ulps": int(distance.max())}
            )
            print(
                f"  {'WRONG' if bad else 'ok':5} {name:10}  the same bits {share:7.2%}, units in the last place: 99 % within "
                f"{int(numpy.quantile(distance, 0.99))}, most {int(distance.max())}; relative difference {error:.1e}"
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"SUMMARY: {wrong} of {len(identical)} results differ by more than rounding; the same bits: {numpy.mean(identical or [0]):.2%}")
    return int(wrong > 0)
