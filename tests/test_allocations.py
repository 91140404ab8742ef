"""No call allocates memory that grows with seqlen_q x seqlen_kv: by the plan's figures at 64k tokens, and by counting what calls at 4k tokens allocate.

Boolean masks and segments make lists of visible tiles, which grow with the square of the number of tiles: four bytes where a matrix of scores has a whole tile.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from conftest import HAS_GPU, Target, rounded

import cuflash
from cuflash.arrays import frameworks
from cuflash.planning.plan import Plan
from cuflash.runtime import calls, launch
from cuflash.runtime.kept_memory import Places


def _documents(seqlen: int) -> Any:
    return (numpy.arange(seqlen, dtype=numpy.int32) // 700)[None]


FEATURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda seqlen: {},
    "causal": lambda seqlen: {"is_causal": True},
    "window": lambda seqlen: {"window": (100, 100)},
    "softcap": lambda seqlen: {"softcap": 5.0},
    "alibi": lambda seqlen: {"alibi_slopes": numpy.array([0.1], numpy.float32)},
    "additive_mask": lambda seqlen: {"attn_mask": numpy.linspace(-1, 1, seqlen, dtype=numpy.float32)},
    "boolean_mask": lambda seqlen: {"attn_mask": numpy.broadcast_to(numpy.arange(seqlen) % 1000 < 700, (1, 1, seqlen, seqlen))},
    "dropout": lambda seqlen: {"dropout_p": 0.2, "dropout_seed": 3},
    "sinks": lambda seqlen: {"sinks": numpy.ones(1, numpy.float32)},
    "segments": lambda seqlen: {"segment_ids_q": _documents(seqlen), "segment_ids_kv": _documents(seqlen)},
    "prefix": lambda seqlen: {"is_causal": True, "prefix_lengths": numpy.array([1000], numpy.int32)},
    "seqlens_kv": lambda seqlen: {"seqlens_kv": numpy.array([seqlen - 5], numpy.int32)},
}
LISTS = ("boolean_mask", "segments")


def _inputs(seqlen: int, head_dim: int) -> list[Any]:
    """Memory that exists once it is touched, which a plan does not do."""
    return [numpy.empty((1, seqlen, 1, head_dim), numpy.float16) for _ in range(3)]


def _sums(plan: cuflash.Plan) -> int:
    """Of dQ, four bytes for each element of whole tiles, and a turn for each tile."""
    nbytes = sum(buffer.nbytes for buffer in plan.workspace if buffer.name in ("query_sums", "turns"))
    assert nbytes <= 4 * (64 + 1) * (plan.problem.seqlen_q + 4 * 128)
    return nbytes


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("feature", FEATURES)
def test_plans_at_64k(simulator: Target, feature: str, backward: bool) -> None:
    """Beyond results a forward pass takes nothing and a backward pass eight bytes for each query, or twelve, and with one kernel for all gradients
    dQ in float32; lists of tiles take a thousandth of the scores."""

    def workspace(seqlen: int) -> int:
        options = {"need_attn_mask_grad": True} if backward and feature == "additive_mask" else {}
        plan = cuflash.plan(*_inputs(seqlen, 64), backward=backward, **FEATURES[feature](seqlen), **options)
        results = 3 if backward else 1
        assert plan.output_bytes <= results * seqlen * 64 * 2 + 4 * seqlen
        return plan.workspace_bytes - _sums(plan)

    seqlen = 65536
    if feature in LISTS:
        assert workspace(seqlen) <= seqlen * seqlen * 2 / 1000
    else:
        per_query = 12 if feature == "additive_mask" else 8
        assert workspace(seqlen) == (per_query * seqlen if backward else 0)
        assert workspace(seqlen) <= 2 * workspace(seqlen // 2)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_plans_of_packed_sequences_at_64k(simulator: Target, backward: bool) -> None:
    seqlen = 65536
    inputs = [x[0] for x in _inputs(seqlen, 64)]
    offsets = numpy.array([0, 60000, 60000, seqlen], numpy.int32)
    plan = cuflash.varlen_plan(*inputs, offsets, offsets, backward=backward)
    assert plan.workspace_bytes - _sums(plan) == (8 * seqlen if backward else 0) + _list_bytes(plan)
    if backward:
        plan = cuflash.varlen_plan(*inputs, offsets, offsets, backward=True, tile={"backward_fused": cuflash.Tile(32, 64, 4, 2)})
        slots = seqlen // 32 + 3  # tiles of 32 queries; each of three sequences may begin within one
        assert plan.workspace_bytes == 8 * seqlen + 4 * 64 * 32 * slots + 4 * (1 + slots) + _list_bytes(plan)


def _list_bytes(plan: cuflash.Plan) -> int:
    """Eight bytes for each tile that three sequences may have, of the kernel that has the most."""
    most = max((kernel.packed_places for kernel in plan.kernels), default=0)
    assert most <= 65536 // 32 + 4
    return 8 * (1 + most) if most else 0


@pytest.fixture(params=["sm_90", *([pytest.param("gpu", marks=pytest.mark.gpu)] if HAS_GPU else [])])
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The simulator poses as sm_90, so that `bench_attention.py --compile --arch sm_90 --like CACHE` knows these kernels, which no other tests have."""
    pytest.importorskip("cupy")
    if request.param != "gpu":
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", request.param)
    return Target(request.param)


class Allocations:
    """What the calls allocate while it is entered: arrays for results and workspace as they are asked for, and the peak of everything.

    Attributes:
        bytes: of all arrays that were asked for.
        peak: of memory in use beyond that at the beginning, Python's objects and NumPy's arrays on the simulator, CuPy's pool on a GPU.
    """

    def __init__(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = self.peak = 0
        self._is_gpu = target.is_gpu
        framework = type(frameworks.CUPY if target.is_gpu else frameworks.NUMPY)
        allocate = framework.empty

        def counted(self_: Any, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
            array = allocate(self_, shape, dtype, like)
            self.bytes += getattr(array, "bits", array).nbytes
            return array

        monkeypatch.setattr(framework, "empty", counted)

    def __enter__(self) -> Allocations:
        if self._is_gpu:
            import cupy

            self._pool = cupy.cuda.MemoryPool()  # its own: another one has free memory to give
            self._allocator = cupy.cuda.using_allocator(self._pool.malloc)
            self._allocator.__enter__()
        else:
            tracemalloc.start()
        return self

    def __exit__(self, *of_exception: object) -> None:
        if self._is_gpu:
            self._allocator.__exit__(*of_exception)
            self.peak = self._pool.total_bytes()
        else:
            self.peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()


def asked_for(plan: Plan) -> int:
    """Bytes of a call: what the plan says, and between buffers of the workspace, which are one piece of memory, some that nobody may touch."""
    nbytes = Places(plan.workspace).nbytes
    assert plan.workspace_bytes <= nbytes <= plan.workspace_bytes + 256 * len(plan.workspace)
    return plan.output_bytes + nbytes


@pytest.mark.parametrize("feature", FEATURES)
def test_calls_at_4k(on: Target, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls ask for what their plans say, and nothing else takes a twentieth of one matrix of scores."""
    seqlen, head_dim = 4096, 8
    inputs = [on.random((1, seqlen, 1, head_dim), "float16", seed) for seed in (1, 2, 3)]
    options = {name: on.place(x) if isinstance(x, numpy.ndarray) else x for name, x in FEATURES[feature](seqlen).items()}
    need = {"need_attn_mask_grad": True} if feature == "additive_mask" else {}
    plans = [cuflash.plan(*inputs, return_lse=True, **options), cuflash.plan(*inputs, backward=True, **options, **need)]
    if not on.is_gpu and feature != "causal":  # simulating them takes long, and what the calls allocate does not depend on it
        monkeypatch.setattr(launch, "_SimulatorExecutable", _Idle)
        monkeypatch.setattr(launch, "_executables", {})
        monkeypatch.setattr(calls, "_calls", {})
    first = {name: _shortened(x, seqlen) for name, x in options.items()}
    out, lse = cuflash.scaled_dot_product_attention(*(x[:, :20] for x in inputs), return_lse=True, **first)
    cuflash.scaled_dot_product_attention_backward(out, *(x[:, :20] for x in inputs), out, lse, **first, **need)
    with Allocations(on, monkeypatch) as allocations:
        out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **options)
        cuflash.scaled_dot_product_attention_backward(out, *inputs, out, lse, **options, **need)
    assert allocations.bytes == sum(map(asked_for, plans))
    assert allocations.bytes <= allocations.peak * (
        1 if on.is_gpu else 2
    )  # it does see the arrays; those of the forward pass are gone at times
    assert allocations.peak < seqlen * seqlen * 2 / 20


class _Idle:
    """A kernel that is neither compiled nor run."""

    def __init__(self, *_: object) -> None: ...

    def launch(self, *_: object) -> None: ...


def _shortened(option: Any, seqlen: int) -> Any:
    """An option for twenty tokens, so that all is compiled before memory is counted."""
    for axis, extent in enumerate(getattr(option, "shape", ())):
        if extent == seqlen:
            option = option[(slice(None),) * axis + (slice(20),)]
    return option


def test_packed_calls_at_4k(on: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    seqlen, head_dim = 4096, 8
    inputs = [on.random((1, seqlen, 1, head_dim), "float16", seed)[0] for seed in (1, 2, 3)]
    offsets = on.place(numpy.array([0, 3000, 3000, seqlen], numpy.int32))

    def run() -> None:
        out, lse = cuflash.varlen_attention(*inputs, offsets, offsets, return_lse=True)
        cuflash.varlen_attention_backward(out, *inputs, out, lse, offsets, offsets)

    plans = [
        cuflash.varlen_plan(*inputs, offsets, offsets, return_lse=True),
        cuflash.varlen_plan(*inputs, offsets, offsets, backward=True),
    ]
    run()
    with Allocations(on, monkeypatch) as allocations:
        run()
    assert allocations.bytes == sum(map(asked_for, plans))
    assert allocations.peak < seqlen * seqlen * 2 / 20


def test_the_reference_would_be_noticed(simulator: Target) -> None:
    """The same measure sees the matrix of scores of the unfused formula."""
    from cuflash.reference import attention_naive

    seqlen = 512
    inputs = [rounded(numpy.zeros((1, seqlen, 1, 8)), "float16") for _ in range(3)]
    tracemalloc.start()
    attention_naive(*inputs, "float16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak > seqlen * seqlen * 2
