"""`cuflash.planning.kernel_specs` is the only place that knows one kernel from another, and what it says is so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cuflash
from cuflash.jit.compiler import kernels_directory
from cuflash.planning import kernel_specs
from cuflash.planning.argument_structs import FORWARD_ARGUMENTS
from cuflash.planning.kernel_specs import KERNELS, KernelSpec

PACKAGE = Path(cuflash.__file__).parent
NAMES = {kernel.name for kernel in KERNELS}
OTHER_MEANINGS = {
    "__init__.py": {"dropout_mask", "merge_attention", "merge_attention_backward"},  # public functions
    "__main__.py": {"forward"},  # a pass
    "cli/command_options.py": {"forward"},
    "cli/explanation.py": {"forward"},
    "cli/profiling.py": {"forward"},
    "tuner/api.py": {"forward"},
    "tuner/command.py": {"forward"},
    "timing/report.py": {"forward"},
    "planning/measured_tiles.py": NAMES,  # a table by kernel
    "planning/predicted_tiles.py": NAMES,  # likewise
    "planning/predicted_backward.py": NAMES,  # likewise
    "dropout.py": {"dropout_mask"},  # memory
    "planning/argument_structs.py": {"visible_tiles", "packed_tiles"},  # fields
    "runtime/calls.py": {"forward"},
    "attention.py": {"forward"},
    "torch/warm_calls.py": {"forward"},
    "torch/last_calls.py": {"forward"},
    "torch/operators.py": {"forward"},
    "runtime/arguments.py": {"visible_tiles", "packed_tiles"},
    "planning/packed_tiles.py": {"packed_tiles"},  # memory
    "planning/description.py": {"forward"},
    "planning/planner.py": {"visible_tiles"},  # memory
    "torch/__init__.py": {"merge_attention"},  # the public function
    "torch/merging.py": {"merge_attention"},
}
"""Literals that are words of something else."""


def literals(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_other_module_names_a_kernel_or_its_file() -> None:
    files = {kernel.source for kernel in KERNELS}
    found = {
        (str(path.relative_to(PACKAGE)), text)
        for path in PACKAGE.rglob("*.py")
        if path.name != "kernel_specs.py"
        for text in literals(ast.parse(path.read_text(encoding="utf-8")))
        if text in NAMES | files or text.endswith(("_mma", "_mma.cu"))
    }
    assert {(file, text) for file, text in found if text not in OTHER_MEANINGS.get(file, set())} == set()


def test_every_file_of_a_kernel_has_one() -> None:
    assert {path.name for path in kernels_directory().glob("*.cu")} == {kernel.source for kernel in KERNELS}


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_entry_is_in_the_file(kernel: KernelSpec) -> None:
    assert f" {kernel.entry}(" in (kernels_directory() / kernel.source).read_text(encoding="utf-8")


def test_names_are_unique() -> None:
    assert len(NAMES) == len(KERNELS)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.is_tiled], ids=str)
def test_products_are_those_of_the_formulas(kernel: KernelSpec) -> None:
    """S and dP for what a kernel recomputes; each output is one product more, over the operands that it needs."""
    columns = {
        "S": (0,),
        "dP": (1,),
        "O": (1,),
        "dV": (1,),
        "dQ": (0,),
        "dK": (0,),
        "S_dot": (0, 0),
        "O_dot": (1, 1),
    }  # tangents have two terms
    over = [product for name in (*kernel.scores, *kernel.outputs) for product in columns[name]]
    assert kernel.products == (over.count(0), over.count(1))
    needs_dp = {"dQ", "dK"} & set(kernel.outputs) or kernel.sums_scores
    assert ("dP" in kernel.scores) == bool(needs_dp)
    operands = {*kernel.stationary, *kernel.streamed}
    assert {"query", "key"} <= operands
    assert not ("dP" in kernel.scores and not {"value", "grad_out"} <= operands)
    assert ({"key", "value"} & set(kernel.stationary) != set()) == kernel.owns_keys
    assert not set(kernel.stationary) & set(kernel.streamed)


def test_a_kernel_is_known_by_its_name_and_its_implementation() -> None:
    same = KernelSpec("forward", "another.cu", FORWARD_ARGUMENTS, "mma")
    assert same == kernel_specs.FORWARD
    assert hash(same) == hash(kernel_specs.FORWARD)
    assert KernelSpec("forward", "another.cu", FORWARD_ARGUMENTS) != kernel_specs.FORWARD
