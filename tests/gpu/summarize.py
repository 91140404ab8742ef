"""Calibration files (see calibration.py) as a Markdown table, and as one small file.

    python tests/gpu/summarize.py out*.json                        # the table of docs/calibration.md
    python tests/gpu/summarize.py out*.json --keep kept.json.gz    # also what is worth keeping

Kept are all counts, every element that differs (4096 of them at most), and whole arrays of up to 64 KB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from calibration import decode, encode, unequal

WHOLE, PLACES = 1 << 16, 4096


def row(case: dict[str, Any]) -> str:
    if "different" not in case:
        outcome = "refused by both" if case.get("refused") else case.get("error") or case.get("simulator_error", "")
        return f"| {case['case']} | | | | {outcome} |"
    return f"| {case['case']} | {case['of']} | {case['different']} | {case.get('max_ulps', '')} | |"


def trimmed(case: dict[str, Any]) -> dict[str, Any]:
    """The case with only the elements that differ if its arrays are large."""
    if "inputs" not in case or decode(case["gpu"]).nbytes <= WHOLE:
        return case
    gpu, simulator, *inputs = (decode(entry).reshape(-1) for entry in (case["gpu"], case["simulator"], *case["inputs"]))
    places = numpy.flatnonzero(unequal(gpu, simulator))
    places = places[:: max(1, -(-places.size // PLACES))]
    kept = {key: value for key, value in case.items() if key not in ("gpu", "simulator", "inputs")}
    kept |= {"places": encode(places), "gpu": encode(gpu[places]), "simulator": encode(simulator[places])}
    return kept | {"inputs_at_places": [encode(array[places]) for array in inputs if array.size == gpu.size]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    cases = [case for path in options.files for case in json.loads(path.read_text())["cases"]]
    cases.sort(key=lambda case: case["case"])
    print("| case | elements | differ | largest difference, ulp | |\n|---|---|---|---|---|")
    for case in cases:
        print(row(case))
    if options.keep:
        options.keep.write_bytes(gzip.compress(json.dumps({"cases": [trimmed(case) for case in cases]}).encode(), mtime=0))


if __name__ == "__main__":
    main()
