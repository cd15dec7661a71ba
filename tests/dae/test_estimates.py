"""`dae check`: estimates of memory, tokens and disk, and the overlap of eval sets with training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checked_world import make_checked_world, recipe_of, write_rows
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint, make_model
from stages import plan_of
from transformers import AutoModelForCausalLM

from dae.checking import estimates
from dae.checking.check import in_words
from dae.checking.estimates import bytes_of_logits, disk, memory, tokens_of_run, trainable, weights
from dae.checking.overlap import normalised, overlaps, parts
from kd.config.data_recipe import DataRecipe
from kd.data.examples import SourceReport
from kd.losses import chunked


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checked_world(tmp_path_factory.mktemp("world"))


def test_weights_are_counted_as_they_are_loaded(world: Path, tmp_path: Path) -> None:
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "base").parameters())
    shutil.copytree(world / "base", tmp_path / "copy", dirs_exist_ok=True)
    make_checkpoint(tmp_path / "other", seed=1)
    shared = plan_of(recipe_of(world, tmp_path / "o", reference=tmp_path / "copy"))
    assert [item.name for item in weights(shared)] == [
        "base: student, reference, expert.domain",
        "expert.domain adapter",
        "student adapter",
    ]
    assert weights(shared)[0].bytes == size * 4
    assert weights(shared)[1].bytes == weights(shared)[2].bytes == trainable(shared.roles.student) * 4
    own = plan_of(recipe_of(world, tmp_path / "o", expert=str(tmp_path / "other"), lora=None))
    assert [(item.name, item.bytes) for item in weights(own)] == [
        ("base: reference", size * 4),
        ("expert.domain", size * 4),
        ("student, all weights", size * 4),
    ]
    assert trainable(own.roles.student) == size


def test_trainable_weights_are_those_of_a_real_adapter(world: Path, tmp_path: Path) -> None:
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"]))
    real = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    recipe = recipe_of(world, tmp_path / "o", lora={"rank": 2, "target_modules": ["q_proj", "down_proj"]})
    assert trainable(plan_of(recipe).roles.student) == real


def test_checkpointing_needs_less_memory_and_more_rows_need_more(world: Path, tmp_path: Path) -> None:
    def needed(**train: Any) -> float:
        recipe = recipe_of(world, tmp_path / "o", train={"max_steps": 3, **train})
        plan = plan_of(recipe)
        return sum(item.bytes for item in memory(plan))

    assert needed(gradient_checkpointing=True) < needed() < needed(per_device_train_batch_size=32)


def test_logits_take_a_chunk_or_all_tokens_whichever_is_less() -> None:
    chunk = chunked.CPU_LOGITS_ELEMENTS
    assert bytes_of_logits(3, 500, "cpu") == 4 * (estimates.LIVE_CHUNKS + estimates.LIVE_BLOCKS) * 3 * 500
    assert bytes_of_logits(10**6, 500, "cpu") == bytes_of_logits(2 * 10**6, 500, "cpu") > 4 * 2 * chunk
    wide = chunk // chunked.FEWEST_CHUNK_TOKENS * 4
    assert bytes_of_logits(10**6, wide, "cpu") > 4 * 2 * 4 * chunk


def test_kept_activations_are_near_what_a_llama_layer_keeps() -> None:
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

    per_width, per_inner = estimates.KEPT_BYTES[torch.float32]
    assert kept(3) - kept(2) == pytest.approx(tokens * (per_width * width + per_inner * inner), rel=0.2)


def test_tokens_and_disk(world: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe_of(world, tmp_path / "o"))
    drawn = [row for step in range(plan.steps) for row in plan.mixture.rows_of_step(step)]
    real = sum(int(plan.data.rows[source].lengths[row]) for source, row in drawn)
    assert tokens_of_run(plan.data, len(drawn), plan.data.route_names) == pytest.approx(real, rel=0.02)
    result, checkpoints = disk(plan)
    assert checkpoints.bytes == 3 * 3 * result.bytes


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (14.5e9, "14.5 GB"), (2e13, "20 TB")]
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert in_words(count) == words


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
    reports = {"train": [SourceReport(str(rows))], "eval.train": [SourceReport(str(held))]}
    overlap = overlaps(DataRecipe(train=[rows], eval={"train": [held]}), reports)["train"]  # type: ignore[call-arg]
    assert (overlap.same_row, overlap.same_prompt) == (1, 0)


def test_rows_that_were_dropped_overlap_with_nothing(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in ("one", "two", "three")])
    held = write_rows(tmp_path / "b.jsonl", [{"text": text} for text in ("one", "two", "three")])
    reports = {"train": [SourceReport("a", dropped_at=[0])], "eval.train": [SourceReport("b", dropped_at=[2])]}
    overlap = overlaps(DataRecipe(train=[rows], eval={"train": [held]}), reports)["train"]  # type: ignore[call-arg]
    assert overlap.same_row == 1
