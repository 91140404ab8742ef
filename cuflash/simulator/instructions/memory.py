"""ld, st, atom, red, cp.async, and instructions that only concern caches."""

from __future__ import annotations

import functools
from typing import NamedTuple

from cuflash.simulator.encoder import ADDRESS_64, GENERIC, SPACES, SYMBOL_WIDTHS, A, B, C, D, Encoder, Unsupported, parse_integer, vector
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement, type_bits

_NO_RESULT = 16
_STRONG = 32
_STRONG_MODIFIERS = frozenset({"volatile", "relaxed", "acquire", "release", "mmio"})
_ORDERED = frozenset({"acquire", "release", "acq_rel", "sc"})


class Access(NamedTuple):
    """What the modifiers of a load or store say."""

    space: int
    element: str  # u8, s8, u16, s16, b32 or b64
    signed: bool
    elements: int
    ordered: bool
    strong: bool
    param: bool
    cache_hint: bool


def _scope(opcode: str) -> str:
    """What the core calls the scope of a fence: "1" when it is wider than the block."""
    return "0" if "cta" in opcode.split(".") else "1"


def _element(type_name: str, load: bool) -> str:
    bits = type_bits(type_name)
    if bits >= 32:
        return f"b{bits}"
    return f"s{bits}" if load and type_name[0] == "s" else f"u{bits}"


@functools.lru_cache(maxsize=4096)
def _access(opcode: str) -> Access:
    parts = opcode.split(".")
    space, count = GENERIC, 1
    for part in parts[1:-1]:
        if part in SPACES:
            space = SPACES[part]
        elif part in ("v2", "v4", "v8"):
            count = int(part[1])
    type_name = parts[-1]
    return Access(
        space,
        _element(type_name, parts[0] == "ld"),
        type_name[0] == "s",
        count,
        any(part in _ORDERED for part in parts),
        any(part in _STRONG_MODIFIERS for part in parts),
        "param" in parts or "param::func" in parts,
        "L2::cache_hint" in parts,
    )


def _emit_access(encoder: Encoder, name: str, access: Access, address: str, registers: list[str], defines: bool) -> None:
    if access.elements > 1:
        name += f".v{access.elements}"
    if name not in encoder.table or len(registers) != access.elements:
        raise Unsupported("this access")
    start = encoder.begin(name)
    offset, wide = encoder.put_address(start, A, address, SYMBOL_WIDTHS[access.space])
    encoder.set_field(start, C, access.space | (ADDRESS_64 if wide else 0) | (_STRONG if access.strong else 0))
    encoder.add_extra(start, offset & 0xFFFF, offset >> 16 & 0xFFFF)
    kind = 64 if access.element == "b64" else 32
    for register in registers:
        encoder.put_extra(register, kind, defines)


def _is_call_param(encoder: Encoder, address: str) -> bool:
    """Whether `[name+offset]` is a parameter of a call, not of the kernel."""
    name = address.strip("[] ").split("+")[0].strip()
    return name not in encoder.kernel.params and encoder.width(name) is None


@decodes("ld", "ldu")
def decode_ld(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """ld{.space}{.vec}.type d, [a]: a register may be wider than the type."""
    access = _access(statement.opcode)
    targets = vector(operands[0])
    if access.param and _is_call_param(encoder, operands[1]):
        for target in targets:  # what a call returned: nothing is called
            encoder.emit("mov.b64" if encoder.width(target) == 64 else "mov.b32", target, "0")
        return
    registers, widened = [], []
    for target in targets:
        if target == "_":
            target = encoder.new_register(64 if access.element == "b64" else 32)
        elif access.element != "b64" and encoder.width(target) == 64:
            narrow = encoder.new_register(32)
            widened.append((target, narrow))
            target = narrow
        registers.append(target)
    _emit_access(encoder, f"ld.{access.element}", access, operands[1], registers, True)
    for target, narrow in widened:
        encoder.emit("cvt.s64.s32" if access.signed else "cvt.u64.u32", target, narrow)
    if access.ordered:
        encoder.emit("fence", _scope(statement.opcode))


@decodes("st")
def decode_st(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """st{.space}{.vec}.type [a], b."""
    access = _access(statement.opcode)
    if access.param and _is_call_param(encoder, operands[0]):
        return
    sources = []
    for source in vector(operands[1]):
        if access.element != "b64" and encoder.width(source) == 64:
            narrow = encoder.new_register(32)
            encoder.emit("unpack.b64.b32", narrow, source, "0")
            source = narrow
        sources.append(source)
    if access.ordered:
        encoder.emit("fence", _scope(statement.opcode))
    _emit_access(encoder, f"st.{access.element}", access, operands[0], sources, False)


@functools.lru_cache(maxsize=4096)
def _atomic(opcode: str) -> tuple[str, int, int]:
    """Name in the core's table, space and number of elements of an atom or red."""
    parts = opcode.split(".")
    space, count, operation = GENERIC, 1, ""
    for part in parts[1:-1]:
        if part in SPACES:
            space = SPACES[part]
        elif part in ("v2", "v4", "v8"):
            count = int(part[1])
        elif part in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"):
            operation = part
    return f"atom.{operation}.{parts[-1]}", space, count


def _emit_atomic(encoder: Encoder, opcode: str, results: list[str] | None, address: str, values: list[str], second: str | None) -> None:
    name, space, count = _atomic(opcode)
    if name not in encoder.table or len(values) != count:
        raise Unsupported("this atomic operation")
    nbytes = type_bits(name.rsplit(".", 1)[1]) // 8
    kind = 64 if nbytes == 8 else 32
    for i, value in enumerate(values):
        start = encoder.begin(name)
        offset, wide = encoder.put_address(start, A, address, SYMBOL_WIDTHS[space])
        if i and not wide and count > 1:
            raise Unsupported("a vector at this address")
        offset += i * nbytes
        flags = space | (ADDRESS_64 if wide else 0)
        if results is None or results[i] == "_":
            flags |= _NO_RESULT
        else:
            encoder.put(start + D, results[i], kind, True)
        encoder.set_field(start, C, flags)
        encoder.add_extra(start, offset & 0xFFFF, offset >> 16 & 0xFFFF)
        encoder.put_extra(value, kind, False)
        encoder.put_extra(second if second is not None else value, kind, False)


def _emit_fenced(encoder: Encoder, opcode: str, results: list[str] | None, address: str, values: list[str], second: str | None) -> None:
    """An atomic operation between the fences that its .acquire, .release or .acq_rel stands for."""
    semantics = _ORDERED.intersection(opcode.split("."))
    if semantics - {"acquire"}:
        encoder.emit("fence", _scope(opcode))
    _emit_atomic(encoder, opcode, results, address, values, second)
    if semantics - {"release"}:
        encoder.emit("fence", _scope(opcode))


@decodes("atom")
def decode_atom(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """atom{.space}.op.type d, [a], b{, c}."""
    second = operands[3] if ".cas." in statement.opcode else None
    _emit_fenced(encoder, statement.opcode, vector(operands[0]), operands[1], vector(operands[2]), second)


@decodes("red")
def decode_red(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """red{.space}.op.type [a], b: an atom whose result nobody wants."""
    _emit_fenced(encoder, statement.opcode, None, operands[0], vector(operands[1]), None)


@decodes("cp.async")
def decode_cp(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """cp.async: [shared], [global], bytes{, bytes read or ignore-predicate}{, cache policy}; and its groups."""
    parts = statement.opcode.split(".")
    if parts[2] == "commit_group" or parts[2] == "wait_all":
        encoder.emit(f"cp.async.{parts[2]}")
        return
    if parts[2] == "wait_group":
        encoder.emit("cp.async.wait_group", operands[0])
        return
    nbytes = parse_integer(operands[2])
    rest = operands[3:-1] if "L2::cache_hint" in parts else operands[3:]
    if nbytes not in (4, 8, 16) or (parts[2] == "cg" and nbytes != 16):
        raise Unsupported(f"a copy of {nbytes} bytes")
    size = rest[0] if rest else operands[2]
    if encoder.width(size) == 1:  # ignore-src: zeros where the predicate is true
        predicate, size = size, encoder.new_register(32)
        encoder.emit("selp.b32", size, "0", operands[2], predicate)
    start = encoder.begin("cp.async")
    target_offset, target_wide = encoder.put_address(start, A, operands[0], 32)
    source_offset, source_wide = encoder.put_address(start, B, operands[1], 64)
    encoder.put(start + C, size, 32, False)
    encoder.add_extra(
        start,
        target_offset & 0xFFFF,
        target_offset >> 16 & 0xFFFF,
        source_offset & 0xFFFF,
        source_offset >> 16 & 0xFFFF,
        nbytes,
        target_wide | source_wide << 1,
    )


@decodes("membar", "fence")
def decode_fence(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """Fences order memory between blocks that run on different threads; within a block memory is always in order, but see proxies."""
    del operands
    encoder.emit("fence", _scope(statement.opcode))


@decodes("fence.proxy")
def decode_fence_proxy(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """fence.proxy.async{.space} and fence.proxy.alias: races are looked for in shared memory only, so a fence of global memory changes nothing."""
    del operands
    kind, _, space = statement.opcode.removeprefix("fence.proxy.").partition(".")
    if kind not in ("async", "alias") or space not in ("", "global", "shared::cta", "shared::cluster"):
        raise Unsupported("this fence of proxies")
    if kind == "async" and space != "global":
        encoder.emit("fence.proxy.async")


@decodes("fence.proxy.tensormap::generic")
def decode_fence_tensormap(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """fence.proxy.tensormap::generic.release.scope and .acquire.scope [addr], 128: they order what is ordered anyway, and blocks as other fences do."""
    parts = statement.opcode.split(".")
    if len(parts) != 5 or parts[3] not in ("release", "acquire") or len(operands) != (2 if parts[3] == "acquire" else 0):
        raise Unsupported("this fence of proxies")
    encoder.emit("fence", _scope(statement.opcode))


@decodes("fence.mbarrier_init")
def decode_fence_mbarrier_init(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """fence.mbarrier_init.release.cluster."""
    del statement, operands
    encoder.emit("fence.mbarrier_init")


@decodes("createpolicy")
def decode_createpolicy(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """createpolicy: there are no caches; the policy is a number that nobody looks at."""
    del statement
    encoder.emit("mov.b64", operands[0], "0")


@decodes("prefetch", "prefetchu", "applypriority", "discard")
def decode_cache(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """Instructions about caches do nothing."""
    del encoder, statement, operands
