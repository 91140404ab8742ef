"""Decode a kernel: statements in, records out.

Contract: `decode` drives the encoder over the statements of a kernel, inserts joins at labels that branches name, and links branches. An
instruction that nobody knows is an error that names it and its source line. Knows no instruction itself.
"""

from __future__ import annotations

from array import array

import numpy as np

from cuflash.errors import SimulatorError
from cuflash.simulator.encoder import WORDS, Encoder, Unsupported, split_operands
from cuflash.simulator.instructions import find_decoder, simplified
from cuflash.simulator.native import Core, Instruction
from cuflash.simulator.parser import Kernel, Statement
from cuflash.simulator.program import Program
from cuflash.simulator.report import describe_statement


def _jump_targets(kernel: Kernel) -> dict[int, list[str]]:
    """Statement index -> labels there."""
    labels: dict[int, list[str]] = {}
    for name, index in kernel.labels.items():
        labels.setdefault(index, []).append(name)
    return labels


def _find_instruction(encoder: Encoder, opcode: str) -> Instruction | None:
    """The table's entry for an opcode, if it describes the operands."""
    instruction = encoder.table.get(opcode) or encoder.table.get(simplified(opcode))
    if instruction is None and ".ftz" in opcode:  # 16-bit arithmetic keeps subnormals
        instruction = encoder.table.get(simplified(opcode.replace(".ftz", "")))
    return instruction


def _guard(encoder: Encoder, statement: Statement) -> None:
    guard = statement.guard
    if guard and statement.scope is not None:
        guard = statement.scope.rename(guard)
    encoder.guard, encoder.negated = guard, statement.negated


def decode(kernel: Kernel, core: Core, addresses: dict[str, int]) -> Program:
    """Encode all statements; `addresses` are those of the module's variables.

    Raises:
        SimulatorError: an instruction is not supported.
    """
    encoder = Encoder(kernel, core, addresses)
    labels = _jump_targets(kernel)
    record_of_label: dict[str, int] = {}
    starts = array("I")
    known: dict[str, Instruction | None] = {}
    words = encoder.words

    def place_labels(index: int) -> None:
        record = len(words) // WORDS
        for name in labels[index]:
            record_of_label[name] = record
        encoder.guard, encoder.negated = "", False
        encoder.begin("join")

    for index, statement in enumerate(kernel.statements):
        if index in labels:
            place_labels(index)
        starts.append(len(words) // WORDS)
        opcode, text, scope = statement.opcode, statement.operands, statement.scope
        if scope is not None:
            text = scope.rename(text)
        if statement.guard or encoder.guard:
            _guard(encoder, statement)
        try:
            decoder = find_decoder(opcode)
            if decoder is not None:
                decoder(encoder, statement, split_operands(text))
                continue
            if opcode not in known:
                known[opcode] = _find_instruction(encoder, opcode)
            instruction = known[opcode]
            if instruction is None:
                raise Unsupported("this instruction")
            encoder.emit_instruction(instruction, split_operands(text))
        except (Unsupported, KeyError, IndexError, ValueError) as error:
            reason = str(error) if isinstance(error, Unsupported) else "its form"
            where = describe_statement(kernel, index)
            raise SimulatorError(f"The simulator does not support {reason} in kernel {kernel.name}:\n{where}") from error
    if len(kernel.statements) in labels:
        place_labels(len(kernel.statements))
    encoder.guard = ""
    encoder.leave("exit")  # a kernel may end without one
    encoder.link(record_of_label)
    return _program(encoder, starts)


def _program(encoder: Encoder, starts: array[int]) -> Program:
    kernel = encoder.kernel
    operands = np.array(encoder.operands, dtype=np.uint32).reshape(-1, 3)
    constants, wide = encoder.constant_table()
    return Program(
        name=kernel.name,
        param_bytes=kernel.param_bytes,
        cluster=kernel.cluster,
        shared_begin=kernel.shared_begin,
        dynamic_shared_begin=kernel.dynamic_shared_begin,
        local_bytes=kernel.local_bytes,
        uses_variables=encoder.uses_variables,
        records=np.array(encoder.words, dtype=np.uint16),
        extra=np.array(encoder.extra or array("H", [0]), dtype=np.uint16),
        operands=np.ascontiguousarray(operands[np.argsort(operands[:, 1], kind="stable")]),
        widths=np.array(encoder.widths, dtype=np.uint8),
        constants=constants,
        wide=wide,
        special=np.array(encoder.special, dtype=np.uint32).reshape(-1, 2),
        jumps=np.array(encoder.jumps, dtype=np.uint32).reshape(-1, 2),
        starts=np.array(starts, dtype=np.uint32),
    )
