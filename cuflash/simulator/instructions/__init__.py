"""How PTX instructions become records.

Contract: most instructions need nothing here: their entry in the core's table (core/table.h) names their operands. The others have a decoder, a
function of (encoder, statement, operands) that is registered for the first words of the opcode by `@decodes("ld")` in the file of their family.
"""

from cuflash.simulator.instructions import bulk_copy, collective, control, matrix, mbarrier, memory, scalar, tensor_map, wgmma
from cuflash.simulator.instructions.registry import Decoder, find_decoder, simplified

__all__ = [
    "Decoder",
    "bulk_copy",
    "collective",
    "control",
    "find_decoder",
    "matrix",
    "mbarrier",
    "memory",
    "scalar",
    "simplified",
    "tensor_map",
    "wgmma",
]
