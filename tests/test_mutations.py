"""No synchronisation of a kernel can be forgotten unnoticed: mutants of the kernels, see kernel_mutations.py.

The ordinary run takes some variants; `pytest --exhaustive tests/test_mutations.py` takes all and compares with the
committed page, which names lines by their text.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

import kernel_mutations
import pytest
from kernel_mutations import SURVIVED, VARIANTS, Outcome, describe, explanations, page, run_variant, table, unexplained

pytest.importorskip("cupy")

SOME = (
    "forward sm_80 float16, 1 stage",
    "forward sm_80 float16, 3 stages",
    "forward sm_80 float32, 2 stages",
    "forward sm_75 float16 causal",
    "forward sm_90 bfloat16 wgmma causal, 2 stages",
    "backward sm_80 float16, 2 stages",
    "backward sm_80 float16 split, 1 stage",
    "backward sm_75 bfloat16",
    "forward sm_80 float16 sliced, 2 stages",
    "forward sm_75 float32 sliced, in steps",
    "backward sm_80 float16 sliced, 1 stage",
    "backward sm_80 float16 lengths, 2 stages",
    "backward sm_80 float16 additive mask, 1 stage",
    "backward sm_80 float16 huge rows, 2 stages",
    "backward sm_80 float16 off 16 bytes, 2 stages",
    "cache sm_80 float16 paged, 3 stages",
    "cache sm_80 float16 stream-K, 2 stages",
    "jvp sm_80 float16, 2 stages",
)

outcomes = functools.cache(run_variant)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", [name if name in SOME else pytest.param(name, marks=pytest.mark.exhaustive) for name in VARIANTS])
def test_every_mutant_is_caught_or_explained(name: str) -> None:
    found = outcomes(name)
    assert any(outcome.caught != SURVIVED for outcome in found)
    assert [describe(outcome) for outcome in unexplained(found, explanations())] == []


def test_lost_copies_and_barriers_are_races_before_they_are_wrong_results() -> None:
    """Results alone would not do: whatever the schedule makes of a lost wait or barrier, the race detector names it, and at once."""
    found: list[Outcome] = [outcome for name in SOME[:2] for outcome in outcomes(name) if outcome.caught != SURVIVED]
    assert {outcome.caught for outcome in found} == {"race", "uninitialized"}
    assert {outcome.schedule for outcome in found} == {"late"}


def test_a_survivor_needs_an_explanation() -> None:
    found = outcomes(SOME[0])
    missing = unexplained(found, [])
    assert {outcome.mutant.instruction for outcome in missing} == {"bar.sync 0;", "bar.warp.sync -1;"}
    missing = [outcome for outcome in missing if outcome.mutant.instruction == "bar.warp.sync -1;"]
    assert len(missing) == 1
    assert "no lane still reads what these rows held" in describe(missing[0])
    for report in (table, page):
        assert "UNEXPLAINED" in report(found, [])
        assert "UNEXPLAINED" not in report(found, explanations())


def test_the_page_counts_and_names_survivors_and_the_table_has_every_line() -> None:
    found = outcomes(SOME[0])
    caught = Counter(outcome.caught for outcome in found)
    text, lines = page(found, explanations()), table(found, explanations())
    assert f"{len(found)} mutants in 1 variants: " in text
    assert f"| forward_mma.cu | {len(found)} | " in text
    assert f"| {caught[SURVIVED]} |" in text
    assert "forward_mma.cu, `__syncwarp();  // no lane still reads what these rows held` in `store_slice<" in text
    assert re.search(r"\.cuh?:\d", text) is None  # lines have no numbers
    rows = re.findall(r"^\| (.*?) \| `(.*?)` \| (.*?) \| .*\|$", lines, re.M)
    assert {name for _, name, _ in rows} == {outcome.mutant.instruction.rstrip(";").split()[0] for outcome in found}
    assert all(re.search(r"\.cuh?:\d", where) for where, _, _ in rows)


@pytest.mark.exhaustive
def test_the_committed_page_is_up_to_date() -> None:
    text = page([outcome for name in VARIANTS for outcome in outcomes(name)], explanations())
    committed = Path(__file__).parent.parent / "docs" / "mutations.md"
    assert committed.read_text() == text, f"run: python tests/kernel_mutations.py --page {committed}"


def test_explanations_name_existing_lines() -> None:
    """An explanation goes with its line; whether something still survives there is found out by running kernel_mutations.py."""
    kernels = Path(kernel_mutations.__file__).parent.parent / "kernels"
    sources = [path.read_text() for path in kernels.rglob("*.cu*")]
    for explanation in explanations():
        assert (kernels / explanation.kernel).is_file()
        assert any(explanation.line in source for source in sources), explanation.line
