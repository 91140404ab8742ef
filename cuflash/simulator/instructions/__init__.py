"""How PTX instructions become records.

Contract: most instructions need nothing here: their entry in the core's table (core/table.h) names their operands. The others have a decoder, a
function of (encoder, statement, operands) that is registered for the first part of the opcode by `@decodes("ld")` in the file of their family.
"""

from cuflash.simulator.instructions import collective, control, matrix, memory, scalar, wgmma
from cuflash.simulator.instructions.registry import DECODERS, Decoder, simplified

__all__ = ["DECODERS", "Decoder", "collective", "control", "matrix", "memory", "scalar", "simplified", "wgmma"]
