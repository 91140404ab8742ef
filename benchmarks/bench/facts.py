"""`--facts`: the machine, its software and its ceilings, on which every figure depends."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import cuflash
from bench.machine import Machine, commit, heat, output_of, the_torch, tree_hash, version_of
from bench.timing import time_call
from cuflash.jit import compiler

SMI_FIELDS = (
    "name,driver_version,pci.bus_id,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,clocks.applications.graphics,power.limit,power.draw,"
    "temperature.gpu,persistence_mode,compute_mode,mig.mode.current,ecc.mode.current"
)
PACKAGES = (
    "numpy", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch", "triton",
    "jax", "jaxlib", "flash-attn", "ml_dtypes", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "rich", "platformdirs", "matplotlib",
)  # fmt: skip


def facts(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--facts`: what every figure depends on."""
    found: dict[str, Any] = {**machine.head(), "tree": tree_hash(), "slug": machine.slug, "cuflash": cuflash.__version__}
    found |= {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            found["cpu"] = line.partition(":")[2].strip()
            break
    found["packages"] = {name: version for name in PACKAGES if (version := version_of(name))}
    found["tools"] = {}
    for tool in ("nvcc", "compute-sanitizer", "ncu", "g++"):
        path = shutil.which(tool)
        found["tools"][tool] = output_of(tool, "--version").splitlines()[-1] if path else "not found"
    found["nvrtc"] = compiler.nvrtc_text()
    if not machine.dry:
        found["nvidia_smi"] = dict(
            zip(
                SMI_FIELDS.split(","),
                output_of("nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader").split(", "),
                strict=False,
            )
        )
        found["cuda_driver"] = machine.cupy.cuda.runtime.driverGetVersion()
        found["cuda_runtime"] = machine.cupy.cuda.runtime.runtimeGetVersion()
        on = machine.device
        found["device"] = {
            name: getattr(on, name) for name in ("arch", "num_sms", "shared_memory_per_block", "shared_memory_per_sm", "registers_per_sm")
        }
        found["gpus"] = machine.cupy.cuda.runtime.getDeviceCount()
    write(found, arguments.output)
    if not machine.dry:
        found["ceilings"] = ceilings(machine)
        write(found, arguments.output)
    print(json.dumps(found, indent=1))
    print(f"SUMMARY: {machine.gpu}, driver {machine.driver}, NVRTC {found['nvrtc']}, {commit()}, {json.dumps(found.get('ceilings', {}))}")
    return 0


def write(found: dict[str, Any], folder: Path | None) -> None:
    """Write what is known so far, so that a machine that stops at the ceilings has told its name."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "facts.json").write_text(json.dumps(found, indent=1) + "\n")


def ceilings(machine: Machine) -> dict[str, Any]:
    """What this GPU reaches on the simplest of work."""
    torch = the_torch()
    if torch is None:
        return {}
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    heat(machine)
    product = time_call(machine, lambda: x @ x, 0.3)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = time_call(machine, lambda: target.copy_(source), 0.1)
    return {
        "bfloat16_matmul_tflops": round(2 * 8192**3 / product["milliseconds"] / 1e9, 1),
        "sm_clock_mhz": product["sm_clock_mhz"],
        "watts": product["watts"],
        "copy_tb_per_s": round(2 * (1 << 30) / copy["milliseconds"] / 1e9, 3),
    }
