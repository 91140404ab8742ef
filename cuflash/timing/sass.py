"""Machine code (SASS) of a cubin, with the control code that the assembler gave every instruction.

`read_functions(cubin)` returns the instructions of every function. `parse_listing(text)` does the same from what `nvdisasm -hex` prints, and
`decode_control(high)` reads the control code of one instruction. An instruction of sm_70 and later has 128 bits. The upper 23 of them say when it may issue
and what it signals (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826, section 2.1):

    bits 105-108  stall count: clocks until the warp's next instruction may issue
    bit  109      yield hint
    bits 110-112  scoreboard that is released when the result has been written; 7 for none
    bits 113-115  scoreboard that is released when the operands have been read; 7 for none
    bits 116-121  scoreboards, one bit each, that must be free before this instruction issues
    bits 122-125  operands that are kept for the next instruction, `.reuse` in the listing
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cuflash.errors import SetupError, UnsupportedError
from cuflash.jit import disassembly

INSTRUCTION_BYTES = 16
NUM_SCOREBOARDS = 6
_NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Control:
    """The control code of an instruction.

    Attributes:
        stall: clocks until the warp's next instruction may issue.
        yields: the hint that another warp should issue next.
        write_scoreboard: released when the result is there; None without.
        read_scoreboard: released when the operands have been read; None without.
        waits: scoreboards that must be free before the instruction issues.
        reuse: one bit for each operand that stays in the operand cache.
    """

    stall: int
    yields: bool
    write_scoreboard: int | None
    read_scoreboard: int | None
    waits: tuple[int, ...]
    reuse: int


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes from the function's begin.
        predicate: "P0", "!UP1", "!PT"; "" without.
        opcode: with its modifiers, such as "HMMA.16816.F32".
        operands: as text, without the semicolon.
        target: index of the instruction that a branch goes to; None for all others, and for branches out of the function.
        control: its control code.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    target: int | None
    control: Control

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def never_runs(self) -> bool:
        """Whether its predicate is false: the assembler works around hardware with such instructions."""
        return self.predicate in ("!PT", "!UPT")


Function = tuple[Instruction, ...]


def decode_control(high: int) -> Control:
    """The control code in the upper 64 of an instruction's 128 bits."""
    write, read, waits = high >> 46 & 7, high >> 49 & 7, high >> 52 & 63
    return Control(
        stall=high >> 41 & 15,
        yields=not high >> 45 & 1,
        write_scoreboard=None if write == _NO_SCOREBOARD else write,
        read_scoreboard=None if read == _NO_SCOREBOARD else read,
        waits=tuple(index for index in range(NUM_SCOREBOARDS) if waits >> index & 1),
        reuse=high >> 58 & 15,
    )


_SECTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L\w+):")
_FIRST_HALF = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass
class _Open:
    """A function that is being read."""

    rows: list[tuple[int, str, str, str]]
    controls: list[Control]
    labels: dict[str, int]

    def close(self) -> Function:
        instructions = []
        for (address, predicate, opcode, operands), control in zip(self.rows, self.controls, strict=True):
            label = _TARGET.search(operands)
            target = self.labels.get(label[1]) if label else None
            instructions.append(Instruction(address, predicate, opcode, operands, target, control))
        return tuple(instructions)


def parse_listing(text: str) -> dict[str, Function]:
    """What `nvdisasm -hex` prints -> the instructions of each function."""
    functions: dict[str, _Open] = {}
    current: _Open | None = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            current = functions.setdefault(section[1], _Open([], [], {}))
        elif line.startswith("//-----"):  # the next section, perhaps one of data
            current = None
        elif current is None:
            continue
        elif label := _LABEL.match(line):
            current.labels[label[1]] = len(current.rows)
        elif first := _FIRST_HALF.match(line):
            current.rows.append((int(first[1], 16), first[2] or "", first[3], first[4]))
        elif (second := _SECOND_HALF.match(line)) and len(current.controls) < len(current.rows):
            current.controls.append(decode_control(int(second[1], 16)))
    return {name: function.close() for name, function in functions.items()}


def read_functions(cubin: bytes) -> dict[str, Function]:
    """The functions of a cubin.

    Raises:
        SetupError: nvdisasm is missing.
        UnsupportedError: nvdisasm cannot read the cubin.
    """
    listing = disassembly.disassemble(cubin)
    if listing is None:
        if disassembly.find_nvdisasm() is None:
            raise SetupError("A prediction reads machine code with nvdisasm: pip install 'cuflash[inspect]'")
        hint = "Install a newer one: pip install -U nvidia-cuda-nvdisasm."
        raise UnsupportedError("cubin", f"{len(cubin)} bytes that nvdisasm cannot read", "a cubin that it knows", hint)
    return parse_listing(listing)
