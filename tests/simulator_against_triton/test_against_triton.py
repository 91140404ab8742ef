"""What Triton makes of kernels for GPUs gives on the simulator what it has to, and no check finds fault with it.

Triton is another compiler, whose code runs on hardware every day: layouts of matrix operands, swizzles, tensor maps, barriers and fences mean to it what they
mean to a GPU. It compiles for any GPU without one. Needs `pip install -e '.[test-triton]'`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="pip install -e '.[test-triton]' installs it")

from cases import Case, simulate, simulate_all_ways
from every_case import every_case
from instruction_kinds import PAGE, VERSION, page_with, table, triton_version
from products import early_read, refused

from cuflash.errors import SimulatorError


def parameters(exact: bool = False) -> list[object]:
    """All cases, or those that are exact."""
    cases = [case for case in every_case() if case.exact or not exact]
    return [pytest.param(case, id=str(case), marks=[pytest.mark.exhaustive] if case.exhaustive else []) for case in cases]


@pytest.mark.parametrize("case", parameters())
def test_result(case: Case) -> None:
    simulate_all_ways(case)


def test_sums_in_half_precision_are_read_too_early() -> None:
    """PTX forbids touching the registers of D before the wait. The simulator gives no right product either: wgmma waits for all four warps."""
    with pytest.raises(SimulatorError) as caught:
        simulate(early_read())
    assert caught.value.check == "wgmma-register"


def test_what_the_simulator_does_not_know_is_refused_by_name() -> None:
    """Products of integers by wgmma; those by mma are known."""
    with pytest.raises(SimulatorError, match=r"(?s)does not support this matrix multiplication.*wgmma"):
        simulate(refused())


def test_the_page_lists_what_was_executed() -> None:
    """If this fails: python tests/simulator_against_triton/instruction_kinds.py."""
    listed = VERSION.search(PAGE.read_text())
    assert listed is not None
    if listed[1] != triton_version():
        pytest.skip(f"the page is about Triton {listed[1]}, installed is {triton_version()}, which chooses other instructions")
    assert PAGE.read_text() == page_with(table())
