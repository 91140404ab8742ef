"""Run CUDA kernels without a GPU: a virtual machine for PTX.

Contract: `Module(ptx)` decodes a kernel that NVRTC compiled, `Module.launch` executes it on host memory with every access checked, and raises
SimulatorError with the source line when the kernel does something wrong. Nothing here knows of attention.
"""

from cuflash.simulator.kernel_profile import Counts, KernelProfile, LineProfile, OperandProfile, Profile, Traffic
from cuflash.simulator.module import Counters, Module
from cuflash.simulator.options import Options, configure, current_options, profile

__all__ = [
    "Counters",
    "Counts",
    "KernelProfile",
    "LineProfile",
    "Module",
    "OperandProfile",
    "Options",
    "Profile",
    "Traffic",
    "configure",
    "current_options",
    "profile",
]
