"""Encode instructions as the 16-byte records that the core executes.

Contract: `Encoder` knows the layout of records, registers, constants and symbols; it knows no instruction. The functions in `instructions/` call
`emit` with operand text, `emit_fields` with numbers, or a mixture. Registers stay virtual: the core gives them rows.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cuflash.simulator.native import NO_RECORD, Core, Instruction
from cuflash.simulator.parser import Kernel, Variable, type_bits

CONSTANT = 0x8000  # marks a row of the constant bank
NEGATED = 0x8000  # marks a guard that is negated
WORDS = 8  # 16-bit words per record
GUARD, D, A, B, C, X = 1, 2, 3, 4, 5, 6  # words of a record
IN_EXTRA = 1 << 31

_ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_OCTAL = re.compile(r"-?0[0-7]+$")


class Unsupported(Exception):
    """Raised by a decoder for an instruction that it does not know; the message says what about it."""


def split_operands(text: str) -> list[str]:
    """Operands separated by commas; `{…}` and `[…]` stay whole."""
    if "{" in text or "[" in text:
        return _OPERAND.findall(text)
    return [part.strip() for part in text.split(",")] if text else []


def vector(text: str) -> list[str]:
    """The elements of `{a, b}`, or the one operand without braces."""
    if text.startswith("{"):
        return [part.strip() for part in text[1:-1].split(",")]
    return [text]


def parse_integer(text: str) -> int:
    """An integer literal as PTX writes them."""
    body = text.rstrip("U")
    return int(body, 8) if _OCTAL.match(body) and body.lstrip("-") != "0" else int(body, 0)


class Encoder:
    """The records of one kernel under construction."""

    def __init__(self, kernel: Kernel, core: Core, globals_: dict[str, int]) -> None:
        self.kernel = kernel
        self.table = core.instructions
        self.special_registers = core.special_registers
        self.globals = globals_  # address of each global and constant variable
        self.words = array("H")
        self.extra = array("H")
        self.operands = array("I")  # triples: position, record, register * 2 + defines
        self.widths = array("B")
        self.registers: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.constant_rows = 0
        self.special: list[tuple[int, int]] = []
        self.jumps: list[tuple[int, int]] = []
        self.branches: list[tuple[int, str]] = []  # record, label: x is filled in at the end
        self.branch_lists: list[tuple[int, int, list[str]]] = []  # record, start in extra, labels
        self.uses_variables = False  # an address of this process is among the constants
        self.guard = ""
        self.negated = False

    # ---- operands

    def new_register(self, width: int) -> str:
        """A register of the decoder's own; its name cannot clash with one of the kernel's."""
        name = f"#{len(self.widths)}"
        self._add_register(name, width)
        return name

    def _add_register(self, name: str, width: int) -> int:
        number = len(self.widths)
        self.registers[name] = number
        self.widths.append(width)
        return number

    def register(self, name: str) -> int | None:
        """The number of a register, or None if `name` is not one."""
        number = self.registers.get(name)
        if number is not None:
            return number
        width = self.kernel.registers.get(name)
        if width is None:
            width = self.kernel.prefixes.get(name.rstrip("0123456789"))
        if width is not None:
            return self._add_register(name, width)
        if name in self.special_registers:
            number = self._add_register(name, 32)
            self.special.append((self.special_registers[name], number))
            return number
        return None

    def width(self, text: str) -> int | None:
        """1, 32 or 64 for a register, None for anything else."""
        number = self.register(text)
        return None if number is None else self.widths[number]

    def constant(self, value: int, width: int) -> int:
        """The operand for a constant of 32 or 64 bits."""
        key = (value & ((1 << width) - 1), width)
        row = self.constants.get(key)
        if row is None:
            row = self.constants[key] = self.constant_rows
            self.constant_rows += width // 32
        return CONSTANT | row

    def literal(self, text: str, width: int) -> int:
        """The bits of an immediate, a symbol's address or a parameter's offset.

        Raises:
            Unsupported: it is none of these.
        """
        if text[:2] in ("0f", "0F", "0d", "0D"):
            bits = int(text[2:], 16)
            if width == 64 and text[1] in "fF":
                raise Unsupported(f"a 32-bit literal {text} for a 64-bit operand")
            return bits
        variable = self.kernel.variables.get(text)
        if variable is not None:
            return self._symbol(variable)
        if text in self.kernel.params:
            return self.kernel.params[text]
        if text == "WARP_SZ":
            return 32
        try:
            if "." in text:
                return int.from_bytes(struct.pack("<f" if width == 32 else "<d", float(text)), "little")
            return parse_integer(text)
        except ValueError:
            raise Unsupported(f"operand {text}") from None

    def _symbol(self, variable: Variable) -> int:
        if variable.space in ("global", "const"):
            if variable.name not in self.globals:
                raise Unsupported(f"the variable {variable.name}, whose initial value is not plain numbers")
            self.uses_variables = True
            return self.globals[variable.name]
        return variable.offset

    def put(self, position: int, text: str, kind: int, defines: bool) -> None:
        """Write operand `text` to a word of the records, or of `extra` if `position` has IN_EXTRA set.

        Args:
            kind: 32 or 64 bits, 1 for a predicate.
        """
        number = self.registers.get(text)
        if number is None:
            number = self.register(text)
        if number is not None:
            if self.widths[number] != kind:
                raise Unsupported(f"operand {text} of {self.widths[number]} bits where {kind} are expected")
            self.operands.extend((position, len(self.words) // WORDS - 1, number * 2 + defines))
            return
        if defines or kind == 1:
            raise Unsupported(f"operand {text}")
        value = self.constant(self.literal(text, kind), kind)
        if position & IN_EXTRA:
            self.extra[position & ~IN_EXTRA] = value
        else:
            self.words[position] = value

    # ---- records

    def begin(self, name: str) -> int:
        """Start a record for instruction `name`, under the current guard; returns the position of its first word."""
        start = len(self.words)
        self.words.extend((self.table[name].number, NEGATED if self.negated else 0, 0, 0, 0, 0, 0, 0))
        if self.guard:
            self.put(start + GUARD, self.guard, 1, False)
        return start

    def emit(self, name: str, *operands: str) -> int:
        """One record whose operands are as its signature says; returns the position of its first word."""
        return self.emit_instruction(self.table[name], operands)

    def emit_instruction(self, instruction: Instruction, operands: Sequence[str]) -> int:
        """`emit` with the table entry at hand."""
        words = self.words
        start = len(words)
        words.extend((instruction.number, NEGATED if self.negated else 0, 0, 0, 0, 0, 0, 0))
        if self.guard:
            self.put(start + GUARD, self.guard, 1, False)
        slots = instruction.slots
        if len(slots) != len(operands):
            raise Unsupported(f"{len(operands)} operands where {len(slots)} are expected")
        for slot, text in zip(slots, operands, strict=True):
            if slot.kind:
                self.put(start + slot.word, text, slot.kind, slot.defines)
            else:
                self.set_x(start, parse_integer(text))
        return start

    def set_x(self, start: int, value: int) -> None:
        """Set the 32-bit field of the record that starts at word `start`."""
        self.words[start + X] = value & 0xFFFF
        self.words[start + X + 1] = value >> 16 & 0xFFFF

    def set_field(self, start: int, word: int, value: int) -> None:
        """Set one 16-bit field."""
        self.words[start + word] = value

    def add_extra(self, start: int, *values: int) -> int:
        """Point x of a record to the end of `extra` and append numbers there; returns the position for further `put` calls."""
        self.set_x(start, len(self.extra))
        self.extra.extend(values)
        return len(self.extra)

    def put_extra(self, text: str, kind: int, defines: bool) -> None:
        """Append a register or constant to `extra`."""
        position = len(self.extra)
        self.extra.append(0)
        self.put(IN_EXTRA | position, text, kind, defines)

    def put_extra_in_place(self, text: str, kind: int) -> None:
        """Append a register that the instruction reads and writes."""
        self.put_extra(text, kind, True)
        self.put(IN_EXTRA | (len(self.extra) - 1), text, kind, False)

    def add_extra_value(self, value: int) -> None:
        """Append a number to `extra`."""
        self.extra.append(value)

    def put_address(self, start: int, word: int, text: str, symbol_width: int) -> tuple[int, bool]:
        """Write the base of `[base+offset]` to a field.

        Args:
            symbol_width: width of the constant when the base is a symbol or a number.

        Returns:
            offset, and whether the base has 64 bits.
        """
        match = _ADDRESS.match(text)
        if match is None:
            raise Unsupported(f"address {text}")
        base, offset = match[1], parse_integer(match[2]) if match[2] else 0
        width = self.width(base)
        if width is None:
            self.words[start + word] = self.constant(self.literal(base, symbol_width) + offset, symbol_width)
            return 0, symbol_width == 64
        self.put(start + word, base, width, False)
        return offset, width == 64

    # ---- control flow

    def jump(self, name: str, label: str) -> None:
        """A record that may continue at `label`."""
        start = self.begin(name)
        self.branches.append((start, label))

    def leave(self, name: str) -> None:
        """A record that ends its lanes."""
        start = self.begin(name)
        self.jumps.append((start // WORDS, NO_RECORD))

    def label(self, text: str) -> str:
        """Check that a label exists."""
        if text not in self.kernel.labels:
            raise Unsupported(f"label {text}")
        return text

    def link(self, record_of_label: dict[str, int]) -> None:
        """Fill in the targets of branches, once all records are there."""
        for start, label in self.branches:
            target = record_of_label[label]
            self.set_x(start, target)
            self.jumps.append((start // WORDS, target))
        for start, position, labels in self.branch_lists:
            for i, label in enumerate(labels):
                target = record_of_label[label]
                self.extra[position + 2 * i] = target & 0xFFFF
                self.extra[position + 2 * i + 1] = target >> 16
                self.jumps.append((start // WORDS, target))

    def constant_table(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """Values of the constant bank in the order of their rows, and which of them have 64 bits."""
        keys = list(self.constants)
        values = np.array([value for value, _ in keys], dtype=np.uint64)
        return values, np.array([width == 64 for _, width in keys], dtype=np.uint8)


def initial_data(kernel: Kernel) -> tuple[npt.NDArray[np.uint8], dict[str, int]]:
    """Memory for the global and constant variables of a module, and the address of each.

    Variables whose initial value contains addresses are left out; using one is reported as unsupported.
    """
    placed: list[tuple[Variable, bytes]] = []
    size = 0
    for variable in kernel.variables.values():
        if variable.space not in ("global", "const"):
            continue
        content = _initial_bytes(variable)
        if content is None:
            continue
        size = -(-size // variable.align) * variable.align
        variable.offset = size
        size += variable.nbytes
        placed.append((variable, content))
    memory = np.zeros(size + 256, dtype=np.uint8)
    shift = -memory.ctypes.data % 256
    data = memory[shift : shift + size]
    addresses: dict[str, int] = {}
    for variable, content in placed:
        data[variable.offset : variable.offset + len(content)] = np.frombuffer(content, dtype=np.uint8)
        addresses[variable.name] = memory.ctypes.data + shift + variable.offset
    return data, addresses


def _initial_bytes(variable: Variable) -> bytes | None:
    text = (variable.initializer or "").strip()
    if not text:
        return b""
    nbytes = type_bits(variable.element) // 8
    content = b""
    for item in re.split(r"[\s,{}]+", text.strip("{} \n\t")):
        if item[:2] in ("0f", "0F", "0d", "0D"):
            content += int(item[2:], 16).to_bytes(nbytes, "little")
            continue
        try:
            content += (parse_integer(item) & ((1 << 8 * nbytes) - 1)).to_bytes(nbytes, "little")
        except ValueError:
            return None
    return content
