"""`dae rank-teachers` from outside: numbers against plain transformers, stops, mistakes, candidates that generate."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from claims import make_reward_model
from pico import make_checkpoint
from processes import Ended, Signal, dae
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from dae.rank_teachers.car import Measured, rank
from dae.rank_teachers.rank_teachers import refuse_unanswerable, unanswered
from dae.rank_teachers.recipe import RankRecipe
from dae.rank_teachers.table import show
from dae.sampling.written_rows import Batch
from kd.config.loading import load_recipe, resolved_yaml
from kd.errors import UserError

ROOT = Path(__file__).parents[2]
ANSWERS = {"big": "the answer to it is, at great length, {}", "near": "{} cups", "odd": "blue {} kettle"}
BETAS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a reward model, one more with two labels, and three candidates' responses to 12 prompts."""
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "student")
    make_reward_model(folder / "rm")
    make_reward_model(folder / "two", num_labels=2)
    for place, (name, text) in enumerate(ANSWERS.items()):
        rows = [{"prompt": f"How big is {n}?", "completion": " " + text.format(n * 7 % 12)} for n in range(12)]
        rows = rows[place:] + rows[:place]  # not every file has the prompts in the same order
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "world"))


def command(*extra: str, names: tuple[str, ...] = tuple(ANSWERS)) -> list[str]:
    candidates = [part for name in names for part in ("--candidate", f"{name}={name}.jsonl")]
    models = ["--student", "student", "--reward-model", "rm"]
    return ["rank-teachers", *models, *candidates, "--output", "out", *extra]


def result(world: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((world / "out" / "ranking.json").read_text())
    return read


def by_hand(world: Path, name: str) -> dict[str, float]:
    """Mean reward, loss, IFD and perplexity from plain transformers in float64, row by row."""
    lm = AutoModelForCausalLM.from_pretrained(world / "student", dtype=torch.float64).eval()
    rm = AutoModelForSequenceClassification.from_pretrained(world / "rm", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "rm")

    @torch.no_grad()
    def nats(prompt: list[int], reply: list[int]) -> float:
        log_p_TV = lm(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        return -sum(float(log_p_TV[len(prompt) + n - 1, token]) for n, token in enumerate(reply)) / len(reply)

    rewards, losses, ratios = [], [], []
    for line in (world / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        reply = [*tokenizer(row["prompt"] + row["completion"])["input_ids"][len(prompt) :], 2]
        losses.append(nats(prompt, reply))
        ratios.append(losses[-1] / nats([1], reply))
        asked = {"role": "user", "content": row["prompt"]}
        talk = [asked, {"role": "assistant", "content": row["completion"].strip()}]
        with torch.no_grad():
            ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=False)
            rewards.append(float(rm(ids).logits))
    rows = len(rewards)
    return {
        "reward": sum(rewards) / rows,
        "lowest": min(rewards),
        "loss": sum(losses) / rows,
        "ifd": sum(ratios) / rows,
        "perplexity": sum(map(math.exp, losses)) / rows,
    }


@pytest.mark.parametrize("shifted", [False, True])
def test_numbers_are_those_of_plain_transformers(world: Path, shifted: bool) -> None:
    ended = dae(command(f"shift={str(shifted).lower()}", "batch_size=5"), world)
    assert ended.status == 0, ended.err
    found, expected = result(world), {name: by_hand(world, name) for name in ANSWERS}
    assert [facts["name"] for facts in found["facts"]] == list(ANSWERS)
    for facts in found["facts"]:
        told = {
            key: facts[key]["value"] if key in ("reward", "loss") else facts[key]
            for key in expected["big"]
            if key != "lowest"
        }
        wanted = {key: value for key, value in expected[facts["name"]].items() if key != "lowest"}
        assert told == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    shift = -min(one["lowest"] for one in expected.values()) if shifted else 0.0
    assert found["shift"] == (pytest.approx(shift, rel=1e-4) if shifted else None)
    assert [at["beta"] for at in found["sweep"]] == list(BETAS)
    for at in found["sweep"]:
        for place in at["places"]:
            one = expected[place["name"]]
            car = (one["reward"] + shift) / (1 + at["beta"] * one["loss"])
            assert place["car"]["value"] == pytest.approx(car, rel=1e-3)
            assert place["car"]["low"] < car < place["car"]["high"]
    settings = found["settings"]
    for what in ("student", "reward_model", *ANSWERS):
        assert len(settings[f"content of {what}"]) == 64
    assert "betas" not in settings
    assert max(map(len, ended.out.splitlines())) <= 80
    assert all(name in ended.out for name in ANSWERS)
    assert f"{'out/ranking.json'}: all numbers" in ended.out


def test_negative_rewards_are_refused_and_nothing_is_computed_twice(world: Path) -> None:
    make_reward_model(world / "rm", sign=-1.0)
    ended = dae(command(), world)
    assert ended.status == 2
    assert "shift: false: " in ended.err
    assert "shift=true" in ended.err
    assert not (world / "out" / "losses").exists()  # told before the student is asked
    before = stamps(world)
    assert len(before) == 3
    for betas in ("[0,2]", "[5]"):
        assert dae(command("shift=true", f"betas={betas}"), world).status == 0
        assert [at["beta"] for at in result(world)["sweep"]] == json.loads(betas)
    after = stamps(world)
    assert {name: after[name] for name in before} == before
    other = dae(command("shift=true", "max_length=100"), world)
    assert (other.status, stamps(world)) == (2, after)
    assert "max_length: 2048 -> 100" in other.err
    (world / "big.jsonl").write_text((world / "big.jsonl").read_text().replace("length", "size"))
    changed = dae(command("shift=true"), world)
    assert changed.status == 2
    assert "content of big" in changed.err


def stamps(world: Path) -> dict[str, int]:
    """When each kept file was written, in nanoseconds."""
    kept = [path for what in ("rewards", "losses", "responses") for path in (world / "out" / what).glob("[!.]*.json*")]
    return {str(path.relative_to(world)): path.stat().st_mtime_ns for path in kept}


@pytest.mark.parametrize(("what", "call"), [("near.json", 1), ("near.json", 2), ("ranking.json", 1)])
def test_a_kill_costs_only_the_candidate_under_way(world: Path, what: str, call: int) -> None:
    """Killed where a file is about to be renamed into its place, and started again."""
    kill = Signal("os:replace", call, name=what)
    assert dae(command("shift=true"), world, signals=[kill]).status == -9
    before = stamps(world)
    assert len(before) == {("near.json", 1): 1, ("near.json", 2): 4, ("ranking.json", 1): 6}[what, call]
    assert dae(command("shift=true"), world).status == 0
    after = stamps(world)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    interrupted = (world / "out" / "ranking.json").read_text()
    shutil.rmtree(world / "out")
    assert dae(command("shift=true"), world).status == 0
    assert (world / "out" / "ranking.json").read_text() == interrupted


def cut_a_row(world: Path) -> None:
    lines = (world / "near.jsonl").read_text().splitlines(keepends=True)
    (world / "near.jsonl").write_text("".join([*lines[:-1], '{"prompt": "Who?", "completion": "me"}\n']))


def empty_a_response(world: Path) -> None:
    with (world / "odd.jsonl").open("a") as file:
        file.write('{"prompt": "How big is 5?", "completion": "\\n"}\n')


MISTAKES: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "missing file": (lambda world: (world / "near.jsonl").unlink(), [], ["near.jsonl: "]),
    "other prompts": (cut_a_row, [], ["near.jsonl: 1 of 12 prompts", "big.jsonl:1 ", "near.jsonl:12"]),
    "empty response": (empty_a_response, [], ["odd.jsonl:13: ", "1 of 13 rows"]),
    "two labels": (lambda _: None, ["reward_model=two"], ["two: has 2 labels"]),
    "no reward model": (lambda _: None, ["reward_model=student"], ["student: has 2 labels"]),
    "name twice": (lambda _: None, ["--candidate", "big=odd.jsonl"], ["--candidate big=odd.jsonl: "]),
    "no name": (lambda _: None, ["--candidate", "odd.jsonl"], ["--candidate odd.jsonl: "]),
    "unknown key": (lambda _: None, ["beta=[1]"], ["did you mean `betas`?"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_status_2_and_leave_nothing(world: Path, mistake: str) -> None:
    prepare, extra, words = MISTAKES[mistake]
    prepare(world)
    ended = dae(command(*extra), world)
    assert (ended.status, ended.out) == (2, ""), ended.err
    assert ended.err.startswith("dae rank-teachers: ")
    for part in words:
        assert part in ended.err
    assert not (world / "out").exists()


def test_candidates_that_are_checkpoints_answer_the_prompts(world: Path) -> None:
    make_checkpoint(world / "teacher", seed=3)
    prompts = [{"prompt": f"How big is {n}?"} for n in range(12)]
    (world / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))

    def asked(*extra: str, **settings: Any) -> Ended:
        arguments = command("--candidate", "self=teacher", *extra, names=("near",))
        return dae([*arguments, "shift=true", "max_new_tokens=3"], world, **settings)

    lacking = asked()
    assert lacking.status == 2
    assert "prompts: " in lacking.err and "add --prompts FILE" in lacking.err
    flag = ("--prompts", "prompts.jsonl")
    assert asked(*flag, signals=[Signal("dae.sampling.sample:SampleFile.append", 4)]).status == -9
    assert (world / "out" / "responses" / "self.jsonl.partial").exists()
    assert asked(*flag).status == 0
    written = [json.loads(line) for line in (world / "out" / "responses" / "self.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"] for row in written) == sorted(row["prompt"] for row in prompts)
    assert [facts["name"] for facts in result(world)["facts"]] == ["near", "self"]
    assert result(world)["rows"] == 12
    before = (world / "out" / "ranking.json").read_text()
    shutil.rmtree(world / "out")
    assert asked(*flag).status == 0
    assert (world / "out" / "ranking.json").read_text() == before


def test_prompts_are_asked_until_each_has_its_response() -> None:
    asked = ["one", "two", "one"]
    assert unanswered(asked, []) == asked
    row = {"prompt": "one", "completion": "x"}
    assert unanswered(asked, [Batch(rows=[row])]) == ["two", "one"]
    talk = [{"role": "user", "content": "one"}]
    reply = {"messages": [*talk, {"role": "assistant", "content": "x"}]}
    assert unanswered([talk], [Batch(rows=[reply])]) == []
    nothing = [Batch()] * 20
    for batch in nothing:
        batch.dropped["no text"] += 1
    refuse_unanswerable("m", "p.jsonl", ["two"], nothing[:19])
    with pytest.raises(UserError, match=r'1 of the prompts of p\.jsonl.*first "two"'):
        refuse_unanswerable("m", "p.jsonl", ["two"], nothing)


def test_the_table_tells_ties_and_where_the_order_changes(capsys: pytest.CaptureFixture[str]) -> None:
    def rows(reward: float, loss: float) -> Measured:
        spread = [-0.2, 0.1, 0.0, 0.1] * 3
        return Measured([reward + s for s in spread], [loss] * 12, [loss + 1] * 12, [5] * 12)

    candidates = {"a-long-teacher-name": rows(3.0, 5.0), "b": rows(2.0, 1.0), "b2": rows(2.0, 1.0)}
    ranking = rank(candidates, list(range(12)), BETAS, shift=False, seed=0)
    show(ranking, Console(width=80, highlight=False))
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "beta 0 a-long-teacher-name > b = b2" in lines
    assert "beta 10 b = b2 > a-long-teacher-name" in lines
    # 3 / (1 + 5 beta) = 2 / (1 + beta) at beta = 1/7
    assert "a-long-teacher-name is ahead of b below beta 0.143, behind it above" in lines
    assert "The order changes with beta between 0 and 10:" in lines
    show(rank(candidates, list(range(12)), (1.0, 10.0), shift=False, seed=0), Console(width=80, highlight=False))
    assert "The order is the same at every beta from 1 to 10." in capsys.readouterr().out


def test_the_shipped_recipe_loads_and_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(RankRecipe, ROOT / "recipes" / "rank_teachers.yaml", {})
    (tmp_path / "copy.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(RankRecipe, tmp_path / "copy.yaml", {}) == recipe
    assert recipe.betas == BETAS
