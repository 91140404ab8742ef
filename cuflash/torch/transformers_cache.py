"""`cuflash.KVCache` as a cache of transformers: `model.generate(…, past_key_values=cuflash.torch.transformers_cache())`.

transformers appends keys and values first, by the cache's `update`, and then calls the attention function with what that returns. Here `update` returns the new ones as
they are, as tensors that know the cache, and the attention function of `register_transformers` appends them and attends to all in one call. Any other attention would
see the new keys alone, so these tensors refuse all else that is done with them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from cuflash.errors import SetupError, UnsupportedError
from cuflash.kv_cache import KVCache

PAGE_SIZE = 64


class AppendedKeys(torch.Tensor):  # type: ignore[misc]  # torch may be missing
    """New keys, or values, of one layer: (batch, heads, new, head_dim).

    Attributes:
        cache: that they go to, with attention.
    """

    cache: KVCache

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only what a tensor is may be asked: its shape, dtype and device."""
        if getattr(func, "__name__", "") != "__get__":
            hint = "Load the model with attn_implementation=cuflash.torch.register_transformers(), or leave past_key_values out."
            raise UnsupportedError("past_key_values", "a cuflash.torch.transformers_cache with another attention", "cuflash's own", hint)
        return super().__torch_function__(func, types, args, kwargs or {})

    def attend(self, query: torch.Tensor, value: torch.Tensor, mask: Any, bias: Any, dropout: float, **options: Any) -> torch.Tensor:
        """Append, and attend to all that the cache has then.

        Args:
            query: (batch, heads, seqlen, head_dim).
            value: what came with these keys.
            mask: boolean or additive, (batch, 1, seqlen, keys), or None for all keys up to that of the query.
            bias: must be None.
            dropout: must be 0.
            options: of `KVCache.attend`.

        Returns:
            (batch, seqlen, heads, head_dim).

        Raises:
            UnsupportedError: a bias, dropout, or values of another cache.
        """
        for name, given, expected in (("position_bias", bias, None), ("dropout", dropout, 0.0)):
            if given is not expected and given != expected:
                raise UnsupportedError(name, "one with a cuflash.torch.transformers_cache", f"{expected}", "Leave past_key_values out.")
        key, value = (of.as_subclass(torch.Tensor).transpose(1, 2) for of in (self, value))
        self.cache.reserve(key.shape[1])
        if mask is not None:  # the cache has room for more keys than there are
            mask = mask[..., : self.cache.room]
            mask = torch.nn.functional.pad(mask, (0, self.cache.room - mask.shape[-1]))
        options = {name: option for name, option in options.items() if option is not None}
        out: torch.Tensor = self.cache.attend(query.transpose(1, 2), key, value, is_causal=mask is None, attn_mask=mask, **options)
        return out


def transformers_cache(page_size: int = PAGE_SIZE) -> Any:
    """A cache of pages for the generation of a model with the attention of `register_transformers`.

    Keys and values are appended by the kernel that attends, and sequences take pages as they grow: nothing is copied or concatenated. Models in float16 or bfloat16.
    Beams, and windows that forget keys, are not for it: a window hides keys that stay in the cache.

    Args:
        page_size: keys of a page.

    Returns:
        A transformers `Cache`, empty, for `past_key_values=`.

    Raises:
        SetupError: transformers is missing, or older than its caches of layers.
    """
    try:
        from transformers.cache_utils import Cache
    except ImportError as error:
        raise SetupError("cuflash.torch.transformers_cache needs transformers with caches of layers: pip install transformers.") from error
    return Cache(layer_class_to_replicate=functools.partial(_layer_class(), page_size))


@functools.cache
def _layer_class() -> Any:
    from transformers.cache_utils import CacheLayerMixin

    class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers may be missing
        """Keys and values of one layer of a model."""

        is_sliding = False
        is_compileable = False
        is_croppable = True
        supports_early_init = False

        def __init__(self, page_size: int) -> None:
            super().__init__()
            self.page_size = page_size
            self.cache: KVCache | None = None

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            batch, heads, _, head_dim = key_states.shape
            self.cache = KVCache(
                batch, heads, head_dim, page_size=self.page_size, dtype=key_states.dtype, head_dim_v=value_states.shape[-1], xp=torch,
                device=key_states.device,
            )  # fmt: skip
            self.is_initialized = True

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if self.cache is None:
                self.lazy_initialization(key_states, value_states)
            keys, values = (of.as_subclass(AppendedKeys) for of in (key_states, value_states))
            keys.cache = values.cache = self.cache
            return keys, values

        def get_seq_length(self) -> int:
            return 0 if self.cache is None else self.cache.lengths[0]

        def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
            new = query_length if isinstance(query_length, int) else len(query_length)  # positions, before transformers 5
            return self.get_seq_length() + new, 0

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length

        def crop(self, max_length: int) -> None:
            """Forget keys from there on; a negative number: so many."""
            there = self.get_seq_length()
            length = max(0, there + max_length) if max_length < 0 else min(max_length, there)
            if self.cache is not None:
                for sequence in range(len(self.cache.lengths)):
                    self.cache.truncate(sequence, length)

        def reset(self) -> None:
            self.crop(0)

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            del beam_idx
            raise _without_rows("beams")

        def batch_repeat_interleave(self, repeats: int) -> None:
            del repeats
            raise _without_rows("repeated rows")

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            del indices
            raise _without_rows("a choice of rows")

    return PagedLayer


def _without_rows(what: str) -> UnsupportedError:
    return UnsupportedError("past_key_values", f"{what} with a cuflash.torch.transformers_cache", "a batch that stays", "Leave it out.")
