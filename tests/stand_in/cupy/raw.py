"""`cupy.cuda.function`: what the stand-in's NVRTC calls a cubin is PTX, which the simulator takes."""

from __future__ import annotations

from cupy import cuda


class Module:
    """A module from the bytes of a cubin."""

    def load(self, cubin: bytes) -> None:
        if cubin.startswith(b"\x7fELF"):
            raise cuda.driver.CUDADriverError(
                "CUDA_ERROR_NO_BINARY_FOR_GPU: machine code of a real GPU; give the stand-in a cache of its own"
            )
        self._ptx = cubin

    def get_function(self, name: str) -> Function:
        return Function(self._ptx, name)


class Function:
    """A kernel, loaded into the current device.

    Attributes:
        ptr: the handle that the driver knows it by.
        max_dynamic_shared_size_bytes: dynamic shared memory that a launch may ask for.
        device, simulated: where it is loaded, and the simulator's module.
    """

    def __init__(self, ptx: bytes, name: str) -> None:
        from cuflash import simulator

        self.simulated = simulator.Module(ptx, name, keep=True)
        self.device = cuda.runtime.getDevice()
        self.max_dynamic_shared_size_bytes = 48 * 1024
        self.ptr = cuda.handle_of(self)
