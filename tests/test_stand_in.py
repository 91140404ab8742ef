"""What runs on a GPU only, without one: in processes that import the stand-in (tests/stand_in) as CuPy, where kernels run on the simulator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import share_simulator

pytest.importorskip("cupy")
pytest.importorskip("xdist")

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
NOT_OURS = (
    "CUFLASH_SIMULATOR_ARCH",
    "CUFLASH_COMPILE",
    "CUFLASH_TEST_DEADLINE",
    "PYTEST_ADDOPTS",
    "PYTEST_XDIST_WORKER",
    "PYTEST_XDIST_WORKER_COUNT",
)


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds the stand-in's `cupy` and `torch` first. Its kernels are in the cache of these tests, under names of their own."""
    path = os.pathsep.join([str(ROOT / "tests" / "stand_in"), str(ROOT), str(BENCHMARKS)])
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    return {**inherited, "PYTHONPATH": path, "CUFLASH_SIMULATOR_THREADS": "1", "PYTHON": sys.executable, **more}


def on_stand_in(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment(**more),
        timeout=600,  # nothing but a hang takes that long, however busy the machine
    )


def pytest_on_stand_in(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return on_stand_in("-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=short", *arguments, **more)


def lost_once(tmp_path: Path, launch: int) -> dict[str, str]:
    """The first process that gets so far loses its GPU with that launch."""
    return {"STAND_IN_LOSS": f"{launch} {tmp_path / 'lost'}"}


# --- cuflash ------------------------------------------------------------------------------------------------------------------------------


def test_the_branch_of_gpus() -> None:
    """Forward and backward, bfloat16, `out`, streams, devices, threads, lengths, seeds, features, graphs, and a launch that fails."""
    done = pytest_on_stand_in(ROOT / "tests" / "test_graphs.py", ROOT / "tests" / "stand_in" / "gpu_branch.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b28 passed", done.stdout), done.stdout


def test_the_stand_in_refuses_machine_code(tmp_path: Path) -> None:
    """A cubin that real NVRTC made must not pass for one of its own."""
    (tmp_path / "real.cubin").write_bytes(b"\x7fELF")
    done = on_stand_in(
        "-c", "import cupy, pathlib, sys; cupy.cuda.function.Module().load(pathlib.Path(sys.argv[1]).read_bytes())", tmp_path / "real.cubin"
    )
    assert "give the stand-in a cache of its own" in done.stderr


def test_kernels_compiled_ahead_are_found(tmp_path: Path) -> None:
    """`warmup --into` on one machine, a call that must not compile on another."""
    share_simulator(tmp_path)
    options = ("--arch", "sm_90", "--head-dim", "32", "--dtype", "float16", "--causal", "--forward-only")
    made = on_stand_in("-m", "cuflash", "warmup", *options, "--into", tmp_path, CUFLASH_DECODE="0")
    assert "1 kernels are in the cache, 1 compiled now" in made.stdout, made.stderr
    program = (
        "import cupy, cuflash; x = cupy.zeros((1, 20, 2, 32), 'float16')\n"
        "cuflash.scaled_dot_product_attention(x, x, x, is_causal=True); print('ran', cupy.cuda.launches[0].name)\n"
        "cuflash.scaled_dot_product_attention(x, x, x)"
    )
    done = on_stand_in("-c", program, CUFLASH_CACHE_DIR=str(tmp_path), CUFLASH_COMPILE="forbid")
    assert done.stdout == "ran forward_mma\n", done.stderr
    assert "CompilationForbiddenError" in done.stderr, "the other kernel was not compiled"


# --- Scripts that run on a GPU ------------------------------------------------------------------------------------------------------------


def test_small_calls_are_judged() -> None:
    done = on_stand_in(BENCHMARKS / "sanitize.py", "--small", "--check", "--cases", "d7 |packed.*grad_lse")
    right, cases = map(int, re.findall(r"SUMMARY: (\d+) of (\d+) cases right, 0 wrong, 0 not run", done.stdout)[0])
    assert right == cases > 0, done.stdout + done.stderr
    assert done.returncode == 0


def test_streams_graphs_threads_and_devices() -> None:
    done = on_stand_in(BENCHMARKS / "sanitize.py", "--small", "--streams")
    assert done.returncode == 0, done.stdout + done.stderr
    for check in ("four threads", "another stream, CuPy", "CUDA graph, CuPy", "second GPU"):
        assert re.search(rf"^{check} +ok$", done.stdout, re.M), done.stdout


def test_calls_that_are_cut_off_say_how_many_there_were() -> None:
    done = on_stand_in(BENCHMARKS / "sanitize.py", "--small", "--seconds", "0", "--cases", "d64 s70x100 b1 h1 aligned is_causal|d128")
    assert "out of time after 0 of 2 cases" in done.stdout, done.stdout + done.stderr
    assert "SUMMARY: 0 of 2 cases, 0 failed" in done.stdout
    assert done.returncode == 1
    whole = on_stand_in(BENCHMARKS / "sanitize.py", "--small", "--cases", "d64 s70x100 b1 h1 aligned is_causal|d128")
    assert "SUMMARY: 2 of 2 cases, 0 failed" in whole.stdout, whole.stdout + whole.stderr
    assert whole.returncode == 0


def test_libraries_are_timed_by_events(tmp_path: Path) -> None:
    done = on_stand_in(BENCHMARKS / "bench_attention.py", "--small", "--quick", "--seconds", "60", "--output", tmp_path)
    assert "SUMMARY: 2 of 2 cases timed, 0 wrong results of cuflash" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
    assert ",events," in (tmp_path / "attention.csv").read_text()


def test_pytest_times_by_events(tmp_path: Path) -> None:
    """Each pass behind other work in the queue."""
    written = tmp_path / "attention.json"
    chosen = "s32 and float32 and cuflash and (forward or both)"
    options = ("--benchmark-enable", f"--benchmark-json={written}", "-k", chosen, BENCHMARKS / "bench_attention.py")
    done = pytest_on_stand_in(*options, CUFLASH_BENCH_SMALL="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["library"], row["pass"]): row for row in (each["extra_info"] for each in json.loads(written.read_text())["benchmarks"])}
    assert set(rows) == {("cuflash", direction) for direction in ("forward", "forward_lse", "both")}
    for row in rows.values():
        assert (row["gpu"], row["timer"], row["repeats"], row["measured"]) == ("Stand-in 0", "events", 2, True)
        assert row["milliseconds"] > 0
        assert row["relative_error"] < 2e-5


@pytest.mark.parametrize("mode", [("--host",), ("--one", "float16", "64", "32", "causal", "backward")], ids=lambda mode: mode[0])
def test_other_modes(mode: tuple[str, ...], tmp_path: Path) -> None:
    done = on_stand_in(BENCHMARKS / "bench_attention.py", "--small", *mode, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    if mode == ("--host",):
        calls = {(row["arrays"], row["call"]) for row in json.loads((tmp_path / "host.json").read_text())}
        assert calls == {("cupy", f"cuflash {which}") for which in ("forward", "forward with LSE", "backward")}


def test_facts_are_there_although_ceilings_fail(tmp_path: Path) -> None:
    program = (
        "import sys, types; from bench import facts, machine\n"
        "def fail(machine): raise RuntimeError('cudaErrorLaunchFailure')\n"
        "facts.ceilings = fail\n"
        "facts.facts(machine.Machine(False), types.SimpleNamespace(output=__import__('pathlib').Path(sys.argv[1])))"
    )
    done = on_stand_in("-c", program, tmp_path)
    assert done.returncode == 1
    assert "cudaErrorLaunchFailure" in done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "facts.json").read_text())
    assert found["gpu"] == "Stand-in 0"
    assert found["device"]["arch"] == "sm_90"
    assert "ceilings" not in found


# --- A GPU that is lost -------------------------------------------------------------------------------------------------------------------


def test_the_judge_goes_on_behind_a_lost_gpu(tmp_path: Path) -> None:
    """In a new process, with the case behind the one that lost it."""
    cases = "prefix=90|d192|d7 "
    listed = on_stand_in(BENCHMARKS / "sanitize.py", "--small", "--check", "--cases", cases, "--count")
    done = on_stand_in(BENCHMARKS / "sanitize.py", "--small", "--check", "--cases", cases, **lost_once(tmp_path, 6))
    count = int(listed.stdout)
    assert count >= 2
    assert done.returncode == 1
    verdicts = re.findall(r"^(WRONG|ok) ", done.stdout, re.M)
    assert verdicts == ["WRONG", *["ok"] * (count - 1)], done.stdout + done.stderr
    assert "cudaErrorLaunchFailure" in done.stdout
    assert f"SUMMARY: {count - 1} of {count} cases right, 1 wrong, 0 not run" in done.stdout


def test_the_comparison_goes_on_behind_a_lost_gpu(tmp_path: Path) -> None:
    done = on_stand_in(
        BENCHMARKS / "bench_attention.py", "--small", "--quick", "--seconds", "60", "--output", tmp_path, **lost_once(tmp_path, 7)
    )
    assert done.returncode == 1
    assert done.stdout.count("another process goes on behind this case") == 1, done.stdout + done.stderr
    assert "SUMMARY: 2 of 2 cases timed, the first 1 by processes that have lost their GPU, 0 wrong" in done.stdout
    rows = (tmp_path / "attention.csv").read_text()
    assert "does not run: CUDARuntimeError: cudaErrorLaunchFailure" in rows
    assert re.search(r",backward,float32,.*,events,", rows), "the case behind it"


def test_pytest_goes_on_behind_a_lost_gpu(tmp_path: Path) -> None:
    """A process of pytest-xdist that has lost its GPU ends, and the tests behind are run by another."""
    done = pytest_on_stand_in("-n", "1", "-k", "new_values or key_lengths", ROOT / "tests" / "test_graphs.py", **lost_once(tmp_path, 3))
    assert done.returncode == 1
    assert "replacing crashed worker" in done.stdout, done.stdout + done.stderr
    passed = set(re.findall(r"^PASSED tests/test_graphs.py::(\w+)", done.stdout, re.M))
    failed = set(re.findall(r"^FAILED tests/test_graphs.py::(\w+)", done.stdout, re.M))
    assert failed == {"test_new_values_in_the_same_memory"}, done.stdout
    assert passed == {"test_key_lengths_are_read_by_each_replay"}, done.stdout


def test_tests_behind_the_deadline_are_skipped() -> None:
    done = pytest_on_stand_in("-m", "gpu", ROOT / "tests" / "test_graphs.py", CUFLASH_TEST_DEADLINE="1")
    assert done.returncode == 0
    assert "7 skipped" in done.stdout
    assert "out of time" in done.stdout
