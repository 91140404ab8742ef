"""What the model knows of GPUs: clocks of instructions of one SM, and counts, clocks and bandwidths of whole cards. Every number has its source beside it.

Sources, by the letters that stand beside the numbers:

    [M]  measured on an H100 80GB HBM3 here: docs/h100.md, benchmarks/results/nvidia-h100-80gb-hbm3
    [G]  CUDA C++ Programming Guide, "Arithmetic Instructions": results per clock and SM of each architecture. A warp instruction of a quarter SM takes
         32 / (results / 4) clocks.
    [W]  NVIDIA's whitepapers of GA100, GA102, AD102 and of Blackwell's RTX cards: peak rates at the boost clock. Divided by SMs and clock they are the
         multiply-adds below.
    [S]  the assembler's own stall counts between instructions that use one unit
    [A]  assumed: the H100's figure, because nobody here measured this one
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cuflash.errors import OptionError

SUB_PARTITIONS = 4
SHARED_BYTES_PER_CLOCK = 128
"""Of one SM: what a wavefront moves. [M] for sm_90 (`lds_128`, `ldsm_x4`: 512 bytes in 4 clocks), [G] for all."""


@dataclass(frozen=True)
class WarpgroupUnits:
    """What Hopper's SM has beside the others: wgmma, bulk copies, mbarriers. Clocks.

    Attributes:
        multiply_adds: per clock and sub-partition of wgmma with 16-bit operands.
        queue: products that the tensor unit holds, the one that it computes among them.
        product_start: from the issue of a product to its computation, in an idle unit.
        product_end: from the end of its computation until the warp that waits goes on.
        phase_wait: of a wait for a phase that is over.
        phase_hand_over: from an arrival that ends a phase until a warp that waits goes on.
        named_barrier: from the last warp's arrival at a barrier whose number is in a register to the release.
        bulk_copy: from the issue of a bulk copy of few bytes until a warp that waits goes on.
        bulk_store: from when L2 has taken what a bulk store reads in shared memory until a warp that waits for that goes on.
        shared_l2_bytes: bytes per clock and SM that L2 delivers if all SMs ask for the same.
    """

    multiply_adds: float
    queue: int
    product_start: float
    product_end: float
    phase_wait: float
    phase_hand_over: float
    named_barrier: float
    bulk_copy: float
    bulk_store: float
    shared_l2_bytes: float


@dataclass(frozen=True)
class Multiprocessor:
    """One SM. Clocks are those that a warp instruction occupies a unit of its sub-partition, latencies those until a dependent instruction may issue.

    Attributes:
        arch: "sm_80", …
        matrix_rates: multiply-adds per clock and sub-partition of `mma.sync`: of 16-bit operands with float32 sums, with float16 sums, of TF32, of 8-bit integers.
        fma: clocks of FFMA, FADD, FMUL.
        imad: clocks of integer multiply-adds, which share that unit.
        alu: clocks of integer additions, logic, comparisons, minima and maxima, selections.
        half: clocks of packed 16-bit arithmetic.
        convert: clocks of conversions.
        mufu: clocks of exponentials and their like.
        mufu_latency, shared_latency, matrix_load_latency, shuffle_latency, constant_latency: of the variable-latency instructions, without waiting for others.
        global_latency: of a load from L2.
        copy_latency: of `cp.async` from L2, until the thread that waits for it goes on.
        barrier_latency: from the last warp's arrival to the release.
        barrier_arrival: clocks that the barrier unit takes for each warp.
        branch: clocks that a taken branch costs beyond its stall count.
        queue_depth: memory instructions of a sub-partition that may wait for the SM's memory pipe.
        l2_bytes: bytes per clock and SM that L2 delivers if all SMs ask.
        reduction_bytes: bytes per clock and SM of float32 that L2 adds up if all SMs ask.
        fence: clocks of a fence of the GPU for the warp that makes it.
        warpgroups: wgmma and what goes with it; None where there is none.
    """

    arch: str
    matrix_rates: dict[str, float]
    fma: float
    imad: float
    alu: float
    half: float
    convert: float
    mufu: float
    mufu_latency: float
    shared_latency: float
    matrix_load_latency: float
    shuffle_latency: float
    constant_latency: float
    global_latency: float
    copy_latency: float
    barrier_latency: float
    barrier_arrival: float
    branch: float
    queue_depth: int
    l2_bytes: float
    reduction_bytes: float
    fence: float
    warpgroups: WarpgroupUnits | None = None


_H100 = Multiprocessor(
    arch="sm_90",
    matrix_rates={  # [M] m16n8k16 in 6.11 clocks, m16n8k8 of TF32 in 6.11; integers [A]: two thirds of wgmma's rate, as those of 16 bits
        "half": 2048 / 6.11,
        "half16": 2048 / 6.11,
        "tf32": 1024 / 6.11,
        "int8": 4096 / 6.11,
    },
    fma=1.0,  # [M] 1.08 with the test's own overhead
    imad=2.04,  # [M]
    alu=2.05,  # [M] fmnmx 2.05, lop3 2.09, prmt 2.07
    half=1.13,  # [M] hfma2_bf16
    convert=2.09,  # [M] f2fp_bf16
    mufu=8.03,  # [M]
    mufu_latency=17.1,  # [M]
    shared_latency=32.1,  # [M] lds_128, of which 4 clocks are its wavefronts
    matrix_load_latency=29.0,  # [M] ldsm_x4, likewise
    shuffle_latency=24.0,  # [M]
    constant_latency=24.0,  # [A] as a shuffle; loads of constants are rare in loops
    global_latency=283.0,  # [M] ld.global from L2
    copy_latency=336.0,  # [M] a bulk copy of 128 bytes; cp.async was not measured
    barrier_latency=13.3,  # [M] bar.sync 0: 13.3 + 2 per warp, for 1, 4, 8, 12 and 16 warps
    barrier_arrival=2.0,  # [M] likewise
    branch=6.0,  # [A] nobody's figure: about what fetching anew costs
    queue_depth=10,  # [A]
    l2_bytes=30.0,  # [M] each SM its own addresses; 86 where all ask for the same
    reduction_bytes=12.8,  # [M] red.add.v4.f32 of all SMs, a region of its own; scalar ones 12.6
    fence=600.0,  # [A] about two trips to L2
    warpgroups=WarpgroupUnits(
        multiply_adds=512.0,  # [M] m64nNk16 in N/2 clocks, on all four sub-partitions
        queue=7,  # [M] for N of 64 to 256, two and three warpgroups
        product_start=60.0,  # [M] 70 from the issue to a result that is there, less the next
        product_end=10.0,  # [M] 1 to 15 clocks more than the seven products that a full unit has to compute
        phase_wait=36.0,  # [M] 46.7 with the loop around it
        phase_hand_over=53.3,  # [M]
        named_barrier=25.3,  # [M] 33.3 for four warps, of which each takes 2
        bulk_copy=336.0,  # [M] of 128 bytes
        bulk_store=336.0,  # [A] as a bulk copy
        shared_l2_bytes=85.9,  # [M]
    ),
)

# Multiply-adds per clock and sub-partition, [W]: A100 312 TFLOP/s of 108 SMs at 1.41 GHz; RTX 3090 71 (sums in float32) and 142 of 82 at 1.695 GHz.
_A100_RATES = {"half": 256.0, "half16": 256.0, "tf32": 128.0, "int8": 512.0}
_GEFORCE_RATES = {"half": 64.0, "half16": 128.0, "tf32": 32.0, "int8": 256.0}

_A100 = replace(
    _H100,
    warpgroups=None,
    arch="sm_80",
    matrix_rates=_A100_RATES,
    fma=2.0,  # [G] 64 results
    imad=2.0,  # [G] 64
    alu=2.0,  # [G] 64
    half=1.0,  # [G] 256 results of two per lane
    convert=2.0,  # [G] 64
    mufu=8.0,  # [G] 16
    global_latency=283.0,  # [A]
    l2_bytes=36.0,  # [W] 5120 bytes per clock over 108 SMs, of which [A] the part that [M] an H100 reaches (3920 of 5120)
    reduction_bytes=15.4,  # [A] the part of l2_bytes that [M] an H100 reaches
)
_GA102 = replace(
    _A100, arch="sm_86", matrix_rates=_GEFORCE_RATES, fma=1.0, l2_bytes=24.0, reduction_bytes=10.2
)  # fma [G] 128; l2_bytes [A], a fifth of it is needed; reduction_bytes [A] as above
_AD102 = replace(_GA102, arch="sm_89")  # [W] 165.2 TFLOP/s of 128 SMs at 2.52 GHz: the rates of GA102
_GB202 = replace(_GA102, arch="sm_120", alu=1.0, imad=1.0)  # [W] 209.5 of 170 SMs at 2.407 GHz; integers at the rate of float32

MULTIPROCESSORS: dict[str, Multiprocessor] = {machine.arch: machine for machine in (_A100, _GA102, _AD102, _H100, _GB202)}


@dataclass(frozen=True)
class PowerLimit:
    """A card at its limit of power lowers its clock, the more the more its tensor cores do: `clock_ghz` where they do `share` of what they can, else by a power law."""

    share: float
    clock_ghz: float
    exponent: float


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: for people.
        arch: of its SMs.
        num_sms: of them.
        clock_ghz: under these kernels.
        memory_bytes_per_second: what a copy reaches.
        memory_latency: seconds until a copy from memory is there while others come from there, too.
        kernel_start: seconds from the end of a kernel to the first blocks of the next one in its stream.
        block_start: clocks from a block's place becoming free to the first instruction of the next block that has its arguments.
        power: how the clock falls under matrix products; None where that is not known.
    """

    name: str
    arch: str
    num_sms: int
    clock_ghz: float
    memory_bytes_per_second: float
    memory_latency: float = 1e-6  # [A]
    kernel_start: float = 1e-6  # [A]
    block_start: float = 600.0  # [A] about two trips to L2
    power: PowerLimit | None = None

    def clock_under(self, share: float) -> float:
        """GHz while so much of what the tensor cores can do is done."""
        limit = self.power
        return (
            self.clock_ghz
            if limit is None or share <= 0
            else min(self.clock_ghz, limit.clock_ghz * (limit.share / share) ** limit.exponent)
        )


_COPY_SHARE = 3.008 / 3.352  # [M] what a copy reaches of an H100's 3352 GB/s; [A] elsewhere

H100_POWER = PowerLimit(share=0.8, clock_ghz=1.56, exponent=0.35)
"""Fitted: with it the model comes within 7 % of the medians of two kernels that were measured at seqlen 16384, head_dim 64 and 128, full, without tokens (docs/timing.md)."""

CARDS: dict[str, Card] = {
    "sm_80": Card("A100 SXM 80 GB", "sm_80", 108, 1.41, 2.039e12 * _COPY_SHARE),  # [W] boost clock
    "sm_86": Card("RTX 3090", "sm_86", 82, 1.695, 0.936e12 * _COPY_SHARE),  # [W]
    "sm_89": Card("RTX 4090", "sm_89", 128, 2.52, 1.008e12 * _COPY_SHARE),  # [W]
    "sm_90": Card("H100 SXM", "sm_90", 132, 1.965, 3.008e12, power=H100_POWER),  # [M] the clock that most cases of attention.csv ran at
    "sm_120": Card("RTX 5090", "sm_120", 170, 2.407, 1.792e12 * _COPY_SHARE),  # [W]
}


def multiprocessor(arch: str) -> Multiprocessor:
    """The SM of an architecture.

    Raises:
        OptionError: nothing is known of it.
    """
    if arch not in MULTIPROCESSORS:
        hint = "Name an architecture whose constants cuflash/timing/machine.py has."
        raise OptionError("arch", arch, "one of " + ", ".join(MULTIPROCESSORS), hint)
    return MULTIPROCESSORS[arch]
