"""`dae check`: what it shows agrees with what a run does, and what would fail later is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checked_world import make_checked_world, recipe_of, write_rows
from pico import make_checkpoint
from stages import fingerprints, plan_of, stage_of
from worlds import make_adapter

from dae.checking.check import check, marked_row, shortened
from dae.checking.estimates import trainable
from dae.checking.loss_shares import LossShare, loss_shares
from dae.checking.plan import Plan
from dae.recipe import AlignRecipe
from kd.errors import UserError
from kd.runs.run_folder import RunFolder, Start
from kd.stages.sft_recipe import SftRecipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checked_world(tmp_path_factory.mktemp("world"))


def check_of(recipe: AlignRecipe | SftRecipe) -> None:
    check(stage_of(recipe), recipe)


def message(recipe: AlignRecipe | SftRecipe) -> str:
    with pytest.raises(UserError) as caught:
        plan_of(recipe)
    return str(caught.value)


# -- shares ------------------------------------------------------------------------------------------------------------


def counted(plan: Plan, factors: Mapping[str, float] | None) -> dict[str, tuple[float, float]]:
    """(mean share of the loss, steps without a row) of each route, step by step; factors None: tokens pooled."""
    names = plan.data.route_names
    shares, missing = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for step in range(plan.steps):
        tokens = dict.fromkeys(names, 0)
        for source, row in plan.mixture.rows_of_step(step):
            tokens[plan.data.sources[source].route] += sum(plan.data.rows[source][row].response_mask)
        says = {name: count if factors is None else factors[name] * (count > 0) for name, count in tokens.items()}
        for name in names:
            shares[name] += says[name] / sum(says.values()) / plan.steps
            missing[name] += tokens[name] == 0
    return {name: (shares[name], missing[name] / plan.steps) for name in names}


@pytest.mark.parametrize(
    ("weights", "factors"),
    [
        ("tokens", None),
        ("routes", {"general": 1.0, "domain": 1.0}),
        ({"general": 1.0, "domain": 3.0}, {"general": 1.0, "domain": 3.0}),
    ],
)
@pytest.mark.parametrize("rows", [2, 4, 20])
def test_shares_of_the_loss_are_those_of_the_rows_that_a_run_draws(
    world: Path, tmp_path: Path, weights: Any, factors: Any, rows: int
) -> None:
    train = {"per_device_train_batch_size": rows, "num_train_epochs": 1}
    recipe = recipe_of(world, tmp_path / "o", weights=weights, train=train)
    plan = plan_of(recipe)
    shown = loss_shares(plan.objective, plan.data, plan.mixture, plan.steps)
    assert {name: (share.mean, share.absent) for name, share in shown.items()} == {
        name: pytest.approx(expected) for name, expected in counted(plan, factors).items()
    }


def test_a_step_without_a_route_gives_its_weight_to_the_others(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, tmp_path / "o", train={"per_device_train_batch_size": 2, "num_train_epochs": 1})
    plan = plan_of(recipe)
    shares = loss_shares(plan.objective, plan.data, plan.mixture, plan.steps)
    # A tenth of the rows, never two in one step of two: a fifth of the steps, and half of the loss of each.
    assert shares == {"general": LossShare(pytest.approx(0.9), 0.0), "domain": LossShare(pytest.approx(0.1), 0.8)}


def test_of_a_long_run_the_first_steps_are_looked_at(world: Path, tmp_path: Path) -> None:
    train = {"per_device_train_batch_size": 20, "max_steps": 10**9}
    plan = plan_of(recipe_of(world, tmp_path / "o", train=train))
    shares = loss_shares(plan.objective, plan.data, plan.mixture, plan.steps)
    assert shares["domain"] == LossShare(pytest.approx(0.5), 0.0)


def test_a_route_with_little_of_the_loss_is_warned_about(world: Path, tmp_path: Path, capsys: Any) -> None:
    check_of(recipe_of(world, tmp_path / "o", weights="tokens"))
    shown = capsys.readouterr().out
    assert "warning: route domain has" in shown and "weights=routes" in shown
    check_of(recipe_of(world, tmp_path / "o", weights="routes", train={"per_device_train_batch_size": 10}))
    assert "warning" not in capsys.readouterr().out


def test_a_route_that_is_missing_from_many_steps_is_warned_about(world: Path, tmp_path: Path, capsys: Any) -> None:
    check_of(recipe_of(world, tmp_path / "o", weights="routes"))
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "route domain has no row in 60 % of the steps" in told
    assert "at least 10 rows" in told and "weights=tokens" in told


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_report_shows_rows_masks_steps_and_needs(world: Path, tmp_path: Path, capsys: Any) -> None:
    data = {
        "max_length": 24,
        "general": world / "general.jsonl",
        "domain": [world / "domain.jsonl", write_rows(tmp_path / "more.jsonl", [
            {"prompt": "Q: which?", "completion": " red"}, {"prompt": "long " * 40, "completion": " red"},
        ])],
        "eval": {"domain": write_rows(tmp_path / "held.jsonl", [
            {"prompt": "q3:  HOW big is the blue kettle?", "completion": " ten"},
            {"prompt": "Q4: how big is the blue kettle?", "completion": " two"},
            {"prompt": "new", "completion": " ten"},
        ])},
    }  # fmt: skip
    check_of(recipe_of(world, tmp_path / "o", data=data, weights="tokens"))
    shown = capsys.readouterr().out
    with_paths = (str(tmp_path), str(world), "warning", "  ")
    assert max(len(line) for line in shown.splitlines() if not line.startswith(with_paths)) <= 80
    assert "\x1b" not in shown
    lines = [line.split() for line in shown.splitlines()]
    (general,) = [line for line in lines if line[:2] == ["general", "90"]]
    (domain,) = [line for line in lines if line[:2] == ["domain", "31"]]
    assert general[4] == "90.0"
    assert domain[4] == "10.0"
    assert domain[-2] == "1"
    assert "more.jsonl: 1 row dropped: prompt fills max_length: no response token left" in shown
    assert "[[ ten</s>]]" in shown
    (overlap,) = [line for line in lines if line[:2] == ["domain", "3"]]
    assert overlap[-2:] == ["1", "2"]
    assert "steps     25 of 4 rows (4 x 1 x 1 process): 100 rows" in shown


def test_held_out_rows_are_shown_as_training_rows_are(world: Path, tmp_path: Path, capsys: Any) -> None:
    long = [{"prompt": f"{n} long " * 40, "completion": " red"} for n in range(6)]
    short = [{"prompt": f"H{n}?", "completion": " two" * 30} for n in range(4)]
    domain = write_rows(tmp_path / "d.jsonl", long + [{"prompt": f"Q{n}?", "completion": " ten"} for n in range(30)])
    held = write_rows(tmp_path / "h.jsonl", long + short)
    data = {"max_length": 24, "general": world / "general.jsonl", "domain": domain, "eval": {"domain": held}}
    check_of(recipe_of(world, tmp_path / "o", data=data, weights="tokens"))
    shown = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in shown if line.split()[:2] == ["domain", "4"]]
    # rows, tokens, response tokens, cut, dropped, in training, same prompt; a prompt "H0?" is 3 tokens of 24
    assert row[1:] == ["4", "96", "84", "4", "6", "0", "0"]
    assert f"{held}: 6 rows dropped: prompt fills max_length: no response token left" in shown


def test_a_checked_recipe_leaves_nothing_behind(world: Path, tmp_path: Path) -> None:
    plan_of(recipe_of(world, tmp_path / "runs" / "o"))
    assert list(tmp_path.iterdir()) == []


def test_long_rows_are_shown_by_their_ends(world: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe_of(world, tmp_path / "o"))
    assert marked_row(plan.data.rows[1], 0, plan, styled=True).plain == "  Q0: how big is the blue kettle? ten</s>"
    text = "".join(str(n % 10) for n in range(1000))
    assert shortened(text).startswith(text[:100])
    assert shortened(text).endswith(text[-100:])
    assert len(shortened(text)) < 260


# -- refused -----------------------------------------------------------------------------------------------------------


def test_missing_files_are_told_at_once(world: Path, tmp_path: Path) -> None:
    data = {"general": "a.jsonl", "domain": "b.jsonl", "eval": {"domain": "c.jsonl"}}
    told = message(recipe_of(world, tmp_path / "o", base=tmp_path / "none", data=data))
    assert told.startswith("4 problems:")
    for name in ("none", "a.jsonl", "b.jsonl", "c.jsonl"):
        assert name in told


def test_what_a_run_would_refuse_is_refused(world: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "gpt2", "gpt2", n_positions=16)
    other = make_checkpoint(tmp_path / "other", hidden_size=32)
    positions = message(recipe_of(world, tmp_path / "o", base=tmp_path / "gpt2", expert=str(tmp_path / "gpt2")))
    assert "set data.max_length=16" in positions
    assert "expert.domain" in message(recipe_of(world, tmp_path / "o", base=other))
    assert "lora.target_modules" in message(recipe_of(world, tmp_path / "o", lora={"target_modules": "nothing_here"}))
    assert "fewer than the" in message(recipe_of(world, tmp_path / "o", train={"gradient_accumulation_steps": 4096}))
    (tmp_path / "file").write_text("")
    assert f"output: {tmp_path / 'file'}: " in message(recipe_of(world, tmp_path / "file"))


def test_every_role_is_looked_at_and_not_the_base_alone(world: Path, tmp_path: Path) -> None:
    base, expert = (make_checkpoint(tmp_path / name, "gpt2", n_positions=n) for name, n in (("base", 256), ("few", 16)))
    told = message(recipe_of(world, tmp_path / "o", base=base, expert=str(expert)))
    assert "set data.max_length=16" in told
    adapted = make_adapter(tmp_path / "head", world / "base", target_modules=["q_proj", "lm_head"], use_dora=True)
    told = message(recipe_of(world, tmp_path / "o", expert=str(adapted)))
    assert "role expert.domain: LlamaForCausalLM: " in told
    plain = make_adapter(tmp_path / "plain", world / "base", target_modules=["q_proj", "lm_head"])
    plan_of(recipe_of(world, tmp_path / "o", expert=str(plain)))


@pytest.mark.parametrize("stage", ["sft", "align"])
def test_an_attention_that_does_not_exist_is_refused(world: Path, tmp_path: Path, stage: str) -> None:
    if stage == "sft":
        rows: Any = {"train": world / "domain.jsonl"}
        told = message(SftRecipe(base=world / "base", output=tmp_path / "o", data=rows, attn_implementation="sdpaa"))  # type: ignore[arg-type]
    else:
        told = message(recipe_of(world, tmp_path / "o", attn_implementation="sdpaa"))
    assert f"attn_implementation: sdpaa: {world / 'base'} " in told
    plan_of(recipe_of(world, tmp_path / "o", attn_implementation="eager"))


def test_a_merge_that_has_no_place_for_a_bias_is_refused(world: Path, tmp_path: Path) -> None:
    earlier = str(make_adapter(tmp_path / "earlier", world / "base", r=2, target_modules=["q_proj"], lora_bias=True))
    told = message(recipe_of(world, tmp_path / "o", student_from=earlier, merge=True))
    assert "merge: true: " in told and "lora_bias" in told
    plan_of(recipe_of(world, tmp_path / "o", student_from=earlier))


def test_a_student_that_goes_on_trains_what_it_trained_before(world: Path, tmp_path: Path) -> None:
    begun = make_adapter(tmp_path / "first", world / "base", r=6, target_modules=["q_proj"])
    earlier, new = (
        plan_of(recipe_of(world, tmp_path / "o", lora={"rank": 6, "target_modules": ["q_proj"]}, **more)).roles.student
        for more in ({"student_from": begun}, {})
    )
    assert trainable(earlier) == trainable(new)
    unsaid = plan_of(recipe_of(world, tmp_path / "o", student_from=begun, lora={}))
    assert trainable(unsaid.roles.student) == trainable(new)


def test_an_sft_recipe_is_checked_too(world: Path, tmp_path: Path, capsys: Any) -> None:
    check_of(SftRecipe(base=world / "base", output=tmp_path / "o", data={"train": world / "domain.jsonl"}))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert "0 through teachers" in shown


# -- the run folder ----------------------------------------------------------------------------------------------------


def test_an_output_that_holds_another_run_or_a_living_one_is_refused(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, tmp_path / "o")
    plan = plan_of(recipe)
    run = RunFolder(recipe.output)
    with run.claim(Start("align", recipe, fingerprints(recipe), recipe.base, plan.data.inputs, processes=8)):
        assert "held by a live process" in message(recipe)
        (run.checkpoints.folder / "step-000001").mkdir()
    before = sorted(path.name for path in run.path.rglob("*"))
    plan_of(recipe)  # the same run, however many processes began it
    other = recipe_of(world, tmp_path / "o", temperature=2.0)
    assert "temperature: 1.0 -> 2.0" in message(other)
    assert sorted(path.name for path in run.path.rglob("*")) == before
