"""Rehearsals of benchmarks/validate_gpu.sh: on the simulator, and on the stand-in of a GPU. The scripts that it calls have tests of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from test_stand_in import ROOT, environment

from cuflash.jit import cache
from cuflash.simulator import build

pytest.importorskip("cupy")

SCRIPT = ROOT / "benchmarks" / "validate_gpu.sh"


def validate(*arguments: str | Path, stand_in: bool, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the script, with the kernels and the simulator's core of these tests."""
    build.library_path()
    folder = cache.directory()
    assert folder is not None
    own = environment(CUFLASH_CACHE_DIR=str(folder.parent), **more)
    if not stand_in:
        del own["PYTHONPATH"]
    return subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False, env=own, timeout=300)


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """step -> (exit code, what the table says of it)."""
    return {step: (code, said) for step, code, said in re.findall(r"^(\w+) +(\d+|–) +[\d–]+  (.*)$", done.stdout, re.M)}


@pytest.mark.parametrize(
    ("preset", "steps"),
    [
        ("--first", "facts compile smoke streams simulator pytest constants bench"),
        ("--second", "sanitize features tiles autotune host profile figures"),
    ],
    ids=["first", "second"],
)
def test_presets_without_time_say_so(preset: str, steps: str, tmp_path: Path) -> None:
    done = validate(preset, "--dry-run", "--seconds", "1", tmp_path, stand_in=False)
    assert done.returncode == 1
    assert summary(done) == dict.fromkeys(steps.split(), ("–", "no time left")), done.stdout + done.stderr
    assert done.stdout.endswith((tmp_path / "summary.txt").read_text())


def test_the_second_preset_has_time_to_spare() -> None:
    """Its steps run one after the other: limits that add up to the total would leave nothing for what starting and ending them takes."""
    text = SCRIPT.read_text()
    limits = {step: int(seconds) for step, seconds in re.findall(r"^(\w+) +(\d+) [-+] ", text, re.M)}
    (total,) = re.findall(r"--second\) total=(\d+)", text)
    (steps,) = re.findall(r'^SECOND="(.*)"$', text, re.M)
    assert sum(limits[step] for step in steps.split()) <= int(total) - 20


def test_a_rehearsal_on_the_simulator(tmp_path: Path) -> None:
    """Two steps that run alone and one that may have others beside it; the archive has what they wrote."""
    archive = tmp_path / "out.tar.gz"
    done = validate("--dry-run", "--archive", archive, tmp_path / "out", "facts", "streams", "host", stand_in=False)
    told = summary(done)
    assert {step: code for step, (code, _) in told.items()} == dict.fromkeys(("facts", "streams", "host"), "0"), done.stdout + done.stderr
    assert done.returncode == 0
    assert told["streams"][1] == "0 of 1 checks wrong"
    with tarfile.open(archive) as packed:
        names = set(packed.getnames())
    assert {"out/summary.txt", "out/facts.json", "out/logs/streams.log", "out/results/simulator/host.json"} <= names


def test_autotune_writes_a_table_of_the_gpu(tmp_path: Path) -> None:
    """On the stand-in; what is not done within the limit is left out."""
    done = validate("--small", "--seconds", "26", tmp_path, "autotune", stand_in=True)
    code, said = summary(done)["autotune"]
    assert code == "0", done.stdout + done.stderr
    assert re.fullmatch(r"1 kernels tuned, 0 of \d+ tiles failed", said)
    assert json.loads((tmp_path / "results" / "gpu" / "tuning.json").read_text())["device"]["name"] == "Stand-in 0"


def test_a_rehearsal_on_the_stand_in(tmp_path: Path) -> None:
    done = validate("--small", tmp_path, "facts", "streams", "bench", stand_in=True)
    told = summary(done)
    assert json.loads((tmp_path / "facts.json").read_text())["gpu"] == "Stand-in 0", done.stdout + done.stderr
    assert told["streams"] == ("0", "0 of 6 checks wrong")
    assert told["bench"] == ("0", "2 of 2 cases timed, 0 wrong results of cuflash")
    assert (tmp_path / "results" / "gpu" / "attention.csv").is_file()
    assert not (ROOT / "benchmarks" / "results" / "gpu").exists()


def test_sanitizers_that_are_cut_off_count_what_there_was(tmp_path: Path) -> None:
    """A step fails unless every tool has seen every case. The tool is one that does nothing but run its program."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\nwhile [ "${1#*python}" = "$1" ]; do shift; done\nexec "$@"\n')
    sanitizer.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = validate("--small", "--seconds", "22", tmp_path / "out", "sanitize", stand_in=True, PATH=path)
    code, said = summary(done)["sanitize"]
    if said == "no time left":
        pytest.skip("this machine takes seconds to begin a step")
    counts = re.findall(r"(\w+) (\d+) \((\d+) of (\d+) cases\)", said)
    assert [tool for tool, *_ in counts] == ["memcheck", "racecheck", "initcheck", "synccheck"], done.stdout + done.stderr
    assert {of for *_, of in counts} == {"10"}
    assert all((status == "0") == (ran == of) for _, status, ran, of in counts), said
    assert (code == "0") == all(ran == of for _, _, ran, of in counts)
