"""Fill the tables of docs/features.md and docs/coming-from.md from the code: what each argument says of itself, what a plan does with it, what bad calls
raise, what arguments are called elsewhere.

python docs/generate_tables.py          # rewrites the pages; tests/test_docs.py compares
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

import cuflash
from cuflash.cli.sample_features import ALONE, others_than
from cuflash.cli.samples import Sample
from cuflash.errors import ArgumentError
from cuflash.hardware import device
from cuflash.planning.kernel_specs import BACKWARD_DKDV, BACKWARD_DQ, BACKWARD_DQ_CONVERT, BACKWARD_FUSED
from cuflash.planning.planner import make_plan
from cuflash.problem.checks import make_problem
from cuflash.problem.operands import Operands, borrowed
from cuflash.problem.options import Options
from cuflash.problem.other_names import OTHER_NAMES

DOCS = Path(__file__).resolve().parent
PAGES = (DOCS / "features.md", DOCS / "coming-from.md")

B, H, S, D = 2, 4, 256, 64


def zeros(*shape: int, dtype: str = "float32") -> Any:
    return numpy.zeros(shape, dtype)


EXAMPLES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "boolean mask": (("attn_mask",), {"attn_mask": zeros(S, S, dtype="bool")}),
    "additive mask": (("attn_mask", "need_attn_mask_grad"), {"attn_mask": zeros(S, S), "need_attn_mask_grad": True}),
    "dropout": (("dropout_p", "dropout_seed"), {"dropout_p": 0.1, "dropout_seed": 1}),
    "window": (("window",), {"window": (63, 0)}),
    "softcap": (("softcap",), {"softcap": 30.0}),
    "ALiBi": (("alibi_slopes",), {"alibi_slopes": zeros(H)}),
    "sinks": (("sinks",), {"sinks": zeros(H)}),
    "segments": (
        ("segment_ids_q", "segment_ids_kv"),
        {"segment_ids_q": zeros(B, S, dtype="int32"), "segment_ids_kv": zeros(B, S, dtype="int32")},
    ),
    "prefix": (("prefix_lengths", "is_causal"), {"prefix_lengths": zeros(B, dtype="int32"), "is_causal": True}),
    "key lengths": (("seqlens_kv",), {"seqlens_kv": zeros(B, dtype="int32")}),
    "query lengths": (("seqlens_q",), {"seqlens_q": zeros(B, dtype="int32")}),
}
for name in others_than("boolean_mask", "additive_mask", "dropout", "window", "softcap", "alibi", "sinks", "segments", "prefix"):
    example = ALONE[name].arguments(Sample(B, S, S, H))
    EXAMPLES[name] = (tuple(example), example)
"""Feature -> its arguments, and a call that uses it."""

BAD_CALLS: list[dict[str, Any]] = [
    {"attn_mask": zeros(S, S, dtype="int32")},
    {"attn_mask": zeros(B, S)},
    {"attn_mask": zeros(S, S, dtype="bool"), "need_attn_mask_grad": True},
    {"need_attn_mask_grad": True},
    {"dropout_p": 1.5},
    {"dropout_p": 0.1},
    {"dropout_p": 0.1, "dropout_seed": 1.5},
    {"dropout_p": 0.1, "dropout_seed": 2**64},
    {"dropout_p": 0.1, "dropout_seed": zeros(2, dtype="int32")},
    {"dropout_p": 0.1, "dropout_seed": zeros(3, dtype="int64")},
    {"window": 128},
    {"window": (128, -2)},
    {"softcap": -1.0},
    {"softcap": 1e-36},
    {"alibi_slopes": zeros(H + 1)},
    {"sinks": zeros(H, dtype="float16")},
    {"segment_ids_q": zeros(B, S, dtype="int32")},
    {"segment_ids_q": zeros(B, S, dtype="int64"), "segment_ids_kv": zeros(B, S, dtype="int64")},
    {"prefix_lengths": zeros(B, dtype="int32")},
    {"seqlens_kv": zeros(B, dtype="int64")},
    {"seqlens_kv": zeros(B + 1, dtype="int32")},
    {"cu_seqlens_q": zeros(B + 1, dtype="int32"), "cu_seqlens_kv": zeros(B + 1, dtype="int32"), "attn_mask": zeros(S, S)},
    {"cu_seqlens_q": zeros(B + 1, dtype="int32"), "cu_seqlens_kv": zeros(B, dtype="int32")},
    {"cu_seqlens_q": zeros(B + 1, dtype="int32"), "cu_seqlens_kv": zeros(B + 1, dtype="int32"), "max_seqlen_q": -1},
    {"cu_seqlens_q": zeros(B + 1, dtype="int32"), "cu_seqlens_kv": zeros(B + 1, dtype="int32"), "max_seqlen_q": 256.0},
]


def plan_of(options: dict[str, Any], backward: bool) -> Any:
    """The plan of a call of the shape above; with `cu_seqlens_q` its sequences are packed."""
    varlen = "cu_seqlens_q" in options
    x = numpy.zeros((B * S, H, D) if varlen else (B, S, H, D), "float16")
    operands = Operands(x, x, x, **{name: value for name, value in options.items() if name in Operands._fields})
    others = Options(varlen=varlen, **{name: value for name, value in options.items() if name in Options._fields})
    return make_plan(make_problem(borrowed(operands, others), others), device.of_arch("sm_80", "gpu"), backward=backward)


def documented_arguments() -> dict[str, str]:
    """Argument -> its sentence in the docstrings of the public calls."""
    found: dict[str, str] = {}
    for call in (cuflash.scaled_dot_product_attention_backward, cuflash.scaled_dot_product_attention):
        section = re.search(r"Args:\n(.*?)\n    (?:Other|Returns)", call.__doc__ or "", re.S)
        assert section is not None
        for names, text in re.findall(r"^        (\w[\w, ]*): (.*?)(?=^        \w|\Z)", section[1] + "\n", re.S | re.M):
            for name in names.split(", "):
                found[name] = " ".join(text.split())
    return found


def feature_table() -> list[str]:
    arguments = documented_arguments()
    rows = ["| feature | arguments | kernels besides the usual ones | tiles of the forward pass |", "|---|---|---|---|"]
    usual = {kernel.name for backward in (False, True) for kernel in plan_of({}, backward).kernels}
    usual |= {kernel.name for kernel in (BACKWARD_FUSED, BACKWARD_DQ_CONVERT, BACKWARD_DKDV, BACKWARD_DQ)}  # both ways to the gradients
    for feature, (names, options) in EXAMPLES.items():
        by_text: dict[str, list[str]] = {}
        for name in names:
            if name != "is_causal":
                by_text.setdefault(arguments[name], []).append(f"`{name}`")
        said = "<br>".join(f"{', '.join(named)}: {text}" for text, named in by_text.items())
        added = [kernel.name for backward in (False, True) for kernel in plan_of(options, backward).kernels if kernel.name not in usual]
        kernels = ", ".join(f"`{name}`" for name in dict.fromkeys(added)) or "none"
        described = plan_of(options, backward=False).describe()
        visits = re.search(r"forward visits (.*?)(?:,|$)", described, re.M)
        rows.append(_row(feature, said, kernels, visits[1] if visits else "all"))
    return rows


def error_table() -> list[str]:
    rows = ["| call | raises | got | expected | way out |", "|---|---|---|---|---|"]
    for options in BAD_CALLS:
        try:
            plan_of(options, backward=True)
        except ArgumentError as error:
            call = ", ".join(f"{name}={_shown(option)}" for name, option in options.items())
            rows.append(_row(f"`{call}`", f"`{type(error).__name__}` of `{error.argument}`", error.got, error.expected, error.hint))
        else:
            raise AssertionError(f"{options} is not a bad call")
    return rows


def name_table() -> list[str]:
    rows = ["| there | in | here | what to mind |", "|---|---|---|---|"]
    for row in OTHER_NAMES:
        names, ours = (", ".join(f"`{name}`" for name in group) for group in (row.names, row.ours))
        rows.append(_row(names, row.libraries, ours or "none", row.difference))
    return rows


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(option: Any) -> str:
    return f"{option.dtype}{list(option.shape)}" if isinstance(option, numpy.ndarray) else repr(option)


TABLES = {"features": feature_table, "errors": error_table, "names": name_table}


def filled(page: str) -> str:
    """The page with its generated tables made anew."""

    def table(match: re.Match[str]) -> str:
        return "\n".join([match[1], *TABLES[match[2]](), match[3]])

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end of \2 -->)", table, page, flags=re.S)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
