"""The documentation site, built as `make docs` builds it: strict, without the network, readable on a phone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMEDRIVER, CHROMIUM, DESKTOP, PHONE, Browser, browser

ROOT = Path(__file__).parents[1]
MISSING = [str(path) for path in (CHROMIUM, CHROMEDRIVER) if not path.exists()]
pytestmark = pytest.mark.slow
PAGES = ("index", "method", "rows", "recipes", "figures", "troubleshooting", "comparison", "python")
# Attributes by which a page loads something; links that a reader follows are no such.
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "link": "href",
    "object": "data",
}


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    packages = os.pathsep.join([str(config.parent), str(config.parent / "eval")])
    env = os.environ | {"PYTHONPATH": packages, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=config.parent, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    return folder


class Loaded(HTMLParser):
    """What a page loads, and the targets of its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if LOADS.get(tag) in dict(attrs):
            self.loaded.append(dict(attrs)[LOADS[tag]] or "")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert {site / f"{name}.html" for name in PAGES} <= set(pages)
    loaded = {page: Loaded(page.read_text(encoding="utf-8")).loaded for page in pages}
    assert all(any(target.endswith(".js") for target in targets) for targets in loaded.values())
    assert [
        (page, target) for page, targets in loaded.items() for target in targets if re.match(r"(\w+:)?//", target)
    ] == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_parts_from_the_code_are_in_their_pages(site: Path) -> None:
    for name, part in {
        "recipes": "id='align.data.max_length'",
        "rows": "<mark>",
        "troubleshooting": "class='messages'",
    }.items():
        text = (site / f"{name}.html").read_text(encoding="utf-8").replace('"', "'")
        assert part in text
        assert "generated:" not in text


def test_broken_links_fail(tmp_path: Path) -> None:
    for name in ("docs", "docs_site", "benchmarks", "examples", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(path, tmp_path)
    for name in ("kd", "dae", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs" / "index.md").open("a", encoding="utf-8") as page:
        page.write("\n[x](nowhere.md) [x](method.md#no-heading) [x](../benchmarks/no_results.md)\n")
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode == 1
    assert all(target in built.stderr for target in ("nowhere.md", "#no-heading", "no_results.md")), built.stderr


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.mark.skipif(bool(MISSING), reason=f"needs Debian's packages chromium and chromium-driver: no {MISSING}")
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_window_and_pictures_are_there(
    chromium: Browser, site: Path, name: str, size: tuple[int, int]
) -> None:
    chromium.open(site / f"{name}.html", size)
    assert chromium.run("return document.documentElement.scrollWidth") <= size[0]
    assert (
        chromium.run(
            "return [...document.images].filter(one => !one.complete || !one.naturalWidth).map(one => one.src)"
        )
        == []
    )
    assert chromium.messages() == []
    loaded = chromium.run("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [url for url in loaded if not url.startswith("file:")] == []
