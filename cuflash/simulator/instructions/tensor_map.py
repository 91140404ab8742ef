"""tensormap.replace and tensormap.cp_fenceproxy: tensor maps that kernels make. The records are described in core/tensor_map.cpp."""

from __future__ import annotations

from cuflash.simulator.encoder import GENERIC, SPACES, A, C, Encoder, Unsupported, parse_integer
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement

# The order of the fields in core/tensor_map.cpp, and how many ordinals each has; 0: it takes none.
_FIELDS = {
    "global_address": 0,
    "rank": 0,
    "box_dim": 5,
    "global_dim": 5,
    "global_stride": 4,
    "element_stride": 5,
    "elemtype": 0,
    "swizzle_mode": 0,
    "fill_mode": 0,
}
_WIDE = ("global_address", "global_stride")
# Numbers of PTX -> numbers of CUtensorMapDataType, which core/reduction.h has. Others flush subnormals, round to tf32 or are below 8 bits.
_ELEMENT_TYPES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 9: 8, 10: 9}
_SPACES = ("global", "shared::cta")
_MAP_BYTES = 128


def _value(encoder: Encoder, field: str, text: str) -> str:
    """The new value as an operand of 64 bits."""
    if field == "elemtype":
        number = parse_integer(text)
        if number not in _ELEMENT_TYPES:
            raise Unsupported(f"element type {number} of a tensor map")
        return str(_ELEMENT_TYPES[number])
    if field in _WIDE or encoder.width(text) is None:
        return text
    wide = encoder.new_register(64)
    encoder.emit("cvt.u64.u32", wide, text)
    return wide


@decodes("tensormap.replace")
def decode_replace(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """tensormap.replace.tile.field{.space}.b1024.type [addr]{, ord}, new_val."""
    _, _, mode, field, *rest = statement.opcode.split(".")
    space = rest.pop(0) if rest[0] in _SPACES else ""
    if mode != "tile" or rest != ["b1024", "b64" if field in _WIDE else "b32"]:
        raise Unsupported("this form")
    if field in ("interleave_layout", "swizzle_atomicity") and parse_integer(operands[1]) == 0:
        return  # the only layout that there is
    if field not in _FIELDS:
        raise Unsupported(f"the field .{field}, or this value of it")
    ordinal = parse_integer(operands[1]) if _FIELDS[field] else 0
    if len(operands) != (3 if _FIELDS[field] else 2) or not 0 <= ordinal < max(1, _FIELDS[field]):
        raise Unsupported("these operands")
    value = _value(encoder, field, operands[-1])
    start = encoder.begin("tensormap.replace")
    encoder.set_field(start, A, ordinal)
    encoder.set_field(start, C, list(_FIELDS).index(field))
    encoder.add_extra(start)
    encoder.put_extra_address(operands[0], SPACES[space] if space else GENERIC)
    encoder.put_extra(value, 64, False)


@decodes("tensormap.cp_fenceproxy")
def decode_copy(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.scope.sync.aligned [dst], [src], 128."""
    parts = statement.opcode.split(".")
    expected = ["tensormap", "cp_fenceproxy", "global", "shared::cta", "tensormap::generic", "release"]
    if parts[:6] != expected or parts[6:7] not in (["cta"], ["cluster"], ["gpu"], ["sys"]) or parts[7:] != ["sync", "aligned"]:
        raise Unsupported("this form")
    if parse_integer(operands[2]) != _MAP_BYTES:
        raise Unsupported(f"{operands[2]} bytes of a tensor map")
    start = encoder.begin("tensormap.cp_fenceproxy")
    encoder.set_field(start, A, int(parts[6] != "cta"))
    encoder.add_extra(start)
    encoder.put_extra_address(operands[0], SPACES["global"])
    encoder.put_extra_address(operands[1], SPACES["shared::cta"])
