"""What a problem keeps of a cache of keys and values that it attends to, and appends to."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.problem.layout import View


@dataclass(frozen=True)
class NewRows:
    """Keys and values that a call appends.

    Attributes:
        key, value: (batch, count, num_heads_kv, head_dim), value with its own head_dim.
    """

    key: View
    value: View

    @property
    def count(self) -> int:
        """Of each sequence."""
        return self.key.shape[1]


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of new keys and of queries.

    Attributes:
        dim: leading columns of a head that are rotated, an even number.
        rows: positions that the tables have.
        dtype: of the tables.
        interleaved: pairs are neighbours; otherwise they lie dim / 2 apart.
        strides: from position to position in the tables of cos and of sin, in elements.
    """

    dim: int
    rows: int
    dtype: str
    interleaved: bool
    strides: tuple[int, int]


@dataclass(frozen=True)
class Scales:
    """What the numbers of an 8-bit cache are multiplied by.

    Attributes:
        key, value: strides of the scales from sequence to sequence and from head to head, in elements; 0 where they are not given, and stand for 1.
    """

    key: tuple[int, int] = (0, 0)
    value: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Cache:
    """Where the keys of each sequence lie, and what is appended.

    Attributes:
        num_rows: rows of the cache, or pages.
        page_size: keys of a page; 0 where each sequence has a row of the cache.
        stride_page_table: from sequence to sequence, in elements.
        new: None where nothing is appended.
        rotary: None without.
        dtype: of keys and values there; empty: as query.
        scales: of keys and values in 8 bits.
    """

    num_rows: int
    page_size: int = 0
    stride_page_table: int = 0
    new: NewRows | None = None
    rotary: Rotary | None = None
    dtype: str = ""
    scales: Scales = Scales()

    @property
    def is_paged(self) -> bool:
        return self.page_size > 0

    @property
    def new_keys(self) -> int:
        """Of each sequence; 0 where nothing is appended."""
        return 0 if self.new is None else self.new.count
