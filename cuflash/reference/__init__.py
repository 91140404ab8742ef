"""Naive attention and its gradients in float64: the judge. Nothing is shared with what it judges."""

from cuflash.reference.comparison import (
    EPSILON,
    Float64,
    Precision,
    Round,
    compare,
    exact,
    from_bfloat16_bits,
    round_to,
    rounding_to,
    to_bfloat16_bits,
    to_float64,
    to_numpy,
)
from cuflash.reference.formulas import (
    Gradients,
    attention,
    attention_backward,
    attention_naive,
    attention_naive_backward,
)
from cuflash.reference.packed import options_of_sequence, varlen_attention, varlen_attention_backward
from cuflash.reference.tangents import attention_jvp

__all__ = [
    "EPSILON",
    "Float64",
    "Gradients",
    "Precision",
    "Round",
    "attention",
    "attention_backward",
    "attention_jvp",
    "attention_naive",
    "attention_naive_backward",
    "compare",
    "exact",
    "from_bfloat16_bits",
    "options_of_sequence",
    "round_to",
    "rounding_to",
    "to_bfloat16_bits",
    "to_float64",
    "to_numpy",
    "varlen_attention",
    "varlen_attention_backward",
]
