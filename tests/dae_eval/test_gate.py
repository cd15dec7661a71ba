"""What the gate must not let pass: a single task that collapses, missing tasks, too few documents, wrong words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from dae_eval.comparing.comparison import compare
from dae_eval.comparing.roles import merge
from dae_eval.comparing.statistics import Estimate, macro_difference, spread
from dae_eval.rendering.headlines import headlines
from dae_eval.report import Report
from dae_eval.results import Evaluation, Kind, TaskResult
from evaluations import KINDS, N, evaluation, line, models, right, task, without

from kd.errors import UserError


def many(student: dict[str, float], reference: float = 0.6, kind: Kind = "general") -> dict[str, Evaluation]:
    """Reference and student on N documents of each task in `student`, which gives the student's scores."""
    tasks = {name: replace(task("sorting", right(score)), task=name, kind=kind) for name, score in student.items()}
    same = {name: replace(task("sorting", right(reference)), task=name, kind=kind) for name in student}
    return {"reference": evaluation("reference", *same.values()), "student": evaluation("student", *tasks.values())}


def changed(found: dict[str, Evaluation], role: str, name: str, result: TaskResult) -> dict[str, Evaluation]:
    return {**found, role: replace(found[role], tasks={**found[role].tasks, name: result})}


def remarks(report: Report) -> str:
    return " | ".join(one.remark for one in headlines(report.student))


# a task of several


def test_one_task_collapses_while_the_mean_stays() -> None:
    found = many({"a": 0.3, "b": 0.67, "c": 0.67, "d": 0.67, "e": 0.67, "f": 0.67})
    report = compare(found, retention_only=True)
    floor, retention = report.student.floor, report.student.retention
    assert retention is not None and floor is not None
    assert (retention.word, floor.word, report.word) == ("PASS", "FAIL", "FAIL")
    assert [one.task for one in floor.lost] == ["a"]
    assert floor.worst.difference.value == pytest.approx(-30)
    assert report.notes[0].startswith("Task a lost 30.0 points against the reference: from 60.0 to 30.0")
    assert "60.0 to 30.0" in report.notes[0]
    assert compare(found, retention_only=True, max_task_loss=50).word == "PASS"


def test_a_loss_that_cannot_be_ruled_out_is_inconclusive_with_its_documents() -> None:
    found = many({"a": 0.6, "b": 0.64})
    worse = replace(task("sorting", right(0.6, wrong=tuple(range(15)))), task="a", kind="general")
    found = changed(found, "student", "a", worse)
    report = compare(found, retention_only=True, margin=4.0)
    floor = report.student.floor
    assert floor is not None
    assert (floor.word, report.word) == ("INCONCLUSIVE", "INCONCLUSIVE")
    (undecided,) = floor.undecided
    assert undecided.task == "a" and undecided.documents_needed is not None and undecided.documents_needed > N
    assert f"about {undecided.documents_needed:,} documents would decide" in remarks(report)
    assert undecided.documents == N


def test_a_domain_task_below_the_base_fails() -> None:
    report = compare(models({"price": right(0.9), "size": right(0.2)}))
    floor, gap = report.student.floor, report.student.gap
    assert floor is not None and gap is not None
    assert (gap.word, floor.word, report.word) == ("PASS", "FAIL", "FAIL")
    assert [(one.task, one.against) for one in floor.lost] == [("size", "base")]


def test_members_of_a_benchmark_fail_alone_and_are_undecided_only_together() -> None:
    def of_benchmark(found: dict[str, Evaluation]) -> dict[str, Evaluation]:
        return {
            role: replace(one, tasks={name: replace(t, benchmark="big", share=0.125) for name, t in one.tasks.items()})
            for role, one in found.items()
        }

    names = "abcdefgh"
    few = of_benchmark(many(dict.fromkeys(names, 0.6)))
    few = {
        role: replace(one, tasks={n: replace(t, documents=t.documents[:60]) for n, t in one.tasks.items()})
        for role, one in few.items()
    }
    report = compare(few, retention_only=True, margin=5)
    assert report.word == "PASS"  # 60 documents of one member alone could not rule out a loss of 5 points
    (benchmark,) = report.benchmarks
    assert (benchmark.members, benchmark.n) == (8, 480)
    lost = of_benchmark(many({**dict.fromkeys(names, 0.72), "a": 0.3}))
    floor = compare(lost, retention_only=True).student.floor
    assert floor is not None
    assert (floor.word, [one.task for one in floor.lost]) == ("FAIL", ["a"])
    short = {}
    for role, one in lost.items():
        cut_a = replace(one.tasks["a"], documents=one.tasks["a"].documents[220:240])
        short[role] = replace(one, tasks={**one.tasks, "a": cut_a})
    floor = compare(short, retention_only=True).student.floor  # 20 documents, all of them lost
    assert floor is not None
    assert (floor.word, [one.task for one in floor.undecided]) == ("INCONCLUSIVE", ["a"])
    assert floor.worst.task == "big"


def test_a_benchmark_counts_as_one_score_with_its_members_shares() -> None:
    found = many({"a": 0.5, "b": 0.7, "c": 0.6})
    shares = {"a": 0.75, "b": 0.25}
    weighted = {
        role: replace(
            one,
            tasks={n: replace(t, benchmark="big", share=shares[n]) if n in shares else t for n, t in one.tasks.items()},
        )
        for role, one in found.items()
    }
    report = compare(weighted, retention_only=True)
    (benchmark,) = report.benchmarks
    assert benchmark.scores["student"] == pytest.approx(0.75 * 0.5 + 0.25 * 0.7)
    assert benchmark.difference.value == pytest.approx(0.55 - 0.6)
    retention = report.student.retention
    assert retention is not None and retention.ratio is not None
    assert retention.difference.value == pytest.approx(100 * ((0.55 - 0.6) + 0) / 2)
    assert retention.ratio.value == pytest.approx(100 * (0.55 / 0.6 + 1) / 2)


# missing tasks and documents


@pytest.mark.parametrize(("role", "name"), [("student", "copying"), ("reference", "sorting"), ("expert", "price")])
def test_a_missing_task_is_inconclusive_unless_it_is_allowed_by_name(role: str, name: str) -> None:
    found = models()
    found[role] = without({role: found[role]}, name)[role]
    found["reference"] = replace(found["reference"], model=replace(found["reference"].model, fingerprint="own"))
    report = compare(found)
    assert report.word == "INCONCLUSIVE"
    assert f"--allow-missing {name}" in remarks(report)
    assert compare(found, allow_missing=[name]).word == "PASS"
    with pytest.raises(UserError, match=r"--allow-missing pric: .*`price`"):
        compare(found, allow_missing=["pric"])


def test_a_general_task_that_only_the_expert_lacks_still_counts() -> None:
    found = models({"copying": right(0.6)})
    found["expert"] = without({"expert": found["expert"]}, "copying")["expert"]
    report = compare(found)
    assert report.word == "FAIL"
    assert line(report, "copying").difference.value == pytest.approx(-0.3)
    assert "expert" not in line(report, "copying").scores
    retention = report.student.retention
    assert retention is not None and retention.difference.value == pytest.approx(-15)


def test_unpaired_documents_beyond_a_hundredth_are_inconclusive() -> None:
    for left_out, word in ((N // 100, "PASS"), (N // 100 + 1, "INCONCLUSIVE")):
        found = models()
        sorting = found["student"].tasks["sorting"]
        found = changed(found, "student", "sorting", replace(sorting, documents=sorting.documents[left_out:]))
        report = compare(found)
        assert report.word == word, left_out
        assert line(report, "sorting").unpaired == left_out
        assert compare(found, allow_missing=["sorting"]).word == "PASS"


# words at the edges


def cut(found: dict[str, Evaluation], n: int) -> dict[str, Evaluation]:
    return {
        role: replace(one, tasks={name: replace(t, documents=t.documents[:n]) for name, t in one.tasks.items()})
        for role, one in found.items()
    }


@pytest.mark.parametrize("n", [1, 2, 3, 5, 14])
def test_no_verdict_rests_on_a_few_documents(n: int) -> None:
    report = compare(cut(models(), n), margin=100, max_task_loss=100)
    assert report.word == "INCONCLUSIVE"
    assert "too few for a verdict" in remarks(report)
    assert "scores 0" not in " ".join(report.notes)
    gap, retention = report.student.gap, report.student.retention
    assert gap is not None and retention is not None
    assert -2 <= gap.gain.low <= gap.gain.high <= 2
    assert -100 <= retention.difference.low <= retention.difference.high <= 100


def test_few_documents_do_not_fail_either() -> None:
    report = compare(cut(models({"sorting": np.zeros(N), "copying": np.zeros(N)}), 10))
    retention, floor = report.student.retention, report.student.floor
    assert retention is not None and floor is not None
    assert (retention.word, floor.word) == ("INCONCLUSIVE", "INCONCLUSIVE")


def test_an_expert_that_is_worse_is_called_worse() -> None:
    found = models()
    worse = {"price": right(0.05), "size": right(0.05)}
    for name, scores in worse.items():
        found = changed(found, "expert", name, task(name, scores))
    report = compare(found)
    gap = headlines(report.student)[0]
    assert (gap.figure, gap.word) == ("undefined", "INCONCLUSIVE")
    assert "the expert is worse than the base" in gap.remark
    assert "not clearly above 0" not in gap.remark


def test_base_and_expert_with_the_same_weights_are_named() -> None:
    found = models()
    report = compare({**found, "expert": found["base"]})
    assert "the same weights" in headlines(report.student)[0].remark
    assert report.student.gap is not None and report.student.gap.gain == Estimate(0, 0, 0)


def test_documents_that_do_not_exist_are_not_asked_for() -> None:
    found = {
        role: replace(one, tasks={name: replace(t, total=N) for name, t in one.tasks.items()})
        for role, one in models({"copying": right(0.9, wrong=(1, 2)), "sorting": right(0.89)}).items()
    }
    report = compare(found)
    retention = report.student.retention
    assert retention is not None
    assert (retention.word, retention.documents_needed, retention.exhausted) == ("INCONCLUSIVE", None, True)
    advised = float(remarks(report).partition("accept --margin ")[2].split()[0].rstrip(";|"))
    decided = compare(found, margin=advised).student.retention
    assert decided is not None and decided.word == "PASS"


def test_ratings_are_shown_as_ratings() -> None:
    rng = np.random.default_rng(1)
    low = np.clip(rng.normal(0.7, 0.15, N), 0.1, 1)
    high = np.clip(low - rng.normal(0.02, 0.1, N), 0.1, 1)
    found = {
        role: evaluation(role, task("sorting", scores, unit="rating", metric="rating / 10", total=N))
        for role, scores in (("reference", low), ("student", high))
    }
    report = compare(found, retention_only=True)
    (retention, _) = headlines(report.student)
    assert retention.figure.endswith(" rating")
    assert retention.condition == "margin 0.1"
    assert float(retention.figure.split()[0]) == pytest.approx(10 * (high - low).mean(), abs=0.006)


# losses


def test_losses_are_paired_and_never_in_points() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(50, 500, N)
    bits = rng.normal(1.2, 0.2, N)

    def with_loss(one: Evaluation, values: np.ndarray) -> Evaluation:
        made = task("crafts", values, unit="bits per byte", metric="bits_per_byte")
        documents = tuple(replace(d, weight=float(w)) for d, w in zip(made.documents, weights, strict=True))
        return replace(one, tasks={**one.tasks, "pile": replace(made, task="pile", documents=documents)})

    found = models()
    worse = bits + 0.05 + rng.normal(0, 0.01, N)
    found = {role: with_loss(one, worse if role == "student" else bits) for role, one in found.items()}
    report = compare(found)
    (loss,) = report.losses
    assert loss.values["student"] == pytest.approx(np.average(worse, weights=weights))
    assert loss.difference.value == pytest.approx(np.average(worse - bits, weights=weights))
    assert loss.difference.low < loss.difference.value < loss.difference.high
    assert loss.p < 1e-6
    assert report.word == "PASS"
    assert "pile" not in {one.task for one in report.tasks}
    assert not [flip for flip in report.flips if flip.task == "pile"]


def test_requests_that_were_cut_are_in_the_notes() -> None:
    found = models()
    found["student"] = replace(found["student"], conditions={"truncated": {"sorting": 42}})
    assert any("sorting" in note and "42 of student" in note for note in compare(found).notes)


def test_the_share_of_documents_without_a_change() -> None:
    crafts = line(compare(models()), "crafts")
    assert (crafts.unchanged, crafts.losses) == (0.9, 40)
    assert set(KINDS) == {one.task for one in compare(models()).tasks}


def test_a_model_against_itself_needs_no_documents() -> None:
    found = cut(models(), 3)
    report = compare({"reference": found["base"], "student": found["base"]}, retention_only=True)
    assert report.word == "PASS"


# from an audit


def test_one_adapter_on_two_bases_is_two_models() -> None:
    found = many({"a": 0.1}, reference=0.9)
    for role, base in (("reference", "one"), ("student", "two")):
        model = replace(found[role].model, fingerprint="adapter", base=base, base_fingerprint=base)
        found[role] = replace(found[role], model=model)
    assert compare(found, retention_only=True).word == "FAIL"
    with pytest.raises(UserError, match="different weights or bases"):
        merge([replace(one, tasks={}) for one in found.values()])


def test_the_same_weights_with_other_scores_cannot_pass() -> None:
    found = many({"a": 0.5}, reference=0.9)
    found["student"] = replace(found["student"], model=found["reference"].model)
    report = compare(found, retention_only=True)
    assert report.word == "INCONCLUSIVE"
    assert "same weights have different scores" in remarks(report)


def test_what_the_gap_leaves_out_is_told() -> None:
    found = models()
    found["expert"] = without({"expert": found["expert"]}, "price")["expert"]
    report = compare(found, allow_missing=["price"])
    assert report.word == "PASS"
    assert any("price" in note and "gap closed" in note for note in report.notes)


@pytest.mark.parametrize("n", [100, 240, 800])
def test_a_model_that_lost_the_margin_in_rare_failures_rarely_passes(n: int) -> None:
    rng = np.random.default_rng(n)
    clusters = np.arange(n)
    passed = 0
    for _ in range(600):
        differences = rng.normal(0, 0.02, n) - (rng.random(n) < 0.05)
        passed += macro_difference([spread(differences, clusters)]).low > -0.05
    assert passed / 600 < 0.045


def test_units_and_benchmarks_must_be_the_same() -> None:
    found = many({"a": 0.6})
    for change in ({"unit": "rating"}, {"benchmark": "big"}):
        other = changed(found, "student", "a", replace(found["student"].tasks["a"], **change))
        with pytest.raises(UserError, match=f"task a: .*{next(iter(change))}"):
            compare(other, retention_only=True)


def test_benchmarks_and_losses_that_became_worse_are_noted() -> None:
    names = "abcd"
    found = {
        role: replace(one, tasks={n: replace(t, benchmark="big", share=0.25) for n, t in one.tasks.items()})
        for role, one in many(dict.fromkeys(names, 0.56)).items()
    }
    report = compare(found, retention_only=True, margin=10)
    assert any(note.startswith("Benchmark big lost 3.8 points") for note in report.notes)


def test_another_student_without_tasks_does_not_end_the_report() -> None:
    found = models()
    found["other"] = evaluation("other", found["student"].tasks["crafts"])
    report = compare(found, others=["other"])
    (other,) = report.others
    assert (other.gap, other.retention, other.floor) == (None, None, None)
    assert report.compared[0].left_out == ("price", "size", "sorting", "copying")
    assert report.word == "PASS"


def test_advice_is_given_only_where_it_helps() -> None:
    found = models({"sorting": np.zeros(N)})
    found["student"] = without({"student": found["student"]}, "copying")["student"]
    report = compare(found)
    assert report.word == "FAIL"
    assert "--allow-missing" not in remarks(report)
