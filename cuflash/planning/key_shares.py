"""Whether the blocks of `forward_wgmma` share out the keys of the last tiles of queries, so that all end at the same time.

A block for each SM computes one tile of queries after the other. Where no mask makes them differ, all take as long, and in the last round some blocks have a tile and the others
have none: of 1376 tiles on 132 SMs ten rounds are full, and in the eleventh 76 SMs are idle. So the key tiles of the tiles of that round are laid one behind the other and cut into
equal shares, one for each block (kernels/tile/key_shares.cuh). Of a call with fewer tiles than SMs that is all of them.

It costs: a block begins with two tiles of queries more, stores its parts in float32, and whoever is last merges those of a tile. In trips through the loop over keys, by the timing
model's bandwidth of L2: `_OF_SHARE` for each block, `_OF_PART` for each part of a tile of queries, which is read again, and `_OF_COUNTERS` once, since the counters are set to 0 before
the kernel begins, which a call has to wait for as for a launch. The order in which parts are merged is that of the keys, so the bits are the same on every run; they depend on the number of SMs, and on how many tiles of queries the call has.
"""

from __future__ import annotations

from math import ceil, isqrt

from cuflash.hardware.device import Device
from cuflash.planning.kernel_plan import UNSHARED, Buffer, KernelPlan, KeyShares
from cuflash.planning.kernel_specs import ROW_PARTS
from cuflash.problem.problem import Problem

LEAST_GAIN = 1.01
"""Of the kernel's time."""

_OF_SHARE = 5
_OF_PART = 1
_PARTIAL_KEYS = 1024
"""After which O starts anew in float32; kernels/tile/partial_outputs.cuh has the same."""
_OF_COUNTERS = 1
_MOST_KEY_TILES = 2**31 - 1
"""Of all tiles that are shared out and a share more, which the kernel counts in 32 bits."""
_WARP_THREADS = 32
_STATE_CHUNKS = 2
"""Of four numbers of a thread, of its rows' softmax; kernels/tile/key_shares.cuh has the same."""


def choose(num_work: int, key_tiles: int, device: Device) -> KeyShares:
    """For so many tiles of queries, each of which sees so many tiles of keys."""
    rounds, left = divmod(num_work, device.num_sms)
    if not left or (left + 1) * key_tiles > _MOST_KEY_TILES:
        return UNSHARED
    shares = KeyShares(left, max(ceil(left * key_tiles / device.num_sms), isqrt(_OF_PART * key_tiles)))
    gains = (rounds + 1) * key_tiles >= LEAST_GAIN * (rounds * key_tiles + trips(shares, key_tiles))
    return shares if gains else UNSHARED


def trips(shares: KeyShares, key_tiles: int) -> float:
    """Trips through the loop that the tiles of queries take which are shared out, with all that sharing costs."""
    return shares.length + _OF_SHARE + _OF_PART * (key_tiles / shares.length + 1) + _OF_COUNTERS if shares.tiles else 0.0


def works_differ(problem: Problem) -> bool:
    """Whether some tiles of queries see more keys than others, so that none are shared out; kernels/tile/key_shares.cuh says the same."""
    kinds = problem.features.kinds
    hides = problem.is_causal or kinds.window or kinds.prefix or kinds.lists_tiles
    return hides or problem.is_ragged


def num_blocks(shares: KeyShares, key_tiles: int) -> int:
    """That have a share."""
    return ceil(shares.tiles * key_tiles / shares.length) if shares.tiles else 0


def arguments(kernel: KernelPlan) -> dict[str, int | str]:
    """`KeyShareArguments`."""
    parts, arrivals = ROW_PARTS
    if not kernel.shares.tiles:
        return {"parts": parts, "first_work": kernel.num_work}
    return {"parts": parts, "arrivals": arrivals, "first_work": kernel.num_work - kernel.shares.tiles, "length": kernel.shares.length}


def part_floats(kernel: KernelPlan) -> int:
    """Of the rows of one tile of queries."""
    chunks = ceil(kernel.head_dim_v / 16) * 2 + _STATE_CHUNKS
    return kernel.tile.num_warps * chunks * 4 * _WARP_THREADS


def workspace(problem: Problem, kernels: tuple[KernelPlan, ...]) -> tuple[Buffer, ...]:
    """The parts, of which neighbouring blocks have neighbouring places, and those of the next tile of queries begin with one more.

    Of float32 each block has a place for O of earlier keys, where there are so many.
    """
    kernel = next((kernel for kernel in kernels if kernel.shares.tiles), None)
    if kernel is None:
        keeping = [
            of
            for of in kernels
            if of.spec.takes_terms and ceil(problem.seqlen_kv / of.tile.tile_kv) > ceil(_PARTIAL_KEYS / of.tile.tile_kv)
        ]
        return tuple(Buffer(ROW_PARTS[0], (of.num_blocks, part_floats(of)), "float32") for of in keeping)
    places = kernel.shares.tiles + kernel.num_blocks - 1
    return (
        Buffer(ROW_PARTS[0], (places, part_floats(kernel)), "float32"),
        Buffer(ROW_PARTS[1], (kernel.shares.tiles * kernel.tile.num_warps,), "int32", is_zeroed=True),
    )
