"""Device functions and launches that the tests of mbarriers, bulk copies and TMA share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from simulated import PRELUDE, compile_cuda, pack

from cuflash.errors import SimulatorError
from cuflash.simulator import Counters, Module, Options

ALL = [Options(threads=1, schedule="early"), Options(threads=1), *(Options(threads=1, schedule="random", seed=seed) for seed in range(4))]
SCHEDULES = ALL[:3]

HEADER = """
struct __align__(64) Map { char bytes[128]; };
__device__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ void init(u64* b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address(b)), "r"(n) : "memory"); }
__device__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void arrive(u64* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address(b)) : "memory"); }
__device__ u64 arrive_state(u64* b) {
    u64 s; asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(s) : "r"(address(b)) : "memory"); return s;
}
__device__ void arrive_expect(u64* b, u32 n) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address(b)), "r"(n) : "memory");
}
__device__ void expect(u64* b, u32 n) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(address(b)), "r"(n) : "memory");
}
__device__ void complete(u64* b, u32 n) {
    asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(address(b)), "r"(n) : "memory");
}
__device__ bool test(u64* b, u32 parity) {
    u32 done;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done) : "r"(address(b)), "r"(parity) : "memory");
    return done;
}
__device__ void wait(u64* b, u32 parity) {
    asm volatile("{.reg .pred p;\\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\\n@!p bra AGAIN;}"
        :: "r"(address(b)), "r"(parity) : "memory");
}
__device__ void load(void* to, const void* from, u32 n, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(address(to)), "l"(from), "r"(n), "r"(address(b)) : "memory");
}
__device__ void store(void* to, const void* from, u32 n) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(to), "r"(address(from)), "r"(n) : "memory");
}
__device__ void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ void wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory"); }
template <int N> __device__ void wait_group() { asm volatile("cp.async.bulk.wait_group %0;" :: "n"(N) : "memory"); }
"""


def launch(
    body: str,
    *arguments: Any,
    maps: Sequence[bytes] = (),
    options: Options | None = None,
    block: int = 32,
    cluster: int = 1,
    grid: int | None = None,
    shared: int = 0,
    element: str = "int",
) -> Counters:
    """Run a kernel with this body: one cluster, or `grid` blocks.

    Line 1 of the source is the header, line 2 the signature: tensor maps m0, m1, …, then arrays of `element` a, b, c, d; the body starts on line 3.
    """
    parameters = [f"const __grid_constant__ Map m{i}" for i in range(len(maps))]
    parameters += [f"{element}* {name}" for name, _ in zip("abcd", arguments, strict=False)]
    dims = f"__cluster_dims__({cluster}, 1, 1) " if cluster > 1 else ""
    source = (
        HEADER.replace("\n", " ") + f'\nextern "C" __global__ void {dims}k({", ".join(parameters)}) {{ int t = threadIdx.x;\n{body}\n}}'
    )
    module = Module(compile_cuda(source, "compute_90a"), sources={"test.cu": PRELUDE + source})
    buffers = [(array.ctypes.data, array.nbytes, f"array {i}") for i, array in enumerate(arguments) if isinstance(array, np.ndarray)]
    return module.launch(
        (grid or cluster, 1, 1), (block, 1, 1), shared, b"".join(maps) + pack(arguments), buffers, options or Options(threads=1)
    )


def report(body: str, *arguments: Any, **launch_options: Any) -> str:
    """The message of the check that stops this kernel."""
    with pytest.raises(SimulatorError) as caught:
        launch(body, *arguments, **launch_options)
    return str(caught.value)
