"""The kernels access memory as docs/log-compiler.md says: no bank conflicts, no sectors that nobody asked for, or the reason for them."""

from __future__ import annotations

import pytest

from cuflash import simulator
from cuflash.cli.profiling import profile_call
from cuflash.cli.samples import Sample
from cuflash.simulator import KernelProfile

DIRECTIONS = ("forward", "backward")


def profiles(arch: str, dtype: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, KernelProfile]:
    """Every kernel of both passes, by name."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", arch)
    found: dict[str, KernelProfile] = {}
    for direction in DIRECTIONS:
        with simulator.configure(checks=False):
            result = profile_call(Sample(seqlen_q=160, seqlen_kv=160, head_dim=head_dim, dtype=dtype), direction)
        assert result.plan.device.arch == arch
        found |= {plan.name: kernel for plan, kernel in zip(result.plan.kernels, result.kernels, strict=True)}
    return found


@pytest.mark.sample(4)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("arch", "dtype"), [("sm_75", "float16"), ("sm_80", "float16"), ("sm_80", "bfloat16"), ("sm_90", "bfloat16")])
def test_16_bit_tiles_have_no_bank_conflicts_and_whole_sectors(
    arch: str, dtype: str, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kernel in profiles(arch, dtype, head_dim, monkeypatch).items():
        total = kernel.total
        if name != "backward_delta":  # which uses no shared memory
            assert total.shared_reads.requests > 0, name
            assert total.shared_writes.requests > 0, name
        assert total.shared_memory.excess == 0, name
        if (arch, name) != ("sm_90", "backward_fused"):  # the simulator counts the four additions of one instruction as a request each
            assert total.global_writes.excess == 0, name
        if arch != "sm_75":  # where row statistics come from global memory, each half of a pair by a load of its own
            assert total.global_reads.excess == 0, name
        for operand in kernel.operands:
            if operand.name in ("out", "grad_query", "grad_key", "grad_value") and operand.bytes_written:
                assert operand.bytes_written == operand.sector_bytes_written == operand.size, name


@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_float32_tiles_have_no_bank_conflicts_and_whole_sectors(arch: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kernel in profiles(arch, "float32", head_dim, monkeypatch).items():
        total = kernel.total
        assert total.shared_memory.excess == total.global_writes.excess == 0, name
        if arch != "sm_75":  # see above
            assert total.global_reads.excess == 0, name


@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dim", [40, 72, 200])
def test_rows_that_are_no_whole_sectors_share_them_between_requests(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of 32 bytes of a row that starts in the middle of a sector lies in two."""
    for name, kernel in profiles("sm_80", "float16", head_dim, monkeypatch).items():
        assert kernel.total.shared_memory.excess == 0, name
        assert kernel.total.global_reads.used <= 1.61 * kernel.total.global_reads.ideal, name
