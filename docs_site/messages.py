"""Every message of an error, from the code that raises it, with its remedy and, where one is known, its cause."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from docs_site.areas import AREAS, MACHINE
from docs_site.causes import CAUSES
from docs_site.inline import with_code
from docs_site.templates import Template, all_templates

# Words that begin a remedy where it is a sentence of its own.
IMPERATIVES = (
    "Choose", "Convert", "Evaluate", "Give", "If they", "Install", "Leave", "Merge", "Pass", "Remove", "Save", "Set",
    "Train", "Use", "Where the method allows it",
)  # fmt: skip
# A remedy behind a colon.
REMEDY = re.compile(
    r": ((?:add|change|evaluate|give|let|move|name|pass|pip install|put|remove|rename|set|use|write)\b.*)$", re.DOTALL
)
FILLED = re.compile("«[^»]*»")


@dataclass(frozen=True)
class Entry:
    """One row of the page."""

    problem: str
    cause: str
    remedy: str


def section() -> str:
    """A heading for each area and its messages."""
    found = by_area(all_templates())
    return "\n\n".join(f"### {area}\n\n{table(found[area])}" for area in [*AREAS, MACHINE] if found[area])


def by_area(templates: Sequence[Template]) -> dict[str, list[Entry]]:
    """The messages of each area, in the order of the files, without repetitions."""
    found: dict[str, dict[str, Entry]] = {area: {} for area in [*AREAS, MACHINE]}
    for template in filter(says_something, templates):
        found[area_of(template)].setdefault(template.text, entry(template.text))
    return {area: list(entries.values()) for area, entries in found.items()}


def says_something(template: Template) -> bool:
    """Whether a message has words of its own; others repeat what a library or another message says."""
    return len(re.findall(r"[A-Za-z]{2,}", FILLED.sub("", template.text))) > 1


def area_of(template: Template) -> str:
    """Where a message is listed: the machine's on their own, others by the longest prefix of their file."""
    if template.error == "MachineError":
        return MACHINE
    fitting = [
        (len(prefix), area)
        for area, prefixes in AREAS.items()
        for prefix in prefixes
        if template.file.startswith(prefix)
    ]
    assert fitting, f"docs_site/areas.py: no area for {template.file}"
    return max(fitting)[1]


def entry(text: str) -> Entry:
    problem, remedy = in_two(text)
    return Entry(problem, next((cause for part, cause in CAUSES.items() if part in text), ""), remedy)


def in_two(text: str) -> tuple[str, str]:
    """A message as what is wrong and what to do: the latter is its last clause, or its last sentences."""
    for sentence in sentence_starts(text):
        if text[sentence:].startswith(IMPERATIVES):
            return text[:sentence].rstrip(), text[sentence:]
    if told := REMEDY.search(text):
        return text[: told.start()], told[1]
    clauses = [place for place in range(len(text)) if text.startswith("; ", place) and not inside_brackets(text, place)]
    if clauses:
        return text[: clauses[-1]], text[clauses[-1] + 2 :]
    problem, mark, remedy = text.rpartition(": ")
    return (problem, remedy) if mark and remedy.startswith("expected ") else (text, "")


def sentence_starts(text: str) -> Iterator[int]:
    return (place + 2 for place in range(len(text)) if text.startswith(". ", place))


def inside_brackets(text: str, place: int) -> bool:
    return text.count("(", 0, place) > text.count(")", 0, place)


def table(entries: Sequence[Entry]) -> str:
    """Messages in HTML, one below the other on a narrow screen."""
    head = "<thead><tr><th>message, and its cause</th><th>remedy</th></tr></thead>"
    return "\n".join(["<div class='messages'><table>", head, "<tbody>", *map(line, entries), "</tbody></table></div>"])


def line(one: Entry) -> str:
    cause = f"<p>Cause: {with_code(one.cause)}</p>" if one.cause else ""
    problem = escape(one.problem).replace("\n", "<br>")
    return f"<tr><td><code>{problem}</code>{cause}</td><td>{with_code(one.remedy)}</td></tr>"
