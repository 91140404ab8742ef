"""The bytes of a kernel's argument struct: filled in once for all calls of a kind, with places for what differs from call to call.

Values are given field by field, as `argument_structs.py` lists them: a number is written, the text in the place of a 64-bit word is the name of an address (or
of a word of dropout's seed) that each launch gives, and a `TensorMap` is encoded for the address that each launch gives by its name. Fields that are left out are
zero. `Arguments.fill` writes what belongs to one launch.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Container, Mapping, Sequence
from typing import TypeAlias

from cuflash.planning.argument_structs import FEATURE_ARGUMENTS, TENSOR_MAP, WORD, Scalar, Struct
from cuflash.problem.features import Features
from cuflash.problem.layout import View
from cuflash.problem.problem import Problem
from cuflash.runtime.tensor_maps import TensorMap

Values: TypeAlias = Mapping[str, "Value"]
Value: TypeAlias = int | float | str | TensorMap | Values | Sequence[Values]

Change: TypeAlias = "tuple[slice, array[int]]"
"""A place in a struct, in words, and what it has there."""

Strides3 = tuple[int, int, int]
"""Strides of (batch, head, query), in elements."""

_MAP_WORDS = TENSOR_MAP.size // WORD.size
_LOG2_E = 1.4426950408889634


class Arguments:
    """One kernel's argument struct, filled in but for the words that each launch gives, and for maps.

    Attributes:
        names: of these words and of the addresses of maps, in the order of the struct.
    """

    def __init__(self, layout: Struct, values: Values, words: Container[str]) -> None:
        """Fill in `values`; a name that is not among the `words` that launches give stays null."""
        image = bytearray(layout.size)
        places: dict[int, tuple[str, Scalar]] = {}  # offset -> name of the address, type
        maps: dict[int, TensorMap] = {}
        for path, offset, scalar in layout.scalars():
            value = _value_at(values, path)
            if isinstance(value, TensorMap):
                places[offset], maps[offset] = (value.name, _checked(scalar, TENSOR_MAP, path)), value
            elif isinstance(value, str):
                if value in words:
                    places[offset] = value, _checked(scalar, WORD, path)
            elif scalar is not TENSOR_MAP or value:  # a map that is left out is zeros too
                struct.pack_into("=" + scalar.format, image, offset, value)
        _check_names(layout, values)
        self.names = tuple(name for name, _ in places.values())
        self._image = array(WORD.format, bytes(image))
        self._words = [(offset // WORD.size, name) for offset, (name, _) in places.items() if offset not in maps]
        self._maps = [(offset // WORD.size, tensor_map) for offset, tensor_map in maps.items()]

    def fill(self, words: Mapping[str, int]) -> array[int]:
        """The struct for one launch, as 64-bit words."""
        filled = self._image[:]
        for index, name in self._words:
            filled[index] = words[name]
        for index, tensor_map in self._maps:
            filled[index : index + _MAP_WORDS] = array(WORD.format, tensor_map.at(words[tensor_map.name]))
        return filled

    def change_of(self, other: Arguments) -> Change | None:
        """What makes the filled struct of `other` into this one, which is quicker than to fill this one; None where each launch writes other words to them."""
        if self._words != other._words or self._maps or other._maps or len(self._image) != len(other._image):
            return None
        places = [i for i, (own, theirs) in enumerate(zip(self._image, other._image, strict=True)) if own != theirs] or [0]
        between = slice(places[0], places[-1] + 1)
        return None if any(between.start <= index < between.stop for index, _ in self._words) else (between, self._image[between])


def _value_at(values: Value, path: str) -> int | float | str | TensorMap:
    """What is given for the C++ expression `path`; 0 for what is left out."""
    for name in path.replace("]", "").replace("[", ".").split("."):
        if isinstance(values, Mapping):
            values = values.get(name, 0)
        elif isinstance(values, Sequence) and not isinstance(values, str):
            values = values[int(name)] if int(name) < len(values) else 0
        else:
            return 0  # the whole struct is left out
    assert isinstance(values, (int, float, str, TensorMap)), path
    return values


def _checked(scalar: Scalar, expected: Scalar, path: str) -> Scalar:
    assert scalar is expected, path
    return scalar


def _check_names(layout: Struct, values: Values) -> None:
    """Every value belongs to a field."""
    fields = {field.name: field.type for field in layout.fields}
    for name, value in values.items():
        assert name in fields, f"{layout.name} has no {name}"
        kind = fields[name]
        for part in value if isinstance(value, Sequence) and not isinstance(value, str) else (value,):
            assert isinstance(part, Mapping) == isinstance(kind, Struct), f"{layout.name}.{name}"
            if isinstance(part, Mapping) and isinstance(kind, Struct):
                _check_names(kind, part)


def of_struct(layout: Struct, values: Values) -> Values:
    """Those of a call's values that one kernel's struct has fields for."""
    return {name: values[name] for name in layout.offsets if name in values}


# --- Values -------------------------------------------------------------------------------------------------------------------------------


def tensor(name: str, view: View, vectorized: bool) -> Values:
    """`TensorView` of the array of this name."""
    stride_b, stride_s, stride_h, stride_d = view.strides
    return {
        "data": name, "stride_batch": stride_b, "stride_seqlen": stride_s, "stride_head": stride_h, "stride_dim": stride_d, "vectorized": vectorized,
    }  # fmt: skip


def mapped_tensor(tensor_map: TensorMap) -> Values:
    """`MappedTensor` of the array of this map."""
    return {"map": tensor_map, "head_factor": tensor_map.head_factor, "batch_factor": tensor_map.batch_factor}


def rows(name: str, strides: Strides3) -> Values:
    """`RowView` of the array of this name."""
    stride_b, stride_h, stride_s = strides
    return {"data": name, "stride_batch": stride_b, "stride_head": stride_h, "stride_seqlen": stride_s}


def geometry(problem: Problem, num_tiles: int, section_heads: int = 1) -> Values:
    """`Geometry` of a kernel with so many tiles for one batch and head, and sections of so many of these."""
    (scale,) = struct.unpack("=f", struct.pack("=f", problem.scale))  # as the kernels hold it: what underflows there is 0
    return {
        "batch": problem.batch, "seqlen_q": problem.seqlen_q, "seqlen_kv": problem.seqlen_kv,
        "num_heads_q": problem.num_heads_q, "num_heads_kv": problem.num_heads_kv,
        "causal_offset": max(-(2**31) + 1, min(2**31 - 1, problem.causal_offset)),
        "scale": scale, "scale_log2": abs(scale) * _LOG2_E if scale else 1.0, "score_sign": math.copysign(1.0, scale) if scale else 0.0,
        "num_tiles": num_tiles, "section_heads": section_heads,
    }  # fmt: skip


def lengths(problem: Problem, packed_places: int = 0) -> Values:
    """`SequenceLengths` of a kernel that has a list of so many tiles of packed sequences, or 0."""
    return {
        "cu_seqlens_q": "cu_seqlens_q", "cu_seqlens_kv": "cu_seqlens_kv", **{f"seqlens_{which}": f"{'seqlens' if problem.num_sequences is None else 'seqused'}_{which}" for which in ("q", "kv")},
        "num_sequences": problem.num_sequences or 0, "bottom_right": problem.causal_alignment == "bottom_right",
        "packed_tiles": "packed_tiles" if packed_places else 0, "packed_places": packed_places, "reserved": 0,
    }  # fmt: skip


def feature_values(
    features: Features, scale: float, list_extents: tuple[int, int] = (1, 1), grad_attn_mask_strides: tuple[int, ...] = (0, 0, 0, 0)
) -> Values:
    """`FeatureArguments`: an address is found by the name of its field, and a number that the kernels take as it is by the name that `Features` has for it."""
    mask_strides = (0, 0, 0, 0) if features.attn_mask is None else features.attn_mask.strides
    strides: dict[str, tuple[int, ...]] = {
        "attn_mask": mask_strides,
        "grad_attn_mask": grad_attn_mask_strides,
        "pair_mask": (0, 0, 0, 0) if features.pair_mask is None else features.pair_mask.strides,
        **dict(features.array_strides),
    }
    unit = 1.0 if features.kinds.additive_mask else _LOG2_E  # of scores, as in kernels/tile/score.cuh
    values: dict[str, Value] = {
        "list_batches": list_extents[0],
        "list_heads": list_extents[1],
        "score_factor": scale * unit if features.softcap is None else scale / features.softcap,
        "softcap": (features.softcap or 0.0) * unit,
        "dropout_limit": max(math.ceil(features.dropout_p * 2.0**16) * 2**16 - 1, 0),
        "dropout_scale": 0.0 if features.dropout_p in (0.0, 1.0) else 1.0 / (1.0 - features.dropout_p),
    }
    for field in FEATURE_ARGUMENTS.fields:
        if isinstance(field.type, Struct):
            values[field.name] = _strided(field.name, field.type, strides.get(field.name, ()))
        elif field.name not in values:
            values[field.name] = field.name if field.type is WORD else getattr(features, field.name)
    return values


def _strided(name: str, view: Struct, strides: tuple[int, ...]) -> Values:
    """A view of the array of this name: its address and then its strides."""
    return {"data": name, **dict(zip(list(view.offsets)[1:], strides, strict=False))}
