"""`autotune --fit`: the timing model's constants from the times that tables hold, and the commit that a table names.

A card that is made up differs from the model by known factors; its times have to give them back. Most tests put arithmetic in the model's place, which takes a
hundred times as long: one goes all the way, and with --exhaustive the whole fit does.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy
import pytest

from cuflash.__main__ import main
from cuflash.errors import OptionError
from cuflash.hardware import device
from cuflash.jit import disassembly
from cuflash.problem.tile import Tile
from cuflash.timing.machine import CARDS, multiprocessor
from cuflash.tuned import fingerprint
from cuflash.tuned.buckets import Bucket
from cuflash.tuned.table import Entry, Table, Timing, device_facts
from cuflash.tuner import checkout, fitting
from cuflash.tuner.fitting import CONSTANTS, Observation

pytest.importorskip("cupy")
NEEDS_NVDISASM = pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason="nvdisasm is missing")

CARD = replace(device.of_arch("sm_80", "gpu"), name="A card", num_sms=60)
TILES = (Tile(64, 64, 4, 2), Tile(128, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 2, 2), Tile(128, 32, 8, 2), Tile(64, 128, 4, 1))


def table(times: Sequence[float], **others: Any) -> Table:
    """Of the tiles above, in their order."""
    bucket = Bucket("forward", "float16", 16, 16, False, True, (), "padded", "full", 256, 256)
    timings = tuple(Timing(tile, time, time, time, 20, 1300) for tile, time in zip(TILES, times, strict=False))
    entry = Entry(
        bucket,
        "batch 2, seqlen 200 x 256, heads 4/2",
        TILES[0],
        timings,
        fingerprint.of_source("forward_mma.cu"),
        fingerprint.of_compiler(),
    )
    made = replace(entry, **others)
    return Table(device_facts(CARD), {made.bucket: made})


# --- What there is to fit -----------------------------------------------------------------------------------------------------------------


@NEEDS_NVDISASM
def test_a_tile_of_a_table_is_predicted_as_its_card_ran_it() -> None:
    """The call, the card's SMs and the clock of that time; a constant that costs more makes it slower, one that it does not use does not."""
    left_out: dict[str, int] = {}
    first, second = fitting.observations(table([1.0, 2.0]), left_out)
    assert left_out == {}
    problem = first.problem
    assert (problem.batch, problem.num_heads_q, problem.num_heads_kv, problem.seqlen_q, problem.seqlen_kv) == (2, 4, 2, 200, 256)
    assert (problem.is_causal, problem.dtype, problem.head_dim) == (True, "float16", 16)
    assert (first.card.num_sms, first.card.clock_ghz, first.kernel.tile, second.kernel.tile) == (60, 1.3, *TILES[:2])
    as_it_is = first.predicted({})
    assert first.predicted(dict.fromkeys(CONSTANTS, 1.0)) == as_it_is
    assert first.predicted({"exponentials": 3.0}) > 1.2 * as_it_is
    assert first.predicted({"block start": 2.0}) > as_it_is
    slower = replace(first, card=replace(first.card, clock_ghz=0.65))
    assert slower.predicted({}) == pytest.approx(2 * as_it_is, rel=0.01)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"timer": "model"}, "not timed on a GPU"),
        ({"sources": "0" * 16}, "of other kernels than the present ones"),
        ({"call": "batch 3 packed sequences, seqlen 9 x 9, heads 1"}, "of a call that the table does not describe"),
        (
            {"bucket": Bucket("forward", "float16", 16, 16, False, True, ("softcap",), "padded", "full", 256, 256)},
            "with features or lengths",
        ),
        (
            {"bucket": Bucket("forward_wgmma", "float16", 64, 64, False, True, (), "padded", "full", 256, 256)},
            "that the model does not know",
        ),
    ],
)
def test_what_cannot_be_predicted_again_is_left_out_and_said(others: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=f"nothing to fit: 1 .*{reason}"):
        fitting.fit([table([1.0], **others)])


def test_tables_of_other_devices_are_refused() -> None:
    made = table([1.0])
    with pytest.raises(OptionError, match=r"a table of A card \(simulator, sm_80\)"):
        fitting.fit([replace(made, device={**made.device, "kind": "simulator"})])


def test_tiles_are_taken_from_the_fastest_to_the_slowest() -> None:
    timings = [Timing(Tile(16 * i, 16, 1, 1), float(i)) for i in range(1, 31)]
    timings += [Timing(Tile(8, 8, 1, 1), 0.5, note="wrong: 0.3 apart"), Timing(Tile(8, 16, 1, 1))]
    taken = [timing.milliseconds for timing in fitting.chosen(timings[::-1])]
    assert (taken[0], taken[-1], len(taken)) == (1.0, 30.0, fitting.TILES_OF_AN_ENTRY)
    assert taken == sorted(taken, key=lambda x: x or 0.0)


def test_a_factor_multiplies_clocks() -> None:
    machine, card = multiprocessor("sm_80"), CARDS["sm_80"]
    slower = fitting.scaled(machine, {"matrix": 2.0, "exponentials": 3.0, "block start": 5.0})
    assert slower.matrix_rates == {kind: rate / 2 for kind, rate in machine.matrix_rates.items()}
    assert slower.mufu == 3 * machine.mufu
    assert slower.fma == machine.fma
    assert fitting.scaled(machine, {"L2": 2.0}).l2_bytes == machine.l2_bytes / 2
    assert fitting.scaled(card, {"matrix": 2.0, "block start": 5.0}) == replace(card, block_start=5 * card.block_start)
    named = [name for names in CONSTANTS.values() for name in names]
    assert all(hasattr(machine, name) != hasattr(card, name) for name in named), "each constant is of one of both"


# --- The fit ------------------------------------------------------------------------------------------------------------------------------

TRUE = {"matrix": 1.25, "exponentials": 0.8}


def arithmetic(monkeypatch: pytest.MonkeyPatch, count: int, noise: float = 0.0) -> None:
    """Observations of a card that differs by `TRUE` from a model which adds up two of the constants and knows no others."""
    rng = numpy.random.default_rng(5)
    shares = rng.uniform(0.1, 0.9, count)

    def predicted(self: Any, factors: Mapping[str, float]) -> float:
        return float(self.problem * factors.get("matrix", 1.0) + (1 - self.problem) * factors.get("exponentials", 1.0))

    monkeypatch.setattr(Observation, "predicted", predicted)

    def made(found: Table, left_out: dict[str, int]) -> list[Observation]:
        of: Any = Observation
        times = [share * TRUE["matrix"] + (1 - share) * TRUE["exponentials"] for share in shares]
        return [
            of(None, share, CARDS["sm_80"], None, None, time * exp(noise * rng.standard_normal()))
            for share, time in zip(shares, times, strict=True)
        ]

    monkeypatch.setattr(fitting, "observations", made)


def test_times_give_the_constants_back(monkeypatch: pytest.MonkeyPatch) -> None:
    arithmetic(monkeypatch, 60)
    said: list[str] = []
    (fit,) = fitting.fit([table([1.0])], said.append)
    for name, factor in TRUE.items():
        assert fit.factors[name] == pytest.approx(factor, rel=0.03)
        assert fit.is_decided(name)
    for name in set(CONSTANTS) - set(TRUE):
        assert fit.factors[name] == pytest.approx(1.0, abs=1e-6)
        assert fit.deviations[name] == pytest.approx(fitting.PRIOR)
        assert not fit.is_decided(name)
    assert (len(fit.before), len(fit.held_before)) == (40, 20)
    median_before, median_after = (numpy.median([abs(log(x)) for x in ratios]) for ratios in (fit.held_before, fit.held_after))
    assert median_after < 0.1 * median_before
    assert said
    words = str(fit)
    assert "40 tiles fitted, 20 held out" in words
    assert "not decided by these times: barrier_latency" in words


def test_each_architecture_says_what_was_left_out_of_its_own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of which nothing is left to fit."""

    def made(found: Table, left_out: dict[str, int]) -> list[Any]:
        arch = str(found.device["arch"])
        left_out[f"a reason of {arch}"] = 1
        return [] if arch == "sm_86" else [arch]

    def fitted(arch: str, *_: Any) -> fitting.Fit:
        return fitting.Fit(arch, {}, {}, (1.0,), (1.0,))

    monkeypatch.setattr(fitting, "observations", made)
    monkeypatch.setattr(fitting, "_fitted", fitted)
    tables = [replace(table([1.0]), device=device_facts(replace(CARD, arch=arch))) for arch in ("sm_80", "sm_90", "sm_86")]
    said: list[str] = []
    fits = fitting.fit(tables, said.append)
    assert {fit.arch: dict(fit.left_out) for fit in fits} == {arch: {f"a reason of {arch}": 1} for arch in ("sm_80", "sm_90")}
    assert said == ["sm_86: nothing to fit: 1 a reason of sm_86"]


def test_noise_moves_nothing_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and noisy times: what is found lies within three of the deviations that the fit gives."""
    arithmetic(monkeypatch, 9, noise=0.04)
    (fit,) = fitting.fit([table([1.0])])
    for name, factor in TRUE.items():
        assert abs(log(fit.factors[name] / factor)) < 3 * fit.deviations[name] < 3 * fitting.PRIOR


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arithmetic(monkeypatch, 30)
    (tmp_path / "a.json").write_text(table([1.0]).to_text())
    written = tmp_path / "constants.json"
    assert main(["autotune", "--fit", str(tmp_path / "a.json"), "--output", str(written)]) == 0
    assert "sm_80: 20 tiles fitted, 10 held out" in capsys.readouterr().out
    (found,) = json.loads(written.read_text())
    assert found["arch"] == "sm_80"
    assert found["constants"]["mufu"] == pytest.approx(multiprocessor("sm_80").mufu * found["factors"]["exponentials"])
    assert found["errors"]["after"] < found["errors"]["before"]
    (tmp_path / "b.json").write_text("[]")
    assert main(["autotune", "--fit", str(tmp_path / "b.json")]) == 2
    assert "a table that autotune wrote" in capsys.readouterr().err


@NEEDS_NVDISASM
@pytest.mark.exhaustive
def test_the_whole_fit() -> None:
    """A made-up card, timed by the model itself with other constants."""
    true = {"matrix": 1.2, "exponentials": 1.4}
    times = [observation.predicted(true) for observation in fitting.observations(table([1.0] * len(TILES)), {})]
    (fit,) = fitting.fit([table(times)])
    assert (fitting._error(fit.after) or 0.0) < 0.02
    assert (fitting._error(fit.held_after) or 0.0) < 0.5 * (fitting._error(fit.held_before) or 0.0)


# --- The commit ---------------------------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *own, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_names_its_commit(tmp_path: Path) -> None:
    """With a plus sign where it was changed; an installed copy in somebody else's repository has none."""
    package, kernels, installed = tmp_path / "cuflash", tmp_path / "kernels", tmp_path / "venv" / "cuflash"
    for folder in (package, kernels, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert checkout.commit(package) == "", "no repository"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "cuflash", "kernels")
    git(tmp_path, "commit", "-qm", "first")
    assert checkout.commit(package) == git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert checkout.commit(installed) == ""
    (tmp_path / "notes").write_text("of no account")
    assert not checkout.commit(package).endswith("+")
    (kernels / "__init__.py").write_text("changed")
    assert checkout.commit(package).endswith("+")


def test_tables_keep_the_commit_and_older_ones_have_none() -> None:
    made = table([1.0], commit="0123456789ab+")
    assert '"commit": "0123456789ab+"' in made.to_text()
    assert Table.from_text(made.to_text()) == made
    older = made.to_text().replace('"commit": "0123456789ab+",\n', "")
    (entry,) = Table.from_text(older).entries.values()
    assert entry.commit == ""
    with pytest.raises(ValueError, match="commit is 7"):
        Table.from_text(made.to_text().replace('"0123456789ab+"', "7"))
