"""`dae check`: what it shows agrees with what a run does, and what would fail later is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint, make_model
from transformers import AutoModelForCausalLM

from dae.alignment import fingerprints
from dae.check import check, in_words, make_plan, marked_row, shortened
from dae.estimates import disk, loss_shares, memory, tokens_of_run
from dae.overlap import normalised, overlaps, parts
from dae.recipe import AlignRecipe
from kd.config import DataRecipe, SftRecipe, resolved_yaml
from kd.errors import UserError
from kd.runs import RunFolder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter expert, general texts and domain pairs with short answers."""
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "base")
    adapted = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    adapted.save_pretrained(folder / "adapter")
    write_rows(folder / "general.jsonl", [{"text": f"{n}: red green blue one two three four five"} for n in range(90)])
    pairs = [{"prompt": f"Q{n}: how big is the blue kettle?", "completion": " ten"} for n in range(30)]
    write_rows(folder / "domain.jsonl", pairs)
    return folder


def recipe_of(world: Path, output: Path, **changes: Any) -> AlignRecipe:
    values: dict[str, Any] = {
        "base": world / "base",
        "expert": str(world / "adapter"),
        "output": output,
        "data": {"max_length": 64, "general": world / "general.jsonl", "domain": world / "domain.jsonl"},
        "lora": {"rank": 2},
        "train": {"per_device_train_batch_size": 4, "num_train_epochs": 1},
    }
    return AlignRecipe(**{**values, **changes})


def message(recipe: AlignRecipe | SftRecipe) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(recipe)
    return str(caught.value)


# -- shares ------------------------------------------------------------------------------------------------------------


def test_shares_of_the_loss_are_those_of_the_rows_that_a_run_draws(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, tmp_path / "o", weights="tokens")
    plan = make_plan(recipe)
    counted = dict.fromkeys(plan.data.route_names, 0)
    for step in range(plan.steps):
        for source, row in plan.mixture.rows_of_step(step):
            counted[plan.data.sources[source].route] += sum(plan.data.rows[source][row].response_mask)
    total = sum(counted.values())
    expected = loss_shares(recipe, plan.data)
    assert {name: count / total for name, count in counted.items()} == pytest.approx(expected, rel=0.05)
    assert expected["domain"] < 0.05


def test_shares_of_the_loss_with_weights(world: Path, tmp_path: Path) -> None:
    data = make_plan(recipe_of(world, tmp_path / "o")).data
    assert loss_shares(recipe_of(world, tmp_path), data) == {"general": 0.5, "domain": 0.5}
    factors = recipe_of(world, tmp_path, weights={"general": 1.0, "domain": 3.0})
    assert loss_shares(factors, data) == {"general": 0.25, "domain": 0.75}


def test_a_route_with_little_of_the_loss_is_warned_about(world: Path, tmp_path: Path, capsys: Any) -> None:
    check(recipe_of(world, tmp_path / "o", weights="tokens"))
    assert "warning: route domain has" in capsys.readouterr().out
    check(recipe_of(world, tmp_path / "o", weights="routes"))
    assert "warning" not in capsys.readouterr().out


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
    check(recipe_of(world, tmp_path / "o", data=data, weights="tokens"))
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if not line.startswith((str(tmp_path), "warning", "  "))) <= 80
    assert "\x1b" not in shown
    lines = [line.split() for line in shown.splitlines()]
    (general,) = [line for line in lines if line[:2] == ["general", "90"]]
    (domain,) = [line for line in lines if line[:2] == ["domain", "31"]]
    assert general[4] == "90.0"
    assert domain[4] == "10.0"
    assert domain[-2] == "1"
    assert "more.jsonl: 1 rows dropped: prompt fills max_length: no response token left" in shown
    assert "[[ ten</s>]]" in shown
    (overlap,) = [line for line in lines if line[:2] == ["domain", "3"]]
    assert overlap[2:] == ["1", "2"]
    assert "steps     25 of 4 rows (4 x 1 x 1 process): 100 rows" in shown


def test_a_checked_recipe_leaves_nothing_behind(world: Path, tmp_path: Path) -> None:
    make_plan(recipe_of(world, tmp_path / "runs" / "o"))
    assert list(tmp_path.iterdir()) == []


def test_long_rows_are_shown_by_their_ends(world: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe_of(world, tmp_path / "o"))
    assert marked_row(plan.data.rows[1], 0, plan, styled=True).plain == "  Q0: how big is the blue kettle? ten</s>"
    text = "".join(str(n % 10) for n in range(1000))
    assert shortened(text).startswith(text[:100])
    assert shortened(text).endswith(text[-100:])
    assert len(shortened(text)) < 260


# -- estimates ---------------------------------------------------------------------------------------------------------


def test_weights_are_counted_as_they_are_loaded(world: Path, tmp_path: Path) -> None:
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "base").parameters())
    shutil.copytree(world / "base", tmp_path / "copy", dirs_exist_ok=True)
    make_checkpoint(tmp_path / "other", seed=1)
    shared = make_plan(recipe_of(world, tmp_path / "o", reference=tmp_path / "copy")).models
    assert [item.name for item in shared.weights] == [
        "base: student, reference, expert.domain",
        "expert.domain adapter",
        "student adapter",
    ]
    assert shared.weights[0].bytes == size * 4
    assert shared.weights[1].bytes == shared.weights[2].bytes == shared.trainable * 4
    own = make_plan(recipe_of(world, tmp_path / "o", expert=str(tmp_path / "other"), lora=None)).models
    assert [(item.name, item.bytes) for item in own.weights] == [
        ("base: reference", size * 4),
        ("expert.domain", size * 4),
        ("student, all weights", size * 4),
    ]
    assert own.trainable == size


def test_trainable_weights_are_those_of_a_real_adapter(world: Path, tmp_path: Path) -> None:
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"]))
    real = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    recipe = recipe_of(world, tmp_path / "o", lora={"rank": 2, "target_modules": ["q_proj", "down_proj"]})
    assert make_plan(recipe).models.trainable == real


def test_checkpointing_needs_less_memory_and_more_rows_need_more(world: Path, tmp_path: Path) -> None:
    def needed(**train: Any) -> float:
        plan = make_plan(recipe_of(world, tmp_path / "o", train={"max_steps": 3, **train}))
        return sum(item.bytes for item in memory(plan.models, plan.args, plan.data, plan.settings))

    assert needed(gradient_checkpointing=True) < needed() < needed(per_device_train_batch_size=32)


def test_kept_activations_are_near_what_a_llama_layer_keeps() -> None:
    from dae.estimates import KEPT_BYTES

    width, inner, tokens = 64, 176, 96

    def kept(layers: int) -> int:
        model = make_model(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_key_value_heads=4)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")).train()
        weights = {weight.untyped_storage().data_ptr() for weight in adapted.parameters()}
        held: dict[int, torch.Tensor] = {}

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            _out = adapted(input_ids=torch.zeros((1, tokens), dtype=torch.int64), use_cache=False, logits_to_keep=1)
        return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in weights)

    per_width, per_inner = KEPT_BYTES[torch.float32]
    assert kept(3) - kept(2) == pytest.approx(tokens * (per_width * width + per_inner * inner), rel=0.2)


def test_tokens_and_disk(world: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe_of(world, tmp_path / "o"))
    drawn = [row for step in range(plan.steps) for row in plan.mixture.rows_of_step(step)]
    real = sum(int(plan.data.rows[source].lengths[row]) for source, row in drawn)
    assert tokens_of_run(plan.data, len(drawn), plan.data.route_names) == pytest.approx(real, rel=0.02)
    result, checkpoints = disk(recipe_of(world, tmp_path / "o"), plan.models, plan.args)
    assert checkpoints.bytes == 3 * 3 * result.bytes


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (14.5e9, "14.5 GB"), (2e13, "2e+04 GB")]
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert in_words(count) == words


# -- overlap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a"}, ("", "a")),
        ({"prompt": "p", "completion": "c", "messages": None}, ("p", "c")),
        ({"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "tool", "content": "c"}]}, ("p", "c")),
        (
            {"messages": [
                {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
            ]},
            ("a\nb\nc", "d"),
        ),
    ],
)  # fmt: skip
def test_parts_of_a_record(record: dict[str, Any], expected: tuple[str, str]) -> None:
    assert parts(record) == expected


def test_case_and_white_space_make_no_other_row() -> None:
    assert normalised(" Straße\n\t A ") == normalised("STRASSE a")
    assert normalised("ab") != normalised("a b")


def test_rows_without_prompts_share_no_prompt(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    held = write_rows(tmp_path / "b.jsonl", [{"text": "One "}, {"text": "three"}])
    overlap = overlaps(DataRecipe(train=[rows], eval={"train": [held]}))["train"]  # type: ignore[call-arg]
    assert (overlap.rows, overlap.same_row, overlap.same_prompt) == (2, 1, 0)


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
    assert "has only 16 positions; set data.max_length=16" in positions
    assert "was made for another" in message(recipe_of(world, tmp_path / "o", base=other))
    assert "lora.target_modules" in message(recipe_of(world, tmp_path / "o", lora={"target_modules": "nothing_here"}))
    assert "fewer than the" in message(recipe_of(world, tmp_path / "o", train={"gradient_accumulation_steps": 4096}))
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in message(recipe_of(world, tmp_path / "file"))


def test_an_sft_recipe_is_checked_too(world: Path, tmp_path: Path, capsys: Any) -> None:
    check(SftRecipe(base=world / "base", output=tmp_path / "o", data={"train": world / "domain.jsonl"}))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert "0 through teachers" in shown


# -- the run folder ----------------------------------------------------------------------------------------------------


def test_an_output_that_holds_another_run_or_a_living_one_is_refused(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, tmp_path / "o")
    plan = make_plan(recipe)
    run = RunFolder(recipe.output)
    begun: dict[str, Any] = {"base": recipe.base, "data": plan.data.inputs, "processes": 8}
    with run.claim("align", resolved_yaml(recipe), fingerprints(recipe), **begun):
        assert "held by a live process" in message(recipe)
        (run.checkpoints_dir / "step-000001").mkdir()
        before = sorted(path.name for path in run.path.rglob("*"))
    make_plan(recipe)  # the same run, however many processes began it
    other = recipe_of(world, tmp_path / "o", temperature=2.0)
    assert "temperature: 1.0 -> 2.0" in message(other)
    assert sorted(path.name for path in run.path.rglob("*")) == before
