"""Which part of a sequence each rank of a group has, and which pairs of parts see each other.

A sequence of length S is cut into 2 W chunks of equal length for W ranks. Zigzag: rank r has the chunks r and 2 W − 1 − r, one behind the other, so that under a causal mask
all have the same work. Else it has the chunks 2 r and 2 r + 1, which are neighbours. Of packed sequences each is cut so, and a chunk is that of all of them, one behind the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed

from cuflash.errors import ShapeError

Limit = int | None


class Piece(NamedTuple):
    """A call of its own: queries and keys first .. end - 1 of two shards, the causal mask or a window between them."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    is_causal: bool
    window: tuple[Limit, Limit] | None


def chunks(rank: int, ranks: int, zigzag: bool) -> tuple[int, int]:
    """The two chunks of a rank."""
    return (rank, 2 * ranks - 1 - rank) if zigzag else (2 * rank, 2 * rank + 1)


def pieces(of_queries: tuple[int, int], of_keys: tuple[int, int], length: int, lowest: Limit, highest: Limit) -> list[Piece]:
    """What queries of one shard see of the keys of another, in as few calls as there can be.

    Args:
        of_queries, of_keys: the chunks of each.
        length: of a chunk.
        lowest, highest: query i sees keys j with lowest <= j - i <= highest, positions in the sequence; None for no limit.
    """
    if lowest is None and highest is None:
        return [Piece((0, 2 * length), (0, 2 * length), False, None)]
    if lowest is None and highest == 0 and of_queries == of_keys:  # each chunk comes behind the one before it
        return [Piece((0, 2 * length), (0, 2 * length), True, None)]
    found = [
        piece
        for q, query_chunk in enumerate(of_queries)
        for k, key_chunk in enumerate(of_keys)
        if (piece := _pair(q * length, k * length, (key_chunk - query_chunk) * length, length, lowest, highest)) is not None
    ]
    return _joined(_joined(found, 1), 0)


def packed_pieces(of_queries: tuple[int, int], of_keys: tuple[int, int], length: int, is_causal: bool) -> list[Piece]:
    """The same for packed sequences: chunks of all of them, `length` tokens, each of which sees the other whole, causally, or not at all."""
    return [
        Piece((q * length, (q + 1) * length), (k * length, (k + 1) * length), is_causal and key_chunk == query_chunk, None)
        for q, query_chunk in enumerate(of_queries)
        for k, key_chunk in enumerate(of_keys)
        if not is_causal or key_chunk <= query_chunk
    ]


def _pair(first_q: int, first_k: int, shift: int, length: int, lowest: Limit, highest: Limit) -> Piece | None:
    """Two chunks, of which that of the keys begins `shift` positions behind that of the queries; `first_q`, `first_k` are where they lie in their shards.

    Kernels have windows that hold the diagonal. Where this one does not, its first keys or queries see nothing and are left out, which moves the diagonal into it.
    """
    low = None if lowest is None or lowest - shift <= 1 - length else lowest - shift
    high = None if highest is None or highest - shift >= length - 1 else highest - shift
    if (low is not None and low >= length) or (high is not None and high <= -length):
        return None
    queries, keys = [first_q, first_q + length], [first_k, first_k + length]
    if low is not None and low > 0:
        keys[0] += low
        low, high = 0, None if high is None else high - low
    elif high is not None and high < 0:
        queries[0] -= high
        low, high = None if low is None else low - high, 0
    return Piece((queries[0], queries[1]), (keys[0], keys[1]), *mask_of(low, high))


def mask_of(low: Limit, high: Limit) -> tuple[bool, tuple[Limit, Limit] | None]:
    """is_causal and window of low <= key - query <= high, where low <= 0 <= high."""
    is_causal = high == 0
    if low is None and (high is None or is_causal):
        return is_causal, None
    return is_causal, (None if low is None else -low, None if is_causal else high)


def _joined(found: list[Piece], axis: int) -> list[Piece]:
    """Neighbours along queries (0) or keys (1) that see all of each other and share the rest, as one."""
    result: list[Piece] = []
    for piece in found:
        last = result[-1] if result else piece
        is_whole = not (last.is_causal or piece.is_causal) and last.window is piece.window is None
        if is_whole and axis == 0 and last.keys == piece.keys and last.queries[1] == piece.queries[0]:
            result[-1] = Piece((last.queries[0], piece.queries[1]), last.keys, False, None)
        elif is_whole and axis == 1 and last.queries == piece.queries and last.keys[1] == piece.keys[0]:
            result[-1] = Piece(last.queries, (last.keys[0], piece.keys[1]), False, None)
        else:
            result.append(piece)
    return result


def shard_sequence(x: Any, *, dim: int, group: Any = None, zigzag: bool = True, cu_seqlens: Any = None) -> Any:
    """This rank's part of a tensor that all ranks of the group have.

    Args:
        x: any tensor whose extent along `dim` is a multiple of twice the number of ranks.
        dim: that of the sequence, or of the tokens of packed ones.
        group: of `torch.distributed`; None for all ranks.
        zigzag: as in `ring_attention`, which has to get the same.
        cu_seqlens: offsets of packed sequences, the length of each a multiple of twice the number of ranks, which is checked where they are on the CPU.

    Returns:
        a tensor of x's extents, but for `dim`.
    """
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    extent = x.shape[dim]
    hint = f"Pad it to a multiple of {2 * ranks}; with is_causal=True nothing sees padding behind the sequence."
    if extent % (2 * ranks):
        raise ShapeError("x", f"{extent} positions along dim {dim} for {ranks} ranks", "a multiple of twice the number of ranks", hint)
    own = chunks(rank, ranks, zigzag)
    if cu_seqlens is None:
        parts = x.chunk(2 * ranks, dim)
        return torch.cat([parts[chunk] for chunk in own], dim)
    if not cu_seqlens.is_cuda and bool((cu_seqlens % (2 * ranks)).any()):
        raise ShapeError(
            "cu_seqlens", f"lengths {cu_seqlens.diff().tolist()} for {ranks} ranks", "multiples of twice the number of ranks", hint
        )
    return x.index_select(dim, torch.cat([_tokens(chunk, cu_seqlens, extent, 2 * ranks) for chunk in own]))


def _tokens(chunk: int, cu_seqlens: Any, total: int, count: int) -> Any:
    """Where the tokens of a chunk of each packed sequence lie, which are cut into `count` chunks; nothing of it is read on the host."""
    starts = cu_seqlens.long()
    position = torch.arange(total // count, device=starts.device)
    sequence = torch.searchsorted(starts[1:] // count, position, right=True)
    lengths = starts.diff() // count
    return position - (starts // count)[sequence] + starts[sequence] + chunk * lengths[sequence]


def gather_sequence(x: Any, *, dim: int, group: Any = None, zigzag: bool = True, cu_seqlens: Any = None) -> Any:
    """The whole tensor out of the parts of all ranks, in the order of the sequence: what `shard_sequence` has taken apart.

    Differentiable: the gradient of a part is the sum of what all ranks have for it. A loss that every rank computes of the whole therefore counts once for each rank:
    take it of the parts, or divide it by their number.
    """
    return _Gather.apply(x, dim, group, zigzag, cu_seqlens)


def in_order(shards: list[Any], dim: int, zigzag: bool, cu_seqlens: Any = None) -> Any:
    """Shards of the ranks 0, 1, … as one sequence."""
    by_chunk: dict[int, Any] = {}
    for rank, shard in enumerate(shards):
        by_chunk |= zip(chunks(rank, len(shards), zigzag), shard.chunk(2, dim), strict=True)
    count = 2 * len(shards)
    in_chunks = torch.cat([by_chunk[chunk] for chunk in range(count)], dim)
    if cu_seqlens is None:
        return in_chunks
    places = torch.cat([_tokens(chunk, cu_seqlens, in_chunks.shape[dim], count) for chunk in range(count)])
    return torch.empty_like(in_chunks).index_copy_(dim, places, in_chunks)


def all_shards(x: Any, group: Any) -> list[Any]:
    """Those of all ranks, which this one then has too."""
    shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shards, x.contiguous(), group=group)
    return shards


def sum_of_ranks(x: Any, dim: int, group: Any, zigzag: bool, cu_seqlens: Any = None) -> Any:
    """This rank's part of the sum of the whole tensors that all ranks have, which are in the order of the sequence."""
    ranks = torch.distributed.get_world_size(group)
    if torch.distributed.get_backend(group) != "nccl" or cu_seqlens is not None:  # gloo adds up whole tensors only
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return shard_sequence(x, dim=dim, group=group, zigzag=zigzag, cu_seqlens=cu_seqlens)
    parts = x.chunk(2 * ranks, dim)
    of_ranks = [torch.cat([parts[chunk] for chunk in chunks(rank, ranks, zigzag)], dim) for rank in range(ranks)]
    own = torch.empty_like(of_ranks[0])
    torch.distributed.reduce_scatter(own, of_ranks, group=group)
    return own


class _Gather(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Any, dim: int, group: Any, zigzag: bool, cu_seqlens: Any) -> Any:
        ctx.dim, ctx.group, ctx.zigzag, ctx.cu_seqlens = dim, group, zigzag, cu_seqlens
        return in_order(all_shards(x, group), dim, zigzag, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, None, None, None, None]:
        return sum_of_ranks(grad, ctx.dim, ctx.group, ctx.zigzag, ctx.cu_seqlens), None, None, None, None
