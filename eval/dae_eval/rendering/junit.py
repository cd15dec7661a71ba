"""A JUnit XML file: the verdict in any CI, one case for each of its lines and for each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from dae_eval.comparing.statistics import Word
from dae_eval.rendering.headlines import headlines
from dae_eval.rendering.wording import columns, mark, one_line, p_value, points, score
from dae_eval.report import BenchmarkLine, Report, TaskLine


@dataclass(frozen=True)
class Case:
    """One case. word: PASS, or why it fails (INCONCLUSIVE does not pass, as in the exit status). text: its figures."""

    suite: str
    name: str
    word: Word
    text: str


def render(report: Report) -> str:
    """The file's text."""
    verdict = [
        Case("verdict", line.measure, line.word, "; ".join(filter(None, (line.sentence, line.remark))))
        for line in headlines(report.student)
    ]
    tasks = [_task(task, report) for task in report.tasks]
    cases = {"verdict": verdict, "tasks": [*(_benchmark(line, report) for line in report.benchmarks), *tasks]}
    root = ET.Element("testsuites", _counts(f"dae report: {report.word}", [*verdict, *cases["tasks"]]))
    for name, found in cases.items():
        suite = ET.SubElement(root, "testsuite", {**_counts(name, found), "timestamp": f"{report.date}T00:00:00"})
        for case in found:
            _add(suite, case)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counts(name: str, cases: Sequence[Case]) -> dict[str, str]:
    failed = sum(case.word != "PASS" for case in cases)
    return {"name": name, "tests": str(len(cases)), "failures": str(failed), "errors": "0", "skipped": "0"}


def _task(task: TaskLine, report: Report) -> Case:
    """A task, which fails with the line of the worst task alone."""
    scores = ", ".join(
        f"{column.label} {score(value, task.unit)}"
        for column in columns(report)
        if (value := column.value(task.scores)) is not None
    )
    change = f"{points(task.difference, unit=task.unit)}{mark(task)} against {task.against}"
    text = f"{one_line(task.metric)}: {scores}; difference {change}, p {p_value(task.p_holm)} (Holm), n {task.n}"
    return Case(f"tasks.{one_line(task.group)}", one_line(task.task), _word(task.task, report), text)


def _benchmark(line: BenchmarkLine, report: Report) -> Case:
    """A benchmark as a whole."""
    text = f"{line.members} tasks; student {score(line.scores.get('student'))}, difference {points(line.difference)}"
    text = f"{text} against {line.against}, n {line.n}"
    name = one_line(line.benchmark)
    return Case(f"benchmarks.{one_line(line.group)}", name, _word(line.benchmark, report), text)


def _word(task: str, report: Report) -> Word:
    floor = report.student.floor
    if floor is None:
        return "PASS"
    if task in {one.task for one in floor.lost}:
        return "FAIL"
    return "INCONCLUSIVE" if task in {one.task for one in floor.undecided} else "PASS"


def _add(suite: ET.Element, case: Case) -> None:
    attributes = {"classname": case.suite, "name": case.name, "time": "0"}
    element = ET.SubElement(suite, "testcase", attributes)
    if case.word != "PASS":
        failure = ET.SubElement(element, "failure", {"type": case.word, "message": f"{case.word}: {case.text}"})
        failure.text = case.text
    else:
        ET.SubElement(element, "system-out").text = case.text
