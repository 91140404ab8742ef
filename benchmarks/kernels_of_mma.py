"""Calls on sm_90 as if it had no kernels of wgmma: for tables of what all architectures have, and of what was timed before there were others."""

from __future__ import annotations

import os

from cuflash.planning import wgmma_backward, wgmma_forward


def rule_out_wgmma() -> None:
    """In this process and those that it starts."""
    for variable in (wgmma_forward.VARIABLE, wgmma_backward.VARIABLE):
        os.environ[variable] = "0"
