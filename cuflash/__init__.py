"""cuflash: exact attention with tiled flash kernels, forward and backward, compiled at run time for the case that is called.

The public names are resolved on first use, so that `import cuflash` alone loads neither NumPy nor CuPy nor a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cuflash.arrays.borrowing import bfloat16
    from cuflash.arrays.frameworks import BFloat16Bits
    from cuflash.attention import (
        plan,
        scaled_dot_product_attention,
        scaled_dot_product_attention_backward,
        varlen_attention,
        varlen_attention_backward,
        varlen_plan,
    )
    from cuflash.cascade import cascade_attention
    from cuflash.decoding import attention_with_kvcache, kvcache_plan
    from cuflash.dropout import dropout_mask
    from cuflash.errors import (
        ArgumentError,
        CompileError,
        CuflashError,
        DeviceError,
        DTypeError,
        KeywordError,
        OptionError,
        SetupError,
        ShapeError,
        SimulatorError,
        TileError,
        TuningError,
        UnsupportedError,
    )
    from cuflash.jvp import scaled_dot_product_attention_jvp, varlen_attention_jvp
    from cuflash.kv_cache import KVCache
    from cuflash.merging import MergeGradients, merge_attention, merge_attention_backward
    from cuflash.planning.plan import Plan
    from cuflash.problem.features import FeatureSet
    from cuflash.problem.tile import Tile
    from cuflash.runtime.kept_memory import clear_workspace
    from cuflash.runtime.prepared import Gradients
    from cuflash.tuner.api import Tuned, autotune
    from cuflash.tuning import legal_tiles, warmup, warmup_plan

_HOME = {
    "BFloat16Bits": "arrays.frameworks",
    "bfloat16": "arrays.borrowing",
    "Gradients": "runtime.prepared",
    "plan": "attention",
    "scaled_dot_product_attention": "attention",
    "scaled_dot_product_attention_backward": "attention",
    "scaled_dot_product_attention_jvp": "jvp",
    "varlen_attention": "attention",
    "varlen_attention_backward": "attention",
    "varlen_attention_jvp": "jvp",
    "varlen_plan": "attention",
    "attention_with_kvcache": "decoding",
    "cascade_attention": "cascade",
    "clear_workspace": "runtime.kept_memory",
    "kvcache_plan": "decoding",
    "KVCache": "kv_cache",
    "dropout_mask": "dropout",
    "ArgumentError": "errors",
    "CompileError": "errors",
    "CuflashError": "errors",
    "DeviceError": "errors",
    "DTypeError": "errors",
    "KeywordError": "errors",
    "OptionError": "errors",
    "SetupError": "errors",
    "ShapeError": "errors",
    "SimulatorError": "errors",
    "TileError": "errors",
    "TuningError": "errors",
    "UnsupportedError": "errors",
    "FeatureSet": "problem.features",
    "MergeGradients": "merging",
    "merge_attention": "merging",
    "merge_attention_backward": "merging",
    "Plan": "planning.plan",
    "Tile": "problem.tile",
    "autotune": "tuner.api",
    "Tuned": "tuner.api",
    "legal_tiles": "tuning",
    "warmup": "tuning",
    "warmup_plan": "tuning",
}

__all__ = [
    "ArgumentError",
    "BFloat16Bits",
    "CompileError",
    "CuflashError",
    "DTypeError",
    "DeviceError",
    "FeatureSet",
    "Gradients",
    "KVCache",
    "KeywordError",
    "MergeGradients",
    "OptionError",
    "Plan",
    "SetupError",
    "ShapeError",
    "SimulatorError",
    "Tile",
    "TileError",
    "Tuned",
    "TuningError",
    "UnsupportedError",
    "__version__",
    "attention_with_kvcache",
    "autotune",
    "bfloat16",
    "cascade_attention",
    "clear_workspace",
    "dropout_mask",
    "kvcache_plan",
    "legal_tiles",
    "merge_attention",
    "merge_attention_backward",
    "plan",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
    "scaled_dot_product_attention_jvp",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_jvp",
    "varlen_plan",
    "warmup",
    "warmup_plan",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'cuflash' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"cuflash.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
