"""No name within a kernel hides another one: a compiler of the host reads the kernels and warns. Parameters of a constructor are called as its members are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cuflash.hardware import device
from cuflash.planning import tile_choice
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import BACKWARD_DQ_MASK, BACKWARD_MASK, FORWARD_JVP, FORWARD_SPLIT, TILED_KERNELS
from cuflash.planning.offline import offline_kernels
from cuflash.problem.features import FeatureSet

STAND_INS = Path(__file__).parent / "cuda_stand_ins.h"
KERNELS = Path(__file__).parents[1] / "kernels"
ON = device.of_arch("sm_90", "gpu")
COMPILER = shutil.which("g++")


def warnings(config: str, source: str) -> list[str]:
    """What is said of names that hide others, but of members."""
    assert COMPILER is not None
    text = f'#include "{STAND_INS}"\n{config}#include "{source}"\n'
    options = ["-std=c++20", "-fsyntax-only", "-Wshadow", "-D__CUDA_ARCH__=900", f"-I{KERNELS}", "-xc++", "-"]
    read = subprocess.run([COMPILER, *options], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert read.returncode == 0, read.stderr
    return [line for line in read.stderr.splitlines() if "[-Wshadow" in line and "shadows a member of" not in line]


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize("name", TILED_KERNELS)
def test_no_name_hides_another(name: str) -> None:
    spec = TILED_KERNELS[name]
    features, head_dim = FeatureSet(attn_mask="float16", sinks=True, dropout=spec != FORWARD_SPLIT and spec.drops), 64
    if spec.column_groups > 1:
        features, head_dim = FeatureSet(softcap=True, sinks=True), 512
    if name in ("backward_wgmma_dv", "backward_wgmma_dkdq"):
        head_dim = 256  # of narrow heads one kernel makes both
    if spec.takes_terms:
        features = FeatureSet()
    dtype = "float32" if spec.takes_terms else "float16"
    tile = tile_choice.default_tile(KernelCase(spec, dtype, head_dim, features=features), ON)
    if name in ("backward_dk", "backward_dv"):
        pytest.skip("the file of backward_dkdv")
    pinned = {name: tile} if spec.takes_single_tile != "not" else None
    kernels = offline_kernels(
        ON,
        dtype=dtype,
        head_dim=head_dim,
        features=features,
        tile=pinned,
        need_attn_mask_grad=spec in (BACKWARD_MASK, BACKWARD_DQ_MASK),
        jvp=spec == FORWARD_JVP,
    )
    kernel = next(kernel for kernel in kernels if kernel.name == name)
    assert warnings(kernel.config, kernel.source) == []


@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_a_hidden_name_is_found(tmp_path: Path) -> None:
    source = tmp_path / "hidden.cu"
    source.write_text("constexpr int LENGTH = 1;\nint last(int length) {\n  const int LENGTH = length;\n  return LENGTH;\n}\n")
    assert "LENGTH" in "".join(warnings("", str(source)))
