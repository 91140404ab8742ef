"""setmaxnreg: registers that change hands, and kernels that ask for more than there are."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import Array, compile_cuda, run_cuda, run_ptx

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options
from cuflash.simulator.options import SCHEDULES

KERNEL = """
template <int N> __device__ void inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ void dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
extern "C" __global__ void BOUNDS k(int* out) {
    int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;
    BODY
    out[threadIdx.x] = warpgroup + 1;
}"""


def run(body: str, *, block: int = 384, bounds: str = "", schedule: str = "late") -> Array:
    out = np.zeros(block, np.int32)
    source = KERNEL.replace("BODY", body).replace("BOUNDS", bounds)
    run_cuda(source, out, arch="compute_90a", block=block, options=Options(threads=1, schedule=schedule))
    return out


def report(body: str, **launch: str | int) -> str:
    with pytest.raises(SimulatorError) as caught:
        run(body, **launch)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_producer_gives_to_consumers(schedule: str) -> None:
    # 384 threads start with 168: 128 * 24 + 256 * 240 = 64512.
    out = run("if (warpgroup == 0) dec<24>(); else inc<240>();", schedule=schedule)
    assert out.tolist() == [1] * 128 + [2] * 128 + [3] * 128


def test_back_and_forth() -> None:
    run("if (warpgroup == 0) { dec<40>(); __syncthreads(); inc<168>(); } else { inc<232>(); dec<168>(); __syncthreads(); }")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_at_several_places(schedule: str) -> None:
    """Warps of a warpgroup may reach it by different ways, as the warps of a producer do that have different work."""
    out = run("if (warp % 4 == 1) { out[0] = 1; dec<24>(); out[1] = 2; } else { dec<24>(); out[2] = 3; }", schedule=schedule)
    assert out[127] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_than_there_are(schedule: str) -> None:
    text = report("if (warpgroup == 0) dec<40>(); else inc<240>();  // the bug", schedule=schedule)
    # Seven of eight warps get their 32 * 240 registers; of 65536 - 128 * 40 - 7 * 32 * 240 - 32 * 168 = 1280 the last needs 32 * 72.
    assert text.startswith("[deadlock]")
    assert "waits in setmaxnreg, where 1024 registers are missing for it (1280 of 65536 are free)" in text
    assert "setmaxnreg.inc.sync.aligned.u32 240" in text
    assert "// the bug" in text


def test_nobody_gives() -> None:
    text = report("inc<176>();")
    assert "[deadlock]" in text
    assert "waits in setmaxnreg" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("dec<176>();", "dec to 176 registers per thread, but the warp holds 168"),
        ("inc<160>();", "inc to 160 registers per thread, but the warp holds 168"),
        ("if (warp % 4 == 1) dec<24>(); else dec<32>();", "execute different ones"),
    ],
)
def test_misuse(body: str, message: str) -> None:
    text = report(body)
    assert text.startswith("[setmaxnreg]")
    assert message in text
    assert "test.cu:6" in text


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("missing", [4, 5, 7])
def test_a_warp_that_leaves(missing: int, schedule: str) -> None:
    text = report(f"if (warp == {missing}) return; dec<24>();", schedule=schedule)
    assert text.startswith("[setmaxnreg]")
    assert (
        f"warp {missing} exits without a setmaxnreg" in text
        or f"all warps of a warpgroup must execute it, but warp {missing} has exited" in text
    )


def test_declared_registers() -> None:
    """`.maxnreg` is what threads start with."""
    ptx = compile_cuda(KERNEL.replace("BODY", "inc<128>(); dec<104>();").replace("BOUNDS", ""), "compute_90a")
    assert ".maxnreg" not in ptx
    declared = ptx.replace(")\n{", ")\n.maxnreg 96\n{", 1)
    run_ptx(declared, np.zeros(384, np.int32), block=384)
    with pytest.raises(SimulatorError, match=r"\[setmaxnreg\] inc to 128 registers per thread, but the warp holds 200"):
        run_ptx(ptx.replace(")\n{", ")\n.maxnreg 200\n{", 1), np.zeros(256, np.int32), block=256)
    with pytest.raises(SimulatorError, match=r"\[setmaxnreg\] 384 threads start with 200 registers each, 76800 in all; a block has 65536"):
        run_ptx(ptx.replace(")\n{", ")\n.maxnreg 200\n{", 1), np.zeros(384, np.int32), block=384)


def test_half_a_warp() -> None:
    assert "[partial-warp]" in report("if (threadIdx.x % 32 < 16) dec<24>();")


@pytest.mark.parametrize("count", [16, 100, 264])
def test_counts_that_cannot_be(count: int) -> None:
    ptx = f".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k() {{ setmaxnreg.dec.sync.aligned.u32 {count}; ret; }}"
    with pytest.raises(SimulatorError, match=f"does not support {count} registers: a multiple of 8 from 24 to 256 is expected"):
        Module(ptx)
