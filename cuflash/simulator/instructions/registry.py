"""The decoders by opcode, and the modifiers that change nothing here."""

from __future__ import annotations

import functools
from collections.abc import Callable

from cuflash.simulator.encoder import Encoder
from cuflash.simulator.parser import Statement

Decoder = Callable[[Encoder, Statement, list[str]], None]

DECODERS: dict[str, Decoder] = {}

# Rounding to nearest is the default, approximations are computed accurately, and the lanes of a warp are always in step.
_IDLE_MODIFIERS = frozenset({"rn", "approx", "full", "uni", "sync", "aligned", "noftz"})


def decodes(*opcodes: str) -> Callable[[Decoder], Decoder]:
    """Register a decoder for all instructions whose opcode starts with these words; of several the one with the most words counts."""

    def register(decoder: Decoder) -> Decoder:
        for opcode in opcodes:
            DECODERS[opcode] = decoder
        return decoder

    return register


@functools.lru_cache(maxsize=4096)
def find_decoder(opcode: str) -> Decoder | None:
    """The decoder for an opcode, or None if its table entry describes it."""
    while opcode:
        if opcode in DECODERS:
            return DECODERS[opcode]
        opcode = opcode.rpartition(".")[0]
    return None


@functools.lru_cache(maxsize=4096)
def simplified(opcode: str) -> str:
    """The opcode without modifiers that change nothing."""
    return ".".join(part for part in opcode.split(".") if part not in _IDLE_MODIFIERS)
