"""Whether a timing is still of the present kernels: a digest of a kernel's source with all that it includes, and of the compiler's version.

A tile that was fastest for other text, or with another compiler, may spill registers or be slow now.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from cuflash.errors import SetupError
from cuflash.jit import compiler

_INCLUDE = re.compile(rb'^\s*#include "([^"]+)"', re.M)

_kept: dict[tuple[Path, str, str], str] = {}


def of_source(source: str) -> str:
    """16 hexadecimal digits of a file below `kernels/` and of every file that it includes, by name and content. An edit changes them at the next plan.

    Raises:
        SetupError: the kernels' text is missing.
    """
    folder = compiler.kernels_directory()
    key = folder, compiler.text_digest(), source
    if key not in _kept:
        digest = hashlib.sha256()
        for name in _with_includes(folder, source):
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
        _kept[key] = digest.hexdigest()[:16]
    return _kept[key]


def _with_includes(folder: Path, source: str) -> list[str]:
    """Names of a file and of all that it includes, directly or not. The kernels name files from their folder on."""
    found, todo = set[str](), [source]
    while todo:
        name = todo.pop()
        if name in found or not (folder / name).is_file():
            continue
        found.add(name)
        todo += [included.decode() for included in _INCLUDE.findall((folder / name).read_bytes())]
    return sorted(found)


def of_compiler() -> str:
    """The version of NVRTC, such as "12.9"; empty without."""
    try:
        return compiler.nvrtc_text()
    except SetupError:
        return ""
