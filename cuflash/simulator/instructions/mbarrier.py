"""mbarrier: barriers in shared memory that count arrivals and bytes."""

from __future__ import annotations

from cuflash.simulator.encoder import GENERIC, SPACES, A, C, D, Encoder, Unsupported
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement

_NO_STATE, _RELAXED, _NO_COMPLETE = 1, 2, 4  # in field c of a record, see core/mbarrier.cpp
_SHARED = ("shared", "shared::cta", "shared::cluster")
_MODIFIERS = frozenset({"b64", "release", "acquire", "relaxed", "cta", "cluster", "expect_tx", "noComplete", "parity", *_SHARED})


def _space(parts: list[str]) -> int:
    return next((SPACES[part] for part in parts if part in _SHARED), GENERIC)


def _begin(encoder: Encoder, name: str, address: str, parts: list[str]) -> int:
    """A record with an address and the flags of field c."""
    unknown = [part for part in parts if part not in _MODIFIERS]
    if unknown:
        raise Unsupported(f"the modifier .{unknown[0]}")
    start = encoder.begin(name)
    encoder.set_field(start, C, (_RELAXED if "relaxed" in parts else 0) | (_NO_COMPLETE if "noComplete" in parts else 0))
    encoder.add_extra(start)
    encoder.put_extra_address(address, _space(parts))
    return start


@decodes("mbarrier.init", "mbarrier.expect_tx", "mbarrier.complete_tx")
def decode_count(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """mbarrier.init [addr], count; mbarrier.expect_tx and complete_tx [addr], bytes."""
    _, operation, *modifiers = statement.opcode.split(".")
    _begin(encoder, f"mbarrier.{operation}", operands[0], modifiers)
    encoder.put_extra(operands[1], 32, False)


@decodes("mbarrier.inval")
def decode_inval(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """mbarrier.inval [addr]."""
    _begin(encoder, "mbarrier.inval", operands[0], statement.opcode.split(".")[2:])


@decodes("mbarrier.arrive", "mbarrier.arrive_drop")
def decode_arrive(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """mbarrier.arrive{_drop}{.noComplete} state, [addr]{, count} and mbarrier.arrive{_drop}.expect_tx state, [addr], bytes."""
    _, operation, *modifiers = statement.opcode.split(".")
    start = _begin(encoder, f"mbarrier.{operation}", operands[1], modifiers)
    if operands[0] == "_":
        encoder.words[start + C] |= _NO_STATE
    elif _space(modifiers) == SPACES["shared::cluster"]:
        raise Unsupported("the state of an mbarrier of another block")
    else:
        encoder.put(start + D, operands[0], 64, True)
    value = operands[2] if len(operands) > 2 else None
    expects = "expect_tx" in modifiers
    encoder.put_extra("1" if expects or value is None else value, 32, False)
    encoder.put_extra(value if expects and value is not None else "0", 32, False)


@decodes("mbarrier.test_wait", "mbarrier.try_wait")
def decode_wait(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """mbarrier.test_wait p, [addr], state or with .parity a parity; try_wait the same with an optional time limit, which is not looked at."""
    _, operation, *modifiers = statement.opcode.split(".")
    parity = "parity" in modifiers
    if _space(modifiers) == SPACES["shared::cluster"]:
        raise Unsupported("waiting for an mbarrier of another block")
    start = _begin(encoder, f"mbarrier.{operation}" + (".parity" if parity else ""), operands[1], modifiers)
    encoder.put(start + D, operands[0], 1, True)
    encoder.put_extra(operands[2], 32 if parity else 64, False)


@decodes("cp.async.mbarrier")
def decode_copy_arrive(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """cp.async.mbarrier.arrive{.noinc} [addr]: arrive when the cp.async copies of the thread so far are complete."""
    modifiers = statement.opcode.split(".")[4:]
    start = encoder.begin("cp.async.mbarrier.arrive")
    encoder.set_field(start, A, int("noinc" in modifiers))
    encoder.add_extra(start)
    encoder.put_extra_address(operands[0], _space(modifiers))


@decodes("mbarrier.pending_count")
def decode_pending_count(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """mbarrier.pending_count.b64 count, state."""
    encoder.emit(statement.opcode, *operands)
