"""cuflash for torch: the calls of cuflash in torch's own terms, recorded by autograd, traced by `torch.compile`, and in the place of torch's function.

Nothing of cuflash imports this package or torch: whoever imports `cuflash.torch` has asked for both. See docs/torch.md.

| module | what it does |
|---|---|
| `attention.py`, `merging.py` | the public calls: signatures and docstrings |
| `inputs.py` | what torch's users pass, brought into the form that cuflash takes |
| `functions.py` | eager calls: autograd functions straight over cuflash's calls, with no operator in between |
| `warm_calls.py` | the door of eager calls: those whose like was seen before |
| `batching.py` | both under `torch.func.vmap` |
| `operators.py` | the same calls as registered operators, for tracing and for modes that look at operators |
| `nested.py` | jagged nested tensors as packed sequences |
| `ring.py`, `shards.py` | attention over a sequence whose parts lie on several ranks |
| `registry.py` | cuflash in torch's registry of flash kernels |
| `switch.py` | cuflash in the place of `torch.nn.functional.scaled_dot_product_attention` |
| `modules.py` | torch's `MultiheadAttention` and `TransformerEncoderLayer` on cuflash |
| `transformers.py`, `transformers_cache.py` | cuflash as an attention of transformers, and `KVCache` as its cache |
"""

from __future__ import annotations

from cuflash.errors import SetupError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise SetupError("cuflash.torch needs torch: pip install torch.") from error

from cuflash.torch import registry
from cuflash.torch.attention import plan, scaled_dot_product_attention, varlen_attention
from cuflash.torch.merging import merge_attention
from cuflash.torch.modules import MultiheadAttention, TransformerEncoderLayer
from cuflash.torch.ring import ring_attention
from cuflash.torch.shards import gather_sequence, shard_sequence
from cuflash.torch.switch import Report, disable, enable, report, use
from cuflash.torch.transformers import register_transformers
from cuflash.torch.transformers_cache import transformers_cache

registry.register()

__all__ = [
    "MultiheadAttention",
    "Report",
    "TransformerEncoderLayer",
    "disable",
    "enable",
    "gather_sequence",
    "merge_attention",
    "plan",
    "register_transformers",
    "report",
    "ring_attention",
    "scaled_dot_product_attention",
    "shard_sequence",
    "transformers_cache",
    "use",
    "varlen_attention",
]
