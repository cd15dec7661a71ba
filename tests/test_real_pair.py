from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import real_pair
from benchmarks.real_pair import SETS, Job, Plan, jobs
from benchmarks.real_pair_scores import Document, TaskScores
from benchmarks.real_pair_tables import ENDINGS, STORIES, markdown
from dae.recipe import AlignRecipe
from dae.sampling.recipe import SampleRecipe
from kd.config.loading import load_recipe
from kd.config.schema import Frozen
from kd.stages.sft_recipe import SftRecipe

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS: dict[str, type[Frozen]] = {"sft": SftRecipe, "align": AlignRecipe, "sample": SampleRecipe}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(tmp_path / "shared", tmp_path / "work", tuple(SETS), ("lora", "full"), (0, 1, 2))


def recipe_of(command: tuple[str, ...]) -> Any:
    flags: dict[str, Any] = {}
    assignments = []
    words = iter(command[2:])
    for word in words:
        if word.startswith("--"):
            flags[{"data": "data.train"}.get(word[2:], word[2:].replace("-", "_"))] = next(words)
        else:
            assignments.append(word)
    numbers = {key: int(value) if value.isdigit() else value for key, value in flags.items()}
    return load_recipe(SCHEMAS[command[1]], None, numbers, assignments)


def students(plan: Plan, role: str) -> list[Job]:
    return [job for job in jobs(plan) if f"-{role}-" in job.name]


def test_every_command_is_a_valid_recipe_and_waits_for_what_it_reads(plan: Plan) -> None:
    planned = jobs(plan)
    before: set[str] = set()
    for job in planned:
        assert set(job.after) <= before
        before.add(job.name)
        for command in job.commands:
            if command[0] == "dae":
                recipe_of(command)
    assert len(planned) == len(before) == 2 + 4 + 24
    for job in students(plan, "dae"):
        recipe = recipe_of(job.commands[0])
        assert Path(recipe.expert["domain"]).name in job.after
        assert ("sample" in job.after) == (recipe.data.routes["general"][0].path == str(plan.work / "general.jsonl"))


def test_next_token_students_differ_from_dae_students_in_the_loss_alone(plan: Plan) -> None:
    pairs = list(zip(students(plan, "dae"), students(plan, "ntp"), strict=True))
    assert len(pairs) == 12
    for dae, ntp in pairs:
        ours, theirs = recipe_of(dae.commands[0]), recipe_of(ntp.commands[0])
        assert (ours.lambda_, theirs.lambda_) == (1.0, 0.0)
        assert theirs.model_copy(update={"lambda_": 1.0, "output": ours.output}) == ours
        assert (ours.lora is None) == ("-full-" in dae.name)
        assert ours.train["learning_rate"] == real_pair.LEARNING_RATES["full" if ours.lora is None else "lora"]
        rows = ours.train["per_device_train_batch_size"] * ours.train["gradient_accumulation_steps"]
        assert ours.data.routes["domain"][0].share * rows == pytest.approx(
            SETS[ours.output.split("/")[-1].split("-")[0]].rows[0]
        )


def write_world(plan: Plan) -> None:
    """Three documents a task; the second hetPQA document has the evidence of a training row."""
    data = plan.shared / "data"
    (data / "ecom").mkdir(parents=True)
    (data / "general").mkdir()
    rows = [{"prompt": f"Question: q\nEvidence: e{i}\nAnswer:", "completion": " ab" * (i + 1)} for i in range(3)]
    write_rows(data / "ecom/heldout_hetpqa.jsonl", rows)
    write_rows(data / "ecom/heldout_epqa.jsonl", rows)
    write_rows(data / "ecom/train.jsonl", [rows[1], {"prompt": "Data: x", "completion": " y"}])
    write_rows(data / "general/heldout_stories.jsonl", [{"text": "é" * 1000} for _ in range(3)])


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_scores(plan: Plan, name: str, factor: float, endings: list[float]) -> None:
    scores = {
        "real_hetpqa": [30 * factor, 60 * factor, 60 * factor],
        "real_epqa": [12 * factor, 12 * factor, 12 * factor],
        "real_stories": [1800 / factor] * 3,
        "real_story_endings": endings,
    }
    tasks = {
        task: {
            "task": task,
            "version": "1",
            "metric": "m",
            "documents": [{"id": i, "hash": f"h{i}", "score": s} for i, s in enumerate(values)],
        }
        for task, values in scores.items()
    }
    path = real_pair.scores_file(plan, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fingerprint": "f", "limit": None, "tasks": tasks}), encoding="utf-8")


def test_figures_from_scores_by_hand(plan: Plan) -> None:
    write_world(plan)
    write_scores(plan, "base", 1.0, [1, 1, 1])
    write_scores(plan, "questions-lora-expert", 0.5, [0, 0, 1])
    write_scores(plan, "questions-lora-dae-0", 0.6, [1, 1, 1])
    write_scores(plan, "questions-lora-dae-2", 0.7, [1, 0, 0])
    write_scores(plan, "questions-lora-ntp-2", 0.8, [1, 0, 0])
    found = real_pair.summarise(plan, "questions", "lora")
    assert found is not None
    base, dae = found["rows"]["base"], found["rows"]["dae"]
    # completions have 3, 6 and 9 bytes; a story of 900 characters 1,800
    assert base["scores"]["real_hetpqa"] == pytest.approx([-150 / 18])
    assert base["scores"]["real_hetpqa_unshared"] == pytest.approx([-90 / 12])
    assert base["scores"]["real_stories"] == pytest.approx([-1.0])
    assert dae["scores"]["real_epqa"] == pytest.approx([-0.6 * 2, -0.7 * 2])
    assert [closed["value"] for closed in dae["gap_closed_by_seed"]] == pytest.approx([0.8, 0.6])
    assert dae["gap_closed"]["value"] == pytest.approx(0.7)
    assert dae["stories_bits_per_byte_over_reference"]["value"] == pytest.approx((1 / 0.6 + 1 / 0.7) / 2 - 1)
    assert dae["story_endings_retention"]["value"] == pytest.approx(100 * 2 / 3)
    # only seed 2 has both students
    assert found["dae_minus_ntp"]["real_epqa"]["value"] == pytest.approx((0.8 - 0.7) * 2)
    assert found["runs"]["dae"] == ["questions-lora-dae-0", "questions-lora-dae-2"]
    assert real_pair.summarise(plan, "questions", "full") is None


def test_results_are_written_from_what_is_there(plan: Plan, tmp_path: Path) -> None:
    real_pair.write_results(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_world(plan)
    write_scores(plan, "base", 1.0, [1, 1, 1])
    write_scores(plan, "questions-full-expert", 0.5, [0, 0, 1])
    write_scores(plan, "questions-full-dae-1", 0.6, [1, 1, 0])
    real_pair.write_results(plan, tmp_path / "out")
    record = json.loads((tmp_path / "out/real_pair.json").read_text(encoding="utf-8"))
    assert [result["student"] for result in record["results"]] == ["full"]
    table = (tmp_path / "out/real_pair.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| DAE, all weights"))
    assert [cell.strip() for cell in line.split("|")][2:6] == ["5.000", "4.500", "1.200", "80.0 % [80.0, 80.0]"]
    assert "next-token loss, same rows, all weights" not in table
    assert markdown(record, ["dae sft"], "python").count("```") == 4


def test_bits_per_byte_are_over_the_bytes_of_the_documents_kept() -> None:
    documents = [Document(0, "a", 8.0), Document(1, "b", 2.0), Document(2, "c", 100.0)]
    scores = real_pair.per_byte(
        TaskScores("t", "1", "bits", tuple(documents)), np.array([True, True, False]), np.array([4.0, 1.0, 7.0])
    )
    assert scores.mean == pytest.approx(-(8 + 2) / (4 + 1))
    assert [document.id for document in scores.documents] == [0, 1]


def test_base_scores_agree_with_the_published_ones(shared: Path) -> None:
    # shared/README.md: 0.273 on the first 300 titles and 1.181 bits per byte on the first 100 stories, cut at 1,200
    # characters. There, choices are tokenised by themselves, which moves four titles; and whole texts are scored as
    # lm-eval's rolling task does, as mean over documents and with a second <s> after the first, 12.79 bits here.
    found = real_pair.score_checkpoint(str(shared / "models/stories260k"), shared, ["real_category"], limit=300)
    assert found["real_category"].mean == pytest.approx(0.273, abs=0.02)
    found = real_pair.score_checkpoint(str(shared / "models/stories260k"), shared, ["real_stories"], limit=100)
    bytes_D = real_pair.completion_bytes(shared, "real_stories")[:100]
    bits_D = np.array([document.score for document in found["real_stories"].documents]) + 8.8629 / math.log(2)
    assert float((bits_D / bytes_D).mean()) == pytest.approx(1.181, abs=0.01)


def test_243_questions_share_their_evidence_with_a_training_row(shared: Path) -> None:
    assert int((~real_pair.new_evidence(shared)).sum()) == 243


@pytest.mark.slow
def test_a_job_runs_and_its_scores_are_kept(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "eval")]))
    plan = Plan(shared, tmp_path / "work", ("category",), ("lora",), (0,), steps=1, limit=4)
    expert = next(job for job in jobs(plan) if job.name == "category-lora-expert")
    assert all(real_pair.run_logged(plan, expert.name, command) for command in expert.commands)
    scores, checkpoint = real_pair.scores_file(plan, expert.name), str(plan.work / expert.name)
    tasks = ["real_category", STORIES, ENDINGS]
    written = scores.stat().st_mtime_ns
    real_pair.evaluate(checkpoint, shared, tasks, scores, limit=4)
    assert scores.stat().st_mtime_ns == written
    real_pair.evaluate(checkpoint, shared, tasks, scores, limit=2)
    assert len(json.loads(scores.read_text(encoding="utf-8"))["tasks"][STORIES]["documents"]) == 2
    assert not real_pair.run_logged(plan, "missing", ("dae", "sft", "--base", str(tmp_path / "nowhere")))
