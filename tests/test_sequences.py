"""Sequences of different lengths that only the device knows: `seqlens_kv` of padded batches, and sequences packed one behind the other.

Against the reference, which takes one sequence at a time, and against what the lengths must not let through: NaN behind a row's last key,
tokens behind the last sequence, offsets that make no sense.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from conftest import poison_new_memory
from problems import num_prepared

import cuflash
from cuflash import Tile, reference
from cuflash.errors import ArgumentError, DeviceError, DTypeError, OptionError, ShapeError, SimulatorError
from cuflash.hardware import device
from cuflash.planning.offline import offline_kernels
from cuflash.problem import sequences
from cuflash.reference import varlen_attention, varlen_attention_backward

pytestmark = pytest.mark.small_tiles

if TYPE_CHECKING:
    from conftest import Target

DTYPES = ["float16", "bfloat16", "float32"]
MASKS = {
    "full": {},
    "top_left": {"is_causal": True, "causal_alignment": "top_left"},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
}
MASK = pytest.mark.parametrize("mask", list(MASKS.values()), ids=list(MASKS))


def int32(target: Target, values: Any) -> Any:
    return target.place(numpy.array(values, numpy.int32))


# --- seqlens_kv of padded batches ---------------------------------------------------------------------------------------------------------


def padded(target: Target, lengths: Any, dtype: str, dims: tuple[int, int] = (40, 40), heads: tuple[int, int] = (2, 2)) -> list[Any]:
    """query, key and value for rows of these lengths; key and value hold NaN and infinity behind them."""
    batch, (head_dim, head_dim_v), (heads_q, heads_kv) = len(lengths), dims, heads
    query = target.random((batch, 70, heads_q, head_dim), dtype, 1)
    key, value = (
        target.as_numpy(target.random((batch, 90, heads_kv, dim), dtype, seed)).copy() for seed, dim in ((2, head_dim), (3, head_dim_v))
    )
    for row, length in enumerate(numpy.clip(lengths, 0, 90)):
        key[row, length:], value[row, length:] = numpy.nan, numpy.inf
    return [query, target.place(key), target.place(value)]


@pytest.mark.sample(2)
@MASK
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_their_own_numbers_of_keys(target: Target, dtype: str, mask: dict[str, Any]) -> None:
    lengths = [90, 33, 0, 64, 1]
    results = target.check(*padded(target, lengths, dtype), seqlens_kv=int32(target, lengths), **mask)
    assert not target.host(results.out)[2].any()
    assert numpy.isneginf(target.host(results.lse)[2]).all()
    assert results.grads is not None
    for grad in results.grads[1:]:
        for row, length in enumerate(lengths):
            assert not target.host(grad)[row, length:].any()


@MASK
def test_nan_in_padded_keys_and_values_never_leaks(target: Target, mask: dict[str, Any]) -> None:
    """The same bits as with zeros there, forwards and backwards."""
    lengths = [17, 90, 65]
    dirty = padded(target, lengths, target.half)
    clean = [
        dirty[0],
        *(target.place(numpy.nan_to_num(target.as_numpy(x).astype(numpy.float32), posinf=0).astype(x.dtype)) for x in dirty[1:]),
    ]
    got, want = (target.run(*inputs, seqlens_kv=int32(target, lengths), **mask) for inputs in (dirty, clean))
    assert got.bits() == want.bits()


@pytest.mark.sample(1)
@pytest.mark.parametrize("dims", [(192, 128), (71, 33), (512, 512), (8, 320)], ids=str)
def test_key_lengths_with_other_head_dims(target: Target, dims: tuple[int, int]) -> None:
    lengths = [5, 77]
    inputs = padded(target, lengths, target.half, dims, heads=(4, 2))
    target.check(*inputs, seqlens_kv=int32(target, lengths), enable_gqa=True, is_causal=True, causal_alignment="bottom_right")


@pytest.mark.sample(1)
@MASK
def test_full_key_lengths_change_nothing(target: Target, mask: dict[str, Any]) -> None:
    inputs = padded(target, [90, 90], target.half)
    assert target.run(*inputs, seqlens_kv=int32(target, [90, 90]), **mask).bits() == target.run(*inputs, **mask).bits()


def test_key_lengths_out_of_range_are_clamped(target: Target) -> None:
    inputs = padded(target, [0, 90, 90], target.half)
    got, want = (target.run(*inputs, seqlens_kv=int32(target, lengths)) for lengths in ([-5, 91, 2**31 - 1], [0, 90, 90]))
    assert got.bits() == want.bits()


@pytest.mark.sample(1)
@MASK
@pytest.mark.parametrize("dims", [(40, 40), (256, 256)], ids=str)
def test_key_lengths_of_keys_that_the_batch_shares(target: Target, dims: tuple[int, int], mask: dict[str, Any]) -> None:
    """One K and V for the whole batch, of which every row sees another part: gradients are summed over rows of different lengths."""
    query = target.random((4, 40, 4, dims[0]), target.half, 1)
    key, value = (target.random((1, 80, heads, dim), target.half, seed) for seed, heads, dim in ((2, 2, dims[0]), (3, 1, dims[1])))
    target.check(query, key, value, seqlens_kv=int32(target, [80, 3, 0, 64]), enable_gqa=True, **mask)


@pytest.mark.sample(4)
@pytest.mark.parametrize("layout", ["bhsd", "sbhd"])
def test_key_lengths_in_other_layouts_and_strides(target: Target, view: str, layout: str) -> None:
    order = ["bshd".index(letter) for letter in layout]
    plain, lengths = padded(target, [50, 90], target.half), int32(target, [50, 90])
    turned = [target.restride(target.place(numpy.ascontiguousarray(target.as_numpy(x).transpose(order))), view) for x in plain]
    want = target.run(*plain, seqlens_kv=lengths, backward=False)
    got = target.run(*turned, seqlens_kv=lengths, layout=layout, backward=False)
    assert target.bits(got.out.transpose(numpy.argsort(order))) == target.bits(want.out)
    assert target.bits(got.lse) == target.bits(want.lse)


def test_key_lengths_are_read_when_the_kernels_run(target: Target) -> None:
    """A kept call, as a captured graph, sees what the array holds by then, and nothing is prepared anew."""
    inputs, lengths = padded(target, [90, 90], target.half), int32(target, [90, 20])
    first = target.run(*inputs, seqlens_kv=lengths)
    kept = num_prepared()
    lengths[...] = int32(target, [5, 90])
    second = target.run(*inputs, seqlens_kv=lengths)
    assert num_prepared() == kept
    assert second.bits() != first.bits()
    assert second.bits() == target.run(*inputs, seqlens_kv=int32(target, [5, 90])).bits()


# --- Packed sequences ---------------------------------------------------------------------------------------------------------------------


def offsets(target: Target, lengths: Any) -> Any:
    return int32(target, numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)]))


def packed(
    target: Target,
    tokens: tuple[int, int],
    dtype: str,
    dims: tuple[int, int] = (40, 40),
    heads: tuple[int, int] = (2, 2),
    view: str = "contiguous",
) -> list[Any]:
    """query, key, value and the gradient of out."""
    (tokens_q, tokens_kv), (head_dim, head_dim_v), (heads_q, heads_kv) = tokens, dims, heads
    shapes = [
        (tokens_q, heads_q, head_dim),
        (tokens_kv, heads_kv, head_dim),
        (tokens_kv, heads_kv, head_dim_v),
        (tokens_q, heads_q, head_dim_v),
    ]
    return [target.random((1, *shape), dtype, seed, view)[0] for seed, shape in enumerate(shapes)]


LENGTHS_Q, LENGTHS_KV = [10, 0, 70, 1, 128, 33], [20, 30, 0, 3, 64, 130]


@pytest.mark.sample(2)
@MASK
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(target: Target, dtype: str, mask: dict[str, Any]) -> None:
    cu = offsets(target, LENGTHS_Q), offsets(target, LENGTHS_KV)
    target.check_packed(packed(target, (sum(LENGTHS_Q), sum(LENGTHS_KV)), dtype), cu, (128, 130), **mask)


@pytest.mark.sample(2)
@MASK
@pytest.mark.parametrize("dims", [(192, 128), (71, 33), (576, 512), (64, 256), (256, 8)], ids=str)
def test_packed_sequences_with_other_head_dims(target: Target, dims: tuple[int, int], mask: dict[str, Any]) -> None:
    cu = offsets(target, [10, 0, 40]), offsets(target, [20, 5, 33])
    target.check_packed(packed(target, (50, 58), target.half, dims, heads=(4, 2)), cu, (40, 33), enable_gqa=True, **mask)


@pytest.mark.parametrize("maxima", [(128, 130), (None, None), (128, None), (1000, 1000)], ids=str)
def test_bounds_of_lengths_change_grids_only(target: Target, maxima: Any) -> None:
    inputs, cu = packed(target, (sum(LENGTHS_Q), sum(LENGTHS_KV)), target.half), (offsets(target, LENGTHS_Q), offsets(target, LENGTHS_KV))
    got, want = (target.run_packed(inputs, cu, bounds, is_causal=True) for bounds in (maxima, (sum(LENGTHS_Q), sum(LENGTHS_KV))))
    assert [target.bits(x) for x in got] == [target.bits(x) for x in want]


@pytest.mark.sample(1)
@MASK
def test_one_packed_sequence_is_a_batch_of_one(target: Target, mask: dict[str, Any]) -> None:
    """The same bits as the call on padded batches, which has the same kernels but for where they find the lengths."""
    inputs = packed(target, (100, 130), target.half, (40, 24), heads=(4, 2))
    got = target.run_packed(inputs, (offsets(target, [100]), offsets(target, [130])), enable_gqa=True, **mask)
    want = target.run(*(x[None] for x in inputs[:3]), grad_out=inputs[3][None], enable_gqa=True, **mask)
    assert tuple(target.bits(x) for x in got) == want.bits()


def test_the_default_alignment_is_bottom_right(target: Target) -> None:
    inputs, cu = packed(target, (20, 60), target.half), (offsets(target, [5, 15]), offsets(target, [50, 10]))
    got, want = (
        target.run_packed(inputs, cu, is_causal=True),
        target.run_packed(inputs, cu, is_causal=True, causal_alignment="bottom_right"),
    )
    assert [target.bits(x) for x in got] == [target.bits(x) for x in want]
    assert numpy.isneginf(target.host(got[1])).sum() == 2 * 5, "the second sequence has five queries more than keys"


def test_packed_causal_with_three_keys(target: Target) -> None:
    """Skv = 3: less than a tile, less than a warp's rows; gradients came out infinite elsewhere."""
    for lengths_q in ([3, 3], [1, 5], [40, 3]):
        inputs = packed(target, (sum(lengths_q), 6), target.half)
        target.check_packed(inputs, (offsets(target, lengths_q), offsets(target, [3, 3])), (max(lengths_q), 3), is_causal=True)


@MASK
@pytest.mark.parametrize("lengths", [([0, 1, 1], [2, 0, 2]), ([1, 0, 0], [0, 2, 3]), ([0, 0, 1], [3, 1, 0])], ids=str)
def test_sequences_without_queries_or_keys_and_max_seqlen_1(target: Target, lengths: Any, mask: dict[str, Any]) -> None:
    """Decoding with grouped queries: at most one query each, some sequences have none, some no keys yet."""
    lengths_q, lengths_kv = lengths
    inputs = packed(target, (sum(lengths_q), sum(lengths_kv)), target.half, heads=(8, 2))
    target.check_packed(inputs, (offsets(target, lengths_q), offsets(target, lengths_kv)), (1, max(lengths_kv)), enable_gqa=True, **mask)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_all_sequences_empty(target: Target, lengths: list[int]) -> None:
    """Every token belongs to nobody: zeros, -inf and no gradient, even where all inputs are NaN."""
    inputs = [target.place(numpy.full(x.shape, numpy.nan, x.dtype)) for x in packed(target, (200, 300), target.half)]
    cu = offsets(target, lengths), offsets(target, lengths)
    for maxima in ((None, None), (0, 0), (7, 7)):
        out, lse, *grads = target.run_packed(inputs, cu, maxima, is_causal=True)
        assert numpy.isneginf(target.host(lse)).all()
        for x in (out, *grads):
            assert (target.host(x) == 0).all()


@pytest.mark.parametrize("tokens", [(0, 0), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("count", [0, 2], ids="sequences{}".format)
def test_no_tokens(target: Target, tokens: tuple[int, int], count: int) -> None:
    inputs, cu = packed(target, tokens, target.half, (40, 24)), (int32(target, [0] * (count + 1)), int32(target, [0] * (count + 1)))
    results = target.run_packed(inputs, cu)
    assert [x.shape for x in results] == [(tokens[0], 2, 24), (2, tokens[0]), (tokens[0], 2, 40), (tokens[1], 2, 40), (tokens[1], 2, 24)]
    assert numpy.isneginf(target.host(results[1])).all()
    for x in (results[0], *results[2:]):
        assert (target.host(x) == 0).all()


@pytest.mark.sample(2)
@pytest.mark.parametrize("dims", [(40, 40), (256, 72), (512, 512)], ids=str)
def test_tokens_beyond_the_last_offset(target: Target, dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They give zeros in out and gradients and -inf in LSE, whatever they hold, and memory of results comes uninitialised."""
    poison_new_memory(monkeypatch)
    used_q, used_kv = 60, 75
    inputs = packed(target, (used_q, used_kv), target.half, dims)
    cu = offsets(target, [20, 40]), offsets(target, [35, 40])
    want = target.run_packed(inputs, cu, (40, 40), is_causal=True)
    longer = []
    for x in inputs:
        whole = numpy.full((x.shape[0] + 300, *x.shape[1:]), numpy.nan, x.dtype)
        whole[: x.shape[0]] = target.as_numpy(x)
        longer.append(target.place(whole))
    got = target.run_packed(longer, cu, (40, 40), is_causal=True)
    assert target.bits(got[1][:, :used_q]) == target.bits(want[1])
    assert numpy.isneginf(target.host(got[1])[:, used_q:]).all()
    for long, short in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        used = short.shape[0]
        assert target.bits(long[:used]) == target.bits(short)
        assert (target.host(long)[used:] == 0).all()


def test_neighbours_never_leak(target: Target) -> None:
    """NaN in one sequence stays there: tiles reach past its ends, into the rows of the next."""
    lengths_q, lengths_kv = [30, 45, 20], [50, 17, 40]
    cu = offsets(target, lengths_q), offsets(target, lengths_kv)
    inputs = packed(target, (sum(lengths_q), sum(lengths_kv)), target.half)
    clean = target.run_packed(inputs, cu, is_causal=True)
    dirty_inputs = [target.as_numpy(x).copy() for x in inputs]
    for x, starts in zip(dirty_inputs, (cu[0], cu[1], cu[1], cu[0]), strict=True):
        x[int(starts[1]) : int(starts[2])] = numpy.nan
    dirty = target.run_packed([target.place(x) for x in dirty_inputs], cu, is_causal=True)
    for clean_one, dirty_one, starts in zip(clean, dirty, (cu[0], None, cu[0], cu[1], cu[1]), strict=True):
        got, want = target.host(dirty_one), target.host(clean_one)
        if starts is None:  # lse: tokens come last
            got, want, starts = got.T, want.T, cu[0]
        outside = [*range(int(starts[1])), *range(int(starts[2]), got.shape[0])]
        numpy.testing.assert_array_equal(got[outside], want[outside])


@pytest.mark.parametrize("dims", [(40, 40), (71, 33)], ids=str)
def test_packed_sequences_in_any_strides(target: Target, view: str, dims: tuple[int, int]) -> None:
    cu = offsets(target, [11, 30]), offsets(target, [21, 45])
    plain, strided = (packed(target, (41, 66), target.half, dims, view=name) for name in ("contiguous", view))
    got, want = (target.run_packed(inputs, cu, is_causal=True) for inputs in (strided, plain))
    assert [target.bits(x) for x in got] == [target.bits(x) for x in want]


def test_out_of_packed_sequences(target: Target) -> None:
    query, key, value, _ = packed(target, (41, 66), target.half, (40, 24))
    cu = offsets(target, [11, 25]), offsets(target, [21, 45])
    want = cuflash.varlen_attention(query, key, value, *cu)
    for view in ("padded_rows", "strided_elements"):
        whole = target.random((1, 41, 2, 24), target.half, 5, view)
        out = whole[0]
        assert cuflash.varlen_attention(query, key, value, *cu, out=out) is out
        assert target.bits(out) == target.bits(want)
        assert target.surroundings_are_nan(whole)


@pytest.mark.parametrize("tile", [Tile(16, 16, 1, 1), Tile(64, 32, 4, 1)], ids=str)
def test_packed_sequences_with_a_tile(target: Target, tile: Tile) -> None:
    inputs, cu = packed(target, (150, 150), target.half), (offsets(target, [100, 50]), offsets(target, [30, 120]))
    out, lse = cuflash.varlen_attention(*inputs[:3], *cu, return_lse=True, tile=tile)
    grads = cuflash.varlen_attention_backward(inputs[3], *inputs[:3], out, lse, *cu, tile=tile.transposed())
    for got, want in zip(
        (out, *grads), [varlen_attention(*inputs[:3], *cu)[0], *varlen_attention_backward(inputs[3], *inputs[:3], *cu)], strict=True
    ):
        numpy.testing.assert_allclose(target.host(got), want, atol=2**-6 * numpy.abs(want).max())


@pytest.fixture
def unread_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels get offsets on the simulator as they get them on a GPU, where the host does not read them."""
    monkeypatch.setattr(sequences, "check_offsets", lambda *arguments: None)


@pytest.mark.parametrize(
    "offsets_q", [[0, 500, 20], [-7, 30, 41], [30, 10, 41], [2**31 - 1, -(2**31), 2**31 - 1], [0, 20, 2**31 - 1], [41, 41, 0]], ids=str
)
@pytest.mark.usefixtures("unread_offsets")
def test_senseless_offsets_stay_within_the_arrays(target: Target, offsets_q: list[int]) -> None:
    """The host cannot know those of a GPU without waiting for it. The simulator stops at the first access outside of an array.

    It also says that blocks write the same rows in no order, where an offset descends and sequences overlap: what out holds then is not specified.
    """
    inputs = packed(target, (41, 66), target.half)
    for cu in ((offsets_q, [0, 30, 66]), ([0, 20, 41], offsets_q), (offsets_q, offsets_q)):
        overlapping = not target.is_gpu and [0, 500, 20] in cu
        with pytest.raises(SimulatorError, match="race") if overlapping else contextlib.nullcontext():
            results = target.run_packed(inputs, tuple(int32(target, x) for x in cu), is_causal=True)
            assert results[0].shape == inputs[3].shape


@pytest.mark.usefixtures("unread_offsets")
def test_rows_beyond_max_seqlen_are_zeros(target: Target) -> None:
    lengths, longest = [300, 5, 0, 280], 10
    query, key, value, cu = packed(target, (sum(lengths), sum(lengths)), target.half)
    cu = (offsets(target, lengths), offsets(target, lengths))
    out = target.empty_like(query)
    result, lse = cuflash.varlen_attention(query, key, value, *cu, longest, longest, out=out, return_lse=True)
    grads = cuflash.varlen_attention_backward(
        target.random(query.shape, target.half, 5), query, key, value, result, lse, *cu, longest, longest
    )
    for x in (result, *grads):
        host = target.host(x)
        assert numpy.isfinite(host).all()
        assert host[:longest].any()  # of the first sequence
        assert not host[256:300].any()  # beyond the tile that holds its first rows
    assert numpy.isneginf(target.host(lse)[:, 256:300]).all()


@pytest.mark.parametrize(
    ("wrong", "bound", "argument", "got", "expected", "hint"),
    [
        ([3, 30, 41], 41, "cu_seqlens_{}", "a first offset of 3", "0", "starts at token 0"),
        ([0, 35, 30], 41, "cu_seqlens_{}", "35 followed by 30 at 1", "do not descend", "not lengths"),
        ([0, 20, 42], 41, "cu_seqlens_{}", "a last offset of 42", "at most 41, the tokens", "number of tokens"),
        ([0, 11, 41], 29, "max_seqlen_{}", "29", "at least 30, the longest sequence in cu_seqlens_{}", "Pass max_seqlen_{}=30"),
    ],
)
@pytest.mark.parametrize("which", ["q", "kv"])
def test_senseless_offsets_on_the_cpu(
    simulator: Target, which: str, wrong: list[int], bound: int, argument: str, got: str, expected: str, hint: str
) -> None:
    """Also in a call that is kept: its offsets may have changed."""
    query, key, value, grad_out = packed(simulator, (41, 41), simulator.half)[:4]
    cu = {name: int32(simulator, [0, 20, 40]) for name in ("cu_seqlens_q", "cu_seqlens_kv")}
    bounds = {"max_seqlen_q": 41, "max_seqlen_kv": 41, f"max_seqlen_{which}": bound}
    out, lse = cuflash.varlen_attention(query, key, value, **cu, **bounds, return_lse=True)
    cuflash.varlen_attention_backward(grad_out, query, key, value, out, lse, **cu, **bounds)
    cu[f"cu_seqlens_{which}"][...] = wrong
    for call in (
        lambda: cuflash.varlen_attention(query, key, value, **cu, **bounds, return_lse=True),
        lambda: cuflash.varlen_attention_backward(grad_out, query, key, value, out, lse, **cu, **bounds),
    ):
        with pytest.raises(OptionError) as caught:
            call()
        assert caught.value.argument == argument.format(which)
        assert got in caught.value.got
        assert expected.format(which) in caught.value.expected
        assert hint.format(which) in caught.value.hint


def test_offsets_are_read_when_the_kernels_run(target: Target) -> None:
    """A kept call, as a captured graph, sees the lengths that the arrays hold by then, up to the bounds it was made for."""
    inputs, cu = packed(target, (100, 100), target.half), (offsets(target, [60, 40]), offsets(target, [10, 90]))
    target.run_packed(inputs, cu, (100, 100), is_causal=True)
    kept = num_prepared()
    for lengths in ([0, 100], [1, 2], [100, 0], [50, 50]):
        cu[0][...], cu[1][...] = offsets(target, lengths), offsets(target, lengths)
        got = target.run_packed(inputs, cu, (100, 100), is_causal=True)
        want = target.check_packed(inputs, (offsets(target, lengths), offsets(target, lengths)), (100, 100), is_causal=True)
        assert target.bits(got[0]) == target.bits(want[0])
        assert target.bits(got[1]) == target.bits(want[1])
    assert num_prepared() == kept + 1, "one more with a gradient of lse"


def test_packed_sequences_give_the_same_bits_on_every_run(target: Target) -> None:
    inputs, cu = packed(target, (150, 150), target.half, heads=(4, 2)), (offsets(target, [100, 50]), offsets(target, [30, 120]))
    runs = []
    for seed in range(3):
        with target.schedule(seed):
            runs.append([target.bits(x) for x in target.run_packed(inputs, cu, is_causal=True, enable_gqa=True)])
    assert runs[0] == runs[1] == runs[2]


# --- The judge ----------------------------------------------------------------------------------------------------------------------------


def test_reference_of_key_lengths_is_that_of_cut_keys() -> None:
    rng = numpy.random.default_rng(0)
    q, k, v, grad = (rng.standard_normal((3, 6, 2, 4)) for _ in range(4))
    lengths = [6, 2, 0]
    for mask in MASKS.values():
        out, lse = reference.attention(q, k, v, seqlens_kv=numpy.array(lengths), **mask)
        grads = reference.attention_backward(grad, q, k, v, seqlens_kv=numpy.array(lengths), **mask)
        for b, n in enumerate(lengths):
            row = slice(b, b + 1)
            want, want_lse = reference.attention(q[row], k[row, :n], v[row, :n], **mask)
            numpy.testing.assert_allclose(out[row], want)
            numpy.testing.assert_allclose(lse[row], want_lse)
            wanted = reference.attention_backward(grad[row], q[row], k[row, :n], v[row, :n], **mask)
            for got, one in zip(grads, wanted, strict=True):
                numpy.testing.assert_allclose(got[row, : one.shape[1]], one)
                assert not got[row, one.shape[1] :].any()


def test_reference_of_packed_sequences_against_a_block_diagonal_mask() -> None:
    """By hand: all tokens at once, with scores of other sequences left out."""
    rng = numpy.random.default_rng(1)
    q, k, v = rng.standard_normal((7, 1, 4)), rng.standard_normal((9, 1, 4)), rng.standard_normal((9, 1, 3))
    cu_q, cu_kv = numpy.array([0, 2, 6]), numpy.array([0, 5, 9])
    out, lse = varlen_attention(q, k, v, cu_q, cu_kv)
    scores = numpy.where(
        numpy.searchsorted(cu_q, range(7), "right")[:, None] == numpy.searchsorted(cu_kv, range(9), "right"),
        q[:, 0] @ k[:, 0].T / 2,
        -numpy.inf,
    )
    with numpy.errstate(invalid="ignore", divide="ignore"):
        weights = numpy.nan_to_num(numpy.exp(scores) / numpy.exp(scores).sum(axis=1, keepdims=True))
        numpy.testing.assert_allclose(lse[0], numpy.log(numpy.exp(scores).sum(axis=1)))
    numpy.testing.assert_allclose(out[:, 0], weights @ v[:, 0])


# --- Plans --------------------------------------------------------------------------------------------------------------------------------


def test_lengths_and_numbers_of_sequences_are_not_compiled_in(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_FUSED_BACKWARD", "0")  # one kernel for all gradients or several: lengths decide which is faster
    on = device.of_arch("sm_80")

    def requests(tokens: int, lengths: list[int], **options: Any) -> list[Any]:
        query, key, value, _ = packed(simulator, (tokens, tokens), "float16", (64, 64))
        cu = offsets(simulator, lengths), offsets(simulator, lengths)
        return [
            kernel.request(on)
            for backward in (False, True)
            for kernel in cuflash.varlen_plan(query, key, value, *cu, backward=backward, **options).kernels
        ]

    want = requests(20, [20])
    assert requests(300, [3, 0, 200], max_seqlen_q=200) == want
    of_few = requests(10, [10])
    assert requests(19, [3, 0, 16], max_seqlen_q=16) == of_few != want
    assert set(of_few) <= {kernel.request(on) for kernel in offline_kernels(on, dtype="float16", head_dim=64, varlen=True, every_way=True)}
    offline = [kernel.request(on) for kernel in offline_kernels(on, dtype="float16", head_dim=64, varlen=True)]
    assert set(offline) == set(want)
    assert not set(offline) <= {kernel.request(on) for kernel in offline_kernels(on, dtype="float16", head_dim=64)}


def test_plans_say_that_lengths_come_later(simulator: Target) -> None:
    query, key, value, _ = packed(simulator, (50, 60), "float16")
    text = str(cuflash.varlen_plan(query, key, value, offsets(simulator, [20, 30]), offsets(simulator, [30, 30]), 30, 40, True))
    assert "2 packed sequences" in text
    assert "each of at most 30 x 40" in text
    assert "work       at most" in text
    text = str(cuflash.plan(*padded(simulator, [3, 4], "float16"), seqlens_kv=int32(simulator, [3, 4])))
    assert "keys of each row up to its seqlens_kv" in text
    assert "work       at most" in text


def test_warmup_knows_both(simulator: Target, cold_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_DECODE", "0")  # whose kernels are compiled too
    assert cuflash.warmup(32, "float16", is_causal=False, backward=False, varlen=(False, True)) == 3  # the list of tiles too
    assert cuflash.warmup(32, "float16", is_causal=False, backward=False, seqlens_kv=True) == 1
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    query, key, value, _ = packed(simulator, (5, 5), "float16", (32, 32))
    cuflash.varlen_attention(query, key, value, offsets(simulator, [5]), offsets(simulator, [5]))
    cuflash.scaled_dot_product_attention(query[None], key[None], value[None], seqlens_kv=int32(simulator, [2]))


# --- Errors -------------------------------------------------------------------------------------------------------------------------------


def error_of(call: Any) -> ArgumentError:
    with pytest.raises(ArgumentError) as caught:
        call()
    return caught.value


def test_wrong_key_lengths_say_what_is_right(simulator: Target) -> None:
    inputs = padded(simulator, [3, 4], "float16")
    cases: list[tuple[Any, type[ArgumentError], str]] = [
        (numpy.array([3, 4]), DTypeError, "int32"),
        (numpy.array([3], numpy.int32), ShapeError, "(2,)"),
        (numpy.array([[3, 4]], numpy.int32), ShapeError, "(2,)"),
        (numpy.array([3, 9, 4, 9], numpy.int32)[::2], ShapeError, "contiguous"),
        ([3, 4], DTypeError, "NumPy array"),
    ]
    for lengths, kind, words in cases:
        for call in (cuflash.scaled_dot_product_attention, cuflash.plan):
            error = error_of(lambda call=call, lengths=lengths: call(*inputs, seqlens_kv=lengths))
            assert isinstance(error, kind), error
            assert error.argument == "seqlens_kv"
            assert words in error.expected


def test_wrong_offsets_say_what_is_right(simulator: Target) -> None:
    query, key, value, _ = packed(simulator, (5, 6), "float16")
    good = numpy.array([0, 5], numpy.int32)
    cases: list[tuple[tuple[Any, ...], type[ArgumentError], str]] = [
        ((good.astype(numpy.int64), good), DTypeError, "cu_seqlens_q"),
        ((good, good[None]), ShapeError, "cu_seqlens_kv"),
        ((good[:0], good[:0]), ShapeError, "cu_seqlens_q"),
        ((good, numpy.array([0, 1, 2], numpy.int32)), ShapeError, "cu_seqlens_kv"),
        ((good, good, -1), OptionError, "max_seqlen_q"),
        ((good, good, 5, 2.0), OptionError, "max_seqlen_kv"),
        ((good, good, True), OptionError, "max_seqlen_q"),
    ]
    for arguments, kind, name in cases:
        for call in (cuflash.varlen_attention, cuflash.varlen_plan):
            error = error_of(lambda call=call, arguments=arguments: call(query, key, value, *arguments))
            assert isinstance(error, kind), error
            assert error.argument == name
    error = error_of(lambda: cuflash.varlen_attention(query[None], key, value, good, good))
    assert (error.argument, "scaled_dot_product_attention" in error.hint) == ("query", True)
    error = error_of(lambda: cuflash.varlen_attention_backward(query, query, key, value, query, None, good, good))
    assert (error.argument, "varlen_attention(" in error.hint) == ("lse", True)
    error = error_of(
        lambda: cuflash.varlen_attention_backward(query, query, key, value, query, numpy.zeros((1, 2, 5), numpy.float32), good, good)
    )
    assert "(heads, tokens)" in error.expected


def test_lengths_of_another_library_are_refused(simulator: Target) -> None:
    torch = pytest.importorskip("torch")
    inputs = padded(simulator, [3, 4], "float16")
    error = error_of(lambda: cuflash.scaled_dot_product_attention(*inputs, seqlens_kv=torch.tensor([3, 4], dtype=torch.int32)))
    assert isinstance(error, DeviceError)
    assert error.argument == "seqlens_kv"
