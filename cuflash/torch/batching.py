"""What happens to a call under `torch.func.vmap`, eager or traced.

Samples become rows of the batch where every tensor of them can have a row of its own. Sinks cannot, packed sequences have no batch, and dropout that is to be
the same for all samples differs between rows: these run sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cuflash.errors import UnsupportedError
from cuflash.torch.inputs import TENSORS

_COUNT = len(TENSORS)
_BATCHED_DIMENSIONS = {
    "attn_mask": 4,
    "alibi_slopes": 2,
    "seqlens_q": 1,
    "seqlens_kv": 1,
    "segment_ids_q": 2,
    "segment_ids_kv": 2,
    "prefix_lengths": 1,
}
"""Dimensions of each tensor when the batch is the first."""

Tensors = tuple[Any, ...]
Run = Callable[[Tensors], Tensors]


def attention(info: Any, dims: Tensors, tensors: Tensors, call: Any, attend: Run) -> tuple[Any, Any]:
    """out and lse of all samples, and where their samples lie.

    Args:
        info: of vmap.
        dims: of each tensor, where its samples lie, None for one that all samples share.
        tensors: of the call, in the order of `TENSORS`.
        call: its options.
        attend: tensors -> out and lse.
    """
    _check_randomness(info, call)
    if _foldable(dims, call, info):
        batch = _extent(tensors[0], dims[0])
        return _unfolded(attend(_folded(tensors, dims, info.batch_size, batch, shared=True)), info.batch_size, batch)
    return _stacked(attend, tensors, dims, info.batch_size)


def gradients(info: Any, dims: Tensors, given: Tensors, call: Any, needs_mask: bool, run: Run) -> tuple[Any, Any]:
    """The same of gradients; `given` are those of out and lse, the tensors of the call, out and lse, which `run` takes."""
    tensors, own = given[2 : 2 + _COUNT], dims[2 : 2 + _COUNT]
    size = info.batch_size
    batches = [_extent(x, dim) for x, dim in zip(tensors[:3], own[:3], strict=True)]
    one_batch = len(set(batches)) == 1
    if tensors[4] is not None or not _foldable(own, call, info) or not (call.dropout_p or (one_batch and not needs_mask)):
        return _stacked(run, given, dims, size)
    if needs_mask:  # of the rows of the forward call, whose dropout each has its own
        hint = "Pass randomness='same' to vmap."
        raise UnsupportedError("attn_mask", "its gradient under vmap, with dropout that differs between samples", "one of the two", hint)
    batch = batches[0]
    folded = _folded(tensors, own, size, batch, shared=False)  # gradients of what samples share come for each of them
    grad_out, grad_lse, out, lse = (
        None if x is None else _first(x, dim, size).flatten(0, 1)
        for x, dim in zip((*given[:2], *given[-2:]), (*dims[:2], *dims[-2:]), strict=True)
    )
    grads, found = _unfolded(run((grad_out, grad_lse, *folded, out, lse)), size, batch)
    of_inputs = (grad if own == batch else grad.sum(1, keepdim=True) for grad, own in zip(grads, batches, strict=False))
    return (*of_inputs, *grads[3:]), found


def tangents(info: Any, dims: Tensors, given: Tensors, call: Any, run: Run) -> tuple[Any, Any]:
    """The same of the tangents of out and lse; `given` are those of query, key, value and sinks, the tensors of the call, out and lse, which `run` takes.

    Several tangents at one point run one by one: as rows of a batch each would want the tensors of the point once more.
    """
    first = len(given) - _COUNT - 2
    tensors, own = given[first : first + _COUNT], dims[first : first + _COUNT]
    size = info.batch_size
    if dims[-2] is None or given[first - 1] is not None or not _foldable(own, call, info):
        return _stacked(run, given, dims, size)
    batch = _extent(tensors[0], own[0])
    no_others = (None,) * (_COUNT - 3)
    folded = _folded((*given[:3], *no_others), (*dims[:3], *no_others), size, batch, shared=False)[:3]
    results = (_first(x, dim, size).flatten(0, 1) for x, dim in zip(given[-2:], dims[-2:], strict=True))
    return _unfolded(run((*folded, None, *_folded(tensors, own, size, batch, shared=False), *results)), size, batch)


def one_by_one(info: Any, dims: Tensors, arguments: Tensors, run: Callable[..., Tensors]) -> tuple[Any, Any]:
    """Results of a function that is run for each sample; what is no tensor is the same for all."""
    return _stacked(lambda given: run(*given), arguments, dims, info.batch_size)


def _check_randomness(info: Any, call: Any) -> None:
    if call.dropout_p and info.randomness == "error":
        raise UnsupportedError(
            "dropout_p",
            f"{call.dropout_p} under vmap with randomness='error'",
            "0.0, or a choice",
            "Pass randomness='different' or 'same' to vmap.",
        )


def _foldable(dims: Tensors, call: Any, info: Any) -> bool:
    same_dropout = call.dropout_p and (info.randomness == "same" or dims[TENSORS.index("dropout_seed")] is not None)
    return not call.packed and call.options["layout"].startswith("b") and dims[4] is None and not same_dropout


def _extent(x: Any, dim: int | None) -> int:
    """The first extent of one sample."""
    return int(x.shape[0 if dim is None or dim > 0 else 1])


def _first(x: Any, dim: int | None, size: int) -> Any:
    """The samples along the first axis."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _folded(tensors: Tensors, dims: Tensors, size: int, batch: int, shared: bool) -> Tensors:
    """Tensors whose batch are the rows of all samples, `batch` of each; what has a batch of one for all samples stays as it is if it may be `shared`."""
    folded = []
    for name, x, dim in zip(TENSORS, tensors, dims, strict=True):
        is_input, ndim = name in TENSORS[:3], _BATCHED_DIMENSIONS.get(name, 4)
        for_all = x is None or name in ("sinks", "dropout_seed")
        if not for_all and dim is None:
            is_broadcast = x.dim() < ndim or (x.shape[0] == 1 and ndim > 1)  # lengths are not: there is one for each row
            for_all = (x.shape[0] == 1 and shared and name != "query") if is_input else is_broadcast
        if for_all:
            folded.append(x)
            continue
        samples = _first(x, dim, size)
        while samples.dim() < ndim + 1:
            samples = samples[:, None]
        rows = samples.expand(size, batch, *samples.shape[2:]).flatten(0, 1)
        folded.append(rows.contiguous() if ndim == 1 else rows)
    return tuple(folded)


def _unfolded(results: Tensors, size: int, batch: int) -> tuple[Any, Any]:
    outputs = tuple(None if x is None else x.unflatten(0, (size, batch)) for x in results)
    return outputs, tuple(None if x is None else 0 for x in outputs)


def _sample(tensors: Tensors, dims: Tensors, i: int) -> Tensors:
    return tuple(x.select(dim, i) if isinstance(x, torch.Tensor) and dim is not None else x for x, dim in zip(tensors, dims, strict=True))


def _zeros(tensors: Tensors, dims: Tensors) -> Tensors:
    """What a sample looks like."""
    samples = []
    for x, dim in zip(tensors, dims, strict=True):
        is_sampled = isinstance(x, torch.Tensor) and dim is not None
        samples.append(x.new_zeros([*x.shape[:dim], *x.shape[dim + 1 :]]) if is_sampled else x)
    return tuple(samples)


def _stacked(run: Run, tensors: Tensors, dims: Tensors, size: int) -> tuple[Any, Any]:
    """Results of all samples, run one by one; where there are none, those of zeros say which shapes they have."""
    each = [run(_sample(tensors, dims, i)) for i in range(size)] or [run(_zeros(tensors, dims))]
    outputs = tuple(None if of_result[0] is None else torch.stack(of_result)[:size] for of_result in zip(*each, strict=True))
    return outputs, tuple(None if x is None else 0 for x in outputs)
