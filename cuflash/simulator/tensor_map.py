"""Tensor maps for kernels that the simulator runs.

On a GPU the driver's `cuTensorMapEncodeTiled` writes the 128 bytes that TMA instructions refer to. `encode_tiled` takes the same arguments, makes
the same checks and writes the simulator's own layout (core/tensor_map.h), which a GPU cannot read. Extents, strides, boxes and steps are
ordered from the innermost dimension outwards, as CUDA has them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cuflash.errors import OptionError, UnsupportedError

NBYTES = 128
ALIGNMENT = 64

_MAGIC = b"tnsormap"
_LAYOUT = struct.Struct("<8sQ5Q4Q5H5BBBBB21x")
# Number in core/reduction.h and bytes.
_TYPES = {
    "uint8": (0, 1),
    "uint16": (1, 2),
    "uint32": (2, 4),
    "int32": (3, 4),
    "uint64": (4, 8),
    "int64": (5, 8),
    "float16": (6, 2),
    "float32": (7, 4),
    "float64": (8, 8),
    "bfloat16": (9, 2),
}
_SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}
_PROMOTIONS = ("none", "64B", "128B", "256B")
_MAX_BOX, _MAX_STEP = 256, 8


def _check(condition: bool, argument: str, got: object, expected: str, hint: str) -> None:
    if not condition:
        raise OptionError(argument, got, expected, hint)


def encode_tiled(
    address: int,
    dtype: str,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int] | None = None,
    interleave: str = "none",
    swizzle: str = "none",
    l2_promotion: str = "none",
    oob_fill: str = "zero",
) -> bytes:
    """The descriptor of a tensor that is copied box by box.

    Args:
        address: of the first element in global memory; a multiple of 16.
        dtype: uint8, uint16, uint32, int32, uint64, int64, float16, bfloat16, float32 or float64.
        dims: 1 to 5 extents in elements, innermost first.
        strides_bytes: of all dimensions but the innermost, which is contiguous; multiples of 16 below 2^40.
        box: elements of each dimension that a box spans, at most 256.
        element_strides: of each dimension, take every n-th element of the span only, n at most 8; not of the innermost. None: all elements.
        interleave: "none".
        swizzle: "none", or the span in bytes within which 16-byte chunks of shared memory are exchanged: "32B", "64B" or "128B".
        l2_promotion: "none", "64B", "128B" or "256B"; a hint that changes nothing here.
        oob_fill: "zero" or "nan": what loads put in place of elements outside.

    Returns:
        128 bytes, for a kernel parameter or for memory that is aligned to 64 bytes.

    Raises:
        OptionError: an argument that the driver would refuse.
        UnsupportedError: one that the simulator does not model.
    """
    _check(dtype in _TYPES, "dtype", repr(dtype), "one of " + ", ".join(_TYPES), "Name the type as NumPy does.")
    number, itemsize = _TYPES[dtype]
    rank = len(dims)
    _check(1 <= rank <= 5, "dims", tuple(dims), "1 to 5 extents", "Merge dimensions.")
    steps = (1,) * rank if element_strides is None else tuple(element_strides)
    for argument, values, length in (("strides_bytes", strides_bytes, rank - 1), ("box", box, rank), ("element_strides", steps, rank)):
        _check(len(values) == length, argument, tuple(values), f"{length} numbers", f"The tensor has {rank} dimensions.")
    _check(address % 16 == 0, "address", hex(address), "a multiple of 16", "Align the tensor.")
    _check(all(1 <= extent <= 1 << 32 for extent in dims), "dims", tuple(dims), "extents from 1 to 2^32", "Leave empty tensors out.")
    _check(
        all(stride % 16 == 0 and 0 <= stride < 1 << 40 for stride in strides_bytes),
        "strides_bytes",
        tuple(strides_bytes),
        "multiples of 16 below 2^40",
        "Pad the rows of the tensor.",
    )
    _check(all(1 <= extent <= _MAX_BOX for extent in box), "box", tuple(box), f"extents from 1 to {_MAX_BOX}", "Copy several boxes.")
    _check(
        all(1 <= step <= _MAX_STEP for step in steps), "element_strides", steps, f"steps from 1 to {_MAX_STEP}", "Copy elements one by one."
    )
    if interleave != "none":
        raise UnsupportedError("interleave", repr(interleave), "'none'", "The simulator has no interleaved layouts.")
    _check(l2_promotion in _PROMOTIONS, "l2_promotion", repr(l2_promotion), "one of " + ", ".join(_PROMOTIONS), "It is only a hint.")
    _check(oob_fill in ("zero", "nan"), "oob_fill", repr(oob_fill), "'zero' or 'nan'", "Elements outside are one or the other.")
    floating = "float" in dtype
    _check(oob_fill == "zero" or floating, "oob_fill", repr(oob_fill), f"'zero' for {dtype}", "Integers have no NaN.")
    if swizzle not in _SWIZZLES:
        raise UnsupportedError("swizzle", repr(swizzle), "one of " + ", ".join(_SWIZZLES), "Other patterns are not modelled.")
    row = box[0] * itemsize
    _check(
        row % 16 == 0,
        "box",
        tuple(box),
        f"a multiple of {16 // itemsize} elements in the innermost dimension",
        "Rows of a box are copied in units of 16 bytes.",
    )
    if swizzle != "none":
        span = int(swizzle[:-1])
        _check(
            row <= span, "box", tuple(box), f"at most {span // itemsize} elements in the innermost dimension", "The swizzle spans no more."
        )
        if row < span:
            raise UnsupportedError("box", tuple(box), f"{span // itemsize} elements in the innermost dimension", "Use a narrower swizzle.")

    def padded(values: Sequence[int], length: int, fill: int) -> tuple[int, ...]:
        return (*values, *(fill,) * (length - len(values)))

    steps = (1, *steps[1:])  # the innermost is not looked at
    return _LAYOUT.pack(
        _MAGIC,
        address,
        *padded(dims, 5, 1),
        *padded(strides_bytes, 4, 0),
        *padded(box, 5, 1),
        *padded(steps, 5, 1),
        rank,
        number,
        _SWIZZLES[swizzle],
        oob_fill == "nan",
    )
