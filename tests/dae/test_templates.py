"""Tokenizers and chat templates as inputs of a run: a change is told, and teachers with another template are, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from chat_tokenizers import KEEPS, SPACE_IN_HEADER
from pico import make_checkpoint
from processes import Signal, dae
from stage_forks import Forks
from transformers import AutoTokenizer
from worlds import make_adapter, metrics_of

STEPS = ("train.max_steps=6", "train.save_steps=2", "train.logging_steps=1", "lora.rank=2")
STEP = "kd.training.trainer:RoutedTrainer.training_step"


def write_chats(path: Path, rows: int = 24) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turns = [{"role": "user", "content": f"red {number}?"}, {"role": "assistant", "content": f"blue {number}"}]
            file.write(json.dumps({"messages": turns}) + "\n")


def give_template(folder: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """base with a template, an expert adapter with the same, chats of two routes."""
    folder = tmp_path / "world"
    folder.mkdir()
    make_checkpoint(folder / "base")
    give_template(folder / "base", SPACE_IN_HEADER)
    make_adapter(folder / "expert", folder / "base")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "expert")
    write_chats(folder / "general.jsonl")
    write_chats(folder / "shop.jsonl")
    return folder


def align(folder: Path, *more: str, command: tuple[str, ...] = ("align",), **settings):
    words = [*command, "--base", "base", "--expert", "expert", "--general-data", "general.jsonl"]
    words += ["--domain-data", "shop.jsonl", "--output", "student", *STEPS, *more]
    return dae(words, folder, proof=False, **settings)


def test_a_changed_template_stops_a_run_that_was_to_go_on(world: Path) -> None:
    stopped = align(world, signals=[Signal(STEP, call=4)])
    assert stopped.status == -9
    before = (world / "base" / "chat_template.jinja").read_text()
    (world / "base" / "chat_template.jinja").write_text(before.replace("': '", "' - '"))
    again = align(world)
    assert again.status == 2
    assert "tokens of data.general[0] (tokenizer or chat template): " in again.err
    (world / "base" / "chat_template.jinja").write_text(before)
    assert align(world).status == 0


def test_a_changed_tokenizer_stops_it_too(world: Path) -> None:
    assert align(world, signals=[Signal(STEP, call=4)]).status == -9
    file = world / "base" / "tokenizer.json"
    written = json.loads(file.read_text())
    written["model"]["merges"] = []
    file.write_text(json.dumps(written))
    shutil.copyfile(file, world / "expert" / "tokenizer.json")
    again = align(world)
    assert again.status == 2
    assert "tokens of data.domain[0] (tokenizer or chat template): " in again.err


def test_a_run_begun_before_tokens_were_recorded_goes_on(world: Path) -> None:
    assert align(world, signals=[Signal(STEP, call=4)]).status == -9
    file = world / "student" / "provenance.json"
    provenance = json.loads(file.read_text())
    for sources in provenance["data"].values():
        for source in sources:
            del source["encoded"]
    file.write_text(json.dumps(provenance))
    assert align(world).status == 0
    assert metrics_of(world / "student")[-1]["step"] == 6


def test_an_expert_with_another_template_is_told_and_can_be_asked_in_its_own(world: Path) -> None:
    assert "chat template" not in align(world, command=("check", "align")).err
    give_template(world / "expert", KEEPS)
    told = align(world, command=("check", "align"))
    assert told.status == 0
    assert "expert.domain expert: its chat template (SHA-256 " in told.err
    assert "set data.chat_template=expert" in told.err
    own = align(world, "data.chat_template=expert")
    assert own.status == 0, own.err
    assert "chat template of its own" not in own.err
    assert AutoTokenizer.from_pretrained(world / "student").chat_template == KEEPS


def test_rows_without_conversations_need_no_template(world: Path) -> None:
    give_template(world / "expert", KEEPS)
    for name in ("general", "shop"):
        (world / f"{name}.jsonl").write_text('{"prompt": "red?", "completion": " blue"}\n' * 24)
    assert "chat template" not in align(world, command=("check", "align")).err


def test_plain_is_not_advised_where_a_role_has_a_template(world: Path) -> None:
    (world / "base" / "chat_template.jinja").unlink()
    told = align(world, command=("check", "align"))
    assert told.status == 2
    assert "set data.chat_template=expert" in told.err
    assert "plain" not in told.err
    (world / "expert" / "chat_template.jinja").unlink()
    assert "set data.chat_template to `plain` or to a .jinja file" in align(world, command=("check", "align")).err


def test_experts_templates_that_cannot_be_used(world: Path) -> None:
    wrong = dae(["sft", "--base", "base", "--data", "shop.jsonl", "data.chat_template=expert", "--output", "o"], world)
    assert wrong.status == 2
    assert "data.chat_template=expert: this stage has no expert" in wrong.err
    (world / "expert" / "chat_template.jinja").unlink()
    assert "expert has no chat template" in align(world, "data.chat_template=expert").err


def test_a_pipeline_sees_a_changed_template(world: Path) -> None:
    stage = {"stage": "sft", "base": "base", "data": {"train": "shop.jsonl"}, "lora": {"rank": 2}}
    stage["train"] = {"max_steps": 2}
    (world / "path.yaml").write_text(yaml.safe_dump({"output": "runs", "stages": {"expert": stage}}))
    forks = Forks()
    assert dae(["run", "path.yaml"], world, signals=[forks], proof=False).status == 0
    template = world / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("': '", "' - '"))
    again = dae(["run", "path.yaml"], world, signals=[forks], proof=False)
    assert again.status == 2
    assert "tokenizer of base" in again.err + again.out


def test_rows_of_an_expert_are_read_as_they_were_for_it(world: Path) -> None:
    rows = [{"instruction": f"red {n}?", "output": f"blue {n}", "text": "both"} for n in range(24)]
    (world / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sft", "--base", "base", "--data", "shop.jsonl", "--output", "expert2", *STEPS]
    refused = dae(words, world, proof=False)
    assert refused.status == 2
    assert "set the source's format to text or alpaca, such as data.ROUTE.0.format=text" in refused.err
    assert dae([*words, "data.train.0.format=alpaca"], world, proof=False).status == 0
    words = ["align", "--base", "base", "--expert", "expert2", "--general-data", "general.jsonl", *STEPS]
    assert dae([*words, "--output", "student"], world, proof=False).status == 0
    assert "format: alpaca" in (world / "student" / "recipe.yaml").read_text()


def test_check_shows_formats_and_keys_that_are_not_read(world: Path) -> None:
    lines = (world / "shop.jsonl").read_text().splitlines()
    (world / "shop.jsonl").write_text("".join(line[:-1] + ', "id": 3}\n' for line in lines))
    shown = align(world, command=("check", "align")).out
    assert "shop.jsonl: format: messages (24)" in shown
    assert "warning: shop.jsonl: keys not read: id (24)" in shown
    assert "data.domain: shop.jsonl: keys not read: id (24)" in align(world).err
