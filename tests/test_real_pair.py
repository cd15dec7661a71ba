"""The real pair: its recipe, and its figures from scores by hand and of a real checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import real_pair
from benchmarks.real_pair import SEEDS, STUDENTS, TASKS
from benchmarks.real_pair_scores import Document, TaskScores, completion_bytes, evaluate, new_evidence, score_checkpoint
from benchmarks.real_pair_tables import ENDINGS, STORIES, markdown
from dae.pipeline.recipe import read_pipeline

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_next_token_students_differ_from_dae_students_in_the_loss_alone() -> None:
    pipeline = read_pipeline(ROOT / "benchmarks" / "recipes" / "real_pair.yaml").pipeline()
    stages = {stage.name: stage for stage in pipeline.stages}
    assert Path(pipeline.output) == real_pair.WORK
    assert len(stages) == 1 + 4 + 24
    for name in (f"{of}-{student}" for of in TASKS for student in STUDENTS):
        expert = stages[f"{name}-expert"].recipe
        for seed in SEEDS:
            dae, ntp = (stages[f"{name}-{role}-{seed}"] for role in ("dae", "ntp"))
            ours, theirs = dae.recipe.model_dump(), ntp.recipe.model_dump()
            assert (ours["lambda_"], theirs["lambda_"]) == (1.0, 0.0)
            assert theirs | {"lambda_": 1.0, "output": ours["output"]} == ours
            assert ours["seed"] == seed
            assert (ours["lora"] is None) == (expert.lora is None) == ("-full" in name)
            assert ours["train"]["learning_rate"] == expert.train["learning_rate"]
            assert dae.settings()["expert"] == {"domain": f"@{name}-expert"}


def write_shared(shared: Path) -> None:
    """Three documents a task; the second hetPQA document has the evidence of a training row."""
    data = shared / "data"
    (data / "ecom").mkdir(parents=True)
    (data / "general").mkdir()
    rows = [{"prompt": f"Question: q\nEvidence: e{i}\nAnswer:", "completion": " ab" * (i + 1)} for i in range(3)]
    write_rows(data / "ecom/heldout_hetpqa.jsonl", rows)
    write_rows(data / "ecom/heldout_epqa.jsonl", rows)
    write_rows(data / "ecom/train.jsonl", [rows[1], {"prompt": "Data: x", "completion": " y"}])
    write_rows(data / "general/heldout_stories.jsonl", [{"text": "é" * 1000} for _ in range(3)])


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_scores(work: Path, name: str, factor: float, endings: list[float]) -> None:
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
    path = real_pair.scores_file(work, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fingerprint": "f", "limit": None, "tasks": tasks}), encoding="utf-8")


def test_figures_from_scores_by_hand(tmp_path: Path) -> None:
    write_shared(tmp_path)
    write_scores(tmp_path, "base", 1.0, [1, 1, 1])
    write_scores(tmp_path, "questions-lora-expert", 0.5, [0, 0, 1])
    write_scores(tmp_path, "questions-lora-dae-0", 0.6, [1, 1, 1])
    write_scores(tmp_path, "questions-lora-dae-2", 0.7, [1, 0, 0])
    write_scores(tmp_path, "questions-lora-ntp-2", 0.8, [1, 0, 0])
    found = real_pair.summarise(tmp_path, tmp_path, "questions", "lora")
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
    assert real_pair.summarise(tmp_path, tmp_path, "questions", "full") is None


def test_results_are_written_from_what_is_there(tmp_path: Path) -> None:
    real_pair.write_results(tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_shared(tmp_path)
    write_scores(tmp_path, "base", 1.0, [1, 1, 1])
    write_scores(tmp_path, "questions-full-expert", 0.5, [0, 0, 1])
    write_scores(tmp_path, "questions-full-dae-1", 0.6, [1, 1, 0])
    real_pair.write_results(tmp_path, tmp_path, tmp_path / "out")
    record = json.loads((tmp_path / "out/real_pair.json").read_text(encoding="utf-8"))
    assert [result["student"] for result in record["results"]] == ["full"]
    table = (tmp_path / "out/real_pair.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| DAE, all weights"))
    assert [cell.strip() for cell in line.split("|")][2:6] == ["5.000", "4.500", "1.200", "80.0 % [80.0, 80.0]"]
    assert "next-token loss, same rows, all weights" not in table


def test_the_committed_tables_follow_from_the_committed_figures() -> None:
    """But for the commands: they were those of an earlier script."""
    record = json.loads((RESULTS / "real_pair.json").read_text(encoding="utf-8"))
    committed = (RESULTS / "real_pair.md").read_text(encoding="utf-8")
    assert markdown(record).partition("## Commands")[0] == committed.partition("## Commands")[0]


def test_bits_per_byte_are_over_the_bytes_of_the_documents_kept() -> None:
    documents = [Document(0, "a", 8.0), Document(1, "b", 2.0), Document(2, "c", 100.0)]
    scores = real_pair.per_byte(
        TaskScores("t", "1", "bits", tuple(documents)), np.array([True, True, False]), np.array([4.0, 1.0, 7.0])
    )
    assert scores.mean == pytest.approx(-(8 + 2) / (4 + 1))
    assert [document.id for document in scores.documents] == [0, 1]


def test_base_scores_agree_with_the_published_ones(shared: Path) -> None:
    # shared/README.md: 1.181 bits per byte on the first 100 stories, cut at 1,200 characters. There, whole texts are
    # scored as lm-eval's rolling task does, as mean over documents and with a second <s> after the first, 12.79 bits.
    found = score_checkpoint(str(shared / "models/stories260k"), shared, [STORIES], limit=100)
    bytes_D = completion_bytes(shared, STORIES)[:100]
    bits_D = np.array([document.score for document in found[STORIES].documents]) + 8.8629 / math.log(2)
    assert float((bits_D / bytes_D).mean()) == pytest.approx(1.181, abs=0.01)


def test_243_questions_share_their_evidence_with_a_training_row(shared: Path) -> None:
    assert int((~new_evidence(shared)).sum()) == 243


def test_scores_are_kept_for_the_same_weights_tasks_and_documents(shared: Path, tmp_path: Path) -> None:
    checkpoint, scores = str(shared / "models/stories260k"), tmp_path / "scores.json"
    evaluate(checkpoint, shared, ["real_category", STORIES, ENDINGS], scores, limit=4)
    written = scores.stat().st_mtime_ns
    evaluate(checkpoint, shared, [STORIES], scores, limit=4)
    assert scores.stat().st_mtime_ns == written
    evaluate(checkpoint, shared, [STORIES], scores, limit=2)
    assert len(json.loads(scores.read_text(encoding="utf-8"))["tasks"][STORIES]["documents"]) == 2
