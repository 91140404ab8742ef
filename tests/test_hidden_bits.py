"""Boolean masks in the backward kernels whose rows are keys: read in chunks of 16 keys they hide what they hide element by element, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from conftest import Target

import cuflash
from cuflash import Tile

pytest.importorskip("cupy")
pytestmark = pytest.mark.small_tiles

QUERIES, KEYS = 80, 144  # the last tiles of both are not full
RANDOM = numpy.random.default_rng(3).random((QUERIES, KEYS)) < 0.5
SEEN = RANDOM | (numpy.arange(KEYS) < 16)  # every query sees a key
MASKS = {
    "random": SEEN,
    "other bytes": (SEEN.view("uint8") * 64).view(bool),
    "one byte is another": numpy.where(numpy.arange(KEYS) == 70, SEEN.view("uint8") * 2, SEEN.view("uint8")).view(bool),
    "the same of all queries": numpy.broadcast_to(SEEN[0], SEEN.shape),
}


def between_chunks(mask: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """The same elements where no row starts on 16 bytes."""
    wide = numpy.zeros((QUERIES, KEYS + 1), bool)
    wide[:, 1:] = mask
    return wide[:, 1:]


@pytest.mark.parametrize(("kernel", "tile"), [
    ("backward_fused", Tile(32, 32, 2, 2)),
    ("backward_dkdv", Tile(32, 64, 2, 2)),
    pytest.param("backward_dkdv", Tile(64, 16, 1, 1), marks=pytest.mark.exhaustive),
    pytest.param("backward_dkdv", Tile(16, 16, 1, 2), marks=pytest.mark.exhaustive),
    pytest.param("backward_dkdv", Tile(64, 32, 1, 1), marks=pytest.mark.exhaustive),
    pytest.param("backward_dkdv", Tile(32, 16, 1, 1), marks=pytest.mark.exhaustive),
], ids=str)  # fmt: skip
def test_chunks_hide_what_elements_hide(simulator: Target, kernel: str, tile: Tile) -> None:
    query, grad_out = (simulator.random((1, QUERIES, 2, 32), "bfloat16", seed) for seed in (0, 1))
    key, value = (simulator.random((1, KEYS, 2, 32), "bfloat16", seed) for seed in (2, 3))
    for name, mask in MASKS.items():
        out, lse = cuflash.scaled_dot_product_attention(query, key, value, attn_mask=mask, return_lse=True)
        of_chunks, of_elements = (
            cuflash.scaled_dot_product_attention_backward(grad_out, query, key, value, out, lse, attn_mask=of, tile={kernel: tile})
            for of in (mask, between_chunks(mask))
        )
        for of in ("query", "key", "value"):
            found, expected = (simulator.as_numpy(getattr(grads, of)).view("uint16") for grads in (of_chunks, of_elements))
            assert numpy.array_equal(found, expected), (name, of)
