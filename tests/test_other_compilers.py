"""Kernels as other versions of NVRTC compile them, of which CUFLASH_TEST_NVRTC names libraries: the machine code is as meant, and their PTX runs on the simulator.

CUFLASH_TEST_NVRTC=/usr/local/cuda-13.0:/usr/local/cuda-13.5 python -m pytest tests/test_other_compilers.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_wgmma_backward_machine_code as backward
import test_wgmma_float32 as float32
import test_wgmma_machine_code as forward
import test_wide_forward as wide
from conftest import Target
from nvrtc_library import NvrtcLibrary, libraries
from test_kernels_compile import is_quick, named, reports_of

import cuflash
from cuflash.hardware import device
from cuflash.jit import cache, compiler
from cuflash.jit.compiler import CompileRequest
from cuflash.problem.features import NO_FEATURES, FeatureSet
from cuflash.runtime import calls

pytest.importorskip("cupy")

FEATURES = [
    NO_FEATURES,
    FeatureSet(window=True, softcap=True, alibi=True, sinks=True),
    FeatureSet(dropout=True),
    FeatureSet(attn_mask="float32"),
]


def name_of(path: Path) -> str:
    return "{}.{}".format(*NvrtcLibrary(path).getVersion())


@pytest.fixture(autouse=True, params=libraries(), ids=name_of)
def other_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This NVRTC in the place of CuPy's, with no kernel or call at hand that another one made."""
    library = NvrtcLibrary(request.param)
    monkeypatch.setattr(compiler, "_nvrtc", lambda: library)
    monkeypatch.setattr(calls, "_calls", {})
    cache.reset_memory()
    yield
    cache.reset_memory()


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_forward_wgmma(head_dim: int, features: FeatureSet, is_causal: bool, compilation_seconds: dict[CompileRequest, float]) -> None:
    report = forward.report_of("bfloat16", head_dim, is_causal, features=features)
    forward.assert_as_meant(report)
    assert features != NO_FEATURES or is_quick(report, compilation_seconds), f"{named(report)}: {report.seconds:.2f} seconds"


@pytest.mark.sample(2)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (96, 128)], ids=str)
@pytest.mark.parametrize("seqlens_kv", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_forward_wgmma_float32(dims: tuple[int, int], seqlens_kv: bool, is_causal: bool) -> None:
    forward.assert_as_meant(float32.report_of(dims, is_causal, seqlens_kv=seqlens_kv))


def test_loops_of_forward_wgmma() -> None:
    forward.assert_hot_loops(forward.report_of("bfloat16", 128, True), "bfloat16", 128, True)


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", [(*wide.LATENT, True), (264, 264, False)], ids=str)
@pytest.mark.parametrize("features", wide.MACHINE_CODE)
def test_forward_wgmma_wide(case: tuple[int, int, bool], features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, setting in {"CUFLASH_SIMULATOR_ARCH": "sm_90", "CUFLASH_FORWARD_WGMMA": "1"}.items():
        monkeypatch.setenv(name, setting)
    head_dim, head_dim_v, shared = case
    forward.assert_as_meant(wide.report_of(head_dim, head_dim_v, wide.MACHINE_CODE[features], shared=shared))


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("features", FEATURES[:3], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_backward_wgmma(head_dim: int, features: FeatureSet, is_causal: bool, compilation_seconds: dict[CompileRequest, float]) -> None:
    report = backward.report_of("bfloat16", head_dim, is_causal, features)
    forward.assert_as_meant(report)
    assert features != NO_FEATURES or is_quick(report, compilation_seconds), f"{named(report)}: {report.seconds:.2f} seconds"


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_120"])
def test_kernels_of_mma(arch: str, dtype: str, head_dim: int, compilation_seconds: dict[CompileRequest, float]) -> None:
    for report in reports_of(device.of_arch(arch, "gpu"), dtype, head_dim):
        tolerated = report.subject.request.tolerated_spills
        assert report.resources.spill_store_bytes <= tolerated, named(report)
        assert report.resources.spill_load_bytes <= 2 * tolerated, named(report)
        assert report.warnings == (), named(report)
        assert is_quick(report, compilation_seconds), f"{named(report)}: {report.seconds:.2f} seconds"


@pytest.mark.sample(2)
@pytest.mark.parametrize("wgmma", [False, True], ids=["mma", "wgmma"])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"dropout_p": 0.3, "dropout_seed": 5, "softcap": 2.0, "window": (40, 20)}], ids=str
)
def test_results_on_the_simulator(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], wgmma: bool) -> None:
    """Their PTX is of another version of its language, and may have other instructions."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    for name in ("CUFLASH_FORWARD_WGMMA", "CUFLASH_BACKWARD_WGMMA"):
        monkeypatch.setenv(name, str(int(wgmma)))
    host = Target("sm_90")
    query, key, value = (host.random((1, 150, 1, 64), "bfloat16", seed) for seed in range(3))
    assert any("wgmma" in kernel.name for kernel in cuflash.plan(query, key, value, **options).kernels) == wgmma
    host.check(query, key, value, **options)
