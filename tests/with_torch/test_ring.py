"""A sequence on several ranks: the parts, who sees whom, and `ring_attention` in processes that talk by gloo, against attention over all of it in float64."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from written_out import assert_close, attention

import cuflash
from cuflash.errors import KeywordError, OptionError, ShapeError, UnsupportedError
from cuflash.torch import gather_sequence, ring_attention, shard_sequence
from cuflash.torch.functions import Call
from cuflash.torch.ring import _calls, _Plan
from cuflash.torch.shards import chunks, in_order, pieces

LIMITS = [(None, None), (None, 0), (-5, 0), (-5, 3), (None, 4), (-30, None), (0, 0), (-9, 0)]


@pytest.mark.parametrize("zigzag", [True, False], ids=["zigzag", "neighbours"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_pieces_are_the_pairs_that_see_each_other(limits: tuple[int | None, int | None], zigzag: bool) -> None:
    """Each pair in one piece, and none besides."""
    ranks, length = 3, 4
    lowest, highest = limits
    for r, s in itertools.product(range(ranks), repeat=2):
        positions = [torch.cat([torch.arange(length) + chunk * length for chunk in chunks(rank, ranks, zigzag)]) for rank in (r, s)]
        distance = positions[1] - positions[0][:, None]
        want = torch.ones_like(distance, dtype=torch.bool)
        want &= True if lowest is None else distance >= lowest
        want &= True if highest is None else distance <= highest
        got = torch.zeros_like(distance)
        for piece in pieces(chunks(r, ranks, zigzag), chunks(s, ranks, zigzag), length, lowest, highest):
            (q0, q1), (k0, k1) = piece.queries, piece.keys
            local = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None]
            seen = torch.ones_like(local, dtype=torch.bool)
            left, right = piece.window or (None, None)
            assert min(x for x in (left, right, 0) if x is not None) == 0
            seen &= local <= 0 if piece.is_causal else True
            seen &= True if left is None else local >= -left
            seen &= True if right is None else local <= right
            got[q0:q1, k0:k1] += seen
        assert torch.equal(got, want.int())


def test_causal_work_is_one_call_for_each_rank_and_the_same_for_all() -> None:
    sizes = set()
    for r, s in itertools.product(range(4), repeat=2):
        (piece,) = pieces(chunks(r, 4, True), chunks(s, 4, True), 8, None, 0)
        area = (piece.queries[1] - piece.queries[0]) * (piece.keys[1] - piece.keys[0])
        sizes.add(area // 2 if piece.is_causal else area)
    assert sizes == {128}


def test_parts_and_the_whole() -> None:
    x = torch.arange(24).reshape(2, 12)
    parts = [torch.cat([x.chunk(6, 1)[chunk] for chunk in chunks(rank, 3, zigzag=True)], 1) for rank in range(3)]
    assert parts[0].tolist()[0] == [0, 1, 10, 11]
    assert torch.equal(in_order(parts, 1, zigzag=True), x)


# --- Processes ----------------------------------------------------------------------------------------------------------------------------

HEADS, KEY_HEADS, DIM, CHUNK = 2, 1, 32, 16

CASES: dict[str, dict[str, Any]] = {
    "causal_passed": {"is_causal": True, "method": "pass"},
    "causal_gathered": {"is_causal": True, "method": "gather"},
    "window_passed": {"window": (20, 5), "zigzag": False, "method": "pass"},
    "window_gathered": {"window": (20, 5), "method": "gather", "layout": "bshd"},
    "full_16_bits": {"dtype": torch.float16, "method": "pass", "layout": "bshd"},
    "causal_alibi_sinks": {"is_causal": True, "alibi_slopes": torch.tensor([0.3, 0.1]), "sinks": torch.tensor([0.5, 1.0])},
    "full_sinks": {"method": "pass", "layout": "bshd", "sinks": torch.tensor([0.5, 1.0])},
    "causal_dropout_passed": {"is_causal": True, "method": "pass", "dropout_p": 0.3, "dropout_seed": (5, 6)},
    "window_dropout_gathered": {"window": (20, 5), "method": "gather", "dropout_p": 0.3, "dropout_seed": torch.tensor([5, 6])},
}


def whole(ranks: int, dtype: Any) -> list[Any]:
    """Query, key, value, and gradients of out and lse, the same in all processes."""
    generator = torch.Generator().manual_seed(6)
    seqlen = 2 * ranks * CHUNK
    shapes = [(1, HEADS, seqlen, DIM), *[(1, KEY_HEADS, seqlen, DIM)] * 2, (1, HEADS, seqlen, DIM)]
    return [*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), torch.randn(1, HEADS, seqlen, generator=generator)]


def kept_by_rank(rank: int, ranks: int, case: dict[str, Any], zigzag: bool) -> Any:
    """Which pairs of this rank's queries and all keys dropout keeps, a mask for each call of it; elsewhere what nobody looks at."""
    seqlen = 2 * ranks * CHUNK
    kept = torch.ones(1, HEADS, seqlen, seqlen, dtype=torch.bool)
    left, right = case.get("window", (None, 0))
    plan = _Plan(Call(False, {"causal_alignment": "top_left"}), (), None, 2, CHUNK, None if left is None else -left, right, zigzag)

    def draw(rows: Any, columns: Any, of: int, i: int) -> None:
        shape = (1, HEADS, len(rows), len(columns))
        kept[0][:, rows[:, None], columns] = cuflash.dropout_mask(shape, 0.3, (5, 6 + 4 * (rank * ranks + of) + i), like=torch.zeros(1))[0]

    def positions(of: int) -> Any:
        return torch.cat([torch.arange(CHUNK) + chunk * CHUNK for chunk in chunks(of, ranks, zigzag)])

    if case["method"] == "pass":
        for other in range(ranks):
            for i, piece in enumerate(plan.pieces(rank, other)):
                draw(positions(rank)[slice(*piece.queries)], positions(other)[slice(*piece.keys)], other, i)
    else:
        for i, (rows, seen, _) in enumerate(_calls(plan)):
            draw(positions(rank)[slice(*rows)], torch.arange(*seen), rank, i)
    return kept


def check(rank: int, ranks: int, case: dict[str, Any]) -> None:
    """One rank's part of out, lse and all gradients."""
    options = {"zigzag": True, "layout": "bhsd", "dtype": torch.float32, **case}
    zigzag, layout, dtype = options["zigzag"], options["layout"], options.pop("dtype")
    query, key, value, grad_out, grad_lse = whole(ranks, dtype)
    doubles = [x.double().requires_grad_() for x in (query, key, value)]
    judged: dict[str, Any] = {
        "is_causal": case.get("is_causal", False),
        "window": case.get("window", (-1, -1)),
        "slopes": case.get("alibi_slopes"),
    }
    if "dropout_p" in case:
        judged |= {"dropout_p": 0.3, "kept": kept_by_rank(rank, ranks, case, zigzag)}
    if "sinks" in case:
        options["sinks"] = case["sinks"].clone().requires_grad_()
        judged["sinks"] = case["sinks"].double().requires_grad_()
        doubles.append(judged["sinks"])
    wanted = attention(*doubles[:3], **judged)
    if "dropout_p" in case:  # masks of other ranks are others: the keys' gradients are compared of this rank's queries
        check_dropped(rank, ranks, options, (query, key, value, grad_out, grad_lse), doubles, wanted)
        return
    wanted_grads = torch.autograd.grad(wanted, doubles, [grad_out.double(), grad_lse.double()])

    def part(x: Any) -> Any:
        own = shard_sequence(x, dim=2, zigzag=zigzag)
        return own.transpose(1, 2) if layout == "bshd" and x.dim() == 4 else own

    inputs = [part(x).requires_grad_() for x in (query, key, value)]
    out, lse = ring_attention(*inputs, enable_gqa=True, return_lse=True, **options)
    assert_close(out, part(wanted[0]), "out")
    assert_close(lse, part(wanted[1]), "lse")
    of_sinks = [options["sinks"]] if "sinks" in case else []
    grads = torch.autograd.grad((out, lse), [*inputs, *of_sinks], [part(grad_out), part(grad_lse)])
    for own in grads[3:]:
        torch.distributed.all_reduce(own)
        assert_close(own, wanted_grads[3], "gradient of the sinks")
    for got, want in zip(grads[:3], wanted_grads[:3], strict=True):
        assert got.dtype == dtype
        assert_close(got, part(want), "gradient")
    again = gather_sequence(out, dim=layout.index("s"), zigzag=zigzag)
    assert_close(again, wanted[0].transpose(1, 2) if layout == "bshd" else wanted[0], "gathered")


def check_dropped(rank: int, ranks: int, options: dict[str, Any], whole: Any, doubles: list[Any], wanted: Any) -> None:
    """Out, lse and the query's gradient of this rank's rows; the other gradients where its rows are all that is in the loss, which all ranks take turns with."""
    zigzag = options["zigzag"]
    part = functools.partial(shard_sequence, dim=2, zigzag=zigzag)
    inputs = [part(x).requires_grad_() for x in whole[:3]]
    out, lse = ring_attention(*inputs, enable_gqa=True, return_lse=True, **options)
    assert_close(out, part(wanted[0]), "out")
    assert_close(lse, part(wanted[1]), "lse")
    for turn in range(ranks):
        grads = torch.autograd.grad((out, lse), inputs, [part(x) * (rank == turn) for x in whole[3:]], retain_graph=True)
        of_turn = torch.autograd.grad((part(wanted[0]), part(wanted[1])), doubles, [part(x).double() for x in whole[3:]], retain_graph=True)
        for got, want in zip(grads, of_turn, strict=True):
            torch.distributed.broadcast(want, turn)
            assert_close(got, part(want), f"gradient of rank {turn}")


def check_packed(rank: int, ranks: int, is_causal: bool) -> None:
    """Three sequences of different lengths, one of them empty: each is cut for itself."""
    generator = torch.Generator().manual_seed(7)
    ends = [0, 4 * ranks, 4 * ranks, 32 * ranks]
    offsets = torch.tensor(ends)
    whole = [torch.randn(ends[-1], heads, DIM, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    doubles = [x.double().requires_grad_() for x in whole[:3]]
    given = {"is_causal": is_causal, "sinks": torch.tensor([0.5, 1.0])}
    parts = [attention(*(x[a:b].transpose(0, 1) for x in doubles), **given) for a, b in itertools.pairwise(ends) if a < b]
    wanted = torch.cat([out.transpose(0, 1) for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)
    wanted_grads = torch.autograd.grad(wanted[0], doubles, whole[3].double())

    def part(x: Any, dim: int = 0) -> Any:
        return shard_sequence(x, dim=dim, cu_seqlens=offsets)

    sinks = torch.tensor([0.5, 1.0])
    inputs = [part(x).requires_grad_() for x in whole[:3]]
    out, lse = ring_attention(
        *inputs, sinks=sinks, is_causal=is_causal, enable_gqa=True, cu_seqlens=offsets, max_seqlen=28 * ranks, return_lse=True
    )
    assert_close(out, part(wanted[0]), "out")
    assert_close(lse, part(wanted[1], 1), "lse")
    for got, want in zip(torch.autograd.grad(out, inputs, part(whole[3])), wanted_grads, strict=True):
        assert_close(got, part(want), "gradient")
    again = gather_sequence(out, dim=0, cu_seqlens=offsets)
    assert_close(again, wanted[0], "gathered")
    with pytest.raises(OptionError, match=r"window: got .* with cu_seqlens"):
        ring_attention(*inputs, cu_seqlens=offsets, window=(3, 0))
    with pytest.raises(ShapeError, match=r"cu_seqlens: got lengths \[1, "):
        shard_sequence(whole[0], dim=0, cu_seqlens=torch.tensor([0, 1, ends[-1]]))


def check_gather(rank: int, ranks: int) -> None:
    """Its gradient is the sum over the ranks, and what cannot be shared out is refused."""
    x = torch.arange(4.0 * ranks, requires_grad=True)
    gathered = gather_sequence(shard_sequence(x, dim=0), dim=0)
    assert torch.equal(gathered, x)
    (gathered * (rank + 1)).sum().backward()
    own = shard_sequence(torch.arange(4 * ranks), dim=0)
    assert (x.grad[own] == sum(range(1, ranks + 1))).all()
    with pytest.raises(ShapeError, match=f"x: got 5 positions along dim 0 for {ranks} ranks"):
        shard_sequence(torch.zeros(5), dim=0)
    with pytest.raises(OptionError, match="method: got 'ring'"):
        ring_attention(*[torch.zeros(1, 1, 4, 8)] * 3, method="ring")
    for options, match in (
        ({}, "alibi_slopes: got slopes without is_causal"),
        ({"is_causal": True, "method": "pass"}, "alibi_slopes: got slopes with method='pass'"),
    ):
        with pytest.raises(OptionError, match=match):
            ring_attention(*[torch.zeros(1, 1, 4, 8)] * 3, alibi_slopes=torch.ones(1), **options)
    plan = _Plan(Call(False, {}), (), None, 2, 16, -10, 0, zigzag=True)
    assert plan.chosen() == ("pass" if ranks == 4 else "gather")


def work(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    check_gather(rank, ranks)
    for name, case in CASES.items():
        try:
            check(rank, ranks, case)
        except Exception as error:
            raise AssertionError(f"{name} on rank {rank} of {ranks}") from error
    for is_causal in (True, False):
        check_packed(rank, ranks, is_causal)
    torch.distributed.destroy_process_group()


def test_masks_are_refused_by_name() -> None:
    """Before anything is sent: no rank waits for another."""
    parts = [torch.zeros(1, 1, 4, 8)] * 3
    with pytest.raises(UnsupportedError, match=r"attn_mask: got .* over parts of a sequence; expected None.*gather_sequence"):
        ring_attention(*parts, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(KeywordError, match="attn_bias"):
        ring_attention(*parts, attn_bias=torch.zeros(4, 4))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ring_attention(tmp_path: Path, ranks: int) -> None:
    """Causal, windowed and full, passed and gathered, both orders of parts, grouped heads: out, lse and gradients of each rank's part."""
    if torch.cuda.is_available():
        pytest.skip("gloo and CPU tensors")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cuflash.torch", "pytest"])
    processes = [context.Process(target=work, args=(rank, ranks, str(tmp_path / "store"))) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
