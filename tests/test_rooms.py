"""The house that docs/design.md draws is the one that stands: imports go down its floors only, every module has a room, a call takes the steps of the picture."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cuflash
from cuflash.runtime import calls

PACKAGE = Path(cuflash.__file__).parent
DESIGN = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def picture(heading: str) -> list[str]:
    """The lines of the first picture below a heading."""
    section = DESIGN[DESIGN.index(f"## {heading}\n") :]
    return section.split("```\n")[1].splitlines()


FLOORS: dict[str, int] = {
    room.rstrip("/"): -height
    for height, line in enumerate(picture("Rooms"))
    for room in re.match(r"[\w./]+(?:  ?[\w./]+)*", line)[0].split()  # type: ignore[index]
}
"""Room or module -> floor; what is lower in the picture has the smaller number."""


def room_of(module: Path) -> str:
    return module.parts[0]


def imported(module: Path) -> Iterator[str]:
    """Rooms and files of the package that a module takes something from, within functions and for types alone too."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            continue
        for name in names:
            package, *inner = name.split(".")
            if package == "cuflash":
                yield home_of(inner)


def home_of(inner: list[str]) -> str:
    """The room, or file, of a dotted name without `cuflash`."""
    if inner and (PACKAGE / inner[0]).is_dir():
        return inner[0]
    if inner and (PACKAGE / f"{inner[0]}.py").is_file():
        return f"{inner[0]}.py"
    return "__init__.py"


def test_every_module_has_a_place_in_the_picture() -> None:
    assert {room_of(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", [module for module in MODULES if module.parts != ("__init__.py",)], ids=str)
def test_imports_go_down(module: Path) -> None:
    own = room_of(module)
    for room in imported(module):
        assert room == own or FLOORS[room] < FLOORS[own], f"{module} imports {room}"


@pytest.mark.parametrize("room", [room for room in FLOORS if not room.endswith(".py")])
def test_no_circle_within_a_room(room: str) -> None:
    """Of what is imported when a module is loaded: a module of the room is not reached from itself."""
    modules = {".".join(module.with_suffix("").parts): module for module in MODULES if room_of(module) == room}
    below: dict[str, set[str]] = {}
    for name, module in modules.items():
        tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
        taken: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"cuflash.{room}"):
                base = node.module.removeprefix("cuflash.")
                taken |= {base} | {f"{base}.{entry.name}" for entry in node.names}
        below[name] = taken & set(modules) - {name}
    done: set[str] = set()
    while True:
        more = {name for name, taken in below.items() if name not in done and taken <= done}
        if not more:
            break
        done |= more
    assert set(modules) - done == set()


def test_the_simulator_and_the_judge_know_nothing_of_attention() -> None:
    for room, allowed in (("simulator", {"errors.py", "system", "arrays"}), ("reference", set[str]())):
        taken = {other for module in MODULES if room_of(module) == room for other in imported(module)} - {room}
        assert taken <= allowed


def test_every_module_of_a_room_is_named_with_its_contract() -> None:
    rows = dict(re.findall(r"^\| `(\w+)/` \| .* \| (.*) \|$", DESIGN, re.M))
    assert set(rows) == {room for room in FLOORS if not room.endswith(".py")} - {"simulator", "timing", "demo"}, (
        "those have pages of their own"
    )
    for room, listed in rows.items():
        names = {module.stem for module in MODULES if module.parts[:-1] == (room,)} - {"__init__"}
        assert set(re.findall(r"`(\w+)`", listed)) == names, room


def test_a_call_takes_the_steps_of_the_picture() -> None:
    """Each step is defined in the file beside it, and `calls.forward` takes those that are set in, in their order."""
    steps = [re.fullmatch(r"( *)([\w.]+) +.*?(\S+\.py)", line) for line in picture("One call, a straight line")]
    assert len(steps) > 6
    inner = []
    for step in steps:
        assert step is not None
        name = step[2].rpartition(".")[2]
        assert re.search(rf"^ *(def|class) {name}\b", (PACKAGE / step[3]).read_text(encoding="utf-8"), re.M), step[0]
        if step[1]:
            inner.append(name)
    (forward,) = [
        node for node in ast.parse(Path(calls.__file__).read_text(encoding="utf-8")).body if getattr(node, "name", "") == "forward"
    ]
    lines: dict[str, int] = {}
    for node in ast.walk(forward):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            lines[name] = max(lines.get(name, 0), node.lineno)  # a warm call runs further up
    assert set(inner) <= set(lines)
    assert sorted(inner, key=lines.__getitem__) == inner
