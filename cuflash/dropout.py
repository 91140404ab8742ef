"""The mask that dropout draws, as an array: `dropout_mask` runs the generator of the attention kernels in a kernel of its own."""

from __future__ import annotations

import operator
from math import ceil, prod
from typing import Any

from cuflash.arrays.borrowing import borrow
from cuflash.arrays.descriptions import describe, has_attribute
from cuflash.arrays.signatures import pointer
from cuflash.errors import OptionError, ShapeError
from cuflash.hardware import device
from cuflash.planning.codegen import config_text
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import KernelPlan, LaunchShape
from cuflash.planning.kernel_specs import DROPOUT_MASK
from cuflash.planning.planner import MAX_GRID
from cuflash.problem.features import Extents, Features, check_dropout_p, check_dropout_seed, check_dropout_state, drawn_from
from cuflash.problem.other_names import explains_keywords
from cuflash.problem.problem import MAX_EXTENT
from cuflash.problem.tile import Tile
from cuflash.runtime import arguments, launch

_ROWS = 16  # queries of a block, as in kernels/dropout_mask.cu


@explains_keywords
def dropout_mask(shape: tuple[int, int, int, int], dropout_p: float, dropout_seed: Any, *, like: Any) -> Any:
    """Draw the mask that `scaled_dot_product_attention` applies to the probabilities for the same seed: bit for bit, whatever its tiles.

    Args:
        shape: `(batch, num_heads_q, seqlen_q, seqlen_kv)` of the probabilities.
        dropout_p: how likely a probability is dropped, 0 to 1; rounded up to a multiple of 2**-16.
        dropout_seed: an int, a pair `(seed, offset)`, or an array of two (u)int64 of the kind and on the device of `like`.
        like: an array that says of which kind and on which device the result is, such as the query.

    Returns:
        A boolean array of that shape in memory of its own: True where a probability is kept, and then multiplied by 1 / (1 - dropout_p).

    Raises:
        ShapeError, OptionError, DTypeError, DeviceError: an argument that cannot be used.

    Source: Salmon et al. 2011, Philox 4x32-7, doi 10.1145/2063384.2063405, counted by the coordinates of the element (kernels/tile/dropout.cuh).
    """
    dropout_p = check_dropout_p(dropout_p)
    if dropout_p > 0.0:
        check_dropout_seed(dropout_p, dropout_seed)
    extents = tuple(operator.index(n) if has_attribute(n, "__index__") else -1 for n in shape) if isinstance(shape, (tuple, list)) else ()
    if len(extents) != 4 or not all(0 <= extent <= MAX_EXTENT for extent in extents):
        hint = "Pass the shape of the probabilities, such as (2, 8, 512, 512)."
        raise ShapeError("shape", describe(shape) if not extents else str(extents), "(batch, num_heads_q, seqlen_q, seqlen_kv)", hint)
    array = borrow(like, "like")
    addresses, state = drawn_from(dropout_p, dropout_seed)
    if state is not None:
        seed = borrow(state, "dropout_seed")
        check_dropout_state(seed, Extents(*extents, array))
        addresses["dropout_state"] = seed.pointer

    kept = array.framework.empty(extents, "bool", array)
    if prod(extents) == 0:
        return array.framework.finish(kept)
    if dropout_p == 0.0:
        kept[...] = True
        return array.framework.finish(kept)

    on = device.of_memory(*array.device)
    batch, heads, seqlen_q, seqlen_kv = extents
    num_tiles = ceil(seqlen_q / _ROWS)
    shape_of_launch = LaunchShape(num_tiles * heads * batch, 32 * DROPOUT_MASK.num_warps, 0)
    if shape_of_launch.num_blocks > MAX_GRID:
        raise OptionError("shape", str(extents), "fewer than 2**31 tiles of 16 queries over batch and heads", "Split the batch.")
    warps = DROPOUT_MASK.num_warps
    config = config_text("float32", {"CAPABILITY": on.capability, "NUM_WARPS": warps})
    kernel = KernelPlan(KernelCase(DROPOUT_MASK, "float32", 0), Tile(_ROWS, 1, warps, 1), config, shape_of_launch, num_tiles)
    addresses["dropout_mask"] = pointer(kept)
    values: arguments.Values = {
        "kept": "dropout_mask",
        "geometry": {
            "batch": batch, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv, "num_heads_q": heads, "num_heads_kv": heads,
            "scale": 1.0, "scale_log2": 1.0, "score_sign": 1.0, "num_tiles": num_tiles,
        },
        "features": arguments.feature_values(Features(dropout_p=dropout_p), 1.0),
    }  # fmt: skip
    struct = arguments.Arguments(DROPOUT_MASK.arguments, values, addresses)
    stream = array.framework.current_stream(on.index) if on.kind == "gpu" else 0
    memory = {"dropout_mask": (0, prod(extents)), "dropout_state": (0, 16)}
    buffers = () if on.kind == "gpu" else launch.simulated_memory(memory, addresses, {"dropout_mask"})
    launch.executable(kernel, on).launch(kernel.shape, struct.fill(addresses), stream, buffers)
    return array.framework.finish(kept)
