"""The report that is built from finished evaluations, on evaluations made by hand."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
from dae_eval.comparing.comparison import compare
from dae_eval.comparing.statistics import Estimate
from dae_eval.results import Evaluation, HeldOutLoss, ModelFacts, TaskResult, TrainingRows
from evaluations import KINDS, N, evaluation, line, models, right, task, without

from kd.errors import UserError


def test_a_good_student_passes_both_lines() -> None:
    report = compare(models(), command="dae report")
    gap, retention = report.student.gap, report.student.retention
    assert gap is not None
    assert gap.closed is not None
    assert retention is not None
    assert (report.word, gap.word, retention.word) == ("PASS", "PASS", "PASS")
    assert gap.gain.value == pytest.approx(1.2)
    assert gap.closed.value == pytest.approx(1.1 / 1.2)
    assert gap.documents_needed is None
    assert retention.difference.value == 0
    assert -1 < retention.difference.low < 0 < retention.difference.high < 1
    assert retention.ratio is not None
    assert retention.ratio.value == pytest.approx(100)
    assert [(one.role, one.same_as) for one in report.models] == [
        ("base", ""),
        ("expert", ""),
        ("reference", "base"),
        ("student", ""),
    ]


def test_task_lines_say_what_was_measured() -> None:
    report = compare(models())
    price, crafts = line(report, "price"), line(report, "crafts")
    assert (price.against, price.n, price.clusters, price.wins, price.losses) == ("base", N, N, 220, 0)
    assert price.scores == pytest.approx({"base": 0.3, "expert": 0.9, "reference": 0.3, "student": 0.85})
    assert price.difference.value == pytest.approx(0.55)
    assert (price.chance, price.majority, price.metric, price.test) == (0.5, 0.6, "acc", "mid-p McNemar")
    assert price.p < 1e-6
    assert (crafts.against, crafts.wins, crafts.losses) == ("reference", 0, 40)
    assert line(report, "sorting").p == 1
    assert line(report, "sorting").detectable is not None
    assert (price.seen, price.unseen_scores, price.unseen_difference) == (0, None, None)
    least = min(found.p for found in report.tasks)
    assert min(found.p_holm for found in report.tasks) == pytest.approx(5 * least)


def test_two_identical_models() -> None:
    found = models()
    report = compare(dict.fromkeys(found, found["base"]))
    gap, retention = report.student.gap, report.student.retention
    assert gap is not None
    assert retention is not None
    assert all(each.difference == Estimate(0, 0, 0) and each.p == 1 for each in report.tasks)
    assert {each.test for each in report.tasks} == {"same weights"}
    assert (retention.word, retention.difference, retention.ratio) == (
        "PASS",
        Estimate(0, 0, 0),
        Estimate(100, 100, 100),
    )
    assert (gap.word, gap.closed, gap.gain) == ("INCONCLUSIVE", None, Estimate(0, 0, 0))
    assert gap.documents_needed is None
    assert report.word == "INCONCLUSIVE"
    assert report.flips == ()
    assert gap.same_weights
    assert compare({"reference": found["base"], "student": found["base"]}, retention_only=True).word == "PASS"


@pytest.mark.parametrize("damaged", ["sorting", "copying"])
def test_a_damaged_copy_fails_with_the_damaged_task_first(damaged: str) -> None:
    other = "copying" if damaged == "sorting" else "sorting"
    broken = {damaged: np.zeros(N), other: right(0.9, wrong=(3, 5))}
    report = compare(models(broken))
    assert report.word == "FAIL"
    assert report.student.retention is not None
    assert report.student.retention.word == "FAIL"
    assert report.tasks[0].task == damaged
    assert (report.tasks[0].losses, report.tasks[0].wins) == (360, 0)
    assert {flip.task for flip in report.flips[:360]} == {damaged}
    assert [(flip.task, flip.id) for flip in report.flips[360:362]] == [(other, 3), (other, 5)]
    first = report.flips[0]
    assert (first.change, first.answers, first.scores) == (
        -1,
        {"reference": "yes", "student": "no"},
        {"reference": 1, "student": 0},
    )
    assert [flip.change for flip in report.flips] == sorted(flip.change for flip in report.flips)
    assert {flip.task for flip in report.flips if flip.change > 0} == {"price", "size"}


def test_a_student_that_took_nothing_fails_the_gap() -> None:
    report = compare(models({"price": right(0.3, wrong=(1, 2)), "size": right(0.2)}))
    assert report.student.gap is not None
    assert report.student.gap.closed is not None
    assert (report.student.gap.word, report.word) == ("FAIL", "FAIL")
    assert report.student.gap.closed.high < 0


def test_minimum_of_the_gap_is_a_bar_for_the_whole_interval() -> None:
    assert compare(models(), min_gap=0.8).word == "PASS"
    higher = compare(models(), min_gap=0.9)
    assert higher.student.gap is not None
    assert (higher.word, higher.student.gap.word) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert higher.student.gap.documents_needed is not None
    assert higher.student.gap.documents_needed > N
    assert compare(models(), min_gap=0.98).word == "FAIL"


def test_a_small_suite_is_inconclusive_and_says_how_many_documents_would_decide() -> None:
    found = models()
    few = {
        role: replace(e, tasks={n: replace(t, documents=t.documents[-60:]) for n, t in e.tasks.items()})
        for role, e in found.items()
    }
    report = compare(few, retention_only=True)
    retention = report.student.retention
    assert retention is not None
    assert (report.word, retention.word) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert retention.documents_needed is not None
    assert 60 < retention.documents_needed < N
    assert compare(few, retention_only=True, margin=5.0, max_task_loss=20.0).word == "PASS"


def test_retention_only_needs_no_expert() -> None:
    found = models()
    two = {role: found[role] for role in ("reference", "student")}
    report = compare(two, retention_only=True)
    assert (report.word, report.student.gap) == ("PASS", None)
    assert line(report, "price").against == "reference"
    with pytest.raises(UserError, match=r"--from base=FOLDER.*--retention-only"):
        compare(two)
    with pytest.raises(UserError, match="--from reference=FOLDER"):
        compare({"student": found["student"]}, retention_only=True)


def test_a_suite_needs_domain_and_general_tasks() -> None:
    with pytest.raises(UserError, match="no domain task"):
        compare(without(models(), "price", "size"))
    assert compare(without(models(), "price", "size"), retention_only=True).word == "PASS"
    with pytest.raises(UserError, match="no general task"):
        compare(without(models(), "sorting", "copying"))


def test_scores_that_are_not_0_1_are_tested_by_bootstrap() -> None:
    rng = np.random.default_rng(0)
    found = models({"crafts": np.clip(right(0.8) * 0.9 + rng.normal(0, 0.05, N), 0, 1)})
    crafts = line(compare(found), "crafts")
    assert crafts.test == "paired bootstrap"
    assert crafts.detectable is not None
    assert crafts.detectable < 0.02


def test_other_students_stand_beside_and_do_not_decide() -> None:
    found = models()
    next_token = models({"sorting": right(0.5)})["student"]
    found["next-token"] = replace(next_token, model=ModelFacts("next-token", "sha-next-token"))
    report = compare(found, others=["next-token"])
    assert report.word == "PASS"
    (other,) = report.others
    assert other.retention is not None
    assert (other.name, other.retention.word) == ("next-token", "FAIL")
    assert line(report, "sorting").scores["next-token"] == 0.5
    assert report.student == compare(models()).student
    (compared,) = report.compared
    assert compared.other == "next-token"
    assert compared.gap is not None and compared.retention is not None
    assert compared.gap.value == 0
    assert -0.01 < compared.gap.low < 0 < compared.gap.high < 0.01
    assert compared.retention.value == pytest.approx(20)
    with pytest.raises(UserError, match="--from absent=FOLDER"):
        compare(found, others=["absent"])


def test_radars_of_tasks_and_of_categories() -> None:
    found = models()

    def with_categories(one: Evaluation) -> Evaluation:
        crafts = one.tasks["crafts"]
        documents = tuple(replace(d, category=["wood", "clay"][d.id % 2]) for d in crafts.documents)
        return replace(one, tasks={**one.tasks, "crafts": replace(crafts, documents=documents)})

    report = compare({role: with_categories(one) for role, one in found.items()})
    assert [(radar.title, radar.axes) for radar in report.radars] == [
        ("General tasks", ("sorting", "copying")),
        ("Domain tasks", ("price", "size")),
        ("Tasks in no line", ("crafts",)),
        ("crafts: categories", ("wood", "clay")),
    ]
    assert report.radars[0].values["expert"] == pytest.approx((0.4, 0.4))
    assert report.radars[3].values["student"] == pytest.approx((0.7, 0.7))


def test_curves_held_out_losses_and_notes() -> None:
    found = models()
    drift = [
        {
            "step": step,
            "loss": 1.0,
            "drift/general/kl_reference": 0.1 * step,
            "drift/general/loss": 2.0,
            "shop/ntp": 1.0,
        }
        for step in (0, 5, 10)
    ]
    falling = [{"step": step, "train/ntp": 5.0 / step, "train/tokens": 5} for step in range(1, 41)]
    rows = TrainingRows("rows.jsonl", "sha-rows", "the file is gone")
    loss = HeldOutLoss("general", "held.jsonl", "sha-held", 100, 1.5, {"reference": 0.2})
    found["student"] = replace(found["student"], training=tuple(drift), training_rows=(rows,), held_out=(loss,))
    found["base"] = replace(found["base"], held_out=(replace(loss, sha256="another"),))
    found["expert"] = replace(found["expert"], training=tuple(falling))
    report = compare(found)
    curves = {(curve.model, curve.name): curve for curve in report.curves}
    assert curves.keys() == {
        ("student", "KL(reference || student), general rows"),
        ("student", "held-out loss, general rows"),
        ("expert", "training loss, train rows"),
    }
    forgetting = curves["student", "KL(reference || student), general rows"]
    assert (forgetting.steps, forgetting.values) == ((0, 5, 10), pytest.approx((0, 0.5, 1)))
    assert [(each.model, each.loss, each.kl) for each in report.held_out] == [
        ("base", 1.5, {"reference": 0.2}),
        ("student", 1.5, {"reference": 0.2}),
    ]
    told = " ".join(report.notes)
    assert "rows.jsonl could not be compared with the documents: the file is gone" in told
    assert "route general are of different files" in told
    assert "KL(reference || model) is missing" not in told
    assert "The expert's training loss on train rows still fell by" in told


def test_provenance_names_every_condition() -> None:
    found = models()
    found["student"] = replace(
        found["student"], conditions={"command": "dae eval tasks --model student", "libraries": {"torch": "2.14.0"}}
    )
    told = compare(found, margin=2.0, command="dae report --output x").provenance
    said = dict(told)
    assert [(line.role, line.fingerprint) for line in compare(found).models if line.role == "student"] == [
        ("student", "sha-student")
    ]
    assert "sha-student" not in str(told)
    assert [said[f"tasks: {key}"] for key in ("version", "metric", "shots", "limit")] == ["1", "acc", "0", "null"]
    assert said["libraries.torch of base, expert, reference"] == "2.13.0"
    assert said["libraries.torch of student"] == "2.14.0"
    assert said["margin"] == "2.0"
    assert told[-1] == ("command of the report", "dae report --output x")

    made_here = {
        name: replace(one, conditions={"command": ["dae", "report", "--output", "a b"]}) for name, one in found.items()
    }
    told = compare(made_here, margin=2.0, command="dae report --output 'a b'").provenance
    assert [line for line in told if "command" in line[0]] == [("command", "dae report --output 'a b'")]


def test_no_evaluation_makes_warnings_or_numbers_that_json_refuses() -> None:
    rng = np.random.default_rng(0)

    def scores(n: int) -> np.ndarray:
        values = rng.random(n)
        binary, level = rng.random() < 0.5, rng.choice([0, 0.1, 0.5, 0.9, 1])
        return (values < level).astype(float) if binary else np.round(values**2 * rng.choice([0, 0.01, 1]), 3)

    def answered(name: str, clusters: list[int]) -> TaskResult:
        result = task(name, scores(len(clusters)))
        documents = tuple(
            replace(document, cluster=str(cluster), seen=bool(rng.random() < 0.1))
            for document, cluster in zip(result.documents, clusters, strict=True)
        )
        return replace(result, documents=documents)

    with warnings.catch_warnings(), np.errstate(divide="raise", invalid="raise", over="raise"):
        warnings.simplefilter("error")
        for seed in range(60):
            clusters = {name: list(rng.integers(rng.integers(1, 20), size=rng.integers(1, 30))) for name in KINDS}
            found = {
                role: evaluation(role, *(answered(name, given) for name, given in clusters.items()))
                for role in ("base", "expert", "reference", "student")
            }
            report = compare(found, seed=seed, margin=float(rng.choice([1, 5, 50])))
            json.dumps(asdict(report), allow_nan=False)
            assert all(one.difference.low <= one.difference.value <= one.difference.high for one in report.tasks)


def test_a_missing_kl_is_explained() -> None:
    found = models()
    loss = HeldOutLoss("general", "held.jsonl", "sha-held", 100, 1.5, {"reference": 0.0})
    found["reference"] = replace(found["reference"], held_out=(loss,))
    found["student"] = replace(found["student"], held_out=(replace(loss, kl={}),))
    assert any("KL(reference || model) is missing for student:" in note for note in compare(found).notes)
