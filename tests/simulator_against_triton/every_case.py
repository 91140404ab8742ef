"""All cases of this directory."""

from __future__ import annotations

import functools

from attentions import attention_cases
from cases import Case
from mapped_products import mapped_product_cases
from products import product_cases
from rows import row_cases


@functools.cache
def every_case() -> tuple[Case, ...]:
    """Each once; names are unique."""
    cases = (*product_cases(), *mapped_product_cases(), *attention_cases(), *row_cases())
    assert len({str(case) for case in cases}) == len(cases)
    return cases
