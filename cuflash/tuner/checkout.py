"""Which commit the library is of, where it runs from a git checkout: what a table of tiles says of its kernels besides their fingerprint.

Contract: nothing here raises or takes long. An installed copy has no commit, also where it lies inside of somebody else's repository.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
_SECONDS = 10.0


def commit(package: Path = PACKAGE) -> str:
    """Twelve digits of the commit, with a plus sign where library or kernels differ from it; empty without git or a checkout."""
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    found = _git(package, "rev-parse", "--short=12", "HEAD") if tracked else None
    if not found:
        return ""
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels")
    return found + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
