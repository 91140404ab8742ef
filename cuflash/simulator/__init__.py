"""Run CUDA kernels without a GPU: a virtual machine for PTX.

Contract: `Module(ptx)` decodes a kernel that NVRTC compiled, `Module.launch` executes it on host memory with every access checked, and raises
SimulatorError with the source line when the kernel does something wrong. Nothing here knows of attention.
"""

from cuflash.simulator.module import Buffer, Counters, Module
from cuflash.simulator.options import Options, configure, current_options

__all__ = ["Buffer", "Counters", "Module", "Options", "configure", "current_options"]
