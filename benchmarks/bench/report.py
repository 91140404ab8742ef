"""Rows of CSV files and lines of text: which columns there are, and what the columns of a case hold."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from bench.cases import Case
from cuflash.hardware.device import Device

COLUMNS = (
    "date", "commit", "gpu", "driver", "library", "version", "backend", "pass", "dtype", "batch", "heads", "seqlen", "head_dim", "causal", "milliseconds",
    "milliseconds_p20", "milliseconds_p80", "tflops", "sm_clock_mhz", "peak_memory_bytes", "relative_error", "repeats", "timer", "sm_clock_before_mhz",
    "sm_clock_after_mhz", "watts", "celsius", "note", "case", "heads_kv", "head_dim_v", "features", "visible_share", "visited_share",
)  # fmt: skip
"""Of attention.csv. `tflops` counts visible scores (see `bench.cases`), `visible_share` says which part of all scores they are, and `visited_share` which part of
all tiles cuflash visits, where that is known before it runs. Without `milliseconds` a row was not timed, and `note` says why."""

TILE_COLUMNS = (
    "date", "commit", "gpu", "driver", "kernel", "dtype", "batch", "heads", "seqlen", "head_dim", "causal", "tile_q", "tile_kv", "num_warps", "num_stages",
    "rank", "of", "modelled", "registers", "spill_bytes", "shared_bytes", "milliseconds", "milliseconds_p20", "milliseconds_p80", "tflops", "note",
)  # fmt: skip
"""Of tiles.csv."""

STEP_COLUMNS = (
    "date", "commit", "gpu", "driver", "dtype", "kv_dtype", "batch", "heads", "heads_kv", "head_dim", "seqlen_q", "keys", "page_size", "splits",
    "milliseconds", "milliseconds_p20", "milliseconds_p80", "gigabytes_per_second", "relative_error", "repeats", "timer", "sm_clock_mhz",
    "sm_clock_before_mhz", "sm_clock_after_mhz", "watts", "celsius", "note",
)  # fmt: skip
"""Of cache.csv. A page_size of 0: a row of the cache for each sequence. `gigabytes_per_second` counts keys and values once."""

FLOP_LINE = "TFLOP/s count 2·(D + DV) FLOP forward and 2·(3·D + 2·DV) backward for each visible score, whatever a library really computes"


class Table:
    """A CSV file that has every row at once, whatever happens next."""

    def __init__(self, path: Path | None, columns: tuple[str, ...]) -> None:
        self._file = None
        self._columns = columns
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            self._file = path.open("a", newline="")
            self._writer = csv.DictWriter(self._file, columns, restval="", extrasaction="raise", lineterminator="\n")
            if new:
                self._writer.writeheader()

    def add(self, row: dict[str, Any]) -> None:
        unknown = set(row) - set(self._columns)
        assert not unknown, unknown
        if self._file is not None:
            shown = {name: "" if x is None else f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
            self._writer.writerow(shown)
            self._file.flush()


def shape_columns(case: Case) -> dict[str, Any]:
    """The columns that both tables have of a case."""
    sample = case.sample
    return {
        "dtype": sample.dtype, "batch": case.num_sequences, "heads": sample.num_heads_q, "seqlen": case.seqlen, "head_dim": sample.head_dim,
        "causal": int(sample.is_causal),
    }  # fmt: skip


def case_columns(case: Case, on: Device) -> dict[str, Any]:
    """The columns of attention.csv of a case on a device."""
    lengths = ""
    if case.sample.is_packed:
        lengths = "packed sequences of " + " ".join(map(str, case.sample.packed_lengths[0]))
    elif case.sample.lengths_kv is not None:
        lengths = "seqlens_kv " + " ".join(map(str, case.sample.lengths_kv))
    elif case.sample.seqlen_kv != case.sample.seqlen_q:
        lengths = f"{case.sample.seqlen_kv} keys"
    return {
        **shape_columns(case), "case": case.name, "heads_kv": case.sample.num_heads_kv, "head_dim_v": case.head_dim_v,
        "features": case.problem.features.describe() or lengths, "visible_share": case.visible_share, "visited_share": case.visited_share(on),
    }  # fmt: skip


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
