"""What the site has besides the pages of docs/: README.md as its start, CHANGELOG.md, and the reference, which is made of the docstrings.

mkdocs calls the two functions (mkdocs.yml, `hooks`). Contract: a link to a file outside docs/ that is no page of the site becomes its path in code, since the site has no
such file; every other link stays as it is, for mkdocs to check.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository's root -> pages of the site."""

MODULES = {
    "cuflash": "Arrays of CuPy, NumPy and torch",
    "cuflash.torch": "In torch's terms: autograd, torch.compile, modules",
    "cuflash.flash_attn": "In flash-attn's terms",
    "cuflash.reference": "The formula in float64",
}
"""Of the reference, in its order."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(?:```.*?^```$)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, page in MOVED.items():
        files.append(File.generated(config, page, content=_in_docs((ROOT / source).read_text(encoding="utf-8"))))
    files.append(File.generated(config, "reference.md", content=reference_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Mend links that leave docs/."""
    return _outside_of_code(markdown, lambda text: _LINK.sub(lambda link: _mended(link, page.file.src_uri), text))


def _outside_of_code(markdown: str, change: Any) -> str:
    """The page with everything between its fenced blocks changed."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def _in_docs(text: str) -> str:
    """A file of the root as if it lay in docs/."""

    def moved(link: re.Match[str]) -> str:
        target = link[3]
        if not _is_path(target):
            return link[0]
        return f"{link[1]}[{link[2]}]({posixpath.relpath(target, 'docs')})"

    return _outside_of_code(text, lambda part: _LINK.sub(moved, part))


def _is_path(target: str) -> bool:
    return not re.match(r"[a-z]+:|#", target)


def _mended(link: re.Match[str], page: str) -> str:
    mark, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if not _is_path(target) or not path:
        return link[0]
    place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
    if place.startswith("docs/") and not place.endswith(".py"):
        return link[0]
    if place in MOVED:
        return f"{mark}[{text}]({MOVED[place]}{'#' + anchor if anchor else ''})"
    return text if text.strip("`") == place else f"{text} (`{place}`)"


# --- The reference ------------------------------------------------------------------------------------------------------------------------


def public_names(module: str) -> list[str]:
    """`__all__` of a module, read and not run: torch need not be installed."""
    path = ROOT / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    raise ValueError(f"{module} has no __all__")


def reference_page() -> str:
    """Every public name under its module, functions before classes before errors."""

    def order(name: str) -> tuple[int, str]:
        return (2 if name.endswith("Error") else int(name[0].isupper()), name)

    parts = ["# Reference\n\nMade of the docstrings. `help(cuflash.plan)` shows the same."]
    for module, title in MODULES.items():
        parts.append(f"## `{module}`\n\n{title}.")
        parts += [f"::: {module}.{name}" for name in sorted(public_names(module), key=order)]
    return "\n\n".join(parts) + "\n"
