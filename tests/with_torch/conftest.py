"""cuflash.torch on CPU tensors, through the simulator, and on CUDA tensors where there are any. Without torch nothing here is collected.

The directory is not called torch: `import torch` would find it where torch is not installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU leave out what is of streams and graphs alone: nothing is skipped where nothing is missing."""
    here = Path(__file__).parent
    left_out = [item for item in items if here in item.path.parents and item.get_closest_marker("gpu")]
    if len(_devices()) == 1 and left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> Any:
    """Where tensors are: on the CPU they run on the simulator."""
    import torch

    torch.manual_seed(0)
    return torch.device(request.param)
