"""README, docs/ and what docs_site/ generates: links lead somewhere, commands exist, nothing of the code is missing."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
import typer

import dae
from dae.cli import command_line
from dae.commands.keys import schemas
from dae.stages import STAGES
from docs_site import keys, messages, rows
from docs_site.areas import AREAS
from docs_site.causes import CAUSES
from docs_site.templates import ERRORS, all_templates
from kd.config.data_recipe import FORMATS
from kd.config.key_docs import key_docs

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "recipes/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
GENERATED = "<!-- generated: "


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!\w+:)([^()\s#]*)(?:#([^()\s]*))?\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor and GENERATED not in file.read_text(encoding="utf-8"):
            assert anchor in anchors(file), f"{target}#{anchor}"


def code_of(page: Path) -> Iterator[str]:
    """The code of a page: lines of indented blocks, with their continuations, and what stands in backticks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.split("  #")[0].strip()
        else:
            yield from re.findall(r"`([^`]*)`", line)


def commands_of(page: Path) -> list[list[str]]:
    found = (command for code in code_of(page) for command in re.findall(r"(?:^|\s)(?<!from )dae ([a-z].*)$", code))
    return [shlex.split(command.replace("'", "")) for command in found]


def known(words: list[str]) -> None:
    """Hold a command and its flags to the command line; words in capitals and dots stand for the reader's."""
    group, place = typer.main.get_command(command_line()), 0
    context = typer.Context(group)
    while place < len(words) and hasattr(group, "commands"):
        word = words[place]
        if word not in group.commands:
            assert place > 0 and (word.isupper() or "/" in word or word == "..."), f"dae {' '.join(words)}"
            break
        group, place = group.commands[word], place + 1
        if word in ("check", "cache") and words[place : place + 1] and words[place] not in STAGES:
            return  # with a file: the flags of the recipe's stage
    options = {name for parameter in group.get_params(context) for name in parameter.opts} | {"--help", "--version"}
    for flag in (word.split("=")[0] for word in words[place:] if word.startswith("--")):
        assert flag in options, f"dae {' '.join(words)}: {flag}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=named)
def test_commands_and_flags_exist(page: Path) -> None:
    for words in commands_of(page):
        known(words)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_targets_of_make_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for code in code_of(page):
        for target in re.findall(r"^make ([a-z-]+)", code):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), code
        for path in re.findall(r"\b(?:benchmarks|recipes|examples|tests|docs|docs_site|kd|dae)/[\w./-]+\.\w+\b", code):
            assert (ROOT / path).exists() or (ROOT / "eval" / path).exists() or "/" + path in code, code


def test_commands_are_found_in_the_pages() -> None:
    assert [words[0] for words in commands_of(ROOT / "README.md")][:4] == ["sft", "sample", "check", "align"]
    with pytest.raises(AssertionError, match="--basis"):
        known(["align", "--basis", "B"])
    with pytest.raises(AssertionError, match="dae aling"):
        known(["aling"])


def test_the_calls_of_the_python_page_can_be_made() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    tree = ast.parse(block)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert {ast.unparse(call.func) for call in calls} == {*imported}
    for call in calls:
        keywords = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(getattr(dae, ast.unparse(call.func))).bind(*call.args, **keywords)


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_every_key_of_every_recipe_is_listed() -> None:
    section = keys.section()
    for name, schema in schemas().items():
        assert f"## {keys.title(name)}\n" in section
        for doc in key_docs(schema):
            assert section.count(f"id='{name}.{doc.key}'") == 1
    assert "`--general-data` sets `data.general`" in section
    assert "id='run.stages'" in section


def letters(text: str) -> str:
    """Only letters and digits: how a message is broken into cells and marked up does not matter."""
    return re.sub(r"[\W_]", "", unescape(re.sub(r"<(?!\w+\b-)[^<>]*>", "", text)))


def literals(path: Path) -> Iterator[str]:
    """The parts of error messages that are written in a file, two words or longer."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            texts = (part.value for part in parts if isinstance(part, ast.Constant))
            yield from (text for text in texts if len(re.findall(r"[A-Za-z]{2,}", text)) > 1)


def test_every_message_is_listed() -> None:
    page = letters(re.sub(r"<p>Cause: .*?</p>", "", messages.section()))
    files = [path for package in ("kd", "dae", "eval/dae_eval") for path in sorted((ROOT / package).rglob("*.py"))]
    found = [(path, text) for path in files for text in literals(path)]
    assert len(found) > 400
    assert letters("out of memory; halve train.per_device_train_batch_size") in page
    assert letters("«key» = «value»: expected an integer") in page
    assert [(str(path), text) for path, text in found if letters(text) not in page] == []


def test_causes_and_areas_belong_to_messages() -> None:
    templates = all_templates()
    assert [part for part in CAUSES if not any(part in template.text for template in templates)] == []
    files = [template.file for template in templates]
    for prefix in (prefix for prefixes in AREAS.values() for prefix in prefixes):
        assert (ROOT / prefix).exists() or any(file.startswith(prefix) for file in files), prefix


def test_a_message_is_parted_into_problem_and_remedy() -> None:
    assert messages.in_two("a: not there; look (here; or there)") == ("a: not there", "look (here; or there)")
    assert messages.in_two("a: too long: set b=1") == ("a: too long", "set b=1")
    assert messages.in_two("a: «x»: expected b, not «y»") == ("a: «x»", "expected b, not «y»")
    assert messages.in_two("a: is damaged. Save it again.") == ("a: is damaged.", "Save it again.")
    assert messages.in_two("a: is damaged (torn; short)") == ("a: is damaged (torn; short)", "")


def test_every_format_of_rows_is_shown_with_its_mask() -> None:
    shown = {case.title: rows.rendering(case) for case in rows.CASES}
    assert {name for name in FORMATS if any(f"format: {name}" in html for html in shown.values())} == set(FORMATS)
    *_, (last, refused) = shown.items()
    assert last == "A part that the template leaves out"
    assert "class='row refused'" in refused and "tools[0]" in refused
    assert all("<mark>" in html for title, html in shown.items() if title != last)


@pytest.mark.parametrize(
    ("title", "marked"),
    [
        ("A turn without loss", ["9 coins.<|im_end|>"]),
        ("An answer that was cut off", ["It costs"]),
        ("With tools", ['<call>price {"item": "kettle"}</call><|im_end|>', "9 coins.<|im_end|>"]),
        ("A template without `{% generation %}`", ["<think>Look it up.</think>9 coins.<|im_end|>"]),
        ("A template with `{% generation %}`", ["9 coins.<|im_end|>"]),
        ("A pair of strings", [" 9 coins.</s>"]),
    ],
)
def test_the_masks_of_the_page(title: str, marked: list[str]) -> None:
    (case,) = (case for case in rows.CASES if case.title == title)
    assert [unescape(text) for text in re.findall("<mark>(.*?)</mark>", rows.rendering(case))] == marked


SECTIONS = {
    ("figures", "Training against merging"): ("trade_off",),
    ("figures", "What a step costs"): ("step_cost",),
    ("figures", "Beside other trainers"): ("peers",),
    ("figures", "On a real checkpoint"): ("real_pair",),
    ("figures", "When the expert is worth more than labels"): ("rows",),
    ("start", "What it gives"): ("starts",),
}


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+\.\d+", text)


def assert_from(figures: list[str], results: tuple[str, ...]) -> None:
    """Each figure is one of a result, rounded; as a share or in per cent, or the inverse of a ratio."""
    folder = ROOT / "benchmarks" / "results"
    values = [float(one) for name in results for one in numbers((folder / f"{name}.md").read_text(encoding="utf-8"))]
    forms = [form for value in values for form in (value, 100 * value, 1 / value if value else 0)]
    for figure in figures:
        unit = 10 ** -len(figure.partition(".")[2])
        assert any(abs(float(figure) - form) <= 0.5001 * unit for form in forms), f"{figure}: not in {results}"


@pytest.mark.parametrize(("page", "section"), SECTIONS)
def test_tables_of_figures_are_those_of_the_results(page: str, section: str) -> None:
    whole = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    text = whole.split(f"\n## {section}\n")[1].split("\n## ")[0]
    figures = numbers("\n".join(line for line in text.splitlines() if line.startswith("|")))
    assert len(figures) > 15
    assert_from(figures, SECTIONS[page, section])


@pytest.mark.parametrize(
    ("page", "results"),
    [("README.md", "demo"), ("docs/index.md", "demo"), ("docs/figures.md", "demo"), ("README.md", "trade_off")],
)
def test_figures_in_sentences_are_those_of_the_results(page: str, results: str) -> None:
    paragraphs = (ROOT / page).read_text(encoding="utf-8").split("\n\n")
    (paragraph,) = (one for one in paragraphs if f"/{results}.md)" in one)
    figures = numbers(paragraph)
    assert len(figures) >= 4
    assert_from(figures, (results,))


def test_a_figure_of_no_result_is_found() -> None:
    with pytest.raises(AssertionError, match=r"108\.9"):
        assert_from(["100.3", "108.9"], ("demo",))
