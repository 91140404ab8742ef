"""shfl, vote, match, elect, and the barriers of a block."""

from __future__ import annotations

from cuflash.simulator.encoder import A, B, C, D, Encoder, Unsupported, X
from cuflash.simulator.instructions.registry import decodes, simplified
from cuflash.simulator.parser import Statement

_HAS_COUNT = 1  # in field x of a barrier
_NO_REGISTER = 0xFFFF


def _plain(encoder: Encoder, text: str) -> str:
    """A predicate operand, which may be written `!p`."""
    if not text.startswith("!"):
        return text
    negated = encoder.new_register(1)
    encoder.emit("not.pred", negated, text[1:].strip())
    return negated


@decodes("shfl")
def decode_shfl(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """shfl.sync.mode.b32 d{|p}, a, b, c, membermask."""
    parts = statement.opcode.split(".")
    if len(parts) != 4 or parts[1] != "sync" or parts[3] != "b32":
        raise Unsupported("this shuffle")
    target, _, predicate = (part.strip() for part in operands[0].partition("|"))
    start = encoder.begin(f"shfl.{parts[2]}")
    if target == "_":
        target = encoder.new_register(32)
    encoder.put(start + D, target, 32, True)
    for word, operand in zip((A, B, C), operands[1:4], strict=True):
        encoder.put(start + word, operand, 32, False)
    encoder.add_extra(start)
    encoder.put_extra(operands[4], 32, False)
    if predicate and predicate != "_":
        encoder.put_extra(predicate, 1, True)
    else:
        encoder.add_extra_value(0)


@decodes("vote")
def decode_vote(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """vote.sync.mode d, {!}p, membermask."""
    if ".sync" not in statement.opcode:
        raise Unsupported("a vote without .sync")
    encoder.emit(simplified(statement.opcode), operands[0], _plain(encoder, operands[1]), operands[2])


@decodes("match")
def decode_match(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """match.any.sync.type d, a, membermask, and match.all.sync.type d{|p}, a, membermask."""
    target, _, predicate = (part.strip() for part in operands[0].partition("|"))
    start = encoder.emit(simplified(statement.opcode), target, *operands[1:])
    if predicate and predicate != "_":
        encoder.put(start + X, predicate, 1, True)


@decodes("elect")
def decode_elect(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """elect.sync d|p, membermask."""
    del statement
    target, _, predicate = (part.strip() for part in operands[0].partition("|"))
    start = encoder.begin("elect.sync")
    encoder.add_extra(start)
    if target == "_":
        encoder.add_extra_value(_NO_REGISTER)
    else:
        encoder.put_extra(target, 32, True)
    encoder.put_extra(predicate, 1, True)
    encoder.put_extra(operands[1], 32, False)


@decodes("bar", "barrier")
def decode_bar(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """bar{.cta}.sync a{, b}, bar.arrive a, b, bar.red.op.type d, a{, b}, {!}p, bar.warp.sync membermask, and
    barrier.cluster.arrive and .wait."""
    parts = [part for part in statement.opcode.split(".") if part not in ("cta", "aligned")]
    if parts[1] == "cluster":
        if parts[2] == "arrive":
            encoder.emit("barrier.cluster.arrive", "1" if "relaxed" in parts else "0")
        else:
            encoder.emit("barrier.cluster.wait")
        return
    if parts[1] == "warp":
        encoder.emit("bar.warp.sync", *operands)
        return
    if parts[1] in ("sync", "arrive"):
        _emit_barrier(encoder, f"bar.{parts[1]}", operands)
    elif parts[1] == "red":
        predicate = _plain(encoder, operands[-1])
        start = _emit_barrier(encoder, ".".join(["bar", *parts[1:]]), operands[1:-1])
        encoder.put(start + D, operands[0], 32 if parts[-1] == "u32" else 1, True)
        encoder.put(start + C, predicate, 1, False)
    else:
        raise Unsupported("this barrier")


def _emit_barrier(encoder: Encoder, name: str, operands: list[str]) -> int:
    """A record with the number of a barrier and perhaps the number of threads."""
    start = encoder.begin(name)
    encoder.put(start + A, operands[0], 32, False)
    if len(operands) > 1:
        encoder.put(start + B, operands[1], 32, False)
        encoder.set_x(start, _HAS_COUNT)
    return start
