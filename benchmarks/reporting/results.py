"""What lies in a folder of results: rows of attention.csv, or of the JSON that pytest-benchmark writes, tiles.csv, predicted.csv, host.json, facts.json.

Of a case that was timed several times, the last time counts. What is missing is left out.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]
Key = tuple[str, int, bool, int, str]
"""dtype, head_dim, causal, seqlen, pass."""

ORDER = (
    "cuflash", "torch flash", "torch cudnn", "torch efficient", "torch flex", "torch math", "jax cudnn", "numpy formula", "torch varlen", "flash-attn", "triton",
    "flashinfer", "cupy naive", "numpy naive",
)  # fmt: skip
COLORS = (
    "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f", "#ff7f0e", "#bcbd22", "#17becf", "#e377c2", "#393b79", "#637939", "#843c39", "#843c39",
)  # fmt: skip


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def library(row: Row) -> str:
    return row["library"] if row["library"] == row["backend"] else f"{row['library']} {row['backend']}"


def rates(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """For each plain case the last timed row of each library."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row["milliseconds"] and not row["case"]:
            key = (row["dtype"], int(row["head_dim"]), row["causal"] == "1", int(row["seqlen"]), row["pass"])
            found.setdefault(key, {})[library(row)] = row
    return found


def of_pytest(path: Path) -> list[Row]:
    """Rows of attention.csv that pytest-benchmark wrote as JSON; other benchmarks of the file are left out."""
    if not path.exists():
        return []
    told = [benchmark["extra_info"] for benchmark in json.loads(path.read_text())["benchmarks"]]
    return [{name: "" if x is None else str(x) for name, x in info.items()} for info in told if "library" in info]


def named(found: dict[Key, dict[str, Row]]) -> list[str]:
    present = {name for group in found.values() for name in group}
    return [name for name in ORDER if name in present] + sorted(present - set(ORDER))


def tile_groups(rows: list[Row]) -> dict[tuple[str, str, int, bool], list[Row]]:
    groups: dict[tuple[str, str, int, bool], dict[str, Row]] = {}
    for row in rows:
        if row["milliseconds"]:
            groups.setdefault((row["kernel"], row["dtype"], int(row["head_dim"]), row["causal"] == "1"), {})[row["rank"]] = row
    return {key: list(group.values()) for key, group in groups.items()}


def lead(group: dict[str, Row]) -> tuple[float, str] | None:
    """cuflash's rate over the fastest other library's of equal exactness, and which that is; None without both."""
    others = {name: float(row["tflops"]) for name, row in group.items() if name != "cuflash" and not row["note"]}
    if "cuflash" not in group or not others:
        return None
    best = max(others, key=lambda name: others[name])
    return float(group["cuflash"]["tflops"]) / others[best], best


@dataclass(frozen=True)
class Results:
    """Of one GPU, or of the simulator.

    Attributes:
        folder: where they lie.
        rows, tiles, predicted: of attention.csv and attention.json, of tiles.csv, of predicted.csv.
        facts: of facts.json.
    """

    folder: Path
    rows: list[Row]
    tiles: list[Row]
    predicted: list[Row]
    facts: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Results:
        facts = folder / "facts.json"
        return cls(
            folder, read(folder / "attention.csv") + of_pytest(folder / "attention.json"), read(folder / "tiles.csv"), read(folder / "predicted.csv"),
            json.loads(facts.read_text()) if facts.exists() else {},
        )  # fmt: skip

    @property
    def gpu(self) -> str:
        rows = self.rows or self.tiles
        return str(self.facts.get("gpu") or (rows[0]["gpu"] if rows else "unknown"))

    @property
    def measured(self) -> bool:
        """Whether a GPU ran it."""
        return self.gpu != "simulator"

    @property
    def found(self) -> dict[Key, dict[str, Row]]:
        return rates(self.rows)

    @property
    def expected(self) -> dict[Key, Row]:
        """What the timing model predicts, by plain case."""
        return {(row["dtype"], int(row["head_dim"]), row["causal"] == "1", int(row["seqlen"]), row["pass"]): row for row in self.predicted}

    @property
    def predicted_at(self) -> list[str]:
        """The commits of the kernels that were predicted."""
        return sorted({row["commit"] for row in self.expected.values()})
