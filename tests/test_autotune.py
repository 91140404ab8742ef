"""The autotuner end to end: on a fake clock, with candidates that crash, are wrong or do not compile; in real processes on the simulator; on the stand-in of a GPU."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from test_stand_in import environment, on_stand_in

import cuflash
from cuflash.__main__ import main
from cuflash.cli.samples import Sample, numpy_call
from cuflash.errors import OptionError, SetupError
from cuflash.hardware import device
from cuflash.jit import compiler, disassembly
from cuflash.planning import tile_choice, tile_model
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.problem.tile import Tile
from cuflash.runtime import calls
from cuflash.tuned import store
from cuflash.tuned.table import Entry, Table, Timing
from cuflash.tuner import api, described_calls, progress, session, tasks, worker
from cuflash.tuner.session import Session
from cuflash.tuner.tasks import Task, problem_of, tasks_of

ROOT = Path(__file__).resolve().parents[1]
ON = device.of_arch("sm_80")
SMALL = Sample(batch=1, seqlen_q=40, seqlen_kv=40, num_heads_q=1, num_heads_kv=1, head_dim=16)
TIMED = pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason="the timing model reads what nvdisasm says")


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's table in these tests."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    monkeypatch.delenv(store.VARIABLE, raising=False)
    monkeypatch.delenv("CUFLASH_COMPILE", raising=False)
    monkeypatch.setattr(store, "own_path", lambda on: tmp_path / f"{store.slug(on.name)}.json")
    calls.forget()
    return tmp_path / "cuflash-simulator-sm-80.json"


def small_tasks(backward: bool = False, count: int = 4, sample: Sample = SMALL) -> list[Task]:
    """The tasks of a pass with so many candidates each."""
    made = tasks_of(
        described_calls.of_sample(sample), problem_of(sample, backward=backward), ON, effort="quick",
        passes=("backward",) if backward else ("forward",),
    )  # fmt: skip
    return [replace(task, tiles=task.tiles[:count]) for task in made]


# --- On a fake clock ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Fake:
    """An evaluator whose candidates take what `times` says, ten seconds each by its clock; text is a note instead, an exception is raised."""

    times: Callable[[Task, int], float | str | BaseException]
    timer: str = "events"
    now: float = 0.0
    tried: list[tuple[str, int]] = field(default_factory=list)
    limits: list[float | None] = field(default_factory=list)
    closed: int = 0

    def evaluate(self, task: Task, tile: Tile, give_up_at: float | None) -> Timing:
        number = task.tiles.index(tile)
        found = self.times(task, number)
        if isinstance(found, BaseException):
            raise found
        self.tried.append((task.kernel.name, number))
        self.limits.append(give_up_at)
        self.now += 10.0
        return Timing(tile, note=found) if isinstance(found, str) else Timing(tile, found, found, found, 20, 1410)

    def close(self) -> None:
        self.closed += 1

    def clock(self) -> float:
        return self.now


def run(wanted: list[Task], fake: Fake, path: Path, seconds: float | None = None, again: bool = False) -> tuple[list[Entry], str, str]:
    """The entries, why it ended, and what was said."""
    said = io.StringIO()
    facts = {"driver": "CUDA 13.0", "cuflash": "0", "date": "2026", "effort": "quick"}
    of = Session(ON, path, fake, progress.Lines(said), facts, seconds, again, fake.clock)
    entries, reason = of.run(wanted)
    assert fake.closed == 1
    return entries, reason, said.getvalue()


def test_the_fastest_tile_is_found_kept_and_taken(own_table: Path) -> None:
    wanted = small_tasks()
    query, key, value = (numpy.zeros((1, 40, 1, 16), numpy.float16) for _ in range(3))
    assert cuflash.plan(query, key, value).kernels[0].tile == wanted[0].default
    entries, reason, said = run(wanted, Fake(lambda task, number: [2.0, 3.0, 1.0, 1.5][number]), own_table)
    assert reason == "done"
    (entry,) = entries
    assert entry.best is not None
    assert (entry.best.tile, entry.gain, entry.is_complete) == (wanted[0].tiles[2], 2.0, True)
    assert Table.from_text(own_table.read_text()).entries == {entry.bucket: entry}, "what is in the file is what was found"
    (kernel,) = cuflash.plan(query, key, value).kernels
    assert (kernel.tile, kernel.tile_by) == (wanted[0].tiles[2], "timed for seqlen up to 64 x 64 (the user's table)")
    assert "forward, float16, head_dim 16, seqlen up to 64, full, few blocks (4 tiles)" in said
    assert re.search(r"1 ms; best 1 ms \S+ w\d s\d; 1 left, about 10 s", said)


def test_each_kernel_of_a_pass_is_tuned_by_itself(own_table: Path) -> None:
    fake = Fake(lambda task, number: [2.0, 1.0, 3.0, 4.0][number] if task.kernel.name == "backward_dq" else [2.0, 3.0, 4.0, 1.0][number])
    entries, _, _ = run(small_tasks(backward=True), fake, own_table)
    found = {entry.bucket.kernel: [timing.tile for timing in entry.timings].index(entry.best.tile) for entry in entries if entry.best}
    assert found == {"backward_dkdv": 3, "backward_dq": 1}
    assert fake.limits[:4] == [None, *[2.0 * session.HOPELESS] * 3], "what is slower than that is left early"


def test_a_candidate_that_was_left_early_is_not_taken(own_table: Path) -> None:
    """Even if its first launches, which are all that there is, were the fastest."""
    wanted = small_tasks(count=2)
    entry = Entry(
        wanted[0].bucket,
        "",
        wanted[0].default,
        (Timing(wanted[0].default, 2.0), Timing(wanted[0].tiles[1], 1.0, note="left early")),
        "",
        "",
    )
    assert entry.best is not None
    assert entry.best.tile == wanted[0].default


def test_the_end_of_the_budget(own_table: Path) -> None:
    wanted, fake = small_tasks(backward=True), Fake(lambda task, number: 2.0 - number / 10)
    entries, reason, said = run(wanted, fake, own_table, seconds=25.0)
    assert reason == "out of time"
    assert fake.tried == [("backward_dkdv", 0), ("backward_dkdv", 1), ("backward_dkdv", 2)], "what was begun before the end is finished"
    assert [entry.is_complete for entry in entries] == [False]
    assert "out of time: what was found is kept" in said
    assert cuflash.plan(*[numpy.zeros((1, 40, 1, 16), numpy.float16)] * 3, backward=True).kernels[1].tile == wanted[0].tiles[2]


def test_a_run_goes_on_where_the_last_one_ended(own_table: Path) -> None:
    wanted = small_tasks(backward=True)
    run(wanted, Fake(lambda task, number: 2.0), own_table, seconds=25.0)
    second = Fake(lambda task, number: 1.0)
    entries, reason, said = run(wanted, second, own_table)
    assert reason == "done"
    assert second.tried == [("backward_dkdv", 3), *[("backward_dq", number) for number in range(4)]]
    assert "backward_dkdv, float16, head_dim 16, seqlen up to 64, full, few blocks (4 tiles, 3 tried before)" in said
    assert [len(entry.timings) for entry in entries] == [4, 4]
    third = Fake(lambda task, number: 1.0)
    assert run(wanted, third, own_table)[1] == "done"
    assert third.tried == []
    again = Fake(lambda task, number: 3.0)
    (first, _), _, _ = run(wanted, again, own_table, again=True)
    assert len(again.tried) == 8
    assert {timing.milliseconds for timing in first.timings} == {3.0}


def test_a_run_of_other_kernels_begins_anew(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(small_tasks(), Fake(lambda task, number: 2.0), own_table)
    monkeypatch.setattr("cuflash.tuned.fingerprint.of_source", lambda source: "0" * 16)
    second = Fake(lambda task, number: 1.0)
    run(small_tasks(), second, own_table)
    assert len(second.tried) == 4
    (entry,) = Table.from_text(own_table.read_text()).entries.values()
    assert {timing.milliseconds for timing in entry.timings} == {1.0}


def test_ctrl_c_keeps_what_is_found(own_table: Path) -> None:
    wanted = small_tasks()
    fake = Fake(lambda task, number: [2.0, 1.0, KeyboardInterrupt(), 1.0][number])
    entries, reason, said = run(wanted, fake, own_table)
    assert reason == "interrupted"
    assert "interrupted: what was found is kept" in said
    (entry,) = Table.from_text(own_table.read_text()).entries.values()
    assert [entry] == entries
    assert entry.best is not None
    assert (len(entry.timings), entry.best.tile, entry.is_complete) == (2, wanted[0].tiles[1], False)


def test_a_crash_of_the_tuner_itself_loses_nothing(own_table: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(small_tasks(), Fake(lambda task, number: [2.0, 1.0, ZeroDivisionError()][number]), own_table)
    (entry,) = Table.from_text(own_table.read_text()).entries.values()
    assert len(entry.timings) == 2


def test_candidates_that_fail_are_listed_and_not_tried_again(own_table: Path) -> None:
    wanted = small_tasks()
    fake = Fake(lambda task, number: [2.0, "crashed: signal 11", "wrong: 0.3 from the default tile's result", 3.0][number])
    entries, reason, said = run(wanted, fake, own_table)
    assert reason == "done"
    assert entries[0].best is not None
    assert entries[0].best.tile == wanted[0].default
    assert progress.failures(entries) == [
        f"forward, float16, head_dim 16, {progress.short(wanted[0].tiles[1])}: crashed: signal 11",
        f"forward, float16, head_dim 16, {progress.short(wanted[0].tiles[2])}: wrong: 0.3 from the default tile's result",
    ]
    assert "crashed: signal 11; best 2 ms" in said
    again = Fake(lambda task, number: 1.0)
    run(wanted, again, own_table)
    assert again.tried == []


def test_a_default_that_fails_leaves_the_choice_as_it_was(own_table: Path) -> None:
    entries, _, _ = run(small_tasks(), Fake(lambda task, number: ["wrong: the default", 1.0, 1.0, 1.0][number]), own_table)
    assert entries[0].best is None
    assert cuflash.plan(*[numpy.zeros((1, 40, 1, 16), numpy.float16)] * 3).kernels[0].tile == small_tasks()[0].default
    assert progress.gains(entries).rows[0][:3] == ("–", "–", "–")


def test_the_table_of_gains() -> None:
    task = small_tasks()[0]
    timings = (Timing(task.tiles[0], 2.0), Timing(task.tiles[1], 1.6), Timing(task.tiles[2], note="crashed: x"))
    entry = Entry(task.bucket, "", task.default, timings, "", "")
    assert progress.gains([entry]).rows == [
        ("2", "1.6", "1.25x", "3", "1", progress.short(task.tiles[1]), progress.short(task.default), str(task.bucket))
    ]
    text = str(api.Tuned((entry,), Path("table.json"), "done"))
    assert re.split("  +", text.splitlines()[0]) == [
        "default ms",
        "best ms",
        "faster",
        "tried",
        "failed",
        "best tile",
        "default tile",
        "for",
    ]
    assert text.endswith("crashed: x\ndone; kept in table.json")
    assert "predictions" in str(api.Tuned((replace(entry, timer="model"),), Path("t"), "done"))


def test_a_bar_says_the_same() -> None:
    pytest.importorskip("rich")
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    listener = progress.listener_for(terminal)
    assert isinstance(listener, progress.Bar)
    task = small_tasks()[0]
    timing = Timing(task.tiles[0], 2.0)
    listener.begun(task, 0)
    listener.tried(task, timing, Entry(task.bucket, "", task.default, (timing,), "", ""), 3, 30.0)
    listener.ended("interrupted")
    assert "seqlen up to 64" in terminal.getvalue()
    assert "interrupted: what was found is kept" in terminal.getvalue()
    assert isinstance(progress.listener_for(io.StringIO()), progress.Lines)


# --- Candidates ---------------------------------------------------------------------------------------------------------------------------


def test_tiles_that_were_fastest_on_an_h100_are_among_the_first() -> None:
    """In every sweep that was timed, the candidates of standard effort hold one that is within 2 % of the fastest, without knowing it; quick misses one sweep."""
    on, sweeps = device.of_arch("sm_90", "gpu"), dict[tuple[Any, ...], dict[Tile, float]]()
    with (ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/tiles.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["milliseconds"]:
                tile = Tile(*(int(row[name]) for name in ("tile_q", "tile_kv", "num_warps", "num_stages")))
                sweeps.setdefault((row["kernel"], row["dtype"], int(row["head_dim"]), row["causal"]), {})[tile] = float(row["milliseconds"])
    assert len(sweeps) == 16
    missed = {"quick": 0, "standard": 0}
    for (kernel, dtype, head_dim, _), times in sweeps.items():
        case = KernelCase(TILED_KERNELS[kernel], dtype, head_dim)
        default, *others = tile_choice.worth_timing(case, on)
        assert default == tile_choice.default_tile(case, on)
        listed = sorted([default, *others], key=lambda tile, case=case: tile_model.estimate_cycles(case, tile, on, spills=False))
        assert [tile for tile in listed if tile != default] == others
        good = {tile for tile, milliseconds in times.items() if milliseconds <= 1.02 * min(times.values())}
        for effort in missed:
            count = tasks.EFFORTS[effort]  # type: ignore[index]
            assert count is not None
            missed[effort] += not good & set(listed[:count])
    assert missed == {"quick": 1, "standard": 0}


def test_every_class_of_calls_has_tasks() -> None:
    for sample, name in zip(
        tasks.samples(ON, dtypes=["float16"], head_dims=[16], seqlens=[64], classes=tasks.CLASSES), tasks.CLASSES, strict=True
    ):
        found = tasks_of(
            described_calls.of_sample(sample), problem_of(sample, backward=True), ON, passes=("forward", "backward"), effort="quick"
        )
        kernels = [task.kernel.name for task in found]
        assert kernels == ["forward", "backward_dkdv", "backward_dq", *(["backward_mask"] if name == "additive_mask" else [])], name
        assert all(task.tiles[0] == task.kernel.tile and len(set(task.tiles)) == len(task.tiles) == 21 for task in found[:3]), name
        assert found[0].bucket.causal == (name not in ("plain", "seqlens_kv"))
    with pytest.raises(OptionError, match=r"classes: got 'colour'; expected some of plain, causal, window"):
        tasks.samples(ON, dtypes=["float16"], head_dims=[16], seqlens=[64], classes=["colour"])


# --- In real processes, on the simulator --------------------------------------------------------------------------------------------------


@pytest.fixture
def workers() -> Any:
    made = worker.Workers(ON, ahead=1)
    yield made
    made.close()


def odd_kernels(folder: Path) -> Path:
    """Kernels of which some tiles fail: 32 keys give wrong results, 48 stop the kernel, and 64 do not compile."""
    shutil.copytree(compiler.kernels_directory(), folder / "kernels")
    path = folder / "kernels" / "forward_mma.cu"
    text, line = path.read_text(), "multiply_accumulator(O, P, V);"
    assert text.count(line) == 1
    odd = 'static_assert(TILE_KV != 64, "a tile that does not compile"); if (TILE_KV == 32) clear(O); if (TILE_KV == 48) __trap();'
    path.write_text(text.replace(line, f"{line} {odd}"))
    return folder / "kernels"


def with_tiles(task: Task, *lengths: int) -> Task:
    tiles = tuple(Tile(16, length, 1, 1) for length in lengths)
    return replace(task, tiles=tiles, kernel=replace(task.kernel, tile=tiles[0]))


@TIMED
def test_wrong_crashing_and_uncompilable_candidates_are_caught(
    tmp_path: Path, own_table: Path, monkeypatch: pytest.MonkeyPatch, workers: worker.Workers
) -> None:
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(odd_kernels(tmp_path)))
    monkeypatch.setattr(tile_choice, "default_tile", lambda case, on: Tile(16, 16, 1, 1))
    (task,) = small_tasks()
    task = with_tiles(task, 80, 32, 48, 64, 96)
    workers.compile_ahead([task])
    found = [workers.evaluate(task, tile, None) for tile in task.tiles]
    assert found[0].milliseconds is not None
    assert found[1].note.startswith("wrong: ")
    assert "from the default tile's result" in found[1].note
    assert found[2].note.startswith("failed: ")
    assert found[3].note.startswith("did not compile: ")
    assert found[4].milliseconds is not None
    assert found[4].note == "", "the process goes on behind a candidate that failed"


@TIMED
def test_a_process_that_dies_is_replaced(workers: worker.Workers) -> None:
    (task,) = small_tasks(count=2)
    assert workers.evaluate(task, task.tiles[0], None).milliseconds is not None
    assert workers._process is not None
    workers._process.kill()
    workers._process.wait()
    assert workers.evaluate(task, task.tiles[1], None).milliseconds is not None
    process = workers._process
    workers._connection.send("nothing that it knows")  # which ends it
    crashed = workers.evaluate(task, task.tiles[1], None)
    assert crashed.note.startswith("crashed: exit status ")
    assert "AttributeError" in crashed.note
    assert workers.evaluate(task, task.tiles[1], None).milliseconds is not None
    assert workers._process is not process


def test_a_candidate_that_hangs_is_ended() -> None:
    hasty = worker.Workers(ON, ahead=1, answer_timeout=0.01)
    (task,) = small_tasks(count=1)
    assert hasty.evaluate(task, task.tiles[0], None).note == "hung: no answer for 0 s"
    assert hasty._process is None
    hasty.close()


def test_what_is_missing_ends_the_run(monkeypatch: pytest.MonkeyPatch, workers: worker.Workers) -> None:
    """And is not noted as the fault of each candidate."""

    def fetch(request: Any) -> Any:
        raise SetupError("CuPy is missing")

    monkeypatch.setattr(worker.cache, "fetch", fetch)
    (task,) = small_tasks(count=1)
    workers.compile_ahead([task])
    with pytest.raises(SetupError, match="CuPy is missing"):
        workers.evaluate(task, task.tiles[0], None)


@TIMED
def test_a_call_is_tuned_and_the_next_one_takes_the_tile(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuflash.autotune` in a process that has made the call before: of a transposed batch with a mask in bfloat16."""
    monkeypatch.setitem(tasks.EFFORTS, "quick", 1)
    rng = numpy.random.default_rng(0)
    query, key, value = (cuflash.bfloat16(rng.integers(0, 2**14, (1, 1, 40, 16), numpy.uint16)) for _ in range(3))
    options: dict[str, Any] = {"layout": "bhsd", "attn_mask": rng.random((40, 40)) < 0.7}
    before = cuflash.scaled_dot_product_attention(query, key, value, **options)
    found = cuflash.autotune(query, key, value, backward=False, effort="quick", verbose=False, **options)
    assert found.reason == "done"
    (entry,) = found.entries
    assert [timing.note for timing in entry.timings] == ["", ""]
    assert entry.bucket.features == ("attn_mask of bool",)
    assert entry.timer == "model"
    assert len(calls._calls) == 0, "calls that were prepared with another tile are prepared again"
    after = cuflash.scaled_dot_product_attention(query, key, value, **options)
    assert numpy.abs(before.to_float32() - after.to_float32()).max() < 0.02
    (kernel,) = [kernel for kernel in cuflash.plan(query, key, value, **options).kernels if kernel.name == "forward"]
    assert kernel.tile_by == "predicted for seqlen up to 64 x 64 (the user's table)"
    json.loads(own_table.read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"effort": "much"}, "effort: got 'much'; expected one of quick, standard, full"),
        ({"budget": 0}, "budget: got 0; expected a positive number of minutes"),
        ({"budget": True}, "budget: got True"),
        ({"tile": Tile(16, 16, 1, 1)}, "tile: got a tile; expected none"),
        ({"backward": 1}, "backward: got 1"),
        ({"is_causl": True}, "is_causl"),
        ({"window": 3}, "window: got 3"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], words: str) -> None:
    x = numpy.zeros((1, 40, 1, 16), numpy.float16)
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        cuflash.autotune(x, x, x, verbose=False, **options)


def test_what_nothing_would_find_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numpy.zeros((1, 40, 1, 16), numpy.float16)
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    with pytest.raises(OptionError, match="CUFLASH_COMPILE: got 'forbid'"):
        cuflash.autotune(x, x, x, verbose=False)
    monkeypatch.setenv(store.VARIABLE, "off")
    with pytest.raises(OptionError, match="CUFLASH_TUNING: got 'off'"):
        cuflash.autotune(x, x, x, verbose=False)
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setattr(store, "own_path", lambda on: None)
    with pytest.raises(OptionError, match="output: got no cache directory"):
        cuflash.autotune(x, x, x, verbose=False)


def test_calls_are_made_again_from_their_description() -> None:
    """As samples and as a user's arrays: the same operands and options, whatever the library."""
    sample = replace(SMALL, dtype="bfloat16", lengths_q=(20, 30), is_causal=True)
    operands, arguments = numpy_call(sample)
    inputs = {name: operands[name] for name in ("query", "key", "value")}
    for call in (described_calls.of_sample(sample), described_calls.of_arguments(inputs, arguments)):
        assert call.varlen
        assert call.operands["query"] == described_calls.Described((50, 1, 16), (0, 1, 2), "bfloat16")
        made, options = call.operands_and_options(inputs | {"cu_seqlens_q": arguments["cu_seqlens_q"]})
        assert made.cu_seqlens_kv.tolist() == [0, 20, 50]
        assert (options.varlen, options.causal_alignment, options.max_seqlen_q) == (True, "bottom_right", 30)
    transposed = numpy.zeros((2, 3, 40, 16), numpy.float32).swapaxes(1, 2)
    mask = cuflash.bfloat16(numpy.full((40, 40), 0x3F80, numpy.uint16))
    call = described_calls.of_arguments(dict.fromkeys(("query", "key", "value"), transposed), {"attn_mask": mask, "window": (3, 3)})
    assert call.operands["key"] == described_calls.Described((2, 40, 3, 16), (0, 2, 1, 3), "float32")
    assert call.arguments["attn_mask"].bits.tolist() == mask.bits.tolist()
    assert call.arguments["window"] == (3, 3)


# --- Commands -----------------------------------------------------------------------------------------------------------------------------


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


@TIMED
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.EFFORTS, "quick", 1)
    table = tmp_path / "table.json"
    like = "--seqlen 40 --head-dim 16 --causal --window 5 5"
    status, out, err = command("autotune", "--like", like, "--effort", "quick", "--output", str(table), capsys=capsys)
    assert status == 0
    assert f"cuflash simulator (sm_80): 1 call, effort quick; writes {table}" in err
    assert out.splitlines()[0].split()[:4] == ["default", "ms", "best", "ms"]
    assert f"done; kept in {table}" in out
    (entry,) = json.loads(table.read_text())["entries"]
    assert (entry["bucket"]["kernel"], entry["bucket"]["features"], len(entry["timings"])) == ("forward", ["window"], 2)
    again, out, _ = command("autotune", "--like", like, "--effort", "quick", "--output", str(table), capsys=capsys)
    assert again == 0


def test_candidates_are_compiled_ahead_for_a_gpu_that_is_absent(
    cold_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.EFFORTS, "quick", 1)
    options = ("--head-dim", "16", "--seqlen", "64", "--pass", "forward", "--classes", "plain", "--effort", "quick")
    status, out, _ = command("autotune", "--compile-only", "--arch", "sm_90", *options, capsys=capsys)
    assert (status, out.splitlines()[-1]) == (0, f"2 kernels of 1 task for sm_90, 0 failed; {cold_cache / 'kernels'}")
    assert len(list((cold_cache / "kernels").glob("*.cubin"))) == 2
    status, _, err = command("autotune", "--arch", "sm_90", capsys=capsys)
    assert status == 2
    assert "--arch: got sm_90; expected --compile-only with it" in err
    assert command("autotune", "--classes", "help", capsys=capsys)[1].split() == list(tasks.CLASSES)


def test_on_the_stand_in_of_a_gpu(tmp_path: Path) -> None:
    """Events, flushed caches, a process that loses its GPU with its twelfth launch, and a table that the next process takes."""
    table = tmp_path / "table.json"
    program = (
        "import sys; from cuflash.tuner import tasks, measuring; tasks.EFFORTS['quick'] = 2; measuring.MOST_LAUNCHES = 3\n"
        "from cuflash.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    options = ("--like", "--seqlen 40 --head-dim 16 --causal --pass backward", "--effort", "quick", "--output", str(table))
    done = on_stand_in("-c", program, "autotune", *options, STAND_IN_LOSS=f"12 {tmp_path / 'lost'}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(table.read_text())
    assert found["device"]["name"] == "Stand-in 0"
    timings = {entry["bucket"]["kernel"]: entry["timings"] for entry in found["entries"]}
    assert [len(each) for each in timings.values()] == [3, 3]
    notes = [timing["note"] for each in timings.values() for timing in each]
    assert sum(note.startswith("crashed: ") for note in notes) == 1, notes
    assert all(entry["timer"] == "events" and entry["driver"] for entry in found["entries"])
    assert "not taken: backward_dkdv" in done.stdout


def test_ctrl_c_of_a_real_run(tmp_path: Path) -> None:
    """The signal of a terminal, to the process that tunes; its worker ends with it, and the next run goes on."""
    table = tmp_path / "table.json"
    like = "--batch 1 --heads 1 --seqlen 40 --head-dim 16"
    tune = (
        "import sys; from cuflash.__main__ import main; sys.exit(main(sys.argv[1:]))",
        "autotune",
        "--like",
        like,
        "--output",
        str(table),
    )
    running = subprocess.Popen([sys.executable, "-c", *tune], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    assert running.stderr is not None
    said = [next(running.stderr) for _ in range(4)]  # what is tuned, the bucket, two candidates
    assert " left, about " in said[-1], said
    running.send_signal(signal.SIGINT)
    rest = running.stderr.read()
    assert running.wait(60) == 130, [*said, rest]
    assert "interrupted: what was found is kept" in rest
    (entry,) = json.loads(table.read_text())["entries"]
    assert 2 <= len(entry["timings"]) < 41
    assert not entry["is_complete"]


def test_calls_never_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a call nor a plan imports the tuner."""
    program = (
        "import sys, numpy, cuflash; x = numpy.zeros((1, 40, 1, 16), 'float16'); print(cuflash.plan(x, x, x)); "
        "cuflash.scaled_dot_product_attention(x, x, x); sys.exit(any(name.startswith('cuflash.tuner') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
