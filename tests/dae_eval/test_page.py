"""The report's page in a real browser, at the width of a phone and of a desk: what it does, not only that it opens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMEDRIVER, CHROMIUM, DESKTOP, PHONE, Browser, browser
from dae_eval.rendering import html, plots
from dae_eval.report import Report
from reports import HOSTILE, demo_report, hostile_report, wide_report

MISSING = [str(path) for path in (CHROMIUM, CHROMEDRIVER) if not path.exists()]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs Debian's packages chromium and chromium-driver: no {MISSING}"),
]

REPORTS: dict[str, Callable[[], Report]] = {
    "demo": demo_report, "wide": wide_report, "hostile": hostile_report, "large": lambda: demo_report(5000),
}  # fmt: skip

COUNT = "return document.querySelector('#count').innerText"
SHOWN = (
    "return [...document.querySelectorAll('#flips tbody tr')].filter(row => row.checkVisibility()).map(row => row.{})"
)
CHOOSE = """
const field = document.querySelector(`#filters [name=${arguments[0]}]`);
field.value = arguments[1];
field.dispatchEvent(new Event("input", {bubbles: true}));
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With plots where the width of the page is looked at."""
    folder = tmp_path_factory.mktemp("reports")
    for name, make in REPORTS.items():
        report = make()
        page = html.render(report, plots.draw(report) if name in ("demo", "wide") else ())
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in REPORTS}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["demo", "wide", "hostile"])
def test_nothing_is_wider_than_the_window_and_the_console_is_silent(
    chromium: Browser, pages: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    chromium.open(pages[name], size)
    assert chromium.run("return innerWidth") == size[0]
    chromium.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert chromium.run("return document.documentElement.scrollWidth") <= size[0]
    assert chromium.run("scrollTo(9999, 0); return scrollX") == 0
    assert chromium.messages() == []


def test_filters_show_the_matching_rows(chromium: Browser, pages: dict[str, Path]) -> None:
    report = demo_report(5000)
    held = html.embedded(report.flips)
    chromium.open(pages["large"], DESKTOP)
    assert len(chromium.run(SHOWN.format("dataset.task"))) == 50
    assert chromium.run(COUNT).startswith(f"50 of {html.FLIPS} ")

    chromium.run(CHOOSE, "task", "world_price")
    chromium.run(CHOOSE, "direction", "better")
    fits = [flip for flip in held if flip.task == "world_price" and flip.change > 0]
    assert chromium.run(SHOWN.format("dataset.task")) == ["world_price"] * len(fits)
    assert set(chromium.run(SHOWN.format("dataset.direction"))) == {"better"}

    chromium.run(CHOOSE, "seen", "yes")
    assert len(chromium.run(SHOWN.format("dataset.seen"))) == sum(flip.seen for flip in fits)

    chromium.run("document.querySelector('#filters button[type=reset]').click()")
    chromium.run(CHOOSE, "text", "no such words")
    assert chromium.run(SHOWN.format("innerText")) == []
    assert chromium.run(COUNT) == "No matching documents."


def test_more_rows_are_shown_when_asked_for(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["demo"], DESKTOP)
    assert len(chromium.run(SHOWN.format("dataset.task"))) == 50
    chromium.run("document.querySelector('#more').click()")
    assert len(chromium.run(SHOWN.format("dataset.task"))) == 60
    assert not chromium.run("return document.querySelector('#more').checkVisibility()")


def test_the_keyboard_reaches_and_works_the_search(chromium: Browser, pages: dict[str, Path]) -> None:
    flip = demo_report().flips[7]
    chromium.open(pages["demo"], DESKTOP)
    chromium.run("document.querySelector('#filters [name=seen]').focus()")
    chromium.keys(f"\ue004question {flip.id}:")  # Tab, then letters: upper and lower case are one
    assert chromium.run("return document.activeElement.name") == "text"
    (row,) = chromium.run(SHOWN.format("innerText"))
    assert row.startswith(f"{flip.task} {flip.id}")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert chromium.run(outline) == "solid"
    chromium.run(CHOOSE, "text", "")
    chromium.run("document.querySelector('#flips summary').focus()")
    assert not chromium.run("return document.querySelector('#flips details .text').checkVisibility()")
    chromium.keys("\ue007")  # Enter opens the prompt
    assert chromium.run("return document.querySelector('#flips details .text').checkVisibility()")


def test_what_a_model_wrote_stays_text(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["hostile"], DESKTOP)
    assert chromium.run("return window.hacked") is None
    texts = chromium.run("return [...document.querySelectorAll('#flips .text')].map(part => part.textContent)")
    for hostile in HOSTILE[:3]:
        assert hostile in texts
    assert chromium.run("return document.querySelectorAll('#flips script, #flips img, #flips b').length") == 0
    assert chromium.run("return document.scripts.length") == 1
    chromium.run(CHOOSE, "task", "<script>alert(1)</script>|`x`")
    assert len(chromium.run(SHOWN.format("dataset.task"))) == 1


def test_a_script_that_is_not_ours_would_not_run(chromium: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = pages["demo"].read_text(encoding="utf-8")
    page.write_text(text.replace("<main>", "<main><script>window.hacked = true</script>"), encoding="utf-8")
    chromium.open(page, DESKTOP)
    assert chromium.run("return window.hacked") is None
    assert any("Content Security Policy" in message for message in chromium.messages())


def test_without_scripts_all_rows_are_there_and_no_form(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["demo"], PHONE, scripts=False)
    try:
        tree = chromium.devtools("DOM.getDocument", depth=1)["root"]["nodeId"]
        found = [
            chromium.devtools("DOM.querySelectorAll", nodeId=tree, selector=selector)["nodeIds"]
            for selector in ("#flips tbody tr", "#flips tbody tr[hidden]", "#filters[hidden]", "#more[hidden]")
        ]
        assert [len(nodes) for nodes in found] == [60, 0, 1, 1]
    finally:
        chromium.devtools("Emulation.setScriptExecutionDisabled", value=False)
