"""Everything that a call will do. `print(plan)` says it in words."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.hardware.device import Device
from cuflash.planning.description import describe
from cuflash.planning.kernel_plan import Buffer, KernelPlan
from cuflash.problem.problem import Problem


@dataclass(frozen=True)
class Plan:
    """Everything that a call will do. `print(plan)` says it in words.

    Attributes:
        problem: the checked problem.
        device: where it runs.
        backward: which pass.
        kernels: launches in order; empty when there is nothing to compute.
        outputs: what the call returns.
        workspace: device memory beyond inputs and outputs. Lists of visible tiles of each kernel follow those of the one before in the same memory.
        choice: which of two kernels runs, and why not the other; empty where there is no choice.
    """

    problem: Problem
    device: Device
    backward: bool
    kernels: tuple[KernelPlan, ...]
    outputs: tuple[Buffer, ...]
    workspace: tuple[Buffer, ...]
    choice: str = ""

    @property
    def output_bytes(self) -> int:
        """Memory of the arrays that the call returns."""
        return sum(buffer.nbytes for buffer in self.outputs)

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and outputs."""
        return sum(buffer.nbytes for buffer in self.workspace)

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        names = ", ".join(kernel.name for kernel in self.kernels)
        return f"<Plan of {names or 'nothing'} on {self.device.name}; print it for all there is to say>"

    def describe(self) -> str:
        """A few lines for people: problem, device, kernels with tiles and grids, memory, work."""
        return describe(
            self.problem,
            self.device,
            self.kernels,
            backward=self.backward,
            output_bytes=self.output_bytes,
            workspace_bytes=self.workspace_bytes,
            choice=self.choice,
        )
