"""Where a report goes besides its folder: the student's model card, and a JUnit file."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml
from dae_eval.rendering import junit
from dae_eval.rendering.card import BEGIN, END, upload_command, write_card
from huggingface_hub import ModelCard
from reports import bare_report, demo_report, failing_report, full_report, hostile_report

from kd.errors import UserError

CARD = """---
# kept as it is
license: apache-2.0
model-index:
- name: somebody's
  results:
  - task: {type: text-generation}
    dataset: {name: arc, type: arc}
    metrics: [{type: acc, value: 1.0}]
    source: {name: elsewhere, url: x}
tags: [dae-align,   "lora"]
---

# student

Text of the   author.

## Recipe

```yaml
---
```
"""


def test_a_card_gets_the_report_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "student" / "README.md"
    path.parent.mkdir()
    path.write_bytes(CARD.encode())
    write_card(demo_report(), path)
    text = path.read_text()
    index = CARD[CARD.index("model-index:") : CARD.index("tags:")]
    before, after = CARD.split(index)
    assert (
        text.startswith(before.rstrip("\n"))
        and after.partition("---")[2].rstrip() in text
        and 'tags: [dae-align,   "lora"]' in text
    )
    card = ModelCard.load(path)
    results = {(r.dataset_name, r.source_name): r for r in card.data.eval_results or ()}
    assert results["arc", "elsewhere"].metric_value == 1.0
    price = next(task for task in demo_report().tasks if task.task == "world_price")
    assert results["world_price", "dae-align"].metric_value == round(100 * price.scores["student"], 2)
    assert (card.data.license, card.data.model_name) == ("apache-2.0", "somebody's")
    assert "gap closed" in text and "retention" in text and "world\\_price" not in text and "world_price" in text
    write_card(failing_report(), path)
    again = path.read_text()
    assert again.count(BEGIN) == again.count(END) == again.count("model-index:") == 1
    assert "Evaluation: FAIL" in again and "Evaluation: PASS" not in again
    write_card(demo_report(), path)
    assert path.read_text() == text


def test_text_after_the_report_stays(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(CARD)
    write_card(demo_report(), path)
    path.write_text(path.read_text() + "\nMy own words.\n")
    write_card(full_report(), path)
    text = path.read_text()
    assert text.endswith(f"{END}\n\nMy own words.\n")
    assert text.index("Text of the   author.") < text.index(BEGIN)


def test_a_folder_without_a_card_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "my-student" / "README.md"
    path.parent.mkdir()
    write_card(demo_report(), path)
    assert ModelCard.load(path).data.model_name == "my-student"
    assert "# my-student" in path.read_text()
    assert upload_command(path).startswith("hf upload YOUR-NAME/my-student ")


def test_line_ends_stay(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(CARD.replace("\n", "\r\n").encode())
    write_card(demo_report(), path)
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")


@pytest.mark.parametrize(
    "card",
    [
        "---\na: [\n---\ntext",
        "---\n- a\n---\ntext",
        f"text {BEGIN}",
        f"{END} {BEGIN}",
        f"{BEGIN}{END}{BEGIN}{END}",
        "---\nmodel-index: 3\n---\n",
        "---\nmodel-index:\n- {name: a}\n---\n",
        "---\n{license: mit}\n---\n",
        "---\nmodel-index:\n- name: &n a\n  results: []\npretty_name: *n\n---\n",
        '---\n"model-index":\n- {name: a, results: []}\n---\n',
    ],
)
def test_a_damaged_card_is_refused_and_left_alone(card: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(card)
    with pytest.raises(UserError, match=r"README\.md"):
        write_card(demo_report(), path)
    assert path.read_text() == card


@pytest.mark.parametrize(
    "card",
    [
        "\n---\nlicense: mit\n---\ntext   \n\n\n",
        "\ufeff---\nlicense: mit\n---\ntext",
        "---\nlicense: mit\nmodel-index:\n- {name: a, results: [], own: 1}\n# note\ntags: [a]\n---\none\r\ntwo\nthr\n",
        "---\r\nlicense: mit\r\n---\r\ntext\r\n",
        "",
    ],
)
def test_every_other_byte_stays(card: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(card.encode())
    write_card(demo_report(), path)
    text = path.read_bytes().decode()
    for part in ("license: mit", "# note", "tags: [a]", "text   \n\n\n", "one\r\ntwo\nthr\n", "own: 1"):
        assert (part in card) == (part in text)
    once = path.read_bytes()
    write_card(demo_report(), path)
    assert path.read_bytes() == once


def test_a_card_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the README\.md"):
        write_card(demo_report(), tmp_path / "card.md")
    with pytest.raises(UserError, match=r"--card .*folder .* not found"):
        write_card(demo_report(), tmp_path / "absent" / "README.md")


@pytest.mark.parametrize("make", [demo_report, bare_report, failing_report, hostile_report, full_report])
def test_junit_has_a_case_for_each_line_and_task(make: object) -> None:
    report = make()  # type: ignore[operator]
    root = ET.fromstring(junit.render(report).encode())
    verdict, tasks = root.findall("testsuite")
    lines = [one for one in (report.student.gap, report.student.retention, report.student.floor) if one is not None]
    words = [case.find("failure") for case in verdict.findall("testcase")]
    assert ["PASS" if found is None else found.get("type") for found in words] == [line.word for line in lines]
    assert len(tasks.findall("testcase")) == len(report.tasks) + len(report.benchmarks)
    for element in (root, verdict, tasks):
        assert element.get("failures") == str(len(element.findall(".//failure")))
        assert element.get("tests") == str(len(element.findall(".//testcase")))


def test_junit_fails_a_task_that_lost_or_is_undecided() -> None:
    root = ET.fromstring(junit.render(failing_report()).encode())
    words = {case.get("name"): [one.get("type") for one in case.findall("failure")] for case in root.iter("testcase")}
    assert words["world_arithmetic"] == ["FAIL"]
    assert words["world_sorting"] == ["INCONCLUSIVE"]
    assert words["world_copying"] == []


def test_metadata_is_yaml_with_hostile_names(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_card(hostile_report(), path)
    assert isinstance(yaml.safe_load(path.read_text().split("---\n")[1]), dict)
