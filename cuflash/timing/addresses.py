"""What an address is made of, as far as the code says it: the constants that are added up on the way to a register.

Kernels of wgmma keep mbarriers in shared memory, each at a constant distance from its begin, a ring of them with a stage that varies. Which barrier an instruction means is
told by the constant part of its address. `constants(code, position, operand, first)` follows a register back through additions, shifts and copies in the order of the code that
is given: a path through a loop from `first` on, behind what comes before the loop. What it does not know counts as 0, and so does what goes from trip to trip, such as a
stage. Where a selection decides, all possible constants are returned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cuflash.timing.sass import Instruction

_REGISTER = re.compile(r"-?U?R\d+")
_NUMBER = re.compile(r"-?0x[0-9a-f]+")
_ZERO = frozenset(("RZ", "URZ", "SRZ"))
_DEPTH = 24
_MOST = 4
_ADDITIONS = frozenset(("IADD3", "UIADD3", "VIADD", "IADD"))
_COPIES = frozenset(("MOV", "UMOV", "R2UR", "S2UR", "SHFL"))
_WORD = 2**32

Constants = frozenset[int]


def constants(code: Sequence[Instruction], position: int, operand: str, first: int = 0) -> Constants:
    """The constant parts that an operand of `code[position]` may have: a register, a number, or an address in brackets, of which the terms are added."""
    return _Search(code, first).of_address(position, operand)


def operands_of(instruction: Instruction) -> list[str]:
    """Its operands, the result first, without predicates and marks of reuse."""
    parts = [part.strip().removesuffix(".reuse").replace(".reuse", "") for part in instruction.operands.split(",")]
    return [part for part in parts if not re.fullmatch(r"!?U?P[T\d]", part)]


class _CarriedError(Exception):
    """A register goes from trip to trip."""


class _Search:
    """Follows registers back through one piece of code."""

    def __init__(self, code: Sequence[Instruction], first: int) -> None:
        self.code, self.first = code, first
        self.written_last = {result_of(code[at]): at for at in range(first, len(code))} if first else {}
        self.looks_back = False

    def of_address(self, position: int, operand: str) -> Constants:
        terms = re.findall(r"-?U?R(?:Z|\d+)|-?0x[0-9a-f]+", operand)
        return self._sum([self._value(position, term, _DEPTH) for term in terms])

    def _value(self, position: int, operand: str, depth: int) -> Constants:
        if _NUMBER.fullmatch(operand):
            return frozenset((_signed(int(operand, 16)),))
        if not _REGISTER.fullmatch(operand) or depth == 0:
            return frozenset((0,))
        sign, register = (-1, operand[1:]) if operand.startswith("-") else (1, operand)
        for before in range(position - 1, -1, -1):
            if before < self.first <= position and register in self.written_last:
                return frozenset(_signed(sign * value) for value in self._left_by_last_trip(register, depth - 1))
            instruction = self.code[before]
            if result_of(instruction) == register:
                found = self._result(before, instruction, depth - 1)
                if instruction.predicate and not instruction.never_runs:  # or it keeps what it had
                    found |= self._value(before, register, depth - 1)
                return frozenset(_signed(sign * value) for value in list(found)[:_MOST])
        return frozenset((0,))

    def _left_by_last_trip(self, register: str, depth: int) -> Constants:
        """What a trip leaves in a register: 0 where that depends on the trip before, as a stage does."""
        if self.looks_back:
            raise _CarriedError
        self.looks_back = True
        try:
            at = self.written_last[register]
            return self._result(at, self.code[at], depth)
        except _CarriedError:
            return frozenset((0,))
        finally:
            self.looks_back = False

    def _result(self, position: int, instruction: Instruction, depth: int) -> Constants:
        base, parts = instruction.base, operands_of(instruction)[1:]

        def value(operand: str) -> Constants:
            return self._value(position, operand, depth)

        if base in _ADDITIONS and "X" not in instruction.opcode.split("."):
            return self._sum([value(part) for part in parts])
        if base in _COPIES:
            return value(parts[0]) if parts else frozenset((0,))
        if base in ("IMAD", "UIMAD") and "WIDE" not in instruction.opcode and "HI" not in instruction.opcode and len(parts) == 3:
            return self._sum([self._product(value(parts[0]), value(parts[1]), parts), value(parts[2])])
        if base in ("LEA", "ULEA") and "HI" not in instruction.opcode and len(parts) >= 3 and _NUMBER.fullmatch(parts[-1]):
            shift = int(parts[-1], 16)
            return self._sum([frozenset(_signed(of << shift) for of in value(parts[0])), value(parts[1])])
        if base in ("SEL", "USEL"):
            return frozenset(list(value(parts[0]) | value(parts[1]))[:_MOST])
        return frozenset((0,))

    @staticmethod
    def _product(first: Constants, second: Constants, parts: Sequence[str]) -> Constants:
        """Of a register and a number; a product of registers has no constant part."""
        if not any(_NUMBER.fullmatch(part) or part in _ZERO for part in parts[:2]):
            return frozenset((0,))
        return frozenset(_signed(a * b) for a in first for b in second)

    @staticmethod
    def _sum(terms: Sequence[Constants]) -> Constants:
        total = [0]
        for term in terms:
            total = [a + b for a in total for b in term][:_MOST]
        return frozenset(_signed(of) for of in total)


def result_of(instruction: Instruction) -> str:
    """The register that it writes; "" for none."""
    parts = operands_of(instruction)
    return parts[0] if parts else ""


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value
