"""cp.async.bulk, its tensor and reducing forms, its groups; st.async and red.async.

The records are described in core/bulk_copy.cpp and core/tensor_copy.cpp.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cuflash.simulator.encoder import GENERIC, SPACES, C, Encoder, Unsupported, vector
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement, type_bits

# The order of the enumerations in core/reduction.h.
_OPERATIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")
_ELEMENTS = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16")
_BITS = {"b32": "u32", "b64": "u64"}
_NO_OPERATION = 15
_MULTICAST = 1
_OPERATION_SHIFT, _ELEMENT_SHIFT = 4, 8

_COMPLETIONS = frozenset({"mbarrier::complete_tx::bytes", "bulk_group"})
_HINTS = frozenset({"L2::cache_hint", "tile", "cta_group::1", "noftz"})
_TENSOR = re.compile(r"\[\s*([^,\]]+?)\s*,\s*(\{[^}]*\}|[^\]]+?)\s*\]$")

# (destination, operation) -> types, of cp.reduce.async.bulk and red.async.
_GLOBAL_REDUCTIONS = {
    "add": {"u32", "s32", "u64", "f32", "f64", "f16", "bf16"},
    "min": {"u32", "s32", "u64", "s64", "f16", "bf16"},
    "max": {"u32", "s32", "u64", "s64", "f16", "bf16"},
    "inc": {"u32"},
    "dec": {"u32"},
    "and": {"b32", "b64"},
    "or": {"b32", "b64"},
    "xor": {"b32", "b64"},
}
_SHARED_REDUCTIONS = {
    "add": {"u32", "s32", "u64"},
    "min": {"u32", "s32"},
    "max": {"u32", "s32"},
    "inc": {"u32"},
    "dec": {"u32"},
    "and": {"b32"},
    "or": {"b32"},
    "xor": {"b32"},
}


class _Form(NamedTuple):
    """What the modifiers of a copy say."""

    target: str
    source: str
    on_mbarrier: bool
    multicast: bool
    rank: int  # 0: not a tensor
    operation: str  # of a reduction, or ""
    element: str


def _parse_form(parts: list[str]) -> _Form:
    """Read the modifiers after `cp.async.bulk` or `cp.reduce.async.bulk`."""
    spaces: list[str] = []
    completion, operation, element, rank, multicast = "", "", "", 0, False
    for part in parts:
        if part in SPACES and part.startswith(("shared::", "global")):
            spaces.append(part)
        elif part in _COMPLETIONS:
            completion = part
        elif part in _OPERATIONS:
            operation = part
        elif part in _ELEMENTS or part in _BITS:
            element = part
        elif part == "multicast::cluster":
            multicast = True
        elif part in ("1d", "2d", "3d", "4d", "5d"):
            rank = int(part[0])
        elif part not in _HINTS and part != "tensor":
            raise Unsupported(f"the modifier .{part}")
    if len(spaces) != 2 or not completion:
        raise Unsupported("this kind of copy")
    return _Form(spaces[0], spaces[1], completion != "bulk_group", multicast, rank, operation, element)


def _flags(form: _Form) -> int:
    flags = _MULTICAST if form.multicast else 0
    operation = _OPERATIONS.index(form.operation) if form.operation else _NO_OPERATION
    element = _ELEMENTS.index(_BITS.get(form.element, form.element)) if form.element else 0
    return flags | operation << _OPERATION_SHIFT | element << _ELEMENT_SHIFT


@decodes("cp.async.bulk", "cp.reduce")
def decode_bulk(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """Copies and reductions of ranges: [to], [from], bytes{, [mbarrier]}{, mask of blocks}{, cache policy}."""
    parts = statement.opcode.split(".")
    form = _parse_form(parts[parts.index("bulk") + 1 :])
    if form.rank:
        _decode_tensor(encoder, form, operands)
        return
    shared_target = form.target.startswith("shared")
    if form.operation:
        allowed = (_SHARED_REDUCTIONS if shared_target else _GLOBAL_REDUCTIONS)[form.operation]
        if form.element not in allowed or ("noftz" in parts) != (form.operation == "add" and form.element in ("f16", "bf16")):
            raise Unsupported("this reduction")
    if shared_target != form.on_mbarrier or not (form.source.startswith("shared") or (shared_target and not form.operation)):
        raise Unsupported("this kind of copy")
    name = "to_global" if not shared_target else "to_shared" if form.source == "global" else "between_blocks"
    start = encoder.begin(f"cp.async.bulk.{name}")
    encoder.set_field(start, C, _flags(form))
    encoder.add_extra(start)
    encoder.put_extra_address(operands[0], SPACES[form.target])
    encoder.put_extra_address(operands[1], SPACES[form.source])
    if shared_target:
        encoder.put_extra_address(operands[3], SPACES[form.target])
    encoder.put_extra(operands[2], 32, False)
    if name == "to_shared":
        encoder.put_extra(operands[4] if form.multicast else "0", 32, False)


def _decode_tensor(encoder: Encoder, form: _Form, operands: list[str]) -> None:
    """Loads: [to], [map, {coordinates}], [mbarrier]{, mask of blocks}; stores and reductions: [map, {coordinates}], [from]."""
    load = form.source == "global"
    if load != form.on_mbarrier or form.target.startswith("shared") != load or (load and form.operation):
        raise Unsupported("this kind of copy")
    shared, tensor = (operands[0], operands[1]) if load else (operands[1], operands[0])
    match = _TENSOR.match(tensor)
    coordinates = vector(match[2]) if match else []
    if match is None or len(coordinates) != form.rank:
        raise Unsupported(f"the coordinates {tensor}")
    start = encoder.begin(f"cp.async.bulk.tensor.{'load' if load else 'store'}")
    encoder.set_field(start, C, _flags(form))
    encoder.add_extra(start)
    encoder.put_extra_address(shared, SPACES[form.target if load else form.source])
    encoder.put_extra_address(f"[{match[1]}]", GENERIC)
    if load:
        encoder.put_extra_address(operands[2], SPACES[form.target])
    encoder.add_extra_value(form.rank)
    for coordinate in coordinates:
        encoder.put_extra(coordinate, 32, False)
    if load:
        encoder.put_extra(operands[3] if form.multicast else "0", 32, False)


@decodes("cp.async.bulk.prefetch")
def decode_prefetch(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """cp.async.bulk.prefetch.L2.global [from], bytes; that of a tensor does nothing."""
    if "tensor" in statement.opcode.split("."):
        return
    start = encoder.begin("cp.async.bulk.prefetch")
    encoder.add_extra(start)
    encoder.put_extra_address(operands[0], SPACES["global"])
    encoder.put_extra(operands[1], 32, False)


@decodes("cp.async.bulk.commit_group")
def decode_commit(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """cp.async.bulk.commit_group."""
    del operands
    encoder.emit(statement.opcode)


@decodes("cp.async.bulk.wait_group")
def decode_wait(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """cp.async.bulk.wait_group{.read} n."""
    encoder.emit(statement.opcode, operands[0])


@decodes("st.async", "red.async")
def decode_store(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """st.async{.vec}.type [to], values, [mbarrier] and red.async.op.type [to], value, [mbarrier]."""
    parts = statement.opcode.split(".")
    element = parts[-1]
    operation = next((part for part in parts if part in _OPERATIONS), "")
    if "mbarrier::complete_tx::bytes" not in parts or (parts[0] == "red" and element not in _SHARED_REDUCTIONS[operation]):
        raise Unsupported("this asynchronous store")
    space = SPACES["shared::cluster"] if "shared::cluster" in parts else GENERIC
    values = vector(operands[1])
    bits = type_bits(element)
    start = encoder.begin("st.async")
    encoder.set_field(start, C, _flags(_Form("", "", True, False, 0, operation, element if operation else "")))
    encoder.add_extra(start)
    encoder.put_extra_address(operands[0], space)
    encoder.put_extra_address(operands[2], space)
    encoder.add_extra_value(bits // 8)
    encoder.add_extra_value(len(values))
    for value in values:
        encoder.put_extra(value, bits, False)
