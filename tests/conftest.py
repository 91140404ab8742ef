"""What the tests share: the devices that there are, arrays in every memory layout, and the comparison of a whole call with the reference.

Tests that take the fixture `target` run once on each device: the simulator posing as each of three generations, and the GPU if CuPy finds
one (marked `gpu`). Arrays are made with NumPy in any strides, then `target.place` puts them on the device with the same strides.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import pytest
import sampling
from hypothesis import settings

import cuflash
from cuflash import reference
from cuflash.arrays import frameworks
from cuflash.hardware import device
from cuflash.hardware.device import Device
from cuflash.jit import cache, compiler, disassembly
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import tile_choice, wgmma_backward, wgmma_forward
from cuflash.planning.kernel_cases import KernelCase
from cuflash.problem.tile import Tile
from cuflash.reference import attention, attention_backward, attention_naive, attention_naive_backward, compare
from cuflash.runtime import calls, launch

SIMULATED = tuple(os.environ.get("CUFLASH_TEST_ARCHS", "sm_75 sm_80 sm_90").split())
"""float16 only on tensor cores, staged copies; cp.async and all types on tensor cores; the same with more shared memory."""

USUAL = "sm_80" if "sm_80" in SIMULATED else SIMULATED[0]
"""Which one the simulator poses as in tests that do not depend on the device."""

ELEMENTS: dict[str, Any] = {"float16": numpy.float16, "bfloat16": ml_dtypes.bfloat16, "float32": numpy.float32}

gc.disable()  # until all tests are collected: nothing of them goes away, and looking takes a fifth of that time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


settings.register_profile("cuflash", deadline=None)  # a first example may compile
settings.load_profile("cuflash")


def _has_gpu() -> bool:
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.is_available())


HAS_GPU = _has_gpu()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="every case on every architecture, and tests marked exhaustive, which take minutes"
    )


LONGEST_FILES = (
    "test_random_configurations", "test_features", "test_attention", "test_cli", "test_stand_in", "test_autotune_processes", "test_benchmarks",
    "test_sequences", "test_edge_cases", "test_kernels_compile", "test_tiles", "test_fused_backward", "test_wgmma_forward", "test_wgmma_machine_code",
    "test_validate_gpu", "test_visited_tiles", "test_tuning", "test_cache_scales", "test_wrong_types", "test_wgmma_lengths_and_masks",
)  # fmt: skip
"""They run first, so that no process of pytest-xdist has a long test left when the others have nothing to do."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if config.getoption("--exhaustive"):
        return
    left_out = {item for item in items if item.get_closest_marker("exhaustive")}
    left_out |= sampling.on_other_architectures([item for item in items if item not in left_out], SIMULATED, USUAL)
    left_out |= sampling.beyond_samples([item for item in items if item not in left_out])
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


DEADLINE = float(os.environ.get("CUFLASH_TEST_DEADLINE") or "inf")
"""Seconds since the epoch after which tests are skipped, so that a run within a limit ends with its report."""

GPU_UNUSABLE = 75
"""Exit status of a process whose GPU answers nothing any more: a CUDA error is for life. Of pytest's parallel processes another one takes its place."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > DEADLINE:
        pytest.skip("out of time")


_failed_on_gpu: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.get_closest_marker("gpu"):
        _failed_on_gpu.add(item.nodeid)
    return report


def pytest_runtest_logfinish(nodeid: str) -> None:
    """End a process that has lost its GPU, once the failure is reported and before others are blamed."""
    if nodeid in _failed_on_gpu and not _gpu_answers():
        os._exit(GPU_UNUSABLE)


def _gpu_answers() -> bool:
    import cupy

    try:
        cupy.cuda.runtime.deviceSynchronize()
        cupy.zeros(1).get()
    except Exception:
        return False
    return True


def pytest_configure(config: pytest.Config) -> None:
    for variable in (
        wgmma_forward.VARIABLE,
        wgmma_backward.VARIABLE,
    ):  # on sm_90 tests are of the kernels that all architectures have, unless they say otherwise
        os.environ.setdefault(variable, "0")
    config.addinivalue_line("markers", "gpu: needs a GPU; everything else also runs on the simulator")
    config.addinivalue_line("markers", "xdist_group(name): tests of pytest-xdist that run in one process under --dist loadgroup")
    config.addinivalue_line(
        "markers", "sample(n): n of the cases, every value of every parameter about equally often; all with --exhaustive"
    )
    config.addinivalue_line(
        "markers", "small_tiles: on the simulator with small tiles in place of the default ones, which --exhaustive takes"
    )
    config.addinivalue_line("markers", "exhaustive: all cases of something that the ordinary run tests some cases of; needs --exhaustive")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # the simulator's threads and pytest's processes share the cores
        os.environ.setdefault("CUFLASH_SIMULATOR_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


# --- Memory layouts -----------------------------------------------------------------------------------------------------------------------


def rounded(values: Any, dtype: str) -> numpy.ndarray[Any, Any]:
    """A NumPy array of the named element type; what is too large for it becomes infinite."""
    with numpy.errstate(over="ignore"):
        return numpy.asarray(values, numpy.float32).astype(ELEMENTS[dtype])


def poisoned(shape: tuple[int, ...], like: Any) -> Any:
    """Memory that must not be read: all NaN."""
    return numpy.full(shape, numpy.nan, like.dtype)


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspace of later calls come full of NaN."""
    for library in (frameworks._NumPy, frameworks._CuPy):
        unset = library.empty

        def empty(self: Any, shape: Any, dtype: str, like: Any, unset: Any = unset) -> Any:
            array = unset(self, shape, dtype, like)
            array[...] = 0x7FFFFFFF if dtype == "int32" else numpy.nan
            return array

        monkeypatch.setattr(library, "empty", empty)


def _transposed(x: Any) -> Any:
    return numpy.ascontiguousarray(x.T).T


def _reversed_rows(x: Any) -> Any:
    return numpy.ascontiguousarray(x[:, ::-1])[:, ::-1]


def _reversed_everywhere(x: Any) -> Any:
    everywhere = (slice(None, None, -1),) * x.ndim
    return numpy.ascontiguousarray(x[everywhere])[everywhere]


def _sliced(x: Any) -> Any:
    """The middle of a larger array, with NaN before, behind and between the rows."""
    buffer = poisoned((x.shape[0] + 1, 2 * x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 8), x)
    view = buffer[1:, 1::2, 1:-1, :-8]
    view[...] = x
    return view


def _padded_rows(x: Any) -> Any:
    """Rows of an odd pitch: contiguous elements, but no row after the first is aligned."""
    buffer = poisoned((*x.shape[:-1], x.shape[-1] + 1 + x.shape[-1] % 2), x)
    buffer[..., : x.shape[-1]] = x
    return buffer[..., : x.shape[-1]]


def _unaligned_base(x: Any) -> Any:
    buffer = poisoned((x.size + 1,), x)
    buffer[1:] = x.reshape(-1)
    return buffer[1:].reshape(x.shape)


def _strided_elements(x: Any) -> Any:
    """Every third element of a row, so that the stride of the last dimension is not 1."""
    buffer = poisoned((*x.shape[:-1], 3 * x.shape[-1]), x)
    buffer[..., 1::3] = x
    return buffer[..., 1::3]


VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "reversed_rows": _reversed_rows,
    "reversed_everywhere": _reversed_everywhere,
    "sliced": _sliced,
    "padded_rows": _padded_rows,
    "unaligned_base": _unaligned_base,
    "strided_elements": _strided_elements,
}
"""From a contiguous NumPy array of four dimensions to the same values in other strides, surrounded by NaN."""


# --- Devices ------------------------------------------------------------------------------------------------------------------------------


class Bits:
    """The elements of an array in logical order, bit by bit; shown by a digest.

    pytest explains two unequal `bytes` by a diff of their text. With -v, before its version 9.2, it takes hours for a few ten thousand of them.
    """

    def __init__(self, elements: bytes) -> None:
        self._bytes = elements

    def __repr__(self) -> str:
        return f"Bits({len(self._bytes)} bytes, sha256 {hashlib.sha256(self._bytes).hexdigest()[:16]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bits) and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)


@dataclass(frozen=True)
class Results:
    """What the two calls gave; `grads` is None where the backward pass was left out."""

    out: Any
    lse: Any
    grads: tuple[Any, Any, Any] | None
    grad_attn_mask: Any = None
    grad_sinks: Any = None

    def bits(self) -> tuple[Bits, ...]:
        """Every bit of every result, in logical order."""
        others = [grad for grad in (self.grad_attn_mask, self.grad_sinks) if grad is not None]
        return tuple(Target.bits(x) for x in (self.out, self.lse, *(self.grads or ()), *others))


class Target:
    """A device under test.

    Attributes:
        name: "sm_75", "sm_80", "sm_90" for the simulator, or "gpu".
        device: limits and architecture.
        is_gpu: arrays are CuPy's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_gpu = name == "gpu"
        self.device = device.gpu(0) if self.is_gpu else device.of_arch(name)

    @property
    def half(self) -> str:
        """The 16-bit type that this device has matrix instructions for."""
        return "float16" if self.device.capability == 75 else "bfloat16"

    def place(self, x: Any) -> Any:
        """A NumPy array on the device, with the same strides and all the memory between its elements."""
        if not self.is_gpu:
            return x
        import cupy

        low, high = numpy.lib.array_utils.byte_bounds(x)
        memory = cupy.empty(high - low + 16, numpy.uint8)[low % 16 :]  # as much out of alignment as the original
        memory[: high - low] = cupy.asarray(numpy.frombuffer((ctypes.c_char * (high - low)).from_address(low), numpy.uint8))
        return cupy.ndarray(x.shape, x.dtype, memory.data + (x.ctypes.data - low), x.strides)

    def place_far(self, x: Any, strides: tuple[int, ...], reach: int) -> Any:
        """The values of x at the given strides, in elements, within `reach` elements of memory that is touched nowhere else."""
        if self.is_gpu:
            import cupy

            memory, as_strided = cupy.empty(reach, x.dtype), cupy.lib.stride_tricks.as_strided
        else:
            memory, as_strided = numpy.empty(reach, x.dtype), numpy.lib.stride_tricks.as_strided  # pages exist once they are touched
        begin = sum(-stride * (extent - 1) for stride, extent in zip(strides, x.shape, strict=True) if stride < 0)
        view = as_strided(memory[begin:], x.shape, tuple(stride * x.itemsize for stride in strides))
        view[...] = self.place(x)
        return view

    def free_memory(self) -> None:
        """Give a GPU's memory that no array holds back to other processes."""
        if self.is_gpu:
            import cupy

            cupy.get_default_memory_pool().free_all_blocks()

    def random(self, shape: tuple[int, ...], dtype: str, seed: int, view: str = "contiguous") -> Any:
        """Normally distributed values in one of the memory layouts of `VIEWS`."""
        values = numpy.random.default_rng(seed).standard_normal(shape)
        return self.place(VIEWS[view](rounded(values, dtype)))

    @property
    def views(self) -> list[str]:
        """The names of all memory layouts."""
        return list(VIEWS)

    def as_numpy(self, x: Any) -> numpy.ndarray[Any, Any]:
        """Any array of this target in NumPy, in its own element type."""
        return x.get() if self.is_gpu else x

    def restride(self, x: Any, view: str) -> Any:
        """The same values in one of the memory layouts of `VIEWS`; an array of three dimensions gets a fourth for the while."""
        values = self.as_numpy(x)
        return self.place(VIEWS[view](values) if values.ndim == 4 else VIEWS[view](values[..., None])[..., 0])

    def surroundings_are_nan(self, x: Any) -> bool:
        """Whether all memory between the elements of an array made by `VIEWS` still is NaN."""
        if self.is_gpu:  # `place` keeps the memory, but not as an array
            return True
        buffer = x
        while isinstance(buffer.base, numpy.ndarray):
            buffer = buffer.base
        x_bytes = x.size * x.itemsize
        return bool(numpy.isnan(buffer).sum() * x.itemsize == buffer.nbytes - x_bytes)

    @contextlib.contextmanager
    def schedule(self, seed: int) -> Iterator[None]:
        """On the simulator, another order of warps and of arriving copies for every seed; on a GPU the hardware's."""
        if self.is_gpu:
            yield
            return
        from cuflash.simulator.options import configure

        with configure(schedule="random", seed=seed):
            yield

    @staticmethod
    def bits(x: Any) -> Bits:
        """The elements of an array of any kind."""
        x = getattr(x, "bits", x)
        return Bits(numpy.ascontiguousarray(x.get() if hasattr(x, "get") else x).tobytes())

    def empty_like(self, x: Any) -> Any:
        """An array for results, with the shape of x; C-contiguous."""
        return self.place(poisoned(x.shape, x))

    def run(
        self, query: Any, key: Any, value: Any, *, backward: bool = True, grad_out: Any = None, grad_lse: Any = None, out: Any = None,
        tile: Any = None, backward_tile: Any = None, **options: Any,
    ) -> Results:  # fmt: skip
        """Both calls, with a random gradient of the output unless there is one, and with the gradient of an additive mask."""
        out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True, out=out, tile=tile, **options)
        if not backward:
            return Results(out, lse, None)
        if grad_out is None:
            grad_out = self.random(out.shape, str(query.dtype), seed=99)
        mask = options.get("attn_mask")
        grads = cuflash.scaled_dot_product_attention_backward(
            grad_out, query, key, value, out, lse, grad_lse=grad_lse, tile=backward_tile,
            need_attn_mask_grad=mask is not None and str(mask.dtype) != "bool", **options,
        )  # fmt: skip
        return Results(out, lse, tuple(grads), grads.attn_mask, grads.sinks)

    def check(
        self, query: Any, key: Any, value: Any, *, backward: bool = True, grad_out: Any = None, grad_lse: Any = "random", out: Any = None,
        tile: Any = None, backward_tile: Any = None, **options: Any,
    ) -> Results:  # fmt: skip
        """Run both calls and assert that out, LSE and all gradients are as exact as the naive formula in the same precision."""
        dtype = str(query.dtype)
        judged = {name: option for name, option in options.items() if name != "deterministic"}  # what changes results
        want, want_lse = attention(query, key, value, **judged)
        if grad_out is None:
            grad_out = self.random(want.shape, dtype, seed=99)
        if isinstance(grad_lse, str):
            grad_lse = self.random(want_lse.shape, "float32", seed=98)
        results = self.run(
            query, key, value, backward=backward, grad_out=grad_out, grad_lse=grad_lse, out=out, tile=tile, backward_tile=backward_tile,
            **options,
        )  # fmt: skip
        naive, _ = attention_naive(query, key, value, dtype, **judged)  # type: ignore[arg-type]
        _, naive_lse = attention_naive(query, key, value, "float32", **judged)  # scores are never rounded to 16 bits
        compare(results.out, want, naive, name="out")
        of_scores = functools.partial(attention, query, key, value, magnitudes=True, **judged)
        compare(results.lse, want_lse, naive_lse, name="lse", dtype="float32", terms=lambda: of_scores()[1])
        if results.grads is not None:
            inputs = grad_out, query, key, value

            def gradients(precision: str | None = None, **more: Any) -> reference.Gradients:
                more |= {"grad_lse": grad_lse, **judged}
                if precision is None:
                    return attention_backward(*inputs, **more)
                return attention_naive_backward(*inputs, precision, **more)  # type: ignore[arg-type]

            judge = GradientJudge(gradients, results.out, dtype)
            for name, got in zip(("query", "key", "value"), results.grads, strict=True):
                assert got.dtype == query.dtype, name
                judge(name, got)
            for name in ("attn_mask", "sinks"):
                got = getattr(results, f"grad_{name}")
                assert (got is not None) == judge.has(name), name
                if got is not None:
                    assert got.dtype == options[name].dtype, name
                    judge(name, got)
        return results

    def run_packed(
        self, inputs: list[Any], cu: tuple[Any, Any], maxima: Any = (None, None), grad_lse: Any = None, **options: Any
    ) -> tuple[Any, ...]:
        """Both calls on packed query, key, value, grad_out: (out, lse, grad_query, grad_key, grad_value), and grad_sinks where there are sinks."""
        query, key, value, grad_out = inputs
        out, lse = cuflash.varlen_attention(query, key, value, *cu, *maxima, return_lse=True, **options)
        grads = cuflash.varlen_attention_backward(grad_out, query, key, value, out, lse, *cu, *maxima, grad_lse=grad_lse, **options)
        return (out, lse, *grads, *(() if grads.sinks is None else (grads.sinks,)))

    def check_packed(
        self, inputs: list[Any], cu: tuple[Any, Any], maxima: Any = (None, None), grad_lse: Any = "random", **options: Any
    ) -> tuple[Any, ...]:
        """`run_packed`, and assert that all results are as exact as the naive formula in the same precision."""
        query, key, value, grad_out = inputs
        dtype, heads = str(query.dtype), query.shape[1]
        if isinstance(grad_lse, str):
            grad_lse = self.random((heads, query.shape[0]), "float32", 98)
        results = self.run_packed(inputs, cu, maxima, grad_lse, **options)
        shapes = [grad_out.shape, (heads, query.shape[0]), query.shape, key.shape, value.shape, (heads,)]
        assert [x.shape for x in results] == shapes[: len(results)]
        judged = {name: option for name, option in options.items() if name != "deterministic"}
        out, lse = reference.varlen_attention(query, key, value, *cu, **judged)
        naive_out, _ = reference.varlen_attention(query, key, value, *cu, precision=dtype, **judged)  # type: ignore[arg-type]
        _, naive_lse = reference.varlen_attention(query, key, value, *cu, precision="float32", **judged)
        compare(results[0], out, naive_out, name="out")
        of_scores = functools.partial(reference.varlen_attention, query, key, value, *cu, magnitudes=True, **judged)
        compare(results[1], lse, naive_lse, name="lse", dtype="float32", terms=lambda: of_scores()[1])
        gradients = functools.partial(reference.varlen_attention_backward, grad_out, query, key, value, *cu, grad_lse=grad_lse, **judged)
        judge = GradientJudge(gradients, results[0], dtype)
        for name, got in zip(("query", "key", "value"), results[2:5], strict=True):
            judge(name, got)
        if len(results) > 5:
            judge("sinks", results[5])
        return results

    def host(self, x: Any) -> numpy.ndarray[Any, Any]:
        """Any array of this target as float64 in NumPy."""
        return reference.to_float64(x)


class GradientJudge:
    """Asserts that gradients are as exact as those of the naive formula.

    The backward pass is given O and takes delta from it. Where a gradient is not close enough to the truth, it has to be to the truth of that O: with few keys,
    dropout or sinks little else of it may be left than what O was rounded by. The naive formula is given the same O then.

    Args:
        gradients: the reference's gradients of the call, a function of `precision`, `out` and `magnitudes`.
        out: what the forward pass gave.
        dtype: element type of the inputs.
    """

    def __init__(self, gradients: Callable[..., reference.Gradients], out: Any, dtype: str) -> None:
        self._gradients, self._out, self._dtype = gradients, out, dtype
        self._known: dict[tuple[bool, str], reference.Gradients] = {}

    def has(self, name: str) -> bool:
        """Whether the call has that gradient."""
        return getattr(self._of(False, "truth"), name) is not None

    def __call__(self, name: str, got: Any) -> None:
        try:
            self._compare(name, got, given_out=False)
        except AssertionError:
            self._compare(name, got, given_out=True)

    def _compare(self, name: str, got: Any, given_out: bool) -> None:
        # The naive dS, which gradients of masks and sinks are sums of, is rounded to the type of the inputs.
        dtype = max(self._dtype, str(got.dtype).rpartition(".")[2], key=reference.EPSILON.__getitem__)
        want, naive = (getattr(self._of(given_out, kind), name) for kind in ("truth", "naive"))
        compare(got, want, naive, name=f"grad_{name}", dtype=dtype, terms=lambda: getattr(self._of(given_out, "magnitudes"), name))

    def _of(self, given_out: bool, kind: str) -> reference.Gradients:
        if (given_out, kind) not in self._known:
            options = {"truth": {}, "naive": {"precision": self._dtype}, "magnitudes": {"magnitudes": True}}[kind]
            self._known[given_out, kind] = self._gradients(out=self._out if given_out else None, **options)
        return self._known[given_out, kind]


@pytest.fixture(params=[*SIMULATED, *([pytest.param("gpu", marks=pytest.mark.gpu)] if HAS_GPU else [])])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Every device that there is, one after the other."""
    pytest.importorskip("cupy")
    if request.param != "gpu":
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", request.param)
    return Target(request.param)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Target:
    """The simulator posing as the usual architecture, for what does not depend on the device."""
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", USUAL)
    return Target(USUAL)


@pytest.fixture(params=["sm_80", *([pytest.param("gpu", marks=pytest.mark.gpu)] if HAS_GPU else [])])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The devices that have the kernel which shares out the keys of a few queries among blocks: sm_75 does not."""
    pytest.importorskip("cupy")
    if request.param != "gpu":
        monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", request.param)
    return Target(request.param)


@pytest.fixture(params=list(VIEWS))
def view(request: pytest.FixtureRequest) -> str:
    """The name of each memory layout of `VIEWS`."""
    return str(request.param)


@pytest.fixture
def no_disassembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without nvdisasm, which takes as long as the compiler: for tests of what ptxas says."""
    monkeypatch.setattr(disassembly, "disassemble", lambda cubin: None)


@pytest.fixture
def compilation_seconds(monkeypatch: pytest.MonkeyPatch) -> dict[CompileRequest, float]:
    """Processor time of each compilation of the test, in the thread that compiled. By the clock on the wall it takes longer on a busy machine."""
    seconds: dict[CompileRequest, float] = {}
    compile_kernel = compiler.compile_kernel

    def timed(request: CompileRequest) -> compiler.Artifact:
        start = time.thread_time()
        artifact = compile_kernel(request)
        seconds[request] = time.thread_time() - start
        return artifact

    monkeypatch.setattr(compiler, "compile_kernel", timed)
    return seconds


def share_simulator(folder: Path) -> None:
    """Let a cache directory that is otherwise empty know the simulator's core, which takes a minute to build."""
    from cuflash.simulator import build

    library = build.library_path()
    (folder / "simulator").mkdir(parents=True, exist_ok=True)
    for path in (library, library.with_suffix(".sha256")):
        shutil.copy(path, folder / "simulator")


@functools.cache
def small_tile(case: KernelCase, on: Device) -> Tile:
    """A legal tile of about 32 rows and keys, two warps for each slice of a head, and two stages."""
    warps = 2 * case.head_slices(on)
    return min(
        tile_choice.legal_tiles_for(case, on),
        key=lambda tile: (abs(tile.num_warps - warps), abs(tile.tile_q - 32) + abs(tile.tile_kv - 32), abs(tile.num_stages - 2)),
    )


_calls_of_small_tiles: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests marked `small_tiles` take small default tiles on the simulator, unless all is tested."""
    if request.node.get_closest_marker("small_tiles") is None or request.config.getoption("--exhaustive"):
        return
    if "target" in request.fixturenames and request.getfixturevalue("target").is_gpu:
        return
    monkeypatch.setattr(tile_choice, "default_tile", small_tile)
    monkeypatch.setattr(calls, "_calls", _calls_of_small_tiles)


@pytest.fixture
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that has compiled no kernel, with an empty cache directory, which is the value of the fixture."""
    share_simulator(tmp_path)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CUFLASH_COMPILE", raising=False)

    def forget() -> None:
        cache.reset_memory()
        launch._executables.clear()
        calls._calls.clear()

    forget()
    yield tmp_path
    forget()
