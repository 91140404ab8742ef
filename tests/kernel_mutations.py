"""Every synchronising instruction of every kernel, left out or weakened, and which check of the simulator notices.

A kernel is compiled as the public calls compile it, one instruction of its PTX is changed (cuflash/simulator/mutation.py), and the same calls run with it
until a check fires or a result differs: under the schedule "late", under random ones, under "early". What survives is either a check that is missing or an
instruction that is not needed in that variant; kernel_mutations.json says which, and anything that it does not explain is an error.

    python tests/kernel_mutations.py --processes 2 --page docs/mutations.md --output mutants.md

runs all variants and writes docs/mutations.md, the counts and what survived, and where asked a table of all mutants by source line;
tests/test_mutations.py runs some variants.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ml_dtypes
import numpy as np
from caches import CacheCall

import cuflash
from cuflash import Tile
from cuflash.errors import SimulatorError
from cuflash.hardware import device
from cuflash.jit import cache
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.problem.tile import Tiles
from cuflash.runtime import calls as calls_of_cuflash
from cuflash.runtime import launch
from cuflash.simulator import Module, check, configure
from cuflash.simulator.mutation import Mutant, mutants

EXPLANATIONS = Path(__file__).with_suffix(".json")
SEEDS = range(4)
SURVIVED = ""
WRONG_RESULT = "result"

ELEMENTS: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
Shape = tuple[int, int, int, int]


# --- What runs ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The arrays of a call: small, but of several tiles in each direction, the last ones ragged.

    Attributes:
        query, key, value: shapes, (batch, seqlen, heads, head_dim).
        off: names of arrays whose rows do not start on 16 bytes, since their pitch is odd; kernels copy these element by element.
        options: further arguments of both calls.
        backward_options: further arguments of the backward call.
    """

    query: Shape
    key: Shape
    value: Shape
    off: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    backward_options: tuple[tuple[str, Any], ...] = ()

    def arrays(self, dtype: str) -> list[Any]:
        """Query, key, value and a gradient of the output, always the same numbers."""
        rng = np.random.default_rng(0)
        made = []
        shapes = {"query": self.query, "key": self.key, "value": self.value, "grad_out": (*self.query[:3], self.value[3])}
        for name, shape in shapes.items():
            pitch = shape[-1] + (name in self.off)
            rows = rng.standard_normal((*shape[:-1], pitch)).astype(np.float32).astype(ELEMENTS[dtype])
            made.append(rows[..., : shape[-1]])
        return made


GROUPED = Inputs((1, 75, 2, 32), (1, 150, 1, 32), (1, 150, 1, 32), options=(("enable_gqa", True),))
UNALIGNED = Inputs((1, 75, 2, 32), (1, 150, 2, 32), (1, 150, 2, 32), off=("query", "key", "value", "grad_out"))
QUERIES_OFF, KEYS_OFF = replace(GROUPED, off=("query", "grad_out")), replace(GROUPED, off=("key", "value"))
OFF = (UNALIGNED, QUERIES_OFF, KEYS_OFF)
BROADCAST = Inputs((2, 75, 2, 32), (1, 150, 1, 32), (1, 150, 1, 32), options=(("enable_gqa", True),))
BROADCAST_KEY = Inputs((2, 75, 2, 32), (1, 150, 1, 32), (2, 150, 2, 32), options=(("enable_gqa", True),))
BROADCAST_VALUE = Inputs((2, 75, 2, 32), (2, 150, 2, 32), (1, 150, 1, 32), options=(("enable_gqa", True),))
BLIND_ROWS = Inputs((1, 170, 1, 32), (1, 75, 1, 32), (1, 75, 1, 32), options=(("causal_alignment", "bottom_right"),))
FEW_QUERIES = Inputs((1, 20, 1, 32), (1, 150, 1, 32), (1, 150, 1, 32))
SLABS = Inputs((1, 150, 3, 64), (1, 200, 1, 64), (1, 200, 1, 64), options=(("enable_gqa", True),))
BLIND_SLABS = Inputs((1, 300, 2, 64), (1, 90, 2, 64), (1, 90, 2, 64), options=(("causal_alignment", "bottom_right"),))
KEY_SLABS = Inputs((1, 150, 2, 64), (1, 300, 1, 64), (1, 300, 1, 64), options=(("enable_gqa", True), ("causal_alignment", "bottom_right")))
MORE_QUERY_SLABS = replace(KEY_SLABS, query=(1, 310, 2, 64))
THREE_SLABS = Inputs(
    (1, 110, 2, 136), (1, 190, 1, 136), (1, 190, 1, 72), options=(("enable_gqa", True), ("causal_alignment", "bottom_right"))
)
WIDE_VALUE_SLABS = Inputs((1, 75, 2, 40), (1, 140, 1, 40), (1, 140, 1, 136), options=(("enable_gqa", True),))
MASKED_WIDE_VALUE_SLABS = replace(
    WIDE_VALUE_SLABS,
    options=(("enable_gqa", True), ("attn_mask", (np.random.default_rng(1).random((75, 144)) * np.tri(75, 144, 60) > 0.3)[:, :140])),
)
WINDOW_SLABS = Inputs((1, 150, 2, 64), (1, 300, 2, 64), (1, 300, 2, 64), options=(("window", (70, 60)),))
BLIND_WINDOW_SLABS = Inputs((1, 500, 2, 64), (1, 90, 2, 64), (1, 90, 2, 64), options=(("window", (100, 20)),))
TWO_SLABS = Inputs((1, 150, 2, 128), (1, 200, 1, 128), (1, 200, 1, 128), options=(("enable_gqa", True),))
BLIND_TWO_SLABS = Inputs((1, 300, 2, 128), (1, 90, 2, 128), (1, 90, 2, 128), options=(("causal_alignment", "bottom_right"),))
WIDE_SLABS = Inputs((1, 50, 3, 264), (1, 90, 1, 264), (1, 90, 1, 264), options=(("enable_gqa", True), ("causal_alignment", "bottom_right")))
WIDE_LENGTHS_SLABS = Inputs(
    (2, 3, 4, 512), (2, 90, 2, 512), (2, 90, 2, 200), options=(("enable_gqa", True), ("seqlens_kv", np.array([90, 33], np.int32)))
)
LENGTHS_SLABS = Inputs((4, 150, 2, 64), (4, 90, 2, 64), (4, 90, 2, 64), options=(("seqlens_kv", np.array([90, 20, 70, 0], np.int32)),))
QUERY_LENGTHS_SLABS = Inputs(
    (4, 300, 2, 64), (4, 90, 2, 64), (4, 90, 2, 64),
    options=(("seqlens_q", np.array([300, 20, 150, 0], np.int32)), ("seqlens_kv", np.array([90, 20, 0, 90], np.int32))),
)  # fmt: skip
MASKED_SLABS, BLIND_MASKED_SLABS = (
    Inputs(
        (1, seqlen, 4, 64), (1, 90, 4, 64), (1, 90, 4, 64),
        options=(("attn_mask", (np.random.default_rng(1).random((seqlen, 90)) > 0.3) & (np.arange(seqlen) < seeing)[:, None]),),
    )
    for seqlen, seeing in ((150, 150), (400, 128))
)  # fmt: skip
WIDE = Inputs((1, 75, 1, 128), (1, 300, 1, 128), (1, 300, 1, 128))
SLICED = Inputs((1, 70, 2, 288), (1, 75, 1, 288), (1, 75, 1, 288), options=(("enable_gqa", True),))
SLICED_OFF = (replace(SLICED, off=("query", "grad_out")), replace(SLICED, off=("key", "value")), replace(SLICED, off=UNALIGNED.off))
IN_STEPS = Inputs((1, 40, 2, 304), (1, 37, 1, 304), (1, 37, 1, 304), options=(("enable_gqa", True),))
IN_STEPS_520 = Inputs((1, 37, 2, 520), (1, 40, 1, 520), (1, 40, 1, 520), options=(("enable_gqa", True),))
WIDER_VALUE = Inputs((1, 75, 2, 32), (1, 150, 1, 32), (1, 150, 1, 72), options=(("enable_gqa", True),))
LENGTHS = Inputs(
    (3, 75, 1, 32), (1, 150, 1, 32), (1, 150, 1, 32), options=(("seqlens_kv", np.array([150, 20, 70], np.int32)), ("window", (40, 90)))
)
SINKS = Inputs(
    (1, 75, 2, 32), (1, 150, 1, 32), (1, 150, 1, 32), options=(("enable_gqa", True), ("sinks", np.array([0.5, 2.0], np.float32)))
)


HUGE_ROWS = slice(40, None)  # the first tile of queries has none


def _masked(shape: tuple[int, ...], boolean: bool = False, seqlen_q: int = 75) -> Inputs:
    """Two heads with a mask of this shape, of which a boolean one empties tiles, and an additive one has rows of huge scores and gets its gradient."""
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    if boolean:
        values[..., :64] = -np.inf
    elif len(shape) > 1:
        values[..., HUGE_ROWS, :] = -1e9
    options: tuple[tuple[str, Any], ...] = (("attn_mask", values > 0 if boolean else values),)
    grad = () if boolean else (("need_attn_mask_grad", True),)
    return Inputs((1, seqlen_q, 2, 32), (1, 150, 1, 32), (1, 150, 1, 32), options=(("enable_gqa", True), *options), backward_options=grad)


BOOLEAN_MASK = (
    _masked((2, 75, 150), boolean=True), _masked((75, 150), boolean=True),
    _masked((140, 150), boolean=True, seqlen_q=140),  # lists of more tiles than their kernel has warps, for tiles of keys too
)  # fmt: skip
ADDITIVE_MASK = tuple(_masked(shape) for shape in ((75, 150), (150,), (75, 1), (1,)))
MASK_OF_EACH_PAIR = (_masked((2, 75, 150)),)  # whose gradient the kernel of dQ stores
MASKED_IN_STEPS = Inputs(
    (1, 37, 2, 488), (1, 40, 1, 488), (1, 40, 1, 488),
    options=(("enable_gqa", True), ("attn_mask", np.linspace(-1001, -999, 40, dtype=np.float32))),  # scores are huge, and differ
    backward_options=(("need_attn_mask_grad", True),),
)  # fmt: skip


def _with_huge_rows(inputs: Inputs) -> Inputs:
    """The same with a mask that makes the scores of the last queries huge."""
    mask = np.where(np.arange(inputs.query[1]) < inputs.query[1] // 2, 0, -1e9).astype(np.float32)[:, None]
    return replace(inputs, options=(*inputs.options, ("attn_mask", mask)))


@dataclass(frozen=True)
class Variant:
    """One compilation of the kernels of a pass, and the calls that run it.

    A mutant survives a variant only if it survives all of its calls. Without a `tile` the calls choose theirs. `only` names the one kernel that is
    mutated, or its file, where the others are as in another variant. `num_sms`: so many has the simulator, for blocks that stay.
    """

    name: str
    arch: str
    dtype: str
    tile: Tiles
    inputs: tuple[Inputs, ...]
    backward: bool = False
    is_causal: bool = False
    allow_tf32: bool = False
    only: str | None = None
    num_sms: int | None = None

    @property
    def device(self) -> device.Device:
        """What the simulator poses as."""
        on = device.of_arch(self.arch)
        return on if self.num_sms is None else replace(on, num_sms=self.num_sms)

    def calls(self) -> list[Callable[[], Any]]:
        """The public calls, to be made while the simulator poses as `arch`."""
        return [self._call(inputs) for inputs in self.inputs]

    def _call(self, inputs: Inputs) -> Callable[[], Any]:
        arrays = inputs.arrays(self.dtype)
        options = {"is_causal": self.is_causal, "allow_tf32": self.allow_tf32, "tile": self.tile, **dict(inputs.options)}
        if not self.backward:
            return functools.partial(cuflash.scaled_dot_product_attention, *arrays[:3], return_lse=True, **options)
        query, key, value, grad_out = arrays
        out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True, **{**options, "tile": None})
        options |= dict(inputs.backward_options)
        return functools.partial(cuflash.scaled_dot_product_attention_backward, grad_out, query, key, value, out, lse, **options)

    def kernels(self) -> list[KernelPlan]:
        """The kernels that the calls launch, each once; they are the same for all `inputs`."""
        found: dict[tuple[str, str], KernelPlan] = {}
        for inputs in self.inputs:
            arrays = inputs.arrays(self.dtype)[:3]
            options = {"is_causal": self.is_causal, "allow_tf32": self.allow_tf32, "tile": self.tile, **dict(inputs.options)}
            if self.backward:
                options |= dict(inputs.backward_options)
            for kernel in cuflash.plan(*arrays, backward=self.backward, **options).kernels:
                if self.only in (None, kernel.source, kernel.name):
                    found.setdefault((kernel.source, kernel.config), kernel)
        return list(found.values())


def _negative(inputs: Inputs) -> Inputs:
    """The same with a negative scale, which the forward kernel takes into Q."""
    return replace(inputs, options=(*inputs.options, ("scale", -0.2)))


@dataclass(frozen=True)
class CacheVariant(Variant):
    """Calls with a cache.

    Attributes:
        is_paged: the cache has pages.
        num_splits: of several steps each, or stream-K.
        scales: of a cache in e4m3, as `CacheCall` has them.
    """

    is_paged: bool = False
    num_splits: int | str = 2
    scales: str = ""

    def calls(self) -> list[Callable[[], Any]]:
        return [functools.partial(cuflash.attention_with_kvcache, **arguments, return_lse=True) for arguments in self._arguments()]

    def kernels(self) -> list[KernelPlan]:
        found = {
            (kernel.source, kernel.config): kernel
            for arguments in self._arguments()
            for kernel in cuflash.kvcache_plan(**arguments).kernels
        }
        return list(found.values())

    def _arguments(self) -> Iterator[dict[str, Any]]:
        call = CacheCall(
            (260, 20), 3, 2, 6, 2, page_size=16 * self.is_paged, rotary_dim=16, dtype=self.dtype, scales=self.scales,
            options={"is_causal": True, "num_splits": self.num_splits, "tile": self.tile},
        )  # fmt: skip
        arguments = call.arrays()
        tables = {
            name: arguments[name].astype(ELEMENTS[self.dtype]) for name in ("rotary_cos", "rotary_sin")
        }  # so that both are calls of one kernel
        rotary = tables | {"rotary_interleaved": arguments["rotary_interleaved"]}
        plain = {name: array for name, array in arguments.items() if name not in rotary}
        yield plain
        wider = np.zeros((*arguments["query"].shape[:-1], call.head_dim + 1), arguments["query"].dtype)
        query, wider[..., :-1] = wider[..., :-1], arguments["query"]
        caches = {}
        for name in ("key_cache", "value_cache"):
            rows = np.zeros((*arguments[name].shape[:-1], call.head_dim + 1), arguments[name].dtype)
            rows[..., :-1] = arguments[name]
            caches[name] = rows[..., :-1]
        yield plain | rotary | caches | {"query": query}  # rows that do not start on 16 bytes


@dataclass(frozen=True)
class JvpVariant(Variant):
    """Calls of tangents, of all inputs and of the query and value alone."""

    def _call(self, inputs: Inputs) -> Callable[[], Any]:
        query, key, value, _ = inputs.arrays(self.dtype)
        options = {"is_causal": self.is_causal, **dict(inputs.options)}
        out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True, **options)
        tangents = [np.flip(x, 1) for x in (query, key, value)]  # other numbers, with strides of their own
        call = functools.partial(cuflash.scaled_dot_product_attention_jvp, tile=self.tile, **options)
        return lambda: (*call(*tangents, query, key, value, out, lse), *call(tangents[0], None, tangents[2], query, key, value, out, lse))

    def kernels(self) -> list[KernelPlan]:
        found = {}
        for inputs in self.inputs:
            options = {"is_causal": self.is_causal, "tile": self.tile, **dict(inputs.options)}
            for kernel in cuflash.plan(*inputs.arrays(self.dtype)[:3], jvp=True, **options).kernels:
                found[kernel.source, kernel.config] = kernel
        return list(found.values())


def _stages(number: int) -> str:
    return f"{number} stage{'s' if number > 1 else ''}"


def _variants() -> Iterator[Variant]:
    both = (GROUPED, _negative(GROUPED))
    for stages in (2, 3):
        few = {"forward_split": Tile(16, 32, 2, stages)}
        yield CacheVariant(f"cache sm_80 float16, {_stages(stages)}", "sm_80", "float16", few, ())
        yield CacheVariant(f"cache sm_80 float16 paged, {_stages(stages)}", "sm_80", "float16", few, (), is_paged=True)
    few = {"forward_split": Tile(16, 32, 2, 2)}
    yield CacheVariant("cache sm_80 float16 stream-K, 2 stages", "sm_80", "float16", few, (), num_splits="stream-K", num_sms=1)
    yield CacheVariant(
        "cache sm_90 float16 in e4m3, 3 stages", "sm_90", "float16", {"forward_split": Tile(16, 32, 2, 3)}, (), scales="heads"
    )
    for stages in (1, 2, 3, 4):
        yield Variant(f"forward sm_80 float16, {_stages(stages)}", "sm_80", "float16", Tile(32, 32, 2, stages), both)
    for stages in (1, 2):
        yield Variant(
            f"forward sm_80 float16 causal, {_stages(stages)}",
            "sm_80",
            "float16",
            Tile(32, 32, 2, stages),
            (*both, BLIND_ROWS),
            is_causal=True,
        )
    yield Variant("forward sm_90 bfloat16, 2 stages", "sm_90", "bfloat16", Tile(64, 32, 2, 2), both)
    slabs = {"forward_wgmma": Tile(128, 16, 8, 2)}
    yield Variant(
        "forward sm_90 bfloat16 wgmma causal, 2 stages", "sm_90", "bfloat16", slabs, (SLABS, BLIND_SLABS), is_causal=True, num_sms=1
    )
    yield Variant("forward sm_90 float16 wgmma window, 2 stages", "sm_90", "float16", slabs, (WINDOW_SLABS, BLIND_WINDOW_SLABS), num_sms=1)
    yield Variant("forward sm_90 float16 wgmma lengths, 2 stages", "sm_90", "float16", slabs, (LENGTHS_SLABS,), num_sms=1)
    yield Variant("forward sm_90 float16 wgmma lengths of queries, 2 stages", "sm_90", "float16", slabs, (QUERY_LENGTHS_SLABS,), num_sms=1)
    yield Variant(
        "forward sm_90 bfloat16 wgmma boolean mask, 2 stages",
        "sm_90",
        "bfloat16",
        slabs,
        (MASKED_SLABS, BLIND_MASKED_SLABS),
        only="forward_wgmma.cu",
        num_sms=1,
    )
    float32 = {"forward_wgmma_float32": Tile(128, 16, 8, 2)}
    yield Variant(
        "forward sm_90 float32 wgmma causal, 2 stages", "sm_90", "float32", float32, (SLABS, BLIND_SLABS),
        is_causal=True, only="forward_wgmma_float32.cu", num_sms=1,
    )  # fmt: skip
    one_stage = {"forward_wgmma_float32": Tile(128, 32, 8, 1)}
    yield Variant(
        "forward sm_90 float32 wgmma two slabs, 1 stage", "sm_90", "float32", one_stage, (TWO_SLABS, BLIND_TWO_SLABS),
        is_causal=True, only="forward_wgmma_float32.cu", num_sms=1,
    )  # fmt: skip
    wide = {"forward_wgmma_wide": Tile(64, 16, 8, 2)}
    yield Variant("forward sm_90 float16 wgmma wide causal, 2 stages", "sm_90", "float16", wide, (WIDE_SLABS,), is_causal=True)
    yield Variant("forward sm_90 bfloat16 wgmma wide lengths, 2 stages", "sm_90", "bfloat16", wide, (WIDE_LENGTHS_SLABS,))
    yield Variant("forward sm_80 float32, 1 stage", "sm_80", "float32", Tile(32, 32, 2, 1), both)
    yield Variant("forward sm_80 float32, 2 stages", "sm_80", "float32", Tile(32, 32, 2, 2), both)
    yield Variant("forward sm_80 TF32, 2 stages", "sm_80", "float32", Tile(32, 32, 2, 2), both, allow_tf32=True)
    yield Variant("forward sm_75 float16", "sm_75", "float16", Tile(32, 32, 2, 1), both)
    yield Variant("forward sm_75 float16 causal", "sm_75", "float16", Tile(32, 32, 2, 1), (*both, BLIND_ROWS), is_causal=True)
    yield Variant("forward sm_75 float16, not staged", "sm_75", "float16", Tile(32, 64, 2, 1), (WIDE, _negative(WIDE)))
    yield Variant("forward sm_75 float32", "sm_75", "float32", Tile(32, 32, 2, 1), both)
    yield Variant("forward sm_75 bfloat16", "sm_75", "bfloat16", Tile(32, 32, 2, 1), both)

    for stages in (1, 2):
        yield Variant(
            f"forward sm_80 float16 sliced, {_stages(stages)}",
            "sm_80",
            "float16",
            Tile(32, 32, 4, stages),
            (SLICED, _negative(SLICED)),
        )
    yield Variant("forward sm_75 float32 sliced, in steps", "sm_75", "float32", Tile(32, 16, 6, 1), (IN_STEPS,))
    yield Variant(
        "forward sm_80 float16, wider value, 2 stages", "sm_80", "float16", Tile(32, 32, 2, 2), (WIDER_VALUE, _negative(WIDER_VALUE))
    )
    yield Variant(
        "forward sm_80 float16 boolean mask, 2 stages", "sm_80", "float16", Tile(32, 32, 2, 2), (*BOOLEAN_MASK, _negative(BOOLEAN_MASK[0]))
    )
    yield Variant("forward sm_80 float16 lengths, 2 stages", "sm_80", "float16", Tile(32, 32, 2, 2), (LENGTHS, _negative(LENGTHS)))

    sums = (GROUPED, BROADCAST)
    for stages in (1, 2, 3):
        yield Variant(f"backward sm_80 float16, {_stages(stages)}", "sm_80", "float16", Tile(32, 32, 2, stages), sums, backward=True)
    for stages in (1, 2):
        yield Variant(
            f"backward sm_80 float16 causal, {_stages(stages)}", "sm_80", "float16", Tile(32, 32, 2, stages), (*sums, BLIND_ROWS), backward=True, is_causal=True
        )  # fmt: skip
        yield Variant(
            f"backward sm_80 float16 split, {_stages(stages)}",
            "sm_80",
            "float16",
            Tile(32, 32, 2, stages),
            (BROADCAST_KEY, BROADCAST_VALUE),
            backward=True,
        )
        yield Variant(f"backward sm_80 float32, {_stages(stages)}", "sm_80", "float32", Tile(32, 32, 2, stages), sums, backward=True)
    for stages in (1, 2, 3):
        fused = {"backward_fused": Tile(32, 32, 2, stages)}
        yield Variant(f"backward sm_80 float16 fused, {_stages(stages)}", "sm_80", "float16", fused, (*sums, FEW_QUERIES), backward=True)
        yield Variant(
            f"backward sm_80 float16 fused causal, {_stages(stages)}", "sm_80", "float16", fused, (*sums, BLIND_ROWS), backward=True, is_causal=True
        )  # fmt: skip
    yield Variant(
        "backward sm_90 bfloat16 fused, 2 stages", "sm_90", "bfloat16", {"backward_fused": Tile(32, 64, 4, 2)}, sums, backward=True
    )
    slabs = {"backward_wgmma": Tile(32, 128, 8, 2)}
    yield Variant(
        "backward sm_90 bfloat16 wgmma causal, 2 stages", "sm_90", "bfloat16", slabs, (MORE_QUERY_SLABS, BLIND_SLABS), backward=True, is_causal=True,
        only="backward_wgmma.cu", num_sms=1,  # so few that no block shares out queries
    )  # fmt: skip
    yield Variant(  # no more queries than keys: its blocks make dQ of their sums
        "backward sm_90 bfloat16 wgmma causal, with dQ, 2 stages", "sm_90", "bfloat16", slabs, (KEY_SLABS,), backward=True, is_causal=True,
        only="backward_wgmma.cu",
    )  # fmt: skip
    yield Variant(  # so many SMs that four blocks share out the queries of a tile of keys, and dQ is added up in two chains
        "backward sm_90 bfloat16 wgmma query splits, 2 stages", "sm_90", "bfloat16", slabs, (MORE_QUERY_SLABS,), backward=True,
        only="backward_wgmma.cu", num_sms=12,
    )  # fmt: skip
    yield Variant(  # so many columns of K that dV is waited for before dQ is issued
        "backward sm_90 bfloat16 wgmma three slabs, 2 stages", "sm_90", "bfloat16", slabs, (THREE_SLABS,), backward=True, is_causal=True,
        only="backward_wgmma.cu", num_sms=1,
    )  # fmt: skip
    alone = {"backward_wgmma_dv": Tile(32, 128, 8, 2), "backward_wgmma_dkdq": Tile(32, 128, 8, 2)}
    for name, inputs in (("", (WIDE_VALUE_SLABS,)), (", boolean mask", (MASKED_WIDE_VALUE_SLABS,))):
        yield Variant(
            f"backward sm_90 float16 wgmma dV alone{name}, 2 stages", "sm_90", "float16", alone, inputs, backward=True,
            only="backward_wgmma_dv", num_sms=1,
        )  # fmt: skip
    yield Variant("backward sm_90 bfloat16, 2 stages", "sm_90", "bfloat16", Tile(32, 64, 2, 2), sums, backward=True)
    yield Variant("backward sm_75 float16", "sm_75", "float16", Tile(32, 32, 2, 1), sums, backward=True)
    yield Variant(
        "backward sm_75 float16 causal", "sm_75", "float16", Tile(32, 32, 2, 1), (*sums, BLIND_ROWS), backward=True, is_causal=True
    )
    yield Variant("backward sm_75 float16 split", "sm_75", "float16", Tile(32, 32, 2, 1), (BROADCAST_KEY, BROADCAST_VALUE), backward=True)
    yield Variant("backward sm_75 float32", "sm_75", "float32", Tile(32, 32, 2, 1), sums, backward=True)
    yield Variant("backward sm_75 bfloat16", "sm_75", "bfloat16", Tile(32, 32, 2, 1), sums, backward=True)
    for stages in (1, 2):
        yield Variant(
            f"backward sm_80 float16 sliced, {_stages(stages)}", "sm_80", "float16", Tile(32, 32, 4, stages), (SLICED,), backward=True
        )  # fmt: skip
        yield Variant(
            f"backward sm_80 float16 lengths, {_stages(stages)}", "sm_80", "float16", Tile(32, 32, 2, stages), (LENGTHS,), backward=True
        )
        yield Variant(
            f"backward sm_80 float16 boolean mask, {_stages(stages)}", "sm_80", "float16", Tile(32, 32, 2, stages), BOOLEAN_MASK, backward=True
        )  # fmt: skip
    by_queries, by_keys = Tile(32, 16, 4, 1), Tile(16, 32, 8, 1)
    yield Variant(
        "backward sm_75 float16 sliced, additive mask, in steps", "sm_75", "float16",
        {"backward_dkdv": by_keys, "backward_dq": by_queries, "backward_mask": by_queries}, (MASKED_IN_STEPS,), backward=True,
    )  # fmt: skip
    yield Variant(
        "backward sm_80 float32 sliced, in steps", "sm_80", "float32",
        {"backward_dv": Tile(16, 16, 4, 1), "backward_dk": by_keys, "backward_dq": by_keys.transposed()}, (IN_STEPS_520,), backward=True,
    )  # fmt: skip
    yield Variant("backward sm_80 float16, wider value, 2 stages", "sm_80", "float16", Tile(32, 32, 2, 2), (WIDER_VALUE,), backward=True)
    yield Variant("backward sm_80 float16 additive mask, 1 stage", "sm_80", "float16", Tile(32, 64, 2, 1), ADDITIVE_MASK, backward=True)
    yield Variant(
        "backward sm_80 float16 mask of each pair, 1 stage", "sm_80", "float16", Tile(32, 64, 2, 1), MASK_OF_EACH_PAIR, backward=True
    )
    yield Variant("backward sm_75 float16 additive mask", "sm_75", "float16", Tile(32, 64, 2, 1), ADDITIVE_MASK, backward=True)
    row_sums = "backward_row_sums_mma.cu"
    for stages in (1, 2, 3):
        narrow, sliced = Tile(32, 32, 2, stages), Tile(32, 32, 4, stages)
        yield Variant(
            f"backward sm_80 float16 huge rows, {_stages(stages)}", "sm_80", "float16",
            {"backward_row_sums": narrow, "backward_dkdv": narrow, "backward_dq": narrow}, tuple(map(_with_huge_rows, sums)), backward=True,
        )  # fmt: skip
        yield Variant(
            f"backward sm_80 float16 sliced, huge rows, {_stages(stages)}", "sm_80", "float16",
            {"backward_row_sums": sliced}, (_with_huge_rows(SLICED),), backward=True, only=row_sums,
        )  # fmt: skip
    in_steps = {"backward_row_sums": Tile(32, 16, 4, 1)}
    for arch, dtype, tile, inputs in (("sm_75", "float16", {}, sums), ("sm_75", "float32", in_steps, (IN_STEPS_520,))):
        name = f"backward {arch} {dtype} {'sliced, huge rows, in steps' if tile else 'huge rows'}"
        yield Variant(name, arch, dtype, tile, tuple(map(_with_huge_rows, inputs)), backward=True, only=row_sums)
    # Kernels in which each array says whether its rows start on 16 bytes.
    narrow, sliced = Tile(32, 32, 2, 2), Tile(32, 32, 4, 2)
    yield Variant("forward sm_80 float16 off 16 bytes, 2 stages", "sm_80", "float16", narrow, (*OFF, _negative(KEYS_OFF)))
    yield Variant("forward sm_75 float16 off 16 bytes", "sm_75", "float16", Tile(32, 32, 2, 1), (*OFF, _negative(KEYS_OFF)))
    yield Variant(
        "forward sm_80 float16 sliced, off 16 bytes, 2 stages", "sm_80", "float16", sliced, (*SLICED_OFF, *map(_negative, SLICED_OFF))
    )
    for stages in (1, 2):
        yield Variant(
            f"backward sm_80 float16 off 16 bytes, {_stages(stages)}", "sm_80", "float16", Tile(32, 32, 2, stages), OFF, backward=True
        )
    yield Variant("backward sm_75 float16 off 16 bytes", "sm_75", "float16", Tile(32, 32, 2, 1), OFF, backward=True)
    yield Variant(
        "backward sm_80 float16 fused, off 16 bytes, 2 stages", "sm_80", "float16", {"backward_fused": narrow}, OFF, backward=True
    )
    yield Variant("backward sm_80 float16 sliced, off 16 bytes, 2 stages", "sm_80", "float16", sliced, SLICED_OFF, backward=True)
    yield Variant(
        "backward sm_80 float16 huge rows, off 16 bytes, 2 stages", "sm_80", "float16", {"backward_row_sums": narrow},
        tuple(map(_with_huge_rows, OFF)), backward=True, only=row_sums,
    )  # fmt: skip
    yield Variant("backward sm_80 float16 sinks, 2 stages", "sm_80", "float16", Tile(32, 32, 2, 2), (SINKS,), backward=True)
    for stages in (1, 2, 3):
        yield JvpVariant(f"jvp sm_80 float16, {_stages(stages)}", "sm_80", "float16", Tile(32, 32, 2, stages), (GROUPED, SINKS))
    yield JvpVariant("jvp sm_80 float16 causal, 2 stages", "sm_80", "float16", narrow, (GROUPED, BLIND_ROWS), is_causal=True)
    yield JvpVariant("jvp sm_80 float16 off 16 bytes, 2 stages", "sm_80", "float16", narrow, OFF)
    yield JvpVariant("jvp sm_80 float16 sliced, 1 stage", "sm_80", "float16", Tile(32, 32, 4, 1), (SLICED,))
    yield JvpVariant("jvp sm_75 float16", "sm_75", "float16", Tile(32, 32, 2, 1), (GROUPED,))
    yield JvpVariant("jvp sm_75 float32 sliced, in steps", "sm_75", "float32", Tile(32, 16, 6, 1), (IN_STEPS,))


VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _variants()}


# --- Running mutants ----------------------------------------------------------------------------------------------------------------------


MAX_INSTRUCTIONS = 2**22
"""Of a warp: far more than any of these kernels executes, unless it waits for what does not come."""


@dataclass(frozen=True)
class Outcome:
    """What happened to one mutant.

    Attributes:
        variant, kernel: names; the kernel is a file.
        mutant: without its PTX.
        caught: name of the check that fired, `WRONG_RESULT`, or `SURVIVED`.
        schedule: under which it was caught.
    """

    variant: str
    kernel: str
    mutant: Mutant
    caught: str
    schedule: str


@contextlib.contextmanager
def running(kernel: KernelPlan, on: device.Device, ptx: str) -> Iterator[None]:
    """Launches of a kernel take this PTX instead of the compiler's."""
    executable: Any = launch.executable(kernel, on)
    original = executable._module
    executable._module = Module(ptx, kernel.entry)
    try:
        yield
    finally:
        executable._module = original


def _bits(result: Any) -> list[bytes]:
    others = (getattr(result, name, None) for name in ("attn_mask", "sinks"))  # a gradient that is no element of the tuple
    return [np.ascontiguousarray(array).tobytes() for array in (*result, *others) if array is not None]


def _catch(calls: Sequence[Callable[[], Any]], want: Sequence[list[bytes]]) -> tuple[str, str]:
    """What catches the kernels that the calls launch now, and under which schedule."""
    for schedule, seed in (("late", 0), *(("random", seed) for seed in SEEDS), ("early", 0)):
        with configure(schedule=schedule, seed=seed, max_instructions=MAX_INSTRUCTIONS):
            for call, bits in zip(calls, want, strict=True):
                try:
                    result = call()
                except SimulatorError as error:
                    if not error.check:
                        raise
                    return error.check, schedule
                if _bits(result) != bits:
                    return WRONG_RESULT, schedule
    return SURVIVED, ""


def run_variant(name: str) -> list[Outcome]:
    """All mutants of all kernels of a variant.

    Raises:
        SimulatorError: the kernels as they are do not pass.
    """
    variant = VARIANTS[name]
    previous, found = os.environ.get("CUFLASH_SIMULATOR_ARCH"), device.of_memory
    os.environ["CUFLASH_SIMULATOR_ARCH"] = variant.arch
    on = variant.device
    device.of_memory = lambda kind, index: on
    calls_of_cuflash._calls.clear()  # those that were made for another number of SMs
    outcomes = []
    try:
        calls = variant.calls()
        for call in calls:
            check(call, seeds=SEEDS)
        want = [_bits(call()) for call in calls]
        for kernel in variant.kernels():
            for mutant in mutants(cache.fetch(kernel.request(on)).data, kernel.entry):
                with running(kernel, on, mutant.ptx):
                    caught, schedule = _catch(calls, want)
                bare = Mutant(mutant.statement, mutant.instruction, mutant.change, mutant.source, "")
                outcomes.append(Outcome(name, kernel.source, bare, caught, schedule))
        assert _catch(calls, want) == (SURVIVED, "")  # the original is back
    finally:
        device.of_memory = found
        calls_of_cuflash._calls.clear()
        if previous is None:
            del os.environ["CUFLASH_SIMULATOR_ARCH"]
        else:
            os.environ["CUFLASH_SIMULATOR_ARCH"] = previous
    return outcomes


# --- Explanations and the table -----------------------------------------------------------------------------------------------------------


@functools.cache
def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


@dataclass(frozen=True)
class Explanation:
    """Why mutants survive.

    Attributes:
        kernel: file in kernels/.
        line: part of the text of one of the mutant's source lines.
        changes: what was done to the instruction.
        variants: patterns of names.
        why: for the table.
    """

    kernel: str
    line: str
    changes: tuple[str, ...]
    variants: tuple[str, ...]
    why: str

    def covers(self, outcome: Outcome) -> bool:
        """Whether this outcome is meant."""
        return (
            outcome.kernel == self.kernel
            and outcome.mutant.change in self.changes
            and any(fnmatch.fnmatchcase(outcome.variant, pattern) for pattern in self.variants)
            and any(self.line in _lines(path)[line - 1] for path, line in outcome.mutant.source)
        )


def explanations() -> list[Explanation]:
    """The contents of kernel_mutations.json."""
    entries = json.loads(EXPLANATIONS.read_text())
    return [Explanation(e["kernel"], e["line"], tuple(e["changes"]), tuple(e["variants"]), e["why"]) for e in entries]


def unexplained(outcomes: Sequence[Outcome], known: Sequence[Explanation]) -> list[Outcome]:
    """Mutants that survived without a reason on file."""
    return [outcome for outcome in outcomes if outcome.caught == SURVIVED and not any(e.covers(outcome) for e in known)]


def describe(outcome: Outcome) -> str:
    """One mutant for people."""
    lines = " < ".join(f"{Path(path).name}:{line} `{_lines(path)[line - 1].strip()}`" for path, line in outcome.mutant.source)
    return f"{outcome.variant}, {outcome.kernel}: {outcome.mutant.instruction} {outcome.mutant.change} at {lines}"


@dataclass
class _Row:
    """The same change at the same source line in all variants."""

    caught: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, set[str]] = field(default_factory=dict)  # explanation -> variants


def _label(outcome: Outcome) -> tuple[str, str, str]:
    """Source lines outermost first, instruction without its numbers, change."""
    where = " → ".join(f"{Path(path).name}:{line}" for path, line in reversed(outcome.mutant.source) if Path(path).parent.name != "ptx")
    return where, outcome.mutant.instruction.rstrip(";").split()[0], outcome.mutant.change


def counts(outcomes: Sequence[Outcome]) -> str:
    """One sentence: how many mutants there were, and what became of them."""
    checks = Counter(outcome.caught for outcome in outcomes)
    became = ", ".join(f"{count} {name or 'survived, each explained below'}" for name, count in checks.most_common())
    return f"{len(outcomes)} mutants in {len({o.variant for o in outcomes})} variants: {became}."


def _why(outcome: Outcome, known: Sequence[Explanation]) -> str:
    return next((e.why for e in known if e.covers(outcome)), "UNEXPLAINED")


def page(outcomes: Sequence[Outcome], known: Sequence[Explanation]) -> str:
    """The committed report: counts for each kernel, and what survived, named by the text of its source lines."""
    checks = [name for name, _ in Counter(outcome.caught for outcome in outcomes).most_common() if name]
    lines = [
        "# What happens when a synchronisation is forgotten",
        "",
        "Written by `python tests/kernel_mutations.py --page docs/mutations.md`; explanations are kept in `tests/kernel_mutations.json`, and `--output FILE` writes a",
        "table of all mutants by source line.",
        "",
        "Every instruction of every kernel that orders memory accesses or waits was left out or weakened, one at a time, in PTX, and the same public calls were",
        "run with it on the simulator with all checks on: under the schedule `late`, then random ones, then `early`. A number counts mutants over all variants (dtype,",
        'architecture, stages, causal) and all copies of an inlined or unrolled line; "race" and the like are names of checks (`simulator.md`), "result" means that',
        "no check fired but a result had other bits.",
        "",
        counts(outcomes),
        "",
        f"| kernel | mutants | {' | '.join(checks)} | survived |",
        "|---" * (len(checks) + 3) + "|",
    ]
    for kernel in sorted({outcome.kernel for outcome in outcomes}):
        caught = Counter(outcome.caught for outcome in outcomes if outcome.kernel == kernel)
        lines.append(f"| {kernel} | {caught.total()} | {' | '.join(str(caught[name]) for name in (*checks, SURVIVED))} |")
    survivors: dict[str, dict[str, Counter[str]]] = {}
    for outcome in outcomes:
        if outcome.caught == SURVIVED:
            survivors.setdefault(_why(outcome, known), {}).setdefault(_place(outcome), Counter())[outcome.mutant.change] += 1
    lines += ["", "## What survives, and why", ""]
    for number, (why, places) in enumerate(sorted(survivors.items()), 1):
        lines.append(f"{number}. {why}")
        lines += [
            f"   - {place}: {', '.join(f'{change} {n}' for change, n in changes.items())}" for place, changes in sorted(places.items())
        ]
    return "\n".join(lines) + "\n"


def _place(outcome: Outcome) -> str:
    """Where a mutant was changed, by the text of the line and of the one in the kernel that it was inlined into; numbers of lines would go stale."""
    texts = [_lines(path)[line - 1].strip() for path, line in outcome.mutant.source if Path(path).parent.name != "ptx"]
    return f"{outcome.kernel}, `{texts[0]}`" + (f" in `{texts[-1]}`" if len(texts) > 1 else "")


def table(outcomes: Sequence[Outcome], known: Sequence[Explanation]) -> str:
    """All mutants: per kernel and source line what was changed, and what caught it or why it survived."""
    lines = ["# Mutants by source line", "", counts(outcomes)]
    notes: list[str] = []
    for kernel in sorted({outcome.kernel for outcome in outcomes}):
        rows: dict[tuple[str, str, str], _Row] = {}
        for outcome in outcomes:
            if outcome.kernel != kernel:
                continue
            row = rows.setdefault(_label(outcome), _Row())
            row.caught[outcome.caught] += 1
            if outcome.caught == SURVIVED:
                why = _why(outcome, known)
                row.reasons.setdefault(why, set()).add(outcome.variant)
                if why not in notes:
                    notes.append(why)
        lines += ["", f"## {kernel}", "", "| line | instruction | change | caught by | survived |", "|---|---|---|---|---|"]
        for (where, instruction, change), row in sorted(rows.items(), key=_order):
            caught = ", ".join(f"{name} {count}" for name, count in row.caught.most_common() if name)
            survived = f"{row.caught[SURVIVED]} " + ", ".join(f"[{notes.index(why) + 1}]" for why in row.reasons) if row.reasons else ""
            lines.append(f"| {where} | `{instruction}` | {change} | {caught} | {survived} |")
    lines += ["", "## Why some survive", ""]
    lines += [f"{number}. {why}" for number, why in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def _order(item: tuple[tuple[str, str, str], _Row]) -> tuple[Any, ...]:
    (where, instruction, change), _ = item
    return [(part.split(":")[0], int(part.split(":")[1])) for part in where.split(" → ")], instruction, change


def run(names: Sequence[str], processes: int) -> list[Outcome]:
    """Run variants, in several processes if asked to."""
    if processes <= 1:
        return [outcome for name in names for outcome in run_variant(name)]
    os.environ.setdefault("CUFLASH_SIMULATOR_THREADS", "1")
    with ProcessPoolExecutor(processes) as pool:
        return [outcome for outcomes in pool.map(run_variant, names) for outcome in outcomes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="to run at the same time")
    parser.add_argument("--variants", default="*", help="pattern of the names to run")
    parser.add_argument("--output", type=Path, help="file for the table of all mutants by source line")
    parser.add_argument("--page", type=Path, help="file for the counts and what survived; without a file this is printed")
    arguments = parser.parse_args()
    names = [name for name in VARIANTS if fnmatch.fnmatchcase(name, arguments.variants)]
    outcomes, known = run(names, arguments.processes), explanations()
    if arguments.output:
        arguments.output.write_text(table(outcomes, known))
    if arguments.page:
        arguments.page.write_text(page(outcomes, known))
    elif not arguments.output:
        print(page(outcomes, known))
    missing = unexplained(outcomes, known)
    for outcome in missing:
        print("survived without an explanation:", describe(outcome), file=sys.stderr)
    stale = [e for e in known if arguments.variants == "*" and not any(o.caught == SURVIVED and e.covers(o) for o in outcomes)]
    for explanation in stale:
        print("nothing survives any more that this explains:", explanation, file=sys.stderr)
    return 1 if missing or stale else 0


if __name__ == "__main__":
    sys.exit(main())
