"""The site of the documentation is built without a warning, has no dead link, needs nothing from elsewhere, and lists every public name.

Needs `pip install -e '.[docs]'`; a headless Chromium, if there is one (tests/test_report.py), opens two pages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

pytest.importorskip("mkdocs", reason="pip install -e '.[docs]' installs it")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).resolve().parents[1]
BROWSER = os.environ.get("CUFLASH_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HERE = "https://site/"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return built


class References(HTMLParser):
    """What a page points to, what it loads, and which places in it can be pointed to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("script", "img", "iframe") and "src" in given:
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, References]:
    """By address, as a browser sees them."""
    found = {}
    for path in site.rglob("*.html"):
        address = HERE + path.relative_to(site).as_posix().removesuffix("index.html")
        found[address] = References(path.read_text(encoding="utf-8"))
    assert len(found) > 20
    return found


def test_no_link_is_dead(site: Path, pages: dict[str, References]) -> None:
    """Neither to a page or a picture, nor to a place in a page."""
    dead = []
    for address, page in pages.items():
        if address.endswith("404.html"):
            continue
        for link in [*page.links, *page.loaded]:
            target, place = urldefrag(urljoin(address, link))
            if not target.startswith(HERE):
                continue
            if target in pages:
                if place and unquote(place) not in pages[target].places:
                    dead.append((address, link))
            elif not (site / unquote(target.removeprefix(HERE))).is_file():
                dead.append((address, link))
    assert dead == []


def test_nothing_comes_from_elsewhere(pages: dict[str, References]) -> None:
    loaded = {urljoin(address, link) for address, page in pages.items() for link in page.loaded}
    assert loaded
    assert {link for link in loaded if not link.startswith((HERE, "data:"))} == set()


def test_every_public_name_is_in_the_reference_and_found(site: Path, pages: dict[str, References]) -> None:
    import cuflash

    names = {f"cuflash.{name}" for name in cuflash.__all__ if not name.startswith("__")}
    assert names <= pages[HERE + "reference/"].places
    assert {"cuflash.torch.ring_attention", "cuflash.flash_attn.flash_attn_func"} <= pages[HERE + "reference/"].places
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"] for entry in index["docs"]}
    assert {f"reference/#{name}" for name in names} <= found
    (entry,) = (entry for entry in index["docs"] if entry["location"] == "reference/#cuflash.autotune")
    assert "Candidates run in a process of their own" in entry["text"]


def test_readme_and_changelog_are_pages(pages: dict[str, References]) -> None:
    assert any(link.startswith("tutorial/") for link in pages[HERE].links)
    assert HERE + "changelog/" in pages
    assert not any(".md" in link for page in pages.values() for link in page.links if not link.startswith("http"))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium, or CUFLASH_BROWSER")
@pytest.mark.parametrize("page", ["index.html", "reference/index.html"])
def test_a_browser_shows_it(page: str, site: Path, tmp_path: Path) -> None:
    """Styles apply, text is there, and every picture in sight is decoded."""
    count = """<script>addEventListener("load", () => { document.body.dataset.seen = JSON.stringify({
        broken: [...document.images].filter(x => x.complete && !x.naturalWidth).length, title: document.querySelector("h1").firstChild.textContent.trim(),
        styled: getComputedStyle(document.querySelector(".md-header")).position, wide: document.documentElement.scrollWidth > innerWidth }); });</script>"""
    copied = site / page.replace("index", "seen")
    copied.write_text((site / page).read_text(encoding="utf-8").replace("</body>", count + "</body>"), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1300,2000",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run([str(BROWSER), *options, "--dump-dom", copied.as_uri()], capture_output=True, text=True, check=False, timeout=240)
    told = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert told is not None, done.stderr
    title = "Reference" if "reference" in page else "cuflash"
    assert json.loads(told[1].replace("&quot;", '"')) == {"broken": 0, "title": title, "styled": "sticky", "wide": False}
