"""What a public function is given arrives, under its own name and with its own type, where kernels are chosen: no argument is mistaken for another."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest

import cuflash
from cuflash import attention
from cuflash.cli.sample_features import ALONE
from cuflash.cli.samples import Sample
from cuflash.planning import planner
from cuflash.problem import checks, features, options, sequences
from cuflash.problem.features import FeatureSet
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options
from cuflash.problem.tangents import Tangents
from cuflash.runtime import calls, jvp_calls

FUNCTIONS = {
    "scaled_dot_product_attention": "forward",
    "scaled_dot_product_attention_backward": "backward",
    "plan": "plan",
    "varlen_attention": "forward",
    "varlen_attention_backward": "backward",
    "varlen_plan": "plan",
    "scaled_dot_product_attention_jvp": "jvp",
    "varlen_attention_jvp": "jvp",
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_argument_arrives_in_the_field_of_its_name(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: dict[str, Any] = {}

    def take(operands: Operands, options: Options, backward: object = False, jvp: object = False) -> None:
        arrived.update(operands._asdict(), **options._asdict(), backward=backward, jvp=jvp)

    def take_tangents(tangents: Tangents, operands: Operands, options: Options) -> None:
        arrived.update(tangents._asdict(), **operands._asdict(), **options._asdict())

    if FUNCTIONS[function] == "jvp":
        monkeypatch.setattr(jvp_calls, "jvp", take_tangents)
    else:
        monkeypatch.setattr(calls, FUNCTIONS[function], take)
    signature = inspect.signature(getattr(cuflash, function))
    given = {name: object() for name in signature.parameters}
    getattr(cuflash, function)(**given)
    assert {name: arrived[name] for name in given} == given
    varlen = function.startswith("varlen")
    defaults = {**Operands(None, None, None)._asdict(), **Options()._asdict(), "backward": False, "jvp": False}
    others = {name: value for name, value in arrived.items() if name not in given}
    assert others == {name: varlen if name == "varlen" else defaults[name] for name in others}


def test_defaults_are_those_of_the_public_function() -> None:
    public = {name: parameter.default for name, parameter in inspect.signature(cuflash.scaled_dot_product_attention).parameters.items()}
    for given in (Operands, Options):
        for name, default in given._field_defaults.items():
            if name in public:
                assert public[name] == default, name


def test_features_are_constants_of_their_own_names() -> None:
    for name in (flag.name for flag in fields(FeatureSet) if flag.name != "attn_mask"):
        constants = FeatureSet(**{name: True}).constants()
        assert [constant for constant, value in constants.items() if value is True] == [name.upper()]


def test_each_feature_has_a_sample_and_its_arrays_are_operands() -> None:
    """What benchmarks, tables and other tests make of `ALONE` leaves no feature out."""
    names = {flag.name for flag in fields(FeatureSet)}
    assert {name for sample in ALONE.values() for name in names if getattr(sample.kinds(), name)} == names
    assert {array.feature for array in features.FEATURE_ARRAYS.values()} <= names
    assert set(features.FEATURE_ARRAYS) <= set(Operands._fields)
    made = {name for sample in ALONE.values() for name in sample.arguments(Sample())}
    assert made == set(features.FEATURE_OF)


@pytest.mark.parametrize("module", [attention, calls, checks, features, options, planner, sequences], ids=lambda module: module.__name__)
def test_no_mapping_hides_the_types_of_options(module: ModuleType) -> None:
    """A type checker follows an option from the public call to the constant of a kernel: on the way there is no dictionary of anything."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("dict", "Mapping"):
            value = node.slice.elts[1] if isinstance(node.slice, ast.Tuple) else None
            kept = ast.unparse(node) == "dict[Hashable, Any]"  # the prepared calls, by their keys
            assert kept or value is None or ast.unparse(value) not in ("Any", "object"), (
                f"{module.__name__}:{node.lineno}: {ast.unparse(node)}"
            )
        if isinstance(node, ast.arguments):
            assert node.kwarg is None, f"{module.__name__}: {ast.unparse(node)}"
