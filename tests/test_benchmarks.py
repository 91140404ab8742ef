"""The benchmarks without a GPU: what is timed and how it is counted and judged, whole dry runs, and that the sanitizers' cases reach every kernel."""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy
import pytest

import cuflash
from bench import calls, cases, comparison, first_call, libraries, report, torch_libraries
from bench import machine as bench_machine
from bench.calls import Calls, Library, NotSupported, cuflash_calls
from bench.cases import Case
from bench.machine import Machine
from bench.operands import ALLOWED_ERROR, Operands
from bench.timing import Stopwatch, time_call
from cuflash import reference
from cuflash.cli.sample_features import SampleFeatures
from cuflash.cli.samples import Sample, numpy_call
from cuflash.hardware import device
from cuflash.planning.planner import make_plan
from cuflash.problem.features import FeatureSet
from cuflash.tuner import checkout
from small_calls import judge as judging
from small_calls import streams
from small_calls.arrays import cached_call, operands_of, run, values_of
from small_calls.cases import MANY, check_cases, simulator_cases, tiny_cases
from small_calls.judge import judge

pytest.importorskip("cupy")

ROOT = Path(__file__).resolve().parents[1]
DRY = cases.dry_feature_cases()


@pytest.fixture(autouse=True)
def architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")


@pytest.fixture
def machine() -> Machine:
    return Machine(dry=True)


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_results_name_the_commit_or_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit as tables of tiles name it."""
    for found, said in (("0123456789ab+", "0123456789ab+"), ("", f"tree-{bench_machine.tree_hash()}")):
        monkeypatch.setattr(checkout, "commit", lambda found=found: found)
        bench_machine.commit.cache_clear()
        assert bench_machine.commit() == said
    bench_machine.commit.cache_clear()


# --- What is timed ------------------------------------------------------------------------------------------------------------------------


def pairs(case: Case) -> Iterator[tuple[int, int, int]]:
    """(sequence, query, key) that the definitions in docs/features.md make visible, one by one."""
    sample, given = case.sample, case.arguments
    rows, columns = sample.packed_lengths if sample.is_packed else ((sample.seqlen_q,) * sample.batch, (sample.seqlen_kv,) * sample.batch)
    left, right = (-1 if limit is None else limit for limit in sample.features.window or (-1, -1))
    for b, (queries, keys) in enumerate(zip(rows, columns, strict=True)):
        for i, j in itertools.product(range(queries), range(keys)):
            shift = keys - queries if sample.is_packed else 0
            causal = not sample.is_causal or j <= i + shift or ("prefix_lengths" in given and j < given["prefix_lengths"][b])
            near = (left < 0 or j - i - shift >= -left) and (right < 0 or j - i - shift <= right)
            same = "segment_ids_q" not in given or given["segment_ids_q"][b, i] == given["segment_ids_kv"][b, j]
            there = "seqlens_kv" not in given or j < given["seqlens_kv"][b]
            mask = given.get("attn_mask")
            shown = mask is None or mask.dtype != bool or numpy.broadcast_to(mask, (sample.batch, 1, queries, keys))[b, 0, i, j]
            if causal and near and same and there and shown:
                yield b, i, j


@pytest.mark.parametrize("case", [*DRY, *cases.dry_cases()], ids=str)
def test_flop_are_those_of_visible_scores(case: Case) -> None:
    visible, sample = sum(1 for _ in pairs(case)), case.sample
    assert case.visible_scores == visible
    head_dim_v = sample.head_dim_v or sample.head_dim
    assert case.flops("forward") == 2 * visible * sample.num_heads_q * (sample.head_dim + head_dim_v)
    assert case.flops("backward") == 2 * visible * sample.num_heads_q * (3 * sample.head_dim + 2 * head_dim_v)
    total = (
        sum(q * k for q, k in zip(*sample.packed_lengths, strict=True))
        if sample.is_packed
        else sample.batch * sample.seqlen_q * sample.seqlen_kv
    )
    assert case.visible_share == visible / total


def test_plain_cases_have_the_usual_flop() -> None:
    """4 · batch · heads · seqlen² · head_dim; causal half of it, and the diagonal; backward 2.5 times that."""
    full, causal = (Case.plain("bfloat16", 128, is_causal, 4096) for is_causal in (False, True))
    assert full.flops("forward") == 4 * 4 * 16 * 4096**2 * 128
    assert causal.flops("forward") == full.flops("forward") / 2 * (1 + 1 / 4096)
    assert causal.flops("backward") == 2.5 * causal.flops("forward")


def test_visited_tiles_are_told_where_they_are_known() -> None:
    on = device.of_arch("sm_90", "gpu")
    causal = Case.plain("bfloat16", 128, True, 4096)
    assert 0.5 < (causal.visited_share(on) or 0.0) < 0.6
    shares = {case.name: case.visited_share(on) for case in cases.feature_cases() if case.name in ("window", "segments", "varlen")}
    assert shares.pop("window") == pytest.approx(0.24, abs=0.03)
    assert shares == {"segments": None, "varlen": None}


def test_every_feature_has_a_case() -> None:
    made = cases.feature_cases()
    used = {name for case in made for name in vars(case.sample.features.kinds()) if getattr(case.sample.features.kinds(), name)}
    assert used == {field.name for field in fields(FeatureSet)} - {"prefix"}
    assert {case.sample.features.attn_mask for case in made} == {None, "bool", "bfloat16"}
    assert any(case.sample.is_packed for case in made)
    assert any("seqlens_kv" in case.arguments for case in made if case.name == "seqlens_kv")
    assert {(case.sample.head_dim, case.head_dim_v) for case in made} == {
        (128, 128),
        (192, 128),
        (576, 512),
        (512, 512),
        (72, 72),
        (37, 37),
    }
    assert any(case.sample.num_heads_q != case.sample.num_heads_kv > 1 for case in made)
    assert any(case.sample.seqlen_q != case.sample.seqlen_kv for case in made)
    assert {case.sample.dtype for case in made} == {"bfloat16", "float32"}
    assert [case.name for case in made] == [case.name for case in DRY]


# --- Clocks -------------------------------------------------------------------------------------------------------------------------------


class FakeClock:
    """Time that passes only while a call runs."""

    def __init__(self, *durations: float) -> None:
        self.now, self.calls, self.durations = 100.0, 0, itertools.cycle(durations)

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.calls += 1
        self.now += next(self.durations)


def test_times_are_those_of_the_clock(machine: Machine) -> None:
    clock = FakeClock(0.002)
    times = time_call(machine, clock.call, 0.1, clock=clock)
    assert times["milliseconds"] == pytest.approx(2.0)
    assert times["timer"] == "wall"
    assert times["repeats"] == 10  # a fifth of 0.1 s
    assert clock.calls == 11


def test_medians_and_quantiles_of_asynchronous_calls(machine: Machine) -> None:
    """Work that a call only starts is waited for before the clock is read."""
    machine.dry = False
    clock, pending = FakeClock(0.001, 0.001, 0.003, 0.001, 0.001, 0.001), []

    def wait() -> None:
        while pending:
            pending.pop()
            clock.call()

    times = time_call(machine, lambda: pending.append(None), 0.005, wait, clock=clock)
    assert times["milliseconds"] == pytest.approx(1.0)
    assert times["milliseconds_p80"] == pytest.approx(1.4)
    assert times["repeats"] == 5


class FakeEvents:
    """What timing needs of CuPy, on a clock: events that remember when they were recorded."""

    def __init__(self, clock: FakeClock) -> None:
        class Event:
            def record(self, stream: None) -> None:
                self.at = clock()

        self.cuda, self.runtime = self, self
        self.Event, self.Stream, self.null = Event, self, None

    def get_elapsed_time(self, start: Any, end: Any) -> float:
        return float(1000 * (end.at - start.at))

    def deviceSynchronize(self) -> None:
        pass


def test_events_surround_each_call_on_a_gpu(machine: Machine) -> None:
    clock = FakeClock(*[0.5] * 3, 0.001, 0.002, 0.003, 0.004)  # the call that warms up, and two that say how many fit
    machine.dry, machine.cupy = False, FakeEvents(clock)
    times = time_call(machine, clock.call, 2.0)
    assert (times["repeats"], times["timer"]) == (4, "events")
    assert times["milliseconds"] == pytest.approx(2.5)
    assert times["milliseconds_p20"] == pytest.approx(1.6)
    assert clock.calls == 7
    for duration, repeats in ((1.0, 3), (1e-5, 200)):
        clock = FakeClock(duration)
        machine.cupy = FakeEvents(clock)
        assert time_call(machine, clock.call, 0.5)["repeats"] == repeats


def test_a_stopwatch_reads_events_in_pairs(machine: Machine) -> None:
    """The second reading less the first is what lay between; nothing is waited for at the first."""
    clock = FakeClock(0.004, 0.002)
    events = FakeEvents(clock)
    waits: list[float] = []
    events.deviceSynchronize = lambda: waits.append(clock())  # type: ignore[method-assign]
    machine.dry, machine.cupy = False, events
    stopwatch = Stopwatch(machine)
    assert stopwatch.name == "events"
    for seconds in (0.004, 0.002):
        before, count = stopwatch(), len(waits)
        clock.call()
        assert stopwatch() - before == pytest.approx(seconds)
        assert len(waits) == count + 1
    ended: list[str] = []
    stopwatch.wait = lambda: ended.append("waited for")
    assert stopwatch.name == "wall"
    assert stopwatch() < stopwatch()
    assert ended == ["waited for"] * 2, "what a call started on a stream of its own ends before the clock is read"


# --- Judging ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DRY, ids=str)
def test_the_truth_of_one_head_is_that_of_the_reference(case: Case, machine: Machine) -> None:
    """Two independent ways of computing the same, both in float64."""
    operands, sample = Operands(case, machine), case.sample
    values = {name: reference.to_float64(x) for name, x in operands.arrays.items()}
    inputs = [values[name] for name in ("query", "key", "value")]
    options = {name: x for name, x in case.arguments.items() if not name.startswith("max_seqlen")}
    forward, backward = reference.attention, reference.attention_backward
    if sample.is_packed:
        forward, backward = reference.varlen_attention, reference.varlen_attention_backward  # type: ignore[assignment]
    out, _ = forward(*inputs, **options)
    grads = backward(values["grad_out"], *inputs, **options)
    results = {"out": out, "query": grads.query, "key": grads.key, "value": grads.value}
    results |= {} if grads.attn_mask is None or not sample.features.need_attn_mask_grad else {"attn_mask": grads.attn_mask}
    if operands.torch is not None:
        results = {name: operands.torch.as_tensor(x) for name, x in results.items()}
    errors = operands.errors(results)
    assert len(errors) == len(results)
    assert max(errors) < 1e-12


def test_a_wrong_result_is_wrong(machine: Machine) -> None:
    library = Library("other", "other", "1", cuflash_calls)
    half, single = (Case(Sample(dtype=dtype)) for dtype in ("bfloat16", "float32"))
    assert comparison.judge(library, half, [1e-3, 1e-2]) == (1e-2, "")
    assert comparison.judge(library, half, [1e-3, 1e-1])[1] == "wrong"
    assert comparison.judge(library, half, [1e-3, float("nan")])[1] == "wrong"
    assert comparison.judge(library, half, []) == (None, "not checked")
    tf32 = 20 * ALLOWED_ERROR["float32"]
    assert comparison.judge(library, single, [tf32])[1] == "less exact than float32"
    assert comparison.judge(Library("cuflash", "cuflash", "1", cuflash_calls), single, [tf32])[1] == "wrong"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_the_table_says_of_libraries_that_cannot(machine: Machine, tmp_path: Path) -> None:
    def unable(operands: Operands) -> Any:
        raise NotSupported("has no such thing")

    def falling(operands: Operands) -> Any:
        raise RuntimeError("No available\nkernel")

    def wrong(operands: Operands) -> Calls:
        arrays = operands.arrays
        return Calls(lambda: arrays["query"], lambda: [arrays[name] for name in ("query", "key", "value")])

    def other_mask(operands: Operands) -> Calls:
        return replace(wrong(operands), note="not checked: draws another dropout mask")

    others = {"unable": unable, "falling": falling, "wrong": wrong, "random": other_mask, "absent": unable}
    made = [Library(name, name, "1", prepare) for name, prepare in others.items()]
    made[-1] = replace(made[-1], takes=lambda case: False)
    path = tmp_path / "attention.csv"
    assert list(comparison.time_case(cases.dry_cases()[0], made, machine, report.Table(path, report.COLUMNS), 0.001)) == []
    notes = {(row["library"], row["pass"]): (row["note"], bool(row["milliseconds"])) for row in rows_of(path)}
    for direction in comparison.PASSES:
        assert notes.pop(("unable", direction)) == ("not supported: has no such thing", False)
        assert notes.pop(("falling", direction)) == ("not supported: RuntimeError: No available kernel", False)
    for direction in ("forward", "backward"):  # these two have no call that also gives LSE
        assert notes.pop(("wrong", direction)) == ("wrong", False)
        assert notes.pop(("random", direction)) == ("not checked: draws another dropout mask", True)
    assert notes == {}


def test_a_feature_that_a_library_lacks_is_named() -> None:
    sample = Sample(features=SampleFeatures(softcap=3.0, sinks=True))
    with pytest.raises(NotSupported, match=r"^it has no softcap and no sinks$"):
        calls.refuse(Case(sample), "it", "window", "softcap", "sinks", "varlen")
    calls.refuse(Case(Sample(lengths_kv=(3,))), "it", "softcap", "varlen")
    with pytest.raises(NotSupported, match="no key lengths"):
        calls.refuse(Case(Sample(lengths_kv=(3,))), "it", "seqlens_kv")
    with pytest.raises(NotSupported, match="no packed sequences"):
        calls.refuse(Case(Sample(lengths_q=(3,))), "it", "varlen")


@pytest.mark.parametrize("case", DRY, ids=str)
def test_torch_computes_the_same(case: Case, machine: Machine) -> None:
    """Where it can; with a mask of the size of the scores for what it has no argument for."""
    pytest.importorskip("torch")
    operands = Operands(case, machine)
    if case.name in ("softcap", "sinks", "varlen"):
        with pytest.raises(NotSupported):
            torch_libraries.sdpa_calls(operands, "MATH")
        return
    found = torch_libraries.sdpa_calls(operands, "MATH")
    for direction in ("forward", "backward"):
        error, note = comparison.checked(Library("torch", "math", "", cuflash_calls), operands, found, direction)
        if case.name == "dropout":
            assert (error, note) == (None, "not checked: draws another dropout mask")
        else:
            assert error is not None
            assert error < ALLOWED_ERROR["bfloat16"]
            assert note == "" or note.startswith("by a mask of ")


@pytest.mark.parametrize(
    "name", ["", "window", "key_padding", "segments", "seqlens_kv", "gqa", "cross", "head_dim_192_128", "odd_head_dim"]
)
def test_the_written_out_formula_computes_the_same(name: str, machine: Machine) -> None:
    """What a user of CuPy writes, here on NumPy's arrays: against the truth of one head."""
    of_any_type = [*cases.dry_cases(), *DRY]
    case = next(case for case in of_any_type if case.name == name)
    operands = Operands(Case(replace(case.sample, dtype="float32"), name), machine)
    if operands.torch is not None:
        pytest.skip("is written for arrays; the operands are tensors")
    library = Library("numpy", "naive", "", cuflash_calls)
    found = libraries.naive_calls(operands, numpy)
    for direction in ("forward", "backward", "both"):
        error, note = comparison.checked(library, operands, found, direction)
        assert note == ""
        assert error is not None
        assert error < ALLOWED_ERROR["float32"]
    assert found.of("forward_lse") is None


def test_the_written_out_formula_says_what_it_lacks(machine: Machine) -> None:
    reasons = {}
    for case in DRY:
        try:
            libraries.naive_calls(Operands(Case(replace(case.sample, dtype="float32"), case.name), machine), numpy)
        except NotSupported as error:
            reasons[case.name] = str(error)
    assert reasons["softcap"] == "the written-out formula has no softcap"
    assert reasons["varlen"] == "the written-out formula has no packed sequences"
    assert reasons["bias"] == "additive masks are not written out here"
    with pytest.raises(NotSupported, match="numpy has no bfloat16"):
        libraries.naive_calls(Operands(DRY[0], machine), numpy)


def test_peers_that_are_not_here_are_named(machine: Machine) -> None:
    here = {library.label for library in libraries.libraries(machine, list(libraries.NEEDED))}
    missing = libraries.absent(machine)
    assert here | set(missing) == set(libraries.NEEDED)
    assert not here & set(missing)
    assert missing["triton"] == "needs triton with torch on a GPU"


# --- Whole runs ---------------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_of_features_and_its_tables(tmp_path: Path) -> None:
    arguments = ("--dry-run", "--libraries", "cuflash,formula,math", "--output", str(tmp_path))
    plain = script("bench_attention.py", *arguments, "--quick")
    assert "SUMMARY: 2 of 2 cases timed, 0 wrong" in plain.stdout, plain.stderr
    done = script("bench_attention.py", *arguments, "--features", "--cases", "window|bias|varlen|576")
    assert done.returncode == 0, done.stderr
    assert "SUMMARY: 4 of 4 cases timed, 0 wrong" in done.stdout
    assert "for each visible score, whatever a library really computes" in done.stdout
    rows = rows_of(tmp_path / "attention.csv")
    assert tuple(rows[0]) == report.COLUMNS
    own = [row for row in rows if row["library"] == "cuflash"]
    assert {(row["case"], row["pass"]) for row in own} >= {
        ("varlen", "forward"),
        ("bias", "backward"),
        ("head_dim_576_512", "backward"),
        ("", "forward"),
    }
    assert all(float(row["milliseconds"]) > 0 and 0 < float(row["relative_error"]) < 2e-2 and row["note"] == "" for row in own)
    assert {row["features"] for row in own if row["case"] == "bias"} == {"attn_mask bfloat16 (1, 2, 24, 24), with its gradient"}
    (reason,) = {row["note"] for row in rows if row["case"] == "varlen" and row["library"] != "cuflash"}
    assert reason.startswith("not supported: ")
    tables = script("report.py", str(tmp_path)).stdout
    assert f"varlen: {reason}" in tables
    assert "| window | window of keys at distances -11 to 0 | 64 | yes | 22 % |" in tables
    assert tables.count("### bfloat16, TFLOP/s forward / backward") == 1
    assert "| 576 |" not in tables, "cases of features are not among the plain ones"
    worst = script("bench_attention.py", "--worst", str(tmp_path / "attention.csv"))
    assert worst.stdout.split()[3] in ("causal", "full")
    assert worst.stdout.split()[2] in ("48", "32"), "a plain case, which --one can run"


def test_pytest_measures_the_same(tmp_path: Path) -> None:
    """Each pass of each library is a benchmark with the columns of the table; what runs on the simulator says that it was not measured."""
    written = tmp_path / "attention.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-q", "benchmarks/bench_attention.py", "--benchmark-enable"]
    chosen = "(s32 and float32 and (cuflash or naive or jax)) or (host and LSE)"
    alone = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }  # no worker of pytest-xdist, which measures nothing
    done = subprocess.run(
        [*command, f"--benchmark-json={written}", "-k", chosen], capture_output=True, text=True, check=False, cwd=ROOT, env=alone
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(written.read_text())["benchmarks"]
    rows = {(row["library"], row["pass"]): row for row in (each["extra_info"] for each in found) if "pass" in row}
    assert {direction for library, direction in rows if library == "cuflash"} == {"forward", "forward_lse", "backward", "both"}
    for (library, direction), row in rows.items():
        assert set(row) - set(report.COLUMNS) == {"measured", "gb_per_s"}
        assert row["measured"] is False
        assert row["gpu"] == "simulator"
        assert row["tflops"] == pytest.approx(2 * 32 * 32 * 64 * {"backward": 5, "both": 7}.get(direction, 2) / row["milliseconds"] / 1e9)
        assert row["relative_error"] < ALLOWED_ERROR["float32"]
        assert library in ("cuflash", "numpy")
    moved = 4 * 4 * 32 * 64  # query, key, value and out
    assert rows["cuflash", "forward"]["gb_per_s"] == pytest.approx(moved / rows["cuflash", "forward"]["milliseconds"] / 1e6)
    if "numpy" in {library for library, _ in rows}:
        assert rows["cuflash", "forward"]["peak_memory_bytes"] >= 4 * 32 * 64
        assert "jax is not here: needs jax" in done.stdout
    assert all("simulator, not measured" in each["group"] for each in found if "pass" in each["extra_info"])
    (host,) = (each["extra_info"] for each in found if "call" in each["extra_info"] and each["extra_info"]["arrays"] == "numpy")
    assert (host["call"], host["measured"]) == ("cuflash forward with LSE", False)


def test_the_first_call_compiles_once(tmp_path: Path, machine: Machine) -> None:
    """With nothing compiled a new process compiles; the next one finds it."""
    folder = first_call.empty_cache(tmp_path / "cache", machine)
    cold, warm = (first_call.first_call(folder, machine) for _ in range(2))
    assert cold["kernels_compiled"] > 0 == warm["kernels_compiled"]
    assert all(found["call_seconds"] > 0 < found["import_seconds"] for found in (cold, warm))


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(("--host",), marks=pytest.mark.exhaustive),  # these two: tests/test_validate_gpu.py
        pytest.param(("--facts",), marks=pytest.mark.exhaustive),
        ("--compile",),
        ("--one", "float16", "64", "32", "full", "backward"),
    ],
    ids=lambda mode: mode[0],
)
def test_dry_runs_of_the_other_modes(mode: tuple[str, ...], tmp_path: Path) -> None:
    done = script("bench_attention.py", *mode, "--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "SUMMARY" in done.stdout or mode[0] == "--one"


def test_steps_of_generation_are_timed(tmp_path: Path) -> None:
    done = script("bench_attention.py", "--cache", "--dry-run", "--output", str(tmp_path))
    assert "SUMMARY: 2 of 2 steps timed on the simulator: times mean nothing, 0 failed" in done.stdout, done.stdout + done.stderr
    rows = rows_of(tmp_path / "cache.csv")
    assert [(row["kv_dtype"], row["page_size"], row["gpu"], row["timer"]) for row in rows] == [
        ("bfloat16", "16", "simulator", "wall"),
        ("float8_e4m3fn", "0", "simulator", "wall"),
    ]
    assert all(float(row["relative_error"]) < 1e-2 for row in rows)


def test_tiles_are_swept(tmp_path: Path) -> None:
    done = script("bench_attention.py", "--tiles", "--dry-run", "--seconds", "300", "--output", str(tmp_path))
    assert "SUMMARY: 12 of 12 tiles timed, 0 wrong" in done.stdout, done.stderr
    assert {row["kernel"] for row in rows_of(tmp_path / "tiles.csv")} == {"forward", "backward_fused", "backward_dkdv", "backward_dq"}


def test_the_script_of_all_of_it_names_its_steps() -> None:
    listed = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "validate_gpu.sh"), "--list"], capture_output=True, text=True, check=True
    ).stdout
    steps = [line.split()[0] for line in listed.splitlines() if line.strip()]
    text = (ROOT / "benchmarks" / "validate_gpu.sh").read_text()
    assert "features" in steps
    assert all(f"step_{step}()" in text for step in steps)


# --- The sanitizers' cases ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [tiny_cases, check_cases])
def test_every_kernel_is_among_the_sanitizers_cases(listed: Any) -> None:
    found = set()
    for case in listed():
        problem = Case(case.sample).problem
        for backward in (False, True):
            tile = case.tile(90, backward=backward)
            found |= {kernel.source for kernel in make_plan(problem, device.of_arch("sm_90"), backward=backward, tile=tile).kernels}
        if case.sample.features.dropout and not case.sample.is_packed:
            found.add("dropout_mask.cu")  # which `small_calls.arrays.run` calls besides
        if case.has_tangents:
            found.add("forward_jvp_mma.cu")
        if case.cached:
            found |= {kernel.source for kernel in cuflash.kvcache_plan(**cached_call(case, numpy_call(case.sample)[0])).kernels}
        if case.sample.features.sinks:
            found |= {"merge_attention.cu", "merge_attention_backward.cu", "merge_table.cu"}
    assert found == {path.name for path in (ROOT / "kernels").glob("*.cu")}


@pytest.mark.parametrize("listed", [tiny_cases, check_cases, simulator_cases])
def test_every_feature_is_among_the_sanitizers_cases(listed: Any) -> None:
    kinds = [case.sample.features.kinds() for case in listed()]
    assert {field.name for field in fields(FeatureSet) if any(getattr(kind, field.name) for kind in kinds)} == {
        field.name for field in fields(FeatureSet)
    }
    assert any(case.sample.is_packed for case in listed())
    assert max(case.sample.head_dim for case in listed()) == 576


@functools.cache
def a_right_case() -> tuple[Any, Any, dict[str, Any]]:
    """A case with many features, its inputs, and results that the judge finds right."""
    case = next(case for case in simulator_cases() if case.sample.features == MANY)
    values = values_of(case)
    results = run(case, operands_of(case, values, numpy))
    assert judge(case, values, results)[1] == []
    return case, values, results


@pytest.mark.parametrize(
    "result", ["out", "lse", "grad_query", "grad_key", "grad_value", "grad_sinks", "dropout_mask", "merged_out", "merged_lse", "grad_part"]
)
def test_the_judge_sees_one_wrong_element(result: str) -> None:
    case, values, results = a_right_case()
    broken = {name: reference.to_float64(x) for name, x in results.items()}
    last = (-1,) * broken[result].ndim
    broken[result][last] = 1.0 - broken[result][last] if result == "dropout_mask" else broken[result][last] + 0.5
    (complaint,) = judge(case, values, broken)[1]
    assert complaint.startswith(f"{result}: ")


def test_results_that_are_kept_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be too much is left out; what is kept is whole."""
    monkeypatch.setattr(judging, "KEPT_BYTES", 5000)
    noise = numpy.random.default_rng(1).integers(0, 65536, (4, 1000), numpy.uint16)
    for number, bits in enumerate(noise):
        judging.keep_results(tmp_path, f"case {number}: d64 s1x1", {"out": bits})
    kept = sorted(tmp_path.iterdir())
    assert [file.name for file in kept] == ["case_0_d64_s1x1.npz", "case_1_d64_s1x1.npz"]
    assert sum(file.stat().st_size for file in kept) <= 5000
    with numpy.load(kept[1]) as found:
        assert (found["out"] == noise[1]).all()


def test_calls_under_the_sanitizers_run_dry() -> None:
    done = script("sanitize.py", "--dry-run", "--cases", "packed|attn_mask=bfloat16|window=.60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUMMARY: 3 of 3 cases, 0 failed" in done.stdout
    checked = script("sanitize.py", "--dry-run", "--check", "--cases", "prefix=90|d192")
    assert "SUMMARY: 2 of 2 cases right, 0 wrong, 0 not run" in checked.stdout, checked.stdout + checked.stderr


def test_what_a_machine_cannot_check_is_skipped_not_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(dry_run=True, small=False)
    for trouble, verdict, status in (
        (streams.Skipped("one GPU only"), "skipped: one GPU only", 0),
        (NotImplementedError("gone"), "WRONG", 1),
    ):

        def threads(*_: Any, trouble: Exception = trouble, **__: Any) -> None:
            raise trouble

        monkeypatch.setattr(streams.threading, "Thread", threads)
        assert streams.streams(options) == status
        assert f"four threads             {verdict}" in capsys.readouterr().out
