"""No file of the cache makes the simulator's core crash: programs with any numbers in any array, each with the right checksum."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import share_simulator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_forged_programs_are_refused_reported_or_run(tmp_path: Path) -> None:
    """In a process of its own, which a crash would end. 6,600 were tried; more: python tests/simulator/forging.py FIRST COUNT."""
    share_simulator(tmp_path)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))
    environment = {**os.environ, "PYTHONPATH": paths, "CUFLASH_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "forging.py"), "0", "200"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"mutant {result.stdout.split()[-1:]}: {result.stderr}"
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert min(outcomes.values()) > 10
