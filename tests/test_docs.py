"""Tables in the documentation that are made from the code are what the code makes, and the calls that it shows can be made."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from PIL import Image

import cuflash
from cuflash.errors import ArgumentError
from cuflash.jit import disassembly
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.reference import attention, attention_backward
from reporting import publishing

if TYPE_CHECKING:
    from conftest import Target

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "generate_tables.py"))


@pytest.mark.parametrize("path", SCRIPT["PAGES"], ids=lambda path: path.name)
def test_tables_are_generated(path: Path) -> None:
    """If this fails: python docs/generate_tables.py."""
    page = path.read_text()
    assert "<!-- generated: " in page
    assert SCRIPT["filled"](page) == page


def test_the_trace_of_a_call_is_what_is_seen() -> None:
    """If this fails: python docs/trace_call.py. Machine code is compared where the compiler is the one that made the page's."""
    pytest.importorskip("cupy")
    trace = runpy.run_path(str(DOCS / "trace_call.py"))
    page = trace["PAGE"].read_text()
    same_compiler = trace["compiler_version"]() in page and disassembly.find_nvdisasm() is not None
    steps = tuple(step for step in trace["STEPS"] if same_compiler or step not in trace["OF_THE_COMPILER"])
    assert len(steps) >= 5
    assert trace["filled"](page, steps) == page


PICTURES = runpy.run_path(str(DOCS / "draw_pictures.py"))
PIPELINES = runpy.run_path(str(DOCS / "pipeline_pictures.py"))


@pytest.mark.parametrize("name", PICTURES["PICTURES"])
def test_pictures_are_of_the_present_code_and_shown(name: str) -> None:
    """If this fails: python docs/draw_pictures.py, and look at what comes out."""
    path = PICTURES["FOLDER"] / f"{name}.png"
    assert PICTURES["fingerprint_in"](path) == PICTURES["PICTURES"][name][1]()
    assert any(f"](pictures/{name}.png)" in page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))


def test_there_are_no_other_pictures() -> None:
    assert {path.stem for path in PICTURES["FOLDER"].iterdir()} == set(PICTURES["PICTURES"])
    assert sum(path.stat().st_size for path in PICTURES["FOLDER"].iterdir()) < 300_000


@pytest.mark.parametrize("name", PIPELINES["CASES"])
def test_pictures_of_pipelines_name_all_products_and_copies(name: str) -> None:
    """As the kernel's specification has them: what the patterns do not find would look like time between the products."""
    kernel = PIPELINES["planned"](name)
    sources = PIPELINES["sources_of"](kernel).values()
    found = {PIPELINES["operation_of"](statement) for source in sources for statement in source} - {None}
    made = {label.split()[0] for label in found if PIPELINES["is_product"](label)}
    assert made >= {*kernel.spec.scores, *kernel.spec.outputs}
    assert made <= set(PIPELINES["_COLOURS"])
    letters = {"query": "Q", "key": "K", "value": "V", "grad_out": "dO", "key_dot": "K_dot", "value_dot": "V_dot"}
    assert found >= {f"copy of {letters[operand]}" for operand in kernel.spec.streamed}


def test_every_kernel_with_a_walk_of_its_own_has_a_picture() -> None:
    drawn = {TILED_KERNELS[name].source for name in PIPELINES["CASES"]}
    assert drawn == {kernel.source for kernel in TILED_KERNELS.values()}


@pytest.mark.parametrize("name", ["way_of_a_call", "backward_dq"])
def test_pictures_can_be_drawn(name: str, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    if name != "way_of_a_call" and disassembly.find_nvdisasm() is None:
        pytest.skip("nvdisasm is missing")
    if name != "way_of_a_call":
        pytest.importorskip("cupy")
    matplotlib.use("Agg")
    draw, fingerprint = PICTURES["PICTURES"][name]
    draw(tmp_path / "picture.png")
    assert PICTURES["fingerprint_in"](tmp_path / "picture.png") == fingerprint()
    assert (tmp_path / "picture.png").stat().st_size > 10_000


WRAPPING = runpy.run_path(str(DOCS / "wrap_lines.py"))


@pytest.mark.parametrize("path", WRAPPING["PAGES"], ids=lambda path: path.name)
def test_lines_are_wrapped(path: Path) -> None:
    """If this fails: python docs/wrap_lines.py."""
    assert WRAPPING["long_lines"](path.read_text(encoding="utf-8")) == []


def test_wrapping_leaves_markup_alone() -> None:
    long = "word " * 30
    kept = f"| {long}|\n\n```\n{long}\n```\n\n# {long}\n<!-- generated: x -->\n{long}\n<!-- end of x -->\n    {long}\n"
    assert WRAPPING["filled"](kept) == kept
    item = WRAPPING["filled"](f"- {long}\n  and `one span {long}` - 3 more\n- short\n").splitlines()
    assert item[0].startswith("- word")
    assert all(line.startswith("  ") for line in item[1:-1])
    assert [line for line in item if "`" in line] == [line for line in item if line.count("`") == 2]
    assert item[-1] == "- short"
    assert not any(line.lstrip().startswith("-") for line in item[1:-1])


PAGE = (DOCS / "coming-from.md").read_text()
CALLS = re.findall(r"\| `(cuflash\.[^`]*)` \|", PAGE)
RECIPES = re.findall(r"^\| `([^`]*)` \| `([^`]*)` \|$", PAGE.partition("## FlexAttention")[2].partition("\n## ")[0], re.M)


def zeros(*shape: int) -> Any:
    return numpy.zeros(shape, "float16")


def packing(shape: tuple[int, ...]) -> dict[str, Any]:
    """The names that the calls use, with arrays of a shape of query."""
    x, qkv, offsets = zeros(*shape), zeros(*shape[:-2], 3, *shape[-2:]), numpy.array([0, 2, 6], "int32")
    lengths = {"cu": offsets, "cu_q": offsets, "cu_k": offsets, "lengths": offsets[1:], "longest": 4, "max_q": 4, "max_k": 4}
    return {"q": x, "k": x, "v": x, "k_cache": x, "v_cache": x, "qkv": qkv, **lengths}


def test_every_row_is_tried() -> None:
    """Those of the tables above "Names"; each table has one row of headings."""
    assert len(CALLS) + len(RECIPES) + 2 == PAGE.partition("\n## Names")[0].count("\n| ")


@pytest.mark.parametrize("call", CALLS)
def test_calls_for_those_who_come_from_elsewhere(call: str) -> None:
    """Each can be made, of arrays of four dimensions or of three."""
    planned = SimpleNamespace(
        scaled_dot_product_attention=cuflash.plan, varlen_attention=cuflash.varlen_plan, attention_with_kvcache=cuflash.kvcache_plan
    )
    plans, errors = [], []
    for shape in ((2, 6, 6, 8), (6, 6, 8)):
        try:
            plans.append(eval(call, {"cuflash": planned, **packing(shape)}))
        except (ArgumentError, IndexError) as error:
            errors.append(error)
    assert len(plans) == 1, errors
    assert plans[0].kernels


@pytest.mark.parametrize(("function", "arguments"), RECIPES)
def test_recipes_for_flex_attention(simulator: Target, function: str, arguments: str) -> None:
    """The arguments do to the scores what the function does."""
    rng = numpy.random.default_rng(7)
    q, k, v = rng.standard_normal((3, 2, 2, 20, 16)).astype("float32")
    given = {
        "width": 5, "lengths": numpy.array([20, 9], "int32"), "document": numpy.repeat(numpy.arange(4, dtype="int32"), 5), "softcap": 1.5,
        "prefix": numpy.array([11, 0], "int32"), "slopes": numpy.array([0.5, 0.25], "float32"), "mask": rng.random((2, 2, 20, 20)) < 0.5,
        "bias": rng.standard_normal((2, 2, 20, 20)).astype("float32"),
    }  # fmt: skip
    given["mask"][..., 0] = True  # a row that sees nothing has no softmax
    plain = q.astype(float) @ k.swapaxes(2, 3) / 4
    b, h, q_idx, kv_idx = numpy.ogrid[:2, :2, :20, :20]
    names = {"score": plain, "b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx, "tanh": numpy.tanh, **given}
    changed = eval(function.replace("\\|", "|"), names)
    scores = numpy.where(changed, plain, -numpy.inf) if changed.dtype == bool else changed
    weights = numpy.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    out = cuflash.scaled_dot_product_attention(q, k, v, layout="bhsd", **eval(f"dict({arguments})", given))
    numpy.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert abs(expected - cuflash.scaled_dot_product_attention(q, k, v, layout="bhsd")).max() > 1e-2


def test_what_was_measured_is_published() -> None:
    """If this fails: python benchmarks/report.py --publish."""
    for path, text in publishing.published().items():
        assert path.read_text() == text, path.name
    for results in publishing.results():
        with Image.open(publishing.picture(results)) as picture:
            assert picture.text["Source"] == publishing.source_of(results), "drawn from other results"  # type: ignore[attr-defined]


def test_the_example_of_chunks_of_keys(simulator: Target) -> None:
    """Out and gradients of the chunks are those of one call over all keys."""
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "context_parallelism.md").read_text(), re.S)
    made: dict[str, Any] = {}
    exec(example, made)
    query, key, value, grad_out = (made[name] for name in ("query", "key", "value", "grad_out"))
    want, _ = attention(query, key, value, is_causal=True)
    grads = attention_backward(grad_out, query, key, value, is_causal=True)
    for name, truth in (("out", want), ("grad_query", grads.query), ("grad_key", grads.key), ("grad_value", grads.value)):
        numpy.testing.assert_allclose(made[name], truth, rtol=0, atol=2e-5 * abs(truth).max(), err_msg=name)
