"""Damaged PTX is answered with a SimulatorError, or runs: no other exception, no hang, no crash."""

from __future__ import annotations

import contextlib
import random
import re
import time

import numpy as np
import pytest
import test_hopper_pipeline as hopper
from forging import SMALL
from simulated import compile_cuda, pack

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options

NUMBERS = ("0", "-1", "1", "3", "7", "65536", "4294967296", "99999999999999999999", "08", "0x", "1.5", "0f3F80", "9" * 5000)
SECONDS = 6.0


def mutated(ptx: str, random_: random.Random) -> str:
    """One or two changes: of a number, a word, a line, or a character."""
    lines = ptx.split("\n")
    for _ in range(random_.choice((1, 1, 2))):
        at = random_.randrange(len(lines))
        kind = random_.randrange(6)
        if kind == 0 and (found := list(re.finditer(r"\d+", lines[at]))):
            match = random_.choice(found)
            lines[at] = lines[at][: match.start()] + random_.choice(NUMBERS) + lines[at][match.end() :]
        elif kind == 1 and (found := list(re.finditer(r"[\w.]+", lines[at]))):
            match, words = random_.choice(found), re.findall(r"[\w.%$]+", random_.choice(lines)) or [""]
            lines[at] = lines[at][: match.start()] + random_.choice(words) + lines[at][match.end() :]
        elif kind == 2:
            del lines[at]
        elif kind == 3:
            lines.insert(at, random_.choice(lines))
        elif kind == 4 and lines[at]:
            place = random_.randrange(len(lines[at]))
            lines[at] = lines[at][:place] + random_.choice(";{}[](),.:%@!<>\0é") + lines[at][place + 1 :]
        else:
            lines = lines[:at] if random_.random() < 0.1 else lines
            if not lines:
                return ""
    return "\n".join(lines)


def run_small(module: Module, options: Options) -> None:
    out = np.zeros(64, np.int32)
    module.launch((2, 1, 1), (64, 1, 1), 0, pack([out, 3]), [(out.ctypes.data, out.nbytes, "out")], options)


@pytest.mark.parametrize("kernel", ["small", "hopper"])
def test_mutated_ptx(kernel: str) -> None:
    ptx = compile_cuda(SMALL) if kernel == "small" else hopper.ptx()
    run = run_small if kernel == "small" else hopper.run
    started, number, refused = time.monotonic(), 0, 0
    while number < 400 and time.monotonic() - started < SECONDS:
        text = mutated(ptx, random.Random(number))
        begun = time.monotonic()
        try:
            run(Module(text), Options(1, max_instructions=20_000))
        except SimulatorError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutant {number} of {kernel}") from error
        assert time.monotonic() - begun < 10, f"mutant {number} of {kernel}"
        number += 1
    assert 0 < refused < number


@pytest.mark.parametrize(
    "ptx",
    [
        None, 5, b"\xff\xfe", b"\x7fELF", "", ".entry k() {", ".entry k() { .shared .align 0 .b8 x[4]; ret; }", ".entry k() { .local .b8 x[99999999999999]; ret; }",
        ".entry k() { .shared .b8 x[99999999999]; ret; }", ".global .b8 x[99999999999999];\n.entry k() { ret; }", ".entry k(.param .b8 p[9999999999]) { ret; }",
        ".entry k(.param .align 0 .u32 p) { ret; }", ".entry k() .reqnctapercluster 0, 0, 0 { ret; }", ".entry k() { .reg .b32 %r<3>; past.the.end; ret; }",
        ".entry k() { .reg .b32 %r<3>; wgmma.hazard; ret; }", ".entry k() { " + "{" * 5000 + " ret; }", ".target sm_" + "9" * 6000 + "\n.entry k() { ret; }",
        ".entry k() .maxnreg 99999999 { setmaxnreg.inc.sync.aligned.u32 24; ret; }",
    ],
    ids=lambda ptx: str(ptx)[:40],
)  # fmt: skip
def test_ptx_with_odd_numbers(ptx: object) -> None:
    """Most are refused; what is left runs, and ends."""
    with contextlib.suppress(SimulatorError):
        module = Module(ptx)  # type: ignore[arg-type]
        module.launch((1, 1, 1), (32, 1, 1), 0, bytes(module.param_bytes), [])


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": (2**32, 1, 1)}, {"grid": (2**31, 1, 1)}, {"grid": (1, 65536, 1)}, {"grid": 5}, {"grid": (10**5000, 1, 1)}, {"block": (0, 1, 1)}, {"block": "abc"},
        {"cluster": (3, 1, 1)}, {"shared_bytes": 1.5}, {"shared_bytes": -1}, {"params": None}, {"params": "12345678"}, {"buffers": 5}, {"buffers": [(1, 2)]},
        {"buffers": [(-1, 2, "x")]}, {"buffers": [(2**64, 2, "x")]}, {"buffers": [(1, -2, "x")]}, {"buffers": [(8, 2, "x", np.zeros(2))]}, {"options": 5},
        {"buffers": [(8, 2, "x", np.zeros(3, np.uint8))]},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_launch_with_odd_arguments(changes: dict[str, object]) -> None:
    module = Module(".entry k(.param .u64 p) { ret; }")
    call: dict[str, object] = {"grid": (1, 1, 1), "block": (32, 1, 1), "shared_bytes": 0, "params": bytes(8), "buffers": []}
    with pytest.raises(SimulatorError) as caught:
        module.launch(**{**call, **changes})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 2000
