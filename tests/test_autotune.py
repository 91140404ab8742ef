"""The autotuner on a fake clock: budget, interruption, resuming, candidates that fail, what is kept and taken; which candidates there are; how one is timed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

import cuflash
from cuflash.cli.samples import Sample
from cuflash.errors import OptionError, SetupError, TuningError
from cuflash.hardware import device
from cuflash.planning import tile_choice, tile_model
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.problem.tile import Tile
from cuflash.runtime import calls
from cuflash.tuned import store
from cuflash.tuned.table import Entry, Table, Timing, device_facts
from cuflash.tuner import api, described_calls, measuring, progress, session, tasks
from cuflash.tuner.session import Session
from cuflash.tuner.tasks import Task, problem_of, tasks_of

ROOT = Path(__file__).resolve().parents[1]
ON = device.of_arch("sm_80")
SMALL = Sample(batch=1, seqlen_q=40, seqlen_kv=40, num_heads_q=1, num_heads_kv=1, head_dim=16)


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
    left: list[float | None] = field(default_factory=list)
    again: list[tuple[str, int]] = field(default_factory=list)
    compiled: list[tuple[str, int]] = field(default_factory=list)
    closed: int = 0

    def compile_ahead(self, candidates: Sequence[tuple[Task, Tile]]) -> int:
        self.compiled = [(task.kernel.name, task.tiles.index(tile)) for task, tile in candidates]
        return len(candidates)

    def time_again(self, task: Task, tile: Tile, seconds_left: float | None) -> Timing:
        number = task.tiles.index(tile)
        self.again.append((task.kernel.name, number))
        self.now += 10.0
        milliseconds = self.times_again(task, number)
        return Timing(tile, milliseconds, milliseconds, milliseconds, 20, 1410)

    def times_again(self, task: Task, number: int) -> float:
        found = self.times(task, number)
        assert isinstance(found, float)
        return found

    def evaluate(self, task: Task, tile: Tile, give_up_at: float | None, seconds_left: float | None) -> Timing:
        number = task.tiles.index(tile)
        found = self.times(task, number)
        if isinstance(found, BaseException):
            raise found
        self.tried.append((task.kernel.name, number))
        self.limits.append(give_up_at)
        self.left.append(seconds_left)
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
    assert found == {"backward_dkdv": 3, "backward_dq": 1, "backward_fused": 3}
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
    assert fake.left == [25.0, 15.0, 5.0]
    assert [entry.is_complete for entry in entries] == [False]
    assert "out of time: what was found is kept" in said
    assert cuflash.plan(*[numpy.zeros((1, 40, 1, 16), numpy.float16)] * 3, backward=True).kernels[1].tile == wanted[0].tiles[2]


def test_a_run_goes_on_where_the_last_one_ended(own_table: Path) -> None:
    wanted = small_tasks(backward=True)
    run(wanted, Fake(lambda task, number: 2.0), own_table, seconds=25.0)
    second = Fake(lambda task, number: 1.0)
    entries, reason, said = run(wanted, second, own_table)
    assert reason == "done"
    others = [(name, number) for name in ("backward_dq", "backward_fused") for number in range(4)]
    assert second.tried == second.compiled == [("backward_dkdv", 3), *others]
    assert "backward_dkdv, float16, head_dim 16, seqlen up to 64, full, few blocks (4 tiles, 3 tried before)" in said
    assert [len(entry.timings) for entry in entries] == [4, 4, 4]
    third = Fake(lambda task, number: 1.0)
    assert run(wanted, third, own_table)[1] == "done"
    assert third.tried == []
    again = Fake(lambda task, number: 3.0)
    (first, *_), _, _ = run(wanted, again, own_table, again=True)
    assert len(again.tried) == 12
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


def test_a_run_that_found_nothing_says_so(own_table: Path) -> None:
    entries, reason, said = run(small_tasks(), Fake(lambda task, number: KeyboardInterrupt()), own_table)
    assert said.endswith("interrupted before a candidate was timed; the same command begins again\n")
    text = str(api.Tuned(tuple(entries), own_table, reason))
    assert text == "nothing was timed\ninterrupted; nothing to keep"
    assert not own_table.exists()


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


@pytest.mark.parametrize("note", ["hung: no answer for 120 s", "took long to compile: more than 120 s"])
def test_what_may_be_the_machines_fault_is_tried_again(own_table: Path, note: str) -> None:
    entries, _, _ = run(small_tasks(), Fake(lambda task, number: [2.0, note, 3.0, 1.0][number]), own_table)
    assert progress.failures(entries) == [f"forward, float16, head_dim 16, {progress.short(small_tasks()[0].tiles[1])}: {note}"]
    assert note not in own_table.read_text()
    again = Fake(lambda task, number: 1.5)
    run(small_tasks(), again, own_table)
    assert again.tried == [("forward", 1)]


def test_nothing_is_recorded_where_no_tile_is_to_blame(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(progress.Lines, "ended", lambda self, reason: ended.append(reason))
    for number, error in ((0, TuningError("no memory")), (0, SetupError("no CuPy"))):
        with pytest.raises(type(error)):
            run(small_tasks(), Fake(lambda task, index, n=number, e=error: e if index == n else 1.0), own_table)  # type: ignore[misc]
        assert not own_table.exists()
    with pytest.raises(TuningError):
        run(small_tasks(), Fake(lambda task, index: [2.0, 1.0, TuningError("no memory"), 1.0][index]), own_table)
    (entry,) = Table.from_text(own_table.read_text()).entries.values()
    assert len(entry.timings) == 2, "what was found before is kept"
    assert ended == ["stopped"] * 3, "a bar is taken away"


def test_an_error_before_the_first_candidate_ends_the_compiler_too(own_table: Path) -> None:
    own_table.write_text(Table(device_facts(device.of_arch("sm_90"))).to_text())
    fake = Fake(lambda task, index: 1.0)
    with pytest.raises(OptionError, match="a table of cuflash simulator"):
        run(small_tasks(), fake, own_table)
    assert fake.closed == 1


class Noisy(Fake):
    """Timed again, the default and all others take two milliseconds, but for the tile of number 2."""

    def times_again(self, task: Task, number: int) -> float:
        return 1.5 if number == 2 else 2.0


def test_the_fastest_are_timed_again_beside_the_default(own_table: Path) -> None:
    """A tile that was the fastest by chance is not taken."""
    fake = Noisy(lambda task, number: [2.0, 1.0, 1.6, 1.9, 1.95][number])
    (entry,), _, _ = run(small_tasks(count=5), fake, own_table)
    assert fake.again == [("forward", number) for number in (0, 1, 2, 3)] * 2, "in turns"
    assert [timing.milliseconds for timing in entry.timings] == [2.0, 2.0, 1.5, 2.0, 1.95]
    assert entry.best is not None
    assert entry.best.tile == small_tasks(count=5)[0].tiles[2]


def test_a_gain_that_is_noise_is_none(own_table: Path) -> None:
    (entry,), _, _ = run(small_tasks(count=2), Fake(lambda task, number: [2.0, 1.99][number]), own_table)
    assert entry.best is not None
    assert (entry.best.tile, entry.gain) == (entry.default, 1.0)


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
    """In every sweep that was timed, the candidates of quick effort hold one that is within 2 % of the fastest, without knowing it."""
    on, sweeps = device.of_arch("sm_90", "gpu"), dict[tuple[Any, ...], dict[Tile, float]]()
    with (ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/tiles.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["milliseconds"]:
                tile = Tile(*(int(row[name]) for name in ("tile_q", "tile_kv", "num_warps", "num_stages")))
                sweeps.setdefault((row["kernel"], row["dtype"], int(row["head_dim"]), row["causal"]), {})[tile] = float(row["milliseconds"])
    assert len(sweeps) == 16
    count = tasks.EFFORTS["quick"]
    for (kernel, dtype, head_dim, _), times in sweeps.items():
        case = KernelCase(TILED_KERNELS[kernel], dtype, head_dim)
        default, *others = tile_choice.worth_timing(case, on)
        assert default == tile_choice.default_tile(case, on)
        listed = sorted([default, *others], key=lambda tile, case=case: tile_model.estimate_cycles(case, tile, on, spills=False))
        assert [tile for tile in listed if tile != default] == others
        good = {tile for tile, milliseconds in times.items() if milliseconds <= 1.02 * min(times.values())}
        assert good & set(listed[:count]), (kernel, dtype, head_dim)


FLASH_ATTENTION_2 = {
    ("sm_80", 64): (128, 128, 4), ("sm_80", 96): (128, 64, 4), ("sm_80", 128): (128, 64, 4), ("sm_80", 192): (128, 64, 8), ("sm_80", 256): (128, 64, 8),
    ("sm_86", 64): (128, 128, 4), ("sm_86", 128): (128, 32, 4), ("sm_86", 256): (64, 64, 4), ("sm_90", 64): (128, 128, 4), ("sm_90", 128): (128, 64, 4),
}  # fmt: skip
"""Queries, keys and warps of its forward kernels without dropout (flash_fwd_launch_template.h), which its authors timed."""


@pytest.mark.parametrize(("arch", "head_dim"), FLASH_ATTENTION_2)
def test_tiles_of_flash_attention_2_are_among_the_first(arch: str, head_dim: int) -> None:
    """Already of the candidates of quick effort; how many stages they have is ours to choose."""
    count = tasks.EFFORTS["quick"]
    assert count is not None
    case = KernelCase(TILED_KERNELS["forward"], "float16", head_dim)
    first = tile_choice.worth_timing(case, device.of_arch(arch, "gpu"))[:count]
    assert FLASH_ATTENTION_2[arch, head_dim] in {(tile.tile_q, tile.tile_kv, tile.num_warps) for tile in first}


def test_every_class_of_calls_has_tasks() -> None:
    for sample, name in zip(
        tasks.samples(ON, dtypes=["float16"], head_dims=[16], seqlens=[64], classes=tasks.CLASSES), tasks.CLASSES, strict=True
    ):
        found = tasks_of(
            described_calls.of_sample(sample), problem_of(sample, backward=True), ON, passes=("forward", "backward"), effort="quick"
        )
        kernels = [task.kernel.name for task in found]
        of_gradients = ["backward_dkdv", "backward_dq", "backward_fused"]
        if name == "additive_mask":  # of one sequence and head, of which nothing is summed
            of_gradients = ["backward_dkdv", "backward_dq_mask", "backward_fused", "backward_mask", "backward_dq"]
        assert kernels == ["forward", *of_gradients], name
        assert all(task.tiles[0] == task.kernel.tile and len(set(task.tiles)) == len(task.tiles) == 29 for task in found[:3]), name
        assert found[0].bucket.causal == (name not in ("plain", "seqlens_kv"))
    windows = [
        tasks.samples(device.of_arch("sm_80", "gpu"), dtypes=["float16"], head_dims=[64], seqlens=[n], classes=["window"])
        for n in (256, 4096)
    ]
    assert [sample.features.window for (sample,) in windows] == [(50, 20), (800, 320)], "as large a part of any length"
    with pytest.raises(OptionError, match=r"classes: got 'colour'; expected some of plain, causal, window"):
        tasks.samples(ON, dtypes=["float16"], head_dims=[16], seqlens=[64], classes=["colour"])


# --- How a kernel is timed, on a fake GPU -----------------------------------------------------------------------------------------------------


class FakeGpu:
    """Events and memory that note what is done, and launches that take `milliseconds`, the last number again and again."""

    def __init__(self, *milliseconds: float) -> None:
        self.done: list[str] = []
        self._milliseconds = list(milliseconds)
        self.cuda = SimpleNamespace(
            Event=lambda: SimpleNamespace(record=lambda stream: self.done.append("event")), Stream=SimpleNamespace(null=0),
            get_elapsed_time=self._elapsed, runtime=SimpleNamespace(deviceSynchronize=lambda: self.done.append("wait")),
        )  # fmt: skip
        self.candidate = SimpleNamespace(
            launch_before=lambda kernel: self.done.append("before"), launch=lambda kernel: self.done.append(kernel)
        )

    def _elapsed(self, start: object, end: object) -> float:
        return self._milliseconds.pop(0) if len(self._milliseconds) > 1 else self._milliseconds[0]

    def empty(self, nbytes: int, dtype: object) -> Any:
        assert nbytes >= 2 * 40 * 2**20, "twice an A100's L2"
        return SimpleNamespace(nbytes=nbytes, data=SimpleNamespace(memset_async=lambda value, size: self.done.append("flush")))

    def timed(self, give_up_at: float | None) -> Timing:
        bench = object.__new__(measuring.Bench)
        bench._library, bench._flushed, bench.device = self, None, device.of_arch("sm_80", "gpu")
        bench._monitor = measuring.Monitor(ON)
        return bench._timed(self.candidate, "forward", Tile(16, 16, 1, 1), give_up_at)  # type: ignore[arg-type]


def test_a_kernel_is_timed_alone_with_a_cold_cache() -> None:
    gpu = FakeGpu(9.0, 2.0, 2.0, 2.0, 1.0, 3.0, 2.0)
    timing = gpu.timed(None)
    assert gpu.done[:6] == ["before", "flush", "event", "forward", "event", "wait"]
    assert gpu.done.count("forward") == 1 + 3 + 25, "one to warm up, three to look at, and 50 ms"
    assert (timing.milliseconds, timing.repeats, timing.note) == (2.0, 28, ""), "the one that warms up does not count"


def test_a_hopeless_candidate_is_left_early() -> None:
    gpu = FakeGpu(9.0, 2.0)
    assert gpu.timed(1.9) == Timing(Tile(16, 16, 1, 1), 2.0, 2.0, 2.0, 3, None, "left early")
    assert gpu.done.count("forward") == 4
    assert FakeGpu(9.0, 2.0, 2.0, 1.8, 2.0).timed(1.9).note == "", "the fastest of three says whether there is hope"
    assert FakeGpu(0.001).timed(None).repeats == 3 + measuring.MOST_LAUNCHES
