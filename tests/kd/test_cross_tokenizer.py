"""Universal Logit Distillation against its definition, and rows in two tokenizers' tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation import assert_same, gradients, step_loss
from pico import make_checkpoint, make_model, make_tokenizer
from stages import build, check_checkpoints, stage_of
from torch import Tensor, nn
from worlds import GENERAL_WORDS, metrics_of
from worlds import make_rows as write_rows

import kd.training.publishing
from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.examples import load_rows
from kd.data.mixing import MixedRows, collate
from kd.data.paired_rows import PairedRows, load_paired_rows
from kd.data.stage_data import StageData
from kd.errors import UserError
from kd.losses.cross_tokenizer import CrossTokenizerLoss, aligned_positions, differentiable_logits, uld_sum
from kd.models.head import Head
from kd.models.roles import LoadSettings, Role
from kd.stages.distill import distill
from kd.stages.distill_recipe import DistillRecipe

M, D, E = 7, 5, 4


def defined_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of one token: sorted probabilities, the shorter list filled up with zeros, entry by entry."""
    p = sorted((ours.exp() / ours.exp().sum()).unbind(), key=Tensor.item, reverse=True)
    q = sorted((theirs.exp() / theirs.exp().sum()).unbind(), key=Tensor.item, reverse=True)
    zero = torch.zeros((), dtype=torch.float64)
    longest = max(len(p), len(q))
    p, q = p + [zero] * (longest - len(p)), q + [zero] * (longest - len(q))
    return sum(((a - b).abs() for a, b in zip(p, q, strict=True)), zero)


@pytest.mark.parametrize(("vocabulary", "teacher_vocabulary"), [(13, 13), (13, 29), (29, 13)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
def test_value_and_gradients_equal_the_definition(
    vocabulary: int, teacher_vocabulary: int, scale: float, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theirs, teacher_head = normal(M, E), Head(normal(teacher_vocabulary, E))
    inputs = [t.requires_grad_() for t in (normal(M, D), normal(vocabulary, D), normal(vocabulary))]
    hidden, weight, bias = inputs
    results = []
    for chunk_tokens in (1, 3, 100):
        total = uld_sum(hidden, Head(weight, bias, scale, softcap), theirs, teacher_head, chunk_tokens=chunk_tokens)
        results.append((total, *torch.autograd.grad(total, inputs)))
    logits = scale * (torch.einsum("md,vd->mv", hidden, weight) + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    teacher_logits = theirs @ teacher_head.weight_VD.T
    expected = torch.zeros((), dtype=torch.float64)
    for m in range(M):
        expected = expected + defined_distance(logits[m], teacher_logits[m])
    for found in results:
        for ours, wanted in zip(
            found, (expected, *torch.autograd.grad(expected, inputs, retain_graph=True)), strict=True
        ):
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_logits_are_those_of_the_head() -> None:
    torch.manual_seed(0)
    for bias, scale, softcap in ((None, 1.0, None), (torch.randn(9), 0.3, 2.0)):
        head, hidden = Head(torch.randn(9, D), bias, scale, softcap), torch.randn(M, D)
        torch.testing.assert_close(differentiable_logits(head, hidden), head.logits(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_distributions_cost_exactly_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(M, D, dtype=dtype, requires_grad=True), torch.randn(13, D, dtype=dtype)
    total = uld_sum(hidden, Head(weight), hidden.detach(), Head(weight))
    total.backward()
    assert total == 0 and hidden.grad is not None and not hidden.grad.any()
    other_tokens = Head(weight[torch.randperm(13)])  # which token is which is not looked at
    assert uld_sum(hidden, Head(weight), hidden.detach(), other_tokens) < 1e-5


def test_no_tokens_give_a_zero_that_is_connected() -> None:
    hidden = torch.randn(0, D, requires_grad=True)
    total = uld_sum(hidden, Head(torch.randn(9, D)), torch.randn(0, E), Head(torch.randn(8, E)))
    total.backward()
    assert total == 0 and hidden.grad is not None


def test_the_first_response_tokens_of_a_row_are_partners() -> None:
    ours = {"response_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0]]).bool()}
    theirs = {"response_mask": torch.tensor([[0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1, 1]]).bool()}
    ours_BT, theirs_BT = aligned_positions(ours, theirs)
    assert ours_BT.int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 1, 0]]
    assert theirs_BT.int().tolist() == [[0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 0]]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_those_that_each_tokenizer_gives_alone(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 1, 30, GENERAL_WORDS)
    with file.open("a") as rows:
        rows.write(json.dumps({"prompt": "The blue kettle costs nine coins. " * 8, "completion": " two cups."}) + "\n")
    student, teacher = make_tokenizer(), make_tokenizer(270)
    source, settings = SourceRecipe(path=str(file)), DataRecipe(max_length=200)
    (paired,), (report,) = load_paired_rows([source], student, settings, teacher_tokenizer=teacher)
    assert isinstance(paired, PairedRows)
    (ours,), (expected,) = load_rows([source], student, settings)
    (theirs,), _ = load_rows([source], teacher, settings)
    assert len(theirs) == 30 and len(ours) == 31  # the long one fits in the student's tokens alone
    assert [paired[row] for row in range(30)] == [ours[row] for row in range(30)]
    assert [paired.teacher[row] for row in range(30)] == [theirs[row] for row in range(30)]
    assert (report.records, report.kept, report.truncated) == (31, 30, 0)
    assert report.dropped == {"in the teacher's tokens: prompt fills max_length: no response token left": 1}
    assert expected.kept == 31 and not (paired.lengths == paired.teacher.lengths).all()
    both = PairedRows.concatenate([paired, paired])
    assert len(both) == 60 and both.teacher[45] == paired.teacher[15]


def test_a_source_without_a_row_on_both_sides_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "The blue kettle costs nine coins. " * 8, "completion": " two cups."}) + "\n")
    settings = DataRecipe(max_length=200)
    with pytest.raises(UserError, match=r"none of its 1 rows has a response token \(1 x in the teacher's tokens"):
        load_paired_rows(
            [SourceRecipe(path=str(file))], make_tokenizer(), settings, teacher_tokenizer=make_tokenizer(270)
        )


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "base")
    teacher = make_model("qwen3", seed=5, vocab_size=300, num_hidden_layers=3)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4.0)  # surer than the student, which is all that ULD can see
    teacher.save_pretrained(folder / "teacher")
    make_tokenizer(270).save_pretrained(folder / "teacher")
    write_rows(folder / "rows.jsonl", 1, 64, GENERAL_WORDS)
    write_rows(folder / "heldout.jsonl", 2, 16, GENERAL_WORDS)
    return folder


def recipe_of(world: Path, output: Path, **changes: Any) -> DistillRecipe:
    data = {"max_length": 64, "train": world / "rows.jsonl", "eval": {"train": world / "heldout.jsonl"}}
    train = {"max_steps": 20, "save_steps": 10, "logging_steps": 5, "learning_rate": 1e-2}
    values = {"base": world / "base", "teacher": world / "teacher", "output": output, "data": data, "train": train}
    return DistillRecipe(**{**values, "cross_tokenizer": "uld", "lambda": 0.6, "lora": {"rank": 4}, **changes})


def test_a_run_lowers_the_distance_to_a_teacher_with_other_tokens(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd.training.publishing, "verify_saved", lambda *_: None)
    check_checkpoints(recipe_of(world, tmp_path / "o"))
    folder = distill(recipe_of(world, tmp_path / "o", lora=None)).path
    lines = [line for line in metrics_of(folder) if "train/uld" in line]
    assert lines[-1]["train/uld"] < 0.9 * lines[0]["train/uld"]
    assert lines[-1]["train/ntp"] < lines[0]["train/ntp"] and "train/kl" not in lines[0]
    for line in lines:
        assert line["train/loss"] == pytest.approx(0.4 * line["train/ntp"] + 0.6 * line["train/uld"], rel=1e-5)
    held_out = [line["eval_train_uld"] for line in metrics_of(folder) if "eval_loss" in line]
    assert held_out[-1] < 0.95 * lines[0]["train/uld"]


def load_data(recipe: DistillRecipe) -> StageData:
    return stage_of(recipe).load_data(recipe, stage_of(recipe).inputs(recipe))


def batches_of(world: Path, tmp_path: Path, size: int) -> list[dict[str, Tensor]]:
    (rows,) = load_data(recipe_of(world, tmp_path)).rows
    mixed = MixedRows([rows], [0])
    picked = [mixed[(0, row)] for row in range(8)]
    return [collate(picked[i : i + size], pad_token_id=0, packing=False) for i in range(0, 8, size)]


def test_micro_batches_do_not_matter_and_the_loss_is_the_definition(world: Path, tmp_path: Path) -> None:
    model, teacher, objective = build(recipe_of(world, tmp_path), LoadSettings(torch.float64))
    student: nn.Module = model.double()
    results = []
    for size in (8, 4, 1):
        loss = step_loss(student, batches_of(world, tmp_path, size), objective)
        results.append((loss, gradients(student)))
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-10, atol=1e-12)
        assert_same(found, results[0][1])
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches_of(world, tmp_path, 1):
        with torch.no_grad():
            ours = student(batch["input_ids"]).logits[0][:-1][batch["response_mask"][0, 1:]]
            theirs = teacher(batch["teacher_input_ids"]).logits[0][:-1]
        theirs = theirs[batch["teacher_response_mask"][0, 1:]]
        labels = batch["input_ids"][0, 1:][batch["response_mask"][0, 1:]]
        count += len(labels)
        total += 0.4 * -ours.log_softmax(-1).gather(1, labels[:, None]).sum()
        for a, b in zip(ours, theirs, strict=False):  # what the longer side has over has no partner
            total += 0.6 * defined_distance(a, b)
    torch.testing.assert_close(results[0][0], total / count, rtol=1e-9, atol=1e-9)


def test_the_teacher_reads_its_own_tokens_without_gradient(world: Path, tmp_path: Path) -> None:
    student, _, objective = build(recipe_of(world, tmp_path), LoadSettings(torch.float32))
    (term,) = objective.terms
    assert isinstance(term, CrossTokenizerLoss) and isinstance(term.teacher, Role)
    (batch,) = batches_of(world, tmp_path, 8)
    seen = []
    term.teacher.model.register_forward_pre_hook(
        lambda _m, _a, inputs: seen.append((inputs["input_ids"], torch.is_grad_enabled())), with_kwargs=True
    )
    step_loss(student, [batch], objective)
    assert len(seen) == 1 and not seen[0][1] and torch.equal(seen[0][0], batch["teacher_input_ids"])
    assert batch["teacher_input_ids"].shape != batch["input_ids"].shape


def test_rows_that_the_teacher_has_no_embedding_for_are_refused(world: Path, tmp_path: Path) -> None:
    make_model("llama", vocab_size=100).save_pretrained(tmp_path / "small")
    make_tokenizer(288).save_pretrained(tmp_path / "small")
    with pytest.raises(
        UserError, match=rf"{tmp_path / 'small'}: its tokenizer gives token \d+, but the models share only 100"
    ):
        load_data(recipe_of(world, tmp_path / "o", teacher=tmp_path / "small"))
