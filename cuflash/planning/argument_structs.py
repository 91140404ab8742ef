"""The one by-value parameter of each kernel, as a list of typed fields: the structs of kernels/*arguments.cuh, field by field in their order.

Sizes, offsets and padding follow from the list as C++ has them, and bytes are written by it (`arguments.py`); tests/test_argument_structs.py lets the compiler
assert every one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from cuflash.problem.features import FEATURE_ARRAYS


@dataclass(frozen=True)
class Scalar:
    """A type without fields.

    Attributes:
        format: as the module `struct` has it.
        size: bytes.
        alignment: its address is a multiple of this.
    """

    format: str
    size: int
    alignment: int


WORD = Scalar("Q", 8, 8)
"""An address, or another 64-bit word that is written for each launch."""
INT64 = Scalar("q", 8, 8)
INT = Scalar("i", 4, 4)
UINT32 = Scalar("I", 4, 4)
FLOAT = Scalar("f", 4, 4)
TENSOR_MAP = Scalar("128s", 128, 64)
"""What the TMA unit knows an array by: opaque, and another one for each address (cuflash/runtime/tensor_maps.py)."""


@dataclass(frozen=True)
class Field:
    """A member of a struct; with `count`, an array."""

    name: str
    type: Scalar | Struct
    count: int | None = None


@dataclass(frozen=True)
class Struct:
    """A struct of kernels/.

    Attributes:
        name: in C++.
        fields: in order.
    """

    name: str
    fields: tuple[Field, ...]

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def alignment(self) -> int:
        """The largest of its fields."""
        return max(field.type.alignment for field in self.fields)

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where each field begins, in bytes."""
        return self._layout[0]

    @functools.cached_property
    def size(self) -> int:
        """In bytes, padding included."""
        return self._layout[1]

    @functools.cached_property
    def _layout(self) -> tuple[dict[str, int], int]:
        offsets, end = {}, 0
        for field in self.fields:
            offsets[field.name] = _round_up(end, field.type.alignment)
            end = offsets[field.name] + (field.count or 1) * field.type.size
        return offsets, _round_up(end, self.alignment)

    def scalars(self, path: str = "", at: int = 0) -> Iterator[tuple[str, int, Scalar]]:
        """Each scalar within: the C++ expression for it, such as "listed[3].out.data", its offset, and its type."""
        for field in self.fields:
            for i in range(field.count or 1):
                name = path + field.name + ("" if field.count is None else f"[{i}]")
                offset = at + self.offsets[field.name] + i * field.type.size
                if isinstance(field.type, Scalar):
                    yield name, offset, field.type
                else:
                    yield from field.type.scalars(f"{name}.", offset)


def _round_up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _struct(name: str, *fields: tuple[str, Scalar | Struct] | tuple[str, Scalar | Struct, int]) -> Struct:
    return Struct(name, tuple(Field(*field) for field in fields))


# --- kernels/arguments.cuh ----------------------------------------------------------------------------------------------------------------

TENSOR_VIEW = _struct(
    "TensorView",
    ("data", WORD), ("stride_batch", INT64), ("stride_seqlen", INT64), ("stride_head", INT64), ("stride_dim", INT64), ("vectorized", INT), ("reserved", INT),
)  # fmt: skip
ROW_VIEW = _struct("RowView", ("data", WORD), ("stride_batch", INT64), ("stride_head", INT64), ("stride_seqlen", INT64))
GEOMETRY = _struct(
    "Geometry",
    ("batch", INT), ("seqlen_q", INT), ("seqlen_kv", INT), ("num_heads_q", INT), ("num_heads_kv", INT), ("causal_offset", INT),
    ("scale", FLOAT), ("scale_log2", FLOAT), ("score_sign", FLOAT), ("num_tiles", INT),
    ("section_heads", INT),
)  # fmt: skip
SEQUENCE_LENGTHS = _struct(
    "SequenceLengths",
    ("cu_seqlens_q", WORD), ("cu_seqlens_kv", WORD), ("seqlens_kv", WORD), ("seqlens_q", WORD), ("num_sequences", INT), ("bottom_right", INT),
    ("packed_tiles", WORD), ("packed_places", INT), ("reserved", INT),
)  # fmt: skip

# --- kernels/feature_arguments.cuh --------------------------------------------------------------------------------------------------------

MASK_VIEW = _struct(
    "MaskView", ("data", WORD), ("stride_batch", INT64), ("stride_head", INT64), ("stride_query", INT64), ("stride_key", INT64)
)
HEAD_VIEW = _struct("HeadView", ("data", WORD), ("stride_batch", INT64), ("stride_head", INT64))
SEQUENCE_VIEW = _struct("SequenceView", ("data", WORD), ("stride_batch", INT64), ("stride_position", INT64))


def _feature_arrays() -> Iterator[tuple[str, Scalar | Struct]]:
    """The fields of `FEATURE_ARRAYS`, each followed by the address of its gradient if it has one."""
    for name, array in FEATURE_ARRAYS.items():
        yield name, HEAD_VIEW if any("h" in axes for axes in array.axes) else SEQUENCE_VIEW
        if array.has_gradient:
            yield f"grad_{name}", WORD


FEATURE_ARGUMENTS = _struct(
    "FeatureArguments",
    ("attn_mask", MASK_VIEW), ("grad_attn_mask", MASK_VIEW), *_feature_arrays(), ("visible_tiles", WORD),
    ("dropout_state", WORD), ("dropout_seed", WORD), ("dropout_offset", WORD), ("list_batches", INT), ("list_heads", INT),
    ("window_low", INT), ("window_high", INT), ("score_factor", FLOAT), ("softcap", FLOAT), ("dropout_limit", UINT32), ("dropout_scale", FLOAT),
    ("log2_sums", WORD), ("pair_mask", MASK_VIEW),
)  # fmt: skip

CACHE_ARGUMENTS = _struct(
    "CacheArguments",
    ("page_table", WORD), ("batch_indices", WORD), ("leftpad", WORD), ("stride_page_table", INT64), ("page_size", INT), ("num_rows", INT),
    ("new_keys", INT), ("reserved", INT),
)  # fmt: skip
CACHE_SCALES = _struct("CacheScales", ("key", HEAD_VIEW), ("value", HEAD_VIEW))
ROTARY_ARGUMENTS = _struct(
    "RotaryArguments",
    ("cos", WORD), ("sin", WORD), ("stride_cos", INT64), ("stride_sin", INT64), ("dim", INT), ("rows", INT), ("interleaved", INT), ("queries_advance", INT),
)  # fmt: skip
MAPPED_TENSOR = _struct("MappedTensor", ("map", TENSOR_MAP), ("head_factor", INT), ("batch_factor", INT))

# --- Parameters of kernels ----------------------------------------------------------------------------------------------------------------

FORWARD_ARGUMENTS = _struct(
    "ForwardArguments",
    ("query", TENSOR_VIEW), ("key", TENSOR_VIEW), ("value", TENSOR_VIEW), ("out", TENSOR_VIEW), ("lse", ROW_VIEW),
    ("geometry", GEOMETRY), ("lengths", SEQUENCE_LENGTHS), ("features", FEATURE_ARGUMENTS),
)  # fmt: skip
FORWARD_SPLIT_ARGUMENTS = _struct(
    "ForwardSplitArguments",
    ("query", TENSOR_VIEW), ("key", TENSOR_VIEW), ("value", TENSOR_VIEW), ("out", TENSOR_VIEW), ("lse", ROW_VIEW),
    ("partial_out", WORD), ("partial_lse", WORD), ("geometry", GEOMETRY), ("lengths", SEQUENCE_LENGTHS), ("features", FEATURE_ARGUMENTS),
    ("cache", CACHE_ARGUMENTS), ("num_splits", INT), ("split_tiles", INT), ("scales", CACHE_SCALES),
    ("part_table", WORD), ("begin_tiles", INT), ("part_tiles", FLOAT), ("new_key", TENSOR_VIEW), ("new_value", TENSOR_VIEW), ("rotary", ROTARY_ARGUMENTS),
)  # fmt: skip
CACHE_APPEND_ARGUMENTS = _struct(
    "CacheAppendArguments",
    ("given_query", TENSOR_VIEW), ("rotated_query", TENSOR_VIEW), ("new_key", TENSOR_VIEW), ("new_value", TENSOR_VIEW), ("key", TENSOR_VIEW),
    ("value", TENSOR_VIEW), ("geometry", GEOMETRY), ("lengths", SEQUENCE_LENGTHS), ("cache", CACHE_ARGUMENTS), ("head_dim", INT), ("head_dim_v", INT),
    ("scales", CACHE_SCALES), ("rotary", ROTARY_ARGUMENTS),
)  # fmt: skip
KEY_SHARE_ARGUMENTS = _struct("KeyShareArguments", ("parts", WORD), ("arrivals", WORD), ("first_work", INT), ("length", INT))
FORWARD_WGMMA_ARGUMENTS = _struct(
    "ForwardWgmmaArguments",
    ("query", MAPPED_TENSOR), ("key", MAPPED_TENSOR), ("value", MAPPED_TENSOR), ("out", TENSOR_VIEW), ("lse", ROW_VIEW), ("geometry", GEOMETRY),
    ("lengths", SEQUENCE_LENGTHS), ("features", FEATURE_ARGUMENTS), ("next_work", WORD), ("num_work", INT),
    ("attn_mask", MAPPED_TENSOR), ("shares", KEY_SHARE_ARGUMENTS), ("mapped_out", MAPPED_TENSOR),
)  # fmt: skip
OPERAND_TERMS_ARGUMENTS = _struct(
    "OperandTermsArguments",
    ("query", TENSOR_VIEW), ("key", TENSOR_VIEW), ("value", TENSOR_VIEW), ("query_terms", WORD), ("key_terms", WORD), ("value_terms", WORD),
    ("geometry", GEOMETRY),
)  # fmt: skip
FORWARD_WGMMA_WIDE_ARGUMENTS = _struct(
    "ForwardWgmmaWideArguments",
    ("key", MAPPED_TENSOR), ("value", MAPPED_TENSOR), ("query", TENSOR_VIEW), ("out", TENSOR_VIEW), ("lse", ROW_VIEW), ("partial_out", WORD),
    ("partial_lse", WORD), ("geometry", GEOMETRY), ("lengths", SEQUENCE_LENGTHS), ("features", FEATURE_ARGUMENTS), ("cache", CACHE_ARGUMENTS),
    ("num_splits", INT), ("split_tiles", INT),
)  # fmt: skip
QUERY_SPLITS = _struct(
    "QuerySplits", ("key_parts", WORD), ("num_splits", INT), ("num_chains", INT), ("chain_tiles", INT), ("chain_slots", INT)
)
BACKWARD_ARGUMENTS = _struct(
    "BackwardArguments",
    ("query", TENSOR_VIEW), ("key", TENSOR_VIEW), ("value", TENSOR_VIEW), ("out", TENSOR_VIEW), ("grad_out", TENSOR_VIEW),
    ("grad_query", TENSOR_VIEW), ("grad_key", TENSOR_VIEW), ("grad_value", TENSOR_VIEW), ("lse", ROW_VIEW), ("grad_lse", ROW_VIEW),
    ("row_statistics", WORD), ("geometry", GEOMETRY), ("group_batch", INT), ("group_heads", INT),
    ("lengths", SEQUENCE_LENGTHS), ("features", FEATURE_ARGUMENTS),
    ("query_sums", WORD), ("turns", WORD), ("num_turns", INT), ("splits", QUERY_SPLITS),
)  # fmt: skip
BACKWARD_WGMMA_ARGUMENTS = _struct(
    "BackwardWgmmaArguments",
    ("query", MAPPED_TENSOR), ("key", MAPPED_TENSOR), ("value", MAPPED_TENSOR), ("grad_out", MAPPED_TENSOR), ("grad_key", TENSOR_VIEW),
    ("grad_value", TENSOR_VIEW), ("row_statistics", WORD), ("geometry", GEOMETRY), ("group_batch", INT), ("group_heads", INT),
    ("lengths", SEQUENCE_LENGTHS), ("features", FEATURE_ARGUMENTS), ("query_sums", WORD), ("turns", WORD), ("grad_query", TENSOR_VIEW),
    ("splits", QUERY_SPLITS),
)  # fmt: skip
FORWARD_JVP_ARGUMENTS = _struct(
    "ForwardJvpArguments",
    ("query", TENSOR_VIEW), ("key", TENSOR_VIEW), ("value", TENSOR_VIEW), ("out", TENSOR_VIEW),
    ("query_dot", TENSOR_VIEW), ("key_dot", TENSOR_VIEW), ("value_dot", TENSOR_VIEW), ("out_dot", TENSOR_VIEW), ("lse", ROW_VIEW), ("lse_dot", ROW_VIEW),
    ("sinks_dot", HEAD_VIEW), ("row_statistics", WORD), ("geometry", GEOMETRY), ("lengths", SEQUENCE_LENGTHS), ("features", FEATURE_ARGUMENTS),
)  # fmt: skip
VISIBLE_TILES_ARGUMENTS = _struct(
    "VisibleTilesArguments", ("geometry", GEOMETRY), ("lengths", SEQUENCE_LENGTHS), ("features", FEATURE_ARGUMENTS)
)
PACKED_TILES_ARGUMENTS = _struct(
    "PackedTilesArguments",
    ("geometry", GEOMETRY),
    ("lengths", SEQUENCE_LENGTHS),
)
DROPOUT_MASK_ARGUMENTS = _struct("DropoutMaskArguments", ("kept", WORD), ("geometry", GEOMETRY), ("features", FEATURE_ARGUMENTS))

# --- kernels/merge_arguments.cuh ----------------------------------------------------------------------------------------------------------

LISTED_PARTS = 16
MERGE_PART = _struct("MergePart", ("out", TENSOR_VIEW), ("lse", ROW_VIEW))
MERGE_PARTS = _struct(
    "MergeParts",
    ("table", WORD), ("stride_part_out", INT64), ("stride_part_lse", INT64), ("num_parts", INT), ("first", INT), ("one_array", INT), ("reserved", INT),
    ("listed", MERGE_PART, LISTED_PARTS),
)  # fmt: skip
MERGE_STREAM = _struct(
    "MergeStream", ("part_table", WORD), ("tile_q", INT), ("num_tiles", INT), ("group", INT), ("num_sequences", INT), ("cu_seqlens_q", WORD)
)
MERGE_TABLE_ARGUMENTS = _struct("MergeTableArguments", ("parts", MERGE_PARTS))
MERGE_ARGUMENTS = _struct(
    "MergeArguments",
    ("out", TENSOR_VIEW), ("grad_out", TENSOR_VIEW), ("grad_outs", TENSOR_VIEW), ("lse", ROW_VIEW), ("grad_lse", ROW_VIEW), ("grad_lses", ROW_VIEW),
    ("stride_grad_outs", INT64), ("stride_grad_lses", INT64), ("seqlen_q", INT), ("num_heads", INT), ("head_dim", INT), ("num_tiles", INT), ("lanes", INT),
    ("groups", INT), ("parts", MERGE_PARTS), ("stream", MERGE_STREAM),
)  # fmt: skip
