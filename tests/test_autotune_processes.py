"""The autotuner in real processes: candidates that crash, are wrong or do not compile on the simulator; commands; signals; the stand-in of a GPU."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from test_autotune import ON, ROOT, SMALL, own_table, small_tasks
from test_stand_in import environment, on_stand_in

import cuflash
from cuflash.__main__ import main
from cuflash.cli.samples import numpy_call
from cuflash.errors import OptionError, SetupError, TuningError
from cuflash.jit import compiler, disassembly
from cuflash.planning import tile_choice
from cuflash.problem.tile import Tile
from cuflash.runtime import calls
from cuflash.tuned import store
from cuflash.tuner import api, described_calls, session, tasks, worker
from cuflash.tuner.tasks import Task

TIMED = pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason="the timing model reads what nvdisasm says")


pytestmark = pytest.mark.usefixtures(own_table.__name__)


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
    workers.compile_ahead([(task, tile) for tile in task.tiles])
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


def answering(program: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> worker.Workers:
    """Workers whose process gets as far as a candidate and then runs a program."""
    made = worker.Workers(ON, ahead=1, **options)
    start = f"import os, signal, time; from multiprocessing.connection import Connection; from cuflash.tuner.worker import READY, Trouble; {program}"

    def running() -> Any:
        ours, theirs = worker.Pipe()
        made._errors = tempfile.TemporaryFile()  # noqa: SIM115
        code = start.replace("CONNECTION", f"Connection({theirs.fileno()})")
        made._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=(theirs.fileno(),), stderr=made._errors, cwd=ROOT)
        theirs.close()
        made._connection = ours
        if "send(READY)" in program:
            ours.poll(60)  # what starting takes is not what is waited for
        return ours

    monkeypatch.setattr(made, "_running", running)
    return made


def test_only_what_happens_after_the_default_is_a_candidates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = small_tasks(count=2)
    default, other = task.tiles

    def found(program: str, tile: Tile = other) -> str:
        workers = answering(program, monkeypatch)
        try:
            return workers.evaluate(task, tile, None).note
        finally:
            workers.close()

    assert found("c = CONNECTION; c.send(READY); os._exit(3)") == "crashed: exit status 3"
    assert found("c = CONNECTION; c.send(READY); os.kill(os.getpid(), signal.SIGSEGV)") == "crashed: signal 11"
    for program, words in (
        ("os._exit(3)", "ended before the default tile's result: exit status 3"),
        ("raise RuntimeError('no GPU')", "ended before the default tile's result: exit status 1; RuntimeError: no GPU"),
        (
            "c = CONNECTION; c.send(READY); os.kill(os.getpid(), signal.SIGKILL)",
            "was ended by signal 9: by the system, if memory was short",
        ),
        ("c = CONNECTION; c.send(READY); c.send(Trouble('OutOfMemoryError: 3 GiB'))", "OutOfMemoryError: 3 GiB"),
    ):
        with pytest.raises(TuningError, match=re.escape(words)):
            found(program)
    with pytest.raises(TuningError, match=r"The default tile of forward, Tile\(.*\), cannot be timed: crashed: exit status 3"):
        found("c = CONNECTION; c.send(READY); os._exit(3)", default)
    with pytest.raises(SetupError, match="no CuPy"):
        found("CONNECTION.send(Trouble('no CuPy', True))")


def test_a_candidate_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = small_tasks(count=2)
    hang = "time.sleep(60)"
    workers = answering(f"c = CONNECTION; c.send(READY); {hang}", monkeypatch, answer_timeout=0.1)
    assert workers.evaluate(task, task.tiles[1], None).note == "hung: no answer for 0 s"
    assert workers._process is None
    workers = answering(f"c = CONNECTION; {hang}", monkeypatch, answer_timeout=0.1)
    with pytest.raises(TuningError, match="The default tile's result does not come: no answer for 0 s"):
        workers.evaluate(task, task.tiles[1], None)
    monkeypatch.setattr(worker, "GRACE", 0.1)
    workers = answering(f"c = CONNECTION; {hang}", monkeypatch)
    with pytest.raises(session.OutOfTime):
        workers.evaluate(task, task.tiles[1], None, 0.0)
    workers.close()


def test_a_compiler_that_takes_too_long_is_no_verdict(monkeypatch: pytest.MonkeyPatch, workers: worker.Workers) -> None:
    (task,) = small_tasks(count=2)
    monkeypatch.setattr(worker, "COMPILE_TIMEOUT", 0.0)
    workers._compiled[task, task.tiles[1]] = [concurrent.futures.Future()]
    assert workers.evaluate(task, task.tiles[1], None).note == "took long to compile: more than 0 s"
    monkeypatch.setattr(worker, "GRACE", 0.0)
    workers._compiled[task, task.tiles[1]] = [concurrent.futures.Future()]
    with pytest.raises(session.OutOfTime):
        workers.evaluate(task, task.tiles[1], None, 0.0)


@TIMED
def test_the_process_has_a_group_but_no_session_of_its_own(workers: worker.Workers) -> None:
    """Ctrl-C reaches the tuner alone; whoever ends the tuner's session ends its process."""
    (task,) = small_tasks(count=1)
    workers.evaluate(task, task.tiles[0], None)
    assert workers._process is not None
    pid = workers._process.pid
    assert os.getpgid(pid) == pid
    assert os.getsid(pid) == os.getsid(0)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has such a signal")
def test_the_process_never_outlives_the_one_that_tunes() -> None:
    """Even if it hangs, so that it does not see that nobody waits for its answer: here it is stopped."""
    program = (
        "import os, signal, test_autotune; from cuflash.tuner.worker import Workers\n"
        "workers = Workers(test_autotune.ON, ahead=1); (task,) = test_autotune.small_tasks(count=1)\n"
        "workers.evaluate(task, task.tiles[0], None); pid = workers._process.pid; os.kill(pid, signal.SIGSTOP); print(pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=variables, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    status, deadline = Path("/proc") / done.stdout.strip() / "stat", time.monotonic() + 20

    def is_alive() -> bool:
        try:
            return status.read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    while is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive()


def test_what_is_missing_ends_the_run(monkeypatch: pytest.MonkeyPatch, workers: worker.Workers) -> None:
    """And is not noted as the fault of each candidate."""

    def fetch(request: Any) -> Any:
        raise SetupError("CuPy is missing")

    monkeypatch.setattr(worker.cache, "fetch", fetch)
    (task,) = small_tasks(count=1)
    workers.compile_ahead([(task, task.tiles[0])])
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


def test_options_that_cannot_be_are_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "Session", None)
    (tmp_path / "notes.txt").write_text("mine")
    for options, words in (
        (("--budget", "0"), "budget: got 0.0; expected a positive number of minutes"),
        (("--output", str(tmp_path / "notes.txt")), "is no table of tuned tiles"),
        (("--like", "--seqlen 40", "--seqlen", "64", "--classes", "causal"), "--like: got --seqlen, --classes beside it; expected"),
        (
            ("--like", "--seqlen 1 --cache --page-size 16"),
            "--like: got --cache; expected a call without a cache. Calls with a cache take the tile of",
        ),
    ):
        status, out, err = command("autotune", *options, capsys=capsys)
        assert (status, out) == (2, "")
        assert err.startswith("cuflash: "), "one line, and none that says what will be tuned"
        assert words in err


def test_both_passes_of_one_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    passes: list[Any] = []
    monkeypatch.setattr(api, "tune", lambda wanted, on, **options: passes.append(options["passes"]) or api.Tuned((), Path("x"), "done"))
    like = "--seqlen 40 --head-dim 16"
    for options in (("--like", like), ("--like", f"{like} --pass backward"), ("--like", like, "--pass", "forward", "backward")):
        assert command("autotune", *options, capsys=capsys)[0] == 0
    assert passes == [["forward"], ["backward"], ["forward", "backward"]]


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
    """Events, flushed caches, a process that loses its GPU with the first launch of a candidate, and a table that the next process takes."""
    table = tmp_path / "table.json"
    program = (
        "import sys; from cuflash.tuner import tasks, measuring; tasks.EFFORTS['quick'] = 2; measuring.MOST_LAUNCHES = 3\n"
        "from cuflash.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    options = ("--like", "--seqlen 40 --head-dim 16 --causal --pass backward", "--effort", "quick", "--output", str(table))
    done = on_stand_in("-c", program, "autotune", *options, STAND_IN_LOSS=f"kernel:6 {tmp_path / 'lost'}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(table.read_text())
    assert found["device"]["name"] == "Stand-in 0"
    timings = {entry["bucket"]["kernel"]: entry["timings"] for entry in found["entries"]}
    assert [len(each) for each in timings.values()] == [3, 3, 3]
    notes = [timing["note"] for each in timings.values() for timing in each]
    assert sum(note.startswith("crashed: ") for note in notes) == 1, notes
    assert all(entry["timer"] == "events" and entry["driver"] for entry in found["entries"])
    assert "not taken: backward_dkdv" in done.stdout
    other = tmp_path / "other.json"
    done = on_stand_in("-c", program, "autotune", *options[:-1], str(other), STAND_IN_LOSS=f"2 {tmp_path / 'lost too'}")
    assert done.returncode != 0
    assert "cudaErrorLaunchFailure" in done.stderr
    assert not other.exists(), "the default tile's result is no candidate's to give"


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
