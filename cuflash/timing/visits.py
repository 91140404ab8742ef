"""How many tiles the blocks of one launch visit, whatever decides it: positions alone (planning/visits.py), or the arrays of the call as well.

`visits_of_launch(kernel, problem, data)` follows kernels/visible_tiles.cu: of the tiles that positions leave, those are visited in which some pair is visible, and those
are partial of which some pair is not. `data` has the arrays of the call by the names of its arguments, as NumPy arrays: `attn_mask`, `segment_ids_q`,
`segment_ids_kv`, `prefix_lengths`, `seqlens_kv`, `seqlens_q`, `cu_seqlens_q`, `cu_seqlens_kv`. Arrays that decide nothing need not be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
from numpy.typing import NDArray

from cuflash.errors import UnsupportedError
from cuflash.planning.kernel_plan import UNSPLIT, KernelPlan
from cuflash.planning.visits import Band, Visits, band_of, visits_of_blocks, visits_of_key_blocks, visits_of_warpgroups, walks
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

Data = Mapping[str, Any]

NO_DATA: Data = {}


def visits_of_launch(kernel: KernelPlan, problem: Problem, data: Data) -> list[list[Visits]]:
    """What each block visits, for each (batch, head) pair of the launch and each of its tiles, or for each head and each place in the list of tiles of packed
    sequences.

    Raises:
        UnsupportedError: an array that decides is missing from `data`.
    """
    if kernel.spec.rows_of == "attn_mask":
        return [_of_mask_tiles(kernel, problem)]
    tile, by_keys = kernel.tile, kernel.spec.owns_keys
    group_batch, group_heads = kernel.group_batch, kernel.group_heads
    num_tiles = kernel.num_work or kernel.num_blocks  # of blocks that stay each has several
    heads = problem.num_heads_q // group_heads
    known = visits_of_blocks(problem, tile, by_keys=by_keys)
    if kernel.spec.splits_keys:
        return _of_splits(kernel, problem, data)
    if kernel.splits.chains:
        whole = visits_of_launch(replace(kernel, splits=UNSPLIT, num_work=num_tiles // kernel.splits.number), problem, data)
        return [[_part(of, kernel.splits.number) for of in head for _ in range(kernel.splits.number)] for head in whole]
    if known is not None:
        if kernel.spec.stays and not by_keys:
            own = visits_of_warpgroups(band_of(problem), tile)
        elif kernel.spec.maps_tensors and by_keys:
            own = visits_of_key_blocks(band_of(problem), tile, members=group_batch * group_heads)
        else:
            own = [Visits(group_batch * group_heads * count) for count in known]
        return [own] * (num_tiles // max(1, len(own)))
    lookup = _Lookup(problem, data, tile, by_keys)
    if kernel.packed_places:
        return [_of_list(kernel, problem, lookup)] * heads
    pairs = []
    for batch in range(num_tiles // max(1, kernel.num_tiles * heads)):
        for head in range(heads):
            members = [
                lookup.of_head(batch * group_batch + i, head * group_heads + j) for i in range(group_batch) for j in range(group_heads)
            ]
            pairs.append([_sum([member[index] for member in members if index < len(member)]) for index in range(kernel.num_tiles)])
    return pairs


def _of_list(kernel: KernelPlan, problem: Problem, lookup: _Lookup) -> list[Visits]:
    """Of the tiles of packed sequences in their list, and of the places behind them: what a block visits does not depend on its head."""
    tiles = [of for sequence in range(problem.sequences) for of in lookup.of_head(sequence, 0)]
    listed = sorted((Visits(kernel.group_heads * of.full, kernel.group_heads * of.partial) for of in tiles), key=lambda of: -of.total)
    return listed + [Visits(0)] * (kernel.packed_places - len(listed))


def _part(of: Visits, splits: int) -> Visits:
    """Of one of the blocks that share out the tiles of a block: the mean of all, but whole tiles."""
    total = -(-of.total // splits)
    partial = of.partial / splits
    return Visits(total - partial, partial)


def _of_splits(kernel: KernelPlan, problem: Problem, data: Data) -> list[list[Visits]]:
    """Of blocks with the queries of all heads that share a key head, which share out keys."""
    pairs = []
    sequences = tiles_of_sequences(kernel, problem, data)
    for split in range(kernel.splits.number):
        for walked in sequences:
            splits = [kernel.splits.tiles or -(-count // kernel.splits.number) for count in walked]
            own = [Visits(max(0, min(count - split * of, of))) for count, of in zip(walked, splits, strict=True)]
            own += [Visits(0)] * (kernel.num_tiles - len(own))  # blocks that end at once
            pairs += [own] * problem.num_heads_kv
    return pairs


def tiles_of_sequences(kernel: KernelPlan, problem: Problem, data: Data) -> list[list[int]]:
    """Key tiles that each tile of grouped rows of each sequence sees, as many tiles as it has queries for: all sequences have the most queries and keys where `data` does not have their lengths."""
    tile, group = kernel.tile, problem.heads_per_kv
    lookup = _Lookup(problem, data, tile, by_keys=False)
    queries, lengths = [problem.max_seqlen_q] * problem.sequences, [problem.max_seqlen_kv] * problem.sequences
    if "cu_seqlens_q" in data:
        queries = [lookup.length_of(sequence, "q") for sequence in range(problem.sequences)]
    if "seqlens_kv" in data:
        lengths = [int(of) for of in data["seqlens_kv"]]
    elif "cu_seqlens_kv" in data:
        lengths = [lookup.length_of(sequence, "kv") for sequence in range(problem.sequences)]
    rows = range(0, problem.max_seqlen_q * group, tile.tile_q)
    sequences = []
    for seqlen_q, seqlen_kv in zip(queries, lengths, strict=True):
        band = band_of(problem, seqlen_q, seqlen_kv)
        ends = [(first // group, min(seqlen_q - 1, (first + tile.tile_q - 1) // group)) for first in rows if first < seqlen_q * group]
        sequences.append([_walked_tiles(band, first_q, last_q, tile.tile_kv) for first_q, last_q in ends])
    return sequences


def _walked_tiles(band: Band, first_q: int, last_q: int, tile_kv: int) -> int:
    """Tiles of keys that any of these queries sees."""
    begin, end = max(0, first_q + band.low), min(band.seqlen_kv, last_q + 1 + band.high, last_q + 1 + band.causal)
    return -(-end // tile_kv) - begin // tile_kv if begin < end else 0


def _sum(visits: Sequence[Visits]) -> Visits:
    return Visits(sum(of.full for of in visits), sum(of.partial for of in visits))


def _of_mask_tiles(kernel: KernelPlan, problem: Problem) -> list[Visits]:
    """The gradient of a mask: all heads' tiles, shared out among the tiles of the mask."""
    walked = sum(map(len, walks(band_of(problem), kernel.tile, by_keys=False)))
    all_heads = problem.batch * problem.num_heads_q * walked
    return [Visits(all_heads // kernel.num_blocks + (index < all_heads % kernel.num_blocks)) for index in range(kernel.num_blocks)]


@dataclass(frozen=True)
class _Hiding:
    """The arrays that hide pairs of one (batch, head)."""

    ids_q: NDArray[Any] | None = None
    ids_kv: NDArray[Any] | None = None
    mask: NDArray[Any] | None = None

    def key(self) -> object:
        """Equal where the same pairs are hidden: ids by value, a mask by its place."""
        ids = tuple(None if of is None else of.tobytes() for of in (self.ids_q, self.ids_kv))
        return ids, None if self.mask is None else self.mask.__array_interface__["data"]


class _Lookup:
    """The visits of one kernel's heads, each kind found once."""

    def __init__(self, problem: Problem, data: Data, tile: Tile, by_keys: bool) -> None:
        self.problem, self.data, self.tile, self.by_keys = problem, data, tile, by_keys
        self.lists = problem.features.kinds.lists_tiles
        self._known: dict[object, list[Visits]] = {}

    def of_head(self, batch: int, head: int) -> list[Visits]:
        """Of each tile that a block of the head owns."""
        band = self._band(batch)
        hiding = self._hiding(batch, head) if self.lists else _Hiding()
        key = (band, hiding.key())
        if key not in self._known:
            self._known[key] = self._listed(band, hiding) if self.lists else self._walked(band)
        return self._known[key]

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self.data:
            hint = "Pass the arrays of the call as data."
            raise UnsupportedError(name, "a call whose visible tiles it decides, without its values", f"{name} in data", hint)
        return numpy.asarray(self.data[name])

    def _band(self, batch: int) -> Band:
        problem = self.problem
        if problem.num_sequences is not None:
            if batch == problem.num_sequences:
                return band_of(problem, 0, 0)  # behind the last sequence
            return band_of(problem, *(self.length_of(batch, of) for of in ("q", "kv")))
        prefix = int(self._array("prefix_lengths")[batch]) if problem.features.kinds.prefix else 0
        keys = int(self._array("seqlens_kv")[batch]) if problem.seqlens_kv else None
        queries = int(self._array("seqlens_q")[batch]) if problem.seqlens_q else None
        return band_of(problem, queries, keys, prefix)

    def length_of(self, sequence: int, which: str) -> int:
        """Of a packed sequence, in queries or keys."""
        place = int(numpy.diff(self._array(f"cu_seqlens_{which}"))[sequence])
        used = self.data.get(f"seqused_{which}") if self.problem.in_places else None
        return place if used is None else min(place, max(int(used[sequence]), 0))

    def _hiding(self, batch: int, head: int) -> _Hiding:
        ids_q = ids_kv = mask = None
        if self.problem.features.kinds.segments:
            ids_q, ids_kv = (self._array(f"segment_ids_{of}")[batch] for of in ("q", "kv"))
        if self.problem.features.kinds.attn_mask == "bool":
            of_call = numpy.atleast_2d(self._array("attn_mask"))
            mask = numpy.broadcast_to(of_call, (self.problem.batch, self.problem.num_heads_q, *of_call.shape[-2:]))[batch, head]
        return _Hiding(ids_q, ids_kv, mask)

    def _walked(self, band: Band) -> list[Visits]:
        return [Visits(len(walk)) for walk in walks(band, self.tile, by_keys=self.by_keys)]

    def _listed(self, band: Band, hiding: _Hiding) -> list[Visits]:
        tile = self.tile
        keys = numpy.arange(-(-band.seqlen_kv // tile.tile_kv) * tile.tile_kv)
        if band.seqlen_q == 0:
            return [Visits(0)] * (len(keys) // tile.tile_kv if self.by_keys else 0)
        any_of, all_of = [], []
        for first_q in range(0, band.seqlen_q, tile.tile_q):
            queries = numpy.arange(first_q, min(band.seqlen_q, first_q + tile.tile_q))
            seen = _visible(band, hiding, queries, keys).reshape(len(queries), -1, tile.tile_kv)
            any_of.append(seen.any(axis=(0, 2)))
            all_of.append(seen.all(axis=(0, 2)))
        axis = 0 if self.by_keys else 1
        visited, whole = numpy.sum(any_of, axis=axis), numpy.sum(all_of, axis=axis)
        return [Visits(int(full), int(total - full)) for total, full in zip(visited, whole, strict=True)]


def _visible(band: Band, hiding: _Hiding, queries: NDArray[Any], keys: NDArray[Any]) -> NDArray[numpy.bool_]:
    distance = keys[None, :] - queries[:, None]
    seen: NDArray[numpy.bool_] = (distance <= band.causal) | (keys < band.prefix)[None, :]
    seen &= (distance >= band.low) & (distance <= band.high) & (keys < band.seqlen_kv)[None, :]
    existing = numpy.minimum(keys, band.seqlen_kv - 1)
    if hiding.ids_q is not None and hiding.ids_kv is not None:
        seen &= hiding.ids_q[queries][:, None] == hiding.ids_kv[existing][None, :]
    if hiding.mask is not None:
        rows, columns = hiding.mask.shape
        seen &= hiding.mask[queries if rows > 1 else 0][..., existing if columns > 1 else slice(None)]
    return seen
