"""lm-eval through our door: right scores, nothing printed, nothing left changed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from dae_eval.harness import TASKS, score_tasks
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dae.demo import world
from dae.demo.tokenizer import build_tokenizer
from kd.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "heldout").mkdir()
    for name, records in world.files():
        if name.startswith("heldout/"):
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records[:24]))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.5,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> list[float]:
    """Accuracy from the definition: one choice at a time, no padding."""
    scores = []
    for line in path.read_text().splitlines():
        document = json.loads(line)
        sums = []
        for choice in document["choices"]:
            start = len(tokenizer(document["context"]).input_ids)
            ids = torch.tensor([tokenizer(document["context"] + " " + choice).input_ids])
            logs = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
            sums.append(sum(logs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
        scores.append(float(int(np.argmax(sums)) == document["gold"]))
    return scores


def test_scores_equal_the_definition(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = ["world_sorting", "world_category", "world_compatibility"]
    results = score_tasks(model, tokenizer, tasks, metadata={"world": str(folder)}, batch_size=7)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    model.eval()
    assert list(results) == tasks
    for task, scores in results.items():
        expected = by_hand(model, tokenizer, folder / "heldout" / f"{task.removeprefix('world_')}.jsonl")
        assert [document.score for document in scores.documents] == expected
        assert 0 < scores.mean < 1
        assert scores.mean == pytest.approx(sum(expected) / len(expected))
        assert [document.id for document in scores.documents] == list(range(24))
        assert len({document.hash for document in scores.documents}) == 24
        assert (scores.version, scores.metric) == ("1", "acc")


def global_random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def test_nothing_is_left_changed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = global_random_states()
    limited = score_tasks(model, tokenizer, ["world_sorting"], metadata={"world": str(folder)}, limit=5)
    assert [module.training for module in model.modules()] == modes
    assert global_random_states() == states
    assert len(limited["world_sorting"].documents) == 5


def test_every_skill_and_kind_has_its_task() -> None:
    tasks = {path.stem for path in (TASKS / "world").glob("[a-z]*.yaml")}
    assert tasks == set(world.GENERAL_SKILLS + world.SHOP_KINDS)


def test_unknown_task_and_metric_are_told(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    with pytest.raises(UserError, match=r"no task world_sortin;.*world_sorting"):
        score_tasks(model, tokenizer, ["world_sortin"], metadata={"world": str(folder)})
    with pytest.raises(UserError, match=r"world_sorting: no metric 'f1'; it has acc"):
        score_tasks(model, tokenizer, ["world_sorting"], metadata={"world": str(folder)}, metric="f1", limit=2)
