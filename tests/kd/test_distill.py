"""`dae distill` from recipe to finished run, on pico models; and its loss against the definition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation import as_batch, assert_same, gradients, make_rows, step_loss
from peft import PeftModel
from pico import make_checkpoint, make_tokenizer
from safetensors.torch import load_file
from stages import build, check_checkpoints
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from worlds import SHOP_WORDS, make_adapter, metrics_of
from worlds import make_rows as write_rows

import kd.training.publishing
from kd.config.loading import load_recipe
from kd.data.batches import predicting_positions
from kd.errors import UserError
from kd.models.forward import final_hidden_states, head_of
from kd.models.roles import LoadSettings
from kd.runs.checkpoints import Checkpoints
from kd.stages.distill import distill
from kd.stages.distill_recipe import DistillRecipe
from kd.training.objective import Objective, route_sums
from kd.training.verify import Verification, verify_saved

BOTH = {"attention": {"weight": 0.5}, "hidden": {"weight": 0.5, "loss": "mse"}}
DOUBLE = LoadSettings(torch.float64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a deeper and wider teacher with a padded vocabulary and more heads, and rows."""
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "base")
    make_checkpoint(
        folder / "teacher",
        vocab_size=320,
        seed=5,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=8,
        head_dim=4,
    )
    make_checkpoint(folder / "experts", "mixtral", seed=6)
    write_rows(folder / "rows.jsonl", 1, 96, SHOP_WORDS)
    write_rows(folder / "heldout.jsonl", 2, 16, SHOP_WORDS)
    return folder


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result is loaded with plain transformers and peft and compared, not in a fresh process: that is slow."""

    def compare(
        folder: Path, ids: Sequence[int], expected_TV: Tensor, _settings: LoadSettings, _base: Any = None
    ) -> None:
        config = folder / "adapter_config.json"
        base = json.loads(config.read_text())["base_model_name_or_path"] if config.exists() else folder
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if config.exists():
            model = PeftModel.from_pretrained(model, str(folder))
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(torch.tensor([ids])).logits[0], expected_TV, rtol=0, atol=1e-4)

    monkeypatch.setattr(kd.training.publishing, "verify_saved", compare)


def recipe_of(world: Path, output: Path | None = None, **changes: Any) -> DistillRecipe:
    values: dict[str, Any] = {
        "base": world / "base",
        "teacher": world / "teacher",
        "output": output or world / "unused",
        "data": {"max_length": 48, "train": world / "rows.jsonl"},
        "lora": {"rank": 4},
        "train": {
            "per_device_train_batch_size": 8,
            "max_steps": 12,
            "save_steps": 3,
            "logging_steps": 3,
            "learning_rate": 1e-2,
            **changes.pop("train", {}),
        },
    }
    return DistillRecipe(**{**values, **changes})


def losses_of(folder: Path, name: str) -> list[float]:
    return [line[f"train/{name}"] for line in metrics_of(folder) if f"train/{name}" in line]


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
def test_the_student_comes_to_match_a_larger_teacher(world: Path, tmp_path: Path, lora: bool) -> None:
    settings: dict[str, Any] = {} if lora else {"lora": None}
    data = {"max_length": 48, "train": world / "rows.jsonl", "eval": {"train": world / "heldout.jsonl"}}
    result = distill(recipe_of(world, tmp_path / "o", data=data, train={"max_steps": 40, "save_steps": 20}, **settings))
    held_out = [line["eval_train_kl"] for line in metrics_of(result.path) if "eval_loss" in line]
    start = result.summary["initial_kl"]["train"]
    assert start > 0.5 and held_out[-1] < 0.9 * start
    inputs = json.loads((result.path / "provenance.json").read_text())["inputs"]
    assert inputs.keys() == {"base", "teacher"} and inputs["base"] != inputs["teacher"]
    assert f"| teacher | `{world / 'teacher'}` | `{inputs['teacher']}` |" in (result.path / "README.md").read_text()
    again = distill(recipe_of(world, tmp_path / "o", data=data, train={"max_steps": 40, "save_steps": 20}, **settings))
    assert again.summary == result.summary


@pytest.mark.parametrize("lora", [True, False])
def test_terms_are_logged_alone_and_fall_and_projections_are_not_published(
    world: Path, tmp_path: Path, lora: bool
) -> None:
    settings: dict[str, Any] = {} if lora else {"lora": None}
    recipe = recipe_of(world, tmp_path / "o", train={"max_steps": 30, "save_steps": 15}, **BOTH, **settings)
    folder = distill(recipe).path
    for name in ("attention", "hidden", "kl"):
        values = losses_of(folder, name)
        assert len(values) == 10 and values[-1] < 0.95 * values[0], name
    for total, kl, attention, hidden in zip(*(losses_of(folder, n) for n in ("loss", "kl", *BOTH)), strict=True):
        assert total == pytest.approx(kl + 0.5 * attention + 0.5 * hidden, rel=1e-5)
    (weights,) = folder.glob("*.safetensors")
    assert not [name for name in load_file(weights) if "training_only" in name]
    kept = load_file(folder / "checkpoints" / "step-000030" / "training_only.safetensors")
    assert {name: list(weight.shape) for name, weight in kept.items()} == {"0.weight": [24, 16], "1.weight": [24, 16]}


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    settings: dict[str, Any] = {} if lora else {"lora": None}
    whole = distill(recipe_of(world, tmp_path / "whole", **BOTH, **settings)).path
    seal, sealed = Checkpoints.seal, []

    def stop_after_two(run: Checkpoints, staging: Path, step: int) -> Path:
        sealed.append(seal(run, staging, step))
        if len(sealed) == 2:
            raise ConnectionAbortedError
        return sealed[-1]

    recipe = recipe_of(world, tmp_path / "stopped", **BOTH, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "seal", stop_after_two)
        with pytest.raises(ConnectionAbortedError):
            distill(recipe)
    stopped = distill(recipe).path
    assert [line["step"] for line in metrics_of(stopped)] == [line["step"] for line in metrics_of(whole)]
    for folder in (".", "checkpoints/step-000012"):
        for file in (whole / folder).glob("*.safetensors"):
            first, second = load_file(file), load_file(stopped / folder / file.name)
            assert first.keys() == second.keys() and first
            assert all(torch.equal(first[name], second[name]) for name in first), file
    assert (whole / "checkpoints/step-000012/training_only.safetensors").is_file()


def test_how_a_step_is_cut_into_micro_batches_does_not_matter_to_a_run(world: Path, tmp_path: Path) -> None:
    results = []
    for size in (8, 4, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 4}
        folder = distill(recipe_of(world, tmp_path / str(size), train={**cut, "save_steps": 4}, **BOTH)).path
        results.append((load_file(folder / "adapter_model.safetensors"), [losses_of(folder, n) for n in BOTH]))
    for weights, losses in results[1:]:
        for ours, theirs in zip(losses, results[0][1], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][0][name], rtol=0, atol=2e-3)


def test_gradient_checkpointing_does_not_matter_to_a_run(world: Path, tmp_path: Path) -> None:
    results = []
    ways: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    ways.append({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}})
    for place, way in enumerate(ways):
        recipe = recipe_of(world, tmp_path / str(place), train={"max_steps": 3, **way}, **BOTH)
        results.append(load_file(distill(recipe).path / "adapter_model.safetensors"))
    for weights in results[1:]:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][name], rtol=0, atol=1e-5)


def test_a_mixture_of_experts_can_teach_and_learn(world: Path, tmp_path: Path) -> None:
    taught = distill(recipe_of(world, tmp_path / "taught", teacher=world / "experts", **BOTH)).path
    assert losses_of(taught, "kl")[-1] < losses_of(taught, "kl")[0]
    recipe = recipe_of(world, tmp_path / "learner", base=world / "experts", lora=None, attention={"weight": 1.0})
    learner = distill(recipe).path
    assert losses_of(learner, "kl")[-1] < losses_of(learner, "kl")[0]
    assert losses_of(learner, "attention")[-1] < losses_of(learner, "attention")[0]


@pytest.mark.slow
def test_a_fresh_process_opens_a_mixture_that_was_trained(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof as a user's run has it; the other tests here stay in this process."""
    found: list[Verification] = []
    monkeypatch.setattr(
        kd.training.publishing, "verify_saved", lambda *arguments: found.append(verify_saved(*arguments))
    )
    distill(recipe_of(world, tmp_path / "o", base=world / "experts", train={"max_steps": 2, "save_steps": 2}))
    assert [one.relative < 1e-5 and one.scale > 0.1 for one in found] == [True]


# -- the loss ----------------------------------------------------------------------------------------------------------


def defined_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], recipe: DistillRecipe) -> Tensor:
    """Position by position, from whole models' full logits over the vocabulary that both have."""
    temperature, skew, total, count = recipe.temperature, recipe.skew, torch.zeros((), dtype=torch.float64), 0
    for row, mask in zip(batch["input_ids"], predicting_positions(batch), strict=True):
        with torch.no_grad():
            theirs = teacher(input_ids=row[None]).logits[0]
        ours = student(input_ids=row[None]).logits[0]
        for t in mask.nonzero().flatten().tolist():
            vocabulary = min(ours.shape[1], theirs.shape[1])
            q = (theirs[t, :vocabulary] / temperature).softmax(-1)
            p = (ours[t, :vocabulary] / temperature).softmax(-1)
            mixed = {"skewed_forward_kl": skew * q + (1 - skew) * p, "skewed_reverse_kl": skew * p + (1 - skew) * q}
            first, second = {
                "forward_kl": (q, p),
                "reverse_kl": (p, q),
                "skewed_forward_kl": (q, mixed["skewed_forward_kl"]),
                "skewed_reverse_kl": (p, mixed["skewed_reverse_kl"]),
            }[recipe.divergence]
            divergence = (first * (first / second).log()).sum()
            ntp = -ours[t, :vocabulary].log_softmax(-1)[row[t + 1]]
            total = total + (1 - recipe.lambda_) * ntp + recipe.lambda_ * temperature**2 * divergence
            count += 1
    return total / count


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl"])
@pytest.mark.parametrize(("lora", "weight", "temperature"), [(True, 1.0, 1.0), (False, 0.6, 2.0)])
def test_loss_and_gradient_equal_the_definition(
    world: Path, divergence: str, lora: bool, weight: float, temperature: float
) -> None:
    changes: dict[str, Any] = {"divergence": divergence, "lambda": weight, "temperature": temperature}
    recipe = recipe_of(world, **changes, **({"skew": 0.3} if "skewed" in divergence else {}))
    student, teacher, objective = build(recipe, DOUBLE)
    if not lora:
        student.requires_grad_(True)
    student, batch = student.double().eval(), as_batch(make_rows(4))
    expected = defined_loss(student, teacher, batch, recipe)
    expected.backward()
    wanted = gradients(student)
    loss = step_loss(student, [batch], objective)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-7, atol=1e-8)
    assert_same(gradients(student), wanted)


def test_a_model_that_teaches_itself_has_a_gradient_of_exactly_zero(world: Path) -> None:
    recipe = recipe_of(world, teacher=world / "base", attention={"weight": 1.0}, hidden={"loss": "mse"})
    student, _, objective = build(recipe, LoadSettings(torch.float32))
    sums = route_sums(student.train(), as_batch(make_rows()), objective)
    sums.loss.sum().backward()
    assert sums.loss.tolist() == [0.0] and [term.item() for term in sums.terms] == [0.0, 0.0]
    found = gradients(student)
    assert found and not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("lora", [True, False])
def test_micro_batches_do_not_matter_with_every_term_on(world: Path, lora: bool) -> None:
    recipe = recipe_of(world, **{"lambda": 0.7}, **BOTH, **({} if lora else {"lora": None}))
    student, _, objective = build(recipe, DOUBLE)
    student, rows, results = student.double(), make_rows(8), []
    for size in (8, 4, 2, 1):
        batches = [as_batch(rows[i : i + size]) for i in range(0, 8, size)]
        results.append((step_loss(student, batches, objective), gradients(student)))
    assert [name for name in results[0][1] if "training_only" in name]
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-10, atol=1e-12)
        assert_same(found, results[0][1])


def test_a_micro_batch_without_response_tokens_contributes_nothing(world: Path) -> None:
    student, _, objective = build(recipe_of(world, **BOTH), DOUBLE)
    student, rows = student.double(), make_rows()
    silent = [{**row, "response_mask": row["response_mask"] & False} for row in make_rows(3, seed=5)]
    alone = step_loss(student, [as_batch(rows)], objective)
    wanted = gradients(student)
    assert step_loss(student, [as_batch(silent), as_batch(rows)], objective) == alone
    assert_same(gradients(student), wanted, 0.0)


def test_a_frozen_teacher_runs_once_and_gets_no_gradient(world: Path) -> None:
    student, teacher, objective = build(recipe_of(world, **BOTH), LoadSettings(torch.float32))
    calls: list[bool] = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    route_sums(student, as_batch(make_rows()), objective).loss.sum().backward()
    assert calls == [False]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())


def test_plain_next_token_loss_asks_no_teacher(world: Path) -> None:
    objective = build(recipe_of(world, **{"lambda": 0.0}), LoadSettings(torch.float32))[2]
    assert not objective.trains_with_teachers
    assert Objective(objective.routes, objective.token_loss, terms=build_terms(world)).trains_with_teachers


def build_terms(world: Path) -> Any:
    return build(recipe_of(world, **BOTH), LoadSettings(torch.float32))[2].terms


def test_final_hidden_states_and_head_of_a_mixture_of_experts_give_its_logits(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "experts").eval()
    batch = as_batch(make_rows())
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(head_of(model).logits(final_hidden_states(model, inputs)), expected)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(recipe: DistillRecipe) -> str:
    with pytest.raises(UserError) as caught:
        check_checkpoints(recipe)
    return str(caught.value)


def test_checkpoints_that_do_not_belong_together_are_refused(world: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", world / "base")
    words = refusal(recipe_of(world, teacher=tmp_path / "adapter"))
    assert words.startswith(f"teacher: {tmp_path / 'adapter'}: is an adapter, and a full checkpoint is wanted here")
    make_checkpoint(tmp_path / "other")
    make_tokenizer(270).save_pretrained(tmp_path / "other")
    words = refusal(recipe_of(world, teacher=tmp_path / "other"))
    assert words.startswith(f"teacher {tmp_path / 'other'}: ") and "`cross_tokenizer: uld`" in words


def test_layers_and_heads_that_are_not_there_are_refused_before_weights_are_read(world: Path, tmp_path: Path) -> None:
    words = refusal(recipe_of(world, attention={"layers": [[0, 0], [1, 3]]}))
    assert words == "attention.layers: [1, 3]: the teacher has no layer 3; its layers are 0 to 2"
    words = refusal(recipe_of(world, hidden={"layers": [[2, 0]]}))
    assert words == "hidden.layers: [2, 0]: the student has no layer 2; its layers are 0 to 1"
    make_checkpoint(tmp_path / "six", num_attention_heads=6, num_key_value_heads=2, hidden_size=24)
    assert "4 attention heads and the teacher 6" in refusal(recipe_of(world, teacher=tmp_path / "six", **BOTH))
    check_checkpoints(recipe_of(world, teacher=tmp_path / "six", hidden={}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.3}, "beta = 0.3: is read with `divergence: jsd` only"),
        ({"skew": 0.3}, "skew = 0.3: is read with `divergence: skewed_forward_kl` or `skewed_reverse_kl` only"),
        ({"skew": 0.0, "divergence": "skewed_reverse_kl"}, "skew = 0.0: must be at least 0.001"),
        ({"divergence": "kl"}, "expected forward_kl, reverse_kl, jsd, skewed_"),
        ({"attention": {"layers": [[0, 1, 2]]}}, "expected even, or a list of"),
        ({"attention": {"layers": [[0, -1]]}}, "expected even, or a list of"),
        ({"attention": {"weight": 0.0}}, "attention.weight = 0.0: must be above 0"),
        ({"hidden": {"loss": "l1"}}, "expected cosine or mse"),
        (
            {"cross_tokenizer": "uld", "lambda": 0.5, "temperature": 2.0},
            "temperature = 2.0: is not read with `cross_tokenizer: uld`",
        ),
        ({"cross_tokenizer": "uld", "lambda": 0.5, "divergence": "jsd"}, "divergence = 'jsd': is not read with"),
        (
            {"cross_tokenizer": "uld", "lambda": 0.5, "attention": {}},
            "attention = {}: needs the same tokens on both sides",
        ),
        (
            {"cross_tokenizer": "uld", "lambda": 0.5, "data": {"train": "a", "packing": True}},
            "two tokenizers cannot be packed",
        ),
        ({"cross_tokenizer": "uld"}, "lambda: with `cross_tokenizer: uld` only the next-token loss says which tokens"),
        ({"data": {"train": "a", "general": "b"}}, "unknown key or route; the routes are train"),
        ({"data": {}}, "no training rows for `train`: add --data PATH"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: dict[str, Any], words: str) -> None:
    flags = {"base": "b", "teacher": "t", "data": {"train": "rows.jsonl"}, **changes}
    with pytest.raises(UserError) as caught:
        load_recipe(DistillRecipe, None, flags)
    assert words in str(caught.value)
