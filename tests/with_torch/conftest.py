"""cuflash.torch on CPU tensors, through the simulator, and on CUDA tensors where there are any. Without torch nothing here is collected.

The directory is not called torch: `import torch` would find it where torch is not installed.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore_glob = [] if HAS_TORCH else ["test_*.py"]


def _devices() -> list[Any]:
    if HAS_TORCH:
        import torch

        if torch.cuda.is_available():
            return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
    return ["cpu"]


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> Any:
    """Where tensors are: on the CPU they run on the simulator."""
    import torch

    torch.manual_seed(0)
    return torch.device(request.param)
