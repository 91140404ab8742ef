"""Stores of warps and reductions of blocks that nothing orders and whose order makes no difference."""

from __future__ import annotations

import numpy as np
import pytest
from mbarriers import ALL, launch
from simulated import run_cuda
from test_tensor_copy import SETUP, aligned, tensor_map

from cuflash.errors import SimulatorError
from cuflash.simulator import Options

BLOCK = """extern "C" __global__ void k(int* out) {
    __shared__ __align__(16) int s[64];
    STORE
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x % 4];
}"""
STORES = {
    "a word": "s[threadIdx.x % 4] = VALUE;",
    "vectors": "*(int4*)s = make_int4(VALUE, VALUE, VALUE, VALUE);",
    "64 bits": "*(long long*)(s + threadIdx.x % 2 * 2) = VALUE * 0x100000001ll;",
    "bytes": "((char*)s)[threadIdx.x % 16] = VALUE;",
}
OTHERS = [Options(threads=1, isa_rules=False, schedule=schedule) for schedule in ("late", "early", "random")]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_warps_that_store_the_same(store: str, options: Options) -> None:
    source = BLOCK.replace("STORE", STORES[store])
    out = np.zeros(128, np.int32)
    run_cuda(source.replace("VALUE", "7"), out, block=128, options=options)
    assert set(out.tolist()) == {0x07070707 if store == "bytes" else 7}
    with pytest.raises(SimulatorError) as strict:
        run_cuda(source.replace("VALUE", "7"), out, block=128)
    assert strict.value.check == "race"
    with pytest.raises(SimulatorError) as different:
        run_cuda(source.replace("VALUE", "int(threadIdx.x / 32 == 2)"), out, block=128, options=options)
    assert different.value.check == "race"


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_a_read_between_stores_of_the_same_is_a_race(options: Options) -> None:
    """Who reads may come before both."""
    source = BLOCK.replace(
        "STORE", "if (threadIdx.x == 0) s[0] = 7; __syncthreads(); if (threadIdx.x == 32) out[64] = s[0]; if (threadIdx.x >= 64) s[0] = 7;"
    )
    with pytest.raises(SimulatorError) as caught:
        run_cuda(source, np.zeros(128, np.int32), block=96, options=options)
    assert caught.value.check == "race"


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_a_store_of_what_an_atomic_has_made_is_a_race(options: Options) -> None:
    """In the other order the result is another."""
    store = "if (threadIdx.x == 0) s[0] = 3; __syncthreads(); if (threadIdx.x == 32) atomicAdd(s, 4); if (threadIdx.x == 64) s[0] = 7;"
    with pytest.raises(SimulatorError) as caught:
        run_cuda(BLOCK.replace("STORE", store).replace("s[threadIdx.x % 4]", "s[0]"), np.zeros(128, np.int32), block=96, options=options)
    assert caught.value.check == "race"


REDUCE = {
    "a range": 'asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%0], [%1], 128;" :: "l"(a), "r"(address(s)) : "memory");',
    "a box": 'asm volatile("cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.tile.bulk_group [%0, {0}], [%1];" :: "l"(&m0), "r"(address(s)) : "memory");',
}
"""Of 32 words in shared memory, to the same place for all blocks."""


@pytest.mark.parametrize("form", REDUCE)
@pytest.mark.parametrize("options", ALL, ids=str)
def test_blocks_that_reduce_to_the_same_place(form: str, options: Options) -> None:
    body = SETUP + "((u32*)s)[t] = t; fence_async(); __syncwarp(); if (t == 0) { REDUCE commit(); wait_group<0>(); }"
    out = aligned(np.zeros(32, np.uint32))
    run = {"maps": [tensor_map(out, (32,))], "shared": 128, "options": options}
    launch(body.replace("REDUCE", REDUCE[form]), out, grid=3, **run)
    np.testing.assert_array_equal(out, 3 * np.arange(32))
    mixed = body.replace("REDUCE", "if (blockIdx.x) { REDUCE } else a[5] = 1;").replace("REDUCE", REDUCE[form])
    with pytest.raises(SimulatorError) as caught:
        launch(mixed, out, grid=3, **run)
    assert caught.value.check == "race"
