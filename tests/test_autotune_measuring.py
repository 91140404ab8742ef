"""What the autotuner makes of a candidate's results: rows compared by their own size, nothing left of earlier candidates, counters cleared, arrays without cuRAND."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from cuflash import reference
from cuflash.cli.samples import Sample
from cuflash.errors import SetupError
from cuflash.hardware import device
from cuflash.planning.planner import make_plan
from cuflash.runtime import launch
from cuflash.tuned import fingerprint, store
from cuflash.tuned.table import Entry, Timing
from cuflash.tuner import described_calls, measuring
from cuflash.tuner.comparing import ALLOWED, excess
from cuflash.tuner.measuring import Bench, Pass
from cuflash.tuner.tasks import problem_of, tasks_of

ON = device.of_arch("sm_80")
SMALL = Sample(batch=1, seqlen_q=40, seqlen_kv=40, num_heads_q=1, num_heads_kv=1, head_dim=16)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")


# --- Comparing ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal() -> list[Any]:
    """The output and the gradients of a causal call of 1024 positions, in float32."""
    rng = numpy.random.default_rng(1)
    query, key, value, grad_out = (rng.standard_normal((1, 1024, 1, 16)) for _ in range(4))
    (out, *_) = reference.attention(query, key, value, is_causal=True)
    gradients = reference.attention_backward(grad_out, query, key, value, is_causal=True)[:3]
    return [numpy.float32(x) for x in (out, *gradients)]


@pytest.mark.parametrize("index", range(4), ids=["out", "grad_query", "grad_key", "grad_value"])
@pytest.mark.parametrize("dtype", ALLOWED)
def test_lost_late_rows_of_a_causal_call_are_seen(causal: list[Any], index: int, dtype: str) -> None:
    want = causal[index]
    lost = want.copy()
    lost[:, -16:] = 0.0
    assert excess(lost, want, ALLOWED[dtype]) > 1.0
    if index == 3:
        assert numpy.abs(lost - want).max() < 2.0**-5 * numpy.abs(want).max(), "which a bound by the whole array's largest value lets pass"
    mantissa = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "tf32": 2.0**-11}[dtype]
    rounded = want * numpy.float32(1.0 + mantissa)
    assert excess(rounded, want, ALLOWED[dtype]) <= 1.0


def test_what_is_the_same_and_what_is_not() -> None:
    want = numpy.array([[1.0, -numpy.inf, 3.0], [0.0, 0.0, 0.0]], numpy.float32)
    assert excess(want.copy(), want, 2.0**-8) == 0.0, "equal infinities"
    for row, column, value in ((0, 1, numpy.inf), (0, 1, 1e30), (0, 0, numpy.nan), (0, 0, 1.1), (1, 2, 1.0)):
        got = want.copy()
        got[row, column] = value
        assert not excess(got, want, 2.0**-8) <= 1.0, value
    assert excess(numpy.zeros((0, 4)), numpy.zeros((0, 4)), 1.0) == 0.0


# --- Running ------------------------------------------------------------------------------------------------------------------------------


def test_a_candidate_that_writes_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if its memory is that of the last candidate, whose results were right."""
    call = described_calls.of_sample(SMALL)
    (task,) = tasks_of(call, problem_of(SMALL, backward=False), ON, passes=("forward",), effort="quick")
    bench = Bench(call, False, ON)
    assert bench.wrong_default == ""
    right = bench._wanted[0].astype(numpy.float16)
    framework = type(Pass(bench._operands, bench._options, False, ON)._prepared.framework)
    empty = framework.empty
    monkeypatch.setattr(launch._SimulatorExecutable, "launch", lambda *_: None)

    def used_before(self: Any, shape: Any, dtype: Any, like: Any) -> Any:
        made = empty(self, shape, dtype, like)
        made[...] = right if made.shape == right.shape else 0
        return made

    monkeypatch.setattr(framework, "empty", used_before)
    assert bench.evaluate(task, task.tiles[0], None).note.startswith("wrong: nan times as far from the default tile's result")


def test_counters_are_cleared_before_every_launch_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that stay take tiles of queries from a counter: with what the last launch left there, they would find none."""
    on = device.of_arch("sm_90")
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setattr(launch, "executable", lambda kernel, on: SimpleNamespace(launch=lambda *_: None))
    sample = Sample(batch=1, seqlen_q=512, seqlen_kv=512, num_heads_q=80, num_heads_kv=80, head_dim=64, is_causal=True)
    call = described_calls.of_sample(sample)
    arrays = {name: numpy.zeros(of.shape, of.dtype) for name, of in call.operands.items()}
    monkeypatch.setenv("CUFLASH_FORWARD_WGMMA", "1")
    operands, options = call.operands_and_options(arrays, return_lse=True)
    made = Pass(operands, options, False, on)
    counter = ctypes.c_int32.from_address(made._addresses["next_work"])
    for _ in range(2):
        counter.value = 640  # as a launch leaves it
        made.launch_before("forward_wgmma")
        assert counter.value == 0


def test_arrays_are_made_without_the_gpus_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_DRAWN", 7)
    bench = object.__new__(Bench)
    bench._library = SimpleNamespace(asarray=numpy.asarray)
    for dtype in ("float16", "float32", "bfloat16"):
        made = bench._random(described_calls.Described((5, 3), (1, 0), dtype), 4)
        values = made.to_float32() if dtype == "bfloat16" else made
        assert values.shape == (5, 3)
        assert len(numpy.unique(values)) == 7, "a small block, repeated"
        assert (values[:, 0] != values[:, 1]).any()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SetupError, match="CuPy cannot be imported"):
        Bench(described_calls.of_sample(SMALL), False, device.of_arch("sm_80", "gpu"))


# --- Few queries --------------------------------------------------------------------------------------------------------------------------


def test_the_kernel_for_few_queries_is_timed_with_what_merges_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile decides how many parts there are, so its time is that of both kernels; each candidate has memory for its own parts."""
    sample = Sample(batch=1, seqlen_q=2, seqlen_kv=300, num_heads_q=4, num_heads_kv=2, head_dim=16)
    call = described_calls.of_sample(sample)
    task, other_kernel = tasks_of(call, problem_of(sample, backward=False), ON, passes=("forward",), effort="quick")
    assert other_kernel.kernel.name == "forward"
    assert (task.kernel.name, task.bucket.seqlen_q, task.bucket.grid) == ("forward_split", 4, "few")
    bench = Bench(call, False, ON)
    other = next(tile for tile in task.tiles if tile.tile_kv != task.default.tile_kv)
    candidate = Pass(bench._operands, bench._options._replace(tile={task.kernel.name: other}), False, ON)
    kernels = [kernel.name for kernel in candidate._plan.kernels]
    assert kernels == ["forward_split", "merge_attention"]
    assert candidate._plan.kernels[0].splits != task.kernel.splits
    launched: list[Any] = []
    monkeypatch.setattr(candidate, "_launch", launched.append)
    candidate.launch_before("forward_split")
    assert launched == []
    candidate.launch("forward_split")
    assert launched == list(candidate._prepared.launches)
    monkeypatch.setattr(measuring, "predicted_milliseconds", lambda *of: 1.0)
    assert bench.evaluate(task, other, None).note == ""


# --- Two ways to the same results ---------------------------------------------------------------------------------------------------------


def test_both_ways_to_the_gradients_are_tuned_and_the_faster_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all kernels of both were timed on the same call, their sums decide; the time of one kernel for all gradients has the conversion of its sums in it."""
    sample = replace(SMALL, head_dim=32)
    call, problem = described_calls.of_sample(sample), problem_of(sample, backward=True)
    assert "backward_dq" in [kernel.name for kernel in make_plan(problem, ON, backward=True).kernels]
    tasks = tasks_of(call, problem, ON, passes=("backward",), effort="quick")
    assert [task.kernel.name for task in tasks] == ["backward_dkdv", "backward_dq", "backward_fused"]
    fused = tasks[-1]
    bench = Bench(call, True, ON)
    candidate = Pass(bench._operands, bench._options._replace(tile={"backward_fused": fused.default}), True, ON)
    launched: list[Any] = []
    monkeypatch.setattr(candidate, "_launch", launched.append)
    candidate.launch("backward_fused")
    assert launched == list(candidate._prepared.launches)[1:]

    def chosen(milliseconds: float, *, of_call: str = "the same") -> tuple[str, str]:
        path = tmp_path / f"{milliseconds}{of_call}.json"
        for task in tasks:
            timing = Timing(task.default, *3 * [milliseconds if task is fused else 1.0], 3, None)
            sources, nvrtc = fingerprint.of_source(task.kernel.source), fingerprint.of_compiler()
            where = of_call if task is fused else "the same"
            store.save(path, ON, Entry(task.bucket, where, task.default, (timing,), sources, nvrtc))
        monkeypatch.setenv(store.VARIABLE, str(path))
        plan = make_plan(problem, ON, backward=True)
        return plan.kernels[1].name, plan.choice

    assert chosen(1.5) == ("backward_fused", "backward_fused, timed to take 0.75 of the time of backward_dkdv and backward_dq")
    assert chosen(2.5) == ("backward_dkdv", "backward_dkdv and backward_dq, timed to take 0.80 of the time of backward_fused")
    assert "nothing is predicted of it" in chosen(1.5, of_call="another")[1]
