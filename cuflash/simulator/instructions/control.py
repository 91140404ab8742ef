"""Branches, exits, calls and instructions that do nothing here."""

from __future__ import annotations

from cuflash.simulator.encoder import A, Encoder, Unsupported, parse_integer
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement


@decodes("bra")
def decode_bra(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """bra{.uni} label."""
    del statement
    encoder.jump("bra", encoder.label(operands[0]))


@decodes("brx")
def decode_brx(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """brx.idx index, list."""
    labels = encoder.kernel.targets.get(operands[1])
    if labels is None:
        raise Unsupported(f"the list {operands[1]}")
    start = encoder.begin("brx.idx")
    encoder.put(start + A, operands[0], 32, False)
    position = encoder.add_extra(start, len(labels))
    encoder.extra.extend([0] * (2 * len(labels)))
    if statement.scope is not None:
        labels = [statement.scope.rename(label) for label in labels]
    encoder.branch_lists.append((start, position, [encoder.label(label) for label in labels]))


@decodes("ret", "exit")
def decode_exit(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """ret and exit are the same in a kernel."""
    del statement, operands
    encoder.leave("exit")


@decodes("trap")
def decode_trap(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """trap stops the launch."""
    del statement, operands
    encoder.leave("trap")


@decodes("call")
def decode_call(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """call: a failed assertion stops the launch, printf prints nothing, other functions must be inlined."""
    if "__assertfail" in statement.operands:
        encoder.emit("assert")
    elif "vprintf" not in statement.operands:
        raise Unsupported(f"a call of {operands[0]}")


@decodes("setmaxnreg")
def decode_setmaxnreg(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """setmaxnreg.inc.sync.aligned.u32 and setmaxnreg.dec.sync.aligned.u32 count."""
    count = parse_integer(operands[0])
    if not 24 <= count <= 256 or count % 8:
        raise Unsupported(f"{count} registers: a multiple of 8 from 24 to 256 is expected")
    start = encoder.begin(".".join(statement.opcode.split(".")[:2]))
    encoder.set_x(start, count)
    encoder.set_field(start, A, encoder.kernel.directives.get("maxnreg", (0,))[0])


@decodes("griddepcontrol", "pmevent", "brkpt", "nanosleep")
def decode_nothing(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """Hints about scheduling, and programmatic launches, which run one after the other here."""
    del encoder, statement, operands
