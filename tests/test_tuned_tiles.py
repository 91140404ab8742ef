"""Tables of tuned tiles: files that come back as they were, the order in which a plan looks for a tile, entries that are ignored, processes that write at once."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

import cuflash
from cuflash.cli import environment
from cuflash.errors import OptionError
from cuflash.hardware import device
from cuflash.planning import tile_choice, tuned_tiles
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import FORWARD
from cuflash.planning.offline import offline_kernels
from cuflash.planning.planner import make_plan
from cuflash.problem.features import FeatureSet
from cuflash.problem.tile import Tile
from cuflash.system.file_lock import FileLock
from cuflash.tuned import fingerprint, store
from cuflash.tuned.buckets import Bucket, length_bucket
from cuflash.tuned.table import Entry, Table, Timing, device_facts

ON = device.of_arch("sm_80")
DEFAULT = tile_choice.default_tile(KernelCase(FORWARD, "float16", 64), ON)
FAST, OTHER = Tile(32, 16, 2, 1), Tile(16, 32, 1, 2)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's tables are in these tests."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    monkeypatch.setattr(store, "own_path", lambda on: tmp_path / "own" / f"{store.slug(on.name)}.json")
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(store.VARIABLE, raising=False)
    store._said.clear()
    return tmp_path


def bucket(seqlen: int = 1024, **others: Any) -> Bucket:
    kind = Bucket("forward", "float16", 64, 64, False, False, (), "padded", "full", seqlen, seqlen)
    return replace(kind, **others)


def entry(of: Bucket | None = None, tile: Tile = FAST, **others: Any) -> Entry:
    timings = (Timing(DEFAULT, 2.0, 1.9, 2.1, 20, 1410), Timing(tile, 1.0, 0.9, 1.2, 20), Timing(OTHER, 0.5, note="wrong: 0.3 apart"))
    made = Entry(
        of or bucket(), "batch 32", DEFAULT, timings, fingerprint.of_source("forward_mma.cu"), fingerprint.of_compiler(), is_complete=True
    )
    return replace(made, **others)


def arrays(seqlen: int = 1024, batch: int = 32, dtype: Any = numpy.float16) -> list[Any]:
    return [numpy.zeros((batch, seqlen, 8, 64), dtype)] * 3


def planned(seqlen: int = 1024, **options: Any) -> tuple[Tile, str]:
    (kernel,) = cuflash.plan(*arrays(seqlen), **options).kernels
    return kernel.tile, kernel.tile_by


def save_own(*entries: Entry) -> Path:
    path = store.own_path(ON)
    assert path is not None
    for each in entries:
        store.save(path, ON, each)
    return path


# --- Files --------------------------------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    table = Table(device_facts(ON)).with_entry(entry()).with_entry(entry(bucket(64, features=("attn_mask of bool", "window"))))
    assert Table.from_text(table.to_text()) == table
    found = json.loads(table.to_text())
    assert found["device"]["name"] == "cuflash simulator (sm_80)"
    assert found["entries"][0]["tile"] == [32, 16, 2, 1]
    assert found["entries"][0]["gain"] == 2.0
    assert found["entries"][0]["timings"][0] == {
        "tile": [DEFAULT.tile_q, DEFAULT.tile_kv, DEFAULT.num_warps, DEFAULT.num_stages], "milliseconds": 2.0, "p20": 1.9, "p80": 2.1, "repeats": 20, "sm_clock_mhz": 1410, "note": "",
    }  # fmt: skip


def _with(change: Callable[[Any], None]) -> str:
    value = json.loads(Table(device_facts(ON)).with_entry(entry()).to_text())
    change(value)
    return json.dumps(value)


DAMAGED: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "half": lambda: Table(device_facts(ON)).with_entry(entry()).to_text()[:200],
    "a_list": lambda: "[]",
    "null": lambda: "null",
    "deep": lambda: "[" * 100_000,
    "other_format": lambda: _with(lambda value: value.update(format=2)),
    "no_device": lambda: _with(lambda value: value.update(device={})),
    "tile_of_text": lambda: _with(lambda value: value["entries"][0].update(default=["64", 64, 4, 2])),
    "tile_of_true": lambda: _with(lambda value: value["entries"][0]["timings"][0].update(tile=[True, 64, 4, 2])),
    "short_tile": lambda: _with(lambda value: value["entries"][0].update(default=[64, 64, 4])),
    "negative_time": lambda: _with(lambda value: value["entries"][0]["timings"][0].update(milliseconds=-1.0)),
    "nan": lambda: _with(lambda value: value["entries"][0]["timings"][0].update(milliseconds=float("nan"))),
    "text_time": lambda: _with(lambda value: value["entries"][0]["timings"][0].update(milliseconds="1")),
    "list_in_bucket": lambda: _with(lambda value: value["entries"][0]["bucket"].update(grid=[])),
    "no_length": lambda: _with(lambda value: value["entries"][0]["bucket"].update(seqlen_q=0)),
    "more_fields": lambda: _with(lambda value: value["entries"][0]["bucket"].update(colour="red")),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_table_is_ignored_where_it_is_found_and_named_where_it_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whose message is the JSON reader's)
        Table.from_text(DAMAGED[name]())
    path = store.own_path(ON)
    assert path is not None
    path.parent.mkdir()
    path.write_text(DAMAGED[name]())
    assert planned()[0] == DEFAULT
    assert "is ignored: it is no table of tuned tiles" in caplog.text
    monkeypatch.setenv(store.VARIABLE, str(path))
    with pytest.raises(OptionError, match=r"CUFLASH_TUNING: got .* no table of tuned tiles"):
        planned()
    monkeypatch.delenv(store.VARIABLE)
    assert store.read(path, ON).entries == {}
    assert f"{path} is replaced: it is no table of tuned tiles" in caplog.text
    assert save_own(entry()) == path, "autotune replaces it"
    assert planned()[0] == FAST


def test_a_file_of_the_users_that_is_no_table_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"output: got .*notes\.txt"):
        store.save(tmp_path / "notes.txt", ON, entry())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    store.save(tmp_path / "a100.json", device.of_arch("sm_90"), entry())
    with pytest.raises(OptionError, match=r"a table of cuflash simulator \(sm_90\); expected one of cuflash simulator \(sm_80\)"):
        store.save(tmp_path / "a100.json", ON, entry())


def _save_many(path: Path, number: int) -> None:
    for seqlen in (64, 128, 256, 512, 1024):
        store.save(path, ON, entry(bucket(seqlen, head_dim=number)))


def test_processes_that_write_at_once_keep_each_others_entries(tmp_path: Path) -> None:
    path, fork = tmp_path / "table.json", multiprocessing.get_context("fork")
    writers = [fork.Process(target=_save_many, args=(path, number)) for number in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(store.read(path, ON).entries) == 15
    assert sorted(other.name for other in tmp_path.iterdir()) == ["table.json"]


def test_who_waited_on_a_removed_lock_leaves_the_next_ones_alone(tmp_path: Path) -> None:
    """A holds, B waits; A ends and removes the file, C makes and holds a new one: B has to see that it holds nothing, and not remove C's."""
    path = tmp_path / "lock"
    first, second = FileLock(path), FileLock(path)
    assert first.try_acquire()
    assert not second.try_acquire()
    first.close()
    third = FileLock(path)
    assert third.try_acquire()
    assert second.try_acquire(), "on the file that is gone"
    assert not second.is_current()
    second.close()
    assert third.is_current()
    third.close()
    assert not path.exists()


def test_two_runs_of_one_bucket_are_one_entry() -> None:
    slower = replace(entry(), timings=(Timing(DEFAULT, 3.0), Timing(Tile(64, 32, 4, 1), 0.7)))
    table = Table(device_facts(ON)).with_entry(entry()).with_entry(slower)
    (merged,) = table.entries.values()
    assert [(each.tile, each.milliseconds) for each in merged.timings[:3]] == [(DEFAULT, 3.0), (Tile(64, 32, 4, 1), 0.7), (FAST, 1.0)]
    of_other_kernels = table.with_entry(entry(sources="0" * 16)).entries[bucket()]
    assert len(of_other_kernels.timings) == 3, "times of other kernels are not mixed in"


# --- Look-up ------------------------------------------------------------------------------------------------------------------------------


def test_without_tables_the_plan_says_what_chose() -> None:
    tile, words = planned()
    assert (tile, words) == (DEFAULT, "predicted by the timing model (predicted_tiles.py)")
    on, x = device.of_arch("sm_90", "gpu"), cuflash.plan(*arrays(), backward=True).problem
    assert make_plan(x, on, backward=True).kernels[-1].tile_by == "measured on an H100 (measured_tiles.py)"
    x = cuflash.plan(*arrays()).problem
    assert make_plan(x, device.of_arch("sm_75", "gpu")).kernels[0].tile_by.startswith("the model of tiles, best of ")
    assert planned(tile=FAST) == (FAST, "pinned")


def test_the_order_of_the_look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned, a named file, exactly the bucket (the user's own, then shipped), the nearest, the default."""
    shipped = store.SHIPPED / "cuflash-simulator-sm-80.json"
    store.save(shipped, ON, entry(bucket(512), OTHER, timings=(Timing(DEFAULT, 2.0), Timing(OTHER, 1.0))))
    assert planned(512) == (OTHER, "timed for seqlen up to 512 x 512 (the shipped table)")
    assert planned(1024) == (OTHER, "timed for seqlen up to 512 x 512, the nearest there is (the shipped table)")
    save_own(entry(bucket(4096)))
    assert planned(1024)[0] == OTHER, "the shipped one is nearer"
    assert planned(2048) == (FAST, "timed for seqlen up to 4096 x 4096, the nearest there is (the user's table)")
    assert planned(512)[0] == OTHER, "exactly the bucket before a nearer owner"
    save_own(entry(bucket(512)))
    assert planned(512) == (FAST, "timed for seqlen up to 512 x 512 (the user's table)")
    assert planned(512, tile=DEFAULT) == (DEFAULT, "pinned")
    named = tmp_path / "named.json"
    store.save(named, ON, entry(bucket(512), Tile(64, 16, 4, 1)))
    monkeypatch.setenv(store.VARIABLE, str(named))
    assert planned(512) == (Tile(64, 16, 4, 1), "timed for seqlen up to 512 x 512 (CUFLASH_TUNING)")
    assert planned(65536)[0] == DEFAULT, "other tables do not count beside a named one, and this is too far"
    monkeypatch.setenv(store.VARIABLE, "off")
    assert planned(512)[0] == DEFAULT
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(OptionError, match=r"absent\.json.*there is no such file"):
        planned(512)


def test_a_later_plan_takes_the_same_tile_whatever_others_write(tmp_path: Path) -> None:
    """So that bits do not change within a process."""
    assert planned()[0] == DEFAULT
    path, elsewhere = store.own_path(ON), tmp_path / "elsewhere.json"
    assert path is not None
    store.save(elsewhere, ON, entry())
    path.parent.mkdir()
    path.write_bytes(elsewhere.read_bytes())
    path.chmod(0o600)
    assert planned()[0] == DEFAULT, "another process has written it"
    store.forget()
    assert planned()[0] == FAST, "autotune asks anew"
    save_own(entry(bucket(2048), OTHER, timings=(Timing(DEFAULT, 2.0), Timing(OTHER, 1.0))))
    assert planned(2048)[0] == OTHER, "this process has written it"


def test_plans_without_tables_are_so_in_one_thread_alone() -> None:
    save_own(entry())
    with ThreadPoolExecutor(1) as pool, store.untuned():
        assert planned()[0] == DEFAULT
        assert pool.submit(planned).result()[0] == FAST
    assert planned()[0] == FAST


def test_the_plan_prints_where_its_tile_is_from() -> None:
    save_own(entry())
    assert "  tile by    forward: timed for seqlen up to 1024 x 1024 (the user's table)" in str(cuflash.plan(*arrays())).splitlines()
    save_own(entry(timer="model"))
    assert planned()[1].startswith("predicted for seqlen"), "a time that no GPU took is not called one"


@pytest.mark.parametrize("change", [{"sources": "0" * 16}, {"nvrtc": "11.0"}], ids=["sources", "compiler"])
def test_stale_entries_are_ignored_and_said_so(change: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    save_own(entry(**change))
    tile, words = planned()
    what = "other kernel sources" if "sources" in change else "NVRTC 11.0"
    assert tile == DEFAULT
    assert words.endswith(f"; the user's table has a tile of {what}, which is ignored: run autotune again")
    planned()
    assert caplog.text.count("run autotune again") == 1, "once"
    save_own(entry(bucket(2048)))
    assert planned()[0] == FAST, "a fresh one that is further away"


def test_an_edit_of_a_header_makes_timings_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "kernels"
    (kernels / "tile").mkdir(parents=True)
    (kernels / "forward_mma.cu").write_text('#include "tile/load.cuh"\n')
    (kernels / "merge_table.cu").write_text("// alone\n")
    (kernels / "tile" / "load.cuh").write_text('#include "missing.cuh"\n')
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", str(kernels))
    before = fingerprint.of_source("forward_mma.cu"), fingerprint.of_source("merge_table.cu")
    (kernels / "tile" / "load.cuh").write_text("// edited\n")
    after = fingerprint.of_source("forward_mma.cu"), fingerprint.of_source("merge_table.cu")
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_an_illegal_tile_of_a_table_is_ignored() -> None:
    save_own(entry(tile=Tile(48, 64, 2, 1)))
    tile, words = planned()
    assert tile == DEFAULT
    assert words.endswith("Tile(tile_q=48, tile_kv=64, num_warps=2, num_stages=1), which is not legal here and is ignored")


def test_a_table_without_the_default_or_with_nothing_faster_keeps_the_default() -> None:
    save_own(entry(timings=(Timing(FAST, 1.0),)))
    assert planned()[0] == DEFAULT, "how much is gained is not known"
    save_own(entry(timings=(Timing(DEFAULT, 1.0), Timing(FAST, 1.0))))
    assert planned()[0] == DEFAULT


def test_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [length_bucket(n) for n in (0, 1, 2, 3, 64, 65, 1000, 1024, 1025, 10**6)] == [1, 1, 2, 4, 64, 128, 1024, 1024, 2048, 65536]
    near = bucket(1024).distance
    assert near(bucket(1024)) == 0
    assert near(bucket(4096)) == 4
    assert near(bucket(512, dtype="bfloat16")) == 2.5, "the kernels of both 16-bit types are alike"
    assert near(bucket(8192)) is None
    for seqlen in (2, 16, 64):
        assert bucket(1024, seqlen_q=1).distance(bucket(1024, seqlen_q=seqlen)) is None, "decoding"
    windows = [bucket(1024, features=("window",), window=keys) for keys in (64, 128)]
    assert windows[0].distance(windows[1]) == 1
    assert str(windows[0]) == "forward, float16, head_dim 64, seqlen up to 1024, full, window up to 64"
    for change in (
        {"causal": True},
        {"features": ("window",)},
        {"grid": "few"},
        {"dtype": "float32"},
        {"head_dim": 128},
        {"lengths": "varlen"},
    ):
        assert near(bucket(1024, **change)) is None, change
    x = arrays(100, batch=1)
    mask = numpy.zeros((100, 100), bool)
    problem = cuflash.plan(*x, attn_mask=mask, window=(5, 5), is_causal=True).problem
    case = KernelCase(FORWARD, "float16", 64, features=problem.features.kinds)
    assert tuned_tiles.bucket_of(case, problem, ON) == bucket(
        128, causal=True, features=("attn_mask of bool", "window"), grid="few", window=8
    )
    packed = cuflash.varlen_plan(numpy.zeros((50, 8, 64), numpy.float16), *[numpy.zeros((90, 8, 64), numpy.float16)] * 2,
        numpy.array([0, 20, 50], numpy.int32), numpy.array([0, 20, 90], numpy.int32), 30, 70).problem  # fmt: skip
    of = tuned_tiles.bucket_of(KernelCase(FORWARD, "float16", 64), packed, ON)
    assert (of.lengths, of.seqlen_q, of.seqlen_kv) == ("varlen", 32, 128)
    assert str(of) == "forward, float16, head_dim 64, seqlen up to 32 x 128, full, varlen, few blocks"


def test_warmup_compiles_the_tiles_of_all_lengths() -> None:
    save_own(entry(bucket(512)), entry(bucket(8192), timings=(Timing(DEFAULT, 2.0), Timing(OTHER, 1.0))), entry(bucket(64, causal=True)))
    kernels = list(offline_kernels(ON, dtype="float16", head_dim=64, backward=False))
    assert {kernel.tile for kernel in kernels} == {DEFAULT, FAST, OTHER}
    with_tiles = {kernel.config for kernel in kernels}
    for seqlen in (512, 8192):
        assert cuflash.plan(*arrays(seqlen)).kernels[0].config in with_tiles
    pinned = offline_kernels(ON, dtype="float16", head_dim=64, backward=False, tile=FAST)
    assert [kernel.tile for kernel in pinned] == [FAST]
    masked = offline_kernels(ON, dtype="float16", head_dim=64, backward=False, features=FeatureSet(window=True))
    assert len(list(masked)) == 1


def test_a_named_table_serves_another_card_of_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So that a machine without the GPU can compile ahead for it, and all ranks of a job can share one file."""
    card = replace(device.of_arch("sm_80", "gpu"), name="Card")
    store.save(tmp_path / "card.json", card, entry())
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "card.json"))
    problem = cuflash.plan(*arrays()).problem
    assert make_plan(problem, card).kernels[0].tile == FAST
    assert make_plan(problem, device.of_arch("sm_80", "gpu")).kernels[0].tile == FAST
    assert make_plan(problem, ON).kernels[0].tile == DEFAULT, "the simulator is no GPU"
    assert caplog.text.count("CUFLASH_TUNING names a table of Card (gpu, sm_80)") == 1
    for _ in range(2):
        assert make_plan(problem, device.of_arch("sm_86", "gpu")).kernels[0].tile != FAST
    assert caplog.text.count("which has no tile for sm_86") == 1, "once"
    store.save(tmp_path / "model.json", ON, entry())
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "model.json"))
    assert make_plan(problem, ON).kernels[0].tile == FAST
    assert make_plan(problem, card).kernels[0].tile != FAST, "what a model predicted does not count on a GPU"


def test_the_users_table_must_be_the_users(tmp_path: Path) -> None:
    path = save_own(entry())
    path.chmod(0o666)
    assert planned()[0] == (DEFAULT if os.name == "posix" else FAST)


def test_what_there_is_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.summary(ON) == "none: python -m cuflash autotune makes them"
    save_own(entry(), entry(bucket(64)))
    assert store.summary(ON) == "the user's table: 2 buckets"
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "absent.json"))
    assert store.summary(ON).startswith("CUFLASH_TUNING: got ")
    monkeypatch.setenv(store.VARIABLE, "off")
    assert store.summary(ON) == "none (CUFLASH_TUNING=off)"
    assert ("tuned tiles", [(device.default().name, store.summary(device.default()))]) in environment.facts()


# --- Few queries --------------------------------------------------------------------------------------------------------------------------


def cache_plan(seqlen: int = 2, **options: Any) -> cuflash.Plan:
    query = numpy.zeros((3, seqlen, 8, 64), numpy.float16)
    keys, values = numpy.zeros((2, 3, 900, 2, 64), numpy.float16)
    return cuflash.kvcache_plan(query, keys, values, cache_seqlens=numpy.array([900, 5, 0], "int32"), **options)


def test_a_call_with_a_cache_takes_a_tuned_tile(own_folder: Path) -> None:
    """Of the kernel for few queries, whose rows are those of all heads that share a key head; how many splits there are follows from the tile."""
    kernel = next(kernel for kernel in cache_plan().kernels if kernel.name == "forward_split")
    found = tuned_tiles.bucket_of(kernel.case, cache_plan().problem, ON)
    assert (found.kernel, found.lengths, found.seqlen_q, found.seqlen_kv, found.grid) == ("forward_split", "seqlens_kv", 8, 1024, "few")
    tile = Tile(16, 128, 4, 2)
    assert tile != kernel.tile
    made = entry(found, tile, default=kernel.tile, sources=fingerprint.of_source("forward_split_mma.cu"))
    made = replace(made, timings=(Timing(kernel.tile, 2.0, 2.0, 2.0, 9), Timing(tile, 1.0, 1.0, 1.0, 9)))
    store.save(own_folder / "own" / f"{store.slug(ON.name)}.json", ON, made)
    store.forget()
    plan = cache_plan()
    (taken,) = [kernel for kernel in plan.kernels if kernel.name == "forward_split"]
    assert (taken.tile, taken.tile_by) == (tile, "timed for seqlen up to 8 x 1024 (the user's table)")
    pinned = next(kernel for kernel in cache_plan(tile=tile).kernels if kernel.name == "forward_split")
    assert (taken.splits, taken.num_blocks) == (pinned.splits, pinned.num_blocks)
    assert plan.workspace == cache_plan(tile=tile).workspace
    invariant = next(kernel for kernel in cache_plan(batch_invariant=True).kernels if kernel.name == "forward_split")
    assert invariant.tile == kernel.tile, "bits of a row that must not depend on the batch"
