"""Calls on sm_90 as if it had no kernels of wgmma: for tables of what all architectures have, and of what was timed before there were others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cuflash.planning import wgmma_backward, wgmma_forward

SWITCHES = (wgmma_forward.VARIABLE, wgmma_backward.VARIABLE)


def rule_out_wgmma() -> None:
    """In this process and those that it starts."""
    os.environ.update(dict.fromkeys(SWITCHES, "0"))


@contextmanager
def without_wgmma() -> Iterator[None]:
    """The same until the block ends; then the variables are what they were."""
    kept = {name: os.environ[name] for name in SWITCHES if name in os.environ}
    rule_out_wgmma()
    try:
        yield
    finally:
        for name in SWITCHES:
            del os.environ[name]
        os.environ.update(kept)
