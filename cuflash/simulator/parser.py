"""Read PTX text: one kernel's parameters, symbols, registers and statements.

Contract: no meaning is given to instructions here. `parse_kernel` yields statements in order, each with its guard, opcode, operand text, scope
and the number of the `.loc` line that was in force. Scopes (`{ … }` of inline assembly) may redeclare registers and labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cuflash.errors import SimulatorError

SHARED_BASE = 1024  # shared addresses start here, as ptxas has them for sm_90; so a null pointer is out of bounds

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
_DIRECTIVE = re.compile(r"\.(\w+)\s+(\d+(?:\s*,\s*\d+)*)")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\b[^%\[,]*?\s)?([\w$]+)\s*(?:\[(\d+)\])?\s*$")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_MODULE_VARIABLE = re.compile(r"^\s*((?:\.(?:extern|visible|weak|common)\s+)*\.(?:shared|global|const)\s[^;]*);", re.MULTILINE)
_STATEMENT = re.compile(
    r"\s*(?:"
    r"(\.loc\b[^\n]*)"
    r"|([{}])"
    r"|([A-Za-z_$%][\w$]*)\s*:(?!:)"
    r"|(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*([^;]*);"
    r"|(\.[^;{]*(?:\{[^}]*\})?[^;{]*);"
    r"|;)"
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.DOTALL)
_RANGE = re.compile(r"(.+)<(\d+)>$")
_NAME = re.compile(r"[%A-Za-z_$][\w$]*")

_TYPE_BITS = re.compile(r"[a-z]+(\d+)(x2)?$")
_FP8_PAIRS = ("e4m3x2", "e5m2x2")


def type_bits(name: str) -> int:
    """The size of a PTX type: 32 for "f32" and "bf16x2", 1 for "pred"."""
    if name == "pred":
        return 1
    if name in _FP8_PAIRS:
        return 16
    match = _TYPE_BITS.match(name)
    if match is None:
        raise SimulatorError(f"unknown PTX type .{name}")
    return int(match[1]) * (2 if match[2] else 1)


class Scope:
    """Names that a `{ … }` declares, on top of those around it."""

    def __init__(self, outer: Scope | None, suffix: str) -> None:
        self.outer = outer
        self.suffix = suffix
        self.renamed: dict[str, str] = dict(outer.renamed) if outer else {}

    def declare(self, name: str) -> str:
        """Enter a register or label; returns its name in the whole kernel."""
        if not self.suffix:
            return name
        self.renamed[name] = name + self.suffix
        return self.renamed[name]

    def rename(self, text: str) -> str:
        """Replace the names of this scope in operand text."""
        renamed = self.renamed
        return _NAME.sub(lambda match: renamed.get(match[0], match[0]), text)


class Statement(NamedTuple):
    """One instruction as written.

    Attributes:
        guard: predicate register, "" if none.
        negated: the guard is `@!p`.
        opcode: the mnemonic with all its modifiers.
        operands: text after it.
        scope: None outside of inner scopes.
        loc: index into `Kernel.locations`, -1 before the first.
        begin, end: where it stands in the text of the module, from its guard to behind its semicolon.
    """

    guard: str
    negated: bool
    opcode: str
    operands: str
    scope: Scope | None
    loc: int
    begin: int
    end: int

    def text(self) -> str:
        """The instruction as PTX text on one line."""
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {' '.join(self.operands.split())}".rstrip() + ";"


@dataclass
class Variable:
    """A variable in shared, local, global or constant memory; `offset` is its address within that memory."""

    space: str
    name: str
    align: int
    nbytes: int
    offset: int = 0
    initializer: str | None = None
    element: str = "b8"


@dataclass
class Kernel:
    """One entry function as text.

    Attributes:
        params: name -> offset in the parameter block.
        variables: shared, global and constant variables of the module, and the kernel's own.
        prefixes: registers declared as ranges: `%r` -> width of `%r0`, `%r1`, …
        registers: registers declared one by one: name -> width; 16-bit registers count as 32.
        labels: name -> index of the statement that follows.
        targets: label of a `.branchtargets` list -> its labels.
        locations: the `.loc` lines.
        directives: what stands between the parameters and the body: `reqntid` -> (384, 1, 1).
        files: number -> path.
    """

    name: str
    params: dict[str, int] = field(default_factory=dict)
    param_bytes: int = 0
    variables: dict[str, Variable] = field(default_factory=dict)
    shared_begin: int = 0
    dynamic_shared_begin: int = 0
    local_bytes: int = 0
    prefixes: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)
    locations: list[str] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    files: Mapping[int, str] = field(default_factory=dict)

    @property
    def cluster(self) -> tuple[int, int, int]:
        """Blocks of a cluster in x, y, z, as declared; 1 if not."""
        declared = (*self.directives.get("reqnctapercluster", ()), 1, 1, 1)
        return declared[0], declared[1], declared[2]


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _register_width(type_name: str) -> int:
    bits = type_bits(type_name)
    if bits > 64:
        raise SimulatorError(f"registers of type .{type_name} are not supported")
    return bits if bits in (1, 64) else 32


def _parse_params(kernel: Kernel, text: str) -> None:
    offset = 0
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAM.match(item)
        if match is None:
            raise SimulatorError(f"cannot read the kernel parameter: {item}")
        align, type_name, name, count = match.groups()
        size = type_bits(type_name) // 8
        offset = _align(offset, int(align or size))
        kernel.params[name] = offset
        offset += size * int(count or 1)
    kernel.param_bytes = offset


def _parse_variable(text: str) -> Variable | None:
    match = _VARIABLE.match(text.strip())
    if match is None:
        return None
    space, align, type_name, name, dimensions, initializer = match.groups()
    size = type_bits(type_name) // 8
    count = 1
    for extent in re.findall(r"\[(\d*)\]", dimensions):
        count *= int(extent or 0)
    return Variable(space, name, int(align or size), size * count, initializer=initializer, element=type_name)


def _place_shared(kernel: Kernel, aligned_as_declared: bool) -> None:
    """Give shared variables addresses: static ones from SHARED_BASE on, then dynamic memory. With `aligned_as_declared` all of them move up until
    dynamic memory is aligned as its declaration asks for and no better."""
    shared = [v for v in kernel.variables.values() if v.space == "shared"]
    static = [v for v in shared if v.nbytes]
    dynamic_align = max([16] + [v.align for v in shared if not v.nbytes])
    size = 0
    for variable in static:
        size = _align(size, variable.align)
        variable.offset = size
        size += variable.nbytes
    begin = SHARED_BASE
    end = _align(SHARED_BASE + size, dynamic_align)
    if aligned_as_declared:
        if (end // dynamic_align) % 2 == 0 and dynamic_align < SHARED_BASE:
            end += dynamic_align
        static_align = max([16] + [v.align for v in static])
        begin = (end - size) // static_align * static_align if static else end
    for variable in shared:
        variable.offset = begin + variable.offset if variable.nbytes else end
    kernel.shared_begin, kernel.dynamic_shared_begin = begin, end


def _declare_registers(kernel: Kernel, scope: Scope, text: str) -> None:
    match = _REGISTERS.match(text)
    if match is None:
        raise SimulatorError(f"cannot read the register declaration: {text}")
    width = _register_width(match[1])
    for name in (part.strip() for part in match[2].split(",")):
        if (numbered := _RANGE.match(name)) is None:
            kernel.registers[scope.declare(name)] = width
        elif not scope.suffix:
            kernel.prefixes[numbered[1]] = width
        else:
            for i in range(int(numbered[2])):
                kernel.registers[scope.declare(numbered[1] + str(i))] = width


def _declare(kernel: Kernel, scope: Scope, text: str, label: str) -> None:
    """Take in one directive of the body."""
    if text.startswith(".reg"):
        _declare_registers(kernel, scope, text)
    elif text.startswith((".branchtargets", ".calltargets")):
        kernel.targets[label] = [part.strip() for part in text.split(None, 1)[1].split(",")]
    elif text.startswith((".local", ".shared")):
        variable = _parse_variable(text)
        if variable is None:
            raise SimulatorError(f"cannot read the declaration: {text}")
        variable.name = scope.declare(variable.name)
        if variable.space == "local":
            variable.offset = kernel.local_bytes = _align(kernel.local_bytes, variable.align)
            kernel.local_bytes += _align(variable.nbytes, 16)
        kernel.variables[variable.name] = variable


def _parse_body(kernel: Kernel, source: str, position: int) -> None:
    scopes = [Scope(None, "")]
    count = 0
    label = ""
    statements, locations = kernel.statements, kernel.locations
    inner: Scope | None = None
    match_statement = _STATEMENT.match
    while True:
        match = match_statement(source, position)
        if match is None:
            line = source[position : position + 100].strip().split("\n")[0]
            raise SimulatorError(f"cannot read the PTX of {kernel.name} at: {line}")
        position = match.end()
        loc, brace, name, negated, guard, opcode, operands, directive = match.groups()
        if opcode:
            begin = match.start(4) - 1 if guard else match.start(6)  # with the @
            statements.append(Statement(guard or "", negated == "!", opcode, operands, inner, len(locations) - 1, begin, position))
        elif loc:
            locations.append(loc)
        elif name:
            label = scopes[-1].declare(name)
            kernel.labels[label] = len(statements)
        elif directive:
            _declare(kernel, scopes[-1], directive, label)
        elif brace == "{":
            count += 1
            inner = Scope(scopes[-1], f"@{count}")
            scopes.append(inner)
        elif brace == "}":
            scopes.pop()
            if not scopes:
                return
            inner = scopes[-1] if len(scopes) > 1 else None


def parse_kernel(ptx: str, entry: str | None, aligned_as_declared: bool = False) -> Kernel:
    """Read the entry function `entry` of a module, or its only one.

    Args:
        ptx: the text of the module.
        entry: the kernel's name, or None.
        aligned_as_declared: dynamic shared memory starts at an address that is aligned no better than its declaration asks for.

    Raises:
        SimulatorError: no such entry, or text that cannot be read.
    """
    files = {int(number): path for number, path in _FILE.findall(ptx)}
    source = _COMMENT.sub(lambda comment: " " * len(comment[0]), ptx)  # everything stays where it was
    entries = list(_ENTRY.finditer(source))
    found = [match for match in entries if entry is None or match[1] == entry]
    if len(found) != 1:
        names = ", ".join(match[1] for match in entries) or "none"
        raise SimulatorError(f"the PTX must have one kernel{f' named {entry}' if entry else ''}; it has: {names}")
    match = found[0]
    kernel = Kernel(match[1], files=files)
    _parse_params(kernel, match[2] or "")
    kernel.directives = {name: tuple(int(number) for number in numbers.split(",")) for name, numbers in _DIRECTIVE.findall(match[3])}
    first = min(m.start() for m in entries)
    for text in _MODULE_VARIABLE.findall(source[:first]):
        variable = _parse_variable(text)
        if variable is not None:
            kernel.variables[variable.name] = variable
    _parse_body(kernel, source, match.end())
    _place_shared(kernel, aligned_as_declared)
    return kernel
