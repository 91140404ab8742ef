"""What a statement of a kernel is for, as the pictures of pipelines name it: a product, a copy, an addition, or a wait."""

from __future__ import annotations

import re

ADDITIONS, TURNS = "additions in global memory", "turns in global memory"
_BECOME = {"P": "S", "dS": "dP"}
"""Accumulators that are called by what they become: what the product along the head makes of them."""
_ADDED_TO = {"product": "O"}
"""Sums of one tile, and to what they are added."""

_SCORES = (
    r"multiply_rows\((?P<c>\w+), (?P<a>\w+), \w+, (?P<b>\w+)\)",
    r"gemm_rows<.*?>\((?P<c>\w+), \w*Mma::OperandA<\w+>\((?P<a>\w+).*?Mma::OperandB<\w+>\((?P<b>\w+)",
    r"issue_rows(?:_of_terms)?<.*?>\((?P<c>\w+), (?P<a>\w+), (?:\w+::descriptor\(shared\.)?(?P<b>\w+)",
)
_SUMS = (
    r"multiply_accumulator\((?P<c>\w+), (?P<a>\w+), (?P<b>\w+)\)",
    r"gemm_(?:by_rows|accumulator)<.*?>\((?P<c>\w+), (?:\w*Mma::OperandA<\w+>\()?(?P<a>\w+).*?Mma::OperandBByRows<\w+>\((?P<b>\w+)",
    r"issue_(?:accumulator|accumulator_of_terms|shared)<.*?>\((?P<c>\w+), (?P<a>\w+), (?:\w+::descriptor\(shared\.)?(?P<b>\w+)",
)
_QUERY_GRADIENTS = (
    r"gemm_columns<.*?>\((?P<c>\w+), \S+?\((?P<a>\w+)_smem,.*?\((?P<b>\w+)_smem,",
    r"from_shared_by_rows\((?P<c>\w+)(?:\[0\])?, Warpgroup(?P<b>\w+)::rows\(.*GradScores::columns\((?P<a>\w+),",
)
_COPIES = (
    r"Ring\w+::load\(shared\.(\w+)\(",
    r"Ring(\w+)::load\(tile,",
    r"StatisticsOfColumns\(shared\.(\w+)\(.*\)\.issue",
    r"keys\.copy<Warp(\w+), ",
    r"copier\.copy_([KV])<",
    r"(\w+?)(?:_loader\.issue|_of\(step\)\.issue|\.load)\(",
)
_WAIT = re.compile(r"wait_for_tiles|begin_step|end_step|cp_async_wait_group|wait_full|wait_empty|wgmma_wait|mbarrier_wait")
WAIT = "a wait"


def statements(source: str) -> list[str]:
    """For each line of a file, without comments, the whole statement that it belongs to; one that ends in the middle of a line is that line."""
    lines = [line.partition("//")[0].strip() for line in source.splitlines()]
    found: list[str] = []
    while len(found) < len(lines):
        first = len(found)
        last = next((i for i in range(first, len(lines)) if lines[i].endswith((";", "{", "}")) or not lines[i]), len(lines) - 1)
        found += [" ".join(lines[first : last + 1])] * (last + 1 - first)
    return found


def operation_of(statement: str) -> str | None:
    """What a statement of a kernel's loop does, in the names of the code; None where it is neither a product nor a copy nor a wait."""
    for patterns, form in ((_SCORES, "{c} = {a} {b}ᵀ"), (_SUMS, "{c} += {a} {b}"), (_QUERY_GRADIENTS, "{c} = {a} {b}")):
        for match in filter(None, (re.search(pattern, statement) for pattern in patterns)):
            names = {key: re.sub(r"_(smem|descriptor|operand)$", "", name) for key, name in match.groupdict().items()}
            if patterns is _SCORES:
                names["c"] = _BECOME.get(names["c"], names["c"])
            if patterns is _SUMS:
                names["c"] = _ADDED_TO.get(names["c"], names["c"])
            return form.format(**names)
    if re.search(r"add_to_sums\(|add_fragment\(", statement):
        return ADDITIONS
    if re.search(r"\b(wait_for_turn|pass_turn_on)\(", statement):
        return TURNS
    copied = next(filter(None, (re.search(pattern, statement) for pattern in _COPIES)), None)
    if copied is not None:
        return f"copy of {copied[1]}"
    return WAIT if _WAIT.search(statement) else None


def is_product(label: str) -> bool:
    return "=" in label
