"""Merging evaluations of one model, and telling who is who from the runs."""

from __future__ import annotations

import pytest
from dae_eval.comparing.roles import assign_roles, merge
from dae_eval.results import Evaluation
from evaluations import evaluation, right, task

from kd.errors import UserError

INPUTS = {"base": "sha-base", "reference": "sha-base", "expert.shop": "sha-expert"}


def test_merging_evaluations_of_one_model() -> None:
    one = evaluation("student", task("price", right(0.5)), conditions={"command": "a", "template": "t"})
    other = evaluation(
        "elsewhere", task("size", right(0.6)), fingerprint="sha-student", conditions={"command": "b", "template": "t"}
    )
    both = merge([one, other])
    assert set(both.tasks) == {"price", "size"}
    assert both.conditions == {"command": ["a", "b"], "template": "t"}
    assert merge([one, one]) == one
    with pytest.raises(UserError, match="different weights"):
        merge([one, evaluation("expert", task("size", right(0.6)))])
    with pytest.raises(UserError, match="task price"):
        merge([one, evaluation("student", task("price", right(0.4)))])


def runs() -> dict[str, Evaluation]:
    return {
        "base": evaluation("base"),
        "expert": evaluation("expert", inputs={"base": "sha-base"}),
        "student": evaluation("student", inputs=INPUTS),
    }


def test_roles_follow_from_the_students_run() -> None:
    found = runs()
    roles = assign_roles([(None, found[name]) for name in ("student", "base", "expert")])
    assert roles == {**found, "reference": found["base"]}
    assert assign_roles([("student", found["student"]), (None, found["base"])]).keys() == {
        "student",
        "base",
        "reference",
    }
    assert assign_roles([("base", found["base"]), (None, found["student"])]).keys() == {"student", "base", "reference"}


def test_a_role_that_was_given_wins() -> None:
    found = runs()
    other = evaluation("other-expert")
    roles = assign_roles([(None, found["base"]), (None, found["student"]), ("expert", other)])
    assert roles["expert"] == other
    twin = evaluation("ntp", inputs=INPUTS)
    roles = assign_roles(
        [*((None, one) for one in found.values()), ("student", found["student"]), ("next-token", twin)]
    )
    assert roles["next-token"] == twin
    assert roles["student"] == found["student"]


def test_evaluations_of_one_model_are_merged_into_its_role() -> None:
    found = runs()
    more = evaluation("base", task("price", right(0.5)))
    for role in (None, "base"):
        roles = assign_roles([*((None, one) for one in found.values()), (role, more)])
        assert "price" in roles["base"].tasks
        assert roles["reference"] == roles["base"]


@pytest.mark.parametrize("absent", ["student", "base"])
def test_roles_that_cannot_be_told_are_asked_for(absent: str) -> None:
    found = runs()
    unknown = evaluation("unknown")
    left = [(None, one) for name, one in found.items() if name != absent]
    if absent == "student":
        left = [(None, found["base"]), (None, unknown)]
    with pytest.raises(UserError, match="--from"):
        assign_roles([*left, (None, unknown)] if absent == "base" else left)


def test_two_students_and_two_experts_are_ambiguous() -> None:
    found = runs()
    twin = evaluation("ntp", inputs=INPUTS)
    with pytest.raises(UserError, match=r"student, ntp; .*--from student=FOLDER"):
        assign_roles([(None, one) for one in (*found.values(), twin)])
    two = evaluation("student", inputs={**INPUTS, "expert.law": "sha-law"})
    with pytest.raises(UserError, match="several experts"):
        assign_roles([(None, one) for one in (found["base"], found["expert"], evaluation("law"), two)])
    with pytest.raises(UserError, match="different weights"):
        assign_roles([("base", found["base"]), ("base", found["expert"])])
