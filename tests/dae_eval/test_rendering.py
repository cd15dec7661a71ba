"""Every format of a report: the right numbers in the right places, nothing that a model wrote acts on the reader."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
from dae_eval.comparing.statistics import Estimate
from dae_eval.rendering import headlines, html, markdown, plots, terminal, wording, write_report
from dae_eval.report import Report
from markdown_it import MarkdownIt
from reports import HOSTILE, bare_report, demo_report, failing_report, full_report, hostile_report, wide_report
from rich.console import Console

from kd.config.problems import visible
from kd.errors import UserError
from kd.runs.files import TEMPORARY_PREFIX

REPORTS: dict[str, Callable[[], Report]] = {
    "demo": demo_report, "bare": bare_report, "failing": failing_report, "wide": wide_report, "hostile": hostile_report,
    "full": full_report,
}  # fmt: skip


@pytest.fixture(params=REPORTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def report(name: str) -> Report:
    return REPORTS[name]()


def printed(report: Report, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True, highlight=False)
    terminal.show(report, console)
    return console.export_text()


# Words and numbers


def test_an_interval_is_not_rounded_onto_the_bound_that_decides() -> None:
    assert demo_report().student.retention is not None
    line = replace(demo_report().student.retention, difference=Estimate(-0.2, -0.996, 0.4))
    assert headlines.retention_headline(line).interval == "-0.996 to +0.400"
    assert headlines.retention_headline(replace(line, difference=Estimate(-0.2, -0.8, 0.4))).interval == "-0.8 to +0.4"


def test_headlines_of_the_demo() -> None:
    gap, retention, floor = headlines.headlines(demo_report().student)
    assert gap.sentence == "gap closed 92.4 % (88.1 to 95.3), minimum 0 %"
    assert retention.sentence == "retention -0.2 points (-0.8 to +0.4), margin 1"
    assert floor.sentence == "worst task -0.8 points (-2.9 to +1.3), limit 5 per task"
    (undefined, _, _) = headlines.headlines(failing_report().student)
    assert undefined.sentence == "gap closed undefined, minimum 0 %"
    assert "+0.4 (-2.1 to +3.0) points" in undefined.remark


def test_models_with_the_same_weights_are_one_column() -> None:
    labels = [column.label for column in wording.columns(demo_report())]
    assert labels == ["base = reference", "expert", "student", "next-token"]
    assert [column.label for column in wording.columns(wide_report())] == [
        "base", "expert", "reference", "student", "next-token",
    ]  # fmt: skip


def test_tasks_count_only_in_a_line_that_there_is() -> None:
    report = demo_report()
    domain = [task for task in report.tasks if task.kind == "domain"]
    assert wording.kinds(domain, report) == "counts in gap closed"
    without = replace(report, student=replace(report.student, gap=None))
    assert wording.kinds(domain, without) == "counts in worst task"
    assert wording.kinds(report.tasks, report) == ("counts in gap closed or counts in no line or counts in retention")


def test_visible_writes_out_what_only_acts_and_leaves_every_script() -> None:
    assert visible("a\x1b[1m\u202eb\x00\ud83d\tc\nd") == "a<U+001B>[1m<U+202E>b<U+0000><U+D83D>\tc\nd"
    assert visible("żółć 价格 السعر 😀 e\u0301") == "żółć 价格 السعر 😀 e\u0301"


# Terminal


@pytest.mark.parametrize("width", [60, 120])
def test_terminal_keeps_within_its_width_and_says_everything(report: Report, width: int) -> None:
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    together = " ".join(text.split())
    for line in headlines.headlines(report.student):
        assert line.sentence in together
    assert text.index(report.word) < 60 + width
    squeezed = "".join(text.split())
    start = wording.common_start([wording.one_line(task.task) for task in report.tasks])
    for task in report.tasks:
        assert wording.change(task.difference.value, task.unit) in text
        assert "".join(wording.one_line(task.group).split()) in squeezed
        folded = wording.one_line(task.task).removeprefix(start)
        assert folded in text or len(folded) > 14  # a longer name goes over several lines


def test_terminal_at_80_columns_has_every_model_n_chance_and_interval_of_five_models() -> None:
    report = demo_report()
    apart = [replace(line, same_as="") for line in report.models]
    text = printed(replace(report, models=tuple(apart)), 80)
    row = next(line for line in text.splitlines() if line.startswith("compatibility"))
    task = next(task for task in report.tasks if task.task == "world_compatibility")
    models = ("base", "expert", "reference", "student", "next-token")
    numbers = ["800", "25.0", *(f"{100 * task.scores[model]:.1f}" for model in models)]
    ends = [f"{100 * end:+.1f}" for end in (task.difference.value, task.difference.low, task.difference.high)]
    assert re.findall(r"[+-]?\d+(?:\.\d)?", row) == numbers + ends
    assert row.rstrip().endswith("*")
    assert "price: 31 of 800" in text and "arithmetic 3" in text


def test_terminal_names_what_has_no_room() -> None:
    text = " ".join(printed(demo_report(), 60).split())
    assert "No room for: next-token, n, chance" in text
    assert "No room" not in printed(demo_report(), 120)


def test_terminal_prints_markup_and_escapes_of_models_as_text() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None, highlight=False)
    terminal.show(
        replace(hostile_report(), notes=("[bold red]x[/] \x1b]0;title\x07", "[link=http://x]y[/link]")), console
    )
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "[bold red]x[/] <U+001B>]0;title<U+0007>" in file.getvalue()
    assert "[link=http://x]y[/link]" in file.getvalue()
    assert not re.search("\x1b(?!\\[[0-9;]*m)|[\x00\x07\u202e]", file.getvalue())


# Markdown


def rendered_tables(text: str) -> list[list[list[str]]]:
    """Tables of a Markdown text as a reader sees them: rows of cells without any mark-up."""
    tables: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            children = tokens[number + 1].children or []
            assert {child.type for child in children} <= {"text", "strong_open", "strong_close", "text_special"}
            tables[-1][-1].append("".join(child.content for child in children))
    return tables


def test_markdown_reads_as_what_was_meant(report: Report) -> None:
    text = markdown.render(report)
    tables = rendered_tables(text)
    rows = {row[0]: row for table in tables for row in table}
    for task in report.tasks:
        row = rows[wording.one_line(task.task)]
        assert row[1] == wording.documents(task) and wording.score(task.scores["student"], task.unit) in row
        assert row[2:4] == [wording.score(task.chance), wording.score(task.majority)]
        assert {
            wording.p_value(task.p),
            f"{task.wins} / {task.losses}",
            wording.score(task.detectable, task.unit),
        } <= set(row)
    for line in report.models:
        assert wording.one_line(line.path) in rows[line.role]
    for what, value in report.provenance:
        assert rows[wording.one_line(what)] == [wording.one_line(what), wording.one_line(value)]
    assert all(len(row) == len(table[0]) for table in tables for row in table)
    assert text.startswith(f"## Evaluation: {report.word}\n") and not re.search(r"^# ", text, re.MULTILINE)


@pytest.mark.parametrize(
    "text", [*HOSTILE[:7], "- a", "1. a", "+ a", "www.x.invalid @someone $x$ ~~y~~ a_b _c_ ![i](j)"]
)
def test_markdown_escapes_every_text(text: str) -> None:
    """As a paragraph, an item of a list and a cell it is plain text, as an independent parser sees it."""
    parser = MarkdownIt("gfm-like", {"linkify": False}).enable("table")
    for around in ("{}", "- {}", "| {} |\n| --- |\n| x |"):
        tokens = parser.parse(around.format(markdown.escape(text)))
        children = next(token for token in tokens if token.type == "inline").children or []
        assert {child.type for child in children} <= {"text", "text_special"}
        assert "".join(child.content for child in children) == wording.one_line(text)
        assert not {token.type for token in tokens} & {"html_block", "heading_open", "ordered_list_open", "hr"}


# HTML


class Page(HTMLParser):
    """What a browser would make of the page: its elements with their attributes, and the texts in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


PAGES = pytest.mark.parametrize("name", ["demo", "bare", "hostile"])


@cache
def drawn(name: str) -> tuple[plots.Plot, ...]:
    return plots.draw(REPORTS[name]())


@cache
def page_of(name: str) -> str:
    return html.render(REPORTS[name](), drawn(name))


@PAGES
def test_the_page_needs_nothing_from_elsewhere(name: str) -> None:
    text = page_of(name)
    page = Page(text)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
                assert value is not None and value.startswith(("#", "data:")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "script-src 'unsafe" not in policy
    assert text.encode("utf-8")


@PAGES
def test_every_id_of_the_page_is_there_once_and_every_link_has_its_target(name: str) -> None:
    page = Page(page_of(name))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    values = (a.get(key) or "" for _, a in page.elements for key in ("href", "xlink:href"))
    links = {value[1:] for value in values if value.startswith("#")}
    assert links <= set(ids) and {"differences", "tasks", "models"} <= links
    assert ("documents" in links) == bool(REPORTS[name]().flips)
    for _, attributes in page.elements:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)


def test_the_page_escapes_what_models_wrote() -> None:
    text = page_of("hostile")
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "i", "iframe", "object"}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    shown = "".join(page.texts)
    for hostile in HOSTILE[:7]:
        assert shown.count(visible(hostile)) >= 3
    assert "{{ 7 * 7 }}" in shown and "(nothing)" in shown
    assert "the first 1,000 of 100,000 characters" in shown
    assert len(text) < 600_000


def test_a_large_report_embeds_a_fair_part_and_says_so() -> None:
    report = demo_report(5000)
    text = html.render(report, ())
    rows = [a for tag, a in Page(text).elements if tag == "tr" and "data-task" in a]
    assert len(rows) == html.FLIPS and f"{html.FLIPS} of 5,000" in text
    kinds = {(flip.task, flip.change < 0) for flip in report.flips}
    assert {(row["data-task"], row["data-direction"] == "worse") for row in rows} == kinds
    directions = [row["data-direction"] for row in rows]
    assert directions == sorted(directions, reverse=True)  # worse before better
    assert len(text) < 1_500_000


# Plots


def test_plots_are_the_same_bytes_whatever_matplotlib_is_set_to() -> None:
    first = drawn("demo")
    with mpl.rc_context({"lines.linewidth": 9.0, "font.size": 20, "svg.fonttype": "none", "axes.grid": True}):
        before = dict(mpl.rcParams)
        assert plots.draw(demo_report()) == first
        assert dict(mpl.rcParams) == before
    assert not any("date" in plot.svg.lower() for plot in first)


def test_plots_that_there_is_no_data_for_are_not_drawn() -> None:
    assert [plot.name for plot in drawn("demo")] == ["forest", "radar-1", "curve-1", "curve-2", "curve-3"]
    assert [plot.name for plot in drawn("bare")] == ["forest"]
    report = replace(demo_report(), tasks=(), curves=())
    two = replace(report.radars[0], axes=("a", "b"), values={"student": (0.1, 0.2)})
    assert plots.draw(replace(report, radars=(two,))) == ()
    assert plots.draw(replace(bare_report(), tasks=())) == ()


def test_the_forest_plot_shows_the_numbers_of_the_report() -> None:
    report = demo_report()
    figure = plots.forest(report)
    drawn = [
        tuple(line.get_xdata()) for axes in figure.axes for line in axes.lines
        if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]
    ]  # fmt: skip
    expected = {(100 * task.difference.low, 100 * task.difference.high) for task in report.tasks}
    assert set(drawn) == expected
    full = [line for axes in figure.axes for line in axes.lines if line.get_marker() != "None"]
    filled = sum(line.get_markerfacecolor() != plots.PAPER for line in full)
    assert filled == sum(task.p_holm < 0.05 for task in report.tasks)


# Folder


def test_a_report_folder_is_whole_and_can_be_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    report = replace(demo_report(), radars=(), curves=demo_report().curves[:1])
    write_report(report, folder)
    (folder / "mine.txt").write_text("stays")
    (folder / f"{TEMPORARY_PREFIX}new-plots").mkdir()  # as a kill may leave it
    first = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    plotted = {"forest.svg", "forest.png", "curve-1.svg", "curve-1.png"}
    assert set(first) == {"report.html", "report.md", "report.json", "mine.txt"} | plotted
    write_report(report, folder)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first
    assert not list(folder.glob(f"{TEMPORARY_PREFIX}*"))
    write_report(replace(bare_report(), tasks=()), folder)
    assert not (folder / "plots").exists()


def test_a_place_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(bare_report(), tmp_path / "file" / "report")


def test_every_format_tells_all_of_a_task() -> None:
    """What a signature needs: majority beside chance, the test by name, and scores without the documents seen."""
    shown = demo_report()
    shown = replace(shown, tasks=tuple(replace(task, majority=0.333) for task in shown.tasks))
    seen = next(task for task in shown.tasks if task.unseen_scores is not None)
    without = rf"without them .*student {100 * (seen.unseen_scores or {})['student']:.1f}"
    for text in (markdown.render(shown), html.render(shown, ()), " ".join(printed(shown, 220).split())):
        assert "33.3" in text
        assert re.search(without, text)
    for text in (markdown.render(shown), html.render(shown, ())):
        assert seen.test in text
