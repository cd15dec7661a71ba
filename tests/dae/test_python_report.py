"""`dae.report` from Python says what the command says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pico import make_checkpoint
from pico_tasks import make_suite, make_tasks
from worlds import make_adapter, make_rows

from dae import UserError, cli, report, sft


@pytest.fixture(autouse=True, scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "world"
    make_adapter(folder / "expert", make_checkpoint(folder / "base"))
    make_suite(folder / "suite.yaml", make_tasks(folder / "tasks"))
    make_rows(folder / "shop.jsonl", 0)
    return folder


@pytest.fixture(autouse=True)
def _here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr("kd.training.publishing.verify_saved", lambda *_: None)


def test_the_verdict_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base", "base", "--expert", "expert", "--student", "expert", "--compare", "idle=base"]
    assert cli.run(["report", *flags, "--suite", "suite.yaml", "--output", "of-command", "batch_size=3"]) == 1
    capsys.readouterr()
    found = report(
        "base", "expert", "expert", compare={"idle": "base"}, suite="suite.yaml", output_dir="of-python",
        args={"batch_size": 3},
    )  # fmt: skip
    assert capsys.readouterr().out == ""
    reports = [json.loads(Path(folder, "report.json").read_text()) for folder in ("of-command", "of-python")]
    for key in ("word", "student", "others", "tasks", "flips", "models"):
        assert reports[0][key] == reports[1][key]
    assert (found.verdict, found.path) == (reports[0]["word"], Path("of-python"))
    assert repr(found) == f"ReportResult({found.verdict}, of-python/report.html)"
    assert found._repr_markdown_().startswith(f"## Evaluation: {found.verdict}\n")
    command = dict(reports[1]["provenance"])["command"]
    assert command.startswith("dae report --base=base --expert=expert --student=expert")


def test_a_result_reports_on_itself() -> None:
    result = sft("base", "shop.jsonl", output_dir="own", max_steps=2)
    found = result.report("suite.yaml", retention_only=True)
    assert found.path == Path("own/report")
    models = {model.role: model.path for model in found.data.models}
    assert (models["student"], models["reference"]) == ("own", "base")
    with pytest.raises(UserError, match=r"report\(\): expert: required"):
        result.report("suite.yaml", output_dir="other")
    assert result.report("suite.yaml", output_dir="other", expert="expert").data.student.gap is not None


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"student": None}, "report(): student: required"),
    ({"margin": 0}, "margin 0: must be above 0"),
    ({"max_task_loss": 101}, "max_task_loss 101: "),
    ({"min_gap": 2}, "min_gap 2: "),
    ({"compare": {"expert": "base"}}, "report(compare=...): expert: is a role"),
    ({"args": {"batchsize": 3}}, "batchsize=3: "),
    ({"suite": "none.yaml"}, "none.yaml: "),
    ({"student": "nowhere"}, "nowhere: "),
]


@pytest.mark.parametrize(("changed", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_are_one_message_and_leave_nothing(changed: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"base": "base", "expert": "expert", "student": "expert", "suite": "suite.yaml"}
    with pytest.raises(UserError) as refused:
        report(**{**given, "output_dir": "wrong", **changed})
    assert words in str(refused.value)
    assert not Path("wrong").exists()
