"""A call that is remembered is found again by equal options of equal types: what a call refuses when it is new, it refuses after a call that is like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import pytest
from problems import num_prepared

import cuflash
from cuflash import OptionError, Tile, TileError
from cuflash.runtime import calls, launch


class NoLauncher:
    """A kernel that does nothing."""

    def launch(self, *arguments: Any) -> None:
        pass


class Frozen(Mapping[str, Any]):
    """A mapping that can be hashed, as some libraries have."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and self._items == other._items

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._items.items(), key=lambda item: item[0])))


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    monkeypatch.setattr(launch, "executable", lambda kernel, on: NoLauncher())
    monkeypatch.setattr(calls, "_calls", {})


def forward(**options: Any) -> None:
    query = numpy.zeros((1, 64, 2, 32), numpy.float16)
    cuflash.scaled_dot_product_attention(query, query, query, **options)


def backward(**options: Any) -> None:
    query, lse = numpy.zeros((1, 64, 2, 32), numpy.float16), numpy.zeros((1, 2, 64), numpy.float32)
    cuflash.scaled_dot_product_attention_backward(query, query, query, query, query, lse, **options)


EQUAL = [
    ("is_causal", True, 1, OptionError),
    ("window", (1, 0), (True, False), OptionError),
    ("window", (1, 0), (1.0, 0.0), OptionError),
    ("window", (1, None), (True, None), OptionError),
    ("dropout_seed", (1, 0), (True, 0), OptionError),
    ("dropout_seed", (1, 0), (1, 0.0), OptionError),
    ("tile", Tile(64, 64, 4, 2), Tile(64.0, 64, 4, 2), TileError),  # type: ignore[arg-type]
    ("tile", Tile(16, 64, 1, 1), Tile(16, 64, True, 1), TileError),
]
"""An option, a value that is accepted, an equal one that is not, and how it is refused."""


@pytest.mark.parametrize("call", [forward, backward])
@pytest.mark.parametrize(("name", "accepted", "refused", "error"), EQUAL, ids=str)
def test_what_is_refused_cold_is_refused_warm(call: Any, name: str, accepted: Any, refused: Any, error: type[Exception]) -> None:
    assert accepted == refused
    others = {"dropout_p": 0.5} if name == "dropout_seed" else {}
    if call is backward and name == "tile":  # its kernel of keys takes the tile as it is
        accepted, refused = accepted.transposed(), refused.transposed()
    messages = []
    for _ in range(2):
        with pytest.raises(error) as refusal:
            call(**{name: refused}, **others)
        messages.append(str(refusal.value))
        call(**{name: accepted}, **others)
    assert messages[0] == messages[1]


def test_mappings_that_can_be_hashed() -> None:
    forward(tile=Frozen(forward=Tile(16, 64, 1, 1)))
    kept = num_prepared()
    forward(tile=Frozen(forward=Tile(16, 64, 1, 1)))
    assert num_prepared() == kept == 1
    with pytest.raises(TileError):
        forward(tile=Frozen(forward=Tile(16.0, 64, 1, 1)))  # type: ignore[arg-type]


def test_equal_options_of_other_types_that_are_accepted() -> None:
    """They are calls of their own, which costs one preparation each."""
    for window in ((1, 0), (numpy.int64(1), 0), (1, numpy.int32(0))):
        forward(window=window)
        forward(window=window)
    assert num_prepared() == 3


def test_nested_options_are_found_again() -> None:
    for _ in range(3):
        forward(window=(1, 0), tile=Tile(64, 64, 4, 2))
    assert num_prepared() == 1
