"""What the timing model expects of the plain cases of a folder of results: predicted.csv beside attention.csv.

Contract: every row is of the kernels as of the commit that stands in the row, of the card that does, and was never run. Needs CuPy's NVRTC and nvdisasm, no GPU; a minute
for each element type.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from bench.cases import SEQLENS, Case
from bench.machine import commit
from cuflash.hardware import device
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from cuflash.timing import prediction
from cuflash.timing.machine import CARDS, Card
from reporting.results import Results

COLUMNS = ("commit", "card", "dtype", "head_dim", "causal", "seqlen", "pass", "milliseconds", "tflops", "binds")


class Model:
    """The timing model on one card; each kernel's steady state is found once."""

    def __init__(self, card: Card) -> None:
        self.card, self._on = card, replace(device.of_arch(card.arch, "gpu"), num_sms=card.num_sms)
        self._known: dict[Any, prediction.KernelPrediction] = {}

    def row(self, case: Case, direction: str) -> dict[str, Any]:
        """What is expected of one pass: the columns of predicted.csv."""
        plan = make_plan(case.problem, self._on, backward=direction == "backward")
        launches = [self._launch(kernel, plan) for kernel in plan.kernels]
        milliseconds = sum(launch.milliseconds for launch in launches)
        longest = max(launches, key=lambda launch: launch.milliseconds)
        sample = case.sample
        return {
            "commit": commit(), "card": self.card.name, "dtype": sample.dtype, "head_dim": sample.head_dim, "causal": int(sample.is_causal),
            "seqlen": case.seqlen, "pass": direction, "milliseconds": f"{milliseconds:.6g}",
            "tflops": f"{case.flops(direction) / milliseconds / 1e9:.6g}", "binds": longest.binds,
        }  # fmt: skip

    def _launch(self, kernel: KernelPlan, plan: Plan) -> prediction.Launch:
        if not kernel.spec.is_tiled:
            return prediction.predict_traffic(kernel, plan.problem, self.card)
        key = kernel.request(self._on)
        if key not in self._known:
            described, function = prediction.compiled(kernel, self._on, causal=plan.problem.is_causal)
            self._known[key] = prediction.predict_kernel(function, described, limits=False)
        return prediction.lay_out(self._known[key], kernel, plan.problem, self.card)


def predict(results: Results, dtypes: Iterable[str], head_dims: Iterable[int]) -> int:
    """Write predicted.csv into the folder; how many rows."""
    arch = results.facts["device"]["arch"]
    model = Model(CARDS[arch])
    cases = [Case.plain(dtype, d, causal, s) for dtype in dtypes for d in head_dims for causal in (False, True) for s in SEQLENS]
    rows = [model.row(case, direction) for case in cases for direction in ("forward", "backward")]
    with (results.folder / "predicted.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)
