"""Which documents are compared, and what is refused, left out or told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from dae_eval.comparing.comparison import compare
from dae_eval.results import Evaluation
from evaluations import N, line, models, right, task, without

from kd.errors import UserError


def test_a_task_that_a_needed_model_lacks_is_left_out_and_told() -> None:
    found = models()
    found["student"] = without({"student": found["student"]}, "copying")["student"]
    report = compare(found)
    assert "copying" not in {each.task for each in report.tasks}
    assert any("copying" in note and "student" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"shots": 5, "limit": None}}, r"settings\.shots \(0 against 5\)"),
        ({"settings": {"shots": 0, "limit": None, "template": "abc"}}, r"settings\.template \(nothing against 'abc'\)"),
        ({"version": "2"}, r"version \('1' against '2'\)"),
        ({"metric": "acc_norm"}, "metric"),
    ],
)
def test_different_conditions_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    found = models()
    student = found["student"]
    found["student"] = replace(student, tasks={**student.tasks, "size": replace(student.tasks["size"], **change)})
    with pytest.raises(UserError, match=f"task size: base and student .*{said}"):
        compare(found)


def test_documents_are_paired_by_place_and_hash() -> None:
    found = models()
    sorting = found["student"].tasks["sorting"]
    changed = (replace(sorting.documents[0], hash="other", score=0.0), *reversed(sorting.documents[1:-3]))
    tasks = {**found["student"].tasks, "sorting": replace(sorting, documents=changed)}
    found["student"] = replace(found["student"], tasks=tasks)
    report = compare(found)
    sorted_line = line(report, "sorting")
    # The changed one is there twice, as two documents that have no partner.
    assert (sorted_line.n, sorted_line.unpaired, sorted_line.losses) == (N - 4, 5, 0)
    assert any("sorting" in note and "5 documents" in note for note in report.notes)
    none = {**tasks, "sorting": replace(sorting, documents=tuple(replace(d, hash="x") for d in sorting.documents))}
    with pytest.raises(UserError, match="task sorting: no document"):
        compare({**found, "student": replace(found["student"], tasks=none)})
    twice = {**tasks, "sorting": replace(sorting, documents=sorting.documents[:1] * 2)}
    with pytest.raises(UserError, match="task sorting: student answered a document more than once"):
        compare({**found, "student": replace(found["student"], tasks=twice)})


def test_documents_that_any_model_saw_are_counted_and_shown_apart() -> None:
    found = models({"sorting": right(0.9, wrong=tuple(range(10, 20)))})
    for role, seen in (("expert", range(10)), ("student", range(5, 20))):
        sorting = found[role].tasks["sorting"]
        documents = tuple(replace(d, seen=d.id in seen) for d in sorting.documents)
        found[role] = replace(
            found[role], tasks={**found[role].tasks, "sorting": replace(sorting, documents=documents)}
        )
    sorting_line = line(compare(found), "sorting")
    assert sorting_line.seen == 20
    assert sorting_line.unseen_scores is not None
    assert sorting_line.unseen_difference is not None
    assert sorting_line.difference.value == pytest.approx(-10 / N)
    assert sorting_line.unseen_scores["student"] == pytest.approx((0.9 * N - 20) / (N - 20))
    assert sorting_line.unseen_difference.value == 0
    seen_flips = [flip.seen for flip in compare(found).flips if flip.task == "sorting"]
    assert seen_flips == [True] * 10


def test_documents_that_share_a_source_are_one_piece_of_evidence() -> None:
    worse = {"sorting": right(0.9, wrong=tuple(range(20)))}

    def shared(one: Evaluation) -> Evaluation:
        sorting = one.tasks["sorting"]
        documents = tuple(replace(d, cluster=str(d.id // 4)) for d in sorting.documents)
        return replace(one, tasks={**one.tasks, "sorting": replace(sorting, documents=documents)})

    alone = line(compare(models(worse)), "sorting")
    fours = line(compare({role: shared(one) for role, one in models(worse).items()}), "sorting")
    assert (fours.n, fours.clusters, fours.test) == (N, N // 4, "clustered mid-p McNemar")
    assert fours.p > 10 * alone.p
    assert fours.difference.high - fours.difference.low > 1.8 * (alone.difference.high - alone.difference.low)


def test_same_weights_with_other_answers_are_told() -> None:
    found = models()
    again = task("sorting", right(0.9, wrong=(1,)))
    found["reference"] = replace(found["base"], tasks={**found["base"].tasks, "sorting": again})
    report = compare(found)
    assert line(report, "sorting").scores["reference"] == 0.9
    assert any("same weights" in note and "1 document;" in note for note in report.notes)
