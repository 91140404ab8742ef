"""`cuflash.simulator.check`: what it runs, what it compares, what it catches, and what it says then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from simulated import PRELUDE, compile_cuda, pack

import cuflash
from cuflash.errors import DTypeError, OptionError, SimulatorError
from cuflash.simulator import CheckReport, Module, Options, check, current_options

REVERSE = """extern "C" __global__ void reverse(const float* in, float* out) {
    __shared__ float s[128];
    s[threadIdx.x] = in[threadIdx.x];
    %s
    out[threadIdx.x] = s[127 - threadIdx.x];
}"""

# Every warp adds a number of its own magnitude: the float32 sum depends on the order.
SUM = """extern "C" __global__ void sum(float* out) {
    if (threadIdx.x % 32 == 0) atomicAdd(out, threadIdx.x == 0 ? 1.0f : 3e-8f * threadIdx.x);
}"""


def launcher(source: str, *arguments: Any, block: int = 128, options: Options | None = None) -> Callable[[], None]:
    """A call that launches one block of a kernel with the current options."""
    module = Module(compile_cuda(source), sources={"test.cu": PRELUDE + source})
    buffers = [(a.ctypes.data, a.nbytes, f"array {i}") for i, a in enumerate(arguments) if isinstance(a, np.ndarray)]

    def launch() -> None:
        module.launch((1, 1, 1), (block, 1, 1), 0, pack(arguments), buffers, options)

    return launch


def caught(call: Callable[[], Any], **options: Any) -> SimulatorError:
    with pytest.raises(SimulatorError) as error:
        check(call, **options)
    return error.value


def test_runs_every_schedule_and_says_what_it_compared() -> None:
    inputs, out = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    launch, seen = launcher(REVERSE % "__syncthreads();", inputs, out), []

    def call() -> np.ndarray[Any, Any]:
        seen.append((current_options().schedule, current_options().seed, current_options().checks))
        launch()
        return out

    report = check(call, seeds=(3, 5))
    assert seen == [("early", 0, True), ("late", 0, True), ("random", 3, True), ("random", 5, True)]
    assert report == CheckReport((("early", 0), ("late", 0), ("random", 3), ("random", 5)), ("reverse",), ("result: float32 (128,)",))
    assert str(report) == "4 runs (1 early, 1 late, 2 random) of reverse: no check fired; the same bits in result: float32 (128,)"
    assert (out == inputs[::-1]).all()
    assert current_options() == Options()


def test_a_race_is_caught_and_can_be_repeated() -> None:
    call = launcher(REVERSE % "", np.ones(128, np.float32), np.zeros(128, np.float32))
    error = caught(call)
    assert error.check == "uninitialized"  # the first warp reads what the last has not written yet
    for seed in range(20):
        error = caught(call, seeds=[seed], schedules=["random"])
        if error.check == "race":
            break
    assert error.check == "race"
    assert str(error).startswith(f"schedule 'random', seed {seed}: [race] ")
    assert f'with cuflash.simulator.configure(schedule="random", seed={seed}, checks=True, threads=1): call()' in str(error)
    with cuflash.simulator.configure(schedule="random", seed=seed), pytest.raises(SimulatorError) as again:
        call()
    assert str(again.value) in str(error)


def test_a_missing_barrier_gives_other_results_without_checks() -> None:
    inputs, out = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    error = caught(launcher(REVERSE % "", inputs, out), outputs=out, checks=False)
    assert error.check == "nondeterministic"
    assert "[nondeterministic] outputs: " in str(error)
    assert "elements are not the same bits as under schedule 'early', seed 0" in str(error)
    assert "outputs[0] = " in str(error)


def test_float_atomics_depend_on_the_order() -> None:
    out = np.zeros(1, np.float32)
    call = launcher(SUM, out, block=1024)
    error = caught(call, outputs=out)
    assert error.check == "nondeterministic"
    assert "outputs: 1 of 1 elements" in str(error)
    report = check(call, outputs=out, deterministic=False)
    assert report.compared == ()
    assert "no results compared" in str(report)


def test_outputs_start_every_run_as_they_were() -> None:
    source = 'extern "C" __global__ void increment(int* out) { out[threadIdx.x] += 1; }'
    memory = np.arange(20, dtype=np.int32)
    view = memory[16::-2]  # reversed, with gaps
    check(launcher(source, memory, block=20), outputs={"memory": memory}, seeds=range(3))
    assert (memory == np.arange(20) + 1).all()
    report = check(launcher(source, memory, block=1), outputs=[view], seeds=range(3))
    assert report.compared == ("outputs[0]: int32 (9,)",)
    assert memory[0] == 2
    assert (memory[1:] == np.arange(2, 21)).all()


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Record:
    values: Any
    nothing: None = None


def test_results_in_structures() -> None:
    launch = launcher('extern "C" __global__ void nothing() {}')
    half = np.ones((2, 3), np.float16)

    def call() -> dict[str, Any]:
        launch()
        bits = cuflash.bfloat16(np.zeros(4, np.uint16))
        return {"pair": Pair(half, [bits, np.float64(2.0)]), "record": Record(np.ones(5, ml_dtypes.bfloat16)), "none": None}

    assert check(call, seeds=[0]).compared == (
        "result['pair'].left: float16 (2, 3)",
        "result['pair'].right[0]: bfloat16 (4,)",
        "result['pair'].right[1]: float64 ()",
        "result['record'].values: bfloat16 (5,)",
    )


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([np.float32(1), np.float32(1)], ""),
        ([np.float32(0), np.float32(-0.0)], "result[] = -0.0 (0x80000000), was 0.0 (0x00000000)"),
        ([np.zeros(2), np.zeros(3)], "result is float64 (3,), but was float64 (2,)"),
        ([np.zeros(2), (np.zeros(2),)], "the call returned result[0], but result"),
        ([np.zeros(2), None], "the call returned nothing, but result"),
        ([np.ones(2, ml_dtypes.bfloat16), np.zeros(2, ml_dtypes.bfloat16)], "result[1] = 0 (0x0000), was 1 (0x3f80)"),
    ],
)
def test_what_counts_as_a_difference(results: list[Any], message: str) -> None:
    launch, left = launcher('extern "C" __global__ void nothing() {}'), list(results)

    def call() -> Any:
        launch()
        return left.pop(0)

    if not message:
        check(call, schedules=["early", "late"])
    else:
        assert message in str(caught(call, schedules=["early", "late"]))


def test_a_call_that_cannot_be_checked() -> None:
    nothing = 'extern "C" __global__ void nothing() {}'
    with pytest.raises(OptionError, match="launched no kernel on the simulator"):
        check(lambda: np.zeros(1))
    with pytest.raises(OptionError, match="launches nothing with options of its own"):
        check(launcher(nothing, options=Options(schedule="late")))
    with pytest.raises(OptionError, match="'later'"):
        check(launcher(nothing), schedules=["later"])
    with pytest.raises(OptionError, match="at least one run"):
        check(launcher(nothing), schedules=["random"], seeds=())
    with pytest.raises(OptionError, match=r"seeds: got 5; expected ints.* seeds=range\(5\) makes five runs"):
        check(launcher(nothing), seeds=5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"seeds: got \['5'\]"):
        check(launcher(nothing), seeds=["5"])  # type: ignore[list-item]
    with pytest.raises(OptionError, match=r"schedules: got 'late'.*\['late'\]"):
        check(launcher(nothing), schedules="late")
    constant = np.zeros(1)
    constant.flags.writeable = False
    with pytest.raises(DTypeError, match="read-only"):
        check(launcher(nothing), outputs=constant)
    with pytest.raises(DTypeError, match="result"):
        check(lambda: (launcher(nothing)(), "text")[1])


def test_attention_into_a_given_array() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 40, 1, 16)).astype(np.float16) for _ in range(3))
    out = np.empty_like(query)
    report = check(lambda: cuflash.scaled_dot_product_attention(query, key, value, out=out, return_lse=True), seeds=range(3), outputs=out)
    assert report.kernels == ("forward_mma",)
    assert [line.split(":")[0] for line in report.compared] == ["result[0]", "result[1]", "outputs"]
