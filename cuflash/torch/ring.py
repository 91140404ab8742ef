"""`ring_attention`: attention over a sequence whose parts lie on several ranks, by `torch.distributed` alone.

Each rank has its queries, keys and values (`shards.py`). Keys and values come to the queries, by one of two ways:
- "pass": rank by rank, each only where it is seen, while the one before it is computed. Parts are merged by their lse. Gradients of keys go back the way they came.
- "gather": all of them at once, so that each chunk of queries is one call. Their gradients are added up over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from cuflash.arrays.descriptions import describe
from cuflash.errors import OptionError, ShapeError, UnsupportedError
from cuflash.merging import merge_attention
from cuflash.problem.other_names import explains_keywords
from cuflash.torch import shards
from cuflash.torch.functions import Call
from cuflash.torch.inputs import TENSORS, autocast, check_tensors, dropout_source, lengths, number, pair, probability, sinks_and_slopes
from cuflash.torch.shards import Limit, Piece


@explains_keywords
def ring_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    group: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "bhsd",
    window: Any = None,
    softcap: float | None = None,
    return_lse: bool = False,
    allow_tf32: bool = False,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
    zigzag: bool = True,
    method: str | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    attn_mask: None = None,
) -> Any:
    """Attention over the sequence of all ranks, of which each has a part: context parallelism.

    Every rank of the group makes the same call with its own part, as `shard_sequence` gives it.

    Args:
        query, key, value: this rank's parts, `(batch, heads, seqlen / ranks, head_dim)`, of the same shapes on all ranks; queries and keys of one length.
        group: of `torch.distributed` (NCCL for CUDA tensors, gloo for CPU tensors); None for all ranks.
        is_causal, window: of positions in the whole sequence.
        scale, enable_gqa, layout, softcap, return_lse, allow_tf32: as in `scaled_dot_product_attention`.
        cu_seqlens, max_seqlen: offsets of packed sequences and the longest of them, of all ranks together; query, key and value are then `(tokens / ranks, heads, head_dim)`, as
            `shard_sequence(cu_seqlens=…)` gives them, and passed; there are no windows.
        zigzag: whether parts are those of `shard_sequence(zigzag=True)`, which shares out the work of a causal mask evenly.
        method: "pass" or "gather"; None takes the one that moves less: gathering moves every part to every rank once, passing the parts that are seen, twice. Passing
            holds one part of another rank at a time, gathering holds all.
        dropout_p, dropout_seed: as there. Each call of this rank draws a mask of its own, `offset + number of the call`, so that ranks may have the same seed; another number of
            ranks or another method draws other masks.
        alibi_slopes: the same on all ranks; with is_causal, and gathered.
        sinks: the same on all ranks. Their gradient is this rank's part of it, to be added up over the ranks as that of every other parameter.
        attn_mask: refused: a mask has no parts yet.

    Returns:
        this rank's part of out, recorded by autograd, or with return_lse out and lse; the backward pass communicates too, so every rank has to take it.

    Raises:
        CuflashError: as `scaled_dot_product_attention`.
    """
    if attn_mask is not None:
        hint = "Say it by is_causal, window or cu_seqlens; or gather_sequence(key) and value, and call scaled_dot_product_attention with the mask's rows."
        raise UnsupportedError("attn_mask", f"{describe(attn_mask)} over parts of a sequence", "None", hint)
    state = dropout_seed if isinstance(dropout_seed, torch.Tensor) else None
    check_tensors(_in_order(query=query, key=key, value=value, sinks=sinks, alibi_slopes=alibi_slopes, dropout_seed=state))
    if method not in (None, "pass", "gather"):
        raise OptionError("method", describe(method), "'pass', 'gather' or None", "None takes the one that moves less.")
    query, key, value = autocast(query, key, value)
    packed = cu_seqlens is not None
    axis = 0 if packed else layout.index("s")
    if query.shape[axis] != key.shape[axis] or query.shape[axis] % 2:
        got = f"{key.shape[axis]} keys beside {query.shape[axis]} queries"
        raise ShapeError(
            "key", got, "the same even number of both", "Take both from shard_sequence, which gives each rank two chunks of one length."
        )
    left, right = pair(window) or (None, None)
    if packed and (window is not None or method == "gather"):
        name, value_of = ("window", window) if window is not None else ("method", method)
        raise OptionError(
            name,
            f"{describe(value_of)} with cu_seqlens",
            "None",
            "Packed sequences are passed, and see all of each other or what is causal.",
        )
    lowest: Limit = None if left in (None, -1) else -left
    highest: Limit = None if right in (None, -1) else right
    if is_causal:
        highest = 0 if highest is None else min(highest, 0)
    if alibi_slopes is not None:
        _check_alibi(highest, packed, method)
        method = "gather"
    dropout_p = probability(dropout_p)
    state, seed = dropout_source(dropout_p, dropout_seed, query.device)
    sinks, alibi_slopes = sinks_and_slopes(sinks, alibi_slopes)
    options = {
        "dropout_p": dropout_p, "is_causal": False, "scale": number(scale), "enable_gqa": enable_gqa, "causal_alignment": "top_left", "tile": None,
        "deterministic": False, "allow_tf32": allow_tf32, "window": None, "softcap": number(softcap),
    }  # fmt: skip
    others = _in_order(alibi_slopes=alibi_slopes, dropout_seed=state)[3:]
    if packed:
        count = 2 * torch.distributed.get_world_size(group)
        offsets = (lengths(cu_seqlens) // count).to(torch.int32)
        others = _in_order(cu_seqlens_q=offsets, cu_seqlens_kv=offsets, dropout_seed=state)[3:]
        longest = None if max_seqlen is None else number(max_seqlen) // count
        options |= {"max_seqlen_q": longest, "max_seqlen_kv": longest}
    else:
        options |= {"layout": layout, "batch_first": True, "num_heads": None}
    plan = _Plan(Call(packed, options, seed), others, group, axis, query.shape[axis] // 2, lowest, highest, zigzag)
    way = ("pass" if packed else plan.chosen()) if method is None else method
    out, lse = (_Gathered if way == "gather" else _Passed).apply(query, key, value, plan)
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks, plan)
    return (out, lse) if return_lse else out


def _check_alibi(highest: Limit, packed: bool, method: str | None) -> None:
    """Kernels count the distances of ALiBi from their diagonal, which is that of positions where the last key is that of the last query."""
    if highest != 0 or packed or method == "pass":
        got = "slopes with cu_seqlens" if packed else "slopes with method='pass'" if method == "pass" else "slopes without is_causal"
        raise OptionError(
            "alibi_slopes", got, "slopes with is_causal=True, gathered", "Leave method and cu_seqlens out, and pass is_causal=True."
        )


def _with_sinks(out: Any, lse: Any, sinks: Any, plan: _Plan) -> tuple[Any, Any]:
    """Attention with a logit for each head besides: its share of each row is taken off."""
    with_sinks = torch.logaddexp(lse, sinks[:, None])
    share = torch.exp(lse - with_sinks)  # (…, heads, queries)
    layout = plan.call.options.get("layout", "shd")
    order = ["bhs"[-lse.dim() :].index(letter) for letter in layout if letter != "d"]
    return (out * share.permute(order).unsqueeze(layout.index("d"))).to(out.dtype), with_sinks


def _in_order(**tensors: Any) -> tuple[Any, ...]:
    """Tensors of a call in the order of `TENSORS`."""
    return tuple(map(tensors.get, TENSORS))


class _Plan:
    """Who sees whom, and the calls for it.

    Attributes:
        call: of attention, to which each piece adds its mask.
        others: its tensors besides query, key and value; of packed sequences the offsets of a chunk of all of them. The last one is the state of its dropout.
        group, rank, ranks: of torch.distributed.
        axis: of the sequence.
        length: of a chunk, of which each rank has two.
        limits: of key - query, positions in the sequence.
        zigzag: see `shards.py`.
    """

    def __init__(
        self, call: Call, others: tuple[Any, ...], group: Any, axis: int, length: int, lowest: Limit, highest: Limit, zigzag: bool
    ) -> None:
        self.call, self.others, self.group, self.axis, self.length, self.zigzag = call, others, group, axis, length, zigzag
        self.rank, self.ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self.limits = lowest, highest

    def chunks(self, rank: int) -> tuple[int, int]:
        return shards.chunks(rank, self.ranks, self.zigzag)

    def pieces(self, of_queries: int, of_keys: int) -> list[Piece]:
        """Between the shards of two ranks."""
        if self.call.packed:
            return shards.packed_pieces(self.chunks(of_queries), self.chunks(of_keys), self.length, self.limits[1] == 0)
        return shards.pieces(self.chunks(of_queries), self.chunks(of_keys), self.length, *self.limits)

    def chosen(self) -> str:
        """The way that moves less in both passes, for the rank that needs most: parts of keys and values received, and gradients sent."""
        needed = max(sum(bool(self.pieces(rank, other)) for other in range(self.ranks) if other != rank) for rank in range(self.ranks))
        return (
            "pass" if 4 * needed < 3 * (self.ranks - 1) else "gather"
        )  # keys twice, gradients in float32; against keys once and as many gradients

    def steps(self) -> list[tuple[int | None, int | None]]:
        """Whom this rank sends its keys to and whom it gets some from, where they are seen: for each distance."""
        found = []
        for distance in range(1, self.ranks):
            to, source = (self.rank + distance) % self.ranks, (self.rank - distance) % self.ranks
            found.append((to if self.pieces(to, self.rank) else None, source if self.pieces(self.rank, source) else None))
        return found

    def peer(self, rank: int) -> int:
        """The rank of one of the group among all."""
        return rank if self.group is None else torch.distributed.get_global_rank(self.group, rank)

    def slice(self, x: Any, rows: tuple[int, int]) -> Any:
        return x.narrow(self.axis, rows[0], rows[1] - rows[0])

    def masked(self, piece: Piece) -> Call:
        return self.call.replaced(is_causal=piece.is_causal, window=piece.window)

    def drawn(self, call: Call, rank: int, i: int) -> tuple[Call, tuple[Any, ...]]:
        """A call and its other tensors, with a dropout of its own: that of the i-th call of this rank with keys of another, of which there are at most four."""
        if not call.dropout_p:
            return call, self.others
        distance = 4 * (self.rank * self.ranks + rank) + i
        *others, state = self.others
        if state is not None:
            return call, (*others, torch.stack((state[0], state[1] + distance)))
        seed, offset = call.seed if isinstance(call.seed, tuple) else (call.seed, 0)
        return Call(call.packed, call.options, (seed, offset + distance)), self.others


def _exchange(plan: _Plan, to: int | None, source: int | None, sent: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """Begin to send tensors to one rank and to receive as many like them from another; None for nobody.

    Returns:
        what will have been received, and a function that waits for it.
    """
    operations: list[Any] = []
    received: list[Any] = []
    if to is not None:
        operations += [torch.distributed.P2POp(torch.distributed.isend, x, plan.peer(to), plan.group) for x in sent]
    if source is not None:
        received = [torch.empty_like(x) for x in sent]
        operations += [torch.distributed.P2POp(torch.distributed.irecv, x, plan.peer(source), plan.group) for x in received]
    work = torch.distributed.batch_isend_irecv(operations) if operations else []

    def wait() -> None:
        for each in work:
            each.wait()

    return received, wait


def _visits(plan: _Plan, key: Any, value: Any) -> Any:
    """(rank, its keys, its values) for all whose keys this rank sees, its own first; the next ones travel while one is looked at."""
    own = (key.contiguous(), value.contiguous())
    steps = plan.steps()
    travelling = _exchange(plan, *steps[0], own) if steps else None
    yield plan.rank, key, value
    for i, (_, source) in enumerate(steps):
        assert travelling is not None
        arrived, wait = travelling
        wait()
        travelling = _exchange(plan, *steps[i + 1], own) if i + 1 < len(steps) else None
        if source is not None:
            yield source, *arrived


def _saved(ctx: Any, plan: _Plan, query: Any, keys: Any, values: Any, out: Any, lse: Any) -> tuple[Any, Any]:
    """out and lse, with what the backward pass needs in `ctx`."""
    ctx.save_for_backward(query, keys, values, out, lse)
    ctx.plan = plan
    ctx.set_materialize_grads(False)
    return out, lse


def _zeros(x: Any) -> Any:
    """What gradients of x are added up in."""
    return torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


def _gradients(
    ctx: Any,
    drawn: tuple[Call, tuple[Any, ...]],
    rows: tuple[int, int],
    seen: tuple[int, int],
    keys: Any,
    values: Any,
    grad_out: Any,
    grad_lse: Any,
) -> Any:
    """Those of some queries and the keys that they see, with the out and lse of all keys; a missing gradient is zero."""
    query, _, _, out, lse = ctx.saved_tensors
    plan: _Plan = ctx.plan
    tensors = (plan.slice(query, rows), plan.slice(keys, seen), plan.slice(values, seen), *drawn[1])
    own_out, own_lse = plan.slice(out, rows), lse[..., slice(*rows)]
    own_grad = torch.zeros_like(own_out) if grad_out is None else plan.slice(grad_out, rows)
    return drawn[0].backward(tensors, own_out, own_lse, own_grad, None if grad_lse is None else grad_lse[..., slice(*rows)], False)


class _Passed(torch.autograd.Function):  # type: ignore[misc]
    """(out, lse) with keys and values that are passed from rank to rank."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, plan: _Plan) -> tuple[Any, Any]:
        layout = plan.call.options.get("layout", "bshd")
        out: Any = None
        for rank, keys, values in _visits(plan, key, value):
            for i, piece in enumerate(plan.pieces(plan.rank, rank)):
                call, others = plan.drawn(plan.masked(piece), rank, i)
                tensors = (plan.slice(query, piece.queries), plan.slice(keys, piece.keys), plan.slice(values, piece.keys), *others)
                part, part_lse = call.forward(tensors, True)
                if out is None:
                    out, lse = _nothing(plan, query, part, part_lse)
                rows = plan.slice(out, piece.queries)
                rows_lse = lse[..., slice(*piece.queries)]
                merged, merged_lse = merge_attention([rows, part.float()], [rows_lse, part_lse], layout=layout)
                rows.copy_(merged)
                rows_lse.copy_(merged_lse)
        return _saved(ctx, plan, query, key, value, out.to(query.dtype), lse)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> tuple[Any, Any, Any, None]:
        query, key, value, _, _ = ctx.saved_tensors
        plan: _Plan = ctx.plan
        sums = [_zeros(x) for x in (query, key, value)]
        of_others: dict[int, list[Any]] = {}
        for rank, keys, values in _visits(plan, key, value):
            of_rank = sums[1:] if rank == plan.rank else [torch.zeros_like(x) for x in sums[1:]]
            for i, piece in enumerate(plan.pieces(plan.rank, rank)):
                grads = _gradients(
                    ctx, plan.drawn(plan.masked(piece), rank, i), piece.queries, piece.keys, keys, values, grad_out, grad_lse
                )
                plan.slice(sums[0], piece.queries).add_(grads.query)
                for total, grad in zip(of_rank, (grads.key, grads.value), strict=True):
                    plan.slice(total, piece.keys).add_(grad)
            if rank != plan.rank:
                of_others[rank] = of_rank
        for to, source in plan.steps():  # whom the keys came from gets their gradients
            sent = tuple(of_others.pop(source)) if source is not None else tuple(sums[1:])
            received, wait = _exchange(plan, source, to, sent)
            wait()
            for total, grad in zip(sums[1:], received, strict=False):
                total.add_(grad)
        return (*(total.to(x.dtype) for total, x in zip(sums, (query, key, value), strict=True)), None)


def _nothing(plan: _Plan, query: Any, part: Any, part_lse: Any) -> tuple[Any, Any]:
    """out and lse of queries that have seen no key yet."""
    shape = [*part.shape]
    shape[plan.axis] = query.shape[plan.axis]
    lse_shape = (*part_lse.shape[:-1], query.shape[plan.axis])
    return part.new_zeros(shape, dtype=torch.float32), part_lse.new_full(lse_shape, float("-inf"))


class _Gathered(torch.autograd.Function):  # type: ignore[misc]
    """(out, lse) with the keys and values of all ranks, one call for each of the two chunks of queries."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, plan: _Plan) -> tuple[Any, Any]:
        keys, values = (shards.in_order(shards.all_shards(x, plan.group), plan.axis, plan.zigzag) for x in (key, value))
        results = []
        for i, (rows, seen, call) in enumerate(_calls(plan)):
            drawn, others = plan.drawn(call, plan.rank, i)
            results.append(drawn.forward((plan.slice(query, rows), plan.slice(keys, seen), plan.slice(values, seen), *others), True))
        out = torch.cat([out for out, _ in results], plan.axis)
        lse = torch.cat([lse for _, lse in results], -1)
        return _saved(ctx, plan, query, keys, values, out, lse)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> tuple[Any, Any, Any, None]:
        _, keys, values, _, _ = ctx.saved_tensors
        plan: _Plan = ctx.plan
        sums = [_zeros(x) for x in (keys, values)]
        of_queries = []
        for i, (rows, seen, call) in enumerate(_calls(plan)):
            grads = _gradients(ctx, plan.drawn(call, plan.rank, i), rows, seen, keys, values, grad_out, grad_lse)
            of_queries.append(grads.query)
            for total, grad in zip(sums, (grads.key, grads.value), strict=True):
                plan.slice(total, seen).add_(grad)
        own = [shards.sum_of_ranks(total, plan.axis, plan.group, plan.zigzag).to(keys.dtype) for total in sums]
        return torch.cat(of_queries, plan.axis), own[0], own[1], None


def _calls(plan: _Plan) -> list[tuple[tuple[int, int], tuple[int, int], Call]]:
    """For each chunk of queries: its rows in the shard, the keys of the sequence that it sees, and the call, whose diagonal is that of the last query and key."""
    found = []
    lowest, highest = plan.limits
    whole = 2 * plan.ranks * plan.length
    for i, chunk in enumerate(plan.chunks(plan.rank)):
        first, end = chunk * plan.length, (chunk + 1) * plan.length
        seen = 0 if lowest is None else max(0, first + lowest), whole if highest is None else min(whole, end + highest)
        beyond = seen[1] - end  # keys behind the last query, by which that diagonal lies behind the one of positions
        is_causal, window = shards.mask_of(None if lowest is None else lowest - beyond, None if highest is None else highest - beyond)
        call = plan.call.replaced(causal_alignment="bottom_right", is_causal=is_causal, window=window)
        found.append(((i * plan.length, (i + 1) * plan.length), seen, call))
    return found
