"""Run CUDA kernels without a GPU: a virtual machine for PTX.

Contract: `Module(ptx)` decodes a kernel that NVRTC compiled, `Module.launch` executes it on host memory with every access checked, and raises
SimulatorError with the source line when the kernel does something wrong; `check` runs a call under many schedules. Nothing here knows of attention.
"""

from cuflash.errors import SimulatorError
from cuflash.simulator.checking import CheckReport, check
from cuflash.simulator.kernel_profile import Counts, KernelProfile, LineProfile, OperandProfile, Profile, Traffic
from cuflash.simulator.module import Buffer, Counters, Launch, Module, record_launches
from cuflash.simulator.options import Options, configure, current_options, profile

__all__ = [
    "Buffer",
    "CheckReport",
    "Counters",
    "Counts",
    "KernelProfile",
    "Launch",
    "LineProfile",
    "Module",
    "OperandProfile",
    "Options",
    "Profile",
    "SimulatorError",
    "Traffic",
    "check",
    "configure",
    "current_options",
    "profile",
    "record_launches",
]
