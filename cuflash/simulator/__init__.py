"""Run CUDA kernels without a GPU: a virtual machine for PTX.

Contract: `Module(ptx)` decodes a kernel that NVRTC compiled, `Module.launch` executes it on host memory with every access checked, and raises
SimulatorError with the source line when the kernel does something wrong; `check` runs a call under many schedules. Nothing here knows of attention.
"""

from cuflash.simulator.checking import CheckReport, check
from cuflash.simulator.module import Buffer, Counters, Launch, Module, record_launches
from cuflash.simulator.options import Options, configure, current_options

__all__ = ["Buffer", "CheckReport", "Counters", "Launch", "Module", "Options", "check", "configure", "current_options", "record_launches"]
